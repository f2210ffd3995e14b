//! Where a PCI function is.

use core::{fmt, str::FromStr};

/// A PCI function's address, written `0000:00:05.0`; the segment may be left out where it is read.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Address {
    /// The segment, which Linux calls domain.
    pub segment: u16,
    /// The bus.
    pub bus: u8,
    /// The device (five bits) and the function (three).
    pub devfn: u8,
}

impl Address {
    /// Segment, bus, and device and function.
    #[must_use]
    pub fn parts(self) -> (u16, u8, u8) {
        (self.segment, self.bus, self.devfn)
    }

    /// The function whose routing ID is so many steps further.
    #[must_use]
    pub fn plus(self, steps: u16) -> Self {
        let [bus, devfn] = u16::from_be_bytes([self.bus, self.devfn]).wrapping_add(steps).to_be_bytes();
        Self { bus, devfn, ..self }
    }
}

/// What is no PCI address.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0:?} is no PCI address like 0000:00:05.0")]
pub struct AddressError(pub String);

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        read(text).ok_or_else(|| AddressError(text.to_owned()))
    }
}

fn read(text: &str) -> Option<Address> {
    let (segment, rest) = match text.matches(':').count() {
        2 => text.split_once(':')?,
        _ => ("0", text),
    };
    let (bus, rest) = rest.split_once(':')?;
    let (device, function) = rest.split_once('.')?;
    let device = u8::from_str_radix(device, 16).ok().filter(|device| *device < 32)?;
    let function = function.parse::<u8>().ok().filter(|function| *function < 8)?;
    let (segment, bus) = (u16::from_str_radix(segment, 16).ok()?, u8::from_str_radix(bus, 16).ok()?);
    Some(Address { segment, bus, devfn: device << 3 | function })
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { segment, bus, devfn } = self;
        write!(f, "{segment:04x}:{bus:02x}:{:02x}.{}", devfn >> 3, devfn & 7)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routing_ids_carry_into_the_bus() {
        let there: Address = "1:00:1f.7".parse().unwrap();
        assert_eq!(there.plus(1).to_string(), "0001:01:00.0");
    }

    #[test]
    fn addresses_are_read_with_and_without_a_segment() {
        for (text, whole) in
            [("0000:00:05.0", "0000:00:05.0"), ("1:02:1f.7", "0001:02:1f.7"), ("03:00.1", "0000:03:00.1")]
        {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), whole);
        }
        for bad in ["", "5.0", "00:20.0", "00:05.8", "00:05", "x:00:05.0", "0:0:0:05.0"] {
            assert_eq!(bad.parse::<Address>(), Err(AddressError(bad.to_owned())));
        }
    }
}

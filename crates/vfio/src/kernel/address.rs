//! PCI addresses as Linux writes them, and how a user names a device of the host.

use core::{fmt, str::FromStr};

use super::Door;

/// Where a PCI function is: `0000:00:04.0`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PciAddress {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

/// Text that is no address.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("`{0}` is no PCI address: write DOMAIN:BUS:DEVICE.FUNCTION in hexadecimal, as in 0000:00:04.0")]
pub struct NoPciAddress(String);

impl FromStr for PciAddress {
    type Err = NoPciAddress;

    /// The domain may be left out: it is 0 then.
    fn from_str(text: &str) -> Result<Self, NoPciAddress> {
        parse(text).ok_or_else(|| NoPciAddress(text.to_owned()))
    }
}

fn parse(text: &str) -> Option<PciAddress> {
    // The standard library takes a sign.
    let number = |digits: &str, most: usize| {
        let good = (1..=most).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
        good.then(|| u32::from_str_radix(digits, 16).ok()).flatten()
    };
    let byte = |digits: &str, limit: u8| u8::try_from(number(digits, 2)?).ok().filter(|byte| *byte < limit);
    let (place, function) = text.rsplit_once('.')?;
    let (place, device) = place.rsplit_once(':')?;
    let (domain, bus) = place.rsplit_once(':').unwrap_or(("0", place));
    Some(PciAddress {
        domain: number(domain, 8)?,
        bus: u8::try_from(number(bus, 2)?).ok()?,
        device: byte(device, 32)?,
        function: byte(function, 8)?,
    })
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { domain, bus, device, function } = self;
        write!(f, "{domain:04x}:{bus:02x}:{device:02x}.{function}")
    }
}

/// How a user names a device of the host: `0000:00:04.0`, with `,door=cdev` (its own node) or `,door=group` where it matters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HostDeviceName {
    /// Where it is.
    pub address: PciAddress,
    /// By which door it is to be had.
    pub door: Option<Door>,
}

/// Text that names no device.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NoHostDeviceName {
    /// It does not begin with an address.
    #[error(transparent)]
    Address(#[from] NoPciAddress),
    /// What follows the address is not known.
    #[error(
        "`{0}` is no option of a device of the host: there are door=cdev (/dev/vfio/devices) and door=group (/dev/vfio/N)"
    )]
    Option(String),
}

impl FromStr for HostDeviceName {
    type Err = NoHostDeviceName;

    fn from_str(text: &str) -> Result<Self, NoHostDeviceName> {
        let (address, option) = text.split_once(',').map_or((text, None), |(at, option)| (at, Some(option)));
        let door = match option {
            None => None,
            Some("door=cdev") => Some(Door::Device),
            Some("door=group") => Some(Door::Group),
            Some(other) => return Err(NoHostDeviceName::Option(other.to_owned())),
        };
        Ok(Self { address: address.parse()?, door })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written() {
        for (text, written) in [
            ("0000:00:04.0", "0000:00:04.0"),
            ("0:1:1f.7", "0000:01:1f.7"),
            ("ff:00.1", "0000:ff:00.1"),
            ("10000:e1:00.0", "10000:e1:00.0"),
        ] {
            assert_eq!(text.parse::<PciAddress>().unwrap().to_string(), written);
        }
    }

    #[test]
    fn other_text_is_refused() {
        for text in
            ["", "4", "00:04", "00:20.0", "00:04.8", "+0:04.0", "100:00.0", "0000:00:04.0 ", "::.", "../.."]
        {
            let refused = text.parse::<PciAddress>().unwrap_err();
            assert!(refused.to_string().contains("0000:00:04.0"), "{refused}");
        }
    }

    #[test]
    fn a_name_may_say_the_door() {
        let name = |text: &str| text.parse::<HostDeviceName>();
        assert_eq!(name("00:04.0").unwrap().door, None);
        assert_eq!(name("00:04.0,door=cdev").unwrap().door, Some(Door::Device));
        assert_eq!(name("00:04.0,door=group").unwrap().door, Some(Door::Group));
        assert!(name("00:04.0,door=front").unwrap_err().to_string().contains("door=group"));
        assert!(name("4,door=group").unwrap_err().to_string().contains("0000:00:04.0"));
    }
}

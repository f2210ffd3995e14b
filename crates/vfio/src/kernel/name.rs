//! How a user names a device of the host.

use core::str::FromStr;

use super::Door;
use crate::pci::address::{Address, AddressError};

/// How a user names a device of the host: `0000:00:04.0`, with `,door=cdev` (its own node) or `,door=group` where it matters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HostDeviceName {
    /// Where it is.
    pub address: Address,
    /// By which door it is to be had.
    pub door: Option<Door>,
}

/// Text that names no device.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NoHostDeviceName {
    /// It does not begin with an address.
    #[error(transparent)]
    Address(#[from] AddressError),
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
    fn a_name_may_say_the_door() {
        let name = |text: &str| text.parse::<HostDeviceName>();
        assert_eq!(name("00:04.0").unwrap().door, None);
        assert_eq!(name("00:04.0,door=cdev").unwrap().door, Some(Door::Device));
        assert_eq!(name("00:04.0,door=group").unwrap().door, Some(Door::Group));
        assert!(name("00:04.0,door=front").unwrap_err().to_string().contains("door=group"));
        assert!(name("4,door=group").unwrap_err().to_string().contains("no PCI address"));
    }
}

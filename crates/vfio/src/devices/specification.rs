//! A device in software, as a command line names it.

use core::str::FromStr;
use std::path::PathBuf;

use crate::pci::address::{Address, AddressError};

/// What can be named.
const FORMS: &str = "nvme,file=PATH[,ro][,addr=BDF], ioat[,addr=BDF] or test[,addr=BDF]";

/// A device: `nvme,file=PATH[,ro][,addr=BDF]`, `ioat[,addr=BDF]` or `test[,addr=BDF]`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Specification {
    /// What it is.
    pub kind: Kind,
    /// Its PCI address, when it was given one.
    pub address: Option<Address>,
}

/// What a device is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Kind {
    /// An NVMe controller.
    Nvme {
        /// Its disk.
        file: PathBuf,
        /// The disk is not written to.
        read_only: bool,
    },
    /// A DMA engine.
    Ioat,
    /// One with every kind of BAR and interrupt.
    Test,
}

/// Why something names no device.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SpecificationError {
    /// There is no such kind.
    #[error("there is no device `{0}`; write {FORMS}")]
    Kind(String),
    /// The kind has no such option, or wants a value with it.
    #[error("`{option}` is no option of `{kind}`; write {FORMS}")]
    Option {
        /// The kind.
        kind: String,
        /// What stands there.
        option: String,
    },
    /// An NVMe controller without a disk.
    #[error("an NVMe controller needs a file; write {FORMS}")]
    File,
    /// The address is none.
    #[error(transparent)]
    Address(#[from] AddressError),
}

impl FromStr for Specification {
    type Err = SpecificationError;

    fn from_str(text: &str) -> Result<Self, SpecificationError> {
        let (kind, options) = text.split_once(',').unwrap_or((text, ""));
        if !["nvme", "ioat", "test"].contains(&kind) {
            return Err(SpecificationError::Kind(kind.to_owned()));
        }
        let (mut file, mut read_only, mut address) = (None, false, None);
        for option in options.split(',').filter(|option| !option.is_empty()) {
            match option.split_once('=') {
                Some(("file", path)) if kind == "nvme" => file = Some(PathBuf::from(path)),
                None if kind == "nvme" && option == "ro" => read_only = true,
                Some(("addr", text)) => address = Some(text.parse()?),
                _ => {
                    let (kind, option) = (kind.to_owned(), option.to_owned());
                    return Err(SpecificationError::Option { kind, option });
                }
            }
        }
        let kind = match (kind, file) {
            ("nvme", Some(file)) => Kind::Nvme { file, read_only },
            ("nvme", None) => return Err(SpecificationError::File),
            ("ioat", _) => Kind::Ioat,
            _ => Kind::Test,
        };
        Ok(Self { kind, address })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named() {
        let nvme: Specification = "nvme,file=/a b,ro,addr=00:05.0".parse().unwrap();
        assert_eq!(nvme.kind, Kind::Nvme { file: "/a b".into(), read_only: true });
        assert_eq!(nvme.address, Some(Address { segment: 0, bus: 0, devfn: 0x28 }));
        assert_eq!("ioat".parse(), Ok(Specification { kind: Kind::Ioat, address: None }));
        assert_eq!("test".parse(), Ok(Specification { kind: Kind::Test, address: None }));
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (wrong, words) in [
            ("tape", "no device `tape`"),
            ("nvme", "needs a file"),
            ("nvme,ro", "needs a file"),
            ("nvme,file", "`file` is no option"),
            ("ioat,addr=1", "no PCI address"),
            ("ioat,size=1", "`size=1` is no option of `ioat`"),
            ("ioat,file=/a", "no option"),
        ] {
            let problem = wrong.parse::<Specification>().unwrap_err().to_string();
            assert!(problem.contains(words), "{wrong}: {problem}");
        }
    }
}

//! Device nodes: what a program finds in `/dev`.

use std::fmt;

/// A device node.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Node {
    /// `/dev/iommu`.
    Iommufd,
    /// `/dev/vfio/vfio`, VFIO's own.
    Container,
    /// `/dev/vfio/vfio`, which is an iommufd.
    IommufdContainer,
    /// `/dev/vfio/N`, or `/dev/vfio/noiommu-N`.
    Group {
        /// The group's number.
        number: u32,
        /// Its devices have no IOMMU.
        no_iommu: bool,
    },
    /// `/dev/vfio/devices/vfioN`.
    Device {
        /// The device's number.
        number: u32,
    },
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Iommufd => f.write_str("/dev/iommu"),
            Self::Container | Self::IommufdContainer => f.write_str("/dev/vfio/vfio"),
            Self::Group { number, no_iommu: false } => write!(f, "/dev/vfio/{number}"),
            Self::Group { number, no_iommu: true } => write!(f, "/dev/vfio/noiommu-{number}"),
            Self::Device { number } => write!(f, "/dev/vfio/devices/vfio{number}"),
        }
    }
}

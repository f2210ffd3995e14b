//! The devices and files that are served.

pub(crate) mod attribute;
pub(crate) mod faults;
pub(crate) mod iommu;
pub(crate) mod status;
pub(crate) mod vfio;

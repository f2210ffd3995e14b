//! Devices in software.

pub mod ioat;
pub mod nvme;
pub mod specification;
pub mod test;

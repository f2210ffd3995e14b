//! Devices in software.

pub mod ioat;
pub mod nvme;
pub mod test;

//! Devices in software.

pub mod nvme;

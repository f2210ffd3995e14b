//! What any emulated PCI function has: a configuration space, registers, MSI and MSI-X.
//!
//! Registers and rules only. Who drives the bus and who takes the interrupts are elsewhere; devices of crates `virtio`
//! and `vfio` are made of these parts.

#![forbid(unsafe_code)]

pub mod access;
pub mod config;
pub mod msi;
pub mod msix;

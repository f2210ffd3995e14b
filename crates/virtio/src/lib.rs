//! Virtio devices over PCI.
#![forbid(unsafe_code)]

pub mod console;
pub mod device;
pub mod event;
pub mod interrupt;
pub mod msix;
pub mod pci;
pub mod pci_config;
pub mod queue;
mod warn;
mod worker;

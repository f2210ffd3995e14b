//! Virtio devices over PCI.
#![forbid(unsafe_code)]

pub mod block;
pub mod console;
pub mod device;
pub mod event;
pub mod interrupt;
pub mod msix;
pub mod pci;
pub mod pci_config;
pub mod queue;
pub mod rng;
mod serve;
mod warn;
mod worker;

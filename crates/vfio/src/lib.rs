//! Devices given to user space: VFIO's doors and devices, without a kernel's VFIO.
//!
//! A [`device::Device`] is a trait: regions, interrupts, reset, migration, the log of its DMA. Devices in software, the
//! other end of a vfio-user socket and the host's real devices are behind the same trait, and whoever gives a device to
//! somebody (a door of VFIO, a vfio-user server, a virtual machine) sees nothing else of it. A device reaches memory by
//! a [`dma::Dma`], which it is given when it is opened.

// The client of the host's kernel hands addresses to it.
#![cfg_attr(not(feature = "kernel"), forbid(unsafe_code))]
#![cfg_attr(feature = "kernel", deny(unsafe_code))]

mod capabilities;
pub mod device;
pub mod devices;
pub mod dma;
#[cfg(any(feature = "device-cdev", feature = "group"))]
pub mod doors;
pub mod eventfd;
pub mod irq;
#[cfg(feature = "kernel")]
pub mod kernel;
pub mod migration;
pub mod pci;
pub mod user;

#[cfg(test)]
mod documentation;

pub use iommufd::Errno;

/// What most calls return: the errno is the one that the kernel's interface documents, or that it was seen to give.
pub type Result<T, E = Errno> = core::result::Result<T, E>;

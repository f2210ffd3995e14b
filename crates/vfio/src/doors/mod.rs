//! VFIO's doors: the ways by which a program comes to a device.
//!
//! # Theory of operation
//!
//! A [`System`] has devices. Each belongs to a group, the devices that cannot be kept apart. A program reaches one in
//! one of two ways, and not in both at once:
//!
//! - By the device's own node ([`cdev`]): it opens `/dev/vfio/devices/vfioN`, binds that to an iommufd, and attaches it to
//!   an address space there. Nothing else works before it is bound.
//! - By its group ([`group`]): it opens `/dev/vfio/N`, gives the group a container, and asks the group for the device. The
//!   container is an open `/dev/vfio/vfio` ([`container`]) or an iommufd, which knows a container's calls too.
//!
//! Either way it has a [`DeviceFile`] in the end, with the same calls. Which ways there are is decided when this is built,
//! as with the kernel: see [`System::nodes`].
//!
//! The calls come as numbers and addresses. One table ([`table`]) says what is known of each.
//!
//! # Locks
//!
//! A group's lock before its devices' and its container's; none of them while a device is told anything that may wait for
//! its user's memory or for a peer, but for opening and closing it.

#[cfg(all(feature = "container", feature = "iommufd-container"))]
compile_error!(
    "features `container` and `iommufd-container` would both serve /dev/vfio/vfio: choose one of them, or none"
);
#[cfg(all(feature = "group", not(any(feature = "container", feature = "iommufd"))))]
compile_error!("feature `group` needs something that translates for it: add `container` or `iommufd`");

#[cfg(feature = "device-cdev")]
pub mod cdev;
mod chain;
#[cfg(feature = "container")]
pub mod container;
mod device_file;
mod dma;
mod feature;
#[cfg(feature = "group")]
pub mod group;
mod hot_reset;
mod info;
mod irqs;
mod migration_file;
mod node;
#[cfg(feature = "mapped-registers")]
pub mod registers;
mod sriov;
mod structure;
mod system;
pub mod table;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod token;

use std::sync::Arc;

use iommufd::{Context, process::UserAddr};

pub use device_file::{DeviceFile, Mapping, REGION_SHIFT};
pub use migration_file::MigrationFile;
pub use node::Node;
pub use sriov::VirtualFunctions;
pub use system::{Registration, System, SystemError};
pub use token::Token;

use crate::Result;

/// What a descriptor of the program has open, as far as VFIO's calls take it.
#[derive(Debug)]
pub enum Opened {
    /// An iommufd.
    Iommufd(Arc<Context>),
    /// A container.
    #[cfg(feature = "container")]
    Container(Arc<container::Container>),
    /// A group.
    #[cfg(feature = "group")]
    Group(Arc<group::GroupFile>),
    /// A device.
    Device(Arc<DeviceFile>),
    /// Something else.
    Other,
}

/// Who calls: what VFIO needs of it beside what iommufd needs.
pub trait Caller: iommufd::caller::Caller {
    /// What descriptor `fd` has open.
    ///
    /// # Errors
    /// EBADF when it has nothing open.
    fn opened(&self, fd: i32) -> Result<Opened>;

    /// Gives it a descriptor for a device: its number.
    ///
    /// # Errors
    /// EMFILE when it has too many.
    fn install_device(&self, device: Arc<DeviceFile>) -> Result<i32>;

    /// Whether the `length` bytes at `at` are registers of a device that it has mapped ([`Mapping::Registers`]): there is no
    /// memory to be pinned then.
    fn has_registers(&self, at: UserAddr, length: u64) -> bool {
        let _ = (at, length);
        false
    }
}

#[cfg(test)]
mod tests;

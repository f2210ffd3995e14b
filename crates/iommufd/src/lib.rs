//! I/O address spaces in user space, with the semantics and the interface of Linux's iommufd.
//!
//! # Theory of operation
//!
//! A [`Context`] is what one open `/dev/iommu` is in the kernel: a table of objects that ioctls make, use and destroy.
//! The central object is the IOAS ([`ioas::Ioas`]): a map from I/O virtual addresses to *areas* of user memory or of files.
//! Devices and other users of that memory come to it in two ways:
//!
//! - A device that translates by an IOMMU is attached to a HWPT, whose [`domain::Domain`] is the page table that the IOMMU
//!   reads. While an IOAS has a domain, all its areas are pinned and entered there.
//! - A user without page tables (a software device, a hardware queue) has an access, pins what it needs
//!   ([`ioas::Pinned`]) and unpins it when it is told to.
//!
//! What the ioctls need of the world are three traits, so that the same code serves a monitor that calls it as a library,
//! the devices of `ring3 run`, and unmodified programs under `ring3 shim`:
//! [`process::Process`] is the memory that user addresses refer to, [`caller::Caller`] the rest of who calls (descriptors,
//! capabilities, limits), and [`hardware::Hardware`] the IOMMU behind a device: in software, a mock for
//! the kernel's own tests, or the host's real one.

#![deny(unsafe_code)]

pub mod account;
mod api;
pub mod caller;
mod context;
pub mod dmabuf;
pub mod domain;
pub mod hardware;
pub mod hostmem;
pub mod inject;
pub mod ioas;
mod ioctl;
pub mod iova;
#[cfg(feature = "kernel")]
pub mod kernel;
mod mapping;
pub mod memory;
#[cfg(any(test, feature = "mock"))]
pub mod mock;
mod object;
pub mod pages;
pub mod process;
pub mod soft;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;
mod user_data;
mod vfio_compat;
pub mod viommu;

pub use context::{Context, Extension};
pub use ioctl::support_table;
pub use mapping::Mapping;
pub use object::{
    Access, BoundDevice, DeviceDma, DevicePort, HwptOptions, PageRequest, PageRequestFlags, PageResponse,
    ResponseCode,
};

pub use rustix::io::Errno;

/// What everything here returns: the errno is the one that the kernel's interface documents.
pub type Result<T> = core::result::Result<T, Errno>;

/// The programs in the documentation compile.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/iommufd.md")]
struct Documentation;

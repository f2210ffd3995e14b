//! PCI functions in software.
//!
//! A [`model::Model`] is the part that differs from device to device: what registers mean. All else that VFIO shows of a
//! PCI function (configuration space, decoding, interrupts, memory behind BARs, reset, the log of DMA) is a
//! [`function::Function`] around it, and a `Function` is a [`Device`](crate::device::Device). A [`layout::Layout`]
//! says what the function consists of; a [`function::Link`] is what its model has of it.

pub mod address;
pub mod function;
pub mod interrupts;
mod ioeventfd;
pub mod layout;
pub mod logging;
pub mod memory;
pub mod model;

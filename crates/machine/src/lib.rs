//! A small modern PC around a software processor.
//!
//! [`machine`] puts the parts together and is where to start reading: memory by the [`layout`], interrupt
//! controllers ([`apic`]), the [`clock`] and KVM's paravirtual interface ([`kvm`]), the [`bus`] with [`pci`],
//! [`serial`], [`rtc`] and [`power`], devices from elsewhere ([`assigned`]), memory as devices reach it
//! ([`dma`]) and the guest's own [`iommu`], the [`loader`], and the [`acpi`] tables that describe all of it to the guest.
#![deny(unsafe_code)]

pub mod acpi;
pub mod apic;
pub mod assigned;
mod boot;
pub mod bus;
pub mod clock;
pub mod dma;
mod guest_abi;
pub mod iommu;
pub mod kvm;
pub mod layout;
pub mod loader;
pub mod machine;
pub mod memory;
pub mod pci;
pub mod power;
pub mod rtc;
pub mod serial;
mod signals;
mod vcpu;
mod virtio_pci;
mod writes;

pub use guest_abi::GuestAbi;
pub use machine::{Ended, IommuKind, Machine, MachineConfig, MachineError, MachineHandle, MachineStats};

//! A small modern PC around a software processor.

pub mod apic;
pub mod clock;
pub mod kvm;

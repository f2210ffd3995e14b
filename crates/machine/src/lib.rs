//! A small modern PC around a software processor.

pub mod apic;
pub mod bus;
pub mod clock;
pub mod layout;
pub mod loader;
pub mod power;
pub mod rtc;
pub mod serial;
pub mod kvm;

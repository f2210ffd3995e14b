//! A small modern PC around a software processor.

pub mod acpi;
pub mod bus;
pub mod layout;
pub mod loader;
pub mod pci;
pub mod power;
pub mod rtc;
pub mod serial;

//! A small modern PC around a software processor.

pub mod bus;
pub mod layout;
pub mod loader;
pub mod power;
pub mod rtc;
pub mod serial;

//! A small modern PC around a software processor.

pub mod clock;

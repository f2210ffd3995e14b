//! The kernel's iommufd and VFIO devices for unmodified programs.

#![deny(unsafe_code)]

mod caller;
mod calls;
mod configuration;
mod errno;
mod inside;
#[cfg(not(test))]
mod interpose;
mod mapped;
mod node;
mod nodes;
mod paths;
mod process;
mod real;
mod served;
mod start;
mod table;
mod user;

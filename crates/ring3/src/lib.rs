//! The `ring3` command: what it is told ([`cli`]), which kernel it boots ([`kernel`]), what the guest finds
//! at boot ([`initramfs`]), one run from start to exit status ([`run`]), the guest that tests the PVM guest
//! ABI ([`pvm_guest`]), and devices for other monitors ([`vfio`]).

// `net::isolation::background` alone allows it.
#![deny(unsafe_code)]

pub mod cli;
pub mod initramfs;
pub mod kernel;
pub mod net;
pub mod pvm_guest;
pub mod run;
pub mod shim;
pub mod vfio;

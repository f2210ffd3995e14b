//! The `ring3` command: what it is told ([`cli`]), which kernel it boots ([`kernel`]), what the guest finds
//! at boot ([`initramfs`]), and one run from start to exit status ([`run`]).

pub mod cli;
pub mod initramfs;
pub mod kernel;
pub mod run;

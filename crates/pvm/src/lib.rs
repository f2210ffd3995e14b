//! The PVM guest ABI: how a guest kernel that knows it runs deprivileged gets its events, changes between
//! supervisor and user mode, and asks its hypervisor for what it cannot do itself.
//!
//! The crate is a state machine, [`Pvm`], for each vCPU, over a small trait, [`Processor`], that gives it registers,
//! MSRs and guest memory. It knows nothing of how the processor works. A virtual machine monitor calls it
//! - when the vCPU enters 64-bit supervisor mode ([`Pvm::enter`]),
//! - for every exception, interrupt and NMI ([`Pvm::deliver`]),
//! - for SYSCALL ([`Pvm::syscall`]), which is also every return and every hypercall,
//! - for RDMSR and WRMSR ([`Pvm::read_msr`], [`Pvm::write_msr`]), and
//! - to learn whether an interrupt may be delivered ([`Pvm::interrupts_open`]).
//!
//! [`conformance`] goes through the ABI row by row and names the test for each.
//!
//! The words are the specification's: what is *underlying* is the state of the processor that the guest runs on
//! without privileges; what is not, is what the guest believes. Numbers and layouts are tables ([`abi`]), one
//! for each generation of the ABI.

#![cfg_attr(not(any(test, feature = "testing")), no_std)]
#![forbid(unsafe_code)]

pub mod abi;
#[doc = include_str!("conformance.md")]
pub mod conformance {}
mod event;
mod gdt;
pub mod image;
mod msr;
pub mod processor;
mod range;
mod stats;
mod syscall;
#[cfg(feature = "testing")]
pub mod testing;
mod vcpu;

pub use event::{Event, Frame};
pub use gdt::Gdt;
pub use msr::Access;
pub use processor::{Processor, Register};
pub use range::AddressRanges;
pub use stats::Stats;
pub use syscall::Next;
pub use vcpu::{Config, Mode, Pvm, TripleFault};

//! An x86-64 processor in software.
//!
//! A [`Vcpu`] is the architectural state with a software TLB; an [`Interpreter`] is the engine that runs it.
//! Whatever the processor does not know leaves it as a typed [`Exit`], answered by a [`Platform`]; other
//! threads reach it through one [`Attention`] word. The page-table walk is `mmu`'s.
//!
//! Reading order: [`state`], [`flags`], [`insn`] (what is executed), `mem` and `tlb` (how it reaches memory),
//! `exec` (the instructions), `native` (those that the host CPU executes), [`event`] (exceptions and
//! interrupts), `run` (the loop), `pvm_mode` (guests that run without privileges and know it).

pub mod attention;
mod block;
pub mod cpuid;
mod data;
mod debug;
pub mod event;
mod exec;
pub mod exit;
pub mod fault;
pub mod flags;
pub mod fpu;
mod frame;
mod group;
mod hostmem;
pub mod insn;
mod mem;
pub mod msr;
mod native;
mod pvm_mode;
pub mod ram;
mod run;
mod segment;
mod stack;
pub mod state;
mod stats;
mod task;
#[cfg(feature = "testing")]
pub mod testing;
mod tlb;
mod vcpu;

pub use attention::Attention;
pub use cpuid::Cpuid;
pub use data::Data;
pub use event::Event;
pub use exit::{Answer, Exit, Platform};
pub use fault::{Exec, Fault, Stop};
pub use ram::{GuestRam, PageStamps, Ram};
pub use run::{Interpreter, Outcome};
pub use state::CpuState;
pub use stats::{Exits, VcpuStats};
pub use vcpu::{Vcpu, VcpuConfig};

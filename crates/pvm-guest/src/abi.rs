//! The ABI's numbers, as this kernel uses them: from `pvm::abi`, with the shared structure as a type.

use core::mem::offset_of;

use pvm::abi::GENERATION_1;
pub use pvm::abi::{PvmMsr, cpuid, event_flags, hypercall, rflags, selector, x86_msr};

/// The number of one of PVM's MSRs.
pub fn msr(msr: PvmMsr) -> u32 {
    GENERATION_1.msr_index(msr).unwrap_or(0)
}

/// The shared structure (specification, "MSR_PVM_VCPU_CTRL_STRUCT"). The names are the specification's.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are the specification's")]
pub struct Pvcs {
    pub event_flags: u64,
    pub event_errcode: u32,
    pub event_vector: u32,
    pub cr2: u64,
    pub reserved0: [u64; 5],
    pub user_cs: u16,
    pub user_ss: u16,
    pub reserved1: u32,
    pub reserved2: u64,
    pub user_gsbase: u64,
    pub eflags: u32,
    pub pkru: u32,
    pub rip: u64,
    pub rsp: u64,
    pub rcx: u64,
    pub r11: u64,
}

// The type and the table say the same.
macro_rules! same_layout {
    ($($field:ident),+) => {
        $(const _: () = assert!(offset_of!(Pvcs, $field) == GENERATION_1.pvcs.$field.offset as usize);)+
    };
}
same_layout!(event_flags, event_errcode, event_vector, cr2, user_cs, user_ss, user_gsbase, eflags, pkru);
same_layout!(rip, rsp, rcx, r11);
const _: () = assert!(size_of::<Pvcs>() == GENERATION_1.pvcs.size as usize);

/// The frame of an exception in supervisor mode, from its lowest address on (specification, "Vector events in
/// supervisor mode").
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are the specification's")]
pub struct Frame {
    pub errcode: u32,
    pub vector: u32,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
    pub rcx: u64,
    pub r11: u64,
}

/// Vectors of exceptions (Intel SDM vol. 3, 6.3.1).
#[expect(missing_docs, reason = "the names are the manual's")]
pub mod vector {
    pub const DE: u32 = 0;
    pub const DB: u32 = 1;
    pub const NMI: u32 = 2;
    pub const BP: u32 = 3;
    pub const OF: u32 = 4;
    pub const UD: u32 = 6;
    pub const GP: u32 = 13;
    pub const PF: u32 = 14;
    pub const MF: u32 = 16;
    pub const XM: u32 = 19;
}

/// Bits of the error code of #PF (Intel SDM vol. 3, 4.7).
pub mod pf {
    /// The translation was there: its rights were not.
    pub const PRESENT: u32 = 1 << 0;
    /// A write.
    pub const WRITE: u32 = 1 << 1;
    /// From user mode.
    pub const USER: u32 = 1 << 2;
    /// A fetch.
    pub const FETCH: u32 = 1 << 4;
    /// By protection keys.
    pub const KEYS: u32 = 1 << 5;
}

/// Control-register bits (Intel SDM vol. 3, 2.5).
#[expect(missing_docs, reason = "the names are the manual's")]
pub mod control {
    pub const CR4_LA57: u64 = 1 << 12;
    pub const CR4_FSGSBASE: u64 = 1 << 16;
    pub const CR4_PCIDE: u64 = 1 << 17;
    pub const CR4_OSXSAVE: u64 = 1 << 18;
    pub const CR4_SMEP: u64 = 1 << 20;
    pub const CR4_SMAP: u64 = 1 << 21;
    pub const CR4_PKE: u64 = 1 << 22;
    pub const CR4_PKS: u64 = 1 << 24;
}

//! Exceptions as values.
//!
//! An instruction that cannot complete returns a [`Stop`]. A fault travels as a value until the one
//! place that delivers events turns it into a frame on the guest's stack, or into whatever the event
//! ABI of the vCPU is.

use mmu::Gva;

/// Exception vectors (Intel SDM vol. 3, 6.15).
pub mod vector {
    /// #DE, divide error.
    pub const DE: u8 = 0;
    /// #DB, debug.
    pub const DB: u8 = 1;
    /// Non-maskable interrupt.
    pub const NMI: u8 = 2;
    /// #BP, breakpoint.
    pub const BP: u8 = 3;
    /// #OF, overflow.
    pub const OF: u8 = 4;
    /// #BR, bound range exceeded.
    pub const BR: u8 = 5;
    /// #UD, invalid opcode.
    pub const UD: u8 = 6;
    /// #NM, device not available.
    pub const NM: u8 = 7;
    /// #DF, double fault.
    pub const DF: u8 = 8;
    /// #TS, invalid TSS.
    pub const TS: u8 = 10;
    /// #NP, segment not present.
    pub const NP: u8 = 11;
    /// #SS, stack fault.
    pub const SS: u8 = 12;
    /// #GP, general protection.
    pub const GP: u8 = 13;
    /// #PF, page fault.
    pub const PF: u8 = 14;
    /// #MF, x87 floating-point error.
    pub const MF: u8 = 16;
    /// #AC, alignment check.
    pub const AC: u8 = 17;
    /// #MC, machine check.
    pub const MC: u8 = 18;
    /// #XM, SIMD floating-point error.
    pub const XM: u8 = 19;
}

/// An exception that an instruction raised and that is not delivered yet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fault {
    /// The exception's vector, see [`vector`].
    pub vector: u8,
    /// The error code, for the vectors that push one.
    pub error_code: Option<u32>,
    /// For #PF the faulting address, which delivery puts into CR2.
    pub address: Gva,
    /// For #DB the bits to set in DR6.
    pub dr6: u64,
    /// Whether the instruction has completed (a trap): RIP then stays past it.
    pub trap: bool,
}

impl Fault {
    /// A fault without an error code.
    pub const fn new(vector: u8) -> Self {
        Self { vector, error_code: None, address: Gva(0), dr6: 0, trap: false }
    }

    /// A fault with an error code.
    pub const fn with_code(vector: u8, error_code: u32) -> Self {
        Self { vector, error_code: Some(error_code), address: Gva(0), dr6: 0, trap: false }
    }

    /// #UD.
    pub const fn ud() -> Self {
        Self::new(vector::UD)
    }

    /// #GP with `error_code` (0, or a selector with its low bits).
    pub const fn gp(error_code: u32) -> Self {
        Self::with_code(vector::GP, error_code)
    }

    /// #PF at `address`.
    pub const fn pf(address: Gva, error_code: u32) -> Self {
        Self { vector: vector::PF, error_code: Some(error_code), address, dr6: 0, trap: false }
    }

    /// #DB with the given DR6 bits; `trap` where the instruction has completed.
    pub const fn db(dr6: u64, trap: bool) -> Self {
        Self { vector: vector::DB, error_code: None, address: Gva(0), dr6, trap }
    }
}

/// Why an instruction did not simply complete.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stop {
    /// It raised an exception.
    Fault(Fault),
    /// It completed, and the vCPU sleeps until an interrupt (HLT, or MWAIT).
    Halt,
    /// The vCPU cannot go on: an event could not be delivered three times over.
    TripleFault,
    /// The instruction was given up half-way, without effect or (a repeated string instruction) with some
    /// elements done, and is to be run again: something asked for attention meanwhile.
    Restart,
}

/// The result of a step of an instruction. The error is boxed so that success stays in registers.
pub type Exec<T = ()> = Result<T, Box<Stop>>;

impl From<Fault> for Box<Stop> {
    #[cold]
    fn from(fault: Fault) -> Self {
        Box::new(Stop::Fault(fault))
    }
}

/// `Err` with a fault, for use as a tail expression.
#[cold]
pub fn fault<T>(fault: Fault) -> Exec<T> {
    Err(fault.into())
}

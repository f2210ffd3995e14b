//! A case: one instruction with everything it can read; and an outcome: everything it can have written.

use iced_x86::Instruction;

use crate::generate::Family;

/// Where the data window starts, in the guest and in the process that asks the host CPU.
pub const DATA: u64 = 0x1000_0000;
/// The data window's writable part in bytes, which comes first.
pub const DATA_WRITABLE: u64 = 0x2000;
/// The data window's size in bytes. Its last page can only be read; around it nothing is mapped.
pub const DATA_SIZE: u64 = 0x3000;
/// Where the code window starts: two pages that can be read and executed, with nothing around them.
pub const CODE: u64 = 0x1001_0000;
/// The code window's size in bytes.
pub const CODE_SIZE: u64 = 0x2000;
/// What the code window is filled with around the instruction: INT3.
pub const FILLER: u8 = 0xcc;
/// The base of the GS segment. That of FS stays the host's: its instructions are not tested with it.
pub const GS_BASE: u64 = 0x1234_5678;
/// The selector of 64-bit user code, as Linux has it.
pub const USER_CS: u16 = 0x33;
/// The selector of 32-bit user code, as Linux has it.
pub const USER_CS32: u16 = 0x23;
/// The selector of the user's stack segment, as Linux has it.
pub const USER_SS: u16 = 0x2b;

/// The mode that the instruction runs in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// 64-bit mode.
    Bits64,
    /// Compatibility mode with a 32-bit code segment; all segments flat.
    Bits32,
}

impl Mode {
    /// The width in bits, as the decoder wants it.
    pub const fn bitness(self) -> u32 {
        match self {
            Self::Bits64 => 64,
            Self::Bits32 => 32,
        }
    }
}

/// x87, MMX, SSE and AVX state.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VectorState {
    /// The x87 control word.
    pub fcw: u16,
    /// The x87 status word.
    pub fsw: u16,
    /// The x87 tags as FXSAVE has them: bit n is set if physical register n is not empty.
    pub tags: u8,
    /// ST0 to ST7 (from the top of the stack).
    pub st: [[u8; 10]; 8],
    /// MXCSR.
    pub mxcsr: u32,
    /// YMM0 to YMM15.
    pub ymm: [[u8; 32]; 16],
}

impl Default for VectorState {
    fn default() -> Self {
        Self { fcw: 0x37f, fsw: 0, tags: 0, st: [[0; 10]; 8], mxcsr: 0x1f80, ymm: [[0; 32]; 16] }
    }
}

/// The registers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Registers {
    /// RAX to R15 by encoding.
    pub gpr: [u64; 16],
    /// RIP.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// Vector and x87 state.
    pub vector: VectorState,
}

/// The contents of the data window.
pub type Memory = [u8; DATA_SIZE as usize];

/// One instruction and its input.
#[derive(Clone, Debug)]
pub struct Case {
    /// The seed of the run that the case belongs to.
    pub seed: u64,
    /// Its number there.
    pub number: u64,
    /// What kind of instruction it is.
    pub family: Family,
    /// The mode.
    pub mode: Mode,
    /// The instruction as decoded; invalid if it must raise #UD.
    pub instruction: Instruction,
    /// Its bytes. They end at the end of the code window at the latest; what then is missing faults.
    pub bytes: Vec<u8>,
    /// The registers before. RIP points at the instruction.
    pub registers: Registers,
    /// The data window before.
    pub memory: Box<Memory>,
}

/// An exception that the instruction raised.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Exception {
    /// The vector.
    pub vector: u8,
    /// The error code, zero for vectors that have none.
    pub error_code: u32,
    /// The faulting address of a page fault; else zero.
    pub address: u64,
}

/// What an engine made of a case.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Outcome {
    /// The exception, if there was one.
    pub exception: Option<Exception>,
    /// The registers after. RIP is where the program goes on: at the instruction itself after a fault.
    pub registers: Registers,
    /// The data window after.
    pub memory: Box<Memory>,
}

/// #BP.
const BREAKPOINT: u8 = 3;
/// #PF.
const PAGE_FAULT: u8 = 14;
/// Error code bit of a page fault: the page is present.
pub const PF_PRESENT: u32 = 1 << 0;
/// Error code bit of a page fault: it was an instruction fetch.
const PF_FETCH: u32 = 1 << 4;

impl Outcome {
    /// Makes an outcome of the exception that ended a run, which in most cases is not the instruction's.
    ///
    /// The run goes on until an exception, so that the instruction is seen to complete by the INT3 that
    /// follows, or by the fault of fetching from wherever it branched to.
    pub fn from_exception(
        case: &Case,
        mut exception: Exception,
        registers: Registers,
        memory: Box<Memory>,
    ) -> Self {
        let mut outcome = Self { exception: None, registers, memory };
        let fetch = exception.vector == PAGE_FAULT && exception.error_code & PF_FETCH != 0;
        if exception.vector == BREAKPOINT {
            outcome.registers.rip = registers.rip.wrapping_sub(1);
        } else if !(fetch && registers.rip == exception.address && registers.rip != case.registers.rip) {
            if exception.vector != PAGE_FAULT {
                exception.address = 0;
            }
            outcome.exception = Some(exception);
        }
        outcome
    }
}

/// Something that executes cases.
pub trait Engine {
    /// Executes one.
    ///
    /// # Errors
    /// When the engine broke down, which is not an outcome.
    fn run(&mut self, case: &Case) -> Result<Outcome, EngineError>;
}

/// Why an engine has no outcome.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The processor shut down.
    #[error("triple fault at RIP {rip:#x}")]
    TripleFault {
        /// RIP.
        rip: u64,
    },
    /// The run ended in a way that it should not.
    #[error("the engine stopped at RIP {rip:#x}: {what}")]
    Stopped {
        /// RIP.
        rip: u64,
        /// What happened.
        what: String,
    },
    /// The host refused something.
    #[error("{what}")]
    Host {
        /// What was asked.
        what: &'static str,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
    /// The host CPU lacks something that every case needs.
    #[error("the host CPU has no {0}")]
    Lacks(&'static str),
}

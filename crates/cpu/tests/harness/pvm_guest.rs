//! PVM: which event a program ended in, as its handler sees it, and the same program in both modes.

use cpu::Outcome;
use cpu::state::reg;
use iced_x86::IcedError;
use iced_x86::code_asm::CodeAssembler;
use pvm::Mode;
use pvm::abi::GENERATION_1;

use super::{CODE, ENTRY, Guest, RETS, RETU, STACK};

/// MSR_PVM_LINEAR_ADDRESS_RANGE.
pub const MSR_RANGE: u32 = 0x4b56_4df0;
/// MSR_PVM_VCPU_STRUCT.
pub const MSR_VCPU_STRUCT: u32 = 0x4b56_4df1;
/// MSR_PVM_SUPERVISOR_RSP.
pub const MSR_SUPERVISOR_RSP: u32 = 0x4b56_4df2;
/// MSR_PVM_SUPERVISOR_REDZONE.
pub const MSR_REDZONE: u32 = 0x4b56_4df3;
/// MSR_PVM_EVENT_ENTRY.
pub const MSR_EVENT_ENTRY: u32 = 0x4b56_4df4;
/// MSR_PVM_RETU_RIP.
pub const MSR_RETU_RIP: u32 = 0x4b56_4df5;
/// MSR_PVM_RETS_RIP.
pub const MSR_RETS_RIP: u32 = 0x4b56_4df6;
/// MSR_PVM_SWITCH_CR3.
pub const MSR_SWITCH_CR3: u32 = 0x4b56_4df7;

/// Both modes that programs run in.
pub const MODES: [Mode; 2] = [Mode::Supervisor, Mode::User];

/// An event as its handler sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PvmEvent {
    /// The mode that it came from.
    pub from: Mode,
    pub vector: u8,
    /// For vectors that have one.
    pub error_code: Option<u32>,
    pub rip: u64,
    pub rsp: u64,
    pub rflags: u64,
}

/// Whether the exception `vector` has an error code.
fn has_error_code(vector: u8) -> bool {
    matches!(vector, 8 | 10..=14 | 17)
}

impl Guest {
    /// Puts `program` at [`CODE`] and the vCPU, in `mode`, in front of it. Its end is HLT in supervisor mode, and a
    /// system call in user mode.
    pub fn pvm_program(
        &mut self,
        mode: Mode,
        program: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    ) {
        match mode {
            Mode::User => {
                self.code_at(CODE, 64, |a| {
                    program(a)?;
                    a.syscall()
                });
                self.pvm_user(CODE, STACK, 0x202);
            }
            _ => {
                self.code(program);
                self.resume_at(CODE);
            }
        }
    }

    /// As [`Self::pvm_user`], to 32-bit code.
    pub fn pvm_user32(&mut self, rip: u64, rsp: u64, eflags: u64) {
        let p = &GENERATION_1.pvcs;
        let fields = [(p.user_cs, 0x23), (p.user_ss, 0x2b), (p.eflags, eflags), (p.rip, rip), (p.rsp, rsp)];
        for (field, value) in fields {
            self.set_pvcs(field, value);
        }
        self.resume_at(RETU);
        self.engine.step(&mut self.vcpu);
    }

    /// A PVM guest in front of `program` in `mode`, see [`Self::pvm_program`].
    pub fn pvm_in(mode: Mode, program: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Self {
        let mut guest = Self::pvm();
        guest.pvm_program(mode, program);
        guest
    }

    /// Runs until HLT; the event, if it is a handler's.
    #[track_caller]
    pub fn run_pvm(&mut self) -> Option<PvmEvent> {
        assert_eq!(self.run(), Outcome::Halted, "at {:#x}", self.vcpu.state.rip());
        self.pvm_event()
    }

    /// Runs to the end of the program, which must not meet an event.
    #[track_caller]
    pub fn finish_pvm(&mut self) {
        let event = self.run_pvm();
        assert_eq!(event, None, "{event:x?}");
        assert_eq!(self.vcpu.pvm_mode(), Mode::Supervisor);
    }

    /// Runs until the handler of the exception `vector`, and returns what it is told.
    #[track_caller]
    pub fn pvm_fault(&mut self, vector: u8) -> PvmEvent {
        let event = self.run_pvm();
        match event {
            Some(e) if e.vector == vector => e,
            _ => panic!("not {vector} but {event:x?}; stopped at {:#x}", self.vcpu.state.rip()),
        }
    }

    /// The event whose handler's HLT was executed last, if it was a handler's.
    pub fn pvm_event(&self) -> Option<PvmEvent> {
        let p = &GENERATION_1.pvcs;
        let in_pvcs = |from| {
            let vector = self.pvcs(p.event_vector) as u8;
            PvmEvent {
                from,
                vector,
                error_code: has_error_code(vector).then(|| self.pvcs(p.event_errcode) as u32),
                rip: self.pvcs(p.rip),
                rsp: self.pvcs(p.rsp),
                rflags: self.pvcs(p.eflags),
            }
        };
        match self.vcpu.state.rip().wrapping_sub(ENTRY + 1) {
            0 => Some(in_pvcs(Mode::User)),
            256 => {
                let frame = self.pvm_frame();
                let vector = (frame.errcode >> 32) as u8;
                Some(PvmEvent {
                    from: Mode::Supervisor,
                    vector,
                    error_code: has_error_code(vector).then_some(frame.errcode as u32),
                    rip: frame.rip,
                    rsp: frame.rsp,
                    rflags: frame.rflags,
                })
            }
            512 => Some(in_pvcs(Mode::Supervisor)),
            _ => None,
        }
    }

    /// The frame at the stack pointer.
    pub fn pvm_frame(&self) -> pvm::Frame {
        let at = self.reg(reg::RSP);
        pvm::Frame::from_words(std::array::from_fn(|n| self.peek(at + n as u64 * 8)))
    }

    /// Installs a handler for exceptions of both modes that skips `len` bytes of the faulting instruction: it counts
    /// them in R15, and leaves vector and error code of the last one in R14.
    pub fn pvm_skip(&mut self, len: u64) {
        let p = &GENERATION_1.pvcs;
        let field = |f: pvm::abi::Field| super::PVCS + u64::from(f.offset);
        use iced_x86::code_asm::*;
        self.code_at(ENTRY, 64, |a| {
            a.mov(r14, qword_ptr(field(p.event_errcode)))?;
            a.inc(r15)?;
            a.add(qword_ptr(field(p.rip)), len as i32)?;
            a.jmp(RETU)
        });
        self.code_at(ENTRY + 256, 64, |a| {
            a.mov(r14, qword_ptr(rsp))?;
            a.inc(r15)?;
            a.add(qword_ptr(rsp + 8), len as i32)?;
            a.jmp(RETS)
        });
    }
}

/// A hypercall with up to three arguments; RAX holds the result.
pub fn hypercall(a: &mut CodeAssembler, number: u64, args: [u64; 3]) -> Result<(), IcedError> {
    use iced_x86::code_asm::*;
    let [first, second, third] = args;
    a.mov(rax, number)?;
    a.mov(rbx, first)?;
    a.mov(r10, second)?;
    a.mov(rdx, third)?;
    a.syscall()
}

/// WRMSR of `value` to `index`.
pub fn write_msr(a: &mut CodeAssembler, index: u32, value: u64) -> Result<(), IcedError> {
    use iced_x86::code_asm::*;
    a.mov(ecx, index)?;
    a.mov(eax, value as u32)?;
    a.mov(edx, (value >> 32) as u32)?;
    a.wrmsr()
}

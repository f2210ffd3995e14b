//! The check that generated code passes before it may run.
//!
//! The generator is written so that its code reaches nothing but the vCPU's register image. This check does
//! not believe it: it decodes the bytes again and looks at each instruction's registers, memory and control
//! flow.

use std::mem::{offset_of, size_of};
use std::ops::Range;

use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, OpAccess, Register,
};

use crate::fpu::Fpu;
use crate::state::CpuState;

/// The parts of `CpuState` that native code may touch: the general registers and the floating-point state.
const ALLOWED: [Range<u64>; 2] = [
    offset_of!(CpuState, regs) as u64..offset_of!(CpuState, regs) as u64 + 16 * 8,
    offset_of!(CpuState, fpu) as u64..(offset_of!(CpuState, fpu) + size_of::<Fpu>()) as u64,
];

/// Code that passed the check.
#[derive(Debug)]
pub(crate) struct Verified(Vec<u8>);

impl Verified {
    /// The code.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Code of a test that vouches for it.
    #[cfg(test)]
    pub(crate) fn trusted(code: Vec<u8>) -> Self {
        Self(code)
    }
}

/// Why code was turned down.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum Rejected {
    /// Not an instruction, or bytes after the return.
    #[error("not code, or no return at the end, at offset {0}")]
    Malformed(usize),
    /// A branch, or an instruction that does more than compute.
    #[error("{0:?} is not allowed")]
    Forbidden(Code),
    /// Memory outside the register image.
    #[error("{0:?} reaches memory at {1:?} + {2:#x}")]
    Memory(Code, Register, u64),
    /// A register that belongs to the caller.
    #[error("{0:?} writes {1:?}")]
    Clobbers(Code, Register),
}

/// Checks `code`: straight-line, ends with its only RET, computes with vector, x87 and the scratch general
/// registers, and all memory is in [`ALLOWED`], addressed from RDI, which stays.
pub(crate) fn verify(code: Vec<u8>) -> Result<Verified, Rejected> {
    let mut decoder = Decoder::with_ip(64, &code, 0, DecoderOptions::NONE);
    let mut factory = InstructionInfoFactory::new();
    let mut i = Instruction::default();
    while decoder.can_decode() {
        let at = decoder.position();
        decoder.decode_out(&mut i);
        if i.is_invalid() {
            return Err(Rejected::Malformed(at));
        }
        if i.code() == Code::Retnq {
            return if decoder.can_decode() { Err(Rejected::Malformed(at)) } else { Ok(Verified(code)) };
        }
        check(&i, &mut factory)?;
    }
    Err(Rejected::Malformed(code.len()))
}

fn check(i: &Instruction, factory: &mut InstructionInfoFactory) -> Result<(), Rejected> {
    let glue = matches!(
        i.code(),
        Code::Mov_r64_rm64
            | Code::Mov_rm64_r64
            | Code::Mov_r8_rm8
            | Code::Mov_rm32_r32
            | Code::Lahf
            | Code::Sahf
            | Code::Seto_rm8
            | Code::Fxrstor64_m512byte
            | Code::Fxsave64_m512byte
            | Code::Fninit
            | Code::VEX_Vzeroupper
    );
    if !glue && !super::class::computes(i)
        || i.flow_control() != FlowControl::Next
        || i.is_privileged()
        || i.is_stack_instruction()
        || i.is_string_instruction()
        || i.has_lock_prefix()
        || i.is_vsib()
    {
        return Err(Rejected::Forbidden(i.code()));
    }
    let info = factory.info(i);
    for memory in info.used_memory() {
        let (start, size) = (memory.displacement(), memory.memory_size().size() as u64);
        let inside = |r: &Range<u64>| {
            start >= r.start && size > 0 && start.checked_add(size).is_some_and(|end| end <= r.end)
        };
        if memory.base() != Register::RDI
            || memory.index() != Register::None
            || i.segment_prefix() != Register::None
            || !ALLOWED.iter().any(inside)
        {
            return Err(Rejected::Memory(i.code(), memory.base(), start));
        }
    }
    for used in info.used_registers() {
        let register = used.register();
        let read_only = matches!(used.access(), OpAccess::Read | OpAccess::CondRead);
        let free = register.is_vector_register() || register.is_mm() || register.is_st();
        let scratch = matches!(register.full_register(), Register::RAX | Register::RCX | Register::RDX);
        if !free && !scratch && !read_only {
            return Err(Rejected::Clobbers(i.code(), register));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::code_asm::*;

    fn assemble(f: impl FnOnce(&mut CodeAssembler)) -> Vec<u8> {
        let mut a = CodeAssembler::new(64).unwrap();
        f(&mut a);
        a.assemble(0).unwrap()
    }

    #[test]
    fn honest_code_passes() {
        let fpu = offset_of!(CpuState, fpu) as i32;
        let code = assemble(|a| {
            a.movups(xmm1, xmmword_ptr(rdi + fpu)).unwrap();
            a.paddd(xmm1, xmmword_ptr(rdi + fpu + 32)).unwrap();
            a.movups(xmmword_ptr(rdi + fpu), xmm1).unwrap();
            a.ret().unwrap();
        });
        assert!(verify(code).is_ok());
    }

    #[test]
    fn code_that_reaches_out_is_turned_down() {
        let fpu = offset_of!(CpuState, fpu) as i32;
        let end = (offset_of!(CpuState, fpu) + size_of::<Fpu>()) as i32;
        type Emit = fn(&mut CodeAssembler, i32, i32);
        let bad: [Emit; 12] = [
            |a, _, end| a.movups(xmm1, xmmword_ptr(rdi + end)).unwrap(),
            |a, _, end| a.movups(xmm1, xmmword_ptr(rdi + end - 15)).unwrap(),
            |a, _, _| a.movups(xmm1, xmmword_ptr(rdi + 16 * 8)).unwrap(),
            |a, fpu, _| a.movups(xmm1, xmmword_ptr(rsi + fpu)).unwrap(),
            |a, fpu, _| a.movups(xmm1, xmmword_ptr(rdi + rax + fpu)).unwrap(),
            |a, fpu, _| a.movups(xmm1, xmmword_ptr(rdi + fpu).fs()).unwrap(),
            |a, _, _| a.movd(edi, xmm1).unwrap(),
            |a, _, _| a.movd(ebx, xmm1).unwrap(),
            |a, _, _| a.push(rax).unwrap(),
            |a, _, _| a.syscall().unwrap(),
            |a, _, _| a.call(rax).unwrap(),
            |a, _, _| a.maskmovdqu(xmm1, xmm2).unwrap(),
        ];
        for (n, emit) in bad.iter().enumerate() {
            let code = assemble(|a| {
                emit(a, fpu, end);
                a.ret().unwrap();
            });
            assert!(verify(code).is_err(), "case {n}");
        }
        assert_eq!(verify(assemble(|a| a.pxor(xmm1, xmm1).unwrap())).unwrap_err(), Rejected::Malformed(4));
        assert!(verify(vec![0xc3, 0xc3]).is_err());
        assert!(verify(vec![0x0f, 0xff, 0xc3]).is_err());
    }
}

//! Generation of native code for one instruction.
//!
//! # Theory of operation
//! A stub loads the vector and general registers that the instruction names from the vCPU's state, executes
//! the instruction with its memory operand replaced by a scratch buffer in that state, and stores what it
//! may have changed. Vector registers keep their numbers; the one general register that such an
//! instruction may name becomes RAX, so that any guest register will do. RDI holds the state throughout.
//!
//! x87 and MMX instructions run between FXRSTOR64 and FXSAVE64 of the guest's image; FNINIT then leaves
//! the host's x87 unit as the ABI demands it.

use std::mem::offset_of;

use iced_x86::{
    BlockEncoder, BlockEncoderOptions, Code, CodeSize, Encoder, IcedError, Instruction, InstructionBlock,
    InstructionInfoFactory, MemoryOperand, OpAccess, OpKind, Register,
};

use super::class::{self, Class};
use crate::fpu::Fpu;
use crate::state::CpuState;

const FPU: usize = offset_of!(CpuState, fpu);
const YMM: usize = FPU + offset_of!(Fpu, ymm);
const LEGACY: usize = FPU + offset_of!(Fpu, legacy);
const SCRATCH: usize = FPU + offset_of!(Fpu, scratch);
const FLAGS: usize = FPU + offset_of!(Fpu, native_flags);

/// An instruction in the form in which a stub executes it.
pub(crate) struct Rewritten {
    instruction: Instruction,
    /// The guest's general register that RAX stands for.
    general: Option<u8>,
    class: Class,
}

/// What identifies a stub: the rewritten instruction's bytes and the guest register behind RAX.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Key {
    bytes: [u8; 15],
    general: u8,
}

/// The operand of the state at byte `offset`.
fn operand(offset: usize) -> MemoryOperand {
    MemoryOperand::with_base_displ(Register::RDI, offset as i64)
}

/// Rewrites `i` for a stub; `None` if it has operands that no stub can have.
pub(crate) fn rewrite(i: &Instruction, class: Class) -> Option<Rewritten> {
    let mut instruction = *i;
    instruction.set_segment_prefix(Register::None);
    instruction.set_code_size(CodeSize::Code64);
    let mut general = None;
    for n in 0..i.op_count() {
        match i.op_kind(n) {
            OpKind::Register => {
                let register = i.op_register(n);
                if register.is_gpr() {
                    let stand_in = match register.size() {
                        8 => Register::RAX,
                        4 => Register::EAX,
                        _ => return None,
                    };
                    if general.replace(register.number() as u8).is_some() {
                        return None;
                    }
                    instruction.set_op_register(n, stand_in);
                }
            }
            OpKind::Memory => {
                instruction.set_memory_base(Register::RDI);
                instruction.set_memory_index(Register::None);
                instruction.set_memory_index_scale(1);
                instruction.set_memory_displacement64(SCRATCH as u64);
                instruction.set_memory_displ_size(8);
            }
            OpKind::Immediate8 => {}
            _ => return None,
        }
    }
    Some(Rewritten { instruction, general, class })
}

impl Rewritten {
    /// What tells this stub from others.
    pub(crate) fn key(&self) -> Option<Key> {
        let mut encoder = Encoder::new(64);
        encoder.encode(&self.instruction, 0).ok()?;
        let buffer = encoder.take_buffer();
        let mut bytes = [0; 15];
        bytes.get_mut(..buffer.len())?.copy_from_slice(&buffer);
        Some(Key { bytes, general: self.general.unwrap_or(0xff) })
    }

    /// The stub's code; `None` if the instruction uses registers that no stub can provide.
    pub(crate) fn code(&self) -> Option<Vec<u8>> {
        self.instructions()?.ok()
    }

    fn instructions(&self) -> Option<Result<Vec<u8>, IcedError>> {
        let i = &self.instruction;
        let used = Used::of(i)?;
        let x87 = matches!(self.class, Class::X87 | Class::Mmx);
        let general = |n: u8| {
            let guest = if n == 0 { self.general.unwrap_or(0) } else { n };
            usize::from(guest & 15) * 8
        };
        let build = || -> Result<Vec<Instruction>, IcedError> {
            let mut code = Vec::with_capacity(12);
            if x87 {
                code.push(Instruction::with1(Code::Fxrstor64_m512byte, operand(LEGACY))?);
            }
            for n in bits(used.vectors) {
                let (load, register) = match self.class {
                    Class::Avx => (Code::VEX_Vmovdqu_ymm_ymmm256, Register::YMM0 + n),
                    _ => (Code::Movdqu_xmm_xmmm128, Register::XMM0 + n),
                };
                code.push(Instruction::with2(load, register, operand(YMM + n as usize * 32))?);
            }
            if class::reads_flags(i) {
                code.push(Instruction::with2(Code::Mov_r8_rm8, Register::AH, operand(FLAGS))?);
                code.push(Instruction::with(Code::Sahf));
            }
            for n in bits(used.general_read) {
                code.push(Instruction::with2(
                    Code::Mov_r64_rm64,
                    Register::RAX + n,
                    operand(general(n as u8)),
                )?);
            }
            code.push(*i);
            for n in bits(used.general_written) {
                code.push(Instruction::with2(
                    Code::Mov_rm64_r64,
                    operand(general(n as u8)),
                    Register::RAX + n,
                )?);
            }
            if class::writes_flags(i) {
                code.push(Instruction::with(Code::Lahf));
                code.push(Instruction::with1(Code::Seto_rm8, Register::AL)?);
                code.push(Instruction::with2(Code::Mov_rm32_r32, operand(FLAGS), Register::EAX)?);
            }
            for n in bits(used.vectors_written) {
                code.push(match self.class {
                    Class::Avx => Instruction::with2(
                        Code::VEX_Vmovdqu_ymmm256_ymm,
                        operand(YMM + n as usize * 32),
                        Register::YMM0 + n,
                    )?,
                    _ => Instruction::with2(
                        Code::Movdqu_xmmm128_xmm,
                        operand(YMM + n as usize * 32),
                        Register::XMM0 + n,
                    )?,
                });
            }
            if x87 {
                code.push(Instruction::with1(Code::Fxsave64_m512byte, operand(LEGACY))?);
                code.push(Instruction::with(Code::Fninit));
            }
            if self.class == Class::Avx {
                // The code around stubs is legacy SSE, which is slow while upper halves are in use.
                code.push(Instruction::with(Code::VEX_Vzeroupper));
            }
            code.push(Instruction::with(Code::Retnq));
            Ok(code)
        };
        Some(build().and_then(|code| {
            let block = InstructionBlock::new(&code, 0);
            Ok(BlockEncoder::encode(64, block, BlockEncoderOptions::NONE)?.code_buffer)
        }))
    }
}

/// The registers that a rewritten instruction uses, by number, as bit sets.
#[derive(Default)]
struct Used {
    vectors: u32,
    vectors_written: u32,
    general_read: u32,
    general_written: u32,
}

impl Used {
    fn of(i: &Instruction) -> Option<Self> {
        let mut factory = InstructionInfoFactory::new();
        let info = factory.info(i);
        let mut used = Self::default();
        for r in info.used_registers() {
            let register = r.register();
            let read_only = matches!(r.access(), OpAccess::Read | OpAccess::CondRead);
            let bit = 1u32.checked_shl(register.number() as u32)?;
            if register.is_vector_register() {
                // Those written are loaded too: they may keep a part.
                used.vectors |= bit;
                used.vectors_written |= if read_only { 0 } else { bit };
            } else if register.is_gpr() {
                if register.full_register() == Register::RDI && read_only {
                    continue;
                }
                // RAX, RCX, RDX.
                if register.number() > 2 {
                    return None;
                }
                used.general_read |= bit;
                used.general_written |= if read_only { 0 } else { bit };
            } else if !register.is_st() && !register.is_mm() {
                return None;
            }
        }
        (used.vectors <= 0xffff).then_some(used)
    }
}

fn bits(set: u32) -> impl Iterator<Item = u32> {
    (0..32).filter(move |n| set >> n & 1 != 0)
}

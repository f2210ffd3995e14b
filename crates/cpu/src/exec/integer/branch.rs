//! Near branches: JMP, Jcc, CALL, RET, LOOP and JCXZ.
//!
//! Handlers are generic over [`Near`], the width of the instruction pointer that the operand size selects:
//! 64 bits in 64-bit mode always, elsewhere 16 or 32, to which the target is truncated.

use iced_x86::{Code, Instruction, Mnemonic as M, OpKind};
use mmu::Gva;

use super::condition::{condition, holds};
use super::form::{Form, conditional, form};
use super::stack::{Flat, Segmented, Stack};
use crate::data::Data;
use crate::fault::{Exec, Fault, fault};
use crate::insn::{Handler, Insn};
use crate::state::reg;
use crate::vcpu::Vcpu;

/// `near!(bits => handler::<_, A>)`: the handler for an instruction pointer of 16, 32 or 64 bits.
macro_rules! near {
    ($bits:expr => $handler:ident::<_ $(, $more:tt)*>) => {
        match $bits {
            16 => Some($handler::<Near16 $(, $more)*> as Handler),
            32 => Some($handler::<Near32 $(, $more)*> as Handler),
            64 => Some($handler::<Near64 $(, $more)*> as Handler),
            _ => None,
        }
    };
}

/// Chooses the handler of a near branch.
pub(super) fn select(i: &Instruction, insn: &Insn) -> Option<Handler> {
    let relative = match i.op0_kind() {
        OpKind::NearBranch16 => Some(16),
        OpKind::NearBranch32 => Some(32),
        OpKind::NearBranch64 => Some(64),
        _ => None,
    };
    if let Some(bits) = relative {
        return match i.mnemonic() {
            M::Jmp => near!(bits => jump_relative::<_>),
            M::Call => near!(bits => call_relative::<_>),
            M::Loop => counted(bits, loop_size(i.code()), LOOP),
            M::Loope => counted(bits, loop_size(i.code()), LOOPE),
            M::Loopne => counted(bits, loop_size(i.code()), LOOPNE),
            M::Jcxz => counted(bits, 2, JCXZ),
            M::Jecxz => counted(bits, 4, JCXZ),
            M::Jrcxz => counted(bits, 8, JCXZ),
            _ => {
                let condition = condition(i)?;
                match bits {
                    16 => conditional!(condition => jump_if::<Near16, _>),
                    32 => conditional!(condition => jump_if::<Near32, _>),
                    _ => conditional!(condition => jump_if::<Near64, _>),
                }
            }
        };
    }
    let (bits, call) = match i.code() {
        Code::Jmp_rm16 => (16, false),
        Code::Jmp_rm32 => (32, false),
        Code::Jmp_rm64 => (64, false),
        Code::Call_rm16 => (16, true),
        Code::Call_rm32 => (32, true),
        Code::Call_rm64 => (64, true),
        Code::Retnw | Code::Retnw_imm16 => return near!(16 => ret::<_>),
        Code::Retnd | Code::Retnd_imm16 => return near!(32 => ret::<_>),
        Code::Retnq if insn.imm == 0 => return Some(ret_long),
        Code::Retnq | Code::Retnq_imm16 => return near!(64 => ret::<_>),
        _ => return None,
    };
    match (form(i), call) {
        (Form::Reg, false) => near!(bits => jump_reg::<_>),
        (Form::Mem, false) => near!(bits => jump_mem::<_>),
        (Form::Reg, true) => near!(bits => call_reg::<_>),
        (Form::Mem, true) => near!(bits => call_mem::<_>),
        _ => None,
    }
}

/// A width of the instruction pointer.
trait Near {
    /// What CALL pushes and RET pops.
    type Ip: Data;
    /// Where.
    type Stack: Stack;

    /// Checks a target.
    fn check(vcpu: &Vcpu, target: u64) -> Exec;

    /// Truncates a target to the width.
    #[inline(always)]
    fn truncate(target: u64) -> u64 {
        Self::Ip::truncate(target).widen()
    }
}

struct Near16;
struct Near32;
struct Near64;

impl Near for Near16 {
    type Ip = u16;
    type Stack = Segmented;

    fn check(vcpu: &Vcpu, target: u64) -> Exec {
        vcpu.check_target(target)
    }
}

impl Near for Near32 {
    type Ip = u32;
    type Stack = Segmented;

    fn check(vcpu: &Vcpu, target: u64) -> Exec {
        vcpu.check_target(target)
    }
}

impl Near for Near64 {
    type Ip = u64;
    type Stack = Flat;

    #[inline(always)]
    fn check(vcpu: &Vcpu, target: u64) -> Exec {
        if vcpu.walk.canonical(Gva(target)) { Ok(()) } else { fault(Fault::gp(0)) }
    }
}

#[inline(always)]
fn jump<N: Near>(vcpu: &mut Vcpu, target: u64) -> Exec {
    let target = N::truncate(target);
    N::check(vcpu, target)?;
    vcpu.state.set_rip(target);
    Ok(())
}

/// The target is checked before the return address is pushed.
#[inline(always)]
fn call<N: Near>(vcpu: &mut Vcpu, target: u64) -> Exec {
    let target = N::truncate(target);
    N::check(vcpu, target)?;
    N::Stack::push(vcpu, N::Ip::truncate(vcpu.state.rip()))?;
    vcpu.state.set_rip(target);
    Ok(())
}

#[inline(always)]
fn relative(vcpu: &Vcpu, i: &Insn) -> u64 {
    vcpu.state.rip().wrapping_add(i.imm)
}

fn jump_relative<N: Near>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    jump::<N>(vcpu, relative(vcpu, i))
}

fn jump_if<N: Near, const C: u8>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    if holds::<C>(&vcpu.state.flags) { jump::<N>(vcpu, relative(vcpu, i)) } else { Ok(()) }
}

fn jump_reg<N: Near>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    jump::<N>(vcpu, vcpu.reg(i.dst))
}

fn jump_mem<N: Near>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let target: N::Ip = vcpu.load(i)?;
    jump::<N>(vcpu, target.widen())
}

fn call_relative<N: Near>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    call::<N>(vcpu, relative(vcpu, i))
}

fn call_reg<N: Near>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    call::<N>(vcpu, vcpu.reg(i.dst))
}

fn call_mem<N: Near>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let target: N::Ip = vcpu.load(i)?;
    call::<N>(vcpu, target.widen())
}

/// RET, with the number of bytes to drop in `imm`.
fn ret<N: Near>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let target: N::Ip = N::Stack::peek(vcpu)?;
    jump::<N>(vcpu, target.widen())?;
    N::Stack::release(vcpu, N::Ip::SIZE + (i.imm & 0xffff));
    Ok(())
}

/// RET in 64-bit mode, dropping nothing.
fn ret_long(vcpu: &mut Vcpu, _: &Insn) -> Exec {
    let target: u64 = Flat::peek(vcpu)?;
    jump::<Near64>(vcpu, target)?;
    Flat::release(vcpu, 8);
    Ok(())
}

// ---- LOOP, JCXZ ----

const LOOP: u8 = 0;
const LOOPE: u8 = 1;
const LOOPNE: u8 = 2;
const JCXZ: u8 = 3;

/// The size of the counter, which the address size selects.
fn loop_size(code: Code) -> usize {
    match code {
        Code::Loop_rel8_16_CX
        | Code::Loop_rel8_32_CX
        | Code::Loope_rel8_16_CX
        | Code::Loope_rel8_32_CX
        | Code::Loopne_rel8_16_CX
        | Code::Loopne_rel8_32_CX => 2,
        Code::Loop_rel8_16_ECX
        | Code::Loop_rel8_32_ECX
        | Code::Loop_rel8_64_ECX
        | Code::Loope_rel8_16_ECX
        | Code::Loope_rel8_32_ECX
        | Code::Loope_rel8_64_ECX
        | Code::Loopne_rel8_16_ECX
        | Code::Loopne_rel8_32_ECX
        | Code::Loopne_rel8_64_ECX => 4,
        _ => 8,
    }
}

fn counted(bits: u32, counter: usize, kind: u8) -> Option<Handler> {
    macro_rules! table {
        ($($kind:tt),*) => {
            match (counter, kind) {
                $(
                    (2, $kind) => near!(bits => count::<_, u16, $kind>),
                    (4, $kind) => near!(bits => count::<_, u32, $kind>),
                    (8, $kind) => near!(bits => count::<_, u64, $kind>),
                )*
                _ => None,
            }
        };
    }
    table!(LOOP, LOOPE, LOOPNE, JCXZ)
}

/// The counter changes only if the branch can be taken without a fault.
fn count<N: Near, C: Data, const KIND: u8>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let counter: C = vcpu.get(reg::RCX);
    if KIND == JCXZ {
        return if counter.widen() == 0 { jump::<N>(vcpu, relative(vcpu, i)) } else { Ok(()) };
    }
    let counter = C::truncate(counter.widen().wrapping_sub(1));
    let zf = vcpu.state.flags.zf();
    let more = counter.widen() != 0
        && match KIND {
            LOOPE => zf,
            LOOPNE => !zf,
            _ => true,
        };
    if more {
        jump::<N>(vcpu, relative(vcpu, i))?;
    }
    vcpu.set(reg::RCX, counter);
    Ok(())
}

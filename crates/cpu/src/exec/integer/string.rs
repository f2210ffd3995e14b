//! String instructions: MOVS, STOS, LODS, CMPS and SCAS, alone and repeated.
//!
//! # Theory of operation
//! One element is one step: access, then advance the pointers. A repeated instruction is a loop of steps
//! that leaves the registers consistent after each, so that a fault, or a request for attention, can stop it
//! between any two: it then returns [`Stop::Restart`] and later goes on from where it is. It looks for
//! attention every [`BUDGET`] elements, and for traps (single-step, data breakpoints) after each.
//!
//! Forward MOVS and STOS on flat addresses go in runs, at most to the end of a page, where the TLB has
//! the pages at hand; the single step that follows a miss brings them there.

use iced_x86::{Instruction, Mnemonic as M};

use super::form::sized;
use crate::data::Data;
use crate::fault::{Exec, Stop};
use crate::insn::{Handler, Insn, insn_flags};
use crate::state::{CodeMode, reg, seg, slow};
use crate::vcpu::Vcpu;

/// Elements between two looks at the attention word.
const BUDGET: u64 = 4096;

/// Chooses the handler of a string instruction.
///
/// The source is in segment `seg`; the destination, always ES, in segment `dst`.
pub(super) fn select(i: &Instruction, mode: CodeMode, insn: &mut Insn) -> Option<Handler> {
    let (size, handler): (usize, Choose) = match i.mnemonic() {
        M::Movsb => (1, choose::<Movs>),
        M::Movsw => (2, choose::<Movs>),
        // The mnemonic is also that of an SSE2 move.
        M::Movsd if i.is_string_instruction() => (4, choose::<Movs>),
        M::Movsq => (8, choose::<Movs>),
        M::Stosb => (1, choose::<Stos>),
        M::Stosw => (2, choose::<Stos>),
        M::Stosd => (4, choose::<Stos>),
        M::Stosq => (8, choose::<Stos>),
        M::Lodsb => (1, choose::<Lods>),
        M::Lodsw => (2, choose::<Lods>),
        M::Lodsd => (4, choose::<Lods>),
        M::Lodsq => (8, choose::<Lods>),
        M::Cmpsb => (1, choose::<Cmps>),
        M::Cmpsw => (2, choose::<Cmps>),
        M::Cmpsd if i.is_string_instruction() => (4, choose::<Cmps>),
        M::Cmpsq => (8, choose::<Cmps>),
        M::Scasb => (1, choose::<Scas>),
        M::Scasw => (2, choose::<Scas>),
        M::Scasd => (4, choose::<Scas>),
        M::Scasq => (8, choose::<Scas>),
        _ => return None,
    };
    insn.dst = if mode == CodeMode::Bits64 { seg::FLAT } else { seg::ES };
    handler(size, insn.has(insn_flags::REP | insn_flags::REPNE))
}

/// Chooses among the handlers of one operation by element size and whether it is repeated.
type Choose = fn(usize, bool) -> Option<Handler>;

fn choose<S: StringOp>(size: usize, repeated: bool) -> Option<Handler> {
    if repeated { sized!(size => repeat::<_, S>) } else { sized!(size => once::<_, S>) }
}

/// A string operation.
trait StringOp {
    /// Whether ZF ends a repetition.
    const COMPARES: bool = false;

    /// Accesses one element and advances the pointers.
    fn step<T: Data>(vcpu: &mut Vcpu, i: &Insn) -> Exec;

    /// Does up to `count` elements at flat addresses upward at once; returns how many, perhaps none.
    #[inline(always)]
    fn run<T: Data>(_: &mut Vcpu, _: &Insn, _count: u64) -> u64 {
        0
    }
}

/// The low bits of a pointer or counter that the address size selects.
#[inline(always)]
fn address_mask(i: &Insn) -> u64 {
    match i.address_size {
        8 => u64::MAX,
        4 => 0xffff_ffff,
        _ => 0xffff,
    }
}

/// Replaces a pointer or counter: a 32-bit one clears the upper half, a 16-bit one keeps the rest.
#[inline(always)]
fn set_masked(vcpu: &mut Vcpu, i: &Insn, n: u8, value: u64) {
    match i.address_size {
        8 => vcpu.set_reg(n, value),
        4 => vcpu.set(n, value as u32),
        _ => vcpu.set(n, value as u16),
    }
}

/// The linear address of the element at RSI.
#[inline(always)]
fn source<T: Data>(vcpu: &Vcpu, i: &Insn) -> Exec<u64> {
    let offset = vcpu.reg(reg::RSI);
    if i.has(insn_flags::SEGMENTED) {
        return vcpu.segmented(i.seg, offset & address_mask(i), T::SIZE, false);
    }
    Ok(vcpu.state.seg_base[usize::from(i.seg & 7)].wrapping_add(offset))
}

/// The linear address of the element at RDI.
#[inline(always)]
fn destination<T: Data>(vcpu: &Vcpu, i: &Insn, write: bool) -> Exec<u64> {
    let offset = vcpu.reg(reg::RDI);
    if i.has(insn_flags::SEGMENTED) {
        return vcpu.segmented(i.dst, offset & address_mask(i), T::SIZE, write);
    }
    Ok(offset)
}

/// Moves the pointer `n` by one element in the direction of DF.
#[inline(always)]
fn advance<T: Data>(vcpu: &mut Vcpu, i: &Insn, n: u8) {
    let step = if vcpu.state.flags.df() { T::SIZE.wrapping_neg() } else { T::SIZE };
    set_masked(vcpu, i, n, vcpu.reg(n).wrapping_add(step));
}

#[inline(always)]
fn compare<T: Data>(vcpu: &mut Vcpu, a: T, b: T) {
    let difference = T::truncate(a.widen().wrapping_sub(b.widen()));
    vcpu.state.flags.set_sub(a, b, difference);
}

struct Movs;
struct Stos;
struct Lods;
struct Cmps;
struct Scas;

impl StringOp for Movs {
    #[inline(always)]
    fn step<T: Data>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
        let from = source::<T>(vcpu, i)?;
        let to = destination::<T>(vcpu, i, true)?;
        let value: T = vcpu.read(from)?;
        vcpu.write(to, value)?;
        advance::<T>(vcpu, i, reg::RSI);
        advance::<T>(vcpu, i, reg::RDI);
        Ok(())
    }

    #[inline(always)]
    fn run<T: Data>(vcpu: &mut Vcpu, i: &Insn, count: u64) -> u64 {
        let (Ok(from), Ok(to)) = (source::<T>(vcpu, i), destination::<T>(vcpu, i, true)) else { return 0 };
        let room = (0x1000 - (from & 0xfff)).min(0x1000 - (to & 0xfff));
        let size = count.min(room / T::SIZE) * T::SIZE;
        if size == 0 {
            return 0;
        }
        let copied = vcpu.copy_run(to, from, size);
        vcpu.set_reg(reg::RSI, vcpu.reg(reg::RSI).wrapping_add(copied));
        vcpu.set_reg(reg::RDI, vcpu.reg(reg::RDI).wrapping_add(copied));
        copied / T::SIZE
    }
}

impl StringOp for Stos {
    #[inline(always)]
    fn step<T: Data>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
        let to = destination::<T>(vcpu, i, true)?;
        let value: T = vcpu.get(reg::RAX);
        vcpu.write(to, value)?;
        advance::<T>(vcpu, i, reg::RDI);
        Ok(())
    }

    #[inline(always)]
    fn run<T: Data>(vcpu: &mut Vcpu, i: &Insn, count: u64) -> u64 {
        let Ok(to) = destination::<T>(vcpu, i, true) else { return 0 };
        let value: T = vcpu.get(reg::RAX);
        let filled = vcpu.fill_run(to, value, count);
        vcpu.set_reg(reg::RDI, to.wrapping_add(filled * T::SIZE));
        filled
    }
}

impl StringOp for Lods {
    #[inline(always)]
    fn step<T: Data>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
        let from = source::<T>(vcpu, i)?;
        let value: T = vcpu.read(from)?;
        vcpu.set(reg::RAX, value);
        advance::<T>(vcpu, i, reg::RSI);
        Ok(())
    }
}

impl StringOp for Cmps {
    const COMPARES: bool = true;

    #[inline(always)]
    fn step<T: Data>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
        let from = source::<T>(vcpu, i)?;
        let to = destination::<T>(vcpu, i, false)?;
        let a: T = vcpu.read(from)?;
        let b: T = vcpu.read(to)?;
        compare(vcpu, a, b);
        advance::<T>(vcpu, i, reg::RSI);
        advance::<T>(vcpu, i, reg::RDI);
        Ok(())
    }
}

impl StringOp for Scas {
    const COMPARES: bool = true;

    #[inline(always)]
    fn step<T: Data>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
        let to = destination::<T>(vcpu, i, false)?;
        let b: T = vcpu.read(to)?;
        compare(vcpu, vcpu.get(reg::RAX), b);
        advance::<T>(vcpu, i, reg::RDI);
        Ok(())
    }
}

fn once<T: Data, S: StringOp>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    S::step::<T>(vcpu, i)
}

/// REP; for CMPS and SCAS REPE or REPNE.
fn repeat<T: Data, S: StringOp>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let mut count = vcpu.reg(reg::RCX) & address_mask(i);
    let in_runs = !i.has(insn_flags::SEGMENTED) && !vcpu.state.flags.df();
    let wanted_zf = !i.has(insn_flags::REPNE);
    // A fault shows the flags as they were, not those of the last comparison (Intel SDM vol. 2, REP).
    let before = vcpu.state.flags;
    let mut budget = BUDGET;
    while count != 0 {
        let mut done = if in_runs { S::run::<T>(vcpu, i, count.min(budget)) } else { 0 };
        if done == 0 {
            if let Err(stop) = S::step::<T>(vcpu, i) {
                if S::COMPARES {
                    vcpu.state.flags = before;
                }
                return Err(stop);
            }
            done = 1;
        }
        count -= done;
        set_masked(vcpu, i, reg::RCX, count);
        if count == 0 || S::COMPARES && vcpu.state.flags.zf() != wanted_zf {
            break;
        }
        budget -= done;
        if vcpu.state.slow & (slow::SINGLE_STEP | slow::DEBUG_TRAP) != 0
            || budget == 0 && vcpu.attention().peek() != 0
        {
            return Err(Box::new(Stop::Restart));
        }
        if budget == 0 {
            budget = BUDGET;
        }
    }
    Ok(())
}

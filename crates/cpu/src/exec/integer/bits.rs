//! Single bits (BT, BTS, BTR, BTC) and bit counts and scans.

use iced_x86::{Instruction, Mnemonic as M};

use super::form::{Form, form, lockable, size, wide};
use crate::data::Data;
use crate::fault::Exec;
use crate::flags::{Flags, ZF};
use crate::insn::{Handler, Insn};
use crate::vcpu::Vcpu;

/// Chooses the handler of a bit instruction.
pub(super) fn select(i: &Instruction, insn: &Insn) -> Option<Handler> {
    match i.mnemonic() {
        M::Bt => test(i),
        M::Bts => change::<Set>(i, insn),
        M::Btr => change::<Reset>(i, insn),
        M::Btc => change::<Complement>(i, insn),
        M::Bsf => scan::<Bsf>(i),
        M::Bsr => scan::<Bsr>(i),
        M::Tzcnt => scan::<Tzcnt>(i),
        M::Lzcnt => scan::<Lzcnt>(i),
        M::Popcnt => scan::<Popcnt>(i),
        _ => None,
    }
}

// ---- BT, BTS, BTR, BTC ----

/// What happens to the bit, given its mask.
trait Change {
    fn apply(value: u64, mask: u64) -> u64;
}

struct Set;
struct Reset;
struct Complement;

impl Change for Set {
    #[inline(always)]
    fn apply(value: u64, mask: u64) -> u64 {
        value | mask
    }
}

impl Change for Reset {
    #[inline(always)]
    fn apply(value: u64, mask: u64) -> u64 {
        value & !mask
    }
}

impl Change for Complement {
    #[inline(always)]
    fn apply(value: u64, mask: u64) -> u64 {
        value ^ mask
    }
}

fn test(i: &Instruction) -> Option<Handler> {
    let n = size(i, 0);
    match form(i) {
        Form::RegReg => wide!(n => test_reg_reg::<_>),
        Form::RegImm => wide!(n => test_reg_imm::<_>),
        Form::MemReg => wide!(n => test_mem_reg::<_>),
        Form::MemImm => wide!(n => test_mem_imm::<_>),
        _ => None,
    }
}

fn change<O: Change>(i: &Instruction, insn: &Insn) -> Option<Handler> {
    let n = size(i, 0);
    match form(i) {
        Form::RegReg => wide!(n => change_reg_reg::<_, O>),
        Form::RegImm => wide!(n => change_reg_imm::<_, O>),
        Form::MemReg => lockable!(insn, wide, n => change_mem_reg::<_, O>),
        Form::MemImm => lockable!(insn, wide, n => change_mem_imm::<_, O>),
        _ => None,
    }
}

/// The mask of bit `offset`, taken modulo the operand size.
#[inline(always)]
fn mask<T: Data>(offset: u64) -> u64 {
    1 << (offset & u64::from(T::BITS - 1))
}

/// The operand that holds the bit a register selects, counted (with sign) from the memory operand's own
/// address: it may lie anywhere before or after it.
#[inline(always)]
fn selected<T: Data>(i: &Insn, offset: T) -> Insn {
    let units = offset.sign_extend() as i64 >> T::BITS.trailing_zeros();
    i.displaced((units as u64).wrapping_mul(T::SIZE))
}

/// CF; the others, undefined, stay.
#[inline(always)]
fn set_tested<T: Data>(flags: &mut Flags, value: T, mask: u64) {
    flags.set_cf(value.widen() & mask != 0);
}

fn test_reg_reg<T: Data>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let (value, mask) = (vcpu.get::<T>(i.dst), mask::<T>(vcpu.reg(i.src)));
    set_tested(&mut vcpu.state.flags, value, mask);
    Ok(())
}

fn test_reg_imm<T: Data>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let value: T = vcpu.get(i.dst);
    set_tested(&mut vcpu.state.flags, value, mask::<T>(i.imm));
    Ok(())
}

fn test_mem_reg<T: Data>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let offset: T = vcpu.get(i.src);
    let value: T = vcpu.load(&selected(i, offset))?;
    set_tested(&mut vcpu.state.flags, value, mask::<T>(offset.widen()));
    Ok(())
}

fn test_mem_imm<T: Data>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let value: T = vcpu.load(i)?;
    set_tested(&mut vcpu.state.flags, value, mask::<T>(i.imm));
    Ok(())
}

#[inline(always)]
fn change_register<T: Data, O: Change>(vcpu: &mut Vcpu, i: &Insn, mask: u64) {
    let value: T = vcpu.get(i.dst);
    set_tested(&mut vcpu.state.flags, value, mask);
    vcpu.set(i.dst, T::truncate(O::apply(value.widen(), mask)));
}

#[inline(always)]
fn change_memory<T: Data, O: Change, const LOCK: bool>(vcpu: &mut Vcpu, i: &Insn, mask: u64) -> Exec {
    let (value, _) = vcpu.update(i, LOCK, |value: T| T::truncate(O::apply(value.widen(), mask)))?;
    set_tested(&mut vcpu.state.flags, value, mask);
    Ok(())
}

fn change_reg_reg<T: Data, O: Change>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    change_register::<T, O>(vcpu, i, mask::<T>(vcpu.reg(i.src)));
    Ok(())
}

fn change_reg_imm<T: Data, O: Change>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    change_register::<T, O>(vcpu, i, mask::<T>(i.imm));
    Ok(())
}

fn change_mem_reg<T: Data, O: Change, const LOCK: bool>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let offset: T = vcpu.get(i.src);
    change_memory::<T, O, LOCK>(vcpu, &selected(i, offset), mask::<T>(offset.widen()))
}

fn change_mem_imm<T: Data, O: Change, const LOCK: bool>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    change_memory::<T, O, LOCK>(vcpu, i, mask::<T>(i.imm))
}

// ---- scans and counts ----

/// A scan or count: the result, or `None` to leave the destination as it is, and the flags.
trait Scan {
    fn scan<T: Data>(flags: &mut Flags, source: T) -> Option<u64>;
}

struct Bsf;
struct Bsr;
struct Tzcnt;
struct Lzcnt;
struct Popcnt;

impl Scan for Bsf {
    #[inline(always)]
    fn scan<T: Data>(flags: &mut Flags, source: T) -> Option<u64> {
        let source = source.widen();
        flags.set_zf(source == 0);
        (source != 0).then(|| source.trailing_zeros().into())
    }
}

impl Scan for Bsr {
    #[inline(always)]
    fn scan<T: Data>(flags: &mut Flags, source: T) -> Option<u64> {
        let source = source.widen();
        flags.set_zf(source == 0);
        source.checked_ilog2().map(u64::from)
    }
}

#[inline(always)]
fn set_counted(flags: &mut Flags, source_is_zero: bool, result: u64) {
    flags.set_cf(source_is_zero);
    flags.set_zf(result == 0);
}

impl Scan for Tzcnt {
    #[inline(always)]
    fn scan<T: Data>(flags: &mut Flags, source: T) -> Option<u64> {
        let result = source.widen().trailing_zeros().min(T::BITS).into();
        set_counted(flags, source.widen() == 0, result);
        Some(result)
    }
}

impl Scan for Lzcnt {
    #[inline(always)]
    fn scan<T: Data>(flags: &mut Flags, source: T) -> Option<u64> {
        let result = (source.widen().leading_zeros() - (64 - T::BITS)).into();
        set_counted(flags, source.widen() == 0, result);
        Some(result)
    }
}

impl Scan for Popcnt {
    #[inline(always)]
    fn scan<T: Data>(flags: &mut Flags, source: T) -> Option<u64> {
        let zero = source.widen() == 0;
        flags.set_arithmetic(if zero { ZF } else { 0 });
        Some(source.widen().count_ones().into())
    }
}

fn scan<O: Scan>(i: &Instruction) -> Option<Handler> {
    match form(i) {
        Form::RegReg => wide!(size(i, 0) => scan_reg::<_, O>),
        Form::RegMem => wide!(size(i, 0) => scan_mem::<_, O>),
        _ => None,
    }
}

#[inline(always)]
fn scan_into<T: Data, O: Scan>(vcpu: &mut Vcpu, i: &Insn, source: T) {
    if let Some(result) = O::scan(&mut vcpu.state.flags, source) {
        vcpu.set(i.dst, T::truncate(result));
    }
}

fn scan_reg<T: Data, O: Scan>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    scan_into::<T, O>(vcpu, i, vcpu.get(i.src));
    Ok(())
}

fn scan_mem<T: Data, O: Scan>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let source = vcpu.load(i)?;
    scan_into::<T, O>(vcpu, i, source);
    Ok(())
}

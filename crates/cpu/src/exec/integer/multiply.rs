//! Multiplication and division.

use iced_x86::{Instruction, Mnemonic as M};

use super::form::{Form, form, large, size, sized, wide};
use super::transfer::AH;
use crate::data::Data;
use crate::fault::{Exec, Fault, fault, vector};
use crate::insn::{Handler, Insn};
use crate::state::reg;
use crate::vcpu::Vcpu;

/// Chooses the handler of a multiplication or division.
pub(super) fn select(i: &Instruction) -> Option<Handler> {
    let n = if i.op_count() > 0 { size(i, 0) } else { 0 };
    match (i.mnemonic(), i.op_count(), form(i)) {
        (M::Mul, _, Form::Reg) => sized!(n => multiply_reg::<_, false>),
        (M::Mul, _, Form::Mem) => sized!(n => multiply_mem::<_, false>),
        (M::Imul, 1, Form::Reg) => sized!(n => multiply_reg::<_, true>),
        (M::Imul, 1, Form::Mem) => sized!(n => multiply_mem::<_, true>),
        (M::Imul, 2, Form::RegReg) => wide!(n => imul_reg::<_>),
        (M::Imul, 2, Form::RegMem) => wide!(n => imul_mem::<_>),
        (M::Imul, 3, Form::RegReg) => wide!(n => imul_reg_imm::<_>),
        (M::Imul, 3, Form::RegMem) => wide!(n => imul_mem_imm::<_>),
        (M::Div, _, Form::Reg) => sized!(n => divide_reg::<_, false>),
        (M::Div, _, Form::Mem) => sized!(n => divide_mem::<_, false>),
        (M::Idiv, _, Form::Reg) => sized!(n => divide_reg::<_, true>),
        (M::Idiv, _, Form::Mem) => sized!(n => divide_mem::<_, true>),
        // The third operand is the multiplier: register or memory.
        (M::Mulx, _, Form::RegReg) if i.op_kind(2) == iced_x86::OpKind::Memory => large!(n => mulx_mem::<_>),
        (M::Mulx, _, Form::RegReg) => large!(n => mulx_reg::<_>),
        _ => None,
    }
}

/// CF and OF if the product does not fit. The other flags, undefined, come from its low half.
#[inline(always)]
fn set_flags<T: Data>(vcpu: &mut Vcpu, low: T, overflow: bool) {
    vcpu.state.flags.set_result(low);
    vcpu.state.flags.set_carry_overflow_adjust(overflow, overflow, false);
}

/// The product as low and high half, and whether the high half says more than the low.
#[inline(always)]
fn product<T: Data, const SIGNED: bool>(a: T, b: T) -> (T, T, bool) {
    if SIGNED {
        let full = i128::from(a.sign_extend() as i64) * i128::from(b.sign_extend() as i64);
        let low = T::truncate(full as u64);
        (low, T::truncate((full >> T::BITS) as u64), i128::from(low.sign_extend() as i64) != full)
    } else {
        let full = u128::from(a.widen()) * u128::from(b.widen());
        let high = T::truncate((full >> T::BITS) as u64);
        (T::truncate(full as u64), high, high.widen() != 0)
    }
}

#[inline(always)]
fn multiply<T: Data, const SIGNED: bool>(vcpu: &mut Vcpu, b: T) {
    let (low, high, overflow) = product::<T, SIGNED>(vcpu.get(reg::RAX), b);
    vcpu.set(reg::RAX, low);
    vcpu.set(if T::SIZE == 1 { AH } else { reg::RDX }, high);
    set_flags(vcpu, low, overflow);
}

fn multiply_reg<T: Data, const SIGNED: bool>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    multiply::<T, SIGNED>(vcpu, vcpu.get(i.dst));
    Ok(())
}

fn multiply_mem<T: Data, const SIGNED: bool>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let b = vcpu.load(i)?;
    multiply::<T, SIGNED>(vcpu, b);
    Ok(())
}

#[inline(always)]
fn imul<T: Data>(vcpu: &mut Vcpu, i: &Insn, a: T, b: T) {
    let (low, _, overflow) = product::<T, true>(a, b);
    set_flags(vcpu, low, overflow);
    vcpu.set(i.dst, low);
}

fn imul_reg<T: Data>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    imul::<T>(vcpu, i, vcpu.get(i.dst), vcpu.get(i.src));
    Ok(())
}

fn imul_mem<T: Data>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let b = vcpu.load(i)?;
    imul::<T>(vcpu, i, vcpu.get(i.dst), b);
    Ok(())
}

fn imul_reg_imm<T: Data>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    imul::<T>(vcpu, i, vcpu.get(i.src), T::truncate(i.imm));
    Ok(())
}

fn imul_mem_imm<T: Data>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let a = vcpu.load(i)?;
    imul::<T>(vcpu, i, a, T::truncate(i.imm));
    Ok(())
}

/// Quotient and remainder of the double-width dividend, or `None` where the quotient does not fit.
#[inline(always)]
fn quotient<T: Data, const SIGNED: bool>(high: T, low: T, divisor: T) -> Option<(T, T)> {
    if divisor.widen() == 0 {
        return None;
    }
    if SIGNED {
        let divisor = divisor.sign_extend() as i64;
        let (quotient, remainder) = if T::BITS < 64 {
            let dividend = (high.sign_extend() << T::BITS | low.widen()) as i64;
            (dividend.checked_div(divisor)?, dividend.wrapping_rem(divisor))
        } else if high.widen() as i64 == low.widen() as i64 >> 63 {
            let dividend = low.widen() as i64;
            (dividend.checked_div(divisor)?, dividend.wrapping_rem(divisor))
        } else {
            let dividend = (u128::from(high.widen()) << 64 | u128::from(low.widen())) as i128;
            let divisor = i128::from(divisor);
            let quotient = i64::try_from(dividend.checked_div(divisor)?).ok()?;
            (quotient, dividend.wrapping_rem(divisor) as i64)
        };
        let result = T::truncate(quotient as u64);
        (result.sign_extend() == quotient as u64).then_some((result, T::truncate(remainder as u64)))
    } else {
        let divisor = divisor.widen();
        if high.widen() >= divisor {
            return None;
        }
        let (quotient, remainder) = if T::BITS < 64 {
            let dividend = high.widen() << T::BITS | low.widen();
            (dividend / divisor, dividend % divisor)
        } else if high.widen() == 0 {
            (low.widen() / divisor, low.widen() % divisor)
        } else {
            let dividend = u128::from(high.widen()) << 64 | u128::from(low.widen());
            ((dividend / u128::from(divisor)) as u64, (dividend % u128::from(divisor)) as u64)
        };
        Some((T::truncate(quotient), T::truncate(remainder)))
    }
}

/// Flags, undefined, stay.
#[inline(always)]
fn divide<T: Data, const SIGNED: bool>(vcpu: &mut Vcpu, divisor: T) -> Exec {
    let high = if T::SIZE == 1 { AH } else { reg::RDX };
    match quotient::<T, SIGNED>(vcpu.get(high), vcpu.get(reg::RAX), divisor) {
        None => fault(Fault::new(vector::DE)),
        Some((quotient, remainder)) => {
            vcpu.set(reg::RAX, quotient);
            vcpu.set(high, remainder);
            Ok(())
        }
    }
}

fn divide_reg<T: Data, const SIGNED: bool>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    divide::<T, SIGNED>(vcpu, vcpu.get(i.dst))
}

fn divide_mem<T: Data, const SIGNED: bool>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let divisor = vcpu.load(i)?;
    divide::<T, SIGNED>(vcpu, divisor)
}

/// Low half to the second operand, then high half to the first; flags stay.
#[inline(always)]
fn mulx<T: Data>(vcpu: &mut Vcpu, i: &Insn, b: T) {
    let (low, high, _) = product::<T, false>(vcpu.get(reg::RDX), b);
    vcpu.set(i.src, low);
    vcpu.set(i.dst, high);
}

fn mulx_reg<T: Data>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    mulx::<T>(vcpu, i, vcpu.get(i.src2));
    Ok(())
}

fn mulx_mem<T: Data>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let b = vcpu.load(i)?;
    mulx::<T>(vcpu, i, b);
    Ok(())
}

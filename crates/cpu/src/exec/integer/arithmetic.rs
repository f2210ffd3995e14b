//! Addition, subtraction, logic, comparison, and their forms with one operand.

use iced_x86::{Instruction, Mnemonic as M};

use super::form::{Form, form, large, lockable, size, sized};
use crate::data::Data;
use crate::fault::Exec;
use crate::flags::Flags;
use crate::insn::{Handler, Insn};
use crate::vcpu::Vcpu;

/// Chooses the handler of an arithmetic or logical instruction.
pub(super) fn select(i: &Instruction, insn: &Insn) -> Option<Handler> {
    match i.mnemonic() {
        M::Add => binary::<Add>(i, insn),
        M::Or => binary::<Or>(i, insn),
        M::Adc => binary::<Adc>(i, insn),
        M::Sbb => binary::<Sbb>(i, insn),
        M::And => binary::<And>(i, insn),
        M::Sub => binary::<Sub>(i, insn),
        M::Xor => binary::<Xor>(i, insn),
        M::Cmp => compare::<Sub>(i),
        M::Test => compare::<And>(i),
        M::Inc => unary::<Inc>(i, insn),
        M::Dec => unary::<Dec>(i, insn),
        M::Neg => unary::<Neg>(i, insn),
        M::Not => unary::<Not>(i, insn),
        M::Adcx => add_one_flag::<true>(i),
        M::Adox => add_one_flag::<false>(i),
        _ => None,
    }
}

/// An operation with two operands.
trait Binary {
    /// The result, given CF.
    fn result(carry: bool, a: u64, b: u64) -> u64;
    /// The flags that the result leaves.
    fn flags<T: Data>(flags: &mut Flags, a: T, b: T, result: T);
}

/// An operation with one operand.
trait Unary {
    /// The result.
    fn result(a: u64) -> u64;
    /// The flags that the result leaves.
    fn flags<T: Data>(flags: &mut Flags, a: T, result: T);
}

macro_rules! binary {
    ($($name:ident: |$carry:ident, $a:ident, $b:ident| $result:expr, |$flags:ident, $r:ident| $set:expr;)*) => {$(
        struct $name;

        impl Binary for $name {
            #[inline(always)]
            fn result($carry: bool, $a: u64, $b: u64) -> u64 {
                $result
            }

            #[inline(always)]
            fn flags<T: Data>($flags: &mut Flags, $a: T, $b: T, $r: T) {
                $set
            }
        }
    )*};
}

macro_rules! unary {
    ($($name:ident: |$a:ident| $result:expr, |$flags:ident, $r:ident| $set:expr;)*) => {$(
        struct $name;

        impl Unary for $name {
            #[inline(always)]
            fn result($a: u64) -> u64 {
                $result
            }

            #[inline(always)]
            fn flags<T: Data>($flags: &mut Flags, $a: T, $r: T) {
                $set
            }
        }
    )*};
}

binary! {
    Add: |_carry, a, b| a.wrapping_add(b), |flags, r| flags.set_add(a, b, r);
    Adc: |carry, a, b| a.wrapping_add(b).wrapping_add(carry.into()), |flags, r| flags.set_add(a, b, r);
    Sub: |_carry, a, b| a.wrapping_sub(b), |flags, r| flags.set_sub(a, b, r);
    Sbb: |carry, a, b| a.wrapping_sub(b).wrapping_sub(carry.into()), |flags, r| flags.set_sub(a, b, r);
    And: |_carry, a, b| a & b, |flags, r| { let _ = (a, b); flags.set_logic(r) };
    Or: |_carry, a, b| a | b, |flags, r| { let _ = (a, b); flags.set_logic(r) };
    Xor: |_carry, a, b| a ^ b, |flags, r| { let _ = (a, b); flags.set_logic(r) };
}

unary! {
    Inc: |a| a.wrapping_add(1), |flags, r| flags.set_inc(a, r);
    Dec: |a| a.wrapping_sub(1), |flags, r| flags.set_dec(a, r);
    Neg: |a| a.wrapping_neg(), |flags, r| flags.set_sub(T::truncate(0), a, r);
    Not: |a| !a, |flags, r| { let _ = (flags, a, r); };
}

fn binary<O: Binary>(i: &Instruction, insn: &Insn) -> Option<Handler> {
    let n = size(i, 0);
    match form(i) {
        Form::RegReg => sized!(n => reg_reg::<_, O>),
        Form::RegImm => sized!(n => reg_imm::<_, O>),
        Form::RegMem => sized!(n => reg_mem::<_, O>),
        Form::MemReg => lockable!(insn, sized, n => mem_reg::<_, O>),
        Form::MemImm => lockable!(insn, sized, n => mem_imm::<_, O>),
        _ => None,
    }
}

fn compare<O: Binary>(i: &Instruction) -> Option<Handler> {
    let n = size(i, 0);
    match form(i) {
        Form::RegReg => sized!(n => compare_reg_reg::<_, O>),
        Form::RegImm => sized!(n => compare_reg_imm::<_, O>),
        Form::RegMem => sized!(n => compare_reg_mem::<_, O>),
        Form::MemReg => sized!(n => compare_mem_reg::<_, O>),
        Form::MemImm => sized!(n => compare_mem_imm::<_, O>),
        _ => None,
    }
}

fn unary<O: Unary>(i: &Instruction, insn: &Insn) -> Option<Handler> {
    let n = size(i, 0);
    match form(i) {
        Form::Reg => sized!(n => unary_reg::<_, O>),
        Form::Mem => lockable!(insn, sized, n => unary_mem::<_, O>),
        _ => None,
    }
}

#[inline(always)]
fn apply<T: Data, O: Binary>(carry: bool, a: T, b: T) -> T {
    T::truncate(O::result(carry, a.widen(), b.widen()))
}

/// Operates on a register in place.
#[inline(always)]
fn into_register<T: Data, O: Binary>(vcpu: &mut Vcpu, i: &Insn, b: T) {
    let a = vcpu.get(i.dst);
    let result = apply::<T, O>(vcpu.state.flags.cf(), a, b);
    O::flags(&mut vcpu.state.flags, a, b, result);
    vcpu.set(i.dst, result);
}

/// Operates on memory in place.
#[inline(always)]
fn into_memory<T: Data, O: Binary, const LOCK: bool>(vcpu: &mut Vcpu, i: &Insn, b: T) -> Exec {
    let carry = vcpu.state.flags.cf();
    let (a, result) = vcpu.update(i, LOCK, |a| apply::<T, O>(carry, a, b))?;
    O::flags(&mut vcpu.state.flags, a, b, result);
    Ok(())
}

/// Sets the flags alone.
#[inline(always)]
fn flags_only<T: Data, O: Binary>(vcpu: &mut Vcpu, a: T, b: T) {
    O::flags(&mut vcpu.state.flags, a, b, apply::<T, O>(false, a, b));
}

fn reg_reg<T: Data, O: Binary>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    into_register::<T, O>(vcpu, i, vcpu.get(i.src));
    Ok(())
}

fn reg_imm<T: Data, O: Binary>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    into_register::<T, O>(vcpu, i, T::truncate(i.imm));
    Ok(())
}

fn reg_mem<T: Data, O: Binary>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let b = vcpu.load(i)?;
    into_register::<T, O>(vcpu, i, b);
    Ok(())
}

fn mem_reg<T: Data, O: Binary, const LOCK: bool>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    into_memory::<T, O, LOCK>(vcpu, i, vcpu.get(i.src))
}

fn mem_imm<T: Data, O: Binary, const LOCK: bool>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    into_memory::<T, O, LOCK>(vcpu, i, T::truncate(i.imm))
}

fn compare_reg_reg<T: Data, O: Binary>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    flags_only::<T, O>(vcpu, vcpu.get(i.dst), vcpu.get(i.src));
    Ok(())
}

fn compare_reg_imm<T: Data, O: Binary>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    flags_only::<T, O>(vcpu, vcpu.get(i.dst), T::truncate(i.imm));
    Ok(())
}

fn compare_reg_mem<T: Data, O: Binary>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let b = vcpu.load(i)?;
    flags_only::<T, O>(vcpu, vcpu.get(i.dst), b);
    Ok(())
}

fn compare_mem_reg<T: Data, O: Binary>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let a = vcpu.load(i)?;
    flags_only::<T, O>(vcpu, a, vcpu.get(i.src));
    Ok(())
}

fn compare_mem_imm<T: Data, O: Binary>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let a = vcpu.load(i)?;
    flags_only::<T, O>(vcpu, a, T::truncate(i.imm));
    Ok(())
}

fn unary_reg<T: Data, O: Unary>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let a: T = vcpu.get(i.dst);
    let result = T::truncate(O::result(a.widen()));
    O::flags(&mut vcpu.state.flags, a, result);
    vcpu.set(i.dst, result);
    Ok(())
}

fn unary_mem<T: Data, O: Unary, const LOCK: bool>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let (a, result) = vcpu.update(i, LOCK, |a: T| T::truncate(O::result(a.widen())))?;
    O::flags(&mut vcpu.state.flags, a, result);
    Ok(())
}

// ---- ADCX, ADOX ----

fn add_one_flag<const CARRY: bool>(i: &Instruction) -> Option<Handler> {
    match form(i) {
        Form::RegReg => large!(size(i, 0) => add_one_flag_reg::<_, CARRY>),
        Form::RegMem => large!(size(i, 0) => add_one_flag_mem::<_, CARRY>),
        _ => None,
    }
}

/// Adds with CF (ADCX) or OF (ADOX) as carry in and out; the other flags stay.
#[inline(always)]
fn add_with_one_flag<T: Data, const CARRY: bool>(vcpu: &mut Vcpu, i: &Insn, b: T) {
    let a: T = vcpu.get(i.dst);
    let flags = &mut vcpu.state.flags;
    let carry = if CARRY { flags.cf() } else { flags.of() };
    let sum = u128::from(a.widen()) + u128::from(b.widen()) + u128::from(carry);
    let carry = sum >> T::BITS & 1 != 0;
    if CARRY {
        flags.set_cf(carry);
    } else {
        flags.set_of(carry);
    }
    vcpu.set(i.dst, T::truncate(sum as u64));
}

fn add_one_flag_reg<T: Data, const CARRY: bool>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    add_with_one_flag::<T, CARRY>(vcpu, i, vcpu.get(i.src));
    Ok(())
}

fn add_one_flag_mem<T: Data, const CARRY: bool>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let b = vcpu.load(i)?;
    add_with_one_flag::<T, CARRY>(vcpu, i, b);
    Ok(())
}

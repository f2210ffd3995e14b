//! Shifts and rotates.
//!
//! Counts are masked to 5 bits (6 for 64-bit operands); a masked count of zero leaves all flags. Flags that
//! the manual leaves undefined are what a one-bit shift would give.

use iced_x86::{Instruction, Mnemonic as M, OpKind, Register};

use super::form::{Form, form, large, size, sized, wide};
use crate::data::Data;
use crate::fault::Exec;
use crate::flags::Flags;
use crate::insn::{Handler, Insn};
use crate::state::reg;
use crate::vcpu::Vcpu;

/// Chooses the handler of a shift or rotate.
pub(super) fn select(i: &Instruction) -> Option<Handler> {
    match i.mnemonic() {
        M::Shl | M::Sal => shift::<Shl>(i),
        M::Shr => shift::<Shr>(i),
        M::Sar => shift::<Sar>(i),
        M::Rol => shift::<Rol>(i),
        M::Ror => shift::<Ror>(i),
        M::Rcl => shift::<Rcl>(i),
        M::Rcr => shift::<Rcr>(i),
        M::Shld => double::<true>(i),
        M::Shrd => double::<false>(i),
        M::Shlx => flagless::<Shlx>(i),
        M::Shrx => flagless::<Shrx>(i),
        M::Sarx => flagless::<Sarx>(i),
        M::Rorx => flagless::<Rorx>(i),
        _ => None,
    }
}

/// Where the count comes from.
trait Count {
    fn count(vcpu: &Vcpu, i: &Insn) -> u32;
}

struct Immediate;
struct Cl;

impl Count for Immediate {
    #[inline(always)]
    fn count(_: &Vcpu, i: &Insn) -> u32 {
        i.imm as u32
    }
}

impl Count for Cl {
    #[inline(always)]
    fn count(vcpu: &Vcpu, _: &Insn) -> u32 {
        vcpu.reg(reg::RCX) as u32
    }
}

#[inline(always)]
fn mask<T: Data>(count: u32) -> u32 {
    count & if T::BITS == 64 { 63 } else { 31 }
}

#[inline(always)]
fn bit(value: u64, n: u32) -> bool {
    value >> n & 1 != 0
}

/// A shift or rotate by a masked count that is not zero.
trait Shift {
    /// The result, given CF.
    fn result<T: Data>(carry: bool, a: T, count: u32) -> T;
    /// The flags that it leaves.
    fn flags<T: Data>(flags: &mut Flags, a: T, count: u32, result: T);
}

struct Shl;
struct Shr;
struct Sar;
struct Rol;
struct Ror;
struct Rcl;
struct Rcr;

/// `value << count` for counts up to 63 of operands of any size; zero past the top.
#[inline(always)]
fn shl<T: Data>(a: T, count: u32) -> T {
    T::truncate(a.widen() << count)
}

impl Shift for Shl {
    #[inline(always)]
    fn result<T: Data>(_: bool, a: T, count: u32) -> T {
        shl(a, count)
    }

    #[inline(always)]
    fn flags<T: Data>(flags: &mut Flags, a: T, count: u32, result: T) {
        flags.set_result(result);
        // The last bit out is the one that lies above the operand one step earlier.
        let cf = bit(a.widen() << (count - 1), T::BITS - 1);
        let sign = (result.sign_extend() as i64) < 0;
        flags.set_carry_overflow_adjust(cf, sign != cf, false);
    }
}

impl Shift for Shr {
    #[inline(always)]
    fn result<T: Data>(_: bool, a: T, count: u32) -> T {
        T::truncate(a.widen() >> count)
    }

    #[inline(always)]
    fn flags<T: Data>(flags: &mut Flags, a: T, count: u32, result: T) {
        flags.set_result(result);
        let of = bit(result.widen(), T::BITS - 1) != bit(result.widen(), T::BITS - 2);
        flags.set_carry_overflow_adjust(bit(a.widen(), count - 1), of, false);
    }
}

impl Shift for Sar {
    #[inline(always)]
    fn result<T: Data>(_: bool, a: T, count: u32) -> T {
        T::truncate((a.sign_extend() as i64 >> count) as u64)
    }

    #[inline(always)]
    fn flags<T: Data>(flags: &mut Flags, a: T, count: u32, result: T) {
        flags.set_result(result);
        flags.set_carry_overflow_adjust(bit(a.sign_extend(), count - 1), false, false);
    }
}

/// Rotates change CF and OF only.
#[inline(always)]
fn set_rotated(flags: &mut Flags, cf: bool, of: bool) {
    let af = flags.af();
    flags.set_carry_overflow_adjust(cf, of, af);
}

#[inline(always)]
fn top<T: Data>(value: T) -> bool {
    bit(value.widen(), T::BITS - 1)
}

/// The bit below the top one.
#[inline(always)]
fn second<T: Data>(value: T) -> bool {
    bit(value.widen(), T::BITS - 2)
}

#[inline(always)]
fn rotate_left<T: Data>(a: T, count: u32) -> T {
    let count = count % T::BITS;
    let a = a.widen();
    T::truncate(a << count | a >> ((T::BITS - count) % T::BITS))
}

impl Shift for Rol {
    #[inline(always)]
    fn result<T: Data>(_: bool, a: T, count: u32) -> T {
        rotate_left(a, count)
    }

    #[inline(always)]
    fn flags<T: Data>(flags: &mut Flags, _: T, _: u32, result: T) {
        let cf = bit(result.widen(), 0);
        set_rotated(flags, cf, top(result) != cf);
    }
}

impl Shift for Ror {
    #[inline(always)]
    fn result<T: Data>(_: bool, a: T, count: u32) -> T {
        rotate_left(a, T::BITS - count % T::BITS)
    }

    #[inline(always)]
    fn flags<T: Data>(flags: &mut Flags, _: T, _: u32, result: T) {
        set_rotated(flags, top(result), top(result) != second(result));
    }
}

/// Rotates CF and operand, as one number with CF on top, left by `count` places; returns the new CF and
/// operand.
#[inline(always)]
fn rotate_through_carry<T: Data>(carry: bool, a: T, count: u32) -> (bool, T) {
    let width = T::BITS + 1;
    let count = count % width;
    let value = u128::from(carry) << T::BITS | u128::from(a.widen());
    let rotated = value << count | value >> (width - count);
    (rotated >> T::BITS & 1 != 0, T::truncate(rotated as u64))
}

impl Shift for Rcl {
    #[inline(always)]
    fn result<T: Data>(carry: bool, a: T, count: u32) -> T {
        rotate_through_carry(carry, a, count).1
    }

    #[inline(always)]
    fn flags<T: Data>(flags: &mut Flags, a: T, count: u32, result: T) {
        let cf = rotate_through_carry(flags.cf(), a, count).0;
        set_rotated(flags, cf, top(result) != cf);
    }
}

impl Shift for Rcr {
    #[inline(always)]
    fn result<T: Data>(carry: bool, a: T, count: u32) -> T {
        let width = T::BITS + 1;
        rotate_through_carry(carry, a, width - count % width).1
    }

    #[inline(always)]
    fn flags<T: Data>(flags: &mut Flags, a: T, count: u32, result: T) {
        let width = T::BITS + 1;
        let cf = rotate_through_carry(flags.cf(), a, width - count % width).0;
        set_rotated(flags, cf, top(result) != second(result));
    }
}

fn shift<O: Shift>(i: &Instruction) -> Option<Handler> {
    let n = size(i, 0);
    let cl = i.op1_kind() == OpKind::Register && i.op1_register() == Register::CL;
    match (i.op0_kind(), cl) {
        (OpKind::Register, false) => sized!(n => shift_reg::<_, O, Immediate>),
        (OpKind::Register, true) => sized!(n => shift_reg::<_, O, Cl>),
        (OpKind::Memory, false) => sized!(n => shift_mem::<_, O, Immediate>),
        (OpKind::Memory, true) => sized!(n => shift_mem::<_, O, Cl>),
        _ => None,
    }
}

/// A 32-bit register's upper half is cleared by a count of zero too.
fn shift_reg<T: Data, O: Shift, C: Count>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let count = mask::<T>(C::count(vcpu, i));
    let a: T = vcpu.get(i.dst);
    if count == 0 {
        vcpu.set(i.dst, a);
        return Ok(());
    }
    let result = O::result(vcpu.state.flags.cf(), a, count);
    O::flags(&mut vcpu.state.flags, a, count, result);
    vcpu.set(i.dst, result);
    Ok(())
}

fn shift_mem<T: Data, O: Shift, C: Count>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let count = mask::<T>(C::count(vcpu, i));
    let carry = vcpu.state.flags.cf();
    let (a, result) =
        vcpu.update(i, false, |a: T| if count == 0 { a } else { O::result(carry, a, count) })?;
    if count != 0 {
        O::flags(&mut vcpu.state.flags, a, count, result);
    }
    Ok(())
}

// ---- SHLD, SHRD ----

fn double<const LEFT: bool>(i: &Instruction) -> Option<Handler> {
    let n = size(i, 0);
    let cl = i.op_kind(2) == OpKind::Register;
    match (form(i), cl) {
        (Form::RegReg, false) => wide!(n => double_reg::<_, LEFT, Immediate>),
        (Form::RegReg, true) => wide!(n => double_reg::<_, LEFT, Cl>),
        (Form::MemReg, false) => wide!(n => double_mem::<_, LEFT, Immediate>),
        (Form::MemReg, true) => wide!(n => double_mem::<_, LEFT, Cl>),
        _ => None,
    }
}

/// The result and CF of SHLD or SHRD by a masked count that is not zero.
///
/// A count above 16 of a 16-bit operand, undefined by the manual, shifts the source in twice, as
/// some processors do.
#[inline(always)]
fn double_shift<T: Data, const LEFT: bool>(a: T, b: T, count: u32) -> (T, bool) {
    let (wide_a, wide_b) = (u128::from(a.widen()), u128::from(b.widen()));
    if T::BITS == 16 {
        let (a, b) = (a.widen(), b.widen());
        return if LEFT {
            let value = a << 32 | b << 16 | b;
            (T::truncate(value << count >> 32), bit(value, 48 - count))
        } else {
            let value = b << 32 | b << 16 | a;
            (T::truncate(value >> count), bit(value, count - 1))
        };
    }
    if LEFT {
        let value = wide_a << T::BITS | wide_b;
        (T::truncate((value << count >> T::BITS) as u64), bit(a.widen(), T::BITS - count))
    } else {
        let value = wide_b << T::BITS | wide_a;
        (T::truncate((value >> count) as u64), bit(a.widen(), count - 1))
    }
}

#[inline(always)]
fn double_flags<T: Data>(flags: &mut Flags, a: T, result: T, cf: bool) {
    flags.set_result(result);
    flags.set_carry_overflow_adjust(cf, top(a) != top(result), false);
}

fn double_reg<T: Data, const LEFT: bool, C: Count>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let count = mask::<T>(C::count(vcpu, i));
    let (a, b): (T, T) = (vcpu.get(i.dst), vcpu.get(i.src));
    if count == 0 {
        vcpu.set(i.dst, a);
        return Ok(());
    }
    let (result, cf) = double_shift::<T, LEFT>(a, b, count);
    double_flags(&mut vcpu.state.flags, a, result, cf);
    vcpu.set(i.dst, result);
    Ok(())
}

fn double_mem<T: Data, const LEFT: bool, C: Count>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let count = mask::<T>(C::count(vcpu, i));
    let b: T = vcpu.get(i.src);
    let (a, result) =
        vcpu.update(i, false, |a| if count == 0 { a } else { double_shift::<T, LEFT>(a, b, count).0 })?;
    if count != 0 {
        let cf = double_shift::<T, LEFT>(a, b, count).1;
        double_flags(&mut vcpu.state.flags, a, result, cf);
    }
    Ok(())
}

// ---- BMI2: SHLX, SHRX, SARX, RORX ----

/// A shift that leaves the flags.
trait Flagless {
    fn result<T: Data>(a: T, count: u32) -> T;
}

struct Shlx;
struct Shrx;
struct Sarx;
struct Rorx;

impl Flagless for Shlx {
    #[inline(always)]
    fn result<T: Data>(a: T, count: u32) -> T {
        Shl::result(false, a, count)
    }
}

impl Flagless for Shrx {
    #[inline(always)]
    fn result<T: Data>(a: T, count: u32) -> T {
        Shr::result(false, a, count)
    }
}

impl Flagless for Sarx {
    #[inline(always)]
    fn result<T: Data>(a: T, count: u32) -> T {
        Sar::result(false, a, count)
    }
}

impl Flagless for Rorx {
    #[inline(always)]
    fn result<T: Data>(a: T, count: u32) -> T {
        Ror::result(false, a, count)
    }
}

fn flagless<O: Flagless>(i: &Instruction) -> Option<Handler> {
    let n = size(i, 0);
    let immediate = i.op_kind(2) != OpKind::Register;
    match (form(i), immediate) {
        (Form::RegReg, true) => large!(n => flagless_reg::<_, O, Immediate>),
        (Form::RegReg, false) => large!(n => flagless_reg::<_, O, Third>),
        (Form::RegMem, true) => large!(n => flagless_mem::<_, O, Immediate>),
        (Form::RegMem, false) => large!(n => flagless_mem::<_, O, Third>),
        _ => None,
    }
}

/// A count in the third operand.
struct Third;

impl Count for Third {
    #[inline(always)]
    fn count(vcpu: &Vcpu, i: &Insn) -> u32 {
        vcpu.reg(i.src2) as u32
    }
}

fn flagless_reg<T: Data, O: Flagless, C: Count>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let a: T = vcpu.get(i.src);
    let result = O::result(a, mask::<T>(C::count(vcpu, i)));
    vcpu.set(i.dst, result);
    Ok(())
}

fn flagless_mem<T: Data, O: Flagless, C: Count>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let a: T = vcpu.load(i)?;
    let result = O::result(a, mask::<T>(C::count(vcpu, i)));
    vcpu.set(i.dst, result);
    Ok(())
}

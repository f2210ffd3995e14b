//! BMI1 and BMI2 bit manipulation, and CRC32.

use iced_x86::{Instruction, Mnemonic as M, OpKind};

use super::form::{Form, form, large, size};
use crate::data::Data;
use crate::fault::Exec;
use crate::flags::Flags;
use crate::insn::{Handler, Insn};
use crate::vcpu::Vcpu;

/// Chooses the handler of a BMI instruction or CRC32.
pub(super) fn select(i: &Instruction) -> Option<Handler> {
    match i.mnemonic() {
        M::Andn => last::<Andn>(i),
        M::Pdep => last::<Pdep>(i),
        M::Pext => last::<Pext>(i),
        M::Bextr => middle::<Bextr>(i),
        M::Bzhi => middle::<Bzhi>(i),
        M::Blsi => lowest::<Blsi>(i),
        M::Blsr => lowest::<Blsr>(i),
        M::Blsmsk => lowest::<Blsmsk>(i),
        M::Crc32 => crc32(i),
        _ => None,
    }
}

/// An operation of two sources: the result and the flags.
trait Operation {
    fn result<T: Data>(flags: &mut Flags, a: T, b: T) -> T;
}

struct Andn;
struct Pdep;
struct Pext;
struct Bextr;
struct Bzhi;
struct Blsi;
struct Blsr;
struct Blsmsk;

/// The flags of a result, with the given CF and OF clear.
#[inline(always)]
fn set_flags<T: Data>(flags: &mut Flags, result: T, cf: bool) {
    flags.set_logic(result);
    flags.set_carry_overflow_adjust(cf, false, false);
}

impl Operation for Andn {
    #[inline(always)]
    fn result<T: Data>(flags: &mut Flags, a: T, b: T) -> T {
        let result = T::truncate(!a.widen() & b.widen());
        flags.set_logic(result);
        result
    }
}

/// Deposits the low bits of `a` at the places of the ones in `b`.
impl Operation for Pdep {
    fn result<T: Data>(_: &mut Flags, a: T, b: T) -> T {
        let (mut source, mut mask, mut result) = (a.widen(), b.widen(), 0);
        while mask != 0 {
            let lowest = mask & mask.wrapping_neg();
            if source & 1 != 0 {
                result |= lowest;
            }
            source >>= 1;
            mask ^= lowest;
        }
        T::truncate(result)
    }
}

/// Collects the bits of `a` at the places of the ones in `b`.
impl Operation for Pext {
    fn result<T: Data>(_: &mut Flags, a: T, b: T) -> T {
        let (source, mut mask, mut result, mut place) = (a.widen(), b.widen(), 0, 1u64);
        while mask != 0 {
            let lowest = mask & mask.wrapping_neg();
            if source & lowest != 0 {
                result |= place;
            }
            place <<= 1;
            mask ^= lowest;
        }
        T::truncate(result)
    }
}

impl Operation for Bextr {
    fn result<T: Data>(flags: &mut Flags, a: T, b: T) -> T {
        let (start, length) = (b.widen() & 0xff, b.widen() >> 8 & 0xff);
        let shifted = a.widen().checked_shr(start as u32).unwrap_or(0);
        let mask = 1u64.checked_shl(length as u32).unwrap_or(0).wrapping_sub(1);
        let result = T::truncate(shifted & mask);
        set_flags(flags, result, false);
        result
    }
}

impl Operation for Bzhi {
    fn result<T: Data>(flags: &mut Flags, a: T, b: T) -> T {
        let index = b.widen() as u8;
        let beyond = u32::from(index) >= T::BITS;
        let result = if beyond { a } else { T::truncate(a.widen() & ((1u64 << index) - 1)) };
        set_flags(flags, result, beyond);
        result
    }
}

/// Isolates the lowest one.
impl Operation for Blsi {
    #[inline(always)]
    fn result<T: Data>(flags: &mut Flags, a: T, _: T) -> T {
        let a = a.widen();
        let result = T::truncate(a & a.wrapping_neg());
        set_flags(flags, result, a != 0);
        result
    }
}

/// Clears the lowest one.
impl Operation for Blsr {
    #[inline(always)]
    fn result<T: Data>(flags: &mut Flags, a: T, _: T) -> T {
        let a = a.widen();
        let result = T::truncate(a & a.wrapping_sub(1));
        set_flags(flags, result, a == 0);
        result
    }
}

/// A mask up to the lowest one.
impl Operation for Blsmsk {
    #[inline(always)]
    fn result<T: Data>(flags: &mut Flags, a: T, _: T) -> T {
        let a = a.widen();
        let result = T::truncate(a ^ a.wrapping_sub(1));
        set_flags(flags, result, a == 0);
        result
    }
}

/// `dst = src op src2`, where the last may be memory.
fn last<O: Operation>(i: &Instruction) -> Option<Handler> {
    match i.op_kind(2) {
        OpKind::Register => large!(size(i, 0) => three_reg::<_, O>),
        OpKind::Memory => large!(size(i, 0) => last_mem::<_, O>),
        _ => None,
    }
}

/// `dst = src op src2`, where the middle one may be memory.
fn middle<O: Operation>(i: &Instruction) -> Option<Handler> {
    match form(i) {
        Form::RegReg => large!(size(i, 0) => three_reg::<_, O>),
        Form::RegMem => large!(size(i, 0) => middle_mem::<_, O>),
        _ => None,
    }
}

/// `dst = op src`, where the source may be memory.
fn lowest<O: Operation>(i: &Instruction) -> Option<Handler> {
    match form(i) {
        Form::RegReg => large!(size(i, 0) => three_reg::<_, O>),
        Form::RegMem => large!(size(i, 0) => middle_mem::<_, O>),
        _ => None,
    }
}

fn three_reg<T: Data, O: Operation>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let (a, b): (T, T) = (vcpu.get(i.src), vcpu.get(i.src2));
    let result = O::result(&mut vcpu.state.flags, a, b);
    vcpu.set(i.dst, result);
    Ok(())
}

fn last_mem<T: Data, O: Operation>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let b: T = vcpu.load(i)?;
    let a: T = vcpu.get(i.src);
    let result = O::result(&mut vcpu.state.flags, a, b);
    vcpu.set(i.dst, result);
    Ok(())
}

fn middle_mem<T: Data, O: Operation>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let a: T = vcpu.load(i)?;
    let b: T = vcpu.get(i.src2);
    let result = O::result(&mut vcpu.state.flags, a, b);
    vcpu.set(i.dst, result);
    Ok(())
}

// ---- CRC32 ----

/// The Castagnoli polynomial 0x11EDC6F41, bits reflected.
const POLYNOMIAL: u32 = 0x82f6_3b78;

const CRC_TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = crc >> 1 ^ if crc & 1 != 0 { POLYNOMIAL } else { 0 };
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
};

/// The destination register is 32 or 64 bits wide; the source has a size of its own.
fn crc32(i: &Instruction) -> Option<Handler> {
    use super::form::sized;
    match form(i) {
        Form::RegReg => sized!(size(i, 1) => crc32_reg::<_>),
        Form::RegMem => sized!(size(i, 1) => crc32_mem::<_>),
        _ => None,
    }
}

fn accumulate<T: Data>(vcpu: &mut Vcpu, i: &Insn, source: T) {
    let mut crc: u32 = vcpu.get(i.dst);
    for byte in &source.widen().to_le_bytes()[..T::SIZE as usize] {
        crc = crc >> 8 ^ CRC_TABLE[usize::from(crc as u8 ^ byte)];
    }
    vcpu.set(i.dst, crc);
}

fn crc32_reg<T: Data>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    accumulate::<T>(vcpu, i, vcpu.get(i.src));
    Ok(())
}

fn crc32_mem<T: Data>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let source = vcpu.load(i)?;
    accumulate::<T>(vcpu, i, source);
    Ok(())
}

//! RFLAGS, with the six arithmetic flags kept in a form that is cheap to produce.
//!
//! # Theory of operation
//! Nearly every instruction sets flags and few flags are read. An instruction therefore stores three
//! words from which all six follow, instead of computing them:
//!
//! - `nonzero`: ZF is set exactly when this word is zero;
//! - `sign_parity`: SF is bit 63, PF is the even parity of bits 0 to 7;
//! - `carries`: CF is bit 63, OF is bit 63 XOR bit 62, AF is bit 3.
//!
//! For an addition, subtraction or comparison of any size, `carries` is the vector of carries out of
//! each bit position, moved up so that the operand's top bit is bit 63; `nonzero` and `sign_parity`
//! are the sign-extended result. Every combination of the six flags can be represented, so that POPF
//! and SAHF need no second form. The other flags are kept as they are, in `system`.

use crate::data::Data;

/// CF, carry.
pub const CF: u64 = 1 << 0;
/// Bit 1, which always reads as one.
pub const FIXED: u64 = 1 << 1;
/// PF, parity.
pub const PF: u64 = 1 << 2;
/// AF, auxiliary carry.
pub const AF: u64 = 1 << 4;
/// ZF, zero.
pub const ZF: u64 = 1 << 6;
/// SF, sign.
pub const SF: u64 = 1 << 7;
/// TF, single-step trap.
pub const TF: u64 = 1 << 8;
/// IF, interrupts enabled.
pub const IF: u64 = 1 << 9;
/// DF, string direction.
pub const DF: u64 = 1 << 10;
/// OF, overflow.
pub const OF: u64 = 1 << 11;
/// IOPL, I/O privilege level, two bits.
pub const IOPL: u64 = 3 << 12;
/// NT, nested task.
pub const NT: u64 = 1 << 14;
/// RF, resume.
pub const RF: u64 = 1 << 16;
/// VM, virtual-8086 mode.
pub const VM: u64 = 1 << 17;
/// AC, alignment check and SMAP override.
pub const AC: u64 = 1 << 18;
/// VIF, virtual interrupt flag.
pub const VIF: u64 = 1 << 19;
/// VIP, virtual interrupt pending.
pub const VIP: u64 = 1 << 20;
/// ID, CPUID exists.
pub const ID: u64 = 1 << 21;

/// The six arithmetic flags.
pub const ARITHMETIC: u64 = CF | PF | AF | ZF | SF | OF;
/// The flags held as they are.
pub const SYSTEM: u64 = TF | IF | DF | IOPL | NT | RF | VM | AC | VIF | VIP | ID;

/// RFLAGS (Intel SDM vol. 1, 3.4.3).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Flags {
    nonzero: u64,
    sign_parity: u64,
    carries: u64,
    system: u64,
}

impl Default for Flags {
    /// The state after reset: only the fixed bit set.
    fn default() -> Self {
        let mut flags = Self { nonzero: 0, sign_parity: 0, carries: 0, system: 0 };
        flags.set_bits(FIXED);
        flags
    }
}

impl Flags {
    /// All of RFLAGS as PUSHFQ would store it, RF and VM included.
    #[inline]
    pub fn bits(&self) -> u64 {
        self.system | FIXED | self.arithmetic()
    }

    /// Replaces all of RFLAGS; unknown bits are dropped.
    #[inline]
    pub fn set_bits(&mut self, bits: u64) {
        self.system = bits & SYSTEM;
        self.set_arithmetic(bits);
    }

    /// The six arithmetic flags, in their RFLAGS positions.
    #[inline]
    pub fn arithmetic(&self) -> u64 {
        (self.cf() as u64)
            | (self.pf() as u64) << 2
            | (self.af() as u64) << 4
            | (self.zf() as u64) << 6
            | (self.sf() as u64) << 7
            | (self.of() as u64) << 11
    }

    /// Replaces the six arithmetic flags by those in `bits`.
    #[inline]
    pub fn set_arithmetic(&mut self, bits: u64) {
        self.nonzero = !bits & ZF;
        self.sign_parity = (bits & SF) << 56 | (!bits & PF) >> 2;
        self.set_carry_overflow_adjust(bits & CF != 0, bits & OF != 0, bits & AF != 0);
    }

    /// The flags that are not arithmetic.
    #[inline(always)]
    pub fn system(&self) -> u64 {
        self.system
    }

    /// Sets or clears system flags (TF, IF, DF, IOPL, NT, RF, VM, AC, VIF, VIP, ID) under `mask`.
    ///
    /// Whoever changes TF, AC, IF or VM goes through [`crate::Vcpu::set_rflags`], which also refreshes
    /// what is derived from them.
    #[inline(always)]
    pub(crate) fn set_system(&mut self, mask: u64, bits: u64) {
        self.system = (self.system & !(mask & SYSTEM)) | (bits & mask & SYSTEM);
    }

    /// CF.
    #[inline(always)]
    pub fn cf(&self) -> bool {
        (self.carries as i64) < 0
    }

    /// PF.
    #[inline(always)]
    pub fn pf(&self) -> bool {
        (self.sign_parity as u8).count_ones().is_multiple_of(2)
    }

    /// AF.
    #[inline(always)]
    pub fn af(&self) -> bool {
        self.carries & 8 != 0
    }

    /// ZF.
    #[inline(always)]
    pub fn zf(&self) -> bool {
        self.nonzero == 0
    }

    /// SF.
    #[inline(always)]
    pub fn sf(&self) -> bool {
        (self.sign_parity as i64) < 0
    }

    /// OF.
    #[inline(always)]
    pub fn of(&self) -> bool {
        ((self.carries ^ (self.carries << 1)) as i64) < 0
    }

    /// DF.
    #[inline(always)]
    pub fn df(&self) -> bool {
        self.system & DF != 0
    }

    /// ZF, SF and PF from a result; CF, OF and AF stay.
    #[inline(always)]
    pub fn set_result<T: Data>(&mut self, result: T) {
        let result = result.sign_extend();
        self.nonzero = result;
        self.sign_parity = result;
    }

    /// All six after a logical operation: CF, OF (and AF) clear.
    #[inline(always)]
    pub fn set_logic<T: Data>(&mut self, result: T) {
        self.set_result(result);
        self.carries = 0;
    }

    /// All six after `a + b (+ carry) = result`.
    #[inline(always)]
    pub fn set_add<T: Data>(&mut self, a: T, b: T, result: T) {
        self.set_result(result);
        let (a, b, r) = (a.widen(), b.widen(), result.widen());
        self.set_carry_vector::<T>((a & b) | ((a | b) & !r));
    }

    /// All six after `a - b (- borrow) = result`.
    #[inline(always)]
    pub fn set_sub<T: Data>(&mut self, a: T, b: T, result: T) {
        self.set_result(result);
        let (a, b, r) = (a.widen(), b.widen(), result.widen());
        self.set_carry_vector::<T>((!a & b) | ((!a | b) & r));
    }

    /// As [`Self::set_add`] for INC: CF stays.
    #[inline(always)]
    pub fn set_inc<T: Data>(&mut self, a: T, result: T) {
        let cf = self.cf();
        self.set_add(a, T::truncate(1), result);
        self.set_cf_keeping_overflow(cf);
    }

    /// As [`Self::set_sub`] for DEC: CF stays.
    #[inline(always)]
    pub fn set_dec<T: Data>(&mut self, a: T, result: T) {
        let cf = self.cf();
        self.set_sub(a, T::truncate(1), result);
        self.set_cf_keeping_overflow(cf);
    }

    /// Sets CF, OF and AF one by one; ZF, SF and PF stay.
    #[inline(always)]
    pub fn set_carry_overflow_adjust(&mut self, cf: bool, of: bool, af: bool) {
        self.carries = (cf as u64) << 63 | ((cf ^ of) as u64) << 62 | (af as u64) << 3;
    }

    /// Sets CF; the other five stay.
    #[inline(always)]
    pub fn set_cf(&mut self, cf: bool) {
        self.set_cf_keeping_overflow(cf);
    }

    /// Sets OF; the other five stay.
    #[inline(always)]
    pub fn set_of(&mut self, of: bool) {
        self.carries ^= ((of != self.of()) as u64) << 62;
    }

    /// Sets ZF; the other five stay.
    #[inline(always)]
    pub fn set_zf(&mut self, zf: bool) {
        self.nonzero = !zf as u64;
    }

    #[inline(always)]
    fn set_carry_vector<T: Data>(&mut self, vector: u64) {
        self.carries = if T::BITS == 64 { vector } else { vector << (64 - T::BITS) | vector & 8 };
    }

    #[inline(always)]
    fn set_cf_keeping_overflow(&mut self, cf: bool) {
        // Flipping both top bits flips CF and leaves their XOR, OF, as it is.
        if cf != self.cf() {
            self.carries ^= 3 << 62;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_combination_of_arithmetic_flags_survives() {
        for bits in 0..64u64 {
            let spread = [CF, PF, AF, ZF, SF, OF]
                .iter()
                .enumerate()
                .fold(0, |acc, (i, flag)| if bits >> i & 1 != 0 { acc | flag } else { acc });
            let mut flags = Flags::default();
            flags.set_bits(spread | IF | ID);
            assert_eq!(flags.bits(), spread | FIXED | IF | ID);
            flags.set_cf(spread & CF == 0);
            assert_eq!(flags.bits(), (spread ^ CF) | FIXED | IF | ID);
            flags.set_of(spread & OF == 0);
            assert_eq!(flags.bits(), (spread ^ (CF | OF)) | FIXED | IF | ID);
            flags.set_zf(spread & ZF == 0);
            assert_eq!(flags.bits(), (spread ^ (CF | OF | ZF)) | FIXED | IF | ID);
        }
    }

    #[test]
    fn addition_and_subtraction_of_bytes_match_the_definition() {
        for a in 0..=255u8 {
            for b in 0..=255u8 {
                for carry in 0..=1u8 {
                    let mut flags = Flags::default();
                    let r = a.wrapping_add(b).wrapping_add(carry);
                    flags.set_add(a, b, r);
                    assert_eq!(flags.cf(), u16::from(a) + u16::from(b) + u16::from(carry) > 255);
                    assert_eq!(
                        flags.of(),
                        i8::try_from(i16::from(a as i8) + i16::from(b as i8) + i16::from(carry)).is_err()
                    );
                    assert_eq!(flags.af(), (a & 15) + (b & 15) + carry > 15);
                    assert_eq!((flags.zf(), flags.sf()), (r == 0, r >= 128));
                    assert_eq!(flags.pf(), r.count_ones() % 2 == 0);

                    let r = a.wrapping_sub(b).wrapping_sub(carry);
                    flags.set_sub(a, b, r);
                    assert_eq!(flags.cf(), i16::from(a) - i16::from(b) - i16::from(carry) < 0);
                    assert_eq!(
                        flags.of(),
                        i8::try_from(i16::from(a as i8) - i16::from(b as i8) - i16::from(carry)).is_err()
                    );
                    assert_eq!(flags.af(), (a & 15) < (b & 15) + carry);
                }
            }
        }
    }
}

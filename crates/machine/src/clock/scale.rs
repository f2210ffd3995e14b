//! Ticks to nanoseconds by a multiplication and two shifts: the arithmetic of the paravirtual clock ABI.

/// A factor between ticks and nanoseconds: `ns = ((ticks << shift) * mul) >> 32`, with `ticks >> -shift`
/// where `shift` is negative (struct pvclock_vcpu_time_info in the KVM documentation of MSRs).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Scale {
    /// 32-bit fixed-point fraction, top bit set.
    pub mul: u32,
    /// Shift before the multiplication, from -31 to 31.
    pub shift: i8,
}

impl Scale {
    /// The factor for a counter of `khz` kHz; 0 is taken as 1.
    pub fn from_khz(khz: u32) -> Self {
        let hz = u128::from(khz.max(1)) * 1000;
        // Nanoseconds per tick lie between 2^-13 (u32::MAX kHz) and 2^20 (1 kHz): some shift in this
        // range puts the fraction into [1/2, 1).
        let fraction = |shift: i8| ((1_000_000_000u128 << (48 - shift)) / hz + (1 << 15)) >> 16;
        let shift = (-13..=20).find(|&s| fraction(s) <= u128::from(u32::MAX)).unwrap_or(20);
        Self { mul: u32::try_from(fraction(shift)).unwrap_or(u32::MAX), shift }
    }

    /// Nanoseconds in `ticks`, rounded down; wraps at 2^64 (584 years).
    #[inline]
    pub fn ticks_to_ns(self, ticks: u64) -> u64 {
        let shifted =
            if self.shift < 0 { u128::from(ticks >> -self.shift) } else { u128::from(ticks) << self.shift };
        ((shifted * u128::from(self.mul)) >> 32) as u64
    }

    /// The fewest ticks that take at least `ns` nanoseconds; saturates.
    pub fn ns_to_ticks(self, ns: u64) -> u64 {
        let shifted = (u128::from(ns) << 32).div_ceil(u128::from(self.mul.max(1)));
        let ticks = if self.shift < 0 { shifted << -self.shift } else { shifted.div_ceil(1 << self.shift) };
        u64::try_from(ticks).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KHZ: [u32; 9] = [1, 32, 999, 1_000_000, 1_000_001, 2_596_118, 2_000_000, 5_700_000, u32::MAX];

    #[test]
    fn fraction_is_normalized_and_exact_to_its_last_bit() {
        for khz in KHZ {
            let s = Scale::from_khz(khz);
            assert!(s.mul >= 1 << 31, "{khz}: {s:?}");
            // One hour, against exact division.
            let ticks = u64::from(khz) * 3_600_000;
            let error = s.ticks_to_ns(ticks).abs_diff(3_600_000_000_000);
            // Half a unit of 2^-32 is 0.12e-9; of the dropped low bits, at most 2^13 ticks.
            let tick_ns = 1_000_000 / u64::from(khz) + 1;
            assert!(error <= 3600 + tick_ns, "{khz}: off by {error} ns");
        }
    }

    #[test]
    fn ns_to_ticks_is_the_first_tick_that_reaches() {
        for khz in KHZ {
            let s = Scale::from_khz(khz);
            for ns in [0, 1, 2, 3, 999, 1_000_000, 123_456_789_012, 86_400_000_000_000] {
                let t = s.ns_to_ticks(ns);
                assert!(s.ticks_to_ns(t) >= ns, "{khz} {ns}");
                if t > 0 {
                    assert!(s.ticks_to_ns(t - 1) < ns, "{khz} {ns}");
                }
            }
        }
        assert_eq!(Scale::from_khz(u32::MAX).ns_to_ticks(u64::MAX), u64::MAX);
    }

    #[test]
    fn one_gigahertz_is_the_identity() {
        let s = Scale::from_khz(1_000_000);
        for t in [0, 2, 1_000_000_000, 1 << 40] {
            assert_eq!(s.ticks_to_ns(t), t);
        }
    }
}

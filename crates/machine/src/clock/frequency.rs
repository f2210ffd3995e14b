//! How fast the host's TSC counts, and whether it can be trusted.
//!
//! Asked in this order: CPUID leaf 0x15 (the crystal's frequency and the ratio to it; exact), CPUID
//! leaf 0x4000_0010 of a hypervisor (kHz), a file that some kernels have in /sys, and last a
//! measurement against CLOCK_MONOTONIC. CPUID leaf 0x16 is the base frequency in whole MHz, off by up
//! to a percent from the TSC: it only serves to doubt the answers above.

use super::{monotonic_ns, tsc};
use core::arch::x86_64::__cpuid;
use std::time::Duration;

/// Where a [`TscFrequency`] comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FrequencyOrigin {
    /// CPUID leaf 0x15.
    Crystal,
    /// CPUID leaf 0x4000_0010.
    Hypervisor,
    /// /sys/devices/system/cpu/cpu0/tsc_freq_khz.
    Kernel,
    /// Measured against CLOCK_MONOTONIC.
    Calibrated,
}

/// The host TSC's frequency.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TscFrequency {
    /// In kHz, not 0.
    pub khz: u32,
    /// Who says so.
    pub origin: FrequencyOrigin,
}

impl TscFrequency {
    /// Finds the frequency, or `None` if the TSC is unfit as a clock: not invariant, distrusted by the
    /// kernel, or not steady in the measurement. Takes up to 120 ms, 20 ms as a rule, where it must measure.
    pub fn measure() -> Option<Self> {
        if !is_invariant() || !trusted_by_kernel() {
            return None;
        }
        let told = [
            (from_crystal(), FrequencyOrigin::Crystal),
            (from_hypervisor(), FrequencyOrigin::Hypervisor),
            (from_sys(), FrequencyOrigin::Kernel),
        ];
        let told = told.into_iter().find_map(|(khz, origin)| Some(Self { khz: plausible(khz?)?, origin }));
        told.or_else(|| {
            let khz = calibrate(&mut sample, &mut std::thread::sleep)?;
            Some(Self { khz, origin: FrequencyOrigin::Calibrated })
        })
    }
}

/// 100 MHz to 20 GHz, and within 20 % of the base frequency where CPUID tells it.
fn plausible(khz: u32) -> Option<u32> {
    let base_mhz = if __cpuid(0).eax >= 0x16 { __cpuid(0x16).eax & 0xffff } else { 0 };
    let near_base = base_mhz == 0 || khz.abs_diff(base_mhz * 1000) <= base_mhz * 200;
    (near_base && (100_000..=20_000_000).contains(&khz)).then_some(khz)
}

/// SDM vol. 3, 19.17.1: CPUID leaf 8000_0007H, bit 8 of EDX: the TSC runs at one rate in all states.
fn is_invariant() -> bool {
    __cpuid(0x8000_0000).eax >= 0x8000_0007 && __cpuid(0x8000_0007).edx & 1 << 8 != 0
}

/// A kernel that has seen the TSC jump takes it off the list of clock sources. No list, no objection.
fn trusted_by_kernel() -> bool {
    let list = "/sys/devices/system/clocksource/clocksource0/available_clocksource";
    std::fs::read_to_string(list).map_or(true, |l| l.split_whitespace().any(|w| w == "tsc"))
}

/// SDM vol. 2, CPUID leaf 15H: TSC frequency = ECX * EBX / EAX.
fn from_crystal() -> Option<u32> {
    if __cpuid(0).eax < 0x15 {
        return None;
    }
    let leaf = __cpuid(0x15);
    if leaf.eax == 0 || leaf.ebx == 0 || leaf.ecx == 0 {
        return None;
    }
    u32::try_from(u64::from(leaf.ecx) * u64::from(leaf.ebx) / u64::from(leaf.eax) / 1000).ok()
}

/// CPUID leaf 0x4000_0010: the timing leaf that hypervisors agree on.
fn from_hypervisor() -> Option<u32> {
    let virtualized = __cpuid(1).ecx & 1 << 31 != 0;
    let max = if virtualized { __cpuid(0x4000_0000).eax } else { 0 };
    let khz = if (0x4000_0010..0x4000_0100).contains(&max) { __cpuid(0x4000_0010).eax } else { 0 };
    (khz != 0).then_some(khz)
}

fn from_sys() -> Option<u32> {
    std::fs::read_to_string("/sys/devices/system/cpu/cpu0/tsc_freq_khz").ok()?.trim().parse().ok()
}

/// One moment on both clocks: (TSC, nanoseconds). The tightest of some tries.
fn sample() -> (u64, u64) {
    let one = || {
        let (t0, ns, t1) = (tsc::read(), monotonic_ns(), tsc::read());
        (t1.wrapping_sub(t0), t0.wrapping_add(t1.wrapping_sub(t0) / 2), ns)
    };
    let (_, ticks, ns) = (0..16).map(|_| one()).min_by_key(|&(width, ..)| width).unwrap_or_else(one);
    (ticks, ns)
}

/// Measures kHz over windows of 10 ms until two successive ones agree to 100 ppm; gives up after 12.
fn calibrate(sample: &mut dyn FnMut() -> (u64, u64), wait: &mut dyn FnMut(Duration)) -> Option<u32> {
    let mut last = sample();
    // The window before: where it began, and its rate.
    let mut previous: Option<((u64, u64), u64)> = None;
    for _ in 0..12 {
        wait(Duration::from_millis(10));
        let next = sample();
        let khz = rate(last, next)?;
        match previous {
            // Over both windows together, for the smaller error.
            Some((begin, before)) if before.abs_diff(khz) <= khz / 10_000 => {
                return plausible(u32::try_from(rate(begin, next)?).ok()?);
            }
            _ => previous = Some((last, khz)),
        }
        last = next;
    }
    None
}

fn rate(from: (u64, u64), to: (u64, u64)) -> Option<u64> {
    let ticks = u128::from(to.0.checked_sub(from.0)?);
    let ns = u128::from(to.1.checked_sub(from.1)?);
    let khz = (ticks * 1_000_000 + ns / 2).checked_div(ns)?;
    u64::try_from(khz).ok().filter(|&k| k != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `calibrate` on a made-up counter: `ticks_at(ns)`, a fresh reading each wait of 10 ms.
    fn on(ticks_at: impl Fn(u64) -> u64) -> Option<u32> {
        let ns = std::cell::Cell::new(77_000u64);
        calibrate(&mut || (ticks_at(ns.get()), ns.get()), &mut |d| {
            ns.set(ns.get() + u64::try_from(d.as_nanos()).unwrap());
        })
    }

    /// Within what CPUID leaf 0x16 of the host that runs the test calls plausible.
    fn host_khz() -> u64 {
        let base = if __cpuid(0).eax >= 0x16 { __cpuid(0x16).eax & 0xffff } else { 0 };
        if base == 0 { 2_596_118 } else { u64::from(base) * 1000 + 118 }
    }

    #[test]
    fn a_steady_counter_is_measured() {
        let khz = host_khz();
        assert_eq!(on(|ns| 12345 + ns * khz / 1_000_000).map(u64::from), Some(khz));
    }

    #[test]
    fn an_unsteady_or_dead_counter_is_not() {
        let khz = host_khz();
        assert_eq!(on(|_| 42), None);
        assert_eq!(on(|ns| ns * ns / 1_000_000), None);
        assert_eq!(on(|ns| u64::MAX - ns * khz / 1_000_000), None);
        assert_eq!(on(|ns| ns / 1000), None);
    }

    #[test]
    fn one_disturbed_window_is_left_behind() {
        let khz = host_khz();
        let got = on(|ns| ns * khz / 1_000_000 + if ns > 11_000_000 { 300_000 } else { 0 });
        assert_eq!(got.map(u64::from), Some(khz));
    }

    #[test]
    fn implausible_frequencies_are_refused() {
        for khz in [0, 1, 99_999, 20_000_001, u32::MAX] {
            assert_eq!(plausible(khz), None);
        }
    }

    #[test]
    fn what_this_host_says_is_plausible() {
        if let Some(f) = TscFrequency::measure() {
            assert_eq!(plausible(f.khz), Some(f.khz));
            let by_hand = calibrate(&mut sample, &mut std::thread::sleep).unwrap_or(f.khz);
            assert!(f.khz.abs_diff(by_hand) < f.khz / 500, "{f:?}, measured {by_hand}");
        }
    }
}

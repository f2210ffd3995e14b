//! Time of the machine: the guest's TSC, nanoseconds since start, and the host deadlines they mean.
//!
//! # Theory of operation
//!
//! The guest's time stamp counter is the host's, less its value when the machine started, so a guest
//! RDTSC costs no more than a host RDTSC and an addition. Where the host TSC is unfit (it stops or
//! changes speed with the processor's state, or the kernel distrusts it) the guest's counter is
//! CLOCK_MONOTONIC at 1 GHz instead.
//!
//! Everything else is derived from that counter, so that no two clocks of the guest can disagree: the processor has none
//! of its own, RDTSC asks here ([`cpu::Platform::tsc`]); nanoseconds are ticks times [`Scale`], with the very arithmetic that a guest applies to its
//! paravirtual clock; the APIC timer counts those nanoseconds; a host deadline is the host's
//! CLOCK_MONOTONIC now plus the nanoseconds still to go, computed anew each time, so an error in the
//! measured frequency does not add up.
//!
//! *Base* ticks are the machine's. What one vCPU reads is base plus its IA32_TSC_ADJUST ([`TscAdjust`]).

mod frequency;
mod scale;
mod tsc;

pub use frequency::{FrequencyOrigin, TscFrequency};
pub use scale::Scale;

use rustix::time::{ClockId, clock_gettime};
use std::sync::atomic::{AtomicU64, Ordering};

/// Frequency of the guest TSC when it is derived from CLOCK_MONOTONIC: one tick is one nanosecond.
const MONOTONIC_KHZ: u32 = 1_000_000;

/// The host's CLOCK_MONOTONIC in nanoseconds.
pub fn monotonic_ns() -> u64 {
    nanoseconds(ClockId::Monotonic)
}

/// The host's CLOCK_REALTIME in nanoseconds since 1970.
pub fn realtime_ns() -> u64 {
    nanoseconds(ClockId::Realtime)
}

fn nanoseconds(id: ClockId) -> u64 {
    let t = clock_gettime(id);
    let seconds = u64::try_from(t.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(t.tv_nsec).unwrap_or(0))
}

/// A point in host time: nanoseconds of CLOCK_MONOTONIC.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct HostDeadline(pub u64);

/// A moment in guest time, both ways to say it taken at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Now {
    /// Base ticks of the guest TSC.
    pub tsc: u64,
    /// Nanoseconds since the machine started.
    pub ns: u64,
}

#[derive(Debug)]
enum Source {
    /// Guest ticks are host ticks less `start`.
    HostTsc { start: u64 },
    /// Guest ticks are nanoseconds of CLOCK_MONOTONIC less `start`.
    Monotonic { start: u64 },
    /// Guest ticks are what the owner says.
    Manual(AtomicU64),
}

/// The machine's clock. Shared by all vCPUs; reading it takes no lock.
#[derive(Debug)]
pub struct Clock {
    source: Source,
    tsc_khz: u32,
    scale: Scale,
}

impl Clock {
    /// Measures the host ([`TscFrequency::measure`]: up to some tens of milliseconds) and starts at tick 0.
    pub fn start() -> Self {
        Self::with_frequency(TscFrequency::measure())
    }

    /// Starts at tick 0 with what an earlier measurement found; `None` means the host TSC is unfit.
    pub fn with_frequency(frequency: Option<TscFrequency>) -> Self {
        match frequency {
            Some(f) => Self::new(Source::HostTsc { start: tsc::read() }, f.khz),
            None => Self::new(Source::Monotonic { start: monotonic_ns() }, MONOTONIC_KHZ),
        }
    }

    /// A clock that stands still until [`Clock::advance_ns`]: for tests and for replay.
    ///
    /// A frequency of 0 is taken as 1 kHz.
    pub fn manual(tsc_khz: u32) -> Self {
        Self::new(Source::Manual(AtomicU64::new(0)), tsc_khz.max(1))
    }

    fn new(source: Source, tsc_khz: u32) -> Self {
        Self { source, tsc_khz, scale: Scale::from_khz(tsc_khz) }
    }

    /// Moves a manual clock on by at least `ns` nanoseconds, by a whole number of ticks.
    /// Has no effect on the others.
    pub fn advance_ns(&self, ns: u64) {
        if let Source::Manual(ticks) = &self.source {
            let to = self.scale.ns_to_ticks(self.now_ns().saturating_add(ns));
            ticks.fetch_max(to, Ordering::SeqCst);
        }
    }

    /// The frequency of the guest TSC in kHz.
    pub fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    /// Ticks to nanoseconds, as the paravirtual clock computes them.
    pub fn scale(&self) -> Scale {
        self.scale
    }

    /// Whether guest ticks are host ticks, not nanoseconds.
    pub fn uses_host_tsc(&self) -> bool {
        matches!(self.source, Source::HostTsc { .. })
    }

    /// Base ticks since the machine started.
    #[inline]
    pub fn now_tsc(&self) -> u64 {
        match &self.source {
            // Another CPU's TSC may be some ticks behind the one that read `start`.
            Source::HostTsc { start } => tsc::read().saturating_sub(*start),
            Source::Monotonic { start } => monotonic_ns().saturating_sub(*start),
            Source::Manual(ticks) => ticks.load(Ordering::SeqCst),
        }
    }

    /// Nanoseconds since the machine started.
    #[inline]
    pub fn now_ns(&self) -> u64 {
        self.tsc_to_ns(self.now_tsc())
    }

    /// Both at once.
    #[inline]
    pub fn now(&self) -> Now {
        let tsc = self.now_tsc();
        Now { tsc, ns: self.tsc_to_ns(tsc) }
    }

    /// Nanoseconds that `ticks` take, rounded down.
    #[inline]
    pub fn tsc_to_ns(&self, ticks: u64) -> u64 {
        self.scale.ticks_to_ns(ticks)
    }

    /// The fewest ticks that take at least `ns` nanoseconds, at most `u64::MAX`.
    pub fn ns_to_tsc(&self, ns: u64) -> u64 {
        self.scale.ns_to_ticks(ns)
    }

    /// The first host time at which base ticks will have reached `tsc`; now, if they have.
    pub fn host_deadline(&self, tsc: u64) -> HostDeadline {
        let left = tsc.saturating_sub(self.now_tsc());
        let host = if matches!(self.source, Source::Manual(_)) { self.now_ns() } else { monotonic_ns() };
        HostDeadline(host.saturating_add(self.tsc_to_ns(left)).saturating_add(u64::from(left != 0)))
    }

    /// CLOCK_REALTIME, in nanoseconds since 1970, at tick 0.
    pub fn realtime_at_start_ns(&self) -> u64 {
        realtime_ns().saturating_sub(self.now_ns())
    }
}

/// One vCPU's distance from base ticks: IA32_TSC_ADJUST (SDM vol. 3, 19.17.3).
///
/// IA32_TSC and IA32_TSC_ADJUST move together: writing one moves the other by the same amount. Both
/// start at 0 and no other thing moves them, so one number holds the state of both MSRs. RESET clears
/// it, INIT does not.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct TscAdjust(u64);

impl TscAdjust {
    /// What RDMSR of IA32_TSC_ADJUST yields.
    pub fn get(self) -> u64 {
        self.0
    }

    /// WRMSR to IA32_TSC_ADJUST.
    pub fn set(&mut self, value: u64) {
        self.0 = value;
    }

    /// What RDTSC yields when the machine's base counter is at `base`.
    #[inline]
    pub fn tsc(self, base: u64) -> u64 {
        base.wrapping_add(self.0)
    }

    /// WRMSR to IA32_TSC while the machine's base counter is at `base`.
    pub fn set_tsc(&mut self, base: u64, value: u64) {
        self.0 = value.wrapping_sub(base);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn manual_clock_moves_only_by_hand() {
        let c = Clock::manual(2_596_118);
        assert_eq!(c.now(), Now { tsc: 0, ns: 0 });
        c.advance_ns(1_000_000_000);
        let now = c.now();
        assert!((1_000_000_000..1_000_000_002).contains(&now.ns), "{now:?}");
        assert!(now.tsc.abs_diff(2_596_118_000) < 4, "{now:?}");
        let in_5_us = c.host_deadline(now.tsc + 12_980).0 - now.ns;
        assert!((4_999..=5_001).contains(&in_5_us), "{in_5_us}");
        assert_eq!(c.host_deadline(3), HostDeadline(now.ns));
    }

    /// The host's own clocks must agree with ours over the time a few thousand reads take.
    #[test]
    fn clock_follows_clock_monotonic() {
        for c in [Clock::start(), Clock::with_frequency(None)] {
            let (g0, h0) = (c.now_ns(), monotonic_ns());
            let mut last = c.now_tsc();
            while monotonic_ns() - h0 < 20_000_000 {
                let tsc = c.now_tsc();
                assert!(tsc >= last);
                last = tsc;
            }
            // Bracket the host's reading, so that being descheduled in between cannot fail the test.
            let (g1, h1, g2) = (c.now_ns(), monotonic_ns(), c.now_ns());
            let host = h1 - h0;
            // 1000 ppm of 20 ms, and the same bracket at the start.
            assert!(host + 40_000 + 1_000 * host / 1_000_000 >= g1 - g0, "{g0} {g1} {host}");
            assert!(g2 - g0 + 40_000 + 1_000 * host / 1_000_000 >= host, "{g0} {g2} {host}");
        }
    }

    #[test]
    fn tsc_and_tsc_adjust_move_together() {
        let mut a = TscAdjust::default();
        assert_eq!(a.tsc(1000), 1000);
        a.set_tsc(1000, 5000);
        assert_eq!((a.get(), a.tsc(1000)), (4000, 5000));
        a.set_tsc(2000, 0);
        assert_eq!((a.get(), a.tsc(2000)), (2000u64.wrapping_neg(), 0));
        a.set(7);
        assert_eq!(a.tsc(2000), 2007);
        a.set(u64::MAX);
        assert_eq!(a.tsc(0), u64::MAX);
    }

    #[test]
    fn wall_clock_at_start_is_realtime_less_age() {
        let c = Clock::manual(1_000_000);
        let before = realtime_ns();
        let at0 = c.realtime_at_start_ns();
        assert!((before..=realtime_ns()).contains(&at0));
        c.advance_ns(3_600_000_000_000);
        assert!(at0 - c.realtime_at_start_ns() > 3_599_000_000_000);
    }
}

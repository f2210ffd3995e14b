//! The local APIC timer (SDM vol. 3, 12.5.4): one-shot, periodic, TSC deadline. No lock, no thread:
//! state in, deadline out.

use crate::clock::Now;

/// Frequency of the clock that the divide configuration divides: one tick is one nanosecond.
pub const TIMER_HZ: u32 = 1_000_000_000;

/// The shortest period of a periodic timer, in nanoseconds; a shorter one is taken as this. Each expiry costs the host
/// a wake-up, which no guest may ask for at any rate it likes by one register write. KVM has the same limit by default
/// (its parameter `min_timer_period_us`). A one-shot or deadline timer needs a write for each expiry.
const MIN_PERIOD_NS: u64 = 200_000;

/// Timer mode: bits 18:17 of the LVT timer register.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum TimerMode {
    OneShot,
    Periodic,
    TscDeadline,
    /// Encoding 11: reserved; the timer stands still.
    Reserved,
}

impl TimerMode {
    pub(crate) fn from_lvt(lvt: u32) -> Self {
        match lvt >> 17 & 3 {
            0 => Self::OneShot,
            1 => Self::Periodic,
            2 => Self::TscDeadline,
            _ => Self::Reserved,
        }
    }

    fn counts(self) -> bool {
        matches!(self, Self::OneShot | Self::Periodic)
    }
}

/// When the timer expires next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Expiry {
    /// At this age of the machine in nanoseconds.
    Ns(u64),
    /// When the vCPU's own TSC (adjust included) reaches this.
    Tsc(u64),
}

/// State of the timer. Callers bring it up to date by [`Timer::advance`] before they read or change it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Timer {
    mode: TimerMode,
    divide_config: u32,
    initial_count: u32,
    /// When the count in progress reaches zero; `None`: it has, or there is none.
    zero_at: Option<u64>,
    /// IA32_TSC_DEADLINE; 0: not armed.
    tsc_deadline: u64,
}

impl Timer {
    pub(crate) fn new() -> Self {
        Self { mode: TimerMode::OneShot, divide_config: 0, initial_count: 0, zero_at: None, tsc_deadline: 0 }
    }

    /// Nanoseconds per count: 2, 4, 8, 16, 32, 64, 128, 1 for bits 3, 1, 0 of the divide configuration.
    fn divisor(&self) -> u64 {
        let code = (self.divide_config & 3) | (self.divide_config >> 1 & 4);
        1 << ((code + 1) & 7)
    }

    /// Nanoseconds from the initial count to zero.
    fn period(&self) -> u64 {
        let period = u64::from(self.initial_count) * self.divisor();
        if self.mode == TimerMode::Periodic { period.max(MIN_PERIOD_NS) } else { period }
    }

    /// Accounts for the time up to now. Returns whether the timer expired (once or more).
    pub(crate) fn advance(&mut self, now: Now, own_tsc: u64) -> bool {
        match self.expiry() {
            Some(Expiry::Tsc(at)) if own_tsc >= at => {
                self.tsc_deadline = 0;
                true
            }
            Some(Expiry::Ns(at)) if now.ns >= at => {
                self.zero_at = match self.mode {
                    // Expiries that nobody asked for in time are one: the IRR holds one bit.
                    TimerMode::Periodic => {
                        let missed = (now.ns - at) / self.period();
                        at.checked_add((missed + 1).saturating_mul(self.period()))
                    }
                    _ => None,
                };
                true
            }
            _ => false,
        }
    }

    /// When the timer expires next, if it does.
    pub(crate) fn expiry(&self) -> Option<Expiry> {
        match self.mode {
            TimerMode::OneShot | TimerMode::Periodic => self.zero_at.map(Expiry::Ns),
            TimerMode::TscDeadline if self.tsc_deadline != 0 => Some(Expiry::Tsc(self.tsc_deadline)),
            _ => None,
        }
    }

    /// Follows a write to the LVT timer register. Going to or from TSC-deadline mode disarms.
    pub(crate) fn set_mode(&mut self, mode: TimerMode) {
        if mode != self.mode && !(mode.counts() && self.mode.counts()) {
            self.zero_at = None;
            self.tsc_deadline = 0;
        }
        self.mode = mode;
    }

    pub(crate) fn initial_count(&self) -> u32 {
        self.initial_count
    }

    /// Starts a count, or stops with 0. Ignored in TSC-deadline mode.
    pub(crate) fn set_initial_count(&mut self, count: u32, now: Now) {
        if self.mode.counts() {
            self.initial_count = count;
            self.zero_at = if count == 0 { None } else { now.ns.checked_add(self.period()) };
        }
    }

    /// What is left of the count, rounded up: it reads 0 only once expired. Never more than the initial count, also
    /// in a period that is longer than asked for.
    pub(crate) fn current_count(&self, now: Now) -> u32 {
        let left = match self.zero_at {
            Some(at) if self.mode.counts() => at.saturating_sub(now.ns).div_ceil(self.divisor()),
            _ => 0,
        };
        u32::try_from(left).unwrap_or(u32::MAX).min(self.initial_count)
    }

    pub(crate) fn divide_config(&self) -> u32 {
        self.divide_config
    }

    /// Changes the divisor; a count in progress goes on from where it is.
    pub(crate) fn set_divide_config(&mut self, config: u32, now: Now) {
        let left = u64::from(self.current_count(now));
        self.divide_config = config & 0b1011;
        if self.zero_at.is_some() {
            self.zero_at = now.ns.checked_add(left * self.divisor());
        }
    }

    pub(crate) fn tsc_deadline(&self) -> u64 {
        self.tsc_deadline
    }

    /// Arms, or disarms with 0. Ignored outside TSC-deadline mode.
    pub(crate) fn set_tsc_deadline(&mut self, tsc: u64) {
        if self.mode == TimerMode::TscDeadline {
            self.tsc_deadline = tsc;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ns: u64) -> Now {
        Now { tsc: ns * 3, ns }
    }

    fn step(t: &mut Timer, ns: u64) -> bool {
        t.advance(at(ns), ns * 3)
    }

    #[test]
    fn divide_configuration_table() {
        // SDM vol. 3, figure 12-10.
        let table = [(0b0000, 2), (0b0001, 4), (0b0010, 8), (0b0011, 16)];
        let table2 = [(0b1000, 32), (0b1001, 64), (0b1010, 128), (0b1011, 1)];
        for (config, divisor) in table.into_iter().chain(table2) {
            let mut t = Timer::new();
            t.set_divide_config(config | !0b1011, at(0));
            assert_eq!((t.divide_config(), t.divisor()), (config, divisor));
        }
    }

    #[test]
    fn one_shot_expires_once() {
        let mut t = Timer::new();
        t.set_initial_count(100, at(1000));
        assert_eq!(t.expiry(), Some(Expiry::Ns(1200)));
        assert!(!step(&mut t, 1199));
        assert_eq!(t.current_count(at(1000)), 100);
        assert_eq!(t.current_count(at(1001)), 100);
        assert_eq!(t.current_count(at(1002)), 99);
        assert_eq!(t.current_count(at(1199)), 1);
        assert!(step(&mut t, 1200));
        assert_eq!((t.expiry(), t.current_count(at(1200)), t.initial_count()), (None, 0, 100));
        assert!(!step(&mut t, 1_000_000));
        t.set_initial_count(5, at(0));
        t.set_initial_count(0, at(1));
        assert_eq!((t.expiry(), t.current_count(at(1))), (None, 0));
    }

    #[test]
    fn periodic_keeps_its_phase_over_missed_periods() {
        let mut t = Timer::new();
        t.set_divide_config(0b1011, at(0));
        t.set_mode(TimerMode::Periodic);
        t.set_initial_count(1_000_000, at(500_000));
        assert!(step(&mut t, 1_500_000));
        assert_eq!(t.expiry(), Some(Expiry::Ns(2_500_000)));
        assert!(step(&mut t, 7_777_000));
        assert_eq!(t.expiry(), Some(Expiry::Ns(8_500_000)));
        assert_eq!(t.current_count(at(7_777_000)), 723_000);
        assert!(!step(&mut t, 8_499_999));
    }

    #[test]
    fn a_period_has_a_floor() {
        let mut t = Timer::new();
        t.set_divide_config(0b1011, at(0));
        t.set_initial_count(1, at(0));
        assert_eq!(t.expiry(), Some(Expiry::Ns(1)), "one-shot: as asked for");
        t.set_mode(TimerMode::Periodic);
        assert!(step(&mut t, 1));
        assert_eq!(t.expiry(), Some(Expiry::Ns(1 + MIN_PERIOD_NS)));
        assert_eq!((t.current_count(at(2)), t.initial_count()), (1, 1));
        t.set_initial_count(MIN_PERIOD_NS as u32 - 1, at(0));
        assert_eq!(t.expiry(), Some(Expiry::Ns(MIN_PERIOD_NS)));
        assert_eq!(t.current_count(at(0)), MIN_PERIOD_NS as u32 - 1);
        t.set_initial_count(MIN_PERIOD_NS as u32 + 1, at(0));
        assert_eq!(t.expiry(), Some(Expiry::Ns(MIN_PERIOD_NS + 1)));
        t.set_initial_count(0, at(0));
        assert_eq!(t.expiry(), None, "still stopped by 0");
    }

    #[test]
    fn extremes_do_not_overflow() {
        let mut t = Timer::new();
        t.set_mode(TimerMode::Periodic);
        t.set_divide_config(0b1010, at(0));
        t.set_initial_count(u32::MAX, at(0));
        assert_eq!(t.expiry(), Some(Expiry::Ns(u64::from(u32::MAX) * 128)));
        assert!(t.advance(Now { tsc: 0, ns: u64::MAX }, 0));
        t.set_initial_count(u32::MAX, Now { tsc: 0, ns: u64::MAX });
        assert_eq!(t.expiry(), None);
    }

    #[test]
    fn tsc_deadline_rules() {
        let mut t = Timer::new();
        t.set_tsc_deadline(5);
        assert_eq!(t.tsc_deadline(), 0, "ignored outside the mode");
        t.set_mode(TimerMode::TscDeadline);
        t.set_initial_count(7, at(0));
        assert_eq!((t.initial_count(), t.expiry()), (0, None), "count ignored in the mode");
        t.set_tsc_deadline(300);
        assert_eq!((t.tsc_deadline(), t.expiry()), (300, Some(Expiry::Tsc(300))));
        assert!(!step(&mut t, 99));
        assert!(step(&mut t, 100));
        assert_eq!((t.tsc_deadline(), t.expiry()), (0, None));
        t.set_tsc_deadline(1);
        assert!(step(&mut t, 100), "a deadline in the past expires at once");
        t.set_tsc_deadline(900);
        t.set_tsc_deadline(0);
        assert_eq!(t.expiry(), None);
        t.set_tsc_deadline(900);
        t.set_mode(TimerMode::OneShot);
        assert_eq!((t.tsc_deadline(), t.expiry()), (0, None), "mode change disarms");
        t.set_initial_count(10, at(0));
        t.set_mode(TimerMode::Periodic);
        assert_eq!(t.expiry(), Some(Expiry::Ns(20)), "one-shot to periodic counts on");
        t.set_mode(TimerMode::TscDeadline);
        assert_eq!(t.expiry(), None);
    }
}

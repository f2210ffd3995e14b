//! When which flow is to be looked at.
//!
//! A flow's deadline moves with nearly every segment, nearly always to later. So the queue holds one entry a flow for
//! the earliest time that it was ever asked for, and when that comes, the flow says whether it meant it. Entries that
//! were overtaken by an earlier one, or whose flow is gone, stay until their time comes and are then ignored; should
//! they become many, they are swept out.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Instant;

/// Deadlines of flows, by number.
#[derive(Default)]
pub(super) struct Timers {
    heap: BinaryHeap<Reverse<(Instant, u32)>>,
}

impl Timers {
    /// Entries that nobody minds.
    const FEW: usize = 1024;

    /// Has flow `number` looked at by `deadline`. `scheduled` is the flow's note of its entry here.
    pub(super) fn schedule(&mut self, number: u32, scheduled: &mut Option<Instant>, deadline: Instant) {
        if scheduled.is_none_or(|at| deadline < at) {
            *scheduled = Some(deadline);
            self.heap.push(Reverse((deadline, number)));
        }
    }

    /// Takes the next entry that is due at `now`: when it was due, and whose it is. It counts only if the flow's note
    /// has this very time.
    pub(super) fn due(&mut self, now: Instant) -> Option<(Instant, u32)> {
        match self.heap.peek() {
            Some(&Reverse((at, _))) if at <= now => self.heap.pop().map(|Reverse(entry)| entry),
            _ => None,
        }
    }

    /// Sweeps out the entries that do not count, if most do not: `flows` is how many flows there are.
    pub(super) fn sweep(&mut self, flows: usize, mut counts: impl FnMut(Instant, u32) -> bool) {
        if self.heap.len() > 4 * flows + Self::FEW {
            self.heap.retain(|&Reverse((at, number))| counts(at, number));
        }
    }

    /// When the next entry is due.
    pub(super) fn next(&self) -> Option<Instant> {
        self.heap.peek().map(|Reverse((at, _))| *at)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn entries_that_do_not_count_are_swept_out() {
        let start = Instant::now();
        let mut timers = Timers::default();
        for number in 0..5000 {
            timers.schedule(number, &mut None, start + Duration::from_secs(u64::from(number)));
        }
        timers.sweep(2000, |_, _| unreachable!("they are not that many"));
        timers.sweep(10, |_, number| number == 4321);
        assert_eq!(
            timers.due(start + Duration::from_secs(9999)),
            Some((start + Duration::from_secs(4321), 4321))
        );
        assert_eq!(timers.next(), None);
    }

    #[test]
    fn later_deadlines_cost_nothing_and_earlier_ones_overtake() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut timers = Timers::default();
        let mut note = None;
        timers.schedule(7, &mut note, at(10));
        timers.schedule(7, &mut note, at(20));
        assert_eq!(note, Some(at(10)));
        timers.schedule(7, &mut note, at(5));
        assert_eq!(note, Some(at(5)));
        assert_eq!(timers.next(), Some(at(5)));
        assert_eq!(timers.due(at(4)), None);
        assert_eq!(timers.due(at(30)), Some((at(5), 7)));
        assert_eq!(timers.due(at(30)), Some((at(10), 7)), "stale: its flow's note says otherwise");
        assert_eq!(timers.due(at(30)), None);
    }
}

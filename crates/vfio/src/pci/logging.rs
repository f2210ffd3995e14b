//! The log of what a device writes to memory.
//!
//! Each range that is logged has one bit for each page. A write sets bits; a report takes them. Both are rare beside the
//! writes that are not logged because nobody has started: those cost one load.

use std::sync::{
    RwLock,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use iommufd::{
    domain::DirtySink,
    iova::{Iova, IovaRange},
};

use crate::{Errno, Result, device::DmaLogging};

/// The smallest page that is noted.
const LEAST_PAGE: u64 = 4096;
/// The largest: a coarser log would be of no use to anybody.
const MOST_PAGE: u64 = 1 << 30;
/// How many ranges may be logged at once.
const MOST_RANGES: usize = 1024;
/// How many pages may be logged: 64 MiB of bits, 2 TiB in the smallest pages.
const MOST_PAGES: u64 = 1 << 29;

#[derive(Debug)]
struct Logged {
    range: IovaRange,
    /// The number of the first page.
    first: u64,
    bits: Vec<AtomicU64>,
}

#[derive(Debug, Default)]
struct Log {
    page_shift: u32,
    ranges: Vec<Logged>,
}

/// A log, empty and off at first.
#[derive(Debug, Default)]
pub struct DirtyLog {
    on: AtomicBool,
    log: RwLock<Log>,
}

impl DirtyLog {
    /// The device has written `length` bytes at `iova`.
    pub fn note(&self, iova: Iova, length: u64) {
        if length == 0 || !self.on.load(Ordering::Acquire) {
            return;
        }
        let log = self.log.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        let last = Iova(iova.0.saturating_add(length - 1));
        let Ok(written) = IovaRange::new(iova, last) else { return };
        for logged in &log.ranges {
            if let Some(part) = logged.range.intersection(written) {
                for page in part.start().0 >> log.page_shift..=part.last().0 >> log.page_shift {
                    let at = page - logged.first;
                    if let Some(word) = logged.bits.get((at / 64) as usize) {
                        word.fetch_or(1 << (at % 64), Ordering::Relaxed);
                    }
                }
            }
        }
    }
}

impl DmaLogging for DirtyLog {
    fn start(&self, page_size: u64, ranges: &[IovaRange]) -> Result<u64> {
        let page_size = page_size.clamp(LEAST_PAGE, MOST_PAGE);
        if !page_size.is_power_of_two() || ranges.is_empty() {
            return Err(Errno::INVAL);
        }
        if ranges.len() > MOST_RANGES {
            return Err(Errno::OPNOTSUPP);
        }
        let page_shift = page_size.trailing_zeros();
        let mut sorted = ranges.to_vec();
        sorted.sort_by_key(|range| range.start());
        let overlap = |pair: &[IovaRange]| matches!(pair, [a, b] if a.last() >= b.start());
        if sorted.windows(2).any(overlap) {
            return Err(Errno::INVAL);
        }
        let pages = |range: &IovaRange| (range.last().0 >> page_shift) - (range.start().0 >> page_shift) + 1;
        if sorted
            .iter()
            .try_fold(0u64, |sum, range| sum.checked_add(pages(range)))
            .is_none_or(|sum| sum > MOST_PAGES)
        {
            return Err(Errno::NOMEM);
        }
        let mut log = self.log.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        if self.on.load(Ordering::Acquire) {
            return Err(Errno::INVAL);
        }
        let logged = |range: IovaRange| Logged {
            range,
            first: range.start().0 >> page_shift,
            bits: (0..pages(&range).div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
        };
        *log = Log { page_shift, ranges: sorted.into_iter().map(logged).collect() };
        self.on.store(true, Ordering::Release);
        Ok(page_size)
    }

    fn stop(&self) {
        let mut log = self.log.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        self.on.store(false, Ordering::Release);
        *log = Log::default();
    }

    fn report(&self, range: IovaRange, sink: &mut dyn DirtySink) -> Result<()> {
        let log = self.log.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        if !self.on.load(Ordering::Acquire) {
            return Err(Errno::INVAL);
        }
        let page_size = 1u64 << log.page_shift;
        for logged in &log.ranges {
            let Some(part) = logged.range.intersection(range) else { continue };
            let first = (part.start().0 >> log.page_shift) - logged.first;
            let last = (part.last().0 >> log.page_shift) - logged.first;
            for word in first / 64..=last / 64 {
                let Some(bits) = logged.bits.get(word as usize) else { break };
                let from = first.saturating_sub(word * 64).min(63);
                let to = (last - word * 64).min(63);
                let mask = u64::MAX << from & u64::MAX >> (63 - to);
                let mut dirty = bits.fetch_and(!mask, Ordering::Relaxed) & mask;
                while dirty != 0 {
                    let at = u64::from(dirty.trailing_zeros());
                    let run = u64::from((dirty >> at).trailing_ones());
                    sink.dirty(Iova((logged.first + word * 64 + at) << log.page_shift), run * page_size);
                    dirty &= !(u64::MAX >> (64 - run) << at);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Seen(Vec<(u64, u64)>);

    impl DirtySink for Seen {
        fn dirty(&mut self, iova: Iova, length: u64) {
            self.0.push((iova.0, length));
        }
    }

    fn range(start: u64, length: u64) -> IovaRange {
        IovaRange::with_length(Iova(start), length).unwrap()
    }

    fn report(log: &DirtyLog, range: IovaRange) -> Vec<(u64, u64)> {
        let mut seen = Seen::default();
        log.report(range, &mut seen).unwrap();
        seen.0
    }

    #[test]
    fn writes_are_reported_once() {
        let log = DirtyLog::default();
        log.note(Iova(0x1000), 1);
        assert_eq!(log.report(range(0, 1), &mut Seen::default()), Err(Errno::INVAL));
        assert_eq!(log.start(0x1000, &[range(0x1_0000, 0x20_0000)]), Ok(0x1000));
        log.note(Iova(0xffff), 2);
        log.note(Iova(0x4_f000), 0x3000);
        log.note(Iova(0x20_ffff), 0x1000);
        log.note(Iova(0x30_0000), 1);
        assert_eq!(report(&log, range(0x1_0000, 0x1000)), [(0x1_0000, 0x1000)]);
        assert_eq!(
            report(&log, IovaRange::ALL),
            // Pages 63 and 64 of the range: one run in each word.
            [(0x4_f000, 0x1000), (0x5_0000, 0x2000), (0x20_f000, 0x1000)]
        );
        assert_eq!(report(&log, IovaRange::ALL), []);
        log.stop();
        log.stop();
        assert_eq!(log.report(IovaRange::ALL, &mut Seen::default()), Err(Errno::INVAL));
    }

    #[test]
    fn only_what_is_asked_for_is_taken() {
        let log = DirtyLog::default();
        log.start(0x1000, &[range(0, 0x100_0000)]).unwrap();
        log.note(Iova(0), 0x100_0000);
        let middle = report(&log, range(0x3_e000, 0x4000));
        assert_eq!(middle, [(0x3_e000, 0x2000), (0x4_0000, 0x2000)]);
        let rest: u64 = report(&log, IovaRange::ALL).iter().map(|(_, length)| length).sum();
        assert_eq!(rest, 0x100_0000 - 0x4000);
    }

    #[test]
    fn bad_ranges_are_refused() {
        let log = DirtyLog::default();
        assert_eq!(log.start(4096, &[]), Err(Errno::INVAL));
        assert_eq!(log.start(12288, &[range(0, 1)]), Err(Errno::INVAL));
        assert_eq!(log.start(4096, &[range(0x2000, 0x2000), range(0, 0x2001)]), Err(Errno::INVAL));
        assert_eq!(log.start(4096, &[IovaRange::ALL]), Err(Errno::NOMEM));
        assert_eq!(log.start(4096, &vec![range(0, 1); 2000]), Err(Errno::OPNOTSUPP));
        assert_eq!(log.start(1, &[range(0, 1)]), Ok(4096));
        assert_eq!(log.start(4096, &[range(0, 1)]), Err(Errno::INVAL));
    }
}

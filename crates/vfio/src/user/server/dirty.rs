//! Which pages of the client's memory the device has written to: the log for devices that keep none of their own.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use iommufd::domain::DirtySink;
use iommufd::iova::{Iova, IovaRange};

use crate::user::{Errno, Result};

/// Bytes that the log notes in.
pub(super) const PAGE: u64 = 4096;
/// Pages that one entry of the log has.
const CHUNK: u64 = 64;
/// Entries that the log has at most: 16 GiB of scattered pages, each of which the client has announced.
const MAX_CHUNKS: usize = 1 << 20;

#[derive(Debug)]
struct Log {
    /// What is noted; nothing stands for all addresses.
    ranges: Vec<IovaRange>,
    /// One bit for each page that was written to, by page number divided by [`CHUNK`].
    chunks: HashMap<u64, u64>,
    /// There were more than [`MAX_CHUNKS`]: everything counts as written to.
    overflown: bool,
}

/// The log. While it is off, a write costs one look at it.
#[derive(Debug, Default)]
pub(super) struct DirtyLog {
    on: AtomicBool,
    log: Mutex<Option<Log>>,
}

impl DirtyLog {
    fn lock(&self) -> MutexGuard<'_, Option<Log>> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to note.
    ///
    /// # Errors
    /// EINVAL when it notes already.
    pub(super) fn start(&self, ranges: Vec<IovaRange>) -> Result<u64> {
        let mut log = self.lock();
        if log.is_some() {
            return Err(Errno::INVAL);
        }
        *log = Some(Log { ranges, chunks: HashMap::new(), overflown: false });
        self.on.store(true, Ordering::SeqCst);
        Ok(PAGE)
    }

    /// Stops, and forgets.
    pub(super) fn stop(&self) {
        self.on.store(false, Ordering::SeqCst);
        *self.lock() = None;
    }

    /// `length` bytes were written at `iova`.
    pub(super) fn dirty(&self, iova: Iova, length: u64) {
        if !self.on.load(Ordering::SeqCst) || length == 0 {
            return;
        }
        let Ok(range) = IovaRange::with_length(iova, length) else { return };
        if let Some(log) = &mut *self.lock() {
            let noted =
                log.ranges.is_empty() || log.ranges.iter().any(|noted| noted.intersection(range).is_some());
            if noted {
                log.note(range);
            }
        }
    }

    /// Reports what was written to in `range`, and forgets it.
    ///
    /// # Errors
    /// EINVAL when it does not note.
    pub(super) fn report(&self, range: IovaRange, sink: &mut dyn DirtySink) -> Result<()> {
        let mut log = self.lock();
        let log = log.as_mut().ok_or(Errno::INVAL)?;
        if log.overflown {
            sink.dirty(range.start(), range.length().unwrap_or(u64::MAX));
            return Ok(());
        }
        let (first, last) = (range.start().0 / PAGE, range.last().0 / PAGE);
        let mut report = |key: u64, bits: &mut u64| {
            for bit in 0..CHUNK {
                let page = key * CHUNK + bit;
                if *bits & 1 << bit != 0 && (first..=last).contains(&page) {
                    *bits &= !(1 << bit);
                    sink.dirty(Iova(page * PAGE), PAGE);
                }
            }
        };
        let keys = (last / CHUNK - first / CHUNK).saturating_add(1);
        if usize::try_from(keys).is_ok_and(|keys| keys <= log.chunks.len()) {
            for key in first / CHUNK..=last / CHUNK {
                if let Some(bits) = log.chunks.get_mut(&key) {
                    report(key, bits);
                }
            }
        } else {
            for (key, bits) in &mut log.chunks {
                report(*key, bits);
            }
        }
        log.chunks.retain(|_, bits| *bits != 0);
        Ok(())
    }
}

impl Log {
    fn note(&mut self, range: IovaRange) {
        for page in range.start().0 / PAGE..=range.last().0 / PAGE {
            if self.chunks.len() >= MAX_CHUNKS && !self.chunks.contains_key(&(page / CHUNK)) {
                self.overflown = true;
                self.chunks = HashMap::new();
                return;
            }
            *self.chunks.entry(page / CHUNK).or_default() |= 1 << (page % CHUNK);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Pages(Vec<u64>);

    impl DirtySink for Pages {
        fn dirty(&mut self, iova: Iova, length: u64) {
            self.0.extend((iova.0 / PAGE..(iova.0 + length).div_ceil(PAGE)).collect::<Vec<_>>());
        }
    }

    fn report(log: &DirtyLog, start: u64, length: u64) -> Vec<u64> {
        let mut pages = Pages::default();
        log.report(IovaRange::with_length(Iova(start), length).unwrap(), &mut pages).unwrap();
        pages.0.sort_unstable();
        pages.0
    }

    #[test]
    fn what_is_written_is_reported_once() {
        let log = DirtyLog::default();
        log.dirty(Iova(0), 1);
        log.start(Vec::new()).unwrap();
        assert_eq!(log.start(Vec::new()), Err(Errno::INVAL));
        log.dirty(Iova(0x1fff), 2);
        log.dirty(Iova(0x1000 * 64), 0x1000);
        log.dirty(Iova(0x9000), 0);
        assert_eq!(report(&log, 0x2000, 0x1000), [2]);
        assert_eq!(report(&log, 0, u64::MAX), [1, 64]);
        assert_eq!(report(&log, 0, u64::MAX), [0; 0]);
        log.stop();
        let all = IovaRange::ALL;
        assert_eq!(log.report(all, &mut Pages::default()), Err(Errno::INVAL));
    }

    #[test]
    fn only_the_ranges_are_noted() {
        let log = DirtyLog::default();
        log.start(vec![IovaRange::with_length(Iova(0x4000), 0x2000).unwrap()]).unwrap();
        log.dirty(Iova(0x3000), 0x1000);
        log.dirty(Iova(0x5000), 0x1000);
        assert_eq!(report(&log, 0, u64::MAX), [5]);
    }
}

//! Areas: what is mapped where.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use super::{Owner, ranges::Ranges};
use crate::{
    Errno, Result,
    domain::Prot,
    iova::{Iova, IovaRange},
    pages::{Pages, Placement},
};

/// A range of addresses that shows a part of a backing store.
#[derive(Debug)]
pub(super) struct Area {
    pub(super) range: IovaRange,
    pub(super) length: u64,
    pub(super) pages: Arc<Pages>,
    /// From which byte of `pages` on.
    pub(super) offset: u64,
    pub(super) prot: Prot,
    /// Everything is where it belongs: not while it is being mapped or unmapped, when it only holds its place.
    ready: AtomicBool,
    /// It is about to be unmapped: nobody else may pin it.
    closing: AtomicBool,
    /// Pins of accesses, and how many of them are owners'.
    pins: AtomicU64,
    owners: AtomicU64,
    /// Pins being made and copies being done, which end by themselves. Unmapping waits for them.
    busy: AtomicU64,
}

impl Area {
    pub(super) fn new(range: IovaRange, piece: &Piece, prot: Prot, ready: bool) -> Self {
        Self {
            range,
            length: piece.length,
            pages: piece.pages.clone(),
            offset: piece.offset,
            prot,
            ready: AtomicBool::new(ready),
            closing: AtomicBool::new(false),
            pins: AtomicU64::new(0),
            owners: AtomicU64::new(0),
            busy: AtomicU64::new(0),
        }
    }

    /// Its part in `range`, which is in it, as an area of its own.
    pub(super) fn part(&self, range: IovaRange) -> Self {
        let into = range.start().0 - self.range.start().0;
        let length = range.last().0 - range.start().0 + 1;
        let piece = Piece { pages: self.pages.clone(), offset: self.offset + into, length };
        Self::new(range, &piece, self.prot, true)
    }

    pub(super) fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Acquire)
    }

    pub(super) fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::Release);
    }

    pub(super) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::SeqCst)
    }

    /// Lets nobody else pin or copy, or lets them again.
    pub(super) fn set_closing(&self, closing: bool) {
        self.closing.store(closing, Ordering::SeqCst);
    }

    /// Whether a pin is being made or a copy done. It is read after `closing` was set, and `closing` is read after it fell:
    /// so one of the two notices the other.
    pub(super) fn is_busy(&self) -> bool {
        self.busy.load(Ordering::SeqCst) > 0
    }

    pub(super) fn is_pinned(&self) -> bool {
        self.pins.load(Ordering::Acquire) > 0
    }

    pub(super) fn is_owned(&self) -> bool {
        self.owners.load(Ordering::Acquire) > 0
    }

    /// Under the lock of the map, so that unmapping sees it.
    pub(super) fn begin_busy(&self) {
        self.busy.fetch_add(1, Ordering::SeqCst);
    }

    /// Whether somebody has to be told that it is not busy any more.
    pub(super) fn end_busy(&self) -> bool {
        self.busy.fetch_sub(1, Ordering::SeqCst) == 1 && self.is_closing()
    }

    /// One pin more. While it is busy, so that unmapping sees it.
    pub(super) fn add_pin(&self, owner: bool) {
        self.pins.fetch_add(1, Ordering::Relaxed);
        self.owners.fetch_add(u64::from(owner), Ordering::Relaxed);
    }

    /// One less, whose pages are unpinned.
    pub(super) fn remove_pin(&self, owner: bool) {
        self.owners.fetch_sub(u64::from(owner), Ordering::Release);
        self.pins.fetch_sub(1, Ordering::Release);
    }

    pub(super) fn is_aligned(&self, alignment: u64) -> bool {
        let bits = self.range.start().0 | self.length | self.pages.in_page(self.offset);
        bits & (alignment - 1) == 0
    }

    pub(super) fn placement(&self, huge_pages: bool) -> Placement {
        Placement {
            range: self.range,
            length: self.length,
            offset: self.offset,
            prot: self.prot,
            small: !huge_pages,
        }
    }
}

/// A part of a backing store that is, or is to be, shown.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    pub(super) pages: Arc<Pages>,
    pub(super) offset: u64,
    pub(super) length: u64,
}

/// A part of an area.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) area: Arc<Area>,
    /// From which byte of the area's backing store on.
    pub(super) offset: u64,
    pub(super) length: u64,
    /// It ends where the area does, and the range that was asked for goes on in the next one.
    pub(super) to_end: bool,
}

impl Part {
    pub(super) fn piece(&self) -> Piece {
        Piece { pages: self.area.pages.clone(), offset: self.offset, length: self.length }
    }
}

/// The map of an address space.
#[derive(Debug)]
pub(super) struct Areas {
    pub(super) map: BTreeMap<u64, Arc<Area>>,
    pub(super) ranges: Ranges,
    /// What everything must be aligned to.
    pub(super) alignment: u64,
    pub(super) huge_pages: bool,
}

impl Areas {
    /// The areas that have a part of `range`, in order.
    pub(super) fn overlapping(&self, range: IovaRange) -> impl Iterator<Item = &Arc<Area>> {
        let before = self.map.range(..range.start().0).next_back().map(|(_, area)| area);
        let before = before.filter(|area| area.range.last() >= range.start());
        before.into_iter().chain(self.map.range(range.start().0..=range.last().0).map(|(_, area)| area))
    }

    /// Gives the parts of areas that `range` has, in order, as long as `take` takes them. ENOENT where a part is missing,
    /// or is not ready.
    pub(super) fn walk(&self, range: IovaRange, mut take: impl FnMut(Part) -> Result<()>) -> Result<()> {
        let mut next = range.start();
        for area in self.overlapping(range) {
            if area.range.start() > next || !area.is_ready() {
                return Err(Errno::NOENT);
            }
            let into = next.0 - area.range.start().0;
            let last = area.range.last().min(range.last());
            let part = Part {
                area: area.clone(),
                offset: area.offset + into,
                length: last.0 - next.0 + 1,
                to_end: last < range.last(),
            };
            take(part)?;
            if last == range.last() {
                return Ok(());
            }
            next = Iova(last.0 + 1);
        }
        Err(Errno::NOENT)
    }

    /// EADDRINUSE when a part of `range` is mapped or allowed.
    pub(super) fn reserve(&mut self, range: IovaRange, owner: Owner) -> Result<()> {
        if self.overlapping(range).next().is_some() {
            return Err(Errno::ADDRINUSE);
        }
        self.ranges.reserve(range, owner)
    }

    pub(super) fn insert(&mut self, area: Arc<Area>) {
        self.map.insert(area.range.start().0, area);
    }

    pub(super) fn remove(&mut self, range: IovaRange) -> Option<Arc<Area>> {
        let area = self.map.remove(&range.start().0)?;
        let before = self.map.range(..range.start().0).next_back();
        let free_from = before.map_or(0, |(_, before)| before.range.last().0.saturating_add(1));
        self.ranges.freed(free_from);
        Some(area)
    }

    /// Changes what everything must be aligned to. EADDRINUSE when an area is not.
    pub(super) fn set_alignment(&mut self, alignment: u64) -> Result<()> {
        if alignment > self.alignment && !self.map.values().all(|area| area.is_aligned(alignment)) {
            return Err(Errno::ADDRINUSE);
        }
        if alignment != self.alignment {
            self.alignment = alignment;
            self.ranges.freed(0);
        }
        Ok(())
    }
}

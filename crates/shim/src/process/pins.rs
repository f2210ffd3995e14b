//! Which pages of the program are pinned, where they are now, and by whom.
//!
//! The registry is a map of pieces, which never overlap: runs of pages whose pins are the same. A pin is entered into all
//! pieces that it covers, and pieces are cut at its ends. So the two questions that matter are answered by walking a
//! range: what is pinned among the addresses that the program unmaps, and how often is this page pinned.
//!
//! A page that moves keeps its pins; its piece gets another address, which is *hidden*: memory that belongs to the
//! library and is unmapped when the last pin ends.
//!
//! Lock order: a pin's runs inside the registry.

use core::fmt;
use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError, RwLock, Weak},
};

use iommufd::{domain::HostAddr, hostmem::HostRun, iova::PAGE_SIZE, process::PinObserver, process::UserAddr};

/// Pages one after the other, by page number (address / [`PAGE_SIZE`]).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct PageRun {
    pub start: u64,
    pub pages: u64,
}

impl PageRun {
    pub(crate) const fn end(self) -> u64 {
        self.start + self.pages
    }
}

/// A pin: where its pages were found, where they are, and who must know when they move.
pub(crate) struct Pin {
    /// The number of the page where it was made.
    origin: u64,
    pages: u64,
    observer: Weak<dyn PinObserver>,
    /// Where the pages are, in order: the index of the first, and the run. Together they are all pages of the pin.
    runs: RwLock<Vec<(u64, PageRun)>>,
}

impl fmt::Debug for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pin").field("origin", &self.origin).field("runs", &*self.runs()).finish()
    }
}

impl Pin {
    fn runs(&self) -> std::sync::RwLockReadGuard<'_, Vec<(u64, PageRun)>> {
        self.runs.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many pages it has.
    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }

    /// Where page `first` is, and how many after it lie behind it without a gap.
    pub(crate) fn run(&self, first: u64) -> HostRun {
        let runs = self.runs();
        let at = runs.partition_point(|(index, _)| *index <= first).saturating_sub(1);
        let Some((index, run)) = runs.get(at).copied() else {
            return HostRun { start: HostAddr(0), pages: 0 };
        };
        let skipped = first - index;
        let start = HostAddr((run.start + skipped) * PAGE_SIZE);
        HostRun { start, pages: run.pages.saturating_sub(skipped) }
    }

    /// The pages that are now in `moved`, by the user address at which the pin found them, and how many.
    fn found_at(&self, moved: PageRun) -> Vec<(UserAddr, u64)> {
        let found = |&(index, run): &(u64, PageRun)| {
            let (start, end) = (run.start.max(moved.start), run.end().min(moved.end()));
            (start < end)
                .then(|| (UserAddr((self.origin + index + start - run.start) * PAGE_SIZE), end - start))
        };
        self.runs().iter().filter_map(found).collect()
    }

    /// The pages in `from` are at page number `to` now.
    fn relocate(&self, from: PageRun, to: u64) {
        let mut runs = self.runs.write().unwrap_or_else(PoisonError::into_inner);
        let mut after = Vec::with_capacity(runs.len() + 2);
        for &(index, run) in runs.iter() {
            let (start, end) = (run.start.max(from.start), run.end().min(from.end()));
            if start >= end {
                after.push((index, run));
                continue;
            }
            if run.start < start {
                after.push((index, PageRun { start: run.start, pages: start - run.start }));
            }
            let moved = PageRun { start: to + (start - from.start), pages: end - start };
            after.push((index + (start - run.start), moved));
            if end < run.end() {
                after.push((index + (end - run.start), PageRun { start: end, pages: run.end() - end }));
            }
        }
        *runs = after;
    }
}

/// What one piece is pinned by.
#[derive(Clone, Debug)]
struct Piece {
    pages: u64,
    pins: Vec<Arc<Pin>>,
    /// Whether the address is the library's own.
    hidden: bool,
}

/// An observer, and the pages that move under it.
pub(crate) struct Notice {
    observer: Arc<dyn PinObserver>,
    from: UserAddr,
    pages: u64,
}

impl Notice {
    pub(crate) fn moving(&self) {
        self.observer.moving(self.from, self.pages);
    }

    pub(crate) fn moved(&self) {
        self.observer.moved(self.from, self.pages);
    }
}

/// All pins of this process.
#[derive(Default, Debug)]
pub(crate) struct Registry {
    pieces: BTreeMap<u64, Piece>,
    /// Pages that are being moved: nobody may pin them any more.
    moving: Option<PageRun>,
}

impl Registry {
    pub(crate) const fn new() -> Self {
        Self { pieces: BTreeMap::new(), moving: None }
    }

    /// Whether nothing is pinned.
    pub(crate) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Pins `run`, whose pages are present. None when they are just moving away.
    pub(crate) fn pin(&mut self, run: PageRun, observer: Weak<dyn PinObserver>) -> Option<Arc<Pin>> {
        if self.moving.is_some_and(|moving| run.start < moving.end() && moving.start < run.end()) {
            return None;
        }
        let runs = RwLock::new(vec![(0, run)]);
        let pin = Arc::new(Pin { origin: run.start, pages: run.pages, observer, runs });
        self.enter(run, &pin);
        Some(pin)
    }

    /// Ends `pin`: the hidden runs that nobody pins any more.
    pub(crate) fn unpin(&mut self, pin: &Arc<Pin>) -> Vec<PageRun> {
        let runs = pin.runs().clone();
        let mut free = Vec::new();
        for (_, run) in runs {
            for start in self.cut(run) {
                let Some(piece) = self.pieces.get_mut(&start) else { continue };
                piece.pins.retain(|other| !Arc::ptr_eq(other, pin));
                if piece.pins.is_empty() {
                    if piece.hidden {
                        free.push(PageRun { start, pages: piece.pages });
                    }
                    self.pieces.remove(&start);
                }
            }
        }
        free
    }

    /// Makes two pins of one: the pages before `at`, and those from there on.
    pub(crate) fn split(&mut self, pin: &Arc<Pin>, at: u64) -> (Arc<Pin>, Arc<Pin>) {
        let (mut before, mut after) = (Vec::new(), Vec::new());
        for &(index, run) in pin.runs().iter() {
            let cut = at.saturating_sub(index).min(run.pages);
            if cut > 0 {
                before.push((index, PageRun { start: run.start, pages: cut }));
            }
            if cut < run.pages {
                let rest = PageRun { start: run.start + cut, pages: run.pages - cut };
                after.push((index + cut - at, rest));
            }
        }
        let part = |origin, pages, runs: Vec<(u64, PageRun)>| {
            Arc::new(Pin { origin, pages, observer: Weak::clone(&pin.observer), runs: RwLock::new(runs) })
        };
        let parts =
            (part(pin.origin, at, before.clone()), part(pin.origin + at, pin.pages - at, after.clone()));
        for (part, runs) in [(&parts.0, before), (&parts.1, after)] {
            for (_, run) in runs {
                for start in self.cut(run) {
                    let Some(piece) = self.pieces.get_mut(&start) else { continue };
                    for other in &mut piece.pins {
                        if Arc::ptr_eq(other, pin) {
                            *other = Arc::clone(part);
                        }
                    }
                }
            }
        }
        parts
    }

    /// How often the page is pinned by its address.
    pub(crate) fn count(&self, page: u64) -> u64 {
        match self.pieces.range(..=page).next_back() {
            Some((start, piece)) if page < start + piece.pages => piece.pins.len() as u64,
            _ => 0,
        }
    }

    /// The pinned runs of the program's own addresses in `range`.
    pub(crate) fn pinned(&self, range: PageRun) -> Vec<PageRun> {
        let first = match self.pieces.range(..range.start).next_back() {
            Some((start, piece)) if range.start < start + piece.pages => *start,
            _ => range.start,
        };
        self.pieces
            .range(first..range.end())
            .filter(|(_, piece)| !piece.hidden)
            .map(|(start, piece)| {
                let (start, end) = ((*start).max(range.start), (start + piece.pages).min(range.end()));
                PageRun { start, pages: end - start }
            })
            .collect()
    }

    /// Pages in `range` are about to move: whom to tell. Until [`Self::settle`] nobody can pin them.
    pub(crate) fn unsettle(&mut self, range: PageRun) -> Vec<Notice> {
        self.moving = Some(range);
        let mut notices = Vec::new();
        for run in self.pinned(range) {
            for start in self.cut(run) {
                let Some(piece) = self.pieces.get(&start) else { continue };
                let here = PageRun { start, pages: piece.pages };
                for pin in &piece.pins {
                    let Some(observer) = pin.observer.upgrade() else { continue };
                    let found = pin.found_at(here);
                    notices.extend(found.into_iter().map(|(from, pages)| Notice {
                        observer: Arc::clone(&observer),
                        from,
                        pages,
                    }));
                }
            }
        }
        notices
    }

    /// What `unsettle` began is over.
    pub(crate) fn settle(&mut self) {
        self.moving = None;
    }

    /// The pages of `from`, all pinned, are at page number `to` now, which may be `hidden`.
    pub(crate) fn relocate(&mut self, from: PageRun, to: u64, hidden: bool) {
        for start in self.cut(from) {
            let Some(mut piece) = self.pieces.remove(&start) else { continue };
            let run = PageRun { start, pages: piece.pages };
            let there = to + (start - from.start);
            for pin in &piece.pins {
                pin.relocate(run, there);
            }
            piece.hidden = hidden;
            self.pieces.insert(there, piece);
        }
    }

    /// Takes everything out: the hidden runs.
    pub(crate) fn take_hidden(&mut self) -> Vec<PageRun> {
        self.moving = None;
        let pieces = core::mem::take(&mut self.pieces);
        pieces
            .into_iter()
            .filter(|(_, piece)| piece.hidden)
            .map(|(start, piece)| PageRun { start, pages: piece.pages })
            .collect()
    }

    /// Cuts pieces at the ends of `run`: the starts of those in it.
    fn cut(&mut self, run: PageRun) -> Vec<u64> {
        for at in [run.start, run.end()] {
            let Some((&start, piece)) = self.pieces.range_mut(..at).next_back() else { continue };
            if at < start + piece.pages {
                let mut rest = piece.clone();
                rest.pages = start + piece.pages - at;
                piece.pages = at - start;
                self.pieces.insert(at, rest);
            }
        }
        self.pieces.range(run.start..run.end()).map(|(start, _)| *start).collect()
    }

    /// Adds `pin` to all pages of `run`.
    fn enter(&mut self, run: PageRun, pin: &Arc<Pin>) {
        let mut at = run.start;
        for start in self.cut(run) {
            if at < start {
                self.pieces
                    .insert(at, Piece { pages: start - at, pins: vec![Arc::clone(pin)], hidden: false });
            }
            if let Some(piece) = self.pieces.get_mut(&start) {
                piece.pins.push(Arc::clone(pin));
                at = start + piece.pages;
            }
        }
        if at < run.end() {
            let rest = Piece { pages: run.end() - at, pins: vec![Arc::clone(pin)], hidden: false };
            self.pieces.insert(at, rest);
        }
    }
}

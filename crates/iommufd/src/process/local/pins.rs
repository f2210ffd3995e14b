//! Which memory of this process is pinned, and what becomes of it when the program unmaps it.
//!
//! A pin is a row of pages that were found at consecutive addresses. In this process pages stay where they are by
//! themselves, so to pin is to note it, for two questions: how often is a page pinned, and what is pinned in a range
//! that the program is about to unmap? Such pages move to a place of our own first ([`vacate`]), by mremap(2), which
//! moves the very pages: so a pin is a list of stretches that lie in different places, nearly always one.
//!
//! Stretches are found by address in maps of their own for each order of length, so that one is found by looking back no
//! farther than it can be long.
//!
//! Lock order: the table, then the stretches of a pin. Observers are called with neither.

use core::sync::atomic::{AtomicUsize, Ordering};
use std::{
    collections::BTreeMap,
    sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, RwLock, Weak},
};

use crate::{
    Errno, Result,
    domain::HostAddr,
    hostmem::{self, Behind, HostRun, PinnedPages},
    iova::PAGE_SIZE,
    process::{PinObserver, UserAddr},
};

static TABLE: LazyLock<Mutex<Table>> = LazyLock::new(Mutex::default);

/// How many pins there are. Who unmaps memory where nothing ever was pinned, which may be an allocator in the middle of its
/// work, takes no lock and allocates nothing.
static PINS: AtomicUsize = AtomicUsize::new(0);

fn table() -> MutexGuard<'static, Table> {
    TABLE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Pages of a pin that lie together, and where.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Stretch {
    /// Which page of the pin is the first.
    first: u64,
    pages: u64,
    /// The number of the page that the first is now.
    at: u64,
    /// It has moved to memory that is ours.
    refugee: bool,
}

#[derive(Debug)]
struct Pin {
    id: u64,
    /// Where its first page was found.
    from: u64,
    observer: Option<Weak<dyn PinObserver>>,
    /// In order of pages, without gaps.
    stretches: RwLock<Stretches>,
}

#[derive(Debug)]
enum Stretches {
    One(Stretch),
    Many(Vec<Stretch>),
}

impl core::fmt::Debug for dyn PinObserver {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("PinObserver")
    }
}

impl Stretches {
    fn as_slice(&self) -> &[Stretch] {
        match self {
            Self::One(one) => core::slice::from_ref(one),
            Self::Many(many) => many,
        }
    }

    fn from_vec(mut stretches: Vec<Stretch>) -> Self {
        match stretches.len() {
            1 => Self::One(stretches.remove(0)),
            _ => Self::Many(stretches),
        }
    }
}

/// A stretch as the table has it.
#[derive(Clone, Debug)]
struct Noted {
    pages: u64,
    pin: Arc<Pin>,
}

/// Pages by number; both ends belong to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Range {
    first: u64,
    last: u64,
}

impl Range {
    fn of(stretch: Stretch) -> Self {
        Self { first: stretch.at, last: stretch.at + (stretch.pages - 1) }
    }

    fn overlaps(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }

    fn pages(self) -> u64 {
        self.last - self.first + 1
    }
}

#[derive(Debug)]
struct Table {
    next_id: u64,
    /// Stretches by where they are (and their pin's number), those of 2^n to 2^(n+1)-1 pages in map n.
    orders: Vec<BTreeMap<(u64, u64), Noted>>,
    /// What is just moving: nobody can pin it.
    moving: Vec<Range>,
    /// Memory that moved: where, and how many pages it has.
    refuges: BTreeMap<u64, u64>,
}

impl Default for Table {
    fn default() -> Self {
        // A row of pages has less than 2^52.
        let orders = (0..52).map(|_| BTreeMap::new()).collect();
        Self { next_id: 0, orders, moving: Vec::new(), refuges: BTreeMap::new() }
    }
}

impl Table {
    fn order(&mut self, pages: u64) -> Option<&mut BTreeMap<(u64, u64), Noted>> {
        self.orders.get_mut(pages.checked_ilog2()? as usize)
    }

    fn note(&mut self, pin: &Arc<Pin>, stretch: Stretch) {
        let noted = Noted { pages: stretch.pages, pin: pin.clone() };
        if let Some(order) = self.order(stretch.pages) {
            order.insert((stretch.at, pin.id), noted);
        }
    }

    fn forget(&mut self, pin: &Pin, stretch: Stretch) {
        if let Some(order) = self.order(stretch.pages) {
            order.remove(&(stretch.at, pin.id));
        }
    }

    /// The pins with stretches that overlap `range`, with the part that does. A pin comes once for each stretch.
    fn overlapping(&self, range: Range) -> impl Iterator<Item = (&Arc<Pin>, Range)> {
        self.orders.iter().enumerate().filter(|(_, order)| !order.is_empty()).flat_map(move |(n, order)| {
            let longest = (2_u64 << n) - 1;
            let from = range.first.saturating_sub(longest - 1);
            order.range((from, 0)..=(range.last, u64::MAX)).filter_map(move |(&(at, _), noted)| {
                let (first, last) = (at.max(range.first), (at + (noted.pages - 1)).min(range.last));
                (first <= last).then_some((&noted.pin, Range { first, last }))
            })
        })
    }

    fn new_pin(
        &mut self,
        from: u64,
        observer: Option<Weak<dyn PinObserver>>,
        stretches: Vec<Stretch>,
    ) -> Arc<Pin> {
        self.next_id += 1;
        PINS.fetch_add(1, Ordering::Relaxed);
        let pin = Arc::new(Pin {
            id: self.next_id,
            from,
            observer,
            stretches: RwLock::new(Stretches::from_vec(stretches)),
        });
        for &stretch in pin.stretches().as_slice() {
            self.note(&pin, stretch);
        }
        pin
    }

    /// Replaces the stretches of `pin`.
    fn replace(&mut self, pin: &Arc<Pin>, stretches: Vec<Stretch>) {
        let mut now = pin.stretches.write().unwrap_or_else(PoisonError::into_inner);
        for &stretch in now.as_slice() {
            self.forget(pin, stretch);
        }
        for &stretch in &stretches {
            self.note(pin, stretch);
        }
        *now = Stretches::from_vec(stretches);
    }

    /// Gives back the refuges among `stretches` that nothing pinned is in any more.
    fn abandon(&mut self, stretches: &[Stretch]) {
        for stretch in stretches.iter().filter(|stretch| stretch.refugee) {
            let Some((&start, &pages)) = self.refuges.range(..=stretch.at).next_back() else { continue };
            let whole = Range { first: start, last: start + (pages - 1) };
            if self.overlapping(whole).next().is_none() {
                self.refuges.remove(&start);
                hostmem::unmap(HostAddr(start * PAGE_SIZE), pages * PAGE_SIZE);
            }
        }
    }
}

impl Pin {
    fn stretches(&self) -> std::sync::RwLockReadGuard<'_, Stretches> {
        self.stretches.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Notes that `pages` pages at `start` are pinned. EFAULT when that is no range of addresses, or it is just moving.
pub(crate) fn pin(start: HostAddr, pages: u64, observer: Option<Weak<dyn PinObserver>>) -> Result<LocalPin> {
    let at = start.0 / PAGE_SIZE;
    let end = pages.checked_mul(PAGE_SIZE).and_then(|length| start.0.checked_add(length));
    if pages == 0 || end.is_none() {
        return Err(Errno::FAULT);
    }
    let stretch = Stretch { first: 0, pages, at, refugee: false };
    let mut table = table();
    if table.moving.iter().any(|moving| moving.overlaps(Range::of(stretch))) {
        return Err(Errno::FAULT);
    }
    Ok(LocalPin { pin: table.new_pin(start.0, observer, vec![stretch]) })
}

/// How often the page at `at` is pinned as memory of this address.
pub(crate) fn count(at: HostAddr) -> u64 {
    let page = at.0 / PAGE_SIZE;
    table().overlapping(Range { first: page, last: page }).count() as u64
}

/// A noted pin.
#[derive(Debug)]
pub(crate) struct LocalPin {
    pin: Arc<Pin>,
}

// SAFETY: who pins has made the pages present, and leaves them mapped at these addresses, or has them moved by `vacate`
// before they are unmapped. That is the contract of this process's memory (see the top of the module above).
#[allow(unsafe_code, reason = "the promise that the addresses stay good")]
unsafe impl PinnedPages for LocalPin {
    fn pages(&self) -> u64 {
        self.pin.stretches().as_slice().last().map_or(0, |stretch| stretch.first + stretch.pages)
    }

    fn run(&self, first: u64) -> HostRun {
        let stretches = self.pin.stretches();
        let stretches = stretches.as_slice();
        let index = stretches.partition_point(|stretch| stretch.first <= first).saturating_sub(1);
        let stretch = stretches[index];
        let into = first - stretch.first;
        HostRun { start: HostAddr((stretch.at + into) * PAGE_SIZE), pages: stretch.pages - into }
    }

    fn split_off(&mut self, at: u64) -> Box<dyn PinnedPages> {
        let mut table = table();
        let (mut before, mut after) = (Vec::new(), Vec::new());
        for &stretch in self.pin.stretches().as_slice() {
            let end = stretch.first + stretch.pages;
            if stretch.first < at {
                before.push(Stretch { pages: stretch.pages.min(at - stretch.first), ..stretch });
            }
            if end > at {
                let first = stretch.first.max(at);
                let into = first - stretch.first;
                after.push(Stretch {
                    first: first - at,
                    pages: end - first,
                    at: stretch.at + into,
                    refugee: stretch.refugee,
                });
            }
        }
        table.replace(&self.pin, before);
        let from = self.pin.from + at * PAGE_SIZE;
        Box::new(Self { pin: table.new_pin(from, self.pin.observer.clone(), after) })
    }
}

impl Drop for LocalPin {
    fn drop(&mut self) {
        let mut table = table();
        let stretches = self.pin.stretches();
        for &stretch in stretches.as_slice() {
            table.forget(&self.pin, stretch);
        }
        table.abandon(stretches.as_slice());
        PINS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The program is about to unmap `length` bytes at `start`, or to map something else there: moves the pinned pages away.
/// Afterwards they are the same pages elsewhere, and what is mapped where they were is not what was. Whether anything was
/// pinned.
///
/// Observers are told, and may make this wait. An error means that pages could not be moved: they are still there, and must
/// not be unmapped.
pub fn vacate(start: HostAddr, length: u64) -> Result<bool> {
    move_away(start, length, Behind::Anything)
}

/// The program is about to discard what its private pages in a range hold, and keeps the addresses (`MADV_DONTNEED`): moves
/// the pinned ones away as [`vacate`] does, and leaves the mappings. Shared pages stay: they are not discarded.
pub fn vacate_private(start: HostAddr, length: u64) -> Result<bool> {
    move_away(start, length, Behind::Mapping)
}

/// The program moves `length` bytes at `start` itself, by `remap`, which says where to, if it did (`mremap`). Pins go with them.
pub fn carry(start: HostAddr, length: u64, remap: impl FnOnce() -> Option<HostAddr>) -> Option<HostAddr> {
    let Some(all) = whole_pages(start, length).filter(|all| is_pinned(*all)) else { return remap() };
    let mut there = None;
    // Nothing of this can fail.
    let _ = moving(all, |ranges| {
        there = remap();
        if let Some(to) = there.filter(|to| *to != start) {
            for &range in ranges {
                settle(range, to.0 / PAGE_SIZE + (range.first - all.first), false);
            }
        }
        Ok(())
    });
    there
}

/// In a child after `fork`: what was pinned is its parent's affair, and nothing here is pinned.
///
/// The caller makes sure that no other thread of the parent had the table locked when it forked, by [`quiet`].
pub fn forget() {
    let mut table = table();
    table.moving.clear();
    table.orders.iter_mut().for_each(BTreeMap::clear);
    for (start, pages) in core::mem::take(&mut table.refuges) {
        hostmem::unmap(HostAddr(start * PAGE_SIZE), pages * PAGE_SIZE);
    }
}

/// Keeps the table as it is until the result is dropped: for the time of a `fork`.
pub fn quiet() -> impl Sized {
    table()
}

fn whole_pages(start: HostAddr, length: u64) -> Option<Range> {
    let pages = (start.0 % PAGE_SIZE).saturating_add(length).div_ceil(PAGE_SIZE);
    let first = start.0 / PAGE_SIZE;
    Some(Range { first, last: first.saturating_add(pages.checked_sub(1)?) })
}

/// The pages of a range that are pinned where they are, as addresses and lengths in order: devices use them by these addresses,
/// so they must stay accessible.
pub fn pinned(start: HostAddr, length: u64) -> Vec<(HostAddr, u64)> {
    let Some(all) = whole_pages(start, length).filter(|all| is_pinned(*all)) else { return Vec::new() };
    let parts = table().overlapping(all).map(|(_, part)| part).collect();
    let bytes = |range: Range| (HostAddr(range.first * PAGE_SIZE), range.pages() * PAGE_SIZE);
    merged(parts).into_iter().map(bytes).collect()
}

fn is_pinned(all: Range) -> bool {
    PINS.load(Ordering::Relaxed) != 0 && table().overlapping(all).next().is_some()
}

fn move_away(start: HostAddr, length: u64, behind: Behind) -> Result<bool> {
    let Some(all) = whole_pages(start, length).filter(|all| is_pinned(*all)) else { return Ok(false) };
    moving(all, |ranges| ranges.iter().try_for_each(|range| relocate(*range, behind)))
}

/// Does `work`, which moves what is pinned in `all`, while nobody accesses it. Whether anything was.
fn moving(all: Range, work: impl FnOnce(&[Range]) -> Result<()>) -> Result<bool> {
    /// One move at a time: so no move finds pages in the middle of another.
    static MOVES: Mutex<()> = Mutex::new(());

    let _one_at_a_time = MOVES.lock().unwrap_or_else(PoisonError::into_inner);
    let (ranges, told) = begin(all);
    for (observer, from, pages) in &told {
        observer.moving(*from, *pages);
    }
    let moved = work(&ranges);
    table().moving.clear();
    for (observer, from, pages) in &told {
        observer.moved(*from, *pages);
    }
    moved.map(|()| !ranges.is_empty())
}

type Told = (Arc<dyn PinObserver>, UserAddr, u64);

/// Marks what is pinned in `all` as moving: those ranges, and who is to be told of which pages.
fn begin(all: Range) -> (Vec<Range>, Vec<Told>) {
    let mut table = table();
    let mut parts = Vec::new();
    let mut told = Vec::new();
    for (pin, part) in table.overlapping(all) {
        parts.push(part);
        let Some(observer) = pin.observer.as_ref().and_then(Weak::upgrade) else { continue };
        for stretch in pin.stretches().as_slice().iter().filter(|stretch| Range::of(**stretch).overlaps(part))
        {
            let page = stretch.first + (part.first.max(stretch.at) - stretch.at);
            let pages = part.last.min(Range::of(*stretch).last) - part.first.max(stretch.at) + 1;
            told.push((observer.clone(), UserAddr(pin.from + page * PAGE_SIZE), pages));
        }
    }
    let ranges = merged(parts);
    table.moving.clone_from(&ranges);
    (ranges, told)
}

/// The same pages in order, none twice.
fn merged(mut parts: Vec<Range>) -> Vec<Range> {
    parts.sort_by_key(|part| part.first);
    let mut ranges: Vec<Range> = Vec::new();
    for part in parts {
        match ranges.last_mut() {
            Some(range) if range.last + 1 >= part.first => range.last = range.last.max(part.last),
            _ => ranges.push(part),
        }
    }
    ranges
}

/// Moves the pages of `range` to a place of our own, and lets the pins know.
fn relocate(range: Range, behind: Behind) -> Result<()> {
    let (start, length) = (range.first * PAGE_SIZE, range.pages() * PAGE_SIZE);
    let refuge = hostmem::refuge(HostAddr(start), length)?;
    // A mapping moves alone, and the range may have several.
    for mapping in super::maps::mappings(HostAddr(start), start + length)? {
        if behind == Behind::Mapping && !mapping.private() {
            continue;
        }
        let (from, to) = (mapping.start.max(start), mapping.end.min(start + length));
        let at = HostAddr(refuge.0 + (from - start));
        if let Err(errno) = hostmem::relocate(HostAddr(from), to - from, at, behind) {
            if from == start {
                hostmem::unmap(refuge, length);
                return Err(errno);
            }
            // The pages before have moved already. There is no way back that could not fail too.
            tracing::error!(?errno, "pinned pages cannot be moved");
            break;
        }
        settle(Range { first: from / PAGE_SIZE, last: (to - 1) / PAGE_SIZE }, at.0 / PAGE_SIZE, true);
    }
    let mut table = table();
    table.refuges.insert(refuge.0 / PAGE_SIZE, range.pages());
    // Everybody may have let go meanwhile.
    table.abandon(&[Stretch { first: 0, pages: range.pages(), at: refuge.0 / PAGE_SIZE, refugee: true }]);
    Ok(())
}

/// What was at `range` is at `to` now, which may be a place of our own.
fn settle(range: Range, to: u64, refugee: bool) {
    let mut table = table();
    let pins: BTreeMap<u64, Arc<Pin>> =
        table.overlapping(range).map(|(pin, _)| (pin.id, pin.clone())).collect();
    for pin in pins.values() {
        let mut stretches = Vec::new();
        for &stretch in pin.stretches().as_slice() {
            let here = Range::of(stretch);
            if !here.overlaps(range) {
                stretches.push(stretch);
                continue;
            }
            let (first, last) = (here.first.max(range.first), here.last.min(range.last));
            let part = |first: u64, last: u64| Stretch {
                first: stretch.first + (first - stretch.at),
                pages: last - first + 1,
                at: first,
                refugee: stretch.refugee,
            };
            if here.first < first {
                stretches.push(part(here.first, first - 1));
            }
            stretches.push(Stretch { at: to + (first - range.first), refugee, ..part(first, last) });
            if last < here.last {
                stretches.push(part(last + 1, here.last));
            }
        }
        table.replace(pin, stretches);
    }
}

//! Which addresses may be used, and which of them are free.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Owner, area::Area};
use crate::{
    Errno, Result,
    iova::{Iova, IovaRange, PAGE_SIZE},
};

/// The large pages that IOMMUs have.
const LARGE_PAGES: [u64; 2] = [1 << 30, 2 << 20];

/// Reserved and allowed ranges, and how to find a free one.
#[derive(Debug)]
pub(super) struct Ranges {
    reserved: Vec<(IovaRange, Owner)>,
    /// In order; empty when nothing confines automatic allocation.
    allowed: Vec<IovaRange>,
    /// For each power of two: below this address no range is free that has at least this length and alignment. So a space that
    /// fills from below is not searched from below each time.
    floors: [u64; 64],
}

/// Where automatic allocation puts something: at a multiple of `modulus`, plus `remainder`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Alignment {
    modulus: u64,
    remainder: u64,
}

impl Alignment {
    /// For `length` bytes of memory at `address`, with every address a multiple of `least`.
    ///
    /// What is as long as a large page lies as its memory does, so that large pages can map it. What is shorter is aligned to
    /// its length, rounded up to a power of two, or as its memory is if that is less. And bytes keep their place in the
    /// page.
    pub(super) fn of(length: u64, address: u64, least: u64) -> Self {
        if let Some(&large) = LARGE_PAGES.iter().find(|&&large| length >= large) {
            return Self { modulus: large, remainder: address % large };
        }
        match address % PAGE_SIZE {
            0 => {
                let of_memory = 1_u64 << address.trailing_zeros().min(63);
                let modulus = length.next_power_of_two().min(of_memory).max(least);
                Self { modulus, remainder: 0 }
            }
            in_page => Self { modulus: PAGE_SIZE, remainder: in_page },
        }
    }

    /// The weakest alignment for memory at `address`, where there is no room with the one that is best for it.
    pub(super) fn weakest(address: u64, least: u64) -> Self {
        match address % PAGE_SIZE {
            0 => Self { modulus: least.max(PAGE_SIZE), remainder: 0 },
            in_page => Self { modulus: PAGE_SIZE, remainder: in_page },
        }
    }

    /// The first such address from `from` on.
    fn next(self, from: u64) -> Option<u64> {
        let candidate = (from - from % self.modulus).checked_add(self.remainder)?;
        if candidate >= from { Some(candidate) } else { candidate.checked_add(self.modulus) }
    }
}

impl Ranges {
    pub(super) fn new() -> Self {
        Self { reserved: Vec::new(), allowed: Vec::new(), floors: [0; 64] }
    }

    /// Whether a part of `range` is reserved.
    pub(super) fn is_reserved(&self, range: IovaRange) -> bool {
        self.reserved.iter().any(|(reserved, _)| reserved.intersection(range).is_some())
    }

    /// EADDRINUSE when a part of `range` is allowed.
    pub(super) fn reserve(&mut self, range: IovaRange, owner: Owner) -> Result<()> {
        if self.allowed.iter().any(|allowed| allowed.intersection(range).is_some()) {
            return Err(Errno::ADDRINUSE);
        }
        self.reserved.push((range, owner));
        Ok(())
    }

    pub(super) fn unreserve(&mut self, owner: Owner) {
        self.reserved.retain(|(_, by)| *by != owner);
        self.floors = [0; 64];
    }

    /// EINVAL when two of them overlap or one is a single byte, EADDRINUSE when a part of one is reserved.
    pub(super) fn set_allowed(&mut self, ranges: &[IovaRange]) -> Result<()> {
        if ranges.iter().any(|range| range.start() == range.last()) {
            return Err(Errno::INVAL);
        }
        let mut ranges = ranges.to_vec();
        ranges.sort_by_key(|range| range.start());
        if ranges.windows(2).any(|pair| matches!(pair, [a, b] if a.intersection(*b).is_some())) {
            return Err(Errno::INVAL);
        }
        if ranges.iter().any(|range| self.is_reserved(*range)) {
            return Err(Errno::ADDRINUSE);
        }
        self.allowed = ranges;
        self.floors = [0; 64];
        Ok(())
    }

    /// What is not reserved, in order.
    pub(super) fn usable(&self) -> Vec<IovaRange> {
        let mut reserved: Vec<IovaRange> = self.reserved.iter().map(|(range, _)| *range).collect();
        reserved.sort_by_key(|range| range.start());
        let mut usable = Vec::new();
        let mut next = Some(Iova(0));
        for range in reserved {
            let Some(from) = next else { break };
            if let Some(last) = range.start().0.checked_sub(1)
                && let Ok(gap) = IovaRange::new(from, Iova(last))
            {
                usable.push(gap);
            }
            next = range.last().0.checked_add(1).map(|after| from.max(Iova(after)));
        }
        usable.extend(next.and_then(|from| IovaRange::new(from, Iova(u64::MAX)).ok()));
        usable
    }

    /// Whether automatic allocation stays in allowed ranges.
    pub(super) fn is_confined(&self) -> bool {
        !self.allowed.is_empty()
    }

    /// Something was unmapped, or might have been: from `from` on more may be free.
    pub(super) fn freed(&mut self, from: u64) {
        for floor in &mut self.floors {
            *floor = from.min(*floor);
        }
    }

    /// The lowest range of `length` bytes that is free, usable and, if that is asked, allowed. ENOSPC when there is none.
    pub(super) fn allocate(
        &mut self,
        areas: &BTreeMap<u64, Arc<Area>>,
        length: u64,
        alignment: Alignment,
    ) -> Result<IovaRange> {
        let smaller = length.min(alignment.modulus).ilog2() as usize;
        let floor = self.floors.get(smaller).filter(|_| alignment.remainder == 0).copied().unwrap_or(0);
        let everything = [IovaRange::ALL];
        let windows = if self.allowed.is_empty() { &everything[..] } else { &self.allowed };
        let found = windows
            .iter()
            .find_map(|window| self.find(areas, length, alignment, *window, floor))
            .ok_or(Errno::NOSPC)?;
        if alignment.remainder == 0 {
            // Nor was there room below for what is longer and aligned more.
            let larger = length.max(alignment.modulus);
            let class = larger.checked_next_power_of_two().map_or(64, u64::ilog2) as usize;
            for floor in self.floors.iter_mut().skip(class) {
                *floor = found.start().0.max(*floor);
            }
        }
        Ok(found)
    }

    fn find(
        &self,
        areas: &BTreeMap<u64, Arc<Area>>,
        length: u64,
        alignment: Alignment,
        window: IovaRange,
        floor: u64,
    ) -> Option<IovaRange> {
        let mut from = window.start().0.max(floor);
        loop {
            let start = alignment.next(from)?;
            let range = IovaRange::with_length(Iova(start), length).ok()?;
            if !window.covers(range) {
                return None;
            }
            let reserved = self.reserved.iter().map(|(reserved, _)| *reserved);
            let reserved = reserved.filter(|reserved| reserved.intersection(range).is_some());
            let used = areas.range(..=range.last().0).next_back().map(|(_, area)| area.range);
            let used = used.filter(|used| used.intersection(range).is_some());
            match reserved.chain(used).map(IovaRange::last).max() {
                None => return Some(range),
                Some(last) => from = last.0.checked_add(1)?,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, last: u64) -> IovaRange {
        IovaRange::new(Iova(start), Iova(last)).unwrap()
    }

    #[test]
    fn what_is_not_reserved_is_usable() {
        let mut ranges = Ranges::new();
        assert_eq!(ranges.usable(), [IovaRange::ALL]);
        let (a, b) = (Owner::new(), Owner::new());
        ranges.reserve(range(0x1000, 0x1fff), a).unwrap();
        ranges.reserve(range(0x1800, 0x27ff), b).unwrap();
        ranges.reserve(range(u64::MAX - 9, u64::MAX), b).unwrap();
        assert_eq!(ranges.usable(), [range(0, 0xfff), range(0x2800, u64::MAX - 10)]);
        ranges.reserve(range(0, 0), b).unwrap();
        assert_eq!(ranges.usable(), [range(1, 0xfff), range(0x2800, u64::MAX - 10)]);
        ranges.unreserve(b);
        assert_eq!(ranges.usable(), [range(0, 0xfff), range(0x2000, u64::MAX)]);
        ranges.reserve(IovaRange::ALL, b).unwrap();
        assert_eq!(ranges.usable(), []);
    }

    #[test]
    fn allowed_and_reserved_ranges_exclude_each_other() {
        let mut ranges = Ranges::new();
        let owner = Owner::new();
        assert_eq!(ranges.set_allowed(&[range(5, 9), range(0, 5)]), Err(Errno::INVAL));
        ranges.set_allowed(&[range(10, 19), range(0, 5)]).unwrap();
        assert_eq!(ranges.reserve(range(19, 30), owner), Err(Errno::ADDRINUSE));
        ranges.reserve(range(6, 9), owner).unwrap();
        assert_eq!(ranges.set_allowed(&[range(0, 6)]), Err(Errno::ADDRINUSE));
        ranges.set_allowed(&[]).unwrap();
        ranges.reserve(range(0, 30), owner).unwrap();
    }

    #[test]
    fn large_memory_lies_as_in_the_process() {
        let of = |length, address| Alignment::of(length, address, 1).next(0x1).unwrap();
        assert_eq!(of(0x3000, 0x8000), 0x4000, "its own length, rounded up");
        assert_eq!(of(0x3000, 0x7000), 0x1000, "or as its memory is");
        assert_eq!(of(0x3000, 0), 0x4000);
        assert_eq!(of(0x5000, 0x8800), 0x800, "a byte keeps its place in the page");
        assert_eq!(of(2 << 20, 0x12_3000), 0x12_3000);
        assert_eq!(of((1 << 30) + 4096, 0x1_0000_0000), 1 << 30);
        assert_eq!(Alignment::of(0x1000, 0, 1).next(u64::MAX), None);
    }

    #[test]
    fn the_lowest_free_range_is_found() {
        let mut ranges = Ranges::new();
        let none = BTreeMap::new();
        ranges.reserve(range(0x800, 0x17ff), Owner::new()).unwrap();
        let mut at =
            |length| ranges.allocate(&none, length, Alignment::of(length, 0, 1)).map(IovaRange::start);
        assert_eq!(at(0x800), Ok(Iova(0)));
        assert_eq!(at(0x1000), Ok(Iova(0x2000)));
        assert_eq!(at(0x1800), Ok(Iova(0x2000)));
        assert_eq!(at(0x3000), Ok(Iova(0x4000)));
        assert_eq!(at(1), Ok(Iova(0)));
        assert_eq!(at(u64::MAX), Err(Errno::NOSPC));
    }
}

//! The mock's page table: a map from IOVA to leaves.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use uapi::iommufd_test::{MOCK_APERTURE_LAST, MOCK_APERTURE_START, MOCK_HUGE_PAGE_SIZE, MOCK_PAGE_SIZE};

use crate::{
    Errno, Result,
    domain::{DirtySink, Domain, Geometry, HostAddr, Prot},
    inject,
    iova::{Iova, IovaRange},
};

/// The smallest page.
pub(super) const PAGE: u64 = MOCK_PAGE_SIZE as u64;

/// The page sizes of the usual kind of table: each power of two, up to 2^36.
const SIZES: u64 = (1 << 37) - PAGE;

/// Those of the kind for tests of huge pages.
const HUGE_SIZES: u64 = PAGE | MOCK_HUGE_PAGE_SIZE as u64;

#[derive(Debug)]
struct Leaf {
    host: u64,
    length: u64,
    dirty: bool,
}

#[derive(Debug, Default)]
struct State {
    leaves: BTreeMap<u64, Leaf>,
    tracks: bool,
}

impl State {
    /// The leaf that has `iova`, and where it begins.
    fn find(&mut self, iova: u64) -> Option<(u64, &mut Leaf)> {
        let (start, leaf) = self.leaves.range_mut(..=iova).next_back()?;
        (iova - start < leaf.length).then_some((*start, leaf))
    }
}

/// A page table of the mock.
#[derive(Debug)]
pub(super) struct MockDomain {
    sizes: u64,
    /// It was asked to be able to note writes: devices that cannot must not use it.
    pub(super) tracks_writes: bool,
    state: Mutex<State>,
}

impl MockDomain {
    pub(super) fn new(huge: bool, tracks_writes: bool) -> Self {
        Self { sizes: if huge { HUGE_SIZES } else { SIZES }, tracks_writes, state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes to the leaf at `iova`, as a device would. Whether there is one.
    pub(super) fn dirty(&self, iova: Iova) -> bool {
        let mut state = self.lock();
        let tracks = state.tracks;
        state.find(iova.0).map(|(_, leaf)| leaf.dirty |= tracks).is_some()
    }
}

impl Domain for MockDomain {
    fn geometry(&self) -> Geometry {
        let aperture =
            IovaRange::new(Iova(u64::from(MOCK_APERTURE_START)), Iova(u64::from(MOCK_APERTURE_LAST)));
        Geometry { aperture: aperture.unwrap_or(IovaRange::ALL), page_sizes: self.sizes }
    }

    fn enforce_cache_coherency(&self) -> bool {
        false
    }

    fn map(&self, iova: Iova, host: HostAddr, length: u64, _prot: Prot) -> Result<()> {
        inject::check()?;
        if !(iova.0 | host.0 | length).is_multiple_of(PAGE) {
            return Err(Errno::INVAL);
        }
        let mut state = self.lock();
        let (mut at, mut host, mut left) = (iova.0, host.0, length);
        while left > 0 {
            // The largest page that begins here on both sides and is no longer than what is left.
            let aligned = (at | host | 1 << 63).trailing_zeros().min(left.ilog2());
            let length = 1_u64 << (self.sizes & (u64::MAX >> (63 - aligned))).ilog2();
            state.leaves.insert(at, Leaf { host, length, dirty: false });
            (at, host, left) = (at + length, host + length, left - length);
        }
        Ok(())
    }

    fn unmap(&self, range: IovaRange) {
        let mut state = self.lock();
        let (start, last) = (range.start().0, range.last().0);
        // What a leaf has before and after the range stays.
        if let Some((at, leaf)) = state.find(start).filter(|(at, _)| *at < start) {
            let (host, length, dirty) = (leaf.host, leaf.length, leaf.dirty);
            leaf.length = start - at;
            state
                .leaves
                .insert(start, Leaf { host: host + (start - at), length: length - (start - at), dirty });
        }
        if let Some((at, leaf)) = state.find(last).filter(|(at, leaf)| last - at + 1 < leaf.length) {
            let kept = last - at + 1;
            let (host, length, dirty) = (leaf.host, leaf.length, leaf.dirty);
            state.leaves.insert(last + 1, Leaf { host: host + kept, length: length - kept, dirty });
        }
        state.leaves.extract_if(start..=last, |_, _| true).for_each(drop);
    }

    fn sync(&self) {}

    fn lookup(&self, iova: Iova) -> Option<HostAddr> {
        self.lock().find(iova.0).map(|(at, leaf)| HostAddr(leaf.host + (iova.0 - at)))
    }

    fn set_dirty_tracking(&self, enable: bool) -> Result<()> {
        self.lock().tracks = enable;
        Ok(())
    }

    fn read_and_clear_dirty(&self, range: IovaRange, keep: bool, sink: &mut dyn DirtySink) -> Result<()> {
        let mut state = self.lock();
        let (start, last) = (range.start().0, range.last().0);
        let first = state.find(start).map_or(start, |(at, _)| at);
        for (at, leaf) in state.leaves.range_mut(first..=last).filter(|(_, leaf)| leaf.dirty) {
            let from = start.max(*at);
            let to = last.min(at + (leaf.length - 1));
            sink.dirty(Iova(from), to - from + 1);
            leaf.dirty &= keep;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: u64 = MOCK_APERTURE_START as u64;

    #[test]
    fn leaves_are_as_large_as_they_can_be() {
        let domain = MockDomain::new(false, true);
        domain.map(Iova(START), HostAddr(1 << 30), 0x3800, Prot::WRITE).unwrap();
        let lengths: Vec<_> =
            domain.lock().leaves.iter().map(|(at, leaf)| (*at - START, leaf.length)).collect();
        assert_eq!(lengths, [(0, 0x2000), (0x2000, 0x1000), (0x3000, 0x800)]);
        let huge = MockDomain::new(true, true);
        huge.map(Iova(START), HostAddr(1 << 30), (1 << 20) + 0x1000, Prot::WRITE).unwrap();
        assert_eq!(huge.lock().leaves.len(), 3, "1 MiB and two pages of 2 KiB");
    }

    #[test]
    fn an_unmap_may_cut_leaves() {
        let domain = MockDomain::new(false, true);
        domain.map(Iova(START), HostAddr(1 << 30), 0x4000, Prot::WRITE).unwrap();
        domain.unmap(IovaRange::with_length(Iova(START + 0x1000), 0x1000).unwrap());
        let at = |offset| domain.lookup(Iova(START + offset)).map(|host| host.0 - (1 << 30));
        assert_eq!(
            [at(0xfff), at(0x1000), at(0x1fff), at(0x2000), at(0x3fff), at(0x4000)],
            [Some(0xfff), None, None, Some(0x2000), Some(0x3fff), None]
        );
    }
}

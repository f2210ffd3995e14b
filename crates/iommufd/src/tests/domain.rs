//! A page table that is strict about its contract.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
};

use crate::{
    Result,
    domain::{DirtySink, Domain, Geometry, HostAddr, Prot},
    inject,
    iova::{Iova, IovaRange},
};

/// Mappings as they were made, the pages that were written to, and what was unmapped and not synchronized.
#[derive(Debug, Default)]
struct State {
    mapped: BTreeMap<u64, (u64, HostAddr, Prot)>,
    dirty: BTreeSet<u64>,
    unsynced: Vec<(u64, u64)>,
    suspended: u64,
}

#[derive(Debug)]
pub(super) struct TestDomain {
    geometry: Geometry,
    state: Mutex<State>,
}

impl TestDomain {
    /// A table with this smallest page, for these addresses.
    pub(super) fn new(page: u64, aperture: IovaRange) -> Arc<Self> {
        Arc::new(Self { geometry: Geometry { aperture, page_sizes: page }, state: Mutex::default() })
    }

    pub(super) fn any() -> Arc<Self> {
        Self::new(4096, IovaRange::ALL)
    }

    fn page(&self) -> u64 {
        self.geometry.page_sizes
    }

    /// How many bytes are mapped.
    pub(super) fn bytes(&self) -> u64 {
        self.state.lock().unwrap().mapped.values().map(|(length, ..)| length).sum()
    }

    /// How many mappings there are.
    pub(super) fn mappings(&self) -> usize {
        self.state.lock().unwrap().mapped.len()
    }

    pub(super) fn prot(&self, iova: u64) -> Option<Prot> {
        let state = self.state.lock().unwrap();
        let (start, (length, _, prot)) = state.mapped.range(..=iova).next_back()?;
        (iova - start < *length).then_some(*prot)
    }

    /// How often mappings were suspended.
    pub(super) fn suspended(&self) -> u64 {
        self.state.lock().unwrap().suspended
    }

    /// A device writes to the page at `iova`.
    pub(super) fn write(&self, iova: u64) {
        assert!(self.lookup(Iova(iova)).is_some());
        let page = iova / self.page();
        self.state.lock().unwrap().dirty.insert(page);
    }
}

impl Domain for TestDomain {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn map(&self, iova: Iova, host: HostAddr, length: u64, prot: Prot) -> Result<()> {
        inject::check()?;
        let range = IovaRange::with_length(iova, length).unwrap();
        assert!(self.geometry.aperture.covers(range), "{range:?} is outside the aperture");
        assert_eq!((iova.0 | host.0 | length) % self.page(), 0, "{range:?} is aligned");
        let mut state = self.state.lock().unwrap();
        let before = state.mapped.range(..=range.last().0).next_back();
        if let Some((start, (length, ..))) = before {
            assert!(start + (length - 1) < iova.0, "{range:?} is mapped twice");
        }
        for (start, length) in &state.unsynced {
            let stale = IovaRange::with_length(Iova(*start), *length).unwrap();
            assert_eq!(stale.intersection(range), None, "{range:?} was unmapped but not synchronized");
        }
        state.mapped.insert(iova.0, (length, host, prot));
        Ok(())
    }

    fn unmap(&self, range: IovaRange) {
        let mut state = self.state.lock().unwrap();
        let before = state.mapped.range(..range.start().0).next_back();
        if let Some((start, (length, ..))) = before {
            assert!(start + (length - 1) < range.start().0, "{range:?} cuts a mapping");
        }
        let inside: Vec<_> =
            state.mapped.range(range.start().0..=range.last().0).map(|(start, _)| *start).collect();
        for start in inside {
            let (length, ..) = state.mapped.remove(&start).unwrap();
            assert!(start + (length - 1) <= range.last().0, "{range:?} cuts a mapping");
            state.unsynced.push((start, length));
        }
    }

    fn sync(&self) {
        self.state.lock().unwrap().unsynced.clear();
    }

    fn suspend(&self, range: IovaRange) {
        self.unmap(range);
        self.sync();
        self.state.lock().unwrap().suspended += 1;
    }

    fn lookup(&self, iova: Iova) -> Option<HostAddr> {
        let state = self.state.lock().unwrap();
        let (start, (length, host, _)) = state.mapped.range(..=iova.0).next_back()?;
        let into = iova.0 - start;
        (into < *length).then(|| HostAddr(host.0 + into))
    }

    fn set_dirty_tracking(&self, _: bool) -> Result<()> {
        Ok(())
    }

    fn read_and_clear_dirty(&self, range: IovaRange, keep: bool, sink: &mut dyn DirtySink) -> Result<()> {
        let page = self.page();
        let (first, last) = (range.start().0 / page, range.last().0 / page);
        let mut state = self.state.lock().unwrap();
        let written: Vec<u64> = state.dirty.range(first..=last).copied().collect();
        for number in written {
            sink.dirty(Iova(number * page), page);
            if !keep {
                state.dirty.remove(&number);
            }
        }
        Ok(())
    }
}

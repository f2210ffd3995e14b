//! The software IOMMU's page table as a [`Domain`].
//!
//! Tables that were composed with it, IOTLBs of guests' page tables above it, are its *dependents*: whatever is taken out of
//! it is taken out of them, and who waits for its readers waits for theirs.

#![allow(unsafe_code, reason = "memory is entered as memory by a promise of who enters it")]

use core::{any::Any, fmt};
use std::sync::{Arc, PoisonError, RwLock, Weak};

use crate::{
    Errno, Result,
    domain::{DirtySink, Domain, Geometry, HostAddr, Prot},
    iova::{Iova, IovaRange, PAGE_SIZE},
};

use super::{
    counters::Counters,
    section::Reader,
    table::{ADDRESS_BITS, LEAF_SIZES, Table},
};

/// A page table that devices in this process translate by.
#[derive(Clone)]
pub struct SoftDomain {
    table: Arc<Table>,
    dependents: Arc<RwLock<Vec<Weak<Table>>>>,
}

impl fmt::Debug for SoftDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SoftDomain").field(&self.table).finish()
    }
}

impl Default for SoftDomain {
    fn default() -> Self {
        Self::new()
    }
}

impl SoftDomain {
    /// One that maps nothing.
    #[must_use]
    pub fn new() -> Self {
        Self { table: Table::new(), dependents: Arc::default() }
    }

    /// From now on what is taken out of this one is taken out of `table`, for as long as that exists.
    pub(super) fn add_dependent(&self, table: &Arc<Table>) {
        let mut dependents = self.dependents.write().unwrap_or_else(PoisonError::into_inner);
        dependents.retain(|dependent| dependent.strong_count() > 0);
        dependents.push(Arc::downgrade(table));
    }

    fn each_dependent(&self, each: impl Fn(&Table)) {
        // They are few, and waiting for readers takes long: nobody who makes one waits for that.
        let dependents: Vec<_> = {
            let dependents = self.dependents.read().unwrap_or_else(PoisonError::into_inner);
            dependents.iter().filter_map(Weak::upgrade).collect()
        };
        dependents.iter().for_each(|dependent| each(dependent));
    }

    fn invalidate_dependents(&self) {
        self.each_dependent(|dependent| dependent.invalidate(0, (1 << ADDRESS_BITS) - 1));
    }

    /// Whether writes are noted.
    pub(super) fn tracks_writes(&self) -> bool {
        self.table.tracks()
    }

    fn check(&self, iova: Iova, host: HostAddr, length: u64) -> Result<()> {
        if !(iova.0 | host.0 | length).is_multiple_of(PAGE_SIZE) {
            return Err(Errno::INVAL);
        }
        let range = IovaRange::with_length(iova, length)?;
        host.0.checked_add(length).ok_or(Errno::OVERFLOW)?;
        if self.geometry().aperture.covers(range) { Ok(()) } else { Err(Errno::OVERFLOW) }
    }

    /// A new reader of it. Each thread that translates has one of its own.
    #[must_use]
    pub fn reader(&self) -> Reader {
        self.table.reader()
    }

    /// What its readers did until now.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.table.count()
    }

    fn translated(range: IovaRange) -> Option<(u64, u64)> {
        let aperture = IovaRange::with_length(Iova(0), 1 << ADDRESS_BITS).ok()?;
        let range = range.intersection(aperture)?;
        // Pages are mapped as a whole, so they are unmapped and reported as a whole.
        Some((range.start().0 & !(PAGE_SIZE - 1), range.last().0 | (PAGE_SIZE - 1)))
    }

    #[cfg(test)]
    pub(super) fn nodes(&self) -> usize {
        self.table.nodes()
    }
}

impl Domain for SoftDomain {
    fn geometry(&self) -> Geometry {
        Geometry {
            aperture: IovaRange::with_length(Iova(0), 1 << ADDRESS_BITS).unwrap_or(IovaRange::ALL),
            page_sizes: LEAF_SIZES,
        }
    }

    /// EINVAL for what is not aligned to pages, EOVERFLOW past the aperture, EEXIST where something is mapped.
    fn map(&self, iova: Iova, host: HostAddr, length: u64, prot: Prot) -> Result<()> {
        self.check(iova, host, length)?;
        self.table.map(iova, host, length, prot)
    }

    /// Any range of pages is good: a larger leaf that is cut is replaced by smaller ones.
    fn unmap(&self, range: IovaRange) {
        if let Some((start, last)) = Self::translated(range) {
            self.table.unmap(start, last);
            self.invalidate_dependents();
        }
    }

    fn sync(&self) {
        self.table.sync();
        self.each_dependent(Table::sync);
    }

    /// Devices that come to it meanwhile find [`FaultReason::Moving`](super::FaultReason::Moving).
    fn suspend(&self, range: IovaRange) {
        if let Some((start, last)) = Self::translated(range) {
            self.table.suspend(start, last);
            self.invalidate_dependents();
            self.each_dependent(Table::sync);
        }
    }

    fn lookup(&self, iova: Iova) -> Option<HostAddr> {
        self.table.lookup(iova)
    }

    fn set_dirty_tracking(&self, enable: bool) -> Result<()> {
        self.table.set_tracking(enable);
        // They come back for each page when it is written to.
        self.invalidate_dependents();
        self.each_dependent(Table::sync);
        Ok(())
    }

    /// Reports whole leaves, as far as they are in the range. `sink` must not call back into the domain.
    fn read_and_clear_dirty(&self, range: IovaRange, keep: bool, sink: &mut dyn DirtySink) -> Result<()> {
        if let Some((start, last)) = Self::translated(range) {
            self.table.read_dirty(start, last, keep, sink);
            if !keep {
                self.invalidate_dependents();
                self.each_dependent(Table::sync);
            }
        }
        Ok(())
    }
}

/// [`Domain::map`] of memory of this process. In a domain of the software IOMMU it is entered as what it is, so that devices
/// may access it by its address.
///
/// # Safety
/// The `length` bytes at `host` lie in a run of a [`PinnedPages`](crate::hostmem::PinnedPages), pinned for writing if `prot`
/// says so, until the range has been unmapped and the domain synchronized after that, or it has been suspended.
pub(crate) unsafe fn map_memory(
    domain: &dyn Domain,
    iova: Iova,
    host: HostAddr,
    length: u64,
    prot: Prot,
) -> Result<()> {
    let any: &dyn Any = domain;
    match any.downcast_ref::<SoftDomain>() {
        Some(soft) => {
            soft.check(iova, host, length)?;
            // SAFETY: the caller's promise; what is not unmapped by this domain is not by its table.
            unsafe { soft.table.map_memory(iova, host, length, prot) }
        }
        None => domain.map(iova, host, length, prot),
    }
}

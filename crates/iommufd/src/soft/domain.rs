//! The software IOMMU's page table as a [`Domain`].

use std::sync::Arc;

use crate::{
    Errno, Result,
    domain::{DirtySink, Domain, Geometry, HostAddr, Prot},
    iova::{Iova, IovaRange, PAGE_SIZE},
};

use super::{
    counters::Counters,
    table::{ADDRESS_BITS, LEAF_SIZES, Reader, Table},
};

/// A page table that devices in this process translate by.
#[derive(Clone, Debug)]
pub struct SoftDomain {
    table: Arc<Table>,
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
        Self { table: Table::new() }
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
        if !(iova.0 | host.0 | length).is_multiple_of(PAGE_SIZE) {
            return Err(Errno::INVAL);
        }
        let range = IovaRange::with_length(iova, length)?;
        host.0.checked_add(length).ok_or(Errno::OVERFLOW)?;
        if !self.geometry().aperture.covers(range) {
            return Err(Errno::OVERFLOW);
        }
        self.table.map(iova, host, length, prot)
    }

    /// Any range of pages is good: a larger leaf that is cut is replaced by smaller ones.
    fn unmap(&self, range: IovaRange) {
        if let Some((start, last)) = Self::translated(range) {
            self.table.unmap(start, last);
        }
    }

    fn sync(&self) {
        self.table.sync();
    }

    fn lookup(&self, iova: Iova) -> Option<HostAddr> {
        self.table.lookup(iova)
    }

    fn set_dirty_tracking(&self, enable: bool) -> Result<()> {
        self.table.set_tracking(enable);
        Ok(())
    }

    /// Reports whole leaves, as far as they are in the range. `sink` must not call back into the domain.
    fn read_and_clear_dirty(&self, range: IovaRange, keep: bool, sink: &mut dyn DirtySink) -> Result<()> {
        if let Some((start, last)) = Self::translated(range) {
            self.table.read_dirty(start, last, keep, sink);
        }
        Ok(())
    }
}

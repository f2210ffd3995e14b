//! The page table that an IOMMU reads: what an IOAS is entered into.

use core::{any::Any, fmt};

use crate::{
    Errno, Result,
    iova::{Iova, IovaRange},
};

/// Where a pinned page is: an address in this process's memory. It is what a physical address is to a real IOMMU.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct HostAddr(pub u64);

impl fmt::Debug for HostAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "host {:#x}", self.0)
    }
}

bitflags::bitflags! {
    /// What a device may do with a page.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
    pub struct Prot: u8 {
        /// It may read.
        const READ = 1;
        /// It may write.
        const WRITE = 2;
        /// The mapping is of a device's registers, not of memory.
        const MMIO = 4;
    }
}

/// What a domain can map.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// The addresses that it translates.
    pub aperture: IovaRange,
    /// The page sizes, one bit each. The smallest may be smaller than the host's page.
    pub page_sizes: u64,
}

/// Where [`Domain::read_and_clear_dirty`] reports.
pub trait DirtySink {
    /// `length` bytes at `iova` were written to.
    fn dirty(&mut self, iova: Iova, length: u64);
}

/// An I/O page table. Calls that change it come one at a time for a range of addresses; the IOMMU reads meanwhile.
/// (It is [`Any`] for the driver that made it.)
pub trait Domain: Any + Send + Sync + fmt::Debug {
    /// What it can map.
    fn geometry(&self) -> Geometry;

    /// Whether the device's writes are coherent with the processors' caches whatever the device asks for.
    fn enforce_cache_coherency(&self) -> bool {
        true
    }

    /// Maps `length` bytes (a multiple of the smallest page size) at `iova` to the host memory at `host`. ENOMEM; nothing
    /// stays mapped then. The caller guarantees that the range is not mapped.
    fn map(&self, iova: Iova, host: HostAddr, length: u64, prot: Prot) -> Result<()>;

    /// Unmaps everything in `range`, which never cuts what one [`Self::map`] mapped unless it was mapped with
    /// small pages. After [`Self::sync`] returns no device accesses what was unmapped.
    fn unmap(&self, range: IovaRange);

    /// Waits until no translation that began before is in use: the flush of the IOTLB.
    fn sync(&self);

    /// The memory behind `range` is about to move, and `range` will be mapped again in a moment. Like [`Self::unmap`] and
    /// [`Self::sync`]; but a domain that can lets accesses wait until then rather than fail.
    fn suspend(&self, range: IovaRange) {
        self.unmap(range);
        self.sync();
    }

    /// Where `iova` is mapped to.
    fn lookup(&self, iova: Iova) -> Option<HostAddr>;

    /// Starts or stops noting which pages devices write to. EOPNOTSUPP when it cannot.
    fn set_dirty_tracking(&self, enable: bool) -> Result<()> {
        let _ = enable;
        Err(Errno::OPNOTSUPP)
    }

    /// Reports the pages in `range` that were written to since the last time, and forgets it, unless `keep`.
    fn read_and_clear_dirty(&self, range: IovaRange, keep: bool, sink: &mut dyn DirtySink) -> Result<()> {
        let _ = (range, keep, sink);
        Err(Errno::OPNOTSUPP)
    }
}

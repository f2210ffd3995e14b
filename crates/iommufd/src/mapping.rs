//! `mmap` on a context: memory that drivers let user space map.

use core::fmt;
use std::{
    collections::BTreeMap,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use rustix::mm::{MapFlags, ProtFlags};

use crate::{Context, Errno, Result, iova::PAGE_SIZE};

/// What keeps the owner of a region from being destroyed while it is mapped.
type Hold = Box<dyn fmt::Debug + Send + Sync>;

/// Memory that may be mapped.
pub(crate) struct Region {
    pub(crate) file: Arc<OwnedFd>,
    /// Where it begins in the file.
    pub(crate) offset: u64,
    pub(crate) length: u64,
    /// A use of the object that it belongs to. ENOENT when that is gone.
    pub(crate) owner: Box<dyn Fn() -> Result<Hold> + Send + Sync>,
}

/// The regions of a context by the offsets at which user space maps them.
#[derive(Default)]
pub(crate) struct Regions {
    regions: Mutex<BTreeMap<u64, Region>>,
}

impl fmt::Debug for Regions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.lock().keys()).finish()
    }
}

impl Regions {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Region>> {
        self.regions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a region: its offset. EINVAL when it is not made of whole pages.
    pub(crate) fn add(&self, region: Region) -> Result<u64> {
        if region.length == 0 || !(region.length | region.offset).is_multiple_of(PAGE_SIZE) {
            return Err(Errno::INVAL);
        }
        let mut regions = self.lock();
        // A page apart, so that a wrong length does not reach the neighbour; and 0 is nobody's.
        let mut at = PAGE_SIZE;
        for (start, other) in regions.iter() {
            if start.saturating_sub(at) > region.length {
                break;
            }
            at = start + other.length + PAGE_SIZE;
        }
        regions.insert(at, region);
        Ok(at)
    }

    pub(crate) fn remove(&self, at: u64) {
        let region = self.lock().remove(&at);
        drop(region);
    }
}

/// What to map for the program. It is kept for as long as the program has it mapped: the object that the memory belongs to
/// cannot be destroyed meanwhile.
#[derive(Debug)]
pub struct Mapping {
    file: Arc<OwnedFd>,
    offset: u64,
    _owner: Hold,
}

impl Mapping {
    /// The file to map.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// From where.
    pub fn offset(&self) -> u64 {
        self.offset
    }
}

impl Context {
    /// What `mmap` on the context's descriptor maps.
    ///
    /// - EINVAL: it is not shared, or does not begin at a page, or is empty.
    /// - EPERM: it is to be executed.
    /// - ENXIO: no object has published exactly this range.
    pub fn mmap(&self, offset: u64, length: u64, prot: ProtFlags, flags: MapFlags) -> Result<Mapping> {
        if length == 0 || !offset.is_multiple_of(PAGE_SIZE) || !flags.contains(MapFlags::SHARED) {
            return Err(Errno::INVAL);
        }
        if prot.contains(ProtFlags::EXEC) {
            return Err(Errno::PERM);
        }
        let pages = length.checked_next_multiple_of(PAGE_SIZE);
        let regions = self.regions().lock();
        let region = regions.get(&offset).filter(|region| Some(region.length) == pages).ok_or(Errno::NXIO)?;
        let owner = (region.owner)().map_err(|_| Errno::NXIO)?;
        Ok(Mapping { file: region.file.clone(), offset: region.offset, _owner: owner })
    }
}

//! A file's memory.

use std::{
    collections::HashMap,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, LazyLock, Mutex, PoisonError, Weak},
};

use rustix::fs::{fstat, fstatfs};

use super::Memory;
use crate::{
    Errno, Result,
    domain::HostAddr,
    hostmem::{self, FileMapping, HostRun, PinnedPages},
    iova::PAGE_SIZE,
    process::{
        PinObserver,
        local::{copy, pins},
    },
};

/// `statfs` types of files that are memory: linux/magic.h.
const TMPFS_MAGIC: u64 = 0x0102_1994;
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// Which file is mapped, and whether writable.
type FileId = (u64, u64, bool);

/// The mappings that stores use. One file may have as many stores as it has pages, and a process cannot have as many
/// mappings: so they share one, of the whole file.
static MAPPINGS: LazyLock<Mutex<HashMap<FileId, Weak<FileMapping>>>> = LazyLock::new(Mutex::default);

/// A memory file (memfd, POSIX shared memory, hugetlbfs) from one of its pages on.
#[derive(Debug)]
pub(crate) struct FileMemory {
    mapping: Arc<FileMapping>,
    first: u64,
}

impl FileMemory {
    /// From page `first` on; its last byte that is of interest is before `end`. EINVAL when it is no memory file or ends
    /// before.
    pub(crate) fn new(file: &OwnedFd, first: u64, end: u64, writable: bool) -> Result<Self> {
        let kind = fstatfs(file).map(|statfs| statfs.f_type as u64)?;
        let stat = fstat(file)?;
        let length = u64::try_from(stat.st_size).map_err(|_| Errno::INVAL)?;
        if !matches!(kind, TMPFS_MAGIC | HUGETLBFS_MAGIC) || end > length {
            return Err(Errno::INVAL);
        }
        let id = (stat.st_dev, stat.st_ino, writable);
        let mut mappings = MAPPINGS.lock().unwrap_or_else(PoisonError::into_inner);
        let known = mappings.get(&id).and_then(Weak::upgrade).filter(|mapping| mapping.length() >= end);
        let mapping = match known {
            Some(mapping) => mapping,
            None => {
                mappings.retain(|_, mapping| mapping.strong_count() > 0);
                let length = usize::try_from(length).map_err(|_| Errno::NOMEM)?;
                let mapping = Arc::new(FileMapping::new(file.as_fd(), length, writable)?);
                mappings.insert(id, Arc::downgrade(&mapping));
                mapping
            }
        };
        Ok(Self { mapping, first })
    }

    fn at(&self, offset: u64) -> Result<HostAddr> {
        let offset = offset.checked_add(self.first * PAGE_SIZE).ok_or(Errno::FAULT)?;
        if offset >= self.mapping.length() {
            return Err(Errno::FAULT);
        }
        Ok(HostAddr(self.mapping.start().0 + offset))
    }
}

impl Memory for FileMemory {
    fn pin(
        &self,
        first: u64,
        pages: u64,
        writable: bool,
        _: Weak<dyn PinObserver>,
    ) -> Result<Box<dyn PinnedPages>> {
        let start = self.at(first.checked_mul(PAGE_SIZE).ok_or(Errno::FAULT)?)?;
        hostmem::populate(start, pages * PAGE_SIZE, writable)?;
        let pin = pins::pin(start, pages, None)?;
        Ok(Box::new(FilePin { pin: Box::new(pin), mapping: self.mapping.clone() }))
    }

    fn read(&self, offset: u64, to: &mut [u8]) -> Result<()> {
        copy::read(self.at(offset)?, to)
    }

    fn write(&self, offset: u64, from: &[u8]) -> Result<()> {
        copy::write(self.at(offset)?, from)
    }
}

/// Pages of a mapping, which is kept.
#[derive(Debug)]
struct FilePin {
    pin: Box<dyn PinnedPages>,
    mapping: Arc<FileMapping>,
}

// SAFETY: the pages are in the mapping, which lives as long as this, was made writable if the pages were pinned so, and is
// known to nobody else. A file that becomes shorter takes its pages away nevertheless: then an access ends in SIGBUS, which
// is not undefined behaviour but the end of the process, as for everybody who maps files that others may truncate.
#[allow(unsafe_code, reason = "the promise that the addresses stay good")]
unsafe impl PinnedPages for FilePin {
    fn pages(&self) -> u64 {
        self.pin.pages()
    }

    fn run(&self, first: u64) -> HostRun {
        self.pin.run(first)
    }

    fn split_off(&mut self, at: u64) -> Box<dyn PinnedPages> {
        Box::new(Self { pin: self.pin.split_off(at), mapping: self.mapping.clone() })
    }
}

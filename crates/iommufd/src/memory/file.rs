//! A file's memory.

use std::{
    collections::HashMap,
    fs::File,
    os::fd::{AsRawFd, OwnedFd},
    sync::{
        Arc, LazyLock, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
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

/// Which file it is, and whether it is to be written to.
type FileId = (u64, u64, bool);

/// The files that stores are of. One file may have as many stores as it has pages, and a process has neither so many
/// descriptors nor so many mappings: so they share one of each, and the mapping is of the whole file.
static FILES: LazyLock<Mutex<HashMap<FileId, Weak<SharedFile>>>> = LazyLock::new(Mutex::default);

/// A file that was, or will be, mapped for several stores.
#[derive(Debug)]
struct SharedFile {
    file: OwnedFd,
    writable: bool,
    /// It was to be writable and cannot be: it is sealed.
    sealed: AtomicBool,
    mapping: Mutex<Option<Arc<FileMapping>>>,
}

impl SharedFile {
    fn of(file: &OwnedFd, writable: bool) -> Result<Arc<Self>> {
        let stat = fstat(file)?;
        let id = (stat.st_dev, stat.st_ino, writable);
        let mut files = FILES.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = files.get(&id).and_then(Weak::upgrade) {
            return Ok(known);
        }
        files.retain(|_, file| file.strong_count() > 0);
        let file = file.try_clone().map_err(|_| Errno::MFILE)?;
        let sealed = AtomicBool::new(false);
        let shared = Arc::new(Self { file, writable, sealed, mapping: Mutex::default() });
        files.insert(id, Arc::downgrade(&shared));
        Ok(shared)
    }

    /// The file as memory, at least up to `end`. EINVAL when it is no memory file, or ends before.
    fn mapping(&self, end: u64) -> Result<Arc<FileMapping>> {
        let length = u64::try_from(fstat(&self.file)?.st_size).map_err(|_| Errno::INVAL)?;
        if end > length {
            return Err(Errno::INVAL);
        }
        let mut known = self.mapping.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mapping) = known.as_ref().filter(|mapping| mapping.length() >= end) {
            return Ok(mapping.clone());
        }
        let kind = fstatfs(&self.file)?.f_type as u64;
        if !matches!(kind, TMPFS_MAGIC | HUGETLBFS_MAGIC) {
            return Err(Errno::INVAL);
        }
        let length = usize::try_from(length).map_err(|_| Errno::NOMEM)?;
        Ok(known.insert(Arc::new(self.map(length)?)).clone())
    }

    /// A pin asks neither how a descriptor was opened nor for seals. We cannot do without: another descriptor helps
    /// against the one, nothing against the other, so a sealed file is mapped for devices to read.
    fn map(&self, length: usize) -> Result<FileMapping> {
        let reopened = || {
            File::options()
                .read(true)
                .write(self.writable)
                .open(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
        };
        match FileMapping::new(&self.file, length, self.writable) {
            Err(Errno::ACCESS) => {
                let file = reopened().map_err(|_| Errno::ACCESS)?;
                FileMapping::new(&file, length, self.writable)
            }
            Err(Errno::PERM) if self.writable => {
                self.sealed.store(true, Ordering::Relaxed);
                FileMapping::new(&self.file, length, false)
            }
            mapped => mapped,
        }
    }
}

/// A memory file (memfd, POSIX shared memory, hugetlbfs) from one of its pages on.
#[derive(Debug)]
pub(crate) struct FileMemory {
    file: Arc<SharedFile>,
    first: u64,
    end: u64,
}

impl FileMemory {
    /// From page `first` on, and up to byte `end` of the file. What it is of is looked at when its pages are needed.
    pub(crate) fn new(file: &OwnedFd, first: u64, end: u64, writable: bool) -> Result<Self> {
        Ok(Self { file: SharedFile::of(file, writable)?, first, end })
    }

    /// How often a page is pinned, by this or any other store of the file.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn pin_count(&self, page: u64) -> Result<u64> {
        let stat = fstat(&self.file.file)?;
        let files = FILES.lock().unwrap_or_else(PoisonError::into_inner);
        let stores = [false, true].map(|writable| files.get(&(stat.st_dev, stat.st_ino, writable)));
        let offset = (self.first + page) * PAGE_SIZE;
        let mappings = stores.into_iter().flatten().filter_map(Weak::upgrade).filter_map(|file| {
            let mapping = file.mapping.lock().unwrap_or_else(PoisonError::into_inner);
            mapping.clone().filter(|mapping| offset < mapping.length())
        });
        Ok(mappings.map(|mapping| pins::count(HostAddr(mapping.start().0 + offset))).sum())
    }

    /// Where byte `offset` is, and the mapping that it is in.
    fn at(&self, offset: u64) -> Result<(HostAddr, Arc<FileMapping>)> {
        let offset = offset.checked_add(self.first * PAGE_SIZE).ok_or(Errno::FAULT)?;
        let mapping = self.file.mapping(self.end)?;
        if offset >= mapping.length() {
            return Err(Errno::FAULT);
        }
        Ok((HostAddr(mapping.start().0 + offset), mapping))
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
        let (start, mapping) = self.at(first.checked_mul(PAGE_SIZE).ok_or(Errno::FAULT)?)?;
        hostmem::populate(start, pages * PAGE_SIZE, writable && self.may_write())?;
        let pin = pins::pin(start, pages, None)?;
        Ok(Box::new(FilePin { pin: Box::new(pin), mapping }))
    }

    fn read(&self, offset: u64, to: &mut [u8]) -> Result<()> {
        let (at, _mapping) = self.at(offset)?;
        copy::read(at, to)
    }

    fn write(&self, offset: u64, from: &[u8]) -> Result<()> {
        let (at, _mapping) = self.at(offset)?;
        copy::write(at, from)
    }

    fn may_write(&self) -> bool {
        !self.file.sealed.load(Ordering::Relaxed)
    }
}

/// Pages of a mapping, which is kept.
#[derive(Debug)]
struct FilePin {
    pin: Box<dyn PinnedPages>,
    mapping: Arc<FileMapping>,
}

// SAFETY: the pages are in the mapping, which lives as long as this, is writable unless `may_write` says otherwise, and is
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

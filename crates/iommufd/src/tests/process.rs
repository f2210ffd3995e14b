//! This process with memory that is missing, and a limit of its own.

use std::{
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::{FileOffset, mmap::MmapRegion};

use super::PAGE;
use crate::{
    Errno, Result,
    account::Usage,
    domain::HostAddr,
    hostmem::PinnedPages,
    process::{LocalProcess, PageId, PinObserver, Process, UserAddr},
};

#[derive(Debug)]
pub(crate) struct TestProcess {
    local: Arc<LocalProcess>,
    missing: Mutex<Vec<(u64, u64)>>,
    limit: AtomicU64,
    usage: Usage,
    user: u32,
}

impl TestProcess {
    /// One whose user is nobody else's, without a limit.
    pub(crate) fn new() -> Arc<Self> {
        static USERS: AtomicU32 = AtomicU32::new(1 << 20);
        Self::of_user(USERS.fetch_add(1, Ordering::Relaxed))
    }

    pub(super) fn of_user(user: u32) -> Arc<Self> {
        Arc::new(Self {
            local: LocalProcess::separate(),
            missing: Mutex::default(),
            limit: AtomicU64::new(u64::MAX),
            usage: Usage::default(),
            user,
        })
    }

    /// Pretends that `pages` pages at `start` are not there, or no page is missing for 0.
    pub(crate) fn miss(&self, start: UserAddr, pages: u64) {
        let mut missing = self.missing.lock().unwrap();
        missing.clear();
        if pages > 0 {
            missing.push((start.0, start.0 + pages * PAGE));
        }
    }

    pub(super) fn limit(&self, pages: u64) {
        self.limit.store(pages, Ordering::Relaxed);
    }

    fn check(&self, start: UserAddr, length: u64) -> Result<()> {
        let end = start.0 + length;
        let missing = self.missing.lock().unwrap();
        if missing.iter().any(|&(from, to)| start.0 < to && from < end) { Err(Errno::FAULT) } else { Ok(()) }
    }
}

impl Process for TestProcess {
    fn read(&self, from: UserAddr, to: &mut [u8]) -> Result<()> {
        self.check(from, to.len() as u64)?;
        self.local.read(from, to)
    }

    fn write(&self, to: UserAddr, from: &[u8]) -> Result<()> {
        self.check(to, from.len() as u64)?;
        self.local.write(to, from)
    }

    fn pin(
        &self,
        start: UserAddr,
        pages: u64,
        writable: bool,
        observer: Weak<dyn PinObserver>,
    ) -> Result<Box<dyn PinnedPages>> {
        self.check(start, pages * PAGE)?;
        self.local.pin(start, pages, writable, observer)
    }

    fn page_id(&self, at: UserAddr) -> Result<PageId> {
        self.local.page_id(at)
    }

    fn host_page_id(&self, at: HostAddr) -> Result<PageId> {
        self.local.host_page_id(at)
    }

    fn pin_count(&self, at: UserAddr) -> Result<u64> {
        self.local.pin_count(at)
    }

    fn usage(&self) -> &Usage {
        &self.usage
    }

    fn locked_limit(&self) -> Option<u64> {
        Some(self.limit.load(Ordering::Relaxed)).filter(|limit| *limit != u64::MAX)
    }

    fn user(&self) -> u32 {
        self.user
    }

    fn is(&self, other: &Arc<dyn Process>) -> bool {
        core::ptr::addr_eq(self, Arc::as_ptr(other))
    }

    fn file(&self, fd: i32) -> Result<OwnedFd> {
        self.local.file(fd)
    }
}

/// Memory of the test's own.
#[derive(Debug)]
pub(crate) struct Buffer {
    region: MmapRegion,
}

impl Buffer {
    /// Private memory.
    pub(crate) fn new(pages: u64) -> Self {
        Self { region: MmapRegion::new((pages * PAGE) as usize).unwrap() }
    }

    /// A mapping of a memory file.
    pub(super) fn of(file: &OwnedFd, pages: u64) -> Self {
        let file = std::fs::File::from(file.try_clone().unwrap());
        Self { region: MmapRegion::from_file(FileOffset::new(file, 0), (pages * PAGE) as usize).unwrap() }
    }

    pub(crate) fn start(&self) -> UserAddr {
        UserAddr(self.region.as_ptr() as u64)
    }

    pub(super) fn page(&self, page: u64) -> UserAddr {
        UserAddr(self.start().0 + page * PAGE)
    }

    /// Gives every page bytes that say which it is.
    pub(super) fn number(&self) {
        for page in 0..self.region.size() as u64 / PAGE {
            let bytes: Vec<u8> = (page * PAGE..(page + 1) * PAGE).map(pattern).collect();
            LocalProcess::get().write(self.page(page), &bytes).unwrap();
        }
    }

    pub(super) fn bytes(&self, offset: u64, length: u64) -> Vec<u8> {
        let mut bytes = vec![0; length as usize];
        LocalProcess::get().read(UserAddr(self.start().0 + offset), &mut bytes).unwrap();
        bytes
    }
}

/// The byte at an offset.
pub(super) fn pattern(offset: u64) -> u8 {
    (offset ^ (offset >> 8) ^ (offset >> 16)) as u8
}

/// A memory file of so many pages.
pub(super) fn memory_file(pages: u64) -> OwnedFd {
    let file = memfd_create("iommufd-test", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, pages * PAGE).unwrap();
    file
}

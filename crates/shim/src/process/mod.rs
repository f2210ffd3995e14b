//! The memory of the program, in whose process we are.

pub(crate) mod maps;
pub(crate) mod moving;
mod pins;

#[allow(unsafe_code, reason = "PinnedPages is an unsafe trait: a promise about addresses")]
mod pinned;

use std::{
    fs::OpenOptions,
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::fs::FileExt,
    },
    sync::{Arc, Weak},
};

use iommufd::{
    Errno, Result,
    account::Usage,
    domain::HostAddr,
    hostmem::PinnedPages,
    iova::PAGE_SIZE,
    process::{PageId, PinObserver, Process, UserAddr},
};

use self::{
    moving::{populate, with_registry},
    pins::PageRun,
};
use crate::user;

/// This process's memory.
#[derive(Debug, Default)]
pub(crate) struct ShimProcess {
    usage: Usage,
}

impl Process for ShimProcess {
    fn read(&self, from: UserAddr, to: &mut [u8]) -> Result<()> {
        user::read(from, to)
    }

    fn write(&self, to: UserAddr, from: &[u8]) -> Result<()> {
        user::write(to, from)
    }

    fn pin(
        &self,
        start: UserAddr,
        pages: u64,
        writable: bool,
        observer: Weak<dyn PinObserver>,
    ) -> Result<Box<dyn PinnedPages>> {
        if !start.0.is_multiple_of(PAGE_SIZE) || pages == 0 {
            return Err(Errno::INVAL);
        }
        make_present(start.0, pages, writable)?;
        let run = PageRun { start: start.0 / PAGE_SIZE, pages };
        let pin = with_registry(|registry| registry.pin(run, observer)).ok_or(Errno::FAULT)?;
        Ok(pinned::new(pin))
    }

    fn page_id(&self, at: UserAddr) -> Result<PageId> {
        page_id(at.0)
    }

    fn host_page_id(&self, at: HostAddr) -> Result<PageId> {
        page_id(at.0)
    }

    fn pin_count(&self, at: UserAddr) -> Result<u64> {
        let page = page_id(at.0)?;
        // It may have been pinned where it is mapped elsewhere.
        Ok(maps::all()?.iter().filter_map(|mapped| mapped.find(page)).map(pins_at).sum())
    }

    fn usage(&self) -> &Usage {
        &self.usage
    }

    fn locked_limit(&self) -> Option<u64> {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock);
        limit.current.map(|bytes| bytes / PAGE_SIZE)
    }

    fn user(&self) -> u32 {
        rustix::process::getuid().as_raw()
    }

    fn is(&self, other: &Arc<dyn Process>) -> bool {
        // There is one in a process.
        core::ptr::addr_eq(self, Arc::as_ptr(other))
    }

    fn file(&self, fd: i32) -> Result<OwnedFd> {
        duplicate(fd)
    }
}

/// A descriptor of ours for the program's `fd`.
#[allow(unsafe_code, reason = "borrowing a number that the program gave")]
fn duplicate(fd: i32) -> Result<OwnedFd> {
    if fd < 0 {
        return Err(Errno::BADF);
    }
    // SAFETY: needed because the number comes from the program. It is only handed to fcntl, which answers EBADF when nothing is
    // open there, and is not kept.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    rustix::io::fcntl_dupfd_cloexec(borrowed, 0)
}

/// Closes a descriptor of the program's that it has not seen yet.
#[allow(unsafe_code, reason = "closing a number")]
pub(crate) fn close(fd: i32) {
    // SAFETY: needed to take back what was given as a number. The caller has just made the descriptor for the program, which does
    // not know of it.
    unsafe { crate::real::close()(fd) };
}

/// What the page at an address is.
fn page_id(at: u64) -> Result<PageId> {
    Ok(maps::at(at)?.page(at))
}

/// How often the page at an address of ours is pinned by that address.
pub(crate) fn pins_at(at: u64) -> u64 {
    with_registry(|registry| registry.count(at / PAGE_SIZE))
}

/// Makes pages present as a long-term pin of the kernel's does: writable ones for writing; and a private page that is only to
/// be read becomes the process's own before, so that a write of the program's later does not part it from the device.
fn make_present(start: u64, pages: u64, writable: bool) -> Result<()> {
    if populate(start, pages, libc::MADV_POPULATE_WRITE).is_ok() {
        return Ok(());
    }
    if writable {
        return Err(Errno::FAULT);
    }
    // Somewhere the program may not write: find out where that is private memory.
    populate(start, pages, libc::MADV_POPULATE_READ)?;
    let end = start + pages * PAGE_SIZE;
    for mapped in maps::all()?.iter().filter(|mapped| mapped.start < end && start < mapped.end) {
        let (from, to) = (start.max(mapped.start), end.min(mapped.end));
        if mapped.writable {
            populate(from, (to - from) / PAGE_SIZE, libc::MADV_POPULATE_WRITE)?;
        } else if !mapped.shared {
            unshare(from, to)?;
        }
    }
    Ok(())
}

/// Makes private read-only pages the process's own, by writing to each what it holds. `/proc/self/mem` may write where the program
/// itself may not.
fn unshare(start: u64, end: u64) -> Result<()> {
    let memory =
        OpenOptions::new().read(true).write(true).open("/proc/self/mem").map_err(|_| Errno::FAULT)?;
    let mut at = start;
    while at < end {
        let mut byte = [0];
        memory.read_exact_at(&mut byte, at).map_err(|_| Errno::FAULT)?;
        memory.write_all_at(&byte, at).map_err(|_| Errno::FAULT)?;
        at += PAGE_SIZE;
    }
    Ok(())
}

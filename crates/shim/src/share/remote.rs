//! The memory of a process that shares our files.
//!
//! Its bytes are read and written through the kernel. Its pages can only be pinned where this process can map them too: that is
//! shared memory, either such as both had before the fork, or such as `/proc/PID/map_files` lets us open. Once pinned, a page is
//! mapped here and outlives the other process; before, it is gone with it.

#![allow(
    unsafe_code,
    reason = "another process's memory, and PinnedPages, which is a promise about addresses"
)]

use core::{
    ffi::c_void,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};
use std::{
    any::Any,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError, Weak},
};

use iommufd::{
    Errno, Result,
    account::Usage,
    caller::Caller,
    domain::HostAddr,
    hostmem::{HostRun, PinnedPages},
    iova::PAGE_SIZE,
    process::{PageId, PinObserver, Process, UserAddr},
};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::{
    caller::ShimCaller,
    process::{
        maps::{self, Mapped},
        moving, pins_at,
    },
};

/// Such a process.
#[derive(Debug)]
pub(super) struct RemoteProcess {
    pid: i32,
    pidfd: OwnedFd,
    gone: AtomicBool,
    user: AtomicU64,
    /// RLIMIT_MEMLOCK in bytes; all ones for none.
    locked_limit: AtomicU64,
    usage: Usage,
    /// What it has mapped.
    kept: Mutex<Vec<Kept>>,
}

struct Kept(#[allow(dead_code, reason = "kept only to be dropped")] Arc<dyn Any + Send + Sync>);

impl core::fmt::Debug for Kept {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Kept")
    }
}

impl RemoteProcess {
    /// The process with this number. ESRCH when it is gone already.
    pub(super) fn new(pid: i32) -> Result<Arc<Self>> {
        let number = Pid::from_raw(pid).ok_or(Errno::SRCH)?;
        let process = Arc::new(Self {
            pid,
            pidfd: pidfd_open(number, PidfdFlags::empty())?,
            gone: AtomicBool::new(false),
            user: AtomicU64::new(0),
            locked_limit: AtomicU64::new(0),
            usage: Usage::default(),
            kept: Mutex::default(),
        });
        super::usage::add(&process);
        Ok(process)
    }

    pub(super) fn pid(&self) -> i32 {
        self.pid
    }

    /// What came with a call: who calls, and its limit.
    pub(super) fn set_limits(&self, words: &[u64]) {
        if let [_, _, _, _, user, limit, ..] = words {
            self.user.store(*user, Ordering::Relaxed);
            self.locked_limit.store(*limit, Ordering::Relaxed);
        }
    }

    /// Keeps `guard` until the process ends.
    pub(super) fn keep(&self, guard: Arc<dyn Any + Send + Sync>) {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).push(Kept(guard));
    }

    /// The process has ended.
    pub(super) fn gone(&self) {
        self.gone.store(true, Ordering::Release);
        let kept = core::mem::take(&mut *self.kept.lock().unwrap_or_else(PoisonError::into_inner));
        drop(kept);
    }

    /// EFAULT when the process has ended: its memory is no more, and its number may be another's.
    fn alive(&self) -> Result<()> {
        let mut fds = [rustix::event::PollFd::new(&self.pidfd, rustix::event::PollFlags::IN)];
        let now = rustix::event::Timespec::default();
        let ended = rustix::event::poll(&mut fds, Some(&now)) != Ok(0);
        if ended || self.gone.load(Ordering::Acquire) { Err(Errno::FAULT) } else { Ok(()) }
    }

    fn maps(&self) -> Result<Vec<Mapped>> {
        self.alive()?;
        maps::of(self.pid)
    }

    /// Maps `run`, a part of the other process's `mapped`, here: where.
    fn map_here(&self, mapped: &Mapped, start: u64, length: u64) -> Result<Region> {
        let (dev, ino, offset) = mapped.file.filter(|_| mapped.shared).ok_or(Errno::FAULT)?;
        let offset = offset + (start - mapped.start);
        let twin = maps::all()?.into_iter().find_map(|own| {
            let into = offset.checked_sub(own.shared_file(dev, ino)?)?;
            (own.writable >= mapped.writable && into + length <= own.end - own.start)
                .then(|| own.start + into)
        });
        let at = match twin {
            Some(at) => moving::duplicate(at, length)?,
            None => {
                let name = format!("/proc/{}/map_files/{:x}-{:x}", self.pid, mapped.start, mapped.end);
                let file = std::fs::File::options().read(true).write(mapped.writable).open(name);
                moving::map_shared(file.map_err(|_| Errno::FAULT)?.as_fd(), offset, length, mapped.writable)?
            }
        };
        Ok(Region { start: at, length })
    }
}

/// Addresses of ours where another process's pages are mapped.
#[derive(Debug)]
struct Region {
    start: u64,
    length: u64,
}

impl Drop for Region {
    fn drop(&mut self) {
        moving::release(self.start, self.length);
    }
}

impl Process for RemoteProcess {
    fn read(&self, from: UserAddr, to: &mut [u8]) -> Result<()> {
        self.alive()?;
        let local = libc::iovec { iov_base: to.as_mut_ptr().cast(), iov_len: to.len() };
        let remote = libc::iovec { iov_base: from.0 as *mut c_void, iov_len: to.len() };
        // SAFETY: needed because nothing else reads another process's memory. The kernel writes at most `to.len()` bytes to `to`.
        let done = unsafe { libc::process_vm_readv(self.pid, &raw const local, 1, &raw const remote, 1, 0) };
        if usize::try_from(done) == Ok(to.len()) { Ok(()) } else { Err(Errno::FAULT) }
    }

    fn write(&self, to: UserAddr, from: &[u8]) -> Result<()> {
        self.alive()?;
        let local = libc::iovec { iov_base: from.as_ptr().cast_mut().cast(), iov_len: from.len() };
        let remote = libc::iovec { iov_base: to.0 as *mut c_void, iov_len: from.len() };
        // SAFETY: as above; the kernel only reads `from`.
        let done = unsafe { libc::process_vm_writev(self.pid, &raw const local, 1, &raw const remote, 1, 0) };
        if usize::try_from(done) == Ok(from.len()) { Ok(()) } else { Err(Errno::FAULT) }
    }

    fn pin(
        &self,
        start: UserAddr,
        pages: u64,
        writable: bool,
        _observer: Weak<dyn PinObserver>,
    ) -> Result<Box<dyn PinnedPages>> {
        let end = pages
            .checked_mul(PAGE_SIZE)
            .and_then(|length| start.0.checked_add(length))
            .ok_or(Errno::FAULT)?;
        let (mut at, mut parts) = (start.0, Vec::new());
        for mapped in self.maps()? {
            if mapped.end <= at || end <= mapped.start {
                continue;
            }
            if at < mapped.start || !mapped.readable || (writable && !mapped.writable) {
                return Err(Errno::FAULT);
            }
            let length = end.min(mapped.end) - at;
            let region = self.map_here(&mapped, at, length)?;
            // It is ours now: nobody unmaps it, so nobody needs to be told.
            let nobody = Weak::<Nobody>::new();
            let here = UserAddr(region.start);
            let pinned = ShimCaller::get().process().pin(here, length / PAGE_SIZE, writable, nobody)?;
            parts.push(Part { pinned, _region: Arc::new(region) });
            at += length;
        }
        if at == end && !parts.is_empty() { Ok(Box::new(RemotePages { parts })) } else { Err(Errno::FAULT) }
    }

    fn page_id(&self, at: UserAddr) -> Result<PageId> {
        let mapped = self.maps()?.into_iter().find(|mapped| (mapped.start..mapped.end).contains(&at.0));
        let page = mapped.ok_or(Errno::FAULT)?.page(at.0);
        match page {
            // Not the page of ours that has this address.
            PageId::Private(number) => {
                Ok(PageId::Private(number | u64::from(self.pid.unsigned_abs()) << 40 | 1 << 63))
            }
            file @ PageId::File { .. } => Ok(file),
        }
    }

    fn host_page_id(&self, at: HostAddr) -> Result<PageId> {
        ShimCaller::get().process().host_page_id(at)
    }

    fn pin_count(&self, at: UserAddr) -> Result<u64> {
        let page = self.page_id(at)?;
        Ok(maps::all()?.iter().filter_map(|own| own.find(page)).map(pins_at).sum())
    }

    fn usage(&self) -> &Usage {
        &self.usage
    }

    fn locked_limit(&self) -> Option<u64> {
        match self.locked_limit.load(Ordering::Relaxed) {
            u64::MAX => None,
            bytes => Some(bytes / PAGE_SIZE),
        }
    }

    fn user(&self) -> u32 {
        u32::try_from(self.user.load(Ordering::Relaxed)).unwrap_or(u32::MAX)
    }

    fn is(&self, other: &Arc<dyn Process>) -> bool {
        core::ptr::addr_eq(self, Arc::as_ptr(other))
    }

    fn file(&self, fd: i32) -> Result<OwnedFd> {
        // SAFETY: needed because rustix does not know this call. It takes numbers only.
        let copy = unsafe { libc::syscall(libc::SYS_pidfd_getfd, self.pidfd.as_raw_fd(), fd, 0) };
        let copy = i32::try_from(copy).ok().filter(|&copy| copy >= 0).ok_or(Errno::BADF)?;
        // SAFETY: needed to own what the call made: a new descriptor that nobody else knows.
        Ok(unsafe { OwnedFd::from_raw_fd(copy) })
    }
}

/// Who is not told.
struct Nobody;

impl PinObserver for Nobody {
    fn moving(&self, _from: UserAddr, _pages: u64) {}

    fn moved(&self, _from: UserAddr, _pages: u64) {}
}

/// Pinned pages of another process, in the parts in which they are mapped here.
#[derive(Debug)]
struct RemotePages {
    parts: Vec<Part>,
}

#[derive(Debug)]
struct Part {
    pinned: Box<dyn PinnedPages>,
    // After the pin: it must not go first.
    _region: Arc<Region>,
}

// SAFETY: each part is a pin of this process's memory, which promises what is promised here, in a region that stays mapped until the
// part is dropped.
unsafe impl PinnedPages for RemotePages {
    fn pages(&self) -> u64 {
        self.parts.iter().map(|part| part.pinned.pages()).sum()
    }

    fn run(&self, first: u64) -> HostRun {
        let mut before = 0;
        for part in &self.parts {
            let pages = part.pinned.pages();
            if first < before + pages {
                return part.pinned.run(first - before);
            }
            before += pages;
        }
        HostRun { start: HostAddr(0), pages: 0 }
    }

    fn split_off(&mut self, at: u64) -> Box<dyn PinnedPages> {
        let (mut before, mut rest) = (0, Vec::new());
        for mut part in core::mem::take(&mut self.parts) {
            let pages = part.pinned.pages();
            if before + pages <= at {
                self.parts.push(part);
            } else if before >= at {
                rest.push(part);
            } else {
                let pinned = part.pinned.split_off(at - before);
                rest.push(Part { pinned, _region: Arc::clone(&part._region) });
                self.parts.push(part);
            }
            before += pages;
        }
        Box::new(Self { parts: rest })
    }
}

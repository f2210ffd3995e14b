//! Another process: one that calls through this one, because it shares what this one has open.
//!
//! Its bytes are read and written through the kernel (process_vm_readv(2), which asks for the right to trace it: a child's
//! parent has it nearly everywhere). Its pages can only be pinned where this process can map them too: that is shared
//! memory, either such as both have, or such as `/proc/PID/fd` or `/proc/PID/map_files` lets us open. Pages that are pinned are mapped here
//! and outlive the other process; before that, they are gone with it.

use core::fmt;
use std::{
    fs::{self, File, Metadata},
    io::{IoSlice, IoSliceMut},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::PathBuf,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
};

use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open},
};

use super::{
    PageId, PinObserver, Process, UserAddr,
    local::{
        maps::{self, Mapping},
        pins,
    },
};
use crate::{
    Errno, Result,
    account::Usage,
    domain::HostAddr,
    hostmem::{self, HostRun, PinnedPages},
    iova::PAGE_SIZE,
};

/// A pidfd, and whatever keeps it.
type PidFd = Box<dyn AsFd + Send + Sync>;

/// Another process.
pub struct RemoteProcess {
    pid: Pid,
    pidfd: PidFd,
    gone: AtomicBool,
    user: AtomicU32,
    /// RLIMIT_MEMLOCK in bytes; all ones for none.
    locked_limit: AtomicU64,
    usage: Usage,
}

impl fmt::Debug for RemoteProcess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RemoteProcess").field("pid", &self.pid).finish_non_exhaustive()
    }
}

impl RemoteProcess {
    /// The process with this number. ESRCH when there is none.
    pub fn new(pid: Pid) -> Result<Arc<Self>> {
        Ok(Self::with_pidfd(pid, Box::new(pidfd_open(pid, PidfdFlags::empty())?)))
    }

    /// The process with this number, which `pidfd` is of: for who has descriptors in a place of their own.
    pub fn with_pidfd(pid: Pid, pidfd: PidFd) -> Arc<Self> {
        Arc::new(Self {
            pid,
            pidfd,
            gone: AtomicBool::new(false),
            user: AtomicU32::new(0),
            locked_limit: AtomicU64::new(0),
            usage: Usage::default(),
        })
    }

    /// Its number.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// What it says of itself when it calls: its user, and RLIMIT_MEMLOCK in bytes if it has that limit.
    pub fn set_caller(&self, user: u32, locked_limit: Option<u64>) {
        self.user.store(user, Ordering::Relaxed);
        self.locked_limit.store(locked_limit.unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// It has ended, or runs another program now: its memory is no more.
    pub fn end(&self) {
        self.gone.store(true, Ordering::Release);
    }

    /// EFAULT when the process has ended: its number may be another's.
    fn alive(&self) -> Result<()> {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let ended = poll(&mut fds, Some(&Timespec::default())) != Ok(0);
        if ended || self.gone.load(Ordering::Acquire) { Err(Errno::FAULT) } else { Ok(()) }
    }

    fn nix_pid(&self) -> nix::unistd::Pid {
        nix::unistd::Pid::from_raw(self.pid.as_raw_nonzero().get())
    }

    fn maps(&self) -> Result<Vec<Mapping>> {
        self.alive()?;
        maps::of(self.pid.as_raw_nonzero().get())
    }

    /// The file of a mapping: by a descriptor that the other process has of it, or by its mapping, which takes a privilege.
    fn open_behind(&self, mapping: &Mapping) -> Option<File> {
        let pid = self.pid.as_raw_nonzero();
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        let is_it = |about: Metadata| mapping.is_of(about.dev(), about.ino());
        let same = |path: &PathBuf| fs::metadata(path).is_ok_and(is_it);
        let by_descriptor = descriptors.map(|entry| entry.path()).filter(same);
        let by_mapping = format!("/proc/{pid}/map_files/{:x}-{:x}", mapping.start, mapping.end).into();
        let open = |path| File::options().read(true).write(mapping.writable()).open(path).ok();
        // The process may have put another file under the number since it was looked at.
        let still = |file: &File| file.metadata().is_ok_and(is_it);
        by_descriptor.filter_map(open).find(still).or_else(|| open(by_mapping))
    }

    /// Maps pages here that are mapped here already, from `page` on. None where they are not, or not any more.
    fn map_again(page: PageId, length: u64, writable: bool) -> Result<Option<Region>> {
        let place = |own: &Mapping| {
            let at = own.find(page)?;
            (own.writable() >= writable && length <= own.end - at).then_some(at)
        };
        let Some(at) = maps::all()?.iter().find_map(place) else { return Ok(None) };
        let Ok(start) = hostmem::duplicate(HostAddr(at), length) else { return Ok(None) };
        let region = Region { start, length };
        // Another thread may have mapped something else there before it was duplicated.
        let there = maps::mappings(start, start.0 + length)?;
        let is_whole = |own: &Mapping| own.find(page) == Some(start.0) && length <= own.end - start.0;
        Ok(there.iter().any(is_whole).then_some(region))
    }

    /// Maps a part of the other process's `mapping` here.
    fn map_here(&self, mapping: &Mapping, start: u64, length: u64) -> Result<Region> {
        let page = mapping.page(start);
        if mapping.private() {
            return Err(Errno::FAULT);
        }
        if let Some(region) = Self::map_again(page, length, mapping.writable())? {
            return Ok(region);
        }
        let file = self.open_behind(mapping).ok_or(Errno::FAULT)?;
        let start = hostmem::map_shared(file, mapping.offset_of(start), length, mapping.writable())?;
        Ok(Region { start, length })
    }
}

impl Process for RemoteProcess {
    fn read(&self, from: UserAddr, to: &mut [u8]) -> Result<()> {
        self.alive()?;
        let remote = [RemoteIoVec { base: from.0 as usize, len: to.len() }];
        let length = to.len();
        let done = process_vm_readv(self.nix_pid(), &mut [IoSliceMut::new(to)], &remote);
        if done == Ok(length) { Ok(()) } else { Err(Errno::FAULT) }
    }

    fn write(&self, to: UserAddr, from: &[u8]) -> Result<()> {
        self.alive()?;
        let remote = [RemoteIoVec { base: to.0 as usize, len: from.len() }];
        let done = process_vm_writev(self.nix_pid(), &[IoSlice::new(from)], &remote);
        if done == Ok(from.len()) { Ok(()) } else { Err(Errno::FAULT) }
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
        for mapping in self.maps()?.into_iter().filter(|mapping| mapping.start < end && start.0 < mapping.end)
        {
            if at < mapping.start || (writable && !mapping.writable()) {
                return Err(Errno::FAULT);
            }
            let length = end.min(mapping.end) - at;
            let region = self.map_here(&mapping, at, length)?;
            hostmem::populate(region.start, length, writable)?;
            // The region is ours: nobody unmaps it, so nobody needs to be told.
            let pin = pins::pin(region.start, length / PAGE_SIZE, None)?;
            parts.push(Part { pin: Box::new(pin), region: Arc::new(region) });
            at += length;
        }
        if at == end && !parts.is_empty() { Ok(Box::new(RemotePages { parts })) } else { Err(Errno::FAULT) }
    }

    fn page_id(&self, at: UserAddr) -> Result<PageId> {
        let mapping = self.maps()?.into_iter().find(|mapping| (mapping.start..mapping.end).contains(&at.0));
        match mapping.ok_or(Errno::FAULT)?.page(at.0) {
            // Not the page of ours that has this address. Page numbers have fewer than 40 bits, and process numbers than 22.
            PageId::Private(number) => {
                let process = u64::from(self.pid.as_raw_nonzero().get().unsigned_abs());
                Ok(PageId::Private(number | process << 40 | 1 << 63))
            }
            file @ PageId::File { .. } => Ok(file),
        }
    }

    fn host_page_id(&self, at: HostAddr) -> Result<PageId> {
        maps::page_id(at)
    }

    fn pin_count(&self, at: UserAddr) -> Result<u64> {
        maps::pin_count_of(self.page_id(at)?)
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
        self.user.load(Ordering::Relaxed)
    }

    fn is(&self, other: &Arc<dyn Process>) -> bool {
        core::ptr::addr_eq(self, Arc::as_ptr(other))
    }

    fn file(&self, fd: i32) -> Result<OwnedFd> {
        if fd < 0 {
            return Err(Errno::BADF);
        }
        pidfd_getfd(&self.pidfd, fd, PidfdGetfdFlags::empty())
    }
}

/// Addresses of ours where another process's pages are mapped.
#[derive(Debug)]
struct Region {
    start: HostAddr,
    length: u64,
}

impl Drop for Region {
    fn drop(&mut self) {
        hostmem::unmap(self.start, self.length);
    }
}

/// Pinned pages of another process, in the parts in which they are mapped here.
#[derive(Debug)]
struct RemotePages {
    parts: Vec<Part>,
}

/// The pin goes before the region.
#[derive(Debug)]
struct Part {
    pin: Box<dyn PinnedPages>,
    region: Arc<Region>,
}

// SAFETY: each part is noted as a pin of pages that were made present with these rights, in a region that stays mapped until
// the part is dropped. It is nothing that Rust knows of.
#[allow(unsafe_code, reason = "the promise that the addresses stay good")]
unsafe impl PinnedPages for RemotePages {
    fn pages(&self) -> u64 {
        self.parts.iter().map(|part| part.pin.pages()).sum()
    }

    fn run(&self, first: u64) -> HostRun {
        let mut before = 0;
        for part in &self.parts {
            let pages = part.pin.pages();
            if first < before + pages {
                return part.pin.run(first - before);
            }
            before += pages;
        }
        HostRun { start: HostAddr(0), pages: 0 }
    }

    fn split_off(&mut self, at: u64) -> Box<dyn PinnedPages> {
        let (mut before, mut rest) = (0, Vec::new());
        for mut part in core::mem::take(&mut self.parts) {
            let pages = part.pin.pages();
            if before + pages <= at {
                self.parts.push(part);
            } else if before >= at {
                rest.push(part);
            } else {
                let pin = part.pin.split_off(at - before);
                rest.push(Part { pin, region: Arc::clone(&part.region) });
                self.parts.push(part);
            }
            before += pages;
        }
        Box::new(Self { parts: rest })
    }
}

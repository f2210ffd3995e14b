//! Keeping pinned pages when the program unmaps them.
//!
//! In the kernel a pinned page outlives its mapping. Here a page lives only as long as something maps it, and what pinned
//! it knows it by its address. So before the program's `munmap`, `MAP_FIXED`, `mremap` or `madvise` takes pages away that are
//! pinned, they are moved with `mremap`, which keeps the page itself (no copy, also for private memory), to addresses that the
//! program does not know. Whoever entered the old addresses somewhere is told before and after.

#![allow(unsafe_code, reason = "moving the program's memory")]

use core::{ffi::c_void, ptr};
use std::{
    os::fd::{AsRawFd, BorrowedFd},
    sync::{Mutex, MutexGuard, PoisonError},
};

use iommufd::{Errno, Result, iova::PAGE_SIZE};

use super::{
    maps,
    pins::{Notice, PageRun, Registry},
};
use crate::{inside, real};

/// Huge pages move only to addresses that are aligned as they were.
const HUGE: u64 = 2 << 20;

static REGISTRY: Mutex<Registry> = Mutex::new(Registry::new());

/// One move at a time: between the notices before and after it the registry is not locked.
static MOVING: Mutex<()> = Mutex::new(());

/// The registry of this process's pins. What is done under the lock must not be a call of the program.
pub(super) fn with_registry<T>(work: impl FnOnce(&mut Registry) -> T) -> T {
    inside::run(|| work(&mut lock()))
}

fn lock() -> MutexGuard<'static, Registry> {
    REGISTRY.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The whole pages that `length` bytes at `at` are in.
fn pages(at: usize, length: usize) -> Option<PageRun> {
    let (at, length) = (at as u64, length as u64);
    let end = at.checked_add(length)?.checked_next_multiple_of(PAGE_SIZE)? / PAGE_SIZE;
    let start = at / PAGE_SIZE;
    (start < end).then_some(PageRun { start, pages: end - start })
}

/// The program is about to give up the pages in a range: those that are pinned are brought away. ENOMEM when they
/// cannot be kept: then the program must not go on.
pub(crate) fn evacuate(at: usize, length: usize) -> Result<()> {
    let Some(range) = pinned_range(at, length) else { return Ok(()) };
    moving(range, || move_all(range, Behind::Anything))
}

/// The program is about to throw away what its private pages in a range hold, but keeps the addresses. ENOMEM when the pinned
/// ones cannot be brought away.
pub(crate) fn evacuate_private(at: usize, length: usize) -> Result<()> {
    let Some(range) = pinned_range(at, length) else { return Ok(()) };
    moving(range, || move_all(range, Behind::Mapping))
}

/// What may be where pages were moved from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Behind {
    /// The same mapping, with new pages when they are touched: an older kernel cannot do that for every mapping.
    Mapping,
    /// That, or nothing. The first is better: no other thread is given the addresses before the program's own call comes to
    /// them.
    Anything,
}

/// The program moves a mapping itself, by `remap`, which gives the new address: its pins go with it.
pub(crate) fn carry(at: usize, length: usize, remap: impl FnOnce() -> *mut c_void) -> *mut c_void {
    let Some(range) = pinned_range(at, length) else { return remap() };
    moving(range, || {
        let there = remap();
        if there != libc::MAP_FAILED && there as usize != at {
            with_registry(|registry| {
                for run in registry.pinned(range) {
                    let to = there as u64 / PAGE_SIZE + (run.start - range.start);
                    registry.relocate(run, to, false);
                }
            });
        }
        there
    })
}

/// The pages of a range, when any of them is pinned.
fn pinned_range(at: usize, length: usize) -> Option<PageRun> {
    if inside::is() {
        return None;
    }
    let range = pages(at, length)?;
    with_registry(|registry| !registry.is_empty() && !registry.pinned(range).is_empty()).then_some(range)
}

/// Does `work`, which moves pages of `range`, while nobody uses or pins them.
fn moving<T>(range: PageRun, work: impl FnOnce() -> T) -> T {
    let _one = MOVING.lock().unwrap_or_else(PoisonError::into_inner);
    let notices = with_registry(|registry| registry.unsettle(range));
    inside::run(|| notices.iter().for_each(Notice::moving));
    let result = work();
    with_registry(Registry::settle);
    inside::run(|| notices.iter().for_each(Notice::moved));
    result
}

fn move_all(range: PageRun, behind: Behind) -> Result<()> {
    let mappings = maps::all()?;
    with_registry(|registry| {
        for run in registry.pinned(range) {
            let (start, end) = (run.start * PAGE_SIZE, run.end() * PAGE_SIZE);
            for mapping in mappings.iter().filter(|mapping| mapping.start < end && start < mapping.end) {
                if behind == Behind::Mapping && mapping.shared {
                    continue;
                }
                let (start, end) = (start.max(mapping.start), end.min(mapping.end));
                let there = hide(start, end - start, behind)?;
                let from = PageRun { start: start / PAGE_SIZE, pages: (end - start) / PAGE_SIZE };
                registry.relocate(from, there / PAGE_SIZE, true);
            }
        }
        Ok(())
    })
}

/// Moves `length` bytes at `start`, which lie in one mapping, to hidden addresses: where they are then.
fn hide(start: u64, length: u64, behind: Behind) -> Result<u64> {
    let reserved = length.checked_add(HUGE).ok_or(Errno::NOMEM)?;
    let base = reserve(reserved)?;
    // As far from a huge page's start as before.
    let there = base + (start.wrapping_sub(base) % HUGE);
    let kept = if remap(start, length, there, behind) { there..there + length } else { base..base };
    for (from, to) in [(base, kept.start), (kept.end, base + reserved)] {
        if from < to {
            release(from, to - from);
        }
    }
    if kept.is_empty() { Err(Errno::NOMEM) } else { Ok(there) }
}

/// Addresses that nobody else uses.
fn reserve(length: u64) -> Result<u64> {
    let length = usize::try_from(length).map_err(|_| Errno::NOMEM)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: needed to have a place to move to. A new mapping at an address of the kernel's choice takes nothing from anybody.
    let base = unsafe { real::mmap64()(ptr::null_mut(), length, libc::PROT_NONE, flags, -1, 0) };
    if base == libc::MAP_FAILED { Err(Errno::NOMEM) } else { Ok(base as u64) }
}

/// Moves `length` bytes from `start` to `there`, which is reserved. Whether the kernel did.
fn remap(start: u64, length: u64, there: u64, behind: Behind) -> bool {
    let Ok(length) = usize::try_from(length) else { return false };
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    let ways: &[i32] = match behind {
        Behind::Mapping => &[libc::MREMAP_DONTUNMAP],
        Behind::Anything => &[libc::MREMAP_DONTUNMAP, 0],
    };
    ways.iter().any(|way| {
        // SAFETY: needed because only mremap keeps the pages. The destination is reserved; the source is what the program gives up
        // in this call, so nothing of it will use what was there.
        let moved = unsafe {
            real::mremap()(start as *mut c_void, length, length, flags | way, there as *mut c_void)
        };
        moved != libc::MAP_FAILED
    })
}

/// Unmaps hidden addresses.
pub(crate) fn release(start: u64, length: u64) {
    let Ok(length) = usize::try_from(length) else { return };
    // SAFETY: needed to give memory back. The callers pass addresses of their own reservations, which nobody uses any more.
    unsafe { real::munmap()(start as *mut c_void, length) };
}

/// Makes `pages` present for reading, or for writing. EFAULT when that cannot be.
pub(super) fn populate(start: u64, pages: u64, advice: i32) -> Result<()> {
    let length =
        pages.checked_mul(PAGE_SIZE).and_then(|length| usize::try_from(length).ok()).ok_or(Errno::FAULT)?;
    crate::errno::preserved(|| {
        loop {
            // SAFETY: needed because nothing else asks for pages to be made present. It changes no byte of them and fails for
            // addresses that do not exist.
            let result = unsafe { real::madvise()(start as *mut c_void, length, advice) };
            match result {
                0 => return Ok(()),
                _ if matches!(crate::errno::get(), libc::EINTR | libc::EAGAIN) => {}
                _ => return Err(Errno::FAULT),
            }
        }
    })
}

/// In a child after `fork`: its copies of pinned pages are no pins.
pub(crate) fn forget() {
    let hidden = with_registry(Registry::take_hidden);
    for run in hidden {
        release(run.start * PAGE_SIZE, run.pages * PAGE_SIZE);
    }
}

/// Maps the shared pages at `start` once more: where.
pub(crate) fn duplicate(start: u64, length: u64) -> Result<u64> {
    let length = usize::try_from(length).map_err(|_| Errno::FAULT)?;
    // SAFETY: needed because shared memory without a file can be mapped again in no other way. An old length of 0 leaves the old
    // mapping alone, and the new one is at an address of the kernel's choice.
    let there = unsafe { real::mremap()(start as *mut c_void, 0, length, libc::MREMAP_MAYMOVE) };
    if there == libc::MAP_FAILED { Err(Errno::FAULT) } else { Ok(there as u64) }
}

/// Maps `length` bytes at `offset` of a file, shared, at hidden addresses: where.
pub(crate) fn map_shared(file: BorrowedFd<'_>, offset: u64, length: u64, writable: bool) -> Result<u64> {
    let length = usize::try_from(length).map_err(|_| Errno::FAULT)?;
    let offset = i64::try_from(offset).map_err(|_| Errno::FAULT)?;
    let prot = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
    // SAFETY: needed to have the pages here. A new mapping at an address of the kernel's choice takes nothing from anybody.
    let there =
        unsafe { real::mmap64()(ptr::null_mut(), length, prot, libc::MAP_SHARED, file.as_raw_fd(), offset) };
    if there == libc::MAP_FAILED { Err(Errno::FAULT) } else { Ok(there as u64) }
}

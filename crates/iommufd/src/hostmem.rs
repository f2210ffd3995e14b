//! Memory by its address: the unsafe code of this crate, with `pages/copy.rs`, which uses it.
//!
//! Pinned pages are memory of this process that others write to at any time: the program, its threads, processes that
//! share it, devices. So nothing ever makes a reference to it. It is copied, or loaded and stored atomically, through
//! `vm-memory`'s [`VolatileSlice`].
#![allow(unsafe_code, reason = "memory that Rust does not own is reached by its address")]

use core::{fmt, sync::atomic::AtomicU32};
use std::os::fd::AsFd;

use rustix::mm::{
    Advice, MapFlags, MremapFlags, ProtFlags, madvise, mmap, mmap_anonymous, mremap, mremap_fixed, munmap,
};
use vm_memory::VolatileSlice;

use crate::{Errno, Result, domain::HostAddr};

/// A run of pinned pages that lie one after the other in this process's memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HostRun {
    /// Where the run begins; a multiple of the page size.
    pub start: HostAddr,
    /// How many pages it has; at least one.
    pub pages: u64,
}

/// Pages that somebody keeps in place. Dropping it unpins them.
///
/// The addresses may only change between [`PinObserver::moving`](crate::process::PinObserver::moving) and
/// [`moved`](crate::process::PinObserver::moved).
///
/// # Safety
///
/// Who implements it promises that what [`Self::run`] returns is memory of this process that is mapped readable, and
/// writable if it was pinned so, until the value is dropped or the pages move, and that it is nothing that Rust
/// code holds references to.
pub unsafe trait PinnedPages: Send + Sync + fmt::Debug {
    /// How many there are.
    fn pages(&self) -> u64;

    /// Where page `first` is now, and how many after it lie behind it without a gap. `first` is below [`Self::pages`].
    fn run(&self, first: u64) -> HostRun;

    /// Cuts off the pages from `at` on (neither 0 nor the number of pages), so that the two parts can be unpinned one
    /// after the other.
    fn split_off(&mut self, at: u64) -> Box<dyn PinnedPages>;
}

/// The `length` bytes at `start`, to be read and written in place.
///
/// # Safety
///
/// They lie in a run of a [`PinnedPages`], which is kept and whose pages do not move while the result lives. It is
/// written through only if they were pinned for writing.
pub unsafe fn bytes<'a>(start: HostAddr, length: usize) -> VolatileSlice<'a> {
    // SAFETY: needed because the memory belongs to another part of the program. Sound because the caller promises that it is
    // mapped for as long as the slice lives, and a volatile slice may be written to by others at any time.
    unsafe { VolatileSlice::new(pointer(start).cast(), length) }
}

/// Makes the pages of `length` bytes at `start` present, writable ones if `write`. EFAULT when one does not exist or
/// forbids that. Both are multiples of the page size.
pub(crate) fn populate(start: HostAddr, length: u64, write: bool) -> Result<()> {
    let advice = if write { Advice::LinuxPopulateWrite } else { Advice::LinuxPopulateRead };
    let length = usize::try_from(length).map_err(|_| Errno::FAULT)?;
    loop {
        // SAFETY: needed because only the kernel can say whether an address is good. Sound because it only makes pages present
        // as any access would, and refuses addresses that are not mapped.
        match unsafe { madvise(pointer(start), length, advice) } {
            Ok(()) => return Ok(()),
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(_) => return Err(Errno::FAULT),
        }
    }
}

/// A shared mapping of a file, from its start on.
#[derive(Debug)]
pub(crate) struct FileMapping {
    start: HostAddr,
    length: usize,
}

impl FileMapping {
    /// The first `length` bytes of `file`.
    pub(crate) fn new(file: impl AsFd, length: usize, writable: bool) -> Result<Self> {
        let prot = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        // SAFETY: needed because a mapping is made by address. Sound because the kernel chooses one that nothing is at.
        let start = unsafe {
            mmap(core::ptr::null_mut(), length, prot, MapFlags::SHARED | MapFlags::NORESERVE, file, 0)?
        };
        Ok(Self { start: HostAddr(start as u64), length })
    }

    /// Where it is.
    pub(crate) fn start(&self) -> HostAddr {
        self.start
    }

    /// How many bytes it has.
    pub(crate) fn length(&self) -> u64 {
        self.length as u64
    }

    /// The word at `offset`, a multiple of 4 in the mapping, which must be writable, and whose file must be as long.
    ///
    /// # Panics
    /// When the offset is none.
    pub(crate) fn word(&self, offset: usize) -> &AtomicU32 {
        assert!(
            offset.is_multiple_of(size_of::<u32>()) && offset < self.length,
            "byte {offset} of {}",
            self.length
        );
        // SAFETY: needed because the memory is shared with other processes. Sound because it is aligned and in the mapping,
        // which lives as long as `self`, and everybody can only write bytes there.
        unsafe { AtomicU32::from_ptr(pointer(self.start).cast::<u32>().byte_add(offset)) }
    }
}

impl Drop for FileMapping {
    fn drop(&mut self) {
        unmap(self.start, self.length as u64);
    }
}

/// What the largest pages are aligned to: they move only to addresses that are aligned as they were.
const HUGE: u64 = 2 << 20;

/// A place in the address space for `length` bytes that have to leave `from`, as far from the start of a huge page.
pub(crate) fn refuge(from: HostAddr, length: u64) -> Result<HostAddr> {
    let whole = length.checked_add(HUGE).ok_or(Errno::NOMEM)?;
    let size = usize::try_from(whole).map_err(|_| Errno::NOMEM)?;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: as in `FileMapping::new`.
    let start = unsafe { mmap_anonymous(core::ptr::null_mut(), size, ProtFlags::empty(), flags)? } as u64;
    let place = start + (from.0.wrapping_sub(start) % HUGE);
    for (start, end) in [(start, place), (place + length, start + whole)] {
        if start < end {
            unmap(HostAddr(start), end - start);
        }
    }
    Ok(HostAddr(place))
}

/// What is where pages were moved from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Behind {
    /// The same mapping, with new pages once they are touched. Not every mapping can stay.
    Mapping,
    /// That, or nothing. The first is better: no other thread is given the addresses before the program's own call
    /// has come to them.
    Anything,
}

/// Moves the pages of `length` bytes at `from`, which the program is about to give up, to `to`, which is a [`refuge`]. They
/// are the same pages there.
pub(crate) fn relocate(from: HostAddr, length: u64, to: HostAddr, behind: Behind) -> Result<()> {
    let length = usize::try_from(length).map_err(|_| Errno::NOMEM)?;
    let stay = MremapFlags::MAYMOVE | MremapFlags::DONTUNMAP;
    // SAFETY: needed because only the kernel can move a page. Sound because who calls has the word of the program that it
    // uses what is at `from` no more, and `to` holds nothing.
    let moved = unsafe { mremap_fixed(pointer(from), length, length, stay, pointer(to)) };
    if moved.is_ok() || behind == Behind::Mapping {
        return moved.map(|_| ());
    }
    // SAFETY: as above.
    unsafe { mremap_fixed(pointer(from), length, length, MremapFlags::MAYMOVE, pointer(to)) }?;
    Ok(())
}

/// Maps shared pages once more: where. EFAULT when they are not shared.
pub(crate) fn duplicate(from: HostAddr, length: u64) -> Result<HostAddr> {
    let length = usize::try_from(length).map_err(|_| Errno::FAULT)?;
    // SAFETY: needed because shared memory without a file can be mapped again in no other way. Sound because an old length of 0
    // leaves what is at `from` alone, and the kernel chooses an address that nothing is at.
    let there = unsafe { mremap(pointer(from), 0, length, MremapFlags::MAYMOVE) };
    there.map(|there| HostAddr(there as u64)).map_err(|_| Errno::FAULT)
}

/// Maps `length` bytes at `offset` of a file, shared: where.
pub(crate) fn map_shared(file: impl AsFd, offset: u64, length: u64, writable: bool) -> Result<HostAddr> {
    let length = usize::try_from(length).map_err(|_| Errno::FAULT)?;
    let prot = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
    // SAFETY: as in `FileMapping::new`.
    let there = unsafe { mmap(core::ptr::null_mut(), length, prot, MapFlags::SHARED, file, offset) };
    there.map(|there| HostAddr(there as u64)).map_err(|_| Errno::FAULT)
}

/// Unmaps what this crate has mapped.
pub(crate) fn unmap(start: HostAddr, length: u64) {
    // SAFETY: needed because a mapping is ended by address. Sound because who calls has made the mapping, and nothing refers
    // to it any more.
    let done = unsafe { munmap(pointer(start), length as usize) };
    debug_assert_eq!(done, Ok(()));
}

fn pointer(addr: HostAddr) -> *mut core::ffi::c_void {
    addr.0 as usize as *mut core::ffi::c_void
}

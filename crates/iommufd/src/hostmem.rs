//! Access to pinned memory by its address: the only unsafe code on the way of a DMA.
//!
//! Pinned pages are memory of this process that others write to at any time: the program, its threads, processes that
//! share it, devices. So nothing ever makes a reference to it. It is copied, or loaded and stored atomically, through
//! `vm-memory`'s [`VolatileSlice`].
#![allow(unsafe_code, reason = "memory that Rust does not own is reached by its address")]

use core::fmt;

use vm_memory::VolatileSlice;

use crate::domain::HostAddr;

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
    // A memory's address is as wide as a pointer.
    let start = start.0 as usize as *mut u8;
    // SAFETY: needed because the memory belongs to another part of the program. Sound because the caller promises that it is
    // mapped for as long as the slice lives, and a volatile slice may be written to by others at any time.
    unsafe { VolatileSlice::new(start, length) }
}

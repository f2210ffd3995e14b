//! Whose descriptors the table has: those of the process that the library's memory belongs to.
//!
//! A child of `vfork` (Python's `subprocess` makes such children, and shells do) runs in the memory of its parent, with a copy of its
//! descriptors. What it closes and duplicates until it executes another program is its own copy, and the table, which is the
//! parent's, must not follow. A child of `fork`, or of `clone` without libc's `fork`, has a copy of the memory, and the table in it
//! is its own.
//!
//! The two are told apart by a page that the kernel clears in each copy of the memory (MADV_WIPEONFORK): there is the
//! number of the process whose memory it is.

#![allow(unsafe_code, reason = "a page that the kernel clears is no static of Rust's")]

use core::{
    ptr,
    sync::atomic::{AtomicI32, Ordering},
};
use std::sync::OnceLock;

use rustix::mm::{Advice, MapFlags, ProtFlags};

const PAGE: usize = 4096;

/// The page; none where the kernel gave none.
static OWNER: OnceLock<Option<&'static AtomicI32>> = OnceLock::new();

fn make() -> Option<&'static AtomicI32> {
    let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
    // SAFETY: needed because the kernel clears whole pages of a mapping, so it must be one of its own. It is new memory,
    // where nothing else is.
    let page = unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), PAGE, prot, flags) }.ok()?;
    // SAFETY: as above: nothing is in it yet.
    let wiped = unsafe { rustix::mm::madvise(page, PAGE, Advice::LinuxWipeOnFork) };
    if wiped.is_err() {
        // SAFETY: it is the mapping from above, which nobody has.
        let _ = unsafe { rustix::mm::munmap(page, PAGE) };
        return None;
    }
    // SAFETY: the page is aligned, zero, which is a number, never unmapped, and used by this reference only; what the kernel
    // clears is the copy of a process that does not run yet.
    Some(unsafe { AtomicI32::from_ptr(page.cast()) })
}

/// Whether the calling process is the one whose memory this is, and not a child that borrows it.
pub(crate) fn is_caller() -> bool {
    let Some(owner) = OWNER.get_or_init(make) else { return true };
    let caller = rustix::process::getpid().as_raw_nonzero().get();
    match owner.compare_exchange(0, caller, Ordering::Relaxed, Ordering::Relaxed) {
        Ok(_) => true,
        Err(of) => of == caller,
    }
}

//! Backing stores: the pages that areas show.

use std::{os::fd::OwnedFd, sync::Arc};

use crate::{
    Errno, Result,
    account::Accounting,
    memory::Memory,
    process::{Process, UserAddr},
};

/// A span of memory that areas show, with the state of its pages. Areas of several address spaces may share it
/// ([`crate::ioas::Ioas::copy_from`]): a page is pinned once however many use it, and unpinned with the last of them.
#[derive(Debug)]
pub struct Pages {}

impl Pages {
    /// `length` bytes of a process's memory at `start`, which need not exist yet. EINVAL when `length` is 0, EOVERFLOW
    /// when it goes past the last address.
    pub fn user(
        process: Arc<dyn Process>,
        start: UserAddr,
        length: u64,
        writable: bool,
        accounting: Accounting,
    ) -> Result<Arc<Self>> {
        let _ = (process, start, length, writable, accounting);
        Err(Errno::NOSYS)
    }

    /// `length` bytes of a memory file from byte `start` on, counted with `process`. EINVAL when it is no memory file
    /// (memfd, hugetlb) or does not have them.
    pub fn file(
        process: Arc<dyn Process>,
        file: &OwnedFd,
        start: u64,
        length: u64,
        writable: bool,
        accounting: Accounting,
    ) -> Result<Arc<Self>> {
        let _ = (process, file, start, length, writable, accounting);
        Err(Errno::NOSYS)
    }

    /// `length` bytes of `memory` from byte `start` on that nobody accounts for: a dma-buf, a device's registers. Its
    /// owner may [revoke](Self::revoke) it.
    pub fn exported(memory: Arc<dyn Memory>, start: u64, length: u64, writable: bool) -> Result<Arc<Self>> {
        let _ = (memory, start, length, writable);
        Err(Errno::NOSYS)
    }

    /// Takes the memory away from all that use it: every domain loses it before this returns, and it cannot be pinned
    /// again (ENODEV). The areas stay, with nothing behind them.
    pub fn revoke(&self) {}

    /// Whether it may be written to.
    pub fn writable(&self) -> bool {
        false
    }
}

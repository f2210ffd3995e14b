//! Where the pages of a backing store come from.

use core::fmt;
use std::sync::{Arc, Weak};

use crate::{Result, hostmem::PinnedPages, process::PinObserver};

mod file;
mod user;

pub(crate) use file::FileMemory;
pub(crate) use user::UserMemory;

/// Memory that is pinned by page and copied by byte. Both count from the start of its first page.
pub trait Memory: Send + Sync + fmt::Debug {
    /// Pins pages. EFAULT when one is not there or forbids the access. Memory that never moves has no use for `observer`.
    fn pin(
        &self,
        first: u64,
        pages: u64,
        writable: bool,
        observer: Weak<dyn PinObserver>,
    ) -> Result<Box<dyn PinnedPages>>;

    /// Copies from pages that may or may not be pinned. EFAULT when they are not there.
    fn read(&self, offset: u64, to: &mut [u8]) -> Result<()>;

    /// Copies to them.
    fn write(&self, offset: u64, from: &[u8]) -> Result<()>;

    /// Whether pages that were pinned writable really are: a file may be sealed. Asked after they were pinned.
    fn may_write(&self) -> bool {
        true
    }
}

impl<M: Memory + ?Sized> Memory for Arc<M> {
    fn pin(
        &self,
        first: u64,
        pages: u64,
        writable: bool,
        observer: Weak<dyn PinObserver>,
    ) -> Result<Box<dyn PinnedPages>> {
        (**self).pin(first, pages, writable, observer)
    }

    fn read(&self, offset: u64, to: &mut [u8]) -> Result<()> {
        (**self).read(offset, to)
    }

    fn write(&self, offset: u64, from: &[u8]) -> Result<()> {
        (**self).write(offset, from)
    }
}

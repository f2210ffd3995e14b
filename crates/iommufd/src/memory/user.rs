//! A process's memory.

use std::sync::{Arc, Weak};

use super::Memory;
use crate::{
    Errno, Result,
    hostmem::PinnedPages,
    iova::PAGE_SIZE,
    process::{PinObserver, Process, UserAddr},
};

/// The memory of a process from an address on.
#[derive(Debug)]
pub(crate) struct UserMemory {
    process: Arc<dyn Process>,
    base: UserAddr,
}

impl UserMemory {
    /// From `base` on, which is a multiple of the page size.
    pub(crate) fn new(process: Arc<dyn Process>, base: UserAddr) -> Self {
        Self { process, base }
    }

    fn at(&self, offset: u64) -> Result<UserAddr> {
        self.base.0.checked_add(offset).map(UserAddr).ok_or(Errno::FAULT)
    }
}

impl Memory for UserMemory {
    fn pin(
        &self,
        first: u64,
        pages: u64,
        writable: bool,
        observer: Weak<dyn PinObserver>,
    ) -> Result<Box<dyn PinnedPages>> {
        let start = self.at(first.checked_mul(PAGE_SIZE).ok_or(Errno::FAULT)?)?;
        self.process.pin(start, pages, writable, observer)
    }

    fn read(&self, offset: u64, to: &mut [u8]) -> Result<()> {
        self.process.read(self.at(offset)?, to)
    }

    fn write(&self, offset: u64, from: &[u8]) -> Result<()> {
        self.process.write(self.at(offset)?, from)
    }
}

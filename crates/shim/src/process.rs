//! The memory of the program, in whose process we are: that of this process, with a faster way to what lies on the stack.

use std::{
    os::fd::OwnedFd,
    sync::{Arc, Weak},
};

use iommufd::{
    Result,
    account::Usage,
    domain::HostAddr,
    hostmem::PinnedPages,
    process::{LocalProcess, PageId, PinObserver, Process, UserAddr},
};

use crate::user;

/// This process's memory.
#[derive(Debug)]
pub(crate) struct ShimProcess {
    local: Arc<LocalProcess>,
}

impl ShimProcess {
    /// A process with nothing pinned.
    pub(crate) fn new() -> Self {
        Self { local: LocalProcess::separate() }
    }
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
        self.local.pin(start, pages, writable, observer)
    }

    fn page_id(&self, at: UserAddr) -> Result<PageId> {
        self.local.page_id(at)
    }

    fn host_page_id(&self, at: HostAddr) -> Result<PageId> {
        self.local.host_page_id(at)
    }

    fn pin_count(&self, at: UserAddr) -> Result<u64> {
        self.local.pin_count(at)
    }

    fn usage(&self) -> &Usage {
        self.local.usage()
    }

    fn locked_limit(&self) -> Option<u64> {
        self.local.locked_limit()
    }

    fn user(&self) -> u32 {
        self.local.user()
    }

    fn is(&self, other: &Arc<dyn Process>) -> bool {
        core::ptr::addr_eq(self, Arc::as_ptr(other))
    }

    fn file(&self, fd: i32) -> Result<OwnedFd> {
        self.local.file(fd)
    }
}

/// Closes a descriptor of the program's that it has not seen yet, or one of the library's whose owner is in another process.
#[allow(unsafe_code, reason = "closing a number")]
pub(crate) fn close(fd: i32) {
    // SAFETY: needed to take back what was given as a number. The caller has just made the descriptor for the program, which does
    // not know of it; or it is a copy that `fork` made, whose owner in Rust is never used again.
    unsafe { crate::real::close()(fd) };
}

//! This process: what a monitor that uses the crate as a library calls with.
//!
//! A user address is an address in this process, and pinned pages stay where they are: so whoever calls for itself must
//! not unmap memory that it has mapped for devices. Who cannot promise that, because it serves a program that it did not
//! write, calls [`vacate`] before the program unmaps anything.

use std::{
    os::fd::OwnedFd,
    sync::{Arc, OnceLock, Weak},
};

use rustix::process::{Resource, getrlimit, getuid};

use super::{PageId, PinObserver, Process, UserAddr};
use crate::{
    Errno, Result,
    account::Usage,
    domain::HostAddr,
    hostmem::{self, PinnedPages},
    iova::PAGE_SIZE,
};

pub(crate) mod copy;
mod descriptor;
pub(crate) mod maps;
pub(crate) mod pins;

pub use pins::{carry, forget, pinned, quiet, vacate, vacate_private};

/// This process.
#[derive(Debug, Default)]
pub struct LocalProcess {
    usage: Usage,
}

impl LocalProcess {
    /// The one that there is.
    pub fn get() -> Arc<Self> {
        static LOCAL: OnceLock<Arc<LocalProcess>> = OnceLock::new();
        LOCAL.get_or_init(Arc::default).clone()
    }

    /// Another one, which counts for itself: for tests, and for who keeps several programs in one process.
    pub fn separate() -> Arc<Self> {
        Arc::default()
    }
}

impl Process for LocalProcess {
    fn read(&self, from: UserAddr, to: &mut [u8]) -> Result<()> {
        copy::read(HostAddr(from.0), to)
    }

    fn write(&self, to: UserAddr, from: &[u8]) -> Result<()> {
        copy::write(HostAddr(to.0), from)
    }

    fn pin(
        &self,
        start: UserAddr,
        pages: u64,
        writable: bool,
        observer: Weak<dyn PinObserver>,
    ) -> Result<Box<dyn PinnedPages>> {
        let start = HostAddr(start.0);
        let pin = pins::pin(start, pages, Some(observer))?;
        if writable {
            hostmem::populate(start, pages * PAGE_SIZE, true)?;
        } else {
            present_for_reading(start, pages)?;
        }
        Ok(Box::new(pin))
    }

    fn page_id(&self, at: UserAddr) -> Result<PageId> {
        maps::page_id(HostAddr(at.0))
    }

    fn host_page_id(&self, at: HostAddr) -> Result<PageId> {
        maps::page_id(at)
    }

    fn pin_count(&self, at: UserAddr) -> Result<u64> {
        maps::pin_count(HostAddr(at.0))
    }

    fn usage(&self) -> &Usage {
        &self.usage
    }

    fn locked_limit(&self) -> Option<u64> {
        getrlimit(Resource::Memlock).current.map(|bytes| bytes / PAGE_SIZE)
    }

    fn user(&self) -> u32 {
        getuid().as_raw()
    }

    fn is(&self, other: &Arc<dyn Process>) -> bool {
        core::ptr::addr_eq(self, Arc::as_ptr(other))
    }

    fn file(&self, fd: i32) -> Result<OwnedFd> {
        descriptor::duplicate(fd)
    }
}

/// Makes pages present that are pinned for reading. Private pages become the process's own, as the kernel's long-term pins
/// make them: so that a later write to them does not put another page in their place.
fn present_for_reading(start: HostAddr, pages: u64) -> Result<()> {
    let end = start.0.checked_add(pages.checked_mul(PAGE_SIZE).ok_or(Errno::FAULT)?).ok_or(Errno::FAULT)?;
    let mut at = start.0;
    for mapping in maps::mappings(start, end)? {
        let (from, to) = (mapping.start.max(at), mapping.end.min(end));
        if from > at {
            return Err(Errno::FAULT);
        }
        let own = mapping.private() && mapping.writable();
        // Memory that may only be written to can be pinned nevertheless.
        hostmem::populate(HostAddr(from), to - from, own || !mapping.readable())?;
        if mapping.private() && !mapping.writable() {
            copy::unshare(HostAddr(from), to)?;
        }
        at = to;
    }
    if at < end { Err(Errno::FAULT) } else { Ok(()) }
}

//! Guest RAM as the process that address spaces take their pages from.
//!
//! A user address is where guest RAM is in this process, and pinning costs nothing: RAM is mapped for as long as the machine
//! exists, and nobody moves it. No limit applies, because RAM is not locked: pages that nobody touched
//! are not there, as ever.

#![allow(unsafe_code, reason = "who gives out pinned pages promises that they stay")]

use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

use cpu::GuestRam;
use iommufd::account::Usage;
use iommufd::domain::HostAddr;
use iommufd::hostmem::{HostRun, PinnedPages};
use iommufd::iova::PAGE_SIZE;
use iommufd::process::{PageId, PinObserver, Process, UserAddr};
use iommufd::{Errno, Result};
use vm_memory::{Bytes, GuestAddress};

use crate::dma::{Place, places};

/// A machine's RAM.
#[derive(Debug)]
pub(super) struct GuestProcess {
    ram: Arc<GuestRam>,
    places: Vec<Place>,
    usage: Usage,
    user: u32,
}

impl GuestProcess {
    pub(super) fn new(ram: Arc<GuestRam>) -> Self {
        let places = places(&ram);
        // Asked now: later a filter may be in the way.
        let user = rustix::process::getuid().as_raw();
        Self { ram, places, usage: Usage::default(), user }
    }

    /// Where `length` bytes at `at` are in the guest. EFAULT when they are not RAM.
    fn find(&self, at: UserAddr, length: u64) -> Result<GuestAddress> {
        let found = self.places.iter().find_map(|place| place.physical(at.0, length));
        found.map(GuestAddress).ok_or(Errno::FAULT)
    }
}

/// Pages of guest RAM.
#[derive(Debug)]
struct RamPages {
    /// Keeps them mapped.
    ram: Arc<GuestRam>,
    start: HostAddr,
    pages: u64,
}

// SAFETY: needed because whoever gets the addresses accesses them without asking again. They lie in RAM, which was checked when
// this was made, `ram` keeps it mapped readable and writable, and guest RAM is only accessed by volatile
// slices and atomics: the guest's processors write to it at any time.
unsafe impl PinnedPages for RamPages {
    fn pages(&self) -> u64 {
        self.pages
    }

    fn run(&self, first: u64) -> HostRun {
        HostRun { start: HostAddr(self.start.0 + first * PAGE_SIZE), pages: self.pages - first }
    }

    fn split_off(&mut self, at: u64) -> Box<dyn PinnedPages> {
        let start = HostAddr(self.start.0 + at * PAGE_SIZE);
        let rest = Self { ram: Arc::clone(&self.ram), start, pages: self.pages - at };
        self.pages = at;
        Box::new(rest)
    }
}

impl Process for GuestProcess {
    fn read(&self, from: UserAddr, to: &mut [u8]) -> Result<()> {
        let at = self.find(from, to.len() as u64)?;
        self.ram.read_slice(to, at).map_err(|_| Errno::FAULT)
    }

    fn write(&self, to: UserAddr, from: &[u8]) -> Result<()> {
        let at = self.find(to, from.len() as u64)?;
        self.ram.write_slice(from, at).map_err(|_| Errno::FAULT)
    }

    fn pin(
        &self,
        start: UserAddr,
        pages: u64,
        _writable: bool,
        _observer: Weak<dyn PinObserver>,
    ) -> Result<Box<dyn PinnedPages>> {
        let length = pages.checked_mul(PAGE_SIZE).ok_or(Errno::FAULT)?;
        if pages == 0 || !start.0.is_multiple_of(PAGE_SIZE) {
            return Err(Errno::INVAL);
        }
        self.find(start, length)?;
        Ok(Box::new(RamPages { ram: Arc::clone(&self.ram), start: HostAddr(start.0), pages }))
    }

    fn page_id(&self, at: UserAddr) -> Result<PageId> {
        self.find(at, 1).map(|at| PageId::Private(at.0 / PAGE_SIZE))
    }

    fn host_page_id(&self, at: HostAddr) -> Result<PageId> {
        self.page_id(UserAddr(at.0))
    }

    /// Nobody counts.
    fn pin_count(&self, at: UserAddr) -> Result<u64> {
        self.find(at, 1).map(|_| 0)
    }

    fn usage(&self) -> &Usage {
        &self.usage
    }

    fn locked_limit(&self) -> Option<u64> {
        None
    }

    fn user(&self) -> u32 {
        self.user
    }

    fn is(&self, other: &Arc<dyn Process>) -> bool {
        std::ptr::addr_eq(self, Arc::as_ptr(other))
    }

    /// A guest has no descriptors.
    fn file(&self, _fd: i32) -> Result<OwnedFd> {
        Err(Errno::BADF)
    }
}

//! What is known of the guest's tables: a software IOMMU's table for each domain, filled from them when a device misses something.
//!
//! Devices read it without locks, as any [`SoftDomain`]. Only what the guest's tables allow is entered, so nothing has to be
//! forgotten when the guest maps, and [`Domain::sync`] is what an invalidation waits for. Who fills holds the domain's lock
//! from before it looks at the guest's table until it has entered what it found, and who invalidates takes it: so what was looked at
//! before an invalidation is entered before it, and removed by it.
//!
//! A device that fills is inside a section, so it must never wait for sections. It does not, but the table it fills does when too much
//! was taken out of it since somebody waited: so a device replaces a limited number of pages between two invalidations.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cpu::GuestRam;
use iommufd::Errno;
use iommufd::domain::{Domain, HostAddr, Prot};
use iommufd::iova::{Iova, IovaRange, PAGE_SIZE};
use iommufd::soft::{Access, SoftDomain};

use super::context::Table;
use super::faults::Reason;
use super::walk::walk;
use crate::dma::{self, Place};
use crate::iommu::interrupts;

/// How many pages are replaced by others between two invalidations: a quarter of what a table keeps. A guest that tells of its changes
/// replaces none.
const REPLACEMENTS: u32 = 1024;

/// Why nothing could be entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Miss {
    /// The guest's tables do not allow it.
    Fault(Reason),
    /// They lead to where there is no memory, as a device's registers: the access fails, but the translation has not.
    NoMemory,
}

/// Where guest RAM is: what tables lead to.
#[derive(Debug)]
pub(super) struct Memory {
    pub(super) ram: Arc<GuestRam>,
    places: Vec<Place>,
}

impl Memory {
    pub(super) fn new(ram: &Arc<GuestRam>) -> Self {
        Self { ram: Arc::clone(ram), places: dma::places(ram) }
    }

    /// A domain in which everything lies at its physical address.
    pub(super) fn whole(&self) -> Result<SoftDomain, Errno> {
        let domain = SoftDomain::new();
        for place in &self.places {
            domain.map(Iova(place.physical), HostAddr(place.host), place.len, Prot::READ | Prot::WRITE)?;
        }
        Ok(domain)
    }

    /// Where `length` bytes are in this process, if they are memory as a whole.
    fn host(&self, physical: u64, length: u64) -> Option<HostAddr> {
        self.places.iter().find_map(|place| {
            let offset = physical.checked_sub(place.physical)?;
            (offset.checked_add(length)? <= place.len).then(|| HostAddr(place.host + offset))
        })
    }
}

/// The translations of a table that are known.
#[derive(Debug)]
pub(super) struct Cached {
    pub(super) table: Table,
    pub(super) domain: SoftDomain,
    entered: Mutex<Entered>,
}

/// What was entered, in short.
#[derive(Debug)]
struct Entered {
    /// The size of the largest page since everything was removed.
    largest: u64,
    /// Pages that took the place of others since the last invalidation.
    replaced: u32,
}

impl Cached {
    pub(super) fn new(table: Table) -> Arc<Self> {
        Arc::new(Self {
            table,
            domain: SoftDomain::new(),
            entered: Mutex::new(Entered { largest: PAGE_SIZE, replaced: 0 }),
        })
    }

    fn entered(&self) -> MutexGuard<'_, Entered> {
        self.entered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters the page in which `iova` is, if the guest's table allows the access.
    pub(super) fn fill(&self, memory: &Memory, iova: Iova, access: Access) -> Result<(), Miss> {
        if interrupts().is_ok_and(|range| range.contains(iova)) {
            // Interrupt requests are not translated.
            return Err(Miss::NoMemory);
        }
        let mut entered = self.entered();
        let page = walk(&memory.ram, self.table, iova.0, access).map_err(Miss::Fault)?;
        let offset = (iova.0 - page.start) & !(PAGE_SIZE - 1);
        let whole = memory.host(page.physical, page.size).map(|host| (page.start, host, page.size));
        let small =
            || Some((page.start + offset, memory.host(page.physical + offset, PAGE_SIZE)?, PAGE_SIZE));
        let (start, host, size) = whole.or_else(small).ok_or(Miss::NoMemory)?;
        let range = IovaRange::with_length(Iova(start), size).map_err(|_| Miss::NoMemory)?;
        entered.largest = size.max(entered.largest);
        if self.domain.map(Iova(start), host, size, page.prot).is_err() {
            entered.replaced += 1;
            if entered.replaced > REPLACEMENTS {
                return Err(Miss::NoMemory);
            }
            // The guest has more pages there now, or allows more. What there was is still allowed until the guest
            // invalidates it, so nobody waits.
            self.domain.unmap(range);
            self.domain.map(Iova(start), host, size, page.prot).map_err(|_| Miss::NoMemory)?;
        }
        Ok(())
    }

    /// Removes what is known of a range, and of all pages that reach into it; of everything without a range. Nobody uses it when this
    /// returns.
    pub(super) fn invalidate(&self, range: Option<(u64, u64)>) {
        {
            let mut entered = self.entered();
            entered.replaced = 0;
            let range = match range {
                Some((first, size)) => {
                    let around = size.max(entered.largest);
                    IovaRange::with_length(Iova(first & !(around - 1)), around).unwrap_or(IovaRange::ALL)
                }
                None => {
                    entered.largest = PAGE_SIZE;
                    IovaRange::ALL
                }
            };
            self.domain.unmap(range);
        }
        self.domain.sync();
    }
}

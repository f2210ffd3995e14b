//! A guest's page table as a nested HWPT, and the IOTLB in front of it.
//!
//! # Theory of operation
//!
//! The IOTLB is a [`Table`] as domains have one, from the guest's device addresses to this process's memory, so devices read it
//! without a lock. Who finds nothing there walks the guest's table: each entry is loaded from the guest's memory, which the
//! parent domain translates, and the page that comes out is translated by the parent as well. The result is entered.
//!
//! It must not be entered when it was invalidated while the walk was under way. So a walk begins by reading the IOTLB's
//! generation, and [`Table::cache`] refuses what began in an earlier one. What was found and not entered is used all the same,
//! until the section ends that it was found in; an invalidation is complete when the sections that were open have ended.
//! The same holds for what the parent loses: the IOTLB is its dependent ([`SoftDomain::add_dependent`]).
//!
//! Only what is there is cached (caching mode 0), so a guest need not invalidate what it adds. A cached page that does not
//! allow an access is looked for again, so it need not invalidate either what it makes writable.
//!
//! While the parent notes writes, a page is entered for writing only when it is written to, because the parent has to see
//! the first write; the parent drops what was entered whenever it forgets what was written to.
//!
//! Addresses of interrupt requests are never translated, whatever the table has there (VT-d 3.14). So nothing is entered that
//! has some of them in it.
//!
//! The IOTLB has a limit. What fills it is dropped as a whole by the device that finds it full, when it leaves its section.

#![allow(unsafe_code, reason = "what is memory in the parent is memory in the IOTLB")]

use core::{
    any::Any,
    fmt,
    sync::atomic::{AtomicBool, Ordering},
};
use std::sync::{Arc, Weak};

use super::{stage::Stage, unit::Unit};
use crate::{
    Errno, Result,
    caller::Caller,
    domain::{HostAddr, Prot},
    hardware::{Entries, Nested},
    iova::{Iova, PAGE_SIZE},
    soft::{
        Access, FaultReason, SoftDevice, Translation,
        domain::SoftDomain,
        section::{Reader, Section},
        table::{Cached, LAST_ADDRESS, Table},
    },
};

/// How many nodes an IOTLB may have: 64 MiB of them.
pub(super) const LIMIT: usize = 16 << 10;
/// The sizes that a walk is entered in, largest first.
const SIZES: [u64; 3] = [1 << 30, 2 << 20, PAGE_SIZE];
/// Addresses of interrupt requests: the first, and the first past them.
const INTERRUPTS: [u64; 2] = [0xfee0_0000, 0xfef0_0000];

/// A guest's page table.
pub(in crate::soft) struct GuestTable {
    unit: Arc<Unit>,
    domain: u16,
    stage: Stage,
    parent: SoftDomain,
    iotlb: Arc<Table>,
    /// A walk found no room.
    full: AtomicBool,
}

impl fmt::Debug for GuestTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestTable")
            .field("domain", &self.domain)
            .field("stage", &self.stage)
            .finish_non_exhaustive()
    }
}

impl GuestTable {
    pub(super) fn new(unit: &Arc<Unit>, parent: &SoftDomain, domain: u16, stage: Stage) -> Arc<Self> {
        let iotlb = Table::new();
        parent.add_dependent(&iotlb);
        Arc::new(Self {
            unit: Arc::clone(unit),
            domain,
            stage,
            parent: parent.clone(),
            iotlb,
            full: AtomicBool::new(false),
        })
    }

    pub(super) fn domain(&self) -> u16 {
        self.domain
    }

    pub(in crate::soft) fn unit(&self) -> &Arc<Unit> {
        &self.unit
    }

    /// A reader of the IOTLB.
    pub(in crate::soft) fn reader(&self) -> Reader {
        self.iotlb.reader()
    }

    /// A reader of the parent, for [`Self::walk`].
    pub(in crate::soft) fn parent_reader(&self) -> Reader {
        self.parent.reader()
    }

    /// Forgets translations. [`Self::sync`] has to follow.
    pub(super) fn invalidate(&self, first: u64, last: u64) {
        if first <= LAST_ADDRESS {
            self.iotlb.invalidate(first, last.min(LAST_ADDRESS));
        }
    }

    /// Waits until nobody uses what was forgotten.
    pub(super) fn sync(&self) {
        self.iotlb.sync();
    }

    /// Walks the guest's table for what the IOTLB has not: the translation, and whether it is memory that may be accessed by
    /// its address, both good until `_within`, a section of the IOTLB, ends.
    pub(in crate::soft) fn walk(
        &self,
        _within: &Section<Reader>,
        parent: &mut Reader,
        iova: Iova,
        access: Access,
    ) -> core::result::Result<(Translation, bool), FaultReason> {
        let [interrupts, behind] = INTERRUPTS;
        if (interrupts..behind).contains(&iova.0) {
            return Err(FaultReason::Interrupt);
        }
        let generation = self.iotlb.generation();
        let tracked = self.parent.tracks_writes();
        let needed = match access {
            Access::Read => Prot::READ,
            Access::Write => Prot::WRITE,
        };
        let section = parent.section();
        let moving = |reason, otherwise| if reason == FaultReason::Moving { reason } else { otherwise };
        let leaf = self.stage.walk(iova.0, |at| {
            let entry = section.load::<u64>(Iova(at), Ordering::Acquire);
            entry.map(u64::from_le).map_err(|fault| moving(fault.reason, FaultReason::Table))
        })?;
        if !leaf.prot.contains(needed) {
            return Err(FaultReason::Permission);
        }
        let at = leaf.address + iova.0 % leaf.size;
        let (found, memory) =
            section.look(Iova(at), access).map_err(|fault| moving(fault.reason, FaultReason::Target))?;

        // The largest piece that lies together in the parent as well.
        // Looking notes a write, so that while writes are noted only the page itself is looked at.
        let most = if tracked { PAGE_SIZE } else { leaf.size };
        let whole = SIZES.into_iter().filter(|size| *size <= most).find_map(|size| {
            let offset = iova.0 % size;
            let first = iova.0 - offset;
            if first < behind && interrupts < first + size {
                return None;
            }
            let host = found.host.0.checked_sub(offset)?;
            let (base, is_memory) = section.look(Iova(at - offset), access).ok()?;
            let together = base.length >= size && base.host.0 == host && is_memory == memory;
            together.then_some((size, offset, HostAddr(host)))
        });
        let mut prot = leaf.prot & found.prot;
        if tracked && access == Access::Read {
            prot.remove(Prot::WRITE);
        }
        let in_leaf = leaf.size - iova.0 % leaf.size;
        let before_interrupts = interrupts.checked_sub(iova.0).unwrap_or(in_leaf);
        let length = found.length.min(in_leaf).min(before_interrupts);
        let found = Translation { length, prot, ..found };
        let Some((size, offset, host)) = whole else { return Ok((found, memory)) };
        // SAFETY: needed because devices access what they find by its address. Sound because the parent's leaf is memory, in all
        // of `size`, until the parent loses it and is synchronized; it invalidates the IOTLB first and synchronizes it
        // with itself, and what it lost before `generation` was read the section did not find.
        let cached =
            unsafe { self.iotlb.cache(generation, LIMIT, Iova(iova.0 - offset), host, size, prot, memory) };
        if cached == Cached::Full {
            self.full.store(true, Ordering::Relaxed);
        }
        Ok((found, memory))
    }

    #[cfg(test)]
    pub(super) fn iotlb_nodes(&self) -> usize {
        self.iotlb.nodes()
    }

    /// Makes room, if that lacks. Called outside of sections; it does not wait for those of others.
    pub(in crate::soft) fn tidy(&self) {
        if self.full.load(Ordering::Relaxed) && self.full.swap(false, Ordering::Relaxed) {
            self.iotlb.invalidate(0, LAST_ADDRESS);
            self.iotlb.try_sync();
        }
    }
}

/// A guest's page table, for its object.
#[derive(Debug)]
pub(in crate::soft) struct NestedTable {
    table: Arc<GuestTable>,
}

impl NestedTable {
    pub(super) fn new(table: Arc<GuestTable>) -> Self {
        Self { table }
    }

    /// What `device` is attached to when it is attached to this, and by what id the guest knows the device. EINVAL when it does
    /// not know it.
    pub(in crate::soft) fn attach(&self, device: &SoftDevice) -> Result<(Arc<GuestTable>, u16)> {
        let source = self.table.unit.source(device).ok_or(Errno::INVAL)?;
        Ok((Arc::clone(&self.table), source))
    }
}

impl Nested for NestedTable {
    /// EOPNOTSUPP: a guest's invalidations name domains, not page tables, so they are the vIOMMU's.
    fn invalidate(&self, _caller: &dyn Caller, _entries: Entries, _done: &mut u32) -> Result<()> {
        Err(Errno::OPNOTSUPP)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// The tables of a vIOMMU, as far as they are there.
#[derive(Debug, Default)]
pub(super) struct Tables(Vec<Weak<GuestTable>>);

impl Tables {
    pub(super) fn add(&mut self, table: &Arc<GuestTable>) {
        self.0.retain(|table| table.strong_count() > 0);
        self.0.push(Arc::downgrade(table));
    }

    /// Those of a domain; of all when there is none.
    pub(super) fn of(&self, domain: Option<u16>) -> Vec<Arc<GuestTable>> {
        let tables = self.0.iter().filter_map(Weak::upgrade);
        tables.filter(|table| domain.is_none_or(|domain| table.domain() == domain)).collect()
    }
}

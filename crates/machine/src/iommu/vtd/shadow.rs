//! The guest's page tables, carried over to the host's IOMMU for devices of the host.
//!
//! # Theory of operation
//!
//! A device of the host translates by the host's page tables, which know nothing of the guest's. So each table that such a device
//! is attached to has an IOAS (a *shadow*), whose domain is the host's; what the table maps is mapped there. The unit tells the
//! guest that it caches what is not present (caching mode, VT-d 6.1), so the guest invalidates whatever it changes. A shadow
//! is made by looking at the whole table, and looked at again where the guest invalidates: what is not the same any more is
//! unmapped, and then what is new is mapped, before the guest is told that its invalidation is done.
//!
//! What the host does not map, as when it has no room for more mappings, the device does not reach: VT-d has no way to refuse
//! a page to a guest. It is logged. A table may be its own, and have more pages than there are addresses; so of each
//! invalidation a limited number of entries is looked at, and what lies behind is not mapped.
//!
//! Shadows change under one lock, which no device's thread takes.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use cpu::GuestRam;
use iommufd::domain::Prot;
use iommufd::iova::{Iova, IovaRange};
use iommufd::process::{Process, UserAddr};
use iommufd::soft::FaultReason;
use iommufd::soft::vtd::{IotlbScope, Leaf, Stage};
use iommufd::{BoundDevice, Context, Errno};
use vm_memory::{Bytes, GuestAddress};

use super::context::{Table, Target};
use crate::dma::{self, Place};
use crate::iommu::interrupts;
use crate::layout;
use crate::vcpu::lock;
use crate::writes::{Exposed, Run, What};

/// Entries that one invalidation looks at, and the most that a shadow has mapped: of 4 GiB in pages.
const MOST_ENTRIES: usize = if cfg!(test) { 1 << 12 } else { 1 << 20 };

/// A device of the host, as far as shadows have to do with it.
#[derive(Debug)]
pub(super) struct HostDevice {
    pub(super) device: BoundDevice,
    /// What it writes to.
    pub(super) exposed: Arc<Exposed>,
}

/// All shadows of a unit.
#[derive(Debug)]
pub(super) struct Shadows {
    ram: Arc<GuestRam>,
    context: Arc<Context>,
    process: Arc<dyn Process>,
    places: Vec<Place>,
    /// The IOAS in which RAM lies at its physical addresses.
    whole: u32,
    shadows: Mutex<BTreeMap<Table, Shadow>>,
}

/// A table that devices of the host are attached to.
#[derive(Debug)]
struct Shadow {
    stage: Stage,
    ioas: u32,
    /// What the host has: by where it is mapped, what is memory of the table's pages.
    mapped: BTreeMap<u64, Leaf>,
    /// What the devices in it write to.
    exposed: Vec<Arc<Exposed>>,
}

fn run(leaf: &Leaf) -> Option<Run> {
    leaf.prot.contains(Prot::WRITE).then_some(Run { physical: leaf.address, length: leaf.size })
}

impl Shadows {
    /// None. `whole` is the IOAS of guest RAM in `context`.
    pub(super) fn new(
        ram: &Arc<GuestRam>,
        context: &Arc<Context>,
        process: &Arc<dyn Process>,
        whole: u32,
    ) -> Self {
        Self {
            ram: Arc::clone(ram),
            context: Arc::clone(context),
            process: Arc::clone(process),
            places: dma::places(ram),
            whole,
            shadows: Mutex::default(),
        }
    }

    /// Attaches a device that is attached to nothing.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn attach(&self, host: &HostDevice, to: Target) -> Result<(), Errno> {
        let Target::Table(table) = to else {
            host.device.attach(None, self.whole)?;
            host.exposed.change(What::All);
            return Ok(());
        };
        let mut shadows = lock(&self.shadows);
        let shadow = match shadows.entry(table) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => place.insert(self.shadow(table)?),
        };
        // The host's page table is made, and filled, with this.
        let attached = host.device.attach(None, shadow.ioas).map(drop);
        if attached.is_ok() {
            let runs = shadow.mapped.iter().filter_map(|(at, leaf)| Some((*at, run(leaf)?)));
            host.exposed.change(What::Runs(runs.collect()));
            shadow.exposed.push(Arc::clone(&host.exposed));
        } else {
            self.collect(&mut shadows, table);
        }
        attached
    }

    /// Attaches it to nothing. It uses nothing of what it was attached to when this returns.
    pub(super) fn detach(&self, host: &HostDevice, from: Target) {
        host.device.detach(None);
        host.exposed.change(What::Runs(BTreeMap::new()));
        if let Target::Table(table) = from {
            let mut shadows = lock(&self.shadows);
            if let Some(shadow) = shadows.get_mut(&table) {
                shadow.exposed.retain(|exposed| !Arc::ptr_eq(exposed, &host.exposed));
            }
            self.collect(&mut shadows, table);
        }
    }

    /// How many there are.
    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        lock(&self.shadows).len()
    }

    /// Ends a shadow that no device is attached to.
    fn collect(&self, shadows: &mut BTreeMap<Table, Shadow>, table: Table) {
        if shadows.get(&table).is_some_and(|shadow| shadow.exposed.is_empty())
            && let Some(shadow) = shadows.remove(&table)
            && let Err(errno) = self.context.destroy(shadow.ioas)
        {
            tracing::warn!(%errno, ?table, "an address space of the guest's is still in use");
        }
    }

    fn shadow(&self, table: Table) -> Result<Shadow, Errno> {
        let stage = Stage::new(table.root, 12 + 9 * u32::from(table.levels), layout::PHYS_BITS);
        let stage = stage.ok_or(Errno::INVAL)?;
        let ioas = self.context.ioas_alloc()?;
        let mut shadow = Shadow { stage, ioas, mapped: BTreeMap::new(), exposed: Vec::new() };
        self.look(&mut shadow, 0, u64::MAX);
        Ok(shadow)
    }

    /// Looks again at tables that the guest has changed. Devices have what it mapped, and have not what it unmapped, when this
    /// returns.
    pub(super) fn look_again(&self, scope: IotlbScope) {
        let (wanted, first, last) = match scope {
            IotlbScope::Global => (None, 0, u64::MAX),
            IotlbScope::Domain(domain) => (Some(domain), 0, u64::MAX),
            IotlbScope::Pages { domain, first, last } => (Some(domain), first, last),
        };
        for (table, shadow) in &mut *lock(&self.shadows) {
            if wanted.is_none_or(|domain| domain == table.domain) {
                self.look(shadow, first, last);
            }
        }
    }

    /// Makes a shadow have what its table has from `first` to `last`.
    fn look(&self, shadow: &mut Shadow, first: u64, last: u64) {
        let (first, last) = shadow.widen(first, last);
        let pages = shadow.stage.pages(first, last, MOST_ENTRIES, |at| {
            let entry = self.ram.load::<u64>(GuestAddress(at), Ordering::Acquire);
            entry.map(u64::from_le).map_err(|_| FaultReason::Table)
        });
        if let Some(at) = pages.unseen {
            tracing::warn!(at, last, "the guest's page table has more than is carried over to the host");
        }
        // A page may be larger than the range.
        let first = pages.found.first().map_or(first, |(at, _)| first.min(*at));
        let last = pages.found.last().map_or(last, |(at, leaf)| last.max(at + (leaf.size - 1)));
        let now: BTreeMap<u64, Leaf> =
            pages.found.into_iter().flat_map(|(at, leaf)| self.in_memory(at, leaf)).collect();
        let gone: Vec<(u64, Leaf)> = shadow
            .mapped
            .range(first..=last)
            .filter(|(at, leaf)| now.get(*at) != Some(leaf))
            .map(|(at, leaf)| (*at, *leaf))
            .collect();
        self.unmap(shadow, &gone);
        for (at, leaf) in now {
            if shadow.mapped.contains_key(&at) {
                continue;
            }
            if let Err(errno) = self.map(shadow, at, leaf) {
                tracing::warn!(at, size = leaf.size, %errno, "the host does not map what the guest has mapped");
                // There is no room for the others, either.
                break;
            }
        }
    }

    /// What of a page is guest memory: at the other addresses of it devices find nothing.
    fn in_memory(&self, at: u64, leaf: Leaf) -> impl Iterator<Item = (u64, Leaf)> {
        self.places.iter().filter_map(move |place| {
            let start = leaf.address.max(place.physical);
            let end = (leaf.address + leaf.size).min(place.physical + place.len);
            let size = end.checked_sub(start).filter(|size| *size > 0)?;
            Some((at + (start - leaf.address), Leaf { address: start, size, ..leaf }))
        })
    }

    fn unmap(&self, shadow: &mut Shadow, gone: &[(u64, Leaf)]) {
        // Those that lie together go together.
        for together in gone.chunk_by(|(at, leaf), (next, _)| at + leaf.size == *next) {
            let ends = together.first().zip(together.last());
            let range = ends.and_then(|((first, _), (last, leaf))| {
                IovaRange::new(Iova(*first), Iova(last + (leaf.size - 1))).ok()
            });
            let Some(range) = range else { continue };
            if let Err(errno) = self.context.ioas_unmap(shadow.ioas, range) {
                tracing::error!(?range, %errno, "what the guest unmapped stays mapped");
            }
        }
        for (at, leaf) in gone {
            shadow.mapped.remove(at);
            if run(leaf).is_some() {
                shadow.exposed.iter().for_each(|exposed| exposed.remove(*at));
            }
        }
    }

    /// What lies where messages of interrupts go is left out, as by hardware, and what the host's IOMMU cannot translate.
    fn map(&self, shadow: &mut Shadow, at: u64, leaf: Leaf) -> Result<(), Errno> {
        if shadow.mapped.len() >= MOST_ENTRIES {
            return Err(Errno::NOSPC);
        }
        let from = self.places.iter().find_map(|place| place.host(leaf.address, leaf.size));
        let from = from.map(UserAddr).ok_or(Errno::FAULT)?;
        let range = IovaRange::with_length(Iova(at), leaf.size)?;
        if interrupts()?.intersection(range).is_some() {
            return Ok(());
        }
        let (context, to) = (&self.context, Some(range.start()));
        match context.ioas_map(shadow.ioas, &self.process, from, leaf.size, to, leaf.prot) {
            Ok(_) => {}
            Err(Errno::INVAL) => {
                tracing::debug!(?range, "the host's IOMMU cannot translate what the guest has mapped");
                return Ok(());
            }
            Err(errno) => return Err(errno),
        }
        shadow.mapped.insert(at, leaf);
        if let Some(run) = run(&leaf) {
            shadow.exposed.iter().for_each(|exposed| exposed.add(at, run));
        }
        Ok(())
    }
}

impl Shadow {
    /// The range, and all of the pages that have a part of it.
    fn widen(&self, first: u64, last: u64) -> (u64, u64) {
        let end = |(at, leaf): (&u64, &Leaf)| at + (leaf.size - 1);
        let before = self.mapped.range(..=first).next_back();
        let first = before.filter(|page| end(*page) >= first).map_or(first, |(at, _)| *at);
        let last = self.mapped.range(first..=last).next_back().map_or(last, |page| end(page).max(last));
        (first, last)
    }
}

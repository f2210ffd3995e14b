//! Accesses: who reads the map without a page table.

use std::sync::{Arc, MutexGuard, PoisonError, Weak};

use super::Ioas;
use crate::{
    Errno, Result, inject,
    iova::{IovaRange, PAGE_SIZE},
};

/// What an access does for the address space that it pins pages of.
pub trait AccessOps: Send + Sync {
    /// `range` is being unmapped: every [`Pinned`](super::Pinned) of this access that has a part of it must be dropped before
    /// this returns. Ranges come that it never pinned, and one range comes several times if it must.
    ///
    /// It is called with no lock held, by the thread that unmaps.
    fn unmap(&self, range: IovaRange);
}

/// An access that was registered with [`Ioas::add_access`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct AccessId(u64);

#[derive(Default)]
pub(super) struct Accesses {
    next: u64,
    registered: Vec<Registered>,
}

struct Registered {
    id: AccessId,
    ops: Weak<dyn AccessOps>,
    alignment: u64,
}

impl core::fmt::Debug for Accesses {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_set().entries(self.registered.iter().map(|access| access.id)).finish()
    }
}

impl Ioas {
    /// Registers who will pin pages. What is mapped must be aligned to `alignment` (a power of two up to the page size)
    /// from now on: the page size for who pins, 1 for who only copies. EINVAL for another one, EADDRINUSE when an area is
    /// not aligned.
    pub fn add_access(&self, ops: Weak<dyn AccessOps>, alignment: u64) -> Result<AccessId> {
        if !alignment.is_power_of_two() || alignment > PAGE_SIZE {
            return Err(Errno::INVAL);
        }
        inject::check()?;
        let _domains = self.read_domains();
        let mut areas = self.write_areas();
        let needed = areas.alignment.max(alignment);
        areas.set_alignment(needed)?;
        let mut accesses = self.accesses();
        accesses.next += 1;
        let id = AccessId(accesses.next);
        accesses.registered.push(Registered { id, ops, alignment });
        Ok(id)
    }

    /// Forgets it. What it has pinned stays so until the guards are dropped.
    pub fn remove_access(&self, id: AccessId) {
        let domains = self.read_domains();
        self.accesses().registered.retain(|access| access.id != id);
        self.realign(&domains);
    }

    pub(super) fn access_ops(&self) -> Vec<Arc<dyn AccessOps>> {
        self.accesses().registered.iter().filter_map(|access| access.ops.upgrade()).collect()
    }

    pub(super) fn access_alignment(&self) -> u64 {
        self.accesses().registered.iter().map(|access| access.alignment).max().unwrap_or(1)
    }

    fn accesses(&self) -> MutexGuard<'_, Accesses> {
        self.accesses.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

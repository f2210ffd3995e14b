//! An I/O address space: the map from I/O virtual addresses to areas of backing stores.
//!
//! # Theory of operation
//!
//! An [`Ioas`] holds *areas*, ranges of IOVA that show a part of a [`Pages`](crate::pages::Pages) each. Nothing is pinned for an area until
//! somebody needs its memory:
//!
//! - A *domain* ([`Ioas::attach_domain`]) gets all areas entered, and has all of their pages pinned.
//! - An *access* ([`Ioas::add_access`]) is somebody who reads the map itself. It pins what it needs ([`Ioas::pin`]) for
//!   as long as it keeps the guard, or copies ([`Ioas::read`], [`Ioas::write`]) and keeps nothing.
//!
//! An area is mapped and unmapped as a whole. Unmapping one that accesses have pinned asks them to let go
//! ([`AccessOps::unmap`]), unless the pin is an *owner*, a hardware queue: then EBUSY.
//!
//! Besides areas, the space has *reserved* ranges, where nothing may be mapped (what a domain cannot translate, MSI
//! windows), and *allowed* ranges, in which automatic allocation stays and which nothing may reserve.
//!
//! # Locks
//!
//! In this order:
//!
//! 1. `domains`: read to map and unmap, written to attach and detach, and to cut: so who enters areas into domains sees
//!    all domains, and who enters a domain sees all areas. It may be held while user memory faults in.
//! 2. `areas`: the map itself, and the ranges. Read to look up and to pin, written to change. An area in the map whose
//!    memory is just being pinned is not ready: it holds its place, and is there for nobody else. So nothing is pinned
//!    under the write lock.
//! 3. The lock of a `Pages`.
//!
//! Nothing is locked while an access is told to unmap.

mod access;
mod area;
mod dirty;
mod domains;
mod map;
mod options;
mod pin;
mod ranges;
mod unmap;

use std::sync::{
    Arc, Condvar, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
    atomic::{AtomicU64, Ordering},
};

use access::Accesses;
pub use access::{AccessId, AccessOps};
use area::Areas;
pub use dirty::DirtyBitmap;
use domains::Domains;
pub use pin::Pinned;
use ranges::Ranges;

use crate::{Result, inject, iova::IovaRange};

/// Who reserved a range, so that all that one has reserved can be given back at once.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Owner(u64);

impl Owner {
    /// One that nobody else is.
    #[allow(clippy::new_without_default, reason = "each is another one")]
    pub fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// An I/O address space.
#[derive(Debug)]
pub struct Ioas {
    domains: RwLock<Domains>,
    areas: RwLock<Areas>,
    accesses: Mutex<Accesses>,
    /// Who unmaps waits here for pins being made and copies being done.
    idle: Mutex<()>,
    became_idle: Condvar,
}

impl Ioas {
    /// An empty one, with nothing reserved.
    pub fn new() -> Arc<Self> {
        let areas = Areas { map: Default::default(), ranges: Ranges::new(), alignment: 1, huge_pages: true };
        Arc::new(Self {
            domains: RwLock::default(),
            areas: RwLock::new(areas),
            accesses: Mutex::default(),
            idle: Mutex::default(),
            became_idle: Condvar::new(),
        })
    }

    /// Where anything may be mapped: all but the reserved ranges, in order.
    pub fn iova_ranges(&self) -> Vec<IovaRange> {
        self.read_areas().ranges.usable()
    }

    /// What addresses and lengths of mappings must be multiples of: a power of two up to the page size.
    pub fn iova_alignment(&self) -> u64 {
        self.read_areas().alignment
    }

    /// Confines automatic allocation to `ranges`, and keeps everybody from reserving anything there; when there is none,
    /// all is allowed again. EINVAL when they overlap each other or one is a single byte, EADDRINUSE when a part of
    /// one is reserved.
    pub fn set_allowed(&self, ranges: &[IovaRange]) -> Result<()> {
        inject::check()?;
        self.write_areas().ranges.set_allowed(ranges)
    }

    /// From now on nothing may be mapped in `range`. EADDRINUSE when something is, or it is allowed.
    pub fn reserve(&self, range: IovaRange, owner: Owner) -> Result<()> {
        inject::check()?;
        self.write_areas().reserve(range, owner)
    }

    /// Gives back what `owner` has reserved.
    pub fn unreserve(&self, owner: Owner) {
        self.write_areas().ranges.unreserve(owner);
    }

    /// What is mapped where, for tests.
    #[cfg(test)]
    pub(crate) fn layout(&self) -> Vec<(IovaRange, crate::domain::Prot)> {
        self.read_areas().map.values().map(|area| (area.range, area.prot)).collect()
    }

    fn read_areas(&self) -> RwLockReadGuard<'_, Areas> {
        self.areas.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_areas(&self) -> RwLockWriteGuard<'_, Areas> {
        self.areas.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_domains(&self) -> RwLockReadGuard<'_, Domains> {
        self.domains.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_domains(&self) -> RwLockWriteGuard<'_, Domains> {
        self.domains.write().unwrap_or_else(PoisonError::into_inner)
    }
}

//! An I/O address space: the map from I/O virtual addresses to areas of backing stores.
//!
//! # Theory of operation
//!
//! An [`Ioas`] holds *areas*, ranges of IOVA that show a part of a [`Pages`] each. Nothing is pinned for an area until
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

use std::sync::{Arc, Weak, atomic::AtomicU64, atomic::Ordering};

use crate::{
    Errno, Result,
    domain::{Domain, Prot},
    hostmem::HostRun,
    iova::{Iova, IovaRange},
    pages::Pages,
    process::{Process, UserAddr},
};

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

/// What an access does for the address space that it pins pages of.
pub trait AccessOps: Send + Sync {
    /// `range` is being unmapped: every [`Pinned`] that has a part of it must be dropped before this returns. Pins that
    /// were not made through this access are none of its business, and ranges come that it never pinned.
    ///
    /// It is called with no lock held, by the thread that unmaps, and several times for one range if it must.
    fn unmap(&self, range: IovaRange);
}

/// An access that was registered with [`Ioas::add_access`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct AccessId(u64);

/// Where [`Ioas::read_dirty`] tells what was written to: a bitmap in user memory, one bit for each `page_size` bytes
/// from the start of `range` on. Bits are set there, and never cleared.
#[derive(Clone, Copy, Debug)]
pub struct DirtyBitmap<'a> {
    /// What it tells of.
    pub range: IovaRange,
    /// What one bit stands for: a power of two.
    pub page_size: u64,
    /// Whose memory it is in.
    pub process: &'a dyn Process,
    /// Where.
    pub at: UserAddr,
}

/// An I/O address space.
#[derive(Debug)]
pub struct Ioas {}

impl Ioas {
    /// An empty one, with nothing reserved.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {})
    }

    /// Maps `length` bytes of `pages`, from byte `offset` on, at `at`, or where there is room for them when that is none:
    /// where they are mapped.
    ///
    /// - EINVAL: `length` is 0, or something is not a multiple of [`Self::iova_alignment`], or `at` is in a reserved range.
    /// - EOVERFLOW: the range goes past the last address.
    /// - EEXIST: something is mapped at `at`.
    /// - ENOSPC: no range that is long enough is free and allowed.
    /// - EPERM: `prot` has write but `pages` has not.
    /// - ENOMEM, EFAULT: a domain needs the pages pinned, and they cannot be.
    pub fn map(
        &self,
        pages: &Arc<Pages>,
        offset: u64,
        length: u64,
        at: Option<Iova>,
        prot: Prot,
    ) -> Result<Iova> {
        let _ = (pages, offset, length, at, prot);
        Err(Errno::NOSYS)
    }

    /// Maps what `source` has mapped in `from` (parts of areas, without a hole between them) here too. The pages are
    /// shared, and pinned once for both. `source` may be this address space.
    ///
    /// As [`Self::map`]; and ENOENT when not all of `from` is mapped.
    pub fn copy_from(&self, source: &Self, from: IovaRange, at: Option<Iova>, prot: Prot) -> Result<Iova> {
        let _ = (source, from, at, prot);
        Err(Errno::NOSYS)
    }

    /// Unmaps all areas in `range`: how many bytes they had; 0 when there was none.
    ///
    /// - ENOENT: an area is only partly in `range`.
    /// - EBUSY: an owner has pages of an area pinned, or the area is just being mapped.
    /// - EDEADLK: an access was asked to let go, again and again, and did not.
    ///
    /// Areas before the one that it fails at are unmapped.
    pub fn unmap(&self, range: IovaRange) -> Result<u64> {
        let _ = range;
        Err(Errno::NOSYS)
    }

    /// Where anything may be mapped: all but the reserved ranges, in order.
    pub fn iova_ranges(&self) -> Vec<IovaRange> {
        Vec::new()
    }

    /// What addresses and lengths of mappings must be multiples of: a power of two up to the page size.
    pub fn iova_alignment(&self) -> u64 {
        1
    }

    /// Confines automatic allocation to `ranges` (to nothing when there is none), and keeps everybody from reserving
    /// anything there. EINVAL when they overlap each other, EADDRINUSE when a part of one is reserved.
    pub fn set_allowed(&self, ranges: &[IovaRange]) -> Result<()> {
        let _ = ranges;
        Err(Errno::NOSYS)
    }

    /// From now on nothing may be mapped in `range`. EADDRINUSE when something is, or it is allowed.
    pub fn reserve(&self, range: IovaRange, owner: Owner) -> Result<()> {
        let _ = (range, owner);
        Err(Errno::NOSYS)
    }

    /// Gives back what `owner` has reserved.
    pub fn unreserve(&self, owner: Owner) {
        let _ = owner;
    }

    /// Enters all areas into `domain`, and from now on all that are mapped, until [`Self::detach_domain`]. What is
    /// outside its aperture is reserved.
    ///
    /// - EADDRINUSE: an area is outside the aperture, or not aligned to the domain's smallest page.
    /// - EINVAL: the domain's smallest page is larger than the host's.
    /// - ENOMEM, EFAULT: pages cannot be pinned, or entered. Nothing has changed then.
    pub fn attach_domain(&self, domain: &Arc<dyn Domain>) -> Result<()> {
        let _ = domain;
        Err(Errno::NOSYS)
    }

    /// Takes everything out of `domain`, and forgets it. Pages that nobody else needs are unpinned.
    pub fn detach_domain(&self, domain: &Arc<dyn Domain>) {
        let _ = domain;
    }

    /// Whether pages that lie together may be mapped as larger ones (`IOMMU_OPTION_HUGE_PAGES`): at first they may.
    pub fn huge_pages(&self) -> bool {
        true
    }

    /// Changes it. Without huge pages everything must be aligned to the host's page, and areas can be [cut](Self::cut).
    /// EINVAL when that changes while a domain has areas, EADDRINUSE when an area is not aligned.
    pub fn set_huge_pages(&self, allowed: bool) -> Result<()> {
        let _ = allowed;
        Err(Errno::NOSYS)
    }

    /// Cuts the areas that begin before and end after one of `at` in two there, so that the parts can be unmapped alone: as
    /// VFIO's type 1 version 1 does. EINVAL when huge pages are allowed and a domain has the area, or `at` is not
    /// aligned; EBUSY when an access has pages of the area pinned.
    pub fn cut(&self, at: &[Iova]) -> Result<()> {
        let _ = at;
        Err(Errno::NOSYS)
    }

    /// Counts the pinned pages of all areas in `spaces` with process `to` from now on. EINVAL when one of them is of a
    /// process's memory and not of a file; ENOMEM when they go past the limit of `to`. Nothing has changed then.
    pub fn change_process(spaces: &[Arc<Self>], to: &Arc<dyn Process>) -> Result<()> {
        let _ = (spaces, to);
        Err(Errno::NOSYS)
    }

    /// Starts or stops noting the pages that devices write to through `domain`, which is attached. Starts with none noted.
    pub fn set_dirty_tracking(&self, domain: &Arc<dyn Domain>, enable: bool) -> Result<()> {
        let _ = (domain, enable);
        Err(Errno::NOSYS)
    }

    /// Sets the bits of the pages that were written to through `domain` since the last time, and forgets them unless
    /// `keep`.
    ///
    /// EINVAL when the page size is no power of two, or the range is not made of whole ones, or a part of it is not
    /// mapped; EFAULT when the bitmap cannot be written.
    pub fn read_dirty(&self, domain: &Arc<dyn Domain>, bitmap: &DirtyBitmap<'_>, keep: bool) -> Result<()> {
        let _ = (domain, bitmap, keep);
        Err(Errno::NOSYS)
    }

    /// Registers who will pin pages. What is mapped must be aligned to `alignment` (a power of two up to the page size)
    /// from now on: the page size for who pins, 1 for who only copies. EADDRINUSE when an area is not.
    pub fn add_access(&self, ops: Weak<dyn AccessOps>, alignment: u64) -> Result<AccessId> {
        let _ = (ops, alignment);
        Err(Errno::NOSYS)
    }

    /// Forgets it. What it has pinned stays so until the guards are dropped.
    pub fn remove_access(&self, id: AccessId) {
        let _ = id;
    }

    /// Pins the pages of `length` bytes at `iova`, which may be in several areas without a hole between them. Serves
    /// accesses and hardware queues alike: a queue is an `owner`, whose areas cannot be unmapped.
    ///
    /// - EINVAL: `length` is 0; or the range does not begin at the start of a page, or leaves an area or enters one within a
    ///   page; or an area is just being unmapped.
    /// - EOVERFLOW: it goes past the last address.
    /// - EPERM: it is for `write` and an area is read-only (or the other way round).
    /// - ENOENT: a part of it is not mapped.
    /// - ENOMEM, EFAULT: pages cannot be pinned.
    ///
    /// Nothing stays pinned when it fails.
    pub fn pin(&self, iova: Iova, length: u64, write: bool, owner: bool) -> Result<Pinned> {
        let _ = (iova, length, write, owner);
        Err(Errno::NOSYS)
    }

    /// Copies from the memory behind `iova`, any number of bytes across any number of areas. ENOENT at a hole, EPERM
    /// where an area is not readable, EFAULT where the memory is gone.
    pub fn read(&self, iova: Iova, to: &mut [u8]) -> Result<()> {
        let _ = (iova, to);
        Err(Errno::NOSYS)
    }

    /// Copies to it. As [`Self::read`], and EPERM where an area is not writable.
    pub fn write(&self, iova: Iova, from: &[u8]) -> Result<()> {
        let _ = (iova, from);
        Err(Errno::NOSYS)
    }
}

/// Pages that are pinned until this is dropped.
#[derive(Debug)]
pub struct Pinned {}

impl Pinned {
    /// Where the pages are now, in order; neighbours that lie together are one run. They are valid until the program
    /// unmaps the addresses of the pages that it gave: who keeps them longer wants [`Self::read`] and [`Self::write`].
    pub fn runs(&self) -> Vec<HostRun> {
        Vec::new()
    }

    /// Copies from byte `offset` of the range on. EINVAL when it goes past the end.
    pub fn read(&self, offset: u64, to: &mut [u8]) -> Result<()> {
        let _ = (offset, to);
        Err(Errno::NOSYS)
    }

    /// Copies to it. EINVAL as in [`Self::read`]; EPERM when it was not pinned for writing.
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<()> {
        let _ = (offset, from);
        Err(Errno::NOSYS)
    }
}

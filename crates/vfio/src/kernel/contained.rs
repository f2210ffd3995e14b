//! A container as the IOMMU of the device in it: for an [`iommufd::Context`] above VFIO's old door.
//!
//! # Theory of operation
//!
//! A container has one address space, for as long as a device of it is open. A context has many, and attaches the device to
//! one after the other. So a domain is here a list of what it maps, and the list of the one that the device is
//! attached to is what the container has: mapping there is `VFIO_IOMMU_MAP_DMA`, unmapping `VFIO_IOMMU_UNMAP_DMA`.
//! Attaching the device to another domain changes the container from one list to the other. What is in both stays
//! mapped; the rest of the old one goes first, because the new one may have something else there. When the container
//! refuses a part of the new one, the old one comes back, and the device stays attached to it.
//!
//! One lock guards the lists and is held for calls of the container, which serves one at a time anyway.

#![allow(unsafe_code, reason = "memory is given to devices: see `ContainerHardware::new`")]

use core::{
    any::Any,
    sync::atomic::{AtomicBool, Ordering},
};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use iommufd::{
    caller::Caller,
    domain::{Domain, Geometry, HostAddr, Prot},
    hardware::{Attachment, Capabilities, DomainOptions, Hardware, UserData},
    iova::{Iova, IovaRange, PAGE_SIZE},
    kernel::{Cut, Piece, Pieces},
};

use super::{MapError, container::Container};
use crate::{Errno, Result, eventfd::lock};

/// `enum iommu_hw_info_type`: none.
const INFO_NONE: u32 = 0;

/// What changes a container's address space.
pub(super) trait DmaMap: Send + Sync {
    /// See [`Container::map`].
    ///
    /// # Safety
    /// As there.
    unsafe fn map(&self, iova: Iova, host: HostAddr, length: u64, prot: Prot) -> Result<()>;

    /// See [`Container::unmap`].
    fn unmap(&self, range: IovaRange) -> Result<()>;
}

impl DmaMap for Container {
    unsafe fn map(&self, iova: Iova, host: HostAddr, length: u64, prot: Prot) -> Result<()> {
        // SAFETY: the caller's word.
        unsafe { Self::map(self, iova, host, length, prot) }
    }

    fn unmap(&self, range: IovaRange) -> Result<()> {
        Self::unmap(self, range)
    }
}

/// The container, and what its domains map.
struct Contained {
    container: Arc<dyn DmaMap>,
    ranges: Vec<IovaRange>,
    state: Mutex<State>,
    /// Why it refused something has been said.
    said: AtomicBool,
}

#[derive(Default)]
struct State {
    domains: BTreeMap<u64, Pieces>,
    /// What the container has.
    attached: Option<u64>,
    /// The number of the next domain.
    next: u64,
}

impl core::fmt::Debug for Contained {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let state = lock(&self.state);
        let pieces: BTreeMap<_, _> = state.domains.iter().map(|(id, pieces)| (id, pieces.len())).collect();
        f.debug_struct("Contained")
            .field("attached", &state.attached)
            .field("domains", &pieces)
            .finish_non_exhaustive()
    }
}

/// Whether there is anything that a device may do with it: what allows nothing the container does not take.
fn allows(piece: Piece) -> bool {
    piece.prot.intersects(Prot::READ | Prot::WRITE)
}

impl Contained {
    fn enter(&self, at: Iova, piece: Piece) -> Result<()> {
        if !allows(piece) {
            return Ok(());
        }
        // SAFETY: who made the hardware has promised that what is mapped is pinned memory, which its owner gives to devices
        // and which stays until it is unmapped.
        unsafe { self.container.map(at, piece.host, piece.length, piece.prot) }
    }

    /// As [`Self::enter`]; says what the first refusal means, where `locked` bytes are to be locked with this.
    fn enter_aloud(&self, at: Iova, piece: Piece, locked: u64) -> Result<()> {
        self.enter(at, piece).inspect_err(|errno| {
            // Who asks may ask often.
            if !self.said.swap(true, Ordering::Relaxed) {
                let why = MapError::explain(at, piece.length, locked, *errno, &self.ranges);
                tracing::warn!(%why, "a mapping is not carried over to the host");
            }
        })
    }

    /// Enters what was mapped before, and must be still.
    fn enter_again(&self, at: Iova, piece: Piece) {
        if let Err(errno) = self.enter(at, piece) {
            tracing::error!(?at, length = piece.length, %errno, "the host lost a mapping");
        }
    }

    fn leave(&self, at: Iova, piece: Piece) {
        if let Ok(range) = IovaRange::with_length(at, piece.length)
            && allows(piece)
            && let Err(errno) = self.container.unmap(range)
        {
            tracing::error!(?range, %errno, "the host does not unmap");
        }
    }

    /// Changes what the container has to what domain `to` maps. Nothing has changed when it fails.
    fn attach(&self, to: Option<u64>) -> Result<()> {
        let mut state = lock(&self.state);
        if state.attached == to {
            return Ok(());
        }
        let none = Pieces::default();
        let of = |id: Option<u64>| id.and_then(|id| state.domains.get(&id)).unwrap_or(&none);
        let (before, after) = (of(state.attached), of(to));
        let (gone, new) = (before.without(after), after.without(before));
        gone.iter().for_each(|(at, piece)| self.leave(*at, *piece));
        for (done, (at, piece)) in new.iter().enumerate() {
            let Err(errno) = self.enter_aloud(*at, *piece, after.bytes()) else { continue };
            new.iter().take(done).for_each(|(at, piece)| self.leave(*at, *piece));
            gone.iter().for_each(|(at, piece)| self.enter_again(*at, *piece));
            return Err(errno);
        }
        state.attached = to;
        Ok(())
    }
}

/// A device in a container of its own, for a [`Context`](iommufd::Context).
#[derive(Debug)]
pub(super) struct ContainerHardware {
    shared: Arc<Contained>,
    group: u64,
}

impl ContainerHardware {
    /// The device of this group, for which `ranges` can be mapped, and which `container` has mapped nothing for.
    ///
    /// # Safety
    /// As for [`HostHardware::new`](iommufd::kernel::HostHardware::new).
    pub(super) unsafe fn new(container: Arc<dyn DmaMap>, ranges: Vec<IovaRange>, group: u64) -> Self {
        Self {
            shared: Arc::new(Contained {
                container,
                ranges,
                state: Mutex::default(),
                said: AtomicBool::new(false),
            }),
            group,
        }
    }
}

impl Hardware for ContainerHardware {
    fn group(&self) -> u64 {
        self.group
    }

    /// Type 1 gives away only devices whose writes the IOMMU keeps coherent.
    fn capabilities(&self) -> Capabilities {
        Capabilities::CACHE_COHERENCY
    }

    fn reserved(&self) -> Vec<IovaRange> {
        IovaRange::gaps(&self.shared.ranges)
    }

    fn alloc_paging(
        &self,
        _caller: Option<&dyn Caller>,
        options: DomainOptions,
        data: UserData,
    ) -> Result<Arc<dyn Domain>> {
        if data.kind != INFO_NONE || options.nest_parent || options.dirty_tracking || options.pasid {
            return Err(Errno::OPNOTSUPP);
        }
        let ranges = &self.shared.ranges;
        let (first, last) = ranges.first().zip(ranges.last()).ok_or(Errno::INVAL)?;
        let aperture = IovaRange::new(first.start(), last.last())?;
        let mut state = lock(&self.shared.state);
        let id = state.next;
        state.next += 1;
        state.domains.insert(id, Pieces::default());
        // How large pages become is the host's affair.
        let geometry = Geometry { aperture, page_sizes: !(PAGE_SIZE - 1) };
        Ok(Arc::new(ContainerDomain { shared: Arc::clone(&self.shared), id, geometry }))
    }

    /// EINVAL for a domain that is of another container.
    fn attach(&self, pasid: Option<u32>, to: Option<&Attachment>) -> Result<()> {
        if pasid.is_some() {
            return Err(Errno::INVAL);
        }
        let id = match to {
            None => None,
            Some(Attachment::Paging(domain)) => {
                let domain: &dyn Any = &**domain;
                let domain = domain.downcast_ref::<ContainerDomain>();
                let ours = domain.filter(|domain| Arc::ptr_eq(&domain.shared, &self.shared));
                Some(ours.ok_or(Errno::INVAL)?.id)
            }
            Some(Attachment::Nested(_)) => return Err(Errno::INVAL),
        };
        self.shared.attach(id)
    }

    fn info(&self, kind: u32) -> Result<(u32, Vec<u8>)> {
        if kind == INFO_NONE { Ok((INFO_NONE, Vec::new())) } else { Err(Errno::OPNOTSUPP) }
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

/// What the container has while the device is attached to it.
#[derive(Debug)]
struct ContainerDomain {
    shared: Arc<Contained>,
    id: u64,
    geometry: Geometry,
}

impl Domain for ContainerDomain {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn map(&self, iova: Iova, host: HostAddr, length: u64, prot: Prot) -> Result<()> {
        let mut state = lock(&self.shared.state);
        let attached = state.attached == Some(self.id);
        let pieces = state.domains.get_mut(&self.id).ok_or(Errno::NOENT)?;
        let piece = Piece { host, length, prot };
        if attached {
            self.shared.enter_aloud(iova, piece, pieces.bytes().saturating_add(length))?;
        }
        pieces.insert(iova, piece);
        Ok(())
    }

    fn unmap(&self, range: IovaRange) {
        let mut state = lock(&self.shared.state);
        let attached = state.attached == Some(self.id);
        let Some(pieces) = state.domains.get_mut(&self.id) else { return };
        for Cut { at, piece, rest } in pieces.cut(range) {
            if attached {
                self.shared.leave(at, piece);
            }
            for (at, piece) in rest.into_iter().flatten() {
                pieces.insert(at, piece);
                if attached {
                    self.shared.enter_again(at, piece);
                }
            }
        }
    }

    /// Nothing is left to do: the host unmaps when the IOMMU has forgotten.
    fn sync(&self) {}

    fn lookup(&self, iova: Iova) -> Option<HostAddr> {
        lock(&self.shared.state).domains.get(&self.id)?.lookup(iova)
    }
}

impl Drop for ContainerDomain {
    fn drop(&mut self) {
        self.unmap(IovaRange::ALL);
        let mut state = lock(&self.shared.state);
        state.domains.remove(&self.id);
        // What it had is out of the container.
        state.attached = state.attached.filter(|id| *id != self.id);
    }
}

#[cfg(test)]
mod tests;

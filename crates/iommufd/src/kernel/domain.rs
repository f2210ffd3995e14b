//! A page table of the host's IOMMU as a [`Domain`].

#![allow(unsafe_code, reason = "memory is given to devices: see `HostHardware::new`")]

use std::{
    os::fd::AsFd,
    sync::{Mutex, MutexGuard, PoisonError},
};

use uapi::iommufd::{IOMMU_HWPT_DIRTY_TRACKING_ENABLE, iommu_hwpt_set_dirty_tracking};

use super::{
    Cut, HostIoas, Piece, Pieces,
    calls::{self, Plain},
};
use crate::{
    Errno, Result,
    domain::{DirtySink, Domain, Geometry, HostAddr, Prot},
    iova::{Iova, IovaRange, PAGE_SIZE},
};

/// A page table of the host's, with the address space that fills it.
///
/// The host unmaps only what was mapped in one piece. Where a part of it is to go, all of it is unmapped and the rest
/// mapped again: a device that uses that rest meanwhile fails. [`Domain::suspend`], too, lets accesses fail.
#[derive(Debug)]
pub struct HostDomain {
    ioas: HostIoas,
    /// The page table above `ioas`.
    hwpt: u32,
    tracks: bool,
    geometry: Geometry,
    mapped: Mutex<Pieces>,
}

/// How many words of a bitmap are asked for in one call: 128 MiB of memory in pages.
const WORDS: usize = 512;

impl HostDomain {
    /// # Safety
    /// As for [`HostHardware::new`](super::HostHardware::new).
    ///
    /// # Errors
    /// The kernel's.
    pub(super) unsafe fn new(ioas: HostIoas, hwpt: u32, tracks: bool) -> Result<Self> {
        // How large pages become is the host's affair.
        let geometry = Geometry { aperture: IovaRange::ALL, page_sizes: !(PAGE_SIZE - 1) };
        let mut domain = Self { ioas, hwpt, tracks, geometry, mapped: Mutex::default() };
        let ranges = domain.ioas.ranges()?;
        let (first, last) = ranges.first().zip(ranges.last()).ok_or(Errno::INVAL)?;
        domain.geometry.aperture = IovaRange::new(first.start(), last.last())?;
        Ok(domain)
    }

    /// Its number in the host's iommufd.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.hwpt
    }

    fn lock(&self) -> MutexGuard<'_, Pieces> {
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a piece, but for one that allows nothing, which the host does not take.
    fn enter(&self, at: Iova, piece: Piece) -> Result<()> {
        if !piece.prot.intersects(Prot::READ | Prot::WRITE) {
            return Ok(());
        }
        // SAFETY: who made the hardware has promised that what is mapped is pinned memory, which its owner gives to devices
        // and which stays until it is unmapped.
        unsafe { self.ioas.map(at, piece.host, piece.length, piece.prot) }
    }
}

impl Domain for HostDomain {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn map(&self, iova: Iova, host: HostAddr, length: u64, prot: Prot) -> Result<()> {
        let mut mapped = self.lock();
        let piece = Piece { host, length, prot };
        self.enter(iova, piece)?;
        mapped.insert(iova, piece);
        Ok(())
    }

    fn unmap(&self, range: IovaRange) {
        let mut mapped = self.lock();
        for Cut { at, piece, rest } in mapped.cut(range) {
            let Ok(whole) = IovaRange::with_length(at, piece.length) else { continue };
            if piece.prot.intersects(Prot::READ | Prot::WRITE)
                && let Err(errno) = self.ioas.unmap(whole)
            {
                tracing::error!(?whole, %errno, "the host does not unmap");
                continue;
            }
            for (at, piece) in rest.into_iter().flatten() {
                // It is part of what was mapped, and not of what is unmapped.
                match self.enter(at, piece) {
                    Ok(()) => mapped.insert(at, piece),
                    Err(errno) => {
                        tracing::error!(?at, length = piece.length, %errno, "the host lost a part of a mapping");
                    }
                }
            }
        }
    }

    /// Nothing is left to do: the host unmaps when the IOMMU has forgotten.
    fn sync(&self) {}

    fn lookup(&self, iova: Iova) -> Option<HostAddr> {
        self.lock().lookup(iova)
    }

    fn set_dirty_tracking(&self, enable: bool) -> Result<()> {
        if !self.tracks {
            return Err(Errno::OPNOTSUPP);
        }
        let flags = if enable { IOMMU_HWPT_DIRTY_TRACKING_ENABLE } else { 0 };
        let mut set = iommu_hwpt_set_dirty_tracking { flags, hwpt_id: self.hwpt, ..Default::default() };
        calls::fixed(self.ioas.iommu().as_fd(), Plain::SetDirtyTracking, &mut set).map(drop)
    }

    fn read_and_clear_dirty(&self, range: IovaRange, keep: bool, sink: &mut dyn DirtySink) -> Result<()> {
        if !self.tracks {
            return Err(Errno::OPNOTSUPP);
        }
        let step = WORDS as u64 * 64 * PAGE_SIZE;
        let mut at = range.start().0 & !(PAGE_SIZE - 1);
        loop {
            // Both ends belong to the range, which may end with the last address.
            let length = (range.last().0 - at).checked_add(1).map_or(step, |left| left.min(step));
            let mut bitmap = [0; WORDS];
            let place = (at, length.next_multiple_of(PAGE_SIZE), PAGE_SIZE);
            calls::dirty_bitmap(self.ioas.iommu().as_fd(), self.hwpt, place, keep, &mut bitmap)?;
            for (word, bits) in (0u64..).zip(bitmap) {
                for bit in (0..64).filter(|bit| bits & 1 << bit != 0) {
                    sink.dirty(Iova(at + (word * 64 + bit) * PAGE_SIZE), PAGE_SIZE);
                }
            }
            match at.checked_add(length) {
                Some(next) if next <= range.last().0 => at = next,
                _ => return Ok(()),
            }
        }
    }
}

impl Drop for HostDomain {
    fn drop(&mut self) {
        // Before the address space, which it uses.
        if let Err(errno) = self.ioas.iommu().destroy(self.hwpt) {
            tracing::debug!(id = self.hwpt, %errno, "the host keeps a page table");
        }
    }
}

//! The host's own iommufd: a client of its `/dev/iommu`.
//!
//! # Theory of operation
//!
//! A [`HostIommu`] is an open `/dev/iommu` of the host's kernel. Who gives one of the host's devices to somebody binds it there
//! (crate `vfio` does) and makes a [`HostIoas`], in which the memory is entered that the device may reach.
//!
//! With [`HostHardware`] such a device is one that a [`Context`](crate::Context) of this crate binds. Then there are two
//! iommufds, one above the other: ours has the objects, the rules and the calls, the host's has the page tables of the real
//! IOMMU. Each domain of ours ([`HostDomain`]) is a page table of the host's with an IOAS of its own, and what our IOAS enters
//! into its domain goes through the host's kernel into the real table. So an IOAS of ours may have devices in software
//! and real ones at the same time, and its areas are pinned twice: here as far as this process can, and by the host.
//!
//! Contents: [`calls`], the system calls and the only `unsafe` code but for a promise in [`HostHardware::new`];
//! `domain` and `hardware`, the two traits; `pieces`, what a host was given to map.

pub mod calls;
mod domain;
mod hardware;
mod pieces;

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
};

use uapi::iommufd::{iommu_destroy, iommu_ioas_alloc, iommu_ioas_unmap, iommu_iova_range};

use self::calls::{Plain, Window};
pub use self::{
    domain::HostDomain,
    hardware::{HostHardware, HostPort},
    pieces::{Cut, Piece, Pieces},
};
use crate::{
    Errno, Result,
    domain::{HostAddr, Prot},
    iova::{Iova, IovaRange},
};

/// An open `/dev/iommu` of the host.
#[derive(Debug)]
pub struct HostIommu(File);

impl HostIommu {
    /// Opens it.
    ///
    /// # Errors
    /// The host has none, or not for us.
    pub fn open() -> io::Result<Arc<Self>> {
        File::options().read(true).write(true).open("/dev/iommu").map(Self).map(Arc::new)
    }

    /// A new address space, which maps nothing.
    ///
    /// # Errors
    /// The kernel's.
    pub fn ioas(self: &Arc<Self>) -> Result<HostIoas> {
        let mut alloc = iommu_ioas_alloc::default();
        calls::fixed(self.as_fd(), Plain::IoasAlloc, &mut alloc)?;
        Ok(HostIoas { iommu: Arc::clone(self), id: alloc.out_ioas_id })
    }

    fn destroy(&self, id: u32) -> Result<()> {
        let mut destroy = iommu_destroy { id, ..Default::default() };
        calls::fixed(self.as_fd(), Plain::Destroy, &mut destroy).map(drop)
    }
}

impl AsFd for HostIommu {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// An address space of the host's kernel; destroyed when it is dropped. Devices that are attached to it keep it: then it
/// goes with the descriptor of the [`HostIommu`].
#[derive(Debug)]
pub struct HostIoas {
    iommu: Arc<HostIommu>,
    id: u32,
}

/// More ranges than this no IOMMU has.
const MAX_RANGES: usize = 4096;

impl HostIoas {
    /// Its number in the [`HostIommu`]: what a device is attached to.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The iommufd that it is in.
    #[must_use]
    pub fn iommu(&self) -> &Arc<HostIommu> {
        &self.iommu
    }

    /// The addresses that can be mapped, in order, for the devices that are attached now.
    ///
    /// # Errors
    /// The kernel's.
    pub fn ranges(&self) -> Result<Vec<IovaRange>> {
        let mut ranges = vec![iommu_iova_range::default(); 16];
        loop {
            let count = calls::iova_ranges(self.iommu.as_fd(), self.id, &mut ranges)?;
            if count <= ranges.len() {
                ranges.truncate(count);
                return ranges
                    .iter()
                    .map(|range| IovaRange::new(Iova(range.start), Iova(range.last)))
                    .collect();
            }
            if count > MAX_RANGES {
                return Err(Errno::OVERFLOW);
            }
            ranges.resize(count, iommu_iova_range::default());
        }
    }

    /// Maps `length` bytes of this process at `host`.
    ///
    /// # Errors
    /// The kernel's: ENOMEM when more memory would be locked than is allowed, EEXIST where something is mapped, EINVAL for
    /// what cannot be translated.
    ///
    /// # Safety
    /// As for [`calls::ioas_map`]: until it is unmapped, or this is dropped, devices may do with the memory what `prot`
    /// allows.
    #[allow(unsafe_code, reason = "hands the promise on")]
    pub unsafe fn map(&self, iova: Iova, host: HostAddr, length: u64, prot: Prot) -> Result<()> {
        // SAFETY: the caller's word.
        unsafe { calls::ioas_map(self.iommu.as_fd(), self.id, Window::new(iova, host, length, prot)) }
    }

    /// Unmaps what was mapped in `range`: whole mappings only.
    ///
    /// # Errors
    /// ENOENT when nothing is mapped there, or for a part of a mapping.
    pub fn unmap(&self, range: IovaRange) -> Result<()> {
        let length = range.length().unwrap_or(u64::MAX);
        let mut unmap =
            iommu_ioas_unmap { ioas_id: self.id, iova: range.start().0, length, ..Default::default() };
        calls::fixed(self.iommu.as_fd(), Plain::IoasUnmap, &mut unmap).map(drop)
    }
}

impl Drop for HostIoas {
    fn drop(&mut self) {
        if let Err(errno) = self.iommu.destroy(self.id) {
            tracing::debug!(id = self.id, %errno, "the host keeps an address space");
        }
    }
}

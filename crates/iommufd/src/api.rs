//! What the ioctls do, for who calls from Rust.

use std::{os::fd::OwnedFd, sync::Arc};

use crate::{
    Context, Result,
    account::Accounting,
    caller::{Caller, File},
    domain::Prot,
    hardware::UserData,
    ioas::{DirtyBitmap, Ioas},
    iova::{Iova, IovaRange},
    object::{HwptOptions, ioas::IoasObject, viommu::Viommu},
    pages::Pages,
    process::{Process, UserAddr},
    viommu::VirtualIommu,
};

/// Address spaces.
impl Context {
    /// Makes an address space: its id. ENOMEM.
    pub fn ioas_alloc(&self) -> Result<u32> {
        Ok(self.prepare_ioas()?.finish())
    }

    /// The address space `id` itself. ENOENT. It outlives its id while somebody keeps it.
    pub fn ioas_space(&self, id: u32) -> Result<Arc<Ioas>> {
        Ok(self.ioas(id)?.space.clone())
    }

    /// Maps `length` bytes of a process's memory at `at`, or where there is room when that is none: where. Errors are
    /// those of [`Pages::user`] and [`Ioas::map`]; ENOENT when there is no such address space.
    pub fn ioas_map(
        &self,
        ioas: u32,
        process: &Arc<dyn Process>,
        from: UserAddr,
        length: u64,
        at: Option<Iova>,
        prot: Prot,
    ) -> Result<Iova> {
        self.map_user(ioas, process, self.accounting(), from, length, at, prot)
    }

    /// [`Self::ioas_map`] for a call of `caller`, whose privileges decide how the memory is counted.
    pub fn ioas_map_by(
        &self,
        ioas: u32,
        caller: &dyn Caller,
        from: UserAddr,
        length: u64,
        at: Option<Iova>,
        prot: Prot,
    ) -> Result<Iova> {
        self.map_user(ioas, caller.process(), self.accounting_of(caller), from, length, at, prot)
    }

    #[allow(clippy::too_many_arguments, reason = "they are the kernel's")]
    fn map_user(
        &self,
        ioas: u32,
        process: &Arc<dyn Process>,
        accounting: Accounting,
        from: UserAddr,
        length: u64,
        at: Option<Iova>,
        prot: Prot,
    ) -> Result<Iova> {
        let ioas = self.ioas(ioas)?;
        let writable = prot.contains(Prot::WRITE);
        let pages = Pages::user(process.clone(), from, length, writable, accounting)?;
        ioas.space.map(&pages, 0, length, at, prot)
    }

    /// Maps `length` bytes of a memory file from byte `start` on; they count as pinned by `process`. As
    /// [`Self::ioas_map`].
    #[allow(clippy::too_many_arguments, reason = "they are the kernel's")]
    pub fn ioas_map_file(
        &self,
        ioas: u32,
        process: &Arc<dyn Process>,
        file: &OwnedFd,
        start: u64,
        length: u64,
        at: Option<Iova>,
        prot: Prot,
    ) -> Result<Iova> {
        let ioas = self.ioas(ioas)?;
        let writable = prot.contains(Prot::WRITE);
        let pages = Pages::file(process.clone(), file, start, length, writable, self.accounting())?;
        ioas.space.map(&pages, 0, length, at, prot)
    }

    /// Unmaps all areas in `range`: how many bytes they had. Errors are those of [`Ioas::unmap`]; ENOENT when there is no
    /// such address space.
    pub fn ioas_unmap(&self, ioas: u32, range: IovaRange) -> Result<u64> {
        self.ioas(ioas)?.space.unmap(range)
    }

    /// Counts the pinned pages of every address space with `process` from now on: [`Ioas::change_process`].
    pub fn change_process(&self, process: &Arc<dyn Process>) -> Result<()> {
        let objects = self.table().all::<IoasObject>();
        let spaces: Vec<_> = objects.iter().map(|ioas| ioas.space.clone()).collect();
        Ioas::change_process(&spaces, process)
    }
}

/// Page tables.
impl Context {
    /// Makes a page table for devices of the IOMMU behind `device`: above an address space, or, a guest's, above a page table
    /// that was made to be a parent, or in a vIOMMU: its id.
    ///
    /// - ENOENT: there is no such device or parent or fault queue; EINVAL: the parent is none.
    /// - EOPNOTSUPP: the IOMMU, or this kind of page table, has not what is asked for.
    /// - EINVAL: the parent was not made to be one, or is of another IOMMU.
    /// - ENOMEM, EFAULT: the memory of the address space cannot be pinned, `data` not be read.
    pub fn hwpt_alloc(
        &self,
        caller: &dyn Caller,
        device: u32,
        parent: u32,
        options: HwptOptions,
        data: UserData,
    ) -> Result<u32> {
        Ok(self.prepare_hwpt(caller, device, parent, options, data)?.finish())
    }

    /// Starts or stops noting what devices write to by way of a page table. ENOENT when there is no such, EOPNOTSUPP when it
    /// was made without.
    pub fn set_dirty_tracking(&self, hwpt: u32, enable: bool) -> Result<()> {
        let hwpt = self.hwpt(hwpt)?;
        hwpt.require_dirty_tracking()?;
        hwpt.ioas.space.set_dirty_tracking(&hwpt.domain, enable)
    }

    /// Tells which pages devices have written to by way of a page table, and forgets it unless `keep`. As
    /// [`Self::set_dirty_tracking`], and what [`Ioas::read_dirty`] says.
    pub fn read_dirty(&self, hwpt: u32, bitmap: &DirtyBitmap<'_>, keep: bool) -> Result<()> {
        let hwpt = self.hwpt(hwpt)?;
        hwpt.require_dirty_tracking()?;
        hwpt.ioas.space.read_dirty(&hwpt.domain, bitmap, keep)
    }

    /// Makes a queue for page requests: its id, and the file that they are read from, in the kernel's form
    /// (`struct iommu_hwpt_pgfault`), and answered by (`struct iommu_hwpt_page_response`). ENOMEM, EMFILE.
    pub fn fault_queue_alloc(self: &Arc<Self>) -> Result<(u32, Arc<dyn File>)> {
        let usage = self.prepare_fault_queue()?.finish_used();
        Ok((usage.id(), self.fault_file(usage)))
    }
}

/// vIOMMUs.
impl Context {
    /// Makes a vIOMMU of the IOMMU behind `device` and of the type `data.kind`, above a page table that was made to be a
    /// parent: its id. ENOENT, EINVAL when the page table is none for it, EOPNOTSUPP when the IOMMU has not the type.
    pub fn viommu_alloc(&self, caller: &dyn Caller, device: u32, parent: u32, data: UserData) -> Result<u32> {
        Ok(self.prepare_viommu(caller, device, parent, data)?.finish())
    }

    /// The driver of a vIOMMU: for who knows its type ([`VirtualIommu::as_any`]). ENOENT.
    pub fn viommu(&self, id: u32) -> Result<Arc<dyn VirtualIommu>> {
        Ok(self.table().get::<Viommu>(id)?.driver.clone())
    }

    /// Tells a vIOMMU that its guest knows `device` by `virt_id`: the id of the vDEVICE. ENOENT; EINVAL when the device is
    /// behind another IOMMU; EEXIST when it has a vDEVICE, or the vIOMMU one of that `virt_id`.
    pub fn vdevice_alloc(&self, viommu: u32, device: u32, virt_id: u64) -> Result<u32> {
        let (vdevice, _device) = self.prepare_vdevice(viommu, device, virt_id)?;
        Ok(vdevice.finish())
    }

    /// Makes a queue of `depth` events of a type: its id, and the file that they are read from, each behind a
    /// `struct iommufd_vevent_header`. ENOENT; EINVAL for a depth of 0, or above 2^19; EOPNOTSUPP when the vIOMMU has
    /// no such events; EEXIST when they have a queue.
    pub fn veventq_alloc(
        self: &Arc<Self>,
        viommu: u32,
        kind: u32,
        depth: u32,
    ) -> Result<(u32, Arc<dyn File>)> {
        let usage = self.prepare_event_queue(viommu, kind, depth)?.finish_used();
        Ok((usage.id(), self.event_file(usage)))
    }

    /// Hands `length` bytes at `iova` of the parent's address space to the IOMMU, as its queue `index`: the id of the queue.
    /// The memory is pinned, and cannot be unmapped, until the queue is destroyed.
    ///
    /// - ENOENT: there is no such vIOMMU, or not all of the memory is mapped.
    /// - EOPNOTSUPP: the vIOMMU has no queues of this type; EINVAL: not so many, or the length is 0.
    /// - EOVERFLOW: the queue goes past the last address.
    /// - EFAULT: the IOMMU reads by host addresses, and the pages do not lie together.
    /// - EEXIST: there is a queue of this index; EIO: there is none of the index below.
    pub fn hw_queue_alloc(&self, viommu: u32, kind: u32, index: u32, iova: Iova, length: u64) -> Result<u32> {
        Ok(self.prepare_hw_queue(viommu, kind, index, iova, length)?.finish())
    }
}

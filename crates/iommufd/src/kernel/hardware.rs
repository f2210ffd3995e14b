//! The host's IOMMU, as one of its devices sees it, as [`Hardware`].

#![allow(unsafe_code, reason = "memory is given to devices: see `HostHardware::new`")]

use core::{any::Any, fmt};
use std::{os::fd::AsFd, sync::Arc};

use uapi::iommufd::{
    IOMMU_HW_CAP_DIRTY_TRACKING, IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED, IOMMU_HW_INFO_TYPE_NONE,
    IOMMU_HWPT_ALLOC_DIRTY_TRACKING, IOMMU_HWPT_ALLOC_NEST_PARENT, IOMMU_HWPT_ALLOC_PASID,
};

use super::{HostDomain, HostIommu, calls};
use crate::{
    Errno, Result,
    caller::Caller,
    domain::Domain,
    hardware::{Attachment, Capabilities, DomainOptions, Hardware, UserData},
    iova::IovaRange,
};

/// A device of the host that is bound to an iommufd of the host: what its driver's descriptor can do there.
pub trait HostPort: Send + Sync + fmt::Debug {
    /// Its number in the host's iommufd.
    fn id(&self) -> u32;
    /// Attaches it (none: all its plain DMA) to an IOAS or a page table of the host's, in place of what was there.
    ///
    /// # Errors
    /// The kernel's.
    fn attach(&self, pasid: Option<u32>, table: u32) -> Result<()>;
    /// Detaches it.
    ///
    /// # Errors
    /// The kernel's.
    fn detach(&self, pasid: Option<u32>) -> Result<()>;
}

/// A device of the host behind its real IOMMU.
///
/// Its page tables are the host's; nested ones, virtual IOMMUs and page requests are not handed through.
#[derive(Debug)]
pub struct HostHardware {
    iommu: Arc<HostIommu>,
    port: Arc<dyn HostPort>,
    group: u64,
    capabilities: Capabilities,
    max_pasid_log2: u8,
    reserved: Vec<IovaRange>,
}

/// What a driver may tell of its IOMMU.
const MAX_INFO: usize = 4096;

impl HostHardware {
    /// The device `port`, which is bound to `iommu`, attached to nothing, and in this group. It is attached for a moment, to
    /// learn which addresses it cannot use.
    ///
    /// # Errors
    /// The kernel's.
    ///
    /// # Safety
    /// Its domains reach memory of this process by address. Who uses them, and that is a
    /// [`Context`](crate::Context), maps only what is pinned, what its owner has given to devices, and what nobody in
    /// this process has a Rust reference to.
    pub unsafe fn new(iommu: Arc<HostIommu>, port: Arc<dyn HostPort>, group: u64) -> Result<Arc<Self>> {
        let said = calls::hw_info(iommu.as_fd(), port.id(), IOMMU_HW_INFO_TYPE_NONE, &mut [])?;
        // A driver of the host does not let a user have a device whose writes pass by the caches.
        let mut capabilities = Capabilities::CACHE_COHERENCY;
        let has = |flag: u32| said.out_capabilities & u64::from(flag) != 0;
        capabilities.set(Capabilities::DIRTY_TRACKING, has(IOMMU_HW_CAP_DIRTY_TRACKING));
        capabilities.set(Capabilities::ATS, !has(IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED));
        let ioas = iommu.ioas()?;
        port.attach(None, ioas.id())?;
        let ranges = ioas.ranges();
        port.detach(None)?;
        let reserved = IovaRange::gaps(&ranges?);
        let max_pasid_log2 = said.out_max_pasid_log2;
        Ok(Arc::new(Self { iommu, port, group, capabilities, max_pasid_log2, reserved }))
    }
}

impl Hardware for HostHardware {
    fn group(&self) -> u64 {
        self.group
    }

    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn reserved(&self) -> Vec<IovaRange> {
        self.reserved.clone()
    }

    fn max_pasid_log2(&self) -> u8 {
        self.max_pasid_log2
    }

    fn alloc_paging(
        &self,
        _caller: Option<&dyn Caller>,
        options: DomainOptions,
        data: UserData,
    ) -> Result<Arc<dyn Domain>> {
        if data.kind != IOMMU_HW_INFO_TYPE_NONE {
            return Err(Errno::OPNOTSUPP);
        }
        let wanted = [
            (options.nest_parent, IOMMU_HWPT_ALLOC_NEST_PARENT),
            (options.dirty_tracking, IOMMU_HWPT_ALLOC_DIRTY_TRACKING),
            (options.pasid, IOMMU_HWPT_ALLOC_PASID),
        ];
        let flags = wanted.iter().filter(|(wanted, _)| *wanted).fold(0, |flags, (_, flag)| flags | flag);
        let ioas = self.iommu.ioas()?;
        let hwpt = calls::hwpt_alloc(self.iommu.as_fd(), self.port.id(), ioas.id(), flags, 0, &[])?;
        // SAFETY: the promise of `new`.
        let domain = unsafe { HostDomain::new(ioas, hwpt, options.dirty_tracking) }?;
        Ok(Arc::new(domain))
    }

    fn attach(&self, pasid: Option<u32>, to: Option<&Attachment>) -> Result<()> {
        match to {
            None => self.port.detach(pasid),
            Some(Attachment::Paging(domain)) => {
                let domain: &dyn Any = &**domain;
                let domain = domain.downcast_ref::<HostDomain>().ok_or(Errno::INVAL)?;
                self.port.attach(pasid, domain.id())
            }
            Some(Attachment::Nested(_)) => Err(Errno::INVAL),
        }
    }

    fn info(&self, kind: u32) -> Result<(u32, Vec<u8>)> {
        let mut data = vec![0; MAX_INFO];
        let said = calls::hw_info(self.iommu.as_fd(), self.port.id(), kind, &mut data)?;
        data.truncate(usize::try_from(said.data_len).unwrap_or(usize::MAX));
        // What was asked for and what is told share a field.
        Ok((said.in_data_type, data))
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

//! The IOMMU behind a device.

use core::{any::Any, fmt};
use std::sync::Arc;

use crate::{
    Errno, Result,
    caller::Caller,
    domain::Domain,
    iova::IovaRange,
    object::{DevicePort, PageResponse},
    soft::Port,
    viommu::{ViommuPort, VirtualIommu},
};

bitflags::bitflags! {
    /// What an IOMMU can do for a device (`IOMMU_HW_CAP_*`, `IOMMU_DEV_FEAT_*`).
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Capabilities: u32 {
        /// Its domains note which pages were written to.
        const DIRTY_TRACKING = 1;
        /// It keeps the device's writes coherent with the caches.
        const CACHE_COHERENCY = 2;
        /// It has nested translation: a guest's page table above one of the host's.
        const NESTING = 4;
        /// The device's page requests can be delivered.
        const IOPF = 8;
        /// The device may use address translation services (PCIe 10).
        const ATS = 16;
    }
}

pub use crate::user_data::{Entries, UserData};

/// What is asked of a new paging domain.
#[derive(Clone, Copy, Default, Debug)]
pub struct DomainOptions {
    /// It will be the parent of nested ones.
    pub nest_parent: bool,
    /// It must be able to note writes.
    pub dirty_tracking: bool,
    /// It will be attached to PASIDs.
    pub pasid: bool,
}

/// A guest's page table above a parent domain. What the IOMMU does with it is its own affair.
pub trait Nested: Send + Sync + fmt::Debug {
    /// Runs the entries of a guest's invalidation queue: `done` says how many were, also on an error.
    fn invalidate(&self, caller: &dyn Caller, entries: Entries, done: &mut u32) -> Result<()>;
    /// The concrete type, for the driver that made it.
    fn as_any(&self) -> &dyn Any;
}

/// What a device is attached to.
#[derive(Clone, Debug)]
pub enum Attachment {
    /// A page table of the host's.
    Paging(Arc<dyn Domain>),
    /// A guest's above one of the host's.
    Nested(Arc<dyn Nested>),
}

/// A device as its IOMMU sees it: what [`Context::bind`](crate::Context::bind) binds.
pub trait Hardware: Send + Sync + fmt::Debug {
    /// Devices with the same number cannot be kept apart and are attached together: the IOMMU group.
    fn group(&self) -> u64;
    /// Which IOMMU it is behind. vIOMMUs and nested tables of one are of no use to the devices of another.
    fn iommu(&self) -> u64 {
        0
    }
    /// It has been bound: `port` is how the driver reports page requests, until the device is unbound.
    fn bound(&self, port: DevicePort) {
        drop(port);
    }
    /// What the IOMMU can do for this device.
    fn capabilities(&self) -> Capabilities;
    /// Ranges that must not be mapped for this device (MSI windows among them).
    fn reserved(&self) -> Vec<IovaRange>;
    /// log2 of how many PASIDs it has; 0 without.
    fn max_pasid_log2(&self) -> u8 {
        0
    }
    /// A page table for it. `data` is the driver's own.
    fn alloc_paging(
        &self,
        caller: Option<&dyn Caller>,
        options: DomainOptions,
        data: UserData,
    ) -> Result<Arc<dyn Domain>>;
    /// A guest's page table above `parent`. EOPNOTSUPP when it has no nesting.
    fn alloc_nested(
        &self,
        caller: &dyn Caller,
        parent: &Arc<dyn Domain>,
        data: UserData,
    ) -> Result<Arc<dyn Nested>> {
        let _ = (caller, parent, data);
        Err(Errno::OPNOTSUPP)
    }
    /// A vIOMMU above `parent` of the type `data.kind`. EOPNOTSUPP for a type that it has not.
    fn alloc_viommu(
        &self,
        caller: &dyn Caller,
        parent: &Arc<dyn Domain>,
        data: UserData,
        port: ViommuPort,
    ) -> Result<Arc<dyn VirtualIommu>> {
        let _ = (caller, parent, data, port);
        Err(Errno::OPNOTSUPP)
    }
    /// The answer to a group of page requests (PCIe 10.4.2).
    fn page_response(&self, response: PageResponse) {
        let _ = response;
    }
    /// From now on `pasid` of the device (none: all its plain DMA) is translated by `to`; by nothing when there is none.
    fn attach(&self, pasid: Option<u32>, to: Option<&Attachment>) -> Result<()>;
    /// What its plain DMA, or that of a PASID, goes through, if the software IOMMU translates for it: copies by the device's
    /// addresses take no lock then.
    fn port(&self, pasid: Option<u32>) -> Option<Arc<Port>> {
        let _ = pasid;
        None
    }
    /// What `IOMMU_GET_HW_INFO` tells: the type (`enum iommu_hw_info_type`) and the structure's bytes. `kind` is the type
    /// asked for, 0 for the default. EOPNOTSUPP for one that it has not. A driver with nothing to tell says type 0
    /// (none) and no bytes.
    fn info(&self, kind: u32) -> Result<(u32, Vec<u8>)>;
    /// The concrete type, for the driver that made it.
    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync>;
}

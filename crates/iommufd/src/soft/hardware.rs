//! The software IOMMU as [`Hardware`]: what a software device is bound with.

use core::any::Any;
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::{
    Errno, Result,
    caller::Caller,
    domain::Domain,
    hardware::{Attachment, Capabilities, DomainOptions, Hardware, UserData},
    iova::IovaRange,
    viommu::{ViommuPort, VirtualIommu},
};

use super::{
    domain::SoftDomain,
    port::{Attached, Port},
    vtd::{NestedTable, VtdIommu},
};

/// `enum iommu_hw_info_type`: none. It is also what is asked for by default.
const INFO_NONE: u32 = 0;
/// log2 of the PASIDs that a PCI device can have (PCI Express 6.0, section 7.8.9).
const MAX_PASID_LOG2: u8 = 20;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A device behind the software IOMMU.
#[derive(Debug)]
pub struct SoftDevice {
    group: u64,
    reserved: Vec<IovaRange>,
    plain: Arc<Port>,
    pasids: Mutex<BTreeMap<u32, Arc<Port>>>,
}

impl SoftDevice {
    /// A device in a group of its own number, for which nothing may be mapped in `reserved`.
    #[must_use]
    pub fn new(group: u64, reserved: Vec<IovaRange>) -> Arc<Self> {
        Arc::new(Self { group, reserved, plain: Port::new(), pasids: Mutex::default() })
    }

    /// The port of its DMA without a PASID, or of one PASID.
    #[must_use]
    pub fn port(&self, pasid: Option<u32>) -> Arc<Port> {
        match pasid {
            None => Arc::clone(&self.plain),
            Some(pasid) => Arc::clone(lock(&self.pasids).entry(pasid).or_insert_with(Port::new)),
        }
    }
}

impl Hardware for SoftDevice {
    fn group(&self) -> u64 {
        self.group
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::DIRTY_TRACKING | Capabilities::CACHE_COHERENCY | Capabilities::NESTING
    }

    fn reserved(&self) -> Vec<IovaRange> {
        self.reserved.clone()
    }

    fn max_pasid_log2(&self) -> u8 {
        MAX_PASID_LOG2
    }

    /// EOPNOTSUPP for a driver's own data: it has none.
    fn alloc_paging(
        &self,
        _caller: Option<&dyn Caller>,
        _options: DomainOptions,
        data: UserData,
    ) -> Result<Arc<dyn Domain>> {
        if data.kind != INFO_NONE {
            return Err(Errno::OPNOTSUPP);
        }
        Ok(Arc::new(SoftDomain::new()))
    }

    /// EOPNOTSUPP for a type that is not [`vtd::VIOMMU_TYPE`](super::vtd::VIOMMU_TYPE).
    fn alloc_viommu(
        &self,
        caller: &dyn Caller,
        parent: &Arc<dyn Domain>,
        data: UserData,
        port: ViommuPort,
    ) -> Result<Arc<dyn VirtualIommu>> {
        let viommu: Arc<dyn VirtualIommu> = VtdIommu::alloc(caller, parent, data, port)?;
        Ok(viommu)
    }

    /// EINVAL for a domain that is not of this IOMMU's making, and for a guest's whose vIOMMU does not know the device.
    fn attach(&self, pasid: Option<u32>, to: Option<&Attachment>) -> Result<()> {
        let attached = match to {
            None => None,
            Some(Attachment::Paging(domain)) => {
                let domain: &dyn Any = &**domain;
                Some(Attached::Host(domain.downcast_ref::<SoftDomain>().ok_or(Errno::INVAL)?.clone()))
            }
            Some(Attachment::Nested(nested)) => {
                let nested = nested.as_any().downcast_ref::<NestedTable>().ok_or(Errno::INVAL)?;
                let (table, source) = nested.attach(self)?;
                Some(Attached::Guest { table, source })
            }
        };
        if pasid.is_some_and(|pasid| pasid >> MAX_PASID_LOG2 != 0) {
            return Err(Errno::INVAL);
        }
        self.port(pasid).attach(attached);
        Ok(())
    }

    fn port(&self, pasid: Option<u32>) -> Option<Arc<Port>> {
        Some(Self::port(self, pasid))
    }

    fn info(&self, kind: u32) -> Result<(u32, Vec<u8>)> {
        if kind == INFO_NONE { Ok((INFO_NONE, Vec::new())) } else { Err(Errno::OPNOTSUPP) }
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

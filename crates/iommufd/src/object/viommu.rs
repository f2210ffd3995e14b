//! VIOMMU: a guest's slice of an IOMMU.

use core::fmt;
use std::{
    collections::BTreeMap,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use super::{
    Pending,
    device::Device,
    hwpt::PagingHwpt,
    table::{Table, Use},
    veventq::EventQueue,
};
use crate::{
    Context, Errno, Result,
    caller::Caller,
    hardware::UserData,
    inject,
    mapping::{Region, Regions},
    viommu::VirtualIommu,
};

/// What a vIOMMU's object and its driver have in common.
pub(super) struct Shared {
    id: u32,
    table: Arc<Table>,
    regions: Arc<Regions>,
    /// By their types.
    pub(super) events: Mutex<BTreeMap<u32, Weak<EventQueue>>>,
}

impl Shared {
    pub(super) fn events(&self) -> MutexGuard<'_, BTreeMap<u32, Weak<EventQueue>>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the guest has of a vIOMMU.
#[derive(Debug, Default)]
pub(super) struct Parts {
    /// The vDEVICEs by the ids that the guest has for them.
    pub(super) devices: BTreeMap<u64, u32>,
    /// The hardware queues by type and index.
    pub(super) queues: BTreeMap<(u32, u32), u32>,
}

/// A vIOMMU.
pub(crate) struct Viommu {
    pub(crate) driver: Arc<dyn VirtualIommu>,
    pub(crate) parent: Use<PagingHwpt>,
    pub(crate) iommu: u64,
    pub(super) shared: Arc<Shared>,
    /// Held while the driver gets queues and devices, so that they come in order.
    parts: Mutex<Parts>,
}

impl Viommu {
    pub(super) fn parts(&self) -> MutexGuard<'_, Parts> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Viommu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Viommu")
            .field("driver", &self.driver)
            .field("parent", &self.parent)
            .finish_non_exhaustive()
    }
}

/// How the driver of a vIOMMU reaches the vIOMMU's object.
#[derive(Clone)]
pub struct ViommuPort {
    shared: Arc<Shared>,
}

impl fmt::Debug for ViommuPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "port of vIOMMU {}", self.shared.id)
    }
}

impl ViommuPort {
    /// Puts an event into the queue of its type; when the queue is full user space reads that it lost one. EOPNOTSUPP when
    /// nobody wants events of the type.
    pub fn report(&self, kind: u32, data: &[u8]) -> Result<()> {
        let queue = self.shared.events().get(&kind).and_then(Weak::upgrade).ok_or(Errno::OPNOTSUPP)?;
        queue.push(data);
        Ok(())
    }

    /// Lets user space map `length` bytes of `file` from `offset` on (multiples of the page size), for as long as the result
    /// lives: by `mmap` on the context's descriptor at [`Published::offset`], which the driver tells it. The vIOMMU cannot
    /// be destroyed while it is mapped.
    pub fn publish(&self, file: OwnedFd, offset: u64, length: u64) -> Result<Published> {
        let owner = Box::new({
            let (table, id) = (self.shared.table.clone(), self.shared.id);
            move || Ok(Box::new(table.get::<Viommu>(id)?.hold()) as Box<dyn fmt::Debug + Send + Sync>)
        });
        let at = self.shared.regions.add(Region { file: Arc::new(file), offset, length, owner })?;
        Ok(Published { at, regions: self.shared.regions.clone() })
    }
}

/// Memory that user space may map. Dropping it ends that; mappings that there are stay.
#[derive(Debug)]
pub struct Published {
    at: u64,
    regions: Arc<Regions>,
}

impl Published {
    /// The offset for `mmap` on the context's descriptor.
    pub fn offset(&self) -> u64 {
        self.at
    }
}

impl Drop for Published {
    fn drop(&mut self) {
        self.regions.remove(self.at);
    }
}

impl Context {
    pub(crate) fn prepare_viommu(
        &self,
        caller: &dyn Caller,
        device: u32,
        parent: u32,
        data: UserData,
    ) -> Result<Pending<Viommu>> {
        inject::check()?;
        let device = self.table().get::<Device>(device)?;
        let parent = self.table().get::<PagingHwpt>(parent)?;
        if !parent.options.nest_parent || parent.iommu != device.hardware.iommu() {
            return Err(Errno::INVAL);
        }
        let reservation = self.table().reserve()?;
        let shared = Arc::new(Shared {
            id: reservation.id(),
            table: self.table().clone(),
            regions: self.regions().clone(),
            events: Mutex::default(),
        });
        let port = ViommuPort { shared: shared.clone() };
        let driver = device.hardware.alloc_viommu(caller, &parent.domain, data, port)?;
        let (parent, iommu) = (parent.hold(), device.hardware.iommu());
        Ok(Pending::new(reservation, Viommu { driver, parent, iommu, shared, parts: Mutex::default() }))
    }
}

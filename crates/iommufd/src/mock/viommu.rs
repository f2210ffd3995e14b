//! The mock's vIOMMU: the caches of its devices, a page that user space maps, events, and hardware queues that are
//! never read.

use core::{any::Any, fmt, mem::offset_of};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use uapi::iommufd::IOMMU_VEVENTQ_TYPE_DEFAULT;
use uapi::iommufd_test::{
    IOMMU_HW_QUEUE_TYPE_SELFTEST, IOMMU_TEST_HW_QUEUE_MAX, IOMMU_TEST_INVALIDATE_FLAG_ALL,
    IOMMU_VEVENTQ_TYPE_SELFTEST, IOMMU_VIOMMU_INVALIDATE_DATA_SELFTEST, iommu_viommu_event_selftest,
    iommu_viommu_invalidate_selftest, iommu_viommu_selftest,
};
use zerocopy::IntoBytes;

use super::{hardware::MockHardware, nested::MockNested};
use crate::{
    Errno, Result,
    caller::Caller,
    hardware::{Entries, Hardware, Nested, UserData},
    inject,
    iova::PAGE_SIZE,
    viommu::{HardwareQueue, Published, QueueAddressing, QueueRequest, ViommuPort, VirtualIommu},
};

/// How much user space may map.
const MAPPED: u64 = 2 * PAGE_SIZE;

/// A vIOMMU.
pub(super) struct MockViommu {
    this: Weak<Self>,
    port: ViommuPort,
    devices: Mutex<BTreeMap<u64, Arc<MockHardware>>>,
    _published: Option<Published>,
}

impl fmt::Debug for MockViommu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MockViommu").field("port", &self.port).finish_non_exhaustive()
    }
}

impl MockViommu {
    /// With data, user space may map memory that begins with `in_data`, and learns where.
    pub(super) fn new(caller: &dyn Caller, data: UserData, port: ViommuPort) -> Result<Arc<Self>> {
        inject::check()?;
        let published = if data.length == 0 {
            None
        } else {
            let mut known: iommu_viommu_selftest =
                data.read(&**caller.process(), offset_of!(iommu_viommu_selftest, out_mmap_offset))?;
            let file = memfd_create("mock vIOMMU", MemfdFlags::CLOEXEC)?;
            ftruncate(&file, MAPPED)?;
            rustix::io::pwrite(&file, known.in_data.as_bytes(), 0)?;
            let published = port.publish(file, 0, MAPPED)?;
            known.out_data = known.in_data;
            known.out_mmap_offset = published.offset();
            known.out_mmap_length = MAPPED;
            data.write(&**caller.process(), &known)?;
            Some(published)
        };
        Ok(Arc::new_cyclic(|this| Self {
            this: this.clone(),
            port,
            devices: Mutex::default(),
            _published: published,
        }))
    }

    fn devices(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<MockHardware>>> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// By what id the guest knows `device`. ENOENT when it does not.
    pub(super) fn virt_id(&self, device: &MockHardware) -> Result<u64> {
        let devices = self.devices();
        let found = devices.iter().find(|(_, known)| core::ptr::eq(Arc::as_ptr(known), device));
        found.map(|(virt_id, _)| *virt_id).ok_or(Errno::NOENT)
    }

    /// Reports an event of `device`.
    pub(super) fn report(&self, device: &MockHardware) -> Result<()> {
        // The event has room for 32 bits.
        let event = iommu_viommu_event_selftest { virt_id: self.virt_id(device)? as u32 };
        self.port.report(IOMMU_VEVENTQ_TYPE_SELFTEST, event.as_bytes())
    }

    fn run(&self, request: &iommu_viommu_invalidate_selftest) -> Result<()> {
        if request.flags & !IOMMU_TEST_INVALIDATE_FLAG_ALL != 0 {
            return Err(Errno::OPNOTSUPP);
        }
        let device = self.devices().get(&u64::from(request.vdev_id)).cloned().ok_or(Errno::INVAL)?;
        device.invalidate(request.cache_id, request.flags & IOMMU_TEST_INVALIDATE_FLAG_ALL != 0)
    }
}

impl VirtualIommu for MockViommu {
    fn alloc_nested(&self, caller: &dyn Caller, data: UserData) -> Result<Arc<dyn Nested>> {
        Ok(Arc::new(MockNested::new(caller, data, self.this.upgrade())?))
    }

    fn invalidate(&self, caller: &dyn Caller, entries: Entries, done: &mut u32) -> Result<()> {
        if entries.kind != IOMMU_VIOMMU_INVALIDATE_DATA_SELFTEST {
            return Err(Errno::INVAL);
        }
        let length = size_of::<iommu_viommu_invalidate_selftest>();
        for index in 0..entries.number {
            self.run(&entries.read(&**caller.process(), index, length)?)?;
            *done += 1;
        }
        Ok(())
    }

    fn add_device(&self, hardware: &Arc<dyn Hardware>, virt_id: u64) -> Result<()> {
        inject::check()?;
        let device = hardware.clone().as_any().downcast::<MockHardware>().map_err(|_| Errno::INVAL)?;
        self.devices().insert(virt_id, device);
        Ok(())
    }

    fn remove_device(&self, virt_id: u64) {
        self.devices().remove(&virt_id);
    }

    fn has_events(&self, kind: u32) -> bool {
        kind != IOMMU_VEVENTQ_TYPE_DEFAULT
    }

    fn queues(&self, kind: u32) -> Option<(QueueAddressing, u32)> {
        (kind == IOMMU_HW_QUEUE_TYPE_SELFTEST)
            .then_some((QueueAddressing::Contiguous, IOMMU_TEST_HW_QUEUE_MAX))
    }

    fn create_queue(&self, _request: QueueRequest) -> Result<Box<dyn HardwareQueue>> {
        inject::check()?;
        Ok(Box::new(MockQueue))
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

/// A queue that nobody reads.
#[derive(Debug)]
struct MockQueue;

impl HardwareQueue for MockQueue {}

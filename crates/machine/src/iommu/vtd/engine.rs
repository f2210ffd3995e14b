//! What the registers drive: objects of crate `iommufd`, by the table in [`iommufd::soft::vtd`].
//!
//! Guest RAM is an IOAS, and the HWPT on it is the parent of all others. The guest's page tables are nested HWPTs, one for each that a
//! device is attached to; the invalidation queue is a HW_QUEUE, which a thread of its own serves. Devices of the host are bound to the
//! same context, and attached to guest RAM or to shadows of the guest's page tables.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use cpu::GuestRam;
use iommufd::account::Accounting;
use iommufd::caller::LibraryCaller;
use iommufd::domain::Prot;
use iommufd::hardware::UserData;
use iommufd::iova::{Iova, IovaRange};
use iommufd::process::{Process, UserAddr};
use iommufd::soft::vtd::{
    HWPT_DATA_TYPE, Invalidation, IotlbScope, Listener, QUEUE_TYPE, Queue, TableData, VIOMMU_TYPE,
    ViommuData, VtdIommu,
};
use iommufd::soft::{Port, SoftDevice};
use iommufd::{BoundDevice, Context, Errno, HwptOptions};

use super::context::{Table, Target};
use super::shadow::Shadows;
use crate::dma;
use crate::iommu::ram::GuestProcess;
use crate::iommu::{GROUPS, HostEndpoint, interrupts};
use crate::layout;
use crate::vcpu::lock;

/// The number of the device that the objects are made for, which is behind nothing: no requester has so large a number.
const ITSELF: u64 = 1 << 16;

/// Where the queue is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ring {
    /// The guest-physical address of its first descriptor.
    base: u64,
    /// Bytes, a power of two.
    size: u64,
}

impl Ring {
    /// By the queue's base register (VT-d 10.4.21).
    pub(super) fn new(register: u64) -> Self {
        Self { base: register & !0xfff, size: 0x1000 << (register & 7) }
    }
}

/// The objects of a unit.
#[derive(Debug)]
pub(super) struct Engine {
    context: Arc<Context>,
    /// What devices of the host have instead of nested HWPTs.
    shadows: Shadows,
    _itself: BoundDevice,
    /// The HWPT in which guest RAM lies at its physical addresses.
    parent: u32,
    viommu: u32,
    driver: Arc<VtdIommu>,
    /// The nested HWPTs, and how many devices are attached to each.
    tables: Mutex<BTreeMap<Table, Nested>>,
    /// The queue's object, and the queue.
    queue: Mutex<Option<(u32, Arc<Queue>)>>,
}

#[derive(Clone, Copy, Debug)]
struct Nested {
    hwpt: u32,
    devices: usize,
}

impl Engine {
    /// One without devices and queue.
    ///
    /// # Errors
    /// ENOMEM.
    pub(super) fn new(ram: &Arc<GuestRam>) -> Result<Self, Errno> {
        let context = Context::new();
        context.set_accounting(Accounting::None)?;
        let process: Arc<dyn Process> = Arc::new(GuestProcess::new(Arc::clone(ram)));
        let ioas = context.ioas_alloc()?;
        for place in dma::places(ram) {
            let (at, from) = (Some(Iova(place.physical)), UserAddr(place.host));
            context.ioas_map(ioas, &process, from, place.len, at, Prot::READ | Prot::WRITE)?;
        }
        let itself = context.bind(SoftDevice::new(ITSELF, Vec::new()))?;
        let none = LibraryCaller::new(&0u8);
        let options = HwptOptions { nest_parent: true, ..HwptOptions::default() };
        let parent = context.hwpt_alloc(&none, itself.id(), ioas, options, UserData::default())?;
        let caller =
            LibraryCaller::new(&ViommuData { address_bits: layout::PHYS_BITS, ..Default::default() });
        let viommu = context.viommu_alloc(&caller, itself.id(), parent, caller.data(VIOMMU_TYPE))?;
        let driver = context.viommu(viommu)?.as_any().downcast().map_err(|_| Errno::INVAL)?;
        let (tables, queue) = Default::default();
        let shadows = Shadows::new(ram, &context, &process, ioas);
        Ok(Self { context, shadows, _itself: itself, parent, viommu, driver, tables, queue })
    }

    /// Who hears of what the queue and the devices do.
    pub(super) fn listen(&self, listener: Arc<dyn Listener>) {
        self.driver.listen(Some(listener));
    }

    /// Adds a device, which is attached to nothing.
    ///
    /// # Errors
    /// ENOMEM; EEXIST when there is one of this number.
    pub(super) fn bind(&self, source: u16) -> Result<(BoundDevice, Arc<Port>), Errno> {
        let device = SoftDevice::new(GROUPS | u64::from(source), vec![interrupts()?]);
        let port = device.port(None);
        let device = self.context.bind(device)?;
        self.context.vdevice_alloc(self.viommu, device.id(), source.into())?;
        Ok((device, port))
    }

    /// Adds a device of the host, which is attached to nothing: with the addresses that it can have translated.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn bind_host(&self, device: HostEndpoint) -> Result<(BoundDevice, Vec<IovaRange>), Errno> {
        device.bind(&self.context)
    }

    /// What devices of the host are attached to.
    pub(super) fn shadows(&self) -> &Shadows {
        &self.shadows
    }

    /// Attaches a device that is attached to nothing.
    ///
    /// # Errors
    /// ENOMEM.
    pub(super) fn attach(&self, device: &BoundDevice, to: Target) -> Result<(), Errno> {
        let hwpt = match to {
            Target::Memory => self.parent,
            Target::Table(table) => self.hold(device, table)?,
        };
        let attached = device.attach(None, hwpt).map(drop);
        if attached.is_err() {
            self.release(to);
        }
        attached
    }

    /// Attaches it to nothing. It uses nothing of what it was attached to when this returns.
    pub(super) fn detach(&self, device: &BoundDevice, from: Target) {
        device.detach(None);
        self.release(from);
    }

    /// The HWPT of a table, which is made if no device is attached to it yet.
    fn hold(&self, device: &BoundDevice, table: Table) -> Result<u32, Errno> {
        let mut tables = lock(&self.tables);
        if let Some(nested) = tables.get_mut(&table) {
            nested.devices += 1;
            return Ok(nested.hwpt);
        }
        let address_bits = 12 + 9 * u32::from(table.levels);
        let data = TableData { root: table.root, domain: table.domain.into(), address_bits };
        let (caller, options) = (LibraryCaller::new(&data), HwptOptions::default());
        let data = caller.data(HWPT_DATA_TYPE);
        let hwpt = self.context.hwpt_alloc(&caller, device.id(), self.viommu, options, data)?;
        tables.insert(table, Nested { hwpt, devices: 1 });
        Ok(hwpt)
    }

    /// A device is not attached to its table any more, which goes with the last one.
    fn release(&self, from: Target) {
        let Target::Table(table) = from else { return };
        let mut tables = lock(&self.tables);
        let Some(nested) = tables.get_mut(&table) else { return };
        nested.devices -= 1;
        if nested.devices == 0 {
            let hwpt = nested.hwpt;
            tables.remove(&table);
            if let Err(errno) = self.context.destroy(hwpt) {
                tracing::warn!(%errno, ?table, "a page table of the guest's is still in use");
            }
        }
    }

    /// Forgets translations. None of them is used any more when this returns.
    pub(super) fn forget(&self, scope: IotlbScope) {
        self.driver.invalidate(Invalidation::Iotlb(scope));
    }

    /// Serves another queue from its first descriptor on, or none.
    ///
    /// # Errors
    /// ENOENT: it is not in guest RAM. EAGAIN: the host is out of threads.
    pub(super) fn set_queue(&self, ring: Option<Ring>) -> Result<(), Errno> {
        let mut queue = lock(&self.queue);
        if let Some((id, _)) = queue.take() {
            self.context.destroy(id)?;
        }
        if let Some(Ring { base, size }) = ring {
            let id = self.context.hw_queue_alloc(self.viommu, QUEUE_TYPE, 0, Iova(base), size)?;
            *queue = Some((id, self.driver.queue(0).ok_or(Errno::IO)?));
        }
        Ok(())
    }

    /// The queue, if there is one.
    pub(super) fn queue(&self) -> Option<Arc<Queue>> {
        lock(&self.queue).as_ref().map(|(_, queue)| Arc::clone(queue))
    }
}

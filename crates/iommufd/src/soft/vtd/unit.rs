//! The vIOMMU: what its objects have in common, and the driver behind it.

use core::{any::Any, fmt};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak},
};

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{
    abi::{
        EVENT_TYPE, Event, HWPT_DATA_TYPE, INVALIDATE_TYPE, QUEUE_TYPE, QUEUES, TableData, VIOMMU_TYPE,
        ViommuData, event,
    },
    descriptor::{ContextScope, Descriptor, Invalidation, IotlbScope, QueueError},
    doorbell::Doorbells,
    queue::{Queue, Server},
    record::FaultRecord,
    stage::Stage,
    table::{GuestTable, NestedTable, Tables},
};
use crate::{
    Errno, Result,
    caller::Caller,
    domain::Domain,
    hardware::{Entries, Hardware, Nested, UserData},
    soft::{Fault, SoftDevice, domain::SoftDomain, table::LAST_ADDRESS},
    viommu::{HardwareQueue, Published, QueueAddressing, QueueRequest, ViommuPort, VirtualIommu},
};

/// Bits of an address in a guest's memory, unless it says how many.
const ADDRESS_BITS: u32 = 52;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a monitor hears from its guest's vIOMMU. Calls come from the threads of queues and devices, with no lock of this crate
/// held. They must not destroy the queue whose thread calls, nor take a lock that somebody holds who destroys it: that waits
/// for the thread.
pub trait Listener: Send + Sync + fmt::Debug {
    /// Context entries have changed: whatever follows from that has to be done when this returns, because the guest takes its
    /// next wait descriptor for the end of it.
    fn contexts(&self, scope: ContextScope);

    /// Translations are forgotten: whatever follows from that has to be done when this returns, as for [`Self::contexts`]. Devices
    /// of this IOMMU may use them until the next wait descriptor.
    fn translations(&self, scope: IotlbScope) {
        let _ = scope;
    }

    /// An access of a device faulted: a fault recording register is to get this.
    fn fault(&self, record: FaultRecord);

    /// Queue `queue` executed a wait descriptor that asks for an interrupt (`ICS.IWC`).
    fn completed(&self, queue: u32);

    /// Queue `queue` stopped at its head (`FSTS.IQE`): [`Queue::clear_error`].
    fn stopped(&self, queue: u32, error: QueueError);

    /// `length` bytes at `address` in the guest's memory were written to by queue `queue`: a status.
    fn written(&self, queue: u32, address: u64, length: u64) {
        let _ = (queue, address, length);
    }
}

/// What a vIOMMU's objects have in common.
pub(in crate::soft) struct Unit {
    port: ViommuPort,
    /// The guest's memory.
    pub(super) memory: SoftDomain,
    tables: Mutex<Tables>,
    /// By requester ids.
    devices: Mutex<BTreeMap<u16, Arc<SoftDevice>>>,
    listener: RwLock<Option<Arc<dyn Listener>>>,
}

impl fmt::Debug for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unit").field("port", &self.port).finish_non_exhaustive()
    }
}

impl Unit {
    fn listener(&self) -> Option<Arc<dyn Listener>> {
        self.listener.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn tell(&self, tell: impl FnOnce(&dyn Listener)) {
        if let Some(listener) = self.listener() {
            tell(&*listener);
        }
    }

    /// Puts an event into the queue, if there is one.
    pub(super) fn event(&self, kind: u32, queue: u32, data: [u64; 2]) {
        // Nobody need want events.
        let _ = self.port.report(EVENT_TYPE, Event { kind, queue, data }.as_bytes());
    }

    /// By what id the guest knows `device`.
    pub(super) fn source(&self, device: &SoftDevice) -> Option<u16> {
        let devices = lock(&self.devices);
        devices.iter().find(|(_, known)| core::ptr::eq(Arc::as_ptr(known), device)).map(|(id, _)| *id)
    }

    /// Records a fault of the device `source`, if it is one that the guest's IOMMU knows.
    pub(in crate::soft) fn fault(&self, source: u16, fault: &Fault) {
        let Some(record) = FaultRecord::new(source, fault) else { return };
        self.event(event::FAULT, 0, record.to_words());
        self.tell(|listener| listener.fault(record));
    }

    /// Forgets, and adds to `pending` whose readers have to be waited for.
    pub(super) fn forget(&self, what: Invalidation, pending: &mut Vec<Arc<GuestTable>>) {
        let (domain, first, last) = match what {
            Invalidation::Context(scope) => return self.tell(|listener| listener.contexts(scope)),
            Invalidation::Interrupts => return,
            Invalidation::Iotlb(IotlbScope::Global) => (None, 0, LAST_ADDRESS),
            Invalidation::Iotlb(IotlbScope::Domain(domain)) => (Some(domain), 0, LAST_ADDRESS),
            Invalidation::Iotlb(IotlbScope::Pages { domain, first, last }) => (Some(domain), first, last),
        };
        let tables = lock(&self.tables).of(domain);
        for table in tables {
            table.invalidate(first, last);
            if !pending.iter().any(|other| Arc::ptr_eq(other, &table)) {
                pending.push(table);
            }
        }
        if let Invalidation::Iotlb(scope) = what {
            self.tell(|listener| listener.translations(scope));
        }
    }
}

/// A vIOMMU of type [`VIOMMU_TYPE`].
#[derive(Debug)]
pub struct VtdIommu {
    unit: Arc<Unit>,
    address_bits: u32,
    doorbells: Arc<Doorbells>,
    _published: Option<Published>,
    /// By their indexes, as far as they are there.
    queues: Mutex<BTreeMap<u32, Weak<Queue>>>,
}

impl VtdIommu {
    /// EOPNOTSUPP for another type; EINVAL for a parent that is not of this IOMMU's making, and for data that is wrong.
    pub(in crate::soft) fn alloc(
        caller: &dyn Caller,
        parent: &Arc<dyn Domain>,
        data: UserData,
        port: ViommuPort,
    ) -> Result<Arc<Self>> {
        if data.kind != VIOMMU_TYPE {
            return Err(Errno::OPNOTSUPP);
        }
        let any: &dyn Any = &**parent;
        let memory = any.downcast_ref::<SoftDomain>().ok_or(Errno::INVAL)?.clone();
        let process = &**caller.process();
        let mut known = ViommuData::default();
        if data.length != 0 {
            known = data.read(process, core::mem::offset_of!(ViommuData, doorbell_offset))?;
        }
        if known.flags != 0 {
            return Err(Errno::OPNOTSUPP);
        }
        let address_bits = if known.address_bits == 0 { ADDRESS_BITS } else { known.address_bits };
        Stage::new(0, 48, address_bits).ok_or(Errno::INVAL)?;
        let (doorbells, published) = if data.length == 0 {
            (Doorbells::private()?, None)
        } else {
            let (doorbells, file) = Doorbells::shared()?;
            let published = port.publish(file, 0, Doorbells::LENGTH)?;
            known.doorbell_offset = published.offset();
            known.doorbell_length = Doorbells::LENGTH;
            data.write(process, &known)?;
            (doorbells, Some(published))
        };
        let unit = Arc::new(Unit {
            port,
            memory,
            tables: Mutex::default(),
            devices: Mutex::default(),
            listener: RwLock::default(),
        });
        Ok(Arc::new(Self { unit, address_bits, doorbells, _published: published, queues: Mutex::default() }))
    }

    /// Who hears of what happens, from now on.
    pub fn listen(&self, listener: Option<Arc<dyn Listener>>) {
        *self.unit.listener.write().unwrap_or_else(PoisonError::into_inner) = listener;
    }

    /// The queue of an index, while it is there.
    #[must_use]
    pub fn queue(&self, index: u32) -> Option<Arc<Queue>> {
        lock(&self.queues).get(&index)?.upgrade().filter(|queue| !queue.ended())
    }

    /// Forgets, as by a register (`CCMD`, `IOTLB`): when this returns nobody uses what is forgotten. It must not be called by
    /// who has a section of one of its devices open.
    pub fn invalidate(&self, what: Invalidation) {
        let mut pending = Vec::new();
        self.unit.forget(what, &mut pending);
        pending.iter().for_each(|table| table.sync());
    }

    /// Records a fault that was found before the page tables: no context entry, a root table that is none (VT-d 7.1.3), by
    /// its number.
    pub fn report(&self, record: FaultRecord) {
        self.unit.event(event::FAULT, 0, record.to_words());
        self.unit.tell(|listener| listener.fault(record));
    }
}

/// One descriptor in the data of `IOMMU_HWPT_INVALIDATE`.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
struct Words([u64; 2]);

impl VirtualIommu for VtdIommu {
    /// EOPNOTSUPP for another type; EINVAL for a width, a root or a domain that cannot be.
    fn alloc_nested(&self, caller: &dyn Caller, data: UserData) -> Result<Arc<dyn Nested>> {
        if data.kind != HWPT_DATA_TYPE {
            return Err(Errno::OPNOTSUPP);
        }
        let known: TableData = data.read(&**caller.process(), size_of::<TableData>())?;
        let stage = Stage::new(known.root, known.address_bits, self.address_bits).ok_or(Errno::INVAL)?;
        let domain = u16::try_from(known.domain).map_err(|_| Errno::INVAL)?;
        let table = GuestTable::new(&self.unit, &self.unit.memory, domain, stage);
        lock(&self.unit.tables).add(&table);
        Ok(Arc::new(NestedTable::new(table)))
    }

    /// EOPNOTSUPP for another type; EINVAL for what is no descriptor, or a wait descriptor, which has nothing to wait for here.
    fn invalidate(&self, caller: &dyn Caller, entries: Entries, done: &mut u32) -> Result<()> {
        if entries.kind != INVALIDATE_TYPE {
            return Err(Errno::OPNOTSUPP);
        }
        let mut pending = Vec::new();
        let result = (0..entries.number).try_for_each(|index| {
            let Words([low, high]) = entries.read(&**caller.process(), index, size_of::<Words>())?;
            match Descriptor::decode(u64::from_le(low), u64::from_le(high)) {
                Ok(Descriptor::Invalidate(what)) => self.unit.forget(what, &mut pending),
                _ => return Err(Errno::INVAL),
            }
            *done += 1;
            Ok(())
        });
        pending.iter().for_each(|table| table.sync());
        result
    }

    /// EINVAL for an id of more than 16 bits, or a device of another kind.
    fn add_device(&self, hardware: &Arc<dyn Hardware>, virt_id: u64) -> Result<()> {
        let source = u16::try_from(virt_id).map_err(|_| Errno::INVAL)?;
        let device = hardware.clone().as_any().downcast::<SoftDevice>().map_err(|_| Errno::INVAL)?;
        lock(&self.unit.devices).insert(source, device);
        Ok(())
    }

    fn remove_device(&self, virt_id: u64) {
        if let Ok(source) = u16::try_from(virt_id) {
            lock(&self.unit.devices).remove(&source);
        }
    }

    fn has_events(&self, kind: u32) -> bool {
        kind == EVENT_TYPE
    }

    /// The thread reads a queue wherever its pages lie.
    fn queues(&self, kind: u32) -> Option<(QueueAddressing, u32)> {
        (kind == QUEUE_TYPE).then_some((QueueAddressing::Translated, QUEUES))
    }

    /// EINVAL for a length that is none, or where it begins; EAGAIN when there can be no thread.
    fn create_queue(&self, request: QueueRequest) -> Result<Box<dyn HardwareQueue>> {
        let bell = self.doorbells.bell(request.index).ok_or(Errno::INVAL)?;
        let server = Server::start(&self.unit, bell, request)?;
        lock(&self.queues).insert(server.queue().index(), Arc::downgrade(server.queue()));
        Ok(Box::new(server))
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

#[cfg(test)]
impl VtdIommu {
    /// Where a page of the guest's memory is in this process.
    pub(super) fn host(&self, at: u64) -> Option<u64> {
        self.unit.memory.lookup(crate::iova::Iova(at)).map(|host| host.0)
    }

    /// The most nodes that an IOTLB of it has.
    pub(super) fn largest_iotlb(&self) -> usize {
        lock(&self.unit.tables).of(None).iter().map(|table| table.iotlb_nodes()).max().unwrap_or(0)
    }
}

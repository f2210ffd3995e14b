//! DEVICE: a device that is bound to a context.

use core::{fmt, mem};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use super::{
    fault::{self, FaultQueue, PageRequest, PageResponse, ResponseCode},
    group::{self, Group, Pasid},
    hwpt::{PagingHwpt, Target},
    ioas::IoasObject,
    table::{Table, Use},
};
use crate::{
    Context, Errno, Result,
    domain::HostAddr,
    hardware::Hardware,
    inject,
    ioas::Owner,
    iova::{Iova, IovaRange},
    soft::{Fault, FaultReason, PortDma},
};

/// How a device is attached: at first, or instead of what it is attached to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum How {
    Attach,
    Replace,
}

/// A group of page requests that is not complete: which address space it is for, and which group.
type RequestGroup = (Pasid, u32);

/// Where page requests go. Taken after the group's lock, before a queue's.
#[derive(Debug, Default)]
struct Faults {
    /// The queue of what is attached.
    queues: BTreeMap<Pasid, Arc<FaultQueue>>,
    partial: BTreeMap<RequestGroup, Vec<PageRequest>>,
}

/// A device.
pub(crate) struct Device {
    pub(crate) id: u32,
    pub(crate) hardware: Arc<dyn Hardware>,
    /// In whose name its reserved ranges are reserved.
    pub(super) owner: Owner,
    group: Arc<Group>,
    table: Arc<Table>,
    faults: Mutex<Faults>,
    /// Its vDEVICE.
    pub(super) vdevice: Mutex<Option<u32>>,
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device")
            .field("id", &self.id)
            .field("hardware", &self.hardware)
            .finish_non_exhaustive()
    }
}

impl Device {
    fn faults(&self) -> MutexGuard<'_, Faults> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reserves in `ioas` what the device cannot reach by way of a page table.
    pub(super) fn reserve(&self, ioas: &IoasObject) -> Result<()> {
        for range in self.hardware.reserved() {
            ioas.space.reserve(range, self.owner).inspect_err(|_| ioas.space.unreserve(self.owner))?;
        }
        Ok(())
    }

    /// Tells the hardware, and leads page requests to where they belong now. Those for what it was attached to before are
    /// answered "invalid".
    pub(super) fn attach_hardware(&self, pasid: Pasid, target: Option<&Target>) -> Result<()> {
        self.hardware.attach(pasid, target.map(Target::attachment).as_ref())?;
        let queue = target.and_then(Target::faults).map(|queue| queue.as_arc().clone());
        let before = {
            let mut faults = self.faults();
            match queue {
                Some(queue) => faults.queues.insert(pasid, queue),
                None => faults.queues.remove(&pasid),
            }
        };
        if let Some(before) = before {
            before.dismiss(self.id, pasid);
        }
        Ok(())
    }

    fn change(self: &Arc<Self>, pasid: Pasid, pt_id: u32, how: How) -> Result<u32> {
        let pasid = plain_if_zero(pasid);
        let change = |target: Target| match how {
            How::Attach => self.group.attach(self, pasid, target).map(|()| None),
            How::Replace => self.group.replace(self, pasid, target),
        };
        let (before, target) = match self.table.get_any(pt_id)?.downcast::<IoasObject>() {
            Ok(ioas) => group::with_automatic(&self.table, self, &ioas.hold(), change)?,
            Err(other) => {
                let target = Target::of(other)?;
                (change(target.clone())?, target)
            }
        };
        let id = target.id();
        drop(target);
        if let Some(before) = before {
            self.release(before);
        }
        Ok(id)
    }

    /// Ends the use of a page table. One that was made automatically goes with its last device.
    fn release(&self, target: Target) {
        let automatic = matches!(&target, Target::Paging(hwpt) if hwpt.automatic).then(|| target.id());
        drop(target);
        if let Some(id) = automatic {
            // It stays while another device uses it.
            let _ = self.table.destroy(id);
        }
    }

    pub(crate) fn attach(self: &Arc<Self>, pasid: Pasid, pt_id: u32) -> Result<u32> {
        self.change(pasid, pt_id, How::Attach)
    }

    pub(crate) fn replace(self: &Arc<Self>, pasid: Pasid, pt_id: u32) -> Result<u32> {
        self.change(pasid, pt_id, How::Replace)
    }

    pub(crate) fn detach(&self, pasid: Pasid) {
        if let Some(target) = self.group.detach(self, plain_if_zero(pasid)) {
            self.release(target);
        }
    }

    /// What `pasid` is attached to.
    pub(crate) fn target(&self, pasid: Pasid) -> Option<Target> {
        self.group.target(self, plain_if_zero(pasid))
    }

    /// Takes a page request; a complete group goes into the queue.
    pub(crate) fn report(&self, request: PageRequest) -> Result<()> {
        let mut faults = self.faults();
        // Requests without a PASID, and those of PASIDs that are attached to nothing of their own, are plain DMA's.
        let under = request.pasid.filter(|pasid| faults.queues.contains_key(&Some(*pasid)));
        let queue = faults.queues.get(&under).cloned().ok_or(Errno::NODEV)?;
        let key = (request.pasid, request.group);
        let incomplete = faults.partial.values().map(Vec::len).sum::<usize>();
        let mut requests = faults.partial.remove(&key).unwrap_or_default();
        requests.push(request);
        if !request.last && incomplete < fault::GROUP_LIMIT {
            faults.partial.insert(key, requests);
            return Ok(());
        }
        let group = fault::Group { device: self.id, hardware: self.hardware.clone(), pasid: under, requests };
        // Under the lock: a queue that is no longer attached gets no more groups, which nobody would dismiss.
        let refused = if request.last { queue.push(group).err() } else { Some(group) };
        drop(faults);
        match refused {
            Some(group) => {
                group.respond(ResponseCode::Invalid);
                Err(Errno::NOMEM)
            }
            None => Ok(()),
        }
    }

    /// Ends everything that it has to do with others.
    fn close(&self) {
        let vdevice = self.vdevice.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(id) = vdevice {
            self.table.entomb(id);
        }
        for pasid in self.group.attachments(self) {
            self.detach(pasid);
        }
        for ((pasid, group), _) in mem::take(&mut self.faults().partial) {
            self.hardware.page_response(PageResponse { pasid, group, code: ResponseCode::Invalid });
        }
    }
}

/// PASID 0 is plain DMA: the kernel has kept it for that.
fn plain_if_zero(pasid: Pasid) -> Pasid {
    pasid.filter(|pasid| *pasid != 0)
}

/// A device's being bound. Dropping it unbinds the device; the context need not live for it.
#[derive(Debug)]
pub(crate) struct Binding {
    /// None while it is dropped.
    device: Option<Use<Device>>,
}

impl Binding {
    pub(crate) fn device(&self) -> Result<&Arc<Device>> {
        self.device.as_ref().map(Use::as_arc).ok_or(Errno::NODEV)
    }

    pub(crate) fn id(&self) -> u32 {
        self.device.as_ref().map_or(0, Use::id)
    }
}

impl Drop for Binding {
    fn drop(&mut self) {
        if let Some(usage) = self.device.take() {
            let device = usage.as_arc().clone();
            // First: calls on the device have ended after it, and there are no new ones.
            device.table.destroy_owned(usage);
            device.close();
        }
    }
}

/// A device that is bound to a [`Context`] ([`Context::bind`]). It keeps the context alive. Dropping it unbinds the device:
/// it is attached to nothing then, and its vDEVICE is gone.
#[derive(Debug)]
pub struct BoundDevice {
    binding: Binding,
    context: Arc<Context>,
}

impl BoundDevice {
    /// Its object id.
    pub fn id(&self) -> u32 {
        self.binding.id()
    }

    /// The context that it is bound to.
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// The hardware that was bound.
    pub fn hardware(&self) -> Result<Arc<dyn Hardware>> {
        Ok(self.binding.device()?.hardware.clone())
    }

    /// Attaches the device's plain DMA, or a PASID, to an IOAS or a HWPT: the id of the HWPT that it is attached to. For an
    /// IOAS that is one made automatically, which goes with its last device.
    ///
    /// - ENOENT: no object has the id `pt_id`; EINVAL: one of another kind has.
    /// - EBUSY: it is attached already.
    /// - EINVAL: the rest of its group is attached to something else, or the page table does not fit the device.
    /// - EADDRINUSE: the IOAS has something mapped where the device cannot reach it.
    /// - ENOMEM, EFAULT: the memory of the IOAS cannot be pinned.
    pub fn attach(&self, pasid: Option<u32>, pt_id: u32) -> Result<u32> {
        self.binding.device()?.attach(pasid, pt_id)
    }

    /// Attaches it, with all its group, to something else than before, without a moment in which it is attached to nothing.
    /// As [`Self::attach`]; and EINVAL when it is not attached. When it fails nothing has changed.
    pub fn replace(&self, pasid: Option<u32>, pt_id: u32) -> Result<u32> {
        self.binding.device()?.replace(pasid, pt_id)
    }

    /// Attaches it to nothing. That it was attached is not necessary.
    pub fn detach(&self, pasid: Option<u32>) {
        if let Ok(device) = self.binding.device() {
            device.detach(pasid);
        }
    }

    /// Memory as the device sees it.
    pub fn dma(&self) -> DeviceDma {
        let device = self.binding.device().map(Arc::downgrade).unwrap_or_default();
        DeviceDma::new(device, None)
    }
}

/// Memory as a device in software sees it: through what the device is attached to at the time of the access. It may be kept
/// when the device is unbound; everything faults then.
///
/// Behind the software IOMMU an access takes no lock, and is translated as any device's; what is mapped and unmapped elsewhere
/// does not hold it up. For a device behind another IOMMU the address space is asked.
#[derive(Clone, Debug)]
pub struct DeviceDma {
    device: Weak<Device>,
    pasid: Option<u32>,
    soft: Option<Arc<PortDma>>,
}

/// What the calls that copy say of a fault.
fn errno(fault: Fault) -> Errno {
    match fault.reason {
        FaultReason::Permission => Errno::PERM,
        FaultReason::Unmapped
        | FaultReason::Detached
        | FaultReason::Range
        | FaultReason::Target
        | FaultReason::Interrupt => Errno::NOENT,
        FaultReason::Table | FaultReason::Reserved | FaultReason::Foreign | FaultReason::Moving => {
            Errno::FAULT
        }
    }
}

impl DeviceDma {
    fn new(device: Weak<Device>, pasid: Option<u32>) -> Self {
        let pasid = plain_if_zero(pasid);
        let port = device.upgrade().and_then(|device| device.hardware.port(pasid));
        Self { device, pasid, soft: port.map(|port| Arc::new(PortDma::new(port))) }
    }

    /// Memory as the device's `pasid` sees it.
    pub fn pasid(&self, pasid: u32) -> Self {
        Self::new(self.device.clone(), Some(pasid))
    }

    /// The host's page table that translates: ENOENT when the device is attached to none.
    fn paging(&self) -> Result<Use<PagingHwpt>> {
        match self.device.upgrade().and_then(|device| device.target(self.pasid)).ok_or(Errno::NOENT)? {
            Target::Paging(hwpt) => Ok(hwpt),
            // What a guest's page table says only its driver knows.
            Target::Nested(_) => Err(Errno::OPNOTSUPP),
        }
    }

    /// The software IOMMU's way, if that is the device's. ENOENT when the device is unbound: its hardware may be bound again
    /// by somebody else.
    fn soft(&self) -> Result<Option<&PortDma>> {
        match &self.soft {
            Some(_) if self.device.strong_count() == 0 => Err(Errno::NOENT),
            soft => Ok(soft.as_deref()),
        }
    }

    /// Copies from the memory at `iova`. EINVAL for no bytes, ENOENT where nothing is mapped or the device is attached to
    /// nothing, EPERM where the mapping forbids it, EOVERFLOW past the last address; EFAULT when a guest's page table is
    /// none.
    pub fn read(&self, iova: Iova, to: &mut [u8]) -> Result<()> {
        match self.soft()? {
            Some(dma) => {
                IovaRange::with_length(iova, to.len() as u64)?;
                dma.read(iova, to).map_err(errno)
            }
            None => self.paging()?.ioas.space.read(iova, to),
        }
    }

    /// Copies to the memory at `iova`. As [`Self::read`].
    pub fn write(&self, iova: Iova, from: &[u8]) -> Result<()> {
        match self.soft()? {
            Some(dma) => {
                IovaRange::with_length(iova, from.len() as u64)?;
                dma.write(iova, from).map_err(errno)
            }
            None => self.paging()?.ioas.space.write(iova, from),
        }
    }

    /// Where `iova` is in this process's memory now. It stays there until it is unmapped, which does
    /// not wait.
    pub fn translate(&self, iova: Iova) -> Result<HostAddr> {
        match self.soft()? {
            Some(dma) => dma.locate(iova).map_err(errno),
            None => self.paging()?.domain.lookup(iova).ok_or(Errno::NOENT),
        }
    }
}

/// How the driver of a bound device reaches the device's object.
#[derive(Clone, Debug)]
pub struct DevicePort {
    device: Weak<Device>,
}

impl DevicePort {
    /// Reports a page request. The queue of the page table gets the group that it belongs to when its last request has come,
    /// and the driver its answer ([`Hardware::page_response`]).
    ///
    /// It must not be called within a call of [`Hardware`].
    ///
    /// ENODEV when nobody wants page requests of the device; ENOMEM when there is no room for the group: the group is
    /// answered then.
    pub fn report(&self, request: PageRequest) -> Result<()> {
        self.device.upgrade().ok_or(Errno::NODEV)?.report(request)
    }
}

impl Context {
    pub(crate) fn bind_unowned(&self, hardware: Arc<dyn Hardware>) -> Result<Binding> {
        inject::check()?;
        let reservation = self.table().reserve()?;
        let device = Arc::new(Device {
            id: reservation.id(),
            owner: Owner::new(),
            group: self.group(hardware.group()),
            hardware,
            table: self.table().clone(),
            faults: Mutex::default(),
            vdevice: Mutex::default(),
        });
        let port = DevicePort { device: Arc::downgrade(&device) };
        let binding = Binding { device: Some(reservation.finish_used(device.clone())) };
        device.hardware.bound(port);
        Ok(binding)
    }

    /// Binds a device: from now on it has an object, and can be attached. ENOMEM.
    pub fn bind(self: &Arc<Self>, hardware: Arc<dyn Hardware>) -> Result<BoundDevice> {
        Ok(BoundDevice { binding: self.bind_unowned(hardware)?, context: self.clone() })
    }
}

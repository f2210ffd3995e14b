//! An Intel VT-d remapping unit: DMA remapping of legacy mode, queued invalidation, fault recording.
//!
//! # Theory of operation
//!
//! Here is what a driver sees of the unit beside its own memory: the registers (`registers`), the faults (`faults`), and the tables
//! that say by which page table a device is translated (`context`). Page tables and the invalidation queue are read by the software
//! IOMMU of crate `iommufd`, whose objects the registers become (`engine`): devices translate without locks, and a queue's tail is
//! a doorbell that wakes its thread.
//!
//! A device is attached when a view of its memory is opened and its context entry is present. An entry that is not present is not
//! remembered: the guest need not tell when that changes (caching mode 0). One that is present is looked at again when the guest
//! invalidates it, and only then; whoever asks for that, by register or queue, goes on when no device uses any more what
//! it was attached to before.
//!
//! An access that is not translated fails, and is recorded, unless the context entry says that it should not be, or the
//! address is one of interrupt requests: these are no DMA, and what devices signal does not come by here (`MsiSink`).
//!
//! A device of the host translates by the host's page tables, into which the guest's are carried over (`shadow`). It opens no views:
//! when there is one, the unit is in caching mode, the guest says also what becomes present, and the device is attached
//! and its table is looked at then. Its faults are the host's, and not recorded here.
//!
//! Not offered: interrupt remapping, device TLBs, scalable mode, protected memory regions.
//!
//! # Locks
//!
//! A device's thread may hold a view, which is a section of its port, and then takes an endpoint's `state`, `mode`, the engine's locks,
//! or `registers`. So who waits for sections holds none of these, but `changing`, which devices never take. The lock of shadows
//! comes after a `state`; nobody waits for sections with it.

mod context;
mod engine;
mod event;
mod faults;
mod registers;
mod shadow;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

use cpu::GuestRam;
use iommufd::iova::Iova;
use iommufd::soft::vtd::{ContextScope, FaultRecord, IotlbScope, Listener, QueueError};
use iommufd::soft::{Fault, FaultReason, Port};
use iommufd::{BoundDevice, Errno};
use pci::msix::{Message, MsiSink};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryRegion};

use super::{HostEndpoint, IommuStats, Work};
use crate::bus::MmioDevice;
use crate::dma::Remapper;
use crate::vcpu::lock;
use crate::writes::{Exposed, What};
use context::{Context, NoContext, Target};
use engine::{Engine, Ring};
pub use registers::SIZE;
use registers::{Action, Global, Hosts, NARROW, Registers, WIDTH};
use shadow::HostDevice;

/// The unit. Its queue ends with it.
#[derive(Debug)]
pub struct Vtd {
    unit: Arc<Unit>,
}

/// What the unit is made of. The queue's thread may be the last that has it, and cannot wait for itself.
struct Unit {
    ram: Arc<GuestRam>,
    engine: Engine,
    msi: Arc<dyn MsiSink>,
    registers: Mutex<Registers>,
    mode: RwLock<Mode>,
    endpoints: RwLock<Vec<Arc<Endpoint>>>,
    /// Held by who makes devices leave what they are attached to.
    changing: Mutex<()>,
    attached: AtomicU64,
    faults: AtomicU64,
}

impl std::fmt::Debug for Unit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Unit").field("engine", &self.engine).field("mode", &self.mode).finish_non_exhaustive()
    }
}

/// Whether requests are translated, and the root table's register as it was taken.
#[derive(Clone, Copy, Debug, Default)]
struct Mode {
    translate: bool,
    root: u64,
}

/// A device behind the unit.
#[derive(Debug)]
struct Endpoint {
    /// Bus, device and function number.
    source: u16,
    kind: Kind,
    /// What `state` says: attached, and not leaving.
    attached: AtomicBool,
    state: Mutex<State>,
}

/// Whose device it is.
#[derive(Debug)]
enum Kind {
    /// One in software, which goes through a port.
    Soft(BoundDevice, Arc<Port>),
    Host(HostDevice),
}

/// What a device is attached to.
#[derive(Clone, Copy, Debug)]
enum State {
    Nothing,
    Attached(Context),
    /// To nothing, but it may still be using what it was attached to.
    Leaving,
}

/// A device, with the unit it is behind.
#[derive(Debug)]
struct Behind {
    unit: Arc<Unit>,
    endpoint: Arc<Endpoint>,
    port: Arc<Port>,
}

/// The unit, as the engine's threads call it.
#[derive(Debug)]
struct Ear(Weak<Unit>);

impl Vtd {
    /// A unit that translates nothing yet.
    ///
    /// # Errors
    /// ENOMEM, EMFILE.
    pub fn new(ram: &Arc<GuestRam>, msi: Arc<dyn MsiSink>) -> Result<Self, Errno> {
        let unit = Arc::new(Unit {
            ram: Arc::clone(ram),
            engine: Engine::new(ram)?,
            msi,
            registers: Mutex::new(Registers::new()),
            mode: RwLock::default(),
            endpoints: RwLock::default(),
            changing: Mutex::default(),
            attached: AtomicU64::new(0),
            faults: AtomicU64::new(0),
        });
        unit.engine.listen(Arc::new(Ear(Arc::downgrade(&unit))));
        Ok(Self { unit })
    }

    /// The register file, [`SIZE`] bytes.
    pub fn registers(&self) -> Arc<dyn MmioDevice> {
        Arc::clone(&self.unit) as _
    }

    /// Adds a device by its bus, device and function number: the port that its requests go through, and what looks after that.
    ///
    /// # Errors
    /// ENOMEM; EEXIST when there is one of this number.
    pub fn add_endpoint(&self, source: u16) -> Result<super::Endpoint, Errno> {
        let (device, port) = self.unit.engine.bind(source)?;
        let endpoint = self.unit.add(source, Kind::Soft(device, Arc::clone(&port)));
        let behind = Behind { unit: Arc::clone(&self.unit), endpoint, port: Arc::clone(&port) };
        Ok((port, Arc::new(behind)))
    }

    /// Adds a device of the host by its bus, device and function number, before the guest runs: what the guest's processors have
    /// to know that it writes to.
    ///
    /// # Errors
    /// What the host says, when it does not map guest memory; EOPNOTSUPP when it translates too few addresses.
    pub(crate) fn add_host_endpoint(&self, source: u16, device: HostEndpoint) -> Result<Arc<Exposed>, Errno> {
        let (device, usable) = self.unit.engine.bind_host(device)?;
        let end = usable.last().map_or(Iova(0), |range| range.last());
        if end.0 < (1 << NARROW) - 1 {
            return Err(Errno::OPNOTSUPP);
        }
        let exposed = Exposed::new(&self.unit.ram, What::Runs(Default::default()));
        let host = HostDevice { device, exposed: Arc::clone(&exposed) };
        // Nothing is translated until the guest says so: it is attached to memory.
        let endpoint = self.unit.add(source, Kind::Host(host));
        self.unit.try_attach(&endpoint)?;
        let hosts = &mut lock(&self.unit.registers).hosts;
        *hosts = Hosts { caching: true, narrow: hosts.narrow || end.0 < (1 << WIDTH) - 1 };
        Ok(exposed)
    }

    /// What it counted until now.
    pub fn stats(&self) -> IommuStats {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let translations = |it: &Arc<Endpoint>| match &it.kind {
            Kind::Soft(_, port) => port.counters().translations,
            Kind::Host(_) => 0,
        };
        let translations = self.unit.endpoints().iter().map(translations).sum();
        let work = Work::Tables { attached: count(&self.unit.attached) };
        IommuStats { translations, faults: count(&self.unit.faults), work }
    }
}

impl Drop for Vtd {
    fn drop(&mut self) {
        self.unit.set_queue(None);
    }
}

impl Unit {
    fn endpoints(&self) -> Vec<Arc<Endpoint>> {
        self.endpoints.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn add(&self, source: u16, kind: Kind) -> Arc<Endpoint> {
        let (attached, state) = (AtomicBool::new(false), Mutex::new(State::Nothing));
        let endpoint = Arc::new(Endpoint { source, kind, attached, state });
        let mut endpoints = self.endpoints.write().unwrap_or_else(PoisonError::into_inner);
        endpoints.push(Arc::clone(&endpoint));
        endpoint
    }

    /// What the guest wants a device to be translated by.
    fn context(&self, source: u16) -> Result<Context, NoContext> {
        let mode = *self.mode.read().unwrap_or_else(PoisonError::into_inner);
        if !mode.translate {
            return Ok(Context { domain: 0, target: Target::Memory, quiet: false });
        }
        context::find(&self.ram, mode.root, source)
    }

    /// Attaches a device that is attached to nothing, if its context entry is present.
    fn attach(&self, endpoint: &Endpoint) {
        if let Err(errno) = self.try_attach(endpoint) {
            tracing::warn!(%errno, source = endpoint.source, "a device cannot be attached");
        }
    }

    fn try_attach(&self, endpoint: &Endpoint) -> Result<(), Errno> {
        let mut state = lock(&endpoint.state);
        if !matches!(*state, State::Nothing) {
            return Ok(());
        }
        let Ok(context) = self.context(endpoint.source) else { return Ok(()) };
        match &endpoint.kind {
            Kind::Soft(device, _) => self.engine.attach(device, context.target),
            Kind::Host(host) => self.engine.shadows().attach(host, context.target),
        }?;
        *state = State::Attached(context);
        endpoint.attached.store(true, Ordering::Release);
        if matches!(context.target, Target::Table(_)) {
            self.attached.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Looks again at what devices are to be attached to. None uses anything else when this returns.
    fn look_again(&self, scope: ContextScope) {
        let _changing = lock(&self.changing);
        for endpoint in self.endpoints() {
            let context = {
                let mut state = lock(&endpoint.state);
                let State::Attached(context) = *state else { continue };
                let same = self.context(endpoint.source).ok() == Some(context);
                if same || !covers(scope, endpoint.source, context.domain) {
                    continue;
                }
                endpoint.attached.store(false, Ordering::Release);
                *state = State::Leaving;
                context
            };
            match &endpoint.kind {
                Kind::Soft(device, _) => self.engine.detach(device, context.target),
                Kind::Host(host) => self.engine.shadows().detach(host, context.target),
            }
            *lock(&endpoint.state) = State::Nothing;
        }
        // One of the host's does not say when it begins to use memory.
        for endpoint in self.endpoints().iter().filter(|it| matches!(it.kind, Kind::Host(_))) {
            self.attach(endpoint);
        }
    }

    fn send(&self, message: Option<Message>) {
        if let Some(Message { address, data }) = message {
            self.msi.signal(address, data);
        }
    }

    /// Tells the guest that the queue has stopped.
    fn queue_error(&self) {
        let message = lock(&self.registers).faults.queue_error();
        self.send(message);
    }

    fn record(&self, fault: FaultRecord) {
        let message = lock(&self.registers).faults.record(fault);
        self.send(message);
    }

    fn set_mode(&self, change: impl FnOnce(&mut Mode)) {
        change(&mut self.mode.write().unwrap_or_else(PoisonError::into_inner));
    }

    fn set_queue(&self, ring: Option<Ring>) {
        if let Err(errno) = self.engine.set_queue(ring) {
            tracing::debug!(%errno, ?ring, "the guest's invalidation queue cannot be served");
            self.queue_error();
        }
    }

    /// Carries out what a write to the registers asked for.
    fn act(&self, action: Action) {
        match action {
            Action::Send(message) => self.send(Some(message)),
            Action::Root(register) => {
                self.set_mode(|mode| mode.root = register);
                lock(&self.registers).done(Global::ROOT, true);
            }
            Action::Translate(translate) => {
                self.set_mode(|mode| mode.translate = translate);
                self.look_again(ContextScope::Global);
                lock(&self.registers).done(Global::TRANSLATE, translate);
            }
            Action::Queue(ring) => {
                self.set_queue(ring);
                lock(&self.registers).done(Global::QUEUE, ring.is_some());
            }
            Action::Tail(tail) => match self.engine.queue() {
                Some(queue) => queue.set_tail(tail),
                None => self.queue_error(),
            },
            Action::Resume => {
                if let Some(queue) = self.engine.queue() {
                    queue.clear_error();
                }
            }
            Action::Context(scope) => {
                self.look_again(scope);
                lock(&self.registers).context_done(true);
            }
            Action::Iotlb(scope) => {
                self.engine.forget(scope);
                lock(&self.registers).iotlb_done(true);
            }
        }
    }
}

/// Whether a context entry is meant.
fn covers(scope: ContextScope, source: u16, domain: u16) -> bool {
    match scope {
        ContextScope::Global => true,
        ContextScope::Domain(named) => named == domain,
        ContextScope::Device { source: named, mask, .. } => (named ^ source) & !mask == 0,
    }
}

impl Listener for Ear {
    fn contexts(&self, scope: ContextScope) {
        if let Some(unit) = self.0.upgrade() {
            unit.look_again(scope);
        }
    }

    fn translations(&self, scope: IotlbScope) {
        if let Some(unit) = self.0.upgrade() {
            unit.engine.shadows().look_again(scope);
        }
    }

    fn fault(&self, record: FaultRecord) {
        let Some(unit) = self.0.upgrade() else { return };
        let quiet = |it: &Arc<Endpoint>| {
            it.source == record.source
                && matches!(*lock(&it.state), State::Attached(Context { quiet: true, .. }))
        };
        if !unit.endpoints().iter().any(quiet) {
            unit.record(record);
        }
    }

    fn completed(&self, _queue: u32) {
        if let Some(unit) = self.0.upgrade() {
            let message = lock(&unit.registers).wait_completed();
            unit.send(message);
        }
    }

    fn stopped(&self, _queue: u32, error: QueueError) {
        if let Some(unit) = self.0.upgrade() {
            tracing::debug!(%error, "the guest's invalidation queue has stopped");
            unit.queue_error();
        }
    }

    /// Whoever keeps decoded code of the page has to know.
    fn written(&self, _queue: u32, address: u64, length: u64) {
        let Some(unit) = self.0.upgrade() else { return };
        if let Some((region, at)) = unit.ram.to_region_addr(GuestAddress(address)) {
            region.bitmap().mark_dirty(at.0 as usize, length as usize);
        }
    }
}

/// Registers are read and written as aligned dwords or quadwords (VT-d 10.2). Anything else is not written, and reads as the part of
/// the dwords that it is.
impl MmioDevice for Unit {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let head = self.engine.queue().map_or(0, |queue| queue.head().into());
        let mut registers = lock(&self.registers);
        for (at, byte) in (offset..).zip(data) {
            let dword = registers.read(at & !3, head).to_le_bytes();
            *byte = dword.get((at & 3) as usize).copied().unwrap_or_default();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (dwords, []) = data.as_chunks::<4>() else { return };
        if dwords.len() > 2 || !offset.is_multiple_of(data.len().max(1) as u64) {
            return;
        }
        for (at, dword) in (offset..).step_by(4).zip(dwords) {
            let actions = lock(&self.registers).write(at, u32::from_le_bytes(*dword));
            for action in actions {
                self.act(action);
            }
        }
    }
}

impl Remapper for Behind {
    fn prepare(&self) {
        if !self.endpoint.attached.load(Ordering::Acquire) {
            self.unit.attach(&self.endpoint);
        }
    }

    fn report(&self, fault: Fault) {
        self.unit.faults.fetch_add(1, Ordering::Relaxed);
        if fault.reason != FaultReason::Detached {
            return self.port.report(&fault);
        }
        // If the entry is present now, the guest has changed it under the device.
        let source = self.endpoint.source;
        if let Err(NoContext { reason, quiet: false }) = self.unit.context(source) {
            let (reason, access, address) = (reason as u8, fault.access, fault.iova.0);
            self.unit.record(FaultRecord { source, reason, access, address });
        }
    }
}

//! An Intel VT-d remapping unit: DMA remapping of legacy mode, queued invalidation, fault recording.
//!
//! # Theory of operation
//!
//! The guest's root table says, for each device, by which table in guest memory its requests are translated (`context`, `walk`). What
//! hardware keeps of that in caches is here:
//!
//! - *What a device is attached to*: its [`Port`] of the software IOMMU is attached to a domain when a view of its memory is opened
//!   and its context entry is present. A present entry that changes is looked at again when the guest invalidates it, and only
//!   then. An entry that is not present is not remembered: the guest need not tell when that changes (caching mode 0).
//! - *Translations* (`iotlb`): a domain for each table in use, which devices translate by without locks. A miss looks into
//!   the guest's table, and remembers only what is there.
//!
//! Invalidations come by registers (`registers`) or by the queue (`queue`), and are carried out on the thread of the vCPU that
//! asks. They end when no device uses any more what was invalidated.
//!
//! An access that is not translated fails, and is recorded (`faults`) with the reason that a second look at the tables gives.
//!
//! Not offered: interrupt remapping, device TLBs, scalable mode, protected memory regions.
//!
//! # Locks
//!
//! A device's thread may hold a view, which is a section of its port and of a domain, and then takes an endpoint's `state`, `mode`,
//! `domains`, a domain's lock, or `registers`. So who waits for sections holds none of these, but `queue` and `changing`, in this
//! order, which devices never take.

mod context;
mod event;
mod faults;
mod iotlb;
mod queue;
mod registers;
mod scope;
#[cfg(test)]
mod tests;
mod walk;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

use cpu::GuestRam;
use iommufd::Errno;
use iommufd::hardware::{Attachment, Hardware};
use iommufd::soft::{self, FaultReason, Port, SoftDevice, SoftDomain};
use pci::msix::{Message, MsiSink};

use super::{IommuStats, Work};
use crate::bus::MmioDevice;
use crate::dma::Remapper;
use crate::vcpu::lock;
use context::{Context, NoContext, Table, Target};
use faults::Fault;
use iotlb::{Cached, Memory, Miss};
use queue::{Invalidate, Queue, Stopped};
pub use registers::SIZE;
use registers::{Action, Global, Registers};
use scope::{ContextScope, IotlbScope};

/// The unit.
pub struct Vtd {
    memory: Memory,
    /// What devices reach that nothing translates.
    whole: SoftDomain,
    msi: Arc<dyn MsiSink>,
    registers: Mutex<Registers>,
    queue: Mutex<Queue>,
    /// How far the queue has been served: it can be read while that goes on.
    head: AtomicU64,
    mode: RwLock<Mode>,
    endpoints: RwLock<Vec<Arc<Endpoint>>>,
    /// Those that a device is attached to.
    domains: Mutex<Vec<Weak<Cached>>>,
    /// Held by who makes devices leave what they are attached to.
    changing: Mutex<()>,
    counted: Counted,
}

impl std::fmt::Debug for Vtd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vtd").field("mode", &self.mode).finish_non_exhaustive()
    }
}

/// Whether requests are translated, and the root table's register as it was taken.
#[derive(Clone, Copy, Debug, Default)]
struct Mode {
    translate: bool,
    root: u64,
}

#[derive(Debug, Default)]
struct Counted {
    walks: AtomicU64,
    invalidations: AtomicU64,
    faults: AtomicU64,
}

/// A device behind the unit.
#[derive(Debug)]
struct Endpoint {
    /// Bus, device and function number.
    source: u16,
    device: Arc<SoftDevice>,
    /// What `state` says: attached, and not leaving.
    attached: AtomicBool,
    state: Mutex<State>,
}

/// What a device is attached to.
#[derive(Debug, Default)]
enum State {
    #[default]
    Nothing,
    Attached {
        context: Context,
        /// None when nothing is translated.
        cached: Option<Arc<Cached>>,
    },
    /// To nothing, but it may still be using what it was attached to.
    Leaving,
}

/// A device, with the unit it is behind.
#[derive(Debug)]
struct Behind {
    unit: Arc<Vtd>,
    endpoint: Arc<Endpoint>,
}

impl Vtd {
    /// A unit that translates nothing yet.
    ///
    /// # Errors
    /// ENOMEM.
    pub fn new(ram: &Arc<GuestRam>, msi: Arc<dyn MsiSink>) -> Result<Arc<Self>, Errno> {
        let memory = Memory::new(ram);
        let whole = memory.whole()?;
        Ok(Arc::new(Self {
            memory,
            whole,
            msi,
            registers: Mutex::new(Registers::new()),
            queue: Mutex::default(),
            head: AtomicU64::new(0),
            mode: RwLock::default(),
            endpoints: RwLock::default(),
            domains: Mutex::default(),
            changing: Mutex::default(),
            counted: Counted::default(),
        }))
    }

    /// Adds a device by its bus, device and function number: the port that its requests go through, and what looks after that.
    pub fn add_endpoint(self: &Arc<Self>, source: u16) -> (Arc<Port>, Arc<dyn Remapper>) {
        let device = SoftDevice::new(source.into(), Vec::new());
        let port = device.port(None);
        let endpoint =
            Arc::new(Endpoint { source, device, attached: AtomicBool::new(false), state: Mutex::default() });
        self.endpoints.write().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&endpoint));
        (port, Arc::new(Behind { unit: Arc::clone(self), endpoint }))
    }

    /// What it counted until now.
    pub fn stats(&self) -> IommuStats {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let translations =
            self.endpoints().iter().map(|it| it.device.port(None).counters().translations).sum();
        let work = Work::Guest {
            walks: count(&self.counted.walks),
            invalidations: count(&self.counted.invalidations),
        };
        IommuStats { translations, faults: count(&self.counted.faults), work }
    }

    fn endpoints(&self) -> Vec<Arc<Endpoint>> {
        self.endpoints.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What the guest wants a device to be translated by.
    fn context(&self, source: u16) -> Result<Context, NoContext> {
        let mode = *self.mode.read().unwrap_or_else(PoisonError::into_inner);
        if !mode.translate {
            return Ok(Context { domain: 0, target: Target::Memory, quiet: false });
        }
        context::find(&self.memory.ram, mode.root, source)
    }

    /// The domain of a table, which is made if no device uses the table yet.
    fn cached(&self, table: Table) -> Arc<Cached> {
        let mut domains = lock(&self.domains);
        domains.retain(|domain| domain.strong_count() != 0);
        match domains.iter().filter_map(Weak::upgrade).find(|known| known.table == table) {
            Some(known) => known,
            None => {
                let made = Cached::new(table);
                domains.push(Arc::downgrade(&made));
                made
            }
        }
    }

    /// Attaches a device that is attached to nothing, if its context entry is present.
    fn attach(&self, endpoint: &Endpoint) {
        let mut state = lock(&endpoint.state);
        if !matches!(*state, State::Nothing) {
            return;
        }
        let Ok(context) = self.context(endpoint.source) else { return };
        let cached = match context.target {
            Target::Memory => None,
            Target::Table(table) => Some(self.cached(table)),
        };
        let domain = cached.as_ref().map_or(&self.whole, |cached| &cached.domain).clone();
        // The domain is one of its own making.
        if endpoint.device.attach(None, Some(&Attachment::Paging(Arc::new(domain)))).is_ok() {
            *state = State::Attached { context, cached };
            endpoint.attached.store(true, Ordering::Release);
        }
    }

    /// Looks again at what devices are to be attached to. None uses anything else when this returns.
    fn look_again(&self, scope: ContextScope) {
        let _changing = lock(&self.changing);
        for endpoint in self.endpoints() {
            {
                let mut state = lock(&endpoint.state);
                let State::Attached { context, .. } = &*state else { continue };
                let same = self.context(endpoint.source).ok() == Some(*context);
                if same || !scope.covers(endpoint.source, Some(context.domain)) {
                    continue;
                }
                endpoint.attached.store(false, Ordering::Release);
                *state = State::Leaving;
            }
            // It cannot fail: there is always room for nothing.
            let _ = endpoint.device.attach(None, None);
            *lock(&endpoint.state) = State::Nothing;
        }
    }

    /// Forgets translations. None of them is used any more when this returns.
    fn forget(&self, scope: IotlbScope) {
        self.counted.invalidations.fetch_add(1, Ordering::Relaxed);
        let domains: Vec<Arc<Cached>> = lock(&self.domains).iter().filter_map(Weak::upgrade).collect();
        for cached in domains {
            match scope {
                IotlbScope::All => cached.invalidate(None),
                IotlbScope::Domain(domain) if domain == cached.table.domain => cached.invalidate(None),
                IotlbScope::Pages { domain, first, order } if domain == cached.table.domain => {
                    cached.invalidate(Some((first, 0x1000 << order)));
                }
                IotlbScope::Domain(_) | IotlbScope::Pages { .. } => {}
            }
        }
    }

    /// Serves the queue, after a change.
    fn serve(&self, change: impl FnOnce(&mut Queue)) {
        let mut queue = lock(&self.queue);
        change(&mut queue);
        let result = queue.serve(&self.memory.ram, self);
        self.head.store(queue.head(), Ordering::Release);
        drop(queue);
        if result == Err(Stopped) {
            let message = lock(&self.registers).faults.queue_error();
            self.send(message);
        }
    }

    fn send(&self, message: Option<Message>) {
        if let Some(Message { address, data }) = message {
            self.msi.signal(address, data);
        }
    }

    fn set_mode(&self, change: impl FnOnce(&mut Mode)) {
        change(&mut self.mode.write().unwrap_or_else(PoisonError::into_inner));
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
                self.look_again(ContextScope::All);
                lock(&self.registers).done(Global::TRANSLATE, translate);
            }
            Action::Queue(ring) => {
                let mut queue = lock(&self.queue);
                queue.set_ring(ring);
                self.head.store(0, Ordering::Release);
                drop(queue);
                lock(&self.registers).done(Global::QUEUE, ring.is_some());
            }
            Action::Tail(tail) => self.serve(|queue| queue.set_tail(tail)),
            Action::Resume => self.serve(Queue::resume),
            Action::Context(scope) => {
                self.look_again(scope);
                lock(&self.registers).context_done(true);
            }
            Action::Iotlb(scope) => {
                self.forget(scope);
                lock(&self.registers).iotlb_done(true);
            }
        }
    }
}

impl Invalidate for Vtd {
    fn context(&self, scope: ContextScope) {
        self.look_again(scope);
    }

    fn iotlb(&self, scope: IotlbScope) {
        self.forget(scope);
    }

    fn completed(&self) {
        let message = lock(&self.registers).wait_completed();
        self.send(message);
    }
}

/// Registers are read and written as aligned dwords or quadwords (VT-d 10.2). Anything else is not written, and reads as the part of
/// the dwords that it is.
impl MmioDevice for Vtd {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let head = self.head.load(Ordering::Acquire);
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

impl Behind {
    /// The table that the device is attached to, and whether its faults are to be recorded.
    fn cached(&self) -> Option<(Arc<Cached>, bool)> {
        match &*lock(&self.endpoint.state) {
            State::Attached { context, cached: Some(cached) } => Some((Arc::clone(cached), context.quiet)),
            _ => None,
        }
    }
}

impl Remapper for Behind {
    fn prepare(&self) {
        if !self.endpoint.attached.load(Ordering::Acquire) {
            self.unit.attach(&self.endpoint);
        }
    }

    fn missed(&self, fault: &soft::Fault) -> bool {
        let Some((cached, _)) = self.cached() else { return false };
        self.unit.counted.walks.fetch_add(1, Ordering::Relaxed);
        cached.fill(&self.unit.memory, fault.iova, fault.access).is_ok()
    }

    fn report(&self, fault: soft::Fault) {
        self.unit.counted.faults.fetch_add(1, Ordering::Relaxed);
        let (reason, quiet) = match (self.cached(), self.unit.context(self.endpoint.source)) {
            (Some((cached, quiet)), _) if fault.reason != FaultReason::Detached => {
                match cached.fill(&self.unit.memory, fault.iova, fault.access) {
                    Err(Miss::Fault(reason)) => (reason, quiet),
                    // The guest has mapped it meanwhile, or it is not memory.
                    Ok(()) | Err(Miss::NoMemory) => return,
                }
            }
            (_, Err(NoContext { reason, quiet })) => (reason, quiet),
            // The same: it is present now, or nothing translates.
            _ => return,
        };
        if !quiet {
            let fault =
                Fault { source: self.endpoint.source, address: fault.iova.0, access: fault.access, reason };
            let message = lock(&self.unit.registers).faults.record(fault);
            self.unit.send(message);
        }
    }
}

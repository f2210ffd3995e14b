//! The IOMMU device (virtio 1.3, section 5.13): the guest says what its devices may reach.
//!
//! # Theory of operation
//!
//! An *endpoint* is a device whose DMA is translated; its number is told by a table of the firmware. A *domain* is an address
//! space that the driver makes by attaching the first endpoint to it, and that ends with the last. This module is the
//! device's protocol: requests come by queue 0 and are answered at once, each for itself, on the device's
//! thread. What they mean is done by a [`Translator`], which the machine provides.
//!
//! When UNMAP is answered no device uses what was unmapped: the translator waits for accesses that began before.
//!
//! Faults go the other way. Whoever does DMA puts them into the [`Faults`], and the same thread moves them
//! to the buffers of queue 1. There are few buffers and a device can fault often, so what finds no room is lost, and
//! counted.

mod request;

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::epoll::{self, EventData, EventFlags};
use virtio_bindings::virtio_ids::VIRTIO_ID_IOMMU;

use crate::device::{ActivateError, Activation, GuestMem, VirtioDevice, feature, read_config_bytes};
use crate::event::Event;
use crate::queue::{Chain, Virtq};
use crate::worker::{Stop, Worker};

use request::{FAULT_SIZE, Request, TAIL_SIZE};
pub use request::{MapFlags, Refusal};

/// Requests, events.
const QUEUE_SIZES: [u16; 2] = [128, 64];
/// Bytes for the properties of an endpoint: enough for a few reserved regions.
const PROBE_SIZE: usize = 256;
/// Faults that wait for a buffer.
const MAX_FAULTS: usize = 64;
/// Where the driver may change the configuration: the field `bypass`.
const CONFIG_BYPASS: u64 = 36;

/// Feature bits (virtio 1.3, section 5.13.3).
const F_INPUT_RANGE: u32 = 0;
const F_MAP_UNMAP: u32 = 2;
const F_PROBE: u32 = 4;
const F_BYPASS_CONFIG: u32 = 6;

/// A range of I/O virtual addresses that an endpoint cannot have translated. Both ends belong to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reserved {
    /// The first address.
    pub start: u64,
    /// The last address.
    pub last: u64,
    /// Writes there are message-signalled interrupts.
    pub msi: bool,
}

/// What requests are for. Addresses of the guest's are guest-physical, ranges include their last address.
pub trait Translator: Send {
    /// The first and the last address that can be mapped.
    fn input_range(&self) -> (u64, u64);

    /// From now on `endpoint` is translated by `domain`, and by nothing else; a domain that does not exist is made. With
    /// `bypass` it is one that does not translate.
    ///
    /// # Errors
    /// [`Refusal::NoEntry`]: there is no such endpoint. [`Refusal::Invalid`]: the domain is of the other kind.
    fn attach(&mut self, domain: u32, endpoint: u32, bypass: bool) -> Result<(), Refusal>;

    /// Detaches `endpoint` from `domain`, which ends if it was the last.
    ///
    /// # Errors
    /// [`Refusal::NoEntry`]: there is no such endpoint. [`Refusal::Invalid`]: it is not attached there.
    fn detach(&mut self, domain: u32, endpoint: u32) -> Result<(), Refusal>;

    /// Maps the addresses from `start` to `last` of a domain to guest memory from `to` on.
    ///
    /// # Errors
    /// [`Refusal::NoEntry`]: there is no such domain. [`Refusal::Invalid`]: something is mapped there, or the domain does not
    /// translate. [`Refusal::Range`]: the addresses are no whole pages, or not of guest memory, or cannot be translated.
    fn map(&mut self, domain: u32, start: u64, last: u64, to: u64, flags: MapFlags) -> Result<(), Refusal>;

    /// Unmaps what was mapped from `start` to `last`. When it returns nothing accesses that any more.
    ///
    /// # Errors
    /// [`Refusal::NoEntry`]: there is no such domain. [`Refusal::Range`]: it would cut a mapping; nothing is unmapped
    /// then. [`Refusal::Invalid`]: the domain does not translate.
    fn unmap(&mut self, domain: u32, start: u64, last: u64) -> Result<(), Refusal>;

    /// What `endpoint` cannot have translated.
    ///
    /// # Errors
    /// [`Refusal::NoEntry`]: there is no such endpoint.
    fn reserved(&self, endpoint: u32) -> Result<Vec<Reserved>, Refusal>;

    /// Whether endpoints without a domain reach guest memory as it is, or nothing.
    fn set_bypass(&mut self, bypass: bool);

    /// Ends all domains.
    fn reset(&mut self);
}

/// An access of an endpoint that was not translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultRecord {
    /// Which endpoint.
    pub endpoint: u32,
    /// Where.
    pub address: u64,
    /// It was a write.
    pub write: bool,
    /// The endpoint has a domain: something is wrong with the mapping. Without, it has none.
    pub mapped_domain: bool,
}

/// Faults on their way to the driver.
#[derive(Debug)]
pub struct Faults {
    waiting: Mutex<(VecDeque<FaultRecord>, u64)>,
    event: Event,
}

impl Faults {
    /// None.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Faults { waiting: Mutex::default(), event: Event::new()? }))
    }

    /// Reports one. It is lost when too many wait already.
    pub fn report(&self, fault: FaultRecord) {
        let mut waiting = lock(&self.waiting);
        waiting.1 += 1;
        if waiting.0.len() < MAX_FAULTS {
            waiting.0.push_back(fault);
            self.event.signal();
        }
    }

    /// How many there were, the lost ones included.
    #[must_use]
    pub fn count(&self) -> u64 {
        lock(&self.waiting).1
    }

    /// The one that has waited for the longest.
    #[must_use]
    pub fn oldest(&self) -> Option<FaultRecord> {
        lock(&self.waiting).0.front().copied()
    }

    fn take(&self) -> Option<FaultRecord> {
        lock(&self.waiting).0.pop_front()
    }

    fn put_back(&self, fault: FaultRecord) {
        lock(&self.waiting).0.push_front(fault);
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The IOMMU.
pub struct Iommu {
    translator: Arc<Mutex<dyn Translator>>,
    faults: Arc<Faults>,
    page_sizes: u64,
    bypass: bool,
    worker: Option<Worker<()>>,
}

impl std::fmt::Debug for Iommu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Iommu").field("bypass", &self.bypass).finish_non_exhaustive()
    }
}

impl Iommu {
    /// One that maps pages of the sizes whose bits are set in `page_sizes`. Until the driver decides otherwise, endpoints
    /// without a domain reach all of guest memory, so that what runs before the driver finds its disk.
    #[must_use]
    pub fn new(translator: Arc<Mutex<dyn Translator>>, faults: Arc<Faults>, page_sizes: u64) -> Self {
        lock(&translator).set_bypass(true);
        Iommu { translator, faults, page_sizes, bypass: true, worker: None }
    }

    /// `struct virtio_iommu_config`.
    fn config(&self) -> [u8; 40] {
        let mut config = [0; 40];
        let (start, last) = lock(&self.translator).input_range();
        // Any number will do for a domain.
        let (first_domain, last_domain) = (0u32, u32::MAX);
        let fields: [(usize, &[u8]); 7] = [
            (0, &self.page_sizes.to_le_bytes()),
            (8, &start.to_le_bytes()),
            (16, &last.to_le_bytes()),
            (24, &first_domain.to_le_bytes()),
            (28, &last_domain.to_le_bytes()),
            (32, &(PROBE_SIZE as u32).to_le_bytes()),
            (CONFIG_BYPASS as usize, &[self.bypass.into()]),
        ];
        for (at, bytes) in fields {
            for (to, from) in config.iter_mut().skip(at).zip(bytes) {
                *to = *from;
            }
        }
        config
    }
}

impl<M: GuestMem> VirtioDevice<M> for Iommu {
    fn device_id(&self) -> u16 {
        VIRTIO_ID_IOMMU as u16
    }

    fn pci_class(&self) -> u32 {
        // Base system peripheral, IOMMU.
        0x08_06_00
    }

    fn name(&self) -> &str {
        "virtio-iommu"
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        feature(F_INPUT_RANGE) | feature(F_MAP_UNMAP) | feature(F_PROBE) | feature(F_BYPASS_CONFIG)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let at = CONFIG_BYPASS.checked_sub(offset).and_then(|at| usize::try_from(at).ok());
        // Other values than 0 and 1 are reserved.
        if let Some(value @ (0 | 1)) = at.and_then(|at| data.get(at)) {
            self.bypass = *value == 1;
            lock(&self.translator).set_bypass(self.bypass);
        }
    }

    fn activate(&mut self, mut activation: Activation<M>) -> Result<(), ActivateError> {
        let requests = activation.take_queue(0).ok_or(ActivateError::MissingQueue(0))?;
        let events = activation.take_queue(1).ok_or(ActivateError::MissingQueue(1))?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(io::Error::from)?;
        let mut service = Service {
            mem: activation.mem,
            requests,
            events,
            translator: Arc::clone(&self.translator),
            faults: Arc::clone(&self.faults),
        };
        let watched = [service.requests.kick(), service.events.kick(), &service.faults.event];
        for event in watched {
            epoll::add(&epoll, event, EventData::new_u64(0), EventFlags::IN).map_err(io::Error::from)?;
        }
        self.worker = Some(Worker::spawn("virtio-iommu", move |stop: Stop| {
            if let Err(error) = epoll::add(&epoll, stop.event(), EventData::new_u64(1), EventFlags::IN) {
                tracing::error!(%error, "the IOMMU's thread cannot start");
                return;
            }
            let mut ready = Vec::with_capacity(4);
            while !stop.requested() {
                service.serve(&stop);
                ready.clear();
                match epoll::wait(&epoll, rustix::buffer::spare_capacity(&mut ready), None) {
                    Ok(_) | Err(rustix::io::Errno::INTR) => {}
                    Err(error) => {
                        tracing::error!(%error, "the IOMMU's thread ends");
                        return;
                    }
                }
            }
        })?);
        Ok(())
    }

    fn reset(&mut self) {
        if self.worker.take().is_some() {
            lock(&self.translator).reset();
        }
    }
}

/// What the device's thread has.
struct Service<M: GuestMem> {
    mem: M,
    requests: Virtq<M>,
    events: Virtq<M>,
    translator: Arc<Mutex<dyn Translator>>,
    faults: Arc<Faults>,
}

impl<M: GuestMem> Service<M> {
    fn serve(&mut self, stop: &Stop) {
        let (mem, translator) = (&self.mem, &self.translator);
        self.requests.serve(&|| stop.requested(), |chain| answer(mem, &mut *lock(translator), chain));
        self.faults.event.clear();
        self.events.clear_kick();
        loop {
            while let Some(fault) = self.faults.take() {
                let Some(chain) = self.events.pop() else {
                    self.faults.put_back(fault);
                    break;
                };
                let bytes = request::fault(fault);
                let fits = chain.writable.len() >= FAULT_SIZE;
                let written = if fits { chain.writable.write(&*self.mem.memory(), 0, &bytes) } else { 0 };
                self.events.push(&chain, written);
                self.events.signal();
            }
            if self.events.wait_for_kick() {
                return;
            }
            // There are buffers, and perhaps nothing to put into them.
            if lock(&self.faults.waiting).0.is_empty() {
                return;
            }
        }
    }
}

/// Answers one request; returns how many bytes it wrote: the tail, in a PROBE behind the properties.
fn answer<M: GuestMem>(mem: &M, translator: &mut dyn Translator, chain: &Chain<M>) -> usize {
    let mem = mem.memory();
    let mut bytes = [0; request::MAX_SIZE];
    let length = chain.readable.read(&*mem, 0, &mut bytes);
    let Some(tail) = chain.writable.len().checked_sub(TAIL_SIZE) else { return 0 };
    let mut properties = Vec::new();
    let result = Request::parse(bytes.get(..length).unwrap_or_default()).and_then(|request| match request {
        Request::Attach { domain, endpoint, bypass } => translator.attach(domain, endpoint, bypass),
        Request::Detach { domain, endpoint } => translator.detach(domain, endpoint),
        Request::Map { domain, start, last, to, flags } => translator.map(domain, start, last, to, flags),
        Request::Unmap { domain, start, last } => translator.unmap(domain, start, last),
        Request::Probe { endpoint } => {
            properties = request::properties(&translator.reserved(endpoint)?);
            if tail < PROBE_SIZE || properties.len() > PROBE_SIZE {
                return Err(Refusal::Invalid);
            }
            properties.resize(PROBE_SIZE, 0);
            Ok(())
        }
    });
    if result.is_ok() && !properties.is_empty() {
        chain.writable.write(&*mem, 0, &properties);
    }
    let at = if properties.is_empty() { 0 } else { PROBE_SIZE };
    let status = result.map_or_else(Refusal::status, |()| 0);
    at + chain.writable.write(&*mem, at, &[status, 0, 0, 0])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_that_find_no_room_are_counted() {
        let faults = Faults::new().unwrap();
        let fault = FaultRecord { endpoint: 1, address: 2, write: true, mapped_domain: true };
        for _ in 0..MAX_FAULTS + 3 {
            faults.report(fault);
        }
        assert_eq!(faults.count(), MAX_FAULTS as u64 + 3);
        let mut taken = 0;
        while faults.take().is_some() {
            taken += 1;
        }
        assert_eq!(taken, MAX_FAULTS);
    }
}

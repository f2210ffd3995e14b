//! The path from a device to the driver's interrupt handler, and the status that both sides share.
//!
//! # Theory of operation
//!
//! [`Interrupts`] is shared by the transport (vCPU threads) and the workers of the device. A worker asks for
//! "queue n was used" or "configuration changed"; here that becomes an MSI-X message by the vector which the
//! driver assigned, or, while the driver has not enabled MSI-X, an ISR bit and the INTx wire.
//!
//! Locks: `msix` and `isr` are leaves, never held together; no message is sent under `msix`. The INTx wire is
//! driven under `isr`, so that the level always matches the register.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;

use crate::warn::GuestWarnings;
use ::pci::msix::{IntxLine, Message, MsiSink, Msix};

/// "No vector assigned" (`VIRTIO_MSI_NO_VECTOR`, virtio 1.2, section 4.1.5.1.2).
pub(crate) const NO_VECTOR: u16 = 0xffff;

/// ISR status bits (virtio 1.2, section 4.1.4.5).
const ISR_QUEUE: u8 = 1 << 0;
const ISR_CONFIG: u8 = 1 << 1;

/// `DEVICE_NEEDS_RESET` in the device status register.
pub(crate) const STATUS_NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;

/// Interrupts of one device, and the device status register.
pub struct Interrupts {
    status: AtomicU8,
    generation: AtomicU8,
    bus_master: AtomicBool,
    intx_disabled: AtomicBool,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    isr: Mutex<u8>,
    msix: Mutex<Msix>,
    sink: Arc<dyn MsiSink>,
    intx: Option<Box<dyn IntxLine>>,
    warnings: GuestWarnings,
}

impl std::fmt::Debug for Interrupts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Interrupts").field("status", &self.status).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Interrupts {
    pub(crate) fn new(
        name: &str,
        queues: usize,
        vectors: u16,
        sink: Arc<dyn MsiSink>,
        intx: Option<Box<dyn IntxLine>>,
    ) -> Self {
        Interrupts {
            status: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            bus_master: AtomicBool::new(false),
            intx_disabled: AtomicBool::new(false),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: Mutex::new(0),
            msix: Mutex::new(Msix::new(vectors)),
            sink,
            intx,
            warnings: GuestWarnings::new(name),
        }
    }

    /// Tells the driver that queue `index` has used buffers. The caller has checked with
    /// [`Virtq::signal`](crate::queue::Virtq::signal) that the driver wants to know.
    pub fn queue_used(&self, index: u16) {
        let vector = self.queue_vector(index);
        self.raise(vector, ISR_QUEUE);
    }

    /// Tells the driver that the device-specific configuration changed.
    pub fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.raise(self.config_vector.load(Ordering::SeqCst), ISR_CONFIG);
    }

    /// Puts the device into the state that only a reset ends, because of what the guest did.
    pub fn needs_reset(&self, reason: &dyn std::fmt::Display) {
        self.warnings.warn(reason);
        if self.status.fetch_or(STATUS_NEEDS_RESET, Ordering::SeqCst) & STATUS_NEEDS_RESET == 0 {
            self.config_changed();
        }
    }

    /// Logs, at a bounded rate, something wrong that the guest did.
    pub fn warn(&self, what: &dyn std::fmt::Display) {
        self.warnings.warn(what);
    }

    /// The device may access guest memory.
    #[must_use]
    pub fn bus_master(&self) -> bool {
        self.bus_master.load(Ordering::SeqCst)
    }

    fn raise(&self, vector: u16, isr_bit: u8) {
        let (message, msix_enabled) = {
            let mut msix = lock(&self.msix);
            let enabled = msix.enabled();
            (if enabled { msix.raise(vector) } else { None }, enabled)
        };
        if let Some(message) = message {
            self.sink.signal(message.address, message.data);
        }
        if !msix_enabled {
            let mut isr = lock(&self.isr);
            *isr |= isr_bit;
            self.drive(*isr, msix_enabled);
        }
    }

    fn drive(&self, isr: u8, msix_enabled: bool) {
        if let Some(intx) = &self.intx {
            intx.set(isr != 0 && !msix_enabled && !self.intx_disabled.load(Ordering::SeqCst));
        }
    }

    fn send(&self, messages: &[Message]) {
        for message in messages {
            self.sink.signal(message.address, message.data);
        }
    }

    /// An INTx interrupt is pending, whether or not it may be asserted.
    pub(crate) fn intx_pending(&self) -> bool {
        *lock(&self.isr) != 0
    }

    /// The ISR register: reading clears it and deasserts INTx.
    pub(crate) fn take_isr(&self) -> u8 {
        let enabled = lock(&self.msix).enabled();
        let mut isr = lock(&self.isr);
        let value = std::mem::take(&mut *isr);
        self.drive(0, enabled);
        value
    }

    pub(crate) fn status(&self) -> u8 {
        self.status.load(Ordering::SeqCst)
    }

    /// Sets status bits; the register only gains bits until reset.
    pub(crate) fn add_status(&self, bits: u8) {
        self.status.fetch_or(bits, Ordering::SeqCst);
    }

    pub(crate) fn generation(&self) -> u8 {
        self.generation.load(Ordering::SeqCst)
    }

    pub(crate) fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::SeqCst)
    }

    pub(crate) fn set_config_vector(&self, vector: u16) {
        self.config_vector.store(self.existing(vector), Ordering::SeqCst);
    }

    pub(crate) fn queue_vector(&self, index: u16) -> u16 {
        self.queue_vectors.get(usize::from(index)).map_or(NO_VECTOR, |v| v.load(Ordering::SeqCst))
    }

    pub(crate) fn set_queue_vector(&self, index: u16, vector: u16) {
        if let Some(slot) = self.queue_vectors.get(usize::from(index)) {
            slot.store(self.existing(vector), Ordering::SeqCst);
        }
    }

    /// A vector that does not exist reads back as none: virtio 1.2, section 4.1.5.1.2.2.
    fn existing(&self, vector: u16) -> u16 {
        if vector < lock(&self.msix).vectors() { vector } else { NO_VECTOR }
    }

    /// Takes over what a write to configuration space changed.
    pub(crate) fn set_pci_state(&self, msix_control: u16, bus_master: bool, intx_disabled: bool) {
        self.bus_master.store(bus_master, Ordering::SeqCst);
        self.intx_disabled.store(intx_disabled, Ordering::SeqCst);
        let (messages, enabled) = {
            let mut msix = lock(&self.msix);
            let mut messages = msix.set_bus_master(bus_master);
            messages.extend(msix.set_control(msix_control));
            (messages, msix.enabled())
        };
        self.send(&messages);
        let isr = lock(&self.isr);
        self.drive(*isr, enabled);
    }

    pub(crate) fn table_read(&self, offset: u64, data: &mut [u8]) {
        lock(&self.msix).table_read(offset, data);
    }

    pub(crate) fn table_write(&self, offset: u64, data: &[u8]) {
        let messages = lock(&self.msix).table_write(offset, data);
        self.send(&messages);
    }

    pub(crate) fn pba_read(&self, offset: u64, data: &mut [u8]) {
        lock(&self.msix).pba_read(offset, data);
    }

    /// Virtio reset: status, vectors and ISR. MSI-X itself belongs to PCI and stays.
    pub(crate) fn reset_device(&self) {
        self.status.store(0, Ordering::SeqCst);
        self.config_vector.store(NO_VECTOR, Ordering::SeqCst);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::SeqCst);
        }
        self.take_isr();
    }

    /// PCI reset: MSI-X too.
    pub(crate) fn reset_pci(&self) {
        self.reset_device();
        lock(&self.msix).reset();
        self.set_pci_state(0, false, false);
    }
}

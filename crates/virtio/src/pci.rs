//! A virtio device as a PCI function (virtio 1.2, section 4.1).
//!
//! # Theory of operation
//!
//! Vendor capabilities in configuration space tell the driver where in the BARs the registers lie. BAR 0 has
//! four pages: the common configuration, the ISR, the device-specific configuration, and the doorbells, one
//! dword per queue. BAR 2 has the MSI-X table and pending bits. A fifth capability is a window that lets
//! software without memory access reach the BARs through configuration space.
//!
//! The common configuration is read as an image of its 60 bytes. A write is merged into such an image and then
//! applied to each register that it touched, in ascending order, so every offset and width has a meaning.
//!
//! The device status register is a one-way street, until 0 is written:
//!
//! ```text
//! ACKNOWLEDGE → DRIVER → (features) → FEATURES_OK → (queues) → DRIVER_OK → device runs
//! ```
//!
//! FEATURES_OK does not stick when the driver accepted what was not offered or left out VERSION_1. DRIVER_OK
//! builds the queues and activates the device; if a queue makes no sense, or the device cannot start, the
//! device shows DEVICE_NEEDS_RESET instead. Writing 0 stops the device's threads before it returns.
//!
//! A doorbell write only signals the queue's eventfd. The work is done on the device's own threads.

use std::sync::Arc;

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use crate::device::{Activation, GuestMem, Reach, VirtioDevice, feature};
use crate::event::Event;
use crate::interrupt::{Interrupts, STATUS_NEEDS_RESET};
use crate::queue::Virtq;
use ::pci::config::{Bar, BarKind, ConfigError, PciConfig, PciIds};
use ::pci::msix::{IntxLine, MsiSink, MsixLayout};

/// PCI vendor of virtio devices.
const VENDOR: u16 = 0x1af4;
/// A modern device's PCI device ID is this plus its virtio device ID.
const DEVICE_BASE: u16 = 0x1040;
/// Vendor-specific capability (PCI 3.0, appendix H).
const CAPABILITY_VENDOR: u8 = 0x09;

/// `cfg_type` of the capabilities (virtio 1.2, section 4.1.4; `linux/virtio_pci.h`).
mod cfg_type {
    pub(super) const COMMON: u8 = 1;
    pub(super) const NOTIFY: u8 = 2;
    pub(super) const ISR: u8 = 3;
    pub(super) const DEVICE: u8 = 4;
    pub(super) const PCI: u8 = 5;
}

/// The BAR of virtio's own registers, and its pages.
const REGISTER_BAR: usize = 0;
const REGISTER_BAR_SIZE: u64 = 0x4000;
const PAGE: u64 = 0x1000;
const COMMON_PAGE: u64 = 0;
const ISR_PAGE: u64 = 1;
const DEVICE_PAGE: u64 = 2;
const NOTIFY_PAGE: u64 = 3;
/// Bytes between the doorbells of two queues.
const NOTIFY_MULTIPLIER: u32 = 4;

/// The BAR of MSI-X: table from 0, pending bits in its second half.
const MSIX_BAR: usize = 2;
const MSIX_BAR_SIZE: u64 = 0x1000;
const PBA_OFFSET: u32 = 0x800;
/// Vectors that fit in front of the pending bits: 128.
const MAX_VECTORS: usize = PBA_OFFSET as usize / 16;

/// Offsets in the common configuration (virtio 1.2, section 4.1.4.3).
mod common {
    pub(super) const DEVICE_FEATURE_SELECT: usize = 0;
    pub(super) const DEVICE_FEATURE: usize = 4;
    pub(super) const DRIVER_FEATURE_SELECT: usize = 8;
    pub(super) const DRIVER_FEATURE: usize = 12;
    pub(super) const CONFIG_MSIX_VECTOR: usize = 16;
    pub(super) const NUM_QUEUES: usize = 18;
    pub(super) const DEVICE_STATUS: usize = 20;
    pub(super) const CONFIG_GENERATION: usize = 21;
    pub(super) const QUEUE_SELECT: usize = 22;
    pub(super) const QUEUE_SIZE: usize = 24;
    pub(super) const QUEUE_MSIX_VECTOR: usize = 26;
    pub(super) const QUEUE_ENABLE: usize = 28;
    pub(super) const QUEUE_NOTIFY_OFF: usize = 30;
    pub(super) const QUEUE_DESC: usize = 32;
    pub(super) const QUEUE_DRIVER: usize = 40;
    pub(super) const QUEUE_DEVICE: usize = 48;
    pub(super) const SIZE: usize = 60;
}

const STATUS_DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
const STATUS_FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
/// The bits that a driver may set besides those with a check of their own.
const STATUS_PLAIN: u8 =
    (VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FAILED) as u8;

/// The features that the transport and the rings bring with them.
const TRANSPORT_FEATURES: u64 =
    feature(VIRTIO_F_VERSION_1) | feature(VIRTIO_RING_F_EVENT_IDX) | feature(VIRTIO_RING_F_INDIRECT_DESC);

/// A function cannot be made of a device.
#[derive(Debug, thiserror::Error)]
pub enum PciError {
    /// A BAR or capability does not fit; a mistake in this crate.
    #[error("the configuration space does not fit")]
    Config(#[from] ConfigError),
    /// More queues than there is room for vectors.
    #[error("{0} queues, at most {max} are possible", max = MAX_VECTORS - 1)]
    Queues(usize),
    /// A queue size that is no power of two of at most 32768.
    #[error("queue size {0} is not possible")]
    QueueSize(u16),
    /// No eventfd to be had.
    #[error("cannot create the queues' eventfds")]
    EventFd(#[from] std::io::Error),
}

/// The parts of a queue that the driver sets up.
struct QueueSetup {
    max_size: u16,
    size: u16,
    enabled: bool,
    desc: u64,
    driver: u64,
    device: u64,
    kick: Arc<Event>,
}

impl QueueSetup {
    fn reset(&mut self) {
        self.size = self.max_size;
        self.enabled = false;
        (self.desc, self.driver, self.device) = (0, 0, 0);
    }

    /// The queue to run, if the addresses make sense in this memory.
    fn build(&self, mem: &impl Reach, event_idx: bool) -> Option<Queue> {
        let mut queue = Queue::new(self.max_size).ok()?;
        queue.try_set_size(self.size).ok()?;
        queue.try_set_desc_table_address(GuestAddress(self.desc)).ok()?;
        queue.try_set_avail_ring_address(GuestAddress(self.driver)).ok()?;
        queue.try_set_used_ring_address(GuestAddress(self.device)).ok()?;
        // Lengths from virtio 1.2, section 2.7; the rings' 6 bytes are flags, index and event index.
        let size = usize::from(self.size);
        let parts = [(self.desc, 16 * size), (self.driver, 6 + 2 * size), (self.device, 6 + 8 * size)];
        let fits = |(address, len): (u64, usize)| {
            address.checked_add(len as u64).is_some() && mem.may_read(GuestAddress(address), len)
        };
        // `Queue` takes an available ring at 0 for "not set up".
        let writable = mem.may_write(GuestAddress(self.device), 6 + 8 * size);
        if self.driver == 0 || !parts.into_iter().all(fits) || !writable {
            return None;
        }
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        Some(queue)
    }
}

/// One virtio device as a PCI function.
pub struct VirtioPci<M: GuestMem> {
    device: Box<dyn VirtioDevice<M>>,
    mem: M,
    /// Features that the transport offers.
    features: u64,
    config: PciConfig,
    msix_capability: u8,
    window_capability: u8,
    interrupts: Arc<Interrupts>,
    queues: Vec<QueueSetup>,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u16,
    activated: bool,
}

impl<M: GuestMem> std::fmt::Debug for VirtioPci<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VirtioPci")
            .field("device", &self.device.name())
            .field("interrupts", &self.interrupts)
            .finish_non_exhaustive()
    }
}

impl<M: GuestMem> VirtioPci<M> {
    /// Wraps a device. `intx` is the wire of interrupt pin A, if the machine has one.
    ///
    /// # Errors
    /// [`PciError`]; not for the devices of this crate, unless eventfds run out.
    pub fn new(
        device: Box<dyn VirtioDevice<M>>,
        mem: M,
        msi: Arc<dyn MsiSink>,
        intx: Option<Box<dyn IntxLine>>,
    ) -> Result<Self, PciError> {
        let id = device.device_id();
        let mut config = PciConfig::new(PciIds {
            vendor: VENDOR,
            device: DEVICE_BASE + id,
            revision: 1,
            class: device.pci_class(),
            subsystem_vendor: VENDOR,
            subsystem: DEVICE_BASE + id,
        });
        let queue_count = device.queue_sizes().len();
        let vectors = u16::try_from(queue_count + 1)
            .ok()
            .filter(|vectors| usize::from(*vectors) <= MAX_VECTORS)
            .ok_or(PciError::Queues(queue_count))?;
        let queues = device.queue_sizes().iter().map(|&max_size| {
            Queue::new(max_size).map_err(|_| PciError::QueueSize(max_size))?;
            let kick = Arc::new(Event::new()?);
            let size = max_size;
            Ok(QueueSetup { max_size, size, enabled: false, desc: 0, driver: 0, device: 0, kick })
        });
        let queues = queues.collect::<Result<Vec<_>, PciError>>()?;

        let memory = BarKind::Memory64 { prefetchable: false };
        config.add_bar(REGISTER_BAR, memory, REGISTER_BAR_SIZE)?;
        config.add_bar(MSIX_BAR, memory, MSIX_BAR_SIZE)?;
        if intx.is_some() {
            config.set_interrupt_pin_a();
        }
        let layout = MsixLayout { vectors, bar: MSIX_BAR as u8, table: 0, pba: PBA_OFFSET };
        let msix_capability = layout.add_capability(&mut config)?;
        let capability = |cfg_type: u8, page: u64, length: u32, tail: &[u8]| {
            // cap_len counts the two bytes of the header that every PCI capability has.
            let mut body = vec![16 + tail.len() as u8, cfg_type, REGISTER_BAR as u8, 0, 0, 0];
            body.extend_from_slice(&u32::try_from(page * PAGE).unwrap_or(0).to_le_bytes());
            body.extend_from_slice(&length.to_le_bytes());
            body.extend_from_slice(tail);
            body
        };
        let page = PAGE as u32;
        let plain = [
            capability(cfg_type::COMMON, COMMON_PAGE, common::SIZE as u32, &[]),
            capability(cfg_type::ISR, ISR_PAGE, 1, &[]),
            capability(cfg_type::DEVICE, DEVICE_PAGE, page, &[]),
            capability(cfg_type::NOTIFY, NOTIFY_PAGE, page, &NOTIFY_MULTIPLIER.to_le_bytes()),
        ];
        for body in plain {
            config.add_capability(CAPABILITY_VENDOR, &body, &[])?;
        }
        // The window's BAR number, offset, length and data are writable.
        let window = capability(cfg_type::PCI, COMMON_PAGE, 0, &[0; 4]);
        let mut writable = [0xff; 18];
        writable[..2].fill(0);
        writable[3..6].fill(0);
        let window_capability = config.add_capability(CAPABILITY_VENDOR, &window, &writable)?;

        let interrupts = Interrupts::new(device.name(), queue_count, vectors, msi, intx);
        Ok(VirtioPci {
            device,
            mem,
            features: TRANSPORT_FEATURES,
            config,
            msix_capability,
            window_capability,
            interrupts: Arc::new(interrupts),
            queues,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            queue_select: 0,
            activated: false,
        })
    }

    /// Tells the driver that the device's addresses are not the processor's: it is behind an IOMMU.
    #[must_use]
    pub fn behind_iommu(mut self) -> Self {
        self.features |= feature(VIRTIO_F_ACCESS_PLATFORM);
        self
    }

    /// The BARs as they are programmed now.
    pub fn bars(&self) -> impl Iterator<Item = Bar> + '_ {
        self.config.bars()
    }

    /// Gives a BAR an address, as firmware does. Memory decoding is enabled separately.
    pub fn set_bar_address(&mut self, index: usize, address: u64) {
        self.config.set_bar_address(index, address);
    }

    /// Turns memory decoding on or off, as firmware does.
    pub fn set_memory_enabled(&mut self, on: bool) {
        self.config.set_memory_enabled(on);
    }

    /// Reads configuration space. Any offset and length is good.
    pub fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        let window_data = u16::from(self.window_capability) + 16;
        if touches(offset, data.len(), window_data, 4)
            && let Some((bar, at, length)) = self.window()
        {
            let mut value = [0; 4];
            self.bar_read(bar, at, &mut value[..length]);
            self.config.set(u16::from(self.window_capability) + 16, &value[..length]);
        }
        self.config.set_interrupt_status(self.interrupts.intx_pending());
        self.config.read(offset, data);
    }

    /// Writes configuration space. Any offset and length is good. BARs, memory decoding and bus mastering may
    /// have changed afterwards.
    pub fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
        let window_data = u16::from(self.window_capability) + 16;
        if touches(offset, data.len(), window_data, 4)
            && let Some((bar, at, length)) = self.window()
        {
            let mut value = [0; 4];
            self.config.read(window_data, &mut value);
            self.bar_write(bar, at, &value[..length]);
        }
        self.apply_config();
    }

    /// What the window capability points at, if it is a possible access: BAR, offset and length.
    fn window(&self) -> Option<(usize, u64, usize)> {
        let mut fields = [0; 16];
        self.config.read(self.window_capability.into(), &mut fields);
        let [.., o0, o1, o2, o3, l0, l1, l2, l3] = fields;
        let offset = u32::from_le_bytes([o0, o1, o2, o3]);
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        let fits = matches!(length, 1 | 2 | 4) && offset % length == 0;
        fits.then_some((usize::from(fields[4]), offset.into(), length as usize))
    }

    /// Carries MSI-X control, bus master and INTx disable over to where they act.
    fn apply_config(&mut self) {
        let mut control = [0; 2];
        self.config.read(u16::from(self.msix_capability) + 2, &mut control);
        let may_start = self.config.bus_master() && !self.interrupts.bus_master();
        self.interrupts.set_pci_state(
            u16::from_le_bytes(control),
            self.config.bus_master(),
            self.config.intx_disabled(),
        );
        if may_start && self.activated {
            // The driver may have rung while the device could not look.
            for queue in &self.queues {
                queue.kick.signal();
            }
        }
    }

    /// Reads `data.len()` bytes at `offset` in a BAR. What lies outside registers reads as zero.
    pub fn bar_read(&mut self, bar: usize, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match bar {
            REGISTER_BAR => match (offset / PAGE, offset % PAGE) {
                (COMMON_PAGE, at) => copy_out(&self.common_image(), at, data),
                (ISR_PAGE, 0) if !data.is_empty() => copy_out(&[self.interrupts.take_isr()], 0, data),
                (DEVICE_PAGE, at) => self.device.read_config(at, data),
                _ => {}
            },
            MSIX_BAR if offset < PBA_OFFSET.into() => self.interrupts.table_read(offset, data),
            MSIX_BAR => self.interrupts.pba_read(offset - u64::from(PBA_OFFSET), data),
            _ => {}
        }
    }

    /// Writes `data` at `offset` in a BAR. What lies outside registers is ignored.
    pub fn bar_write(&mut self, bar: usize, offset: u64, data: &[u8]) {
        match bar {
            REGISTER_BAR => match (offset / PAGE, offset % PAGE) {
                (COMMON_PAGE, at) => self.common_write(at, data),
                (DEVICE_PAGE, at) => self.device.write_config(at, data),
                (NOTIFY_PAGE, at) => {
                    let queue = usize::try_from(at / u64::from(NOTIFY_MULTIPLIER)).unwrap_or(usize::MAX);
                    if let Some(queue) = self.queues.get(queue) {
                        queue.kick.signal();
                    }
                }
                _ => {}
            },
            MSIX_BAR if offset < PBA_OFFSET.into() => self.interrupts.table_write(offset, data),
            _ => {}
        }
    }

    /// Conventional PCI reset: the device stops, every register goes back, BARs lose their addresses.
    pub fn reset(&mut self) {
        self.reset_device();
        self.config.reset();
        self.interrupts.reset_pci();
    }

    fn reset_device(&mut self) {
        self.device.reset();
        self.activated = false;
        for queue in &mut self.queues {
            queue.reset();
            // A doorbell of the past must not start the next driver's queue.
            queue.kick.clear();
        }
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        self.interrupts.reset_device();
    }

    fn offered_features(&self) -> u64 {
        self.device.features() | self.features
    }

    fn selected(&self) -> Option<&QueueSetup> {
        self.queues.get(usize::from(self.queue_select))
    }

    /// The common configuration as it reads now.
    fn common_image(&self) -> [u8; common::SIZE] {
        let mut image = [0; common::SIZE];
        let mut put = |offset: usize, bytes: &[u8]| {
            for (to, from) in image.iter_mut().skip(offset).zip(bytes) {
                *to = *from;
            }
        };
        put(common::DEVICE_FEATURE_SELECT, &self.device_feature_select.to_le_bytes());
        put(common::DEVICE_FEATURE, &half(self.offered_features(), self.device_feature_select).to_le_bytes());
        put(common::DRIVER_FEATURE_SELECT, &self.driver_feature_select.to_le_bytes());
        put(common::DRIVER_FEATURE, &half(self.driver_features, self.driver_feature_select).to_le_bytes());
        put(common::CONFIG_MSIX_VECTOR, &self.interrupts.config_vector().to_le_bytes());
        put(common::NUM_QUEUES, &(self.queues.len() as u16).to_le_bytes());
        put(common::DEVICE_STATUS, &[self.interrupts.status()]);
        put(common::CONFIG_GENERATION, &[self.interrupts.generation()]);
        put(common::QUEUE_SELECT, &self.queue_select.to_le_bytes());
        // A queue that does not exist reads as size 0.
        if let Some(queue) = self.selected() {
            put(common::QUEUE_SIZE, &queue.size.to_le_bytes());
            put(common::QUEUE_MSIX_VECTOR, &self.interrupts.queue_vector(self.queue_select).to_le_bytes());
            put(common::QUEUE_ENABLE, &u16::from(queue.enabled).to_le_bytes());
            put(common::QUEUE_NOTIFY_OFF, &self.queue_select.to_le_bytes());
            put(common::QUEUE_DESC, &queue.desc.to_le_bytes());
            put(common::QUEUE_DRIVER, &queue.driver.to_le_bytes());
            put(common::QUEUE_DEVICE, &queue.device.to_le_bytes());
        }
        image
    }

    fn common_write(&mut self, offset: u64, data: &[u8]) {
        let Ok(offset) = usize::try_from(offset) else { return };
        let mut image = self.common_image();
        for (to, from) in image.iter_mut().skip(offset).zip(data) {
            *to = *from;
        }
        let end = offset.saturating_add(data.len());
        let touched = |field: usize, len: usize| offset < field + len && field < end;
        let u16_at = |at: usize| u16::from_le_bytes([image[at], image[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;

        if touched(common::DEVICE_FEATURE_SELECT, 4) {
            self.device_feature_select = u32_at(common::DEVICE_FEATURE_SELECT);
        }
        if touched(common::DRIVER_FEATURE_SELECT, 4) {
            self.driver_feature_select = u32_at(common::DRIVER_FEATURE_SELECT);
        }
        if touched(common::DRIVER_FEATURE, 4) {
            self.set_driver_features(u32_at(common::DRIVER_FEATURE));
        }
        if touched(common::CONFIG_MSIX_VECTOR, 2) {
            self.interrupts.set_config_vector(u16_at(common::CONFIG_MSIX_VECTOR));
        }
        if touched(common::DEVICE_STATUS, 1) {
            self.write_status(image[common::DEVICE_STATUS]);
        }
        if touched(common::QUEUE_SELECT, 2) {
            self.queue_select = u16_at(common::QUEUE_SELECT);
        }
        if touched(common::QUEUE_MSIX_VECTOR, 2) {
            self.interrupts.set_queue_vector(self.queue_select, u16_at(common::QUEUE_MSIX_VECTOR));
        }
        // While a queue is enabled its registers stay: virtio 1.2, section 4.1.4.3.2.
        let selected = self.queues.get_mut(usize::from(self.queue_select));
        let Some(queue) = selected.filter(|queue| !queue.enabled) else { return };
        let size = u16_at(common::QUEUE_SIZE);
        if touched(common::QUEUE_SIZE, 2) && size.is_power_of_two() && size <= queue.max_size {
            queue.size = size;
        }
        if touched(common::QUEUE_DESC, 8) {
            queue.desc = u64_at(common::QUEUE_DESC);
        }
        if touched(common::QUEUE_DRIVER, 8) {
            queue.driver = u64_at(common::QUEUE_DRIVER);
        }
        if touched(common::QUEUE_DEVICE, 8) {
            queue.device = u64_at(common::QUEUE_DEVICE);
        }
        if touched(common::QUEUE_ENABLE, 2) && u16_at(common::QUEUE_ENABLE) == 1 {
            queue.enabled = true;
        }
    }

    fn set_driver_features(&mut self, value: u32) {
        if self.interrupts.status() & STATUS_FEATURES_OK != 0 {
            self.interrupts.warn(&"driver features written after FEATURES_OK");
            return;
        }
        let value = u64::from(value);
        match self.driver_feature_select {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | value,
            1 => self.driver_features = self.driver_features & 0xffff_ffff | value << 32,
            _ => {}
        }
    }

    fn write_status(&mut self, value: u8) {
        if value == 0 {
            self.reset_device();
            return;
        }
        self.interrupts.add_status(value & STATUS_PLAIN);
        let now = self.interrupts.status();
        if value & STATUS_FEATURES_OK != 0 && now & STATUS_FEATURES_OK == 0 {
            let unknown = self.driver_features & !self.offered_features();
            if unknown == 0 && self.driver_features & feature(VIRTIO_F_VERSION_1) != 0 {
                self.interrupts.add_status(STATUS_FEATURES_OK);
            } else {
                let features = self.driver_features;
                self.interrupts.warn(&format_args!("driver accepts impossible features {features:#x}"));
            }
        }
        if value & STATUS_DRIVER_OK != 0 && now & STATUS_DRIVER_OK == 0 {
            self.driver_ok();
        }
    }

    fn driver_ok(&mut self) {
        if self.interrupts.status() & STATUS_FEATURES_OK == 0 {
            self.interrupts.warn(&"DRIVER_OK before FEATURES_OK is ignored");
            return;
        }
        if self.interrupts.status() & STATUS_NEEDS_RESET != 0 {
            return;
        }
        self.interrupts.add_status(STATUS_DRIVER_OK);
        let event_idx = self.driver_features & feature(VIRTIO_RING_F_EVENT_IDX) != 0;
        let indirect = self.driver_features & feature(VIRTIO_RING_F_INDIRECT_DESC) != 0;
        let mem = self.mem.memory();
        let mut running = Vec::with_capacity(self.queues.len());
        for (index, setup) in (0u16..).zip(&self.queues) {
            if !setup.enabled {
                running.push(None);
                continue;
            }
            let Some(queue) = setup.build(&*mem, event_idx) else {
                self.interrupts.needs_reset(&format_args!("queue {index} is not in memory or not aligned"));
                return;
            };
            running.push(Some(Virtq::new(
                index,
                queue,
                self.mem.clone(),
                Arc::clone(&setup.kick),
                Arc::clone(&self.interrupts),
                indirect,
            )));
        }
        let activation = Activation {
            mem: self.mem.clone(),
            queues: running,
            interrupts: Arc::clone(&self.interrupts),
            features: self.driver_features,
        };
        match self.device.activate(activation) {
            Ok(()) => self.activated = true,
            Err(error) => self.interrupts.needs_reset(&format_args!("cannot start: {error}")),
        }
    }
}

impl<M: GuestMem> Drop for VirtioPci<M> {
    fn drop(&mut self) {
        self.device.shut_down();
    }
}

/// The 32 bits of a feature word that a select register chooses.
fn half(features: u64, select: u32) -> u32 {
    let bits = match select {
        0 => features & 0xffff_ffff,
        1 => features >> 32,
        _ => 0,
    };
    u32::try_from(bits).unwrap_or(0)
}

fn touches(offset: u16, len: usize, field: u16, field_len: usize) -> bool {
    let (offset, field) = (usize::from(offset), usize::from(field));
    offset < field + field_len && field < offset.saturating_add(len)
}

fn copy_out(image: &[u8], offset: u64, data: &mut [u8]) {
    crate::device::read_config_bytes(image, offset, data);
}

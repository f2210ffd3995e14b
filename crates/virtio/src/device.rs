//! What a device kind implements, and what it is given when the driver starts it.

use std::sync::Arc;

use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryRegion, GuestRegionCollection};

use crate::interrupt::Interrupts;
use crate::queue::Virtq;

/// Access to guest memory as the devices need it; implemented for everything fit for it.
///
/// An `Arc<GuestMemoryMmap<B>>` is one, with any dirty bitmap `B`: everything a device writes to guest memory
/// marks it.
///
/// What [`GuestAddressSpace::memory`] returns is held while memory is accessed, and not longer: behind an IOMMU it keeps
/// translations valid, and the guest waits for it when it unmaps.
pub trait GuestMem: GuestAddressSpace<M: Reach, T: Send> + Clone + Send + Sync + 'static {}

impl<M: GuestAddressSpace<M: Reach, T: Send> + Clone + Send + Sync + 'static> GuestMem for M {}

/// Memory of which a device may reach a part only.
pub trait Reach: GuestMemory {
    /// The device may read the `len` bytes at `at`.
    fn may_read(&self, at: GuestAddress, len: usize) -> bool;
    /// The device may write to the `len` bytes at `at`.
    fn may_write(&self, at: GuestAddress, len: usize) -> bool;
}

/// Plain memory: all of it.
impl<R: GuestMemoryRegion> Reach for GuestRegionCollection<R> {
    fn may_read(&self, at: GuestAddress, len: usize) -> bool {
        self.check_range(at, len)
    }

    fn may_write(&self, at: GuestAddress, len: usize) -> bool {
        self.check_range(at, len)
    }
}

/// Everything that a device needs to run, from the driver's DRIVER_OK until reset.
pub struct Activation<M: GuestMem> {
    /// Guest memory, for the buffers of the queues.
    pub mem: M,
    /// The queues by number. `None` where the driver did not enable one.
    pub queues: Vec<Option<Virtq<M>>>,
    /// Interrupts to the driver.
    pub interrupts: Arc<Interrupts>,
    /// The features that the driver accepted, a subset of those offered.
    pub features: u64,
}

impl<M: GuestMem> Activation<M> {
    /// Takes the queue with this number out, if the driver enabled it.
    pub fn take_queue(&mut self, index: usize) -> Option<Virtq<M>> {
        self.queues.get_mut(index).and_then(Option::take)
    }

    /// The driver accepted the feature with this bit number.
    #[must_use]
    pub fn has_feature(&self, bit: u32) -> bool {
        self.features & feature(bit) != 0
    }
}

/// The feature word with one bit set.
#[must_use]
pub const fn feature(bit: u32) -> u64 {
    1 << bit
}

/// A device could not be started.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver left out a queue that the device cannot work without.
    #[error("the driver did not enable queue {0}")]
    MissingQueue(usize),
    /// The host refused something.
    #[error("the host refused what the device needs")]
    Host(#[from] std::io::Error),
}

/// One kind of virtio device, behind any transport.
///
/// All methods are called from vCPU threads, one at a time, and return soon: the work is done by threads that
/// [`activate`](Self::activate) starts and [`reset`](Self::reset) ends.
pub trait VirtioDevice<M: GuestMem>: Send {
    /// The device ID of virtio 1.2, section 5 (`linux/virtio_ids.h`).
    fn device_id(&self) -> u16;

    /// The PCI class code to show: base class, subclass, programming interface.
    fn pci_class(&self) -> u32 {
        0x00_ff_00
    }

    /// Name for threads and messages.
    fn name(&self) -> &str;

    /// The largest size of each queue, in entries, each a power of two of at most 32768.
    fn queue_sizes(&self) -> &[u16];

    /// The device-specific features offered. The transport adds the ones that are its own business.
    fn features(&self) -> u64;

    /// Reads the device-specific configuration. Bytes past it are zero, and `data` comes zeroed.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the device-specific configuration; without an own implementation, no field is writable.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The driver set DRIVER_OK: start working. Not called again before [`reset`](Self::reset).
    ///
    /// # Errors
    /// On an error the transport shows DEVICE_NEEDS_RESET.
    fn activate(&mut self, activation: Activation<M>) -> Result<(), ActivateError>;

    /// Stop working and forget the driver. When this returns, no thread of the device touches guest memory or
    /// raises an interrupt. Also called when never activated.
    fn reset(&mut self);

    /// The machine is gone, no vCPU runs any more: as [`reset`](Self::reset), but what the driver left to be done
    /// is done first where somebody outside waits for it.
    fn shut_down(&mut self) {
        self.reset();
    }
}

/// Copies the part of a configuration structure that an access at `offset` covers.
pub(crate) fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    let Ok(start) = usize::try_from(offset) else { return };
    for (to, from) in data.iter_mut().zip(config.iter().skip(start)) {
        *to = *from;
    }
}

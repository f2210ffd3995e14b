//! Where a ring's parts are, and every access to them.
//!
//! The memory is shared with the device, which may write to all of it at any time: nothing here is a Rust reference
//! to it, each access copies (`vm-memory`'s volatile slices), and what is read is the device's word and no more.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemoryRegion, GuestRegionMmap, VolatileMemory, VolatileSlice,
};

use super::Fault;

/// Bytes of an entry of the descriptor table (virtio 1.2, 2.7.5).
const DESCRIPTOR: usize = 16;
/// Bytes before the entries of the available and the used ring: flags and index (2.7.6, 2.7.8).
const RING_HEADER: usize = 4;
/// Bytes of an entry of the used ring.
const USED: usize = 8;
/// What the buffers are aligned to.
const PAGE: usize = 4096;
/// What the two sides write is kept so far apart that they do not share a line of the cache.
const LINE: usize = 64;

/// How many descriptors a ring has, and how long the buffer of each is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    /// Descriptors: a power of two, 32768 at most (2.7).
    pub size: u16,
    /// Bytes of each descriptor's buffer: a multiple of 8.
    pub buffer: u32,
}

impl Shape {
    /// Whether a ring can have it.
    #[must_use]
    pub fn is_valid(self) -> bool {
        self.size.is_power_of_two() && self.buffer != 0 && self.buffer.is_multiple_of(8)
    }

    /// Bytes of memory that the ring and its buffers take: a multiple of the page size.
    #[must_use]
    pub fn bytes(self) -> usize {
        let layout = Layout::new(self);
        (layout.buffers + usize::from(self.size) * self.buffer as usize).next_multiple_of(PAGE)
    }
}

/// Offsets of a ring's parts from where it begins.
#[derive(Clone, Copy, Debug)]
struct Layout {
    avail: usize,
    used: usize,
    buffers: usize,
}

impl Layout {
    fn new(shape: Shape) -> Self {
        let size = usize::from(shape.size);
        // Both rings end with the other side's event index, which is there whether it is agreed on or not.
        let avail = size * DESCRIPTOR;
        let used = (avail + RING_HEADER + size * 2 + 2).next_multiple_of(LINE);
        let buffers = (used + RING_HEADER + size * USED + 2).next_multiple_of(PAGE);
        Self { avail, used, buffers }
    }
}

/// Where the device finds the parts of a ring: addresses in the memory that it was given.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Addresses {
    /// The descriptor table.
    pub descriptors: GuestAddress,
    /// The available ring.
    pub available: GuestAddress,
    /// The used ring.
    pub used: GuestAddress,
}

/// The memory of one ring.
#[derive(Debug)]
pub(super) struct Memory {
    region: Arc<GuestRegionMmap>,
    base: usize,
    layout: Layout,
    shape: Shape,
}

/// An entry of the used ring, as the device wrote it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct UsedEntry {
    pub(super) id: u32,
    pub(super) length: u32,
}

impl Memory {
    /// The memory of a ring that begins `base` bytes into `region`.
    pub(super) fn new(region: Arc<GuestRegionMmap>, base: usize, shape: Shape) -> Result<Self, Fault> {
        let memory = Self { layout: Layout::new(shape), region, base, shape };
        memory.slice(0, shape.bytes())?;
        Ok(memory)
    }

    /// Where the device finds the ring.
    pub(super) fn addresses(&self) -> Addresses {
        let at = |offset: usize| self.region.start_addr().unchecked_add((self.base + offset) as u64);
        Addresses { descriptors: at(0), available: at(self.layout.avail), used: at(self.layout.used) }
    }

    /// Writes a descriptor for the first `length` bytes of its own buffer.
    pub(super) fn set_descriptor(&self, id: u16, length: u32, flags: u16, next: u16) -> Result<(), Fault> {
        let address = self.region.start_addr().raw_value() + (self.base + self.buffer_offset(id)) as u64;
        let mut bytes = [0; DESCRIPTOR];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.slice(usize::from(id) * DESCRIPTOR, DESCRIPTOR)?.copy_from(&bytes);
        Ok(())
    }

    /// Writes the entry of the available ring for `index`.
    pub(super) fn set_available(&self, index: u16, head: u16) -> Result<(), Fault> {
        let place = self.layout.avail + RING_HEADER + usize::from(index % self.shape.size) * 2;
        self.store(place, head, Ordering::Relaxed)
    }

    /// Shows the device all entries before `index`. Release: whoever sees the index sees them too, and their descriptors
    /// and buffers (2.7.13.3).
    pub(super) fn publish(&self, index: u16) -> Result<(), Fault> {
        self.store(self.layout.avail + 2, index, Ordering::Release)
    }

    /// Whether the device shall notify us of used entries, where event indices are not agreed on (2.7.7).
    pub(super) fn set_calls(&self, wanted: bool) -> Result<(), Fault> {
        let flags = if wanted { 0 } else { VRING_AVAIL_F_NO_INTERRUPT as u16 };
        self.store(self.layout.avail, flags, Ordering::Relaxed)
    }

    /// At which used index the device shall notify us (2.7.7).
    pub(super) fn set_used_event(&self, index: u16) -> Result<(), Fault> {
        let place = self.layout.avail + RING_HEADER + usize::from(self.shape.size) * 2;
        self.store(place, index, Ordering::Relaxed)
    }

    /// The device's index of the used ring. Acquire: what it wrote before that is seen after this.
    pub(super) fn used_index(&self) -> Result<u16, Fault> {
        self.load(self.layout.used + 2, Ordering::Acquire)
    }

    /// The used ring's entry for `index`.
    pub(super) fn used_entry(&self, index: u16) -> Result<UsedEntry, Fault> {
        let place = self.layout.used + RING_HEADER + usize::from(index % self.shape.size) * USED;
        let mut bytes = [0; USED];
        self.slice(place, USED)?.copy_to(&mut bytes);
        let [a, b, c, d, e, f, g, h] = bytes;
        Ok(UsedEntry { id: u32::from_le_bytes([a, b, c, d]), length: u32::from_le_bytes([e, f, g, h]) })
    }

    /// Whether the device wants to be notified of available entries, where event indices are not agreed on (2.7.10).
    pub(super) fn kicks_wanted(&self) -> Result<bool, Fault> {
        Ok(u32::from(self.load(self.layout.used, Ordering::Relaxed)?) & VRING_USED_F_NO_NOTIFY == 0)
    }

    /// At which available index the device wants to be notified (2.7.10).
    pub(super) fn available_event(&self) -> Result<u16, Fault> {
        let place = self.layout.used + RING_HEADER + usize::from(self.shape.size) * USED;
        self.load(place, Ordering::Relaxed)
    }

    /// Copies into a descriptor's buffer, from `offset` on.
    pub(super) fn write_buffer(&self, id: u16, offset: usize, bytes: &[u8]) -> Result<(), Fault> {
        self.buffer(id, offset, bytes.len())?.copy_from(bytes);
        Ok(())
    }

    /// Copies out of a descriptor's buffer, from `offset` on.
    pub(super) fn read_buffer(&self, id: u16, offset: usize, bytes: &mut [u8]) -> Result<(), Fault> {
        self.buffer(id, offset, bytes.len())?.copy_to(bytes);
        Ok(())
    }

    fn buffer(&self, id: u16, offset: usize, length: usize) -> Result<VolatileSlice<'_>, Fault> {
        if id >= self.shape.size
            || offset.checked_add(length).is_none_or(|end| end > self.shape.buffer as usize)
        {
            return Err(Fault::OutsideMemory);
        }
        self.slice(self.buffer_offset(id) + offset, length)
    }

    fn buffer_offset(&self, id: u16) -> usize {
        self.layout.buffers + usize::from(id) * self.shape.buffer as usize
    }

    fn slice(&self, offset: usize, length: usize) -> Result<VolatileSlice<'_>, Fault> {
        VolatileMemory::get_slice(&**self.region, self.base + offset, length)
            .map_err(|_| Fault::OutsideMemory)
    }

    fn load(&self, offset: usize, order: Ordering) -> Result<u16, Fault> {
        let value: u16 = self.slice(offset, 2)?.load(0, order).map_err(|_| Fault::OutsideMemory)?;
        Ok(u16::from_le(value))
    }

    fn store(&self, offset: usize, value: u16, order: Ordering) -> Result<(), Fault> {
        self.slice(offset, 2)?.store(value.to_le(), 0, order).map_err(|_| Fault::OutsideMemory)
    }
}

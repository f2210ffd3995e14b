//! A device that keeps to the rules, for tests: rust-vmm's own implementation of a virtqueue's other side.

use std::io::{Read, Write};
use std::sync::Arc;

use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use super::{Addresses, Shape};

/// Memory for so many rings of one shape, and the region that it consists of.
pub(crate) fn memory(shape: Shape, rings: usize) -> (Arc<GuestMemoryMmap>, Arc<GuestRegionMmap>) {
    let region = MmapRegion::new(shape.bytes() * rings).unwrap();
    let region = Arc::new(GuestRegionMmap::new(region, GuestAddress(0x1000)).unwrap());
    (Arc::new(GuestMemoryMmap::from_arc_regions(vec![region.clone()]).unwrap()), region)
}

/// A chain that the device works on.
#[derive(Debug)]
pub(crate) struct Chain {
    pub(crate) head: u16,
    /// What is in it to read.
    pub(crate) bytes: Vec<u8>,
    /// What there is room for.
    pub(crate) room: usize,
}

/// The device.
pub(crate) struct Device {
    memory: Arc<GuestMemoryMmap>,
    queue: Queue,
}

impl Device {
    pub(crate) fn memory(&self) -> Arc<GuestMemoryMmap> {
        self.memory.clone()
    }

    pub(crate) fn new(
        memory: Arc<GuestMemoryMmap>,
        size: u16,
        addresses: Addresses,
        event_index: bool,
    ) -> Self {
        let mut queue = Queue::new(size).unwrap();
        queue.set_size(size);
        queue.try_set_desc_table_address(addresses.descriptors).unwrap();
        queue.try_set_avail_ring_address(addresses.available).unwrap();
        queue.try_set_used_ring_address(addresses.used).unwrap();
        queue.set_event_idx(event_index);
        queue.set_ready(true);
        assert!(queue.is_valid(&*memory));
        Self { memory, queue }
    }

    /// The next chain, if there is one.
    pub(crate) fn pop(&mut self) -> Option<Chain> {
        let chain = self.queue.pop_descriptor_chain(self.memory.clone())?;
        let head = chain.head_index();
        let room = chain.clone().writable().map(|descriptor| descriptor.len() as usize).sum();
        let mut bytes = Vec::new();
        chain.reader(&self.memory).unwrap().read_to_end(&mut bytes).unwrap();
        Some(Chain { head, bytes, room })
    }

    /// The next chain with these bytes written to it, as many as there is room for; returns how many that were. It is
    /// not used yet.
    pub(crate) fn fill(&mut self, bytes: &[u8]) -> Option<(u16, usize)> {
        let chain = self.queue.pop_descriptor_chain(self.memory.clone())?;
        let head = chain.head_index();
        let mut writer = chain.writer(&self.memory).unwrap();
        let length = bytes.len().min(writer.available_bytes());
        writer.write_all(&bytes[..length]).unwrap();
        Some((head, length))
    }

    /// Gives a chain back.
    pub(crate) fn finish(&mut self, head: u16, written: usize) {
        self.queue.add_used(&*self.memory, head, written as u32).unwrap();
    }

    /// Whether the driver is to be notified of what was given back.
    pub(crate) fn call_wanted(&mut self) -> bool {
        self.queue.needs_notification(&*self.memory).unwrap()
    }

    /// Wants no notifications from now on.
    pub(crate) fn work(&mut self) {
        self.queue.disable_notification(&*self.memory).unwrap();
    }

    /// Wants one at the next chain. Returns whether there is one already.
    pub(crate) fn sleep(&mut self) -> bool {
        self.queue.enable_notification(&*self.memory).unwrap()
    }
}

//! A split virtqueue (virtio 1.2, 2.7) seen from the driver's side: the queue is ours, a device serves it.
//!
//! Whoever implements a device gets a driver's queues. Here it is the other way round: the kernel's vhost-net
//! is the device, and this process is its driver.
//!
//! **Each descriptor owns a buffer** of one fixed length, at a fixed place behind the ring. A chain of descriptors is as
//! many buffers as its bytes need. So there is no allocation, and an id that comes back names memory by itself.
//!
//! **State.** Everything by which the driver decides is in this process alone: which descriptors are free, which
//! chains the device has, how they hang together, how far either ring has been walked. The shared memory is
//! written for the device; of it only four things are ever read: the used index and its entries, and what the device
//! says about notifications. A chain goes round like this:
//!
//! ```text
//!   free ──send, offer──▶ prepared ──publish──▶ the device's ──take──▶ taken ──release──▶ free
//! ```
//!
//! **What the device says is checked** before it is believed. The used index may move by no more entries than chains
//! are out. An id must be the head of a chain that the device has, and so cannot come twice. A length is at most what
//! was writable. Anything else is a [`Fault`], and the ring is not used after one: it cannot be known what else
//! is wrong. Nothing that the device writes makes a loop longer than the ring.
//!
//! **Indices** are 16 bits that run freely and wrap; their difference is a count, and modulo the ring's size, a power
//! of two, they are a place in it.
//!
//! **Order.** A chain's buffers and descriptors are written before the available index that shows them (release), and the
//! used index is read (acquire) before the entries and buffers that it speaks of. Each side's decision whether to
//! notify the other has a full fence between its own index and the other's wish, so that the two cannot both
//! believe that the other will look (2.7.13.4.1).
//!
//! **Notifications** to the device are wanted rarely while it is busy, and one serves all chains that were published
//! together. Notifications from the device come once it is asked for one ([`Ring::ask`]), after so many chains as the
//! asker cares about; with event indices exactly one, without them until [`Ring::take`] finds something.

mod memory;
#[cfg(test)]
pub(crate) mod model;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use thiserror::Error;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::GuestRegionMmap;

use memory::Memory;
pub use memory::{Addresses, Shape};

/// What a device did that no device may, by which its ring is lost.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum Fault {
    /// More entries are used than chains are out.
    #[error("the used index went from {from} to {to}, while the device has {outstanding} buffers")]
    Index {
        /// The last entry that was taken.
        from: u16,
        /// What the device wrote.
        to: u16,
        /// Chains that it has.
        outstanding: u16,
    },
    /// No descriptor has this id.
    #[error("buffer {id} was used, of {size}")]
    Id {
        /// What the device wrote.
        id: u32,
        /// Descriptors of the ring.
        size: u16,
    },
    /// The descriptor is not the head of a chain that the device has: it never had it, or it gave it back.
    #[error("buffer {id} was used, which the device does not have")]
    NotOutstanding {
        /// What the device wrote.
        id: u16,
    },
    /// More was written than there was room for.
    #[error("{length} bytes were written to buffer {id}, which has room for {room}")]
    Length {
        /// The chain.
        id: u16,
        /// What the device wrote.
        length: u32,
        /// Its writable bytes.
        room: u32,
    },
    /// The ring's own memory is not where it should be, or our own account of it is wrong: a bug of ours.
    #[error("an access outside of the ring's memory")]
    OutsideMemory,
}

/// Which way a ring's buffers go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// The device reads them.
    ToDevice,
    /// The device writes to them.
    FromDevice,
}

/// A chain that the device has used, until [`Ring::release`].
#[derive(PartialEq, Eq, Debug)]
#[must_use]
pub struct Taken {
    head: u16,
    /// Bytes that the device wrote to it.
    pub length: u32,
}

/// Who has the chain that begins with a descriptor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Holder {
    /// No chain begins with it.
    Nobody,
    /// The driver: before it is published, or after it was taken.
    Driver,
    /// The device.
    Device,
}

/// A descriptor's private record.
#[derive(Clone, Copy, Debug)]
struct Record {
    holder: Holder,
    /// If it is a head: descriptors of the chain.
    count: u16,
    /// The chain's next descriptor.
    next: u16,
}

/// A virtqueue of ours: see above.
#[derive(Debug)]
pub struct Ring {
    memory: Memory,
    shape: Shape,
    direction: Direction,
    event_index: bool,
    /// Descriptors in no chain. The last one freed is the first one taken: its buffer is still in the caches.
    free: Vec<u16>,
    records: Vec<Record>,
    /// Heads that wait for [`Self::publish`].
    prepared: Vec<u16>,
    /// The available index that the device was shown.
    available: u16,
    /// The next entry of the used ring to take.
    used: u16,
    /// The device's used index when it was last looked at.
    used_seen: u16,
    /// Chains that the device has.
    outstanding: u16,
    /// Whether the device is asked to notify us: kept only without event indices.
    asking: bool,
}

impl Ring {
    /// A ring in `region`, from `base` on, which must be zeroes. Both sides agreed on event indices
    /// (`VIRTIO_F_EVENT_IDX`) or they did not.
    ///
    /// # Errors
    /// [`Fault::OutsideMemory`] if `shape` is not valid or does not fit into the region.
    pub fn new(
        region: Arc<GuestRegionMmap>,
        base: usize,
        shape: Shape,
        direction: Direction,
        event_index: bool,
    ) -> Result<Self, Fault> {
        if !shape.is_valid() {
            return Err(Fault::OutsideMemory);
        }
        let memory = Memory::new(region, base, shape)?;
        if event_index {
            // As far ahead as it can be.
            memory.set_used_event(u16::MAX)?;
        } else {
            memory.set_calls(false)?;
        }
        let record = Record { holder: Holder::Nobody, count: 0, next: 0 };
        Ok(Self {
            memory,
            shape,
            direction,
            event_index,
            free: (0..shape.size).rev().collect(),
            records: vec![record; shape.size.into()],
            prepared: Vec::with_capacity(shape.size.into()),
            available: 0,
            used: 0,
            used_seen: 0,
            outstanding: 0,
            asking: false,
        })
    }

    /// Where the device finds it.
    #[must_use]
    pub fn addresses(&self) -> Addresses {
        self.memory.addresses()
    }

    /// Its descriptors and their buffers.
    #[must_use]
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Chains that the device has.
    #[must_use]
    pub fn outstanding(&self) -> u16 {
        self.outstanding
    }

    /// Descriptors in no chain.
    #[must_use]
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Chains that wait to be published.
    #[must_use]
    pub fn prepared(&self) -> usize {
        self.prepared.len()
    }

    /// How many descriptors `bytes` need.
    #[must_use]
    pub fn descriptors(&self, bytes: usize) -> usize {
        bytes.div_ceil(self.shape.buffer as usize).max(1)
    }

    /// Prepares a chain with the bytes of `parts`, one after the other, for the device to read. Returns whether there
    /// were descriptors enough.
    ///
    /// # Errors
    /// [`Fault::OutsideMemory`].
    pub fn send(&mut self, parts: &[&[u8]]) -> Result<bool, Fault> {
        let total = parts.iter().map(|part| part.len()).sum();
        let Some(head) = self.chain(total)? else { return Ok(false) };
        let buffer = self.shape.buffer as usize;
        let (mut id, mut offset) = (head, 0);
        for part in parts {
            let mut rest = *part;
            while !rest.is_empty() {
                if offset == buffer {
                    (id, offset) = (self.record(id)?.next, 0);
                }
                let (now, later) = rest.split_at(rest.len().min(buffer - offset));
                self.memory.write_buffer(id, offset, now)?;
                offset += now.len();
                rest = later;
            }
        }
        Ok(true)
    }

    /// Prepares a chain with room for `bytes` bytes, for the device to write to. Returns whether there were descriptors
    /// enough.
    ///
    /// # Errors
    /// [`Fault::OutsideMemory`].
    pub fn offer(&mut self, bytes: usize) -> Result<bool, Fault> {
        // All of the last buffer too: it would lie idle.
        let bytes = self.descriptors(bytes) * self.shape.buffer as usize;
        Ok(self.chain(bytes)?.is_some())
    }

    /// Takes descriptors for `bytes` bytes and links them.
    fn chain(&mut self, bytes: usize) -> Result<Option<u16>, Fault> {
        let count = self.descriptors(bytes);
        let Some(first) = self.free.len().checked_sub(count) else { return Ok(None) };
        let Some(&head) = self.free.last() else { return Ok(None) };
        let direction = match self.direction {
            Direction::ToDevice => 0,
            Direction::FromDevice => VRING_DESC_F_WRITE as u16,
        };
        let buffer = self.shape.buffer;
        let mut left = bytes;
        // The list's end is taken from the back: head first.
        for place in (first..self.free.len()).rev() {
            let id = self.free[place];
            let next = if place > first { Some(self.free[place - 1]) } else { None };
            let length = u32::try_from(left).map_or(buffer, |left| left.min(buffer));
            left -= length as usize;
            let flags = direction | if next.is_some() { VRING_DESC_F_NEXT as u16 } else { 0 };
            self.memory.set_descriptor(id, length, flags, next.unwrap_or(0))?;
            self.record_mut(id)?.next = next.unwrap_or(0);
        }
        self.free.truncate(first);
        let record = self.record_mut(head)?;
        record.holder = Holder::Driver;
        // No more than the free list had, whose length is 16 bits.
        record.count = count as u16;
        self.prepared.push(head);
        Ok(Some(head))
    }

    /// Gives all prepared chains to the device. Returns whether it wants to be notified of them.
    ///
    /// # Errors
    /// [`Fault::OutsideMemory`].
    pub fn publish(&mut self) -> Result<bool, Fault> {
        if self.prepared.is_empty() {
            return Ok(false);
        }
        let before = self.available;
        for place in 0..self.prepared.len() {
            let head = self.prepared[place];
            self.memory.set_available(self.available, head)?;
            self.record_mut(head)?.holder = Holder::Device;
            self.available = self.available.wrapping_add(1);
            self.outstanding += 1;
        }
        self.prepared.clear();
        self.memory.publish(self.available)?;
        // The index first, then the device's wish: it looks at them the other way round.
        fence(Ordering::SeqCst);
        if self.event_index {
            Ok(passed(self.memory.available_event()?, before, self.available))
        } else {
            self.memory.kicks_wanted()
        }
    }

    /// The next chain that the device has used, if there is one.
    ///
    /// # Errors
    /// What the device did wrong.
    pub fn take(&mut self) -> Result<Option<Taken>, Fault> {
        if self.used == self.used_seen {
            self.look()?;
            if self.used == self.used_seen {
                return Ok(None);
            }
            if self.asking {
                self.asking = false;
                self.memory.set_calls(false)?;
            }
        }
        let entry = self.memory.used_entry(self.used)?;
        let id = u16::try_from(entry.id)
            .ok()
            .filter(|&id| id < self.shape.size)
            .ok_or(Fault::Id { id: entry.id, size: self.shape.size })?;
        let record = *self.record(id)?;
        if record.holder != Holder::Device {
            return Err(Fault::NotOutstanding { id });
        }
        let room = match self.direction {
            Direction::ToDevice => 0,
            Direction::FromDevice => u32::from(record.count).saturating_mul(self.shape.buffer),
        };
        if entry.length > room {
            return Err(Fault::Length { id, length: entry.length, room });
        }
        self.record_mut(id)?.holder = Holder::Driver;
        self.used = self.used.wrapping_add(1);
        self.outstanding -= 1;
        Ok(Some(Taken { head: id, length: entry.length }))
    }

    /// Looks how far the device is.
    fn look(&mut self) -> Result<(), Fault> {
        let index = self.memory.used_index()?;
        if index.wrapping_sub(self.used) > self.outstanding {
            return Err(Fault::Index { from: self.used, to: index, outstanding: self.outstanding });
        }
        self.used_seen = index;
        Ok(())
    }

    /// Copies the bytes that the device wrote to a chain, from `offset` on, as many as `bytes` has room for. Returns how
    /// many those are.
    ///
    /// # Errors
    /// [`Fault::OutsideMemory`].
    pub fn read(&self, taken: &Taken, offset: usize, bytes: &mut [u8]) -> Result<usize, Fault> {
        let buffer = self.shape.buffer as usize;
        let length = (taken.length as usize).saturating_sub(offset).min(bytes.len());
        let (mut id, mut offset) = (taken.head, offset);
        let mut rest = &mut bytes[..length];
        while !rest.is_empty() {
            if offset >= buffer {
                (id, offset) = (self.record(id)?.next, offset - buffer);
                continue;
            }
            let now = rest.len().min(buffer - offset);
            let (part, later) = rest.split_at_mut(now);
            self.memory.read_buffer(id, offset, part)?;
            offset += now;
            rest = later;
        }
        Ok(length)
    }

    /// Makes a chain's descriptors free.
    ///
    /// # Errors
    /// [`Fault::OutsideMemory`].
    pub fn release(&mut self, taken: Taken) -> Result<(), Fault> {
        let count = {
            let record = self.record_mut(taken.head)?;
            record.holder = Holder::Nobody;
            record.count
        };
        let mut id = taken.head;
        for _ in 0..count {
            self.free.push(id);
            id = self.record(id)?.next;
        }
        Ok(())
    }

    /// Asks the device for a notification when it has used `after` chains more, counted from the last one taken.
    /// Returns whether it has already: then none may come.
    ///
    /// # Errors
    /// What the device did wrong.
    pub fn ask(&mut self, after: u16) -> Result<bool, Fault> {
        let after = after.clamp(1, self.outstanding.max(1));
        if self.event_index {
            // It is the entry after which the device notifies.
            self.memory.set_used_event(self.used.wrapping_add(after - 1))?;
        } else if !self.asking {
            self.asking = true;
            self.memory.set_calls(true)?;
        }
        // The wish first, then the index: the device writes them the other way round.
        fence(Ordering::SeqCst);
        self.look()?;
        Ok(self.used_seen.wrapping_sub(self.used) >= after)
    }

    fn record(&self, id: u16) -> Result<&Record, Fault> {
        self.records.get(usize::from(id)).ok_or(Fault::OutsideMemory)
    }

    fn record_mut(&mut self, id: u16) -> Result<&mut Record, Fault> {
        self.records.get_mut(usize::from(id)).ok_or(Fault::OutsideMemory)
    }
}

/// Whether an index that went from `before` to `now` came past `event` (2.7.10.1).
fn passed(event: u16, before: u16, now: u16) -> bool {
    now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(before)
}

//! One virtqueue, from the device's side: chains taken, used elements published, notifications both ways.
//!
//! `virtio-queue` keeps the available ring. The used ring is written here, for a frame in several buffers has to
//! become visible as a whole (virtio 1.2, 5.1.6.4.2), and that crate publishes one element at a time.
//!
//! A descriptor is read once. What the driver changes afterwards harms nobody, and every access is checked to lie in its
//! memory; buffers are only ever copied.

use std::fmt;
use std::fs::File;
use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use rustix::event::epoll;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

/// Bytes of a descriptor (virtio 1.2, 2.7.5).
const DESCRIPTOR: u64 = 16;
/// Most descriptors of a chain, and of an indirect table: what a longest frame in small pieces may need. Linux uses about
/// twenty. A ring may be larger, but then its chains take up the engine's time.
pub(super) const MOST_DESCRIPTORS: u64 = 1024;
/// The available ring's flag against interrupts (virtio 1.2, 2.7.6).
const NO_INTERRUPT: u16 = 1;

/// What a driver did that it must not.
#[derive(Debug)]
pub(super) enum RingError {
    /// `virtio-queue` found it.
    Ring(virtio_queue::Error),
    /// Memory that is not there.
    Memory(vm_memory::GuestMemoryError),
    /// The available ring's index went back.
    Back,
    /// An index beyond the descriptor table's end.
    Index(u64),
    /// A chain of more descriptors than are taken, and perhaps without end.
    Long,
    /// An indirect table where none may be, or of a length that it cannot have.
    Indirect,
    /// A buffer of the wrong direction.
    Direction,
    /// A buffer that is not in memory.
    Buffer(u64, u32),
}

impl fmt::Display for RingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ring(error) => write!(f, "{error}"),
            Self::Memory(error) => write!(f, "{error}"),
            Self::Back => f.write_str("the available index went back"),
            Self::Index(index) => write!(f, "there is no descriptor {index}"),
            Self::Long => write!(f, "a chain has more than {MOST_DESCRIPTORS} descriptors, or no end"),
            Self::Indirect => f.write_str("an indirect table is where none may be, or of no possible length"),
            Self::Direction => f.write_str("a buffer is for the other direction"),
            Self::Buffer(address, length) => write!(f, "{length} bytes at {address:#x} are not in memory"),
        }
    }
}

impl From<virtio_queue::Error> for RingError {
    fn from(error: virtio_queue::Error) -> Self {
        Self::Ring(error)
    }
}

impl From<vm_memory::GuestMemoryError> for RingError {
    fn from(error: vm_memory::GuestMemoryError) -> Self {
        Self::Memory(error)
    }
}

/// Who may read or write a buffer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Direction {
    FromDriver,
    ToDriver,
}

/// A contiguous part of a chain's buffers, found to be in memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment {
    pub(super) address: GuestAddress,
    pub(super) length: usize,
}

/// Where the rings are, as the front end's own process knows it.
#[derive(Clone, Copy, Debug)]
pub(super) struct UserAddresses {
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

/// What a chain's buffers come to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Extent {
    /// Bytes in all of them.
    pub(super) bytes: usize,
    /// Descriptors that were read, one that refers to a table and empty ones included.
    pub(super) descriptors: usize,
}

/// A virtqueue: see the module.
pub(super) struct Ring {
    pub(super) queue: Queue,
    pub(super) addresses: Option<UserAddresses>,
    pub(super) kick: Option<File>,
    pub(super) call: Option<File>,
    /// The front end wants it to run.
    pub(super) enabled: bool,
    /// The addresses are in the present memory.
    pub(super) placed: bool,
    pub(super) broken: bool,
    pub(super) indirect: bool,
    /// The used index when the driver was last notified.
    called: Wrapping<u16>,
    /// [`Self::sleep`] promised a chain.
    promised: bool,
}

impl Ring {
    /// Most entries of a ring: what virtio allows.
    const MOST: u16 = 1 << 15;

    pub(super) fn new() -> Result<Self, virtio_queue::Error> {
        Ok(Self {
            queue: Queue::new(Self::MOST)?,
            addresses: None,
            kick: None,
            call: None,
            enabled: false,
            placed: false,
            broken: false,
            indirect: false,
            called: Wrapping(0),
            promised: false,
        })
    }

    /// Whether chains may be taken.
    pub(super) fn runs(&self) -> bool {
        self.enabled && self.placed && !self.broken && self.kick.is_some()
    }

    /// The addresses were found in memory: goes on where the rings are.
    pub(super) fn place(
        &mut self,
        memory: &GuestMemoryMmap,
        descriptors: GuestAddress,
        available: GuestAddress,
        used: GuestAddress,
    ) -> Result<(), RingError> {
        self.queue.try_set_desc_table_address(descriptors)?;
        self.queue.try_set_avail_ring_address(available)?;
        self.queue.try_set_used_ring_address(used)?;
        self.queue.set_ready(true);
        self.placed = self.queue.is_valid(memory);
        if !self.placed {
            return Err(RingError::Buffer(descriptors.raw_value(), self.queue.size().into()));
        }
        let used = self.queue.used_idx(memory, Ordering::Acquire)?;
        self.queue.set_next_used(used.0);
        self.called = used;
        Ok(())
    }

    /// The next chain's head.
    pub(super) fn take(&mut self, memory: &GuestMemoryMmap) -> Result<Option<u16>, RingError> {
        let head = self.queue.iter(memory)?.next().map(|chain| chain.head_index());
        if head.is_none() && self.promised {
            // The index only ever grows. One that goes back could make the device look for ever.
            return Err(RingError::Back);
        }
        self.promised = false;
        Ok(head)
    }

    /// The buffers of the chain that begins at `head`, all of one direction, added to `segments`.
    pub(super) fn walk(
        &self,
        memory: &GuestMemoryMmap,
        head: u16,
        direction: Direction,
        segments: &mut Vec<Segment>,
    ) -> Result<Extent, RingError> {
        let mut table = self.queue.desc_table();
        let mut size = u64::from(self.queue.size());
        let mut index = u64::from(head);
        let mut left = size.min(MOST_DESCRIPTORS);
        let mut is_indirect = false;
        let mut extent = Extent { bytes: 0, descriptors: 0 };
        loop {
            if index >= size {
                return Err(RingError::Index(index));
            }
            left = left.checked_sub(1).ok_or(RingError::Long)?;
            extent.descriptors += 1;
            let address = table.checked_add(index * DESCRIPTOR).ok_or(RingError::Index(index))?;
            let descriptor: Descriptor = memory.read_obj(GuestAddress(address))?;
            let (address, length) = (descriptor.addr(), descriptor.len());
            if descriptor.refers_to_indirect_table() {
                let entries = u64::from(length) / DESCRIPTOR;
                let fits = u64::from(length) % DESCRIPTOR == 0 && (1..=MOST_DESCRIPTORS).contains(&entries);
                if is_indirect || !self.indirect || descriptor.has_next() || !fits {
                    return Err(RingError::Indirect);
                }
                (table, size, left, index, is_indirect) = (address.raw_value(), entries, entries, 0, true);
                continue;
            }
            if descriptor.is_write_only() != (direction == Direction::ToDriver) {
                return Err(RingError::Direction);
            }
            if length > 0 {
                let bad = RingError::Buffer(address.raw_value(), length);
                match usize::try_from(length) {
                    Ok(length) if memory.check_range(address, length) => {
                        segments.push(Segment { address, length });
                        extent.bytes = extent.bytes.saturating_add(length);
                    }
                    _ => return Err(bad),
                }
            }
            if !descriptor.has_next() {
                return Ok(extent);
            }
            index = descriptor.next().into();
        }
    }

    /// Gives chains back, all at once: their heads, and how many bytes were written to each.
    pub(super) fn publish(&mut self, memory: &GuestMemoryMmap, used: &[(u16, u32)]) -> Result<(), RingError> {
        let ring = GuestAddress(self.queue.used_ring());
        let mut next = Wrapping(self.queue.next_used());
        for &(head, length) in used {
            let slot = u64::from(next.0 % self.queue.size());
            let element = (u64::from(length) << 32 | u64::from(head)).to_le_bytes();
            memory.write_slice(&element, ring.unchecked_add(4 + slot * 8))?;
            next += 1;
        }
        memory.store(next.0.to_le(), ring.unchecked_add(2), Ordering::Release)?;
        self.queue.set_next_used(next.0);
        Ok(())
    }

    /// Notifies the driver of what was given back since the last time, if it wants to know.
    pub(super) fn call(&mut self, memory: &GuestMemoryMmap) -> Result<(), RingError> {
        let now = Wrapping(self.queue.next_used());
        if now == self.called {
            return Ok(());
        }
        // What was published has to be visible before the driver's wish is looked at: it looks at the two in the other
        // order (virtio 1.2, 2.7.7.2).
        fence(Ordering::SeqCst);
        let available = GuestAddress(self.queue.avail_ring());
        let wanted = if self.queue.event_idx_enabled() {
            let at = 4 + 2 * u64::from(self.queue.size());
            let event: u16 = memory.load(available.unchecked_add(at), Ordering::Relaxed)?;
            now - Wrapping(u16::from_le(event)) - Wrapping(1) < now - self.called
        } else {
            let flags: u16 = memory.load(available, Ordering::Relaxed)?;
            u16::from_le(flags) & NO_INTERRUPT == 0
        };
        self.called = now;
        if wanted && let Some(call) = &self.call {
            // It can only fail when the counter is full, and then the driver has been told.
            let _ = rustix::io::write(call, &1u64.to_ne_bytes());
        }
        Ok(())
    }

    /// Has the driver kick for the next chain. Whether there is one meanwhile: then take it.
    pub(super) fn sleep(&mut self, memory: &GuestMemoryMmap) -> Result<bool, RingError> {
        self.promised = self.queue.enable_notification(memory)?;
        Ok(self.promised)
    }

    /// Stops it. Who watched for kicks does not any more.
    pub(super) fn stop(&mut self, epoll: &impl std::os::fd::AsFd) {
        if let Some(kick) = self.kick.take() {
            // Closing it is not enough: the front end has it open too.
            let _ = epoll::delete(epoll, &kick);
        }
        self.call = None;
        self.broken = false;
        self.promised = false;
    }
}

//! One running virtqueue, and the descriptor chains taken from it.
//!
//! # Theory of operation
//!
//! [`Virtq`] puts three things together: the ring arithmetic of `virtio-queue`, the eventfd that the transport
//! signals when the driver notifies the queue, and the interrupt back. A worker loops over
//! [`pop`](Virtq::pop), [`push`](Virtq::push), [`signal`](Virtq::signal), and, when nothing is left,
//! [`wait_for_kick`](Virtq::wait_for_kick) before it sleeps on the eventfd.
//!
//! A chain is walked once, when it is popped (virtio 1.2, section 2.7), into two lists of segments: what the
//! device may read and what it may write. The walk is bounded by the number of descriptors, and each segment is
//! checked to lie in guest memory. A chain that breaks the rules, or rings outside memory, break the whole
//! queue: the device shows DEVICE_NEEDS_RESET and the queue gives nothing more. A driver that does this has
//! lost track of its own ring, so guessing on would only corrupt its data.
//!
//! The guest may change a descriptor after the walk; that does no harm, since nothing reads it twice. Access to
//! the buffers themselves goes through vm-memory's volatile slices, which mark the dirty bitmap.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::bitmap::{BitmapSlice, MS};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, VolatileSlice};

use crate::device::{GuestMem, Reach};
use crate::event::Event;
use crate::interrupt::Interrupts;

/// Bytes of a descriptor (virtio 1.2, section 2.7.5).
const DESCRIPTOR_SIZE: u32 = 16;
/// Most descriptors in one indirect table. The largest request of stock drivers has about 1030.
const MAX_INDIRECT: u32 = 4096;

/// A queue or a chain that the driver set up against the rules.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The available ring claims more entries than the queue has, or lies outside memory.
    #[error("queue {queue}: the rings are unusable: {reason}")]
    Ring {
        /// Number of the queue.
        queue: u16,
        /// What `virtio-queue` says of it.
        reason: virtio_queue::Error,
    },
    /// A descriptor chain is malformed.
    #[error("queue {queue}: descriptor chain at {head}: {reason}")]
    Chain {
        /// Number of the queue.
        queue: u16,
        /// Index of the chain's first descriptor.
        head: u16,
        /// What is wrong with it.
        reason: ChainError,
    },
}

/// What is wrong with a descriptor chain.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ChainError {
    /// A descriptor index at or past the table's size.
    #[error("index {index} in a table of {size}")]
    Index {
        /// The index.
        index: u32,
        /// Entries in the table.
        size: u32,
    },
    /// The descriptor table lies outside guest memory.
    #[error("no memory for the descriptor at {address:#x}")]
    Table {
        /// Guest-physical address of the descriptor.
        address: u64,
    },
    /// More descriptors than the table has: the chain loops.
    #[error("more than {size} descriptors, so it loops")]
    Loop {
        /// Entries in the table.
        size: u32,
    },
    /// More descriptors than the device has a use for.
    #[error(
        "more than {most} descriptors, which no driver may chain for this device (virtio 1.2, 2.7.5.3.1)"
    )]
    Long {
        /// How many may be.
        most: u32,
    },
    /// An indirect descriptor without the feature, inside an indirect table, or with a next one.
    #[error("indirect descriptor where none may be")]
    Indirect,
    /// The length of an indirect table is zero, no multiple of 16, or over the limit.
    #[error("indirect table of {len} bytes")]
    IndirectLength {
        /// Its length in bytes.
        len: u32,
    },
    /// A device-readable buffer follows a device-writable one.
    #[error("readable buffer after a writable one")]
    Order,
    /// A buffer is not in guest memory.
    #[error("buffer at {address:#x} of {len:#x} bytes is not in memory")]
    Buffer {
        /// Guest-physical address.
        address: u64,
        /// Length in bytes.
        len: u32,
    },
    /// The chain describes 2^32 bytes or more.
    #[error("4 GiB or more in one chain")]
    Size,
}

/// A contiguous part of a chain's buffers, checked to be in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment {
    address: GuestAddress,
    len: u32,
}

/// The buffers of a chain in one direction, as one run of bytes.
#[derive(Debug, Clone, Default)]
pub struct Buffers {
    segments: Vec<Segment>,
    len: u32,
}

impl Buffers {
    /// Total length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        usize::try_from(self.len).unwrap_or(usize::MAX)
    }

    /// There are no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The memory of bytes `offset..offset + len`, or as much of it as there is.
    pub fn slices<'m, G: GuestMemory>(
        &self,
        mem: &'m G,
        offset: usize,
        len: usize,
    ) -> Vec<VolatileSlice<'m, MS<'m, G>>> {
        let mut slices = Vec::new();
        let mut skip = offset;
        let mut left = len;
        for segment in &self.segments {
            let segment_len = usize::try_from(segment.len).unwrap_or(usize::MAX);
            if skip >= segment_len {
                skip -= segment_len;
                continue;
            }
            if left == 0 {
                break;
            }
            let take = (segment_len - skip).min(left);
            let Some(start) = segment.address.checked_add(skip as u64) else { break };
            for slice in mem.get_slices(start, take) {
                // The walk checked the range; memory does not shrink under a running device.
                let Ok(slice) = slice else { return slices };
                slices.push(slice);
            }
            skip = 0;
            left -= take;
        }
        slices
    }

    /// Copies bytes from `offset` on out of guest memory; returns how many there were.
    pub fn read<G: GuestMemory>(&self, mem: &G, offset: usize, data: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in self.slices(mem, offset, data.len()) {
            let Some(rest) = data.get_mut(done..) else { break };
            done += slice.copy_to(rest);
        }
        done
    }

    /// Copies bytes to `offset` on into guest memory; returns how many found room.
    pub fn write<G: GuestMemory>(&self, mem: &G, offset: usize, data: &[u8]) -> usize {
        let mut done = 0;
        for slice in self.slices(mem, offset, data.len()) {
            let part = data.get(done..).unwrap_or(&[]);
            let part = part.get(..slice.len()).unwrap_or(part);
            slice.copy_from(part);
            done += part.len();
        }
        done
    }
}

/// Marks the first `len` bytes of slices as written, after a system call wrote them.
pub(crate) fn mark_dirty<B: BitmapSlice>(slices: &[VolatileSlice<'_, B>], len: usize) {
    let mut left = len;
    for slice in slices {
        let part = left.min(slice.len());
        slice.bitmap().mark_dirty(0, part);
        left -= part;
    }
}

/// One buffer that the driver made available.
#[derive(Debug)]
pub struct Chain<M: GuestMem> {
    head: u16,
    /// What the driver wrote for the device.
    pub readable: Buffers,
    /// Where the device writes its answer.
    pub writable: Buffers,
    raw: Option<DescriptorChain<M::T>>,
}

impl<M: GuestMem> Chain<M> {
    /// The same chain for libraries that walk it themselves. Only a chain that is answered at once ([`Virtq::serve`])
    /// has it, because it keeps hold of memory.
    #[must_use]
    pub fn raw(&self) -> Option<DescriptorChain<M::T>> {
        self.raw.clone()
    }
}

/// A queue in use.
#[derive(Debug)]
pub struct Virtq<M: GuestMem> {
    index: u16,
    queue: Queue,
    mem: M,
    kick: Arc<Event>,
    interrupts: Arc<Interrupts>,
    indirect: bool,
    /// How many descriptors a chain may have.
    longest: u32,
    broken: bool,
    /// [`wait_for_kick`](Self::wait_for_kick) saw a chain that was not popped yet.
    promised: bool,
    /// How many entries were pushed since the last [`signal`](Self::signal).
    unsignalled: u32,
}

impl<M: GuestMem> Virtq<M> {
    pub(crate) fn new(
        index: u16,
        queue: Queue,
        mem: M,
        kick: Arc<Event>,
        interrupts: Arc<Interrupts>,
        indirect: bool,
    ) -> Self {
        Virtq {
            index,
            queue,
            mem,
            kick,
            interrupts,
            indirect,
            longest: u32::MAX,
            broken: false,
            promised: false,
            unsignalled: 0,
        }
    }

    /// Number of the queue.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.index
    }

    /// How many chains it holds at most.
    #[must_use]
    pub fn size(&self) -> usize {
        self.queue.size().into()
    }

    /// Lets a chain have `most` descriptors at most, those of an indirect table included. "A driver MUST NOT create a
    /// descriptor chain longer than the Queue Size of the device" (virtio 1.2, 2.7.5.3.1); but Linux does with indirect
    /// tables, where a request asks for it. So a device says it whose requests are never so long.
    pub fn limit_chains(&mut self, most: u16) {
        self.longest = most.into();
    }

    /// Signalled when the driver made buffers available; non-blocking.
    #[must_use]
    pub fn kick(&self) -> &Event {
        &self.kick
    }

    /// Takes the next available chain. `None` when there is none, the queue is broken, or the function may not
    /// access memory (bus master off; the queue is kicked when that changes).
    pub fn pop(&mut self) -> Option<Chain<M>> {
        self.pop_raw().map(|chain| Chain { raw: None, ..chain })
    }

    fn pop_raw(&mut self) -> Option<Chain<M>> {
        if self.broken || !self.interrupts.bus_master() {
            return None;
        }
        let mem = self.mem.memory();
        let raw = match self.queue.iter(mem.clone()).map(|mut available| available.next()) {
            Ok(Some(raw)) => raw,
            Ok(None) => {
                // The index only ever grows. One that goes back could make a worker look for ever.
                if self.promised {
                    let reason = virtio_queue::Error::InvalidAvailRingIndex;
                    self.break_by(&QueueError::Ring { queue: self.index, reason });
                }
                return None;
            }
            Err(reason) => {
                self.break_by(&QueueError::Ring { queue: self.index, reason });
                return None;
            }
        };
        self.promised = false;
        let head = raw.head_index();
        let table = Table { address: GuestAddress(self.queue.desc_table()), size: self.queue.size().into() };
        match walk(&*mem, table, head, self.indirect, self.longest) {
            Ok((readable, writable)) => Some(Chain { head, readable, writable, raw: Some(raw) }),
            Err(reason) => {
                self.break_by(&QueueError::Chain { queue: self.index, head, reason });
                None
            }
        }
    }

    /// Gives a chain back to the driver with `written` bytes of its writable part filled.
    pub fn push(&mut self, chain: &Chain<M>, written: usize) {
        self.push_all(&[(chain, written)]);
    }

    /// Gives chains back as [`Self::push`] does one. The driver finds all of them in the ring, or none yet.
    pub fn push_all(&mut self, chains: &[(&Chain<M>, usize)]) {
        if self.broken {
            return;
        }
        match self.try_push(chains) {
            Ok(()) => {
                let count = u32::try_from(chains.len()).unwrap_or(u32::MAX);
                self.unsignalled = self.unsignalled.saturating_add(count);
            }
            Err(reason) => self.break_by(&QueueError::Ring { queue: self.index, reason }),
        }
    }

    fn try_push(&mut self, chains: &[(&Chain<M>, usize)]) -> Result<(), virtio_queue::Error> {
        let Some(((last, written), others)) = chains.split_last() else { return Ok(()) };
        let len = |written: usize| u32::try_from(written).unwrap_or(u32::MAX);
        let mem = self.mem.memory();
        let mut next = self.queue.next_used();
        for (chain, written) in others {
            // A ring's header, then an element of index and length for each entry (virtio 1.2, section 2.7.8).
            let slot = 4 + 8 * u64::from(next % self.queue.size());
            let element = u64::from(chain.head) | u64::from(len(*written)) << 32;
            let address = GuestAddress(self.queue.used_ring())
                .checked_add(slot)
                .ok_or(virtio_queue::Error::AddressOverflow)?;
            mem.write_obj(element.to_le(), address).map_err(virtio_queue::Error::GuestMemory)?;
            next = next.wrapping_add(1);
        }
        // The last one takes the ring's index past all of them.
        self.queue.set_next_used(next);
        self.queue.add_used(&*mem, last.head, len(*written))
    }

    /// Interrupts the driver if chains were given back since the last call and it wants to know of them.
    pub fn signal(&mut self) {
        let pushed = std::mem::take(&mut self.unsignalled);
        if self.broken || pushed == 0 {
            return;
        }
        match self.is_wanted(pushed) {
            Ok(true) => self.interrupts.queue_used(self.index),
            Ok(false) => {}
            Err(reason) => self.break_by(&QueueError::Ring { queue: self.index, reason }),
        }
    }

    /// Whether the last `pushed` entries passed the one at which the driver wants an interrupt (virtio 1.2, section
    /// 2.7.7). `virtio-queue` has the same question, but counts pushes by itself.
    fn is_wanted(&self, pushed: u32) -> Result<bool, virtio_queue::Error> {
        if !self.queue.event_idx_enabled() {
            return Ok(true);
        }
        // The entries must be there before the driver's wish is looked at: it writes, then looks for entries.
        fence(Ordering::SeqCst);
        let address = GuestAddress(self.queue.avail_ring())
            .checked_add(4 + 2 * u64::from(self.queue.size()))
            .ok_or(virtio_queue::Error::AddressOverflow)?;
        let mem = self.mem.memory();
        let event =
            u16::from_le(mem.load(address, Ordering::Relaxed).map_err(virtio_queue::Error::GuestMemory)?);
        let past = self.queue.next_used().wrapping_sub(event).wrapping_sub(1);
        Ok(u32::from(past) < pushed)
    }

    /// Asks the driver to signal the eventfd for the next available chain. `false`: chains came meanwhile, go
    /// on popping.
    #[must_use]
    pub fn wait_for_kick(&mut self) -> bool {
        if self.broken || !self.interrupts.bus_master() {
            return true;
        }
        let mem = self.mem.memory();
        match self.queue.enable_notification(&*mem) {
            Ok(more) => {
                self.promised = more;
                !more
            }
            Err(reason) => {
                self.break_by(&QueueError::Ring { queue: self.index, reason });
                true
            }
        }
    }

    /// Clears the eventfd.
    pub fn clear_kick(&self) {
        self.kick.clear();
    }

    /// Calls `handle` with each available chain, gives it back with the length returned, and interrupts the
    /// driver, until none is left or `stop` says so. For queues where each chain is a request answered at once.
    pub fn serve(&mut self, stop: &dyn Fn() -> bool, mut handle: impl FnMut(&Chain<M>) -> usize) {
        self.clear_kick();
        loop {
            while let Some(chain) = self.pop_raw() {
                let written = handle(&chain);
                self.push(&chain, written);
                self.signal();
                if stop() {
                    return;
                }
            }
            if self.wait_for_kick() {
                return;
            }
        }
    }

    /// Stops the queue for good and shows the driver that the device must be reset.
    pub fn break_by(&mut self, error: &QueueError) {
        self.broken = true;
        self.interrupts.needs_reset(error);
    }
}

#[derive(Debug, Clone, Copy)]
struct Table {
    address: GuestAddress,
    size: u32,
}

/// Walks a chain of `longest` descriptors at most: what the device reads and what it writes.
fn walk<G: Reach>(
    mem: &G,
    mut table: Table,
    head: u16,
    indirect_allowed: bool,
    longest: u32,
) -> Result<(Buffers, Buffers), ChainError> {
    let mut readable = Buffers::default();
    let mut writable = Buffers::default();
    let mut index = u32::from(head);
    let mut in_indirect = false;
    let mut walked = 0;
    let mut left = longest;
    loop {
        if index >= table.size {
            return Err(ChainError::Index { index, size: table.size });
        }
        if walked == table.size {
            return Err(ChainError::Loop { size: table.size });
        }
        walked += 1;
        left = left.checked_sub(1).ok_or(ChainError::Long { most: longest })?;
        let address = u64::from(index) * u64::from(DESCRIPTOR_SIZE);
        let descriptor: Descriptor = table
            .address
            .checked_add(address)
            .and_then(|address| mem.read_obj(address).ok())
            .ok_or(ChainError::Table { address: table.address.raw_value().wrapping_add(address) })?;
        let len = descriptor.len();

        if descriptor.refers_to_indirect_table() {
            if in_indirect || !indirect_allowed || descriptor.has_next() {
                return Err(ChainError::Indirect);
            }
            let size = len / DESCRIPTOR_SIZE;
            if !len.is_multiple_of(DESCRIPTOR_SIZE) || size == 0 || size > MAX_INDIRECT {
                return Err(ChainError::IndirectLength { len });
            }
            in_indirect = true;
            table = Table { address: descriptor.addr(), size };
            index = 0;
            walked = 0;
            continue;
        }

        let buffers = match (descriptor.is_write_only(), writable.segments.is_empty()) {
            (true, _) => &mut writable,
            (false, true) => &mut readable,
            (false, false) => return Err(ChainError::Order),
        };
        buffers.len = buffers.len.checked_add(len).ok_or(ChainError::Size)?;
        let address = descriptor.addr();
        if len > 0 {
            let in_reach = usize::try_from(len).is_ok_and(|len| match descriptor.is_write_only() {
                true => mem.may_write(address, len),
                false => mem.may_read(address, len),
            });
            if !in_reach || address.checked_add(len.into()).is_none() {
                return Err(ChainError::Buffer { address: address.raw_value(), len });
            }
            buffers.segments.push(Segment { address, len });
        }

        if !descriptor.has_next() {
            return Ok((readable, writable));
        }
        index = descriptor.next().into();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
    use vm_memory::GuestMemoryMmap;

    const NEXT: u16 = VRING_DESC_F_NEXT as u16;
    const WRITE: u16 = VRING_DESC_F_WRITE as u16;
    const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;
    const TABLE: Table = Table { address: GuestAddress(0x1000), size: 8 };

    /// Two regions that touch at 1 MiB, so that a buffer can cross.
    fn memory() -> GuestMemoryMmap<()> {
        let mib = 1 << 20;
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), mib), (GuestAddress(mib as u64), mib)]).unwrap()
    }

    fn put(mem: &GuestMemoryMmap<()>, table: u64, descriptors: &[(u64, u32, u16, u16)]) {
        for (i, (address, len, flags, next)) in descriptors.iter().enumerate() {
            let descriptor = Descriptor::new(*address, *len, *flags, *next);
            mem.write_obj(descriptor, GuestAddress(table + 16 * i as u64)).unwrap();
        }
    }

    fn walk_direct(descriptors: &[(u64, u32, u16, u16)]) -> Result<(usize, usize), ChainError> {
        let mem = memory();
        put(&mem, 0x1000, descriptors);
        walk(&mem, TABLE, 0, true, u32::MAX).map(|(r, w)| (r.len(), w.len()))
    }

    #[test]
    fn good_chains() {
        assert_eq!(walk_direct(&[(0x8000, 10, 0, 0)]), Ok((10, 0)));
        assert_eq!(walk_direct(&[(0x8000, 10, NEXT, 2), (0, 0, 0, 0), (0x9000, 20, WRITE, 0)]), Ok((10, 20)));
        // Zero-length buffers are allowed anywhere and carry nothing.
        assert_eq!(walk_direct(&[(u64::MAX, 0, NEXT, 1), (0x9000, 1, WRITE, 0)]), Ok((0, 1)));
    }

    #[test]
    fn bad_chains() {
        assert_eq!(walk_direct(&[(0x8000, 1, NEXT, 0)]), Err(ChainError::Loop { size: 8 }));
        assert_eq!(walk_direct(&[(0x8000, 1, NEXT, 8)]), Err(ChainError::Index { index: 8, size: 8 }));
        assert_eq!(walk_direct(&[(0x8000, 1, NEXT | WRITE, 1), (0x8000, 1, 0, 0)]), Err(ChainError::Order));
        assert_eq!(
            walk_direct(&[(0x1f_ffff, 2, 0, 0)]),
            Err(ChainError::Buffer { address: 0x1f_ffff, len: 2 })
        );
        assert_eq!(
            walk_direct(&[(u64::MAX - 1, 8, 0, 0)]),
            Err(ChainError::Buffer { address: u64::MAX - 1, len: 8 })
        );
        assert!(matches!(
            walk_direct(&[(0, 0x10_0000, NEXT, 1), (0, u32::MAX, 0, 0)]),
            Err(ChainError::Size)
        ));
    }

    #[test]
    fn indirect_tables() {
        let mem = memory();
        put(&mem, 0x1000, &[(0x8000, 1, NEXT, 1), (0x4000, 32, INDIRECT, 0)]);
        put(&mem, 0x4000, &[(0x9000, 2, NEXT, 1), (0xa000, 3, WRITE, 0)]);
        let lens = |allowed| walk(&mem, TABLE, 0, allowed, u32::MAX).map(|(r, w)| (r.len(), w.len()));
        assert_eq!(lens(true), Ok((3, 3)));
        assert_eq!(lens(false), Err(ChainError::Indirect));
        put(&mem, 0x4000, &[(0x9000, 2, NEXT, 1), (0x4000, 32, INDIRECT, 0)]);
        assert_eq!(lens(true), Err(ChainError::Indirect));
        put(&mem, 0x4000, &[(0x9000, 2, NEXT, 1), (0xa000, 3, NEXT, 0)]);
        assert_eq!(lens(true), Err(ChainError::Loop { size: 2 }));
        for len in [0, 8, 33, 16 * 4097] {
            put(&mem, 0x1000, &[(0x4000, len, INDIRECT, 0)]);
            assert_eq!(lens(true), Err(ChainError::IndirectLength { len }));
        }
        put(&mem, 0x1000, &[(0x4000, 16, INDIRECT | NEXT, 1)]);
        assert_eq!(lens(true), Err(ChainError::Indirect));
        put(&mem, 0x1000, &[(0x20_0000, 16, INDIRECT, 0)]);
        assert_eq!(lens(true), Err(ChainError::Table { address: 0x20_0000 }));
    }

    #[test]
    fn chains_may_be_limited() {
        let mem = memory();
        put(&mem, 0x1000, &[(0x8000, 1, NEXT, 1), (0x4000, 48, INDIRECT, 0)]);
        // Empty buffers are descriptors too.
        put(&mem, 0x4000, &[(0, 0, NEXT, 1), (0, 0, NEXT, 2), (0x9000, 2, 0, 0)]);
        let len = |longest| walk(&mem, TABLE, 0, true, longest).map(|(readable, _)| readable.len());
        assert_eq!(len(5), Ok(3));
        assert_eq!(len(4), Err(ChainError::Long { most: 4 }));
        // A table that is longer than what is used of it does no harm.
        put(&mem, 0x1000, &[(0x4000, 16 * 4096, INDIRECT, 0)]);
        assert_eq!(len(4), Ok(2));
    }

    #[test]
    fn buffers_cross_regions_and_segments() {
        let mem = memory();
        put(&mem, 0x1000, &[(0xf_fffe, 4, NEXT | WRITE, 1), (0x9000, 4, WRITE, 0)]);
        let (_, writable) = walk(&mem, TABLE, 0, true, u32::MAX).unwrap();
        assert_eq!(writable.write(&mem, 1, b"abcdefghij"), 7);
        let mut data = [0; 10];
        assert_eq!(writable.read(&mem, 0, &mut data), 8);
        assert_eq!(&data, b"\0abcdefg\0\0");
        assert_eq!(writable.slices(&mem, 0, 8).len(), 3);
        assert_eq!(writable.read(&mem, 8, &mut data), 0);
        assert_eq!(writable.read(&mem, usize::MAX, &mut data), 0);
    }
}

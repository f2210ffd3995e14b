//! A pair of queues: frames from descriptor chains, and into them.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use usernet::tap::{Abilities, LONGEST_FRAME, Offload, Sent};
use virtio_queue::QueueT;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};

use super::features::Features;
use super::memory::Shared;
use super::ring::{Direction, Extent, Ring, RingError, Segment};
use crate::vnet;

/// The longest packet that fits into the buffers of a driver that can neither take long segments nor merge buffers.
const PLAIN_MTU: u16 = 1500;

/// Descriptors that are read for one frame to the guest at most, give or take a chain: twice what the longest one takes in
/// buffers of a header's length, which is the shortest that a driver may give (virtio 1.2, 5.1.6.3.1). For a driver
/// with shorter ones the frame is too long.
const MOST_GATHERED: usize = 2 * (LONGEST_FRAME / vnet::HEADER + 1);

/// A chain that was taken for frames to the guest, and has not been used yet.
struct Taken {
    head: u16,
    segments: Vec<Segment>,
    extent: Extent,
}

/// What a pair's owner and those who set it up share.
pub(super) struct Pair {
    pub(super) shared: Option<Arc<Shared>>,
    /// Frames to the guest.
    pub(super) to_guest: Ring,
    /// Frames from the guest.
    pub(super) from_guest: Ring,
    features: Features,
    mtu: u16,
    taken: VecDeque<Taken>,
    /// Bytes of all that was taken.
    room: usize,
    /// Its descriptors.
    gathered: usize,
    /// Lists of segments that are not in use.
    lists: Vec<Vec<Segment>>,
    /// Frames to the guest that no buffer was long enough for.
    pub(super) too_long: u64,
}

/// Which ring of a pair.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Which {
    ToGuest,
    FromGuest,
}

impl Pair {
    pub(super) fn new(mtu: u16) -> Result<Self, virtio_queue::Error> {
        Ok(Self {
            shared: None,
            to_guest: Ring::new()?,
            from_guest: Ring::new()?,
            features: Features::default(),
            mtu,
            taken: VecDeque::new(),
            room: 0,
            gathered: 0,
            lists: Vec::new(),
            too_long: 0,
        })
    }

    pub(super) fn ring(&mut self, which: Which) -> &mut Ring {
        match which {
            Which::ToGuest => &mut self.to_guest,
            Which::FromGuest => &mut self.from_guest,
        }
    }

    pub(super) fn set_features(&mut self, features: Features) {
        self.features = features;
        for ring in [&mut self.to_guest, &mut self.from_guest] {
            ring.queue.set_event_idx(features.has(Features::EVENT_IDX));
            ring.indirect = features.has(Features::INDIRECT);
        }
    }

    pub(super) fn abilities(&self) -> Abilities {
        let has = |feature| self.features.has(feature);
        let checksum = has(Features::GUEST_CSUM);
        let segmentation =
            [Features::GUEST_TSO4, Features::GUEST_TSO6].map(|feature| checksum && has(feature));
        let long = has(Features::MRG_RXBUF) || segmentation.contains(&true);
        let mtu = if long { self.mtu } else { self.mtu.min(PLAIN_MTU) };
        Abilities { checksum, segmentation, datagrams: false, mtu }
    }

    /// Stops a ring. Where the next chain is, for whoever goes on with it.
    pub(super) fn stop(&mut self, which: Which, epoll: &OwnedFd) -> u16 {
        self.rewind(which);
        self.ring(which).stop(epoll);
        self.ring(which).queue.next_avail()
    }

    /// Puts back what was taken and not used.
    pub(super) fn rewind(&mut self, which: Which) {
        if which == Which::ToGuest {
            let queue = &mut self.to_guest.queue;
            // It is the last that was taken, in order.
            let count = u16::try_from(self.taken.len()).unwrap_or(u16::MAX);
            queue.set_next_avail(queue.next_avail().wrapping_sub(count));
            self.forget_taken();
        }
    }

    fn forget_taken(&mut self) {
        self.lists.extend(self.taken.drain(..).map(|taken| taken.segments));
        (self.room, self.gathered) = (0, 0);
    }

    /// Bytes of the header before a frame.
    fn header(&self) -> usize {
        let long = self.features.has(Features::VERSION_1) || self.features.has(Features::MRG_RXBUF);
        // The count of buffers is its last field.
        if long { vnet::HEADER } else { vnet::HEADER - 2 }
    }

    /// Takes a frame from the guest.
    pub(super) fn receive(&mut self, buffer: &mut [u8]) -> Option<(usize, Offload)> {
        let shared = self.shared.clone().filter(|_| self.from_guest.runs())?;
        self.try_receive(&shared.memory, buffer).unwrap_or_else(|error| {
            break_ring(&mut self.from_guest, "from the guest", &error);
            None
        })
    }

    fn try_receive(
        &mut self,
        memory: &GuestMemoryMmap,
        buffer: &mut [u8],
    ) -> Result<Option<(usize, Offload)>, RingError> {
        let head = loop {
            match self.from_guest.take(memory)? {
                Some(head) => break head,
                None if self.from_guest.sleep(memory)? => {}
                None => return Ok(None),
            }
        };
        let mut segments = self.lists.pop().unwrap_or_default();
        segments.clear();
        let frame = self
            .from_guest
            .walk(memory, head, Direction::FromDriver, &mut segments)
            .and_then(|extent| self.read(memory, &segments, extent.bytes, buffer));
        self.lists.push(segments);
        let frame = frame?;
        self.from_guest.publish(memory, &[(head, 0)])?;
        Ok(Some(frame))
    }

    /// Copies a frame out of its buffers. One that is too short or too long is empty, which the engine counts as what it
    /// is: malformed.
    fn read(
        &self,
        memory: &GuestMemoryMmap,
        segments: &[Segment],
        bytes: usize,
        buffer: &mut [u8],
    ) -> Result<(usize, Offload), RingError> {
        let mut header = [0; vnet::HEADER];
        let nothing = Ok((0, Offload::default()));
        let Some(length) = bytes.checked_sub(self.header()) else { return nothing };
        let (Some(frame), Some(own)) = (buffer.get_mut(..length), header.get_mut(..self.header())) else {
            return nothing;
        };
        scatter(segments, own, frame, |part, address| memory.read_slice(part, address))?;
        Ok((length, vnet::decode(&header)))
    }

    /// Gives the guest a frame; one for which there never will be room is lost, as one is for which there is no guest.
    pub(super) fn send(&mut self, header: &[u8], payload: &[u8], offload: Offload) -> Sent {
        let Some(shared) = self.shared.clone().filter(|_| self.to_guest.runs()) else { return Sent::Yes };
        self.try_send(&shared.memory, header, payload, offload).unwrap_or_else(|error| {
            break_ring(&mut self.to_guest, "to the guest", &error);
            self.forget_taken();
            Sent::Yes
        })
    }

    fn try_send(
        &mut self,
        memory: &GuestMemoryMmap,
        header: &[u8],
        payload: &[u8],
        offload: Offload,
    ) -> Result<Sent, RingError> {
        let needed = self.header() + header.len() + payload.len();
        let merge = self.features.has(Features::MRG_RXBUF);
        let most = if merge { usize::from(self.to_guest.queue.size()) } else { 1 };
        while self.room < needed && self.taken.len() < most && self.gathered < MOST_GATHERED {
            let Some(head) = self.to_guest.take(memory)? else {
                if self.to_guest.sleep(memory)? {
                    continue;
                }
                return Ok(Sent::Full);
            };
            let mut segments = self.lists.pop().unwrap_or_default();
            segments.clear();
            let extent = self.to_guest.walk(memory, head, Direction::ToDriver, &mut segments)?;
            self.room = self.room.saturating_add(extent.bytes);
            self.gathered += extent.descriptors;
            self.taken.push_back(Taken { head, segments, extent });
        }
        if self.room < needed {
            self.too_long += 1;
            return Ok(Sent::Yes);
        }
        let mut first = vnet::encode(header, offload);
        let buffers = self.buffers_for(needed);
        let [.., low, high] = &mut first;
        [*low, *high] = u16::try_from(buffers).unwrap_or(u16::MAX).to_le_bytes();
        let own = first.get(..self.header()).unwrap_or_default();
        self.write(memory, [own, header, payload], buffers)?;
        Ok(Sent::Yes)
    }

    /// How many of the chains that were taken hold this many bytes.
    fn buffers_for(&self, needed: usize) -> usize {
        let mut room = 0usize;
        let enough = self.taken.iter().position(|taken| {
            room = room.saturating_add(taken.extent.bytes);
            room >= needed
        });
        enough.map_or(0, |last| last + 1)
    }

    /// Copies a frame into as many of the chains, and gives them to the driver.
    fn write(
        &mut self,
        memory: &GuestMemoryMmap,
        parts: [&[u8]; 3],
        buffers: usize,
    ) -> Result<(), RingError> {
        let mut parts = parts.into_iter();
        let mut part: &[u8] = &[];
        let mut used = Vec::with_capacity(buffers);
        for _ in 0..buffers {
            let Some(taken) = self.taken.pop_front() else { break };
            self.room -= taken.extent.bytes;
            self.gathered -= taken.extent.descriptors;
            let mut written = 0u32;
            for &Segment { mut address, mut length } in &taken.segments {
                while length > 0 {
                    if part.is_empty() {
                        match parts.next() {
                            Some(next) => part = next,
                            None => break,
                        }
                        continue;
                    }
                    let (now, rest) = part.split_at(length.min(part.len()));
                    memory.write_slice(now, address)?;
                    part = rest;
                    address = address.unchecked_add(now.len() as u64);
                    length -= now.len();
                    written = written.saturating_add(u32::try_from(now.len()).unwrap_or(u32::MAX));
                }
            }
            used.push((taken.head, written));
            self.lists.push(taken.segments);
        }
        self.to_guest.publish(memory, &used)
    }

    /// Notifies the driver of what it was given since the last time.
    pub(super) fn flush(&mut self) {
        let Some(shared) = self.shared.clone() else { return };
        for (ring, name) in [(&mut self.to_guest, "to the guest"), (&mut self.from_guest, "from the guest")] {
            if ring.runs()
                && let Err(error) = ring.call(&shared.memory)
            {
                break_ring(ring, name, &error);
            }
        }
    }
}

/// Calls `copy` with each piece of `first` and `second` that lies in one segment, and its address.
fn scatter<E>(
    segments: &[Segment],
    first: &mut [u8],
    second: &mut [u8],
    copy: impl Fn(&mut [u8], GuestAddress) -> Result<(), E>,
) -> Result<(), E> {
    let (mut part, mut next) = (first, second);
    for &Segment { mut address, mut length } in segments {
        while length > 0 {
            if part.is_empty() {
                part = std::mem::take(&mut next);
            }
            if part.is_empty() {
                return Ok(());
            }
            let (now, rest) = part.split_at_mut(length.min(part.len()));
            copy(now, address)?;
            part = rest;
            address = address.unchecked_add(now.len() as u64);
            length -= now.len();
        }
    }
    Ok(())
}

/// A driver that breaks the rules has lost track of its own ring. Until it sets the ring up anew, nothing of it is used.
fn break_ring(ring: &mut Ring, name: &str, error: &RingError) {
    ring.broken = true;
    tracing::warn!("the ring {name} is broken until the guest resets it: {error}");
}

const _: () = assert!(LONGEST_FRAME + vnet::HEADER < 1 << 32, "lengths in a used ring have 32 bits");

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryMmap;

    use super::super::ring::MOST_DESCRIPTORS;
    use super::*;

    /// A ring as large as virtio allows, and where its parts are.
    const SIZE: u16 = 1 << 15;
    const AVAILABLE: u64 = 1 << 20;
    const USED: u64 = 2 << 20;
    const MEMORY: usize = 4 << 20;
    const NEXT: u16 = 1;
    const WRITE: u16 = 2;

    /// A pair, one ring of which is all chains of `length` empty descriptors; as many as it has entries.
    fn idle_chains(which: Which, length: u16) -> Pair {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let direction = if which == Which::ToGuest { WRITE } else { 0 };
        for index in 0..length {
            let flags = direction | if index + 1 < length { NEXT } else { 0 };
            let words = [flags, index + 1].map(u16::to_le_bytes).concat();
            memory.write_slice(&words, GuestAddress(u64::from(index) * 16 + 12)).unwrap();
        }
        memory.write_obj(SIZE.to_le(), GuestAddress(AVAILABLE + 2)).unwrap();
        let mut pair = Pair::new(1500).unwrap();
        pair.set_features(Features(Features::offered(1).0));
        let ring = pair.ring(which);
        ring.queue.set_size(SIZE);
        ring.enabled = true;
        ring.kick = Some(kick());
        ring.place(&memory, GuestAddress(0), GuestAddress(AVAILABLE), GuestAddress(USED)).unwrap();
        pair.shared = Some(Arc::new(Shared::of(memory)));
        pair
    }

    /// Any file: nobody kicks.
    fn kick() -> std::fs::File {
        std::fs::File::open("/dev/null").unwrap()
    }

    #[test]
    fn chains_that_hold_nothing_are_not_gathered_for_ever() {
        let length = MOST_DESCRIPTORS as u16;
        let mut pair = idle_chains(Which::ToGuest, length);
        for lost in 1..4 {
            assert_eq!(pair.send(&[0; 54], &[0; 1000], Offload::default()), Sent::Yes);
            assert_eq!(pair.too_long, lost);
            // The second frame reads nothing more.
            assert_eq!(pair.taken.len(), MOST_GATHERED.div_ceil(length.into()));
        }
        assert!(pair.to_guest.runs(), "what was taken can still be put back");
        pair.rewind(Which::ToGuest);
        assert_eq!(pair.to_guest.queue.next_avail(), 0);
        assert_eq!(pair.send(&[0; 54], &[], Offload::default()), Sent::Yes);
        assert_eq!(pair.taken.len(), MOST_GATHERED.div_ceil(length.into()));

        let mut pair = idle_chains(Which::FromGuest, length);
        let mut buffer = [0; 100];
        assert_eq!(pair.receive(&mut buffer), Some((0, Offload::default())));
    }

    #[test]
    fn chains_that_are_longer_than_any_frame_break_the_ring() {
        for which in [Which::ToGuest, Which::FromGuest] {
            let mut pair = idle_chains(which, MOST_DESCRIPTORS as u16 + 1);
            assert_eq!(pair.send(&[0; 54], &[], Offload::default()), Sent::Yes);
            assert_eq!(pair.receive(&mut [0; 100]), None);
            assert!(pair.ring(which).broken);
        }
    }
}

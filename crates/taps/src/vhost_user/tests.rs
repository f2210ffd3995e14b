//! A driver and a front end in this process: messages by the crate `vhost`, rings by hand.

use std::num::Wrapping;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering as Order;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::features::Features;
use super::*;
use crate::vnet;

const MTU: u16 = 65520;
/// Entries of a ring.
const SIZE: u16 = 64;
/// Bytes of the memory, and where the front end claims to have it.
const MEMORY: u64 = 4 << 20;
const USER: u64 = 0x7000_0000_0000;
/// Bytes between the areas of two rings, and where a ring's parts and buffers are in its area.
const AREA: u64 = 1 << 20;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const BUFFERS: u64 = 0x10000;

/// How long a test waits before it fails.
const PATIENCE: Duration = Duration::from_secs(20);

const WRITE: u16 = 2;
const NEXT: u16 = 1;

/// A front end, and the guest's driver behind it.
struct Guest {
    frontend: Frontend,
    memory: GuestMemoryMmap,
    file: std::fs::File,
    kicks: Vec<EventFd>,
    calls: Vec<EventFd>,
    available: Vec<Wrapping<u16>>,
    used: Vec<Wrapping<u16>>,
}

/// Links and the socket of their front end.
fn links(pairs: usize) -> (Vec<QueuePair>, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (links, control) = super::links(Source::Connected(ours), pairs, MTU).unwrap();
    thread::spawn(|| control.run());
    (links, theirs)
}

/// All that is offered.
fn everything() -> u64 {
    Features::offered(2).0
}

impl Guest {
    fn new(socket: UnixStream, rings: usize, features: u64) -> Self {
        let file = std::fs::File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, MEMORY).unwrap();
        let range = (GuestAddress(0), MEMORY as usize, Some(FileOffset::new(file.try_clone().unwrap(), 0)));
        let memory = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();
        let mut frontend = Frontend::from_stream(socket, rings as u64);
        frontend.set_owner().unwrap();
        let offered = frontend.get_features().unwrap();
        assert_eq!(features & !offered & !Features::offered(2).0, 0);
        let protocol = frontend.get_protocol_features().unwrap();
        assert!(protocol.contains(VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK));
        frontend.set_protocol_features(protocol).unwrap();
        frontend.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
        frontend.set_features(features & offered).unwrap();
        let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let mut guest = Self {
            frontend,
            memory,
            file,
            kicks: (0..rings).map(|_| event()).collect(),
            calls: (0..rings).map(|_| event()).collect(),
            available: vec![Wrapping(0); rings],
            used: vec![Wrapping(0); rings],
        };
        guest.share();
        (0..rings).for_each(|ring| guest.start(ring, 0));
        guest
    }

    /// Shares the memory.
    fn share(&mut self) {
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: MEMORY,
            userspace_addr: USER,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        };
        self.frontend.set_mem_table(&[region]).unwrap();
    }

    fn place(&self, ring: usize) -> VringConfigData {
        let area = USER + ring as u64 * AREA;
        VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: area,
            used_ring_addr: area + USED,
            avail_ring_addr: area + AVAILABLE,
            log_addr: None,
        }
    }

    fn start(&mut self, ring: usize, base: u16) {
        let place = self.place(ring);
        self.frontend.set_vring_num(ring, SIZE).unwrap();
        self.frontend.set_vring_addr(ring, &place).unwrap();
        self.frontend.set_vring_base(ring, base).unwrap();
        self.frontend.set_vring_call(ring, &self.calls[ring]).unwrap();
        self.frontend.set_vring_kick(ring, &self.kicks[ring]).unwrap();
        self.frontend.set_vring_enable(ring, true).unwrap();
    }

    fn area(ring: usize) -> u64 {
        ring as u64 * AREA
    }

    fn descriptor(&self, ring: usize, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let at = GuestAddress(Self::area(ring) + u64::from(index) * 16);
        self.memory.write_obj(address, at).unwrap();
        self.memory.write_obj(length, GuestAddress(at.0 + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at.0 + 12)).unwrap();
        self.memory.write_obj(next, GuestAddress(at.0 + 14)).unwrap();
    }

    /// Makes a chain available, and kicks.
    fn offer(&mut self, ring: usize, head: u16) {
        let available = Self::area(ring) + AVAILABLE;
        let slot = u64::from(self.available[ring].0 % SIZE);
        self.memory.write_obj(head, GuestAddress(available + 4 + slot * 2)).unwrap();
        self.available[ring] += 1;
        self.memory.store(self.available[ring].0, GuestAddress(available + 2), Order::Release).unwrap();
        self.kicks[ring].write(1).unwrap();
    }

    /// Where a descriptor's buffer is.
    fn buffer(ring: usize, index: u16) -> u64 {
        Self::area(ring) + BUFFERS + u64::from(index) * 4096
    }

    /// Sends a frame in pieces of these lengths, by descriptors from `first` on.
    fn send(&mut self, ring: usize, first: u16, header: [u8; vnet::HEADER], frame: &[u8], pieces: &[usize]) {
        let bytes = [header.as_slice(), frame].concat();
        let mut left = bytes.as_slice();
        for (n, &length) in pieces.iter().enumerate() {
            let last = n + 1 == pieces.len();
            let (now, rest) = left.split_at(if last { left.len() } else { length.min(left.len()) });
            let index = first + n as u16;
            self.memory.write_slice(now, GuestAddress(Self::buffer(ring, index))).unwrap();
            let flags = if last { 0 } else { NEXT };
            self.descriptor(ring, index, Self::buffer(ring, index), now.len() as u32, flags, index + 1);
            left = rest;
        }
        self.offer(ring, first);
    }

    /// Offers buffers of this length for frames to the guest.
    fn give(&mut self, ring: usize, count: u16, length: u32) {
        for _ in 0..count {
            let index = self.available[ring].0 % SIZE;
            self.descriptor(ring, index, Self::buffer(ring, index), length, WRITE, 0);
            self.offer(ring, index);
        }
    }

    /// What was given back: heads and lengths.
    fn given_back(&mut self, ring: usize) -> Vec<(u32, u32)> {
        let used = Self::area(ring) + USED;
        let now: u16 = self.memory.load(GuestAddress(used + 2), Order::Acquire).unwrap();
        let mut found = Vec::new();
        while self.used[ring].0 != now {
            let at = used + 4 + u64::from(self.used[ring].0 % SIZE) * 8;
            let head = self.memory.read_obj(GuestAddress(at)).unwrap();
            found.push((head, self.memory.read_obj(GuestAddress(at + 4)).unwrap()));
            self.used[ring] += 1;
        }
        found
    }

    /// The frame in the buffers that were given back, and its header.
    fn frame(&mut self, ring: usize) -> Option<(Vec<u8>, Vec<u8>)> {
        let back = self.given_back(ring);
        let mut bytes = Vec::new();
        for (head, length) in &back {
            let mut part = vec![0; *length as usize];
            let at = Self::buffer(ring, *head as u16);
            self.memory.read_slice(&mut part, GuestAddress(at)).unwrap();
            bytes.extend(part);
        }
        let header = bytes.get(..vnet::HEADER)?.to_vec();
        assert_eq!(
            u16::from_le_bytes([header[10], header[11]]),
            back.len() as u16,
            "the buffers are counted"
        );
        Some((header, bytes[vnet::HEADER..].to_vec()))
    }
}

/// Waits until a link is ready, as an engine does, and looks.
fn wait(link: &mut QueuePair) {
    let fd = link.readiness().try_clone_to_owned().unwrap();
    let patience = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
    assert_eq!(poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&patience)).unwrap(), 1, "it becomes ready");
    link.acknowledge();
}

/// The next frame from the guest.
fn receive(link: &mut QueuePair) -> (Vec<u8>, Offload) {
    let mut buffer = vec![0; usernet::tap::LONGEST_FRAME];
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some((length, offload)) = link.receive(&mut buffer).unwrap() {
            return (buffer[..length].to_vec(), offload);
        }
        assert!(Instant::now() < end);
        wait(link);
    }
}

fn noise(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at.wrapping_mul(31) ^ (at >> 7)) as u8).collect()
}

#[test]
fn frames_go_both_ways_in_any_pieces() {
    let (mut links, socket) = links(1);
    let link = &mut links[0];
    let mut guest = Guest::new(socket, 2, everything());
    let frame = noise(5000);
    let mut header = [0; vnet::HEADER];
    header[0] = 1;
    // The header split, and with the frame's beginning in one piece.
    for pieces in [&[5012][..], &[12, 5000], &[5, 10, 1, 4000, 996], &[3000, 2012]] {
        guest.send(1, 0, header, &frame, pieces);
        let (got, offload) = receive(link);
        assert!(got == frame);
        assert!(offload.needs_checksum);
        link.flush().unwrap();
        assert_eq!(guest.given_back(1), [(0, 0)]);
    }
    assert!(guest.calls[1].read().is_ok(), "the driver is told");

    guest.give(0, 8, 1536);
    wait(link);
    assert_eq!(link.send(&frame[..54], &frame[54..], Offload::default()).unwrap(), Sent::Yes);
    link.flush().unwrap();
    assert!(guest.frame(0).unwrap().1 == frame);
    assert!(guest.calls[0].read().is_ok());
}

#[test]
fn a_link_without_buffers_is_full_until_there_are_enough() {
    let (mut links, socket) = links(1);
    let link = &mut links[0];
    let mut guest = Guest::new(socket, 2, everything());
    let frame = noise(4000);
    wait(link);
    guest.give(0, 2, 1536);
    wait(link);
    assert_eq!(link.send(&[], &frame, Offload::default()).unwrap(), Sent::Full);
    assert_eq!(guest.frame(0), None, "nothing of it is to be seen");
    guest.give(0, 1, 1536);
    wait(link);
    assert_eq!(link.send(&[], &frame, Offload::default()).unwrap(), Sent::Yes);
    assert!(guest.frame(0).unwrap().1 == frame);
    // Those that it kept are not lost to whoever sets the ring up again.
    guest.give(0, 2, 1536);
    wait(link);
    assert_eq!(link.send(&[], &frame, Offload::default()).unwrap(), Sent::Full);
    let base = guest.frontend.get_vring_base(0).unwrap();
    assert_eq!(base, 3, "two were taken and not used");
    guest.start(0, 3);
    guest.give(0, 1, 1536);
    wait(link);
    assert_eq!(link.send(&[], &frame, Offload::default()).unwrap(), Sent::Yes);
    assert!(guest.frame(0).unwrap().1 == frame);
}

#[test]
fn many_frames_wrap_around_the_rings() {
    let (mut links, socket) = links(1);
    let link = &mut links[0];
    let mut guest = Guest::new(socket, 2, everything());
    wait(link);
    for n in 0..usize::from(SIZE) * 5 {
        let frame = noise(60 + n);
        let first = (n % usize::from(SIZE)) as u16;
        guest.send(1, first, [0; vnet::HEADER], &frame, &[0]);
        assert!(receive(link).0 == frame, "frame {n}");
        assert_eq!(guest.given_back(1), [(u32::from(first), 0)]);
        guest.give(0, 1, 2048);
        assert_eq!(link.send(&frame, &[], Offload::default()).unwrap(), Sent::Yes);
        assert!(guest.frame(0).unwrap().1 == frame);
    }
}

#[test]
fn without_mergeable_buffers_a_frame_is_in_one_or_lost() {
    let (mut links, socket) = links(1);
    let link = &mut links[0];
    let mut guest = Guest::new(socket, 2, everything() & !(1 << Features::MRG_RXBUF));
    wait(link);
    guest.give(0, 4, 1536);
    assert_eq!(link.send(&[], &noise(4000), Offload::default()).unwrap(), Sent::Yes);
    assert_eq!(guest.frame(0), None);
    assert_eq!(link.send(&[], &noise(1500), Offload::default()).unwrap(), Sent::Yes);
    assert!(guest.frame(0).unwrap().1 == noise(1500));
}

#[test]
fn abilities_are_what_was_agreed_on() {
    for (without, checksum, segmentation, mtu) in [
        (&[][..], true, [true; 2], MTU),
        (&[Features::GUEST_TSO4], true, [false, true], MTU),
        (&[Features::GUEST_CSUM, Features::MRG_RXBUF], false, [false; 2], 1500),
    ] {
        let (mut links, socket) = links(1);
        let _guest = Guest::new(socket, 2, without.iter().fold(everything(), |all, bit| all & !(1 << bit)));
        wait(&mut links[0]);
        assert_eq!(links[0].abilities(), Abilities { checksum, segmentation, datagrams: false, mtu });
    }
}

#[test]
fn the_table_of_memory_may_change_while_the_rings_run() {
    let (mut links, socket) = links(1);
    let link = &mut links[0];
    let mut guest = Guest::new(socket, 2, everything());
    guest.send(1, 0, [0; vnet::HEADER], &noise(100), &[0]);
    assert!(receive(link).0 == noise(100));
    guest.share();
    guest.send(1, 1, [0; vnet::HEADER], &noise(200), &[0]);
    assert!(receive(link).0 == noise(200));
}

#[test]
fn broken_rings_stop_and_can_be_set_up_again() {
    type Deed = fn(&mut Guest);
    let deeds: &[(&str, Deed)] = &[
        ("a buffer beyond memory", |g| {
            g.descriptor(1, 0, MEMORY - 4, 100, 0, 0);
            g.offer(1, 0);
        }),
        ("a buffer at the end of addresses", |g| {
            g.descriptor(1, 0, u64::MAX - 4, u32::MAX, 0, 0);
            g.offer(1, 0);
        }),
        ("a chain without end", |g| {
            g.descriptor(1, 0, Guest::buffer(1, 0), 10, NEXT, 0);
            g.offer(1, 0);
        }),
        ("a head beyond the table", |g| g.offer(1, SIZE)),
        ("a next beyond the table", |g| {
            g.descriptor(1, 0, Guest::buffer(1, 0), 10, NEXT, SIZE);
            g.offer(1, 0);
        }),
        ("a buffer to write in", |g| {
            g.descriptor(1, 0, Guest::buffer(1, 0), 100, WRITE, 0);
            g.offer(1, 0);
        }),
        ("an indirect table of no length", |g| {
            g.descriptor(1, 0, Guest::buffer(1, 0), 8, 4, 0);
            g.offer(1, 0);
        }),
        ("an index that jumps", |g| {
            g.available[1] += 5000;
            g.offer(1, 0);
        }),
    ];
    for (name, deed) in deeds {
        let (mut links, socket) = links(1);
        let link = &mut links[0];
        let mut guest = Guest::new(socket, 2, everything());
        wait(link);
        deed(&mut guest);
        let mut buffer = vec![0; usernet::tap::LONGEST_FRAME];
        assert_eq!(link.receive(&mut buffer).unwrap(), None, "{name}");
        guest.send(1, 1, [0; vnet::HEADER], &noise(100), &[0]);
        assert_eq!(link.receive(&mut buffer).unwrap(), None, "{name}: it stays broken");
        // The other ring goes on.
        guest.give(0, 1, 2048);
        assert_eq!(link.send(&noise(60), &[], Offload::default()).unwrap(), Sent::Yes, "{name}");
        assert!(guest.frame(0).is_some(), "{name}");
        let _ = guest.frontend.get_vring_base(1).unwrap();
        let base = guest.available[1].0;
        guest.start(1, base);
        guest.send(1, 2, [0; vnet::HEADER], &noise(300), &[0]);
        assert!(receive(link).0 == noise(300), "{name}");
    }
}

#[test]
fn a_pair_that_is_not_used_gives_to_the_first() {
    let (mut links, socket) = links(2);
    let mut guest = Guest::new(socket, 4, everything());
    guest.frontend.set_vring_enable(2, false).unwrap();
    guest.give(0, 1, 2048);
    assert_eq!(links[1].send(&noise(60), &[], Offload::default()).unwrap(), Sent::Yes);
    assert!(guest.frame(0).unwrap().1 == noise(60));
    guest.frontend.set_vring_enable(2, true).unwrap();
    guest.give(2, 1, 2048);
    assert_eq!(links[1].send(&noise(70), &[], Offload::default()).unwrap(), Sent::Yes);
    assert!(guest.frame(2).unwrap().1 == noise(70));
    guest.send(3, 0, [0; vnet::HEADER], &noise(80), &[0]);
    assert!(receive(&mut links[1]).0 == noise(80));
}

#[test]
fn messages_that_cannot_be_obeyed_are_refused() {
    let (_links, socket) = links(1);
    let guest = Guest::new(socket, 2, everything());
    let elsewhere = VringConfigData { desc_table_addr: 0x1234_0000, ..guest.place(0) };
    guest.frontend.set_vring_addr(0, &elsewhere).unwrap_err();
    let (_links, socket) = links(1);
    let guest = Guest::new(socket, 2, everything());
    guest.frontend.set_vring_num(0, SIZE).unwrap_err();
    let (_links, socket) = links(1);
    let guest = Guest::new(socket, 2, everything());
    let unknown = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() | 1 << 50;
    guest.frontend.set_features(unknown).unwrap_err();
}

#[test]
fn a_front_end_that_leaves_ends_its_link() {
    let (mut links, socket) = links(1);
    let guest = Guest::new(socket, 2, everything());
    drop(guest);
    let mut buffer = vec![0; usernet::tap::LONGEST_FRAME];
    let end = Instant::now() + PATIENCE;
    let error = loop {
        match links[0].receive(&mut buffer) {
            Ok(None) => {}
            Ok(Some(_)) => panic!("a frame"),
            Err(error) => break error,
        }
        assert!(Instant::now() < end);
        wait(&mut links[0]);
    };
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    assert_eq!(links[0].send(&noise(60), &[], Offload::default()).unwrap(), Sent::Yes, "it is lost");
}

/// What the fuzz targets do, for a moment.
#[test]
fn any_bytes_are_survived() {
    let mut state = 0x1234_5678_9abc_def0u64;
    let mut byte = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // Small numbers come deeper.
        if state & 3 == 0 { (state >> 8) as u8 } else { (state >> 8) as u8 & 7 }
    };
    for round in 0..300 {
        let bytes: Vec<u8> = (0..round * 8).map(|_| byte()).collect();
        testing::any_messages(&bytes);
        testing::any_rings(&bytes);
    }
}

use proptest::prelude::*;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Address, GuestAddress};

use super::attach::{RECEIVE, SEND, SHAPE};
use super::software::{Dummy, EVERYTHING, Software};
use super::*;
use crate::ring::Addresses;
use crate::ring::model::Device;

const REFUSED: [(&str, &str); 10] = [
    ("set_owner", "an owner"),
    ("get_features", "to tell its features"),
    ("set_features", "its own features"),
    ("set_mem_table", "its memory"),
    ("set_vring_num", "a ring"),
    ("set_vring_addr", "a ring"),
    ("set_vring_kick", "a ring"),
    ("set_vring_call", "a ring"),
    ("set_vring_err", "a ring"),
    ("set_backend", "the tap device"),
];

/// A tap, and the device behind it with both of its queues.
struct Link {
    tap: VhostTap<Software>,
    software: Software,
    receive: Device,
    send: Device,
    buffer: Vec<u8>,
}

impl Link {
    fn new(features: u64) -> Self {
        let software = Software::new(features);
        let tap = VhostTap::new(&Dummy::new(), |memory| software.open(memory)).unwrap();
        let device = |queue: usize| {
            let state = software.state();
            let addresses = state.vrings[queue].addresses.unwrap();
            let addresses = Addresses {
                descriptors: GuestAddress(addresses.desc_table_addr),
                available: GuestAddress(addresses.avail_ring_addr),
                used: GuestAddress(addresses.used_ring_addr),
            };
            let event_index = state.features.unwrap() & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
            Device::new(state.memory.clone().unwrap(), SHAPE.size, addresses, event_index)
        };
        let (receive, send) = (device(RECEIVE), device(SEND));
        Self { tap, receive, send, software, buffer: vec![0; LONGEST_FRAME] }
    }

    fn mergeable(&self) -> bool {
        self.software.state().features.unwrap() & 1 << VIRTIO_NET_F_MRG_RXBUF != 0
    }

    /// A frame from the guest, as vhost-net delivers it. Returns whether there was room.
    fn deliver(&mut self, frame: &[u8], offload: Offload) -> bool {
        let buffers = if self.mergeable() { (frame.len() + vnet::HEADER).div_ceil(8192) } else { 1 };
        let mut bytes = header(offload, buffers as u16).to_vec();
        bytes.extend(frame);
        self.deliver_raw(&bytes)
    }

    /// The same with any bytes, over as many buffers as they need.
    fn deliver_raw(&mut self, bytes: &[u8]) -> bool {
        let mut rest = bytes;
        let mut used = Vec::new();
        loop {
            let Some((head, length)) = self.receive.fill(rest) else { return false };
            used.push((head, length));
            rest = &rest[length..];
            if rest.is_empty() {
                break;
            }
        }
        for (head, length) in used {
            self.receive.finish(head, length);
        }
        if self.receive.call_wanted() {
            self.software.call(RECEIVE);
        }
        true
    }

    fn frame(&mut self) -> io::Result<Option<(Vec<u8>, Offload)>> {
        let frame = self.tap.receive(&mut self.buffer)?;
        Ok(frame.map(|(length, offload)| (self.buffer[..length].to_vec(), offload)))
    }

    /// What the guest is sent: header and frame.
    fn sent(&mut self) -> Option<Vec<u8>> {
        let chain = self.send.pop()?;
        self.send.finish(chain.head, 0);
        if self.send.call_wanted() {
            self.software.call(SEND);
        }
        Some(chain.bytes)
    }

    /// Whether the tap is ready; if so, it is acknowledged.
    fn ready(&mut self) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let readiness = self.tap.readiness();
        let ready = poll(&mut [PollFd::new(&readiness, PollFlags::IN)], Some(&now)).unwrap() == 1;
        if ready {
            self.tap.acknowledge();
        }
        ready
    }

    /// Why the link is gone: always the same, whatever is asked of it.
    fn end(&mut self) -> String {
        let error = self.frame().unwrap_err().to_string();
        assert_eq!(self.frame().unwrap_err().to_string(), error);
        assert_eq!(self.tap.send(&[0; 14], &[], Offload::default()).unwrap_err().to_string(), error);
        assert_eq!(self.tap.flush().unwrap_err().to_string(), error);
        error
    }
}

/// A header in this order of bytes.
fn header(offload: Offload, buffers: u16) -> [u8; vnet::HEADER] {
    let mut bytes = [0; vnet::HEADER];
    bytes[0] = offload.needs_checksum.into();
    if let Some(size) = offload.segment {
        bytes[1] = 1;
        bytes[4..6].copy_from_slice(&size.to_le_bytes());
    }
    bytes[10..].copy_from_slice(&buffers.to_le_bytes());
    bytes
}

fn noise(length: usize, seed: usize) -> Vec<u8> {
    (0..length).map(|n| (n * 31 + seed * 7 + n / 251) as u8).collect()
}

/// With and without each feature that a device need not have.
fn all_features() -> [u64; 4] {
    let optional = [0, 1 << VIRTIO_NET_F_MRG_RXBUF, 1 << VIRTIO_RING_F_EVENT_IDX, EVERYTHING];
    optional.map(|features| features | 1 << VIRTIO_F_VERSION_1)
}

#[test]
fn the_device_is_told_everything() {
    // It may offer more than is wanted.
    let software = Software::new(EVERYTHING | 1 << 27 | 1 << 28 | 1 << 33);
    let tap = VhostTap::new(&Dummy::new(), |memory| software.open(memory)).unwrap();
    assert_eq!(tap.abilities(), Dummy::new().abilities());
    {
        let state = software.state();
        assert_eq!(state.features, Some(EVERYTHING));
        assert_eq!(state.table, Some((MEMORY.raw_value(), 2 * SHAPE.bytes() as u64)));
        for vring in &state.vrings {
            assert!(vring.running && vring.call.is_some() && vring.error.is_some());
            assert_eq!(vring.size, SHAPE.size);
        }
    }
    drop(tap);
    assert!(software.state().vrings.iter().all(|vring| !vring.running), "it is stopped in the end");
}

#[test]
fn a_device_that_lacks_a_feature_is_not_used() {
    let software = Software::new(EVERYTHING & !(1 << VIRTIO_F_VERSION_1));
    let Err(error) = VhostTap::new(&Dummy::new(), |memory| software.open(memory)) else { panic!() };
    assert_eq!(error.to_string(), "vhost-net lacks features 0x100000000: it offers 0x20008000");
}

#[test]
fn a_refusal_says_what_was_refused() {
    for (request, what) in REFUSED {
        let software = Software::new(EVERYTHING);
        software.state().refuse = request;
        let Err(error) = VhostTap::new(&Dummy::new(), |memory| software.open(memory)) else {
            panic!("{request} is needed")
        };
        assert!(error.to_string().starts_with(&format!("vhost-net refuses {what}: ")), "{request}: {error}");
        assert!(software.state().vrings.iter().all(|vring| !vring.running), "{request}");
    }
}

#[test]
fn the_way_out_is_named() {
    for (number, words) in [(libc::ENOENT, "modprobe vhost_net"), (libc::EACCES, "group kvm")] {
        let open = |_| Err::<Software, _>(vhost::Error::VhostOpen(io::Error::from_raw_os_error(number)));
        let Err(error) = VhostTap::new(&Dummy::new(), open) else { panic!() };
        let error = error.to_string();
        assert!(error.contains("/dev/vhost-net") && error.contains(words), "{error}");
    }
}

#[test]
fn frames_from_the_guest_arrive() {
    for features in all_features() {
        let mut link = Link::new(features);
        assert!(link.frame().unwrap().is_none());
        link.ready();
        let offload = Offload { needs_checksum: true, segment: Some(1448) };
        let sizes = [0, 1, 60, 8179, 8180, 8181, 16372, 16373, LONGEST_FRAME];
        for (seed, size) in sizes.into_iter().enumerate() {
            let frame = noise(size, seed);
            assert!(link.deliver(&frame, offload));
            assert!(link.ready(), "{size}");
            assert!(link.frame().unwrap() == Some((frame, offload)), "{size}");
            assert!(link.frame().unwrap().is_none());
            assert!(!link.ready(), "{size}");
        }
    }
}

#[test]
fn buffers_are_offered_again() {
    for features in all_features() {
        let mut link = Link::new(features);
        // All that fits, several times over.
        for round in 0..4 {
            let mut delivered = 0;
            while link.deliver(&noise(30_000, delivered), Offload::default()) {
                delivered += 1;
            }
            let most = if link.mergeable() { 512 / 4 } else { 512 / 9 };
            assert_eq!(delivered, most, "round {round}");
            for seed in 0..delivered {
                assert!(link.frame().unwrap() == Some((noise(30_000, seed), Offload::default())));
            }
            assert!(link.frame().unwrap().is_none());
        }
    }
}

#[test]
fn a_long_time_passes() {
    // Indices wrap, and buffers come back in any order.
    let mut link = Link::new(EVERYTHING);
    for number in 0..40_000usize {
        let frame = noise(14 + number % 100, number);
        assert!(link.deliver(&frame, Offload::default()));
        if number % 7 == 6 {
            for back in (0..7).rev() {
                let expected = noise(14 + (number - back) % 100, number - back);
                assert!(link.frame().unwrap() == Some((expected, Offload::default())), "{number}");
            }
        }
    }
}

#[test]
fn a_frame_that_is_too_long_is_cut() {
    let mut link = Link::new(EVERYTHING);
    let frame = noise(LONGEST_FRAME + 4, 0);
    assert!(link.deliver(&frame, Offload::default()));
    assert!(link.frame().unwrap() == Some((frame[..LONGEST_FRAME].to_vec(), Offload::default())));
    assert!(link.frame().unwrap().is_none());
}

#[test]
fn frames_to_the_guest_arrive() {
    for features in all_features() {
        let mut link = Link::new(features);
        for (seed, size) in [0, 1, 8192 - 12 - 54, 8192, 60_000, LONGEST_FRAME - 54].into_iter().enumerate() {
            let mut header = noise(54, seed);
            header[12..15].copy_from_slice(&[8, 0, 0x45]);
            header[14 + 9] = 6;
            header[14 + 20 + 12] = 0x50;
            let payload = noise(size, seed);
            let offload = Offload { needs_checksum: true, segment: Some(1460) };
            assert_eq!(link.tap.send(&header, &payload, offload).unwrap(), Sent::Yes);
            link.tap.flush().unwrap();
            let sent = link.sent().unwrap();
            assert!(sent[vnet::HEADER..] == [header, payload].concat(), "{size}");
            assert_eq!(sent[..vnet::HEADER], [1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 1, 0]);
            assert!(link.sent().is_none());
        }
        let long = link.tap.send(&[0; 54], &vec![0; LONGEST_FRAME], Offload::default());
        assert_eq!(long.unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert!(link.tap.flush().is_ok(), "that was no fault of the link's");
    }
}

#[test]
fn a_batch_is_one_kick() {
    for features in all_features() {
        let mut link = Link::new(features);
        link.software.kicks(SEND);
        for _ in 0..10 {
            assert_eq!(link.tap.send(&[0; 60], &[], Offload::default()).unwrap(), Sent::Yes);
        }
        assert!(link.sent().is_none());
        assert_eq!(link.software.kicks(SEND), 0);
        link.tap.flush().unwrap();
        link.tap.flush().unwrap();
        assert_eq!(link.software.kicks(SEND), 1);
        assert_eq!(std::iter::from_fn(|| link.sent()).count(), 10);
    }
}

#[test]
fn a_guest_that_does_not_keep_up_is_waited_for() {
    for features in all_features() {
        let mut link = Link::new(features);
        let mut number = 0;
        for round in 0..5 {
            let first = number;
            while link.tap.send(&[0; 14], &noise(20_000, number), Offload::default()).unwrap() == Sent::Yes {
                number += 1;
            }
            // What the device was not shown is shown now, and nobody is ready yet.
            assert!(!link.ready());
            assert!(number - first >= 512 / 6, "{round}");
            let waiting = 512 / 3;
            for seed in number - waiting..number {
                assert!(link.sent().unwrap()[26..] == noise(20_000, seed));
                if seed == number - waiting / 2 {
                    assert!(link.ready(), "half of it is gone");
                }
            }
            assert!(link.sent().is_none());
            // Without event indices a device calls until it is told that it is enough.
            link.ready();
        }
    }
}

#[test]
fn counts_of_buffers_that_lie_end_the_link() {
    for (count, bytes) in [(0, 100), (2, 100), (3, 9000), (513, 60_000), (u16::MAX, 100)] {
        let mut link = Link::new(EVERYTHING);
        let mut frame = header(Offload::default(), count).to_vec();
        frame.resize(bytes, 0);
        let used = if count == 0 { 1 } else { bytes.div_ceil(8192) };
        assert!(link.deliver_raw(&frame));
        let said = format!("vhost-net delivered a frame of {count} buffers, of which it had used {used}");
        assert_eq!(link.end(), said);
    }
}

#[test]
fn less_than_a_header_ends_the_link() {
    for features in all_features() {
        let mut link = Link::new(features);
        assert!(link.deliver_raw(&[0; vnet::HEADER - 1]));
        assert_eq!(link.end(), "vhost-net delivered 11 bytes, which is less than a header");
    }
}

#[test]
fn a_broken_ring_ends_the_link() {
    let mut link = Link::new(EVERYTHING);
    link.software.write_used(RECEIVE, 2, &1000u16.to_le_bytes());
    assert!(link.end().starts_with("vhost-net's receive ring is broken: the used index"));

    let mut link = Link::new(EVERYTHING);
    link.software.write_used(RECEIVE, 2, &[1, 0, 0xff, 0xff, 0, 0, 100, 0]);
    assert_eq!(link.end(), "vhost-net's receive ring is broken: buffer 65535 was used, of 512");

    let mut link = Link::new(EVERYTHING);
    link.software.write_used(SEND, 2, &[1, 0]);
    assert!(link.tap.flush().unwrap_err().to_string().starts_with("vhost-net's send ring is broken"));
    assert!(link.end().starts_with("vhost-net's send ring is broken"));
}

#[test]
fn a_complaint_of_the_device_ends_the_link() {
    for queue in [RECEIVE, SEND] {
        let mut link = Link::new(EVERYTHING);
        link.software.complain(queue);
        assert!(link.ready());
        assert_eq!(link.end(), "vhost-net gave up: it could not read the rings, or what they point to");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { rng_seed: proptest::test_runner::RngSeed::Fixed(7), failure_persistence: None, ..ProptestConfig::default() })]

    /// The body of the fuzz target.
    #[test]
    fn no_device_harms_its_driver(data in prop::collection::vec(any::<u8>(), 0..2000)) {
        crate::testing::any_completions(&data);
    }
}

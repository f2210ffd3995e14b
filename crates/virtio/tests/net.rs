//! The network device between a driver and the engine's end of it.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use common::{EVENT_IDX, Guest, INDIRECT_DESC, Mem, VERSION_1, WRITE};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use usernet::Engine;
use usernet::tap::{LONGEST_FRAME, Offload, Sent, Tap};
use usernet::testing::{GATEWAY_MAC, GATEWAY_V4, GUEST_MAC, GUEST_V4};
use virtio::net::{Net, NetConfig, QueueTap};

const ANY: u64 = u64::MAX;
const MRG_RXBUF: u64 = 1 << 15;
const RINGS: u64 = VERSION_1 | EVENT_IDX | INDIRECT_DESC;

/// The first pair's queues.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

const CONFIG: NetConfig = NetConfig { mac: GUEST_MAC, mtu: 9000, pairs: 1 };

type Tap0 = QueueTap<Arc<Mem>>;

fn device(pairs: u16) -> (Guest, Vec<Tap0>) {
    let (net, taps) = Net::new(NetConfig { pairs, ..CONFIG }).unwrap();
    (Guest::new(net), taps)
}

/// A running driver with these features.
fn running(features: u64) -> (Guest, Tap0) {
    let (mut guest, mut taps) = device(1);
    guest.run(features);
    (guest, taps.remove(0))
}

fn readable(fd: BorrowedFd<'_>) -> bool {
    poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&Timespec::default())).unwrap() > 0
}

/// The beginning of an IPv4 frame with TCP, and nothing sensible after it.
fn tcp_header() -> Vec<u8> {
    let mut header = vec![0x11; 54];
    header[12..15].copy_from_slice(&[8, 0, 0x45]);
    header[23] = 6;
    header
}

/// Sends from the guest: header of the device, then the frame.
fn transmit(guest: &mut Guest, header: [u8; 12], frame: &[u8]) {
    let (header, body) = (guest.put(&header), guest.put(frame));
    guest.offer(TRANSMIT, &[(header, 12, 0), (body, frame.len() as u32, 0)]);
    guest.kick(TRANSMIT);
}

fn received(tap: &mut Tap0) -> Option<(Vec<u8>, Offload)> {
    let mut buffer = vec![0; LONGEST_FRAME];
    let (length, offload) = tap.receive(&mut buffer).unwrap()?;
    buffer.truncate(length);
    Some((buffer, offload))
}

#[test]
fn configuration() {
    let (mut guest, _taps) = device(1);
    assert_eq!(guest.read::<6>(0x2000), GUEST_MAC);
    assert_eq!([6, 8, 10].map(|at| guest.read16(0x2000 + at)), [1, 1, 9000], "up, one pair, the MTU");
    assert_eq!(guest.read16(18), 2, "queues");
    // CSUM, GUEST_CSUM, MTU, MAC, GUEST_TSO4 and 6, HOST_TSO4 and 6, MRG_RXBUF, STATUS.
    let expected = [0, 1, 3, 5, 7, 8, 11, 12, 15, 16].iter().fold(RINGS, |bits, bit| bits | 1 << bit);
    assert_eq!(guest.offered(), expected);
    let (mut guest, _taps) = device(4);
    assert_eq!((guest.read16(18), guest.read16(0x2000 + 8)), (9, 4));
    assert_eq!(guest.offered(), expected | 1 << 17 | 1 << 22, "control queue, several pairs");
    for (pairs, mtu) in [(0, 1500), (17, 1500), (1, 67)] {
        assert!(Net::<Arc<Mem>>::new(NetConfig { pairs, mtu, ..CONFIG }).is_err());
    }
}

#[test]
fn frames_of_the_guest_arrive_with_what_is_left_to_do() {
    let (mut guest, mut tap) = running(ANY);
    tap.acknowledge();
    assert_eq!(received(&mut tap), None);
    transmit(&mut guest, [0; 12], b"the first frame");
    transmit(&mut guest, [1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0], &[7; 65535]);
    assert!(readable(tap.readiness()));
    tap.acknowledge();
    assert!(!readable(tap.readiness()));
    assert_eq!(received(&mut tap), Some((b"the first frame".to_vec(), Offload::default())));
    let (frame, offload) = received(&mut tap).unwrap();
    assert!(frame == [7; 65535]);
    assert_eq!(offload, Offload { needs_checksum: true, segment: Some(1460) });
    assert_eq!(received(&mut tap), None);
    tap.flush().unwrap();
    assert_eq!([guest.wait_used(TRANSMIT).1, guest.wait_used(TRANSMIT).1], [0, 0]);
    // The last look asked for a kick.
    transmit(&mut guest, [0; 12], b"x");
    assert!(readable(tap.readiness()));
}

#[test]
fn a_frame_has_no_more_pieces_than_the_queue_has_entries() {
    const NEXT: u16 = 1;
    const INDIRECT: u16 = 4;
    let (mut guest, mut tap) = running(ANY);
    // What refers to the table counts as well.
    for (pieces, fits) in [(255, true), (256, false)] {
        let bytes = guest.put(&[0; 512]);
        let piece = |number: u16| {
            let flags = if number + 1 < pieces { NEXT } else { 0 };
            let [address, length] = [bytes.to_le_bytes(), (2 | u64::from(flags) << 32).to_le_bytes()];
            let mut descriptor = [address, length].concat();
            descriptor[14..].copy_from_slice(&(number + 1).to_le_bytes());
            descriptor
        };
        let table = (0..pieces).flat_map(piece).collect::<Vec<u8>>();
        let address = guest.put(&table);
        guest.offer(TRANSMIT, &[(address, table.len() as u32, INDIRECT)]);
        guest.kick(TRANSMIT);
        tap.acknowledge();
        // The device's header is of these bytes too.
        let frame = received(&mut tap).map(|(frame, _)| frame.len());
        assert_eq!(frame, fits.then_some(2 * usize::from(pieces) - 12), "{pieces}");
        if !fits {
            guest.expect_needs_reset();
        }
    }
}

#[test]
fn a_frame_may_be_cut_anywhere() {
    let (mut guest, mut tap) = running(ANY);
    let bytes = guest.put(&[[0; 12].as_slice(), b"cut anywhere"].concat());
    guest.offer(TRANSMIT, &[(bytes, 5, 0), (0, 0, 0), (bytes + 5, 9, 0), (bytes + 14, 10, 0)]);
    guest.kick(TRANSMIT);
    assert_eq!(received(&mut tap).unwrap().0, b"cut anywhere");
}

#[test]
fn what_is_no_frame_becomes_an_empty_one_and_is_given_back() {
    let (mut guest, mut tap) = running(ANY);
    // An offload that was not offered, a frame that is too long, a header cut short, nothing at all.
    transmit(&mut guest, [0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], b"udp segments");
    transmit(&mut guest, [0; 12], &[1; LONGEST_FRAME + 1]);
    let short = guest.put(&[0; 11]);
    guest.offer(TRANSMIT, &[(short, 11, 0)]);
    guest.offer(TRANSMIT, &[(short, 11, WRITE)]);
    transmit(&mut guest, [0; 12], b"good");
    for _ in 0..4 {
        assert_eq!(received(&mut tap), Some((vec![], Offload::default())));
    }
    assert_eq!(received(&mut tap).unwrap().0, b"good");
    assert_eq!(received(&mut tap), None);
    for _ in 0..5 {
        assert!(guest.poll_used(TRANSMIT).is_some());
    }
}

#[test]
fn a_long_frame_takes_several_buffers_which_appear_at_once() {
    let (mut guest, mut tap) = running(ANY);
    let buffers: Vec<u64> = (0..5).map(|_| guest.alloc(1500)).collect();
    for &buffer in &buffers {
        guest.offer(RECEIVE, &[(buffer, 1000, WRITE), (buffer + 1000, 500, WRITE)]);
    }
    let payload: Vec<u8> = (0..4000u32).map(|i| (i % 251) as u8).collect();
    let seen = guest.irqs.count(RECEIVE + 1);
    let offload = Offload { needs_checksum: true, segment: Some(1460) };
    assert_eq!(tap.send(&tcp_header(), &payload, offload).unwrap(), Sent::Yes);
    assert_eq!(guest.irqs.count(RECEIVE + 1), seen, "not before the flush");
    tap.flush().unwrap();
    guest.irqs.wait(RECEIVE + 1, seen);
    let whole = 12 + 54 + 4000;
    let lengths: Vec<u32> = std::iter::from_fn(|| guest.poll_used(RECEIVE)).map(|(_, len)| len).collect();
    assert_eq!(lengths, [1500, 1500, whole - 3000]);
    let frame: Vec<u8> = buffers[..3].iter().flat_map(|&at| guest.get(at, 1500)).collect();
    let header = [1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 3, 0];
    assert!(frame[..whole as usize] == [&header[..], &tcp_header(), &payload].concat());
    // The interrupts of the others come when they do.
    assert_eq!(tap.send(&tcp_header(), b"", Offload::default()).unwrap(), Sent::Yes);
    assert_eq!(guest.poll_used(RECEIVE).unwrap().1, 66);
    assert_eq!(guest.get(buffers[3], 12), [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], "the checksum is good");
}

#[test]
fn without_room_the_link_is_full_until_the_driver_kicks() {
    let (mut guest, mut tap) = running(ANY);
    tap.acknowledge();
    let buffer = guest.alloc(1000);
    guest.offer(RECEIVE, &[(buffer, 500, WRITE)]);
    guest.kick(RECEIVE);
    tap.acknowledge();
    let send = |tap: &mut Tap0| tap.send(&tcp_header(), &[3; 900], Offload::default()).unwrap();
    assert_eq!(send(&mut tap), Sent::Full);
    assert!(!readable(tap.readiness()));
    // The buffer taken for the frame is not lost, and serves a shorter one meanwhile.
    assert_eq!(tap.send(b"short", b"", Offload::default()).unwrap(), Sent::Yes);
    for at in [0, 500] {
        guest.offer(RECEIVE, &[(buffer + at, 500, WRITE)]);
    }
    guest.kick(RECEIVE);
    assert!(readable(tap.readiness()));
    tap.acknowledge();
    assert_eq!(send(&mut tap), Sent::Yes);
    let lengths: Vec<u32> = std::iter::from_fn(|| guest.poll_used(RECEIVE)).map(|(_, len)| len).collect();
    assert_eq!(lengths, [12 + 5, 500, 12 + 54 + 900 - 500]);
}

#[test]
fn a_frame_that_can_never_fit_is_dropped() {
    let (mut guest, mut tap) = running(ANY);
    let buffer = guest.alloc(16);
    for _ in 0..256 {
        guest.offer(RECEIVE, &[(buffer, 16, WRITE)]);
    }
    assert_eq!(tap.send(&[0; 5000], b"", Offload::default()).unwrap(), Sent::Yes);
    assert_eq!(guest.poll_used(RECEIVE), None);
    assert_eq!(tap.send(&[0; 20], b"", Offload::default()).unwrap(), Sent::Yes);
    assert_eq!([guest.poll_used(RECEIVE).unwrap().1, guest.poll_used(RECEIVE).unwrap().1], [16, 16]);
}

#[test]
fn a_driver_without_mergeable_buffers_has_one_for_each_frame() {
    let (mut guest, mut tap) = running(!MRG_RXBUF);
    let buffer = guest.alloc(2000);
    guest.offer(RECEIVE, &[(buffer, 1000, WRITE)]);
    assert_eq!(tap.send(&[1; 1000], b"", Offload::default()).unwrap(), Sent::Yes, "dropped");
    assert_eq!(guest.poll_used(RECEIVE), None);
    assert_eq!(tap.send(&[2; 900], &[3; 88], Offload::default()).unwrap(), Sent::Yes);
    assert_eq!(guest.poll_used(RECEIVE).unwrap().1, 1000);
    let expected = [&[0; 10][..], &[1, 0], &[2; 900], &[3; 88]].concat();
    assert!(guest.get(buffer, 1000) == expected);
    assert_eq!(tap.send(b"x", b"", Offload::default()).unwrap(), Sent::Full);
}

#[test]
fn without_a_driver_the_link_is_full_and_a_reset_takes_it_away() {
    let (mut guest, mut taps) = device(1);
    let mut tap = taps.remove(0);
    let quiet = |tap: &mut Tap0| {
        assert_eq!(tap.send(b"x", b"", Offload::default()).unwrap(), Sent::Full);
        assert_eq!(received(tap), None);
        let abilities = tap.abilities();
        assert_eq!((abilities.checksum, abilities.segmentation, abilities.mtu), (false, [false; 2], 9000));
        tap.flush().unwrap();
        tap.acknowledge();
        assert!(!readable(tap.readiness()));
    };
    quiet(&mut tap);
    for _ in 0..3 {
        guest.run(ANY);
        assert!(readable(tap.readiness()), "it may go on");
        assert!(tap.abilities().checksum && tap.abilities().segmentation == [true; 2]);
        transmit(&mut guest, [0; 12], b"frame");
        guest.set_status(0);
        quiet(&mut tap);
    }
    // TSO without checksums is none; neither is what the driver did not accept.
    guest.run(!(1 << 1));
    assert_eq!((tap.abilities().checksum, tap.abilities().segmentation), (false, [false; 2]));
    guest.run(!(1 << 7));
    assert_eq!(tap.abilities().segmentation, [false, true]);
}

#[test]
fn a_broken_chain_needs_a_reset_and_a_reset_helps() {
    let (mut guest, mut tap) = running(ANY);
    guest.offer(TRANSMIT, &[(1 << 40, 16, 0)]);
    guest.kick(TRANSMIT);
    assert_eq!(received(&mut tap), None);
    guest.expect_needs_reset();
    guest.run(RINGS);
    transmit(&mut guest, [0; 12], b"well again");
    assert_eq!(received(&mut tap).unwrap().0, b"well again");
}

#[test]
fn the_driver_says_how_many_pairs_it_uses() {
    let (mut guest, mut taps) = device(3);
    guest.run(ANY);
    let mut usable = |guest: &mut Guest| -> Vec<bool> {
        for pair in 0..3 {
            let buffer = guest.alloc(100);
            guest.offer(2 * pair, &[(buffer, 100, WRITE)]);
        }
        taps.iter_mut().map(|tap| tap.send(b"x", b"", Offload::default()).unwrap() == Sent::Yes).collect()
    };
    assert_eq!(usable(&mut guest), [true, false, false]);
    let set = |guest: &mut Guest, command: &[u8]| guest.request(6, &[command], 1);
    assert_eq!(set(&mut guest, &[4, 0, 2, 0]), [0]);
    assert_eq!(usable(&mut guest), [true, true, false]);
    // None, too many, another class, another command, too short.
    for command in [&[4, 0, 0, 0][..], &[4, 0, 4, 0], &[1, 0, 1, 0], &[4, 1, 1, 0], &[4, 0, 1]] {
        assert_eq!(set(&mut guest, command), [1], "{command:?}");
    }
    assert_eq!(usable(&mut guest), [true, true, false]);
    assert_eq!(set(&mut guest, &[4, 0, 3, 0]), [0]);
    assert_eq!(usable(&mut guest), [true; 3]);
    guest.run(!(1 << 22));
    assert_eq!(set(&mut guest, &[4, 0, 2, 0]), [1], "not negotiated");
}

/// An ARP request for the gateway, through a real engine on its own thread.
#[test]
fn the_engine_answers_and_takes_the_last_frames_before_the_end() {
    let (mut guest, mut taps) = device(1);
    let engine = Engine::new(usernet::testing::config(), Box::new(taps.remove(0))).unwrap();
    let handle = engine.handle();
    let thread = std::thread::spawn(move || engine.run());
    guest.run(ANY);
    let mut request = [&[0xff; 6][..], &GUEST_MAC, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &GUEST_MAC].concat();
    request.extend(GUEST_V4.octets());
    request.extend([0; 6]);
    request.extend(GATEWAY_V4.octets());
    let buffer = guest.alloc(2048);
    guest.offer(RECEIVE, &[(buffer, 2048, WRITE)]);
    transmit(&mut guest, [0; 12], &request);
    // A router advertisement may come first.
    let mut at = buffer;
    while guest.get(at + 12 + 12, 2) != [8, 6] {
        guest.wait_used(RECEIVE);
        if guest.get(at + 12 + 12, 2) == [8, 6] {
            break;
        }
        at = guest.alloc(2048);
        guest.offer(RECEIVE, &[(at, 2048, WRITE)]);
        guest.kick(RECEIVE);
    }
    assert_eq!(guest.get(at + 12 + 6, 6), GATEWAY_MAC);
    // No kick: the end of the machine looks by itself.
    let before = handle.stats().unwrap().frames_in;
    let body = guest.put(&[&[0; 12][..], &request].concat());
    for _ in 0..100 {
        guest.offer(TRANSMIT, &[(body, 12 + request.len() as u32, 0)]);
    }
    drop(guest);
    assert_eq!(handle.stats().unwrap().frames_in, before + 100);
    handle.stop();
    thread.join().unwrap().unwrap();
}

#[test]
fn the_end_does_not_wait_for_an_engine_that_is_gone() {
    let (mut guest, tap) = running(ANY);
    transmit(&mut guest, [0; 12], b"for nobody");
    drop(tap);
    drop(guest);
}

#[test]
fn readiness_is_a_descriptor_of_its_own() {
    let (_guest, taps) = device(2);
    let [first, second] = [&taps[0], &taps[1]].map(|tap| format!("{:?}", tap.readiness().as_fd()));
    assert_ne!(first, second);
}

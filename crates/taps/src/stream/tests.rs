use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use proptest::prelude::*;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use usernet::tap::LONGEST_FRAME;

use super::*;

const MTU: u16 = 65520;

/// A link and its peer.
fn pair() -> (Stream, UnixStream) {
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
    let theirs = UnixStream::from(theirs);
    theirs.set_nonblocking(true).unwrap();
    (Stream::connected(ours, MTU).unwrap(), theirs)
}

fn framed(frame: &[u8]) -> Vec<u8> {
    [&prefix(frame.len()), frame].concat()
}

/// A frame of this length that differs from others.
fn frame(length: usize, seed: usize) -> Vec<u8> {
    (0..length).map(|at| (at.wrapping_mul(31) ^ (at >> 8) ^ seed.wrapping_mul(97)) as u8).collect()
}

fn is_ready(tap: &Stream) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(&tap.readiness(), PollFlags::IN)], Some(&now)).unwrap() > 0
}

fn receive(tap: &mut Stream) -> io::Result<Option<Vec<u8>>> {
    let mut buffer = vec![0; LONGEST_FRAME];
    Ok(tap.receive(&mut buffer)?.map(|(length, offload)| {
        assert_eq!(offload, Offload::default());
        buffer[..length].to_vec()
    }))
}

/// Everything that can be read now.
fn read_some(peer: &mut UnixStream, most: usize) -> Vec<u8> {
    let mut buffer = vec![0; most];
    match peer.read(&mut buffer) {
        Ok(count) => buffer[..count].to_vec(),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Vec::new(),
        Err(error) => panic!("{error}"),
    }
}

fn lengths() -> impl Strategy<Value = Vec<usize>> {
    let length =
        prop_oneof![4 => 1..200usize, 2 => 1400..1515usize, 1 => 1..=LONGEST_FRAME, 1 => Just(LONGEST_FRAME)];
    prop::collection::vec(length, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// However the bytes are cut, the frames that come out are those that went in.
    #[test]
    fn frames_survive_any_fragmentation(lengths in lengths(), cuts in prop::collection::vec(1..40_000usize, 1..40)) {
        let (mut tap, mut peer) = pair();
        let frames: Vec<_> = lengths.iter().enumerate().map(|(n, &length)| frame(length, n)).collect();
        let bytes: Vec<_> = frames.iter().flat_map(|frame| framed(frame)).collect();
        let mut left = bytes.as_slice();
        let mut cuts = cuts.iter().cycle();
        let mut seen = Vec::new();
        while seen.len() < frames.len() {
            let cut = (*cuts.next().unwrap()).min(left.len());
            match peer.write(&left[..cut]) {
                Ok(count) => left = &left[count..],
                Err(error) => prop_assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            }
            tap.acknowledge();
            while let Some(frame) = receive(&mut tap).unwrap() {
                seen.push(frame);
            }
        }
        prop_assert!(left.is_empty());
        prop_assert!(seen == frames);
        prop_assert_eq!(receive(&mut tap).unwrap(), None);
        prop_assert!(!is_ready(&tap));
    }

    /// However slowly the peer reads, it gets every frame that was taken, whole and in order; what was not taken can be
    /// sent when the link is ready again.
    #[test]
    fn frames_survive_any_reader(lengths in lengths(), reads in prop::collection::vec(1..100_000usize, 1..40), split in 0..100usize) {
        let (mut tap, mut peer) = pair();
        let frames: Vec<_> = lengths.iter().enumerate().map(|(n, &length)| frame(length, n)).collect();
        let expected: Vec<_> = frames.iter().flat_map(|frame| framed(frame)).collect();
        let mut got = Vec::new();
        let mut next = 0;
        let mut full = false;
        for most in reads.iter().cycle() {
            while next < frames.len() && !full {
                let frame = &frames[next];
                let (header, payload) = frame.split_at(split.min(frame.len()));
                match tap.send(header, payload, Offload::default()).unwrap() {
                    Sent::Yes => next += 1,
                    Sent::Full => full = true,
                }
            }
            tap.flush().unwrap();
            got.extend(read_some(&mut peer, *most));
            if is_ready(&tap) {
                tap.acknowledge();
                full = false;
            }
            if got.len() == expected.len() {
                break;
            }
        }
        prop_assert_eq!(next, frames.len());
        prop_assert!(got == expected);
    }
}

#[test]
fn short_frames_wait_for_the_flush() {
    let (mut tap, mut peer) = pair();
    for n in 0..3 {
        assert_eq!(tap.send(&frame(14, n), &frame(40, n), Offload::default()).unwrap(), Sent::Yes);
    }
    assert_eq!(read_some(&mut peer, 1000), b"");
    tap.flush().unwrap();
    assert_eq!(read_some(&mut peer, 1000).len(), 3 * (4 + 14 + 40), "all of them in one piece");
}

#[test]
fn a_full_link_is_bounded_and_becomes_ready() {
    let (mut tap, mut peer) = pair();
    let payload = frame(60_000, 1);
    let mut taken = 0;
    while tap.send(&[0; 14], &payload, Offload::default()).unwrap() == Sent::Yes {
        taken += 1;
        assert!(taken < 1000, "a socket that never is full");
    }
    assert!(!is_ready(&tap));
    assert_eq!(tap.send(&[0; 14], &[], Offload::default()).unwrap(), Sent::Full, "nothing overtakes");
    let mut got = Vec::new();
    while !is_ready(&tap) {
        let some = read_some(&mut peer, 10_000);
        assert!(!some.is_empty(), "all was read and the link is not ready");
        got.extend(some);
    }
    tap.acknowledge();
    assert_eq!(tap.send(&[0; 14], &[], Offload::default()).unwrap(), Sent::Yes);
    tap.flush().unwrap();
    loop {
        let some = read_some(&mut peer, 100_000);
        if some.is_empty() && !is_ready(&tap) {
            break;
        }
        got.extend(some);
        tap.acknowledge();
        tap.flush().unwrap();
    }
    assert_eq!(got.len(), taken * (4 + 14 + payload.len()) + 4 + 14);
}

#[test]
fn lengths_that_lie_end_the_link() {
    for length in [0, LONGEST_FRAME as u32 + 1, u32::MAX] {
        let (mut tap, mut peer) = pair();
        peer.write_all(&framed(b"good")).unwrap();
        peer.write_all(&length.to_be_bytes()).unwrap();
        peer.write_all(&[0; 100]).unwrap();
        assert_eq!(receive(&mut tap).unwrap().unwrap(), b"good");
        let error = receive(&mut tap).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert!(error.to_string().contains(&length.to_string()), "{error}");
    }
}

#[test]
fn a_peer_that_leaves_is_noticed_after_its_last_frame() {
    let (mut tap, mut peer) = pair();
    peer.write_all(&framed(b"last")).unwrap();
    peer.write_all(&[0, 0]).unwrap();
    drop(peer);
    assert!(is_ready(&tap));
    tap.acknowledge();
    assert_eq!(receive(&mut tap).unwrap().unwrap(), b"last");
    assert_eq!(receive(&mut tap).unwrap(), None);
    assert_eq!(receive(&mut tap).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
}

/// A link that listens, and where.
fn listening(clients: Clients) -> (Stream, impl Fn() -> UnixStream) {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
    let tap = Stream::listening(listener.into(), clients, MTU).unwrap();
    let connect = move || {
        let stream = UnixStream::connect(dir.path().join("socket")).unwrap();
        stream.set_nonblocking(true).unwrap();
        stream
    };
    (tap, connect)
}

#[test]
fn without_a_client_frames_are_lost_and_the_next_one_gets_only_its_own() {
    let (mut tap, connect) = listening(Clients::OneAfterTheOther);
    assert!(!is_ready(&tap));
    assert_eq!(receive(&mut tap).unwrap(), None);
    assert_eq!(tap.send(b"nobody", b"", Offload::default()).unwrap(), Sent::Yes);
    tap.flush().unwrap();
    for round in [b"1".as_slice(), b"2"] {
        let mut client = connect();
        assert!(is_ready(&tap));
        tap.acknowledge();
        client.write_all(&framed(round)).unwrap();
        assert_eq!(receive(&mut tap).unwrap().unwrap(), round);
        assert_eq!(tap.send(round, b"", Offload::default()).unwrap(), Sent::Yes);
        tap.flush().unwrap();
        assert_eq!(read_some(&mut client, 100), framed(round));
        // Half a frame, which the next client must not be taken to go on with.
        client.write_all(&framed(b"half")[..6]).unwrap();
        drop(client);
        assert!(is_ready(&tap));
        tap.acknowledge();
        while receive(&mut tap).unwrap().is_some() {}
        while tap.client.is_some() {
            assert_eq!(receive(&mut tap).unwrap(), None);
        }
        assert!(!is_ready(&tap));
    }
}

#[test]
fn a_second_client_is_turned_away_unless_the_first_has_gone() {
    let (mut tap, connect) = listening(Clients::OneAfterTheOther);
    let mut first = connect();
    tap.acknowledge();
    let mut second = connect();
    tap.acknowledge();
    second.set_nonblocking(false).unwrap();
    assert_eq!(second.read(&mut [0; 10]).unwrap(), 0, "it is disconnected");
    first.write_all(&framed(b"first")).unwrap();
    assert_eq!(receive(&mut tap).unwrap().unwrap(), b"first");
    drop(first);
    // Both are noticed at once.
    let mut third = connect();
    tap.acknowledge();
    third.write_all(&framed(b"third")).unwrap();
    assert_eq!(receive(&mut tap).unwrap().unwrap(), b"third");
}

#[test]
fn a_client_that_lies_makes_room_for_the_next() {
    let (mut tap, connect) = listening(Clients::OneAfterTheOther);
    let mut liar = connect();
    tap.acknowledge();
    liar.write_all(&u32::MAX.to_be_bytes()).unwrap();
    assert_eq!(receive(&mut tap).unwrap(), None);
    liar.set_nonblocking(false).unwrap();
    assert_eq!(liar.read(&mut [0; 10]).unwrap(), 0, "it is disconnected");
    let mut honest = connect();
    tap.acknowledge();
    honest.write_all(&framed(b"honest")).unwrap();
    assert_eq!(receive(&mut tap).unwrap().unwrap(), b"honest");
}

#[test]
fn a_client_that_leaves_while_the_link_is_full_frees_it() {
    let (mut tap, connect) = listening(Clients::OneAfterTheOther);
    let client = connect();
    tap.acknowledge();
    while tap.send(&[0; 14], &[0; 50_000], Offload::default()).unwrap() == Sent::Yes {}
    assert!(!is_ready(&tap));
    drop(client);
    assert!(is_ready(&tap), "or the engine would never try again");
    tap.acknowledge();
    assert_eq!(tap.send(&[0; 14], &[], Offload::default()).unwrap(), Sent::Yes);
}

#[test]
fn the_only_client_takes_the_link_with_it() {
    let (mut tap, connect) = listening(Clients::One);
    let client = connect();
    tap.acknowledge();
    drop(client);
    assert_eq!(receive(&mut tap).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
}

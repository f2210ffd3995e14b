//! How messages are cut out of what a socket brings.

use std::fs::File;
use std::io::{IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rustix::fs::fstat;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use zerocopy::IntoBytes;

use super::{memfd, noise};
use crate::user::transport::{Broken, Message, Socket};
use crate::user::version::MAX_FDS;
use crate::user::wire::{Command, Header};

/// Longer than a test takes that does not hang.
const LONG: Duration = Duration::from_secs(60);

fn pair() -> (UnixStream, Socket) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (ours, Socket::new(theirs.into(), LONG))
}

fn message(id: u16, payload: &[u8]) -> Vec<u8> {
    let header = Header::command(id, Command::RegionWrite, payload.len(), true);
    [header.as_bytes(), payload].concat()
}

fn send(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2 * MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(fds)));
    let sent = sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::empty());
    assert_eq!(sent, Ok(bytes.len()));
}

/// What has come already.
fn receive(socket: &Socket) -> Result<Option<Message>, Broken> {
    socket.receive(Some(Instant::now()), LONG)
}

/// Which files came with it.
fn inodes(message: &Message) -> Vec<u64> {
    message.fds.iter().map(|fd| fstat(fd).unwrap().st_ino).collect()
}

#[test]
fn descriptors_belong_to_the_message_they_were_sent_with() {
    let (peer, socket) = pair();
    let files: Vec<File> = (1..5).map(|pages| memfd(pages << 12)).collect();
    let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    let numbers: Vec<_> = files.iter().map(|file| fstat(file).unwrap().st_ino).collect();
    // All of it has come before the first message is taken. The payloads of some are longer than is read ahead.
    let sent: [(usize, &[usize]); 9] = [
        (4, &[]),
        (4, &[0]),
        (0, &[]),
        (9000, &[1, 2]),
        (5000, &[]),
        (0, &[3]),
        (7, &[0, 1]),
        (0, &[]),
        (1, &[2]),
    ];
    for (id, (length, with)) in (0..).zip(sent) {
        let with: Vec<_> = with.iter().map(|file| fds[*file]).collect();
        send(&peer, &message(id, &noise(id.into(), length)), &with);
    }
    for (id, (length, with)) in (0..).zip(sent) {
        let came = receive(&socket).unwrap().unwrap();
        assert_eq!((came.header.id, came.payload == noise(id.into(), length)), (id, true));
        let with: Vec<_> = with.iter().map(|file| numbers[*file]).collect();
        assert_eq!(inodes(&came), with, "message {id}");
    }
    assert!(matches!(receive(&socket), Ok(None)));
}

#[test]
fn descriptors_of_a_message_that_comes_in_pieces() {
    let (peer, socket) = pair();
    let file = memfd(4096);
    let number = fstat(&file).unwrap().st_ino;
    let bytes = [message(1, &[1; 40]), message(2, &[2; 40]), message(3, &[])].concat();
    // The first piece ends in the second message's header, and the rest brings a descriptor for the last message.
    send(&peer, &bytes[..60], &[file.as_fd()]);
    let first = receive(&socket).unwrap().unwrap();
    assert_eq!((first.header.id, inodes(&first)), (1, vec![]));
    send(&peer, &bytes[60..], &[file.as_fd(), file.as_fd()]);
    let second = receive(&socket).unwrap().unwrap();
    assert_eq!((second.header.id, inodes(&second)), (2, vec![number]));
    let third = receive(&socket).unwrap().unwrap();
    assert_eq!((third.header.id, inodes(&third)), (3, vec![number, number]));
}

#[test]
fn too_many_descriptors_end_the_connection() {
    let file = memfd(4096);
    // In one piece, which the room for them cuts off; and in several of one message.
    let (peer, socket) = pair();
    send(&peer, &message(1, &[]), &[file.as_fd(); MAX_FDS + 1]);
    assert!(matches!(receive(&socket), Err(Broken::Protocol(_))));
    for last in [1, 0] {
        let (peer, socket) = pair();
        let bytes = message(1, &[0; 20]);
        send(&peer, &bytes[..10], &[file.as_fd(); MAX_FDS]);
        send(&peer, &bytes[10..], &[file.as_fd(); 1][..last]);
        assert_eq!(receive(&socket).is_err(), last == 1);
    }
}

#[test]
fn a_wait_ends_at_its_time_whatever_the_socket_waits() {
    // The socket's own time is much longer, and much shorter, than there is to wait.
    for pace in [LONG, Duration::from_millis(1)] {
        let (peer, theirs) = UnixStream::pair().unwrap();
        let socket = Socket::new(theirs.into(), pace);
        let until = Instant::now() + Duration::from_millis(20);
        assert!(matches!(socket.receive(Some(until), LONG), Ok(None)));
        assert!(Instant::now() >= until);
        // A message that does not go on is another thing.
        (&peer).write_all(&[0; 5]).unwrap();
        let begun = socket.receive(Some(Instant::now() + LONG), Duration::from_millis(1));
        assert!(matches!(begun, Err(Broken::TimedOut)));
    }
}

#[test]
fn a_socket_that_does_not_wait_is_waited_for() {
    let (peer, theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    let socket = Socket::new(theirs.into(), LONG);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| socket.receive(None, LONG));
        send(&peer, &message(7, &[1, 2, 3]), &[]);
        assert_eq!(reader.join().unwrap().unwrap().unwrap().payload, [1, 2, 3]);
        let reader = scope.spawn(|| socket.receive(None, LONG));
        drop(peer);
        assert!(matches!(reader.join().unwrap(), Err(Broken::Closed)));
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn messages_survive_whatever_pieces_they_come_in(
        lengths in prop::collection::vec(prop_oneof![0usize..40, 0usize..9000], 1..12),
        pieces in prop::collection::vec(prop_oneof![1usize..30, 1usize..6000], 1..12),
    ) {
        let (peer, socket) = pair();
        let payloads: Vec<_> = (0..).zip(&lengths).map(|(seed, length)| noise(seed, *length)).collect();
        let bytes: Vec<u8> = (0..).zip(&payloads).flat_map(|(id, payload)| message(id, payload)).collect();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut rest = &*bytes;
                for piece in pieces.iter().cycle() {
                    let (now, later) = rest.split_at((*piece).min(rest.len()));
                    (&peer).write_all(now).unwrap();
                    rest = later;
                    if rest.is_empty() {
                        break;
                    }
                }
            });
            for (id, payload) in (0..).zip(&payloads) {
                let came = socket.receive(None, LONG).unwrap().unwrap();
                assert_eq!(came.header.id, id);
                assert!(came.payload == *payload);
            }
        });
    }
}

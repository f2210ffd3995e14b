//! Datagrams that a socket gives by one call: recvmmsg(2).
//!
//! One call for many costs less than one for each, and one call that gives fewer than it was asked for shows that the socket
//! is empty. But preparing for many costs something too, and who has taken datagrams has to put them somewhere. So
//! each socket is asked for as many as it may be expected to have ([`Appetite`]).

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{MsgFlags, RecvMmsgData, SockaddrStorage, recvmmsg};

use super::{CONTROL, Received, received};
use crate::packet::Datagrams;

/// Datagrams that one call takes at most.
const MOST: usize = 32;

/// The longest datagram that a socket can hold, or the longest packet that the kernel puts several together in.
const LONGEST: usize = 65535;

/// How many datagrams a socket is asked for: two, so that one alone is known to be the last, and twice as many as the
/// last time after it had all of those. Where the kernel puts datagrams together, each may be many, and is asked for alone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Appetite(usize);

impl Appetite {
    const FEW: usize = 2;

    /// How many to ask for.
    fn asked(self) -> usize {
        self.0
    }

    /// `taken` came, several in one of them if `together`.
    fn note(&mut self, taken: usize, together: bool) {
        self.0 = match taken {
            _ if together => 1,
            taken if taken >= self.0 => (2 * self.0).min(MOST),
            _ => Self::FEW,
        };
    }
}

impl Default for Appetite {
    fn default() -> Self {
        Self(Self::FEW)
    }
}

/// Where datagrams are taken to.
#[derive(Debug)]
pub(crate) struct Inbox {
    /// Room for the longest datagram so often. What was never written to takes no memory.
    bytes: Vec<u8>,
    /// Room for the control messages of each.
    control: Vec<Vec<u8>>,
    /// What is known of each; nothing if nobody sent it.
    taken: Vec<Option<Received>>,
}

impl Inbox {
    pub(crate) fn new() -> Self {
        Self {
            bytes: vec![0; MOST * LONGEST],
            control: (0..MOST).map(|_| Vec::with_capacity(CONTROL)).collect(),
            taken: Vec::with_capacity(MOST),
        }
    }

    /// Takes the next datagrams of a socket, in place of those that are here. Whether there may be more.
    ///
    /// # Errors
    /// As [`super::receive`]; one that follows some datagrams is kept by the kernel for the next call.
    pub(crate) fn receive(&mut self, fd: &OwnedFd, appetite: &mut Appetite) -> io::Result<bool> {
        self.taken.clear();
        let asked = appetite.asked();
        let rooms = self.bytes.chunks_exact_mut(LONGEST).zip(&mut self.control).take(asked);
        let mut rooms: Vec<_> = rooms
            .map(|(room, control)| RecvMmsgData { iov: [IoSliceMut::new(room)], cmsg_buffer: Some(control) })
            .collect();
        // syscalls: recvmmsg
        let messages =
            recvmmsg::<_, SockaddrStorage>(fd.as_raw_fd(), rooms.iter_mut(), MsgFlags::MSG_DONTWAIT, None)?;
        self.taken.extend(messages.iter().map(received));
        let together = self.taken.iter().flatten().any(|received| received.segment.is_some());
        appetite.note(self.taken.len(), together);
        Ok(self.taken.len() >= asked)
    }

    /// How many datagrams were taken.
    pub(crate) fn count(&self) -> usize {
        self.taken().map(|(_, datagrams)| datagrams.count()).sum()
    }

    /// What was taken: where from, and the payloads.
    pub(crate) fn taken(&self) -> impl Iterator<Item = (&Received, Datagrams<'_>)> {
        self.taken
            .iter()
            .zip(self.bytes.chunks_exact(LONGEST))
            .filter_map(|(received, room)| received.as_ref().map(|it| (it, it.datagrams(room))))
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    #[test]
    fn a_socket_is_asked_for_as_many_as_it_may_have() {
        let mut appetite = Appetite::default();
        let mut asked = Vec::new();
        // All that was asked for, six times; one; one that is many; all of one; nothing.
        for (taken, together) in [
            (2, false),
            (4, false),
            (8, false),
            (16, false),
            (32, false),
            (32, false),
            (1, false),
            (1, true),
            (1, false),
            (0, false),
        ] {
            asked.push(appetite.asked());
            appetite.note(taken, together);
        }
        assert_eq!(asked, [2, 4, 8, 16, 32, 32, 32, 2, 1, 2]);
        assert_eq!(appetite, Appetite::default());
    }

    #[test]
    fn each_datagram_is_told_apart_and_the_last_is_known() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let peers = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
        let to = socket.local_addr().unwrap();
        for number in 0..5u8 {
            peers[usize::from(number % 2)].send_to(&vec![number; number.into()], to).unwrap();
        }
        let (mut inbox, mut appetite) = (Inbox::new(), Appetite::default());
        let fd = OwnedFd::from(socket);
        let mut got = Vec::new();
        let mut more = true;
        while more {
            more = inbox.receive(&fd, &mut appetite).unwrap();
            let datagrams = inbox.taken().flat_map(|(received, datagrams)| {
                datagrams.each().map(|bytes| (received.peer, bytes.to_vec()))
            });
            got.extend(datagrams);
        }
        let expected: Vec<_> = (0..5u8)
            .map(|number| (peers[usize::from(number % 2)].local_addr().unwrap(), vec![number; number.into()]))
            .collect();
        assert_eq!(got, expected);
        // Two, and three of four.
        assert_eq!(inbox.count(), 3);
        assert_eq!(inbox.receive(&fd, &mut appetite).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert_eq!(inbox.count(), 0);
    }
}

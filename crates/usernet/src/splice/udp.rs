//! Spliced UDP: datagrams from a listening socket on one side to a socket on the other, and back.
//!
//! A flow is one peer's datagrams to one address. On the far side it has a socket that is connected to the target. On the
//! near side, where the peer is, answers have to come from the address that the peer has sent to: if possible by a second
//! socket, bound to that address and connected to the peer, to which the kernel then gives what else the peer sends;
//! otherwise (the port may be one that this process could not bind again) by the listening socket.
//!
//! **Errors.** A target that refuses is noted: what refused is the host's kernel, and the flow goes on, in case somebody
//! listens there later. The peer cannot be told. ICMP for a port is sent by the kernel alone, when no socket has that
//! port; here one does.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, bind, connect, recv, send, sockopt};

use crate::claims::Claims;
use crate::config::Transport;
use crate::flow::{Class, FlowTable, Patience};
use crate::poller::{Poller, Token};
use crate::socket;

use super::sockets::{Kind, Sockets};
use super::{Side, Sides};

/// How long flows may be idle, as [`crate::udp`] has it.
const PATIENCE: Patience = [Duration::from_secs(30), Duration::from_secs(180)];
/// Datagrams taken from one socket before others have their turn.
const QUANTUM: usize = 64;
/// The longest datagram that a socket can hold.
const LONGEST: usize = 65535;

/// Datagrams to a socket that was bound and not yet connected: those kept at most.
const MOST_STRAY: usize = 64;

/// A datagram that came to such a socket, and from whom.
type Stray = (SocketAddr, Vec<u8>);

/// What a flow is known by.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Key {
    /// Where the peer is.
    side: Side,
    peer: SocketAddr,
    /// The address that it sends to.
    local: SocketAddr,
}

/// A datagram that a listening socket took.
#[derive(Debug)]
pub(super) struct Arrival {
    pub(super) side: Side,
    pub(super) listener: Arc<OwnedFd>,
    /// Who sent it.
    pub(super) peer: SocketAddr,
    /// What it was sent to.
    pub(super) local: SocketAddr,
    /// Where it is to go, on the other side.
    pub(super) target: SocketAddr,
}

#[derive(Debug)]
struct Flow {
    /// Connected to the target.
    far: OwnedFd,
    /// Connected to the peer, if that could be.
    near: Option<OwnedFd>,
    listener: Weak<OwnedFd>,
    queued: [bool; 2],
}

/// The two sockets of a flow.
const NEAR: usize = 0;
const FAR: usize = 1;

/// All spliced UDP flows.
#[derive(Debug)]
pub(super) struct Udp {
    flows: FlowTable<Key, Flow>,
    /// Sockets that may have something: of which flow, and which of its two.
    work: VecDeque<(u32, usize)>,
    buffer: Vec<u8>,
    refused: u64,
    lost: u64,
}

impl Udp {
    /// With room for so many flows.
    pub(super) fn new(most: usize) -> Self {
        Self {
            flows: FlowTable::new(most, PATIENCE, Claims::alone()),
            work: VecDeque::new(),
            buffer: vec![0; LONGEST],
            refused: 0,
            lost: 0,
        }
    }

    /// How many flows there are.
    pub(super) fn len(&self) -> usize {
        self.flows.len()
    }

    /// How many datagrams nobody took at their target.
    pub(super) fn refused(&self) -> u64 {
        self.refused
    }

    /// How many datagrams were lost because a socket was full.
    pub(super) fn lost(&self) -> u64 {
        self.lost
    }

    /// Whether sockets are to be read.
    pub(super) fn has_work(&self) -> bool {
        !self.work.is_empty()
    }

    /// Passes on a datagram that a listening socket took.
    ///
    /// # Errors
    /// There is no flow for it and none can be made: no descriptors, or no way to the target.
    pub(super) fn arrived(
        &mut self,
        poller: &Poller,
        sides: &Sides,
        arrival: Arrival,
        payload: &[u8],
        now: Instant,
    ) -> io::Result<()> {
        let mut strays = self.pass(poller, sides, &arrival, payload, now)?;
        let mut arrival = arrival;
        for _ in 0..MOST_STRAY {
            let Some((peer, payload)) = strays.pop_front() else { break };
            arrival.peer = peer;
            strays.extend(self.pass(poller, sides, &arrival, &payload, now)?);
        }
        Ok(())
    }

    /// Passes on one datagram. Returns what others have sent meanwhile to where its flow's socket was bound.
    fn pass(
        &mut self,
        poller: &Poller,
        sides: &Sides,
        arrival: &Arrival,
        payload: &[u8],
        now: Instant,
    ) -> io::Result<VecDeque<Stray>> {
        let key = Key { side: arrival.side, peer: arrival.peer, local: arrival.local };
        let mut strays = VecDeque::new();
        let number = match self.flows.find(&key) {
            Some(number) => number,
            None => {
                let mut opened = self.open(poller, sides, key, arrival, now);
                if let Err(error) = &opened
                    && crate::udp::is_exhausted(error)
                    && self.flows.remove_oldest().is_some()
                {
                    opened = self.open(poller, sides, key, arrival, now);
                }
                let number = opened?;
                if let Some((_, Flow { near: Some(near), .. })) = self.flows.get_mut(number) {
                    while strays.len() < MOST_STRAY
                        && let Ok(received) = socket::receive(near, &mut self.buffer)
                    {
                        let payload = self.buffer.get(..received.length).unwrap_or_default();
                        strays.push_back((received.peer, payload.to_vec()));
                    }
                }
                number
            }
        };
        let class = self.flows.class(number).unwrap_or(Class::OneWay);
        self.flows.touch(number, class, now);
        if let Some((_, flow)) = self.flows.get_mut(number) {
            let sent = flow.send(FAR, key, payload);
            self.count(sent);
        }
        Ok(strays)
    }

    fn open(
        &mut self,
        poller: &Poller,
        sides: &Sides,
        key: Key,
        arrival: &Arrival,
        now: Instant,
    ) -> io::Result<u32> {
        let far = sides[key.side.other()].socket(Kind::of(Transport::Udp, arrival.target))?;
        // syscalls(pasta): connect
        connect(&far, &arrival.target)?;
        let near = connected_beside(&*sides[key.side], &arrival.listener, arrival.local, arrival.peer);
        let listener = Arc::downgrade(&arrival.listener);
        let flow = Flow { far, near, listener, queued: [false; 2] };
        // A table alone refuses no key.
        let Some((number, _)) = self.flows.insert(key, flow, now) else {
            return Err(io::ErrorKind::AddrInUse.into());
        };
        let Some((_, flow)) = self.flows.get_mut(number) else { return Ok(number) };
        let watch = |fd: &OwnedFd, which: usize| {
            poller.add(fd, Token::Udp(number << 1 | which as u32), EventFlags::IN | EventFlags::ET)
        };
        let watched =
            watch(&flow.far, FAR).and_then(|()| flow.near.as_ref().map_or(Ok(()), |fd| watch(fd, NEAR)));
        if let Err(error) = watched {
            self.flows.remove(number);
            return Err(error);
        }
        Ok(number)
    }

    /// A flow's socket has something.
    pub(super) fn ready(&mut self, token: u32) {
        let (number, which) = (token >> 1, (token & 1) as usize);
        let Some((_, flow)) = self.flows.get_mut(number) else { return };
        if !std::mem::replace(&mut flow.queued[which], true) {
            self.work.push_back((number, which));
        }
    }

    /// Lets each socket that has something give some of it.
    pub(super) fn turn(&mut self, now: Instant) {
        for _ in 0..self.work.len() {
            let Some((number, which)) = self.work.pop_front() else { return };
            if self.drain(number, which, now) {
                if let Some((_, flow)) = self.flows.get_mut(number) {
                    flow.queued[which] = false;
                }
            } else {
                self.work.push_back((number, which));
            }
        }
    }

    /// Takes some datagrams; whether it took all.
    fn drain(&mut self, number: u32, which: usize, now: Instant) -> bool {
        for _ in 0..QUANTUM {
            let Some((key, flow)) = self.flows.get_mut(number) else { return true };
            let fd = match which {
                FAR => &flow.far,
                _ => match &flow.near {
                    Some(fd) => fd,
                    None => return true,
                },
            };
            // syscalls(pasta): recvfrom
            match recv(fd, &mut self.buffer[..], RecvFlags::DONTWAIT) {
                Ok((length, _)) => {
                    let payload = self.buffer.get(..length).unwrap_or_default();
                    let sent = flow.send(1 - which, key, payload);
                    self.count(sent);
                    let class = match which {
                        FAR => Class::BothWays,
                        _ => self.flows.class(number).unwrap_or(Class::OneWay),
                    };
                    self.flows.touch(number, class, now);
                }
                Err(Errno::AGAIN) => return true,
                Err(Errno::CONNREFUSED) => self.refused += u64::from(which == FAR),
                // The error of a datagram that was sent before.
                Err(_) => {}
            }
        }
        false
    }

    /// Ends the flows that came by sockets that no longer listen.
    pub(super) fn forget_closed(&mut self) {
        self.flows.remove_if(|_, flow| flow.listener.strong_count() == 0);
    }

    /// Ends flows whose time is over, and says when the next one's is.
    pub(super) fn timers(&mut self, now: Instant) -> Option<Instant> {
        while self.flows.remove_expired(now).is_some() {}
        self.flows.deadline()
    }

    fn count(&mut self, sent: io::Result<()>) {
        match sent.map_err(|error| Errno::from_io_error(&error)) {
            Ok(()) => {}
            Err(Some(Errno::CONNREFUSED)) => self.refused += 1,
            Err(_) => self.lost += 1,
        }
    }
}

impl Flow {
    fn send(&self, which: usize, key: Key, payload: &[u8]) -> io::Result<()> {
        let fd = if which == FAR { Some(&self.far) } else { self.near.as_ref() };
        let once = || -> io::Result<usize> {
            if let Some(fd) = fd {
                // syscalls(pasta): sendto
                return Ok(send(fd, payload, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?);
            }
            let listener = self.listener.upgrade().ok_or(io::ErrorKind::BrokenPipe)?;
            socket::send(&listener, payload, None, Some(key.local.ip()), Some(key.peer))
        };
        match once() {
            // The refusal of an earlier datagram, which took this one's place.
            Err(error) if Errno::from_io_error(&error) == Some(Errno::CONNREFUSED) => once().map(drop),
            result => result.map(drop),
        }
    }
}

/// A socket from `local` to `peer`, while `listener` has `local`'s port.
///
/// Two sockets may have a port if both say so (SO_REUSEADDR) when the second is bound. The listening one says so
/// just then, so that nobody else gets a part of what is sent to it.
fn connected_beside(
    side: &dyn Sockets,
    listener: &OwnedFd,
    local: SocketAddr,
    peer: SocketAddr,
) -> Option<OwnedFd> {
    // What the kernel calls an IPv4 address in a socket of IPv6, a socket of IPv4 has too.
    let canonical = |address: SocketAddr| -> SocketAddr {
        let ip: IpAddr = address.ip().to_canonical();
        if ip == address.ip() { address } else { SocketAddr::new(ip, address.port()) }
    };
    let (local, peer) = (canonical(local), canonical(peer));
    let fd = side.socket(Kind::of(Transport::Udp, local)).ok()?;
    // Of several engines' listening sockets this is one: the others have said so for good.
    if sockopt::socket_reuseport(listener).ok()? {
        sockopt::set_socket_reuseport(&fd, true).ok()?;
    }
    sockopt::set_socket_reuseaddr(&fd, true).ok()?;
    sockopt::set_socket_reuseaddr(listener, true).ok()?;
    // syscalls(pasta): bind connect setsockopt getsockopt
    let bound = bind(&fd, &local);
    // Refused by no socket.
    let _ = sockopt::set_socket_reuseaddr(listener, false);
    bound.ok()?;
    connect(&fd, &peer).ok()?;
    Some(fd)
}

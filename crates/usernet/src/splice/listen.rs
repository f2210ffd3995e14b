//! The splicer's own listening sockets.

use std::collections::HashSet;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{SocketFlags, acceptfrom_with, getsockname};

use crate::config::Transport;
use crate::forward;
use crate::poller::{Poller, Token};
use crate::slots::Slots;
use crate::socket;

use super::udp::Arrival;
use super::{Forward, Side, Sides, is_loopback};

#[derive(Debug)]
struct Listener {
    socket: Arc<OwnedFd>,
    forward: Forward,
    /// Whether it is among those that have something.
    queued: bool,
}

/// What came to a listening socket.
#[derive(Debug)]
pub(super) enum Taken {
    /// No more for now.
    Nothing,
    /// Something that is not for the bypass.
    Stranger,
    Connection {
        from: Side,
        socket: OwnedFd,
        target: SocketAddr,
    },
    /// A datagram, of which the buffer has so much.
    Datagram {
        arrival: Arrival,
        length: usize,
    },
}

/// All of the splicer's listening sockets.
#[derive(Default, Debug)]
pub(super) struct Listeners {
    slots: Slots<Listener>,
    /// What they listen for.
    forwards: HashSet<Forward>,
    /// Those that may have something.
    queue: Vec<u32>,
}

impl Listeners {
    /// Listens for `forward`. Returns it with the port if the kernel was to choose that.
    ///
    /// # Errors
    /// It cannot, or does already; the error names the address.
    pub(super) fn add(&mut self, poller: &Poller, sides: &Sides, forward: Forward) -> io::Result<Forward> {
        let named = |error: io::Error| {
            let Forward { listen, from, transport, .. } = &forward;
            let place = match from {
                Side::Host => "the host",
                Side::Guest => "the namespace",
            };
            io::Error::new(
                forward::kind(&error),
                format!("cannot listen on {transport} {listen} in {place}: {error}"),
            )
        };
        if self.forwards.contains(&forward) {
            return Err(named(io::ErrorKind::AlreadyExists.into()));
        }
        let bound = sides[forward.from]
            .bind(forward.transport, forward.listen, forward.interface.as_deref())
            // syscalls(pasta): getsockname
            .and_then(|socket| Ok((SocketAddr::try_from(getsockname(&socket)?)?, socket)));
        let (listen, socket) = bound.map_err(named)?;
        let number = self.slots.next_number();
        let token = match forward.transport {
            Transport::Tcp => Token::TcpListener(number),
            Transport::Udp => Token::UdpListener(number),
        };
        // Changes only: when descriptors run out, what cannot be accepted must not wake us without end.
        poller.add(&socket, token, EventFlags::IN | EventFlags::ET)?;
        let forward = Forward { listen, ..forward };
        self.forwards.insert(forward.clone());
        self.slots.insert(Listener { socket: Arc::new(socket), forward: forward.clone(), queued: false });
        Ok(forward)
    }

    /// Stops to listen. Whether it did.
    pub(super) fn remove(&mut self, forward: &Forward) -> bool {
        self.forwards.remove(forward) && self.slots.remove(|listener| listener.forward == *forward).is_some()
    }

    /// What is listened for.
    pub(super) fn forwards(&self) -> Vec<Forward> {
        self.slots.iter().map(|listener| listener.forward.clone()).collect()
    }

    /// Listener `number` has something.
    pub(super) fn ready(&mut self, number: u32) {
        if let Some(listener) = self.slots.get_mut(number)
            && !std::mem::replace(&mut listener.queued, true)
        {
            self.queue.push(number);
        }
    }

    /// Whether there is something to take.
    pub(super) fn has_work(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Those that are to be asked at `now`.
    pub(super) fn turn(&mut self, now: Instant) -> Vec<u32> {
        while let Some(number) = self.slots.due(now) {
            self.ready(number);
        }
        let queue = std::mem::take(&mut self.queue);
        for number in &queue {
            if let Some(listener) = self.slots.get_mut(*number) {
                listener.queued = false;
            }
        }
        queue
    }

    /// When the next listener is to be tried again.
    pub(super) fn next(&self) -> Option<Instant> {
        self.slots.next_due()
    }

    /// Takes one connection or datagram of listener `number`.
    ///
    /// # Errors
    /// When descriptors or memory are used up. It is tried again after a while.
    pub(super) fn take(&mut self, number: u32, buffer: &mut [u8], now: Instant) -> Result<Taken, Errno> {
        let Some(listener) = self.slots.get_mut(number) else { return Ok(Taken::Nothing) };
        match listener.forward.transport {
            Transport::Tcp => listener.accept().inspect_err(|_| self.slots.retry(number, now)),
            Transport::Udp => Ok(listener.receive(buffer)),
        }
    }
}

impl Listener {
    fn accept(&self) -> Result<Taken, Errno> {
        loop {
            // syscalls(pasta): accept4
            match acceptfrom_with(&self.socket, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
                Ok((socket, peer)) => {
                    let ends = peer.map(SocketAddr::try_from).zip(Some(getsockname(&socket)?.try_into()));
                    let Some((Ok(peer), Ok(local))) = ends else { continue };
                    if !is_loopback(peer, local) {
                        super::tcp::reset(socket);
                        return Ok(Taken::Stranger);
                    }
                    let target = self.forward.target(peer);
                    return Ok(Taken::Connection { from: self.forward.from, socket, target });
                }
                Err(Errno::AGAIN) => return Ok(Taken::Nothing),
                Err(error @ (Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM)) => {
                    return Err(error);
                }
                // The connection broke before it was accepted (accept(2)).
                Err(error) => tracing::debug!(%error, "not accepted"),
            }
        }
    }

    fn receive(&mut self, buffer: &mut [u8]) -> Taken {
        match socket::receive(&self.socket, buffer) {
            Ok(received) => {
                let local = received.local.unwrap_or_else(|| self.forward.listen.ip());
                let local = SocketAddr::new(local, self.forward.listen.port());
                if !is_loopback(received.peer, local) {
                    return Taken::Stranger;
                }
                let arrival = Arrival {
                    side: self.forward.from,
                    listener: self.socket.clone(),
                    peer: received.peer,
                    local,
                    target: self.forward.target(received.peer),
                };
                Taken::Datagram { arrival, length: received.length }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Taken::Nothing,
            // The error of a datagram that was sent before.
            Err(_) => Taken::Stranger,
        }
    }
}

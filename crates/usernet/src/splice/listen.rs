//! The splicer's own listening sockets.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{SocketFlags, acceptfrom_with, getsockname};

use crate::config::Transport;
use crate::poller::{Poller, Token};
use crate::socket;

use super::udp::Arrival;
use super::{Forward, Side, Sides, is_loopback};

/// How long to wait before accepting again where something was used up.
const RETRY: Duration = Duration::from_millis(100);

#[derive(Debug)]
struct Listener {
    socket: Arc<OwnedFd>,
    forward: Forward,
    /// Whether it is among those that have something.
    queued: bool,
    retry_at: Option<Instant>,
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
    slots: Vec<Option<Listener>>,
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
            let what = match forward.transport {
                Transport::Tcp => "TCP",
                Transport::Udp => "UDP",
            };
            let Forward { listen, from, .. } = &forward;
            let place = match from {
                Side::Host => "the host",
                Side::Guest => "the namespace",
            };
            io::Error::new(error.kind(), format!("cannot listen on {listen} ({what}) in {place}: {error}"))
        };
        if self.slots.iter().flatten().any(|listener| listener.forward == forward) {
            return Err(named(io::ErrorKind::AlreadyExists.into()));
        }
        let bound = sides[forward.from]
            .bind(forward.transport, forward.listen, forward.interface.as_deref())
            // syscalls(pasta): getsockname
            .and_then(|socket| Ok((SocketAddr::try_from(getsockname(&socket)?)?, socket)));
        let (listen, socket) = bound.map_err(named)?;
        let vacant = self.slots.iter().position(Option::is_none).unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        let number = vacant as u32;
        let token = match forward.transport {
            Transport::Tcp => Token::TcpListener(number),
            Transport::Udp => Token::UdpListener(number),
        };
        // Changes only: when descriptors run out, what cannot be accepted must not wake us without end.
        poller.add(&socket, token, EventFlags::IN | EventFlags::ET)?;
        let forward = Forward { listen, ..forward };
        self.slots[vacant] = Some(Listener {
            socket: Arc::new(socket),
            forward: forward.clone(),
            queued: false,
            retry_at: None,
        });
        Ok(forward)
    }

    /// Stops to listen. Whether it did.
    pub(super) fn remove(&mut self, forward: &Forward) -> bool {
        let slot = self.slots.iter_mut().find(|slot| slot.as_ref().is_some_and(|l| l.forward == *forward));
        slot.is_some_and(|slot| slot.take().is_some())
    }

    /// What is listened for.
    pub(super) fn forwards(&self) -> Vec<Forward> {
        self.slots.iter().flatten().map(|listener| listener.forward.clone()).collect()
    }

    /// Listener `number` has something.
    pub(super) fn ready(&mut self, number: u32) {
        if let Some(Some(listener)) = self.slots.get_mut(number as usize)
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
        let due = |slot: &mut Option<Listener>| {
            slot.as_mut().is_some_and(|listener| listener.retry_at.take_if(|at| *at <= now).is_some())
        };
        if self.next().is_some_and(|at| at <= now) {
            for number in 0..self.slots.len() {
                if due(&mut self.slots[number]) {
                    self.ready(number as u32);
                }
            }
        }
        let queue = std::mem::take(&mut self.queue);
        for number in &queue {
            if let Some(Some(listener)) = self.slots.get_mut(*number as usize) {
                listener.queued = false;
            }
        }
        queue
    }

    /// When the next listener is to be tried again.
    pub(super) fn next(&self) -> Option<Instant> {
        self.slots.iter().flatten().filter_map(|listener| listener.retry_at).min()
    }

    /// Takes one connection or datagram of listener `number`.
    ///
    /// # Errors
    /// When descriptors or memory are used up. It is tried again after a while.
    pub(super) fn take(&mut self, number: u32, buffer: &mut [u8], now: Instant) -> Result<Taken, Errno> {
        let Some(Some(listener)) = self.slots.get_mut(number as usize) else { return Ok(Taken::Nothing) };
        match listener.forward.transport {
            Transport::Tcp => listener.accept(now),
            Transport::Udp => Ok(listener.receive(buffer)),
        }
    }
}

impl Listener {
    fn accept(&mut self, now: Instant) -> Result<Taken, Errno> {
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
                    self.retry_at = Some(now + RETRY);
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

//! Ports of the host that lead into the guest.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Instant;

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, acceptfrom_with, listen, socket_with, sockopt};

use crate::config::{Forward, Transport};
use crate::context::Context;
use crate::poller::Token;
use crate::slots::Slots;
use crate::socket::bind_forward;

/// Connections that wait to be accepted, as the kernel's own default has it.
const BACKLOG: i32 = 4096;

/// A socket that listens.
struct Listener {
    socket: OwnedFd,
    forward: Forward,
}

/// A connection that was accepted.
pub(super) struct Accepted {
    pub(super) socket: OwnedFd,
    pub(super) peer: SocketAddr,
    pub(super) guest_address: Option<IpAddr>,
    pub(super) guest_port: u16,
}

/// All sockets that listen.
pub(super) struct Listeners {
    slots: Slots<Listener>,
    /// Whether other engines listen on the same ports: the kernel spreads the connections (SO_REUSEPORT).
    shares_ports: bool,
}

impl Listeners {
    pub(super) fn new(shares_ports: bool) -> Self {
        Self { slots: Slots::default(), shares_ports }
    }

    /// Listens for `forward`. Returns where, which tells the port if the kernel was to choose it.
    pub(super) fn add(&mut self, cx: &Context<'_>, forward: &Forward) -> io::Result<SocketAddr> {
        if forward.transport != Transport::Tcp {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let family = if forward.listen.is_ipv6() { AddressFamily::INET6 } else { AddressFamily::INET };
        let socket =
            socket_with(family, SocketType::STREAM, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC, None)?;
        // syscalls: setsockopt
        sockopt::set_socket_reuseaddr(&socket, true)?;
        sockopt::set_socket_reuseport(&socket, self.shares_ports)?;
        bind_forward(&socket, forward, cx.config.freebind)?;
        // syscalls: listen getsockname
        listen(&socket, BACKLOG)?;
        let bound = SocketAddr::try_from(rustix::net::getsockname(&socket)?)?;
        // Changes only: when descriptors run out, what cannot be accepted must not wake us without end.
        let token = Token::TcpListener(self.slots.next_number());
        cx.poller.add(&socket, token, EventFlags::IN | EventFlags::ET)?;
        self.slots.insert(Listener { socket, forward: Forward { listen: bound, ..forward.clone() } });
        Ok(bound)
    }

    /// Stops to listen. Connections that were accepted go on. Whether there was such a forward.
    pub(super) fn remove(&mut self, forward: &Forward) -> bool {
        self.slots.remove(|listener| listener.forward == *forward).is_some()
    }

    /// Accepts the next connection of listener `number`, if there is one.
    ///
    /// # Errors
    /// When descriptors or memory are used up. It is tried again after a while.
    pub(super) fn accept(&mut self, number: u32, now: Instant) -> Result<Option<Accepted>, Errno> {
        let Some(listener) = self.slots.get_mut(number) else { return Ok(None) };
        loop {
            // syscalls: accept4
            match acceptfrom_with(&listener.socket, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
                Ok((socket, peer)) => {
                    let Some(Ok(peer)) = peer.map(SocketAddr::try_from) else { continue };
                    let Forward { guest_address, guest_port, .. } = listener.forward;
                    return Ok(Some(Accepted { socket, peer, guest_address, guest_port }));
                }
                Err(Errno::AGAIN) => return Ok(None),
                Err(error @ (Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM)) => {
                    self.slots.retry(number, now);
                    return Err(error);
                }
                // The connection broke before it was accepted, or the network says something about it (accept(2)).
                Err(error) => tracing::debug!(%error, "not accepted"),
            }
        }
    }

    /// A listener that is to be tried again at `now`.
    pub(super) fn due(&mut self, now: Instant) -> Option<u32> {
        self.slots.due(now)
    }

    /// When the next listener is to be tried again.
    pub(super) fn next(&self) -> Option<Instant> {
        self.slots.next_due()
    }
}

//! Ports of the host that lead into the guest.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, acceptfrom_with, listen, socket_with, sockopt};

use crate::config::{Forward, Transport};
use crate::context::Context;
use crate::poller::Token;
use crate::socket::bind_forward;

/// Connections that wait to be accepted, as the kernel's own default has it.
const BACKLOG: i32 = 4096;
/// How long to wait before accepting again where something was used up.
const RETRY: Duration = Duration::from_millis(100);

/// A socket that listens.
struct Listener {
    socket: OwnedFd,
    forward: Forward,
    retry_at: Option<Instant>,
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
    slots: Vec<Option<Listener>>,
    /// Whether other engines listen on the same ports: the kernel spreads the connections (SO_REUSEPORT).
    shares_ports: bool,
}

impl Listeners {
    pub(super) fn new(shares_ports: bool) -> Self {
        Self { slots: Vec::new(), shares_ports }
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
        let vacant = self.slots.iter().position(Option::is_none).unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        // Changes only: when descriptors run out, what cannot be accepted must not wake us without end.
        cx.poller.add(&socket, Token::TcpListener(vacant as u32), EventFlags::IN | EventFlags::ET)?;
        self.slots[vacant] =
            Some(Listener { socket, forward: Forward { listen: bound, ..forward.clone() }, retry_at: None });
        Ok(bound)
    }

    /// Stops to listen. Connections that were accepted go on. Whether there was such a forward.
    pub(super) fn remove(&mut self, forward: &Forward) -> bool {
        let slot = self.slots.iter_mut().find(|slot| slot.as_ref().is_some_and(|l| l.forward == *forward));
        slot.is_some_and(|slot| slot.take().is_some())
    }

    /// Accepts the next connection of listener `number`, if there is one.
    ///
    /// # Errors
    /// When descriptors or memory are used up. It is tried again after a while.
    pub(super) fn accept(&mut self, number: u32, now: Instant) -> Result<Option<Accepted>, Errno> {
        let Some(Some(listener)) = self.slots.get_mut(number as usize) else { return Ok(None) };
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
                    listener.retry_at = Some(now + RETRY);
                    return Err(error);
                }
                // The connection broke before it was accepted, or the network says something about it (accept(2)).
                Err(error) => tracing::debug!(%error, "not accepted"),
            }
        }
    }

    /// A listener that is to be tried again at `now`.
    pub(super) fn due(&mut self, now: Instant) -> Option<u32> {
        let number = self.slots.iter_mut().position(|slot| {
            slot.as_mut().is_some_and(|listener| listener.retry_at.take_if(|at| *at <= now).is_some())
        })?;
        Some(number as u32)
    }

    /// When the next listener is to be tried again.
    pub(super) fn next(&self) -> Option<Instant> {
        self.slots.iter().flatten().filter_map(|listener| listener.retry_at).min()
    }
}

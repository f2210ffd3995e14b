//! How an engine hands over what does not need it.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{TrySendError, channel};

use super::sockets;
use super::udp::Arrival;
use super::{Command, Handle, Side, is_loopback, loopback_like};

/// What an engine asks about what comes to its forwarded ports, from the host's loopback to a loopback address: that goes
/// to the guest's sockets without a frame.
#[derive(Clone, Debug)]
pub struct Bypass {
    handle: Handle,
    to_loopback: bool,
}

impl Bypass {
    /// By this splicer. What comes leads to the guest's loopback if `to_loopback`, else to the address that it would
    /// have by frames.
    #[must_use]
    pub fn new(handle: Handle, to_loopback: bool) -> Self {
        Self { handle, to_loopback }
    }

    /// Where something from `peer` to `local` is to go, which by frames would be `guest`'s `port`. `None` if by frames.
    pub(super) fn target(
        &self,
        peer: SocketAddr,
        local: SocketAddr,
        guest: Option<IpAddr>,
        port: u16,
    ) -> Option<SocketAddr> {
        if !is_loopback(peer, local) {
            return None;
        }
        let address = if self.to_loopback { Some(loopback_like(peer.ip())) } else { guest };
        address.map(|address| SocketAddr::new(address, port))
    }

    /// Takes over a connection that was accepted from `peer`, or gives it back.
    pub(crate) fn connection(
        &self,
        socket: OwnedFd,
        peer: SocketAddr,
        guest: Option<IpAddr>,
        port: u16,
    ) -> Option<OwnedFd> {
        // Asked of few: most peers are elsewhere.
        if !peer.ip().to_canonical().is_loopback() {
            return Some(socket);
        }
        // syscalls(pasta): getsockname
        let local = rustix::net::getsockname(&socket).ok().and_then(|local| SocketAddr::try_from(local).ok());
        let Some(target) = local.and_then(|local| self.target(peer, local, guest, port)) else {
            return Some(socket);
        };
        sockets::prepare(&socket);
        let command = Command::Connection { from: Side::Host, socket, target };
        match self.handle.commands.try_send(command) {
            Ok(()) => {
                self.handle.wake();
                None
            }
            // It has ended, or has too much to do.
            Err(
                TrySendError::Full(Command::Connection { socket, .. })
                | TrySendError::Disconnected(Command::Connection { socket, .. }),
            ) => Some(socket),
            Err(_) => None,
        }
    }

    /// Takes over a datagram that `listener` has received; whether it did. It is lost if the splicer has too much to do.
    pub(crate) fn datagram(
        &self,
        listener: &Arc<OwnedFd>,
        (peer, local): (SocketAddr, SocketAddr),
        guest: Option<IpAddr>,
        port: u16,
        payload: &[u8],
    ) -> bool {
        let Some(target) = self.target(peer, local, guest, port) else { return false };
        let arrival = Arrival { side: Side::Host, listener: listener.clone(), peer, local, target };
        match self.handle.commands.try_send(Command::Datagram(arrival, payload.to_vec())) {
            Ok(()) => {
                self.handle.wake();
                true
            }
            Err(TrySendError::Full(_)) => true,
            Err(TrySendError::Disconnected(_)) => false,
        }
    }

    /// Has the splicer end the UDP flows of listeners that were closed, and waits until it has: their port is free then.
    pub(crate) fn forget_closed(&self) {
        let (reply, done) = channel();
        if self.handle.commands.send(Command::Forget(reply)).is_ok() {
            self.handle.wake();
            let _ = done.recv();
        }
    }
}

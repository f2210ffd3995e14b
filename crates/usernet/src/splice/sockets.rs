//! Sockets of a network namespace that this thread is not in.
//!
//! A socket belongs to the namespace of the thread that made it, and stays there whoever uses it
//! (network_namespaces(7)): only `socket` and, for the right to low ports, `bind` have to be done inside. So a
//! thread that has entered the namespace serves these two ([`Server`]), and keeps some sockets made beforehand, so that a
//! new connection does not wait for it.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt};

use crate::config::Transport;

/// Connections that wait to be accepted, as the kernel's own default has it.
const BACKLOG: i32 = 4096;

/// What sort of socket is needed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Kind {
    /// TCP or UDP.
    pub transport: Transport,
    /// IPv6 or IPv4.
    pub v6: bool,
}

impl Kind {
    /// The sort of socket that reaches `address`.
    #[must_use]
    pub fn of(transport: Transport, address: SocketAddr) -> Self {
        Self { transport, v6: address.is_ipv6() }
    }

    fn index(self) -> usize {
        usize::from(self.transport == Transport::Udp) << 1 | usize::from(self.v6)
    }
}

const KINDS: [Kind; 4] = [
    Kind { transport: Transport::Tcp, v6: false },
    Kind { transport: Transport::Tcp, v6: true },
    Kind { transport: Transport::Udp, v6: false },
    Kind { transport: Transport::Udp, v6: true },
];

/// How many sockets of each of [`KINDS`] are made beforehand.
const STOCK: [usize; 4] = [32, 16, 8, 4];

/// The sockets of one network namespace.
pub trait Sockets: Send {
    /// A new socket, which does not block and is not inherited, and is otherwise as [`Here`] makes them.
    ///
    /// # Errors
    /// As socket(2); `BrokenPipe` if the namespace can no longer be reached.
    fn socket(&self, kind: Kind) -> io::Result<OwnedFd>;

    /// A socket that is bound to `address`, on `interface` only if it is given (`SO_BINDTODEVICE`). One for
    /// TCP listens. One for any address of IPv6 serves IPv4 too.
    ///
    /// # Errors
    /// The address is taken or not the namespace's, the port forbidden, or no descriptors; `BrokenPipe` if the
    /// namespace can no longer be reached.
    fn bind(&self, transport: Transport, address: SocketAddr, interface: Option<&str>)
    -> io::Result<OwnedFd>;
}

/// Makes a TCP socket fit for passing on what somebody else writes, as far as the kernel lets it. What a listening
/// socket accepts is as fit as that.
pub(super) fn prepare(socket: &OwnedFd) {
    // syscalls(pasta): setsockopt
    // Whoever writes has waited already if it wanted to (RFC 1122 4.2.3.4): what it wrote goes on at once.
    let _ = sockopt::set_tcp_nodelay(socket, true);
    // Otherwise its byte is lost.
    let _ = sockopt::set_socket_oobinline(socket, true);
    // The loopback has no congestion. One that paces (bbr) would spend its time with timers.
    let _ = sockopt::set_tcp_congestion(socket, "reno");
}

/// The sockets of the namespace that the calling thread is in.
#[derive(Clone, Copy, Debug, Default)]
pub struct Here;

impl Sockets for Here {
    fn socket(&self, kind: Kind) -> io::Result<OwnedFd> {
        let family = if kind.v6 { AddressFamily::INET6 } else { AddressFamily::INET };
        let socket_type = match kind.transport {
            Transport::Tcp => SocketType::STREAM,
            Transport::Udp => SocketType::DGRAM,
        };
        // syscalls(pasta): socket setsockopt
        let fd = socket_with(family, socket_type, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC, None)?;
        if kind.transport == Transport::Tcp {
            prepare(&fd);
        }
        Ok(fd)
    }

    fn bind(
        &self,
        transport: Transport,
        address: SocketAddr,
        interface: Option<&str>,
    ) -> io::Result<OwnedFd> {
        let fd = self.socket(Kind::of(transport, address))?;
        if address.is_ipv6() {
            // "Any" of IPv6 means any of IPv4 too, whatever the system's default.
            sockopt::set_ipv6_v6only(&fd, !address.ip().is_unspecified())?;
        }
        if let Some(interface) = interface {
            crate::socket::bind_interface(&fd, interface)?;
        }
        match transport {
            Transport::Tcp => {
                sockopt::set_socket_reuseaddr(&fd, true)?;
                // syscalls(pasta): bind listen
                bind(&fd, &address)?;
                listen(&fd, BACKLOG)?;
            }
            Transport::Udp => {
                crate::socket::keep_destinations(&fd, address.is_ipv6())?;
                bind(&fd, &address)?;
            }
        }
        Ok(fd)
    }
}

enum Request {
    Socket(Kind, Sender<io::Result<OwnedFd>>),
    Bind(Transport, SocketAddr, Option<String>, Sender<io::Result<OwnedFd>>),
    Restock,
}

/// Sockets made beforehand.
#[derive(Default, Debug)]
struct Stock([Vec<OwnedFd>; 4]);

/// The sockets of a namespace in which a [`Server`] runs.
#[derive(Clone, Debug)]
pub struct There {
    requests: Sender<Request>,
    stock: Arc<Mutex<Stock>>,
}

/// Makes sockets for others. To be run by a thread that has entered the namespace.
#[derive(Debug)]
pub struct Server {
    requests: Receiver<Request>,
    stock: Arc<Mutex<Stock>>,
}

/// A server for a thread to run once it has entered the namespace, and what asks it.
#[must_use]
pub fn remote() -> (There, Server) {
    let (sender, requests) = channel();
    let stock = Arc::new(Mutex::new(Stock::default()));
    (There { requests: sender, stock: stock.clone() }, Server { requests, stock })
}

fn lock(stock: &Mutex<Stock>) -> MutexGuard<'_, Stock> {
    stock.lock().unwrap_or_else(PoisonError::into_inner)
}

impl There {
    fn ask(&self, request: impl FnOnce(Sender<io::Result<OwnedFd>>) -> Request) -> io::Result<OwnedFd> {
        let (reply, answer) = channel();
        self.requests.send(request(reply)).map_err(|_| io::ErrorKind::BrokenPipe)?;
        answer.recv().map_err(|_| io::ErrorKind::BrokenPipe)?
    }
}

impl Sockets for There {
    fn socket(&self, kind: Kind) -> io::Result<OwnedFd> {
        let (taken, left) = {
            let shelf = &mut lock(&self.stock).0[kind.index()];
            (shelf.pop(), shelf.len())
        };
        if left == STOCK[kind.index()] / 2 {
            // Whether somebody is there shows when the shelf is empty.
            let _ = self.requests.send(Request::Restock);
        }
        match taken {
            Some(socket) => Ok(socket),
            None => self.ask(|reply| Request::Socket(kind, reply)),
        }
    }

    fn bind(
        &self,
        transport: Transport,
        address: SocketAddr,
        interface: Option<&str>,
    ) -> io::Result<OwnedFd> {
        self.ask(|reply| Request::Bind(transport, address, interface.map(str::to_owned), reply))
    }
}

impl Server {
    /// Serves until nobody is left who could ask.
    pub fn run(self) {
        self.restock();
        while let Ok(request) = self.requests.recv() {
            // Whoever asked may have gone: then nobody wants the socket.
            match request {
                Request::Socket(kind, reply) => {
                    let _ = reply.send(Here.socket(kind));
                    self.restock();
                }
                Request::Bind(transport, address, interface, reply) => {
                    let _ = reply.send(Here.bind(transport, address, interface.as_deref()));
                }
                Request::Restock => self.restock(),
            }
        }
    }

    fn restock(&self) {
        for kind in KINDS {
            let shelf = |stock: &Stock| stock.0[kind.index()].len();
            while shelf(&lock(&self.stock)) < STOCK[kind.index()] {
                // No descriptors: they are for connections rather than for the shelf.
                let Ok(socket) = Here.socket(kind) else { return };
                lock(&self.stock).0[kind.index()].push(socket);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_sockets_than_the_stock() {
        let (there, server) = remote();
        let thread = std::thread::spawn(|| server.run());
        for kind in KINDS {
            if Here.socket(kind).is_err() {
                eprintln!("SKIPPED a part of more_sockets_than_the_stock: no IPv6");
                continue;
            }
            let sockets: Vec<_> = (0..100).map(|_| there.socket(kind).unwrap()).collect();
            for socket in &sockets {
                let expected =
                    if kind.transport == Transport::Tcp { SocketType::STREAM } else { SocketType::DGRAM };
                assert_eq!(sockopt::socket_type(socket).unwrap(), expected);
            }
        }
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let listener = there.bind(Transport::Tcp, address, None).unwrap();
        let bound = SocketAddr::try_from(rustix::net::getsockname(&listener).unwrap()).unwrap();
        let taken = there.bind(Transport::Tcp, bound, None).unwrap_err();
        assert_eq!(taken.kind(), io::ErrorKind::AddrInUse);
        drop(there);
        thread.join().unwrap();
    }

    #[test]
    fn a_namespace_that_is_gone_is_an_error() {
        let (there, server) = remote();
        drop(server);
        let error = there.socket(KINDS[0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }
}

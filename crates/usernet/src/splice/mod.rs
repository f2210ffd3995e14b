//! The loopback bypass: connections between two network namespaces of one host that need no frames.
//!
//! # Theory of operation
//! A network namespace has a loopback of its own. What the host's says to the namespace's, or the other way round, could
//! go by the tap and two TCPs on the way; but both ends are sockets of the same kernel, so a pair of sockets, one in
//! each namespace, and bytes moved from one to the other are enough.
//!
//! **Sockets** ([`sockets`]) of the namespace come from a thread that has entered it. Everything else is done by the
//! splicer's own thread, with an epoll loop of its own ([`Splicer::run`]): it shares nothing with an engine.
//!
//! **TCP** (`tcp`, `relay`). A connection is accepted first, because the kernel allows nothing else, and a socket of
//! the other side connects to the target; a refusal is a RST to the client. Then each direction moves bytes by splice(2)
//! through a pipe (`pipes`) and copies none. Half-closes and resets are passed on, the latter after the bytes that came
//! before them.
//!
//! **UDP** (`udp`). A flow is a peer and the address that it sends to; it has a connected socket on each side.
//!
//! **Where they come from.** Either by a listening socket of the splicer's own ([`Forward`]), on either side: what does not
//! come from the loopback to the loopback is reset there, or not taken. Or by a forwarded port of an
//! [`Engine`](crate::Engine)'s, which hands over what the bypass is for ([`Bypass`]) and carries the rest by frames.
//!
//! **Bounds.** Connections, flows, pipes, what waits to be handed over, and the work done for one before others have
//! their turn are limited. When descriptors run out, accepting is tried again after a while; a connection that was
//! accepted and cannot go on is reset. The log gets a few lines at most.
//!
//! The process must ignore SIGPIPE, as programs in Rust do by default.

mod bypass;
mod listen;
mod pipes;
mod relay;
pub mod sockets;
mod tcp;
#[cfg(test)]
mod tests;
mod udp;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::Index;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use crate::config::Transport;
use crate::poller::{Events, Poller, Ready, Token};
use crate::warn::Warnings;

pub use bypass::Bypass;
use listen::{Listeners, Taken};
use sockets::Sockets;
use tcp::Tcp;
use udp::{Arrival, Udp};

/// Commands, connections and datagrams that wait to be handed over.
const QUEUE: usize = 1024;
/// Listening sockets' connections and datagrams taken before others have their turn.
const QUANTUM: usize = 64;

/// One of the two namespaces.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Side {
    /// The host's.
    Host,
    /// The guest's.
    Guest,
}

impl Side {
    fn other(self) -> Self {
        match self {
            Self::Host => Self::Guest,
            Self::Guest => Self::Host,
        }
    }
}

/// The sockets of both namespaces.
struct Sides([Box<dyn Sockets>; 2]);

impl Index<Side> for Sides {
    type Output = Box<dyn Sockets>;

    fn index(&self, side: Side) -> &Self::Output {
        &self.0[side as usize]
    }
}

/// A port of one side's loopback that leads to the other side.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Forward {
    /// The side that listens.
    pub from: Side,
    /// TCP or UDP.
    pub transport: Transport,
    /// Where it listens. If that is not the loopback, what comes from elsewhere is refused.
    pub listen: SocketAddr,
    /// The only interface by which it can be reached (`SO_BINDTODEVICE`); all of them if `None`.
    pub interface: Option<String>,
    /// The address on the other side that it leads to; the loopback of the client's own IP family if `None`.
    pub target_address: Option<IpAddr>,
    /// The port that it leads to.
    pub target_port: u16,
}

impl Forward {
    /// A forward from loopback to loopback.
    #[must_use]
    pub fn new(from: Side, transport: Transport, listen: SocketAddr, target_port: u16) -> Self {
        Self { from, transport, listen, interface: None, target_address: None, target_port }
    }

    /// Where a client that is known as `peer` is led.
    fn target(&self, peer: SocketAddr) -> SocketAddr {
        SocketAddr::new(self.target_address.unwrap_or_else(|| loopback_like(peer.ip())), self.target_port)
    }
}

/// What a splicer does.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    /// Ports that it listens to.
    pub forwards: Vec<Forward>,
    /// TCP connections at most, of two descriptors each.
    pub most_connections: usize,
    /// UDP flows at most, of two descriptors each.
    pub most_flows: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self { forwards: Vec::new(), most_connections: 64 << 10, most_flows: 4096 }
    }
}

/// What a splicer has counted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stats {
    /// TCP connections that are open now.
    pub tcp_connections: usize,
    /// UDP flows that are open now.
    pub udp_flows: usize,
    /// Bytes of TCP that were moved.
    pub tcp_bytes: u64,
    /// TCP connections that could not be made: the client was reset.
    pub tcp_refused: u64,
    /// Datagrams that their target refused.
    pub udp_refused: u64,
    /// Datagrams that were lost.
    pub udp_lost: u64,
}

enum Command {
    Add(Forward, Sender<io::Result<Forward>>),
    Remove(Forward, Sender<bool>),
    List(Sender<Vec<Forward>>),
    Stats(Sender<Stats>),
    Connection { from: Side, socket: OwnedFd, target: SocketAddr },
    Datagram(Arrival, Vec<u8>),
    Forget(Sender<()>),
    Stop,
}

/// A way to talk to a splicer that runs on another thread.
#[derive(Clone, Debug)]
pub struct Handle {
    commands: SyncSender<Command>,
    wake: Arc<OwnedFd>,
}

impl Handle {
    /// Has [`Splicer::run`] return. Does nothing if it has already.
    pub fn stop(&self) {
        let _ = self.commands.send(Command::Stop);
        self.wake();
    }

    /// Forwards one more port. Returns the forward as it is named from now on: with the port that the kernel chose,
    /// if it was asked for port 0.
    ///
    /// # Errors
    /// The port is taken, forbidden, or not the namespace's (named in the error); `AlreadyExists` if it is
    /// forwarded already; `BrokenPipe` if the splicer has ended.
    pub fn add_forward(&self, forward: Forward) -> io::Result<Forward> {
        self.ask(|reply| Command::Add(forward, reply))?
    }

    /// Ends the forwarding of a port, and of UDP the flows that came by it. Returns whether it was forwarded.
    ///
    /// # Errors
    /// `BrokenPipe` if the splicer has ended.
    pub fn remove_forward(&self, forward: Forward) -> io::Result<bool> {
        self.ask(|reply| Command::Remove(forward, reply))
    }

    /// The ports that are forwarded, in the order in which they were added.
    ///
    /// # Errors
    /// `BrokenPipe` if the splicer has ended.
    pub fn forwards(&self) -> io::Result<Vec<Forward>> {
        self.ask(Command::List)
    }

    /// What the splicer has counted.
    ///
    /// # Errors
    /// `BrokenPipe` if the splicer has ended.
    pub fn stats(&self) -> io::Result<Stats> {
        self.ask(Command::Stats)
    }

    fn ask<T>(&self, command: impl FnOnce(Sender<T>) -> Command) -> io::Result<T> {
        let (reply, answer) = channel();
        self.commands.send(command(reply)).map_err(|_| io::ErrorKind::BrokenPipe)?;
        self.wake();
        answer.recv().map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    fn wake(&self) {
        // It can only fail when the counter is full, and then it is readable already.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

/// The bypass: see above.
pub struct Splicer {
    sides: Sides,
    poller: Poller,
    listeners: Listeners,
    tcp: Tcp,
    udp: Udp,
    handle: Handle,
    commands: Receiver<Command>,
    /// Where datagrams are taken to.
    buffer: Vec<u8>,
    refused: u64,
    warnings: Warnings,
    deadline: Option<Instant>,
    stopped: bool,
}

impl Splicer {
    /// A splicer between the host and the guest, with its ports open.
    ///
    /// # Errors
    /// There are no descriptors, or a port cannot be listened to: the error then names it.
    pub fn new(config: Config, host: Box<dyn Sockets>, guest: Box<dyn Sockets>) -> io::Result<Self> {
        let poller = Poller::new()?;
        let wake = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?);
        poller.add(&wake, Token::Wake, EventFlags::IN)?;
        let (sender, commands) = sync_channel(QUEUE);
        let mut splicer = Self {
            sides: Sides([host, guest]),
            poller,
            listeners: Listeners::default(),
            tcp: Tcp::new(config.most_connections),
            udp: Udp::new(config.most_flows),
            handle: Handle { commands: sender, wake },
            commands,
            buffer: vec![0; usize::from(u16::MAX)],
            refused: 0,
            warnings: Warnings::default(),
            deadline: None,
            stopped: false,
        };
        for forward in config.forwards {
            splicer.listeners.add(&splicer.poller, &splicer.sides, forward)?;
        }
        Ok(splicer)
    }

    /// A way to talk to the splicer from elsewhere.
    #[must_use]
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Serves until [`Handle::stop`].
    ///
    /// # Errors
    /// The host's epoll fails.
    pub fn run(mut self) -> io::Result<()> {
        let mut events = Events::new();
        while !self.stopped {
            self.poller.wait(&mut events, self.timeout())?;
            for ready in events.iter() {
                self.dispatch(ready);
            }
            let now = Instant::now();
            self.listen(now);
            self.tcp.turn(&self.poller);
            self.udp.turn(now);
            self.deadline = [self.udp.timers(now), self.listeners.next()].into_iter().flatten().min();
        }
        Ok(())
    }

    /// How long to wait for events.
    fn timeout(&self) -> Option<Duration> {
        if self.tcp.has_work() || self.udp.has_work() || self.listeners.has_work() {
            return Some(Duration::ZERO);
        }
        self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()))
    }

    fn dispatch(&mut self, ready: Ready) {
        match ready.token {
            Token::Wake => {
                // It can only fail when it is clear.
                let _ = rustix::io::read(&self.handle.wake, &mut [0; 8]);
                self.obey();
            }
            Token::Tcp(token) => self.tcp.ready(token, ready.flags),
            Token::Udp(token) => self.udp.ready(token),
            Token::TcpListener(number) | Token::UdpListener(number) => self.listeners.ready(number),
            // An engine's.
            _ => {}
        }
    }

    fn obey(&mut self) {
        for _ in 0..QUEUE {
            let Ok(command) = self.commands.try_recv() else { return };
            // Whoever asked may have gone: then nobody wants the answer.
            match command {
                Command::Add(forward, reply) => {
                    let _ = reply.send(self.listeners.add(&self.poller, &self.sides, forward));
                }
                Command::Remove(forward, reply) => {
                    let removed = self.listeners.remove(&forward);
                    self.udp.forget_closed();
                    let _ = reply.send(removed);
                }
                Command::List(reply) => {
                    let _ = reply.send(self.listeners.forwards());
                }
                Command::Stats(reply) => {
                    let _ = reply.send(self.stats());
                }
                Command::Connection { from, socket, target } => self.connect(from, socket, target),
                Command::Datagram(arrival, payload) => self.arrived(arrival, &payload),
                Command::Forget(reply) => {
                    self.udp.forget_closed();
                    let _ = reply.send(());
                }
                Command::Stop => self.stopped = true,
            }
        }
        // Others have their turn.
        self.handle.wake();
    }

    /// Takes what came to the listening sockets.
    fn listen(&mut self, now: Instant) {
        for number in self.listeners.turn(now) {
            for left in (0..QUANTUM).rev() {
                match self.listeners.take(number, &mut self.buffer, now) {
                    Ok(Taken::Nothing) => break,
                    Ok(Taken::Stranger) => self.refused += 1,
                    Ok(Taken::Connection { from, socket, target }) => self.connect(from, socket, target),
                    Ok(Taken::Datagram { arrival, length }) => {
                        let buffer = std::mem::take(&mut self.buffer);
                        self.arrived(arrival, buffer.get(..length).unwrap_or_default());
                        self.buffer = buffer;
                    }
                    Err(error) => {
                        let what = format_args!("cannot accept connections of the loopback now: {error}");
                        self.warnings.warn(now, &what);
                        break;
                    }
                }
                if left == 0 {
                    self.listeners.ready(number);
                }
            }
        }
    }

    fn connect(&mut self, from: Side, socket: OwnedFd, target: SocketAddr) {
        let there = &*self.sides[from.other()];
        let Err(error) = self.tcp.open(&self.poller, there, socket, target) else { return };
        self.refused += 1;
        if let Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM | Errno::ADDRNOTAVAIL = error {
            let what = format_args!("a connection of the loopback to {target} was reset: {error}");
            self.warnings.warn(Instant::now(), &what);
        } else {
            tracing::debug!(%target, %error, "cannot connect");
        }
    }

    fn arrived(&mut self, arrival: Arrival, payload: &[u8]) {
        let now = Instant::now();
        let target = arrival.target;
        if let Err(error) = self.udp.arrived(&self.poller, &self.sides, arrival, payload, now) {
            self.warnings
                .warn(now, &format_args!("a datagram of the loopback to {target} was lost: {error}"));
        }
    }

    #[cfg(test)]
    fn set_most_pipes(&mut self, most: usize) {
        self.tcp.set_most_pipes(most);
    }

    fn stats(&self) -> Stats {
        Stats {
            tcp_connections: self.tcp.len(),
            udp_flows: self.udp.len(),
            tcp_bytes: self.tcp.bytes(),
            tcp_refused: self.refused,
            udp_refused: self.udp.refused(),
            udp_lost: self.udp.lost(),
        }
    }
}

/// Whether something from `peer` to `local` stays on the loopback.
fn is_loopback(peer: SocketAddr, local: SocketAddr) -> bool {
    peer.ip().to_canonical().is_loopback() && local.ip().to_canonical().is_loopback()
}

/// The loopback address of the IP family that `like` is of in truth.
fn loopback_like(like: IpAddr) -> IpAddr {
    match like.to_canonical() {
        IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    }
}

//! UDP: each flow of the guest's is a socket of the host's.
//!
//! A flow is the guest's end and the other end as the guest names it.
//!
//! **From the guest.** The first datagram opens a socket that is connected to the other end (an address that
//! stands for the host's loopback or for a resolver is replaced: [`Context::outside`]), with the guest's own port if
//! the host has it free. Multicast and broadcast do not leave the link.
//!
//! Datagrams that the guest sends in one go leave the host in one go ([`burst`]). The other way, several are taken from a
//! socket by one call ([`Inbox`]), and those that are alike are given to the guest together, if its link can do that.
//!
//! **Into the guest.** A forwarded port is one socket for all of its peers. A datagram on it makes a flow
//! without a socket of its own: the guest's answers go out by the same one, from the address that the peer had sent to.
//!
//! **Errors.** Sockets keep the ICMP errors that they are sent (IP_RECVERR), and the guest is told with the same type
//! and code, about the same datagram. The other way, a guest that says "port unreachable" about what it was sent
//! loses the flow: with its socket gone, the host's kernel says the same for it. For a forwarded port it does not,
//! since others may use that.
//!
//! **Time and space.** Flows end when they were idle for [`PATIENCE`], and when [`MOST_FLOWS`] are not enough
//! those idle longest go first. Sockets are watched edge-triggered. One that is ready is queued, and [`Udp::turn`]
//! takes a few datagrams of each in turn, so that no flow starves others; while the guest takes nothing, they
//! stay in the host's receive buffers.

mod burst;
mod deliver;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::iter;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use etherparse::{IpNumber, Ipv4HeaderSlice, Ipv6HeaderSlice};
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::SendFlags;

use crate::claims::Claims;
use crate::config::{Config, Forward};
use crate::context::{Context, RESOLVER_PORTS, Spare};
use crate::flow::{Class, FlowTable, Patience};
use crate::frame::{HOP_LIMIT, IcmpError, quoted_udp};
use crate::packet::{Addresses, Datagrams, UdpView};
use crate::poller::Token;
use crate::socket::{self, Appetite, Inbox, Received};
use burst::Burst;
use deliver::deliver;

/// How long flows may be idle: without an answer as long as a resolver's patience, with one as long as
/// RFC 4787 4.3 asks of translators at least, and some.
const PATIENCE: Patience = [Duration::from_secs(30), Duration::from_secs(180)];

/// How long a flow must have been idle to give its descriptor to another protocol's.
pub(crate) const IDLE: Duration = Duration::from_secs(10);

/// Flows at most. Each may take a descriptor; a busy BitTorrent client has about two thousand.
const MOST_FLOWS: usize = 4096;

/// Datagrams taken from one socket before others have their turn.
const QUANTUM: usize = 32;

/// Sockets that have their turn before the engine looks for other events.
const SOURCES: usize = 64;

/// The longest datagram that a socket can hold.
const LONGEST: usize = 65535;

/// The two ends of a flow, as the guest knows them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Key {
    guest: SocketAddr,
    remote: SocketAddr,
}

impl Key {
    fn of(datagram: &UdpView<'_>) -> Self {
        Self { guest: datagram.source(), remote: datagram.destination() }
    }

    /// The addresses of what the guest sends, and the ports.
    fn outbound(&self) -> Option<(Addresses, (u16, u16))> {
        let addresses = Addresses::new(self.guest.ip(), self.remote.ip())?;
        Some((addresses, (self.guest.port(), self.remote.port())))
    }
}

/// How a flow's datagrams leave the host.
#[derive(Debug)]
enum Way {
    /// By a connected socket of its own.
    Own(OwnedFd),
    /// By a forwarded port's, as `local` to `peer`.
    Forwarded { listener: u32, peer: SocketAddr, local: Option<IpAddr> },
}

#[derive(Debug)]
struct Flow {
    way: Way,
    /// What the socket's packets have; the guest's, if it has a say.
    hop_limit: u8,
    /// Whether it is in the queue.
    queued: bool,
    /// Whether there may be errors to read.
    failed: bool,
    /// Whether its datagrams go one by one, because the host cannot take them together.
    alone: bool,
    appetite: Appetite,
}

impl Flow {
    /// Whether it has a descriptor.
    fn has_socket(&self) -> bool {
        matches!(self.way, Way::Own(_))
    }

    fn new(way: Way) -> Self {
        Self {
            way,
            hop_limit: HOP_LIMIT,
            queued: false,
            failed: false,
            alone: false,
            appetite: Appetite::default(),
        }
    }
}

#[derive(Debug)]
struct Listener {
    forward: Forward,
    fd: Arc<OwnedFd>,
    queued: bool,
    failed: bool,
    appetite: Appetite,
}

/// A socket with something to read.
#[derive(Clone, Copy, Debug)]
enum Source {
    Flow(u32),
    Listener(u32),
}

/// Whether a socket has been read dry.
#[derive(PartialEq, Eq)]
enum Drained {
    Yes,
    No,
}

/// All UDP flows and forwarded ports.
pub(crate) struct Udp {
    flows: FlowTable<Key, Flow>,
    listeners: HashMap<u32, Listener>,
    next_listener: u32,
    queue: VecDeque<Source>,
    /// What the guest sent: by which flow, and the hop limit.
    burst: Burst<(u32, u8)>,
    /// What the guest is sent.
    inward: Burst<()>,
    inbox: Inbox,
    /// Where errors are taken to, with what they are about.
    buffer: Vec<u8>,
    shares_ports: bool,
}

impl Udp {
    /// `shares_ports` says whether other engines listen on the same ports.
    pub(crate) fn new(claims: Claims<Key>, shares_ports: bool) -> Self {
        Self {
            flows: FlowTable::new(MOST_FLOWS, PATIENCE, claims),
            listeners: HashMap::new(),
            next_listener: 0,
            queue: VecDeque::new(),
            burst: Burst::default(),
            inward: Burst::default(),
            inbox: Inbox::new(),
            buffer: vec![0; LONGEST],
            shares_ports,
        }
    }

    /// The other engine whose flow this datagram of the guest's is.
    pub(crate) fn elsewhere(&self, datagram: &UdpView<'_>) -> Option<u16> {
        self.flows.elsewhere(&Key::of(datagram))
    }

    /// The other engine whose flow the guest refuses, of which it quotes the packet.
    pub(crate) fn refused_elsewhere(&self, quoted: &[u8]) -> Option<u16> {
        self.flows.elsewhere(&quoted_key(quoted)?)
    }

    /// How many flows there are.
    pub(crate) fn len(&self) -> usize {
        self.flows.len()
    }

    /// Forwards a port of the host's to the guest. Returns where it listens: the port may be the kernel's choice.
    ///
    /// # Errors
    /// The port is taken or forbidden, or there are no descriptors.
    pub(crate) fn listen(&mut self, cx: &Context<'_>, forward: &Forward) -> io::Result<SocketAddr> {
        let fd = socket::listening_udp(forward, cx.config.freebind, self.shares_ports)?;
        socket::receive_together(&fd);
        // syscalls: getsockname
        let listen = SocketAddr::try_from(rustix::net::getsockname(&fd)?)?;
        let forward = Forward { listen, ..forward.clone() };
        let number = self.next_listener;
        self.next_listener = number.wrapping_add(1);
        cx.poller.add(&fd, Token::UdpListener(number), EventFlags::IN | EventFlags::ET)?;
        let fd = Arc::new(fd);
        let appetite = Appetite::default();
        self.listeners.insert(number, Listener { forward, fd, queued: false, failed: false, appetite });
        Ok(listen)
    }

    /// Ends a forward, and the flows that came by it. Whether there was one.
    pub(crate) fn unlisten(&mut self, forward: &Forward) -> bool {
        let Some(number) =
            self.listeners.iter().find(|(_, l)| l.forward == *forward).map(|(number, _)| *number)
        else {
            return false;
        };
        self.listeners.remove(&number);
        self.flows
            .remove_if(|_, flow| matches!(flow.way, Way::Forwarded { listener, .. } if listener == number));
        true
    }

    /// The guest's network is another: ends the flows to resolvers that may be others now.
    pub(crate) fn reconfigured(&mut self, old: &Config, new: &Config) {
        if old.dns_forward == new.dns_forward {
            return;
        }
        self.flows.remove_if(|key, _| {
            RESOLVER_PORTS.contains(&key.remote.port())
                && old.dns_forward.iter().any(|(inside, _)| *inside == key.remote.ip())
        });
    }

    /// A datagram from the guest.
    pub(crate) fn datagram(&mut self, cx: &mut Context<'_>, datagram: &UdpView<'_>) {
        let key = Key::of(datagram);
        let broadcast =
            matches!(key.remote.ip(), IpAddr::V4(a) if a.is_broadcast() || is_subnet_broadcast(cx, a));
        if key.remote.ip().is_multicast() || broadcast {
            cx.link.stats.dropped.multicast += 1;
            return;
        }
        if key.guest.ip().is_unspecified() || key.guest.port() == 0 || key.remote.port() == 0 {
            cx.link.stats.dropped.address += 1;
            return;
        }
        let number = match self.gathered_by(key).or_else(|| self.flows.find(&key)) {
            Some(number) => number,
            None => match self.open_after_burst(cx, key) {
                Ok(number) => number,
                Err(error) => {
                    cx.link.stats.dropped.host += 1;
                    let why = socket::local_error(datagram.ip.addresses.is_v6(), errno(&error), 0);
                    refuse(cx, why, datagram);
                    return;
                }
            },
        };
        self.send(cx, number, datagram);
    }

    /// The flow of what is gathered, if that is `key`'s: who sends fast sends by one flow, and need not be looked up again.
    fn gathered_by(&mut self, key: Key) -> Option<u32> {
        let (number, _) = self.burst.common();
        let (known, _) = self.flows.get_mut(number)?;
        (self.burst.len() > 0 && known == key).then_some(number)
    }

    /// Makes a flow of the guest's own. One that it takes the place of still sends what it was given.
    fn open_after_burst(&mut self, cx: &mut Context<'_>, key: Key) -> io::Result<u32> {
        self.send_burst(cx);
        self.open(cx, key)
    }

    /// Makes a flow of the guest's own.
    fn open(&mut self, cx: &mut Context<'_>, key: Key) -> io::Result<u32> {
        let peer = cx.outside(key.remote);
        let binding = cx.binding(peer.ip());
        let fd = match socket::connected_udp(peer, key.guest.port(), &binding) {
            Err(error)
                if is_exhausted(&error)
                    && self.flows.remove_oldest_of(cx.now, Flow::has_socket).is_some() =>
            {
                cx.link.stats.evicted += 1;
                cx.link
                    .warnings
                    .warn(cx.now, &format_args!("the oldest UDP flow makes room for a new one: {error}"));
                socket::connected_udp(peer, key.guest.port(), &cx.binding(peer.ip()))?
            }
            result => result?,
        };
        socket::receive_together(&fd);
        let flow = Flow::new(Way::Own(fd));
        // The guest's next datagram will find whose it is.
        let number = insert(&mut self.flows, cx, key, flow).ok_or(io::ErrorKind::AlreadyExists)?;
        if let Some((_, Flow { way: Way::Own(fd), .. })) = self.flows.get_mut(number) {
            // Something may have come before it was watched: epoll tells.
            if let Err(error) = cx.poller.add(&*fd, Token::Udp(number), EventFlags::IN | EventFlags::ET) {
                self.flows.remove(number);
                return Err(error);
            }
        }
        Ok(number)
    }

    /// Sends what the guest sent by its flow, now or with what follows.
    fn send(&mut self, cx: &mut Context<'_>, number: u32, datagram: &UdpView<'_>) {
        let common = (number, datagram.ip.hop_limit);
        for payload in datagram.payload.each() {
            if !self.burst.add(common, payload) {
                self.send_burst(cx);
                self.burst.add(common, payload);
            }
        }
        if self.flows.get_mut(number).is_some_and(|(_, flow)| flow.alone) {
            self.send_burst(cx);
        }
    }

    /// Sends what was gathered.
    fn send_burst(&mut self, cx: &mut Context<'_>) {
        let burst = std::mem::take(&mut self.burst);
        let (number, hop_limit) = burst.common();
        if burst.len() > 0
            && let Some(class) = self.set_off(number, hop_limit)
        {
            self.flows.touch(number, class, cx.now);
            let (bytes, length) = burst.together();
            if burst.len() == 1 {
                self.send_one(cx, number, bytes);
            } else if let Err(error) = self.transmit(number, bytes, Some(length)) {
                if is_full(&error) {
                    cx.link.stats.dropped.host += burst.len() as u64;
                } else {
                    // One of them may be too long, or the way out cannot cut them.
                    self.set_alone(number);
                    burst.each().for_each(|payload| self.send_one(cx, number, payload));
                }
            }
            if self.flows.get_mut(number).is_some_and(|(_, flow)| flow.failed) {
                self.enqueue(number);
            }
        }
        self.burst = burst;
        self.burst.clear();
    }

    /// Prepares a flow's socket for packets that live for `hops`. The flow's class from now on; `None` if it is gone.
    fn set_off(&mut self, number: u32, hops: u8) -> Option<Class> {
        let class = self.flows.class(number)?;
        let (key, flow) = self.flows.get_mut(number)?;
        match &flow.way {
            Way::Own(fd) => {
                if flow.hop_limit != hops {
                    flow.hop_limit = hops;
                    socket::set_hop_limit(fd, key.remote.is_ipv6(), hops);
                }
                Some(class)
            }
            Way::Forwarded { .. } => Some(Class::BothWays),
        }
    }

    fn set_alone(&mut self, number: u32) {
        if let Some((_, flow)) = self.flows.get_mut(number) {
            flow.alone = true;
        }
    }

    /// Sends one datagram by a flow.
    fn send_one(&mut self, cx: &mut Context<'_>, number: u32, payload: &[u8]) {
        let Err(error) = self.transmit(number, payload, None) else { return };
        cx.link.stats.dropped.host += 1;
        // The host's queue is full: a datagram is lost, as on any link.
        if is_full(&error) {
            return;
        }
        let Some((key, flow)) = self.flows.get_mut(number) else { return };
        flow.failed = true;
        // Longer than the path takes: the error's queue knows by how much.
        if errno(&error) != Errno::MSGSIZE {
            let why = socket::local_error(key.remote.is_ipv6(), errno(&error), 0);
            tell(cx, key, why, None, payload);
        }
    }

    /// Gives a flow's socket one datagram, or several of `length` bytes each.
    fn transmit(&mut self, number: u32, bytes: &[u8], length: Option<u16>) -> io::Result<()> {
        let Some((_, flow)) = self.flows.get_mut(number) else { return Ok(()) };
        let listener = match &flow.way {
            Way::Own(_) => None,
            Way::Forwarded { listener, .. } => self.listeners.get_mut(listener),
        };
        let send = || match (&flow.way, &listener) {
            (Way::Own(fd), _) => match length {
                Some(_) => socket::send(fd, bytes, length, None, None),
                None => {
                    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
                    // syscalls: sendto
                    rustix::net::send(fd, bytes, flags).map_err(io::Error::from)
                }
            },
            (Way::Forwarded { peer, local, .. }, Some(listener)) => {
                socket::send(&listener.fd, bytes, length, *local, Some(*peer))
            }
            (Way::Forwarded { .. }, None) => Ok(0),
        };
        let mut result = send();
        let pending = matches!(&result, Err(error) if is_pending(errno(error)));
        if pending {
            // The error of an earlier datagram, which took this one's place.
            result = send();
            match listener {
                Some(listener) => listener.failed = true,
                None => flow.failed = true,
            }
        }
        result.map(|_| ())
    }

    fn enqueue(&mut self, number: u32) {
        if let Some((_, flow)) = self.flows.get_mut(number)
            && !std::mem::replace(&mut flow.queued, true)
        {
            self.queue.push_back(Source::Flow(number));
        }
    }

    /// The socket of flow `number` has something.
    pub(crate) fn ready(&mut self, number: u32, flags: EventFlags) {
        if let Some((_, flow)) = self.flows.get_mut(number) {
            flow.failed |= flags.contains(EventFlags::ERR);
        }
        self.enqueue(number);
    }

    /// The socket of forward `number` has something.
    pub(crate) fn listener_ready(&mut self, number: u32, flags: EventFlags) {
        let Some(listener) = self.listeners.get_mut(&number) else { return };
        listener.failed |= flags.contains(EventFlags::ERR);
        if !std::mem::replace(&mut listener.queued, true) {
            self.queue.push_back(Source::Listener(number));
        }
    }

    /// Whether there are sockets to be read.
    pub(crate) fn has_work(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Sends what was gathered, and reads some of the sockets that are ready, as long as the guest takes what they give.
    pub(crate) fn turn(&mut self, cx: &mut Context<'_>) {
        self.send_burst(cx);
        for _ in 0..self.queue.len().min(SOURCES) {
            if cx.link.full {
                return;
            }
            let Some(source) = self.queue.pop_front() else { return };
            let drained = match source {
                Source::Flow(number) => self.drain_flow(cx, number),
                Source::Listener(number) => self.drain_listener(cx, number),
            };
            if drained == Drained::No {
                self.queue.push_back(source);
                continue;
            }
            match source {
                Source::Flow(number) => {
                    if let Some((_, flow)) = self.flows.get_mut(number) {
                        flow.queued = false;
                    }
                }
                Source::Listener(number) => {
                    if let Some(listener) = self.listeners.get_mut(&number) {
                        listener.queued = false;
                    }
                }
            }
        }
    }

    fn drain_flow(&mut self, cx: &mut Context<'_>, number: u32) -> Drained {
        let mut taken = 0;
        while taken < QUANTUM {
            taken += 1;
            if cx.link.full {
                return Drained::No;
            }
            let Some((key, flow)) = self.flows.get_mut(number) else { return Drained::Yes };
            let Way::Own(fd) = &flow.way else {
                flow.failed = false;
                return Drained::Yes;
            };
            if flow.failed {
                match socket::next_error(fd, &mut self.buffer) {
                    Some(error) => {
                        let payload = self.buffer.get(..error.length).unwrap_or_default();
                        tell(cx, key, error.error, error.offender, payload);
                    }
                    None => flow.failed = false,
                }
                continue;
            }
            match self.inbox.receive(fd, &mut flow.appetite) {
                Ok(more) => {
                    self.flows.touch(number, Class::BothWays, cx.now);
                    taken += self.inbox.count();
                    deliver(cx, &mut self.inward, key, self.inbox.taken().map(|(_, datagrams)| datagrams));
                    if !more {
                        return Drained::Yes;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Drained::Yes,
                Err(_) => flow.failed = true,
            }
        }
        Drained::No
    }

    fn drain_listener(&mut self, cx: &mut Context<'_>, number: u32) -> Drained {
        let mut taken = 0;
        while taken < QUANTUM {
            taken += 1;
            if cx.link.full {
                return Drained::No;
            }
            let Some(listener) = self.listeners.get_mut(&number) else { return Drained::Yes };
            if listener.failed {
                match socket::next_error(&listener.fd, &mut self.buffer) {
                    Some(error) => {
                        if let Some(peer) = error.destination
                            && let Some((key, Some(_))) =
                                flow_of(&mut self.flows, cx, &listener.forward, peer)
                        {
                            let payload = self.buffer.get(..error.length).unwrap_or_default();
                            tell(cx, key, error.error, error.offender, payload);
                        }
                    }
                    None => listener.failed = false,
                }
                continue;
            }
            match self.inbox.receive(&listener.fd, &mut listener.appetite) {
                Ok(more) => {
                    taken += self.inbox.count();
                    self.arrived(cx, number);
                    if !more {
                        return Drained::Yes;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Drained::Yes,
                Err(_) => listener.failed = true,
            }
        }
        Drained::No
    }

    /// Hands on what came by forwarded port `number`.
    fn arrived(&mut self, cx: &mut Context<'_>, number: u32) {
        let Some(listener) = self.listeners.get(&number) else { return };
        let mut arrivals = self.inbox.taken().peekable();
        while let Some((first, datagrams)) = arrivals.next() {
            // What comes between the same ends without a break goes the same way.
            let ends = (first.peer, first.local);
            let mut rest = iter::from_fn(|| {
                arrivals.next_if(|(next, _)| (next.peer, next.local) == ends).map(|(_, datagrams)| datagrams)
            });
            if bypass(cx, listener, first, datagrams) {
                for datagrams in rest {
                    bypass(cx, listener, first, datagrams);
                }
                continue;
            }
            let Some((key, flow)) = flow_of(&mut self.flows, cx, &listener.forward, first.peer) else {
                // A guest without an address is not there.
                rest.by_ref().for_each(drop);
                continue;
            };
            let way = Way::Forwarded { listener: number, peer: first.peer, local: first.local };
            note_peer(&mut self.flows, cx, key, flow, way);
            deliver(cx, &mut self.inward, key, iter::once(datagrams).chain(rest));
        }
    }

    /// The guest says that a datagram it was sent, of which it quotes the packet, found nobody.
    pub(crate) fn refused_by_guest(&mut self, quoted: &[u8]) {
        if let Some(key) = quoted_key(quoted)
            && let Some(number) = self.flows.find(&key)
        {
            self.flows.remove(number);
        }
    }

    /// Ends flows whose time is over, and says when the next one's is.
    pub(crate) fn timers(&mut self, now: Instant) -> Option<Instant> {
        while self.flows.remove_expired(now).is_some() {}
        self.flows.deadline()
    }
}

impl Spare for Udp {
    fn give_up(&mut self, now: Instant) -> bool {
        let since = now.checked_sub(IDLE);
        since.is_some_and(|since| self.flows.remove_oldest_of(since, Flow::has_socket).is_some())
    }
}

/// Adds a flow, unless another engine has just done so.
fn insert(flows: &mut FlowTable<Key, Flow>, cx: &mut Context<'_>, key: Key, flow: Flow) -> Option<u32> {
    let (number, evicted) = flows.insert(key, flow, cx.now)?;
    cx.link.stats.evicted += u64::from(evicted.is_some());
    Some(number)
}

/// Something came by a forwarded port: makes its flow, if it has no number yet, or keeps it alive.
fn note_peer(
    flows: &mut FlowTable<Key, Flow>,
    cx: &mut Context<'_>,
    key: Key,
    number: Option<u32>,
    way: Way,
) {
    let Some(number) = number else {
        insert(flows, cx, key, Flow::new(way));
        return;
    };
    let class = flows.class(number).unwrap_or(Class::OneWay);
    flows.touch(number, class, cx.now);
    if let Some((_, flow)) = flows.get_mut(number)
        && matches!(flow.way, Way::Forwarded { .. })
    {
        // Several of the host's own addresses are one to the peer: it is answered from the last that it spoke to.
        flow.way = way;
    }
}

/// Gives datagrams to the bypass, if they are for that. Whether they were.
fn bypass(cx: &Context<'_>, listener: &Listener, received: &Received, datagrams: Datagrams<'_>) -> bool {
    let (Some(bypass), Some(local)) = (&cx.link.bypass, received.local) else { return false };
    let local = SocketAddr::new(local, listener.forward.listen.port());
    let own = || cx.guest_address(received.peer.ip().to_canonical());
    let guest = listener.forward.guest_address.or_else(own);
    let port = listener.forward.guest_port;
    // They have all the same ends.
    let pass = |payload| bypass.datagram(&listener.fd, (received.peer, local), guest, port, payload);
    let mut passed = false;
    for payload in datagrams.each() {
        passed |= pass(payload);
    }
    passed
}

/// The flow of `peer`, as the host knows it, by a forwarded port, and its number if it is there already; `None` if the
/// guest has no address.
///
/// Several peers may look the same to the guest. Then those that come later have other ports; when that does not help
/// either, the guest answers the last that spoke.
fn flow_of(
    flows: &mut FlowTable<Key, Flow>,
    cx: &Context<'_>,
    forward: &Forward,
    peer: SocketAddr,
) -> Option<(Key, Option<u32>)> {
    /// Ports that are tried.
    const ATTEMPTS: u16 = 8;
    /// Between two of them. Any odd number visits all ports.
    const STEP: u16 = 0x6a25;
    let (guest, remote) = cx.arrival(peer, forward.guest_address)?;
    let key = |attempt: u16| {
        let port = match remote.port().wrapping_add(attempt.wrapping_mul(STEP)) {
            0 => STEP,
            port => port,
        };
        Key { guest: SocketAddr::new(guest, forward.guest_port), remote: SocketAddr::new(remote.ip(), port) }
    };
    for key in (0..ATTEMPTS).map(key) {
        let Some(number) = flows.find(&key) else {
            // Among several engines, the kernel gives each peer to one of them for good.
            if flows.elsewhere(&key).is_some() {
                continue;
            }
            return Some((key, None));
        };
        match flows.get_mut(number) {
            Some((_, Flow { way: Way::Forwarded { peer: other, .. }, .. })) if *other != peer => {}
            _ => return Some((key, Some(number))),
        }
    }
    let key = key(0);
    Some((key, flows.find(&key)))
}

/// The flow of a datagram that the guest was sent, from the beginning of its packet.
fn quoted_key(packet: &[u8]) -> Option<Key> {
    let (source, destination, rest): (IpAddr, IpAddr, _) = match packet.first()? >> 4 {
        4 => {
            let header = Ipv4HeaderSlice::from_slice(packet).ok()?;
            let rest = packet.get(header.slice().len()..)?;
            (header.protocol() == IpNumber::UDP).then_some((
                header.source_addr().into(),
                header.destination_addr().into(),
                rest,
            ))?
        }
        6 => {
            let header = Ipv6HeaderSlice::from_slice(packet).ok()?;
            let rest = packet.get(header.slice().len()..)?;
            (header.next_header() == IpNumber::UDP).then_some((
                header.source_addr().into(),
                header.destination_addr().into(),
                rest,
            ))?
        }
        _ => return None,
    };
    let [a, b, c, d, ..] = *rest else { return None };
    Some(Key {
        guest: SocketAddr::new(destination, u16::from_be_bytes([c, d])),
        remote: SocketAddr::new(source, u16::from_be_bytes([a, b])),
    })
}

/// Whether `address` is the broadcast address of the guest's network.
fn is_subnet_broadcast(cx: &Context<'_>, address: std::net::Ipv4Addr) -> bool {
    cx.config.ipv4.is_some_and(|family| {
        // Networks of one or two addresses have none (RFC 3021).
        family.prefix < 31 && {
            let host = u32::MAX.checked_shr(family.prefix.into()).unwrap_or(0);
            address.to_bits() == family.guest.to_bits() | host
        }
    })
}

/// Tells the guest that its datagram with this payload did not get through.
fn tell(cx: &mut Context<'_>, key: Key, error: IcmpError, offender: Option<IpAddr>, payload: &[u8]) {
    let Some((addresses, ports)) = key.outbound() else { return };
    // A resolver or the host's loopback goes by the name that the guest knows.
    let from = match offender {
        Some(offender) if offender.to_canonical() != cx.outside(key.remote).ip() => {
            cx.inside(SocketAddr::new(offender, 0)).ip()
        }
        _ => key.remote.ip(),
    };
    cx.send_icmp_error(error, from, addresses, &quoted_udp(addresses, ports, payload));
}

/// Tells the guest that this datagram does not get through.
fn refuse(cx: &mut Context<'_>, error: IcmpError, datagram: &UdpView<'_>) {
    let addresses = datagram.ip.addresses;
    cx.send_icmp_error(error, addresses.destination(), addresses, datagram.ip.bytes);
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

/// Whether the host's queue has no room.
fn is_full(error: &io::Error) -> bool {
    matches!(errno(error), Errno::AGAIN | Errno::NOBUFS)
}

/// Whether an error may be that of a datagram sent earlier (ip(7), IP_RECVERR).
fn is_pending(error: Errno) -> bool {
    matches!(
        error,
        Errno::CONNREFUSED | Errno::HOSTUNREACH | Errno::NETUNREACH | Errno::PROTO | Errno::ACCESS
    )
}

/// Whether there are no descriptors, or no memory for them.
pub(crate) fn is_exhausted(error: &io::Error) -> bool {
    matches!(errno(error), Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::NOBUFS)
}

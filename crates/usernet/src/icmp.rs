//! ICMP and ICMPv6 echo, by ping sockets (icmp(7)), which need no privilege.
//!
//! A flow is the guest's address, its identifier and the other end: one socket of the host's, connected. The
//! kernel gives the identifier on the host; the guest's own is put back into the answers. What stands for the host
//! itself is answered for here, whatever the host allows.
//!
//! Everything else that ICMP can say is either made by the protocol that it is about, or not carried.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use etherparse::IpNumber;
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use crate::claims::Claims;
use crate::context::{Context, Spare};
use crate::flow::{Class, FlowTable, Patience};
use crate::frame::{HOP_LIMIT, quoted_icmp};
use crate::packet::{Addresses, IcmpView};
use crate::poller::Token;
use crate::socket;
use crate::udp::{IDLE, is_exhausted};

/// How long flows may be idle. `ping` asks every second; 60 seconds are what RFC 5508 3.2 asks of translators.
const PATIENCE: Patience = [Duration::from_secs(30), Duration::from_secs(60)];

/// Flows at most: a guest that scans a network by ping is no reason to have more.
const MOST_FLOWS: usize = 256;

/// Answers taken from one socket before others have their turn.
const QUANTUM: usize = 8;

/// Echo request and reply, of ICMP and of ICMPv6.
const ECHO: [(u8, u8); 2] = [(8, 0), (128, 129)];

/// The addresses of what the guest sends, and its identifier.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Key {
    addresses: Addresses,
    identifier: u16,
}

impl Key {
    fn of(message: &IcmpView<'_>) -> Self {
        let [a, b, _, _] = message.word;
        Self { addresses: message.ip.addresses, identifier: u16::from_be_bytes([a, b]) }
    }
}

#[derive(Debug)]
struct Flow {
    fd: OwnedFd,
    hop_limit: u8,
    queued: bool,
}

/// All ping flows.
pub(crate) struct Ping {
    flows: FlowTable<Key, Flow>,
    queue: VecDeque<u32>,
    buffer: Vec<u8>,
    /// Whether the user has been told that the host forbids it.
    told: bool,
}

impl Ping {
    pub(crate) fn new(claims: Claims<Key>) -> Self {
        Self {
            flows: FlowTable::new(MOST_FLOWS, PATIENCE, claims),
            queue: VecDeque::new(),
            buffer: vec![0; usize::from(u16::MAX)],
            told: false,
        }
    }

    /// The other engine whose flow this message of the guest's is.
    pub(crate) fn elsewhere(&self, message: &IcmpView<'_>) -> Option<u16> {
        self.flows.elsewhere(&Key::of(message))
    }

    /// How many flows there are.
    pub(crate) fn len(&self) -> usize {
        self.flows.len()
    }

    /// A message from the guest; only echo requests do anything.
    pub(crate) fn packet(&mut self, cx: &mut Context<'_>, message: &IcmpView<'_>) {
        let addresses = message.ip.addresses;
        let (request, reply) = ECHO[usize::from(addresses.is_v6())];
        if (message.kind, message.code) != (request, 0) {
            cx.link.stats.dropped.unsupported += 1;
            return;
        }
        if !cx.config.services.icmp {
            cx.link.stats.dropped.disabled += 1;
            return;
        }
        let target = addresses.destination();
        if cx.is_ours(target) {
            cx.send_icmp(addresses.reversed(), HOP_LIMIT, (reply, 0), message.word, message.payload);
            return;
        }
        if target.is_multicast() || matches!(target, IpAddr::V4(a) if a.is_broadcast()) {
            cx.link.stats.dropped.multicast += 1;
            return;
        }
        if addresses.source().is_unspecified() {
            cx.link.stats.dropped.address += 1;
            return;
        }
        let key = Key::of(message);
        match self.find_or_open(cx, key) {
            Ok(number) => self.send(cx, number, message),
            Err(error) => {
                cx.link.stats.dropped.host += 1;
                self.complain(cx, &error);
            }
        }
    }

    fn find_or_open(&mut self, cx: &mut Context<'_>, key: Key) -> io::Result<u32> {
        if let Some(number) = self.flows.find(&key) {
            return Ok(number);
        }
        let target = cx.outside(SocketAddr::new(key.addresses.destination(), 0)).ip();
        let (fd, _) = match socket::ping(target, key.identifier, &cx.binding(target)) {
            Err(error) if is_exhausted(&error) && self.flows.remove_oldest().is_some() => {
                cx.link.stats.evicted += 1;
                socket::ping(target, key.identifier, &cx.binding(target))?
            }
            result => result?,
        };
        let flow = Flow { fd, hop_limit: HOP_LIMIT, queued: false };
        // The guest's next message will find whose it is.
        let (number, evicted) = self.flows.insert(key, flow, cx.now).ok_or(io::ErrorKind::AlreadyExists)?;
        cx.link.stats.evicted += u64::from(evicted.is_some());
        if let Some((_, flow)) = self.flows.get_mut(number)
            && let Err(error) = cx.poller.add(&flow.fd, Token::Ping(number), EventFlags::IN | EventFlags::ET)
        {
            self.flows.remove(number);
            return Err(error);
        }
        Ok(number)
    }

    fn send(&mut self, cx: &mut Context<'_>, number: u32, message: &IcmpView<'_>) {
        let class = self.flows.class(number).unwrap_or(Class::OneWay);
        self.flows.touch(number, class, cx.now);
        let Some((_, flow)) = self.flows.get_mut(number) else { return };
        let hops = message.ip.hop_limit;
        if flow.hop_limit != hops {
            flow.hop_limit = hops;
            socket::set_hop_limit(&flow.fd, message.ip.addresses.is_v6(), hops);
        }
        // The kernel puts in its identifier and the checksum.
        let bytes = [&[message.kind, 0, 0, 0], message.word.as_slice(), message.payload].concat();
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let sent = rustix::net::send(&flow.fd, &bytes, flags);
        // The first may fail for an error of an earlier one.
        let sent = if sent.is_err() { rustix::net::send(&flow.fd, &bytes, flags) } else { sent };
        if let Err(error) = sent {
            cx.link.stats.dropped.host += 1;
            if error != Errno::AGAIN && error != Errno::NOBUFS {
                let addresses = message.ip.addresses;
                let why = socket::local_error(addresses.is_v6(), error, 0);
                if error != Errno::MSGSIZE {
                    cx.send_icmp_error(why, addresses.destination(), addresses, message.ip.bytes);
                }
            }
        }
    }

    fn complain(&mut self, cx: &mut Context<'_>, error: &io::Error) {
        match error.kind() {
            io::ErrorKind::PermissionDenied if self.told => {}
            io::ErrorKind::PermissionDenied => {
                self.told = true;
                tracing::warn!(
                    "the guest cannot ping: this host allows ping sockets only to the groups in the sysctl \
                     net.ipv4.ping_group_range, and this process is in none of them; \
                     `sysctl -w net.ipv4.ping_group_range='0 2147483647'` allows everybody"
                );
            }
            _ => cx
                .link
                .warnings
                .warn(cx.now, &format_args!("a ping of the guest's does not get through: {error}")),
        }
    }

    /// The socket of flow `number` has something.
    pub(crate) fn ready(&mut self, number: u32) {
        if let Some((_, flow)) = self.flows.get_mut(number)
            && !std::mem::replace(&mut flow.queued, true)
        {
            self.queue.push_back(number);
        }
    }

    /// Whether there are sockets to be read.
    pub(crate) fn has_work(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Reads the sockets that are ready, a little of each.
    pub(crate) fn turn(&mut self, cx: &mut Context<'_>) {
        for _ in 0..self.queue.len() {
            if cx.link.full {
                return;
            }
            let Some(number) = self.queue.pop_front() else { return };
            if self.drain(cx, number) {
                if let Some((_, flow)) = self.flows.get_mut(number) {
                    flow.queued = false;
                }
            } else {
                self.queue.push_back(number);
            }
        }
    }

    /// Reads some of a socket; whether that was all.
    fn drain(&mut self, cx: &mut Context<'_>, number: u32) -> bool {
        for _ in 0..QUANTUM {
            if cx.link.full {
                return false;
            }
            let Some((key, flow)) = self.flows.get_mut(number) else { return true };
            match rustix::net::recv(&flow.fd, &mut self.buffer[..], RecvFlags::DONTWAIT) {
                Ok((length, _)) => {
                    self.flows.touch(number, Class::BothWays, cx.now);
                    answer(cx, key, self.buffer.get(..length).unwrap_or_default());
                }
                Err(Errno::AGAIN) => {
                    let Some(error) = socket::next_error(&flow.fd, &mut self.buffer) else { return true };
                    let quoted = self.buffer.get(..error.length).unwrap_or_default();
                    let from = error.offender.map_or(key.addresses.destination(), |offender| {
                        cx.inside(SocketAddr::new(offender, 0)).ip()
                    });
                    let original = quoted_icmp(key.addresses, key.identifier, quoted);
                    cx.send_icmp_error(error.error, from, key.addresses, &original);
                }
                // It is on the queue of errors too.
                Err(_) => {}
            }
        }
        false
    }

    /// Ends flows whose time is over, and says when the next one's is.
    pub(crate) fn timers(&mut self, now: Instant) -> Option<Instant> {
        while self.flows.remove_expired(now).is_some() {}
        self.flows.deadline()
    }
}

impl Spare for Ping {
    fn give_up(&mut self, now: Instant) -> bool {
        now.checked_sub(IDLE).is_some_and(|since| self.flows.remove_oldest_of(since, |_| true).is_some())
    }
}

/// Gives the guest an answer, with its own identifier.
fn answer(cx: &mut Context<'_>, key: Key, message: &[u8]) {
    let (_, reply) = ECHO[usize::from(key.addresses.is_v6())];
    let [kind, _, _, _, _, _, c, d, payload @ ..] = message else { return };
    if *kind != reply {
        return;
    }
    let [a, b] = key.identifier.to_be_bytes();
    cx.send_icmp(key.addresses.reversed(), HOP_LIMIT, (reply, 0), [a, b, *c, *d], payload);
}

/// The protocol of the family's ICMP.
pub(crate) fn protocol(v6: bool) -> IpNumber {
    if v6 { IpNumber::IPV6_ICMP } else { IpNumber::ICMP }
}

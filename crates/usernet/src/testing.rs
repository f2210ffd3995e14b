//! A guest without a machine, for the tests and fuzz targets of this crate and of others.
//!
//! [`tap`] makes a link in memory: one end is a [`Tap`] for the engine, the other a [`Guest`], which sends and receives
//! whatever frames a test likes. [`Net`] holds a guest and its engine, and runs the engine's turns on the test's
//! own thread.

use std::collections::VecDeque;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use dhcproto::{Decodable as _, v4, v6};
use etherparse::{EtherType, IpNumber, SlicedPacket, TransportSlice};
use rustix::event::{EventfdFlags, eventfd};

use crate::config::{Config, Family, Outbound, Services};
use crate::dhcpv6;
use crate::engine::Engine;
use crate::frame::Header;
use crate::packet::Addresses;
use crate::poller::Events;
use crate::stats::Stats;
use crate::tap::{Abilities, Offload, Sent, Tap};

/// The Ethernet address of [`config`]'s guest.
pub const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
/// The Ethernet address of [`config`]'s gateway.
pub const GATEWAY_MAC: [u8; 6] = [0x9a, 0x55, 0x9a, 0x55, 0x9a, 0x55];
/// [`config`]'s guest.
pub const GUEST_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 15);
/// [`config`]'s gateway, which stands for the host's loopback.
pub const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
/// [`config`]'s guest.
pub const GUEST_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 15);
/// [`config`]'s gateway, which stands for the host's loopback.
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);

/// How long a test waits for what must come before it fails.
const PATIENCE: Duration = Duration::from_secs(20);

/// A network as a guest may have it, of addresses for documentation (RFC 5737, RFC 3849).
#[must_use]
pub fn config() -> Config {
    Config {
        guest_mac: Some(GUEST_MAC),
        gateway_mac: GATEWAY_MAC,
        ipv4: Some(Family {
            guest: GUEST_V4,
            prefix: 24,
            gateway: GATEWAY_V4,
            host_loopback: Some(GATEWAY_V4),
            host_global: None,
        }),
        ipv6: Some(Family {
            guest: GUEST_V6,
            prefix: 64,
            gateway: GATEWAY_V6,
            host_loopback: Some(GATEWAY_V6),
            host_global: None,
        }),
        mtu: 1500,
        dns: vec![
            Ipv4Addr::new(192, 0, 2, 53).into(),
            Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 53).into(),
        ],
        dns_forward: Vec::new(),
        search: vec!["example.org".to_owned(), "example.net".to_owned()],
        hostname: Some("guest".to_owned()),
        fqdn: Some("guest.example.org".to_owned()),
        services: Services::default(),
        forwards: Vec::new(),
        freebind: false,
        outbound: Outbound::default(),
    }
}

/// What the link of [`tap`] can do if a test does not care.
pub const PLAIN: Abilities =
    Abilities { checksum: false, segmentation: [false; 2], datagrams: false, mtu: 1500 };

struct State {
    to_engine: VecDeque<(Vec<u8>, Offload)>,
    to_guest: VecDeque<(Vec<u8>, Offload)>,
    /// Frames to the guest that there is room for.
    room: usize,
    refused: bool,
    closed: bool,
    abilities: Abilities,
}

struct Shared {
    state: Mutex<State>,
    /// Readable when the engine's end may do something.
    engine: OwnedFd,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake_engine(&self) {
        // It can only fail when the counter is full, and then it is readable already.
        let _ = rustix::io::write(&self.engine, &1u64.to_ne_bytes());
    }
}

/// The engine's end of a link in memory.
pub struct MemoryTap(Arc<Shared>);

/// The guest's end of a link in memory.
pub struct Guest(Arc<Shared>);

/// A link in memory that holds `room` frames for the guest.
///
/// # Errors
/// The host is out of descriptors.
pub fn tap(abilities: Abilities, room: usize) -> io::Result<(MemoryTap, Guest)> {
    let state = State {
        to_engine: VecDeque::new(),
        to_guest: VecDeque::new(),
        room,
        refused: false,
        closed: false,
        abilities,
    };
    let engine = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
    let shared = Arc::new(Shared { state: Mutex::new(state), engine });
    Ok((MemoryTap(shared.clone()), Guest(shared)))
}

impl Tap for MemoryTap {
    fn readiness(&self) -> BorrowedFd<'_> {
        self.0.engine.as_fd()
    }

    fn acknowledge(&mut self) {
        // It can only fail when it is clear.
        let _ = rustix::io::read(&self.0.engine, &mut [0; 8]);
    }

    fn abilities(&self) -> Abilities {
        self.0.state().abilities
    }

    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<Option<(usize, Offload)>> {
        let mut state = self.0.state();
        if state.closed {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        let Some((frame, offload)) = state.to_engine.pop_front() else { return Ok(None) };
        let length = frame.len().min(buffer.len());
        buffer[..length].copy_from_slice(&frame[..length]);
        Ok(Some((length, offload)))
    }

    fn send(&mut self, header: &[u8], payload: &[u8], offload: Offload) -> io::Result<Sent> {
        let mut state = self.0.state();
        if state.to_guest.len() >= state.room {
            state.refused = true;
            return Ok(Sent::Full);
        }
        state.to_guest.push_back(([header, payload].concat(), offload));
        Ok(Sent::Yes)
    }
}

impl Guest {
    /// Sends a frame with nothing left to do.
    pub fn send(&self, frame: impl Into<Vec<u8>>) {
        self.send_with(frame, Offload::default());
    }

    /// Sends a frame.
    pub fn send_with(&self, frame: impl Into<Vec<u8>>, offload: Offload) {
        self.0.state().to_engine.push_back((frame.into(), offload));
        self.0.wake_engine();
    }

    /// Takes the next frame, if there is one.
    #[must_use]
    pub fn receive(&self) -> Option<(Vec<u8>, Offload)> {
        let mut state = self.0.state();
        let frame = state.to_guest.pop_front();
        if std::mem::take(&mut state.refused) {
            drop(state);
            self.0.wake_engine();
        }
        frame
    }

    /// Changes how many frames there is room for.
    pub fn set_room(&self, room: usize) {
        self.0.state().room = room;
        self.0.wake_engine();
    }

    /// Cuts the link.
    pub fn close(&self) {
        self.0.state().closed = true;
        self.0.wake_engine();
    }
}

/// A guest and its engine, on one thread.
pub struct Net {
    /// The engine.
    pub engine: Engine,
    /// The guest.
    pub guest: Guest,
    events: Events,
}

impl Net {
    /// With a plain link.
    ///
    /// # Panics
    /// If the engine cannot be made.
    #[must_use]
    pub fn new(config: Config) -> Self {
        Self::with(config, PLAIN, 1024)
    }

    /// With a link that can do this, and holds `room` frames for the guest.
    ///
    /// # Panics
    /// If the engine cannot be made.
    #[must_use]
    pub fn with(config: Config, abilities: Abilities, room: usize) -> Self {
        let (tap, guest) = tap(abilities, room).expect("descriptors for a link");
        Self { engine: Engine::new(config, Box::new(tap)).expect("an engine"), guest, events: Events::new() }
    }

    /// Runs the engine until nothing is left to do at once.
    ///
    /// # Panics
    /// If the engine ends.
    pub fn settle(&mut self) {
        while self.engine.turn(&mut self.events, Some(Duration::ZERO)).expect("the engine runs") {}
    }

    /// Runs the engine until the guest gets a frame of which `look` makes something.
    ///
    /// # Panics
    /// If none comes.
    pub fn expect<T>(&mut self, look: impl Fn(&[u8]) -> Option<T>) -> T {
        let end = Instant::now() + PATIENCE;
        loop {
            while let Some((frame, _)) = self.guest.receive() {
                if let Some(found) = look(&frame) {
                    return found;
                }
            }
            assert!(Instant::now() < end, "the guest was not sent what it should be");
            self.engine.turn(&mut self.events, Some(Duration::from_millis(100))).expect("the engine runs");
        }
    }

    /// Runs the engine until `done` says so.
    ///
    /// # Panics
    /// If it does not.
    pub fn until(&mut self, mut done: impl FnMut(&mut Engine) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !done(&mut self.engine) {
            assert!(Instant::now() < end, "what should happen did not");
            self.engine.turn(&mut self.events, Some(Duration::from_millis(10))).expect("the engine runs");
        }
    }

    /// All frames that the guest was sent and has not taken.
    #[must_use]
    pub fn frames(&self) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| self.guest.receive()).map(|(frame, _)| frame).collect()
    }

    /// Lets the engine believe that it is later.
    pub fn advance(&mut self, by: Duration) {
        self.engine.advance(by);
        self.settle();
    }

    /// What the engine has counted.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.engine.stats()
    }
}

/// The body of the fuzz target `frames`: any bytes as frames, some of which are made right enough to come deep.
///
/// Each frame is two bytes, which say how it is made and how long it is, and then its bytes. Nothing leaves the host: all
/// destinations are one port of its loopback that nobody listens to.
///
/// # Panics
/// Never: that is what the target is for.
pub fn any_frames(mut data: &[u8]) {
    let mut net = Net::with(config(), Abilities { checksum: true, ..PLAIN }, 64);
    net.engine.contain(CLOSED_PORT);
    while let [how, length, rest @ ..] = data {
        let length = rest.len().min(usize::from(*length) * 4);
        let (bytes, rest) = rest.split_at(length);
        data = rest;
        let (frame, offload) = made(*how, bytes);
        net.guest.send_with(frame, offload);
        if how & 0x80 != 0 {
            net.settle();
            while net.guest.receive().is_some() {}
        }
    }
    net.settle();
    net.advance(Duration::from_secs(1000));
    let stats = net.stats();
    assert_eq!((stats.udp_flows, stats.ping_flows), (0, 0), "flows do not outlive their time");
}

/// The body of the fuzz target `dhcp`: any bytes as a client's request, and after a right beginning any options.
///
/// # Panics
/// If an answer cannot be read, which the target is to find out.
pub fn any_dhcp(data: &[u8]) {
    /// A request of BOOTP's from this guest, up to the options.
    fn beginning() -> Vec<u8> {
        let fields = [&[1, 1, 6, 0, 1, 2, 3, 4][..], &[0; 20], &GUEST_MAC, &[0; 202]].concat();
        [&fields[..], &[99, 130, 83, 99]].concat()
    }
    let requests = [data.to_vec(), [&beginning(), data].concat()];
    let addresses = Addresses::V4 { source: Ipv4Addr::UNSPECIFIED, destination: Ipv4Addr::BROADCAST };
    for answer in answers(addresses, 67, requests) {
        v4::Message::from_bytes(&answer).expect("an answer of DHCP");
    }
}

/// The body of the fuzz target `dhcpv6`: any bytes as a client's request, and after each type any options.
///
/// # Panics
/// If an answer cannot be read, which the target is to find out.
pub fn any_dhcpv6(data: &[u8]) {
    let source = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0x77);
    let addresses = Addresses::V6 { source, destination: dhcpv6::SERVERS };
    // A client's identifier, without which most requests are none, and then the options of an association.
    let client = [&[0, 1, 0, 10, 0, 3, 0, 1][..], &GUEST_MAC].concat();
    let length = data.len().saturating_add(12).min(usize::from(u16::MAX)) as u16;
    let association = [&[0, 3][..], &length.to_be_bytes(), &[0; 12]].concat();
    let mut requests = vec![data.to_vec()];
    for kind in 1..=11 {
        let header = [kind, 1, 2, 3];
        requests.push([&header[..], &client, data].concat());
        requests.push([&header[..], &client, &association, data].concat());
    }
    for answer in answers(addresses, 547, requests) {
        v6::Message::from_bytes(&answer).expect("an answer of DHCPv6");
    }
}

/// The body of the fuzz target `ndp`: any bytes as solicitations, from a guest with an address and from one without.
///
/// # Panics
/// If an answer is no packet, which the target is to find out.
pub fn any_ndp(data: &[u8]) {
    let mut net = Net::new(config());
    for source in [GUEST_V6, Ipv6Addr::UNSPECIFIED] {
        let destination = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);
        let addresses = Addresses::V6 { source, destination };
        for kind in [133, 134, 135, 136, 137] {
            let message = with_icmp_checksum(addresses, [&[kind, 0, 0, 0, 0, 0, 0, 0], data].concat());
            let mut header = Header::ethernet(GATEWAY_MAC, GUEST_MAC, EtherType::IPV6);
            header.push_ip(addresses, IpNumber::IPV6_ICMP, 255, message.len());
            net.guest.send([header.as_slice(), &message].concat());
        }
    }
    net.settle();
    for frame in net.frames() {
        SlicedPacket::from_ethernet(&frame).expect("a packet");
    }
}

/// What a server answers to any requests: the payloads of its datagrams.
fn answers(addresses: Addresses, port: u16, requests: impl IntoIterator<Item = Vec<u8>>) -> Vec<Vec<u8>> {
    let mut net = Net::new(config());
    let kind = if addresses.is_v6() { EtherType::IPV6 } else { EtherType::IPV4 };
    for request in requests {
        // No packet is longer.
        let request = request.get(..60_000).unwrap_or(&request);
        let length = 8 + request.len();
        let mut header = Header::ethernet([0xff; 6], GUEST_MAC, kind);
        header.push_ip(addresses, IpNumber::UDP, 255, length);
        header.push(&(port + 1).to_be_bytes());
        header.push(&port.to_be_bytes());
        header.push(&(length as u16).to_be_bytes());
        // A checksum that is left to do.
        header.push(&[0, 1]);
        let offload = Offload { needs_checksum: true, segment: None };
        net.guest.send_with([header.as_slice(), request].concat(), offload);
    }
    net.settle();
    let payload = |frame: &Vec<u8>| match SlicedPacket::from_ethernet(frame).expect("a packet").transport {
        Some(TransportSlice::Udp(datagram)) => Some(datagram.payload().to_vec()),
        _ => None,
    };
    net.frames().iter().filter_map(payload).collect()
}

/// tcpmux, which is nowhere.
const CLOSED_PORT: u16 = 1;

/// A frame from `bytes`, with as much of a beginning as `how` says.
fn made(how: u8, bytes: &[u8]) -> (Vec<u8>, Offload) {
    let offload = Offload { needs_checksum: true, segment: None };
    let (Some(choice), Some(rest)) = (bytes.first(), bytes.get(1..)) else {
        return (bytes.to_vec(), offload);
    };
    let v4 = |destination| Addresses::V4 { source: GUEST_V4, destination };
    let v6 = |destination| Addresses::V6 { source: GUEST_V6, destination };
    let ff02 = |last| Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, last);
    let addresses = match choice % 8 {
        0 => v4(GATEWAY_V4),
        1 => v4(Ipv4Addr::BROADCAST),
        2 => v4(Ipv4Addr::new(192, 0, 2, *choice)),
        3 => v4(Ipv4Addr::new(224, 0, 0, *choice)),
        4 => v6(GATEWAY_V6),
        5 => v6(ff02(2)),
        6 => v6(ff02(u16::from(*choice))),
        _ => v6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, u16::from(*choice))),
    };
    let kind = if addresses.is_v6() { EtherType::IPV6 } else { EtherType::IPV4 };
    let icmp = if addresses.is_v6() { IpNumber::IPV6_ICMP } else { IpNumber::ICMP };
    let ports = |port: u16| [&[0x80, *choice], port.to_be_bytes().as_slice()].concat();
    // UDP's length 0 means all there is.
    let udp = |port: u16| [ports(port).as_slice(), &[0, 0, 0, 1], rest].concat();
    let (protocol, body) = match how % 8 {
        0 => return (bytes.to_vec(), offload),
        1 => (IpNumber::UDP, udp(67)),
        2 => (IpNumber::UDP, udp(547)),
        3 => (IpNumber::UDP, udp(u16::from(*choice))),
        4 => (IpNumber::TCP, [ports(u16::from(*choice)).as_slice(), rest].concat()),
        5 => (icmp, rest.to_vec()),
        6 => {
            let mut header = Header::ethernet(GATEWAY_MAC, GUEST_MAC, EtherType::ARP);
            header.push(&[0, 1, 8, 0, 6, 4, 0]);
            return ([header.as_slice(), rest].concat(), offload);
        }
        _ => (IpNumber(*choice), rest.to_vec()),
    };
    let body = if protocol == icmp { with_icmp_checksum(addresses, body) } else { body };
    let mut header = Header::ethernet(GATEWAY_MAC, GUEST_MAC, kind);
    header.push_ip(addresses, protocol, 255, body.len());
    ([header.as_slice(), &body].concat(), offload)
}

/// An ICMP message with the right checksum, if it is long enough for one.
fn with_icmp_checksum(addresses: Addresses, mut message: Vec<u8>) -> Vec<u8> {
    if let Some(place) = message.get_mut(2..4) {
        place.fill(0);
    }
    let sum = match addresses {
        Addresses::V4 { .. } => etherparse::checksum::Sum16BitWords::new(),
        Addresses::V6 { .. } => addresses.pseudo_header(IpNumber::IPV6_ICMP, message.len()),
    };
    let sum = sum.add_slice(&message).ones_complement();
    if let Some(place) = message.get_mut(2..4) {
        place.copy_from_slice(&sum.to_ne_bytes());
    }
    message
}

//! A guest, a link that loses things, and the world.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use smoltcp::iface::{Config as InterfaceConfig, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{self, Checksum, ChecksumCapabilities, DeviceCapabilities, Medium};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::wire::{HardwareAddress, IpCidr};

use super::super::Tcp;
use super::super::view::{TcpFlags, TcpView};
use super::network;
use crate::claims::Claims;
use crate::config::{Config, Forward};
use crate::context::{Context, Link};
use crate::poller::{Events, Poller, Token};
use crate::tap::{Abilities, Offload, Sent, Tap};

/// Numbers that look random (xorshift64*).
pub(super) struct Dice(u64);

impl Dice {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(super) fn roll(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(super) fn below(&mut self, bound: u64) -> u64 {
        (self.roll() >> 16) % bound
    }

    pub(super) fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length).map(|_| self.roll() as u8).collect()
    }
}

/// How bad a link is, in frames of a hundred.
#[derive(Clone, Copy, Default)]
pub(super) struct Harm {
    pub(super) lost: u64,
    pub(super) twice: u64,
    pub(super) swapped: u64,
}

/// One direction.
struct Wire {
    frames: VecDeque<Vec<u8>>,
    held: Option<Vec<u8>>,
    harm: Harm,
    dice: Dice,
    room: usize,
}

impl Wire {
    fn new(harm: Harm, seed: u64) -> Self {
        Self { frames: VecDeque::new(), held: None, harm, dice: Dice::new(seed), room: usize::MAX }
    }

    fn push(&mut self, frame: Vec<u8>) {
        let mut falls = |share: u64| self.dice.below(100) < share;
        if falls(self.harm.lost) {
            return;
        }
        if falls(self.harm.twice) {
            self.frames.push_back(frame.clone());
        }
        if self.held.is_none() && falls(self.harm.swapped) {
            // It goes after the next one, or when nothing else is left.
            self.held = Some(frame);
            return;
        }
        self.frames.push_back(frame);
        self.frames.extend(self.held.take());
    }

    fn pop(&mut self) -> Option<Vec<u8>> {
        self.frames.pop_front().or_else(|| self.held.take())
    }
}

/// The engine's side of the link.
struct SimTap {
    to_guest: Arc<Mutex<Wire>>,
    abilities: Abilities,
    nothing: OwnedFd,
}

impl Tap for SimTap {
    fn readiness(&self) -> BorrowedFd<'_> {
        self.nothing.as_fd()
    }

    fn acknowledge(&mut self) {}

    fn abilities(&self) -> Abilities {
        self.abilities
    }

    fn receive(&mut self, _: &mut [u8]) -> io::Result<Option<(usize, Offload)>> {
        Ok(None)
    }

    fn send(&mut self, header: &[u8], payload: &[u8], offload: Offload) -> io::Result<Sent> {
        let mut wire = self.to_guest.lock().unwrap();
        if wire.frames.len() >= wire.room {
            return Ok(Sent::Full);
        }
        let ipv6 = header[12..14] == [0x86, 0xdd];
        let frame = [header, payload].concat();
        match offload.segment {
            Some(mss) => {
                assert!(self.abilities.segmentation[usize::from(ipv6)] && offload.needs_checksum);
                assert!(payload.len() > usize::from(mss));
            }
            None => assert!(frame.len() <= 14 + usize::from(self.abilities.mtu), "{}", frame.len()),
        }
        wire.push(frame);
        Ok(Sent::Yes)
    }
}

/// The guest's side.
struct Nic {
    to_guest: Arc<Mutex<Wire>>,
    from_guest: Wire,
    mtu: usize,
    checksums: bool,
}

struct Received(Vec<u8>);

impl phy::RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0[14..])
    }
}

struct Transmitted<'a>(&'a mut Wire);

impl phy::TxToken for Transmitted<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut packet = vec![0; length];
        let result = f(&mut packet);
        self.0.push(packet);
        result
    }
}

impl phy::Device for Nic {
    type RxToken<'a> = Received;
    type TxToken<'a> = Transmitted<'a>;

    fn receive(&mut self, _: smoltcp::time::Instant) -> Option<(Received, Transmitted<'_>)> {
        let frame = self.to_guest.lock().unwrap().pop()?;
        Some((Received(frame), Transmitted(&mut self.from_guest)))
    }

    fn transmit(&mut self, _: smoltcp::time::Instant) -> Option<Transmitted<'_>> {
        Some(Transmitted(&mut self.from_guest))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = self.mtu;
        capabilities.checksum = ChecksumCapabilities::default();
        if !self.checksums {
            capabilities.checksum.tcp = Checksum::Tx;
        }
        capabilities
    }
}

/// A guest's TCP segment, from a packet without an Ethernet header.
pub(super) fn view(packet: &[u8]) -> Option<TcpView<'_>> {
    let sliced = SlicedPacket::from_ip(packet).ok()?;
    let (source, destination): (IpAddr, IpAddr) = match sliced.net? {
        NetSlice::Ipv4(ip) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
        NetSlice::Ipv6(ip) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
        NetSlice::Arp(_) => return None,
    };
    let Some(TransportSlice::Tcp(tcp)) = sliced.transport else { return None };
    let options = &tcp.header_slice()[20..];
    Some(TcpView {
        source,
        destination,
        source_port: tcp.source_port(),
        destination_port: tcp.destination_port(),
        seq: tcp.sequence_number(),
        ack: tcp.acknowledgment_number(),
        flags: TcpFlags { syn: tcp.syn(), ack: tcp.ack(), fin: tcp.fin(), rst: tcp.rst(), psh: tcp.psh() },
        window: tcp.window_size(),
        options,
        payload: tcp.payload(),
    })
}

/// What a simulation is made of.
#[derive(Clone, Copy)]
pub(super) struct Setup {
    pub(super) seed: u64,
    pub(super) to_guest: Harm,
    pub(super) from_guest: Harm,
    pub(super) mtu: u16,
    pub(super) offload: bool,
    /// How many frames the link holds.
    pub(super) room: usize,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            seed: 1,
            to_guest: Harm::default(),
            from_guest: Harm::default(),
            mtu: 1500,
            offload: false,
            room: usize::MAX,
        }
    }
}

/// Everything.
pub(super) struct Sim {
    pub(super) tcp: Tcp,
    config: Config,
    link: Link,
    pub(super) poller: Poller,
    pub(super) now: Instant,
    start: Instant,
    nic: Nic,
    interface: Interface,
    pub(super) sockets: SocketSet<'static>,
    next_port: u16,
    /// Bytes of payload that the guest sent, repeats included.
    pub(super) payload_from_guest: u64,
}

impl Sim {
    pub(super) fn new(setup: Setup) -> Self {
        let to_guest =
            Arc::new(Mutex::new(Wire { room: setup.room, ..Wire::new(setup.to_guest, setup.seed) }));
        let abilities = Abilities {
            checksum: setup.offload,
            segmentation: [setup.offload; 2],
            datagrams: false,
            mtu: setup.mtu,
        };
        let nothing = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        let tap = Box::new(SimTap { to_guest: to_guest.clone(), abilities, nothing });
        let mut nic = Nic {
            to_guest,
            from_guest: Wire::new(setup.from_guest, setup.seed + 1000),
            mtu: setup.mtu.into(),
            checksums: !setup.offload,
        };
        let mut config = InterfaceConfig::new(HardwareAddress::Ip);
        config.random_seed = setup.seed;
        let mut interface = Interface::new(config, &mut nic, smoltcp::time::Instant::ZERO);
        interface.update_ip_addrs(|addresses| {
            addresses.push(IpCidr::new(Ipv4Addr::new(10, 0, 2, 15).into(), 24)).unwrap();
            addresses.push(IpCidr::new("fd00::15".parse::<Ipv6Addr>().unwrap().into(), 64)).unwrap();
        });
        interface.routes_mut().add_default_ipv4_route(Ipv4Addr::new(10, 0, 2, 2)).unwrap();
        let now = Instant::now();
        Self {
            tcp: Tcp::new(Claims::alone(), false),
            config: network(),
            link: Link::new(tap, &network()),
            poller: Poller::new().unwrap(),
            now,
            start: now,
            nic,
            interface,
            sockets: SocketSet::new(Vec::new()),
            next_port: 40_000,
            payload_from_guest: 0,
        }
    }

    /// Has the engine do something.
    pub(super) fn engine<R>(&mut self, f: impl FnOnce(&mut Tcp, &mut Context<'_>) -> R) -> R {
        let mut cx = Context {
            config: &self.config,
            link: &mut self.link,
            poller: &self.poller,
            now: self.now,
            spare: None,
        };
        f(&mut self.tcp, &mut cx)
    }

    fn guest_time(&self) -> smoltcp::time::Instant {
        smoltcp::time::Instant::from_micros(self.now.duration_since(self.start).as_micros() as i64)
    }

    /// Flows that had to make room.
    pub(super) fn evicted(&self) -> u64 {
        self.link.stats.evicted
    }

    /// Forwards a port of the host's. Returns where it listens.
    pub(super) fn listen(&mut self, forward: &Forward) -> SocketAddr {
        self.engine(|tcp, cx| tcp.listen(cx, forward)).unwrap()
    }

    /// A socket of the guest's with buffers of `size` bytes.
    pub(super) fn socket(&mut self, size: usize) -> SocketHandle {
        let buffer = || SocketBuffer::new(vec![0; size]);
        self.sockets.add(Socket::new(buffer(), buffer()))
    }

    pub(super) fn guest(&mut self, handle: SocketHandle) -> &mut Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// A connection of the guest's to the host's loopback, at `port`.
    pub(super) fn connect(&mut self, port: u16, ipv6: bool, size: usize) -> SocketHandle {
        let gateway: IpAddr =
            if ipv6 { "fd00::2".parse().unwrap() } else { Ipv4Addr::new(10, 0, 2, 2).into() };
        self.connect_to(SocketAddr::new(gateway, port), size)
    }

    pub(super) fn connect_to(&mut self, to: SocketAddr, size: usize) -> SocketHandle {
        let handle = self.socket(size);
        self.next_port = self.next_port.checked_add(1).unwrap_or(40_000);
        let socket = self.sockets.get_mut::<Socket<'_>>(handle);
        socket.connect(self.interface.context(), (to.ip(), to.port()), self.next_port).unwrap();
        handle
    }

    /// One round of everybody. Whether anything happened.
    fn round(&mut self, wait: Duration) -> bool {
        let time = self.guest_time();
        let mut busy = self.interface.poll(time, &mut self.nic, &mut self.sockets)
            == smoltcp::iface::PollResult::SocketStateChanged;
        while let Some(packet) = self.nic.from_guest.pop() {
            busy = true;
            let Some(view) = view(&packet) else { continue };
            self.payload_from_guest += view.payload.len() as u64;
            self.engine(|tcp, cx| tcp.segment(cx, &view));
        }
        let mut events = Events::new();
        self.poller.wait(&mut events, Some(wait)).unwrap();
        for event in events.iter() {
            busy = true;
            self.engine(|tcp, cx| match event.token {
                Token::Tcp(number) => tcp.ready(cx, number, event.flags),
                Token::TcpListener(number) => tcp.accept(cx, number),
                other => panic!("{other:?}"),
            });
        }
        if self.link.full {
            self.link.full = false;
            self.engine(|tcp, cx| tcp.resume(cx));
        }
        let now = self.now;
        let next = self.engine(|tcp, cx| tcp.timers(cx));
        busy |= next.is_some_and(|at| at <= now);
        busy |= !self.nic.to_guest.lock().unwrap().frames.is_empty();
        busy |= self.nic.to_guest.lock().unwrap().held.is_some();
        busy
    }

    /// Goes on until `world`, called again and again, says that it is finished. It returns whether it is, and whether
    /// it did something.
    pub(super) fn run(&mut self, mut world: impl FnMut(&mut Self) -> (bool, bool)) {
        let mut idle = 0;
        loop {
            let (finished, active) = world(self);
            if finished {
                return;
            }
            // The kernel may have timers of its own that are not over: so it is waited for, shortly.
            let wait = Duration::from_millis(u64::from(idle > 1));
            if self.round(wait) || active {
                idle = 0;
                continue;
            }
            idle += 1;
            assert!(idle < 5000, "nothing goes on: {} flows, {:?}", self.tcp.flows(), self.now - self.start);
            let guest = self.interface.poll_delay(self.guest_time(), &self.sockets);
            let guest = guest.map(|delay| self.now + Duration::from_micros(delay.total_micros()));
            let own = self.engine(|tcp, cx| tcp.timers(cx));
            if idle > 1
                && let Some(next) = guest.into_iter().chain(own).min()
            {
                self.now = self.now.max(next);
            }
        }
    }

    /// Lets `time` pass.
    pub(super) fn pass(&mut self, time: Duration) {
        let until = self.now + time;
        while self.now < until {
            while self.round(Duration::ZERO) {}
            let guest = self.interface.poll_delay(self.guest_time(), &self.sockets);
            let guest = guest.map(|delay| self.now + Duration::from_micros(delay.total_micros().max(1)));
            let own = self.engine(|tcp, cx| tcp.timers(cx));
            self.now =
                guest.into_iter().chain(own).chain([until]).min().unwrap_or(until).min(until).max(self.now);
        }
        while self.round(Duration::ZERO) {}
    }
}

/// One end of a connection that has something to say, and listens.
pub(super) struct Talk {
    pub(super) say: Vec<u8>,
    said: usize,
    pub(super) heard: Vec<u8>,
    /// Whether the other end has ended.
    pub(super) ended: bool,
    closed: bool,
    /// The most that is heard at a time; nothing if zero.
    pub(super) sip: usize,
    /// Whether it ends its direction when all is said.
    pub(super) close: bool,
}

impl Talk {
    pub(super) fn new(say: Vec<u8>) -> Self {
        Self { say, said: 0, heard: Vec::new(), ended: false, closed: false, sip: 1 << 20, close: true }
    }

    pub(super) fn finished(&self) -> bool {
        self.ended && self.closed
    }

    /// All that can be done now by a socket of the world's. Whether anything was.
    pub(super) fn world(&mut self, stream: &mut TcpStream) -> bool {
        let mut active = false;
        while self.said < self.say.len() {
            match stream.write(&self.say[self.said..]) {
                Ok(n) => self.said += n,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("{error}"),
            }
            active = true;
        }
        if self.said == self.say.len() && self.close && !self.closed {
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            self.closed = true;
            active = true;
        }
        let mut buffer = vec![0; self.sip];
        while !self.ended && self.sip > 0 {
            match stream.read(&mut buffer) {
                Ok(0) => self.ended = true,
                Ok(n) => self.heard.extend_from_slice(&buffer[..n]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("{error}"),
            }
            active = true;
        }
        active
    }

    /// The same by a socket of the guest's.
    pub(super) fn guest(&mut self, socket: &mut Socket<'_>) -> bool {
        let mut active = false;
        if socket.can_send() && self.said < self.say.len() {
            let n = socket.send_slice(&self.say[self.said..]).unwrap();
            self.said += n;
            active |= n > 0;
        }
        if self.said == self.say.len() && self.close && !self.closed && socket.may_send() {
            socket.close();
            self.closed = true;
            active = true;
        }
        if self.sip > 0 && socket.can_recv() {
            let sip = self.sip;
            let n = socket.recv(|bytes| {
                let n = bytes.len().min(sip);
                self.heard.extend_from_slice(&bytes[..n]);
                (n, n)
            });
            active |= n.unwrap() > 0;
        }
        let over = matches!(socket.state(), State::CloseWait | State::LastAck | State::Closing)
            || matches!(socket.state(), State::TimeWait)
            || (socket.state() == State::Closed && self.closed);
        if over && !socket.can_recv() && !self.ended {
            self.ended = true;
            active = true;
        }
        active
    }
}

/// A socket of the world's that listens, and its port.
pub(super) fn listener(ipv6: bool) -> (TcpListener, u16) {
    let listener = TcpListener::bind(if ipv6 { "[::1]:0" } else { "127.0.0.1:0" }).unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

pub(super) fn accept(listener: &TcpListener) -> Option<TcpStream> {
    match listener.accept() {
        Ok((stream, _)) => {
            stream.set_nonblocking(true).unwrap();
            Some(stream)
        }
        Err(error) if error.kind() == ErrorKind::WouldBlock => None,
        Err(error) => panic!("{error}"),
    }
}

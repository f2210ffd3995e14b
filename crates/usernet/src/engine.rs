//! The engine: one thread, one epoll loop, everything in turn.
//!
//! A turn of the loop waits for an event, or until something's time has come, and then does a bounded amount of everything
//! that there is to do:
//!
//! 1. What the poller reports is handed to its owner. TCP works on its sockets at once; UDP and ping sockets are queued.
//! 2. At most [`FRAMES`] frames are taken from the tap. Each is taken apart ([`packet::parse`]), and what is
//!    left of it goes to the protocol that it is for.
//! 3. Queued sockets are read, a few datagrams each, while the guest takes what they give.
//! 4. Timers.
//! 5. The tap is told that these were all the frames for now ([`Tap::flush`]).
//!
//! If frames or queued sockets are left, the next turn does not wait. So a guest that sends without end cannot keep
//! the host's sockets from being served, nor the other way round.
//!
//! When the tap is full nothing more is read for the guest: data stays in the host's sockets, whose peers are slowed
//! down or, with UDP, whose buffers overflow. The tap becomes ready again by itself.
//!
//! **Multicast and broadcast** do not cross, in either direction: a socket of the host's that joined a group would need an
//! interface to do so on, and would hear what was meant for the host. Neighbour discovery and DHCP, which stay on the
//! link, are answered; everything else to a group or to everybody is dropped, counted (`multicast` in
//! [`Dropped`](crate::stats::Dropped)) and answered with nothing, as RFC 1122 3.2.2 has it. IGMP and MLD reports are not
//! acted upon.
//!
//! **Fragments** from the guest are not put together: the first of a packet is answered with "reassembly time exceeded", the
//! others with nothing. Datagrams from the host that are too long for the link are cut into fragments.
//!
//! Others talk to the engine by a [`Handle`]: a queue of commands, and an eventfd that wakes the loop.

use std::collections::HashSet;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use rustix::event::{EventfdFlags, eventfd};

use crate::claims::Claims;
use crate::config::{Config, Forward, MacAddress, Transport};
use crate::context::{Context, Link, Spare};
use crate::forward::explained;
use crate::frame::IcmpError;
use crate::group::{self, Group, Guest, Letter, Member};
use crate::icmp::Ping;
use crate::ndp::{self, Ndp};
use crate::packet::{self, Addresses, Frame, IcmpView, Packet, UdpView};
use crate::poller::{Events, Poller, Ready, Token};
use crate::splice::Bypass;
use crate::stats::Stats;
use crate::tap::{LONGEST_FRAME, Tap};
use crate::tcp::Tcp;
use crate::udp::Udp;
use crate::{arp, dhcp, dhcpv6};

/// Frames taken from the guest before others have their turn.
const FRAMES: usize = 128;

/// ICMP: destination unreachable, and its code of a port.
const PORT_UNREACHABLE: [(u8, u8); 2] = [(3, 3), (1, 4)];

/// What an engine is asked.
enum Command {
    Add(Forward, Sender<io::Result<Forward>>),
    Remove(Forward, Sender<bool>),
    List(Sender<Vec<Forward>>),
    Stats(Sender<Stats>),
    Reconfigure(Box<Config>, Sender<()>),
    Stop,
}

/// Where an engine is spoken to.
#[derive(Debug)]
struct Door {
    commands: Sender<Command>,
    wake: Arc<OwnedFd>,
}

/// A way to talk to the engines of a guest, which run on other threads.
#[derive(Clone, Debug)]
pub struct Handle {
    engines: Arc<[Door]>,
}

impl Handle {
    /// Has [`Engine::run`] return. Does nothing if it has already.
    pub fn stop(&self) {
        for door in self.engines.iter() {
            let _ = door.commands.send(Command::Stop);
            group::wake(&door.wake);
        }
    }

    /// Forwards one more port. Returns the forward as it is named from now on: with the port that the host chose,
    /// if it was asked for port 0.
    ///
    /// # Errors
    /// As [`Engine::new`] has them for the port, `AlreadyExists` if it is forwarded already, or `BrokenPipe` if the
    /// engine has ended.
    pub fn add_forward(&self, forward: Forward) -> io::Result<Forward> {
        let mut bound = forward;
        for (index, door) in self.engines.iter().enumerate() {
            match ask(door, |reply| Command::Add(bound.clone(), reply)).and_then(|answer| answer) {
                Ok(forward) => bound = forward,
                Err(error) => {
                    for door in &self.engines[..index] {
                        let _ = ask(door, |reply| Command::Remove(bound.clone(), reply));
                    }
                    return Err(error);
                }
            }
        }
        Ok(bound)
    }

    /// Ends the forwarding of a port, and with it the UDP flows that came by it; connections go on. Returns whether it
    /// was forwarded.
    ///
    /// # Errors
    /// `BrokenPipe` if the engine has ended.
    pub fn remove_forward(&self, forward: Forward) -> io::Result<bool> {
        let mut removed = false;
        for door in self.engines.iter() {
            removed |= ask(door, |reply| Command::Remove(forward.clone(), reply))?;
        }
        Ok(removed)
    }

    /// The ports that are forwarded, in the order in which they were added.
    ///
    /// # Errors
    /// `BrokenPipe` if the engine has ended.
    pub fn forwards(&self) -> io::Result<Vec<Forward>> {
        // All have the same.
        self.engines.first().map_or(Ok(Vec::new()), |door| ask(door, Command::List))
    }

    /// Gives the guest another network while it runs: addresses, gateways, resolvers, names, MTU, services, and what
    /// outbound sockets are bound to. The Ethernet addresses and the forwarded ports stay as they are, and flows go on.
    ///
    /// The guest learns of IPv6 by a router advertisement at once, and of IPv4 when it renews its lease.
    ///
    /// # Errors
    /// `BrokenPipe` if the engine has ended.
    pub fn reconfigure(&self, config: Config) -> io::Result<()> {
        for door in self.engines.iter() {
            ask(door, |reply| Command::Reconfigure(Box::new(config.clone()), reply))?;
        }
        Ok(())
    }

    /// What the engines have counted, together.
    ///
    /// # Errors
    /// `BrokenPipe` if the engine has ended.
    pub fn stats(&self) -> io::Result<Stats> {
        let mut sum = Stats::default();
        for door in self.engines.iter() {
            sum += ask(door, Command::Stats)?;
        }
        Ok(sum)
    }
}

fn ask<T>(door: &Door, command: impl FnOnce(Sender<T>) -> Command) -> io::Result<T> {
    let (reply, answer) = channel();
    door.commands.send(command(reply)).map_err(|_| io::ErrorKind::BrokenPipe)?;
    group::wake(&door.wake);
    answer.recv().map_err(|_| io::ErrorKind::BrokenPipe.into())
}

/// A guest's network: see above.
pub struct Engine {
    config: Config,
    /// What is in `config.forwards`, to be asked for one of them.
    forwarded: HashSet<Forward>,
    link: Link,
    poller: Poller,
    /// Where frames are taken to.
    frame: Vec<u8>,
    /// Whether the tap may have more frames.
    more_frames: bool,
    tcp: Tcp,
    udp: Udp,
    ping: Ping,
    ndp: Ndp,
    deadline: Option<Instant>,
    handle: Handle,
    wake: Arc<OwnedFd>,
    commands: Receiver<Command>,
    /// Its place among several.
    member: Option<Member>,
    /// A frame that is another engine's, which has no room for it now.
    undelivered: Option<(u16, Letter)>,
    stopped: bool,
    /// How much later the engine believes it is: for tests.
    ahead: Duration,
}

impl Engine {
    /// An engine for the guest behind `tap`, with its forwarded ports open.
    ///
    /// # Errors
    /// The host is out of descriptors, or a port cannot be listened to: the error then names it.
    pub fn new(config: Config, tap: Box<dyn Tap>) -> io::Result<Self> {
        let mut engines = Self::several(config, vec![tap])?;
        engines.pop().ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    /// An engine for each of `taps`, which are the queues of one link, with the guest's forwarded ports open.
    ///
    /// # Errors
    /// As [`Engine::new`].
    pub(crate) fn several(config: Config, taps: Vec<Box<dyn Tap>>) -> io::Result<Vec<Self>> {
        let mut doors = Vec::new();
        let mut commands = Vec::new();
        for _ in &taps {
            let wake = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?);
            let (sender, receiver) = channel();
            doors.push(Door { commands: sender, wake });
            commands.push(receiver);
        }
        let wakes: Vec<_> = doors.iter().map(|door| Arc::clone(&door.wake)).collect();
        let group = (taps.len() > 1).then(|| Arc::new(Group::new(&wakes)));
        let handle = Handle { engines: doors.into() };
        let mut engines = Vec::new();
        for (number, ((tap, commands), wake)) in taps.into_iter().zip(commands).zip(wakes).enumerate() {
            // There are `group::MOST` at most.
            let member = group.as_ref().map(|group| Member::new(Arc::clone(group), number as u16));
            engines.push(Self::one(&config, tap, handle.clone(), wake, commands, member)?);
        }
        for mut forward in config.forwards {
            for engine in &mut engines {
                // The first finds the port that the others share.
                forward = engine.add_forward(forward)?;
            }
        }
        Ok(engines)
    }

    fn one(
        config: &Config,
        tap: Box<dyn Tap>,
        handle: Handle,
        wake: Arc<OwnedFd>,
        commands: Receiver<Command>,
        member: Option<Member>,
    ) -> io::Result<Self> {
        let poller = Poller::new()?;
        poller.add(tap.readiness(), Token::Tap, EventFlags::IN)?;
        poller.add(&wake, Token::Wake, EventFlags::IN)?;
        let shares = member.is_some();
        let (tcp, udp, ping) = match &member {
            Some(member) => (member.tcp(), member.udp(), member.ping()),
            None => (Claims::alone(), Claims::alone(), Claims::alone()),
        };
        Ok(Self {
            link: Link::new(tap, config),
            poller,
            frame: vec![0; LONGEST_FRAME],
            // The guest may have been faster.
            more_frames: true,
            tcp: Tcp::new(tcp, shares),
            udp: Udp::new(udp, shares),
            ping: Ping::new(ping),
            ndp: Ndp::default(),
            deadline: None,
            handle,
            wake,
            commands,
            member,
            undelivered: None,
            stopped: false,
            ahead: Duration::ZERO,
            config: Config { forwards: Vec::new(), ..config.clone() },
            forwarded: HashSet::new(),
        })
    }

    /// A way to talk to the engine from elsewhere.
    #[must_use]
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Has what comes from the host's loopback to forwarded ports go by `bypass`, without frames.
    pub fn set_bypass(&mut self, bypass: Bypass) {
        self.link.bypass = Some(bypass);
    }

    /// Serves the guest until [`Handle::stop`].
    ///
    /// # Errors
    /// When the link to the guest is gone, or the host's epoll fails.
    pub fn run(mut self) -> io::Result<()> {
        let mut events = Events::new();
        while !self.stopped {
            self.turn(&mut events, None)?;
        }
        Ok(())
    }

    /// One turn of the loop, which waits for `longest` at most. Returns whether there was anything to do.
    pub(crate) fn turn(&mut self, events: &mut Events, longest: Option<Duration>) -> io::Result<bool> {
        let timeout = self.timeout(longest);
        self.poller.wait(events, timeout)?;
        let now = self.now();
        let mut busy = self.timeout(None) == Some(Duration::ZERO);
        for ready in events.iter() {
            busy = true;
            self.dispatch(ready, now);
        }
        self.take_news();
        self.take_frames(now)?;
        if let Some(member) = &mut self.member {
            member.tell(self.link.guest());
        }
        self.serve_sockets(now);
        self.serve_timers(now);
        self.link.tap.flush()?;
        match self.link.lost.take() {
            Some(error) => Err(error),
            None => Ok(busy),
        }
    }

    /// The ports that are forwarded.
    #[cfg(test)]
    pub(crate) fn forwards(&self) -> &[Forward] {
        &self.config.forwards
    }

    /// Has everything that leaves the host go to this port of its loopback.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn contain(&mut self, port: u16) {
        self.link.contained = Some(port);
    }

    /// Where the host's socket goes for what the guest calls `destination`.
    #[cfg(test)]
    pub(crate) fn outside(&mut self, destination: std::net::SocketAddr) -> std::net::SocketAddr {
        let now = self.now();
        Context { config: &self.config, link: &mut self.link, poller: &self.poller, now, spare: None }
            .outside(destination)
    }

    /// Lets the engine believe that it is later.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn advance(&mut self, by: Duration) {
        self.ahead += by;
    }

    fn now(&self) -> Instant {
        Instant::now() + self.ahead
    }

    /// How long to wait for events.
    fn timeout(&self, longest: Option<Duration>) -> Option<Duration> {
        let queued = (self.udp.has_work() || self.ping.has_work()) && !self.link.full;
        if self.more_frames || queued {
            return Some(Duration::ZERO);
        }
        let until = self.deadline.map(|deadline| deadline.saturating_duration_since(self.now()));
        [longest, until].into_iter().flatten().min()
    }

    fn dispatch(&mut self, ready: Ready, now: Instant) {
        let mut cx =
            Context { config: &self.config, link: &mut self.link, poller: &self.poller, now, spare: None };
        match ready.token {
            Token::Tap => {
                cx.link.tap.acknowledge();
                self.more_frames = true;
                if cx.link.full {
                    cx.link.flush();
                    self.tcp.resume(&mut cx);
                }
            }
            Token::Wake => {
                // It can only fail when it is clear.
                let _ = rustix::io::read(&self.wake, &mut [0; 8]);
                self.obey();
                self.take_letters(now);
            }
            Token::Tcp(number) => self.tcp.ready(&mut cx, number, ready.flags),
            Token::TcpListener(number) => {
                let mut others = Datagrams { udp: &mut self.udp, ping: &mut self.ping };
                self.tcp.accept(&mut Context { spare: Some(&mut others), ..cx }, number);
            }
            Token::Udp(number) => self.udp.ready(number, ready.flags),
            Token::UdpListener(number) => self.udp.listener_ready(number, ready.flags),
            Token::Ping(number) => self.ping.ready(number),
        }
    }

    fn obey(&mut self) {
        while let Ok(command) = self.commands.try_recv() {
            // Whoever asked may have gone: then nobody wants the answer.
            match command {
                Command::Add(forward, reply) => {
                    let _ = reply.send(self.add_forward(forward));
                }
                Command::Remove(forward, reply) => {
                    let _ = reply.send(self.remove_forward(&forward));
                }
                Command::List(reply) => {
                    let _ = reply.send(self.config.forwards.clone());
                }
                Command::Stats(reply) => {
                    let _ = reply.send(self.stats());
                }
                Command::Reconfigure(config, reply) => {
                    self.reconfigure(*config);
                    let _ = reply.send(());
                }
                Command::Stop => self.stopped = true,
            }
        }
    }

    pub(crate) fn reconfigure(&mut self, config: Config) {
        let forwards = std::mem::take(&mut self.config.forwards);
        let Config { guest_mac, gateway_mac, .. } = self.config;
        let config = Config { guest_mac, gateway_mac, forwards, ..config };
        let old = std::mem::replace(&mut self.config, config);
        self.link.reconfigured(&self.config);
        self.udp.reconfigured(&old, &self.config);
        self.ndp.reconfigured(&old, &self.config, self.now());
    }

    pub(crate) fn add_forward(&mut self, forward: Forward) -> io::Result<Forward> {
        if self.forwarded.contains(&forward) {
            let error = format!("{} {} is forwarded already", forward.transport, forward.listen);
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, error));
        }
        let now = self.now();
        let cx =
            Context { config: &self.config, link: &mut self.link, poller: &self.poller, now, spare: None };
        let listen = match forward.transport {
            Transport::Tcp => self.tcp.listen(&cx, &forward),
            Transport::Udp => self.udp.listen(&cx, &forward),
        };
        let listen = listen.map_err(|error| explained(&forward, &error))?;
        let forward = Forward { listen, ..forward };
        self.forwarded.insert(forward.clone());
        self.config.forwards.push(forward.clone());
        Ok(forward)
    }

    fn remove_forward(&mut self, forward: &Forward) -> bool {
        let removed = match forward.transport {
            Transport::Tcp => self.tcp.unlisten(forward),
            Transport::Udp => self.udp.unlisten(forward),
        };
        self.forwarded.remove(forward);
        self.config.forwards.retain(|other| other != forward);
        if let (Transport::Udp, Some(bypass)) = (forward.transport, &self.link.bypass) {
            bypass.forget_closed();
        }
        removed
    }

    pub(crate) fn stats(&self) -> Stats {
        Stats {
            tcp_flows: self.tcp.flows(),
            udp_flows: self.udp.len(),
            ping_flows: self.ping.len(),
            ..self.link.stats
        }
    }

    fn take_frames(&mut self, now: Instant) -> io::Result<()> {
        if !self.more_frames {
            return Ok(());
        }
        let mut buffer = std::mem::take(&mut self.frame);
        let result = self.take_some(&mut buffer, now);
        self.frame = buffer;
        self.more_frames = result?;
        Ok(())
    }

    /// Takes frames from the tap; whether there may be more.
    fn take_some(&mut self, buffer: &mut [u8], now: Instant) -> io::Result<bool> {
        if let Some((to, letter)) = self.undelivered.take()
            && !self.hand_over(to, letter)
        {
            return Ok(false);
        }
        for _ in 0..FRAMES {
            let Some((length, offload)) = self.link.tap.receive(buffer)? else { return Ok(false) };
            self.link.stats.frames_in += 1;
            self.link.stats.bytes_in += length as u64;
            let bytes = buffer.get(..length).unwrap_or_default();
            match packet::parse(bytes, offload) {
                Ok(frame) => match self.elsewhere(&frame) {
                    None => self.handle_frame(&frame, now),
                    Some(to) if self.hand_over(to, Letter { frame: bytes.to_vec(), offload }) => {}
                    Some(_) => return Ok(false),
                },
                Err(why) => self.link.stats.refused(why),
            }
        }
        Ok(true)
    }

    /// The other engine that a frame is for.
    fn elsewhere(&self, frame: &Frame<'_>) -> Option<u16> {
        self.member.as_ref()?;
        match &frame.packet {
            Packet::Tcp(segment) => self.tcp.elsewhere(segment),
            Packet::Udp(datagram) => self.udp.elsewhere(datagram),
            Packet::Icmp(message) if is_refusal(message) => self.udp.refused_elsewhere(message.payload),
            Packet::Icmp(message) => self.ping.elsewhere(message),
            Packet::Arp(_) | Packet::Fragment(_) | Packet::Other(_) => None,
        }
    }

    /// Gives another engine a frame that is for it. If that has no room, the frame is kept, and it is false.
    fn hand_over(&mut self, to: u16, letter: Letter) -> bool {
        let Some(member) = &self.member else { return true };
        self.undelivered = member.hand_over(to, letter).err().map(|letter| (to, letter));
        self.undelivered.is_none()
    }

    /// Takes what other engines have handed over.
    fn take_letters(&mut self, now: Instant) {
        let Some(member) = &self.member else { return };
        for Letter { frame, offload } in member.letters() {
            // Its owner until just now may have been this one: then it is as any frame that belongs to nothing.
            match packet::parse(&frame, offload) {
                Ok(frame) => self.handle_frame(&frame, now),
                Err(why) => self.link.stats.refused(why),
            }
        }
        // Whoever wakes us may have made room for what is undelivered.
        self.more_frames |= self.undelivered.is_some();
    }

    /// Learns from the other engines what the guest was seen with.
    fn take_news(&mut self) {
        if let Some(member) = &mut self.member
            && let Some(Guest { mac, v4, v6 }) = member.news()
        {
            (self.link.guest_mac, self.link.guest_v4, self.link.guest_v6) = (mac, v4, v6);
        }
    }

    fn handle_frame(&mut self, frame: &Frame<'_>, now: Instant) {
        let mut cx =
            Context { config: &self.config, link: &mut self.link, poller: &self.poller, now, spare: None };
        if !is_for_us(frame.destination, self.config.gateway_mac) {
            cx.link.stats.dropped.other_mac += 1;
            return;
        }
        learn(&mut cx, frame);
        if self.member.as_ref().is_none_or(Member::is_first) {
            self.ndp.guest_is_there(&cx);
        }
        let services = self.config.services;
        match &frame.packet {
            Packet::Arp(packet) => arp::packet(&mut cx, packet),
            Packet::Tcp(_) if !services.tcp => cx.link.stats.dropped.disabled += 1,
            Packet::Tcp(segment) => {
                let mut others = Datagrams { udp: &mut self.udp, ping: &mut self.ping };
                self.tcp.segment(&mut Context { spare: Some(&mut others), ..cx }, segment);
            }
            Packet::Udp(datagram) if is_dhcp(&cx, datagram) => dhcp::packet(&mut cx, datagram),
            Packet::Udp(datagram) if is_dhcpv6(&cx, datagram) => dhcpv6::packet(&mut cx, datagram),
            Packet::Udp(_) if !services.udp => cx.link.stats.dropped.disabled += 1,
            Packet::Udp(datagram) => self.udp.datagram(&mut cx, datagram),
            Packet::Icmp(message) if is_solicitation(message) => ndp::packet(&mut cx, message),
            Packet::Icmp(message) if is_refusal(message) => self.udp.refused_by_guest(message.payload),
            Packet::Icmp(message) => self.ping.packet(&mut cx, message),
            Packet::Fragment(ip) => {
                cx.link.stats.dropped.fragment += 1;
                // What a host says that waited for the others in vain (RFC 792, RFC 4443 3.3), without the wait.
                if !is_group(&ip.addresses) {
                    let error = IcmpError::not_reassembled(ip.addresses.is_v6());
                    cx.send_icmp_error(error, ip.addresses.destination(), ip.addresses, ip.bytes);
                }
            }
            Packet::Other(ip) => {
                cx.link.stats.dropped.unsupported += 1;
                // Nothing is answered to what was not for one host alone (RFC 1122 3.2.2).
                if !is_group(&ip.addresses) {
                    let error = IcmpError::protocol_unreachable(ip.addresses.is_v6());
                    cx.send_icmp_error(error, ip.addresses.destination(), ip.addresses, ip.bytes);
                }
            }
        }
    }

    fn serve_sockets(&mut self, now: Instant) {
        let mut cx =
            Context { config: &self.config, link: &mut self.link, poller: &self.poller, now, spare: None };
        self.udp.turn(&mut cx);
        self.ping.turn(&mut cx);
    }

    fn serve_timers(&mut self, now: Instant) {
        let mut cx =
            Context { config: &self.config, link: &mut self.link, poller: &self.poller, now, spare: None };
        let ndp = self.ndp.timers(&mut cx);
        let mut others = Datagrams { udp: &mut self.udp, ping: &mut self.ping };
        let tcp = self.tcp.timers(&mut Context { spare: Some(&mut others), ..cx });
        self.deadline = [ndp, tcp, self.udp.timers(now), self.ping.timers(now)].into_iter().flatten().min();
    }
}

/// Flows that an application takes up again by itself if they end, as connections are not.
struct Datagrams<'a> {
    udp: &'a mut Udp,
    ping: &'a mut Ping,
}

impl Spare for Datagrams<'_> {
    fn give_up(&mut self, now: Instant) -> bool {
        self.ping.give_up(now) || self.udp.give_up(now)
    }
}

/// Whether a frame with this destination is for the gateway, or for everybody.
fn is_for_us(destination: MacAddress, gateway: MacAddress) -> bool {
    let group = destination[0] & 1 != 0;
    group || destination == gateway
}

/// Whether a packet is from nobody or to a group.
fn is_group(addresses: &Addresses) -> bool {
    let to_group = match addresses {
        Addresses::V4 { destination, .. } => destination.is_multicast() || destination.is_broadcast(),
        Addresses::V6 { destination, .. } => destination.is_multicast(),
    };
    to_group || addresses.source().is_unspecified()
}

/// Notes which addresses the guest uses.
fn learn(cx: &mut Context<'_>, frame: &Frame<'_>) {
    let group = frame.source[0] & 1 != 0;
    if !group && frame.source != [0; 6] && frame.source != cx.config.gateway_mac {
        cx.link.guest_mac = frame.source;
    }
    let addresses = match &frame.packet {
        Packet::Tcp(segment) => match Addresses::new(segment.source, segment.destination) {
            Some(addresses) => addresses,
            None => return,
        },
        Packet::Udp(datagram) => datagram.ip.addresses,
        Packet::Icmp(message) => message.ip.addresses,
        Packet::Arp(_) | Packet::Fragment(_) | Packet::Other(_) => return,
    };
    match addresses {
        Addresses::V4 { source, .. } => {
            if let Some(family) = cx.config.ipv4
                && !source.is_unspecified()
                && source != family.gateway
                && !cx.is_ours(source.into())
            {
                cx.link.guest_v4 = Some(source);
            }
        }
        Addresses::V6 { source, .. } => {
            if let Some(family) = cx.config.ipv6
                && !source.is_unspecified()
                && !source.is_unicast_link_local()
                && source != family.gateway
                && !cx.is_ours(source.into())
            {
                cx.link.guest_v6 = Some(source);
            }
        }
    }
}

fn is_dhcp(cx: &Context<'_>, datagram: &UdpView<'_>) -> bool {
    let (Some(family), Addresses::V4 { destination, .. }) = (cx.config.ipv4, datagram.ip.addresses) else {
        return false;
    };
    let to_server = destination.is_broadcast() || destination == family.gateway;
    cx.config.services.dhcp && datagram.destination_port == dhcp::SERVER && to_server
}

fn is_dhcpv6(cx: &Context<'_>, datagram: &UdpView<'_>) -> bool {
    let (Some(_), Addresses::V6 { source, destination }) = (cx.config.ipv6, datagram.ip.addresses) else {
        return false;
    };
    let to_server = destination == dhcpv6::SERVERS && !source.is_unspecified();
    cx.config.services.dhcpv6 && datagram.destination_port == dhcpv6::SERVER && to_server
}

fn is_solicitation(message: &IcmpView<'_>) -> bool {
    message.ip.addresses.is_v6()
        && matches!(message.kind, ndp::ROUTER_SOLICITATION | ndp::NEIGHBOUR_SOLICITATION)
}

fn is_refusal(message: &IcmpView<'_>) -> bool {
    (message.kind, message.code) == PORT_UNREACHABLE[usize::from(message.ip.addresses.is_v6())]
}

//! TCP: each connection of the guest's is one socket of the host's.
//!
//! # Theory of operation
//! To the guest we are the other end: a TCP of our own, with sequence numbers, windows and timers. To the world we are
//! a program with a socket. What the guest's TCP and the world's agree on separately, data, ends of data, resets,
//! refusals and back-pressure, is carried from one to the other.
//!
//! **To the guest** ([`send`]). Bytes stay in the receive queue of the host's socket until the guest has acknowledged
//! them: they are peeked at, at an offset (`MSG_PEEK`, `SO_PEEK_OFF`), sent, and thrown away once acknowledged
//! (`MSG_TRUNC`). Sending something again is peeking again: nothing is kept here. A guest that reads slowly fills
//! that queue, and the kernel slows the world down. A kernel without `SO_PEEK_OFF` for TCP (before 6.9; before 6.11
//! for IPv6) has the bytes before the offset copied too, and at most [`Shared::SCRATCH`] on their way.
//!
//! **From the guest** ([`receive`]). Bytes are given to the host's socket as they arrive. The window never allows more
//! than the socket has free. What does not fit all the same, because the kernel counts its own overhead, is kept and
//! acknowledged: nothing that was allowed is dropped, and the guest does not send it again. This also shows the kernel
//! that its buffer is too small, so that it grows. What comes out of order is kept and told by SACK.
//!
//! **Work.** Segments and events note what they change and put the flow into a queue; [`Tcp::timers`], called before
//! each wait, and [`Tcp::resume`] do the work of the queue: one acknowledgement for a batch of segments, one peek for
//! a batch of events, in turns, so that no flow keeps others waiting. When the link is full the queue stays as it is.
//!
//! **Opening.** The guest's SYN is answered only when the host has connected: a refusal is a RST to the guest. For a
//! forwarded port the host's connection is accepted first, because the kernel allows nothing else, and then the guest is
//! asked; its refusal is a RST to the host's peer.
//!
//! **Ends.** The guest's FIN becomes `shutdown(SHUT_WR)` after the last byte; the host's end of file becomes a FIN.
//! A RST of the guest's closes the host's socket with a RST; an error of the host's socket is a RST to the guest, after
//! the bytes that came before it. That the other end could not be reached at all is told by ICMP ([`unreachable`]).
//!
//! **Bounds.** The table, the half-open flows and the memory for what is kept are limited. If there is no room, or no
//! descriptor, the oldest half-open flow makes it, so that a flood of SYNs drives out itself; if there is none, of some
//! flows that are looked at in turn the one that was idle longest. If all are busy the guest gets a RST. The log has a
//! line about it every ten seconds at most.
//!
//! **Not done.** Urgent data is delivered in line, both ways, without its mark. No timestamps, no PAWS, no ECN, no data
//! on a SYN. IP options and type of service are not carried over.

mod deliver;
mod emit;
mod flow;
mod kernel;
mod listen;
mod options;
mod receive;
mod rto;
mod send;
mod seq;
mod shared;
mod table;
#[cfg(test)]
mod tests;
mod timer;
mod unreachable;
pub(crate) mod view;

use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;

use crate::claims::Claims;
use crate::config::Forward;
use crate::context::Context;
use crate::packet::Addresses;
use crate::poller::Token;
use crate::tap::Sent;
pub(crate) use emit::Ends;
use flow::{EVENTS, Fate, Flow};
use listen::{Accepted, Listeners};
use seq::Seq;
use shared::Shared;
use table::Table;
use view::TcpView;

/// What TCP may use.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// Flows.
    flows: usize,
    /// Flows that are half-open.
    half_open: usize,
    /// Bytes kept for flows whose host does not take them yet, or that came out of order.
    memory: usize,
}

const LIMITS: Limits = Limits { flows: 128 << 10, half_open: 4096, memory: 64 << 20 };

/// How long a flow must have been idle to make room for another.
const IDLE: Duration = Duration::from_secs(30);

/// At most one warning in this time.
const WARNING_INTERVAL: Duration = Duration::from_secs(10);

/// All TCP of one guest.
pub(crate) struct Tcp {
    table: Table,
    limits: Limits,
    listeners: Listeners,
    shared: Shared,
    /// Flows with work to do, in turn.
    work: VecDeque<u32>,
    /// The secret of initial sequence numbers.
    secret: RandomState,
    /// When their clock began.
    epoch: Instant,
    warned: Option<Instant>,
}

impl Tcp {
    /// `shares_ports` says whether other engines listen on the same ports.
    pub(crate) fn new(claims: Claims<Ends>, shares_ports: bool) -> Self {
        Self::with_limits(LIMITS, claims, shares_ports)
    }

    fn with_limits(limits: Limits, claims: Claims<Ends>, shares_ports: bool) -> Self {
        Self {
            table: Table::new(limits.flows, claims),
            limits,
            listeners: Listeners::new(shares_ports),
            shared: Shared::new(limits.memory),
            work: VecDeque::new(),
            secret: RandomState::new(),
            epoch: Instant::now(),
            warned: None,
        }
    }

    /// The other engine whose flow this segment of the guest's is.
    pub(crate) fn elsewhere(&self, view: &TcpView<'_>) -> Option<u16> {
        self.table.elsewhere(&Ends::of(view))
    }

    /// How many flows there are.
    pub(crate) fn flows(&self) -> usize {
        self.table.len()
    }

    /// Takes in a segment of the guest's.
    pub(crate) fn segment(&mut self, cx: &mut Context<'_>, view: &TcpView<'_>) {
        let ends = Ends::of(view);
        let flags = view.flags;
        let begins = flags.syn && !flags.ack && !flags.rst && !flags.fin;
        if let Some(number) = self.table.find(&ends) {
            let replaced =
                begins && self.table.get(number).is_some_and(|flow| flow.may_be_replaced(Seq(view.seq)));
            if !replaced {
                self.run(cx, number, |flow, cx, shared| flow.segment(cx, shared, view));
                return;
            }
            self.run(cx, number, |flow, _, _| flow.reset_host());
        }
        if begins {
            self.open(cx, ends, view);
        } else if !flags.rst {
            self.refuse(cx, &ends, view);
        }
    }

    /// The socket of flow `number` is ready. What it is ready for is a hint: it may be for a flow that had the number before.
    pub(crate) fn ready(&mut self, cx: &mut Context<'_>, number: u32, flags: EventFlags) {
        self.run(cx, number, |flow, _, _| {
            flow.ready(flags);
            Fate::Stays
        });
    }

    /// Listens for a port of the host's that leads into the guest. Returns where: the port may be the kernel's choice.
    ///
    /// # Errors
    /// When it cannot: the port is taken, or not allowed.
    pub(crate) fn listen(&mut self, cx: &Context<'_>, forward: &Forward) -> io::Result<SocketAddr> {
        self.listeners.add(cx, forward)
    }

    /// Stops to listen for a forward, named as [`Self::listen`] bound it. Its connections go on.
    pub(crate) fn unlisten(&mut self, forward: &Forward) -> bool {
        self.listeners.remove(forward)
    }

    /// Listener `number` has connections.
    pub(crate) fn accept(&mut self, cx: &mut Context<'_>, number: u32) {
        loop {
            match self.listeners.accept(number, cx.now) {
                Ok(None) => return,
                Ok(Some(accepted)) => {
                    if let Some(accepted) = bypass(cx, accepted) {
                        self.adopt(cx, accepted);
                    }
                }
                Err(error) => {
                    self.free_descriptor(cx);
                    self.warn(cx.now, "cannot accept connections now (`ulimit -n` allows more)", error);
                    return;
                }
            }
        }
    }

    /// Does what is due and what events have left to do. To be called before each wait; returns until when to wait
    /// at most.
    pub(crate) fn timers(&mut self, cx: &mut Context<'_>) -> Option<Instant> {
        while let Some((at, number)) = self.shared.timers.due(cx.now) {
            if self.table.get(number).is_some_and(|flow| flow.scheduled == Some(at)) {
                self.run(cx, number, Flow::expire);
            }
        }
        let table = &mut self.table;
        self.shared.timers.sweep(table.len(), |at, number| {
            table.get(number).is_some_and(|flow| flow.scheduled == Some(at))
        });
        while let Some(number) = self.listeners.due(cx.now) {
            self.accept(cx, number);
        }
        self.resume(cx);
        if !self.work.is_empty() && !cx.link.full {
            return Some(cx.now);
        }
        [self.shared.timers.next(), self.listeners.next()].into_iter().flatten().min()
    }

    /// Goes on with the queue of work, as far as the link has room: each flow that was in it has one turn.
    pub(crate) fn resume(&mut self, cx: &mut Context<'_>) {
        while !cx.link.full
            && let Some((ends, segment)) = self.shared.resets.pop()
        {
            if emit::emit(cx, &ends, &segment, &[]) == Sent::Full {
                self.shared.resets.push((ends, segment));
            }
        }
        for _ in 0..self.work.len() {
            let Some(number) = self.work.pop_front() else { return };
            let Some(flow) = self.table.get(number) else { continue };
            flow.queued = false;
            let was_half_open = flow.is_half_open();
            let (fate, again) = flow.work(cx, &mut self.shared);
            flow.schedule(&mut self.shared);
            if was_half_open && !flow.is_half_open() {
                self.table.opened();
            }
            if fate == Fate::Gone {
                self.remove(number);
            } else if again || cx.link.full {
                // A full link stops everybody: this one was first, and is first again.
                let back = !cx.link.full;
                self.enqueue(number, back);
                if !back {
                    return;
                }
            }
        }
    }

    /// Has a flow do something, and its work afterwards.
    fn run(
        &mut self,
        cx: &mut Context<'_>,
        number: u32,
        what: impl FnOnce(&mut Flow, &mut Context<'_>, &mut Shared) -> Fate,
    ) {
        let Some(flow) = self.table.get(number) else { return };
        let was_half_open = flow.is_half_open();
        let fate = what(flow, cx, &mut self.shared);
        if was_half_open && !flow.is_half_open() {
            self.table.opened();
        }
        match fate {
            Fate::Gone => self.remove(number),
            Fate::Stays => self.enqueue(number, true),
        }
    }

    fn enqueue(&mut self, number: u32, back: bool) {
        let Some(flow) = self.table.get(number) else { return };
        if flow.queued {
            return;
        }
        flow.queued = true;
        if back { self.work.push_back(number) } else { self.work.push_front(number) }
    }

    fn remove(&mut self, number: u32) {
        if let Some(mut flow) = self.table.remove(number) {
            flow.release(&mut self.shared);
        }
    }

    /// The guest begins a connection. Another engine may have had the same SYN: then it is that one's.
    fn open(&mut self, cx: &mut Context<'_>, ends: Ends, view: &TcpView<'_>) {
        if self.table.claim(&ends)
            && let Err(error) = self.begin(cx, ends, view)
        {
            self.table.renounce(&ends);
            if !unreachable::tell(cx, &ends, Seq(view.seq), error) {
                self.refuse(cx, &ends, view);
            }
        }
    }

    /// Makes the flow that the guest asks for.
    fn begin(&mut self, cx: &mut Context<'_>, ends: Ends, view: &TcpView<'_>) -> Result<(), Errno> {
        // The addresses by which a host means itself are never taken literally.
        let addresses = Addresses::new(ends.guest, ends.peer);
        if is_group(ends.peer) || !addresses.is_some_and(|addresses| addresses.plausible()) {
            return Err(Errno::CONNREFUSED);
        }
        let to = cx.outside(SocketAddr::new(ends.peer, ends.peer_port));
        if !self.make_room(cx) {
            self.warn(cx.now, "too many TCP flows, and none is idle", Errno::NOBUFS);
            return Err(Errno::NOBUFS);
        }
        let mut connected = flow::connect(to, &cx.binding(to.ip()));
        if connected.as_ref().is_err_and(|error| is_exhausted(*error)) && self.free_descriptor(cx) {
            connected = flow::connect(to, &cx.binding(to.ip()));
        }
        let socket = connected.inspect_err(|&error| {
            tracing::debug!(%to, %error, "cannot connect");
            if is_exhausted(error) {
                self.warn(cx.now, "no descriptor for a connection of the guest's (`ulimit -n` allows more)", error);
            } else if error == Errno::ADDRNOTAVAIL {
                let what = "no port or no address for a connection of the guest's (the sysctl \
                            net.ipv4.ip_local_port_range has the ports; an outbound address must be the host's)";
                self.warn(cx.now, what, error);
            }
        })?;
        let iss = self.initial_sequence(&ends, cx.now);
        let number = self.table.next_number();
        if !self.watch(cx, &socket, number) {
            return Err(Errno::NOSPC);
        }
        // Whether it is connected is told by the poller, even if it is already.
        self.table.add(Flow::outward(cx, &self.shared, ends, number, socket, iss, view));
        Ok(())
    }

    /// A connection to the host leads to the guest.
    fn adopt(&mut self, cx: &mut Context<'_>, accepted: Accepted) {
        let Accepted { socket, peer, guest_address, guest_port } = accepted;
        let Some((guest, peer)) = cx.arrival(peer, guest_address) else { return };
        if !self.make_room(cx) {
            self.warn(cx.now, "too many TCP flows, and none is idle", Errno::NOBUFS);
            return;
        }
        let mut ends = Ends { guest, peer: peer.ip(), guest_port, peer_port: peer.port() };
        // Several peers may look the same to the guest.
        let mut attempts = 0;
        while self.table.find(&ends).is_some() || !self.table.claim(&ends) {
            let hash = self.secret.hash_one((&ends, attempts)) as u16;
            ends.peer_port = hash % (u16::MAX - 1024) + 1024;
            attempts += 1;
            if attempts > 64 {
                self.warn(cx.now, "no port left for a connection to the guest", Errno::ADDRINUSE);
                return;
            }
        }
        flow::prepare(&socket);
        let iss = self.initial_sequence(&ends, cx.now);
        let number = self.table.next_number();
        if self.watch(cx, &socket, number) {
            self.table.add(Flow::inward(cx, &self.shared, ends, number, socket, iss));
            self.run(cx, number, |flow, cx, _| {
                flow.send_syn(cx);
                Fate::Stays
            });
        } else {
            self.table.renounce(&ends);
        }
    }

    fn watch(&mut self, cx: &Context<'_>, socket: &OwnedFd, number: u32) -> bool {
        let watched = cx.poller.add(socket, Token::Tcp(number), EVENTS);
        if let Err(error) = &watched {
            tracing::error!(%error, "cannot watch a socket");
        }
        watched.is_ok()
    }

    /// Makes room for one more flow that is half-open.
    fn make_room(&mut self, cx: &mut Context<'_>) -> bool {
        if self.table.half_open() >= self.limits.half_open {
            self.evict_half_open(cx);
        } else if self.table.is_full() {
            self.evict(cx);
        }
        !self.table.is_full()
    }

    /// Has a descriptor given up for a new flow: by one that is half-open, by another protocol's that was idle for a while,
    /// or by one that was idle for longer.
    fn free_descriptor(&mut self, cx: &mut Context<'_>) -> bool {
        if self.evict_half_open(cx) {
            return true;
        }
        if let Some(others) = &mut cx.spare
            && others.give_up(cx.now)
        {
            cx.link.stats.evicted += 1;
            return true;
        }
        self.evict_idle(cx)
    }

    /// Gives up a flow that others need more, if there is one.
    fn evict(&mut self, cx: &mut Context<'_>) -> bool {
        self.evict_half_open(cx) || self.evict_idle(cx)
    }

    /// Gives up the flow that has been half-open for longest.
    fn evict_half_open(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(number) = self.table.oldest_half_open() else { return false };
        cx.link.stats.evicted += 1;
        self.run(cx, number, Flow::give_up);
        true
    }

    /// Gives up a flow that has been idle for long.
    fn evict_idle(&mut self, cx: &mut Context<'_>) -> bool {
        let Some((number, active)) = self.table.idle_longest() else { return false };
        if cx.now.saturating_duration_since(active) < IDLE {
            return false;
        }
        cx.link.stats.evicted += 1;
        self.warn(cx.now, "a connection that was idle makes room for another", Errno::NOBUFS);
        self.run(cx, number, Flow::give_up);
        true
    }

    /// Answers a segment that belongs to no connection (RFC 9293, 3.10.7.1).
    fn refuse(&mut self, cx: &mut Context<'_>, ends: &Ends, view: &TcpView<'_>) {
        if view.flags.ack {
            self.shared.reset(cx, ends, Seq(view.ack), None);
        } else {
            let length = view.payload.len() as u32 + u32::from(view.flags.syn) + u32::from(view.flags.fin);
            self.shared.reset(cx, ends, Seq(0), Some(Seq(view.seq).plus(length)));
        }
    }

    /// The initial sequence number of a flow: a clock of 4 µs and a secret function of the ends (RFC 6528).
    fn initial_sequence(&self, ends: &Ends, now: Instant) -> Seq {
        let clock = (now.saturating_duration_since(self.epoch).as_micros() / 4) as u32;
        Seq((self.secret.hash_one(ends) as u32).wrapping_add(clock))
    }

    /// Does as if the kernel had no SO_PEEK_OFF, for flows to come.
    #[cfg(test)]
    fn forget_peek_offset(&mut self) {
        self.shared.peek_offset = false;
    }

    fn warn(&mut self, now: Instant, what: &str, error: Errno) {
        if self.warned.is_none_or(|at| now.saturating_duration_since(at) >= WARNING_INTERVAL) {
            self.warned = Some(now);
            tracing::warn!(%error, flows = self.flows(), "{what}");
        }
    }
}

/// Whether there are no descriptors, or no memory for them.
fn is_exhausted(error: Errno) -> bool {
    matches!(error, Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM)
}

/// Gives a connection to the bypass, if it is for that.
fn bypass(cx: &Context<'_>, accepted: Accepted) -> Option<Accepted> {
    let Some(bypass) = &cx.link.bypass else { return Some(accepted) };
    let Accepted { socket, peer, guest_port, guest_address } = accepted;
    let guest = guest_address.or_else(|| cx.guest_address(peer.ip().to_canonical()));
    let socket = bypass.connection(socket, peer, guest, guest_port)?;
    Some(Accepted { socket, peer, guest_port, guest_address })
}

/// Whether an address is everybody's: there are no connections to those.
fn is_group(address: IpAddr) -> bool {
    address.is_multicast() || matches!(address, IpAddr::V4(address) if address.is_broadcast())
}

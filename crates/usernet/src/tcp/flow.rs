//! One flow: a TCP connection of the guest's, and a socket of the host's that it is the other side of.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{SendFlags, Shutdown, send, shutdown, sockopt};

use super::emit::{Control, Ends, Segment, emit};
use super::kernel;
use super::options::{Options, Requested, requested, sack_blocks};
use super::receive::{Place, Receiver};
use super::send::{Acked, Sender};
use super::seq::Seq;
use super::shared::Shared;
use super::unreachable;
use super::view::TcpView;
use crate::context::Context;
use crate::poller::Token;
use crate::socket::Binding;
use crate::tap::Sent;

/// The events that a flow's socket is watched for: changes only, because what is not acknowledged stays readable.
pub(super) const EVENTS: EventFlags = EventFlags::IN
    .union(EventFlags::PRI)
    .union(EventFlags::OUT)
    .union(EventFlags::RDHUP)
    .union(EventFlags::ET);

/// The shift of our windows: 16 MiB at most.
const SCALE: u8 = 8;
/// How long an acknowledgement waits for data to go with, where data has gone with the last ones.
const DELAYED_ACK: Duration = Duration::from_millis(10);
/// Without a sign of the guest for so long it is asked for one, so often, and then given up.
const KEEP_ALIVE_IDLE: Duration = Duration::from_secs(120);
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEP_ALIVE_PROBES: u8 = 8;
/// Time-outs after which a flow is given up: of a SYN, of data.
const SYN_RETRIES: u8 = 6;
const DATA_RETRIES: u8 = 15;
/// How long the end of a flow is remembered that we closed first. Nothing lingers in this network for longer.
pub(super) const TIME_WAIT: Duration = Duration::from_secs(2);
/// The window where the kernel does not say what it has room for.
const MODEST_WINDOW: u32 = 64 << 10;

/// Where a flow is between its first segment and its last.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum State {
    /// The guest's SYN has come, the host's socket connects; nothing was said to the guest.
    /// Next: [`Self::SynReceived`], or a RST.
    Connecting,
    /// The guest was sent our SYN with the acknowledgement of its own. Next: [`Self::Open`] by its acknowledgement.
    SynReceived,
    /// A connection to the host was accepted and the guest sent a SYN. Next: [`Self::Open`] by its SYN.
    SynSent,
    /// Both agree. Either direction may have ended: `tx.fin` and `rx.fin` say so.
    /// Next: [`Self::TimeWait`] if ours ended first, else nothing.
    Open,
    /// Both directions have ended and the host's socket is closed: only the guest's FIN may come again.
    TimeWait,
}

/// Where in the receive queue of the host's socket the kernel peeks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Peek {
    /// At its head. It is told to go on from elsewhere (SO_PEEK_OFF) when that is first needed: never, for a question and its answer.
    Head,
    /// There, next.
    At(Seq),
    /// At its head, and it cannot be told.
    HeadOnly,
}

/// Whether a flow goes on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub(super) enum Fate {
    /// It does.
    Stays,
    /// It is over: to be taken out of the table.
    Gone,
}

/// One flow.
pub(super) struct Flow {
    pub(super) ends: Ends,
    pub(super) number: u32,
    pub(super) state: State,
    pub(super) socket: Option<OwnedFd>,
    pub(super) tx: Sender,
    pub(super) rx: Receiver,
    /// The sequence number of the first byte in the host's receive queue.
    pub(super) head: Seq,
    /// Where the kernel peeks.
    pub(super) peek: Peek,
    /// Whether the host's queue may hold something that was not sent yet.
    pub(super) more: bool,
    /// Whether the host's peer has ended or broken the connection, so that reading comes to an end.
    pub(super) ended: bool,
    /// Whether urgent data may be in the host's queue: reading stops short before it, although there is more.
    pub(super) marked: bool,
    /// Whether the host refused what was written: all that is left is to deliver what came before.
    pub(super) failed: bool,
    /// Whether the guest's FIN was handed on.
    pub(super) shut: bool,
    /// Whether our direction ended before the guest's.
    pub(super) ended_first: bool,
    /// Whether to acknowledge at once.
    pub(super) ack_now: bool,
    /// Whether data has gone with the last acknowledgements.
    pub(super) interactive: bool,
    /// Whether an event is to come when the host's socket has room.
    pub(super) awaiting_space: bool,
    /// Whether it came.
    pub(super) space: bool,
    /// Whether the host's socket sends keep-alive probes, because the guest did.
    pub(super) keep_alive: bool,
    /// Keep-alive probes without an answer.
    pub(super) probes: u8,
    /// Whether it waits in the work queue.
    pub(super) queued: bool,
    /// When the guest was last heard of.
    pub(super) heard: Instant,
    /// When it last said something that it had not been asked for by a probe.
    pub(super) active: Instant,
    pub(super) retransmit_at: Option<Instant>,
    pub(super) ack_at: Option<Instant>,
    /// Its entry in the timers.
    pub(super) scheduled: Option<Instant>,
}

impl Flow {
    fn new(
        (cx, shared): (&Context<'_>, &Shared),
        ends: Ends,
        number: u32,
        state: State,
        socket: OwnedFd,
        iss: Seq,
        rx: Receiver,
    ) -> Self {
        let now = cx.now;
        let peek = if shared.peek_offset { Peek::Head } else { Peek::HeadOnly };
        Self {
            ends,
            number,
            state,
            socket: Some(socket),
            tx: Sender::new(iss),
            rx,
            head: iss.plus(1),
            peek,
            // The poller tells, of what came before it watched too.
            more: false,
            ended: false,
            marked: false,
            failed: false,
            shut: false,
            ended_first: false,
            ack_now: false,
            interactive: false,
            awaiting_space: false,
            space: false,
            keep_alive: false,
            probes: 0,
            queued: false,
            heard: now,
            active: now,
            retransmit_at: None,
            ack_at: None,
            scheduled: None,
        }
    }

    /// A flow that the guest's SYN `view` began, whose socket connects.
    pub(super) fn outward(
        cx: &Context<'_>,
        shared: &Shared,
        ends: Ends,
        number: u32,
        socket: OwnedFd,
        iss: Seq,
        view: &TcpView<'_>,
    ) -> Self {
        let asked = requested(view.options);
        let scale = asked.scale.map_or(0, |_| SCALE);
        let rx = Receiver::new(Seq(view.seq).plus(1), scale);
        let mut flow = Self::new((cx, shared), ends, number, State::Connecting, socket, iss, rx);
        flow.negotiate(cx, &asked, view);
        flow
    }

    /// A flow that a connection to the host began, already accepted.
    pub(super) fn inward(
        cx: &Context<'_>,
        shared: &Shared,
        ends: Ends,
        number: u32,
        socket: OwnedFd,
        iss: Seq,
    ) -> Self {
        Self::new((cx, shared), ends, number, State::SynSent, socket, iss, Receiver::new(Seq(0), SCALE))
    }

    fn negotiate(&mut self, cx: &Context<'_>, asked: &Requested, view: &TcpView<'_>) {
        let largest = self.own_mss(cx);
        self.tx.negotiate(asked, Seq(view.seq), view.window, largest, self.ends.is_ipv6());
    }

    /// The largest segment that the link carries.
    fn own_mss(&self, cx: &Context<'_>) -> u16 {
        cx.link.abilities().mtu.saturating_sub(self.ends.headers()).max(64)
    }

    /// What the guest is to send next, and what it is to acknowledge next.
    #[cfg(test)]
    pub(super) fn positions(&self) -> (u32, u32) {
        (self.rx.next.0, self.tx.una.0)
    }

    pub(super) fn is_half_open(&self) -> bool {
        matches!(self.state, State::Connecting | State::SynReceived | State::SynSent)
    }

    /// Whether the guest may begin a new connection between the same ends with `seq`.
    pub(super) fn may_be_replaced(&self, seq: Seq) -> bool {
        match self.state {
            State::TimeWait => true,
            State::Connecting => self.rx.next != seq.plus(1),
            _ => false,
        }
    }

    // What the guest says.

    /// Takes in a segment of the guest's.
    pub(super) fn segment(&mut self, cx: &mut Context<'_>, shared: &mut Shared, view: &TcpView<'_>) -> Fate {
        self.heard = cx.now;
        if self.probes == 0 {
            self.active = cx.now;
        }
        self.probes = 0;
        match self.state {
            State::Connecting => {
                // It was answered with nothing yet: whatever else it is, it is not for this.
                let is_end =
                    view.flags.rst && (view.seq == self.rx.next.0 || view.seq == self.rx.next.minus(1).0);
                if is_end { self.reset_host() } else { Fate::Stays }
            }
            State::SynSent => self.answer_to_syn(cx, shared, view),
            State::SynReceived | State::Open => self.in_order(cx, shared, view),
            State::TimeWait => {
                let seq = Seq(view.seq);
                if view.flags.rst {
                    return if seq == self.rx.next { Fate::Gone } else { Fate::Stays };
                }
                if view.flags.fin || !view.payload.is_empty() {
                    self.ack_now = true;
                }
                Fate::Stays
            }
        }
    }

    /// The guest's first answer to our SYN.
    fn answer_to_syn(&mut self, cx: &mut Context<'_>, shared: &mut Shared, view: &TcpView<'_>) -> Fate {
        let ack = Seq(view.ack);
        let is_ours = view.flags.ack && ack == self.tx.una.plus(1);
        if view.flags.rst {
            return if is_ours { self.reset_host() } else { Fate::Stays };
        }
        if !is_ours {
            // The rest of an older connection (RFC 9293, 3.5.2): away with it, and our SYN goes again.
            if view.flags.ack {
                shared.reset(cx, &self.ends, ack, None);
            }
            return Fate::Stays;
        }
        if !view.flags.syn {
            return Fate::Stays;
        }
        let asked = requested(view.options);
        let scale = asked.scale.map_or(0, |_| SCALE);
        self.rx = Receiver::new(Seq(view.seq).plus(1), scale);
        self.negotiate(cx, &asked, view);
        let _ = self.tx.acknowledge(ack, Seq(view.seq), view.window, false, std::iter::empty(), cx.now);
        // The field was no scaled one.
        self.tx.window = view.window.into();
        self.retransmit_at = None;
        self.state = State::Open;
        self.ack_now = true;
        Fate::Stays
    }

    /// A segment of a connection that stands, or is about to (RFC 9293, 3.10.7.4, with the checks of RFC 5961).
    fn in_order(&mut self, cx: &mut Context<'_>, shared: &mut Shared, view: &TcpView<'_>) -> Fate {
        let seq = Seq(view.seq);
        let payload_end = seq.plus(view.payload.len() as u32);
        let edge = self.rx.next.plus(self.rx.window()).plus(1 << self.rx.scale);
        if view.flags.rst {
            if seq == self.rx.next {
                return self.reset_host();
            }
            if !seq.before(self.rx.next) && seq.before(edge) {
                self.challenge(cx, shared);
            }
            return Fate::Stays;
        }
        if view.flags.syn {
            if self.state == State::SynReceived && seq.plus(1) == self.rx.next && !view.flags.ack {
                // Ours was lost.
                self.send_syn(cx);
            } else {
                self.challenge(cx, shared);
            }
            return Fate::Stays;
        }
        if !view.flags.ack {
            return Fate::Stays;
        }
        if seq.after(edge) || payload_end.before(self.rx.next) {
            if seq.plus(1) == self.rx.next {
                self.asked_for_a_sign();
            }
            self.ack_now = true;
            return Fate::Stays;
        }
        if seq.plus(1) == self.rx.next && !view.flags.fin && view.payload.len() == 1 {
            self.asked_for_a_sign();
        }

        let pure = view.payload.is_empty() && !view.flags.fin;
        let ack = Seq(view.ack);
        if self.state == State::SynReceived {
            if ack != self.tx.max {
                shared.reset(cx, &self.ends, ack, None);
                return Fate::Stays;
            }
            self.state = State::Open;
            self.retransmit_at = None;
        }
        if !self.tx.in_flight() {
            self.retransmit_at = None;
        }
        match self.tx.acknowledge(ack, seq, view.window, pure, sack_blocks(view.options), cx.now) {
            Acked::Impossible => {
                self.challenge(cx, shared);
                return Fate::Stays;
            }
            Acked::Progress => self.retransmit_at = None,
            Acked::Nothing => {}
        }

        if !view.payload.is_empty() {
            self.payload(cx, shared, seq, view.payload);
        }
        if view.flags.fin {
            match self.rx.fin {
                Some(_) => {
                    self.receive_fin();
                    self.ack_now = true;
                }
                None if payload_end.after(edge) => {}
                None => {
                    self.rx.fin = Some(payload_end);
                    // Else it is when the host has the bytes before it.
                    self.ack_now |= !self.rx.has_all();
                }
            }
        }
        Fate::Stays
    }

    /// The guest's FIN is acknowledged from now on.
    fn receive_fin(&mut self) {
        if self.rx.take_fin() {
            self.ended_first = self.tx.is_complete();
        }
    }

    /// Bytes from the guest.
    fn payload(&mut self, cx: &mut Context<'_>, shared: &mut Shared, seq: Seq, payload: &[u8]) {
        let place = if self.rx.has_all() { Place::Nowhere } else { self.rx.place(seq, payload) };
        match place {
            Place::Nowhere => self.ack_now = true,
            Place::Next(bytes) => {
                let had_gaps = self.rx.has_gaps();
                let (socket, failed) = (self.socket.as_ref(), self.failed);
                let mut write = |bytes: &[u8]| write(socket, failed, bytes);
                if self.rx.take_next(bytes, &mut shared.budget, &mut write).is_err() {
                    self.fail();
                }
                self.ack_now |= had_gaps;
                // A long batch of frames is acknowledged before its end.
                let unsaid = self.rx.next.past(self.rx.acknowledged);
                if unsaid >= 128 << 10 || unsaid > self.rx.window() {
                    self.acknowledge_now(cx);
                }
            }
            Place::Ahead(seq, bytes) => {
                self.rx.keep(seq, bytes, &mut shared.budget);
                // At once and for each, so that the guest can count them (RFC 5681, 4.2).
                self.ack_now = true;
                self.send_ack(cx);
            }
        }
    }

    /// The guest probes whether the connection still lives: the host's socket is to do the same.
    fn asked_for_a_sign(&mut self) {
        if let Some(socket) = &self.socket
            && !self.keep_alive
        {
            self.keep_alive = true;
            // syscalls: setsockopt
            let _ = sockopt::set_socket_keepalive(socket, true);
            let _ = sockopt::set_tcp_keepidle(socket, KEEP_ALIVE_IDLE);
        }
    }

    /// Answers something that cannot be right with where the connection stands.
    fn challenge(&mut self, cx: &Context<'_>, shared: &mut Shared) {
        self.ack_now |= shared.may_challenge(cx.now);
    }

    // What the host's socket says.

    /// The host's socket is ready for something.
    pub(super) fn ready(&mut self, flags: EventFlags) {
        if flags.intersects(EventFlags::IN) {
            self.more = true;
        }
        if flags.intersects(EventFlags::PRI) {
            self.more = true;
            self.marked = true;
        }
        if flags.intersects(EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR) {
            self.more = true;
            self.ended = true;
        }
        // Our FIN may be out already: then nothing is read that would tell of the error.
        if flags.intersects(EventFlags::ERR) && self.tx.fin.is_some() {
            self.failed = true;
        }
        if flags.intersects(EventFlags::OUT) {
            self.awaiting_space = false;
            self.space = true;
        }
    }

    /// Whether the host's socket has connected; answers the guest if so, or if it never will.
    pub(super) fn connected(&mut self, cx: &mut Context<'_>, shared: &mut Shared) -> Fate {
        let Some(socket) = &self.socket else { return Fate::Gone };
        // One that does not connect any more has no peer, as one that does not yet: only then is there an error to ask for.
        // syscalls: getpeername
        if rustix::net::getpeername(socket).is_err() {
            // syscalls: getsockopt
            return match sockopt::socket_error(socket) {
                Ok(Ok(())) => Fate::Stays,
                Ok(Err(error)) | Err(error) => {
                    tracing::debug!(ends = ?self.ends, %error, "no connection");
                    if !unreachable::tell(cx, &self.ends, self.rx.next.minus(1), error) {
                        shared.reset(cx, &self.ends, Seq(0), Some(self.rx.next));
                    }
                    Fate::Gone
                }
            };
        }
        self.state = State::SynReceived;
        // That it may be written to has said that it is connected, and nothing else.
        self.space = false;
        let free = self.free_space(cx);
        self.rx.allow(free);
        self.send_syn(cx);
        Fate::Stays
    }

    // What is said to the guest.

    /// Sends our SYN, or sends it again.
    pub(super) fn send_syn(&mut self, cx: &mut Context<'_>) {
        let received = self.state == State::SynReceived;
        let (scale, sack) = match received {
            true => ((self.rx.scale > 0).then_some(self.rx.scale), self.tx.sack),
            false => (Some(SCALE), true),
        };
        let window = match received {
            true => u16::try_from(self.rx.window()).unwrap_or(u16::MAX),
            false => u16::MAX,
        };
        let segment = Segment {
            seq: self.tx.una,
            ack: received.then_some(self.rx.next),
            control: Control { syn: true, ..Control::default() },
            window,
            options: Options::of_syn(self.own_mss(cx), scale, sack),
            cut: None,
        };
        // If the link is full, the timer sends it.
        if emit(cx, &self.ends, &segment, &[]) == Sent::Yes {
            self.tx.sent(self.tx.una, 1, cx.now);
        } else {
            self.tx.max = self.tx.una.plus(1);
        }
        self.retransmit_at = Some(cx.now + self.tx.rto.timeout());
    }

    /// Sends an acknowledgement with what came out of order.
    fn send_ack(&mut self, cx: &mut Context<'_>) {
        let options = if self.tx.sack {
            let (blocks, count) = self.rx.blocks();
            Options::of_sack(&blocks[..count])
        } else {
            Options::default()
        };
        let segment = Segment { options, ..self.segment_at(self.tx.max) };
        if emit(cx, &self.ends, &segment, &[]) == Sent::Yes {
            self.said();
        }
    }

    /// As [`Self::send_ack`], with the window that the host's socket allows now.
    fn acknowledge_now(&mut self, cx: &mut Context<'_>) {
        self.widen(cx);
        self.ack_now = true;
        self.send_ack(cx);
    }

    /// A segment with nothing but its acknowledgement.
    pub(super) fn segment_at(&self, seq: Seq) -> Segment {
        Segment {
            seq,
            ack: Some(self.rx.next),
            control: Control::default(),
            window: self.rx.window_field(),
            options: Options::default(),
            cut: None,
        }
    }

    /// The acknowledgement has been sent.
    pub(super) fn said(&mut self) {
        self.rx.acknowledged = self.rx.next;
        self.ack_now = false;
        self.ack_at = None;
    }

    /// Asks the guest for a sign: a segment that it must answer, and that changes nothing.
    fn probe(&mut self, cx: &mut Context<'_>) {
        let segment = self.segment_at(self.tx.una.minus(1));
        let _ = emit(cx, &self.ends, &segment, &[]);
    }

    // The work that events leave behind.

    /// Does what there is to do: gives to the host what waits for it, and to the guest what it may have.
    /// Returns also whether it wants another turn.
    pub(super) fn work(&mut self, cx: &mut Context<'_>, shared: &mut Shared) -> (Fate, bool) {
        match self.state {
            State::Connecting => return (self.connected(cx, shared), false),
            State::SynReceived | State::SynSent => return (Fate::Stays, false),
            State::TimeWait => {
                if self.ack_now {
                    self.send_ack(cx);
                }
                return (Fate::Stays, false);
            }
            State::Open => {}
        }
        self.drain(shared);
        if self.failed && self.tx.fin.is_some() {
            return (self.reset_guest(cx, shared), false);
        }
        self.discard_some(shared);
        let Ok(again) = self.transmit(cx, shared) else { return (self.reset_guest(cx, shared), false) };
        self.acknowledge(cx);
        if self.is_over() {
            return (self.close(cx, shared), false);
        }
        self.arm(cx.now);
        (Fate::Stays, again)
    }

    /// Gives the host what it did not take before, and the guest's FIN after it.
    fn drain(&mut self, shared: &mut Shared) {
        if self.rx.has_backlog() {
            let (socket, failed) = (self.socket.as_ref(), self.failed);
            if self.rx.drain(&mut shared.budget, |bytes| write(socket, failed, bytes)).is_err() {
                self.fail();
                self.rx.clear(&mut shared.budget);
            }
        }
        if self.rx.is_delivered() && !self.shut {
            self.receive_fin();
            self.shut = true;
            if let Some(socket) = &self.socket {
                // A connection that is broken is told by reading.
                // syscalls: shutdown
                let _ = shutdown(socket, Shutdown::Write);
            }
        }
    }

    /// The host does not take any more, ever.
    fn fail(&mut self) {
        self.failed = true;
        self.ended = true;
        self.more = true;
    }

    /// Acknowledges what is to be acknowledged, and opens the window.
    fn acknowledge(&mut self, cx: &mut Context<'_>) {
        let unsaid = self.rx.next.past(self.rx.acknowledged);
        if unsaid == 0 && !self.ack_now && !self.space {
            return;
        }
        let before = self.rx.window();
        let free = self.widen(cx);
        self.space = false;
        let mss = u32::from(self.own_mss(cx));
        let grown = self.rx.window() - before;
        let opened = grown >= 2 * mss || (before < mss && grown > 0 && self.rx.window() >= mss.min(free));
        // Nothing comes after a FIN that its acknowledgement could go with, and somebody may wait for it.
        let at_once = self.shut || !self.interactive;
        if self.ack_now || opened || unsaid >= 2 * mss || (unsaid > 0 && at_once) {
            self.ack_now = true;
            self.send_ack(cx);
        } else if unsaid > 0 {
            self.ack_at.get_or_insert(cx.now + DELAYED_ACK);
        }
    }

    /// Moves the window on, unless it is about as wide as it was: asking the host's socket costs a system call.
    /// Returns what that has room for, if it was asked.
    fn widen(&mut self, cx: &Context<'_>) -> u32 {
        if self.rx.is_wide(2 * u32::from(self.own_mss(cx))) {
            return 0;
        }
        let free = self.free_space(cx);
        self.rx.allow(free);
        free
    }

    /// What the host's socket has room for. Where that is little, an event is asked for that comes when it is more.
    fn free_space(&mut self, cx: &Context<'_>) -> u32 {
        let Some(socket) = &self.socket else { return 0 };
        if self.failed || self.shut {
            return 0;
        }
        let Ok(buffer) = kernel::send_buffer(socket) else { return MODEST_WINDOW };
        if !buffer.is_writable() && !self.awaiting_space {
            self.awaiting_space = true;
            let _ = cx.poller.modify(socket, Token::Tcp(self.number), EVENTS);
        }
        buffer.free()
    }

    /// Whether both directions have ended and everything is delivered.
    fn is_over(&self) -> bool {
        self.tx.is_complete() && self.shut && self.rx.acknowledged == self.rx.next
    }

    /// Closes the host's socket after a proper end.
    fn close(&mut self, cx: &Context<'_>, shared: &mut Shared) -> Fate {
        // What is left unread would make the kernel send a RST.
        self.discard(shared, 0);
        self.socket = None;
        self.rx.clear(&mut shared.budget);
        if !self.ended_first {
            return Fate::Gone;
        }
        self.state = State::TimeWait;
        self.heard = cx.now;
        self.retransmit_at = None;
        self.ack_at = None;
        self.schedule(shared);
        Fate::Stays
    }

    /// Ends the host's connection as the guest ended its own: with a RST.
    pub(super) fn reset_host(&mut self) -> Fate {
        if let Some(socket) = self.socket.take() {
            let _ = sockopt::set_socket_linger(&socket, Some(Duration::ZERO));
        }
        Fate::Gone
    }

    /// Ends the guest's connection as the host's was ended: with a RST.
    fn reset_guest(&mut self, cx: &mut Context<'_>, shared: &mut Shared) -> Fate {
        let (seq, ack) = match self.state {
            State::Connecting => (Seq(0), self.rx.next),
            _ => (self.tx.max, self.rx.next),
        };
        if self.state != State::SynSent {
            shared.reset(cx, &self.ends, seq, Some(ack));
        }
        self.socket = None;
        Fate::Gone
    }

    /// Ends both.
    pub(super) fn give_up(&mut self, cx: &mut Context<'_>, shared: &mut Shared) -> Fate {
        let fate = self.reset_host();
        if self.state == State::TimeWait {
            return fate;
        }
        self.reset_guest(cx, shared)
    }

    /// Gives up the memory that it holds, before it goes.
    pub(super) fn release(&mut self, shared: &mut Shared) {
        self.rx.clear(&mut shared.budget);
    }

    // Time.

    /// Sets the timer for what is on its way, or for a window that is closed.
    fn arm(&mut self, now: Instant) {
        let closed = self.more && self.tx.fin.is_none() && self.tx.span().is_none();
        if !self.tx.in_flight() && !closed {
            self.retransmit_at = None;
        } else {
            self.retransmit_at.get_or_insert(now + self.tx.rto.timeout());
        }
    }

    fn deadline(&self) -> Instant {
        let idle = match self.state {
            State::TimeWait => self.heard + TIME_WAIT,
            _ => self.heard + KEEP_ALIVE_IDLE + KEEP_ALIVE_INTERVAL * u32::from(self.probes),
        };
        [self.retransmit_at, self.ack_at].into_iter().flatten().fold(idle, Instant::min)
    }

    /// Has itself looked at when its next deadline comes.
    pub(super) fn schedule(&mut self, shared: &mut Shared) {
        let deadline = self.deadline();
        shared.timers.schedule(self.number, &mut self.scheduled, deadline);
    }

    /// Does what is due at `cx.now`.
    pub(super) fn expire(&mut self, cx: &mut Context<'_>, shared: &mut Shared) -> Fate {
        self.scheduled = None;
        if self.ack_at.is_some_and(|at| at <= cx.now) {
            self.interactive = false;
            self.ack_now = true;
            self.ack_at = None;
        }
        if self.retransmit_at.is_some_and(|at| at <= cx.now) {
            self.retransmit_at = None;
            if self.time_out(cx) {
                return self.give_up(cx, shared);
            }
        }
        if self.deadline() <= cx.now {
            match self.state {
                State::TimeWait => return Fate::Gone,
                // The kernel decides how long connecting may take.
                State::Connecting => self.heard = cx.now,
                _ if cx.link.full => self.heard = cx.now,
                _ if self.probes >= KEEP_ALIVE_PROBES => return self.give_up(cx, shared),
                _ => {
                    self.probes += 1;
                    self.probe(cx);
                }
            }
        }
        Fate::Stays
    }

    /// The guest has not answered in time. Whether to give up.
    fn time_out(&mut self, cx: &mut Context<'_>) -> bool {
        // A guest that takes no frames has lost none: it is stopped.
        if cx.link.full {
            self.retransmit_at = Some(cx.now + self.tx.rto.timeout());
            return false;
        }
        let retries = if self.is_half_open() { SYN_RETRIES } else { DATA_RETRIES };
        if self.tx.rto.backoff >= retries && (self.is_half_open() || self.tx.in_flight()) {
            return true;
        }
        match self.state {
            State::SynSent | State::SynReceived => {
                self.tx.rto.back_off();
                self.send_syn(cx);
            }
            State::Open if self.tx.in_flight() => self.tx.time_out(),
            // The window is closed: it may have opened, and the word of it be lost.
            State::Open => {
                self.tx.rto.back_off();
                self.probe(cx);
                self.retransmit_at = Some(cx.now + self.tx.rto.timeout());
            }
            State::Connecting | State::TimeWait => {}
        }
        false
    }
}

/// Gives bytes to the host's socket: how many it took. One that has failed takes everything, to no end.
fn write(socket: Option<&OwnedFd>, failed: bool, bytes: &[u8]) -> Result<usize, Errno> {
    match socket {
        // syscalls: sendto
        Some(socket) if !failed => match send(socket, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Err(Errno::AGAIN | Errno::INTR | Errno::NOBUFS | Errno::NOMEM) => Ok(0),
            result => result,
        },
        _ => Ok(bytes.len()),
    }
}

/// Prepares a socket: what the guest decided, whether to gather small pieces and what is urgent, is not decided again.
pub(super) fn prepare(socket: &OwnedFd) {
    let _ = sockopt::set_tcp_nodelay(socket, true);
    let _ = sockopt::set_socket_oobinline(socket, true);
}

/// Opens a socket that is bound as `binding` says and connects to `to`.
pub(super) fn connect(to: SocketAddr, binding: &Binding<'_>) -> Result<OwnedFd, Errno> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    let family = if to.is_ipv6() { AddressFamily::INET6 } else { AddressFamily::INET };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    // syscalls: socket connect
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    prepare(&socket);
    binding.bind_interface(&socket)?;
    if let Some(address) = binding.address {
        kernel::set_bind_address_no_port(&socket)?;
        rustix::net::bind(&socket, &SocketAddr::new(address, 0))?;
    }
    match rustix::net::connect(&socket, &to) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(error) => Err(error),
    }
}

//! Bytes of the host's on their way to the guest: peeked at, cut into frames, thrown away when acknowledged.

use std::ops::Range;
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv, sockopt};

use super::emit::{Control, Segment, emit};
use super::flow::{Flow, Peek};
use super::kernel;
use super::seq::Seq;
use super::shared::Shared;
use crate::context::Context;
use crate::tap::Sent;

/// What one flow may send before the next has its turn.
const TURN: usize = 256 << 10;
/// What is peeked at a time: the longest packet, nearly.
const CHUNK: usize = 65535 - 14 - 40 - 60;
/// Acknowledged bytes are left in the host's queue up to here while more acknowledgements are to come, to be thrown
/// away together. Not longer: a few bytes left there keep the whole buffer that they came in, and so may fill the queue.
const LEFT_UNREAD: u32 = 64 << 10;

/// What a peek into the host's queue found.
enum Peeked {
    /// This stretch of the scratch.
    Bytes(Range<usize>),
    /// Nothing more yet.
    Nothing,
    /// The host's peer has ended its direction.
    End,
    /// The connection is broken.
    Broken,
}

impl Flow {
    /// Throws away what the guest has acknowledged, unless more of it is to come soon.
    pub(super) fn discard_some(&mut self, shared: &mut Shared) {
        self.discard(shared, if self.tx.in_flight() { LEFT_UNREAD } else { 0 });
    }

    /// Throws away what the guest has acknowledged, if it is more than `leave`.
    pub(super) fn discard(&mut self, shared: &mut Shared, leave: u32) {
        let Some(socket) = &self.socket else { return };
        let mut acked = self.tx.acked_data().past(self.head);
        if acked <= leave {
            return;
        }
        while acked > 0 {
            let want = shared.scratch.len().min(acked as usize);
            // syscalls: recvfrom
            match recv(socket, &mut shared.scratch[..want], RecvFlags::TRUNC | RecvFlags::DONTWAIT) {
                Ok((_, n @ 1..)) => {
                    self.head = self.head.plus(n as u32);
                    acked = acked.saturating_sub(n as u32);
                }
                // It was there, so the connection is broken: peeking will tell.
                _ => break,
            }
        }
        if let Peek::At(at) = self.peek {
            self.peek = Peek::At(at.later(self.head));
        }
    }

    /// Peeks at what begins at `from`, at most `want` bytes.
    fn peek(&mut self, scratch: &mut [u8], from: Seq, want: usize) -> Peeked {
        let Some(socket) = &self.socket else { return Peeked::Broken };
        let offset = from.past(self.head);
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        self.peek = match self.peek {
            Peek::Head if offset == 0 => Peek::Head,
            Peek::Head if kernel::set_peek_offset(socket, offset).is_err() => Peek::HeadOnly,
            Peek::At(at) if at != from && kernel::set_peek_offset(socket, offset).is_err() => {
                return Peeked::Broken;
            }
            Peek::Head | Peek::At(_) => Peek::At(from),
            Peek::HeadOnly => Peek::HeadOnly,
        };
        let skip = if self.peek == Peek::HeadOnly { offset as usize } else { 0 };
        let end = (skip + want).min(scratch.len());
        if skip >= end {
            return Peeked::Nothing;
        }
        match recv(socket, &mut scratch[..end], flags) {
            Ok((_, n)) if n > skip => {
                if let Peek::At(at) = &mut self.peek {
                    *at = from.plus(n as u32);
                }
                Peeked::Bytes(skip..n)
            }
            // Without the kernel's help, what was read before hides whether more is to come.
            Ok((_, n)) if n > 0 => match sockopt::socket_error(socket) {
                _ if !self.ended => Peeked::Nothing,
                Ok(Ok(())) => Peeked::End,
                _ => Peeked::Broken,
            },
            Ok(_) => Peeked::End,
            Err(Errno::AGAIN | Errno::INTR) => Peeked::Nothing,
            Err(error) => {
                tracing::debug!(ends = ?self.ends, %error, "connection broken");
                Peeked::Broken
            }
        }
    }

    /// Sends what the guest may have. Whether there is more that only waits for its turn.
    ///
    /// # Errors
    /// When the host's connection is broken, after all that came before.
    pub(super) fn transmit(&mut self, cx: &mut Context<'_>, shared: &mut Shared) -> Result<bool, ()> {
        let mut turn = TURN;
        while !cx.link.full {
            let Some(span) = self.tx.span() else { break };
            if self.tx.fin == Some(span.from) {
                self.send_fin(cx);
                continue;
            }
            if !span.again && !self.more {
                break;
            }
            if turn == 0 {
                return Ok(true);
            }
            let mut want = CHUNK.min(span.length as usize);
            if let Some(fin) = self.tx.fin {
                want = want.min(fin.past(span.from) as usize);
            }
            let range = match self.peek(&mut shared.scratch, span.from, want) {
                Peeked::Bytes(range) => range,
                Peeked::Nothing if span.again => {
                    tracing::error!(ends = ?self.ends, "what was not acknowledged is not in the queue any more");
                    return Err(());
                }
                Peeked::Nothing => {
                    // What is on its way fills the scratch, or nothing is there.
                    self.more = self.peek == Peek::HeadOnly && self.tx.in_flight();
                    self.marked &= self.more;
                    break;
                }
                Peeked::End if !self.failed && !span.again => {
                    self.tx.fin = Some(self.tx.max);
                    continue;
                }
                Peeked::End | Peeked::Broken => return Err(()),
            };
            let (found, drained) = (range.len(), range.len() < want);
            let sent = self.send_data(cx, &shared.scratch[range], span.from, drained);
            if drained && sent == found && !span.again {
                self.more = self.ended || self.marked;
            }
            turn = turn.saturating_sub(sent.max(1));
        }
        Ok(false)
    }

    /// Sends bytes that are `from` there on, in as few frames as the link allows. How many were sent.
    fn send_data(&mut self, cx: &mut Context<'_>, bytes: &[u8], from: Seq, push: bool) -> usize {
        let mss = usize::from(self.tx.mss);
        let segmentation = cx.link.abilities().segmentation[usize::from(self.ends.is_ipv6())];
        let longest = if segmentation { CHUNK / mss * mss } else { mss };
        let mut sent = 0;
        while sent < bytes.len() {
            let rest = &bytes[sent..];
            let mut payload = &rest[..rest.len().min(longest.max(mss))];
            // What does not fill a segment waits for what follows it.
            if !push && payload.len() > mss {
                payload = &payload[..payload.len() / mss * mss];
            }
            let seq = from.plus(sent as u32);
            let last = payload.len() == rest.len();
            let segment = Segment {
                control: Control { psh: push && last, ..Control::default() },
                cut: (payload.len() > mss).then_some(self.tx.mss),
                ..self.segment_at(seq)
            };
            if emit(cx, &self.ends, &segment, payload) == Sent::Full {
                break;
            }
            self.sent(seq, payload.len() as u32, cx.now);
            sent += payload.len();
            if !push && !last && rest.len() - payload.len() < mss && segmentation {
                break;
            }
        }
        sent
    }

    fn send_fin(&mut self, cx: &mut Context<'_>) {
        let Some(fin) = self.tx.fin else { return };
        let control = Control { fin: true, ..Control::default() };
        if emit(cx, &self.ends, &Segment { control, ..self.segment_at(fin) }, &[]) == Sent::Yes {
            self.sent(fin, 1, cx.now);
        }
    }

    /// Accounts for a segment that was sent, and for the acknowledgement that went with it.
    fn sent(&mut self, from: Seq, length: u32, now: Instant) {
        self.tx.sent(from, length, now);
        if self.rx.acknowledged != self.rx.next {
            self.interactive = true;
        }
        // Gaps are told by segments of their own, which alone count as duplicates.
        if !(self.ack_now && self.rx.has_gaps()) {
            self.said();
        }
    }
}

//! What the flows have in common.

use std::time::{Duration, Instant};

use super::emit::{Control, Ends, Segment, emit};
use super::options::Options;
use super::receive::Budget;
use super::seq::Seq;
use super::timer::Timers;
use crate::context::Context;
use crate::tap::Sent;

/// What all flows use.
pub(super) struct Shared {
    /// Where bytes pass through that are peeked at.
    pub(super) scratch: Vec<u8>,
    pub(super) budget: Budget,
    pub(super) timers: Timers,
    /// Acknowledgements of nonsense that may still be sent in the second that began then (RFC 5961, 7).
    pub(super) challenges: (u32, Option<Instant>),
    /// Whether to try SO_PEEK_OFF.
    pub(super) peek_offset: bool,
    /// RSTs that the link had no room for.
    pub(super) resets: Vec<(Ends, Segment)>,
}

impl Shared {
    /// What is peeked at where the kernel has no SO_PEEK_OFF: then it is also what may be unacknowledged.
    pub(super) const SCRATCH: usize = 256 << 10;
    const RESETS: usize = 1024;
    const CHALLENGES: u32 = 100;

    pub(super) fn new(memory: usize) -> Self {
        Self {
            scratch: vec![0; Self::SCRATCH],
            budget: Budget { used: 0, limit: memory },
            timers: Timers::default(),
            challenges: (0, None),
            peek_offset: true,
            resets: Vec::new(),
        }
    }

    /// Whether one more may be sent.
    pub(super) fn may_challenge(&mut self, now: Instant) -> bool {
        let (left, since) = &mut self.challenges;
        if since.is_none_or(|since| now.saturating_duration_since(since) >= Duration::from_secs(1)) {
            (*left, *since) = (Self::CHALLENGES, Some(now));
        }
        let may = *left > 0;
        *left = left.saturating_sub(1);
        may
    }

    /// Tells the guest that a connection is over, now or when the link has room.
    pub(super) fn reset(&mut self, cx: &mut Context<'_>, ends: &Ends, seq: Seq, ack: Option<Seq>) {
        let control = Control { rst: true, ..Control::default() };
        let segment = Segment { seq, ack, control, window: 0, options: Options::default(), cut: None };
        if emit(cx, ends, &segment, &[]) == Sent::Full && self.resets.len() < Self::RESETS {
            self.resets.push((*ends, segment));
        }
    }
}

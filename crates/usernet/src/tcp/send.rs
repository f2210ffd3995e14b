//! What goes to the guest: what it has acknowledged, what is on its way, and what may follow.
//!
//! ```text
//!         una         again        lost          max          una + window
//!  ────────┼────────────┼────────────┼────────────┼────────────────┼────────  sequence numbers
//!    gone  │ on its way │ send again │ on its way │ may be sent    │ must wait
//! ```
//! The bytes themselves are in the receive queue of the host's socket: this is the account of them only.
//!
//! The link does not lose frames for want of room, it says that it is full. So nothing holds the sender back but the
//! guest's window, until something is lost all the same, in the guest itself: then the flow is halved and grows back
//! by as much as is acknowledged (RFC 5681, slow start). Loss is seen by three duplicate acknowledgements, with SACK
//! (RFC 2018, 6675) or without (RFC 6582), or by time (RFC 6298).

use std::time::Instant;

use super::options::{Block, Requested};
use super::rto::Rto;
use super::seq::Seq;

/// A stretch to be sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Span {
    pub(super) from: Seq,
    pub(super) length: u32,
    /// Whether it was sent before.
    pub(super) again: bool,
}

/// What an acknowledgement did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Acked {
    /// It is for something never sent.
    Impossible,
    /// Nothing is newly acknowledged.
    Nothing,
    /// Something is.
    Progress,
}

/// The sending half of a flow.
#[derive(Debug)]
pub(super) struct Sender {
    /// The first byte that is not acknowledged.
    pub(super) una: Seq,
    /// Past the last that was ever sent.
    pub(super) max: Seq,
    /// Where our FIN stands, once the host's socket has ended.
    pub(super) fin: Option<Seq>,
    /// What the guest takes beyond `una`.
    pub(super) window: u32,
    largest_window: u32,
    /// The sequence number and acknowledgement of the segment that `window` is from (RFC 9293, 3.10.7.4).
    window_seq: Seq,
    window_ack: Seq,
    /// The shift of the guest's windows.
    scale: u8,
    /// Whether the guest understands SACK.
    pub(super) sack: bool,
    /// The most payload of one segment.
    pub(super) mss: u16,
    duplicates: u8,
    /// The end of what was on its way when loss was seen.
    recover: Option<Seq>,
    /// Next to be sent again, up to `lost`.
    again: Seq,
    lost: Seq,
    /// How much may be on its way.
    congestion: u32,
    /// What the guest has beyond `una`: sorted, not touching.
    sacked: Vec<Block>,
    pub(super) rto: Rto,
    /// Something sent once, to time its acknowledgement: its end, and when it was sent.
    timed: Option<(Seq, Instant)>,
}

impl Sender {
    /// No limit but the guest's window: more than it can be.
    const UNLIMITED: u32 = 1 << 30;
    /// Stretches of SACK remembered at most.
    const BLOCKS: usize = 32;
    /// What a guest is assumed to take that does not say (RFC 9293, 3.7.1).
    const DEFAULT_MSS: [u16; 2] = [536, 1220];
    /// Less would be an attack on us: the smallest that Linux honours is near it.
    const SMALLEST_MSS: u16 = 64;

    /// Begins at `first`, the number of our SYN.
    pub(super) fn new(first: Seq) -> Self {
        Self {
            una: first,
            max: first,
            fin: None,
            window: 0,
            largest_window: 0,
            window_seq: Seq(0),
            window_ack: first,
            scale: 0,
            sack: false,
            mss: Self::DEFAULT_MSS[0],
            duplicates: 0,
            recover: None,
            again: first,
            lost: first,
            congestion: Self::UNLIMITED,
            sacked: Vec::new(),
            rto: Rto::new(),
            timed: None,
        }
    }

    /// Learns what the guest's SYN says; `seq` is its number, `window` its field, which no SYN scales.
    pub(super) fn negotiate(
        &mut self,
        requested: &Requested,
        seq: Seq,
        window: u16,
        largest_mss: u16,
        ipv6: bool,
    ) {
        let asked = requested.mss.unwrap_or(Self::DEFAULT_MSS[usize::from(ipv6)]);
        self.mss = asked.max(Self::SMALLEST_MSS).min(largest_mss);
        self.scale = requested.scale.unwrap_or(0);
        self.sack = requested.sack;
        self.window = window.into();
        self.largest_window = self.window;
        self.window_seq = seq;
    }

    /// Whether something waits to be acknowledged.
    pub(super) fn in_flight(&self) -> bool {
        self.max != self.una
    }

    /// Whether our FIN was acknowledged.
    pub(super) fn is_complete(&self) -> bool {
        self.fin.is_some_and(|fin| self.una.after(fin))
    }

    /// The end of the bytes that the guest has acknowledged, without SYN and FIN.
    pub(super) fn acked_data(&self) -> Seq {
        self.fin.map_or(self.una, |fin| self.una.earlier(fin))
    }

    /// How much is thought to be on its way.
    fn pipe(&self) -> u32 {
        let all = self.max.past(self.una);
        let sacked: u32 = self.sacked.iter().map(|block| block.end.past(block.start)).sum();
        all.saturating_sub(sacked).saturating_sub(self.to_repeat())
    }

    /// How much of what is lost was not sent again yet.
    fn to_repeat(&self) -> u32 {
        let (from, to) = (self.again, self.lost);
        let sacked: u32 =
            self.sacked.iter().map(|block| block.end.earlier(to).past(block.start.later(from))).sum();
        to.past(from).saturating_sub(sacked)
    }

    /// What may be sent now, if there is anything to send.
    pub(super) fn span(&self) -> Option<Span> {
        let mss = u32::from(self.mss);
        let room = self.congestion.saturating_sub(self.pipe());
        // What was lost first.
        let mut from = self.again;
        let mut end = self.lost;
        for block in &self.sacked {
            if from.before(block.start) {
                end = end.earlier(block.start);
                break;
            }
            from = from.later(block.end);
        }
        let length = end.past(from);
        if length > 0 {
            // One segment may always go: the timer or the guest asked for it.
            return (room > 0 || from == self.una).then(|| Span {
                from,
                length: length.min(room.max(mss)),
                again: true,
            });
        }
        if self.fin.is_some_and(|fin| self.max.after(fin)) {
            return None;
        }
        let length = self.una.plus(self.window).past(self.max).min(room);
        // Small pieces only if nothing else will make the window larger (RFC 9293, 3.8.6.2.1).
        let silly = length < mss && length < self.largest_window / 2 && self.in_flight();
        (length > 0 && !silly).then_some(Span { from: self.max, length, again: false })
    }

    /// `length` numbers from `from` were sent.
    pub(super) fn sent(&mut self, from: Seq, length: u32, now: Instant) {
        let end = from.plus(length);
        if from.before(self.max) {
            self.timed = None;
            self.again = self.again.later(end);
        } else {
            self.timed.get_or_insert((end, now));
        }
        self.max = self.max.later(end);
    }

    /// Takes in the acknowledgement of a segment at `seq`. `pure` says that the segment carries nothing else.
    pub(super) fn acknowledge(
        &mut self,
        ack: Seq,
        seq: Seq,
        window: u16,
        pure: bool,
        sack: impl Iterator<Item = Block>,
        now: Instant,
    ) -> Acked {
        if ack.after(self.max) {
            return Acked::Impossible;
        }
        if ack.before(self.una) {
            return Acked::Nothing;
        }
        let window = u32::from(window) << self.scale;
        let same_window = window == self.window;
        if self.window == 0 && window > 0 && !self.in_flight() {
            self.rto.backoff = 0;
        }
        if self.window_seq.before(seq) || (self.window_seq == seq && !ack.before(self.window_ack)) {
            self.window = window;
            self.largest_window = self.largest_window.max(window);
            (self.window_seq, self.window_ack) = (seq, ack);
        }
        let news = self.sack && self.note_sacked(ack, sack);
        let newly = ack.past(self.una);
        if newly > 0 {
            self.progress(ack, newly, now);
            return Acked::Progress;
        }
        if self.in_flight() && pure && (same_window || news) {
            self.duplicates = self.duplicates.saturating_add(1);
            if self.recover.is_none() && self.duplicates >= 3 {
                self.begin_recovery();
            } else if self.recover.is_some() {
                self.extend_loss();
            }
        }
        Acked::Nothing
    }

    fn progress(&mut self, ack: Seq, newly: u32, now: Instant) {
        if let Some((end, at)) = self.timed
            && !ack.before(end)
        {
            self.timed = None;
            self.rto.sample(now.saturating_duration_since(at));
        }
        self.rto.backoff = 0;
        self.duplicates = 0;
        self.una = ack;
        self.again = self.again.later(ack);
        self.lost = self.lost.later(self.again);
        self.sacked.retain_mut(|block| {
            block.start = block.start.later(ack);
            block.start.before(block.end)
        });
        self.congestion = self.congestion.saturating_add(newly).min(Self::UNLIMITED);
        match self.recover {
            Some(recover) if ack.before(recover) => self.extend_loss(),
            Some(_) => self.recover = None,
            None => {}
        }
    }

    /// Three acknowledgements said that something is missing.
    fn begin_recovery(&mut self) {
        self.recover = Some(self.max);
        self.congestion = (self.max.past(self.una) / 2).max(2 * u32::from(self.mss));
        self.again = self.una;
        self.lost = self.una;
        self.extend_loss();
    }

    /// Takes as lost what lies before the last thing that the guest has; without SACK, the segment at `una`.
    fn extend_loss(&mut self) {
        match self.sacked.last() {
            Some(block) => self.lost = self.lost.later(block.start),
            // The rest of what was lost is told one segment an acknowledgement.
            None if self.again == self.una => {
                self.lost = self.lost.later(self.una.plus(self.mss.into()).earlier(self.max));
            }
            None => {}
        }
    }

    /// The timer ran out: everything that is not acknowledged is lost.
    pub(super) fn time_out(&mut self) {
        self.rto.back_off();
        self.timed = None;
        self.duplicates = 0;
        self.recover = Some(self.max);
        // The guest may have thought better of what it said it had (RFC 2018, 8).
        self.sacked.clear();
        self.again = self.una;
        self.lost = self.max;
        self.congestion = self.mss.into();
    }

    /// Remembers blocks; whether one of them is new.
    fn note_sacked(&mut self, ack: Seq, blocks: impl Iterator<Item = Block>) -> bool {
        let mut news = false;
        for mut block in blocks.take(4) {
            let possible =
                block.start.before(block.end) && !block.end.after(self.max) && block.end.after(ack);
            if !possible {
                continue;
            }
            block.start = block.start.later(ack);
            let from = self.sacked.partition_point(|known| known.end.before(block.start));
            let to = self.sacked.partition_point(|known| !known.start.after(block.end));
            if let [first, .., last] | [first @ last] = &self.sacked[from..to.max(from)] {
                if to - from == 1 && !block.start.before(first.start) && !block.end.after(first.end) {
                    continue;
                }
                block.start = block.start.earlier(first.start);
                block.end = block.end.later(last.end);
            } else if self.sacked.len() >= Self::BLOCKS {
                continue;
            }
            self.sacked.splice(from..to.max(from), [block]);
            news = true;
        }
        news
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    const MSS: u32 = 1000;

    fn sender(sack: bool) -> (Sender, Instant) {
        let mut sender = Sender::new(Seq(0));
        let requested = Requested { mss: Some(MSS as u16), scale: Some(4), sack };
        sender.negotiate(&requested, Seq(0), u16::MAX, 1460, false);
        (sender, Instant::now())
    }

    fn send_all(sender: &mut Sender, upto: u32, now: Instant) -> Vec<Span> {
        let mut sent = Vec::new();
        while let Some(span) = sender.span() {
            let room = if span.again { span.length } else { Seq(upto).past(span.from).min(span.length) };
            let length = room.min(MSS);
            if length == 0 {
                break;
            }
            sender.sent(span.from, length, now);
            sent.push(Span { length, ..span });
        }
        sent
    }

    fn ack(sender: &mut Sender, ack: u32, blocks: &[(u32, u32)], now: Instant) -> Acked {
        let blocks = blocks.iter().map(|&(start, end)| Block { start: Seq(start), end: Seq(end) });
        sender.acknowledge(Seq(ack), Seq(0), 4096, true, blocks, now)
    }

    #[test]
    fn three_duplicates_with_sack_repeat_the_holes_alone() {
        let (mut sender, now) = sender(true);
        send_all(&mut sender, 10_000, now);
        ack(&mut sender, 1000, &[], now);
        for _ in 0..3 {
            ack(&mut sender, 1000, &[(2000, 3000), (4000, 9000)], now);
        }
        let again = send_all(&mut sender, 10_000, now);
        let froms: Vec<_> = again.iter().map(|span| (span.from.0, span.length, span.again)).collect();
        assert_eq!(froms, [(1000, 1000, true), (3000, 1000, true)]);
        assert_eq!(ack(&mut sender, 10_000, &[], now), Acked::Progress);
        assert!(!sender.in_flight() && sender.sacked.is_empty());
    }

    #[test]
    fn three_duplicates_without_sack_repeat_one_segment_a_time() {
        let (mut sender, now) = sender(false);
        send_all(&mut sender, 10_000, now);
        ack(&mut sender, 0, &[], now);
        for _ in 0..3 {
            ack(&mut sender, 0, &[], now);
        }
        assert_eq!(send_all(&mut sender, 10_000, now), [Span { from: Seq(0), length: MSS, again: true }]);
        ack(&mut sender, 3000, &[], now);
        assert_eq!(send_all(&mut sender, 10_000, now), [Span { from: Seq(3000), length: MSS, again: true }]);
    }

    #[test]
    fn after_a_time_out_everything_goes_again_slowly() {
        let (mut sender, now) = sender(true);
        send_all(&mut sender, 10_000, now);
        sender.time_out();
        assert_eq!(send_all(&mut sender, 10_000, now), [Span { from: Seq(0), length: MSS, again: true }]);
        ack(&mut sender, 1000, &[], now);
        assert_eq!(send_all(&mut sender, 10_000, now).len(), 2);
        // The rest had arrived after all: nothing more is sent again.
        ack(&mut sender, 10_000, &[], now);
        assert_eq!(
            send_all(&mut sender, 12_000, now)[0],
            Span { from: Seq(10_000), length: MSS, again: false }
        );
    }

    #[test]
    fn repeats_are_not_timed() {
        let (mut sender, now) = sender(true);
        send_all(&mut sender, 1000, now);
        sender.time_out();
        send_all(&mut sender, 1000, now);
        ack(&mut sender, 1000, &[], now + Duration::from_secs(50));
        assert_eq!(sender.rto.timeout(), Duration::from_secs(1), "no sample yet");
    }

    #[test]
    fn small_windows_wait_for_larger_ones() {
        let (mut sender, now) = sender(true);
        send_all(&mut sender, 60_000, now);
        sender.acknowledge(Seq(30_000), Seq(0), (30_100 / 16) as u16, true, std::iter::empty(), now);
        assert_eq!(sender.span(), None);
        // Nothing on its way: then a small piece is better than none.
        sender.acknowledge(Seq(60_000), Seq(0), 2, true, std::iter::empty(), now);
        assert_eq!(sender.span(), Some(Span { from: Seq(60_000), length: 32, again: false }));
    }

    proptest! {
        #![proptest_config(ProptestConfig { rng_seed: proptest::test_runner::RngSeed::Fixed(5), ..ProptestConfig::default() })]

        /// Any acknowledgements at all: no panic, and the account stays in order.
        #[test]
        fn hostile_acknowledgements(
            first in any::<u32>(),
            steps in proptest::collection::vec(
                (0u8..4, -3000i32..12_000, any::<u16>(), proptest::collection::vec((-5000i32..15_000, -500i32..5000), 0..5)),
                1..100,
            ),
        ) {
            let now = Instant::now();
            let mut sender = Sender::new(Seq(first));
            let requested = Requested { mss: Some(MSS as u16), scale: Some(2), sack: true };
            sender.negotiate(&requested, Seq(0), 60_000, 1460, true);
            for (what, offset, window, blocks) in steps {
                let at = sender.una.0.wrapping_add_signed(offset);
                let blocks = blocks.into_iter().map(|(start, length)| {
                    let start = sender.una.0.wrapping_add_signed(start);
                    Block { start: Seq(start), end: Seq(start.wrapping_add_signed(length)) }
                }).collect::<Vec<_>>();
                match what {
                    0 => sender.time_out(),
                    1 => { send_all(&mut sender, first.wrapping_add(100_000), now); }
                    _ => {
                        sender.acknowledge(Seq(at), Seq(0), window, what == 2, blocks.into_iter(), now);
                    }
                }
                prop_assert!(!sender.una.after(sender.max));
                prop_assert!(!sender.again.before(sender.una) && !sender.again.after(sender.max));
                prop_assert!(!sender.lost.after(sender.max));
                prop_assert!(sender.sacked.windows(2).all(|pair| pair[0].end.before(pair[1].start)));
                prop_assert!(sender.sacked.len() <= Sender::BLOCKS);
                if let Some(span) = sender.span() {
                    prop_assert!(span.length > 0);
                    prop_assert_eq!(span.again, span.from.before(sender.max));
                }
            }
        }
    }
}

//! What comes from the guest: what of it has arrived, what of that the host's socket took, and what may still come.
//!
//! ```text
//!        taken            next                         edge
//!  ────────┼────────────────┼──────────────────────────┼────────  sequence numbers
//!   socket │    backlog     │   gaps and `ahead`       │ not allowed yet
//! ```
//! Up to `taken` the host's socket has everything. The backlog is in order and acknowledged but did not fit: it goes
//! as soon as there is room. Beyond `next` lie pieces that came out of order, told to the guest by SACK. The edge of
//! the window is `taken` plus what the socket has free, so the backlog is a few segments at most: the difference
//! between the kernel's accounting and ours. The edge never moves back.
//!
//! The guest's FIN is received when the host's socket has taken everything before it: a guest that lingers after closing
//! (SO_LINGER) waits for its acknowledgement, and is told by it that its bytes are on their way. One that asks again gets it all
//! the same, since the bytes are kept, and a kernel that gets none gives up in the end.

use std::collections::VecDeque;

use super::options::Block;
use super::seq::Seq;

/// Memory of all flows together for what the host did not take and what came out of order. Beyond it segments are
/// dropped, for the guest to send again.
#[derive(Debug)]
pub(super) struct Budget {
    pub(super) used: usize,
    pub(super) limit: usize,
}

impl Budget {
    fn take(&mut self, bytes: usize) -> bool {
        let fits = self.used + bytes <= self.limit;
        if fits {
            self.used += bytes;
        }
        fits
    }

    pub(super) fn give_back(&mut self, bytes: usize) {
        self.used = self.used.saturating_sub(bytes);
    }
}

/// Bytes that came out of order.
#[derive(Debug)]
struct Piece {
    start: Seq,
    bytes: Vec<u8>,
}

impl Piece {
    fn end(&self) -> Seq {
        self.start.plus(self.bytes.len() as u32)
    }
}

/// Where a segment's payload belongs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Place<'a> {
    /// Nothing of it is new and allowed.
    Nowhere,
    /// It is what comes next.
    Next(&'a [u8]),
    /// It is for later.
    Ahead(Seq, &'a [u8]),
}

/// The receiving half of a flow.
#[derive(Debug)]
pub(super) struct Receiver {
    /// What the guest is to send next; what is acknowledged.
    pub(super) next: Seq,
    /// What the guest may not go beyond.
    pub(super) edge: Seq,
    /// How wide the window was when the edge was last looked at.
    widest: u32,
    /// What the last segment to the guest acknowledged.
    pub(super) acknowledged: Seq,
    /// Where the guest's FIN stands, once seen.
    pub(super) fin: Option<Seq>,
    /// The shift of the windows that we send.
    pub(super) scale: u8,
    /// In order, not yet taken by the host's socket.
    backlog: VecDeque<u8>,
    /// Out of order: sorted, not overlapping.
    ahead: Vec<Piece>,
    /// In the block that is told first (RFC 2018, 4): where the newest piece began.
    newest: Seq,
}

impl Receiver {
    /// Pieces kept at most, each with its own allocation.
    const PIECES: usize = 128;

    /// For a guest whose first byte is `next`.
    pub(super) fn new(next: Seq, scale: u8) -> Self {
        Self {
            next,
            edge: next,
            widest: 0,
            acknowledged: next,
            fin: None,
            scale,
            backlog: VecDeque::new(),
            ahead: Vec::new(),
            newest: next,
        }
    }

    /// What is held in memory.
    pub(super) fn held(&self) -> usize {
        self.backlog.len() + self.ahead.iter().map(|piece| piece.bytes.len()).sum::<usize>()
    }

    /// Whether something in order waits for the host's socket.
    pub(super) fn has_backlog(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// The host's socket took or refused `free` bytes of room: moves the window's edge on.
    pub(super) fn allow(&mut self, free: u32) {
        let taken = self.next.minus(self.backlog.len() as u32);
        let window = taken.plus(free).past(self.next);
        // What the field can say, in whole units of the scale.
        let window = window.min(u32::from(u16::MAX) << self.scale) >> self.scale << self.scale;
        // A probe of a closed window may be past the edge by a byte: that is no reason to let the next one be.
        if window > 0 {
            self.edge = self.edge.later(self.next.plus(window));
        }
        self.widest = self.window();
    }

    /// Whether the guest has used little of the window since [`Self::allow`], and may still send more than `enough`: then
    /// there is no hurry to move the edge on.
    pub(super) fn is_wide(&self, enough: u32) -> bool {
        let window = self.window();
        window > enough && window > self.widest - self.widest / 8
    }

    /// The window field of a segment that acknowledges `next`. Rounded up, so that the guest never sees the edge move
    /// back; [`Self::place`] allows for it.
    pub(super) fn window_field(&self) -> u16 {
        let window = self.edge.past(self.next);
        u16::try_from(window.div_ceil(1 << self.scale)).unwrap_or(u16::MAX)
    }

    /// What the guest may still send.
    pub(super) fn window(&self) -> u32 {
        self.edge.past(self.next)
    }

    /// Cuts off a payload that starts at `seq` what has been there and what is not allowed.
    pub(super) fn place<'a>(&self, seq: Seq, payload: &'a [u8]) -> Place<'a> {
        let known = self.next.past(seq) as usize;
        let Some(payload) = payload.get(known..) else { return Place::Nowhere };
        let seq = seq.later(self.next);
        // The field rounds up: what it may have said is allowed.
        let edge = self.edge.plus((1 << self.scale) - 1);
        let payload = &payload[..payload.len().min(edge.past(seq) as usize)];
        match payload {
            [] => Place::Nowhere,
            _ if seq == self.next => Place::Next(payload),
            _ => Place::Ahead(seq, payload),
        }
    }

    /// Takes what comes next. `write` gives bytes to the host's socket and returns how many it took. Afterwards, `next`
    /// is past everything that is the host's or kept.
    pub(super) fn take_next<E>(
        &mut self,
        payload: &[u8],
        budget: &mut Budget,
        write: &mut impl FnMut(&[u8]) -> Result<usize, E>,
    ) -> Result<(), E> {
        let taken = if self.backlog.is_empty() { write(payload)?.min(payload.len()) } else { 0 };
        self.next = self.next.plus(taken as u32);
        let rest = &payload[taken..];
        if !rest.is_empty() && budget.take(rest.len()) {
            self.backlog.extend(rest);
            self.next = self.next.plus(rest.len() as u32);
        }
        self.join(budget, write)
    }

    /// Moves pieces that are not ahead any more.
    fn join<E>(
        &mut self,
        budget: &mut Budget,
        write: &mut impl FnMut(&[u8]) -> Result<usize, E>,
    ) -> Result<(), E> {
        // Pieces may touch each other.
        let mut end = self.next;
        let ready = self.ahead.iter().take_while(|piece| {
            let joins = !piece.start.after(end);
            if joins {
                end = end.later(piece.end());
            }
            joins
        });
        let ready = ready.count();
        let mut result = Ok(());
        for piece in self.ahead.drain(..ready) {
            let bytes = piece.bytes.get(self.next.past(piece.start) as usize..).unwrap_or_default();
            let mut taken = 0;
            if self.backlog.is_empty() && result.is_ok() && !bytes.is_empty() {
                match write(bytes) {
                    Ok(n) => taken = n.min(bytes.len()),
                    Err(error) => result = Err(error),
                }
            }
            self.backlog.extend(&bytes[taken..]);
            self.next = self.next.plus(bytes.len() as u32);
            // What stays was counted when it came.
            budget.give_back(piece.bytes.len() - (bytes.len() - taken));
        }
        result
    }

    /// Keeps a piece that is ahead of its time. What does not fit is dropped.
    pub(super) fn keep(&mut self, start: Seq, payload: &[u8], budget: &mut Budget) {
        self.newest = start;
        let end = start.plus(payload.len() as u32);
        let mut seq = start;
        while seq.before(end) {
            let at = self.ahead.partition_point(|piece| !piece.start.after(seq));
            if let Some(before) = at.checked_sub(1).and_then(|i| self.ahead.get(i))
                && before.end().after(seq)
            {
                seq = before.end();
                continue;
            }
            let stop = self.ahead.get(at).map_or(end, |piece| piece.start.earlier(end));
            if !self.insert(at, seq, &payload[seq.past(start) as usize..stop.past(start) as usize], budget) {
                return;
            }
            seq = stop;
        }
    }

    /// Adds bytes between two pieces, at index `at`; to the one before where they continue it.
    fn insert(&mut self, at: usize, start: Seq, bytes: &[u8], budget: &mut Budget) -> bool {
        if !budget.take(bytes.len()) {
            return false;
        }
        if let Some(before) = at.checked_sub(1).and_then(|i| self.ahead.get_mut(i))
            && before.end() == start
        {
            before.bytes.extend_from_slice(bytes);
            return true;
        }
        if self.ahead.len() >= Self::PIECES {
            budget.give_back(bytes.len());
            return false;
        }
        self.ahead.insert(at, Piece { start, bytes: bytes.to_vec() });
        true
    }

    /// Gives the backlog to the host's socket, as much as it takes.
    pub(super) fn drain<E>(
        &mut self,
        budget: &mut Budget,
        mut write: impl FnMut(&[u8]) -> Result<usize, E>,
    ) -> Result<(), E> {
        while !self.backlog.is_empty() {
            let (front, _) = self.backlog.as_slices();
            let offered = front.len();
            let taken = write(front)?.min(offered);
            self.backlog.drain(..taken);
            budget.give_back(taken);
            if taken < offered {
                break;
            }
        }
        if self.backlog.is_empty() {
            self.backlog = VecDeque::new();
        }
        Ok(())
    }

    /// Gives up what is held.
    pub(super) fn clear(&mut self, budget: &mut Budget) {
        budget.give_back(self.held());
        self.backlog = VecDeque::new();
        self.ahead = Vec::new();
    }

    /// Whether all bytes that the guest will ever send are the host's or kept.
    pub(super) fn has_all(&self) -> bool {
        self.fin.is_some_and(|fin| !self.next.before(fin))
    }

    /// Whether all of them are the host's.
    pub(super) fn is_delivered(&self) -> bool {
        self.has_all() && self.backlog.is_empty()
    }

    /// Receives the guest's FIN, if nothing is missing before it: it is acknowledged from then on. Whether it was not yet.
    pub(super) fn take_fin(&mut self) -> bool {
        let is_next = self.fin == Some(self.next);
        if is_next {
            self.next = self.next.plus(1);
        }
        is_next
    }

    /// What has come out of order, for SACK: the stretch that grew last first, at most four.
    pub(super) fn blocks(&self) -> ([Block; 4], usize) {
        let mut blocks = [Block { start: self.next, end: self.next }; 4];
        let mut count = 0;
        let mut stretch: Option<Block> = None;
        let stretches =
            self.ahead.iter().map(Some).chain([None]).filter_map(|piece| match (piece, stretch) {
                (Some(piece), Some(open)) if open.end == piece.start => {
                    stretch = Some(Block { start: open.start, end: piece.end() });
                    None
                }
                (Some(piece), open) => {
                    stretch = Some(Block { start: piece.start, end: piece.end() });
                    open
                }
                (None, open) => open,
            });
        for block in stretches {
            let is_newest = !self.newest.before(block.start) && self.newest.before(block.end);
            if is_newest {
                // It goes first, and one of the others makes room.
                let moved = count.min(blocks.len() - 1);
                blocks.copy_within(..moved, 1);
                blocks[0] = block;
                count = moved + 1;
            } else if count < blocks.len() {
                blocks[count] = block;
                count += 1;
            }
        }
        (blocks, count)
    }

    /// Whether anything came out of order.
    pub(super) fn has_gaps(&self) -> bool {
        !self.ahead.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use proptest::prelude::*;

    use super::*;

    /// A host's socket with room for so much.
    struct Sink {
        got: Vec<u8>,
        room: usize,
    }

    impl Sink {
        fn write(&mut self, bytes: &[u8]) -> Result<usize, Infallible> {
            let n = bytes.len().min(self.room);
            self.room -= n;
            self.got.extend_from_slice(&bytes[..n]);
            Ok(n)
        }
    }

    fn arrive(receiver: &mut Receiver, budget: &mut Budget, sink: &mut Sink, seq: Seq, payload: &[u8]) {
        match receiver.place(seq, payload) {
            Place::Nowhere => {}
            Place::Next(bytes) => receiver.take_next(bytes, budget, &mut |b| sink.write(b)).unwrap(),
            Place::Ahead(seq, bytes) => receiver.keep(seq, bytes, budget),
        }
    }

    #[test]
    fn the_newest_block_is_told_first() {
        let mut budget = Budget { used: 0, limit: 1 << 20 };
        let mut receiver = Receiver::new(Seq(0), 0);
        receiver.allow(10_000);
        for start in [1000, 3000, 5000, 7000, 9000, 3100] {
            receiver.keep(Seq(start), &[0; 100], &mut budget);
        }
        let (blocks, count) = receiver.blocks();
        assert_eq!(count, 4);
        assert_eq!((blocks[0].start, blocks[0].end), (Seq(3000), Seq(3200)));
        receiver.clear(&mut budget);
        assert_eq!(budget.used, 0);
    }

    #[test]
    fn a_fin_waits_for_the_bytes_before_it() {
        let mut budget = Budget { used: 0, limit: 1 << 20 };
        let mut sink = Sink { got: Vec::new(), room: 3 };
        let mut receiver = Receiver::new(Seq(5), 0);
        receiver.allow(100);
        receiver.fin = Some(Seq(11));
        arrive(&mut receiver, &mut budget, &mut sink, Seq(8), b"def");
        assert!(!receiver.has_all() && !receiver.take_fin(), "three bytes are missing");
        arrive(&mut receiver, &mut budget, &mut sink, Seq(5), b"abc");
        assert!(receiver.has_all() && !receiver.is_delivered(), "three were not taken");
        assert_eq!(receiver.next, Seq(11));
        sink.room = 3;
        receiver.drain(&mut budget, |bytes| sink.write(bytes)).unwrap();
        assert!(receiver.is_delivered());
        assert!(receiver.take_fin() && !receiver.take_fin());
        assert_eq!((receiver.next, sink.got.as_slice()), (Seq(12), b"abcdef".as_slice()));
        assert!(receiver.is_delivered());
    }

    #[test]
    fn the_edge_never_moves_back() {
        let mut receiver = Receiver::new(Seq(u32::MAX - 10), 4);
        receiver.allow(1000);
        let edge = receiver.edge;
        receiver.allow(10);
        assert_eq!(receiver.edge, edge);
        assert!(u32::from(receiver.window_field()) << 4 >= receiver.window());
    }

    #[test]
    fn a_window_is_wide_until_an_eighth_of_it_is_used() {
        let mut receiver = Receiver::new(Seq(u32::MAX), 4);
        assert!(!receiver.is_wide(0), "nothing was allowed yet");
        receiver.allow(16_000);
        assert!(receiver.is_wide(2920) && !receiver.is_wide(16_000));
        receiver.next = receiver.next.plus(1999);
        assert!(receiver.is_wide(2920));
        receiver.next = receiver.next.plus(1);
        assert!(!receiver.is_wide(2920));
        // The host's socket has not moved: what is left is what there is.
        receiver.allow(14_000);
        assert!(receiver.is_wide(2920));
        receiver.next = receiver.next.plus(14_000);
        assert!(!receiver.is_wide(0));
    }

    #[test]
    fn beyond_the_window_nothing_is_taken() {
        let mut receiver = Receiver::new(Seq(5), 0);
        receiver.allow(4);
        assert_eq!(receiver.place(Seq(5), b"abcdef"), Place::Next(b"abcd"));
        assert_eq!(receiver.place(Seq(9), b"abcdef"), Place::Nowhere);
        assert_eq!(receiver.place(Seq(3), b"ab"), Place::Nowhere);
        assert_eq!(receiver.place(Seq(3), b"abc"), Place::Next(b"c"));
        assert_eq!(receiver.place(Seq(6), b"b"), Place::Ahead(Seq(6), b"b"));
        assert_eq!(receiver.place(Seq(5u32.wrapping_sub(1 << 31)), b"b"), Place::Nowhere);
    }

    proptest! {
        #![proptest_config(ProptestConfig { rng_seed: proptest::test_runner::RngSeed::Fixed(4), ..ProptestConfig::default() })]

        /// Whatever the order, the overlaps and the room, the host gets the guest's bytes, and what is kept is counted.
        #[test]
        fn any_order_gives_the_same_bytes(
            first in any::<u32>(),
            segments in proptest::collection::vec((0usize..2000, 1usize..300, 0usize..200), 1..200),
        ) {
            let sent: Vec<u8> = (0..2300u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
            let mut budget = Budget { used: 0, limit: 1 << 20 };
            let mut receiver = Receiver::new(Seq(first), 3);
            receiver.allow(2304);
            let mut sink = Sink { got: Vec::new(), room: 0 };
            let mut covered = vec![false; sent.len()];
            for (start, length, room) in segments {
                sink.room += room;
                receiver.drain(&mut budget, |b| sink.write(b)).unwrap();
                let seq = Seq(first).plus(start as u32);
                arrive(&mut receiver, &mut budget, &mut sink, seq, &sent[start..start + length]);
                covered[start..start + length].fill(true);
                prop_assert_eq!(budget.used, receiver.held());
                let contiguous = covered.iter().take_while(|c| **c).count();
                // Too many pieces may have cost one: never more than was sent.
                prop_assert!(receiver.next.past(Seq(first)) as usize <= contiguous);
                let (blocks, count) = receiver.blocks();
                for block in &blocks[..count] {
                    prop_assert!(block.start.after(receiver.next) && block.start.before(block.end));
                    let range = block.start.past(Seq(first)) as usize..block.end.past(Seq(first)) as usize;
                    prop_assert!(covered[range].iter().all(|c| *c));
                }
            }
            sink.room = usize::MAX;
            arrive(&mut receiver, &mut budget, &mut sink, Seq(first), &sent);
            receiver.drain(&mut budget, |b| sink.write(b)).unwrap();
            prop_assert_eq!(&sink.got, &sent);
            prop_assert_eq!(budget.used, 0);
            prop_assert!(!receiver.has_gaps() && !receiver.has_backlog());
        }
    }
}

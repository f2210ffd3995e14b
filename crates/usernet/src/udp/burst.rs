//! Datagrams that go on together.
//!
//! Who sends fast sends many datagrams of one length by one flow. Those that are there at the same time are gathered and
//! given to a kernel by one call, which cuts them apart again: that costs little more than one of them alone. From the guest
//! they leave by the host's socket (`UDP_SEGMENT` in udp(7)), to the guest in one frame, if its link takes such.
//! Everything else ends a burst: another flow, another length, another hop limit, and the end of what is there.

/// Datagrams that go together. More than the kernel takes (UDP_MAX_SEGMENTS) are twice as many; but whoever receives them
/// has them all at once, and should have room.
const MOST: usize = 32;

/// Bytes that go together: no packet is longer, with its headers.
const MOST_BYTES: usize = 65535 - 40 - 8;

/// Datagrams that have `K` in common: see above.
#[derive(Debug, Default)]
pub(super) struct Burst<K> {
    common: K,
    bytes: Vec<u8>,
    /// The length of each but the last, which may be shorter.
    length: usize,
    count: usize,
    /// Whether nothing more can follow.
    whole: bool,
}

impl<K: Copy + PartialEq> Burst<K> {
    /// Adds a datagram. If it is `false`, what there is has to go first.
    pub(super) fn add(&mut self, common: K, payload: &[u8]) -> bool {
        if self.count == 0 {
            (self.common, self.length) = (common, payload.len());
            self.bytes.clear();
        } else if self.whole
            // One without bytes would leave no trace.
            || payload.is_empty()
            || self.common != common
            || payload.len() > self.length
            || self.bytes.len() + payload.len() > MOST_BYTES
        {
            return false;
        }
        self.bytes.extend_from_slice(payload);
        self.count += 1;
        self.whole = payload.is_empty() || payload.len() < self.length || self.count == MOST;
        true
    }

    /// Forgets what there was.
    pub(super) fn clear(&mut self) {
        (self.count, self.whole) = (0, false);
    }

    /// What they have in common.
    pub(super) fn common(&self) -> K {
        self.common
    }

    /// How many datagrams there are.
    pub(super) fn len(&self) -> usize {
        self.count
    }

    /// All of them, and how long each is.
    pub(super) fn together(&self) -> (&[u8], u16) {
        // A datagram's length has 16 bits.
        (&self.bytes, self.length as u16)
    }

    /// One after the other.
    pub(super) fn each(&self) -> impl Iterator<Item = &[u8]> {
        (0..self.count).map(|index| {
            let start = index * self.length;
            let end = (start + self.length).min(self.bytes.len());
            self.bytes.get(start..end).unwrap_or_default()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(burst: &Burst<(u32, u8)>) -> Vec<Vec<u8>> {
        burst.each().map(<[u8]>::to_vec).collect()
    }

    #[test]
    fn datagrams_of_one_length_go_together_and_a_shorter_one_is_the_last() {
        let mut burst = Burst::default();
        assert!(burst.add((1, 64), b"abc") && burst.add((1, 64), b"def") && burst.add((1, 64), b"g"));
        assert!(!burst.add((1, 64), b"h"), "nothing follows a shorter one");
        assert_eq!(burst.together(), (&b"abcdefg"[..], 3));
        assert_eq!(pieces(&burst), [&b"abc"[..], b"def", b"g"]);
        burst.clear();
        assert_eq!(pieces(&burst), Vec::<Vec<u8>>::new());
        assert!(burst.add((1, 64), b"h"));
        assert_eq!(pieces(&burst), [b"h"]);
    }

    #[test]
    fn everything_else_ends_a_burst() {
        for (flow, hops, payload) in [(2, 64, &b"abc"[..]), (1, 63, b"abc"), (1, 64, b"abcd")] {
            let mut burst = Burst::default();
            assert!(burst.add((1, 64), b"abc"));
            assert!(!burst.add((flow, hops), payload));
        }
        let mut burst = Burst::default();
        assert!(burst.add((1, 64), b""));
        assert!(!burst.add((1, 64), b""), "no length tells them apart");
        let mut burst = Burst::default();
        assert!((0..MOST).all(|_| burst.add((1, 64), &[0; 1472])));
        assert!(!burst.add((1, 64), &[0; 1472]));
        let mut burst = Burst::default();
        assert!(burst.add((1, 64), &[0; 40000]));
        assert!(!burst.add((1, 64), &[0; 40000]));
    }
}

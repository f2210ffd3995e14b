//! TCP options: read from the guest's segments, written into ours.
//!
//! Window scale and SACK (RFC 7323, 2018) are spoken. Timestamps are not offered: the round trip is timed without
//! them, and PAWS guards against segments that linger in a network, which this link has none of.

use etherparse::{TcpOptionElement, TcpOptionsIterator};

use super::seq::Seq;

/// The shift beyond which a receiver must not go (RFC 7323, 2.3).
const LARGEST_SCALE: u8 = 14;

/// What a SYN of the guest's asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Requested {
    /// The largest segment that it takes.
    pub(super) mss: Option<u16>,
    /// The shift of its windows, if windows are to be scaled at all.
    pub(super) scale: Option<u8>,
    /// Whether it understands SACK.
    pub(super) sack: bool,
}

/// Reads the options of a SYN. What cannot be parsed ends the reading, and what stood before counts.
pub(super) fn requested(options: &[u8]) -> Requested {
    let mut requested = Requested::default();
    for option in TcpOptionsIterator::from_slice(options) {
        match option {
            Ok(TcpOptionElement::MaximumSegmentSize(mss)) => requested.mss = Some(mss),
            Ok(TcpOptionElement::WindowScale(scale)) => requested.scale = Some(scale.min(LARGEST_SCALE)),
            Ok(TcpOptionElement::SelectiveAcknowledgementPermitted) => requested.sack = true,
            Ok(_) => {}
            Err(_) => break,
        }
    }
    requested
}

/// A stretch of sequence numbers, the end not included.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Block {
    pub(super) start: Seq,
    pub(super) end: Seq,
}

/// The SACK blocks of a segment.
pub(super) fn sack_blocks(options: &[u8]) -> impl Iterator<Item = Block> + '_ {
    TcpOptionsIterator::from_slice(options)
        .map_while(Result::ok)
        .filter_map(|option| match option {
            TcpOptionElement::SelectiveAcknowledgement(first, rest) => Some((first, rest)),
            _ => None,
        })
        .flat_map(|(first, rest)| std::iter::once(Some(first)).chain(rest).flatten())
        .map(|(start, end)| Block { start: Seq(start), end: Seq(end) })
}

/// The options of a segment of ours: their bytes, padded to whole words.
#[derive(Clone, Copy, Debug)]
pub(super) struct Options {
    bytes: [u8; 40],
    length: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { bytes: [0; 40], length: 0 }
    }
}

impl Options {
    const END: u8 = 1; // A no-operation: padding that may stand anywhere.

    pub(super) fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    fn push(&mut self, bytes: &[u8]) {
        self.bytes[self.length..self.length + bytes.len()].copy_from_slice(bytes);
        self.length += bytes.len();
    }

    /// Those of a SYN.
    pub(super) fn of_syn(mss: u16, scale: Option<u8>, sack: bool) -> Self {
        let mut options = Self::default();
        let [high, low] = mss.to_be_bytes();
        options.push(&[2, 4, high, low]);
        if sack {
            options.push(&[Self::END, Self::END, 4, 2]);
        }
        if let Some(scale) = scale {
            options.push(&[Self::END, 3, 3, scale]);
        }
        options
    }

    /// Those of an acknowledgement: what has arrived beyond it, at most four blocks.
    pub(super) fn of_sack(blocks: &[Block]) -> Self {
        let mut options = Self::default();
        let blocks = &blocks[..blocks.len().min(4)];
        if !blocks.is_empty() {
            options.push(&[Self::END, Self::END, 5, 2 + 8 * blocks.len() as u8]);
            for block in blocks {
                options.push(&block.start.0.to_be_bytes());
                options.push(&block.end.0.to_be_bytes());
            }
        }
        options
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let options = Options::of_syn(1460, Some(8), true);
        assert_eq!(options.as_slice().len() % 4, 0);
        assert_eq!(requested(options.as_slice()), Requested { mss: Some(1460), scale: Some(8), sack: true });
        let blocks: Vec<_> = (1..=5).map(|n| Block { start: Seq(n * 100), end: Seq(n * 100 + 50) }).collect();
        let options = Options::of_sack(&blocks);
        assert_eq!(options.as_slice().len(), 36);
        assert_eq!(sack_blocks(options.as_slice()).collect::<Vec<_>>(), blocks[..4]);
        assert!(Options::of_sack(&[]).as_slice().is_empty());
    }

    #[test]
    fn options_that_lie_end_the_reading() {
        // A length of nothing, which would loop; one past the end; one too short for its kind; half an option.
        for bad in [&[8, 0, 1, 1][..], &[2, 200, 5, 180], &[2, 3, 5, 1], &[3]] {
            assert_eq!(requested(bad), Requested::default(), "{bad:?}");
            assert_eq!(sack_blocks(bad).count(), 0);
        }
        assert_eq!(requested(&[2, 4, 5, 180, 3, 0]).mss, Some(1460), "what stood before counts");
        assert_eq!(requested(&[3, 3, 200]).scale, Some(LARGEST_SCALE));
    }
}

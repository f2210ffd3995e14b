//! What was mapped, call by call: for a host that unmaps only what was mapped in one piece.

use std::collections::BTreeMap;

use crate::{
    domain::{HostAddr, Prot},
    iova::{Iova, IovaRange},
};

/// What one call mapped, or is left of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    /// Where it is in this process.
    pub host: HostAddr,
    /// Bytes, at least one.
    pub length: u64,
    /// What devices may do with it.
    pub prot: Prot,
}

/// Pieces, which do not overlap, by where they are mapped.
#[derive(Clone, Default, Debug)]
pub struct Pieces(BTreeMap<u64, Piece>);

/// A piece that was taken out, because a range has a part of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cut {
    /// Where it was mapped.
    pub at: Iova,
    /// All of it.
    pub piece: Piece,
    /// What lies before and behind the range: to be mapped, and [inserted](Pieces::insert), again.
    pub rest: [Option<(Iova, Piece)>; 2],
}

impl Pieces {
    /// Adds what was mapped. Nothing else is mapped there.
    pub fn insert(&mut self, at: Iova, piece: Piece) {
        self.0.insert(at.0, piece);
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl Iterator<Item = (Iova, Piece)> {
        self.0.iter().map(|(at, piece)| (Iova(*at), *piece))
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many bytes they have.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.0.values().map(|piece| piece.length).fold(0, u64::saturating_add)
    }

    /// Those that are not the same in `other`.
    #[must_use]
    pub fn without(&self, other: &Self) -> Vec<(Iova, Piece)> {
        self.iter().filter(|(at, piece)| other.0.get(&at.0) != Some(piece)).collect()
    }

    /// Where `iova` is mapped to.
    #[must_use]
    pub fn lookup(&self, iova: Iova) -> Option<HostAddr> {
        let (at, piece) = self.0.range(..=iova.0).next_back()?;
        let offset = iova.0 - at;
        (offset < piece.length).then(|| HostAddr(piece.host.0 + offset))
    }

    /// Takes out all that `range` has a part of.
    pub fn cut(&mut self, range: IovaRange) -> Vec<Cut> {
        let (start, last) = (range.start().0, range.last().0);
        let reaches_in = self.0.range(..start).next_back();
        let from =
            reaches_in.filter(|(at, piece)| *at + (piece.length - 1) >= start).map_or(start, |(at, _)| *at);
        let hit: Vec<_> = self.0.range(from..=last).map(|(at, piece)| (*at, *piece)).collect();
        let cut = |(at, piece): (u64, Piece)| {
            self.0.remove(&at);
            let before = start.checked_sub(at).filter(|length| *length > 0);
            let after = (at + (piece.length - 1)).checked_sub(last).filter(|length| *length > 0);
            let before = before.map(|length| (Iova(at), Piece { length, ..piece }));
            let after = after.map(|length| {
                let skip = piece.length - length;
                (Iova(at + skip), Piece { host: HostAddr(piece.host.0 + skip), length, ..piece })
            });
            Cut { at: Iova(at), piece, rest: [before, after] }
        };
        hit.into_iter().map(cut).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(host: u64, length: u64) -> Piece {
        Piece { host: HostAddr(host), length, prot: Prot::READ }
    }

    fn range(start: u64, last: u64) -> IovaRange {
        IovaRange::new(Iova(start), Iova(last)).unwrap()
    }

    #[test]
    fn a_range_cuts_what_it_has_a_part_of() {
        let mut pieces = Pieces::default();
        for (at, host) in [(0x1000, 0x7000), (0x5000, 0x9000), (0x9000, 0x2000)] {
            pieces.insert(Iova(at), piece(host, 0x3000));
        }
        assert_eq!(pieces.lookup(Iova(0x3fff)), Some(HostAddr(0x9fff)));
        assert_eq!((pieces.lookup(Iova(0x4000)), pieces.lookup(Iova(0xfff))), (None, None));
        assert_eq!(pieces.cut(range(0x4000, 0x4fff)), []);
        let cut = pieces.cut(range(0x2000, 0x2fff));
        let rest = [Some((Iova(0x1000), piece(0x7000, 0x1000))), Some((Iova(0x3000), piece(0x9000, 0x1000)))];
        assert_eq!(cut, [Cut { at: Iova(0x1000), piece: piece(0x7000, 0x3000), rest }]);
        let cut = pieces.cut(range(0x7fff, 0x9000));
        let rest: Vec<_> = cut.iter().map(|cut| cut.rest).collect();
        let before = Some((Iova(0x5000), piece(0x9000, 0x2fff)));
        let behind = Some((Iova(0x9001), piece(0x2001, 0x2fff)));
        assert_eq!(rest, [[before, None], [None, behind]]);
        assert!(pieces.is_empty());
    }

    #[test]
    fn a_piece_may_end_with_the_last_address() {
        let mut pieces = Pieces::default();
        pieces.insert(Iova(u64::MAX - 0xfff), piece(0, 0x1000));
        assert_eq!(pieces.lookup(Iova(u64::MAX)), Some(HostAddr(0xfff)));
        assert_eq!(pieces.cut(IovaRange::ALL).len(), 1);
    }

    #[test]
    fn what_two_have_in_common_is_left_out() {
        let (mut one, mut other) = (Pieces::default(), Pieces::default());
        one.insert(Iova(0), piece(0, 0x1000));
        one.insert(Iova(0x1000), piece(0x1000, 0x1000));
        other.insert(Iova(0), piece(0, 0x1000));
        other.insert(Iova(0x1000), piece(0x1000, 0x2000));
        assert_eq!(one.without(&other), [(Iova(0x1000), piece(0x1000, 0x1000))]);
        assert_eq!(one.bytes(), 0x2000);
    }
}

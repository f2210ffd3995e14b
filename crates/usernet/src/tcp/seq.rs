//! Sequence numbers: a ring of 2^32, on which "before" means less than half the way round (RFC 9293, 3.4).

/// A sequence number.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash)]
pub(crate) struct Seq(pub(crate) u32);

impl Seq {
    /// The number `bytes` further on.
    pub(crate) fn plus(self, bytes: u32) -> Self {
        Self(self.0.wrapping_add(bytes))
    }

    /// The number `bytes` back.
    pub(crate) fn minus(self, bytes: u32) -> Self {
        Self(self.0.wrapping_sub(bytes))
    }

    /// How far this is past `earlier`; zero if it is not.
    pub(crate) fn past(self, earlier: Self) -> u32 {
        if self.after(earlier) { self.0.wrapping_sub(earlier.0) } else { 0 }
    }

    pub(crate) fn after(self, other: Self) -> bool {
        other.before(self)
    }

    pub(crate) fn before(self, other: Self) -> bool {
        self != other && other.0.wrapping_sub(self.0) < 1 << 31
    }

    /// The later of two.
    pub(crate) fn later(self, other: Self) -> Self {
        if self.before(other) { other } else { self }
    }

    /// The earlier of two.
    pub(crate) fn earlier(self, other: Self) -> Self {
        if self.before(other) { self } else { other }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_goes_round_the_ring() {
        let near_the_end = Seq(u32::MAX - 1);
        let beyond = near_the_end.plus(4);
        assert_eq!(beyond, Seq(2));
        assert!(near_the_end.before(beyond) && beyond.after(near_the_end));
        assert_eq!(beyond.past(near_the_end), 4);
        assert_eq!(near_the_end.past(beyond), 0);
        assert_eq!(near_the_end.later(beyond), beyond);
        assert_eq!(near_the_end.earlier(beyond), near_the_end);
        assert!(!beyond.before(beyond));
    }

    #[test]
    fn the_point_opposite_is_not_before_both_ways() {
        let (here, there) = (Seq(7), Seq(7 + (1 << 31)));
        assert!(!here.before(there) && !there.before(here));
    }
}

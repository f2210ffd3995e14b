//! I/O virtual addresses and ranges of them.

use core::fmt;

use crate::{Errno, Result};

/// The page size that areas and pins count in: the host's, 4 KiB.
pub const PAGE_SIZE: u64 = 4096;

/// An I/O virtual address: what a device puts on the bus.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Iova(pub u64);

impl fmt::Debug for Iova {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "iova {:#x}", self.0)
    }
}

/// A range of I/O virtual addresses that is not empty. Both ends belong to it, as in the kernel's interface: so the last
/// address of all can be in it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct IovaRange {
    start: u64,
    last: u64,
}

impl fmt::Debug for IovaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "iova {:#x}..={:#x}", self.start, self.last)
    }
}

impl IovaRange {
    /// Every address.
    pub const ALL: Self = Self { start: 0, last: u64::MAX };

    /// The range from `start` to `last`, both in it. EINVAL when `last` is below `start`.
    pub fn new(start: Iova, last: Iova) -> Result<Self> {
        if last < start { Err(Errno::INVAL) } else { Ok(Self { start: start.0, last: last.0 }) }
    }

    /// The range of `length` bytes at `start`. EINVAL when it is empty, EOVERFLOW when it goes past the last address.
    pub fn with_length(start: Iova, length: u64) -> Result<Self> {
        let rest = length.checked_sub(1).ok_or(Errno::INVAL)?;
        let last = start.0.checked_add(rest).ok_or(Errno::OVERFLOW)?;
        Ok(Self { start: start.0, last })
    }

    /// The first address.
    pub const fn start(self) -> Iova {
        Iova(self.start)
    }

    /// The last address.
    pub const fn last(self) -> Iova {
        Iova(self.last)
    }

    /// How many bytes it has; none for the range of all addresses, whose length is 2^64.
    pub const fn length(self) -> Option<u64> {
        (self.last - self.start).checked_add(1)
    }

    /// Whether `iova` is in it.
    pub const fn contains(self, iova: Iova) -> bool {
        self.start <= iova.0 && iova.0 <= self.last
    }

    /// Whether all of `other` is in it.
    pub const fn covers(self, other: Self) -> bool {
        self.start <= other.start && other.last <= self.last
    }

    /// What both have; none when that is nothing.
    pub fn intersection(self, other: Self) -> Option<Self> {
        let (start, last) = (self.start.max(other.start), self.last.min(other.last));
        (start <= last).then_some(Self { start, last })
    }

    /// What lies between `ranges`, which are in order and do not overlap. What lies before the first and after the last does
    /// not.
    pub fn gaps(ranges: &[Self]) -> Vec<Self> {
        let pairs = ranges.iter().zip(ranges.iter().skip(1));
        let gap = |(before, after): (&Self, &Self)| {
            let (start, last) = (before.last.checked_add(1)?, after.start.checked_sub(1)?);
            Self::new(Iova(start), Iova(last)).ok()
        };
        pairs.filter_map(gap).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_between_ranges_are_gaps() {
        let range = |start, last| IovaRange::new(Iova(start), Iova(last)).unwrap();
        assert_eq!(IovaRange::gaps(&[]), []);
        let usable = [range(0, 0xfedf_ffff), range(0xfef0_0000, 0x7f_ffff_ffff)];
        assert_eq!(IovaRange::gaps(&usable), [range(0xfee0_0000, 0xfeef_ffff)]);
        assert_eq!(IovaRange::gaps(&[range(0, 9), range(10, u64::MAX)]), []);
    }
}

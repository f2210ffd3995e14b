//! The linear addresses that a guest may use (specification, "MSR_PVM_LINEAR_ADDRESS_RANGE").

use core::ops::Range;

/// The bits of the MSR that are always one.
const ONES: u64 = 0xff00_ff00_ff00_ff00;
/// An index that says "none".
const NONE: u16 = 0x1ff;

/// The upper-half addresses that a guest may use beside the whole lower half: a range of PML4 slots of the
/// topmost PML4 table, and with 5-level paging a range of PML5 slots.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AddressRanges {
    /// Start and end (exclusive) among the PML4 entries.
    pml4: (u16, u16),
    /// Start and end (exclusive) among the PML5 entries; both [`NONE`] without 5-level paging.
    pml5: (u16, u16),
}

impl AddressRanges {
    /// Ranges of PML4 and PML5 indexes; `None` if they break the specification's constraints
    /// (256 <= start < end < 511).
    pub fn new(pml4: Range<u16>, pml5: Option<Range<u16>>) -> Option<Self> {
        let good = |r: &Range<u16>| 256 <= r.start && r.start < r.end && r.end < 511;
        if !good(&pml4) || !pml5.as_ref().is_none_or(good) {
            return None;
        }
        Some(Self { pml4: (pml4.start, pml4.end), pml5: pml5.map_or((NONE, NONE), |r| (r.start, r.end)) })
    }

    /// What guests of generation 1 expect: 32 slots, 0xffff_c900_0000_0000 to 0xffff_d900_0000_0000 among the PML4
    /// entries and, with 5-level paging, those of the same numbers among the PML5 entries.
    pub const fn usual(five_levels: bool) -> Self {
        const SLOTS: (u16, u16) = (402, 434);
        Self { pml4: SLOTS, pml5: if five_levels { SLOTS } else { (NONE, NONE) } }
    }

    /// The MSR's value.
    pub const fn msr(&self) -> u64 {
        ONES | self.pml4.0 as u64
            | (self.pml4.1 as u64) << 16
            | (self.pml5.0 as u64) << 32
            | (self.pml5.1 as u64) << 48
    }

    /// What the guest gets when it writes `value` to the MSR; `None` (#GP) if the value is malformed, or names an
    /// address that is not in `self`: the ranges only become narrower.
    pub fn narrowed(&self, value: u64) -> Option<Self> {
        if value & ONES != ONES {
            return None;
        }
        let index = |shift: u32| (value >> shift & 0x1ff) as u16;
        let (pml4, pml5) = ((index(0), index(16)), (index(32), index(48)));
        let within = |new: (u16, u16), old: (u16, u16)| old.0 <= new.0 && new.0 < new.1 && new.1 <= old.1;
        let pml5_good = if self.pml5.0 == NONE { pml5 == self.pml5 } else { within(pml5, self.pml5) };
        (within(pml4, self.pml4) && pml5_good).then_some(Self { pml4, pml5 })
    }

    /// Whether the guest may use `address`.
    #[inline]
    pub const fn allows(&self, address: u64) -> bool {
        address >> 63 == 0 || self.allows_upper(address)
    }

    const fn allows_upper(&self, address: u64) -> bool {
        // The topmost PML4 table maps the addresses with bits 63 to 48 set; its indexes are in bits 47 to 39.
        let top = address >> 48 == 0xffff;
        let pml4 = (address >> 39 & 0x1ff) as u16;
        if top && pml4 >= self.pml4.0 && pml4 < self.pml4.1 {
            return true;
        }
        // PML5 indexes are in bits 56 to 48.
        let pml5 = (address >> 48 & 0x1ff) as u16;
        address >> 57 == 0x7f && pml5 >= self.pml5.0 && pml5 < self.pml5.1
    }

    /// The PML4 range as addresses: the first, and the first behind it.
    pub const fn pml4_addresses(&self) -> (u64, u64) {
        const TOP: u64 = 0xffff << 48;
        (TOP | (self.pml4.0 as u64) << 39, TOP | (self.pml4.1 as u64) << 39)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges() -> AddressRanges {
        AddressRanges::new(402..434, Some(300..310)).expect("valid")
    }

    #[test]
    fn constraints() {
        assert!(AddressRanges::new(255..300, None).is_none());
        assert!(AddressRanges::new(300..300, None).is_none());
        assert!(AddressRanges::new(300..511, None).is_none());
        assert!(AddressRanges::new(256..510, Some(256..510)).is_some());
        assert!(AddressRanges::new(256..510, Some(256..511)).is_none());
    }

    #[test]
    fn msr_value() {
        let four = AddressRanges::new(402..434, None).expect("valid");
        assert_eq!(four.msr(), 0xffff_ffff_ffb2_ff92);
        assert_eq!(four.narrowed(four.msr()), Some(four));
        assert_eq!(ranges().narrowed(ranges().msr()), Some(ranges()));
    }

    #[test]
    fn only_narrower() {
        let r = ranges();
        let narrow = AddressRanges::new(410..411, Some(300..301)).expect("valid");
        assert_eq!(r.narrowed(narrow.msr()), Some(narrow));
        assert_eq!(narrow.narrowed(r.msr()), None);
        for bit in (0..64).filter(|b| ONES >> b & 1 != 0) {
            assert_eq!(r.narrowed(r.msr() & !(1 << bit)), None, "bit {bit}");
        }
        // An empty or inverted range.
        assert_eq!(r.narrowed(AddressRanges { pml4: (410, 410), ..r }.msr()), None);
        assert_eq!(r.narrowed(AddressRanges { pml4: (420, 410), ..r }.msr()), None);
        // A 5-level range where there is none.
        let four = AddressRanges::new(402..434, None).expect("valid");
        assert_eq!(four.narrowed(r.msr()), None);
    }

    #[test]
    fn the_usual_ranges_are_good() {
        let four = AddressRanges::usual(false);
        assert_eq!(Some(four), AddressRanges::new(402..434, None));
        assert_eq!(four.pml4_addresses(), (0xffff_c900_0000_0000, 0xffff_d900_0000_0000));
        assert_eq!(Some(AddressRanges::usual(true)), AddressRanges::new(402..434, Some(402..434)));
    }

    #[test]
    fn borders() {
        let r = ranges();
        let (start, end) = r.pml4_addresses();
        assert_eq!((start, end), (0xffff_c900_0000_0000, 0xffff_d900_0000_0000));
        for (address, allowed) in [
            (0, true),
            (0x00ff_ffff_ffff_ffff, true),
            (i64::MAX as u64, true),
            (start - 1, false),
            (start, true),
            (end - 1, true),
            (end, false),
            (u64::MAX, false),
            (0xffff_ffff_8000_0000, false),
            ((0xfe00 | 300) << 48, true),
            (((0xfe00 | 300) << 48) - 1, false),
            (((0xfe00 | 310) << 48) - 1, true),
            ((0xfe00 | 310) << 48, false),
            // Not canonical with 57 bits.
            (0x8000_0000_0000_0000 | 300 << 48, false),
        ] {
            assert_eq!(r.allows(address), allowed, "{address:#x}");
        }
    }
}

//! Second-stage page tables in a guest's memory (VT-d 3.7 and 9.8).
//!
//! Three levels of 512 entries for 39 bits of address, four for 48. What may be done with a page is what the entries of all
//! levels allow. An entry that allows nothing is not there, whatever else it says.

use crate::{domain::Prot, soft::FaultReason};

const READ: u64 = 1;
const WRITE: u64 = 2;
/// In an entry of 2 MiB or 1 GiB: it is a leaf. Reserved in the level above these.
const LARGE: u64 = 1 << 7;
/// The address in an entry, for a guest that has as many bits as there can be.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// A guest's page table of the second stage.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stage {
    root: u64,
    levels: u32,
    /// What must be 0 in each entry.
    reserved: u64,
}

/// A page of the guest's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Leaf {
    /// Where it begins in the guest's memory.
    pub address: u64,
    /// How many bytes it has.
    pub size: u64,
    /// READ and WRITE, as far as all levels allow it.
    pub prot: Prot,
}

/// The pages of a range that a table maps.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pages {
    /// Each that has a part of the range: where it is mapped, and what it is. In order.
    pub found: Vec<(u64, Leaf)>,
    /// Where looking ended before the end of the range; none when it did not.
    pub unseen: Option<u64>,
}

/// How many bytes an entry of a level translates; level 0 has pages.
const fn span(level: u32) -> u64 {
    1 << (12 + 9 * level)
}

impl Stage {
    /// A table for addresses of `input_bits` in a guest whose own have `address_bits`. None unless these are 39 or 48, and 32
    /// to 52, and the root is aligned to a page in the guest's memory.
    #[must_use]
    pub fn new(root: u64, input_bits: u32, address_bits: u32) -> Option<Self> {
        let levels = match input_bits {
            39 => 3,
            48 => 4,
            _ => return None,
        };
        if !(32..=52).contains(&address_bits) {
            return None;
        }
        let reserved = ADDRESS & !((1 << address_bits) - 1);
        (root & !(ADDRESS & !reserved) == 0).then_some(Self { root, levels, reserved })
    }

    /// The page that `iova` is in; `read` reads an entry of the guest's memory. Whether its prot allows an access is the caller's
    /// affair.
    pub(super) fn walk(
        &self,
        iova: u64,
        mut read: impl FnMut(u64) -> Result<u64, FaultReason>,
    ) -> Result<Leaf, FaultReason> {
        self.look(iova, &mut read).map_err(|(reason, _)| reason)
    }

    /// The pages that the table has from `first` to `last`, the last address. What it says wrong counts as not there, and so does
    /// a page that allows nothing. At most `most` entries are looked at, each with those that lead to it: a table may be
    /// its own.
    pub fn pages(
        &self,
        first: u64,
        last: u64,
        most: usize,
        mut read: impl FnMut(u64) -> Result<u64, FaultReason>,
    ) -> Pages {
        let last = last.min(span(self.levels) - 1);
        let (mut found, mut at) = (Vec::new(), first);
        for _ in 0..most {
            if at > last {
                return Pages { found, unseen: None };
            }
            let size = match self.look(at, &mut read) {
                Ok(leaf) => {
                    if !leaf.prot.is_empty() {
                        found.push((at & !(leaf.size - 1), leaf));
                    }
                    leaf.size
                }
                Err((_, size)) => size,
            };
            // The end of the entry's range: no more than that of the table's.
            at = (at | (size - 1)) + 1;
        }
        Pages { found, unseen: Some(at).filter(|at| *at <= last) }
    }

    /// As [`Self::walk`]; with an error, how many bytes the entry is for that it is about.
    fn look(
        &self,
        iova: u64,
        read: &mut impl FnMut(u64) -> Result<u64, FaultReason>,
    ) -> Result<Leaf, (FaultReason, u64)> {
        if iova >= span(self.levels) {
            return Err((FaultReason::Range, span(self.levels)));
        }
        let (mut table, mut allowed) = (self.root, READ | WRITE);
        for level in (0..self.levels).rev() {
            let wrong = |reason| (reason, span(level));
            let index = iova / span(level) % 512;
            let entry = read(table + index * 8).map_err(wrong)?;
            if entry & (READ | WRITE) == 0 {
                return Err(wrong(FaultReason::Unmapped));
            }
            if entry & self.reserved != 0 {
                return Err(wrong(FaultReason::Reserved));
            }
            allowed &= entry;
            let leaf = match level {
                0 => true,
                1 | 2 => entry & LARGE != 0,
                _ if entry & LARGE != 0 => return Err(wrong(FaultReason::Reserved)),
                _ => false,
            };
            let address = entry & ADDRESS;
            if leaf {
                if !address.is_multiple_of(span(level)) {
                    return Err(wrong(FaultReason::Reserved));
                }
                let mut prot = Prot::empty();
                prot.set(Prot::READ, allowed & READ != 0);
                prot.set(Prot::WRITE, allowed & WRITE != 0);
                return Ok(Leaf { address, size: span(level), prot });
            }
            table = address;
        }
        // Level 0 has leaves only.
        Err((FaultReason::Unmapped, span(0)))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn walk(entries: &[(u64, u64)], bits: u32, iova: u64) -> Result<Leaf, FaultReason> {
        let memory: HashMap<u64, u64> = entries.iter().copied().collect();
        let read = |at| memory.get(&at).copied().ok_or(FaultReason::Table);
        Stage::new(0x1000, bits, 40).unwrap().walk(iova, read)
    }

    #[test]
    fn tables_are_walked_by_their_levels() {
        let small = [(0x1000, 0x2003), (0x2008, 0x3003), (0x3010, 0x77001)];
        let page = Leaf { address: 0x77000, size: 0x1000, prot: Prot::READ };
        assert_eq!(walk(&small, 39, 0x20_2abc), Ok(page));
        // Any level can take a right away.
        let page = [(0x1000, 0x2002), (0x2000, 0x3003), (0x3000, 0x77003)];
        assert_eq!(walk(&page, 39, 0).unwrap().prot, Prot::WRITE);
        let large = [(0x1000, 0x20_0083)];
        assert_eq!(walk(&large, 39, 5), Err(FaultReason::Reserved));
        let large = [(0x1000, 0x4000_0083)];
        assert_eq!(walk(&large, 39, 5).unwrap().size, 1 << 30);
        let large = [(0x1000, 0x2003), (0x2000, 0x3003), (0x3ff8, 0x40_0083)];
        let page = Leaf { address: 0x40_0000, size: 2 << 20, prot: Prot::READ | Prot::WRITE };
        assert_eq!(walk(&large, 48, (511 << 21) + 7), Ok(page));
    }

    #[test]
    fn the_pages_of_a_range_are_found_whatever_lies_between() {
        let memory: HashMap<u64, u64> = [
            (0x1000, 0x2003),
            (0x1010, 0x8000_0083),
            (0x2000, 0x3003),
            (0x2ff8, 0x20_0081),
            (0x3000, 0x77003),
            (0x3008, 0x78001),
            // One that is wrong, one that allows nothing in the end.
            (0x3010, 1 << 40 | 3),
            (0x1018, 0x4001),
            (0x4000, 0x20_0082),
        ]
        .into();
        let read = |at| Ok(memory.get(&at).copied().unwrap_or(0));
        let stage = Stage::new(0x1000, 39, 40).unwrap();
        let leaf = |address, size, prot| Leaf { address, size, prot };
        let both = Prot::READ | Prot::WRITE;
        let all = [
            (0, leaf(0x77000, 0x1000, both)),
            (0x1000, leaf(0x78000, 0x1000, Prot::READ)),
            (511 << 21, leaf(0x20_0000, 2 << 20, Prot::READ)),
            (2 << 30, leaf(0x8000_0000, 1 << 30, both)),
        ];
        assert_eq!(stage.pages(0, u64::MAX, 4096, read), Pages { found: all.into(), unseen: None });
        // Parts of pages.
        let pages = stage.pages(0x1800, (511 << 21) + 5, 4096, read);
        assert_eq!(pages, Pages { found: all[1..3].into(), unseen: None });
        assert_eq!(stage.pages(0x2000, 0x2fff, 1, read), Pages { found: vec![], unseen: None });
        assert_eq!(stage.pages(1 << 39, u64::MAX, 1, read), Pages { found: vec![], unseen: None });
        // Not all of them.
        assert_eq!(stage.pages(0, 0x2fff, 2, read), Pages { found: all[..2].into(), unseen: Some(0x2000) });
        let own = Stage::new(0x1000, 48, 40).unwrap();
        let pages = own.pages(0, u64::MAX, 600, |_| Ok(0x1003));
        assert_eq!((pages.found.len(), pages.unseen), (600, Some(600 << 12)));
    }

    #[test]
    fn what_is_wrong_in_a_table_is_told() {
        assert_eq!(walk(&[(0x1000, 0x2000)], 39, 0), Err(FaultReason::Unmapped));
        assert_eq!(walk(&[], 39, 1 << 39), Err(FaultReason::Range));
        assert_eq!(walk(&[], 48, 1 << 48), Err(FaultReason::Range));
        assert_eq!(walk(&[(0x1000, 0x2003)], 39, 0), Err(FaultReason::Table));
        // Beyond the guest's memory; a large page of 512 GiB.
        assert_eq!(walk(&[(0x1000, 1 << 40 | 3)], 39, 0), Err(FaultReason::Reserved));
        assert_eq!(walk(&[(0x1000, 0x83)], 48, 0), Err(FaultReason::Reserved));
        // A table that is its own: as deep as any.
        let own = [(0x1000, 0x1003)];
        assert_eq!(walk(&own, 48, 0).unwrap().address, 0x1000);
        for (root, bits, address) in [(1, 39, 40), (1 << 40, 39, 40), (0, 57, 40), (0, 39, 31), (0, 39, 53)] {
            assert_eq!(Stage::new(root, bits, address), None);
        }
    }
}

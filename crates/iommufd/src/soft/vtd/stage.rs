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

/// A guest's page table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Stage {
    root: u64,
    levels: u32,
    /// What must be 0 in each entry.
    reserved: u64,
}

/// A page of the guest's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Leaf {
    /// Where it begins in the guest's memory.
    pub(super) address: u64,
    /// How many bytes it has.
    pub(super) size: u64,
    /// READ and WRITE.
    pub(super) prot: Prot,
}

/// How many bytes an entry of a level translates; level 0 has pages.
const fn span(level: u32) -> u64 {
    1 << (12 + 9 * level)
}

impl Stage {
    /// A table for addresses of `input_bits` in a guest whose own have `address_bits`. None unless these are 39 or 48, and 32
    /// to 52, and the root is aligned to a page in the guest's memory.
    pub(super) fn new(root: u64, input_bits: u32, address_bits: u32) -> Option<Self> {
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
        if iova >= span(self.levels) {
            return Err(FaultReason::Range);
        }
        let (mut table, mut allowed) = (self.root, READ | WRITE);
        for level in (0..self.levels).rev() {
            let index = iova / span(level) % 512;
            let entry = read(table + index * 8)?;
            if entry & (READ | WRITE) == 0 {
                return Err(FaultReason::Unmapped);
            }
            if entry & self.reserved != 0 {
                return Err(FaultReason::Reserved);
            }
            allowed &= entry;
            let leaf = match level {
                0 => true,
                1 | 2 => entry & LARGE != 0,
                _ if entry & LARGE != 0 => return Err(FaultReason::Reserved),
                _ => false,
            };
            let address = entry & ADDRESS;
            if leaf {
                if !address.is_multiple_of(span(level)) {
                    return Err(FaultReason::Reserved);
                }
                let mut prot = Prot::empty();
                prot.set(Prot::READ, allowed & READ != 0);
                prot.set(Prot::WRITE, allowed & WRITE != 0);
                return Ok(Leaf { address, size: span(level), prot });
            }
            table = address;
        }
        // Level 0 has leaves only.
        Err(FaultReason::Unmapped)
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

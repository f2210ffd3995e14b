//! Second-level tables in guest memory (VT-d 9.8): from a device's address to a guest-physical one.
//!
//! A walk takes nothing for granted: each entry is read once, tables may lie outside memory or in themselves, and there are at most
//! four levels.

use std::sync::atomic::Ordering;

use cpu::GuestRam;
use iommufd::domain::Prot;
use iommufd::soft::Access;
use vm_memory::{Bytes, GuestAddress};

use super::context::Table;
use super::faults::Reason;
use crate::layout;

const PAGE_SHIFT: u32 = 12;
/// log2 of the entries of a table.
const INDEX_BITS: u32 = 9;

const READ: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
/// It is a page rather than a table, where there may be either.
const LARGE: u64 = 1 << 7;
/// The address.
const ADDRESS: u64 = ((1 << layout::PHYS_BITS) - 1) & !0xfff;
/// Addresses that no memory has, and the bit for device TLBs.
const RESERVED: u64 = (1 << 52) - (1 << layout::PHYS_BITS) | 1 << 62;

/// A page of a device's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Page {
    /// Its first address.
    pub(super) start: u64,
    /// Bytes: 4 KiB, 2 MiB or 1 GiB.
    pub(super) size: u64,
    /// Its guest-physical address.
    pub(super) physical: u64,
    /// What the device may do: at least what it asked for.
    pub(super) prot: Prot,
}

/// The page in which `address` is, if it may be accessed so.
pub(super) fn walk(memory: &GuestRam, table: Table, address: u64, access: Access) -> Result<Page, Reason> {
    let levels = u32::from(table.levels);
    if address >> (PAGE_SHIFT + INDEX_BITS * levels) != 0 {
        return Err(Reason::BeyondWidth);
    }
    let (wanted, missing) = match access {
        Access::Read => (READ, Reason::NoRead),
        Access::Write => (WRITE, Reason::NoWrite),
    };
    let mut allowed = READ | WRITE;
    let mut at = table.root;
    for level in (0..levels).rev() {
        let shift = PAGE_SHIFT + INDEX_BITS * level;
        let index = address >> shift & ((1 << INDEX_BITS) - 1);
        let no_table = if level + 1 == levels { Reason::ContextInvalid } else { Reason::TableAccess };
        let entry: u64 =
            memory.load(GuestAddress(at + index * 8), Ordering::Acquire).map_err(|_| no_table)?;
        if entry & (READ | WRITE) == 0 {
            return Err(missing);
        }
        let leaf = level == 0 || entry & LARGE != 0;
        let size = 1 << shift;
        let reserved = if leaf { RESERVED | (size - 1) & !0xfff } else { RESERVED };
        if entry & reserved != 0 || (leaf && level > 2) {
            return Err(Reason::TableReserved);
        }
        allowed &= entry;
        if allowed & wanted == 0 {
            return Err(missing);
        }
        if leaf {
            let prot = Prot::from_bits_truncate(u8::from(allowed & READ != 0))
                | if allowed & WRITE != 0 { Prot::WRITE } else { Prot::empty() };
            return Ok(Page { start: address & !(size - 1), size, physical: entry & ADDRESS, prot });
        }
        at = entry & ADDRESS;
    }
    Err(missing)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: u64 = 0x1000;
    const RW: Prot = Prot::READ.union(Prot::WRITE);

    fn memory(entries: &[(u64, u64)]) -> GuestRam {
        let memory = GuestRam::from_ranges(&[(GuestAddress(0), 0x8000)]).unwrap();
        for (at, entry) in entries {
            memory.write_obj(*entry, GuestAddress(*at)).unwrap();
        }
        memory
    }

    fn table(levels: u8) -> Table {
        Table { domain: 1, root: ROOT, levels }
    }

    /// Address 0x80_4020_1000 is entry 1 of each of four tables.
    const AT: u64 = 1 << 39 | 1 << 30 | 1 << 21 | 1 << 12;

    #[test]
    fn four_levels_and_three() {
        let memory = memory(&[(0x1008, 0x2003), (0x2008, 0x3003), (0x3008, 0x4003), (0x4008, 0x7803)]);
        let page = Page { start: AT, size: 0x1000, physical: 0x7000, prot: RW };
        assert_eq!(walk(&memory, table(4), AT + 0x123, Access::Write), Ok(page));
        let three = Table { root: 0x2000, ..table(3) };
        let page = Page { start: AT - (1 << 39), ..page };
        assert_eq!(walk(&memory, three, page.start, Access::Read), Ok(page));
        assert_eq!(walk(&memory, three, AT, Access::Read), Err(Reason::BeyondWidth));
        assert_eq!(walk(&memory, table(4), 1 << 48, Access::Read), Err(Reason::BeyondWidth));
        assert_eq!(walk(&memory, table(4), AT + 0x1000, Access::Read), Err(Reason::NoRead));
        assert_eq!(walk(&memory, table(4), 0, Access::Write), Err(Reason::NoWrite));
    }

    #[test]
    fn large_pages() {
        let memory =
            memory(&[(0x1008, 0x2003), (0x2008, 1 << 30 | 0x83), (0x2000, 0x3003), (0x3008, 0x20_0081)]);
        let page = Page { start: 1 << 39 | 1 << 30, size: 1 << 30, physical: 1 << 30, prot: RW };
        assert_eq!(walk(&memory, table(4), AT, Access::Read), Ok(page));
        let page = Page { start: 1 << 39 | 1 << 21, size: 1 << 21, physical: 1 << 21, prot: Prot::READ };
        assert_eq!(walk(&memory, table(4), 1 << 39 | 1 << 21 | 5, Access::Read), Ok(page));
        assert_eq!(walk(&memory, table(4), 1 << 39 | 1 << 21, Access::Write), Err(Reason::NoWrite));
        // Of 512 GiB there are none.
        let memory = self::memory(&[(0x1008, 0x83)]);
        assert_eq!(walk(&memory, table(4), AT, Access::Read), Err(Reason::TableReserved));
    }

    #[test]
    fn rights_are_those_of_all_levels() {
        let memory = memory(&[(0x1008, 0x2001), (0x2008, 0x3003), (0x3008, 0x4003), (0x4008, 0x7003)]);
        let page = walk(&memory, table(4), AT, Access::Read).unwrap();
        assert_eq!(page.prot, Prot::READ);
        assert_eq!(walk(&memory, table(4), AT, Access::Write), Err(Reason::NoWrite));
        let memory = self::memory(&[(0x2008, 0x3003), (0x3008, 0x4003), (0x4008, 0x7002)]);
        let three = Table { root: 0x2000, ..table(3) };
        assert_eq!(walk(&memory, three, AT - (1 << 39), Access::Write).unwrap().prot, Prot::WRITE);
        assert_eq!(walk(&memory, three, AT - (1 << 39), Access::Read), Err(Reason::NoRead));
    }

    #[test]
    fn tables_that_make_no_sense() {
        let read = |memory: &GuestRam| walk(memory, table(4), AT, Access::Read);
        for entry in [0x8003, 0xff_ffff_f003] {
            assert_eq!(read(&memory(&[(0x1008, entry)])), Err(Reason::TableAccess));
        }
        for entry in [1 << 40 | 3, 1 << 51 | 3, 1 << 62 | 3] {
            assert_eq!(read(&memory(&[(0x1008, entry)])), Err(Reason::TableReserved));
        }
        // A large page that is not aligned.
        let unaligned = memory(&[(0x1008, 0x2003), (0x2008, 0x1083)]);
        assert_eq!(read(&unaligned), Err(Reason::TableReserved));
        let nowhere = Table { root: 0x8000, ..table(4) };
        assert_eq!(walk(&memory(&[]), nowhere, AT, Access::Read), Err(Reason::ContextInvalid));
        // A table that is its own page, at every level.
        let itself = memory(&[(0x1008, 0x1003)]);
        assert_eq!(read(&itself).unwrap().physical, ROOT);
    }
}

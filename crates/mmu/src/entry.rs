//! Entries: reading and making them by format.
//!
//! Entries are plain integers, 64 bits wide for every format; of a 32-bit entry the upper half is 0. What an
//! entry means depends on the format and on the level that it is found at, so these are methods of
//! [`PageFormat`].

use bitflags::bitflags;

use crate::format::{
    EPT_EXECUTE, EPT_USER_EXECUTE, EPT_WRITE_BACK, KEY_SHIFT, NO_EXECUTE, PAGE_SIZE, PRESENT, USER, WRITABLE,
};
use crate::{Gpa, PageFormat, PageRights, PagingMode};

bitflags! {
    /// What an entry says beside the address and the rights.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
    pub struct EntryFlags: u8 {
        /// The entry has been used.
        const ACCESSED = 1 << 0;
        /// The page has been written.
        const DIRTY = 1 << 1;
        /// The page stays in the TLB when CR3 is loaded.
        const GLOBAL = 1 << 2;
    }
}

impl PageFormat {
    /// Whether the entry is present. In EPT: whether it allows any access at all.
    #[inline(always)]
    pub const fn is_present(&self, entry: u64) -> bool {
        entry & self.present != 0
    }

    /// Whether the entry, found at `level`, maps a page rather than referring to a table.
    #[inline(always)]
    pub const fn is_leaf(&self, entry: u64, level: u8) -> bool {
        level <= 1 || entry & PAGE_SIZE != 0 && self.has_leaf(level)
    }

    /// Whether a present entry has a reserved bit set or, in EPT, is misconfigured.
    #[inline]
    pub const fn is_malformed(&self, entry: u64, level: u8) -> bool {
        entry & self.reserved_bits(level, self.is_leaf(entry, level)) != 0 || self.is_misconfigured(entry)
    }

    /// The address in the entry: of the page's start if it maps one, else of the next table.
    #[inline(always)]
    pub const fn frame(&self, entry: u64, level: u8) -> Gpa {
        let address = entry & self.table_address;
        if !self.is_leaf(entry, level) {
            return Gpa(address);
        }
        let offset_bits = self.index_shift(level);
        Gpa(address >> offset_bits << offset_bits | if level > 1 { self.pse36_address(entry) } else { 0 })
    }

    /// What this one entry allows.
    #[inline]
    pub const fn rights(&self, entry: u64) -> PageRights {
        PageRights::of(self, entry ^ self.inverted)
    }

    /// The accessed, dirty and global bits. Of an entry that refers to a table only the first means something.
    #[inline]
    pub fn flags(&self, entry: u64) -> EntryFlags {
        let mut flags = EntryFlags::empty();
        flags.set(EntryFlags::ACCESSED, entry & self.accessed != 0);
        flags.set(EntryFlags::DIRTY, entry & self.dirty != 0);
        flags.set(EntryFlags::GLOBAL, entry & self.global != 0);
        flags
    }

    /// The protection key of an entry that maps a page; 0 in formats without keys.
    #[inline]
    pub const fn pkey(&self, entry: u64) -> u8 {
        if self.protection_keys() { (entry >> KEY_SHIFT & 15) as u8 } else { 0 }
    }

    /// The number of the entry that translates `address` in a table of `level`.
    #[inline]
    pub const fn index(&self, address: u64, level: u8) -> u64 {
        let bits = if matches!(self.mode(), PagingMode::Pae) && level == 3 { 2 } else { self.index_bits() };
        address >> self.index_shift(level) & ((1 << bits) - 1)
    }

    /// An entry of `level` that maps the page that starts at `frame`.
    ///
    /// `None` if the format has no such pages, or if the address is not aligned to the page or needs reserved
    /// bits. Rights and flags that the format cannot express are left out; without NX, every page is executable.
    pub fn make_leaf(&self, frame: Gpa, level: u8, rights: PageRights, flags: EntryFlags) -> Option<u64> {
        let size = self.page_size(level)?;
        let high = if level > 1 { self.pse36_bits(frame.0) } else { 0 };
        let low = frame.0 & self.table_address;
        let mut entry = low | high | self.rights_bits(rights) | if level > 1 { PAGE_SIZE } else { 0 };
        if flags.contains(EntryFlags::ACCESSED) {
            entry |= self.accessed;
        }
        if flags.contains(EntryFlags::DIRTY) {
            entry |= self.dirty;
        }
        if flags.contains(EntryFlags::GLOBAL) {
            entry |= self.global;
        }
        if self.mode() == PagingMode::Ept {
            entry |= EPT_WRITE_BACK;
        }
        let exact = frame.0 & (size.bytes() - 1) == 0 && self.frame(entry, level) == frame;
        (exact && entry & self.reserved_bits(level, true) == 0).then_some(entry)
    }

    /// An entry of `level` that refers to the next table, with its accessed bit clear. `None` as for
    /// [`PageFormat::make_leaf`].
    pub fn make_table(&self, table: Gpa, level: u8, rights: PageRights) -> Option<u64> {
        let entry = table.0 & self.table_address | self.rights_bits(rights);
        let exact = level > 1 && level <= self.levels() && entry & self.table_address == table.0;
        (exact && entry & self.reserved_bits(level, false) == 0).then_some(entry)
    }

    /// The permission bits of an entry that allows `rights`.
    fn rights_bits(&self, rights: PageRights) -> u64 {
        let bit = |right, mask| if rights.contains(right) { mask } else { 0 };
        let write = bit(PageRights::WRITE, WRITABLE);
        if self.mode() == PagingMode::Ept {
            let user = if self.mode_based_execute() { EPT_USER_EXECUTE } else { 0 };
            let execute = bit(PageRights::EXECUTE, EPT_EXECUTE) | bit(PageRights::USER, user);
            return bit(PageRights::READ, PRESENT) | write | execute;
        }
        let forbid = if self.no_execute() { NO_EXECUTE } else { 0 };
        PRESENT | write | bit(PageRights::USER, USER) | (forbid ^ bit(PageRights::EXECUTE, forbid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::EptFeatures;

    fn formats() -> Vec<PageFormat> {
        vec![
            PageFormat::bits32(true, true, 40),
            PageFormat::pae(true, 40),
            PageFormat::npt(false, true, true, 46),
            PageFormat::npt(true, true, true, 52),
            PageFormat::ept(false, true, EptFeatures::all(), 46),
            PageFormat::ept(true, true, EptFeatures::all(), 52),
        ]
    }

    #[test]
    fn what_is_made_is_read_back() {
        for format in formats() {
            for level in 1..=3 {
                let Some(size) = format.page_size(level) else { continue };
                let frame = Gpa(size.bytes() * 5);
                for rights in (0..16).map(PageRights::from_bits_truncate) {
                    for flags in (0..4).map(EntryFlags::from_bits_truncate) {
                        let entry = format.make_leaf(frame, level, rights, flags).unwrap();
                        assert!(format.is_leaf(entry, level));
                        assert_eq!(format.frame(entry, level), frame, "{format:?} level {level}");
                        assert_eq!(format.flags(entry), flags);
                        let mut expected = rights;
                        expected.set(
                            PageRights::READ,
                            rights.contains(PageRights::READ) || format.mode() != PagingMode::Ept,
                        );
                        expected.set(
                            PageRights::EXECUTE,
                            rights.contains(PageRights::EXECUTE) || !format.no_execute(),
                        );
                        assert_eq!(format.rights(entry), expected, "{format:?} level {level}");
                    }
                }
                let table = format.make_table(Gpa(0x7000), 2, PageRights::all()).unwrap();
                assert!(!format.is_leaf(table, 2) && !format.is_malformed(table, 2));
                assert_eq!(format.frame(table, 2), Gpa(0x7000));
            }
        }
    }

    #[test]
    fn what_cannot_be_expressed_is_not_made() {
        let all = PageRights::all();
        let none = EntryFlags::empty();
        let long = PageFormat::npt(false, true, false, 40);
        assert_eq!(long.make_leaf(Gpa(0x1000), 2, all, none), None, "not aligned");
        assert_eq!(long.make_leaf(Gpa(1 << 40), 1, all, none), None, "too wide");
        assert_eq!(long.make_leaf(Gpa(0), 3, all, none), None, "no 1 GiB pages");
        assert_eq!(long.make_table(Gpa(0x1008), 2, all), None, "not aligned");
        assert_eq!(long.make_table(Gpa(0x1000), 1, all), None, "no tables below level 1");
        let narrow = PageFormat::bits32(true, true, 36);
        assert!(narrow.make_leaf(Gpa(0xf_ffc0_0000), 2, all, none).is_some());
        assert_eq!(narrow.make_leaf(Gpa(1 << 36), 2, all, none), None, "above MAXPHYADDR");
        assert_eq!(narrow.make_leaf(Gpa(1 << 32), 1, all, none), None, "above 4 GiB in a 4 KiB page");
    }
}

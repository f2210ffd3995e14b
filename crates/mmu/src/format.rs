//! Page formats as values: how many levels, which bits mean what, which are reserved.
//!
//! A [`PageFormat`] is worked out once from the control registers (or from an EPT pointer), and then says
//! everything that the shape of an entry decides. It knows no root and no permissions of an access, so that
//! the same value serves to walk tables (`walk`) and to build them (`entry`).
//!
//! Levels count as in the SDM's newer figures and as in most hypervisors: 1 is the table whose entries map
//! 4 KiB pages, the root's level is [`PageFormat::levels`].

use crate::ept::EptFeatures;
use crate::state::{PagingFeatures, PagingState, cr0, cr4, efer};

/// Bit 0: present. In EPT: readable.
pub(crate) const PRESENT: u64 = 1 << 0;
/// Bit 1: writable.
pub(crate) const WRITABLE: u64 = 1 << 1;
/// Bit 2: user-mode accesses allowed. In EPT: executable.
pub(crate) const USER: u64 = 1 << 2;
/// Bit 5: accessed.
pub(crate) const ACCESSED: u64 = 1 << 5;
/// Bit 6: dirty, in an entry that maps a page.
pub(crate) const DIRTY: u64 = 1 << 6;
/// Bit 7: page size. The entry maps a page although it is not at level 1.
pub(crate) const PAGE_SIZE: u64 = 1 << 7;
/// Bit 8: global, in an entry that maps a page.
pub(crate) const GLOBAL: u64 = 1 << 8;
/// Bit 63: no instruction fetches.
pub(crate) const NO_EXECUTE: u64 = 1 << 63;
/// The place of the protection key: bits 62:59 of an entry that maps a page.
pub(crate) const KEY_SHIFT: u32 = 59;

/// EPT, bit 2: executable; with mode-based execution control, from supervisor-mode linear addresses.
pub(crate) const EPT_EXECUTE: u64 = 1 << 2;
/// EPT, bit 8: accessed.
pub(crate) const EPT_ACCESSED: u64 = 1 << 8;
/// EPT, bit 9: dirty.
pub(crate) const EPT_DIRTY: u64 = 1 << 9;
/// EPT, bit 10: with mode-based execution control, executable from user-mode linear addresses.
pub(crate) const EPT_USER_EXECUTE: u64 = 1 << 10;
/// EPT, bits 5:3: the memory type write-back, in an entry that maps a page.
pub(crate) const EPT_WRITE_BACK: u64 = 6 << 3;

/// Bits 51:12, the address in a 64-bit entry.
const ADDRESS_64: u64 = bits(12, 51);
/// Bits 31:12, the address in a 32-bit entry.
const ADDRESS_32: u64 = bits(12, 31);

/// The bits `low` to `high`, both included; none if `low` is above `high`.
pub(crate) const fn bits(low: u32, high: u32) -> u64 {
    if low > high || high > 63 { 0 } else { (u64::MAX << low) & (u64::MAX >> (63 - high)) }
}

/// Which of the processor's translation schemes a [`PageFormat`] is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PagingMode {
    /// CR0.PG is clear: a linear address is a physical address.
    None,
    /// 32-bit paging: two levels of 32-bit entries (SDM vol. 3, 4.3).
    Bits32,
    /// PAE paging: four registers and two levels of 64-bit entries (SDM vol. 3, 4.4).
    Pae,
    /// 4-level paging (SDM vol. 3, 4.5).
    Level4,
    /// 5-level paging (SDM vol. 3, 4.5).
    Level5,
    /// Intel's extended page tables, of 4 or 5 levels (SDM vol. 3, "The Extended Page Table Mechanism").
    Ept,
    /// AMD's nested page tables, of 4 or 5 levels (APM vol. 2, 15.25).
    Npt,
}

/// The sizes that a page can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PageSize {
    /// 4 KiB.
    Size4K,
    /// 2 MiB.
    Size2M,
    /// 4 MiB, in 32-bit paging only.
    Size4M,
    /// 1 GiB.
    Size1G,
}

impl PageSize {
    /// The base-2 logarithm of the size.
    #[inline(always)]
    pub const fn shift(self) -> u32 {
        match self {
            Self::Size4K => 12,
            Self::Size2M => 21,
            Self::Size4M => 22,
            Self::Size1G => 30,
        }
    }

    /// The size in bytes.
    #[inline(always)]
    pub const fn bytes(self) -> u64 {
        1 << self.shift()
    }
}

/// A page-table format: everything that the shape of an entry depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageFormat {
    mode: PagingMode,
    levels: u8,
    index_bits: u8,
    input_bits: u8,
    no_execute: bool,
    protection_keys: bool,
    mode_based_execute: bool,
    /// Bit `n`: an entry of level `n` can map a page; above level 1, if its page-size bit is set.
    leaf_levels: u8,
    pub(crate) present: u64,
    pub(crate) accessed: u64,
    pub(crate) dirty: u64,
    pub(crate) global: u64,
    /// The bit that is flipped before entries are combined by AND, because it forbids instead of permits.
    pub(crate) inverted: u64,
    pub(crate) table_address: u64,
    /// By level, eight long so that `level & 7` needs no bounds check.
    reserved_table: [u64; 8],
    reserved_leaf: [u64; 8],
    /// PSE-36: which of the bits 20:13 of a 4 MiB page's entry are bits 39:32 of its address.
    pse36: u64,
    /// EPT: bit `n` is set if an entry is misconfigured whose bits 5:0 and bit 10 read together as `n`.
    misconfigured: u128,
}

impl PageFormat {
    /// No translation: 32-bit addresses stand for themselves.
    pub const NONE: Self = Self {
        mode: PagingMode::None,
        levels: 0,
        index_bits: 0,
        input_bits: 32,
        no_execute: false,
        protection_keys: false,
        mode_based_execute: false,
        leaf_levels: 0,
        present: PRESENT,
        accessed: 0,
        dirty: 0,
        global: 0,
        inverted: NO_EXECUTE,
        table_address: 0,
        reserved_table: [0; 8],
        reserved_leaf: [0; 8],
        pse36: 0,
        misconfigured: 0,
    };

    /// The format that a processor in `state` uses for linear addresses (SDM vol. 3, 4.1.1).
    pub fn new(state: &PagingState) -> Self {
        let global = if state.cr4(cr4::PGE) { GLOBAL } else { 0 };
        let format = if !state.cr0(cr0::PG) {
            Self::NONE
        } else if !state.cr4(cr4::PAE) {
            let pse36 = state.features.contains(PagingFeatures::PSE36);
            Self::bits32(state.cr4(cr4::PSE), pse36, state.maxphyaddr)
        } else if !state.efer(efer::LMA) {
            Self::pae(state.efer(efer::NXE), state.maxphyaddr)
        } else {
            let mode = if state.cr4(cr4::LA57) { PagingMode::Level5 } else { PagingMode::Level4 };
            let gib_pages = state.features.contains(PagingFeatures::GIB_PAGES);
            Self::long(mode, state.cr4(cr4::LA57), state.efer(efer::NXE), gib_pages, state.maxphyaddr)
        };
        Self { global: format.global & global, ..format }
    }

    /// 32-bit paging (SDM vol. 3, table 4-4). `pse` is CR4.PSE. With `pse36`, the entry of a 4 MiB page
    /// holds as many address bits above bit 31 as the processor has, up to bit 39.
    pub fn bits32(pse: bool, pse36: bool, maxphyaddr: u8) -> Self {
        let width = if pse36 { physical_width(maxphyaddr).min(40) } else { 32 };
        let mut reserved_leaf = [0; 8];
        reserved_leaf[2] = bits(width - 32 + 13, 21);
        Self {
            mode: PagingMode::Bits32,
            levels: 2,
            index_bits: 10,
            leaf_levels: if pse { 0b110 } else { 0b010 },
            accessed: ACCESSED,
            dirty: DIRTY,
            global: GLOBAL,
            table_address: ADDRESS_32,
            reserved_leaf,
            pse36: if width > 32 { bits(13, width - 32 + 12) } else { 0 },
            ..Self::NONE
        }
    }

    /// PAE paging (SDM vol. 3, tables 4-9 to 4-11). The entries of level 3 are in registers, and were checked
    /// when they were loaded.
    pub fn pae(nxe: bool, maxphyaddr: u8) -> Self {
        let everywhere = bits(physical_width(maxphyaddr), 62) | if nxe { 0 } else { NO_EXECUTE };
        let mut reserved_table = [0; 8];
        reserved_table[2] = everywhere;
        let mut reserved_leaf = [0; 8];
        reserved_leaf[1] = everywhere;
        reserved_leaf[2] = everywhere | bits(13, 20);
        Self {
            mode: PagingMode::Pae,
            levels: 3,
            index_bits: 9,
            no_execute: nxe,
            leaf_levels: 0b110,
            accessed: ACCESSED,
            dirty: DIRTY,
            global: GLOBAL,
            table_address: ADDRESS_64,
            reserved_table,
            reserved_leaf,
            ..Self::NONE
        }
    }

    /// 4-level and 5-level paging (SDM vol. 3, tables 4-14 to 4-20).
    fn long(mode: PagingMode, five: bool, nxe: bool, gib_pages: bool, maxphyaddr: u8) -> Self {
        let everywhere = bits(physical_width(maxphyaddr), 51) | if nxe { 0 } else { NO_EXECUTE };
        let mut reserved_table = [0; 8];
        reserved_table[2] = everywhere;
        reserved_table[3] = everywhere | if gib_pages { 0 } else { PAGE_SIZE };
        reserved_table[4] = everywhere | PAGE_SIZE;
        reserved_table[5] = everywhere | PAGE_SIZE;
        let mut reserved_leaf = [0; 8];
        reserved_leaf[1] = everywhere;
        reserved_leaf[2] = everywhere | bits(13, 20);
        reserved_leaf[3] = everywhere | bits(13, 29);
        Self {
            mode,
            levels: if five { 5 } else { 4 },
            index_bits: 9,
            input_bits: if five { 57 } else { 48 },
            no_execute: nxe,
            protection_keys: mode != PagingMode::Npt,
            leaf_levels: if gib_pages { 0b1110 } else { 0b0110 },
            accessed: ACCESSED,
            dirty: DIRTY,
            global: if mode == PagingMode::Npt { 0 } else { GLOBAL },
            table_address: ADDRESS_64,
            reserved_table,
            reserved_leaf,
            ..Self::NONE
        }
    }

    /// AMD nested page tables: the format of the host's long mode, with `five` levels or four, without
    /// protection keys and without global pages (APM vol. 2, 15.25.3).
    pub fn npt(five: bool, nxe: bool, gib_pages: bool, maxphyaddr: u8) -> Self {
        Self::long(PagingMode::Npt, five, nxe, gib_pages, maxphyaddr)
    }

    /// Intel extended page tables with `five` levels or four; `accessed_dirty` is bit 6 of the EPT pointer
    /// (SDM vol. 3, "EPT Translation Mechanism" and "EPT Misconfigurations").
    pub fn ept(five: bool, accessed_dirty: bool, features: EptFeatures, maxphyaddr: u8) -> Self {
        let everywhere = bits(physical_width(maxphyaddr), 51);
        let mib2 = features.contains(EptFeatures::MIB2_PAGES);
        let gib = features.contains(EptFeatures::GIB_PAGES);
        let mode_based_execute = features.contains(EptFeatures::MODE_BASED_EXECUTE);
        let mut reserved_table = [0; 8];
        reserved_table[2] = everywhere | bits(3, if mib2 { 6 } else { 7 });
        reserved_table[3] = everywhere | bits(3, if gib { 6 } else { 7 });
        reserved_table[4] = everywhere | bits(3, 7);
        reserved_table[5] = everywhere | bits(3, 7);
        let mut reserved_leaf = [0; 8];
        reserved_leaf[1] = everywhere;
        reserved_leaf[2] = everywhere | bits(12, 20);
        reserved_leaf[3] = everywhere | bits(12, 29);
        let execute_bits = EPT_EXECUTE | if mode_based_execute { EPT_USER_EXECUTE } else { 0 };
        Self {
            mode: PagingMode::Ept,
            levels: if five { 5 } else { 4 },
            index_bits: 9,
            input_bits: if five { 57 } else { 48 },
            no_execute: true,
            mode_based_execute,
            leaf_levels: 0b0010 | u8::from(mib2) << 2 | u8::from(gib) << 3,
            present: PRESENT | WRITABLE | execute_bits,
            accessed: if accessed_dirty { EPT_ACCESSED } else { 0 },
            dirty: if accessed_dirty { EPT_DIRTY } else { 0 },
            inverted: 0,
            table_address: ADDRESS_64,
            reserved_table,
            reserved_leaf,
            misconfigured: ept_misconfigured(execute_bits, features.contains(EptFeatures::EXECUTE_ONLY)),
            ..Self::NONE
        }
    }

    /// The translation scheme.
    #[inline(always)]
    pub const fn mode(&self) -> PagingMode {
        self.mode
    }

    /// The number of levels, which is also the root's level. 3 for PAE paging, whose root is four registers.
    #[inline(always)]
    pub const fn levels(&self) -> u8 {
        self.levels
    }

    /// How many bits of the address select an entry at each level.
    #[inline(always)]
    pub const fn index_bits(&self) -> u8 {
        self.index_bits
    }

    /// How many low bits of an address are translated.
    #[inline(always)]
    pub const fn input_bits(&self) -> u8 {
        self.input_bits
    }

    /// The size of an entry in bytes.
    #[inline(always)]
    pub const fn entry_bytes(&self) -> u8 {
        if self.wide() { 8 } else { 4 }
    }

    /// Whether an entry can forbid instruction fetches.
    #[inline(always)]
    pub const fn no_execute(&self) -> bool {
        self.no_execute
    }

    /// Whether an entry that maps a page holds a protection key.
    #[inline(always)]
    pub const fn protection_keys(&self) -> bool {
        self.protection_keys
    }

    /// Whether fetches from user-mode addresses have a permission bit of their own (EPT).
    #[inline(always)]
    pub const fn mode_based_execute(&self) -> bool {
        self.mode_based_execute
    }

    /// The accessed bit as a mask; 0 if the format has none.
    #[inline(always)]
    pub const fn accessed_bit(&self) -> u64 {
        self.accessed
    }

    /// The dirty bit as a mask; 0 if the format has none.
    #[inline(always)]
    pub const fn dirty_bit(&self) -> u64 {
        self.dirty
    }

    /// Whether an entry of `level` can map a page.
    #[inline(always)]
    pub const fn has_leaf(&self, level: u8) -> bool {
        self.leaf_levels >> (level & 7) & 1 != 0
    }

    /// The size of the pages that entries of `level` map, if they can.
    #[inline]
    pub const fn page_size(&self, level: u8) -> Option<PageSize> {
        if !self.has_leaf(level) {
            return None;
        }
        match (self.wide(), level) {
            (_, 1) => Some(PageSize::Size4K),
            (true, 2) => Some(PageSize::Size2M),
            (false, 2) => Some(PageSize::Size4M),
            (true, 3) => Some(PageSize::Size1G),
            _ => None,
        }
    }

    /// The bits that must be 0 in a present entry of `level`, by whether it maps a page.
    #[inline(always)]
    pub const fn reserved_bits(&self, level: u8, leaf: bool) -> u64 {
        let at = (level & 7) as usize;
        if leaf { self.reserved_leaf[at] } else { self.reserved_table[at] }
    }

    /// Whether entries are 64 bits wide.
    #[inline(always)]
    pub(crate) const fn wide(&self) -> bool {
        !matches!(self.mode, PagingMode::Bits32)
    }

    /// The number of address bits below the index of `level`.
    #[inline(always)]
    pub(crate) const fn index_shift(&self, level: u8) -> u32 {
        let shift = 12 + self.index_bits as u32 * (level.saturating_sub(1) & 7) as u32;
        if shift < 64 { shift } else { 63 }
    }

    /// The address bits above 31 that the 32-bit entry of a 4 MiB page holds.
    #[inline(always)]
    pub(crate) const fn pse36_address(&self, entry: u64) -> u64 {
        (entry & self.pse36) << 19
    }

    /// The bits of a 4 MiB page's 32-bit entry that hold the bits above 31 of `frame`.
    #[inline(always)]
    pub(crate) const fn pse36_bits(&self, frame: u64) -> u64 {
        frame >> 19 & self.pse36
    }

    /// Whether the permissions or the memory type of a present EPT entry are impossible ones.
    #[inline(always)]
    pub(crate) const fn is_misconfigured(&self, entry: u64) -> bool {
        let column = entry & 0x3f | (entry >> 10 & 1) << 6;
        self.misconfigured >> column & 1 != 0
    }
}

/// `maxphyaddr`, held to what an entry has room for.
fn physical_width(maxphyaddr: u8) -> u32 {
    u32::from(maxphyaddr).clamp(32, 52)
}

/// The bitmap of [`PageFormat::is_misconfigured`] (SDM vol. 3, "EPT Misconfigurations").
fn ept_misconfigured(execute_bits: u64, execute_only: bool) -> u128 {
    let mut bitmap = 0;
    for column in 0..128_u64 {
        let entry = column & 0x3f | (column >> 6) << 10;
        let (readable, writable) = (entry & PRESENT != 0, entry & WRITABLE != 0);
        let executable = entry & execute_bits != 0;
        let bad_rights = !readable && (writable || executable && !execute_only);
        // Above the last level the field is reserved, hence 0, which is a valid type.
        let bad_type = matches!(entry >> 3 & 7, 2 | 3 | 7);
        if bad_rights || bad_type {
            bitmap |= 1 << column;
        }
    }
    bitmap
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bit_ranges() {
        assert_eq!(bits(0, 63), u64::MAX);
        assert_eq!(bits(12, 31), 0xffff_f000);
        assert_eq!(bits(52, 51), 0);
        assert_eq!(bits(63, 63), 1 << 63);
        assert_eq!(bits(5, 64), 0);
    }

    #[test]
    fn pse36_takes_as_many_bits_as_the_address_has() {
        for (width, taken, reserved) in [
            (32, 0, bits(13, 21)),
            (36, bits(13, 16), bits(17, 21)),
            (40, bits(13, 20), 1 << 21),
            (52, bits(13, 20), 1 << 21),
        ] {
            let format = PageFormat::bits32(true, true, width);
            assert_eq!((format.pse36, format.reserved_bits(2, true)), (taken, reserved), "{width} bits");
        }
    }

    #[test]
    fn misconfigured_ept_entries() {
        let format = PageFormat::ept(false, false, EptFeatures::empty(), 40);
        let rights = |f: PageFormat| (0..8_u64).filter(|&e| f.is_misconfigured(e)).collect::<Vec<_>>();
        assert_eq!(rights(format), [2, 4, 6]);
        assert_eq!(rights(PageFormat::ept(false, false, EptFeatures::EXECUTE_ONLY, 40)), [2, 6]);
        let types = (0..8_u64).filter(|&t| format.is_misconfigured(t << 3 | 7)).collect::<Vec<_>>();
        assert_eq!(types, [2, 3, 7]);
    }
}

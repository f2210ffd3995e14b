//! Walking: from a linear address to a guest-physical one.
//!
//! # Theory of operation
//!
//! A [`PageWalk`] is all that a walk needs and all that a processor derives from its control registers: a root,
//! a [`PageFormat`] and [`Permissions`]. It is a value, made anew when the registers change.
//!
//! The walk goes down from the root, one entry a level. An entry is read once, and everything is decided from
//! that one value:
//! 1. Not present: page fault, P clear.
//! 2. A reserved bit set: page fault, P and RSVD set.
//! 3. The entry is combined by AND into what all entries so far allow; bits that forbid (NX) are flipped first.
//! 4. It points to a table: its accessed bit is set, and the walk goes on there.
//! 5. It maps a page: the combination makes the page's rights, the permission bitmap decides, and if it agrees,
//!    accessed is set and, for a write, dirty with it.
//!
//! Permissions are thus looked at only when the translation is complete: a missing or malformed entry below
//! reports itself, whatever the entries above forbid (SDM vol. 3, 4.7).
//!
//! **Accessed and dirty bits** (SDM vol. 3, 4.8) are set by a compare-exchange against the very value that was
//! read. If it fails, another processor has changed the entry, so that nothing that was concluded from it may be
//! used: the walk starts again at the root. No update is ever lost, and none is made to an entry that has
//! become something else. An entry that refers to a table counts as used once the walk goes through it, even if
//! the walk then faults below. The entry that maps the page counts as used only if the access is allowed, so that
//! a fault sets neither of its bits.
//!
//! **No RAM at a table's address** reads as all ones; see [`PageTableMemory`].
//!
//! The same descent serves linear addresses, EPT and NPT. What differs is where entries are read: directly in
//! guest memory, or, in a nested walk, through another walk. That is the private trait [`Tables`].

use std::convert::Infallible;

use crate::fault::{Cause, Refusal, WalkFault};
use crate::format::{KEY_SHIFT, PRESENT, PageFormat, PageSize, PagingMode};
use crate::permission::{PageRights, Permissions};
use crate::{Access, Gpa, Gva, PageTableMemory, PagingFeatures, PagingState, cr4, efer};

/// What a walk found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// The guest-physical address of the very byte that was asked for.
    pub gpa: Gpa,
    /// The size of the page that holds it. Without paging, 4 KiB.
    pub page_size: PageSize,
    /// The level of the entry that maps the page; 0 without paging.
    pub level: u8,
    /// The page is global: its bit is set and CR4.PGE is.
    pub global: bool,
    /// What the entries on the way allow together.
    pub rights: PageRights,
    /// The protection key in the entry; 0 in formats without keys.
    pub pkey: u8,
    /// The dirty bit is set, by now, or the format has none. Only then may a TLB let writes pass.
    pub dirty: bool,
    /// The accessed bit of the page's entry is set, by now, or the format has none.
    pub accessed: bool,
}

/// Where a walk reads and updates entries.
pub(crate) trait Tables {
    /// Why an entry or the page cannot be reached although the walk itself allows it.
    type Fault;
    /// What is found behind the page's address.
    type Page;

    /// Reads the entry at `at`, of 64 bits if `WIDE`, else of 32. All ones where there is no RAM.
    fn read<const WIDE: bool>(&self, at: Gpa) -> Result<u64, Self::Fault>;

    /// Replaces the entry `old` at `at`. `false`: the entry is no longer `old`.
    fn update<const WIDE: bool>(&self, at: Gpa, old: u64, new: u64) -> Result<bool, Self::Fault>;

    /// Goes on to the page itself, before its accessed and dirty bits are set.
    fn page(&self, gpa: Gpa, access: Access, rights: PageRights) -> Result<Self::Page, Self::Fault>;
}

/// Tables whose addresses are those of guest memory.
pub(crate) struct Direct<'a, M>(pub(crate) &'a M);

/// Reads the entry at `at`, all ones where there is no RAM.
#[inline(always)]
pub(crate) fn read_entry<const WIDE: bool>(memory: &impl PageTableMemory, at: Gpa) -> u64 {
    if WIDE {
        memory.read_u64(at).unwrap_or(u64::MAX)
    } else {
        u64::from(memory.read_u32(at).unwrap_or(u32::MAX))
    }
}

/// Replaces the entry at `at`, which goes nowhere and succeeds where there is no RAM.
#[inline]
pub(crate) fn update_entry<const WIDE: bool>(
    memory: &impl PageTableMemory,
    at: Gpa,
    old: u64,
    new: u64,
) -> bool {
    if WIDE {
        memory.compare_exchange_u64(at, old, new).unwrap_or(true)
    } else {
        // A narrow entry was read as 32 bits, and only its low bits are changed.
        memory.compare_exchange_u32(at, old as u32, new as u32).unwrap_or(true)
    }
}

impl<M: PageTableMemory> Tables for Direct<'_, M> {
    type Fault = Infallible;
    type Page = ();

    #[inline(always)]
    fn read<const WIDE: bool>(&self, at: Gpa) -> Result<u64, Infallible> {
        Ok(read_entry::<WIDE>(self.0, at))
    }

    #[inline]
    fn update<const WIDE: bool>(&self, at: Gpa, old: u64, new: u64) -> Result<bool, Infallible> {
        Ok(update_entry::<WIDE>(self.0, at, old, new))
    }

    #[inline(always)]
    fn page(&self, _: Gpa, _: Access, _: PageRights) -> Result<(), Infallible> {
        Ok(())
    }
}

/// Why a descent ended without a translation.
pub(crate) enum Stop<F> {
    /// The walk itself says no.
    Refused(Refusal),
    /// An entry or the page was out of reach.
    Unreachable(F),
}

impl<F> From<F> for Stop<F> {
    #[inline(always)]
    fn from(fault: F) -> Self {
        Self::Unreachable(fault)
    }
}

/// Everything needed to translate addresses: a root, a format, and the permission bitmaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageWalk {
    pub(crate) root: u64,
    pub(crate) pdptrs: [u64; 4],
    pub(crate) format: PageFormat,
    pub(crate) permissions: Permissions,
}

impl PageWalk {
    /// The walk of a processor in `state`.
    pub fn new(state: &PagingState) -> Self {
        let format = PageFormat::new(state);
        let permissions = Permissions::paging(state, &format);
        let mut walk = Self { root: 0, pdptrs: state.pdptrs, format, permissions };
        walk.set_cr3(state.cr3);
        walk
    }

    /// The walk of AMD nested page tables in the format that the host's registers say, whose CR3 is nCR3
    /// (APM vol. 2, 15.25.3). The host is taken to be in long mode; CR0 and the keys are not looked at.
    pub fn npt(host: &PagingState) -> Self {
        let format = PageFormat::npt(
            host.cr4(cr4::LA57),
            host.efer(efer::NXE),
            host.features.contains(PagingFeatures::GIB_PAGES),
            host.maxphyaddr,
        );
        let root = host.cr3 & format.table_address;
        Self { root, pdptrs: [0; 4], format, permissions: Permissions::npt(&format) }
    }

    /// The format of the tables that the walk reads.
    #[inline(always)]
    pub const fn format(&self) -> &PageFormat {
        &self.format
    }

    /// The guest-physical address of the root table; for PAE paging, of the table that the
    /// page-directory-pointer registers were loaded from.
    #[inline(always)]
    pub const fn root(&self) -> Gpa {
        Gpa(self.root)
    }

    /// Takes a new CR3, everything else as it was. With PAE paging the registers must be loaded with it:
    /// [`PageWalk::set_pdptrs`].
    #[inline]
    pub fn set_cr3(&mut self, cr3: u64) {
        self.root = match self.format.mode() {
            PagingMode::Pae => cr3 & 0xffff_ffe0,
            _ => cr3 & self.format.table_address,
        };
    }

    /// Takes new page-directory-pointer registers.
    #[inline]
    pub fn set_pdptrs(&mut self, pdptrs: [u64; 4]) {
        self.pdptrs = pdptrs;
    }

    /// Takes new protection-key registers, PKRU and IA32_PKRS.
    #[inline]
    pub fn set_keys(&mut self, pkru: u32, pkrs: u32) {
        self.permissions.set_keys(pkru, pkrs);
    }

    /// Translates `gva` for `access`, and sets accessed and dirty bits on the way.
    ///
    /// Only as many low bits of the address count as the format translates. Whether the rest is canonical is for
    /// the caller to check: it is no page fault; see [`PageWalk::canonical`].
    ///
    /// # Errors
    /// The page fault that the processor would raise.
    #[inline]
    pub fn translate(
        &self,
        memory: &impl PageTableMemory,
        gva: Gva,
        access: Access,
    ) -> Result<Translation, WalkFault> {
        self.direct::<_, true>(memory, gva, access)
    }

    /// As [`PageWalk::translate`], but leaves memory as it is: for debuggers and tests. `accessed` and `dirty`
    /// say what the entry says.
    ///
    /// # Errors
    /// The page fault that the processor would raise.
    #[inline]
    pub fn probe(
        &self,
        memory: &impl PageTableMemory,
        gva: Gva,
        access: Access,
    ) -> Result<Translation, WalkFault> {
        self.direct::<_, false>(memory, gva, access)
    }

    #[inline(always)]
    fn direct<M: PageTableMemory, const UPDATE: bool>(
        &self,
        memory: &M,
        gva: Gva,
        access: Access,
    ) -> Result<Translation, WalkFault> {
        match self.walk::<_, UPDATE>(&Direct(memory), gva.0, access) {
            Ok((translation, ())) => Ok(translation),
            Err(Stop::Refused(refusal)) => Err(self.page_fault(gva, access, refusal)),
            Err(Stop::Unreachable(never)) => match never {},
        }
    }

    /// Whether an access to a page found earlier is allowed, from the bitmaps alone.
    ///
    /// With it, one walk fills a TLB entry with all rights. Two things are up to the caller: to use the right to
    /// write only if `dirty` is set, so that the first write walks and sets it, and to ask again when the control
    /// registers, PKRU or IA32_PKRS have changed.
    #[inline]
    pub const fn permits(&self, translation: &Translation, access: Access) -> bool {
        self.permissions.allows(translation.rights, access)
            && !self.permissions.key_forbids(translation.rights, translation.pkey, access)
    }

    /// Whether `gva` is an address at all in this mode: canonical in 4-level and 5-level paging, of 32 bits in
    /// the others.
    #[inline]
    pub const fn canonical(&self, gva: Gva) -> bool {
        match self.format.mode() {
            PagingMode::Level4 => is_canonical(gva, 4),
            PagingMode::Level5 => is_canonical(gva, 5),
            _ => gva.0 >> 32 == 0,
        }
    }

    #[cold]
    pub(crate) fn page_fault(&self, gva: Gva, access: Access, refusal: Refusal) -> WalkFault {
        let fetch = self.permissions.fetch_error(access);
        WalkFault { error_code: refusal.error_code(access, fetch), gva }
    }

    /// The walk, wherever entries are.
    #[inline(always)]
    pub(crate) fn walk<T: Tables, const UPDATE: bool>(
        &self,
        tables: &T,
        address: u64,
        access: Access,
    ) -> Result<(Translation, T::Page), Stop<T::Fault>> {
        let (root, levels) = (self.root, self.format.levels());
        let nothing_there = Refusal { cause: Cause::NotPresent, combined: 0 };
        match self.format.mode() {
            PagingMode::Level4 | PagingMode::Level5 => {
                self.descend::<T, true, false, UPDATE>(tables, root, levels, address, access)
            }
            PagingMode::None => self.flat(tables, address, access),
            PagingMode::Bits32 => {
                self.descend::<T, false, false, UPDATE>(tables, root, levels, address, access)
            }
            PagingMode::Pae => {
                let pointer = self.pdptrs[(address >> 30 & 3) as usize];
                if pointer & PRESENT == 0 {
                    return Err(Stop::Refused(nothing_there));
                }
                let table = pointer & self.format.table_address;
                self.descend::<T, true, false, UPDATE>(tables, table, 2, address, access)
            }
            // Nothing is mapped above what the tables can hold.
            PagingMode::Ept | PagingMode::Npt if address >> self.format.input_bits() != 0 => {
                Err(Stop::Refused(nothing_there))
            }
            PagingMode::Ept => self.descend::<T, true, true, UPDATE>(tables, root, levels, address, access),
            PagingMode::Npt => self.descend::<T, true, false, UPDATE>(tables, root, levels, address, access),
        }
    }

    /// Translation without paging.
    #[inline]
    fn flat<T: Tables>(
        &self,
        tables: &T,
        address: u64,
        access: Access,
    ) -> Result<(Translation, T::Page), Stop<T::Fault>> {
        let gpa = Gpa(address & 0xffff_ffff);
        let translation = Translation {
            gpa,
            page_size: PageSize::Size4K,
            level: 0,
            global: false,
            rights: PageRights::all(),
            pkey: 0,
            dirty: true,
            accessed: true,
        };
        Ok((translation, tables.page(gpa, access, translation.rights)?))
    }

    /// Goes down from the table `root` of level `top`; see the head of this file. Entries are 64 bits wide if
    /// `WIDE`, and are those of EPT if `EPT`.
    #[inline(always)]
    fn descend<T: Tables, const WIDE: bool, const EPT: bool, const UPDATE: bool>(
        &self,
        tables: &T,
        root: u64,
        top: u8,
        address: u64,
        access: Access,
    ) -> Result<(Translation, T::Page), Stop<T::Fault>> {
        let format = &self.format;
        let (index_bits, entry_shift) = if WIDE { (9, 3) } else { (10, 2) };
        let index_mask = (1_u64 << index_bits) - 1;
        'restart: loop {
            let mut table = root;
            let mut level = top;
            let mut shift = 12 + index_bits * (u32::from(top).saturating_sub(1) & 7);
            let mut combined = u64::MAX;
            loop {
                let at = Gpa(table | (address >> shift & index_mask) << entry_shift);
                let entry = tables.read::<WIDE>(at)?;
                combined &= entry ^ format.inverted;
                if !format.is_present(entry) {
                    return Err(Stop::Refused(Refusal { cause: Cause::NotPresent, combined }));
                }
                let leaf = format.is_leaf(entry, level);
                if entry & format.reserved_bits(level, leaf) != 0 || EPT && format.is_misconfigured(entry) {
                    return Err(Stop::Refused(Refusal { cause: Cause::Reserved, combined }));
                }
                if !leaf {
                    let used = entry | format.accessed;
                    if UPDATE && used != entry && !tables.update::<WIDE>(at, entry, used)? {
                        continue 'restart;
                    }
                    table = entry & format.table_address;
                    level = level.saturating_sub(1);
                    shift = shift.saturating_sub(index_bits);
                    continue;
                }

                let rights = PageRights::of(format, combined);
                let pkey = if format.protection_keys() { (entry >> KEY_SHIFT & 15) as u8 } else { 0 };
                let key_forbids = self.permissions.key_forbids(rights, pkey, access);
                if key_forbids || !self.permissions.allows(rights, access) {
                    let cause = if key_forbids { Cause::KeyDenied } else { Cause::Denied };
                    return Err(Stop::Refused(Refusal { cause, combined }));
                }

                let page_size = leaf_size::<WIDE>(level);
                let offset = page_size.bytes() - 1;
                let high = if WIDE || level == 1 { 0 } else { format.pse36_address(entry) };
                let gpa = Gpa(entry & format.table_address & !offset | high | address & offset);
                let page = tables.page(gpa, access, rights)?;
                let mut used = entry | format.accessed;
                if access.is_write() {
                    used |= format.dirty;
                }
                if UPDATE && used != entry && !tables.update::<WIDE>(at, entry, used)? {
                    continue 'restart;
                }
                let entry = if UPDATE { used } else { entry };
                let translation = Translation {
                    gpa,
                    page_size,
                    level,
                    global: entry & format.global != 0,
                    rights,
                    pkey,
                    dirty: entry & format.dirty == format.dirty,
                    accessed: entry & format.accessed == format.accessed,
                };
                return Ok((translation, page));
            }
        }
    }
}

/// The size of the page that an entry of `level` maps.
#[inline(always)]
const fn leaf_size<const WIDE: bool>(level: u8) -> PageSize {
    match level {
        2 if WIDE => PageSize::Size2M,
        2 => PageSize::Size4M,
        3 => PageSize::Size1G,
        _ => PageSize::Size4K,
    }
}

/// Whether `gva` is canonical for page tables of `levels` levels, 4 or 5: bits 63:47 or 63:56 are all alike
/// (SDM vol. 3, 4.5.2).
#[inline]
pub const fn is_canonical(gva: Gva, levels: u8) -> bool {
    let unused = if levels >= 5 { 64 - 57 } else { 64 - 48 };
    ((gva.0 << unused).cast_signed() >> unused).cast_unsigned() == gva.0
}

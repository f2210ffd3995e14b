//! Permission decisions from a precomputed bitmap.
//!
//! What paging decides about an access depends on the access (kind, privilege, EFLAGS.AC), on the page's
//! rights (the combination of all entries on the way to it), and on control bits that hardly ever change:
//! CR0.WP, CR4.SMEP, CR4.SMAP. The control bits are folded in when a [`Permissions`] is made. A decision is
//! then one load and one shift: the access selects a row, the rights a bit in it.
//!
//! Protection keys do not fit in such a bitmap, as there are sixteen with two bits each and PKRU changes at any
//! moment. But which of a key's two bits an access heeds depends on the access, CR0.WP, CR4.PKE and CR4.PKS
//! alone, and that is the second table: the access selects a mask of the key's bits in PKRU or IA32_PKRS.
//!
//! A key is judged whether or not the rights allow the access, since the error code says both (SDM vol. 3, 4.7).
//! Taken at its word, 4.6.2 lets IA32_PKRS judge user-mode accesses to supervisor-mode pages too: they fault in
//! any case, and PK is then set.

use bitflags::bitflags;

use crate::access::{Access, AccessKind, Privilege};
use crate::format::{EPT_EXECUTE, EPT_USER_EXECUTE, PRESENT, PageFormat, PagingMode, USER, WRITABLE};
use crate::state::{PagingState, cr0, cr4};

bitflags! {
    /// What all the entries on the way to a page allow together.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
    pub struct PageRights: u8 {
        /// Data reads. Only EPT has pages without it.
        const READ = 1 << 0;
        /// Data writes.
        const WRITE = 1 << 1;
        /// User-mode accesses: the page is a user-mode page. In EPT, fetches from user-mode linear addresses;
        /// without mode-based execution control it goes with `EXECUTE`.
        const USER = 1 << 2;
        /// Instruction fetches. In EPT with mode-based execution control, from supervisor-mode linear
        /// addresses.
        const EXECUTE = 1 << 3;
    }
}

impl PageRights {
    /// The rights in the AND of entries that had [`PageFormat::inverted`](PageFormat) flipped.
    #[inline(always)]
    pub(crate) const fn of(format: &PageFormat, combined: u64) -> Self {
        let shared = combined & (PRESENT | WRITABLE);
        let rest = if !matches!(format.mode(), PagingMode::Ept) {
            combined & USER | (combined >> 63) << 3
        } else {
            let execute = combined & EPT_EXECUTE;
            let user = if format.mode_based_execute() { combined & EPT_USER_EXECUTE } else { execute };
            (if user != 0 { 1 << 2 } else { 0 }) | execute << 1
        };
        Self::from_bits_truncate((shared | rest) as u8)
    }
}

/// Which accesses to which pages are allowed, worked out from the control registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Permissions {
    /// By [`Access::index`]: bit `n` allows the access to pages with the rights `n`.
    allowed: [u16; Access::INDEXES],
    /// By [`Access::index`]: which of a key's bits forbid the access, bits 1:0 for supervisor-mode pages,
    /// bits 3:2 for user-mode pages. In each pair, the low bit is access disable, the high bit write disable.
    key_bits: [u8; Access::INDEXES],
    pkru: u32,
    pkrs: u32,
    /// The I/D bit of a fetch's error code, where the processor reports it.
    fetch_error: u32,
}

/// A row's access, the inverse of [`Access::index`].
fn access_of(index: usize) -> Access {
    let kind = match index & 3 {
        0 => AccessKind::Read,
        1 => AccessKind::Write,
        _ => AccessKind::Fetch,
    };
    let privilege = if index & 4 != 0 { Privilege::User } else { Privilege::Supervisor };
    Access { kind, privilege, ac: index & 8 != 0 }
}

impl Permissions {
    /// No paging: everything is allowed.
    fn everything() -> Self {
        Self {
            allowed: [u16::MAX; Access::INDEXES],
            key_bits: [0; Access::INDEXES],
            pkru: 0,
            pkrs: 0,
            fetch_error: 0,
        }
    }

    /// A bitmap of the combinations for which `allow` says yes.
    fn bitmap(allow: impl Fn(Access, PageRights) -> bool) -> [u16; Access::INDEXES] {
        let mut allowed = [0; Access::INDEXES];
        for (index, row) in allowed.iter_mut().enumerate() {
            for rights in 0..16 {
                if allow(access_of(index), PageRights::from_bits_truncate(rights)) {
                    *row |= 1 << rights;
                }
            }
        }
        allowed
    }

    /// The rules for linear addresses (SDM vol. 3, 4.6.1 and 4.6.2).
    pub(crate) fn paging(state: &PagingState, format: &PageFormat) -> Self {
        if format.mode() == PagingMode::None {
            return Self::everything();
        }
        let write_protect = state.cr0(cr0::WP);
        let (smep, smap) = (state.cr4(cr4::SMEP), state.cr4(cr4::SMAP));
        let allowed = Self::bitmap(|access, rights| {
            let user_page = rights.contains(PageRights::USER);
            let user = access.is_user();
            match access.kind {
                AccessKind::Fetch => {
                    rights.contains(PageRights::EXECUTE)
                        && if user { user_page } else { !(smep && user_page) }
                }
                AccessKind::Read | AccessKind::Write => {
                    let reachable = if user { user_page } else { !(smap && user_page) || access.ac };
                    let writable = rights.contains(PageRights::WRITE) || !user && !write_protect;
                    reachable && (writable || !access.is_write())
                }
            }
        });
        let mut key_bits = [0; Access::INDEXES];
        if format.protection_keys() {
            let user_pages = if state.cr4(cr4::PKE) { 0b1100 } else { 0 };
            let supervisor_pages = if state.cr4(cr4::PKS) { 0b0011 } else { 0 };
            for (index, row) in key_bits.iter_mut().enumerate() {
                let access = access_of(index);
                let write_disable = access.is_write() && (access.is_user() || write_protect);
                let heeded = if write_disable { 0b1111 } else { 0b0101 };
                if !access.is_fetch() {
                    *row = heeded & (user_pages | supervisor_pages);
                }
            }
        }
        let fetch_reported = format.no_execute() || smep;
        let fetch_error = if fetch_reported { crate::fault::FETCH } else { 0 };
        Self { allowed, key_bits, pkru: state.pkru, pkrs: state.pkrs, fetch_error }
    }

    /// The rules for EPT: every kind of access has its bit, and nothing else counts.
    pub(crate) fn ept() -> Self {
        let allowed = Self::bitmap(|access, rights| {
            rights.contains(match (access.kind, access.is_user()) {
                (AccessKind::Read, _) => PageRights::READ,
                (AccessKind::Write, _) => PageRights::WRITE,
                (AccessKind::Fetch, true) => PageRights::USER,
                (AccessKind::Fetch, false) => PageRights::EXECUTE,
            })
        });
        Self { allowed, fetch_error: crate::fault::FETCH, ..Self::everything() }
    }

    /// The rules for nested page tables: every access is a user-mode access (APM vol. 2, 15.25.5).
    pub(crate) fn npt(format: &PageFormat) -> Self {
        let allowed = Self::bitmap(|access, rights| {
            rights.contains(PageRights::USER)
                && match access.kind {
                    AccessKind::Read => true,
                    AccessKind::Write => rights.contains(PageRights::WRITE),
                    AccessKind::Fetch => rights.contains(PageRights::EXECUTE),
                }
        });
        let fetch_error = if format.no_execute() { crate::fault::FETCH } else { 0 };
        Self { allowed, fetch_error, ..Self::everything() }
    }

    /// Takes new protection-key registers.
    #[inline]
    pub(crate) fn set_keys(&mut self, pkru: u32, pkrs: u32) {
        self.pkru = pkru;
        self.pkrs = pkrs;
    }

    /// Whether `rights` allow `access`, protection keys aside.
    #[inline(always)]
    pub(crate) const fn allows(&self, rights: PageRights, access: Access) -> bool {
        self.allowed[access.index() & 15] >> (rights.bits() & 15) & 1 != 0
    }

    /// Whether the protection key `key` of a page with `rights` forbids `access`.
    #[inline(always)]
    pub(crate) const fn key_forbids(&self, rights: PageRights, key: u8, access: Access) -> bool {
        let heeded = self.key_bits[access.index() & 15] as u32;
        let (register, heeded) = if rights.contains(PageRights::USER) {
            (self.pkru, heeded >> 2)
        } else {
            (self.pkrs, heeded & 3)
        };
        register >> (2 * (key & 15)) & heeded != 0
    }

    /// The I/D bit for `access`: set for a fetch if CR4.SMEP is, or if fetches can be forbidden.
    #[inline(always)]
    pub(crate) const fn fetch_error(&self, access: Access) -> u32 {
        if access.is_fetch() { self.fetch_error } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_access_has_the_row_that_names_it() {
        for kind in [AccessKind::Read, AccessKind::Write, AccessKind::Fetch] {
            for privilege in [Privilege::User, Privilege::Supervisor, Privilege::Implicit] {
                for ac in [false, true] {
                    let access = Access { kind, privilege, ac };
                    let row = access_of(access.index());
                    assert_eq!((row.kind, row.is_user()), (kind, access.is_user()));
                    assert_eq!(row.ac, ac && privilege == Privilege::Supervisor);
                }
            }
        }
    }

    #[test]
    fn without_paging_everything_is_allowed() {
        let state = PagingState { cr4: cr4::SMEP | cr4::SMAP, ..PagingState::default() };
        let permissions = Permissions::paging(&state, &PageFormat::new(&state));
        for index in 0..Access::INDEXES {
            assert!(permissions.allows(PageRights::empty(), access_of(index)));
        }
    }
}

//! What a walk of a guest's own page tables reports when it fails.

use crate::{Access, Gva};

/// Bit 0, P: the translation exists, and does not allow the access.
pub(crate) const PROTECTION: u32 = 1 << 0;
/// Bit 1, W/R: the access is a write.
pub(crate) const WRITE: u32 = 1 << 1;
/// Bit 2, U/S: the access is a user-mode access.
pub(crate) const USER: u32 = 1 << 2;
/// Bit 3, RSVD: an entry has a reserved bit set.
pub(crate) const RESERVED: u32 = 1 << 3;
/// Bit 4, I/D: the access is an instruction fetch.
pub(crate) const FETCH: u32 = 1 << 4;
/// Bit 5, PK: a protection key forbids the access.
pub(crate) const KEY: u32 = 1 << 5;

/// A page fault, #PF, in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("page fault at {gva}, error code {error_code:#x}")]
pub struct WalkFault {
    /// The error code as the processor pushes it (SDM vol. 3, 4.7): P, W/R, U/S, RSVD, I/D, PK in bits 5:0.
    pub error_code: u32,
    /// The faulting address, for CR2.
    pub gva: Gva,
}

/// Why a walk of either kind stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// An entry is not present.
    NotPresent,
    /// An entry has a reserved bit set or, in EPT, is misconfigured.
    Reserved,
    /// The page does not allow the access.
    Denied,
    /// The page's protection key forbids the access, whatever else may.
    KeyDenied,
}

/// Why a walk of either kind stopped, and what it had seen by then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) cause: Cause,
    /// The AND of the entries that were read, including the one at which the walk stopped.
    pub(crate) combined: u64,
}

impl Refusal {
    /// The #PF error code; `fetch` is the I/D bit if it is to be reported.
    #[inline]
    pub(crate) const fn error_code(self, access: Access, fetch: u32) -> u32 {
        let cause = match self.cause {
            Cause::NotPresent => 0,
            Cause::Reserved => PROTECTION | RESERVED,
            Cause::Denied => PROTECTION,
            Cause::KeyDenied => PROTECTION | KEY,
        };
        cause | fetch | if access.is_write() { WRITE } else { 0 } | if access.is_user() { USER } else { 0 }
    }
}

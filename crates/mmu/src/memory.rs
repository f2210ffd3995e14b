//! The memory that page tables are in.

use crate::Gpa;

/// Guest-physical memory as a page walk uses it.
///
/// Every method answers `None` where there is no RAM. A walk then acts as a processor does on an address
/// that nothing answers: it reads all ones, which nearly always is an entry with a reserved bit set, and its
/// write goes nowhere. Addresses are always naturally aligned. Another thread may access the same memory at
/// any time, so each access must be a single atomic one.
pub trait PageTableMemory {
    /// Reads the 32-bit little-endian entry at `gpa`.
    fn read_u32(&self, gpa: Gpa) -> Option<u32>;

    /// Reads the 64-bit little-endian entry at `gpa`.
    fn read_u64(&self, gpa: Gpa) -> Option<u64>;

    /// Replaces the 32-bit entry at `gpa` with `new` if it is still `old`, and says whether it was. The
    /// exchange is ordered as a locked instruction of the guest's is. It must not fail spuriously: a walk
    /// starts again each time that it loses.
    fn compare_exchange_u32(&self, gpa: Gpa, old: u32, new: u32) -> Option<bool>;

    /// The same for a 64-bit entry.
    fn compare_exchange_u64(&self, gpa: Gpa, old: u64, new: u64) -> Option<bool>;
}

impl<M: PageTableMemory + ?Sized> PageTableMemory for &M {
    #[inline(always)]
    fn read_u32(&self, gpa: Gpa) -> Option<u32> {
        (**self).read_u32(gpa)
    }

    #[inline(always)]
    fn read_u64(&self, gpa: Gpa) -> Option<u64> {
        (**self).read_u64(gpa)
    }

    #[inline(always)]
    fn compare_exchange_u32(&self, gpa: Gpa, old: u32, new: u32) -> Option<bool> {
        (**self).compare_exchange_u32(gpa, old, new)
    }

    #[inline(always)]
    fn compare_exchange_u64(&self, gpa: Gpa, old: u64, new: u64) -> Option<bool> {
        (**self).compare_exchange_u64(gpa, old, new)
    }
}

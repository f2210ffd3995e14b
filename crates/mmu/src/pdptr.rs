//! The page-directory-pointer registers of PAE paging.

use crate::format::{PRESENT, bits};
use crate::walk::read_entry;
use crate::{Gpa, PageTableMemory};

/// A page-directory-pointer entry has reserved bits set: loading it is #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("page-directory-pointer entry {index} is {entry:#x}, with the reserved bits {reserved:#x}")]
pub struct ReservedBits {
    /// Which of the four.
    pub index: usize,
    /// The entry.
    pub entry: u64,
    /// The reserved bits that are set in it.
    pub reserved: u64,
}

/// Reads the four entries that the processor keeps in registers from one MOV to CR3 to the next
/// (SDM vol. 3, 4.4.1).
///
/// # Errors
/// A present entry with reserved bits set: bits 2:1, 8:5, or any from `maxphyaddr` up. The processor then raises
/// #GP(0) and keeps the registers as they were.
pub fn load_pdptrs(
    memory: &impl PageTableMemory,
    cr3: u64,
    maxphyaddr: u8,
) -> Result<[u64; 4], ReservedBits> {
    let mut pdptrs = [0; 4];
    for (offset, register) in (0..).step_by(8).zip(&mut pdptrs) {
        *register = read_entry::<true>(memory, Gpa((cr3 & 0xffff_ffe0) + offset));
    }
    check_pdptrs(&pdptrs, maxphyaddr)?;
    Ok(pdptrs)
}

/// The check of [`load_pdptrs`] alone, for registers that come from elsewhere, such as a VMCS.
///
/// # Errors
/// As for [`load_pdptrs`].
pub fn check_pdptrs(pdptrs: &[u64; 4], maxphyaddr: u8) -> Result<(), ReservedBits> {
    let forbidden = bits(1, 2) | bits(5, 8) | bits(u32::from(maxphyaddr).clamp(32, 52), 63);
    for (index, &entry) in pdptrs.iter().enumerate() {
        let reserved = entry & forbidden;
        if entry & PRESENT != 0 && reserved != 0 {
            return Err(ReservedBits { index, entry, reserved });
        }
    }
    Ok(())
}

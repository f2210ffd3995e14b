//! What is peculiar to Intel's extended page tables: the pointer, the features.

use bitflags::bitflags;

use crate::format::bits;
use crate::permission::Permissions;
use crate::{PageFormat, PageWalk};

bitflags! {
    /// What the capability MSR IA32_VMX_EPT_VPID_CAP and the execution controls say about the format.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct EptFeatures: u32 {
        /// Pages may be executable without being readable: capability bit 0.
        const EXECUTE_ONLY = 1 << 0;
        /// 2 MiB pages: capability bit 16.
        const MIB2_PAGES = 1 << 1;
        /// 1 GiB pages: capability bit 17.
        const GIB_PAGES = 1 << 2;
        /// The control "mode-based execute control for EPT" is on: fetches from user-mode linear addresses have
        /// a permission bit of their own.
        const MODE_BASED_EXECUTE = 1 << 3;
    }
}

/// The EPT pointer would fail VM entry (SDM vol. 3, "Checks on VMX Controls").
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("EPT pointer {eptp:#x} has a memory type, a number of levels, or reserved bits that are not valid")]
pub struct InvalidEptPointer {
    /// The pointer.
    pub eptp: u64,
}

impl PageWalk {
    /// The walk of the extended page tables that the EPT pointer `eptp` refers to (SDM vol. 3, table "Format of
    /// Extended-Page-Table Pointer").
    ///
    /// # Errors
    /// A pointer that VM entry would refuse.
    pub fn ept(eptp: u64, features: EptFeatures, maxphyaddr: u8) -> Result<Self, InvalidEptPointer> {
        let levels = (eptp >> 3 & 7) + 1;
        let memory_type = eptp & 7;
        let width = u32::from(maxphyaddr).clamp(32, 52);
        let reserved = bits(7, 11) | bits(width, 63);
        if !matches!(levels, 4 | 5) || !matches!(memory_type, 0 | 6) || eptp & reserved != 0 {
            return Err(InvalidEptPointer { eptp });
        }
        let format = PageFormat::ept(levels == 5, eptp >> 6 & 1 != 0, features, maxphyaddr);
        let root = eptp & format.table_address;
        Ok(Self { root, pdptrs: [0; 4], format, permissions: Permissions::ept() })
    }
}

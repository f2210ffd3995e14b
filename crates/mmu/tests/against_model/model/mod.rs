//! A second, plain model of address translation, to compare the crate with.
//!
//! It is written from the manuals one format after the other, in straight lines: no bitmaps, no tables of
//! reserved bits, no shared descent. It shares only plain types with the crate. Slow and obvious on purpose.

pub(crate) mod compare;
pub(crate) mod host;
pub(crate) mod linear;

use mmu::testing::FlatMemory;
use mmu::{Gpa, PageTableMemory};

/// The page that a walk ended at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Page {
    /// The address of the byte.
    pub(crate) gpa: u64,
    /// The size of the page in bytes.
    pub(crate) size: u64,
    pub(crate) level: u8,
    pub(crate) global: bool,
    pub(crate) readable: bool,
    pub(crate) writable: bool,
    pub(crate) user: bool,
    pub(crate) executable: bool,
    pub(crate) pkey: u8,
    pub(crate) dirty: bool,
    pub(crate) accessed: bool,
}

/// An exit to the hypervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    EptViolation { gpa: u64, qualification: u64 },
    EptMisconfiguration { gpa: u64 },
    NestedPageFault { gpa: u64, info: u64 },
}

/// Why there is no translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// A page fault with this error code.
    PageFault(u32),
    Exit(Exit),
}

impl From<Exit> for Stop {
    fn from(exit: Exit) -> Self {
        Self::Exit(exit)
    }
}

/// What the model walks over: RAM, or a guest's memory behind a host's tables.
pub(crate) trait Memory {
    fn read(&mut self, address: u64, bytes: u64) -> Result<u64, Exit>;
    fn write(&mut self, address: u64, bytes: u64, value: u64) -> Result<(), Exit>;
    /// Goes on to the page: its address for the walk's user, and the host's page if there is one.
    fn page(&mut self, address: u64, access: mmu::Access, user_page: bool) -> Result<Option<Page>, Exit>;
}

/// Plain RAM. With `frozen`, nothing is written.
pub(crate) struct Ram<'a> {
    pub(crate) memory: &'a mut FlatMemory,
    pub(crate) frozen: bool,
}

impl Memory for Ram<'_> {
    fn read(&mut self, address: u64, bytes: u64) -> Result<u64, Exit> {
        if bytes == 8 {
            Ok(self.memory.read_u64(Gpa(address)).unwrap_or(0xffff_ffff_ffff_ffff))
        } else {
            Ok(self.memory.read_u32(Gpa(address)).map_or(0xffff_ffff, u64::from))
        }
    }

    fn write(&mut self, address: u64, bytes: u64, value: u64) -> Result<(), Exit> {
        if self.frozen || address >= self.memory.size() {
            return Ok(());
        }
        if bytes == 8 {
            self.memory.set_u64(address, value);
        } else {
            self.memory.set_u32(address, value as u32);
        }
        Ok(())
    }

    fn page(&mut self, _: u64, _: mmu::Access, _: bool) -> Result<Option<Page>, Exit> {
        Ok(None)
    }
}

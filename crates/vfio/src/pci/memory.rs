//! The memory of a device that its users may map.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::{
    fs::{MemfdFlags, ftruncate, memfd_create},
    io::{pread, pwrite},
};

use crate::Result;

/// Memory in a file of its own, shared with whoever maps it.
#[derive(Debug)]
pub struct Memory {
    file: OwnedFd,
    size: u64,
}

impl Memory {
    /// `size` bytes of zeros.
    ///
    /// # Errors
    /// What the system says when it has none.
    pub fn new(size: u64) -> Result<Self> {
        let file = memfd_create("vfio-bar", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, size)?;
        Ok(Self { file, size })
    }

    /// Reads; what lies past the end is zero.
    pub fn read(&self, offset: u64, to: &mut [u8]) {
        to.fill(0);
        let within = self.size.saturating_sub(offset).min(to.len() as u64) as usize;
        if let Some(to) = to.get_mut(..within) {
            let _ = pread(&self.file, to, offset);
        }
    }

    /// Writes; what lies past the end is ignored.
    pub fn write(&self, offset: u64, from: &[u8]) {
        let within = self.size.saturating_sub(offset).min(from.len() as u64) as usize;
        if let Some(from) = from.get(..within) {
            let _ = pwrite(&self.file, from, offset);
        }
    }

    /// All zeros again, also where it is mapped.
    pub fn clear(&self) {
        if ftruncate(&self.file, 0).is_ok() {
            let _ = ftruncate(&self.file, self.size);
        }
    }
}

impl AsFd for Memory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

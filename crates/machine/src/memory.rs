//! Guest RAM: one memfd, mapped once for each RAM region of the [layout](crate::layout).
//!
//! A memfd, so that other processes (vhost-user, vfio-user back ends) can be given it. Shared and without
//! reservation, so that the host pays only for pages that the guest touched.

use std::fs::File;
use std::sync::Arc;

use cpu::GuestRam;
use mmu::Gpa;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::{FileOffset, GuestAddress};

/// Why guest RAM could not be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host gives no memory file.
    #[error("cannot create {bytes} bytes of guest memory")]
    Create {
        /// How much was asked for.
        bytes: u64,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
    /// The host does not map it.
    #[error("cannot map {bytes} bytes of guest memory")]
    Map {
        /// How much was asked for.
        bytes: u64,
        /// What the host said.
        #[source]
        source: vm_memory::mmap::FromRangesError,
    },
}

/// Makes guest RAM with the given regions (start, bytes).
///
/// # Errors
/// When the host has no room for it in the address space or refuses memory files.
pub fn create(regions: &[(Gpa, u64)]) -> Result<GuestRam, MemoryError> {
    let bytes = regions.iter().map(|(_, len)| len).sum();
    let create = |source: rustix::io::Errno| MemoryError::Create { bytes, source: source.into() };
    let fd = memfd_create("ring3-ram", MemfdFlags::CLOEXEC).map_err(create)?;
    ftruncate(&fd, bytes).map_err(create)?;
    let file = Arc::new(File::from(fd));
    let mut offset = 0;
    let ranges: Vec<_> = regions
        .iter()
        .map(|(start, len)| {
            let at = FileOffset::from_arc(Arc::clone(&file), offset);
            offset += len;
            (GuestAddress(start.0), *len as usize, Some(at))
        })
        .collect();
    GuestRam::from_ranges_with_files(&ranges).map_err(|source| MemoryError::Map { bytes, source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn regions_are_separate_and_zero() {
        let ram = create(&[(Gpa(0), 1 << 20), (Gpa(4 << 30), 1 << 20)]).unwrap();
        ram.write_obj(7u64, GuestAddress(0x1000)).unwrap();
        ram.write_obj(9u64, GuestAddress((4 << 30) + 0x1000)).unwrap();
        assert_eq!(ram.read_obj::<u64>(GuestAddress(0x1000)).unwrap(), 7);
        assert_eq!(ram.read_obj::<u64>(GuestAddress((4 << 30) + 0x1000)).unwrap(), 9);
        assert_eq!(ram.read_obj::<u64>(GuestAddress(0x2000)).unwrap(), 0);
        assert!(ram.read_obj::<u64>(GuestAddress(1 << 20)).is_err());
    }
}

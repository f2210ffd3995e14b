//! The guest's memory, as the front end shares it.

use std::fs::File;
use std::io;

use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::mmap::{GuestRegionMmap, MmapRegion};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestMemoryRegion};

/// Memory, and where the front end has it in its own process.
pub(super) struct Shared {
    pub(super) memory: GuestMemoryMmap,
    /// The front end's address, the guest's, and how many bytes.
    user: Vec<(u64, u64, u64)>,
}

impl Shared {
    /// Maps the regions.
    ///
    /// A file that is made shorter while it is mapped ends whoever reads beyond its end (`SIGBUS`, mmap(2)). Only the
    /// front end could do that, to the process that serves it; QEMU's memory back end `memfd` is sealed against it.
    pub(super) fn map(regions: &[VhostUserMemoryRegion], files: Vec<File>) -> io::Result<Self> {
        let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, what.to_owned());
        let mut mapped = Vec::new();
        let mut user = Vec::new();
        for (region, file) in regions.iter().zip(files) {
            let VhostUserMemoryRegion { guest_phys_addr: guest, memory_size: size, user_addr, mmap_offset } =
                *region;
            let length = usize::try_from(size).map_err(|_| bad("a region of memory is too long"))?;
            // syscalls(vhost-user): mmap munmap lseek
            let mapping = MmapRegion::from_file(FileOffset::new(file, mmap_offset), length)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error.to_string()))?;
            let region = GuestRegionMmap::new(mapping, GuestAddress(guest));
            mapped.push(region.ok_or_else(|| bad("a region of memory is beyond all addresses"))?);
            user.push((user_addr, guest, size));
        }
        mapped.sort_by_key(GuestMemoryRegion::start_addr);
        let memory = GuestMemoryMmap::from_regions(mapped)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error.to_string()))?;
        Ok(Self { memory, user })
    }

    /// Memory that no front end has.
    #[cfg(any(test, feature = "testing"))]
    pub(super) fn of(memory: GuestMemoryMmap) -> Self {
        Self { memory, user: Vec::new() }
    }

    /// The guest's address of what the front end has at `address`.
    pub(super) fn guest_address(&self, address: u64) -> Option<GuestAddress> {
        self.user.iter().find_map(|&(user, guest, size)| {
            let offset = address.checked_sub(user).filter(|&offset| offset < size)?;
            guest.checked_add(offset).map(GuestAddress)
        })
    }
}

//! Private memory of a child that is to be mapped for devices of the process that serves it.
//!
//! Only shared memory can be pinned there. So the child's private memory becomes shared with that process: its contents go to a
//! memory file, which is mapped where they were. To the program it is the same memory, but that its own children share it
//! from then on. The program must not write to memory in the moment in which it maps it: what other threads write
//! between the copy and the mapping is lost.

#![allow(unsafe_code, reason = "replacing the program's memory by memory with the same contents")]

use std::{
    os::fd::{AsRawFd, IntoRawFd},
    sync::Mutex,
};

use iommufd::{Errno, Result, process::UserAddr};
use rustix::fs::MemfdFlags;

use crate::{kept, real, user};

const IOMMU_IOAS_MAP: u32 = 0x3b85;
const VFIO_IOMMU_MAP_DMA: u32 = 0x3b71;
const PAGE: u64 = 4096;

/// Makes what `request` is about to map shared, if it maps memory. What cannot be is left to the server to refuse.
pub(super) fn before(request: u32, argument: UserAddr) {
    /// Where in the structures the address and the length are.
    const FIELDS: [(u32, u64); 2] = [(IOMMU_IOAS_MAP, 16), (VFIO_IOMMU_MAP_DMA, 8)];
    static ONE: Mutex<()> = Mutex::new(());
    let Some((_, at)) = FIELDS.into_iter().find(|(number, _)| *number == request) else { return };
    let (mut address, mut last) = ([0; 8], [0; 8]);
    // VFIO's structure has the address for the device between the two.
    let length_at = if request == IOMMU_IOAS_MAP { at + 8 } else { at + 16 };
    let fields = user::read(UserAddr(argument.0.wrapping_add(at)), &mut address)
        .and_then(|()| user::read(UserAddr(argument.0.wrapping_add(length_at)), &mut last));
    if fields.is_ok() {
        let _one = ONE.lock();
        let _ = share(u64::from_ne_bytes(address), u64::from_ne_bytes(last));
    }
}

fn share(start: u64, length: u64) -> Result<()> {
    let end =
        start.checked_add(length).and_then(|end| end.checked_next_multiple_of(PAGE)).ok_or(Errno::FAULT)?;
    let start = start - start % PAGE;
    let maps = std::fs::read_to_string("/proc/self/maps").map_err(|_| Errno::FAULT)?;
    // A mapping that grows while the file is read comes twice. Its first part is not private any more then.
    let mut done = start;
    for (from, to) in maps.lines().filter_map(private) {
        let (from, to) = (from.max(done), to.min(end));
        if from < to {
            replace(from, to - from)?;
            done = to;
        }
    }
    Ok(())
}

/// The range of a line of proc_pid_maps(5), when it is private memory that can be read and written, and no stack.
fn private(line: &str) -> Option<(u64, u64)> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let taken = words.next()?.starts_with("rw-p") && !line.ends_with("[stack]");
    let number = |text| u64::from_str_radix(text, 16).ok();
    taken.then_some((number(start)?, number(end)?))
}

/// Puts a memory file with the same contents in the place of private memory.
fn replace(start: u64, length: u64) -> Result<()> {
    let size = usize::try_from(length).map_err(|_| Errno::NOMEM)?;
    let file = rustix::fs::memfd_create(c"ring3-lent", MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&file, length)?;
    let mut done = 0_u64;
    while done < length {
        let at = (start + done) as usize as *const core::ffi::c_void;
        let rest = size - usize::try_from(done).map_err(|_| Errno::NOMEM)?;
        let offset = i64::try_from(done).map_err(|_| Errno::NOMEM)?;
        // SAFETY: needed to copy memory that may go away meanwhile: the kernel reads it, and says EFAULT.
        let some = unsafe { real::pwrite64()(file.as_raw_fd(), at, rest, offset) };
        done += u64::try_from(some).ok().filter(|some| *some > 0).ok_or(Errno::FAULT)?;
    }
    let flags = libc::MAP_SHARED | libc::MAP_FIXED;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let at = start as usize as *mut core::ffi::c_void;
    // SAFETY: needed to put the file where the memory is. It holds the same bytes with the same rights, so nothing changes for
    // who has pointers there; it is the program's memory, none of Rust's.
    let there = unsafe { real::mmap64()(at, size, prot, flags, file.as_raw_fd(), 0) };
    if there == libc::MAP_FAILED {
        return Err(Errno::NOMEM);
    }
    // The other process finds the file by this descriptor; it stays for as long as this process.
    let _kept = kept::for_ever(file).into_raw_fd();
    Ok(())
}

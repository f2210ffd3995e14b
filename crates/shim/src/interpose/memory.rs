//! `mmap` of what is served, and what else changes memory that devices may use.

use core::{
    ffi::{c_int, c_void},
    ptr,
    sync::atomic::{AtomicBool, Ordering},
};
use std::os::fd::AsRawFd;

use iommufd::Errno;
use libc::{off_t, size_t};

use super::answer_pointer;
use crate::{mapped, moving, node::Mappable, real, table};

/// Defines `mmap` under the names that it has.
macro_rules! mmap {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(
            at: *mut c_void,
            length: size_t,
            prot: c_int,
            flags: c_int,
            fd: c_int,
            offset: off_t,
        ) -> *mut c_void {
            let anonymous = flags & libc::MAP_ANONYMOUS != 0;
            let served = if anonymous { None } else { table::get_full(fd) };
            // SAFETY: the caller's arguments but for the file, for the function that it meant to call.
            let map = |fd, offset| unsafe { real::$name()(at, length, prot, flags, fd, offset) };
            if flags & libc::MAP_FIXED != 0 && moving::evacuate(at as usize, length).is_err() {
                return out_of_memory();
            }
            let Some(description) = served else {
                let result = map(fd, offset);
                if result != libc::MAP_FAILED {
                    mapped::replaced(result as usize, length);
                }
                return result;
            };
            answer_pointer(|| {
                let offset = u64::try_from(offset).map_err(|_| Errno::INVAL)?;
                let shared = flags & libc::MAP_TYPE != libc::MAP_PRIVATE;
                let mapping = match description.file.mmap(offset, length as u64, prot, shared)? {
                    Mappable::Pages(mapping) => mapping,
                    Mappable::Registers(device) => {
                        // Nothing is there, so that every access is caught.
                        let fixed = flags & (libc::MAP_FIXED | libc::MAP_FIXED_NOREPLACE);
                        let flags = fixed | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
                        // SAFETY: the caller's place and length, for a mapping of nothing.
                        let result = unsafe { real::$name()(at, length, libc::PROT_NONE, flags, -1, 0) };
                        if result == libc::MAP_FAILED {
                            return Err(Errno::from_raw_os_error(crate::errno::get()));
                        }
                        crate::registers::catch();
                        mapped::replaced(result as usize, length);
                        let held = crate::registers::Mapped { device, offset, base: result as usize };
                        mapped::insert(result as usize, length, std::sync::Arc::new(held));
                        return Ok(result);
                    }
                };
                let offset = off_t::try_from(mapping.offset).map_err(|_| Errno::OVERFLOW)?;
                let result = map(mapping.fd.as_raw_fd(), offset);
                if result == libc::MAP_FAILED {
                    return Err(Errno::from_raw_os_error(crate::errno::get()));
                }
                mapped::replaced(result as usize, length);
                mapped::insert(result as usize, length, mapping.guard);
                Ok(result)
            })
        }
    )*};
}

mmap!(mmap mmap64);

/// MAP_FAILED for want of memory.
fn out_of_memory() -> *mut c_void {
    crate::errno::set(libc::ENOMEM);
    libc::MAP_FAILED
}

#[unsafe(no_mangle)]
unsafe extern "C" fn munmap(at: *mut c_void, length: size_t) -> c_int {
    if moving::evacuate(at as usize, length).is_err() {
        crate::errno::set(libc::ENOMEM);
        return -1;
    }
    // SAFETY: the caller's arguments, for the function that it meant to call.
    let result = unsafe { real::munmap()(at, length) };
    if result == 0 {
        mapped::replaced(at as usize, length);
    }
    result
}

#[unsafe(no_mangle)]
unsafe extern "C" fn mremap(
    at: *mut c_void,
    old_length: size_t,
    new_length: size_t,
    flags: c_int,
    to: *mut c_void,
) -> *mut c_void {
    // As memory of a device.
    if new_length > old_length && mapped::any(at as usize, old_length) {
        crate::errno::set(libc::EFAULT);
        return libc::MAP_FAILED;
    }
    let fixed = flags & libc::MREMAP_FIXED != 0;
    let to = if fixed { to } else { ptr::null_mut() };
    let kept = old_length.min(new_length);
    let cut = moving::evacuate((at as usize).saturating_add(kept), old_length - kept);
    let covered = if fixed { moving::evacuate(to as usize, new_length) } else { Ok(()) };
    if cut.and(covered).is_err() {
        return out_of_memory();
    }
    // SAFETY: the caller's arguments, for the function that it meant to call.
    let remap = || unsafe { real::mremap()(at, old_length, new_length, flags, to) };
    let mut result = libc::MAP_FAILED;
    moving::carry(at as usize, kept, || {
        result = remap();
        (result != libc::MAP_FAILED).then_some(result as usize)
    });
    if result != libc::MAP_FAILED {
        mapped::moved(at as usize, old_length, result as usize, new_length);
    }
    result
}

#[unsafe(no_mangle)]
unsafe extern "C" fn madvise(at: *mut c_void, length: size_t, advice: c_int) -> c_int {
    if matches!(advice, libc::MADV_DONTNEED | libc::MADV_FREE | libc::MADV_REMOVE)
        && mapped::any(at as usize, length)
    {
        crate::errno::set(libc::EINVAL);
        return -1;
    }
    // Advice that throws private pages away; an empty mapping stays where they were.
    if matches!(advice, libc::MADV_DONTNEED | libc::MADV_FREE) {
        // If they cannot be moved they stay, which the advice allows.
        let _ = moving::evacuate_private(at as usize, length);
    }
    // SAFETY: the caller's arguments, for the function that it meant to call.
    unsafe { real::madvise()(at, length, advice) }
}

/// Pages that devices use are used by their addresses in this process: if the program took its own access away, it would take the
/// devices' away. So these stay as they are.
#[unsafe(no_mangle)]
unsafe extern "C" fn mprotect(at: *mut c_void, length: size_t, prot: c_int) -> c_int {
    const BOTH: c_int = libc::PROT_READ | libc::PROT_WRITE;
    static SAID: AtomicBool = AtomicBool::new(false);
    // SAFETY: a part of the caller's range, for the function that it meant to call.
    let protect = |from: usize, to: usize| unsafe { real::mprotect()(from as *mut c_void, to - from, prot) };
    let (mut from, end) = (at as usize, (at as usize).saturating_add(length));
    let aligned = from.is_multiple_of(4096);
    let kept = if prot & BOTH == BOTH || !aligned { Vec::new() } else { moving::in_use(from, length) };
    for (start, behind) in &kept {
        if from < *start {
            let result = protect(from, *start);
            if result != 0 {
                return result;
            }
        }
        from = *behind;
    }
    if !kept.is_empty() && !SAID.swap(true, Ordering::Relaxed) {
        crate::errno::preserved(|| {
            crate::complain(
                "mprotect: memory that is pinned for devices stays accessible to the program, too",
            );
        });
    }
    if kept.is_empty() || from < end { protect(from, end) } else { 0 }
}

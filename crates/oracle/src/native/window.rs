//! Memory at a fixed address, with a second view for writing.

use std::io;

/// Pages mapped twice: at the address that cases name, and elsewhere, always writable.
pub(super) struct Window {
    fixed: usize,
    view: *mut u8,
    size: usize,
}

impl Window {
    /// Maps `size` bytes at `address` with `protection`.
    pub(super) fn new(address: u64, size: u64, protection: libc::c_int) -> io::Result<Self> {
        let (fixed, size) = (address as usize, size as usize);
        // SAFETY: needed for memory with two views; the name is a C string.
        let fd = unsafe { libc::memfd_create(c"oracle".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let map = |at: usize, protection, flags| {
            // SAFETY: needed for memory at a fixed address; MAP_FIXED_NOREPLACE does not replace what the
            // process has there.
            let p = unsafe {
                libc::mmap(
                    at as *mut libc::c_void,
                    size,
                    protection,
                    libc::MAP_SHARED | libc::MAP_POPULATE | flags,
                    fd,
                    0,
                )
            };
            if p == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(p) }
        };
        let unmap = |p: *mut libc::c_void| {
            // SAFETY: needed to undo a mapping just made, which nothing uses yet.
            unsafe { libc::munmap(p, size) };
        };
        // SAFETY: needed to give the file its size; `fd` is open.
        let sized = if unsafe { libc::ftruncate(fd, size as libc::off_t) } == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        };
        let mapped = sized.and_then(|()| {
            let view = map(0, libc::PROT_READ | libc::PROT_WRITE, 0)?;
            match map(fixed, protection, libc::MAP_FIXED_NOREPLACE) {
                Ok(p) if p as usize == fixed => Ok(Self { fixed, view: view.cast(), size }),
                Ok(p) => {
                    // Kernels before 4.17 take the flag for a hint.
                    unmap(p);
                    unmap(view);
                    Err(io::Error::from_raw_os_error(libc::EEXIST))
                }
                Err(e) => {
                    unmap(view);
                    Err(e)
                }
            }
        });
        // SAFETY: needed to close the file, which the mappings keep; nothing else uses `fd`.
        unsafe { libc::close(fd) };
        mapped
    }

    /// Changes the protection of part of the fixed mapping.
    pub(super) fn protect(&self, offset: u64, len: u64, protection: libc::c_int) -> io::Result<()> {
        let (offset, len) = (offset as usize, len as usize);
        if offset.checked_add(len).is_none_or(|end| end > self.size) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        // SAFETY: needed for a page that only reads; the range lies in this window, which no reference
        // points into at its fixed address.
        let result = unsafe { libc::mprotect((self.fixed + offset) as *mut libc::c_void, len, protection) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// The contents.
    pub(super) fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: needed to reach the contents; the view is mapped as long as `self` lives, and cases that
        // change the memory behind the other view run only inside `enter`, an opaque call during which this
        // borrow cannot live.
        unsafe { std::slice::from_raw_parts_mut(self.view, self.size) }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: needed to free the addresses; both mappings are this window's own.
        unsafe {
            libc::munmap(self.fixed as *mut libc::c_void, self.size);
            libc::munmap(self.view.cast(), self.size);
        }
    }
}

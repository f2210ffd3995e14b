//! Descriptors that a caller names by number.
#![allow(unsafe_code, reason = "a number that may or may not be an open descriptor")]

use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::io::fcntl_dupfd_cloexec;

use crate::{Errno, Result};

/// A descriptor of its own for what `fd` is open on. EBADF when it is not open.
pub(super) fn duplicate(fd: i32) -> Result<OwnedFd> {
    if fd < 0 {
        return Err(Errno::BADF);
    }
    // SAFETY: needed because ioctls give descriptors as numbers. Sound because it is not -1, and duplicating it is all that is
    // done: of a number that is not open the kernel says so, and one that is closed meanwhile is duplicated or not.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    fcntl_dupfd_cloexec(borrowed, 3)
}

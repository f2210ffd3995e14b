//! A descriptor that polls readable while there is something to read.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};

use crate::Result;

/// An eventfd that counts 1 or 0.
#[derive(Debug)]
pub(crate) struct Readiness {
    fd: OwnedFd,
}

impl Readiness {
    /// One that is not ready.
    pub(crate) fn new() -> Result<Self> {
        Ok(Self { fd: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)? })
    }

    /// Changes it. The caller holds the lock of what it tells about, and knows that it was the other way round.
    pub(crate) fn set(&self, ready: bool) {
        let mut count = [0; 8];
        // Neither can fail: the count is 0 before the write, and 1 before the read.
        let _ = if ready {
            rustix::io::write(&self.fd, &1_u64.to_ne_bytes())
        } else {
            rustix::io::read(&self.fd, &mut count[..])
        };
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

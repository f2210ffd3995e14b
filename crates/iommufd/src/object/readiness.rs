//! A descriptor that polls readable while there is something to read.

use std::{
    io::IoSliceMut,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    event::{EventfdFlags, epoll, eventfd},
    io::{ReadWriteFlags, preadv2},
};

use crate::Result;

/// An eventfd that counts 1 or 0.
#[derive(Debug)]
pub(crate) struct Readiness {
    fd: OwnedFd,
    /// What polls readable with `fd`, but never writable: the eventfd always can be written to.
    read_only: Option<OwnedFd>,
}

impl Readiness {
    /// One that is not ready, for what can always be written to.
    pub(crate) fn new() -> Result<Self> {
        Ok(Self { fd: eventfd(0, EventfdFlags::CLOEXEC)?, read_only: None })
    }

    /// One that is not ready, for what can never be written to.
    pub(crate) fn new_read_only() -> Result<Self> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC)?;
        let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&poll, &fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
        Ok(Self { fd, read_only: Some(poll) })
    }

    /// Changes it. The caller holds the lock of what it tells about, and knows that it was the other way round.
    pub(crate) fn set(&self, ready: bool) {
        // Neither can fail: the count is 0 before the write, and 1 before the read. If the program has meddled with its
        // descriptor, nothing here waits for that.
        if ready {
            let _ = rustix::io::write(&self.fd, &1_u64.to_ne_bytes());
        } else {
            let mut count = [0; 8];
            let _ = preadv2(&self.fd, &mut [IoSliceMut::new(&mut count)], u64::MAX, ReadWriteFlags::NOWAIT);
        }
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.read_only.as_ref().unwrap_or(&self.fd).as_fd()
    }
}

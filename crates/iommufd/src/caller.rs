//! Who calls: the parts of a process beside its memory that the ioctls need.

use std::{os::fd::BorrowedFd, sync::Arc};

use crate::{Errno, Result, process::Process};

/// Takes bytes that were read: where they belong, and themselves.
pub type Deliver<'a> = &'a mut dyn FnMut(usize, &[u8]) -> Result<()>;

/// A [`Deliver`] to a buffer. EFAULT for what does not fit.
pub(crate) fn fill(buffer: &mut [u8]) -> impl FnMut(usize, &[u8]) -> Result<()> {
    |at, bytes| {
        let there = at.checked_add(bytes.len()).and_then(|end| buffer.get_mut(at..end));
        there.ok_or(Errno::FAULT)?.copy_from_slice(bytes);
        Ok(())
    }
}

/// What an ioctl gives out as a descriptor: a fault queue, an event queue, the mock's access.
pub trait File: Send + Sync {
    /// Reads whole records into `to`: how many bytes. EAGAIN when there is nothing.
    fn read(&self, to: &mut [u8]) -> Result<usize>;
    /// As [`Self::read`] with room for so many bytes, for who may not be able to take them: `to` is given bytes and where they
    /// belong, and records that it refuses stay to be read. If it refuses the first, that is the error.
    ///
    /// Without an implementation they are lost.
    fn read_to(&self, room: usize, to: Deliver<'_>) -> Result<usize> {
        let mut bytes = vec![0; room];
        let done = self.read(&mut bytes)?;
        to(0, bytes.get(..done).unwrap_or_default())?;
        Ok(done)
    }
    /// Writes whole records from `from`: how many bytes.
    fn write(&self, from: &[u8]) -> Result<usize>;
    /// A descriptor that polls readable exactly while [`Self::read`] would give something (an eventfd): what the program
    /// gets, so that `poll` and `epoll` need no help.
    fn readiness(&self) -> BorrowedFd<'_>;
    /// The concrete type behind it, for calls that take the descriptor back.
    fn as_any(self: Arc<Self>) -> Arc<dyn core::any::Any + Send + Sync>;
}

/// Privileges that change what an ioctl does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Capability {
    /// CAP_IPC_LOCK: no limit on pinned memory.
    IpcLock,
    /// CAP_SYS_RESOURCE: may change how pinned memory is counted.
    SysResource,
    /// CAP_SYS_RAWIO: devices without an IOMMU.
    SysRawio,
}

/// The caller of an ioctl.
pub trait Caller {
    /// Its memory.
    fn process(&self) -> &Arc<dyn Process>;
    /// Whether it has `capability`.
    fn capable(&self, capability: Capability) -> bool;
    /// Gives it a descriptor for `file`, closed on exec: its number. EMFILE when it has too many.
    fn install(&self, file: Arc<dyn File>) -> Result<i32>;
    /// Takes back descriptor `fd` that [`Self::install`] has just given it, because the program does not get to know it.
    fn uninstall(&self, fd: i32) {
        let _ = fd;
    }
    /// What [`Self::install`] gave descriptor `fd`. EBADF when it is something else.
    fn installed(&self, fd: i32) -> Result<Arc<dyn File>>;
}

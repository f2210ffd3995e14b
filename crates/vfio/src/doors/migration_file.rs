//! The descriptor by which a device's state is read and written.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use iommufd::{caller::File, process::UserAddr};
use rustix::event::{EventfdFlags, eventfd};
use uapi::vfio::{VFIO_MIG_GET_PRECOPY_INFO, vfio_precopy_info};

use super::structure;
use crate::{Errno, Result, migration::MigrationStream};

/// An open stream of a device's state.
pub struct MigrationFile {
    stream: Arc<dyn MigrationStream>,
    /// Always readable and writable, as a file is.
    readiness: OwnedFd,
}

impl MigrationFile {
    pub(super) fn new(stream: Arc<dyn MigrationStream>) -> Result<Arc<Self>> {
        Ok(Arc::new(Self { stream, readiness: eventfd(1, EventfdFlags::CLOEXEC)? }))
    }

    /// `ioctl` on the descriptor. It has one: `VFIO_MIG_GET_PRECOPY_INFO`.
    ///
    /// # Errors
    /// ENOTTY for others; EFAULT, EINVAL; what the stream says.
    pub fn ioctl(&self, caller: &dyn iommufd::caller::Caller, cmd: u32, arg: UserAddr) -> Result<i32> {
        if cmd != VFIO_MIG_GET_PRECOPY_INFO {
            return Err(Errno::NOTTY);
        }
        let process = &**caller.process();
        let mut info: vfio_precopy_info = structure::get(process, arg, size_of::<vfio_precopy_info>())?;
        let left = self.stream.precopy_info()?;
        info.flags = 0;
        info.initial_bytes = left.initial_bytes;
        info.dirty_bytes = left.dirty_bytes;
        structure::put(process, arg, &info, info.argsz)?;
        Ok(0)
    }
}

impl File for MigrationFile {
    fn read(&self, to: &mut [u8]) -> Result<usize> {
        self.stream.read(to)
    }

    fn write(&self, from: &[u8]) -> Result<usize> {
        self.stream.write(from)
    }

    fn readiness(&self) -> BorrowedFd<'_> {
        self.readiness.as_fd()
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn std::any::Any + Send + Sync> {
        self
    }
}

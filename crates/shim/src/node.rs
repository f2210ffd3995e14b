//! What the library serves: device nodes, and the files that opening them gives.

use std::{any::Any, os::fd::OwnedFd, sync::Arc};

use crate::share::Link;
use iommufd::{Errno, Result, caller::Deliver, process::UserAddr};
use vfio::doors::{Caller, DeviceFile, Opened as VfioOpened};

/// Transfers up to this size need no allocation.
const SMALL: usize = 256;

/// Work with a buffer of `count` bytes.
pub(crate) fn with_buffer<T>(count: usize, work: impl FnOnce(&mut [u8]) -> Result<T>) -> Result<T> {
    let mut small = [0; SMALL];
    match small.get_mut(..count) {
        Some(buffer) => work(buffer),
        None => work(&mut vec![0; count]),
    }
}

/// A path that can be opened.
pub(crate) trait Node: Send + Sync {
    /// Opens it with `flags` (`O_*`).
    fn open(&self, flags: i32) -> Result<Opened>;

    /// What `stat` tells of it.
    fn metadata(&self) -> Metadata;
}

/// What opening gives.
pub(crate) enum Opened {
    /// A file that this library serves.
    Served(Arc<dyn ServedFile>),
    /// An ordinary file.
    Plain(OwnedFd),
}

/// What `stat` tells of a node, as far as programs look.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Metadata {
    /// `st_mode`.
    pub mode: u32,
    /// `st_rdev`: major and minor number.
    pub rdev: (u32, u32),
}

/// What of a served file can be mapped.
pub(crate) enum Mappable {
    /// Memory.
    Pages(Mapping),
    /// Registers of this device, whose file has them at the offset that was asked for: each access is to be caught.
    Registers(Arc<DeviceFile>),
}

/// Pages of a served file, ready for the real mmap. The guard lives as long as any part stays mapped.
pub(crate) struct Mapping {
    /// What to map.
    pub fd: OwnedFd,
    /// From where in it.
    pub offset: u64,
    /// What the mapping holds.
    pub guard: Arc<dyn Any + Send + Sync>,
}

/// An open file that this library serves. The defaults are what Linux answers for a device without the operation.
pub(crate) trait ServedFile: Send + Sync {
    /// `ioctl`. ENOTTY for a request that it does not have.
    fn ioctl(&self, caller: &dyn Caller, request: u32, argument: UserAddr) -> Result<i32>;

    /// `read`.
    fn read(&self, to: &mut [u8]) -> Result<usize> {
        let _ = to;
        Err(Errno::INVAL)
    }

    /// As `read` with room for so many bytes at `to`, where the program may have no memory: what it does not take stays to be read,
    /// where the file can keep it. `deliver` puts bytes there, so far from `to`.
    fn read_to(&self, to: UserAddr, room: usize, deliver: Deliver<'_>) -> Result<usize> {
        let _ = to;
        with_buffer(room, |buffer| {
            let done = self.read(buffer)?;
            deliver(0, buffer.get(..done).ok_or(Errno::IO)?)?;
            Ok(done)
        })
    }

    /// `write`.
    fn write(&self, from: &[u8]) -> Result<usize> {
        let _ = from;
        Err(Errno::INVAL)
    }

    /// `pread` at `offset`.
    fn read_at(&self, offset: u64, to: &mut [u8]) -> Result<usize> {
        let _ = (offset, to);
        Err(Errno::SPIPE)
    }

    /// `pwrite` at `offset`.
    fn write_at(&self, offset: u64, from: &[u8]) -> Result<usize> {
        let _ = (offset, from);
        Err(Errno::SPIPE)
    }

    /// `mmap` of `length` bytes at `offset` with `PROT_*`, shared or private.
    fn mmap(&self, offset: u64, length: u64, prot: i32, shared: bool) -> Result<Mappable> {
        let _ = (offset, length, prot, shared);
        Err(Errno::NODEV)
    }

    /// `lseek`.
    fn seek(&self, offset: i64, whence: i32) -> Result<u64> {
        let _ = (offset, whence);
        Err(Errno::SPIPE)
    }

    /// Whether it is a file, not a device: truncating and syncing it do nothing.
    fn is_regular(&self) -> bool {
        false
    }

    /// What `fstat` tells of it; none for what `fstat` tells of its stand-in.
    fn metadata(&self) -> Option<Metadata> {
        None
    }

    /// What `iommufd` or `vfio` gave for this descriptor, when they take it back from the program.
    fn given(&self) -> Option<Arc<dyn iommufd::caller::File>> {
        None
    }

    /// What VFIO takes it for.
    fn opened(&self) -> VfioOpened {
        VfioOpened::Other
    }

    /// A new file of the node that it was opened by; none for what has no node.
    fn reopen(&self) -> Option<Result<Opened>> {
        None
    }

    /// The connection to the process that serves it, when that is another one, and its number there.
    fn shared(&self) -> Option<(Arc<Link>, u64)> {
        None
    }
}

//! How a device reaches memory.

use core::fmt;
use std::{os::fd::BorrowedFd, sync::Arc};

use iommufd::{
    Errno,
    domain::Prot,
    iova::{Iova, IovaRange},
};

/// Why a device's access to memory failed. A device reports it in its own way (a status, an error interrupt).
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DmaFault {
    /// Nothing is mapped there, or the device is attached to nothing.
    #[error("{0:?} is not mapped")]
    Unmapped(Iova),
    /// The mapping does not allow the access.
    #[error("the mapping of {0:?} forbids the access")]
    Forbidden(Iova),
    /// The range goes past the last address.
    #[error("an access at {0:?} goes past the last address")]
    Overflow(Iova),
    /// The function may not start accesses: it is not bus master, or is being closed.
    #[error("the device may not access memory now")]
    Disabled,
    /// Who holds the memory did not answer, or said that it failed.
    #[error("the memory did not answer: {0}")]
    Remote(Errno),
    /// The file of [`Dma::fill`] or [`Dma::drain`] failed; memory did not.
    #[error("the file failed: {0}")]
    File(Errno),
}

/// A device's access to memory, by I/O virtual addresses. It may be used from several threads at once.
///
/// A call copies: it holds on to no memory when it returns, and whatever is unmapped meanwhile waits for the call. An
/// access that fails may have been done in part, up to the address of the fault.
pub trait Dma: Send + Sync + fmt::Debug {
    /// Reads memory at `iova` into `to`.
    ///
    /// # Errors
    /// What memory says.
    fn read(&self, iova: Iova, to: &mut [u8]) -> Result<(), DmaFault>;

    /// Writes `from` to memory at `iova`.
    ///
    /// # Errors
    /// What memory says.
    fn write(&self, iova: Iova, from: &[u8]) -> Result<(), DmaFault>;

    /// Whether all of `range` is mapped for `access`: what an address translation request (PCIe 10.1) asks. Memory may be
    /// unmapped right after it.
    ///
    /// # Errors
    /// The fault that the first address that is not would give.
    fn translate(&self, range: IovaRange, access: Prot) -> Result<(), DmaFault>;

    /// The same memory as a process address space of the device reaches it; none when the device has no PASIDs here.
    fn pasid(&self, pasid: u32) -> Option<Arc<dyn Dma>> {
        let _ = pasid;
        None
    }

    /// Reads `length` bytes from `at` of `file` into memory at `iova`. What lies past the end of the file is zero.
    ///
    /// An implementation that has the memory mapped reads straight into it.
    ///
    /// # Errors
    /// What memory says, or [`DmaFault::File`].
    fn fill(&self, iova: Iova, length: u64, file: BorrowedFd<'_>, at: u64) -> Result<(), DmaFault> {
        bounce::fill(self, iova, length, file, at)
    }

    /// Writes `length` bytes of memory at `iova` to `at` of `file`.
    ///
    /// # Errors
    /// What memory says, or [`DmaFault::File`].
    fn drain(&self, iova: Iova, length: u64, file: BorrowedFd<'_>, at: u64) -> Result<(), DmaFault> {
        bounce::drain(self, iova, length, file, at)
    }
}

/// `offset` bytes after `iova`.
///
/// # Errors
/// [`DmaFault::Overflow`].
pub fn after(iova: Iova, offset: u64) -> Result<Iova, DmaFault> {
    iova.0.checked_add(offset).map(Iova).ok_or(DmaFault::Overflow(iova))
}

/// The memory of a device that is closed, or that nobody has attached to anything: every access faults.
#[derive(Clone, Copy, Default, Debug)]
pub struct NoDma;

impl Dma for NoDma {
    fn read(&self, iova: Iova, _to: &mut [u8]) -> Result<(), DmaFault> {
        Err(DmaFault::Unmapped(iova))
    }

    fn write(&self, iova: Iova, _from: &[u8]) -> Result<(), DmaFault> {
        Err(DmaFault::Unmapped(iova))
    }

    fn translate(&self, range: IovaRange, _access: Prot) -> Result<(), DmaFault> {
        Err(DmaFault::Unmapped(range.start()))
    }
}

/// Between a file and memory that is only reached by copying.
mod bounce {
    use rustix::io::{pread, pwrite};

    use super::{BorrowedFd, Dma, DmaFault, Errno, Iova, after};

    /// Large enough that a call into memory costs little beside the copy.
    const CHUNK: usize = 64 << 10;

    pub(super) fn fill<D: Dma + ?Sized>(
        dma: &D,
        iova: Iova,
        length: u64,
        file: BorrowedFd<'_>,
        at: u64,
    ) -> Result<(), DmaFault> {
        each_chunk(iova, length, at, |iova, place, chunk| {
            let mut filled = 0;
            while let rest = chunk.get_mut(filled..).unwrap_or_default()
                && !rest.is_empty()
            {
                match pread(file, &mut *rest, place.saturating_add(filled as u64)) {
                    Ok(0) => {
                        rest.fill(0);
                        break;
                    }
                    Ok(count) => filled += count,
                    Err(Errno::INTR) => {}
                    Err(errno) => return Err(DmaFault::File(errno)),
                }
            }
            dma.write(iova, chunk)
        })
    }

    pub(super) fn drain<D: Dma + ?Sized>(
        dma: &D,
        iova: Iova,
        length: u64,
        file: BorrowedFd<'_>,
        at: u64,
    ) -> Result<(), DmaFault> {
        each_chunk(iova, length, at, |iova, place, chunk| {
            dma.read(iova, chunk)?;
            let mut written = 0;
            while let rest = chunk.get(written..).unwrap_or_default()
                && !rest.is_empty()
            {
                match pwrite(file, rest, place.saturating_add(written as u64)) {
                    Ok(0) => return Err(DmaFault::File(Errno::IO)),
                    Ok(count) => written += count,
                    Err(Errno::INTR) => {}
                    Err(errno) => return Err(DmaFault::File(errno)),
                }
            }
            Ok(())
        })
    }

    /// Calls `copy` for one buffer after the other, with its place in memory and in the file.
    fn each_chunk(
        iova: Iova,
        length: u64,
        at: u64,
        mut copy: impl FnMut(Iova, u64, &mut [u8]) -> Result<(), DmaFault>,
    ) -> Result<(), DmaFault> {
        let mut buffer = vec![0; chunk(length)];
        let mut done = 0;
        while done < length {
            let take = chunk(length - done).min(buffer.len());
            let place = at.checked_add(done).ok_or(DmaFault::File(Errno::OVERFLOW))?;
            copy(after(iova, done)?, place, buffer.get_mut(..take).unwrap_or_default())?;
            done += take as u64;
        }
        Ok(())
    }

    fn chunk(length: u64) -> usize {
        usize::try_from(length).unwrap_or(CHUNK).min(CHUNK)
    }
}

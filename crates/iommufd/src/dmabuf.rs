//! Memory that its owner shares, and may take back: a dma-buf (Documentation/driver-api/dma-buf.rst), as far as
//! `IOMMU_IOAS_MAP_FILE` takes it.

use core::{any::Any, fmt};
use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use crate::{Errno, Result, caller::File, memory::Memory, pages::Pages};

#[derive(Debug, Default)]
struct State {
    revoked: bool,
    /// What was mapped of it, and not revoked since.
    pages: Vec<Weak<Pages>>,
}

/// Memory that programs can map into an IOAS by its descriptor.
pub struct DmaBuf {
    file: OwnedFd,
    memory: Arc<dyn Memory>,
    length: u64,
    state: Mutex<State>,
}

impl fmt::Debug for DmaBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DmaBuf")
            .field("length", &self.length)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

impl DmaBuf {
    /// `length` bytes of `memory`. `file` is what programs get for it. EINVAL when the length is 0.
    pub fn new(file: OwnedFd, memory: Arc<dyn Memory>, length: u64) -> Result<Arc<Self>> {
        if length == 0 {
            return Err(Errno::INVAL);
        }
        Ok(Arc::new(Self { file, memory, length, state: Mutex::default() }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `length` bytes of it from byte `start` on, to be mapped. EINVAL when it does not have them, ENODEV while it is
    /// revoked.
    pub fn pages(&self, start: u64, length: u64, writable: bool) -> Result<Arc<Pages>> {
        let end = start.checked_add(length).ok_or(Errno::OVERFLOW)?;
        if length == 0 || end > self.length {
            return Err(Errno::INVAL);
        }
        let mut state = self.lock();
        if state.revoked {
            return Err(Errno::NODEV);
        }
        let pages = Pages::exported(Box::new(self.memory.clone()), start, length, writable)?;
        state.pages.retain(|pages| pages.strong_count() > 0);
        state.pages.push(Arc::downgrade(&pages));
        Ok(pages)
    }

    /// Takes the memory back: no device reaches it when this returns, and nothing new can be mapped of it. What is mapped
    /// stays mapped, with nothing behind it, also after [`Self::restore`].
    pub fn revoke(&self) {
        let pages = {
            let mut state = self.lock();
            state.revoked = true;
            core::mem::take(&mut state.pages)
        };
        pages.iter().filter_map(Weak::upgrade).for_each(|pages| pages.revoke());
    }

    /// From now on it can be mapped again.
    pub fn restore(&self) {
        self.lock().revoked = false;
    }
}

impl File for DmaBuf {
    fn read(&self, _to: &mut [u8]) -> Result<usize> {
        Err(Errno::INVAL)
    }

    fn write(&self, _from: &[u8]) -> Result<usize> {
        Err(Errno::INVAL)
    }

    fn readiness(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

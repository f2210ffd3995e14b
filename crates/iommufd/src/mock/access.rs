//! The mock's accesses: a driver without page tables, by a descriptor. It keeps what it has pinned in numbered items.

use core::any::Any;
use std::{
    collections::BTreeMap,
    os::fd::BorrowedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use crate::{
    Access, Context, Errno, Result,
    caller::{Caller, File},
    inject,
    ioas::{AccessOps, Pinned},
    iova::{Iova, IovaRange, PAGE_SIZE},
    object::readiness::Readiness,
    process::UserAddr,
};

/// How much one call copies or pins: so that a program's number does not decide how much memory it takes.
const LIMIT: u64 = 16 << 20;

/// What is pinned.
#[derive(Debug)]
struct Item {
    range: IovaRange,
    _pinned: Pinned,
}

/// The items of an access by their ids.
#[derive(Debug, Default)]
struct Items {
    items: Mutex<(u32, BTreeMap<u32, Item>)>,
}

impl Items {
    fn lock(&self) -> MutexGuard<'_, (u32, BTreeMap<u32, Item>)> {
        self.items.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AccessOps for Items {
    fn unmap(&self, range: IovaRange) {
        let gone: Vec<_> =
            self.lock().1.extract_if(.., |_, item| item.range.intersection(range).is_some()).collect();
        drop(gone);
    }
}

/// An access's file.
#[derive(Debug)]
pub(super) struct AccessFile {
    // Before the items: dropping it lets go of them.
    access: Access,
    pins: bool,
    items: Arc<Items>,
    readiness: Readiness,
}

impl AccessFile {
    /// One that is attached to `ioas`; it pins if `pins`.
    pub(super) fn new(context: &Arc<Context>, ioas: u32, pins: bool) -> Result<Arc<Self>> {
        inject::check()?;
        let items = Arc::<Items>::default();
        let weak: Weak<Items> = Arc::downgrade(&items);
        let access = context.create_access(pins.then_some(weak as Weak<dyn AccessOps>))?;
        access.attach(ioas)?;
        Ok(Arc::new(Self { access, pins, items, readiness: Readiness::new()? }))
    }

    /// The access behind descriptor `fd`. EBADFD when it is something else.
    pub(super) fn of(caller: &dyn Caller, fd: u32) -> Result<Arc<Self>> {
        let fd = i32::try_from(fd).map_err(|_| Errno::BADFD)?;
        let file = caller.installed(fd).map_err(|_| Errno::BADFD)?;
        file.as_any().downcast().map_err(|_| Errno::BADFD)
    }

    pub(super) fn replace(&self, ioas: u32) -> Result<()> {
        self.access.replace(ioas)
    }

    /// ENOMEM when it is more than one call may ask for.
    pub(super) fn bounded(length: u64) -> Result<usize> {
        usize::try_from(length).ok().filter(|_| length <= LIMIT).ok_or(Errno::NOMEM)
    }

    /// Pins what is mapped at `iova`, which must be what the process has at `user`: the id of the item. EBADE when it is
    /// other memory, EOPNOTSUPP when the access was made without pins.
    pub(super) fn pin(
        &self,
        caller: &dyn Caller,
        iova: Iova,
        length: u64,
        user: UserAddr,
        write: bool,
    ) -> Result<u32> {
        inject::check()?;
        if !self.pins {
            return Err(Errno::OPNOTSUPP);
        }
        let pinned = self.access.pin(iova, length, write)?;
        let process = caller.process();
        let mut at = UserAddr(user.0 & !(PAGE_SIZE - 1));
        for run in pinned.runs() {
            for page in 0..run.pages {
                let host = crate::domain::HostAddr(run.start.0 + page * PAGE_SIZE);
                if process.page_id(at)? != process.host_page_id(host)? {
                    return Err(Errno::BADE);
                }
                at = UserAddr(at.0.checked_add(PAGE_SIZE).ok_or(Errno::FAULT)?);
            }
        }
        let mut items = self.items.lock();
        items.0 = items.0.checked_add(1).ok_or(Errno::NOSPC)?;
        let id = items.0;
        items.1.insert(id, Item { range: IovaRange::with_length(iova, length)?, _pinned: pinned });
        Ok(id)
    }

    /// Unpins an item. ENOENT when there is none.
    pub(super) fn unpin(&self, id: u32) -> Result<()> {
        let item = self.items.lock().1.remove(&id);
        item.map(drop).ok_or(Errno::NOENT)
    }

    /// Copies between `iova` and the process.
    pub(super) fn copy(
        &self,
        caller: &dyn Caller,
        iova: Iova,
        length: usize,
        user: UserAddr,
        write: bool,
    ) -> Result<()> {
        inject::check()?;
        IovaRange::with_length(iova, length as u64)?;
        let mut bytes = vec![0; length];
        if write {
            caller.process().read(user, &mut bytes)?;
            self.access.write(iova, &bytes)
        } else {
            self.access.read(iova, &mut bytes)?;
            caller.process().write(user, &bytes)
        }
    }
}

impl File for AccessFile {
    fn read(&self, _to: &mut [u8]) -> Result<usize> {
        Err(Errno::INVAL)
    }

    fn write(&self, _from: &[u8]) -> Result<usize> {
        Err(Errno::INVAL)
    }

    fn readiness(&self) -> BorrowedFd<'_> {
        self.readiness.fd()
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

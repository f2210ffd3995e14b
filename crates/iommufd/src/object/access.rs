//! ACCESS: memory of an IOAS for who has no page table of its own, as the drivers of mediated devices.

use core::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::{
    ioas::IoasObject,
    table::{Table, Use},
};
use crate::{
    Context, Errno, Result, inject,
    ioas::{AccessId, AccessOps, Pinned},
    iova::{Iova, IovaRange, PAGE_SIZE},
};

/// What an access is attached to.
#[derive(Debug)]
struct Attached {
    ioas: Use<IoasObject>,
    id: AccessId,
}

/// An access.
pub(crate) struct AccessObject {
    /// None when it never pins.
    ops: Option<Weak<dyn AccessOps>>,
    attached: Mutex<Option<Attached>>,
}

impl fmt::Debug for AccessObject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AccessObject").field("attached", &self.attached).finish_non_exhaustive()
    }
}

/// Nobody: an access that never pins has nothing to let go.
struct Nobody;

impl AccessOps for Nobody {
    fn unmap(&self, _range: IovaRange) {}
}

impl AccessObject {
    fn lock(&self) -> MutexGuard<'_, Option<Attached>> {
        self.attached.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn register(&self, ioas: Use<IoasObject>) -> Result<Attached> {
        let id = match &self.ops {
            Some(ops) => ioas.space.add_access(ops.clone(), PAGE_SIZE),
            None => ioas.space.add_access(Weak::<Nobody>::new(), 1),
        }?;
        Ok(Attached { ioas, id })
    }

    /// Ends what it was attached to: the owner lets go of everything first.
    fn leave(&self, attached: Attached) {
        if let Some(ops) = self.ops.as_ref().and_then(Weak::upgrade) {
            ops.unmap(IovaRange::ALL);
        }
        attached.ioas.space.remove_access(attached.id);
    }

    /// The IOAS that it is attached to now. ENOENT when there is none.
    fn ioas(&self) -> Result<Use<IoasObject>> {
        self.lock().as_ref().map(|attached| attached.ioas.clone()).ok_or(Errno::NOENT)
    }
}

/// An access ([`Context::create_access`]): pins and copies memory of an IOAS. Dropping it detaches it.
pub struct Access {
    /// None while it is dropped.
    object: Option<Use<AccessObject>>,
    table: Arc<Table>,
    _context: Arc<Context>,
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Access").field(&self.object).finish()
    }
}

impl Access {
    fn object(&self) -> Result<&Arc<AccessObject>> {
        self.object.as_ref().map(Use::as_arc).ok_or(Errno::NODEV)
    }

    /// Its object id.
    pub fn id(&self) -> u32 {
        self.object.as_ref().map_or(0, Use::id)
    }

    /// Attaches it to an IOAS. ENOENT when there is no such, EINVAL when it is attached already, EADDRINUSE when something is
    /// mapped there that is not aligned to pages and it pins.
    pub fn attach(&self, ioas: u32) -> Result<()> {
        inject::check()?;
        let object = self.object()?;
        let ioas = self.table.get::<IoasObject>(ioas)?;
        let mut attached = object.lock();
        if attached.is_some() {
            return Err(Errno::INVAL);
        }
        *attached = Some(object.register(ioas.hold())?);
        Ok(())
    }

    /// Attaches it to another IOAS instead: its owner is told to let go of all it has pinned ([`AccessOps::unmap`]). As
    /// [`Self::attach`]; and ENOENT when it is not attached.
    pub fn replace(&self, ioas: u32) -> Result<()> {
        inject::check()?;
        let object = self.object()?;
        let ioas = self.table.get::<IoasObject>(ioas)?;
        let before = {
            let mut attached = object.lock();
            let Some(before) = attached.as_ref() else { return Err(Errno::NOENT) };
            if Arc::ptr_eq(before.ioas.as_arc(), ioas.as_arc()) {
                return Ok(());
            }
            attached.replace(object.register(ioas.hold())?)
        };
        if let Some(before) = before {
            object.leave(before);
        }
        Ok(())
    }

    /// Attaches it to nothing: its owner is told to let go of all it has pinned.
    pub fn detach(&self) {
        if let Ok(object) = self.object() {
            let before = object.lock().take();
            if let Some(before) = before {
                object.leave(before);
            }
        }
    }

    /// Pins the pages of `length` bytes at `iova`. EINVAL when the access was made without [`AccessOps`], ENOENT when it is
    /// attached to nothing, and whatever [`Ioas::pin`](crate::ioas::Ioas::pin) says.
    pub fn pin(&self, iova: Iova, length: u64, write: bool) -> Result<Pinned> {
        let object = self.object()?;
        if object.ops.is_none() || length == 0 {
            return Err(Errno::INVAL);
        }
        IovaRange::with_length(iova, length)?;
        object.ioas()?.space.pin(iova, length, write, false)
    }

    /// Copies from the memory at `iova`. ENOENT when the access is attached to nothing, or at a hole; EPERM, EFAULT.
    pub fn read(&self, iova: Iova, to: &mut [u8]) -> Result<()> {
        self.object()?.ioas()?.space.read(iova, to)
    }

    /// Copies to the memory at `iova`. As [`Self::read`].
    pub fn write(&self, iova: Iova, from: &[u8]) -> Result<()> {
        self.object()?.ioas()?.space.write(iova, from)
    }
}

impl Drop for Access {
    fn drop(&mut self) {
        self.detach();
        if let Some(usage) = self.object.take() {
            self.table.destroy_owned(usage);
        }
    }
}

impl Context {
    /// An access. `ops` is its owner, who is told what is unmapped; without, the access copies only and pins nothing.
    pub fn create_access(self: &Arc<Self>, ops: Option<Weak<dyn AccessOps>>) -> Result<Access> {
        inject::check()?;
        let reservation = self.table().reserve()?;
        let object = Arc::new(AccessObject { ops, attached: Mutex::default() });
        let object = Some(reservation.finish_used(object));
        Ok(Access { object, table: self.table().clone(), _context: self.clone() })
    }
}

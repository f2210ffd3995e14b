//! Who calls: the parts of a process beside its memory that the ioctls need.

use std::{
    os::fd::{BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError, Weak},
};

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::{
    Errno, Result,
    account::Usage,
    domain::HostAddr,
    hostmem::PinnedPages,
    process::{PageId, PinObserver, Process, UserAddr},
    user_data::UserData,
};

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

/// A caller that is no program: a monitor that passes one structure of a driver's own, and reads what comes back. Its memory is
/// that structure, at an address that is nobody's; it has nothing to pin, no privileges and no descriptors.
#[derive(Debug)]
pub struct LibraryCaller {
    process: Arc<dyn Process>,
    memory: Arc<Argument>,
}

impl LibraryCaller {
    /// One that passes `data`.
    pub fn new<T: IntoBytes + Immutable>(data: &T) -> Self {
        let memory =
            Arc::new(Argument { bytes: Mutex::new(data.as_bytes().to_vec()), usage: Usage::default() });
        Self { process: memory.clone(), memory }
    }

    /// What it passes, as data of the type `kind`.
    pub fn data(&self, kind: u32) -> UserData {
        let length = u32::try_from(self.memory.lock().len()).unwrap_or(u32::MAX);
        UserData { kind, addr: ARGUMENT, length }
    }

    /// What is there now. None when it is not as long as `T`.
    pub fn value<T: FromBytes>(&self) -> Option<T> {
        T::read_from_bytes(&self.memory.lock()).ok()
    }
}

impl Caller for LibraryCaller {
    fn process(&self) -> &Arc<dyn Process> {
        &self.process
    }

    fn capable(&self, _capability: Capability) -> bool {
        false
    }

    /// EMFILE, always.
    fn install(&self, _file: Arc<dyn File>) -> Result<i32> {
        Err(Errno::MFILE)
    }

    /// EBADF, always.
    fn installed(&self, _fd: i32) -> Result<Arc<dyn File>> {
        Err(Errno::BADF)
    }
}

/// Where a [`LibraryCaller`]'s argument is.
const ARGUMENT: UserAddr = UserAddr(0x1000);

/// Memory that is one structure.
#[derive(Debug)]
struct Argument {
    bytes: Mutex<Vec<u8>>,
    usage: Usage,
}

impl Argument {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bytes that `length` bytes at `at` are. EFAULT outside.
    fn place(at: UserAddr, length: usize) -> Result<core::ops::Range<usize>> {
        let start = at.0.checked_sub(ARGUMENT.0).and_then(|start| usize::try_from(start).ok());
        let start = start.ok_or(Errno::FAULT)?;
        Ok(start..start.checked_add(length).ok_or(Errno::FAULT)?)
    }
}

impl Process for Argument {
    fn read(&self, from: UserAddr, to: &mut [u8]) -> Result<()> {
        let place = Self::place(from, to.len())?;
        to.copy_from_slice(self.lock().get(place).ok_or(Errno::FAULT)?);
        Ok(())
    }

    fn write(&self, to: UserAddr, from: &[u8]) -> Result<()> {
        let place = Self::place(to, from.len())?;
        self.lock().get_mut(place).ok_or(Errno::FAULT)?.copy_from_slice(from);
        Ok(())
    }

    fn pin(
        &self,
        _start: UserAddr,
        _pages: u64,
        _writable: bool,
        _observer: Weak<dyn PinObserver>,
    ) -> Result<Box<dyn PinnedPages>> {
        Err(Errno::FAULT)
    }

    fn page_id(&self, _at: UserAddr) -> Result<PageId> {
        Err(Errno::FAULT)
    }

    fn host_page_id(&self, _at: HostAddr) -> Result<PageId> {
        Err(Errno::FAULT)
    }

    fn pin_count(&self, _at: UserAddr) -> Result<u64> {
        Err(Errno::FAULT)
    }

    fn usage(&self) -> &Usage {
        &self.usage
    }

    fn locked_limit(&self) -> Option<u64> {
        Some(0)
    }

    fn user(&self) -> u32 {
        u32::MAX
    }

    fn is(&self, other: &Arc<dyn Process>) -> bool {
        core::ptr::eq(Arc::as_ptr(other).cast::<()>(), core::ptr::from_ref(self).cast())
    }

    fn file(&self, _fd: i32) -> Result<OwnedFd> {
        Err(Errno::BADF)
    }
}

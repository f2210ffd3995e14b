//! A program to test with: its memory is a file, and its descriptors are a list, so that no address and no number that it
//! makes up means anything in this process. The bodies of the fuzz targets are here too.

mod fuzz;
mod vtd;

use std::{
    collections::BTreeMap,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use rustix::fs::{MemfdFlags, fstat, ftruncate, memfd_create};
use zerocopy::{FromBytes, Immutable, IntoBytes};

pub use fuzz::run_ioctls;
pub use vtd::run_vtd;

use crate::{
    Context, Errno, Result,
    account::Usage,
    caller::{Caller, Capability, File},
    domain::HostAddr,
    hostmem::PinnedPages,
    iova::PAGE_SIZE,
    memory::{FileMemory, Memory},
    process::{
        PageId, PinObserver, Process, UserAddr,
        local::{maps, pins},
    },
};

/// Where the program's memory begins.
pub const MEMORY: u64 = 0x10_0000;
/// How long it is.
pub const LENGTH: u64 = 64 * PAGE_SIZE;
/// The last page of it: where ioctls' structures are put.
pub const ARGUMENTS: UserAddr = UserAddr(MEMORY + LENGTH - PAGE_SIZE);
/// The descriptor by which it has its memory as a file.
pub const MEMORY_FD: i32 = 3;

/// The program's address space.
#[derive(Debug)]
pub struct Arena {
    file: OwnedFd,
    memory: FileMemory,
    usage: Usage,
}

impl Arena {
    fn new() -> Result<Self> {
        let file = memfd_create("program", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, LENGTH)?;
        let memory = FileMemory::new(&file, 0, LENGTH, true)?;
        Ok(Self { file, memory, usage: Usage::default() })
    }

    /// Which byte of the file `length` bytes at `at` begin at. EFAULT outside.
    fn offset(at: UserAddr, length: u64) -> Result<u64> {
        let offset = at.0.checked_sub(MEMORY).ok_or(Errno::FAULT)?;
        let end = offset.checked_add(length).ok_or(Errno::FAULT)?;
        if end > LENGTH { Err(Errno::FAULT) } else { Ok(offset) }
    }

    /// Which pages are pinned wherever this process has them mapped. The kernel says where, once for all of them: it takes a
    /// while.
    fn pinned(&self) -> Result<Vec<u64>> {
        let stat = fstat(&self.file)?;
        let theirs = maps::all()?.into_iter().filter(|mapping| mapping.is_of(stat.st_dev, stat.st_ino));
        let pages = theirs.flat_map(|mapping| {
            let addresses = (mapping.start..mapping.end).step_by(PAGE_SIZE as usize);
            let pinned = addresses.filter(|at| pins::count(HostAddr(*at)) > 0);
            pinned.map(move |at| mapping.offset_of(at) / PAGE_SIZE)
        });
        Ok(pages.collect())
    }

    /// Where a page is in this process.
    fn host(&self, at: UserAddr) -> Result<HostAddr> {
        let page = Self::offset(at, 1)? / PAGE_SIZE;
        let pin = self.memory.pin(page, 1, true, Weak::<Nobody>::new())?;
        Ok(pin.run(0).start)
    }
}

struct Nobody;

impl PinObserver for Nobody {
    fn moving(&self, _from: UserAddr, _pages: u64) {}
    fn moved(&self, _from: UserAddr, _pages: u64) {}
}

impl Process for Arena {
    fn read(&self, from: UserAddr, to: &mut [u8]) -> Result<()> {
        self.memory.read(Self::offset(from, to.len() as u64)?, to)
    }

    fn write(&self, to: UserAddr, from: &[u8]) -> Result<()> {
        self.memory.write(Self::offset(to, from.len() as u64)?, from)
    }

    fn pin(
        &self,
        start: UserAddr,
        pages: u64,
        writable: bool,
        observer: Weak<dyn PinObserver>,
    ) -> Result<Box<dyn PinnedPages>> {
        let length = pages.checked_mul(PAGE_SIZE).ok_or(Errno::FAULT)?;
        self.memory.pin(Self::offset(start, length)? / PAGE_SIZE, pages, writable, observer)
    }

    fn page_id(&self, at: UserAddr) -> Result<PageId> {
        let index = Self::offset(at, 1)? / PAGE_SIZE;
        let stat = fstat(&self.file)?;
        Ok(PageId::File { dev: stat.st_dev, ino: stat.st_ino, index })
    }

    fn host_page_id(&self, at: HostAddr) -> Result<PageId> {
        let first = self.host(UserAddr(MEMORY))?;
        let offset = at.0.checked_sub(first.0).ok_or(Errno::FAULT)?;
        self.page_id(UserAddr(MEMORY.checked_add(offset).ok_or(Errno::FAULT)?))
    }

    /// As the stores of the file know it: a fuzzer's program may ask for all of its pages, time and again.
    fn pin_count(&self, at: UserAddr) -> Result<u64> {
        self.memory.pin_count(Self::offset(at, 1)? / PAGE_SIZE)
    }

    fn usage(&self) -> &Usage {
        &self.usage
    }

    fn locked_limit(&self) -> Option<u64> {
        None
    }

    fn user(&self) -> u32 {
        0
    }

    fn is(&self, other: &Arc<dyn Process>) -> bool {
        core::ptr::addr_eq(self, Arc::as_ptr(other))
    }

    fn file(&self, fd: i32) -> Result<OwnedFd> {
        if fd == MEMORY_FD { self.file.try_clone().map_err(|_| Errno::MFILE) } else { Err(Errno::BADF) }
    }
}

/// The program: what calls.
#[derive(Debug)]
pub struct Program {
    process: Arc<dyn Process>,
    arena: Arc<Arena>,
    /// Its descriptors from 10 on.
    files: Mutex<BTreeMap<i32, Arc<dyn File>>>,
    /// What it may do: CAP_IPC_LOCK and so on.
    pub capable: bool,
}

impl core::fmt::Debug for dyn File {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("a file")
    }
}

impl Program {
    /// One with all capabilities.
    pub fn new() -> Result<Self> {
        let arena = Arc::new(Arena::new()?);
        Ok(Self { process: arena.clone(), arena, files: Mutex::default(), capable: true })
    }

    fn files(&self) -> MutexGuard<'_, BTreeMap<i32, Arc<dyn File>>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes a descriptor. EBADF.
    pub fn close(&self, fd: i32) -> Result<()> {
        let file = self.files().remove(&fd);
        file.map(drop).ok_or(Errno::BADF)
    }

    /// # Panics
    /// A page of its memory is pinned, wherever it is mapped.
    fn assert_unpinned(&self) {
        let pinned = self.arena.pinned().expect("the kernel says what is mapped");
        assert_eq!(pinned, [0; 0], "pages that stay pinned");
    }

    /// Puts bytes into its memory.
    pub fn put(&self, at: UserAddr, bytes: &[u8]) -> Result<()> {
        self.process.write(at, bytes)
    }

    /// Takes a value from its memory.
    pub fn take<T: FromBytes + IntoBytes>(&self, at: UserAddr) -> Result<T> {
        let mut value = T::new_zeroed();
        self.process.read(at, value.as_mut_bytes())?;
        Ok(value)
    }

    /// Makes ioctl `cmd`; the structure comes back as the ioctl leaves it.
    pub fn ioctl<T: FromBytes + IntoBytes + Immutable>(
        &self,
        context: &Arc<Context>,
        cmd: u32,
        args: &mut T,
    ) -> Result<i32> {
        self.put(ARGUMENTS, args.as_bytes())?;
        let result = context.ioctl(self, cmd, ARGUMENTS);
        *args = self.take(ARGUMENTS)?;
        result
    }
}

impl Caller for Program {
    fn process(&self) -> &Arc<dyn Process> {
        &self.process
    }

    fn capable(&self, _capability: Capability) -> bool {
        self.capable
    }

    fn install(&self, file: Arc<dyn File>) -> Result<i32> {
        let mut files = self.files();
        let fd = (10..200).find(|fd| !files.contains_key(fd)).ok_or(Errno::MFILE)?;
        files.insert(fd, file);
        Ok(fd)
    }

    fn uninstall(&self, fd: i32) {
        let file = self.files().remove(&fd);
        drop(file);
    }

    fn installed(&self, fd: i32) -> Result<Arc<dyn File>> {
        self.files().get(&fd).cloned().ok_or(Errno::BADF)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_of_a_program_are_found() {
        let program = Program::new().unwrap();
        let pins = |page| program.process.pin_count(UserAddr(MEMORY + page * PAGE_SIZE)).unwrap();
        program.assert_unpinned();
        let at = UserAddr(MEMORY + 3 * PAGE_SIZE);
        let pinned = program.process.pin(at, 2, true, Weak::<Nobody>::new()).unwrap();
        // By another store of the same file, which has a mapping of its own.
        let file = program.process.file(MEMORY_FD).unwrap();
        let store = FileMemory::new(&file, 4, LENGTH, false).unwrap();
        let other = store.pin(0, 1, false, Weak::<Nobody>::new()).unwrap();
        assert_eq!([2, 3, 4, 5].map(pins), [0, 1, 2, 0]);
        let mut found = program.arena.pinned().unwrap();
        found.sort_unstable();
        assert_eq!(found, [3, 4, 4]);
        drop(pinned);
        assert_eq!((pins(4), program.arena.pinned()), (1, Ok(vec![4])));
        drop(other);
        program.assert_unpinned();
    }
}

//! The client's memory: what it has announced, and how the device reaches it.
//!
//! A window with a descriptor is mapped; one without is reached by asking the client. An access takes the window's lock for
//! reading while it lasts, taking a window away takes it for writing: so DMA_UNMAP is answered when nobody uses the
//! memory any more, and accesses to other windows notice nothing.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use iommufd::domain::Prot;
use iommufd::iova::{Iova, IovaRange};
use rustix::fs::{FileType, fstat, fstatfs};
use rustix::mm::{MapFlags, ProtFlags};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};
use zerocopy::IntoBytes;

use super::dirty::DirtyLog;
use crate::dma::{Dma, DmaFault};
use crate::user::connection::Connection;
use crate::user::wire::{self, Command, DmaAccess, DmaFlags, DmaMap};
use crate::user::{Errno, Result};

/// Bytes that the client is asked for at a time, if it takes as many. A reply that a socket's buffer has no room for makes
/// QEMU 11.1 send a part of it and nothing more.
const MOST_ASKED: usize = 64 << 10;

/// Where the bytes of a window are.
#[derive(Debug)]
enum Backing {
    /// In a file of the client's, mapped here.
    ///
    /// A client that makes the file shorter ends this process (`SIGBUS`, mmap(2)): its own device, and those of others
    /// if the process serves more than one. Files that are sealed against it (`F_SEAL_SHRINK`) cannot be made shorter;
    /// QEMU's memory back end `memfd` seals.
    Mapped(MmapRegion),
    /// With the client, who is to be asked.
    Remote,
}

/// One announced range of addresses.
struct Window {
    range: IovaRange,
    prot: Prot,
    backing: Backing,
    /// Held for reading by every access. False once it was taken away.
    live: RwLock<bool>,
}

/// All of the client's memory.
pub(super) struct ClientMemory {
    /// By the first address. No two overlap.
    windows: RwLock<BTreeMap<u64, Arc<Window>>>,
    /// Where DMA_READ and DMA_WRITE go.
    connection: Arc<Connection>,
    max_windows: usize,
    max_transfer: usize,
    dirty: DirtyLog,
}

impl fmt::Debug for ClientMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientMemory").field("windows", &read(&self.windows).len()).finish_non_exhaustive()
    }
}

fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

impl ClientMemory {
    pub(super) fn new(connection: Arc<Connection>, max_windows: usize, max_transfer: usize) -> Self {
        let dirty = DirtyLog::default();
        let max_transfer = max_transfer.min(MOST_ASKED);
        Self { windows: RwLock::default(), connection, max_windows, max_transfer, dirty }
    }

    /// The log of what the device has written to.
    pub(super) fn dirty(&self) -> &DirtyLog {
        &self.dirty
    }

    /// DMA_MAP.
    ///
    /// # Errors
    /// EINVAL for flags, sizes or offsets that cannot be, EEXIST for addresses that are announced already, ENOSPC for too
    /// many windows, and what mapping the file says.
    pub(super) fn map(&self, map: &DmaMap, file: Option<OwnedFd>) -> Result<()> {
        let flags = DmaFlags::from_bits(map.flags).ok_or(Errno::INVAL)?;
        let range = IovaRange::with_length(Iova(map.address), map.size)?;
        let mut prot = Prot::empty();
        prot.set(Prot::READ, flags.contains(DmaFlags::READ));
        prot.set(Prot::WRITE, flags.contains(DmaFlags::WRITE));
        // Looked at before the file is mapped and again after it, by when it may have changed only if the caller races
        // itself.
        self.check_free(range)?;
        let backing = match file {
            Some(file) => Backing::Mapped(map_file(file, map, prot)?),
            None => Backing::Remote,
        };
        let mut windows = write(&self.windows);
        if overlaps(&windows, range) {
            return Err(Errno::EXIST);
        }
        let window = Window { range, prot, backing, live: RwLock::new(true) };
        windows.insert(map.address, Arc::new(window));
        Ok(())
    }

    fn check_free(&self, range: IovaRange) -> Result<()> {
        let windows = read(&self.windows);
        if windows.len() >= self.max_windows {
            Err(Errno::NOSPC)
        } else if overlaps(&windows, range) {
            Err(Errno::EXIST)
        } else {
            Ok(())
        }
    }

    /// DMA_UNMAP: returns when the device does not use the window any more.
    ///
    /// # Errors
    /// ENOENT unless exactly this window was announced.
    pub(super) fn unmap(&self, address: u64, size: u64) -> Result<()> {
        let window = {
            let mut windows = write(&self.windows);
            match windows.get(&address) {
                Some(window) if window.range.length() == Some(size) => windows.remove(&address),
                _ => None,
            }
        };
        *write(&window.ok_or(Errno::NOENT)?.live) = false;
        Ok(())
    }

    /// All windows: returns when the device uses none any more.
    pub(super) fn unmap_all(&self) {
        let windows = std::mem::take(&mut *write(&self.windows));
        for window in windows.into_values() {
            *write(&window.live) = false;
        }
    }

    fn window(&self, iova: Iova) -> Option<Arc<Window>> {
        let windows = read(&self.windows);
        let (_, window) = windows.range(..=iova.0).next_back()?;
        window.range.contains(iova).then(|| Arc::clone(window))
    }

    /// Calls `part` for each piece of the access that lies in one window: the window, the address, and which bytes of
    /// the access.
    fn access(
        &self,
        iova: Iova,
        length: usize,
        prot: Prot,
        mut part: impl FnMut(&Window, Iova, std::ops::Range<usize>) -> Result<(), DmaFault>,
    ) -> Result<(), DmaFault> {
        let mut done = 0;
        while done < length {
            let at = crate::dma::after(iova, done as u64)?;
            let window = self.window(at).ok_or(DmaFault::Unmapped(at))?;
            let live = read(&window.live);
            if !*live {
                // Taken away since it was found.
                return Err(DmaFault::Unmapped(at));
            }
            if !window.prot.contains(prot) {
                return Err(DmaFault::Forbidden(at));
            }
            let rest = window.range.last().0 - at.0;
            let count = (length - done).min(usize::try_from(rest).unwrap_or(usize::MAX).saturating_add(1));
            part(&window, at, done..done + count)?;
            done += count;
        }
        Ok(())
    }

    /// Asks the client for memory.
    fn ask(&self, at: Iova, to: &mut [u8]) -> Result<(), DmaFault> {
        let mut at = at;
        for to in to.chunks_mut(self.max_transfer) {
            let request = DmaAccess { address: at.0, count: to.len() as u64 };
            let reply = self.connection.request(Command::DmaRead, &[request.as_bytes()], &[]);
            let reply = reply.map_err(DmaFault::Remote)?;
            let (access, data) = wire::split::<DmaAccess>(&reply.payload).map_err(DmaFault::Remote)?;
            if access.count != request.count || data.len() != to.len() {
                return Err(DmaFault::Remote(Errno::PROTO));
            }
            to.copy_from_slice(data);
            at = Iova(at.0.saturating_add(to.len() as u64));
        }
        Ok(())
    }

    /// Sends memory to the client.
    fn tell(&self, at: Iova, from: &[u8]) -> Result<(), DmaFault> {
        let mut at = at;
        for from in from.chunks(self.max_transfer) {
            let request = DmaAccess { address: at.0, count: from.len() as u64 };
            let reply = self.connection.request(Command::DmaWrite, &[request.as_bytes(), from], &[]);
            reply.map_err(DmaFault::Remote)?;
            at = Iova(at.0.saturating_add(from.len() as u64));
        }
        Ok(())
    }
}

fn overlaps(windows: &BTreeMap<u64, Arc<Window>>, range: IovaRange) -> bool {
    let below = windows.range(..=range.last().0).next_back();
    below.is_some_and(|(_, window)| window.range.last() >= range.start())
}

/// `FUSE_SUPER_MAGIC` of `<linux/magic.h>`.
const FUSE: u64 = 0x6573_5546;

/// Maps what a window has.
///
/// # Errors
/// EINVAL for what is no file, is too short, or belongs to a file system in user space: an access could last as long as its
/// owner likes. Otherwise what mmap says.
fn map_file(file: OwnedFd, map: &DmaMap, prot: Prot) -> Result<MmapRegion> {
    let length = usize::try_from(map.size).map_err(|_| Errno::INVAL)?;
    let end = map.offset.checked_add(map.size).ok_or(Errno::OVERFLOW)?;
    let stat = fstat(&file)?;
    let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    let long_enough = u64::try_from(stat.st_size).is_ok_and(|size| end <= size);
    // The field's type depends on the architecture; the number fits any.
    let foreign = fstatfs(&file)?.f_type as u64 == FUSE;
    if !regular || !long_enough || foreign {
        return Err(Errno::INVAL);
    }
    let mut protection = ProtFlags::READ;
    protection.set(ProtFlags::WRITE, prot.contains(Prot::WRITE));
    let flags = MapFlags::SHARED | MapFlags::NORESERVE;
    let file = FileOffset::new(File::from(file), map.offset);
    // These numbers fit, since they come from libc's own.
    let (protection, flags) = (protection.bits().cast_signed(), flags.bits().cast_signed());
    MmapRegion::build(Some(file), length, protection, flags).map_err(|error| match error {
        vm_memory::mmap::MmapRegionError::Mmap(error) => {
            error.raw_os_error().map_or(Errno::INVAL, Errno::from_raw_os_error)
        }
        _ => Errno::INVAL,
    })
}

impl Window {
    /// Where `at` is in the mapping.
    fn offset(&self, at: Iova) -> usize {
        usize::try_from(at.0 - self.range.start().0).unwrap_or(usize::MAX)
    }
}

/// A mapping is as long as its window, so that this cannot be seen.
fn outside(at: Iova) -> DmaFault {
    DmaFault::Unmapped(at)
}

impl Dma for ClientMemory {
    fn read(&self, iova: Iova, to: &mut [u8]) -> Result<(), DmaFault> {
        self.access(iova, to.len(), Prot::READ, |window, at, part| {
            let to = to.get_mut(part).unwrap_or_default();
            match &window.backing {
                Backing::Mapped(mapping) => {
                    let slice = mapping.get_slice(window.offset(at), to.len()).map_err(|_| outside(at))?;
                    slice.copy_to(to);
                    Ok(())
                }
                Backing::Remote => self.ask(at, to),
            }
        })
    }

    fn write(&self, iova: Iova, from: &[u8]) -> Result<(), DmaFault> {
        self.access(iova, from.len(), Prot::WRITE, |window, at, part| {
            let from = from.get(part).unwrap_or_default();
            match &window.backing {
                Backing::Mapped(mapping) => {
                    let slice = mapping.get_slice(window.offset(at), from.len()).map_err(|_| outside(at))?;
                    slice.copy_from(from);
                }
                Backing::Remote => self.tell(at, from)?,
            }
            self.dirty.dirty(at, from.len() as u64);
            Ok(())
        })
    }

    fn translate(&self, range: IovaRange, access: Prot) -> Result<(), DmaFault> {
        let windows = read(&self.windows);
        let mut at = range.start();
        loop {
            let found = windows.range(..=at.0).next_back();
            let window = found.map(|(_, window)| window).filter(|window| window.range.contains(at));
            let window = window.ok_or(DmaFault::Unmapped(at))?;
            if !window.prot.contains(access) {
                return Err(DmaFault::Forbidden(at));
            }
            if window.range.last() >= range.last() {
                return Ok(());
            }
            at = Iova(window.range.last().0 + 1);
        }
    }
}

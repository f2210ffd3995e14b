//! What a call on a served descriptor does: the safe half of the exported functions.

use core::{
    ffi::{c_int, c_void},
    sync::atomic::{AtomicBool, Ordering},
};
use std::{
    os::fd::{AsRawFd, IntoRawFd, OwnedFd},
    sync::Arc,
};

use iommufd::{
    Errno, Result,
    caller::{Deliver, File},
    process::UserAddr,
};
use rustix::{
    fs::{MemfdFlags, OFlags},
    io::FdFlags,
};
use vfio::doors::{Caller, DeviceFile, MigrationFile};

use crate::{
    caller::ShimCaller,
    node::{Node, Opened, ServedFile, with_buffer},
    nodes, process,
    table::{self, Description},
    user,
};

/// The most that one call reads or writes: as Linux does, more is done in part.
const LARGEST: usize = 1 << 20;

/// Opens `node`: the new descriptor.
pub(crate) fn open(node: &dyn Node, flags: c_int) -> Result<c_int> {
    if flags & libc::O_CREAT != 0 && flags & libc::O_EXCL != 0 {
        return Err(Errno::EXIST);
    }
    if flags & libc::O_DIRECTORY != 0 {
        return Err(Errno::NOTDIR);
    }
    let close_on_exec = flags & libc::O_CLOEXEC != 0;
    match node.open(flags)? {
        Opened::Served(file) => {
            let descriptor = stand_in()?;
            let status =
                OFlags::from_bits_truncate(flags.cast_unsigned()) & (OFlags::NONBLOCK | OFlags::APPEND);
            rustix::fs::fcntl_setfl(&descriptor, status)?;
            install(descriptor, file, close_on_exec)
        }
        Opened::Plain(descriptor) => {
            set_close_on_exec(&descriptor, close_on_exec)?;
            Ok(descriptor.into_raw_fd())
        }
    }
}

fn set_close_on_exec(descriptor: &OwnedFd, close_on_exec: bool) -> Result<()> {
    let flags = if close_on_exec { FdFlags::CLOEXEC } else { FdFlags::empty() };
    rustix::io::fcntl_setfd(descriptor, flags)
}

/// Gives the program `descriptor`, which stands for `file`.
pub(crate) fn install(descriptor: OwnedFd, file: Arc<dyn ServedFile>, close_on_exec: bool) -> Result<c_int> {
    set_close_on_exec(&descriptor, close_on_exec)?;
    let number = descriptor.as_raw_fd();
    table::insert(number, Arc::new(Description { file })).map_err(|_| Errno::MFILE)?;
    Ok(descriptor.into_raw_fd())
}

/// Takes back a descriptor that [`install`] gave, before the program has seen its number.
pub(crate) fn uninstall(number: c_int) {
    if let Some(description) = table::remove(number) {
        process::close(number);
        drop(description);
    }
}

/// Gives the program a device that it got by an ioctl: the new descriptor.
pub(crate) fn install_device(device: Arc<DeviceFile>) -> Result<c_int> {
    install(stand_in()?, nodes::vfio::device(device), true)
}

/// What serves a file that an ioctl gives out.
pub(crate) fn given(file: Arc<dyn File>) -> Arc<dyn ServedFile> {
    Arc::new(Given(file))
}

/// A descriptor that polls as a device without a poll operation does: always ready, and none of `epoll`'s.
pub(crate) fn stand_in() -> Result<OwnedFd> {
    rustix::fs::memfd_create(c"ring3", MemfdFlags::CLOEXEC)
}

/// `ioctl`.
///
/// None for what the kernel does for every file, before it asks the driver.
pub(crate) fn ioctl(description: &Description, request: u64, argument: *mut c_void) -> Result<Option<c_int>> {
    /// FIOCLEX, FIONCLEX, FIONBIO, FIOASYNC.
    const GENERIC: [u32; 4] = [0x5451, 0x5450, 0x5421, 0x5452];

    // The kernel's type is an unsigned int; libc's is wider.
    #[expect(clippy::cast_possible_truncation, reason = "as the system call does")]
    let request = request as u32;
    if GENERIC.contains(&request) {
        return Ok(None);
    }
    description.file.ioctl(&*ShimCaller::get(), request, UserAddr(argument as u64)).map(Some)
}

/// The real `ioctl` of a descriptor that is not served did not know `request`. If it is one of the calls that are served, and the
/// descriptor one that another process was given, the user is told why that cannot work.
pub(crate) fn explain_unknown(fd: c_int, request: u64) {
    /// The letter of the calls of iommufd and VFIO.
    const LETTER: u64 = b';' as u64;
    static SAID: AtomicBool = AtomicBool::new(false);
    if request >> 8 & 0xff != LETTER || SAID.load(Ordering::Relaxed) {
        return;
    }
    let is_stand_in = rustix::fs::readlink(format!("/proc/self/fd/{fd}"), Vec::new())
        .is_ok_and(|name| name.as_bytes().starts_with(b"/memfd:ring3 "));
    if is_stand_in && !SAID.swap(true, Ordering::Relaxed) {
        crate::complain(&format!(
            "descriptor {fd} is of a device that was opened before exec, or by another process: it is served there only"
        ));
    }
}

/// Where a `read` or `write` takes place.
#[derive(Clone, Copy)]
pub(crate) enum Position {
    /// At the file's own.
    Current,
    /// At this offset (`pread`).
    At(i64),
}

impl Position {
    fn offset(self) -> Result<Option<u64>> {
        match self {
            Self::Current => Ok(None),
            Self::At(offset) => u64::try_from(offset).map(Some).map_err(|_| Errno::INVAL),
        }
    }
}

/// `read`, `pread`.
pub(crate) fn read(
    description: &Description,
    to: UserAddr,
    count: usize,
    position: Position,
) -> Result<usize> {
    let count = count.min(LARGEST);
    let Some(offset) = position.offset()? else {
        let mut deliver =
            |at: usize, bytes: &[u8]| user::write(UserAddr(to.0.wrapping_add(at as u64)), bytes);
        return description.file.read_to(to, count, &mut deliver);
    };
    with_buffer(count, |buffer| {
        let done = description.file.read_at(offset, buffer)?;
        user::write(to, buffer.get(..done).ok_or(Errno::IO)?)?;
        Ok(done)
    })
}

/// `write`, `pwrite`.
pub(crate) fn write(
    description: &Description,
    from: UserAddr,
    count: usize,
    position: Position,
) -> Result<usize> {
    let offset = position.offset()?;
    with_buffer(count.min(LARGEST), |buffer| {
        user::read(from, buffer)?;
        match offset {
            None => description.file.write(buffer),
            Some(offset) => description.file.write_at(offset, buffer),
        }
    })
}

/// One piece of a vectored call: where, and how long.
type Piece = (UserAddr, usize);

/// `readv`, `preadv` and their opposites: piece by piece, until one is short.
pub(crate) fn vectored(
    pieces: &[Piece],
    position: Position,
    mut each: impl FnMut(Piece, Position) -> Result<usize>,
) -> Result<usize> {
    let mut done = 0_usize;
    for &(at, length) in pieces {
        let here = match position {
            Position::Current => Position::Current,
            Position::At(offset) => {
                Position::At(offset.saturating_add(i64::try_from(done).unwrap_or(i64::MAX)))
            }
        };
        match each((at, length), here) {
            Ok(some) => {
                done = done.saturating_add(some);
                if some < length {
                    break;
                }
            }
            Err(error) if done == 0 => return Err(error),
            Err(_) => break,
        }
    }
    Ok(done)
}

/// The pieces that `count` `iovec`s at `at` name. EINVAL for more than Linux allows, EFAULT for what cannot be read.
pub(crate) fn pieces(at: *const libc::iovec, count: c_int) -> Result<Vec<Piece>> {
    const MOST: usize = 1024;
    const EACH: usize = size_of::<libc::iovec>();
    let count = usize::try_from(count).ok().filter(|&count| count <= MOST).ok_or(Errno::INVAL)?;
    let mut bytes = vec![0; count * EACH];
    user::read(UserAddr(at as u64), &mut bytes)?;
    let (words, _) = bytes.as_chunks::<8>();
    let (pairs, _) = words.as_chunks::<2>();
    pairs
        .iter()
        .map(|&[base, length]| {
            let length = usize::try_from(i64::from_ne_bytes(length)).map_err(|_| Errno::INVAL)?;
            Ok((UserAddr(u64::from_ne_bytes(base)), length))
        })
        .collect()
}

/// A file that an ioctl gave out.
struct Given(Arc<dyn File>);

impl ServedFile for Given {
    fn ioctl(&self, caller: &dyn Caller, request: u32, argument: UserAddr) -> Result<i32> {
        match Arc::clone(&self.0).as_any().downcast::<MigrationFile>() {
            Ok(migration) => migration.ioctl(caller, request, argument),
            Err(_) => Err(Errno::NOTTY),
        }
    }

    fn read(&self, to: &mut [u8]) -> Result<usize> {
        self.0.read(to)
    }

    fn read_to(&self, _to: UserAddr, room: usize, deliver: Deliver<'_>) -> Result<usize> {
        self.0.read_to(room, deliver)
    }

    fn write(&self, from: &[u8]) -> Result<usize> {
        self.0.write(from)
    }

    fn given(&self) -> Option<Arc<dyn File>> {
        Some(Arc::clone(&self.0))
    }
}

//! `ioctl`, `read` and `write`.

use core::ffi::{c_int, c_ulong, c_void};

use iommufd::process::UserAddr;
use libc::{iovec, off_t, size_t, ssize_t};

use super::{answer, answer_if};
use crate::{
    calls::{self, Position},
    errno, real, table,
    table::Description,
};

#[unsafe(no_mangle)]
unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
    if let Some(description) = table::get_full(fd) {
        let result = answer_if(|| calls::ioctl(&description, request, argument));
        if let Some(result) = result {
            return result;
        }
    }
    // SAFETY: the caller's arguments, for the function that it meant to call.
    let result = unsafe { real::ioctl()(fd, request, argument) };
    if result == -1 && errno::get() == libc::ENOTTY {
        errno::preserved(|| crate::inside::run(|| calls::explain_unknown(fd, request)));
    }
    result
}

/// Defines functions that take a descriptor first: `served` when it is served, else the real function of the name.
macro_rules! by_descriptor {
    ($($name:ident($fd:ident $(, $argument:ident: $type:ty)*) -> $result:ty: $description:ident => $served:expr;)*) => {$(
        #[unsafe(no_mangle)]
        pub(super) unsafe extern "C" fn $name($fd: c_int $(, $argument: $type)*) -> $result {
            match table::get_full($fd) {
                Some($description) => answer(|| $served),
                // SAFETY: the caller's arguments, for the function that it meant to call.
                None => unsafe { real::$name()($fd $(, $argument)*) },
            }
        }
    )*};
}

fn fill(of: &Description, to: *mut c_void, count: size_t, position: Position) -> iommufd::Result<usize> {
    calls::read(of, UserAddr(to as u64), count, position)
}

fn drain(of: &Description, from: *const c_void, count: size_t, position: Position) -> iommufd::Result<usize> {
    calls::write(of, UserAddr(from as u64), count, position)
}

fn scatter(
    of: &Description,
    pieces: *const iovec,
    count: c_int,
    position: Position,
) -> iommufd::Result<usize> {
    let each = |(to, length), here| calls::read(of, to, length, here);
    calls::vectored(&calls::pieces(pieces, count)?, position, each)
}

fn gather(
    of: &Description,
    pieces: *const iovec,
    count: c_int,
    position: Position,
) -> iommufd::Result<usize> {
    let each = |(from, length), here| calls::write(of, from, length, here);
    calls::vectored(&calls::pieces(pieces, count)?, position, each)
}

/// A buffer that the compiler knows to be too small for what is read into it is a bug of the program, which libc ends.
fn fits(count: size_t, room: size_t) -> iommufd::Result<()> {
    if count <= room { Ok(()) } else { std::process::abort() }
}

by_descriptor! {
    read(fd, to: *mut c_void, count: size_t) -> ssize_t: of => fill(&of, to, count, Position::Current);
    write(fd, from: *const c_void, count: size_t) -> ssize_t: of => drain(&of, from, count, Position::Current);
    pread(fd, to: *mut c_void, count: size_t, at: off_t) -> ssize_t: of => fill(&of, to, count, Position::At(at));
    pread64(fd, to: *mut c_void, count: size_t, at: off_t) -> ssize_t: of => fill(&of, to, count, Position::At(at));
    pwrite(fd, from: *const c_void, count: size_t, at: off_t) -> ssize_t: of => drain(&of, from, count, Position::At(at));
    pwrite64(fd, from: *const c_void, count: size_t, at: off_t) -> ssize_t: of => drain(&of, from, count, Position::At(at));
    readv(fd, pieces: *const iovec, count: c_int) -> ssize_t: of => scatter(&of, pieces, count, Position::Current);
    writev(fd, pieces: *const iovec, count: c_int) -> ssize_t: of => gather(&of, pieces, count, Position::Current);
    preadv(fd, pieces: *const iovec, count: c_int, at: off_t) -> ssize_t: of => scatter(&of, pieces, count, Position::At(at));
    preadv64(fd, pieces: *const iovec, count: c_int, at: off_t) -> ssize_t: of => scatter(&of, pieces, count, Position::At(at));
    pwritev(fd, pieces: *const iovec, count: c_int, at: off_t) -> ssize_t: of => gather(&of, pieces, count, Position::At(at));
    pwritev64(fd, pieces: *const iovec, count: c_int, at: off_t) -> ssize_t: of => gather(&of, pieces, count, Position::At(at));
    __read_chk(fd, to: *mut c_void, count: size_t, room: size_t) -> ssize_t:
        of => fits(count, room).and_then(|()| fill(&of, to, count, Position::Current));
    __pread_chk(fd, to: *mut c_void, count: size_t, at: off_t, room: size_t) -> ssize_t:
        of => fits(count, room).and_then(|()| fill(&of, to, count, Position::At(at)));
    __pread64_chk(fd, to: *mut c_void, count: size_t, at: off_t, room: size_t) -> ssize_t:
        of => fits(count, room).and_then(|()| fill(&of, to, count, Position::At(at)));
}

/// Defines `lseek` under the names that it has.
macro_rules! lseek {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        pub(super) unsafe extern "C" fn $name(fd: c_int, offset: off_t, whence: c_int) -> off_t {
            if let Some(description) = table::get_full(fd) {
                return answer(|| description.file.seek(offset, whence));
            }
            // SAFETY: the caller's arguments, for the function that it meant to call.
            unsafe { real::$name()(fd, offset, whence) }
        }
    )*};
}

lseek!(lseek lseek64);

//! Functions that look at a path without opening it.

use core::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::Arc;

use libc::{size_t, ssize_t};

use crate::{
    errno, inside,
    node::{Metadata, Node},
    paths::{self, Target},
    real, tree, user,
};

/// Looks at `path` as the program means it: a node with `served`, any other path with `real`.
pub(super) fn look<R>(
    path: *const c_char,
    served: impl FnOnce(Arc<dyn Node>) -> R,
    real: impl FnOnce(*const c_char) -> R,
) -> R {
    match paths::resolve(path) {
        Target::Real | Target::Refused(_) => real(path),
        Target::Elsewhere(there) => real(there.as_ptr()),
        Target::Node(node) => served(node),
    }
}

/// A node may be read and written, and not executed.
fn allowed(mode: c_int) -> c_int {
    if mode & libc::X_OK == 0 {
        return 0;
    }
    errno::set(libc::EACCES);
    -1
}

#[unsafe(no_mangle)]
unsafe extern "C" fn access(path: *const c_char, mode: c_int) -> c_int {
    // SAFETY: the caller's arguments, or a path of ours, for the function that it meant to call.
    look(path, |_| allowed(mode), |path| unsafe { real::access()(path, mode) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn faccessat(directory: c_int, path: *const c_char, mode: c_int, flags: c_int) -> c_int {
    // SAFETY: as above.
    look(path, |_| allowed(mode), |path| unsafe { real::faccessat()(directory, path, mode, flags) })
}

/// Writes what `stat` tells of a node.
fn tell(node: &dyn Node, to: *mut libc::stat) -> c_int {
    let Metadata { mode, rdev: (major, minor) } = node.metadata();
    // SAFETY: needed because a C structure has padding that only zeroing defines; all zeros is a valid value of it.
    let mut stat: libc::stat = unsafe { core::mem::zeroed() };
    stat.st_mode = mode;
    stat.st_rdev = libc::makedev(major, minor);
    stat.st_nlink = 1;
    stat.st_blksize = 4096;
    write_to(&stat, to.cast())
}

/// Copies a structure to the program.
fn write_to<T>(value: &T, to: *mut c_void) -> c_int {
    // SAFETY: needed to copy it as bytes. The structures here are C's and were zeroed before they were filled, padding included.
    let bytes =
        unsafe { core::slice::from_raw_parts(core::ptr::from_ref(value).cast::<u8>(), size_of::<T>()) };
    match user::write(iommufd::process::UserAddr(to as u64), bytes) {
        Ok(()) => 0,
        Err(error) => {
            errno::set(error.raw_os_error());
            -1
        }
    }
}

/// Defines `stat` under the names that it and its relatives have.
macro_rules! stat {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        pub(super) unsafe extern "C" fn $name(path: *const c_char, to: *mut libc::stat) -> c_int {
            // SAFETY: the caller's arguments, or a path of ours, for the function that it meant to call.
            look(path, |node| tell(&*node, to), |path| unsafe { real::$name()(path, to) })
        }
    )*};
}

/// The same for `fstatat`.
macro_rules! fstatat {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(directory: c_int, path: *const c_char, to: *mut libc::stat, flags: c_int) -> c_int {
            // SAFETY: the caller's arguments, or a path of ours, for the function that it meant to call.
            look(path, |node| tell(&*node, to), |path| unsafe { real::$name()(directory, path, to, flags) })
        }
    )*};
}

/// The same for `fstat`, which asks for a descriptor.
macro_rules! fstat {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(fd: c_int, to: *mut libc::stat) -> c_int {
            // SAFETY: the caller's arguments, for the function that it meant to call.
            let result = unsafe { real::$name()(fd, to) };
            let Some(description) = crate::table::get_full(fd) else { return result };
            match description.file.metadata() {
                // SAFETY: the call above has filled the structure.
                Some(Metadata { mode, rdev: (major, minor) }) if result == 0 => unsafe {
                    (*to).st_mode = mode;
                    (*to).st_rdev = libc::makedev(major, minor);
                    (*to).st_size = 0;
                    0
                },
                _ => result,
            }
        }
    )*};
}

stat!(stat stat64 lstat lstat64);
fstatat!(fstatat fstatat64);
fstat!(fstat fstat64);

#[unsafe(no_mangle)]
unsafe extern "C" fn statx(
    directory: c_int,
    path: *const c_char,
    flags: c_int,
    mask: c_uint,
    to: *mut libc::statx,
) -> c_int {
    let tell = |node: Arc<dyn Node>| {
        let Metadata { mode, rdev } = node.metadata();
        // SAFETY: needed because a C structure has padding that only zeroing defines; all zeros is a valid value of it.
        let mut statx: libc::statx = unsafe { core::mem::zeroed() };
        statx.stx_mask = libc::STATX_TYPE | libc::STATX_MODE | libc::STATX_NLINK;
        // The field has the width of the modes that there are.
        statx.stx_mode = u16::try_from(mode).unwrap_or(0);
        statx.stx_nlink = 1;
        (statx.stx_rdev_major, statx.stx_rdev_minor) = rdev;
        statx.stx_blksize = 4096;
        write_to(&statx, to.cast())
    };
    // SAFETY: the caller's arguments, or a path of ours, for the function that it meant to call.
    look(path, tell, |path| unsafe { real::statx()(directory, path, flags, mask, to) })
}

fn no_link<T>(_node: T) -> ssize_t {
    errno::set(libc::EINVAL);
    -1
}

#[unsafe(no_mangle)]
unsafe extern "C" fn readlink(path: *const c_char, to: *mut c_char, size: size_t) -> ssize_t {
    // SAFETY: the caller's arguments, or a path of ours, for the function that it meant to call.
    look(path, no_link, |path| unsafe { real::readlink()(path, to, size) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn readlinkat(
    directory: c_int,
    path: *const c_char,
    to: *mut c_char,
    size: size_t,
) -> ssize_t {
    // SAFETY: as above.
    look(path, no_link, |path| unsafe { real::readlinkat()(directory, path, to, size) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn realpath(path: *const c_char, to: *mut c_char) -> *mut c_char {
    let result = match paths::resolve(path) {
        // SAFETY: the caller's arguments, for the function that it meant to call.
        Target::Real | Target::Refused(_) => unsafe { real::realpath()(path, to) },
        // SAFETY: as above; nodes are at real paths of their own, or nowhere.
        Target::Node(_) => return unsafe { real::realpath()(path, to) },
        // SAFETY: as above, with a path of ours.
        Target::Elsewhere(there) => unsafe { real::realpath()(there.as_ptr(), to) },
    };
    as_the_program_knows(result)
}

/// A path that libc has just made, as the program knows it.
fn as_the_program_knows(path: *mut c_char) -> *mut c_char {
    if path.is_null() || !tree::is_planned() || inside::is() {
        return path;
    }
    // SAFETY: libc returned a C string in the program's buffer, or one that it allocated.
    let length = unsafe { libc::strlen(path) };
    // SAFETY: the same string, which nobody else has yet.
    let text = unsafe { core::slice::from_raw_parts_mut(path.cast::<u8>(), length + 1) };
    if let Some(outside) = tree::outside(text) {
        let cut = text.len() - outside.len();
        text.copy_within(cut.., 0);
    }
    path
}

#[unsafe(no_mangle)]
unsafe extern "C" fn getcwd(to: *mut c_char, size: size_t) -> *mut c_char {
    // SAFETY: the caller's arguments, for the function that it meant to call.
    as_the_program_knows(unsafe { real::getcwd()(to, size) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn chdir(path: *const c_char) -> c_int {
    let refuse = |_| {
        errno::set(libc::ENOTDIR);
        -1
    };
    // SAFETY: the caller's arguments, or a path of ours, for the function that it meant to call.
    look(path, refuse, |path| unsafe { real::chdir()(path) })
}

//! `open` and its relatives.

use core::ffi::{CStr, c_char, c_int, c_void};

use libc::{FILE, mode_t, off_t, size_t, ssize_t};

use super::{answer, transfer};
use crate::{
    calls, errno,
    node::Node,
    paths::{self, Target},
    real, table,
};

/// Opens what we serve; the real function opens the rest, where it is.
fn open_or(
    directory: c_int,
    path: *const c_char,
    flags: c_int,
    real: impl FnOnce(*const c_char) -> c_int,
) -> c_int {
    match paths::resolve_to_open(directory, path, flags) {
        Target::Real => real(path),
        Target::Refused(error) => {
            errno::set(error.raw_os_error());
            -1
        }
        Target::Elsewhere(there) => real(there.as_ptr()),
        // A name without a file: it cannot be used for anything but to be looked at.
        Target::Node(_) if flags & libc::O_PATH != 0 => real(c"/dev/null".as_ptr()),
        Target::Node(node) => answer(|| calls::open(&*node, flags)),
    }
}

/// Defines `open` under the names that it has.
macro_rules! open {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
            // SAFETY: the caller's arguments, for the function that it meant to call.
            open_or(libc::AT_FDCWD, path, flags, |path| unsafe { real::$name()(path, flags, mode) })
        }
    )*};
}

/// Defines `openat` under the names that it has. An absolute path is not looked up in the directory.
macro_rules! openat {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        pub(super) unsafe extern "C" fn $name(directory: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
            // SAFETY: the caller's arguments, for the function that it meant to call.
            open_or(directory, path, flags, |path| unsafe { real::$name()(directory, path, flags, mode) })
        }
    )*};
}

/// Defines what a program calls instead when it was compiled with `_FORTIFY_SOURCE` and gives no mode.
macro_rules! open_2 {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(path: *const c_char, flags: c_int) -> c_int {
            // SAFETY: the caller's arguments, for the function that it meant to call.
            open_or(libc::AT_FDCWD, path, flags, |path| unsafe { real::$name()(path, flags) })
        }
    )*};
}

/// The same for `openat`.
macro_rules! openat_2 {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(directory: c_int, path: *const c_char, flags: c_int) -> c_int {
            // SAFETY: the caller's arguments, for the function that it meant to call.
            open_or(directory, path, flags, |path| unsafe { real::$name()(directory, path, flags) })
        }
    )*};
}

open!(open open64);
openat!(openat openat64);
open_2!(__open_2 __open64_2);
openat_2!(__openat_2 __openat64_2);

/// Defines `fopen` under the names that it has.
macro_rules! fopen {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(path: *const c_char, mode: *const c_char) -> *mut FILE {
            // SAFETY: the caller's arguments, or a path of ours, for the function that it meant to call.
            let open = |path| unsafe { real::$name()(path, mode) };
            let flags = flags(mode);
            match paths::resolve_to_open(libc::AT_FDCWD, path, flags) {
                Target::Real => open(path),
                Target::Elsewhere(there) => open(there.as_ptr()),
                Target::Node(node) => stream(&*node, flags, mode),
                Target::Refused(error) => {
                    errno::set(error.raw_os_error());
                    core::ptr::null_mut()
                }
            }
        }
    )*};
}

fopen!(fopen fopen64);

/// The flags by which a mode of `fopen` opens.
fn flags(mode: *const c_char) -> c_int {
    // SAFETY: a mode is a C string; a bad one crashes in libc as well.
    let letters = unsafe { CStr::from_ptr(mode) }.to_bytes();
    let access = match (letters.contains(&b'+'), letters.first()) {
        (true, _) => libc::O_RDWR,
        (false, Some(b'r')) => libc::O_RDONLY,
        (false, _) => libc::O_WRONLY,
    };
    let makes = match letters.first() {
        Some(b'w') => libc::O_CREAT | libc::O_TRUNC,
        Some(b'a') => libc::O_CREAT | libc::O_APPEND,
        _ => 0,
    };
    let makes = if letters.contains(&b'x') { makes | libc::O_EXCL } else { makes };
    let cloexec = if letters.contains(&b'e') { libc::O_CLOEXEC } else { 0 };
    access | makes | cloexec
}

/// A stream on what we serve.
///
/// What libc's own streams read and write does not come by this library. So the stream is one with functions of ours, which
/// has no descriptor to the program; what is an ordinary file below is an ordinary stream.
fn stream(node: &dyn Node, flags: c_int, mode: *const c_char) -> *mut FILE {
    let fd: c_int = answer(|| calls::open(node, flags));
    if fd < 0 {
        return core::ptr::null_mut();
    }
    if table::get(fd).is_none() {
        // SAFETY: the descriptor was just made and becomes the stream's.
        return unsafe { libc::fdopen(fd, mode) };
    }
    let functions = Functions { read, write, seek, close };
    // SAFETY: the functions are of this library, which is never unloaded, and take what is given here: the descriptor, which is
    // the stream's from now on.
    unsafe { fopencookie(fd as usize as *mut c_void, mode, functions) }
}

/// `cookie_io_functions_t`.
#[repr(C)]
struct Functions {
    read: unsafe extern "C" fn(*mut c_void, *mut c_char, size_t) -> ssize_t,
    write: unsafe extern "C" fn(*mut c_void, *const c_char, size_t) -> ssize_t,
    seek: unsafe extern "C" fn(*mut c_void, *mut off_t, c_int) -> c_int,
    close: unsafe extern "C" fn(*mut c_void) -> c_int,
}

unsafe extern "C" {
    /// fopencookie(3), which crate libc does not have.
    fn fopencookie(cookie: *mut c_void, mode: *const c_char, functions: Functions) -> *mut FILE;
}

/// The descriptor of a stream.
fn descriptor(cookie: *mut c_void) -> c_int {
    c_int::try_from(cookie as usize).unwrap_or(-1)
}

unsafe extern "C" fn read(cookie: *mut c_void, to: *mut c_char, count: size_t) -> ssize_t {
    // SAFETY: libc's buffer, for the function that takes it.
    unsafe { transfer::read(descriptor(cookie), to.cast(), count) }
}

unsafe extern "C" fn write(cookie: *mut c_void, from: *const c_char, count: size_t) -> ssize_t {
    // SAFETY: as above.
    let done = unsafe { transfer::write(descriptor(cookie), from.cast(), count) };
    // The one answer that libc takes for an error.
    done.max(0)
}

unsafe extern "C" fn seek(cookie: *mut c_void, offset: *mut off_t, whence: c_int) -> c_int {
    // SAFETY: libc's own variable.
    let to = unsafe { &mut *offset };
    // SAFETY: numbers.
    *to = unsafe { transfer::lseek64(descriptor(cookie), *to, whence) };
    if *to < 0 { -1 } else { 0 }
}

unsafe extern "C" fn close(cookie: *mut c_void) -> c_int {
    // SAFETY: the stream's descriptor, which nobody else has.
    unsafe { super::descriptors::close(descriptor(cookie)) }
}

//! `open` and its relatives.

use core::ffi::{CStr, c_char, c_int};

use libc::{FILE, mode_t};

use super::answer;
use crate::{
    calls,
    node::Node,
    paths::{self, Target},
    real,
};

/// Opens what we serve; the real function opens the rest, where it is.
fn open_or(path: *const c_char, flags: c_int, real: impl FnOnce(*const c_char) -> c_int) -> c_int {
    match paths::resolve(path) {
        Target::Real => real(path),
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
            open_or(path, flags, |path| unsafe { real::$name()(path, flags, mode) })
        }
    )*};
}

/// Defines `openat` under the names that it has. An absolute path is not looked up in the directory.
macro_rules! openat {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(directory: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
            // SAFETY: the caller's arguments, for the function that it meant to call.
            open_or(path, flags, |path| unsafe { real::$name()(directory, path, flags, mode) })
        }
    )*};
}

/// Defines what a program calls instead when it was compiled with `_FORTIFY_SOURCE` and gives no mode.
macro_rules! open_2 {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(path: *const c_char, flags: c_int) -> c_int {
            // SAFETY: the caller's arguments, for the function that it meant to call.
            open_or(path, flags, |path| unsafe { real::$name()(path, flags) })
        }
    )*};
}

/// The same for `openat`.
macro_rules! openat_2 {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(directory: c_int, path: *const c_char, flags: c_int) -> c_int {
            // SAFETY: the caller's arguments, for the function that it meant to call.
            open_or(path, flags, |path| unsafe { real::$name()(directory, path, flags) })
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
            match paths::resolve(path) {
                Target::Real => open(path),
                Target::Elsewhere(there) => open(there.as_ptr()),
                Target::Node(node) => stream(&*node, mode),
            }
        }
    )*};
}

fopen!(fopen fopen64);

/// A stream on what we serve.
fn stream(node: &dyn Node, mode: *const c_char) -> *mut FILE {
    // SAFETY: a mode is a C string; a bad one crashes in libc as well.
    let letters = unsafe { CStr::from_ptr(mode) }.to_bytes();
    let access = match (letters.contains(&b'+'), letters.first()) {
        (true, _) => libc::O_RDWR,
        (false, Some(b'r')) => libc::O_RDONLY,
        (false, _) => libc::O_WRONLY,
    };
    let cloexec = if letters.contains(&b'e') { libc::O_CLOEXEC } else { 0 };
    let fd: c_int = answer(|| calls::open(node, access | cloexec));
    if fd < 0 {
        return core::ptr::null_mut();
    }
    // SAFETY: the descriptor was just made and becomes the stream's.
    unsafe { libc::fdopen(fd, mode) }
}

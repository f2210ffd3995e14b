//! `open` and its relatives.

use core::ffi::{c_char, c_int};

use libc::mode_t;

use super::answer;
use crate::{calls, paths, real};

/// Opens what we serve; the real function, `otherwise`.
fn open_or(path: *const c_char, flags: c_int, otherwise: impl FnOnce() -> c_int) -> c_int {
    match paths::node(path) {
        Some(node) => answer(|| calls::open(&*node, flags)),
        None => otherwise(),
    }
}

/// Defines `open` under the names that it has.
macro_rules! open {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
            // SAFETY: the caller's arguments, for the function that it meant to call.
            open_or(path, flags, || unsafe { real::$name()(path, flags, mode) })
        }
    )*};
}

/// Defines `openat` under the names that it has. An absolute path is not looked up in the directory.
macro_rules! openat {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(directory: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
            // SAFETY: the caller's arguments, for the function that it meant to call.
            open_or(path, flags, || unsafe { real::$name()(directory, path, flags, mode) })
        }
    )*};
}

/// Defines what a program calls instead when it was compiled with `_FORTIFY_SOURCE` and gives no mode.
macro_rules! open_2 {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(path: *const c_char, flags: c_int) -> c_int {
            // SAFETY: the caller's arguments, for the function that it meant to call.
            open_or(path, flags, || unsafe { real::$name()(path, flags) })
        }
    )*};
}

/// The same for `openat`.
macro_rules! openat_2 {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(directory: c_int, path: *const c_char, flags: c_int) -> c_int {
            // SAFETY: the caller's arguments, for the function that it meant to call.
            open_or(path, flags, || unsafe { real::$name()(directory, path, flags) })
        }
    )*};
}

open!(open open64);
openat!(openat openat64);
open_2!(__open_2 __open64_2);
openat_2!(__openat_2 __openat64_2);

//! The exported functions: what the program calls instead of libc's.
//!
//! Each looks whether the path or the descriptor is served, and calls the real function with the same arguments when it is
//! not. They are C functions of the program as much as libc's are: they are called from signal handlers and before `main`, so
//! the way to the real function allocates nothing and takes no lock.
//!
//! `open`, `ioctl`, `fcntl` and `mremap` are variadic in C. Rust cannot define such functions, and need not on x86-64: there
//! the integer arguments of a variadic call are in the same registers as those of any other. An argument that the caller
//! did not give is whatever the register held, and is only passed on, as libc itself does.

#![allow(
    unsafe_code,
    reason = "exported C functions, which take the program's pointers and call libc's functions"
)]

mod descriptors;
mod directories;
mod memory;
mod open;
mod paths;
mod processes;
mod signals;
mod transfer;

use core::ffi::c_void;

use iommufd::Result;

/// A result as C has it: -1 and errno, or the value with errno as it was before.
fn answer<T, R: From<i8> + TryFrom<T>>(work: impl FnOnce() -> Result<T>) -> R {
    let before = crate::errno::get();
    let result = crate::inside::run(work);
    let (value, errno) = match result {
        Ok(value) => match R::try_from(value) {
            Ok(value) => (value, before),
            Err(_) => (R::from(-1), libc::EOVERFLOW),
        },
        Err(error) => (R::from(-1), error.raw_os_error()),
    };
    crate::errno::set(errno);
    value
}

/// As [`answer`], for what may turn out not to be ours.
fn answer_if(work: impl FnOnce() -> Result<Option<core::ffi::c_int>>) -> Option<core::ffi::c_int> {
    let before = crate::errno::get();
    let (value, errno) = match crate::inside::run(work) {
        Ok(value) => (value, before),
        Err(error) => (Some(-1), error.raw_os_error()),
    };
    crate::errno::set(errno);
    value
}

/// As [`answer`], for functions that give a pointer: MAP_FAILED and errno.
fn answer_pointer(work: impl FnOnce() -> Result<*mut c_void>) -> *mut c_void {
    let before = crate::errno::get();
    let (pointer, errno) = match crate::inside::run(work) {
        Ok(pointer) => (pointer, before),
        Err(error) => (libc::MAP_FAILED, error.raw_os_error()),
    };
    crate::errno::set(errno);
    pointer
}

//! The calling thread's `errno`.

#![allow(unsafe_code, reason = "errno is a C variable of the thread")]

use core::ffi::c_int;

/// Sets it.
pub(crate) fn set(value: c_int) {
    // SAFETY: needed because errno is found by this call only; libc guarantees that the pointer is valid for this thread.
    unsafe { *libc::__errno_location() = value };
}

/// Its value.
pub(crate) fn get() -> c_int {
    // SAFETY: as above.
    unsafe { *libc::__errno_location() }
}

/// Runs `work`, which may use libc, and leaves errno as it was.
pub(crate) fn preserved<T>(work: impl FnOnce() -> T) -> T {
    let before = get();
    let result = work();
    set(before);
    result
}

//! Threads of the library take none of the program's signals.

#![allow(unsafe_code, reason = "signal masks are C structures")]

use core::{mem::MaybeUninit, ptr};

/// Does `work`, which may start a thread, with all signals blocked.
pub(super) fn blocked<T>(work: impl FnOnce() -> T) -> T {
    let mut all = MaybeUninit::uninit();
    let mut before = MaybeUninit::uninit();
    // SAFETY: needed because a thread inherits the mask of who starts it. The first call fills the set that the second reads and
    // writes the old mask to a local.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr());
    }
    let result = work();
    // SAFETY: as above: `before` was written by the call there, which cannot fail with these arguments.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), ptr::null_mut()) };
    result
}

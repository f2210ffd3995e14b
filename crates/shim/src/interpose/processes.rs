//! Functions that make a process, or end it, and do so in libc without calling any that is exported here.

use core::ffi::c_int;

use crate::{real, share, tree};

/// Defines the functions that end the process at once, without what the loader would call.
macro_rules! exits {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(status: c_int) -> ! {
            tree::remove();
            // SAFETY: the caller's argument, for the function that it meant to call.
            unsafe { real::$name()(status) };
            std::process::abort()
        }
    )*};
}

exits!(_exit _Exit);

#[unsafe(no_mangle)]
unsafe extern "C" fn daemon(stay: c_int, keep: c_int) -> c_int {
    // SAFETY: the caller's arguments, for the function that it meant to call.
    share::bequeath(|| unsafe { real::daemon()(stay, keep) })
}

//! `sigaction` and `signal`, for the one signal whose handler may be the library's.

use core::ffi::c_int;

use libc::sighandler_t;

use crate::{
    real,
    registers::wanted::{self, Action},
};

/// Defines `sigaction` under the names that it has.
macro_rules! sigaction {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(
            signal: c_int,
            new: *const libc::sigaction,
            old: *mut libc::sigaction,
        ) -> c_int {
            if signal == libc::SIGSEGV {
                // SAFETY: the caller's structure, or none.
                let new = unsafe { new.as_ref() }.map(Action::from);
                if let Some(before) = wanted::exchange(new) {
                    if !old.is_null() {
                        // SAFETY: the caller's structure.
                        unsafe { old.write(before.into()) };
                    }
                    return 0;
                }
            }
            // SAFETY: the caller's arguments, for the function that it meant to call.
            unsafe { real::$name()(signal, new, old) }
        }
    )*};
}

sigaction!(sigaction __sigaction);

/// Defines `signal` under a name, with the flags that its kind of signals has.
macro_rules! signal {
    ($($name:ident: $flags:expr, $blocks:expr;)*) => {$(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(signal: c_int, handler: sighandler_t) -> sighandler_t {
            if signal == libc::SIGSEGV && handler != libc::SIG_ERR {
                let mask = if $blocks { wanted::bit(signal) } else { 0 };
                if let Some(before) = wanted::exchange(Some(Action { handler, flags: $flags, mask })) {
                    return before.handler;
                }
            }
            // SAFETY: the caller's arguments, for the function that it meant to call.
            unsafe { real::$name()(signal, handler) }
        }
    )*};
}

signal! {
    signal: libc::SA_RESTART, true;
    bsd_signal: libc::SA_RESTART, true;
    sysv_signal: libc::SA_RESETHAND | libc::SA_NODEFER, false;
    __sysv_signal: libc::SA_RESETHAND | libc::SA_NODEFER, false;
}

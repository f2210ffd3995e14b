//! Failures on demand: every step that can fail for want of memory asks [`check`] first, and a test makes the n-th of
//! them fail, for every n until none does. This is the kernel's `/proc/self/task/N/fail-nth`
//! (Documentation/fault-injection), so `ring3 shim` serves that file from here.

use std::cell::Cell;

use crate::{Errno, Result};

thread_local! {
    /// How many more checks until the one that fails; 0 for none.
    static COUNTDOWN: Cell<u64> = const { Cell::new(0) };
}

/// Makes the `nth` check of this thread from now on fail; none for 0.
pub fn fail_nth(nth: u64) {
    COUNTDOWN.set(nth);
}

/// How many checks are left until the one that fails: 0 when it has failed, or none was to.
pub fn remaining() -> u64 {
    COUNTDOWN.get()
}

/// ENOMEM when it is this check's turn.
#[inline]
pub fn check() -> Result<()> {
    match COUNTDOWN.get() {
        0 => Ok(()),
        left => {
            COUNTDOWN.set(left - 1);
            if left == 1 { Err(Errno::NOMEM) } else { Ok(()) }
        }
    }
}

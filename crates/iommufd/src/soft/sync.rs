//! What [`epoch`](super::epoch) is made of: atomics, locks, and time to pass. Its model has loom's instead.

pub(super) use core::sync::atomic::{AtomicU64, Ordering, compiler_fence, fence};
use core::time::Duration;
pub(super) use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Instant;

/// An exchange is a fence for everything: a locked instruction on x86 (Intel SDM vol. 3, 10.2.3.9), which the language's memory model
/// does not know of.
pub(super) const EXCHANGE_IS_FENCE: bool = cfg!(target_arch = "x86_64");

/// How long a waiter does not look, in turn, before it sleeps. Most sections are shorter than going to sleep.
pub(super) const PAUSES: [Duration; 4] =
    [Duration::from_micros(1), Duration::from_micros(2), Duration::from_micros(4), Duration::from_micros(4)];

/// Lets `duration` pass without going to sleep.
pub(super) fn pause(duration: Duration) {
    let begin = Instant::now();
    while begin.elapsed() < duration {
        core::hint::spin_loop();
    }
}

//! What the program wants of SIGSEGV, while the signal's handler is ours.
//!
//! `sigaction` may be called anywhere, also in a signal handler; so nothing is allocated here, and the lock is held with all signals
//! blocked, for a few instructions.

#![allow(unsafe_code, reason = "signal masks are C structures")]

use core::{
    ffi::c_int,
    hint,
    mem::MaybeUninit,
    ptr,
    sync::atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering},
};

/// A `sigaction`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Action {
    /// A function, SIG_DFL or SIG_IGN.
    pub handler: usize,
    /// `SA_*`.
    pub flags: c_int,
    /// The signals that are blocked meanwhile, one bit for each, as the kernel has them.
    pub mask: u64,
}

/// The bit of a signal in a mask.
pub(crate) fn bit(signal: c_int) -> u64 {
    u32::try_from(signal).ok().and_then(|signal| 1_u64.checked_shl(signal.wrapping_sub(1))).unwrap_or(0)
}

impl From<&libc::sigaction> for Action {
    fn from(action: &libc::sigaction) -> Self {
        // SAFETY: needed because a set is a C structure; it is the caller's, and whole.
        let has = |signal: &c_int| unsafe { libc::sigismember(&raw const action.sa_mask, *signal) } == 1;
        let mask = (1..=64).filter(has).fold(0, |mask, signal| mask | bit(signal));
        Self { handler: action.sa_sigaction, flags: action.sa_flags, mask }
    }
}

impl From<Action> for libc::sigaction {
    fn from(action: Action) -> Self {
        // SAFETY: needed because the structure is C's: zeroes are the default action.
        let mut whole = unsafe { MaybeUninit::<Self>::zeroed().assume_init() };
        whole.sa_sigaction = action.handler;
        whole.sa_flags = action.flags;
        for signal in (1..=64).filter(|signal| action.mask & bit(*signal) != 0) {
            // SAFETY: as above; the set is the structure's own.
            unsafe { libc::sigaddset(&raw mut whole.sa_mask, signal) };
        }
        whole
    }
}

static LOCKED: AtomicBool = AtomicBool::new(false);
static CAUGHT: AtomicBool = AtomicBool::new(false);
static HANDLER: AtomicUsize = AtomicUsize::new(libc::SIG_DFL);
static FLAGS: AtomicI32 = AtomicI32::new(0);
static MASK: AtomicU64 = AtomicU64::new(0);

/// Does `work` alone, and with all signals blocked.
fn alone<T>(work: impl FnOnce() -> T) -> T {
    let (mut all, mut before) = (MaybeUninit::uninit(), MaybeUninit::uninit());
    // SAFETY: needed because a handler that came in the middle would wait for ever. The first call fills the set that the second
    // reads and writes the old mask to a local.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr());
    }
    while LOCKED.compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed).is_err() {
        hint::spin_loop();
    }
    let result = work();
    LOCKED.store(false, Ordering::Release);
    // SAFETY: as above: `before` was written by the call there, which cannot fail with these arguments.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), ptr::null_mut()) };
    result
}

fn load() -> Action {
    Action {
        handler: HANDLER.load(Ordering::Relaxed),
        flags: FLAGS.load(Ordering::Relaxed),
        mask: MASK.load(Ordering::Relaxed),
    }
}

fn store(action: Action) {
    HANDLER.store(action.handler, Ordering::Relaxed);
    FLAGS.store(action.flags, Ordering::Relaxed);
    MASK.store(action.mask, Ordering::Relaxed);
}

/// The handler is to be ours: `install` makes it so, unless it is, and gives what was there.
pub(crate) fn catch(install: impl FnOnce() -> Option<Action>) {
    if CAUGHT.load(Ordering::Acquire) {
        return;
    }
    alone(|| {
        if !CAUGHT.load(Ordering::Relaxed)
            && let Some(before) = install()
        {
            store(before);
            CAUGHT.store(true, Ordering::Release);
        }
    });
}

/// What it wants now.
pub(crate) fn now() -> Action {
    alone(load)
}

/// The program asks what there is, and for `new` if that is given: what there was. None while the handler is not ours.
pub(crate) fn exchange(new: Option<Action>) -> Option<Action> {
    if !CAUGHT.load(Ordering::Acquire) {
        return None;
    }
    alone(|| {
        let before = load();
        if let Some(new) = new {
            store(new);
        }
        Some(before)
    })
}

/// In a child after a fork: another thread may have had the lock, which the child does not have.
pub(crate) fn child() {
    LOCKED.store(false, Ordering::Release);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn actions_are_kept_whole() {
        let wanted = Action { handler: 0x1234, flags: libc::SA_SIGINFO, mask: bit(1) | bit(11) | bit(64) };
        assert_eq!(exchange(Some(wanted)), None, "it is not ours");
        let before = Action { handler: libc::SIG_IGN, flags: 0, mask: 0 };
        catch(|| Some(before));
        catch(|| panic!("it is ours already"));
        assert_eq!(exchange(None), Some(before));
        assert_eq!(exchange(Some(wanted)), Some(before));
        assert_eq!(Action::from(&libc::sigaction::from(now())), wanted);
    }
}

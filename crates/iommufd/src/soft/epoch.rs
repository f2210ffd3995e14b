//! Waiting for readers that began before.
//!
//! # Theory of operation
//!
//! Each [`Member`] has a slot: 0 while it is outside, and while it is inside a number that it never had before. Who has
//! changed something and wants the old state to be out of use ([`synchronize`](Epoch::synchronize)) looks at all slots and
//! waits for those with a number, until they have another value.
//!
//! - A slot that has another value was left since: what was read before is used no more. Whether its owner came in
//!   again does not matter; it sees the change then (release on every store to the slot, acquire on the look).
//! - A slot that reads 0 either is outside, or its owner's store is on the way. Then the owner's fence comes after our
//!   fence, so its loads see the change.
//! - A member that registers after the look takes the mutex after us, and sees the change by that.
//!
//! So members share nothing with each other, and with who waits only their slots.
//!
//! A look takes the slot's cache line from its owner, who pays for it when it comes in or leaves next. So who waits does not look
//! all the time: after a first look it gives a member a microsecond, which is several sections, then twice that, and then
//! sleeps. A member loses little even beside somebody who waits after every page that he unmaps; he waits longer.
//!
//! Who sleeps marks the slots that it waits for, so that leaving, an exchange, tells whether somebody is to be woken.
//!
//! The fence could be the waiter's alone, by membarrier(2). That saves a member some 10 ns for each time inside, and costs
//! it an interrupt for each wait elsewhere: in a virtual machine microseconds. Measured beside a writer that waits after
//! each page, readers lost between a third and two thirds of their rate with it, and a fifth to two fifths with fences.
//!
//! Locks: `slots` and `gate` are leaves and never held together. Nobody waits while holding `slots`, so that members come
//! and go while somebody waits.
//!
//! What this is made of comes from [`super::sync`], so that a model checker can put its own there: crate `ring3-models`
//! runs this very file through every order in which the threads of small programs can go on, and every value that a load may
//! return.

use std::sync::{Arc, PoisonError};

use super::sync::{
    AtomicU64, Condvar, EXCHANGE_IS_FENCE, Mutex, MutexGuard, Ordering, PAUSES, compiler_fence, fence, pause,
};

/// What a member outside has in its slot.
const OUTSIDE: u64 = 0;
/// Somebody waits for this one to leave.
const AWAITED: u64 = 1 << 63;

/// A member's state, on cache lines of its own: two, because processors fetch them in pairs.
#[derive(Debug)]
#[repr(align(128))]
struct Slot {
    state: AtomicU64,
}

impl Slot {
    /// Which time inside this is; [`OUTSIDE`] for none.
    fn time(&self) -> u64 {
        self.state.load(Ordering::Acquire) & !AWAITED
    }

    /// Its owner comes in: what it loads after this is loaded after this is seen.
    #[inline]
    fn publish(&self, time: u64) {
        if EXCHANGE_IS_FENCE {
            // A store with a fence is the slower of the two.
            self.state.swap(time, Ordering::SeqCst);
            compiler_fence(Ordering::SeqCst);
        } else {
            self.state.store(time, Ordering::Release);
            fence(Ordering::SeqCst);
        }
    }

    /// Asks its owner to wake the waiters when it leaves: whether it is inside for the time `time` still.
    fn await_end(&self, time: u64) -> bool {
        let mark = |state: u64| (state & !AWAITED == time).then_some(state | AWAITED);
        self.state.fetch_update(Ordering::AcqRel, Ordering::Acquire, mark).is_ok()
    }
}

/// Something that is read without locks, and changed by those who call [`Self::synchronize`].
#[derive(Debug)]
pub(super) struct Epoch {
    slots: Mutex<Vec<Arc<Slot>>>,
    /// Held while a waiter looks at slots and goes to sleep, and while a member wakes it.
    gate: Mutex<()>,
    left: Condvar,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Epoch {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self { slots: Mutex::default(), gate: Mutex::default(), left: Condvar::new() })
    }

    /// A new member, outside.
    pub(super) fn join(self: &Arc<Self>) -> Member {
        let slot = Arc::new(Slot { state: AtomicU64::new(OUTSIDE) });
        lock(&self.slots).push(Arc::clone(&slot));
        Member { epoch: Arc::clone(self), slot, times: OUTSIDE, inside: false }
    }

    /// Waits until every member that was inside when this was called has left. Must not be called by one inside.
    pub(super) fn synchronize(&self) {
        fence(Ordering::SeqCst);
        let inside = |slot: &Arc<Slot>| {
            let time = slot.time();
            (time != OUTSIDE).then(|| (Arc::clone(slot), time))
        };
        let busy: Vec<_> = lock(&self.slots).iter().filter_map(inside).collect();
        if busy.is_empty() {
            return;
        }
        for duration in PAUSES {
            pause(duration);
            if !busy.iter().any(|(slot, time)| slot.time() == *time) {
                return;
            }
        }
        let mut gate = lock(&self.gate);
        while busy.iter().any(|(slot, time)| slot.await_end(*time)) {
            gate = self.left.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Whether nobody is inside, so that [`Self::synchronize`] would not wait.
    pub(super) fn is_quiet(&self) -> bool {
        fence(Ordering::SeqCst);
        lock(&self.slots).iter().all(|slot| slot.time() == OUTSIDE)
    }

    /// How many members there are.
    #[cfg(test)]
    pub(super) fn members(&self) -> usize {
        lock(&self.slots).len()
    }

    #[cold]
    fn wake(&self) {
        // A waiter that has looked and does not sleep yet holds the gate.
        drop(lock(&self.gate));
        self.left.notify_all();
    }
}

/// Who may be inside, one time at once.
#[derive(Debug)]
pub(super) struct Member {
    epoch: Arc<Epoch>,
    slot: Arc<Slot>,
    /// How often it came in.
    times: u64,
    inside: bool,
}

impl Member {
    /// Comes in. Who is inside already, because somebody forgot to leave, leaves first.
    #[inline]
    pub(super) fn enter(&mut self) {
        if self.inside {
            self.leave();
        }
        self.inside = true;
        self.times += 1;
        self.slot.publish(self.times);
    }

    /// Leaves: what was read inside must not be used any more.
    #[inline]
    pub(super) fn leave(&mut self) {
        self.inside = false;
        if self.slot.state.swap(OUTSIDE, Ordering::AcqRel) & AWAITED != 0 {
            self.epoch.wake();
        }
    }
}

#[cfg(test)]
impl Member {
    /// Whether somebody sleeps, or is about to, until it leaves.
    pub(super) fn is_awaited(&self) -> bool {
        self.slot.state.load(Ordering::SeqCst) & AWAITED != 0
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.leave();
        lock(&self.epoch.slots).retain(|slot| !Arc::ptr_eq(slot, &self.slot));
    }
}

//! Waiting for readers, in threads as they run here; `models` has every order.

use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::{sync::mpsc, thread};

use crate::soft::epoch::Epoch;

/// A value that is "freed" by being set to false after a grace period must be seen true by all inside.
#[test]
fn nobody_sees_what_was_freed_after_a_grace_period() {
    const ROUNDS: usize = 2_000;
    let epoch = Epoch::new();
    let cells: Vec<_> = (0..=ROUNDS).map(|_| AtomicBool::new(true)).collect();
    let current = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..2 {
            let mut member = epoch.join();
            let (cells, current) = (&cells, &current);
            scope.spawn(move || {
                loop {
                    member.enter();
                    let at = current.load(Ordering::Acquire);
                    for _ in 0..20 {
                        assert!(cells[at].load(Ordering::Relaxed), "cell {at} was freed under a reader");
                    }
                    member.leave();
                    if at == ROUNDS {
                        break;
                    }
                }
            });
        }
        for (round, cell) in cells.iter().enumerate().take(ROUNDS) {
            current.store(round + 1, Ordering::Release);
            epoch.synchronize();
            cell.store(false, Ordering::Relaxed);
        }
    });
}

#[test]
fn who_is_inside_holds_up_the_wait_and_nothing_else() {
    let epoch = Epoch::new();
    let mut inside = epoch.join();
    inside.enter();
    let (done, is_done) = mpsc::channel();
    thread::scope(|scope| {
        let waiter = &epoch;
        scope.spawn(move || {
            waiter.synchronize();
            done.send(()).unwrap();
        });
        // The waiter sleeps or is about to; others come, go and register meanwhile.
        while !inside.is_awaited() {
            let mut other = epoch.join();
            other.enter();
            other.leave();
        }
        assert_eq!(is_done.try_recv(), Err(mpsc::TryRecvError::Empty));
        let mut later = epoch.join();
        later.enter();
        // One that came later is not waited for.
        inside.leave();
        is_done.recv().unwrap();
        later.leave();
    });
}

#[test]
fn coming_in_again_ends_the_time_before() {
    let epoch = Epoch::new();
    let mut member = epoch.join();
    member.enter();
    thread::scope(|scope| {
        let waiter = scope.spawn(|| epoch.synchronize());
        while !member.is_awaited() {
            thread::yield_now();
        }
        // The guard of the first time was forgotten: the mark of who waits for it must not be lost.
        member.enter();
        waiter.join().unwrap();
    });
    member.leave();
}

#[test]
fn a_member_that_is_dropped_inside_is_not_waited_for() {
    let epoch = Epoch::new();
    let mut member = epoch.join();
    member.enter();
    drop(member);
    epoch.synchronize();
    assert_eq!(epoch.members(), 0);
}

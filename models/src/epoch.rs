//! How `iommufd::soft` waits for readers: its file `epoch.rs`. What is not checked: the exchange that is a
//! fence on x86 (loom knows the store and the fence of other processors), and the waiter's pauses but one, which do nothing but
//! look. Entries of a table are modelled by the least that has their orderings: a word that is loaded and stored as in
//! `table`, and memory that loom says of who accesses it when.

use std::sync::Arc;

use loom::{
    cell::UnsafeCell,
    model::Builder,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use epoch::{Epoch, Member};

#[path = "../../crates/iommufd/src/soft/epoch.rs"]
#[allow(dead_code, reason = "not everything is modelled")]
mod epoch;

/// What `epoch` is made of, of loom.
mod sync {
    use core::time::Duration;

    pub(super) use core::sync::atomic::compiler_fence;
    pub(super) use loom::sync::{
        Condvar, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering, fence},
    };

    pub(super) const EXCHANGE_IS_FENCE: bool = false;

    /// That a waiter looks more than twice is nothing new.
    pub(super) const PAUSES: [Duration; 1] = [Duration::ZERO];

    /// Others may go on between any two steps; to yield would only let them.
    pub(super) fn pause(_: Duration) {}
}

/// Runs a program in all orders in which threads take turns by force at most `preemptions` times.
fn check(preemptions: usize, program: impl Fn() + Send + Sync + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(program);
}

/// An entry that leads to one of two places, as a node's does.
struct Entry {
    to: AtomicUsize,
    places: [UnsafeCell<()>; 2],
}

impl Entry {
    /// One that leads to the first.
    fn new() -> Arc<Self> {
        let entry = Self { to: AtomicUsize::new(0), places: [UnsafeCell::new(()), UnsafeCell::new(())] };
        entry.places[0].with_mut(|_| ());
        Arc::new(entry)
    }

    /// What a section does: it finds a place and reads what is there.
    fn read(&self) -> usize {
        let at = self.to.load(Ordering::Acquire);
        self.places[at].with(|_| ());
        at
    }

    /// What who maps does: it fills a place and lets the entry lead there.
    fn put(&self, at: usize) {
        self.places[at].with_mut(|_| ());
        self.to.store(at, Ordering::Release);
    }

    /// What frees a place does. Loom ends the program if somebody may be reading it.
    fn free(&self, at: usize) {
        self.places[at].with_mut(|_| ());
    }
}

fn section<T>(member: &mut Member, body: impl FnOnce() -> T) -> T {
    member.enter();
    let result = body();
    member.leave();
    result
}

#[test]
fn what_a_section_may_have_found_is_not_freed_before_it_ends() {
    check(3, || {
        let (epoch, entry) = (Epoch::new(), Entry::new());
        let mut member = epoch.join();
        let reader = thread::spawn({
            let entry = Arc::clone(&entry);
            move || {
                // The same slot twice: the second time is another number.
                let first = section(&mut member, || entry.read());
                let second = section(&mut member, || (entry.read(), entry.read()));
                assert!(first <= second.0 && second.0 <= second.1);
            }
        });
        entry.put(1);
        epoch.synchronize();
        entry.free(0);
        reader.join().unwrap();
    });
}

#[test]
fn who_registers_late_sees_the_change_or_is_waited_for() {
    check(3, || {
        let (epoch, entry) = (Epoch::new(), Entry::new());
        let reader = thread::spawn({
            let (epoch, entry) = (Arc::clone(&epoch), Arc::clone(&entry));
            move || {
                let mut member = epoch.join();
                section(&mut member, || entry.read());
            }
        });
        entry.put(1);
        epoch.synchronize();
        entry.free(0);
        reader.join().unwrap();
    });
}

#[test]
fn a_place_is_used_again_after_each_of_two_grace_periods() {
    check(2, || {
        let (epoch, entry) = (Epoch::new(), Entry::new());
        let mut member = epoch.join();
        let reader = thread::spawn({
            let entry = Arc::clone(&entry);
            move || {
                section(&mut member, || entry.read());
                section(&mut member, || entry.read());
            }
        });
        for at in [1, 0] {
            entry.put(at);
            epoch.synchronize();
            entry.free(1 - at);
        }
        reader.join().unwrap();
    });
}

#[test]
fn who_is_woken_by_one_reader_still_waits_for_the_other() {
    check(3, || {
        let (epoch, entry) = (Epoch::new(), Entry::new());
        let readers = [(); 2].map(|()| {
            let (mut member, entry) = (epoch.join(), Arc::clone(&entry));
            thread::spawn(move || {
                section(&mut member, || entry.read());
            })
        });
        entry.put(1);
        epoch.synchronize();
        entry.free(0);
        readers.map(|reader| reader.join().unwrap());
    });
}

#[test]
fn two_who_wait_for_one_reader_are_both_woken() {
    check(2, || {
        let (epoch, entry) = (Epoch::new(), Entry::new());
        let (mut member, waiter) = (epoch.join(), Arc::clone(&epoch));
        let reader = thread::spawn({
            let entry = Arc::clone(&entry);
            move || {
                section(&mut member, || entry.read());
            }
        });
        let other = thread::spawn(move || waiter.synchronize());
        entry.put(1);
        epoch.synchronize();
        entry.free(0);
        reader.join().unwrap();
        other.join().unwrap();
    });
}

#[test]
fn coming_in_again_and_dropping_inside_are_ends() {
    check(3, || {
        let (epoch, entry) = (Epoch::new(), Entry::new());
        let mut member = epoch.join();
        let reader = thread::spawn({
            let entry = Arc::clone(&entry);
            move || {
                member.enter();
                entry.read();
                member.enter();
                entry.read();
                drop(member);
            }
        });
        entry.put(1);
        epoch.synchronize();
        entry.free(0);
        reader.join().unwrap();
    });
}

#[test]
fn nobody_is_inside_when_it_is_quiet() {
    check(3, || {
        let (epoch, entry) = (Epoch::new(), Entry::new());
        let mut member = epoch.join();
        let reader = thread::spawn({
            let entry = Arc::clone(&entry);
            move || {
                section(&mut member, || entry.read());
            }
        });
        entry.put(1);
        if epoch.is_quiet() {
            entry.free(0);
        }
        reader.join().unwrap();
    });
}

/// A write that is not in the copy which was made after the dirty bit was taken has set the bit again.
#[test]
fn no_write_is_lost_between_the_dirty_bit_and_the_copy() {
    const DIRTY: usize = 1;
    check(3, || {
        let epoch = Epoch::new();
        let mut member = epoch.join();
        let (leaf, page) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let writer = thread::spawn({
            let (leaf, page) = (Arc::clone(&leaf), Arc::clone(&page));
            move || {
                for value in [1, 2] {
                    section(&mut member, || {
                        // As `Table::translate`; nothing else changes this leaf's other bits.
                        let found = leaf.load(Ordering::Acquire);
                        if found & DIRTY == 0 {
                            let set = found | DIRTY;
                            let order = (Ordering::AcqRel, Ordering::Relaxed);
                            while leaf.compare_exchange(found, set, order.0, order.1).is_err() {}
                        }
                        page.store(value, Ordering::Relaxed);
                    });
                }
            }
        });
        leaf.fetch_and(!DIRTY, Ordering::AcqRel);
        epoch.synchronize();
        let copy = page.load(Ordering::Relaxed);
        writer.join().unwrap();
        let dirty = leaf.load(Ordering::Relaxed) & DIRTY != 0;
        assert!(dirty || page.load(Ordering::Relaxed) == copy);
    });
}

//! Which addresses of the program are mappings of served files, and what each holds until it is unmapped.

use core::sync::atomic::{AtomicUsize, Ordering};
use std::{
    any::Any,
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::inside;

/// What a mapping holds: the same for all its parts when it is cut.
type Held = Arc<dyn Any + Send + Sync>;

/// Start -> end and what is held. Never overlapping.
static MAPPINGS: Mutex<BTreeMap<usize, (usize, Held)>> = Mutex::new(BTreeMap::new());

/// How many there are, so that a program without any does not wait for the lock.
static COUNT: AtomicUsize = AtomicUsize::new(0);

fn lock() -> MutexGuard<'static, BTreeMap<usize, (usize, Held)>> {
    MAPPINGS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `length` bytes at `at` are a mapping that holds `held`.
pub(crate) fn insert(at: usize, length: usize, held: Held) {
    inside::run(|| {
        let mut mappings = lock();
        mappings.insert(at, (end(at, length), held));
        COUNT.store(mappings.len(), Ordering::Release);
    });
}

/// Whether any of `length` bytes at `at` are such a mapping.
pub(crate) fn any(at: usize, length: usize) -> bool {
    if COUNT.load(Ordering::Acquire) == 0 || inside::is() {
        return false;
    }
    let past = end(at, length);
    inside::run(|| lock().range(..past).next_back().is_some_and(|(_, (end, _))| *end > at))
}

/// What holds the mapping that `at` is in, and its end; none when it is in none.
pub(crate) fn at(at: usize) -> Option<(usize, Held)> {
    if COUNT.load(Ordering::Acquire) == 0 {
        return None;
    }
    inside::run(|| {
        let mappings = lock();
        let (_, (end, held)) = mappings.range(..=at).next_back()?;
        (*end > at).then(|| (*end, Arc::clone(held)))
    })
}

/// `length` bytes at `at` were unmapped, or something else was mapped over them.
pub(crate) fn replaced(at: usize, length: usize) {
    if COUNT.load(Ordering::Acquire) != 0 && !inside::is() {
        drop(take(at, length));
    }
}

/// A mapping was moved, or its length changed.
pub(crate) fn moved(from: usize, old_length: usize, to: usize, new_length: usize) {
    if COUNT.load(Ordering::Acquire) == 0 || inside::is() {
        return;
    }
    let taken = take(from, old_length);
    drop(take(to, new_length));
    if let Some((_, held)) = taken.into_iter().next() {
        insert(to, new_length, held);
    }
}

/// Cuts a range out of the table: its parts. They are dropped by the caller, without the lock.
fn take(at: usize, length: usize) -> Vec<(usize, Held)> {
    inside::run(|| take_locked(at, length))
}

fn take_locked(at: usize, length: usize) -> Vec<(usize, Held)> {
    let mut mappings = lock();
    let past = end(at, length);
    let overlapping: Vec<usize> = mappings
        .range(..past)
        .rev()
        .take_while(|&(_, &(end, _))| end > at)
        .map(|(&start, _)| start)
        .collect();
    let mut taken = Vec::new();
    for start in overlapping.into_iter().rev() {
        let Some((last, held)) = mappings.remove(&start) else { continue };
        if start < at {
            mappings.insert(start, (at, Arc::clone(&held)));
        }
        if past < last {
            mappings.insert(past, (last, Arc::clone(&held)));
        }
        taken.push((start.max(at), held));
    }
    COUNT.store(mappings.len(), Ordering::Release);
    taken
}

/// The end of a range, whose length counts in whole pages.
fn end(at: usize, length: usize) -> usize {
    at.saturating_add(length.checked_next_multiple_of(4096).unwrap_or(usize::MAX))
}

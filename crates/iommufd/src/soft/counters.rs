//! Counting what readers do without a cache line that they share.

use core::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What readers did.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct Counters {
    /// Translations that succeeded.
    pub translations: u64,
    /// Translations that did not.
    pub faults: u64,
}

impl Counters {
    fn plus(self, more: Self) -> Self {
        Self {
            translations: self.translations.wrapping_add(more.translations),
            faults: self.faults.wrapping_add(more.faults),
        }
    }
}

/// One reader's, to which only it adds.
#[derive(Default, Debug)]
struct Own {
    translations: AtomicU64,
    faults: AtomicU64,
}

impl Own {
    fn get(&self) -> Counters {
        Counters {
            translations: self.translations.load(Ordering::Relaxed),
            faults: self.faults.load(Ordering::Relaxed),
        }
    }
}

/// The counters of all readers of something: of those that are there, and the sum of those that are gone.
#[derive(Default, Debug)]
pub(super) struct CounterSet(Mutex<(Vec<Arc<Own>>, Counters)>);

impl CounterSet {
    fn lock(&self) -> MutexGuard<'_, (Vec<Arc<Own>>, Counters)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new reader's. Who drops it calls [`Self::leave`] before.
    pub(super) fn join(&self) -> Tally {
        let own = Arc::new(Own::default());
        self.lock().0.push(Arc::clone(&own));
        Tally(own)
    }

    pub(super) fn leave(&self, tally: &Tally) {
        let mut set = self.lock();
        set.0.retain(|own| !Arc::ptr_eq(own, &tally.0));
        set.1 = set.1.plus(tally.0.get());
    }

    pub(super) fn sum(&self) -> Counters {
        let set = self.lock();
        set.0.iter().fold(set.1, |sum, own| sum.plus(own.get()))
    }
}

/// What one reader did.
#[derive(Debug)]
pub(super) struct Tally(Arc<Own>);

impl Tally {
    #[inline]
    pub(super) fn add(&mut self, more: Counters) {
        let sum = self.0.get().plus(more);
        self.0.translations.store(sum.translations, Ordering::Relaxed);
        self.0.faults.store(sum.faults, Ordering::Relaxed);
    }
}

//! The pins of a backing store.

use std::collections::BTreeMap;

use super::counts::Span;
use crate::hostmem::{HostRun, PinnedPages};

/// Pages that are pinned, each by one pin. A pin may have more pages than are released at a time: it is split then.
#[derive(Debug, Default)]
pub(super) struct Held {
    pins: BTreeMap<u64, Box<dyn PinnedPages>>,
}

impl Held {
    /// Keeps `pin`, whose first page is `first`. None of its pages is held yet.
    pub(super) fn insert(&mut self, first: u64, pin: Box<dyn PinnedPages>) {
        self.pins.insert(first, pin);
    }

    /// Unpins the pages of `span`, all of which are held.
    pub(super) fn release(&mut self, span: Span) {
        self.split_before(span.first);
        if let Some(after) = span.last.checked_add(1) {
            self.split_before(after);
        }
        while let Some((&first, _)) = self.pins.range(span.first..=span.last).next() {
            self.pins.remove(&first);
        }
    }

    fn split_before(&mut self, page: u64) {
        if let Some((&first, pin)) = self.pins.range_mut(..page).next_back()
            && pin.pages() > page - first
        {
            let rest = pin.split_off(page - first);
            self.pins.insert(page, rest);
        }
    }

    /// Where `page` is, and how many pages lie behind it in memory that are held too; none when it is not held.
    pub(super) fn run(&self, page: u64) -> Option<HostRun> {
        let (&first, pin) = self.pins.range(..=page).next_back()?;
        (page - first < pin.pages()).then(|| pin.run(page - first))
    }

    /// The first page from `page` on that is held.
    pub(super) fn next(&self, page: u64) -> Option<u64> {
        if self.run(page).is_some() {
            return Some(page);
        }
        self.pins.range(page..).next().map(|(&first, _)| first)
    }
}

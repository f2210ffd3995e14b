//! Pins as `iommufd` holds them.

use std::sync::Arc;

use iommufd::{
    hostmem::{HostRun, PinnedPages},
    iova::PAGE_SIZE,
};

use super::{
    moving::{release, with_registry},
    pins::Pin,
};

/// A pin that ends when this is dropped.
#[derive(Debug)]
struct Pinned(Arc<Pin>);

/// `pin`, which is in the registry.
pub(super) fn new(pin: Arc<Pin>) -> Box<dyn PinnedPages> {
    Box::new(Pinned(pin))
}

// SAFETY: the pages were made present with the rights that were asked for when they were entered into the registry, and as long
// as they are there the exported functions move them away before the program unmaps them. They are the program's memory.
unsafe impl PinnedPages for Pinned {
    fn pages(&self) -> u64 {
        self.0.pages()
    }

    fn run(&self, first: u64) -> HostRun {
        self.0.run(first)
    }

    fn split_off(&mut self, at: u64) -> Box<dyn PinnedPages> {
        let (before, after) = with_registry(|registry| registry.split(&self.0, at));
        self.0 = before;
        new(after)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let hidden = with_registry(|registry| registry.unpin(&self.0));
        for run in hidden {
            release(run.start * PAGE_SIZE, run.pages * PAGE_SIZE);
        }
    }
}

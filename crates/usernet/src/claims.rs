//! Which engine of several a flow belongs to.
//!
//! A flow is served by one engine, the one that first saw it, and only that one has it in its table. The guest
//! may send a flow's frames by any of its queues, so an engine that has no such flow looks here before it makes one. It is
//! asked only then, when a flow begins and when it ends: what an engine knows by itself costs nothing more.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Parts of a directory, so that engines seldom wait for each other.
const PARTS: usize = 64;

/// Who has which flow: parts with a lock each, keyed with a secret so that no guest can have them collide.
#[derive(Debug)]
pub(crate) struct Directory<K> {
    secret: RandomState,
    parts: [Mutex<HashMap<K, u16>>; PARTS],
}

impl<K: Copy + Eq + Hash> Directory<K> {
    pub(crate) fn new() -> Self {
        Self { secret: RandomState::new(), parts: std::array::from_fn(|_| Mutex::default()) }
    }

    fn part(&self, key: &K) -> MutexGuard<'_, HashMap<K, u16>> {
        let part = self.secret.hash_one(key) as usize % PARTS;
        // Whole after a panic too: each change is one call.
        self.parts[part].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One engine's view of a [`Directory`]; of an engine that is alone, nothing at all.
#[derive(Debug)]
pub(crate) struct Claims<K> {
    directory: Option<Arc<Directory<K>>>,
    engine: u16,
}

impl<K> Claims<K> {
    /// For an engine that is alone.
    pub(crate) fn alone() -> Self {
        Self { directory: None, engine: 0 }
    }

    /// For engine number `engine` of several.
    pub(crate) fn shared(directory: Arc<Directory<K>>, engine: u16) -> Self {
        Self { directory: Some(directory), engine }
    }
}

impl<K: Copy + Eq + Hash> Claims<K> {
    /// Takes a flow for this engine. Whether it is this one's now: another may have been faster.
    pub(crate) fn claim(&self, key: &K) -> bool {
        let Some(directory) = &self.directory else { return true };
        match directory.part(key).entry(*key) {
            Entry::Occupied(entry) => *entry.get() == self.engine,
            Entry::Vacant(entry) => {
                entry.insert(self.engine);
                true
            }
        }
    }

    /// Gives a flow up.
    pub(crate) fn release(&self, key: &K) {
        if let Some(directory) = &self.directory
            && let Entry::Occupied(entry) = directory.part(key).entry(*key)
            && *entry.get() == self.engine
        {
            entry.remove();
        }
    }

    /// The other engine that has the flow, if one has.
    pub(crate) fn elsewhere(&self, key: &K) -> Option<u16> {
        let owner = self.directory.as_ref()?.part(key).get(key).copied();
        owner.filter(|&owner| owner != self.engine)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flow_has_one_engine() {
        let directory = Arc::new(Directory::new());
        let [a, b] = [0, 1].map(|engine| Claims::shared(Arc::clone(&directory), engine));
        assert!(a.claim(&7) && a.claim(&7));
        assert!(!b.claim(&7));
        assert_eq!((a.elsewhere(&7), b.elsewhere(&7)), (None, Some(0)));
        b.release(&7);
        assert!(!b.claim(&7), "only its own engine gives a flow up");
        a.release(&7);
        assert!(b.claim(&7));
        assert_eq!(a.elsewhere(&7), Some(1));
    }

    #[test]
    fn an_engine_alone_has_every_flow() {
        let claims = Claims::alone();
        assert!(claims.claim(&1));
        assert_eq!(claims.elsewhere(&1), None);
    }
}

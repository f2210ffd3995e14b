//! A bounded table of flows.
//!
//! A flow has a key, by which frames find it; a number, by which events of its socket do; and a class, which
//! says how long it may be idle. Each class keeps its flows in the order of their last use, so that the one to go
//! next is always known: lookup, use, insertion and removal take constant time, whatever a guest does. The map is keyed
//! at random ([`std::hash::RandomState`]), so that nobody can choose keys that collide.
//!
//! A full table makes room by its flow that was idle longest, of the class with the shorter time first. Numbers are
//! used again: an event that was noticed before its flow went may be taken for one of the next flow with that
//! number, which then finds nothing to do.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

use crate::claims::Claims;

/// How long flows of each class may be idle: the shortest first.
pub(crate) type Patience = [Duration; 2];

/// The class of a flow: an index into [`Patience`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Class {
    /// One side alone has said something.
    OneWay = 0,
    /// Both have.
    BothWays = 1,
}

#[derive(Debug)]
struct Entry<K, V> {
    key: K,
    value: V,
    class: Class,
    used: Instant,
    previous: Option<u32>,
    next: Option<u32>,
}

/// Flows of one class: those used longest ago at the head.
#[derive(Clone, Copy, Default, Debug)]
struct List {
    head: Option<u32>,
    tail: Option<u32>,
}

/// A bounded table of flows: see above.
#[derive(Debug)]
pub(crate) struct FlowTable<K, V> {
    numbers: HashMap<K, u32>,
    entries: Vec<Option<Entry<K, V>>>,
    free: Vec<u32>,
    lists: [List; 2],
    most: usize,
    patience: Patience,
    claims: Claims<K>,
}

impl<K: Copy + Eq + Hash, V> FlowTable<K, V> {
    /// Room for `most` flows, taken as they come.
    pub(crate) fn new(most: usize, patience: Patience, claims: Claims<K>) -> Self {
        Self {
            numbers: HashMap::new(),
            entries: Vec::new(),
            free: Vec::new(),
            lists: [List::default(); 2],
            most: most.max(1),
            patience,
            claims,
        }
    }

    /// How many flows there are.
    pub(crate) fn len(&self) -> usize {
        self.numbers.len()
    }

    /// Whether an insertion would need another flow's place.
    pub(crate) fn is_full(&self) -> bool {
        self.len() >= self.most
    }

    /// The number of the flow with `key`.
    pub(crate) fn find(&self, key: &K) -> Option<u32> {
        self.numbers.get(key).copied()
    }

    /// The flow's key and value.
    pub(crate) fn get_mut(&mut self, number: u32) -> Option<(K, &mut V)> {
        let entry = self.entry_mut(number)?;
        Some((entry.key, &mut entry.value))
    }

    /// The other engine that has the flow with `key`.
    pub(crate) fn elsewhere(&self, key: &K) -> Option<u16> {
        if self.find(key).is_some() { None } else { self.claims.elsewhere(key) }
    }

    /// Puts in a flow that was used now, unless it is another engine's. The one that it takes the place of, if any, is
    /// returned: one with the same key, or in a full table the oldest.
    pub(crate) fn insert(&mut self, key: K, value: V, now: Instant) -> Option<(u32, Option<V>)> {
        // The old one first, because its end gives up the claim.
        let same = self.find(&key).and_then(|number| self.remove(number));
        if !self.claims.claim(&key) {
            return None;
        }
        let gone = match same {
            None if self.is_full() => self.remove_oldest(),
            same => same,
        };
        let gone = gone.map(|(_, value)| value);
        let class = Class::OneWay;
        let entry = Entry { key, value, class, used: now, previous: None, next: None };
        let number = match self.free.pop() {
            Some(number) => number,
            None => {
                self.entries.push(None);
                // The table is bounded far below 2^32.
                (self.entries.len() - 1) as u32
            }
        };
        if let Some(place) = self.entries.get_mut(number as usize) {
            *place = Some(entry);
        }
        self.numbers.insert(key, number);
        self.link(number, class);
        Some((number, gone))
    }

    /// Notes that the flow was used now, and its class from now on.
    pub(crate) fn touch(&mut self, number: u32, class: Class, now: Instant) {
        if self.entry(number).is_none() {
            return;
        }
        self.unlink(number);
        if let Some(entry) = self.entry_mut(number) {
            entry.used = now;
            entry.class = class;
        }
        self.link(number, class);
    }

    /// The flow's class.
    pub(crate) fn class(&self, number: u32) -> Option<Class> {
        self.entry(number).map(|entry| entry.class)
    }

    /// Takes a flow out.
    pub(crate) fn remove(&mut self, number: u32) -> Option<(K, V)> {
        self.entry(number)?;
        self.unlink(number);
        let entry = self.entries.get_mut(number as usize)?.take()?;
        self.numbers.remove(&entry.key);
        self.claims.release(&entry.key);
        self.free.push(number);
        Some((entry.key, entry.value))
    }

    /// Takes out the flow that was idle longest, of the class with the shorter time first.
    pub(crate) fn remove_oldest(&mut self) -> Option<(K, V)> {
        let number = self.lists.iter().find_map(|list| list.head)?;
        self.remove(number)
    }

    /// Takes out the flow that was idle longest, of the class with the shorter time first, among those that were not used
    /// after `since` and of which `suits` says so.
    pub(crate) fn remove_oldest_of(&mut self, since: Instant, suits: impl Fn(&V) -> bool) -> Option<(K, V)> {
        let first = |list: &List| {
            let mut next = list.head;
            while let Some(number) = next {
                let entry = self.entry(number).filter(|entry| entry.used <= since)?;
                if suits(&entry.value) {
                    return Some(number);
                }
                next = entry.next;
            }
            None
        };
        let number = self.lists.iter().find_map(first)?;
        self.remove(number)
    }

    /// Takes out a flow whose time is over.
    pub(crate) fn remove_expired(&mut self, now: Instant) -> Option<(K, V)> {
        let number = self.ends().find(|&(_, end)| end <= now).map(|(number, _)| number)?;
        self.remove(number)
    }

    /// When the next flow's time will be over.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.ends().map(|(_, end)| end).min()
    }

    /// Takes out all flows for which `doomed` says so.
    pub(crate) fn remove_if(&mut self, mut doomed: impl FnMut(&K, &V) -> bool) {
        for number in 0..self.entries.len() as u32 {
            if self.entry(number).is_some_and(|entry| doomed(&entry.key, &entry.value)) {
                self.remove(number);
            }
        }
    }

    /// The first flow of each class to go, and when.
    fn ends(&self) -> impl Iterator<Item = (u32, Instant)> + '_ {
        self.lists.iter().zip(self.patience).filter_map(|(list, patience)| {
            let number = list.head?;
            Some((number, self.entry(number)?.used + patience))
        })
    }

    fn entry(&self, number: u32) -> Option<&Entry<K, V>> {
        self.entries.get(number as usize)?.as_ref()
    }

    fn entry_mut(&mut self, number: u32) -> Option<&mut Entry<K, V>> {
        self.entries.get_mut(number as usize)?.as_mut()
    }

    /// Puts a flow at the end of its class's list.
    fn link(&mut self, number: u32, class: Class) {
        let last = self.lists[class as usize].tail.replace(number);
        match last.and_then(|last| self.entry_mut(last)) {
            Some(last) => last.next = Some(number),
            None => self.lists[class as usize].head = Some(number),
        }
        if let Some(entry) = self.entry_mut(number) {
            (entry.previous, entry.next) = (last, None);
        }
    }

    /// Takes a flow out of its class's list.
    fn unlink(&mut self, number: u32) {
        let Some(entry) = self.entry_mut(number) else { return };
        let (class, previous, next) = (entry.class as usize, entry.previous.take(), entry.next.take());
        match previous.and_then(|n| self.entry_mut(n)) {
            Some(entry) => entry.next = next,
            None => self.lists[class].head = next,
        }
        match next.and_then(|n| self.entry_mut(n)) {
            Some(entry) => entry.previous = previous,
            None => self.lists[class].tail = previous,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PATIENCE: Patience = [Duration::from_secs(30), Duration::from_secs(180)];

    #[test]
    fn the_oldest_one_way_flow_goes_first() {
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let mut table = FlowTable::new(3, PATIENCE, Claims::alone());
        let (a, _) = table.insert("a", 1, at(0)).unwrap();
        table.touch(a, Class::BothWays, at(0));
        table.insert("b", 2, at(1));
        table.insert("c", 3, at(2));
        assert_eq!(table.insert("d", 4, at(3)).unwrap().1, Some(2));
        assert_eq!(table.insert("e", 5, at(4)).unwrap().1, Some(3));
        assert!(table.find(&"a").is_some(), "a flow with answers outlives those without");
    }

    #[test]
    fn the_oldest_of_some_is_found_behind_others() {
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let mut table = FlowTable::new(9, PATIENCE, Claims::alone());
        let (a, _) = table.insert("a", 1, at(0)).unwrap();
        for (second, key) in ["b", "c", "d"].into_iter().enumerate() {
            table.insert(key, second + 2, at(second as u64 + 1));
        }
        table.touch(a, Class::BothWays, at(2));
        let odd = |value: &usize| value % 2 == 1;
        assert_eq!(table.remove_oldest_of(at(1), odd), None, "c was used later");
        assert_eq!(table.remove_oldest_of(at(2), odd), Some(("c", 3)));
        assert_eq!(table.remove_oldest_of(at(9), odd), Some(("a", 1)), "of the other class");
        assert_eq!(table.remove_oldest_of(at(9), odd), None);
        assert_eq!(table.len(), 2);
    }

    #[test]
    fn flows_end_when_their_classes_time_is_over() {
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let mut table = FlowTable::new(10, PATIENCE, Claims::alone());
        let (a, _) = table.insert("a", 1, at(0)).unwrap();
        table.insert("b", 2, at(1));
        table.touch(a, Class::BothWays, at(5));
        assert_eq!(table.deadline(), Some(at(31)));
        assert_eq!(table.remove_expired(at(30)), None);
        assert_eq!(table.remove_expired(at(31)), Some(("b", 2)));
        assert_eq!(table.deadline(), Some(at(185)));
        assert_eq!(table.remove_expired(at(185)), Some(("a", 1)));
        assert_eq!(table.deadline(), None);
    }

    proptest! {
        /// Against a model: a vector of (key, class, time of use).
        #[test]
        fn it_is_what_a_vector_would_be(steps in proptest::collection::vec((0u8..4, 0u8..12), 0..300)) {
            let start = Instant::now();
            let mut table = FlowTable::new(6, PATIENCE, Claims::alone());
            let mut model: Vec<(u8, Class, Instant)> = Vec::new();
            for (second, (what, key)) in steps.into_iter().enumerate() {
                let now = start + Duration::from_secs(second as u64);
                let number = table.find(&key);
                prop_assert_eq!(number.is_some(), model.iter().any(|m| m.0 == key));
                match (what, number) {
                    (0, _) => {
                        table.insert(key, key, now);
                        if number.is_some() {
                            model.retain(|m| m.0 != key);
                        } else if model.len() == 6 {
                            let oldest = (0..6).min_by_key(|&i| (model[i].1 as u8, model[i].2)).unwrap();
                            model.remove(oldest);
                        }
                        model.push((key, Class::OneWay, now));
                    }
                    (1, Some(number)) => {
                        table.touch(number, Class::BothWays, now);
                        let entry = model.iter_mut().find(|m| m.0 == key).unwrap();
                        (entry.1, entry.2) = (Class::BothWays, now);
                    }
                    (2, Some(number)) => {
                        prop_assert_eq!(table.remove(number), Some((key, key)));
                        model.retain(|m| m.0 != key);
                    }
                    (3, _) => while let Some((gone, _)) = table.remove_expired(now) {
                        let entry = model.iter().find(|m| m.0 == gone).unwrap();
                        prop_assert!(entry.2 + PATIENCE[entry.1 as usize] <= now);
                        model.retain(|m| m.0 != gone);
                    },
                    _ => {}
                }
                prop_assert_eq!(table.len(), model.len());
                prop_assert_eq!(table.deadline(), model.iter().map(|m| m.2 + PATIENCE[m.1 as usize]).min());
            }
        }
    }
}

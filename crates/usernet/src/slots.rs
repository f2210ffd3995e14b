//! Sockets by number, some of which are to be tried again after a while.
//!
//! There may be one for each of 65535 ports, and the loop asks in each of its turns what is due: so nothing here but
//! [`Slots::remove`] and [`Slots::iter`] looks at all of them.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// How long to wait before trying again where something was used up.
const RETRY: Duration = Duration::from_millis(100);

#[derive(Debug)]
struct Slot<T> {
    value: T,
    /// Whether it is among those to be tried again.
    waits: bool,
}

/// See above.
#[derive(Debug)]
pub(crate) struct Slots<T> {
    slots: Vec<Option<Slot<T>>>,
    vacant: Vec<u32>,
    /// What is to be tried again, and when: all wait for the same time, so the first is due first.
    retries: VecDeque<(Instant, u32)>,
}

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Self { slots: Vec::new(), vacant: Vec::new(), retries: VecDeque::new() }
    }
}

impl<T> Slots<T> {
    /// The number that [`Self::insert`] gives next.
    pub(crate) fn next_number(&self) -> u32 {
        // A number stands for a descriptor, of which there are not so many.
        self.vacant.last().copied().unwrap_or(self.slots.len() as u32)
    }

    /// Adds one, at [`Self::next_number`].
    pub(crate) fn insert(&mut self, value: T) {
        let slot = Some(Slot { value, waits: false });
        match self.vacant.pop() {
            Some(number) => self.slots[number as usize] = slot,
            None => self.slots.push(slot),
        }
    }

    /// Takes out the first one that `is` one. Its number may be another's soon: whoever uses it later may mean the old one.
    pub(crate) fn remove(&mut self, is: impl Fn(&T) -> bool) -> Option<T> {
        let number = self.slots.iter().position(|slot| slot.as_ref().is_some_and(|slot| is(&slot.value)))?;
        self.vacant.push(number as u32);
        self.slots[number].take().map(|slot| slot.value)
    }

    pub(crate) fn get_mut(&mut self, number: u32) -> Option<&mut T> {
        self.slots.get_mut(number as usize)?.as_mut().map(|slot| &mut slot.value)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        self.slots.iter().flatten().map(|slot| &slot.value)
    }

    /// Has `number` be [due](Self::due) after a while.
    pub(crate) fn retry(&mut self, number: u32, now: Instant) {
        if let Some(Some(slot)) = self.slots.get_mut(number as usize)
            && !std::mem::replace(&mut slot.waits, true)
        {
            self.retries.push_back((now + RETRY, number));
        }
    }

    /// One that is to be tried again at `now`.
    pub(crate) fn due(&mut self, now: Instant) -> Option<u32> {
        let (_, number) = self.retries.pop_front_if(|(at, _)| *at <= now)?;
        if let Some(Some(slot)) = self.slots.get_mut(number as usize) {
            slot.waits = false;
        }
        Some(number)
    }

    /// When the next is due.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        self.retries.front().map(|(at, _)| *at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_used_again() {
        let mut slots = Slots::default();
        for value in ['a', 'b', 'c'] {
            slots.insert(value);
        }
        assert_eq!(slots.remove(|value| *value == 'b'), Some('b'));
        assert_eq!(slots.remove(|value| *value == 'b'), None);
        assert_eq!(slots.get_mut(1), None);
        assert_eq!(slots.next_number(), 1);
        slots.insert('d');
        assert_eq!(slots.get_mut(1).copied(), Some('d'));
        assert_eq!(slots.next_number(), 3);
        assert_eq!(slots.iter().collect::<String>(), "adc");
    }

    #[test]
    fn each_is_tried_again_once() {
        let mut slots = Slots::default();
        slots.insert('a');
        slots.insert('b');
        let now = Instant::now();
        slots.retry(1, now);
        slots.retry(1, now + RETRY / 2);
        slots.retry(0, now + RETRY / 2);
        slots.retry(7, now);
        assert_eq!((slots.next_due(), slots.due(now)), (Some(now + RETRY), None));
        assert_eq!((slots.due(now + RETRY), slots.due(now + RETRY)), (Some(1), None));
        slots.remove(|value| *value == 'a');
        // What is not there any more is nobody's concern.
        assert_eq!(slots.due(now + 2 * RETRY), Some(0));
        assert_eq!(slots.next_due(), None);
    }
}

//! The flows: by number, by their ends, and the half-open ones by age.
//!
//! The map's hash is keyed with a secret of this process, so that no guest can choose ends that collide.

use std::collections::{HashMap, VecDeque};
use std::time::Instant;

use super::emit::Ends;
use super::flow::Flow;
use crate::claims::Claims;

/// All flows.
pub(super) struct Table {
    slots: Vec<Option<Box<Flow>>>,
    vacant: Vec<u32>,
    by_ends: HashMap<Ends, u32>,
    /// Those that were not open when they were added, oldest first: with ends, because numbers are used again.
    half_open: VecDeque<(u32, Ends)>,
    half_open_count: usize,
    /// Where [`Self::idle_longest`] looked last.
    hand: usize,
    limit: usize,
    claims: Claims<Ends>,
}

impl Table {
    pub(super) fn new(limit: usize, claims: Claims<Ends>) -> Self {
        Self {
            slots: Vec::new(),
            vacant: Vec::new(),
            by_ends: HashMap::new(),
            half_open: VecDeque::new(),
            half_open_count: 0,
            hand: 0,
            limit,
            claims,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.by_ends.len()
    }

    pub(super) fn is_full(&self) -> bool {
        self.len() >= self.limit
    }

    /// How many flows are half-open.
    pub(super) fn half_open(&self) -> usize {
        self.half_open_count
    }

    pub(super) fn find(&self, ends: &Ends) -> Option<u32> {
        self.by_ends.get(ends).copied()
    }

    pub(super) fn get(&mut self, number: u32) -> Option<&mut Flow> {
        self.slots.get_mut(number as usize)?.as_deref_mut()
    }

    /// The number that the next flow gets.
    pub(super) fn next_number(&self) -> u32 {
        self.vacant.last().copied().unwrap_or(self.slots.len() as u32)
    }

    /// The other engine that has the flow with these ends.
    pub(super) fn elsewhere(&self, ends: &Ends) -> Option<u16> {
        if self.find(ends).is_some() { None } else { self.claims.elsewhere(ends) }
    }

    /// Takes the flow with these ends for this engine, before it is made. Whether it is this one's now.
    pub(super) fn claim(&self, ends: &Ends) -> bool {
        self.claims.claim(ends)
    }

    /// Gives up a flow that was claimed and not made.
    pub(super) fn renounce(&self, ends: &Ends) {
        self.claims.release(ends);
    }

    /// Adds a flow that is half-open under [`Self::next_number`].
    pub(super) fn add(&mut self, flow: Flow) -> u32 {
        let number = self.next_number();
        let ends = flow.ends;
        let flow = Some(Box::new(flow));
        match self.vacant.pop() {
            Some(number) => self.slots[number as usize] = flow,
            None => self.slots.push(flow),
        }
        self.by_ends.insert(ends, number);
        self.half_open_count += 1;
        if self.half_open.len() >= 2 * self.half_open_count + 64 {
            let still = |&(number, ends): &(u32, Ends)| Self::is_half_open(&self.slots, number, &ends);
            self.half_open.retain(still);
        }
        self.half_open.push_back((number, ends));
        number
    }

    /// A flow has opened.
    pub(super) fn opened(&mut self) {
        self.half_open_count = self.half_open_count.saturating_sub(1);
    }

    /// Takes a flow out.
    pub(super) fn remove(&mut self, number: u32) -> Option<Box<Flow>> {
        let flow = self.slots.get_mut(number as usize)?.take()?;
        self.vacant.push(number);
        self.by_ends.remove(&flow.ends);
        self.claims.release(&flow.ends);
        if flow.is_half_open() {
            self.opened();
        }
        Some(flow)
    }

    fn is_half_open(slots: &[Option<Box<Flow>>], number: u32, ends: &Ends) -> bool {
        matches!(slots.get(number as usize), Some(Some(flow)) if flow.ends == *ends && flow.is_half_open())
    }

    /// Of some flows that are open, looked at in turn, the one that has been idle for longest, and since when it is.
    pub(super) fn idle_longest(&mut self) -> Option<(u32, Instant)> {
        /// As many as are looked at: enough that one of them is among the most idle.
        const SAMPLE: usize = 64;
        let mut found: Option<(u32, Instant)> = None;
        for _ in 0..self.slots.len().min(SAMPLE) {
            self.hand = (self.hand + 1) % self.slots.len();
            if let Some(Some(flow)) = self.slots.get(self.hand)
                && !flow.is_half_open()
                && found.is_none_or(|(_, active)| flow.active < active)
            {
                found = Some((flow.number, flow.active));
            }
        }
        found
    }

    /// The flow that has been half-open for longest.
    pub(super) fn oldest_half_open(&mut self) -> Option<u32> {
        while let Some((number, ends)) = self.half_open.front() {
            if Self::is_half_open(&self.slots, *number, ends) {
                return Some(*number);
            }
            self.half_open.pop_front();
        }
        None
    }
}

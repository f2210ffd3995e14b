//! Pages in the page tables of domains, and what happens there when they move.

#![allow(unsafe_code, reason = "who enters pinned pages promises that they stay")]

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError, RwLockWriteGuard},
};

use super::{Pages, Span, State};
use crate::{
    Errno, Result,
    domain::{Domain, HostAddr, Prot},
    hostmem::HostRun,
    inject,
    iova::{Iova, IovaRange, PAGE_SIZE},
    process::{PinObserver, UserAddr},
    soft,
};

/// Where a part of a store is in an address space.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Placement {
    /// Where.
    pub(crate) range: IovaRange,
    /// How many bytes it has.
    pub(crate) length: u64,
    /// From which byte of the store on.
    pub(crate) offset: u64,
    /// What devices may do.
    pub(crate) prot: Prot,
    /// Each page is mapped alone, so that it can be unmapped alone.
    pub(crate) small: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    /// The domain has it.
    Entered,
    /// The domain had it, and gets it back when the pages have arrived.
    Suspended,
    /// The domain has it no more, but may still use it until it is synchronized.
    Leaving,
}

#[derive(Debug)]
struct Entry {
    domain: Arc<dyn Domain>,
    placement: Placement,
    span: Span,
    stage: Stage,
}

/// Which domain an entry is in (its address; the entry keeps it alive), and where.
type Key = (usize, Iova);

/// What of a store is in which domain.
#[derive(Debug, Default)]
pub(super) struct Entries {
    /// Boxed, because most stores have one, and a node of the tree has room for eleven.
    entries: BTreeMap<Key, Box<Entry>>,
}

fn key(domain: &Arc<dyn Domain>, range: IovaRange) -> Key {
    (Arc::as_ptr(domain).cast::<()>() as usize, range.start())
}

impl Entry {
    /// Maps it to `runs`, which are all of its pages. Nothing stays mapped when it fails.
    fn map(&self, lead: u64, runs: &[HostRun]) -> Result<()> {
        let Placement { range, length, offset, prot, small } = self.placement;
        let mut mapped = 0;
        let mut skip = (lead + offset) % PAGE_SIZE;
        let pieces = runs.iter().flat_map(|run| {
            let each = if small { 1 } else { run.pages };
            (0..run.pages / each).map(move |index| (run.start.0 + index * each * PAGE_SIZE, each * PAGE_SIZE))
        });
        for (start, bytes) in pieces {
            let piece = (bytes - skip).min(length - mapped);
            let at = Iova(range.start().0 + mapped);
            let host = HostAddr(start + skip);
            // SAFETY: needed because only who pins pages knows that they stay. The store holds the pins of an entry until the
            // domain was synchronized after the entry was unmapped (`left`, `revoke`, and below), and suspends it
            // before they move. The prot of an entry has no WRITE where the store pins for reading.
            let map = || unsafe { soft::map_memory(&*self.domain, at, host, piece, prot) };
            let done = inject::check().and_then(|()| map());
            if let Err(errno) = done {
                if mapped > 0 {
                    self.domain.unmap(IovaRange::with_length(range.start(), mapped)?);
                    self.domain.sync();
                }
                return Err(errno);
            }
            mapped += piece;
            skip = 0;
        }
        Ok(())
    }
}

impl Pages {
    /// Pins a part and maps it in `domain`. Nothing has changed when it fails. Of what was revoked nothing is mapped.
    pub(crate) fn enter(self: &Arc<Self>, domain: &Arc<dyn Domain>, placement: Placement) -> Result<()> {
        let span = self.span(placement.offset, placement.length);
        let mut state = self.settled(span);
        inject::check()?;
        let mut entry = Entry { domain: domain.clone(), placement, span, stage: Stage::Entered };
        if state.revoked {
            state.users.add(span);
        } else {
            state.take(self, span)?;
            if !(self.writable && self.memory.may_write()) {
                entry.placement.prot.remove(Prot::WRITE);
            }
            if let Err(errno) = entry.map(self.lead, &state.runs(span)) {
                state.give_up(span);
                return Err(errno);
            }
        }
        state.entries.entries.insert(key(domain, placement.range), Box::new(entry));
        Ok(())
    }

    /// Unmaps what [`Self::enter`] mapped at `range`. Its pages stay pinned until [`Self::left`], before which `domain` has
    /// to be synchronized.
    pub(crate) fn leave(&self, domain: &Arc<dyn Domain>, range: IovaRange) {
        let key = key(domain, range);
        let mut state = self.settled_entry(key);
        let revoked = state.revoked;
        if let Some(entry) = state.entries.entries.get_mut(&key) {
            if !revoked && entry.stage == Stage::Entered {
                domain.unmap(range);
            }
            entry.stage = Stage::Leaving;
        }
    }

    /// Ends what [`Self::leave`] began.
    pub(crate) fn left(&self, domain: &Arc<dyn Domain>, range: IovaRange) {
        let key = key(domain, range);
        let mut state = self.settled_entry(key);
        if let Some(entry) = state.entries.entries.remove(&key) {
            state.give_up(entry.span);
        }
    }

    /// The state, once nothing of the entry is moving.
    fn settled_entry(&self, key: Key) -> RwLockWriteGuard<'_, State> {
        loop {
            let state = self.write();
            match state.entries.entries.get(&key).map(|entry| entry.span) {
                Some(span) if state.is_moving(span) => {
                    drop(state);
                    self.await_arrival(span);
                }
                _ => return state,
            }
        }
    }

    /// Makes two entries of the one at `range`, from which `rest` is the second part. It was mapped page by page.
    pub(crate) fn split_entry(
        &self,
        domain: &Arc<dyn Domain>,
        range: IovaRange,
        first: Placement,
        rest: Placement,
    ) {
        let (first_span, rest_span) =
            (self.span(first.offset, first.length), self.span(rest.offset, rest.length));
        let mut state = self.settled(Span { first: first_span.first, last: rest_span.last });
        let Some(entry) = state.entries.entries.remove(&key(domain, range)) else { return };
        let whole = entry.span;
        for (placement, span) in [(first, first_span), (rest, rest_span)] {
            state.users.add(span);
            let entry = Entry { domain: domain.clone(), placement, span, stage: entry.stage };
            state.entries.entries.insert(key(domain, placement.range), Box::new(entry));
        }
        // The parts have all of its pages, so none is unpinned here.
        state.give_up(whole);
    }

    /// Takes the memory away from all that use it: every domain loses it before this returns, and it cannot be pinned
    /// again (ENODEV). The areas stay, with nothing behind them.
    pub fn revoke(&self) {
        let all = self.span(0, self.length);
        let mut state = self.settled(all);
        if state.revoked {
            return;
        }
        for entry in state.entries.entries.values() {
            if entry.stage == Stage::Entered {
                entry.domain.unmap(entry.placement.range);
            }
            entry.domain.sync();
        }
        let mut page = all.first;
        while let Some(held) = state.held.next(page) {
            let Some(run) = state.held.run(held) else { break };
            let last = held + (run.pages - 1);
            state.held.release(Span { first: held, last });
            if let Some(account) = &mut state.account {
                account.uncharge(run.pages);
            }
            page = last + 1;
        }
        state.revoked = true;
    }

    /// The pages that a provider calls by their user address.
    fn moving_span(&self, from: UserAddr, pages: u64) -> Option<Span> {
        let first = from.0.checked_sub(self.base)? / PAGE_SIZE;
        let last = first.checked_add(pages.checked_sub(1)?)?;
        (last <= self.span(0, self.length).last).then_some(Span { first, last })
    }
}

impl PinObserver for Pages {
    fn moving(&self, from: UserAddr, pages: u64) {
        let Some(span) = self.moving_span(from, pages) else { return };
        let mut state = self.settled(span);
        for entry in state.entries.entries.values_mut().filter(|entry| entry.span.overlaps(span)) {
            match entry.stage {
                Stage::Entered => {
                    entry.domain.suspend(entry.placement.range);
                    entry.stage = Stage::Suspended;
                }
                Stage::Leaving => entry.domain.sync(),
                Stage::Suspended => {}
            }
        }
        state.moving.push(span);
    }

    fn moved(&self, from: UserAddr, pages: u64) {
        let Some(span) = self.moving_span(from, pages) else { return };
        let mut state = self.write();
        let Some(index) = state.moving.iter().position(|moving| *moving == span) else { return };
        state.moving.swap_remove(index);
        state.resume(span, self.lead);
        drop(state);
        drop(self.arrivals.lock().unwrap_or_else(PoisonError::into_inner));
        self.arrived.notify_all();
    }
}

impl State {
    /// Maps the entries again that were suspended for `span`, unless other pages of theirs still move.
    fn resume(&mut self, span: Span, lead: u64) {
        let mut entries = core::mem::take(&mut self.entries);
        for entry in entries.entries.values_mut() {
            let ready =
                entry.stage == Stage::Suspended && entry.span.overlaps(span) && !self.is_moving(entry.span);
            if !ready {
                continue;
            }
            entry.stage = Stage::Entered;
            let mapped =
                if self.revoked { Err(Errno::NODEV) } else { entry.map(lead, &self.runs(entry.span)) };
            if let Err(errno) = mapped {
                // Devices will fault here, which is the most that a page table without memory can do. They do not wait.
                entry.domain.unmap(entry.placement.range);
                tracing::error!(?errno, range = ?entry.placement.range, "pages that moved cannot be mapped again");
            }
        }
        self.entries = entries;
    }
}

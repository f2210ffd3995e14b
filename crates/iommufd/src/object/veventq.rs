//! VEVENTQ: the events of a vIOMMU, for user space to read.
//!
//! Every event has a sequence number, whether it finds room or not. So who reads a gap knows how many were lost. When the
//! last ones were lost there is nothing to read after the gap; then there is a header alone, which says so, with the number
//! of the last lost event. It goes away when an event finds room behind it.

use core::{any::Any, fmt};
use std::{
    collections::VecDeque,
    os::fd::BorrowedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use uapi::iommufd::{IOMMU_VEVENTQ_FLAG_LOST_EVENTS, iommufd_vevent_header};
use zerocopy::IntoBytes;

use super::{Pending, readiness::Readiness, table::Use, viommu::Viommu};
use crate::{
    Context, Errno, Result,
    caller::{self, Deliver, File},
    inject,
};

/// How many events a queue may be asked to hold.
const MAX_DEPTH: u32 = 1 << 19;

#[derive(Debug, Default)]
struct State {
    /// Sequence numbers and data.
    events: VecDeque<(u32, Box<[u8]>)>,
    /// The sequence number of the last event, when it was lost.
    lost: Option<u32>,
    /// The sequence number of the next event.
    next: u32,
}

impl State {
    fn is_empty(&self) -> bool {
        self.events.is_empty() && self.lost.is_none()
    }
}

/// An event queue.
pub(crate) struct EventQueue {
    kind: u32,
    depth: usize,
    /// Taken last: nothing else is locked while it is held.
    state: Mutex<State>,
    readiness: Readiness,
    viommu: Use<Viommu>,
}

impl fmt::Debug for EventQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventQueue")
            .field("kind", &self.kind)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

impl EventQueue {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an event, or notes that it is lost.
    pub(super) fn push(&self, data: &[u8]) {
        let mut state = self.lock();
        let was_empty = state.is_empty();
        let sequence = state.next;
        state.next = if sequence == i32::MAX as u32 { 0 } else { sequence + 1 };
        if state.events.len() < self.depth && inject::check().is_ok() {
            state.lost = None;
            state.events.push_back((sequence, data.into()));
        } else {
            state.lost = Some(sequence);
        }
        if was_empty {
            self.readiness.set(true);
        }
    }
}

impl Drop for EventQueue {
    fn drop(&mut self) {
        let mut events = self.viommu.shared.events();
        // It may have a successor already: this one was out of the table before.
        if events.get(&self.kind).is_some_and(|queue| queue.strong_count() == 0) {
            events.remove(&self.kind);
        }
    }
}

/// What the program has of an event queue.
#[derive(Debug)]
pub(crate) struct EventFile {
    queue: Use<EventQueue>,
    /// The context lives for as long as any of its files is open. Dropped after the use.
    _context: Arc<Context>,
}

impl File for EventFile {
    fn read(&self, to: &mut [u8]) -> Result<usize> {
        self.read_to(to.len(), &mut caller::fill(to))
    }

    /// Reads whole events, as many as fit: 0 bytes when there is none. EINVAL when not even a header fits, or not the first
    /// event. Events that come meanwhile wait until what was read is delivered.
    fn read_to(&self, room: usize, to: Deliver<'_>) -> Result<usize> {
        if room < size_of::<iommufd_vevent_header>() {
            return Err(Errno::INVAL);
        }
        let mut done = 0;
        let mut put = |header: iommufd_vevent_header, data: &[u8]| {
            let record = [header.as_bytes(), data].concat();
            if room - done < record.len() {
                return Err(Errno::INVAL);
            }
            to(done, &record)?;
            done += record.len();
            Ok(())
        };
        let mut state = self.queue.lock();
        let was_empty = state.is_empty();
        let mut stopped = Ok(());
        while let Some((sequence, data)) = state.events.front() {
            stopped = put(iommufd_vevent_header { flags: 0, sequence: *sequence }, data);
            if stopped.is_err() {
                break;
            }
            state.events.pop_front();
        }
        if stopped.is_ok()
            && let Some(sequence) = state.lost
        {
            stopped = put(iommufd_vevent_header { flags: IOMMU_VEVENTQ_FLAG_LOST_EVENTS, sequence }, &[]);
            if stopped.is_ok() {
                state.lost = None;
            }
        }
        if !was_empty && state.is_empty() {
            self.queue.readiness.set(false);
        }
        match stopped {
            Err(error) if done == 0 => Err(error),
            _ => Ok(done),
        }
    }

    fn write(&self, _from: &[u8]) -> Result<usize> {
        Err(Errno::INVAL)
    }

    fn readiness(&self) -> BorrowedFd<'_> {
        self.queue.readiness.fd()
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

impl Context {
    /// EINVAL for a depth of 0 or past the limit, ENOENT without the vIOMMU, EOPNOTSUPP when it has no events of the type,
    /// EEXIST when there is a queue for them already.
    pub(crate) fn prepare_event_queue(
        &self,
        viommu: u32,
        kind: u32,
        depth: u32,
    ) -> Result<Pending<EventQueue>> {
        inject::check()?;
        if depth == 0 || depth > MAX_DEPTH {
            return Err(Errno::INVAL);
        }
        let viommu = self.table().get::<Viommu>(viommu)?;
        if !viommu.driver.has_events(kind) {
            return Err(Errno::OPNOTSUPP);
        }
        let reservation = self.table().reserve()?;
        let readiness = Readiness::new_read_only()?;
        let depth = usize::try_from(depth).map_err(|_| Errno::INVAL)?;
        let mut events = viommu.shared.events();
        if events.get(&kind).is_some_and(|queue| queue.strong_count() > 0) {
            return Err(Errno::EXIST);
        }
        let state = Mutex::default();
        let queue = EventQueue { kind, depth, state, readiness, viommu: viommu.hold() };
        let pending = Pending::new(reservation, queue);
        events.insert(kind, Arc::downgrade(pending.object()));
        drop(events);
        Ok(pending)
    }

    /// The file of an event queue.
    pub(crate) fn event_file(self: &Arc<Self>, queue: Use<EventQueue>) -> Arc<dyn File> {
        Arc::new(EventFile { queue, _context: self.clone() })
    }
}

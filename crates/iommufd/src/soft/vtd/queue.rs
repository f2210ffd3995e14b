//! An invalidation queue in the guest's memory, and the thread that serves it (VT-d 6.5.2).
//!
//! # Theory of operation
//!
//! The queue is a ring. The guest writes descriptors and moves the tail; the thread executes what is between head and tail and
//! moves the head. The ring's pages are pinned by its object, so the thread reads them without asking.
//!
//! The thread sleeps on the doorbell's futex word. It reads how often the bell rang before it looks at the tail, and goes to
//! sleep only if that is still so: a ring between is not lost.
//!
//! An invalidation takes entries out of IOTLBs at once. Waiting for those who still use them is put off until a wait
//! descriptor, or the end of what there is to do: a guest may ask for thousands before it waits for them.
//! A wait descriptor's status is written when all that came before it is complete, never earlier.
//!
//! What is no descriptor stops the queue, with the head at it, until the error is cleared. Then it is read again.
//!
//! The thread ends when the queue's object is destroyed, which waits for it.

use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::{sync::Arc, thread};

use super::{
    abi::event,
    descriptor::{Descriptor, QueueError},
    doorbell::Bell,
    table::GuestTable,
    unit::Unit,
};
use crate::{
    Errno, Result,
    iova::{Iova, PAGE_SIZE},
    soft::{FaultReason, section::Reader},
    viommu::{HardwareQueue, QueueMemory, QueueRequest},
};

/// How many bytes a descriptor has.
const DESCRIPTOR: u32 = 16;
/// The longest queue: 2^7 pages (IQA.QS).
const LONGEST: u64 = PAGE_SIZE << 7;

/// A queue that a thread serves.
#[derive(Debug)]
pub struct Queue {
    index: u32,
    /// How many bytes it has: a power of two.
    length: u32,
    unit: Arc<Unit>,
    bell: Bell,
    /// Only the thread changes it.
    head: AtomicU32,
    /// Why it is stopped, by its number. The thread sets it, and clears it when the doorbell's is cleared.
    error: AtomicU32,
    stop: AtomicBool,
}

impl Queue {
    /// Which queue it is.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Moves the tail to byte `tail` of the queue, and wakes the thread.
    pub fn set_tail(&self, tail: u32) {
        self.bell.tail().store(tail, Ordering::Release);
        self.bell.ring();
    }

    /// The byte of the next descriptor to be executed.
    #[must_use]
    pub fn head(&self) -> u32 {
        self.head.load(Ordering::Acquire)
    }

    /// Why it has stopped.
    #[must_use]
    pub fn error(&self) -> Option<QueueError> {
        QueueError::of(self.error.load(Ordering::Acquire))
    }

    /// Lets it go on, at its head, if it has stopped.
    pub fn clear_error(&self) {
        self.bell.error().store(0, Ordering::Release);
        self.error.store(0, Ordering::Release);
        self.bell.ring();
    }

    pub(super) fn ended(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// What the thread does. `ring` is dropped, and by that unpinned, when the thread ends.
    fn serve(&self, ring: QueueMemory) {
        let mut memory = self.unit.memory.reader();
        while !self.ended() {
            let seen = self.bell.rings();
            if self.error().is_some() && self.bell.error().load(Ordering::Acquire) == 0 {
                self.error.store(0, Ordering::Release);
            }
            if self.error().is_none() {
                let mut pending = Vec::new();
                let result = self.run(&ring, &mut memory, &mut pending);
                settle(&mut pending);
                if let Err(error) = result {
                    self.stopped(error);
                }
            }
            if !self.ended() {
                self.bell.wait(seen);
            }
        }
    }

    fn stopped(&self, error: QueueError) {
        let number = error as u32;
        self.bell.error().store(number, Ordering::Release);
        self.error.store(number, Ordering::Release);
        self.unit.event(event::QUEUE_STOPPED, self.index, [number.into(), self.head().into()]);
        self.unit.tell(|listener| listener.stopped(self.index, error));
    }

    /// Executes what there is. What was forgotten and is still in use is in `pending` then.
    fn run(
        &self,
        ring: &QueueMemory,
        memory: &mut Reader,
        pending: &mut Vec<Arc<GuestTable>>,
    ) -> core::result::Result<(), QueueError> {
        while !self.ended() {
            let (head, tail) = (self.head(), self.bell.tail().load(Ordering::Acquire));
            if tail >= self.length || !tail.is_multiple_of(DESCRIPTOR) {
                return Err(QueueError::Tail);
            }
            if head == tail {
                break;
            }
            let mut bytes = [0; DESCRIPTOR as usize];
            ring.read(head.into(), &mut bytes).map_err(|_| QueueError::Memory)?;
            let word = |at: usize| {
                let word = bytes.get(at..at + 8).and_then(|word| word.try_into().ok());
                u64::from_le_bytes(word.unwrap_or_default())
            };
            match Descriptor::decode(word(0), word(8))? {
                Descriptor::Invalidate(what) => self.unit.forget(what, pending),
                Descriptor::Wait { status, interrupt } => {
                    settle(pending);
                    if let Some((address, data)) = status {
                        self.write_status(memory, address, data);
                    }
                    if interrupt {
                        self.advance(head);
                        self.bell.complete();
                        self.unit.event(event::COMPLETED, self.index, [0; 2]);
                        self.unit.tell(|listener| listener.completed(self.index));
                        continue;
                    }
                }
            }
            self.advance(head);
        }
        Ok(())
    }

    fn advance(&self, head: u32) {
        let next = (head + DESCRIPTOR) % self.length;
        self.head.store(next, Ordering::Release);
        self.bell.head().store(next, Ordering::Release);
    }

    /// A write to where the guest has no memory is lost, as on a bus.
    fn write_status(&self, memory: &mut Reader, address: u64, data: u32) {
        let written = loop {
            let written = memory.section().store(Iova(address), data.to_le(), Ordering::Release);
            match written {
                Err(fault) if fault.reason == FaultReason::Moving => memory.settle(),
                written => break written,
            }
        };
        match written {
            Ok(()) => {
                let length = size_of::<u32>() as u64;
                self.unit.tell(|listener| listener.written(self.index, address, length));
            }
            Err(fault) => tracing::debug!(%fault, index = self.index, "the status of a wait is lost"),
        }
    }
}

/// Waits for those who use what was forgotten.
fn settle(pending: &mut Vec<Arc<GuestTable>>) {
    pending.drain(..).for_each(|table| table.sync());
}

/// A queue's being served. Dropping it ends the thread.
#[derive(Debug)]
pub(super) struct Server {
    queue: Arc<Queue>,
    /// None while it is dropped.
    thread: Option<thread::JoinHandle<()>>,
}

impl HardwareQueue for Server {}

impl Server {
    /// EINVAL for a length that is none, or where it begins; EAGAIN when there can be no thread.
    pub(super) fn start(unit: &Arc<Unit>, bell: Bell, request: QueueRequest) -> Result<Self> {
        let length = request.memory.length();
        let whole = length.is_power_of_two() && (PAGE_SIZE..=LONGEST).contains(&length);
        if !whole || !request.iova.start().0.is_multiple_of(PAGE_SIZE) {
            return Err(Errno::INVAL);
        }
        let queue = Arc::new(Queue {
            index: request.index,
            length: u32::try_from(length).map_err(|_| Errno::INVAL)?,
            unit: Arc::clone(unit),
            bell,
            head: AtomicU32::new(0),
            error: AtomicU32::new(0),
            stop: AtomicBool::new(false),
        });
        let served = Arc::clone(&queue);
        let thread = thread::Builder::new().name(format!("vtd queue {}", request.index));
        let memory = request.memory;
        let thread = thread.spawn(move || served.serve(memory)).map_err(|_| Errno::AGAIN)?;
        Ok(Self { queue, thread: Some(thread) })
    }

    pub(super) fn queue(&self) -> &Arc<Queue> {
        &self.queue
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.queue.stop.store(true, Ordering::SeqCst);
        self.queue.bell.rouse();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(index = self.queue.index, "the thread of an invalidation queue panicked");
        }
    }
}

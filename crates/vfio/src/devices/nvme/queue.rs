//! Submission and completion queues (section 4.1).
//!
//! A queue is a ring in memory. Doorbells are plain atomics, written by whoever writes the register; everything else of a
//! queue belongs to the worker that holds its lock. The lock of a submission queue may be held while that of its
//! completion queue is taken, never the other way round.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use iommufd::iova::Iova;
use zerocopy::IntoBytes;

use super::spec::{Command, Completion, Status};
use crate::dma::{Dma, DmaFault};

/// Commands that are fetched at once.
pub(super) const BATCH: u32 = 32;

/// What the driver writes when it has filled or emptied entries.
#[derive(Debug, Default)]
pub(super) struct Doorbell(AtomicU32);

impl Doorbell {
    pub(super) fn ring(&self, value: u32) {
        // What was written to memory before is seen by whoever sees this.
        self.0.store(value, Ordering::SeqCst);
    }

    fn value(&self) -> u32 {
        self.0.load(Ordering::SeqCst)
    }
}

/// A completion queue.
#[derive(Debug)]
pub(super) struct CompletionQueue {
    base: Iova,
    /// Entries.
    pub(super) size: u32,
    /// The vector of its interrupt, if it has one.
    pub(super) vector: Option<u16>,
    /// The driver's head.
    pub(super) head: Doorbell,
    tail: Mutex<Tail>,
    /// The same tail for who only looks.
    seen_tail: AtomicU32,
    /// Somebody waits for room.
    stalled: AtomicBool,
    /// Submission queues that use it.
    pub(super) users: AtomicU32,
}

#[derive(Debug)]
struct Tail {
    at: u32,
    phase: bool,
}

impl CompletionQueue {
    pub(super) fn new(base: Iova, size: u32, vector: Option<u16>) -> Self {
        let tail = Mutex::new(Tail { at: 0, phase: true });
        let (head, seen_tail) = (Doorbell::default(), AtomicU32::new(0));
        let stalled = AtomicBool::new(false);
        Self { base, size, vector, head, tail, seen_tail, stalled, users: AtomicU32::new(0) }
    }

    /// Entries that can be filled before the driver empties one. Others may fill them meanwhile.
    pub(super) fn room(&self) -> u32 {
        let used = self.seen_tail.load(Ordering::SeqCst) + self.size - self.head.value();
        self.size - 1 - used % self.size
    }

    /// The next time that the driver empties entries, a worker waits for it.
    pub(super) fn set_stalled(&self) {
        self.stalled.store(true, Ordering::SeqCst);
    }

    /// Whether a worker waits, who is woken now.
    pub(super) fn take_stalled(&self) -> bool {
        self.stalled.swap(false, Ordering::SeqCst)
    }

    /// Whether there are entries that the driver has not emptied.
    pub(super) fn pending(&self) -> bool {
        self.seen_tail.load(Ordering::SeqCst) != self.head.value()
    }

    /// Adds completions: how many there was room for.
    ///
    /// # Errors
    /// The queue is not in memory.
    pub(super) fn post(&self, dma: &dyn Dma, completions: &[Completion]) -> Result<usize, DmaFault> {
        let mut tail = super::lock(&self.tail);
        let mut done = 0;
        for completion in completions {
            if self.room() == 0 {
                break;
            }
            let completion =
                Completion { status: completion.status & !1 | u16::from(tail.phase), ..*completion };
            let bytes = completion.as_bytes();
            let at = crate::dma::after(self.base, u64::from(tail.at) * size_of::<Completion>() as u64)?;
            // The driver looks at the phase, which is in the second half: it must not arrive before the first.
            let (first, second) = bytes.split_at(size_of::<Completion>() / 2);
            dma.write(at, first)?;
            dma.write(crate::dma::after(at, first.len() as u64)?, second)?;
            tail.at += 1;
            if tail.at == self.size {
                *tail = Tail { at: 0, phase: !tail.phase };
            }
            self.seen_tail.store(tail.at, Ordering::SeqCst);
            done += 1;
        }
        Ok(done)
    }
}

/// A submission queue.
#[derive(Debug)]
pub(super) struct SubmissionQueue {
    pub(super) id: u16,
    base: Iova,
    /// Entries.
    pub(super) size: u32,
    pub(super) completions: Arc<CompletionQueue>,
    /// The driver's tail.
    pub(super) tail: Doorbell,
    /// Where the next command is. Held while commands are carried out.
    pub(super) head: Mutex<Head>,
}

/// What the worker knows of a submission queue.
#[derive(Debug)]
pub(super) struct Head {
    at: u32,
    /// False when the queue was deleted.
    pub(super) live: bool,
    /// Completions that the completion queue had no room for.
    pub(super) unposted: Vec<Completion>,
}

impl Head {
    /// As completions have it. Queues have at most 1024 entries.
    pub(super) fn number(&self) -> u16 {
        u16::try_from(self.at).unwrap_or(0)
    }
}

impl SubmissionQueue {
    pub(super) fn new(id: u16, base: Iova, size: u32, completions: Arc<CompletionQueue>) -> Self {
        completions.users.fetch_add(1, Ordering::SeqCst);
        let head = Mutex::new(Head { at: 0, live: true, unposted: Vec::new() });
        Self { id, base, size, completions, tail: Doorbell::default(), head }
    }

    /// Fetches commands that have come, at most `most`.
    ///
    /// # Errors
    /// The queue is not in memory.
    pub(super) fn fetch(&self, head: &mut Head, dma: &dyn Dma, most: u32) -> Result<Vec<Command>, DmaFault> {
        let tail = self.tail.value();
        let until = if tail >= head.at { tail } else { self.size };
        let count = (until - head.at).min(most).min(BATCH);
        let mut commands = vec![Command::default(); usize::try_from(count).unwrap_or(0)];
        if count > 0 {
            let offset = u64::from(head.at) * size_of::<Command>() as u64;
            dma.read(crate::dma::after(self.base, offset)?, commands.as_mut_bytes())?;
        }
        Ok(commands)
    }

    /// One command more was carried out: the head after it.
    pub(super) fn advance(&self, head: &mut Head) -> u16 {
        head.at = (head.at + 1) % self.size;
        head.number()
    }

    /// The completion of a command, after which the head is `sq_head`.
    pub(super) fn completion(
        &self,
        sq_head: u16,
        command: &Command,
        result: u32,
        status: Status,
    ) -> Completion {
        Completion {
            result,
            reserved: 0,
            sq_head,
            sq_id: self.id,
            command_id: command.id,
            status: status.0 << 1,
        }
    }
}

impl Drop for SubmissionQueue {
    fn drop(&mut self) {
        self.completions.users.fetch_sub(1, Ordering::SeqCst);
    }
}

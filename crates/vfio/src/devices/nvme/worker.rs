//! The threads that carry out commands.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

use super::controller::Shared;
use super::lock;
use super::queue::SubmissionQueue;
use super::spec::{Command, Completion, Status, csts};
use super::{admin, io};
use crate::dma::DmaFault;

/// Wakes a worker.
#[derive(Debug, Default)]
pub(super) struct Signal {
    state: Mutex<Pending>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Pending {
    set: bool,
    ended: bool,
}

impl Signal {
    pub(super) fn set(&self) {
        let mut state = lock(&self.state);
        if !state.set {
            state.set = true;
            self.changed.notify_one();
        }
    }

    /// The worker is to end.
    pub(super) fn end(&self) {
        lock(&self.state).ended = true;
        self.changed.notify_one();
    }

    /// Waits: whether there is something to do, rather than an end.
    fn wait(&self) -> bool {
        let mut state = lock(&self.state);
        while !state.set && !state.ended {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.set = false;
        !state.ended
    }
}

/// What a command comes to.
pub(super) enum Outcome {
    /// A result, and a status.
    Done(u32, Status),
    /// Its completion comes when there is an event.
    Later,
}

impl From<Result<u32, Status>> for Outcome {
    fn from(result: Result<u32, Status>) -> Self {
        match result {
            Ok(result) => Self::Done(result, Status::SUCCESS),
            Err(status) => Self::Done(0, status),
        }
    }
}

/// A worker's life.
pub(super) fn run(shared: &Arc<Shared>, number: usize) {
    let mut buffer = Vec::new();
    let Some(signal) = shared.signals.get(number) else { return };
    while signal.wait() {
        let mine: Vec<_> = {
            let tables = lock(&shared.tables);
            let all = tables.submission.iter().flatten();
            all.filter(|queue| usize::from(queue.id) % shared.signals.len() == number).cloned().collect()
        };
        // Another round while there was something, so that no queue waits for a long one.
        let mut busy = true;
        while busy {
            busy = false;
            for queue in &mine {
                let running = shared.running.read().unwrap_or_else(PoisonError::into_inner);
                if !*running || lock(&shared.registers).status & csts::FATAL != 0 {
                    break;
                }
                match batch(shared, queue, &mut buffer) {
                    Ok(more) => busy |= more,
                    Err(fault) => {
                        drop(running);
                        shared.fail(&fault);
                    }
                }
            }
        }
    }
}

/// Carries out some commands of a queue: whether there may be more.
fn batch(shared: &Shared, queue: &SubmissionQueue, buffer: &mut Vec<u8>) -> Result<bool, DmaFault> {
    let mut head = lock(&queue.head);
    if !head.live {
        return Ok(false);
    }
    let dma = &*shared.link;
    if queue.id == 0 {
        let due = lock(&shared.state).due(head.number());
        head.unposted.extend(due);
    }
    if !post(shared, queue, &mut head.unposted)? {
        return Ok(false);
    }
    let commands = queue.fetch(&mut head, dma, queue.completions.room())?;
    let more = !commands.is_empty();
    for command in &commands {
        let outcome = execute(shared, queue.id, command, buffer);
        let at = queue.advance(&mut head);
        if let Outcome::Done(result, status) = outcome {
            head.unposted.push(queue.completion(at, command, result, status));
        }
    }
    post(shared, queue, &mut head.unposted)?;
    Ok(more)
}

/// Posts what is to be posted, and signals: whether all of it was.
fn post(shared: &Shared, queue: &SubmissionQueue, unposted: &mut Vec<Completion>) -> Result<bool, DmaFault> {
    if !unposted.is_empty() {
        let posted = queue.completions.post(&*shared.link, unposted)?;
        unposted.drain(..posted);
        if posted > 0 {
            shared.signal(&queue.completions);
        }
    }
    if unposted.is_empty() && queue.completions.room() > 0 {
        return Ok(true);
    }
    // The driver's next doorbell of the completion queue wakes this thread, unless it has come just now.
    queue.completions.set_stalled();
    if queue.completions.room() > 0 {
        shared.wake(queue.id);
    }
    Ok(false)
}

fn execute(shared: &Shared, queue: u16, command: &Command, buffer: &mut Vec<u8>) -> Outcome {
    // Two commands as one are not offered.
    const FUSED: u8 = 3;
    if command.flags & FUSED != 0 {
        return Outcome::Done(0, Status::INVALID_FIELD);
    }
    let outcome = if queue == 0 {
        admin::execute(shared, command)
    } else {
        io::execute(shared, command, buffer).map(|()| 0).into()
    };
    if let Outcome::Done(_, status) = outcome
        && status != Status::SUCCESS
    {
        tracing::debug!(queue, opcode = command.opcode, status = status.0, "an NVMe command fails");
    }
    outcome
}

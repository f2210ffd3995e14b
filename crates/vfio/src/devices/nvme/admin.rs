//! Commands that configure the controller (section 5).

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use iommufd::iova::Iova;

use super::controller::Shared;
use super::queue::{CompletionQueue, SubmissionQueue};
use super::spec::{
    CQ_ENTRY_BITS, Command, Completion, MAX_ENTRIES, MAX_TRANSFER, PAGE, SQ_ENTRY_BITS, Status, admin, cc,
    feature, log,
};
use super::worker::Outcome;
use super::{identify, lock, prp};

/// Asynchronous event requests that may wait.
pub(super) const MAX_EVENT_REQUESTS: usize = 4;
/// Events that are kept for requests to come.
const MAX_EVENTS: usize = 8;
/// The temperature that the driver is warned at, in kelvin, and its default.
pub(super) const WARNING_TEMPERATURE: u16 = 343;

/// What a controller reset puts back.
#[derive(Debug)]
pub(super) struct State {
    /// Command identifiers of asynchronous event requests.
    requests: VecDeque<u16>,
    /// Events that no request has reported, as in the completion's result.
    events: VecDeque<u32>,
    /// Types of events that are not reported until the driver has read their log page.
    masked: u32,
    temperature: u32,
    async_events: u32,
    arbitration: u32,
    error_recovery: u32,
    coalescing: u32,
    atomicity: u32,
}

impl Default for State {
    fn default() -> Self {
        Self {
            requests: VecDeque::new(),
            events: VecDeque::new(),
            masked: 0,
            temperature: WARNING_TEMPERATURE.into(),
            async_events: 0,
            arbitration: 0,
            error_recovery: 0,
            coalescing: 0,
            atomicity: 0,
        }
    }
}

impl State {
    /// An asynchronous event (section 5.2).
    pub(super) fn event(&mut self, kind: u8, information: u8, page: u8) {
        let event = u32::from(page) << 16 | u32::from(information) << 8 | u32::from(kind);
        if self.masked & 1 << kind == 0 && self.events.len() < MAX_EVENTS {
            self.masked |= 1 << kind;
            self.events.push_back(event);
        }
    }

    /// Completions of the requests that have something to report, when the admin queue's head is `sq_head`.
    pub(super) fn due(&mut self, sq_head: u16) -> Vec<Completion> {
        let mut due = Vec::new();
        while !self.requests.is_empty()
            && let Some(result) = self.events.pop_front()
        {
            let command_id = self.requests.pop_front().unwrap_or_default();
            due.push(Completion { result, command_id, sq_head, ..Default::default() });
        }
        due
    }
}

pub(super) fn execute(shared: &Shared, command: &Command) -> Outcome {
    match command.opcode {
        admin::DELETE_SQ => delete_submission(shared, command).map(|()| 0).into(),
        admin::CREATE_SQ => create_submission(shared, command).map(|()| 0).into(),
        admin::GET_LOG_PAGE => log_page(shared, command).map(|()| 0).into(),
        admin::DELETE_CQ => delete_completion(shared, command).map(|()| 0).into(),
        admin::CREATE_CQ => create_completion(shared, command).map(|()| 0).into(),
        admin::IDENTIFY => identify(shared, command).map(|()| 0).into(),
        // Commands are carried out as they are fetched: there is nothing that could still be aborted.
        admin::ABORT => Outcome::Done(1, Status::SUCCESS),
        admin::SET_FEATURES => set_feature(shared, command).into(),
        admin::GET_FEATURES => get_feature(shared, command).into(),
        admin::ASYNC_EVENT => {
            let mut state = lock(&shared.state);
            if state.requests.len() >= MAX_EVENT_REQUESTS {
                return Outcome::Done(0, Status::TOO_MANY_EVENTS);
            }
            state.requests.push_back(command.id);
            drop(state);
            // An event may wait for it already.
            shared.wake(0);
            Outcome::Later
        }
        _ => Outcome::Done(0, Status::INVALID_OPCODE),
    }
}

/// The number of a queue, and its entries.
fn queue_and_size(command: &Command) -> (u16, u32) {
    let [q0, q1, s0, s1] = command.cdw10.to_le_bytes();
    (u16::from_le_bytes([q0, q1]), u32::from(u16::from_le_bytes([s0, s1])) + 1)
}

/// What creating either kind of queue asks for.
fn check_queue(
    shared: &Shared,
    command: &Command,
    entry_shift: u32,
    entry_bits: u32,
) -> Result<(u16, u32), Status> {
    const CONTIGUOUS: u32 = 1;
    let (id, size) = queue_and_size(command);
    if id == 0 || id > shared.queues {
        return Err(Status::INVALID_QUEUE);
    }
    let entry = lock(&shared.registers).configuration >> entry_shift & 0xf;
    if !(2..=MAX_ENTRIES).contains(&size) || entry != entry_bits {
        return Err(Status::INVALID_QUEUE_SIZE);
    }
    if command.cdw11 & CONTIGUOUS == 0 {
        return Err(Status::INVALID_FIELD);
    }
    if !command.prp1.is_multiple_of(PAGE) {
        return Err(Status::INVALID_PRP);
    }
    Ok((id, size))
}

fn create_completion(shared: &Shared, command: &Command) -> Result<(), Status> {
    const INTERRUPTS: u32 = 2;
    let (id, size) = check_queue(shared, command, cc::CQ_ENTRY_SHIFT, CQ_ENTRY_BITS)?;
    let [_, _, v0, v1] = command.cdw11.to_le_bytes();
    let vector = u16::from_le_bytes([v0, v1]);
    if vector > shared.queues {
        return Err(Status::INVALID_VECTOR);
    }
    let vector = (command.cdw11 & INTERRUPTS != 0).then_some(vector);
    let mut tables = lock(&shared.tables);
    match tables.completion.get_mut(usize::from(id)) {
        Some(slot @ None) => {
            *slot = Some(Arc::new(CompletionQueue::new(Iova(command.prp1), size, vector)));
            Ok(())
        }
        _ => Err(Status::INVALID_QUEUE),
    }
}

fn create_submission(shared: &Shared, command: &Command) -> Result<(), Status> {
    let (id, size) = check_queue(shared, command, cc::SQ_ENTRY_SHIFT, SQ_ENTRY_BITS)?;
    let [_, _, c0, c1] = command.cdw11.to_le_bytes();
    let completion = usize::from(u16::from_le_bytes([c0, c1]));
    let mut tables = lock(&shared.tables);
    let completions = tables.completion.get(completion).cloned().flatten().filter(|_| completion != 0);
    let completions = completions.ok_or(Status::CQ_INVALID)?;
    match tables.submission.get_mut(usize::from(id)) {
        Some(slot @ None) => {
            *slot = Some(Arc::new(SubmissionQueue::new(id, Iova(command.prp1), size, completions)));
            Ok(())
        }
        _ => Err(Status::INVALID_QUEUE),
    }
}

fn delete_submission(shared: &Shared, command: &Command) -> Result<(), Status> {
    let (id, _) = queue_and_size(command);
    if id == 0 {
        return Err(Status::INVALID_QUEUE);
    }
    let queue = lock(&shared.tables).submission.get_mut(usize::from(id)).and_then(Option::take);
    let queue = queue.ok_or(Status::INVALID_QUEUE)?;
    // Waits for commands that are being carried out. Their completions are posted before this one.
    lock(&queue.head).live = false;
    Ok(())
}

fn delete_completion(shared: &Shared, command: &Command) -> Result<(), Status> {
    let (id, _) = queue_and_size(command);
    let mut tables = lock(&shared.tables);
    let slot = tables.completion.get_mut(usize::from(id)).filter(|_| id != 0);
    let slot = slot.filter(|slot| slot.is_some()).ok_or(Status::INVALID_QUEUE)?;
    let used = |queue: &CompletionQueue| queue.users.load(Ordering::SeqCst) > 0;
    if slot.as_deref().is_some_and(used) {
        return Err(Status::INVALID_DELETION);
    }
    *slot = None;
    Ok(())
}

/// Sends data to where a command wants it.
fn answer(shared: &Shared, command: &Command, data: &[u8]) -> Result<(), Status> {
    let dma = &*shared.link;
    let segments = prp::segments(dma, command, data.len() as u64)?;
    prp::scatter(dma, &segments, data)
}

fn identify(shared: &Shared, command: &Command) -> Result<(), Status> {
    let data = identify::data(shared, command.cdw10 & 0xff, command.namespace)?;
    answer(shared, command, &data)
}

fn log_page(shared: &Shared, command: &Command) -> Result<(), Status> {
    const RETAIN: u32 = 1 << 15;
    let dwords = u64::from(command.cdw10 >> 16) | u64::from(command.cdw11 & 0xffff) << 16;
    let length = (dwords + 1) * 4;
    let offset = u64::from(command.cdw12) | u64::from(command.cdw13) << 32;
    let id = command.cdw10.to_le_bytes()[0];
    let page = identify::log_page(shared, id)?;
    let from = usize::try_from(offset).ok().filter(|offset| offset.is_multiple_of(4));
    let rest = from.and_then(|from| page.get(from..)).ok_or(Status::INVALID_FIELD)?;
    if length > MAX_TRANSFER {
        return Err(Status::INVALID_FIELD);
    }
    // What is beyond the page is zero.
    let mut data = rest.to_vec();
    data.resize(usize::try_from(length).unwrap_or(0), 0);
    answer(shared, command, &data)?;
    if command.cdw10 & RETAIN == 0 && id == log::ERRORS {
        lock(&shared.state).masked &= !1;
    }
    Ok(())
}

/// How many pairs of queues there are, as both halves of a result have it.
fn queues(shared: &Shared) -> u32 {
    let last = u32::from(shared.queues - 1);
    last << 16 | last
}

fn set_feature(shared: &Shared, command: &Command) -> Result<u32, Status> {
    const SAVE: u32 = 1 << 31;
    if command.cdw10 & SAVE != 0 {
        return Err(Status::NOT_SAVEABLE);
    }
    let value = command.cdw11;
    let mut state = lock(&shared.state);
    match command.cdw10.to_le_bytes()[0] {
        feature::ARBITRATION => state.arbitration = value,
        // There is one power state.
        feature::POWER_MANAGEMENT if value & 0x1f == 0 => {}
        feature::TEMPERATURE => state.temperature = value & 0xffff,
        feature::ERROR_RECOVERY => state.error_recovery = value & 0xffff,
        feature::WRITE_CACHE => {
            let on = value & 1 != 0;
            drop(state);
            if !on {
                shared.disk.flush().map_err(|_| Status::WRITE_FAULT)?;
            }
            shared.write_cache.store(on, Ordering::SeqCst);
        }
        feature::QUEUES => {
            // All that there are, whatever was asked for, unless that is nonsense.
            if value & 0xffff == 0xffff || value >> 16 == 0xffff {
                return Err(Status::INVALID_FIELD);
            }
            return Ok(queues(shared));
        }
        feature::COALESCING => state.coalescing = value & 0xffff,
        feature::VECTOR => {
            if value & 0xffff > u32::from(shared.queues) {
                return Err(Status::INVALID_FIELD);
            }
        }
        feature::ATOMICITY => state.atomicity = value & 1,
        feature::ASYNC_EVENTS => state.async_events = value,
        feature::POWER_MANAGEMENT => return Err(Status::INVALID_FIELD),
        0x0c..=0x7f => return Err(Status::INVALID_FIELD),
        _ => return Err(Status::NOT_CHANGEABLE),
    }
    Ok(0)
}

fn get_feature(shared: &Shared, command: &Command) -> Result<u32, Status> {
    let state = lock(&shared.state);
    Ok(match command.cdw10.to_le_bytes()[0] {
        feature::ARBITRATION => state.arbitration,
        feature::POWER_MANAGEMENT => 0,
        // Of the sensors only the composite one exists.
        feature::TEMPERATURE => match command.cdw11 >> 16 & 0x3f {
            0 => state.temperature,
            // The threshold of cold.
            0x10 => 0,
            _ => return Err(Status::INVALID_FIELD),
        },
        feature::ERROR_RECOVERY => state.error_recovery,
        feature::WRITE_CACHE => shared.write_cache.load(Ordering::SeqCst).into(),
        feature::QUEUES => queues(shared),
        feature::COALESCING => state.coalescing,
        feature::VECTOR => {
            let vector = command.cdw11 & 0xffff;
            if vector > u32::from(shared.queues) {
                return Err(Status::INVALID_FIELD);
            }
            // Coalescing of this vector cannot be turned on.
            vector | 1 << 16
        }
        feature::ATOMICITY => state.atomicity,
        feature::ASYNC_EVENTS => state.async_events,
        _ => return Err(Status::INVALID_FIELD),
    })
}

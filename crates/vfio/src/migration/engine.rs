//! Migration of a device in software: the states and the streams, around what it has to save.
//!
//! # Theory of operation
//!
//! A device that can be saved as bytes, and made of them again, is a [`Saved`]. A [`StateMachine`] makes a [`Migration`] of
//! it. The states that it knows are STOP, RUNNING, STOP_COPY, RESUMING and PRE_COPY; a change of state goes by the
//! shortest way over these steps:
//!
//! ```text
//! RESUMING <-> STOP <-> RUNNING <-> PRE_COPY -> STOP_COPY <-> STOP
//! ```
//!
//! The stream is, in PRE_COPY, what [`Saved::early`] gives, and then, in STOP_COPY, [`Saved::save`]; each behind its length.
//! What is written while RESUMING is taken apart and loaded when RESUMING is left for STOP.

use std::{
    collections::VecDeque,
    fmt,
    sync::{Arc, Mutex},
};

use super::{Migration, MigrationFlags, MigrationStream, PrecopyInfo, State};
use crate::{Errno, Result, eventfd::lock};

/// The most that a stream may bring: a peer must not fill memory.
const MOST: usize = 64 << 20;
/// Before each part of a stream: which part, and how many bytes.
const HEAD: usize = 8;
const EARLY: u32 = 0x3145_5233;
const REST: u32 = 0x3252_5233;

/// A device as it is saved and loaded.
pub trait Saved: Send + Sync {
    /// Lets go of memory and interrupts: registers change no more, and no access to memory is under way.
    fn stop(&self);
    /// Goes on.
    fn resume(&self);
    /// What can be taken while it runs. It may be old when it arrives.
    fn early(&self) -> Vec<u8> {
        Vec::new()
    }
    /// All that must be taken when it is stopped.
    fn save(&self) -> Vec<u8>;
    /// Becomes what was saved.
    ///
    /// # Errors
    /// EINVAL for bytes that no such device has saved. The device may be anything after that, but must stay safe.
    fn load(&self, early: &[u8], rest: &[u8]) -> Result<()>;
}

/// A stream that is read or written.
#[derive(Default)]
struct Data {
    bytes: VecDeque<u8>,
    /// More will come, from the state that follows.
    unfinished: bool,
    resuming: bool,
    /// The device is no longer in a state that it belongs to.
    ended: bool,
}

struct Stream(Mutex<Data>);

impl MigrationStream for Stream {
    fn read(&self, to: &mut [u8]) -> Result<usize> {
        let mut data = lock(&self.0);
        if data.ended {
            return Err(Errno::NODEV);
        }
        if data.resuming {
            return Err(Errno::INVAL);
        }
        if data.bytes.is_empty() && data.unfinished {
            return Err(Errno::NOMSG);
        }
        let count = data.bytes.len().min(to.len());
        for (to, byte) in to.iter_mut().zip(data.bytes.drain(..count)) {
            *to = byte;
        }
        Ok(count)
    }

    fn write(&self, from: &[u8]) -> Result<usize> {
        let mut data = lock(&self.0);
        if data.ended {
            return Err(Errno::NODEV);
        }
        if !data.resuming || data.bytes.len().saturating_add(from.len()) > MOST {
            return Err(Errno::INVAL);
        }
        data.bytes.extend(from);
        Ok(from.len())
    }

    fn precopy_info(&self) -> Result<PrecopyInfo> {
        let data = lock(&self.0);
        if data.ended {
            return Err(Errno::NODEV);
        }
        if !data.unfinished {
            return Err(Errno::INVAL);
        }
        Ok(PrecopyInfo { initial_bytes: data.bytes.len() as u64, dirty_bytes: 0 })
    }
}

/// What follows a part's head.
fn part(kind: u32, bytes: &[u8]) -> impl Iterator<Item = u8> + '_ {
    let length = bytes.len() as u32;
    kind.to_le_bytes().into_iter().chain(length.to_le_bytes()).chain(bytes.iter().copied())
}

/// Takes the part `kind` from the front. EINVAL when it is another, or not all there.
fn take<'a>(bytes: &mut &'a [u8], kind: u32) -> Result<&'a [u8]> {
    let (head, rest) = bytes.split_at_checked(HEAD).ok_or(Errno::INVAL)?;
    let word = |at: usize| {
        head.get(at..at + 4).and_then(|word| word.first_chunk()).map_or(0, |word| u32::from_le_bytes(*word))
    };
    if word(0) != kind {
        return Err(Errno::INVAL);
    }
    let (part, rest) = rest.split_at_checked(word(4) as usize).ok_or(Errno::INVAL)?;
    *bytes = rest;
    Ok(part)
}

struct Now {
    state: State,
    stream: Option<Arc<Stream>>,
}

/// The migration of a device in software.
pub struct StateMachine<S> {
    saved: S,
    now: Mutex<Now>,
}

impl<S> fmt::Debug for StateMachine<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StateMachine").field("state", &lock(&self.now).state).finish_non_exhaustive()
    }
}

/// One step from a state, in the order in which they are tried.
fn steps(from: State) -> &'static [State] {
    match from {
        State::Running => &[State::Stop, State::PreCopy],
        State::Stop => &[State::Running, State::StopCopy, State::Resuming],
        State::StopCopy | State::Resuming => &[State::Stop],
        State::PreCopy => &[State::Running, State::StopCopy],
        State::Error | State::RunningP2p | State::PreCopyP2p => &[],
    }
}

/// The states on the shortest way, the last included. EINVAL when there is none.
fn way(from: State, to: State) -> Result<Vec<State>> {
    // What STOP_COPY has given cannot be given early again.
    if from == State::StopCopy && to == State::PreCopy {
        return Err(Errno::INVAL);
    }
    let mut seen = vec![(from, from)];
    let mut next = 0;
    while let Some(&(state, _)) = seen.get(next) {
        next += 1;
        for step in steps(state) {
            if seen.iter().all(|(known, _)| known != step) {
                seen.push((*step, state));
            }
        }
    }
    let before = |state| seen.iter().find(|(known, _)| *known == state).map(|(_, before)| *before);
    let mut way = Vec::new();
    let mut at = to;
    while at != from {
        way.insert(0, at);
        at = before(at).ok_or(Errno::INVAL)?;
    }
    if before(to).is_none() { Err(Errno::INVAL) } else { Ok(way) }
}

impl<S: Saved> StateMachine<S> {
    /// A device that runs.
    pub fn new(saved: S) -> Self {
        Self { saved, now: Mutex::new(Now { state: State::Running, stream: None }) }
    }

    /// What is saved.
    pub fn saved(&self) -> &S {
        &self.saved
    }

    /// The device was reset: it runs, whatever state it was in.
    pub fn reset(&self) {
        let mut now = lock(&self.now);
        Self::end(&mut now);
        if now.state != State::Running {
            now.state = State::Running;
            self.saved.resume();
        }
    }

    fn end(now: &mut Now) {
        if let Some(stream) = now.stream.take() {
            *lock(&stream.0) = Data { ended: true, ..Data::default() };
        }
    }

    fn begin(now: &mut Now, data: Data) -> Arc<Stream> {
        let stream = Arc::new(Stream(Mutex::new(data)));
        now.stream = Some(Arc::clone(&stream));
        stream
    }

    /// One step.
    fn step(&self, now: &mut Now, to: State) -> Result<Option<Arc<Stream>>> {
        let from = now.state;
        let mut stream = None;
        match (from, to) {
            (State::Running, State::Stop) => self.saved.stop(),
            (State::Stop, State::Running) => self.saved.resume(),
            (State::Running, State::PreCopy) => {
                let bytes = part(EARLY, &self.saved.early()).collect();
                stream = Some(Self::begin(now, Data { bytes, unfinished: true, ..Data::default() }));
            }
            (State::PreCopy, State::StopCopy) => {
                self.saved.stop();
                if let Some(stream) = &now.stream {
                    let mut data = lock(&stream.0);
                    data.bytes.extend(part(REST, &self.saved.save()));
                    data.unfinished = false;
                }
            }
            (State::Stop, State::StopCopy) => {
                let mut bytes: VecDeque<u8> = part(EARLY, &self.saved.early()).collect();
                bytes.extend(part(REST, &self.saved.save()));
                stream = Some(Self::begin(now, Data { bytes, ..Data::default() }));
            }
            (State::Stop, State::Resuming) => {
                stream = Some(Self::begin(now, Data { resuming: true, ..Data::default() }));
            }
            (State::Resuming, State::Stop) => {
                let bytes = now.stream.as_ref().map(|stream| std::mem::take(&mut lock(&stream.0).bytes));
                Self::end(now);
                let mut bytes = bytes.unwrap_or_default();
                // Nothing written: the device stays as it was.
                if !bytes.is_empty() {
                    let mut rest: &[u8] = bytes.make_contiguous();
                    let early = take(&mut rest, EARLY)?;
                    let last = take(&mut rest, REST)?;
                    if !rest.is_empty() {
                        return Err(Errno::INVAL);
                    }
                    self.saved.load(early, last)?;
                }
            }
            _ => Self::end(now),
        }
        now.state = to;
        Ok(stream)
    }
}

impl<S: Saved> Migration for StateMachine<S> {
    fn flags(&self) -> MigrationFlags {
        MigrationFlags::STOP_COPY | MigrationFlags::PRE_COPY
    }

    fn state(&self) -> Result<State> {
        Ok(lock(&self.now).state)
    }

    fn set_state(&self, to: State) -> Result<Option<Arc<dyn MigrationStream>>> {
        let mut now = lock(&self.now);
        let mut stream = None;
        for step in way(now.state, to)? {
            match self.step(&mut now, step) {
                Ok(begun) => stream = begun,
                Err(errno) => {
                    Self::end(&mut now);
                    now.state = State::Error;
                    return Err(errno);
                }
            }
        }
        Ok(stream.map(|stream| stream as Arc<dyn MigrationStream>))
    }

    fn stop_copy_length(&self) -> Result<u64> {
        let (early, rest) = (self.saved.early().len(), self.saved.save().len());
        Ok((early + rest + 2 * HEAD) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Value {
        value: Mutex<Vec<u8>>,
        runs: Mutex<Vec<bool>>,
    }

    impl Saved for Value {
        fn stop(&self) {
            lock(&self.runs).push(false);
        }

        fn resume(&self) {
            lock(&self.runs).push(true);
        }

        fn early(&self) -> Vec<u8> {
            vec![7; 3]
        }

        fn save(&self) -> Vec<u8> {
            lock(&self.value).clone()
        }

        fn load(&self, early: &[u8], rest: &[u8]) -> Result<()> {
            if early != [7; 3] {
                return Err(Errno::INVAL);
            }
            *lock(&self.value) = rest.to_vec();
            Ok(())
        }
    }

    fn machine(value: &[u8]) -> StateMachine<Value> {
        StateMachine::new(Value { value: Mutex::new(value.to_vec()), ..Value::default() })
    }

    fn all(stream: &dyn MigrationStream) -> (Vec<u8>, Result<usize>) {
        let (mut bytes, mut buffer) = (Vec::new(), [0; 5]);
        loop {
            match stream.read(&mut buffer) {
                Ok(0) => return (bytes, Ok(0)),
                Ok(count) => bytes.extend_from_slice(&buffer[..count]),
                error => return (bytes, error),
            }
        }
    }

    #[test]
    fn a_device_moves_while_it_runs() {
        let (from, to) = (machine(b"state"), machine(b""));
        let stream = from.set_state(State::PreCopy).unwrap().unwrap();
        assert_eq!(stream.precopy_info().unwrap().initial_bytes, 11);
        let (mut bytes, end) = all(&*stream);
        assert_eq!(end, Err(Errno::NOMSG));
        assert_eq!(stream.precopy_info().unwrap().initial_bytes, 0);
        assert!(from.set_state(State::StopCopy).unwrap().is_none(), "the same stream goes on");
        assert_eq!(stream.precopy_info(), Err(Errno::INVAL));
        let (rest, end) = all(&*stream);
        assert_eq!(end, Ok(0));
        bytes.extend(rest);
        assert_eq!(bytes.len() as u64, from.stop_copy_length().unwrap());
        from.set_state(State::Stop).unwrap();
        assert_eq!(stream.read(&mut [0]), Err(Errno::NODEV));

        let stream = to.set_state(State::Resuming).unwrap().unwrap();
        assert_eq!(stream.read(&mut [0]), Err(Errno::INVAL));
        for piece in bytes.chunks(4) {
            assert_eq!(stream.write(piece), Ok(piece.len()));
        }
        to.set_state(State::Running).unwrap();
        assert_eq!(*lock(&to.saved().value), b"state");
        assert_eq!(*lock(&to.saved().runs), [false, true]);
        assert_eq!(stream.write(&[0]), Err(Errno::NODEV));
    }

    #[test]
    fn ways_between_states() {
        use State::{Error, PreCopy, Resuming, Running, RunningP2p, Stop, StopCopy};
        assert_eq!(way(Running, StopCopy), Ok(vec![Stop, StopCopy]));
        assert_eq!(way(Resuming, PreCopy), Ok(vec![Stop, Running, PreCopy]));
        assert_eq!(way(PreCopy, Stop), Ok(vec![Running, Stop]));
        assert_eq!(way(Stop, Stop), Ok(vec![]));
        assert_eq!(way(StopCopy, PreCopy), Err(Errno::INVAL));
        for (from, to) in [(Running, Error), (Error, Running), (Running, RunningP2p)] {
            assert_eq!(way(from, to), Err(Errno::INVAL));
        }
    }

    #[test]
    fn bytes_that_nobody_saved_are_an_error_until_the_reset() {
        let good: Vec<u8> = part(EARLY, &[7; 3]).chain(part(REST, b"x")).collect();
        let wrong = [&good[..5], &good[..good.len() - 1], &good[1..], &[good.as_slice(), &[0]].concat()];
        for bytes in wrong {
            let machine = machine(b"old");
            let stream = machine.set_state(State::Resuming).unwrap().unwrap();
            stream.write(bytes).unwrap();
            assert_eq!(machine.set_state(State::Running).err(), Some(Errno::INVAL));
            assert_eq!(machine.state(), Ok(State::Error));
            assert_eq!(machine.set_state(State::Stop).err(), Some(Errno::INVAL));
            machine.reset();
            assert_eq!(machine.state(), Ok(State::Running));
        }
        let machine = machine(b"");
        let stream = machine.set_state(State::Resuming).unwrap().unwrap();
        assert_eq!(stream.write(&vec![0; MOST + 1]), Err(Errno::INVAL));
    }
}

//! Commands and replies over one socket, in both directions at a time.
//!
//! # Theory of operation
//!
//! Replies to our commands and commands of the peer come over the same socket, mixed. No thread is there only to sort
//! them: whoever waits for something and finds nobody reading reads himself, and hands out what comes. So a reply usually
//! arrives on the thread that waits for it, without a switch of threads and by one system call; and a server whose command
//! waits for memory of the client (DMA_READ) reads that reply itself, while new commands pile up until it is done (within
//! bounds).
//!
//! A sender whom the socket does not take more from reads as well meanwhile, unless somebody does: so two sides that both
//! send a lot do not wait for each other.
//!
//! **The end.** The first thing that goes wrong is the state of the connection from then on, and everybody who waits gets
//! it. There is no way back: a new connection begins anew.
//!
//! **Locks.** `writing` is held while one message is sent, however long the peer takes (at most [`Patience::message`]);
//! `state` is held for moments, never while waiting for the peer. `writing` may be taken before `state`.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::transport::{Broken, Message, Outgoing, Ready, Socket};
use super::version::{MAX_FDS, MAX_MESSAGE};
use super::wire::{Command, Header};
use super::{Errno, Result};

/// Commands of the peer that may wait to be taken.
const MAX_QUEUED: usize = 1024;
/// Bytes that they may have together.
const MAX_QUEUED_BYTES: usize = 4 * MAX_MESSAGE;
/// Descriptors that they may have together.
const MAX_QUEUED_FDS: usize = 4 * MAX_FDS;
/// Commands of ours that may wait for their reply.
const MAX_WAITING: usize = 4096;

/// How long a peer may take.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Patience {
    /// To send the rest of a message that it began, or to take one.
    pub message: Duration,
    /// To answer a command.
    pub reply: Duration,
}

impl Default for Patience {
    /// Ten seconds for a message, thirty for a reply: resets and saved state can take long.
    fn default() -> Self {
        Self { message: Duration::from_secs(10), reply: Duration::from_secs(30) }
    }
}

/// A command of ours that waits for its reply.
#[derive(Debug)]
enum Slot {
    Waiting(Command),
    Arrived(Message),
}

#[derive(Debug)]
struct State {
    /// Somebody reads the socket.
    reading: bool,
    /// How many wait for who reads.
    sleeping: usize,
    /// By the number of the command.
    waiting: HashMap<u16, Slot>,
    next_id: u16,
    /// Commands of the peer, in order.
    commands: VecDeque<Message>,
    queued_bytes: usize,
    queued_fds: usize,
    broken: Option<Broken>,
}

/// One connection, of either side.
#[derive(Debug)]
pub struct Connection {
    socket: Socket,
    /// Commands of the peer may come on this socket.
    takes_commands: bool,
    patience: Patience,
    writing: Mutex<()>,
    state: Mutex<State>,
    changed: Condvar,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Connection {
    /// A connection over this UNIX stream socket. When the peer may send no commands over it, one ends the connection.
    pub fn new(socket: OwnedFd, takes_commands: bool, patience: Patience) -> Self {
        let state = State {
            reading: false,
            sleeping: 0,
            waiting: HashMap::new(),
            next_id: 0,
            commands: VecDeque::new(),
            queued_bytes: 0,
            queued_fds: 0,
            broken: None,
        };
        Self {
            // Half of what a caller waits at most: so who begins to wait for a reply lets the socket wait for him.
            socket: Socket::new(socket, patience.reply / 2),
            takes_commands,
            patience,
            writing: Mutex::new(()),
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
    }

    /// Ends the connection, as if the peer had closed it.
    pub fn shut_down(&self) {
        self.break_off(Broken::Closed);
    }

    /// Why it ended, if it did.
    pub fn broken(&self) -> Option<Broken> {
        lock(&self.state).broken
    }

    /// Sends a command and waits for its reply, whose payload has at least the length of the command's [`Row`].
    ///
    /// # Errors
    /// What the peer says; [`Broken::errno`] when it does not answer; EMSGSIZE for a command that is too long to be sent;
    /// EBUSY when too many wait for a reply.
    ///
    /// [`Row`]: super::wire::Row
    pub fn request(&self, command: Command, parts: &[&[u8]], fds: &[BorrowedFd<'_>]) -> Result<Message> {
        check_length(parts, fds)?;
        let id = self.new_slot(command)?;
        let header = Header::command(id, command, length(parts), false);
        if let Err(broken) = self.send(header, parts, fds) {
            lock(&self.state).waiting.remove(&id);
            return Err(broken.errno());
        }
        let until = Instant::now() + self.patience.reply;
        let arrived = self.wait_for(Some(until), |state| match state.waiting.get(&id) {
            Some(Slot::Arrived(_)) => state.waiting.remove(&id),
            _ => None,
        });
        let reply = match arrived {
            Ok(Some(Slot::Arrived(reply))) => reply,
            // A peer that does not answer is a peer that has gone: its answer would find nobody.
            Ok(_) => return Err(self.break_off(Broken::TimedOut).errno()),
            Err(broken) => return Err(broken.errno()),
        };
        if let Some(errno) = reply.header.failure() {
            return Err(errno);
        }
        if reply.payload.len() < command.row().reply {
            return Err(self.break_off(Broken::Protocol("a reply is too short")).errno());
        }
        Ok(reply)
    }

    /// Sends a command and waits for no reply. It has been done before any later command is answered.
    ///
    /// # Errors
    /// As [`Self::request`], apart from what only a reply can tell.
    pub fn post(&self, command: Command, parts: &[&[u8]]) -> Result<()> {
        check_length(parts, &[])?;
        let header = Header::command(0, command, length(parts), true);
        self.send(header, parts, &[]).map_err(Broken::errno)
    }

    /// The next command of the peer.
    ///
    /// # Errors
    /// The end of the connection.
    pub fn next_command(&self) -> Result<Message, Broken> {
        let command = self.wait_for(None, |state| {
            let command = state.commands.pop_front()?;
            state.queued_bytes -= command.payload.len();
            state.queued_fds -= command.fds.len();
            Some(command)
        });
        // Without an end of its time the wait ends with a command or not at all.
        command.and_then(|command| command.ok_or(Broken::TimedOut))
    }

    /// Answers a command that wants an answer.
    ///
    /// # Errors
    /// The end of the connection.
    pub fn reply(&self, to: &Header, parts: &[&[u8]], fds: &[BorrowedFd<'_>]) -> Result<(), Broken> {
        if to.no_reply() {
            return Ok(());
        }
        self.send(to.reply(length(parts)), parts, fds)
    }

    /// Answers a command that wants an answer: it failed.
    ///
    /// # Errors
    /// The end of the connection.
    pub fn reply_failure(&self, to: &Header, errno: Errno) -> Result<(), Broken> {
        if to.no_reply() {
            return Ok(());
        }
        self.send(to.failed(errno), &[], &[])
    }

    /// A number for a command that waits for its reply.
    fn new_slot(&self, command: Command) -> Result<u16> {
        let mut state = lock(&self.state);
        if let Some(broken) = state.broken {
            return Err(broken.errno());
        }
        if state.waiting.len() >= MAX_WAITING {
            return Err(Errno::BUSY);
        }
        // Fewer are in use than there are numbers.
        let mut id = state.next_id;
        while state.waiting.contains_key(&id) {
            id = id.wrapping_add(1);
        }
        state.next_id = id.wrapping_add(1);
        state.waiting.insert(id, Slot::Waiting(command));
        Ok(id)
    }

    /// Waits until `find` finds something; none when the time is over before. Reads while nobody else does.
    fn wait_for<T>(
        &self,
        until: Option<Instant>,
        mut find: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<Option<T>, Broken> {
        let mut state = lock(&self.state);
        loop {
            if let Some(found) = find(&mut state) {
                return Ok(Some(found));
            }
            if let Some(broken) = state.broken {
                return Err(broken);
            }
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(None);
            }
            if state.reading {
                state.sleeping += 1;
                state = match left {
                    None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                    Some(left) => {
                        let waited = self.changed.wait_timeout(state, left);
                        waited.unwrap_or_else(PoisonError::into_inner).0
                    }
                };
                state.sleeping -= 1;
            } else {
                state.reading = true;
                drop(state);
                let came = self.socket.receive(until, self.patience.message);
                state = lock(&self.state);
                self.hand_out(&mut state, came);
            }
        }
    }

    /// Gives what was read to who waits for it. Ends being the one who reads.
    fn hand_out(&self, state: &mut State, came: Result<Option<Message>, Broken>) {
        state.reading = false;
        let result = match came {
            Ok(None) => Ok(()),
            Ok(Some(message)) => state.take(message, self.takes_commands),
            Err(broken) => Err(broken),
        };
        if let Err(broken) = result {
            state.broken.get_or_insert(broken);
            self.socket.shut_down();
        }
        // To wake nobody is a system call too.
        if state.sleeping > 0 {
            self.changed.notify_all();
        }
    }

    /// Sends one message.
    fn send(&self, header: Header, parts: &[&[u8]], fds: &[BorrowedFd<'_>]) -> Result<(), Broken> {
        let _writing = lock(&self.writing);
        if let Some(broken) = self.broken() {
            return Err(broken);
        }
        let until = Instant::now() + self.patience.message;
        let mut outgoing = Outgoing::new(header, parts);
        loop {
            let with = if outgoing.begun() { &[] } else { fds };
            match outgoing.rest(|rest| self.socket.send(rest, with)) {
                Ok(count) => {
                    if outgoing.advance(count) {
                        return Ok(());
                    }
                }
                Err(Errno::AGAIN) => {
                    if Instant::now() >= until {
                        return Err(self.break_off(Broken::TimedOut));
                    }
                    self.wait_writable(until)?;
                }
                Err(errno) => return Err(self.break_off(errno.into())),
            }
        }
    }

    /// Waits until the socket may take more, and reads what comes meanwhile if nobody else does.
    fn wait_writable(&self, until: Instant) -> Result<(), Broken> {
        let mut state = lock(&self.state);
        if let Some(broken) = state.broken {
            return Err(broken);
        }
        let reads = !state.reading;
        state.reading = true;
        drop(state);
        if !reads {
            return self
                .socket
                .wait(Ready { readable: false, writable: true }, Some(until))
                .map(|_| ())
                .map_err(|broken| self.break_off(broken));
        }
        let came = match self.socket.wait(Ready { readable: true, writable: true }, Some(until)) {
            Ok(ready) if ready.readable => self.socket.receive(Some(Instant::now()), self.patience.message),
            Ok(_) => Ok(None),
            Err(broken) => Err(broken),
        };
        let mut state = lock(&self.state);
        self.hand_out(&mut state, came);
        state.broken.map_or(Ok(()), Err)
    }

    /// Ends the connection: why it has ended, which may be an earlier reason.
    fn break_off(&self, why: Broken) -> Broken {
        let mut state = lock(&self.state);
        let why = *state.broken.get_or_insert(why);
        self.socket.shut_down();
        self.changed.notify_all();
        why
    }
}

impl State {
    /// Takes in one message.
    fn take(&mut self, message: Message, takes_commands: bool) -> Result<(), Broken> {
        let is_reply = message.header.is_reply();
        if is_reply.map_err(|_| Broken::Protocol("a message is neither command nor reply"))? {
            let number = message.header.command;
            let slot = self.waiting.get_mut(&message.header.id);
            let slot =
                slot.filter(|slot| matches!(slot, Slot::Waiting(command) if *command as u16 == number));
            *slot.ok_or(Broken::Protocol("a reply that nobody waits for"))? = Slot::Arrived(message);
            Ok(())
        } else if takes_commands {
            self.queued_bytes += message.payload.len();
            self.queued_fds += message.fds.len();
            self.commands.push_back(message);
            let few = self.commands.len() <= MAX_QUEUED
                && self.queued_bytes <= MAX_QUEUED_BYTES
                && self.queued_fds <= MAX_QUEUED_FDS;
            if few { Ok(()) } else { Err(Broken::Protocol("too many commands at a time")) }
        } else {
            Err(Broken::Protocol("a command where none may come"))
        }
    }
}

fn length(parts: &[&[u8]]) -> usize {
    parts.iter().map(|part| part.len()).sum()
}

fn check_length(parts: &[&[u8]], fds: &[BorrowedFd<'_>]) -> Result<()> {
    let fits = length(parts) <= MAX_MESSAGE - Header::SIZE && fds.len() <= MAX_FDS;
    if fits { Ok(()) } else { Err(Errno::MSGSIZE) }
}

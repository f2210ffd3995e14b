//! One direction of a spliced connection: bytes from one socket to another.
//!
//! **Much.** Bytes move from the source's queue into a pipe and from there into the sink's queue, by splice(2): their
//! pages do, nothing is copied. A pipe is held only while bytes are in it.
//!
//! **Little.** Messages that come one by one are copied, which is cheaper for them than pages and pipes are; a full buffer
//! is the sign to go over to splicing, and little at one time is the sign to go back. What the sink does not take is held,
//! in all connections together [`MOST_HELD`] bytes at most: beyond that bytes are only peeked at, and thrown away once
//! the sink has them. So it goes without pipes, too, when there are too many or no descriptors for them.
//!
//! **Back-pressure.** Nothing is read while the sink takes nothing: it is the kernel's own. A source that goes on telling of
//! bytes meanwhile is not listened to until then ([`Direction::is_pestered`]).
//!
//! **Readiness** is edge-triggered. A read that is shorter than its buffer has emptied the source's queue, except
//! before its end or urgent data, of which epoll tells beforehand. About splice(2) nothing of that sort can be said, since
//! a pipe may be full of a few bytes: with an empty pipe it has to come back with nothing.
//!
//! **Urgent data** stops splice(2) for ever, or looks like the end. So it is copied, in line and without its mark, and
//! what the end is copying alone decides.

use std::os::fd::OwnedFd;

use rustix::io::{Errno, retry_on_intr};
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};
use rustix::pipe::{SpliceFlags, splice};

use super::pipes::{Pipe, Pipes};

/// Bytes that a direction moves before others have their turn.
const QUANTUM: usize = 4 << 20;
/// Bytes asked of one splice(2): more than any pipe holds.
const MOST: usize = 16 << 20;
/// Bytes copied at once. Less than this at one time is little.
const LITTLE: usize = 32 << 10;
/// Bytes that were read and could not be written, of all connections.
const MOST_HELD: usize = 8 << 20;

/// What all directions use.
#[derive(Debug)]
pub(super) struct Means {
    pub(super) pipes: Pipes,
    /// Where bytes are copied to.
    scratch: Vec<u8>,
    /// How many bytes all directions hold.
    held: usize,
    /// How many bytes were moved.
    pub(super) moved: u64,
}

impl Means {
    pub(super) fn new() -> Self {
        Self { pipes: Pipes::new(), scratch: vec![0; LITTLE], held: 0, moved: 0 }
    }
}

/// How a source ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    /// By a FIN.
    Orderly,
    /// By a reset, or another error.
    Reset,
}

/// What has become of a direction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum State {
    /// It goes on.
    Open,
    /// All bytes are with the sink, and it knows that they were the last; or the sink is gone.
    Done,
    /// The source was reset, and the sink has all that came before it.
    Reset,
}

/// What a turn came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Turn {
    /// There is more to do at once.
    pub(super) again: bool,
    /// The sink was found to be gone.
    pub(super) sink_is_gone: bool,
}

/// One direction.
#[derive(Debug)]
pub(super) struct Direction {
    /// The source may have something.
    readable: bool,
    /// The sink may have room.
    writable: bool,
    /// The source's queue has urgent data in it, or its end: a short read does not mean that it is empty.
    marked: bool,
    /// The source has told again of what was known, while the sink takes nothing.
    insists: bool,
    /// Splicing rather than copying.
    much: bool,
    /// Bytes moved since the source was last empty.
    burst: usize,
    /// Holds `pending` bytes. None if there are none.
    pipe: Option<Pipe>,
    pending: usize,
    /// Bytes that were copied and the sink did not take.
    held: Vec<u8>,
    end: Option<End>,
    state: State,
    /// The source was found to be reset when something was written to it.
    source_is_gone: bool,
}

impl Direction {
    pub(super) fn new() -> Self {
        Self {
            readable: false,
            writable: false,
            marked: false,
            insists: false,
            much: false,
            burst: 0,
            pipe: None,
            pending: 0,
            held: Vec::new(),
            end: None,
            state: State::Open,
            source_is_gone: false,
        }
    }

    pub(super) fn state(&self) -> State {
        self.state
    }

    /// The source may have something; `marked` if urgent data, or its end or an error, is in its queue.
    pub(super) fn source_ready(&mut self, marked: bool) {
        self.insists = self.is_stopped();
        self.readable = true;
        self.marked |= marked;
    }

    /// Whether what the source has waits for the sink alone.
    pub(super) fn is_stopped(&self) -> bool {
        self.readable && !self.writable && self.end.is_none()
    }

    /// Whether it is so, and the source has told of more meanwhile.
    pub(super) fn is_pestered(&self) -> bool {
        self.insists && self.is_stopped()
    }

    /// The sink may have room.
    pub(super) fn sink_ready(&mut self) {
        self.writable = true;
    }

    /// The source was found to be gone when something was written to it. What it sent before is still there, but the
    /// kernel has told of the error already, and will call what follows an orderly end.
    pub(super) fn source_gone(&mut self) {
        self.source_is_gone = true;
        self.source_ready(true);
    }

    /// Gives up what is held.
    pub(super) fn release(&mut self, means: &mut Means) {
        if let Some(pipe) = self.pipe.take() {
            if self.pending == 0 { means.pipes.give_back(pipe) } else { means.pipes.discard(pipe) }
        }
        self.pending = 0;
        means.held -= self.held.len();
        self.held = Vec::new();
    }

    /// Moves what can be moved, up to a quantum. `last` says that the other direction is done.
    pub(super) fn turn(&mut self, source: &OwnedFd, sink: &OwnedFd, means: &mut Means, last: bool) -> Turn {
        let mut left = QUANTUM;
        while self.state == State::Open && left > 0 {
            match self.step(source, sink, means, last) {
                Ok(Some(n)) => {
                    means.moved += n as u64;
                    self.burst = self.burst.saturating_add(n);
                    // What moved nothing counts too.
                    left = left.saturating_sub(n.max(1));
                }
                Ok(None) => break,
                Err(_) => {
                    self.release(means);
                    self.state = State::Done;
                    return Turn { again: false, sink_is_gone: true };
                }
            }
        }
        if self.pending == 0
            && let Some(pipe) = self.pipe.take()
        {
            means.pipes.give_back(pipe);
        }
        Turn { again: left == 0 && self.state == State::Open, sink_is_gone: false }
    }

    /// Does one thing, and says how many bytes the sink has got by it. `None` if there is nothing to do but wait.
    ///
    /// # Errors
    /// The sink is gone.
    fn step(
        &mut self,
        source: &OwnedFd,
        sink: &OwnedFd,
        means: &mut Means,
        last: bool,
    ) -> Result<Option<usize>, Errno> {
        if !self.writable {
            return Ok(None);
        }
        if !self.held.is_empty() {
            let sent = retry_on_intr(|| send(sink, &self.held, send_flags()));
            return self.note_sent(sent, |direction, n| {
                direction.held.drain(..n);
                means.held -= n;
            });
        }
        let may_read = self.readable && self.end.is_none();
        let splicing = self.much && !self.marked;
        if may_read && splicing {
            if self.pipe.is_none() {
                self.pipe = means.pipes.take();
            }
            let Some(pipe) = &self.pipe else { return self.peek(source, sink, means) };
            // syscalls(pasta): splice
            match retry_on_intr(|| splice(source, None, &pipe.write, None, MOST, splice_flags())) {
                // Copying will tell whether it is.
                Ok(0) => self.marked = true,
                Ok(n) => self.pending += n,
                // The pipe is full, or the source empty: only an empty pipe tells.
                Err(Errno::AGAIN) if self.pending > 0 => {}
                Err(error) => self.note_unreadable(error),
            }
        }
        if self.pending > 0
            && let Some(pipe) = &self.pipe
        {
            let sent = retry_on_intr(|| splice(&pipe.read, None, sink, None, self.pending, splice_flags()));
            return self.note_sent(sent, |direction, n| {
                direction.pending = direction.pending.saturating_sub(n);
            });
        }
        if self.end.is_some() {
            self.finish(sink, last)?;
            return Ok(None);
        }
        if !self.readable {
            return Ok(None);
        }
        if splicing {
            // It has changed its mind just now.
            return Ok(Some(0));
        }
        if means.held >= MOST_HELD { self.peek(source, sink, means) } else { self.copy(source, sink, means) }
    }

    /// Copies some bytes.
    fn copy(&mut self, source: &OwnedFd, sink: &OwnedFd, means: &mut Means) -> Result<Option<usize>, Errno> {
        // syscalls(pasta): recvfrom sendto
        let read = retry_on_intr(|| recv(source, &mut means.scratch[..], RecvFlags::DONTWAIT));
        let Some(n) = self.note_read(read.map(|(n, _)| n)) else { return Ok(Some(0)) };
        if n == means.scratch.len() {
            self.much = true;
        } else {
            self.readable = self.marked;
        }
        let bytes = means.scratch.get(..n).unwrap_or_default();
        let sent = match retry_on_intr(|| send(sink, bytes, send_flags())) {
            Err(Errno::AGAIN) => 0,
            sent => sent?,
        };
        let rest = bytes.get(sent..).unwrap_or_default();
        if !rest.is_empty() {
            self.held = rest.to_vec();
            means.held += rest.len();
        }
        Ok(Some(sent))
    }

    /// Copies some bytes, of which none is held if the sink does not take it.
    fn peek(&mut self, source: &OwnedFd, sink: &OwnedFd, means: &mut Means) -> Result<Option<usize>, Errno> {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let read = retry_on_intr(|| recv(source, &mut means.scratch[..], flags));
        let Some(n) = self.note_read(read.map(|(n, _)| n)) else { return Ok(Some(0)) };
        let bytes = means.scratch.get(..n).unwrap_or_default();
        let sent = retry_on_intr(|| send(sink, bytes, send_flags()));
        let scratch = &mut means.scratch;
        self.note_sent(sent, |_, n| {
            // Thrown away without a copy (tcp(7)); the bytes are there, they were peeked at.
            let gone = scratch.get_mut(..n).unwrap_or_default();
            let _ = recv(source, gone, RecvFlags::TRUNC | RecvFlags::DONTWAIT);
        })
    }

    fn note_sent(
        &mut self,
        sent: Result<usize, Errno>,
        note: impl FnOnce(&mut Self, usize),
    ) -> Result<Option<usize>, Errno> {
        match sent {
            Ok(n) => {
                note(self, n);
                Ok(Some(n))
            }
            Err(Errno::AGAIN) => {
                self.writable = false;
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// How many bytes were read, if that is neither an end nor an error.
    fn note_read(&mut self, read: Result<usize, Errno>) -> Option<usize> {
        match read {
            Ok(0) => self.end = Some(if self.source_is_gone { End::Reset } else { End::Orderly }),
            Ok(n) => return Some(n),
            Err(error) => self.note_unreadable(error),
        }
        None
    }

    fn note_unreadable(&mut self, error: Errno) {
        match error {
            Errno::AGAIN => {
                self.readable = false;
                self.marked = false;
                self.much = self.burst >= LITTLE;
                self.burst = 0;
            }
            _ => self.end = Some(End::Reset),
        }
    }

    /// Passes on the end, of which there is one, and nothing is held. If it is the last, closing does that.
    fn finish(&mut self, sink: &OwnedFd, last: bool) -> Result<(), Errno> {
        match self.end {
            Some(End::Reset) => self.state = State::Reset,
            _ => self.state = State::Done,
        }
        // syscalls(pasta): shutdown
        if self.state == State::Done && !last { shutdown(sink, Shutdown::Write) } else { Ok(()) }
    }
}

fn send_flags() -> SendFlags {
    SendFlags::DONTWAIT | SendFlags::NOSIGNAL
}

fn splice_flags() -> SpliceFlags {
    SpliceFlags::MOVE | SpliceFlags::NONBLOCK
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_pesters_that_tells_again_while_the_sink_is_full() {
        let mut direction = Direction::new();
        assert!(!direction.is_stopped());
        direction.source_ready(false);
        assert!(direction.is_stopped() && !direction.is_pestered(), "this was news");
        direction.source_ready(false);
        assert!(direction.is_pestered());
        direction.sink_ready();
        assert!(!direction.is_stopped() && !direction.is_pestered());
        direction.source_ready(false);
        direction.writable = false;
        assert!(direction.is_stopped() && !direction.is_pestered());
        // Nothing more will come that could be waited for.
        direction.source_ready(false);
        direction.end = Some(End::Orderly);
        assert!(!direction.is_pestered());
    }
}

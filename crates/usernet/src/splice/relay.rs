//! One direction of a spliced connection: bytes from one socket to another.
//!
//! Bytes move from the source's queue into a pipe and from there into the sink's queue, by splice(2): their pages do,
//! nothing is copied. Nothing is read while the sink takes nothing, so that back-pressure is the kernel's own and a
//! pipe is held only by bytes that the sink took a part of.
//!
//! Without a pipe bytes are copied: peeked at, sent, and what was sent is thrown away, so that nothing is held that was
//! read and could not be written. So they are around urgent data, where splice(2) stops for ever or even says that it
//! has seen the end: copying delivers it in line, without its mark, and it alone decides where the end is.

use std::os::fd::OwnedFd;

use rustix::io::{Errno, retry_on_intr};
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown, sockopt};
use rustix::pipe::{SpliceFlags, splice};

use super::pipes::{Pipe, Pipes};

/// Bytes that a direction moves before others have their turn.
const QUANTUM: usize = 4 << 20;
/// Bytes asked of one call: more than any pipe holds.
const MOST: usize = 16 << 20;

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
    /// The source's queue has urgent data in it, or its end: nothing for splice(2).
    copying: bool,
    /// Holds `pending` bytes. None if there are none.
    pipe: Option<Pipe>,
    pending: usize,
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
            copying: false,
            pipe: None,
            pending: 0,
            end: None,
            state: State::Open,
            source_is_gone: false,
        }
    }

    pub(super) fn state(&self) -> State {
        self.state
    }

    /// The source may have something: bytes, its end, or an error.
    pub(super) fn source_ready(&mut self) {
        self.readable = true;
    }

    /// The source has urgent data, or its end.
    pub(super) fn copy_from(&mut self, source: &OwnedFd) {
        self.copying = true;
        // Refused by no TCP socket; without it the urgent byte is lost.
        let _ = sockopt::set_socket_oobinline(source, true);
    }

    /// The sink may have room.
    pub(super) fn sink_ready(&mut self) {
        self.writable = true;
    }

    /// The source was found to be gone when something was written to it. What it sent before is still there, but the
    /// kernel has told of the error already, and will call what follows an orderly end.
    pub(super) fn source_gone(&mut self) {
        self.source_is_gone = true;
        self.readable = true;
    }

    /// Gives up what is held.
    pub(super) fn release(&mut self, pipes: &mut Pipes) {
        if let Some(pipe) = self.pipe.take() {
            if self.pending == 0 { pipes.give_back(pipe) } else { pipes.discard(pipe) }
        }
        self.pending = 0;
    }

    /// Moves what can be moved, up to a quantum.
    pub(super) fn turn(
        &mut self,
        source: &OwnedFd,
        sink: &OwnedFd,
        pipes: &mut Pipes,
        scratch: &mut [u8],
        moved: &mut u64,
    ) -> Turn {
        let mut left = QUANTUM;
        while self.state == State::Open {
            let result = self.step(source, sink, pipes, scratch);
            match result {
                Ok(0) => break,
                Ok(n) => {
                    *moved += n as u64;
                    left = left.saturating_sub(n);
                    if left == 0 {
                        break;
                    }
                }
                Err(_) => {
                    self.release(pipes);
                    self.state = State::Done;
                    return Turn { again: false, sink_is_gone: true };
                }
            }
        }
        if self.pending == 0 {
            self.release(pipes);
        }
        Turn { again: left == 0 && self.state == State::Open, sink_is_gone: false }
    }

    /// Moves some bytes to the sink, and says how many: none if it must wait.
    ///
    /// # Errors
    /// The sink is gone.
    fn step(
        &mut self,
        source: &OwnedFd,
        sink: &OwnedFd,
        pipes: &mut Pipes,
        scratch: &mut [u8],
    ) -> Result<usize, Errno> {
        if !self.writable {
            return Ok(0);
        }
        let may_read = self.readable && self.end.is_none();
        if may_read && self.copying && self.pending == 0 {
            self.release(pipes);
            return self.copy(source, sink, scratch);
        }
        if may_read && !self.copying {
            if self.pipe.is_none() {
                self.pipe = pipes.take();
            }
            let Some(pipe) = &self.pipe else { return self.copy(source, sink, scratch) };
            // syscalls(pasta): splice
            match retry_on_intr(|| splice(source, None, &pipe.write, None, MOST, flags())) {
                Ok(0) => self.copy_from(source),
                Ok(n) => self.pending += n,
                // The pipe is full, or the source empty: only an empty pipe tells.
                Err(Errno::AGAIN) if self.pending > 0 => {}
                Err(error) => self.note_unreadable(error),
            }
        }
        if self.pending > 0
            && let Some(pipe) = &self.pipe
        {
            return match retry_on_intr(|| splice(&pipe.read, None, sink, None, self.pending, flags())) {
                Ok(n) => {
                    self.pending = self.pending.saturating_sub(n);
                    Ok(n)
                }
                Err(Errno::AGAIN) => {
                    self.writable = false;
                    Ok(0)
                }
                Err(error) => Err(error),
            };
        }
        self.finish(sink)?;
        Ok(0)
    }

    /// Copies some bytes.
    fn copy(&mut self, source: &OwnedFd, sink: &OwnedFd, scratch: &mut [u8]) -> Result<usize, Errno> {
        // syscalls(pasta): recvfrom sendto
        match retry_on_intr(|| recv(source, &mut *scratch, RecvFlags::PEEK | RecvFlags::DONTWAIT)) {
            Ok((0, _)) => {
                self.end = Some(if self.source_is_gone { End::Reset } else { End::Orderly });
            }
            Ok((n, _)) => {
                let bytes = scratch.get(..n).unwrap_or_default();
                return match retry_on_intr(|| send(sink, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)) {
                    Ok(sent) => {
                        // Thrown away without a copy (tcp(7)); the bytes are there, they were peeked at.
                        let gone = scratch.get_mut(..sent).unwrap_or_default();
                        let _ = recv(source, gone, RecvFlags::TRUNC | RecvFlags::DONTWAIT);
                        Ok(sent)
                    }
                    Err(Errno::AGAIN) => {
                        self.writable = false;
                        Ok(0)
                    }
                    Err(error) => Err(error),
                };
            }
            Err(error) => {
                self.copying = false;
                self.note_unreadable(error);
            }
        }
        self.finish(sink)?;
        Ok(0)
    }

    fn note_unreadable(&mut self, error: Errno) {
        match error {
            Errno::AGAIN => self.readable = false,
            _ => self.end = Some(End::Reset),
        }
    }

    /// Passes on the end, once there is one and nothing is pending.
    fn finish(&mut self, sink: &OwnedFd) -> Result<(), Errno> {
        match self.end {
            Some(End::Orderly) => {
                self.state = State::Done;
                // syscalls(pasta): shutdown
                shutdown(sink, Shutdown::Write)
            }
            Some(End::Reset) => {
                self.state = State::Reset;
                Ok(())
            }
            None => Ok(()),
        }
    }
}

fn flags() -> SpliceFlags {
    SpliceFlags::MOVE | SpliceFlags::NONBLOCK
}

//! The command's streams while it runs.
//!
//! The command gets pipes, not the ports themselves: a port can be opened only once (which would break
//! `/dev/stdin` and friends), never raises `SIGPIPE`, and is a character device. One `poll` loop moves bytes:
//!
//! - **output**: pipe → port by `splice`, which hands the pipe's pages to the device without a copy. Only with
//!   indirect descriptors: without them the driver drops a page list that does not fit in the ring. Otherwise
//!   by a buffer.
//! - **input**: port → buffer → pipe; the driver hands out at most one page per read, so several reads are
//!   gathered before one write. End of file on the port closes the pipe.
//! - **hang-up**: when the host closes an output port (or says so on the control port), the pipe's read end is
//!   closed, so that the command gets `SIGPIPE`. When the command closes its input, the port is closed.
//! - **end**: a thread reaps children. When the command itself ends, what its pipes still hold is sent, whoever
//!   else may have them open, and the status is returned. The machine drains the ports' rings at power-off.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc;

use guest_init::control::{FromGuest, Lines, ToGuest};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::pipe::{SpliceFlags, splice};
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, kill_process_group, wait};

use crate::command::Started;
use crate::error::{Error, Result};
use crate::ports::{Control, Port};

/// Bytes moved at a time: the default size of a pipe.
const CHUNK: usize = 64 << 10;

/// Relays until the command ends; returns the message that says how.
pub(crate) fn run(started: Started, ports: [Option<Port>; 3], control: &Control) -> Result<FromGuest> {
    let Started { pid, pipes: [stdin, stdout, stderr], terminal } = started;
    let [stdin_port, stdout_port, stderr_port] = ports;
    let mut input = stdin_port.zip(stdin).map(|(port, pipe)| Input::new(port, pipe));
    let mut outputs = [
        stdout_port.zip(stdout).map(|(port, pipe)| Output::new(port, pipe)),
        stderr_port.zip(stderr).map(|(port, pipe)| Output::new(port, pipe)),
    ];
    let (ended, status) = reaper(pid)?;
    let mut lines = Lines::default();
    let mut control_open = true;
    loop {
        let mut set = PollSet::default();
        let ended_at = set.add(ended.as_fd(), PollFlags::IN);
        let control_at = control_open.then(|| set.add(control.as_fd(), PollFlags::IN));
        let input_at = input.as_ref().map(|input| input.register(&mut set));
        let outputs_at = outputs.each_ref().map(|o| o.as_ref().map(|output| output.register(&mut set)));
        let events = set.wait()?;
        if let Some(at) = control_at
            && events.any(at)
        {
            control_open = obey(control, &mut lines, pid, &mut outputs, terminal.as_ref());
        }
        if let (Some(at), Some(relay)) = (input_at, input.as_mut())
            && relay.advance(&events, at)? == Progress::Done
        {
            input = None;
        }
        for (at, slot) in outputs_at.into_iter().zip(&mut outputs) {
            if let (Some(at), Some(output)) = (at, slot.as_mut())
                && output.advance(&events, at)? == Progress::Done
            {
                *slot = None;
            }
        }
        if events.any(ended_at) {
            break;
        }
    }
    for output in outputs.iter_mut().flatten() {
        output.drain()?;
    }
    if let Some(terminal) = &terminal {
        // Wait until the console driver has handed everything to the device.
        let _ = rustix::termios::tcdrain(terminal);
    }
    let status =
        status.recv().map_err(|_| Error::Relay("the reaper is gone", io::ErrorKind::Other.into()))?;
    Ok(match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => FromGuest::Exit(u8::try_from(code & 0xff).unwrap_or(u8::MAX)),
        (None, Some(signal)) => FromGuest::Signal(u8::try_from(signal).unwrap_or(u8::MAX)),
        (None, None) => FromGuest::Failed("the command ended in an unknown way".into()),
    })
}

/// Starts the thread that waits for every child. Returns a descriptor that becomes readable when `main` has
/// ended, and where its status then is.
fn reaper(main: Pid) -> Result<(OwnedFd, mpsc::Receiver<WaitStatus>)> {
    let (reader, writer) = io::pipe().map_err(|e| Error::Relay("cannot make a pipe", e))?;
    let (sender, status) = mpsc::channel();
    let reap = move || {
        loop {
            match wait(WaitOptions::empty()) {
                Ok(Some((pid, status))) if pid == main => {
                    let _ = sender.send(status);
                    break;
                }
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) => break,
            }
        }
        drop(writer);
    };
    std::thread::Builder::new()
        .stack_size(CHUNK)
        .spawn(reap)
        .map_err(|e| Error::Relay("cannot start a thread", e))?;
    Ok((reader.into(), status))
}

/// Reads and follows the host's control lines. False when the port is closed for good.
fn obey(
    control: &Control,
    lines: &mut Lines,
    command: Pid,
    outputs: &mut [Option<Output>; 2],
    terminal: Option<&std::fs::File>,
) -> bool {
    let mut buffer = [0; 512];
    let count = match control.read(&mut buffer) {
        Ok(0) => return false,
        Ok(count) => count,
        Err(error) => return matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted),
    };
    let Ok(lines) = lines.push(buffer.get(..count).unwrap_or_default()) else { return false };
    for line in lines {
        match ToGuest::parse(&line) {
            Some(ToGuest::Signal(number)) => {
                if let Some(signal) = Signal::from_named_raw(i32::from(number)) {
                    // The group may be gone already; then the command's end is on its way.
                    let _ = kill_process_group(command, signal);
                }
            }
            Some(ToGuest::Winsize(rows, columns)) => {
                if let Some(terminal) = terminal {
                    crate::command::set_winsize(terminal, rows, columns);
                }
            }
            Some(ToGuest::Hangup(stream @ (1 | 2))) => {
                if let Some(slot) = outputs.get_mut(usize::from(stream) - 1) {
                    *slot = None;
                }
            }
            Some(ToGuest::Hangup(_)) | None => {}
        }
    }
    true
}

/// Whether a relay has more to do.
#[derive(PartialEq, Eq)]
enum Progress {
    More,
    Done,
}

/// Host to command.
struct Input {
    port: Port,
    pipe: OwnedFd,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    eof: bool,
}

impl Input {
    fn new(port: Port, pipe: OwnedFd) -> Self {
        Self { port, pipe, buffer: vec![0; CHUNK].into_boxed_slice(), start: 0, end: 0, eof: false }
    }

    fn register<'a>(&'a self, set: &mut PollSet<'a>) -> (usize, usize) {
        let (port, pipe) = if self.start < self.end {
            (PollFlags::empty(), PollFlags::OUT)
        } else {
            (PollFlags::IN, PollFlags::empty())
        };
        // A port with nothing to wait for would report its hang-up for ever: left out (index of the pipe).
        let pipe_at = set.add(self.pipe.as_fd(), pipe);
        let port_at = if port.is_empty() { pipe_at } else { set.add(self.port.file.as_fd(), port) };
        (port_at, pipe_at)
    }

    fn advance(&mut self, events: &Events, (port_at, pipe_at): (usize, usize)) -> Result<Progress> {
        if events.has(pipe_at, PollFlags::ERR) {
            return Ok(Progress::Done);
        }
        if !events.any(port_at) && !events.any(pipe_at) {
            return Ok(Progress::More);
        }
        if self.start == self.end {
            self.fill()?;
        }
        while self.start < self.end {
            match rustix::io::write(&self.pipe, self.buffer.get(self.start..self.end).unwrap_or_default()) {
                Ok(count) => self.start += count,
                Err(Errno::AGAIN) => return Ok(Progress::More),
                Err(Errno::INTR) => {}
                Err(Errno::PIPE) => return Ok(Progress::Done),
                Err(errno) => return Err(Error::Relay("cannot write to the command's input", errno.into())),
            }
        }
        Ok(if self.eof { Progress::Done } else { Progress::More })
    }

    /// Gathers what the port has, up to the buffer's size.
    fn fill(&mut self) -> Result<()> {
        (self.start, self.end) = (0, 0);
        while let Some(room) = self.buffer.get_mut(self.end..).filter(|room| !room.is_empty()) {
            match self.port.file.read(room) {
                Ok(0) => {
                    self.eof = true;
                    break;
                }
                Ok(count) => self.end += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::Relay("cannot read the standard input port", error)),
            }
        }
        Ok(())
    }
}

/// Command to host.
struct Output {
    port: Port,
    pipe: OwnedFd,
    /// Bytes taken from the pipe that the port did not take yet; only without `splice`.
    pending: Vec<u8>,
    /// The port has no room: wait for it, not for the pipe.
    port_full: bool,
}

/// What one step of an [`Output`] did.
enum Step {
    Moved,
    PipeEmpty,
    PortFull,
    PipeClosed,
    PortClosed,
}

impl Output {
    fn new(port: Port, pipe: OwnedFd) -> Self {
        Self { port, pipe, pending: Vec::new(), port_full: false }
    }

    fn register<'a>(&'a self, set: &mut PollSet<'a>) -> (usize, usize) {
        let (port, pipe) = if self.port_full {
            (PollFlags::OUT, PollFlags::empty())
        } else {
            (PollFlags::empty(), PollFlags::IN)
        };
        let port_at = set.add(self.port.file.as_fd(), port);
        // A pipe whose writers are gone would report its hang-up for ever while the port is full.
        let pipe_at = if pipe.is_empty() { port_at } else { set.add(self.pipe.as_fd(), pipe) };
        (port_at, pipe_at)
    }

    fn advance(&mut self, events: &Events, (port_at, pipe_at): (usize, usize)) -> Result<Progress> {
        if events.has(port_at, PollFlags::HUP) {
            return Ok(Progress::Done);
        }
        if !events.any(port_at) && !events.any(pipe_at) {
            return Ok(Progress::More);
        }
        // One step per poll keeps the other streams and the control port alive.
        Ok(match self.step()? {
            Step::Moved | Step::PipeEmpty | Step::PortFull => Progress::More,
            Step::PipeClosed | Step::PortClosed => Progress::Done,
        })
    }

    /// Moves everything that is in the pipe now, waiting for the port.
    fn drain(&mut self) -> Result<()> {
        loop {
            match self.step()? {
                Step::Moved => {}
                Step::PipeEmpty | Step::PipeClosed | Step::PortClosed => return Ok(()),
                Step::PortFull => {
                    let mut fds = [PollFd::new(&self.port.file, PollFlags::OUT)];
                    poll(&mut fds, None).map_err(|e| Error::Relay("cannot wait for a port", e.into()))?;
                    if fds.iter().any(|fd| fd.revents().contains(PollFlags::HUP)) {
                        return Ok(());
                    }
                }
            }
        }
    }

    fn step(&mut self) -> Result<Step> {
        let step = if self.port.indirect { self.splice()? } else { self.copy()? };
        self.port_full = matches!(step, Step::PortFull);
        Ok(step)
    }

    fn splice(&mut self) -> Result<Step> {
        let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
        match splice(&self.pipe, None, &self.port.file, None, CHUNK, flags) {
            Ok(0) => Ok(Step::PipeClosed),
            Ok(_) => Ok(Step::Moved),
            // Either side: ask the pipe whether it has something.
            Err(Errno::AGAIN) => {
                let mut fds = [PollFd::new(&self.pipe, PollFlags::IN)];
                let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
                poll(&mut fds, Some(&now)).map_err(|e| Error::Relay("cannot poll a pipe", e.into()))?;
                let ready = fds.iter().any(|fd| !fd.revents().is_empty());
                Ok(if ready { Step::PortFull } else { Step::PipeEmpty })
            }
            Err(Errno::INTR) => Ok(Step::Moved),
            Err(Errno::INVAL | Errno::NOSYS) => {
                self.port.indirect = false;
                self.copy()
            }
            Err(Errno::PIPE | Errno::NODEV | Errno::IO) => Ok(Step::PortClosed),
            Err(errno) => Err(Error::Relay("cannot write the command's output", errno.into())),
        }
    }

    fn copy(&mut self) -> Result<Step> {
        if self.pending.is_empty() {
            let mut buffer = vec![0; CHUNK];
            match rustix::io::read(&self.pipe, &mut buffer) {
                Ok(0) => return Ok(Step::PipeClosed),
                Ok(count) => buffer.truncate(count),
                Err(Errno::AGAIN) => return Ok(Step::PipeEmpty),
                Err(Errno::INTR) => return Ok(Step::Moved),
                Err(errno) => return Err(Error::Relay("cannot read the command's output", errno.into())),
            }
            self.pending = buffer;
        }
        match self.port.file.write(&self.pending) {
            Ok(count) => {
                self.pending.drain(..count);
                Ok(Step::Moved)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Step::PortFull),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(Step::Moved),
            Err(_) => Ok(Step::PortClosed),
        }
    }
}

/// The descriptors of one `poll`.
#[derive(Default)]
struct PollSet<'a> {
    fds: Vec<PollFd<'a>>,
}

/// What `poll` reported, by the index that [`PollSet::add`] gave.
struct Events(Vec<PollFlags>);

impl<'a> PollSet<'a> {
    fn add(&mut self, fd: BorrowedFd<'a>, flags: PollFlags) -> usize {
        self.fds.push(PollFd::from_borrowed_fd(fd, flags));
        self.fds.len() - 1
    }

    fn wait(mut self) -> Result<Events> {
        loop {
            match poll(&mut self.fds, None) {
                Ok(_) => return Ok(Events(self.fds.iter().map(PollFd::revents).collect())),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(Error::Relay("cannot wait for the streams", errno.into())),
            }
        }
    }
}

impl Events {
    fn has(&self, at: usize, flags: PollFlags) -> bool {
        self.0.get(at).is_some_and(|seen| seen.intersects(flags))
    }

    fn any(&self, at: usize) -> bool {
        self.has(at, PollFlags::all())
    }
}

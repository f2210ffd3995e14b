//! The socket and its clients: one thread, which waits for all of them at once.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::{Errno, ioctl_fionbio};
use rustix::net::{RecvFlags, SendFlags, SocketFlags, accept_with, recv, send};

use super::{Controlled, LONGEST_REQUEST, MOST_CLIENTS, Request};
use crate::net::local::{self, Access, Keeper, Name};
use crate::net::{Because, NetError};

/// How long no client is accepted when the host has run out of something.
const PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// A socket that is listened on, before there is an engine.
#[derive(Debug)]
pub struct ControlSocket {
    listener: OwnedFd,
    keeper: Option<Keeper>,
}

impl ControlSocket {
    /// Listens at `path`, for the user alone. A socket that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// There is something else, or a process that listens, or the socket cannot be made.
    pub fn bind(path: &Path) -> Result<(Self, Name), NetError> {
        let cannot = || format!("cannot listen for control at {}", path.display());
        let (listener, name) = local::listen(path, Access::Owner).because(cannot)?;
        // Who comes may have gone before it is accepted.
        ioctl_fionbio(&listener, true).because(cannot)?;
        Ok((Self { listener, keeper: None }, name))
    }

    /// Likewise, from a process of one thread that is going to lose sight of the name, or its rights: another process
    /// removes it at the end.
    ///
    /// # Errors
    /// As [`Self::bind`], or there is no such process to be had.
    pub fn bind_kept(path: &Path) -> Result<Self, NetError> {
        let (socket, name) = Self::bind(path)?;
        let keeper = Keeper::start(name);
        let keeper = keeper.because(|| "cannot start a process to remove the control socket".into())?;
        Ok(Self { keeper: Some(keeper), ..socket })
    }

    /// Serves clients on a thread of its own.
    ///
    /// # Errors
    /// The host is out of descriptors or threads.
    pub fn serve(self, controlled: Controlled) -> io::Result<Server> {
        let stop = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?);
        let stopped = Arc::clone(&stop);
        let Self { listener, keeper } = self;
        let serve = move || {
            if let Err(error) = Clients::default().serve(&listener, &stopped, &controlled) {
                tracing::warn!("the control socket is served no more: {error}");
            }
        };
        let thread = thread::Builder::new().name("control".into()).spawn(serve)?;
        Ok(Server { stop, thread: Some(thread), _keeper: keeper })
    }
}

/// A control socket that is served, until this is dropped. That has to be after the engine's end: a request that waits
/// for the engine is waited for.
#[derive(Debug)]
pub struct Server {
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
    /// Dropped, it removes the name.
    _keeper: Option<Keeper>,
}

impl Drop for Server {
    fn drop(&mut self) {
        // It can only fail when the counter is full, and then it is readable already.
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Everybody who is connected, the eldest first.
#[derive(Default)]
struct Clients {
    clients: Vec<Client>,
}

struct Client {
    socket: OwnedFd,
    /// The beginning of what was not answered yet.
    input: Vec<u8>,
    /// The rest of an answer.
    output: Vec<u8>,
    /// Whether the connection ends when the answer was taken.
    ends: bool,
}

impl Clients {
    fn serve(&mut self, listener: &OwnedFd, stop: &OwnedFd, controlled: &Controlled) -> io::Result<()> {
        let mut exhausted = false;
        loop {
            let mut waits = vec![PollFd::new(stop, PollFlags::IN)];
            let accepts = if exhausted { PollFlags::empty() } else { PollFlags::IN };
            waits.push(PollFd::new(listener, accepts));
            waits.extend(self.clients.iter().map(|client| PollFd::new(&client.socket, client.waits_for())));
            // syscalls: poll
            match poll(&mut waits, exhausted.then_some(&PAUSE)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let mut ready = waits.iter().map(|wait| !wait.revents().is_empty());
            if ready.next() == Some(true) {
                return Ok(());
            }
            let newcomers = ready.next() == Some(true);
            let ready: Vec<bool> = ready.collect();
            drop(waits);
            let mut ready = ready.into_iter();
            self.clients.retain_mut(|client| ready.next() != Some(true) || client.turn(controlled));
            exhausted = newcomers && !self.accept(listener);
        }
    }

    /// Takes in who waits; returns whether the host had all that it takes.
    fn accept(&mut self, listener: &OwnedFd) -> bool {
        // syscalls: accept4
        match accept_with(listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
            Ok(socket) => {
                if self.clients.len() == MOST_CLIENTS {
                    self.clients.remove(0);
                }
                self.clients.push(Client { socket, input: Vec::new(), output: Vec::new(), ends: false });
                true
            }
            Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => false,
            Err(_) => true,
        }
    }
}

impl Client {
    fn waits_for(&self) -> PollFlags {
        if self.output.is_empty() { PollFlags::IN } else { PollFlags::OUT }
    }

    /// Reads, answers, writes; returns whether the client stays.
    fn turn(&mut self, controlled: &Controlled) -> bool {
        if self.output.is_empty() && !self.read() {
            return false;
        }
        loop {
            match self.write() {
                Ok(()) if !self.output.is_empty() => return true,
                Ok(()) if self.ends => return false,
                Ok(()) => {}
                Err(()) => return false,
            }
            if !self.answer(controlled) {
                return true;
            }
        }
    }

    fn read(&mut self) -> bool {
        let mut buffer = [0; LONGEST_REQUEST];
        // syscalls: recvfrom
        match recv(self.socket.as_fd(), &mut buffer[..LONGEST_REQUEST - self.input.len()], RecvFlags::empty())
        {
            Ok((0, _)) => false,
            Ok((length, _)) => {
                self.input.extend(buffer.get(..length).unwrap_or_default());
                true
            }
            Err(Errno::AGAIN | Errno::INTR) => true,
            Err(_) => false,
        }
    }

    /// Makes the answer to the next request, if that is all there; returns whether it was.
    fn answer(&mut self, controlled: &Controlled) -> bool {
        let Some(end) = self.input.iter().position(|byte| *byte == b'\n') else {
            if self.input.len() < LONGEST_REQUEST {
                return false;
            }
            self.output = format!("error a request is longer than {LONGEST_REQUEST} bytes\n").into_bytes();
            self.ends = true;
            return true;
        };
        let line: Vec<u8> = self.input.drain(..=end).collect();
        let answer = match String::from_utf8_lossy(&line).parse::<Request>() {
            Ok(request) => controlled.serve(request),
            Err(error) => Err(error),
        };
        self.output = match answer {
            Ok(lines) => {
                lines.into_iter().chain(["ok".to_owned()]).map(|line| line + "\n").collect::<String>()
            }
            // One line, whatever the words.
            Err(error) => format!("error {}\n", error.replace(['\n', '\r'], " ")),
        }
        .into_bytes();
        true
    }

    fn write(&mut self) -> Result<(), ()> {
        while !self.output.is_empty() {
            // syscalls: sendto
            match send(self.socket.as_fd(), &self.output, SendFlags::NOSIGNAL) {
                Ok(written) => drop(self.output.drain(..written.min(self.output.len()))),
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(_) => return Err(()),
            }
        }
        Ok(())
    }
}

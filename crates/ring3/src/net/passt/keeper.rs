//! Who removes the socket's name at the end.
//!
//! The process that serves guests sees no files any more, and must not: whoever breaks out of the engine could remove
//! anything that it may. So another process is left behind, which knows the name, holds the end of a pipe, and does
//! nothing but wait until the pipe is closed. That happens however the serving process ends. Signals by which whole groups of
//! processes are ended do not end it.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::exit;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::fs::{Mode, OFlags, open};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::setsid;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::socket::Name;
use crate::net::isolation::background::fork;

/// The name is removed when this is dropped, in whatever way.
#[derive(Debug)]
pub(super) struct Keeper {
    path: PathBuf,
    _pipe: OwnedFd,
}

impl Keeper {
    /// Starts the process, and gives the socket back, which is only open here then.
    pub(super) fn start(name: Name, listener: OwnedFd) -> io::Result<(Self, OwnedFd)> {
        let (end, pipe) = pipe_with(PipeFlags::CLOEXEC)?;
        if fork()?.is_some() {
            let path = name.path().to_owned();
            // It is the other process's now.
            name.forget();
            return Ok((Self { path, _pipe: pipe }, listener));
        }
        drop((pipe, listener));
        let result = wait(&end);
        drop(name);
        exit(i32::from(result.is_err()));
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

/// Waits until the pipe is closed.
fn wait(end: &OwnedFd) -> io::Result<()> {
    let _ = setsid();
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::new(AtomicBool::new(false)))?;
    }
    // Who started passt may wait for the end of its output.
    let null = open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    rustix::io::retry_on_intr(|| rustix::io::read(end, &mut [0]))?;
    Ok(())
}

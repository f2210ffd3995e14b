//! Who removes a socket's name at the end.
//!
//! The process that serves guests sees no files any more, and must not: whoever breaks out of the engine could remove
//! anything that it may. So another process is left behind, which knows the name, holds one of a pair of sockets, and does
//! nothing but wait until the other one is closed. That happens however the serving process ends. Signals by which whole groups of
//! processes are ended do not end it. It keeps the rights that the name was made with.

use std::io;
use std::mem;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::exit;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::fs::{Mode, OFlags, open};
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType, shutdown, socketpair};
use rustix::process::setsid;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::Name;
use crate::net::isolation::background::fork;
use crate::run::isolation::Inherited;

/// The name is removed when this is dropped, or when the process ends.
#[derive(Debug)]
#[must_use = "dropped, it takes the name away"]
pub struct Keeper {
    path: PathBuf,
    socket: OwnedFd,
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // The other process removes the name, and ends; whoever waits for this one finds it gone. If it is gone itself,
        // there is nothing to wait for.
        // syscalls: shutdown read
        let _ = shutdown(&self.socket, Shutdown::Write);
        let _ = rustix::io::retry_on_intr(|| rustix::io::read(&self.socket, &mut [0]));
    }
}

impl Keeper {
    /// Starts the process, from one that has a single thread.
    ///
    /// # Errors
    /// This process has several threads, or there are no processes or descriptors to be had. The name is gone then.
    pub fn start(name: Name) -> io::Result<Self> {
        let (end, socket) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        if fork()?.is_some() {
            let path = name.path().to_owned();
            // It is the other process's now.
            mem::forget(name);
            return Ok(Self { path, socket });
        }
        let result = wait(end);
        drop(name);
        // What the closed descriptors belonged to is not dropped.
        exit(i32::from(result.is_err()));
    }

    /// Where the name is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Waits until the other end is closed.
fn wait(end: OwnedFd) -> io::Result<()> {
    let _ = setsid();
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::new(AtomicBool::new(false)))?;
    }
    // Somebody may wait for the end of what the process has open: its output, or a connection.
    let null = open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    rustix::stdio::dup2_stdin(&end)?;
    drop((null, end));
    Inherited::find().close();
    rustix::io::retry_on_intr(|| rustix::io::read(rustix::stdio::stdin(), &mut [0]))?;
    Ok(())
}

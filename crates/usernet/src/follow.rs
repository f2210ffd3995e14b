//! Changes of the host's network, followed while guests run.
//!
//! A laptop is carried elsewhere, a cable is plugged in, a VPN comes up: addresses, routes and resolvers are others than
//! when the guest's network was made after them. [`Follower`] watches for that on a thread of its own, and tells what a guest's
//! network would now be; what is done with it, usually [`Handle::reconfigure`](crate::Handle::reconfigure), is the
//! caller's.
//!
//! **Events.** The kernel announces links, addresses and routes to the multicast groups of rtnetlink(7), and
//! changes of resolv.conf by inotify(7) on the directories that it may be in. Neither is believed in detail: each only says
//! that it is time to look again. Announcements come in bursts, and half of a change is no network. So after the first one
//! the thread looks away until nothing was announced for [`SETTLE`], or [`LONGEST`] has passed; then it asks for everything
//! and compares. Whatever the host does, it is looked at a few times a second at most.
//!
//! **What is lost is kept.** A family, or resolvers, that the host has no more stay the guest's until there are others: a
//! guest has no use for losing its address when a cable is pulled out, and finds it working again when the cable is
//! back.
//!
//! **Isolation.** [`Follower::open`] opens everything. [`Follower::start`], which makes the thread, and the thread itself need
//! no path and no new socket: they can run in a process with an empty root, under a system call filter. What it calls is
//! tagged beside the calls.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SocketFlags, recv};

use crate::config::Config;
use crate::group::wake;
use crate::host::netlink::{ANNOUNCEMENTS, Netlink};
use crate::host::resolv::ResolvConf;
use crate::host::{Host, HostNetwork, Template};

/// How long nothing is announced before a change is believed to be whole.
const SETTLE: Duration = Duration::from_millis(250);

/// How long a change may go on before it is looked at all the same.
const LONGEST: Duration = Duration::from_secs(2);

/// What [`Follower::start`] will need: to be opened before the process is isolated.
#[derive(Debug)]
pub struct Follower {
    pub(crate) host: Host,
    template: Template,
    announcements: Netlink,
    files: OwnedFd,
    stop: Arc<OwnedFd>,
}

impl Follower {
    /// Opens what is needed to follow the part of the host's network that `template` chooses. That part need not be
    /// there yet. Changes from now on are noticed.
    ///
    /// # Errors
    /// No descriptors.
    pub fn open(template: Template) -> io::Result<Self> {
        let announcements = Netlink::open(ANNOUNCEMENTS, SocketFlags::NONBLOCK)?;
        let files = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let host = Host::open()?;
        let changes = WatchFlags::CREATE
            | WatchFlags::MOVED_TO
            | WatchFlags::CLOSE_WRITE
            | WatchFlags::DELETE
            | WatchFlags::MOVED_FROM;
        for place in host.resolv.places() {
            if let Err(error) = inotify::add_watch(&files, place, changes) {
                tracing::info!(%error, "changes in {} are not followed", place.display());
            }
        }
        let stop = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?);
        Ok(Self { host, template, announcements, files, stop })
    }

    /// The part of the host's network that there is now, and a guest's network after it.
    ///
    /// # Errors
    /// As [`Config::from_template`].
    pub fn config(&mut self) -> io::Result<(HostNetwork, Config)> {
        self.host.config(&self.template)
    }

    /// Follows the host's network on a new thread. `changed` is called there when it is not what it was before: with the
    /// part that the template chooses, and a guest's network after it, as [`Config::from_template`] makes it. `known` is
    /// what the guest has, as [`Self::config`] gave it.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn start(
        self,
        known: (HostNetwork, Config),
        changed: impl FnMut(&HostNetwork, Config) + Send + 'static,
    ) -> io::Result<Following> {
        let stop = Arc::clone(&self.stop);
        let thread = thread::Builder::new().name("follow".to_owned()).spawn(move || {
            if let Err(error) = self.follow(known, changed) {
                tracing::warn!(%error, "changes of the host's network are not followed any more");
            }
        })?;
        Ok(Following { stop, thread: Some(thread) })
    }

    fn follow(
        mut self,
        mut known: (HostNetwork, Config),
        mut changed: impl FnMut(&HostNetwork, Config),
    ) -> io::Result<()> {
        // It may have changed since.
        let mut first = true;
        while first || self.wait()? {
            first = false;
            if !self.settle()? {
                return Ok(());
            }
            match self.host.config_after(&self.template, &known.0) {
                Ok(now) if now != known => {
                    tracing::info!("the host's network has changed");
                    changed(&now.0, now.1.clone());
                    known = now;
                }
                Ok(_) => {}
                // An interface that the template names is not there, say: it may come back.
                Err(error) => tracing::debug!(%error, "the host's network cannot be read now"),
            }
        }
        Ok(())
    }

    /// Waits until a burst of announcements is over. Whether to go on.
    fn settle(&mut self) -> io::Result<bool> {
        let end = Instant::now() + LONGEST;
        loop {
            if self.stopped_within(SETTLE)? {
                return Ok(false);
            }
            let more = self.take_announcements()? | self.take_files()?;
            if !more || Instant::now() >= end {
                return Ok(true);
            }
        }
    }

    /// Waits for an announcement. Whether to go on.
    // syscalls: poll ppoll
    fn wait(&mut self) -> io::Result<bool> {
        loop {
            let mut fds = [
                PollFd::new(&*self.stop, PollFlags::IN),
                PollFd::new(self.announcements.socket(), PollFlags::IN),
                PollFd::new(&self.files, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            if !fds[0].revents().is_empty() {
                return Ok(false);
            }
            if self.take_announcements()? | self.take_files()? {
                return Ok(true);
            }
        }
    }

    fn stopped_within(&self, time: Duration) -> io::Result<bool> {
        let time = rustix::fs::Timespec { tv_sec: 0, tv_nsec: time.subsec_nanos().into() };
        let mut fds = [PollFd::new(&*self.stop, PollFlags::IN)];
        match poll(&mut fds, Some(&time)) {
            Ok(ready) => Ok(ready > 0),
            Err(Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes what the kernel announces. Whether there was anything.
    // syscalls: recvfrom
    fn take_announcements(&mut self) -> io::Result<bool> {
        // What they say does not matter: they are cut short.
        let mut buffer = [0u8; 16];
        let mut some = false;
        loop {
            match recv(self.announcements.socket(), &mut buffer[..], RecvFlags::DONTWAIT) {
                Ok(_) => some = true,
                Err(Errno::AGAIN) => return Ok(some),
                // There were too many: something has changed, all the same.
                Err(Errno::NOBUFS | Errno::INTR) => some = true,
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Takes what is said of files. Whether any of it matters.
    // syscalls: read
    fn take_files(&mut self) -> io::Result<bool> {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(&self.files, &mut buffer);
        let mut some = false;
        loop {
            match events.next() {
                // A mount that is watched itself has no name, and a queue that has run over has none either.
                Ok(event) => {
                    some |= event.file_name().is_none_or(|name| ResolvConf::is_concerned(name.to_bytes()))
                }
                Err(Errno::AGAIN) => return Ok(some),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// A thread that follows the host's network. It ends when this is dropped.
#[derive(Debug)]
pub struct Following {
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Following {
    fn drop(&mut self) {
        wake(&self.stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

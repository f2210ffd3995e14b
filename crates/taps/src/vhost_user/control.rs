//! The thread that listens to front ends.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use vhost::vhost_user::{BackendReqHandler, Error};

use super::Device;
use super::handler::Handler;
use crate::stream::Clients;

/// How long the rest of a message may take after its beginning.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where front ends come from.
#[derive(Debug)]
pub enum Source {
    /// They connect to this socket, one after the other: who comes too early waits.
    Listener(UnixListener, Clients),
    /// There is this one only.
    Connected(UnixStream),
}

/// Ends the thread when it is dropped.
pub(super) struct Stop(OwnedFd);

impl Stop {
    /// And what the thread looks at.
    pub(super) fn new() -> io::Result<(Arc<Self>, OwnedFd)> {
        let event = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        let seen = event.try_clone()?;
        Ok((Arc::new(Self(event)), seen))
    }
}

impl Drop for Stop {
    fn drop(&mut self) {
        // It can only fail when the counter is full, which nobody else adds to.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }
}

/// Serves front ends until there can be no more, or nobody is left who wants their frames.
pub(super) fn serve(source: &Source, device: &Arc<Device>, stopped: &OwnedFd) {
    match source {
        Source::Connected(stream) => match stream.try_clone() {
            Ok(stream) => serve_one(stream, device, stopped),
            Err(error) => tracing::warn!("cannot serve the front end: {error}"),
        },
        Source::Listener(listener, clients) => {
            while wait(listener, stopped) {
                // syscalls(vhost-user): accept4
                match listener.accept() {
                    Ok((stream, _)) => serve_one(stream, device, stopped),
                    Err(error) => {
                        tracing::warn!("cannot accept a front end: {error}");
                        // Out of descriptors, perhaps not for long.
                        std::thread::sleep(Duration::from_secs(1));
                        continue;
                    }
                }
                if *clients == Clients::One {
                    break;
                }
            }
        }
    }
    device.end();
}

fn serve_one(stream: UnixStream, device: &Arc<Device>, stopped: &OwnedFd) {
    tracing::info!("a front end connected");
    // Without it one that stops in the middle of a message would keep the thread for ever.
    // syscalls(vhost-user): setsockopt fcntl
    let watched = stream.set_read_timeout(Some(PATIENCE)).and_then(|()| stream.try_clone());
    match watched {
        Ok(watched) => {
            let handler = Arc::new(Mutex::new(Handler::new(device.clone())));
            let mut requests = BackendReqHandler::from_stream(stream, handler);
            while wait(&watched, stopped) {
                // syscalls(vhost-user): recvmsg sendmsg
                match requests.handle_request() {
                    Ok(()) => {}
                    Err(Error::Disconnected) => {
                        tracing::info!("the front end disconnected");
                        break;
                    }
                    Err(error) => {
                        tracing::warn!("the front end is disconnected: {error}");
                        break;
                    }
                }
            }
        }
        Err(error) => tracing::warn!("cannot serve the front end: {error}"),
    }
    device.stop();
}

/// Waits until `fd` can be read from; no if that is not wanted any more.
fn wait(fd: &impl AsFd, stopped: &OwnedFd) -> bool {
    loop {
        let mut fds = [PollFd::new(fd, PollFlags::IN), PollFd::new(stopped, PollFlags::IN)];
        // syscalls(vhost-user): poll ppoll
        match poll(&mut fds, None) {
            Ok(_) if !fds[1].revents().is_empty() => return false,
            Ok(_) => return true,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                tracing::warn!("cannot wait for the front end: {error}");
                return false;
            }
        }
    }
}

//! Root's hand for one deed: opening the tap device's file, where only root may.
//!
//! On systems without udev /dev/net/tun is root's. Whoever is in a user namespace cannot open it then, not even as
//! root there; and it has to be opened in the network namespace, which is made in the user namespace. So
//! before root becomes an ordinary user, a process is started that stays root, waits for a network namespace, enters it,
//! opens the file, hands it over and ends.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use nix::sched::{CloneFlags, clone};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use rustix::process::{Pid, WaitOptions, waitpid};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use taps::tun;

use super::namespace::NetNamespace;
use crate::net::{Because, NetError};

/// The process that is still root.
#[derive(Debug)]
pub(super) struct Opener {
    pid: Pid,
    socket: OwnedFd,
}

impl Opener {
    /// Starts it.
    pub(super) fn start() -> Result<Self, NetError> {
        const STACK: usize = 256 << 10;
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .because(|| "cannot make a pair of sockets".into())?;
        let (mut ours, theirs) = (Some(ours), theirs);
        let mut stack = vec![0; STACK];
        let body = || {
            // Otherwise it would not notice that nobody is left who asks.
            ours.take();
            serve(&theirs).map_or(1, |()| 0)
        };
        let pid = clone(Box::new(body), &mut stack, CloneFlags::empty(), Some(libc::SIGCHLD))
            .map_err(io::Error::from)
            .and_then(|pid| Pid::from_raw(pid.as_raw()).ok_or_else(|| io::ErrorKind::NotFound.into()))
            .because(|| "cannot start a process".into())?;
        let socket = ours.take().ok_or(io::ErrorKind::NotFound).map_err(io::Error::from);
        Ok(Self { pid, socket: socket.because(|| "cannot start a process".into())? })
    }

    /// Has it open the tap device's file in `namespace`.
    pub(super) fn open(self, namespace: &NetNamespace) -> io::Result<OwnedFd> {
        send(&self.socket, &[0], Some(namespace.as_fd()))?;
        let answer = receive(&self.socket);
        drop(self.socket);
        let _ = waitpid(Some(self.pid), WaitOptions::empty());
        let (error, file) = answer?;
        file.ok_or_else(|| io::Error::from_raw_os_error(error.into()))
    }
}

/// What the process does.
fn serve(socket: &OwnedFd) -> io::Result<()> {
    let (_, namespace) = receive(socket)?;
    let Some(namespace) = namespace else { return Ok(()) };
    let opened = move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
        .map_err(io::Error::from)
        .and_then(|()| tun::open());
    match opened {
        Ok(file) => send(socket, &[0], Some(file.as_fd())),
        // Numbers of errors are small.
        Err(error) => send(socket, &[error.raw_os_error().unwrap_or(libc::EIO) as u8], None),
    }
}

fn send(socket: &OwnedFd, bytes: &[u8], fd: Option<std::os::fd::BorrowedFd<'_>>) -> io::Result<()> {
    let fds: Vec<_> = fd.into_iter().collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&fds));
    }
    sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::empty())?;
    Ok(())
}

/// A byte, and a descriptor if one came with it.
fn receive(socket: &OwnedFd) -> io::Result<(u8, Option<OwnedFd>)> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut control, flags)?;
    let fd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    if received.bytes == 0 { Ok((libc::EPIPE as u8, None)) } else { Ok((byte[0], fd)) }
}

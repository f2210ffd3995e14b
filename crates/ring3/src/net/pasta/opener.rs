//! Root's hand for one deed: opening the tap device's file, once for each queue, where only root may.
//!
//! On systems without udev /dev/net/tun is root's. Whoever is in a user namespace cannot open it then, not even as
//! root there; and it has to be opened in the network namespace, which is made in the user namespace. So
//! before root becomes an ordinary user, a process is started that stays root, waits for a network namespace and a number,
//! enters the namespace, opens the file that many times, hands over what it gets and ends.

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

    /// Has it open the tap device's file `count` times in `namespace`.
    pub(super) fn open(self, namespace: &NetNamespace, count: u16) -> io::Result<Vec<OwnedFd>> {
        let files = self.ask(namespace, count);
        drop(self.socket);
        let _ = waitpid(Some(self.pid), WaitOptions::empty());
        files
    }

    fn ask(&self, namespace: &NetNamespace, count: u16) -> io::Result<Vec<OwnedFd>> {
        send(&self.socket, count, Some(namespace.as_fd()))?;
        let answer = || {
            let (error, file) = receive(&self.socket)?;
            file.ok_or_else(|| io::Error::from_raw_os_error(error.into()))
        };
        (0..count).map(|_| answer()).collect()
    }
}

/// What the process does.
fn serve(socket: &OwnedFd) -> io::Result<()> {
    let (count, namespace) = receive(socket)?;
    let Some(namespace) = namespace else { return Ok(()) };
    let entered = move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network));
    for _ in 0..count {
        match entered.map_err(io::Error::from).and_then(|()| tun::open()) {
            Ok(file) => send(socket, 0, Some(file.as_fd()))?,
            Err(error) => {
                // They are small positive numbers.
                let number = error.raw_os_error().and_then(|number| number.try_into().ok());
                return send(socket, number.unwrap_or(IO), None);
            }
        }
    }
    Ok(())
}

/// An error that is nobody's in particular, and that of a process that has ended.
const IO: u16 = libc::EIO as u16;
const ENDED: u16 = libc::EPIPE as u16;

fn send(socket: &OwnedFd, number: u16, fd: Option<std::os::fd::BorrowedFd<'_>>) -> io::Result<()> {
    let fds: Vec<_> = fd.into_iter().collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&fds));
    }
    sendmsg(socket, &[IoSlice::new(&number.to_ne_bytes())], &mut control, SendFlags::empty())?;
    Ok(())
}

/// A number, and a descriptor if one came with it.
fn receive(socket: &OwnedFd) -> io::Result<(u16, Option<OwnedFd>)> {
    let mut number = [0; 2];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(socket, &mut [IoSliceMut::new(&mut number)], &mut control, flags)?;
    let fd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    if received.bytes == 0 { Ok((ENDED, None)) } else { Ok((u16::from_ne_bytes(number), fd)) }
}

//! Single messages over a UNIX stream socket.
//!
//! Descriptors come with the first byte of what was sent with them. A message is read in two pieces, its header and the
//! rest, so that no read goes past its end and descriptors can only be those of the message that is being read.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, recvmsg, sendmsg, shutdown,
};
use zerocopy::{FromBytes, IntoBytes};

use super::Errno;
use super::version::{MAX_FDS, MAX_MESSAGE};
use super::wire::Header;

/// One message as it came.
#[derive(Debug)]
pub struct Message {
    /// Its header. The size in it is that of the message.
    pub header: Header,
    /// What follows the header.
    pub payload: Vec<u8>,
    /// Descriptors that came with it. They close themselves.
    pub fds: Vec<OwnedFd>,
}

/// Why a connection is at its end.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Broken {
    /// The peer has gone.
    #[error("the peer has closed the connection")]
    Closed,
    /// The peer did not send the rest of a message, take one, or answer one.
    #[error("the peer did not go on within its time")]
    TimedOut,
    /// The peer does not keep to the protocol.
    #[error("the peer breaks the protocol: {0}")]
    Protocol(&'static str),
    /// The socket failed.
    #[error("the socket failed: {0}")]
    Socket(Errno),
}

impl Broken {
    /// What a call fails with that needs the connection: ENODEV after it was closed, ETIMEDOUT, EPROTO, or the socket's.
    pub fn errno(self) -> Errno {
        match self {
            Self::Closed => Errno::NODEV,
            Self::TimedOut => Errno::TIMEDOUT,
            Self::Protocol(_) => Errno::PROTO,
            Self::Socket(errno) => errno,
        }
    }
}

impl From<Errno> for Broken {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::PIPE | Errno::CONNRESET => Self::Closed,
            errno => Self::Socket(errno),
        }
    }
}

/// What to wait for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Ready {
    pub(crate) readable: bool,
    pub(crate) writable: bool,
}

/// One end of a UNIX stream socket.
#[derive(Debug)]
pub(crate) struct Socket(OwnedFd);

impl Socket {
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// Ends the connection in both directions; whoever waits for the socket wakes up.
    pub(crate) fn shut_down(&self) {
        // It fails when it is not connected any more, which is as good.
        let _ = shutdown(&self.0, Shutdown::Both);
    }

    /// Waits until one of `what` is so, or the time is over. What is so then; an end of the connection counts as all.
    pub(crate) fn wait(&self, what: Ready, until: Option<Instant>) -> Result<Ready, Broken> {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, what.readable);
        flags.set(PollFlags::OUT, what.writable);
        loop {
            let mut fds = [PollFd::new(&self.0, flags)];
            let timeout = until.map(|until| timespec(until.saturating_duration_since(Instant::now())));
            match poll(&mut fds, timeout.as_ref()) {
                Ok(0) => return Ok(Ready { readable: false, writable: false }),
                Ok(_) => {
                    let came = fds[0].revents();
                    let ended = came.intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL);
                    return Ok(Ready {
                        readable: ended || came.contains(PollFlags::IN),
                        writable: ended || came.contains(PollFlags::OUT),
                    });
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Reads one message, which has begun to come. The rest must come until `until`.
    pub(crate) fn receive(&self, until: Instant) -> Result<Message, Broken> {
        let mut bytes = [0; Header::SIZE];
        let mut fds = Vec::new();
        self.receive_all(&mut bytes, &mut fds, until)?;
        let header = Header::read_from_bytes(&bytes).map_err(|_| Broken::Protocol("no header"))?;
        let size = usize::try_from(header.size).unwrap_or(usize::MAX);
        let rest =
            size.checked_sub(Header::SIZE).ok_or(Broken::Protocol("a message is shorter than its header"))?;
        if size > MAX_MESSAGE {
            return Err(Broken::Protocol("a message is too long"));
        }
        let mut payload = vec![0; rest];
        self.receive_all(&mut payload, &mut fds, until)?;
        Ok(Message { header, payload, fds })
    }

    /// Fills `to`, and adds descriptors to `fds`.
    fn receive_all(&self, to: &mut [u8], fds: &mut Vec<OwnedFd>, until: Instant) -> Result<(), Broken> {
        let mut done = 0;
        while done < to.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let part = to.get_mut(done..).unwrap_or_default();
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            let received = recvmsg(&self.0, &mut [IoSliceMut::new(part)], &mut control, flags);
            // Taken out of the buffer whatever else is wrong, so that they are closed.
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(came) = message {
                    fds.extend(came);
                }
            }
            match received {
                Ok(received) => {
                    if received.flags.contains(ReturnFlags::CTRUNC) || fds.len() > MAX_FDS {
                        return Err(Broken::Protocol("too many descriptors"));
                    }
                    if received.bytes == 0 {
                        return Err(Broken::Closed);
                    }
                    done += received.bytes;
                }
                Err(Errno::AGAIN) => {
                    let ready = self.wait(Ready { readable: true, writable: false }, Some(until))?;
                    if !ready.readable {
                        return Err(Broken::TimedOut);
                    }
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// Sends as much as the socket takes: how many bytes. EAGAIN when it takes none. Descriptors go with the first byte.
    pub(crate) fn send(&self, parts: &[IoSlice<'_>], fds: &[BorrowedFd<'_>]) -> Result<usize, Errno> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(Errno::INVAL);
        }
        loop {
            match sendmsg(&self.0, parts, &mut control, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Err(Errno::INTR) => {}
                other => return other,
            }
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: duration.subsec_nanos().into(),
    }
}

/// The bytes of a message in pieces, and how far it has been sent.
pub(crate) struct Outgoing<'a> {
    header: Header,
    parts: &'a [&'a [u8]],
    sent: usize,
}

impl<'a> Outgoing<'a> {
    /// `parts` are the payload, as long as the header says.
    pub(crate) fn new(header: Header, parts: &'a [&'a [u8]]) -> Self {
        Self { header, parts, sent: 0 }
    }

    pub(crate) fn begun(&self) -> bool {
        self.sent > 0
    }

    /// `count` bytes more have been sent: whether that was all.
    pub(crate) fn advance(&mut self, count: usize) -> bool {
        self.sent += count;
        self.sent >= Header::SIZE + self.parts.iter().map(|part| part.len()).sum::<usize>()
    }

    /// Calls `send` with what is left.
    pub(crate) fn rest<T>(&self, send: impl FnOnce(&[IoSlice<'_>]) -> T) -> T {
        let mut skip = self.sent;
        let mut slices = Vec::with_capacity(1 + self.parts.len());
        let all = std::iter::once(self.header.as_bytes()).chain(self.parts.iter().copied());
        for part in all {
            let skipped = skip.min(part.len());
            skip -= skipped;
            match part.get(skipped..) {
                Some([]) | None => {}
                Some(rest) => slices.push(IoSlice::new(rest)),
            }
        }
        send(&slices)
    }
}

//! Single messages over a UNIX stream socket.
//!
//! # Theory of operation
//!
//! A small message costs one system call on each side. To send it is one sendmsg(2). To receive it is one recvmsg(2), which
//! waits for itself: the socket has a time for that (SO_RCVTIMEO), so that poll(2) is only needed for what is left of a
//! deadline that is nearer. Each read takes what has come, up to `READ_AHEAD` bytes, so header and payload come together,
//! and posted writes many at a time. What is behind a message is kept for who reads next. The rest of a message that is
//! longer than what has come is read to where it belongs, and not beyond.
//!
//! **Descriptors** come with the first byte of what was sent with them, and a read ends with the bytes that they were sent
//! with (unix(7), SCM_RIGHTS). Who sends a message sends its descriptors with it. So they are those of the last message that
//! begins in the read they came by.

use std::collections::VecDeque;
use std::fmt;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, recvmsg, sendmsg, shutdown, sockopt,
};
use zerocopy::{FromBytes, IntoBytes};

use super::Errno;
use super::version::{MAX_FDS, MAX_MESSAGE};
use super::wire::Header;

/// Bytes that one read takes, with those of later messages: 128 posted writes of a register.
const READ_AHEAD: usize = 4096;

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

/// What has come and was not taken yet.
struct Incoming {
    bytes: [u8; READ_AHEAD],
    /// Where what is left of `bytes` begins and ends.
    start: usize,
    end: usize,
    /// Bytes that were taken since the beginning of the connection.
    taken: u64,
    /// Descriptors, and how many bytes had come since the beginning with the read that they came by.
    fds: VecDeque<(u64, OwnedFd)>,
}

impl fmt::Debug for Incoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Incoming").field("left", &self.left()).field("fds", &self.fds).finish_non_exhaustive()
    }
}

impl Incoming {
    fn new() -> Self {
        Self { bytes: [0; READ_AHEAD], start: 0, end: 0, taken: 0, fds: VecDeque::new() }
    }

    /// Bytes that can be taken.
    fn left(&self) -> usize {
        self.end - self.start
    }

    /// Where a read may put more, behind what is left, which is less than a header.
    fn space(&mut self) -> &mut [u8] {
        self.bytes.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.left());
        self.bytes.get_mut(self.end..).unwrap_or_default()
    }

    /// A read has put bytes into [`Self::space`].
    fn add(&mut self, read: Read) -> Result<(), Broken> {
        self.end += read.bytes;
        self.note(read.fds)
    }

    /// A read has put bytes where they belong, while nothing was left here.
    fn pass(&mut self, read: Read) -> Result<usize, Broken> {
        self.taken += read.bytes as u64;
        self.note(read.fds).map(|()| read.bytes)
    }

    fn note(&mut self, fds: Vec<OwnedFd>) -> Result<(), Broken> {
        let came = self.taken + self.left() as u64;
        self.fds.extend(fds.into_iter().map(|fd| (came, fd)));
        // Those of a message that has begun to come, and those of the one behind it.
        if self.fds.len() > 2 * MAX_FDS { Err(TOO_MANY_FDS) } else { Ok(()) }
    }

    /// Moves the next bytes into `to`: how many.
    fn take(&mut self, to: &mut [u8]) -> usize {
        let count = to.len().min(self.left());
        let from = self.bytes.get(self.start..self.start + count).unwrap_or_default();
        to.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
        self.start += count;
        self.taken += count as u64;
        count
    }

    /// The descriptors of the message whose last byte was taken last.
    fn take_fds(&mut self) -> Result<Vec<OwnedFd>, Broken> {
        // Of what came by a read that ended behind it, a later message is the last to begin.
        let theirs = self.fds.iter().take_while(|(came, _)| *came <= self.taken).count();
        if theirs > MAX_FDS {
            return Err(TOO_MANY_FDS);
        }
        Ok(self.fds.drain(..theirs).map(|(_, fd)| fd).collect())
    }
}

const TOO_MANY_FDS: Broken = Broken::Protocol("too many descriptors");

/// What came by one read: at least a byte.
struct Read {
    bytes: usize,
    fds: Vec<OwnedFd>,
}

/// One end of a UNIX stream socket.
#[derive(Debug)]
pub(crate) struct Socket {
    socket: OwnedFd,
    /// How long a read of the socket waits for itself. None if the kernel did not let it be set.
    pace: Option<Duration>,
    /// Held by who reads, all the time: only one does.
    incoming: Mutex<Incoming>,
}

impl Socket {
    /// Who waits for a message mostly waits for `pace` and more.
    pub(crate) fn new(socket: OwnedFd, pace: Duration) -> Self {
        let set = sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(pace));
        Self { socket, pace: set.ok().map(|()| pace), incoming: Mutex::new(Incoming::new()) }
    }

    /// Ends the connection in both directions; whoever waits for the socket wakes up.
    pub(crate) fn shut_down(&self) {
        // It fails when it is not connected any more, which is as good.
        let _ = shutdown(&self.socket, Shutdown::Both);
    }

    /// Waits until one of `what` is so, or the time is over. What is so then; an end of the connection counts as all.
    pub(crate) fn wait(&self, what: Ready, until: Option<Instant>) -> Result<Ready, Broken> {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, what.readable);
        flags.set(PollFlags::OUT, what.writable);
        loop {
            let mut fds = [PollFd::new(&self.socket, flags)];
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

    /// The next message, if one begins to come until then. The rest of it must come within `patience`.
    pub(crate) fn receive(
        &self,
        until: Option<Instant>,
        patience: Duration,
    ) -> Result<Option<Message>, Broken> {
        let mut incoming = self.incoming.lock().unwrap_or_else(PoisonError::into_inner);
        let incoming = &mut *incoming;
        if incoming.left() == 0 {
            match self.first(incoming.space(), until)? {
                Some(read) => incoming.add(read)?,
                None => return Ok(None),
            }
        }
        let until = Instant::now() + patience;
        while incoming.left() < Header::SIZE {
            let read = self.more(incoming.space(), until)?;
            incoming.add(read)?;
        }
        let mut bytes = [0; Header::SIZE];
        incoming.take(&mut bytes);
        let header = Header::read_from_bytes(&bytes).map_err(|_| Broken::Protocol("no header"))?;
        let size = usize::try_from(header.size).unwrap_or(usize::MAX);
        let rest =
            size.checked_sub(Header::SIZE).ok_or(Broken::Protocol("a message is shorter than its header"))?;
        if size > MAX_MESSAGE {
            return Err(Broken::Protocol("a message is too long"));
        }
        let mut payload = vec![0; rest];
        let mut done = incoming.take(&mut payload);
        while done < rest {
            let read = self.more(payload.get_mut(done..).unwrap_or_default(), until)?;
            done += incoming.pass(read)?;
        }
        Ok(Some(Message { header, payload, fds: incoming.take_fds()? }))
    }

    /// What comes next; none when nothing does until then.
    fn first(&self, to: &mut [u8], until: Option<Instant>) -> Result<Option<Read>, Broken> {
        loop {
            // Without an end it may wait as long as it likes.
            let waits = until.is_none_or(|until| {
                let pace = self.pace.and_then(|pace| Instant::now().checked_add(pace));
                pace.is_some_and(|pace| pace <= until)
            });
            let flags = if waits { RecvFlags::empty() } else { RecvFlags::DONTWAIT };
            match self.read(to, flags) {
                Ok(read) => return read.map(Some),
                // The socket's time is over, or it is one that does not wait.
                Err(Errno::AGAIN) => {
                    let ready = self.wait(Ready { readable: true, writable: false }, until)?;
                    if !ready.readable {
                        return Ok(None);
                    }
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// More of a message, which must come until then.
    fn more(&self, to: &mut [u8], until: Instant) -> Result<Read, Broken> {
        loop {
            match self.read(to, RecvFlags::DONTWAIT) {
                Ok(read) => return read,
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
    }

    /// Reads what has come, at most as much as `to` has room for. The outer error is of a read that has taken nothing.
    fn read(&self, to: &mut [u8], flags: RecvFlags) -> Result<Result<Read, Broken>, Errno> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = flags | RecvFlags::CMSG_CLOEXEC;
        let received = recvmsg(&self.socket, &mut [IoSliceMut::new(to)], &mut control, flags)?;
        let mut fds = Vec::new();
        // Taken out of the buffer whatever else is wrong, so that they are closed.
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(came) = message {
                fds.extend(came);
            }
        }
        Ok(if received.flags.contains(ReturnFlags::CTRUNC) {
            Err(TOO_MANY_FDS)
        } else if received.bytes == 0 {
            Err(Broken::Closed)
        } else {
            Ok(Read { bytes: received.bytes, fds })
        })
    }

    /// Sends as much as the socket takes: how many bytes. EAGAIN when it takes none. Descriptors go with the first byte.
    pub(crate) fn send(&self, parts: &[IoSlice<'_>], fds: &[BorrowedFd<'_>]) -> Result<usize, Errno> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(Errno::INVAL);
        }
        loop {
            match sendmsg(&self.socket, parts, &mut control, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Err(Errno::INTR) => {}
                other => return other,
            }
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
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

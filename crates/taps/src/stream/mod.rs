//! A UNIX stream socket, as QEMU's `-netdev stream` speaks it.
//!
//! # Theory of operation
//!
//! Frames go both ways one after the other, each preceded by its length (`framing`). Nothing is negotiated, so there
//! are no offloads: every frame is complete, and as long as the guest's MTU allows.
//!
//! Frames are received and sent many at a time. One `recv` takes what there is, up to several of the longest frames;
//! [`Tap::receive`] hands them out one by one. Short frames to the guest are gathered until [`Tap::flush`], or until there
//! are `BATCH` bytes of them; a long one goes out at once together with those, without being copied.
//!
//! When the socket is full, what it did not take of a frame is kept, at most `BATCH` bytes and a frame, and everything
//! else is refused ([`Sent::Full`]) until it has room again.
//!
//! The engine watches one descriptor, an epoll of the sockets here. All of it is level-triggered: a byte that was left
//! in a socket is reported again, so `receive` need not drain it to the last.
//!
//! A link is made for a socket that is connected, and ends with it ([`Stream::connected`]); or for one that listens, and
//! then can outlive its clients ([`Clients::OneAfterTheOther`]): flows and forwarded ports stay, and a guest that reconnects
//! goes on with them, while one that was started anew answers what it does not know with resets. Between clients it is
//! a cable that is not plugged in, whose frames are lost. There is one client at a time; another is turned away.
//! A client whose frames have impossible lengths is disconnected, for nothing after such a length makes sense.
//!
//! A host that is out of descriptors can be connected to all the same: one is kept for the next client while there is none.

#![forbid(unsafe_code)]

mod framing;

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvFlags, SendAncillaryBuffer, SendFlags, SocketFlags, accept_with, recv, sendmsg, sockopt,
};
use usernet::tap::{Abilities, Offload, Sent, Tap};

pub use framing::BadLength;
use framing::{Inbox, Outbox, prefix};

/// Bytes of short frames that are gathered before they are sent.
const BATCH: usize = 64 << 10;

/// A payload of this many bytes is sent from where it is; a shorter one costs less to copy than to point to.
const LONG: usize = 8 << 10;

/// Who is ready, in the epoll of a [`Stream`].
const LISTENER: u64 = 0;
const CLIENT: u64 = 1;

/// How many clients a socket serves that listens.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Clients {
    /// One, and the link ends with it.
    One,
    /// One at a time, without end.
    OneAfterTheOther,
}

/// The socket of one client.
struct Client {
    socket: OwnedFd,
    inbox: Inbox,
    outbox: Outbox,
    /// Whether the socket was full.
    blocked: bool,
    /// Whether the last `recv` took all that there was.
    drained: bool,
}

/// A link by a stream socket: see the module.
pub struct Stream {
    epoll: OwnedFd,
    listener: Option<OwnedFd>,
    clients: Clients,
    client: Option<Client>,
    /// Keeps a descriptor for the next client.
    spare: Option<OwnedFd>,
    mtu: u16,
}

impl Stream {
    /// A link to the peer of `socket`, which ends with it. Frames to the guest are up to `mtu` bytes long, without the
    /// Ethernet header.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn connected(socket: OwnedFd, mtu: u16) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        let mut stream = Self::new(None, mtu)?;
        stream.begin(socket)?;
        Ok(stream)
    }

    /// A link to those who connect to `listener`.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn listening(listener: OwnedFd, clients: Clients, mtu: u16) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&listener, true)?;
        let mut stream = Self { clients, ..Self::new(Some(listener), mtu)? };
        if let Some(listener) = &stream.listener {
            epoll::add(&stream.epoll, listener, EventData::new_u64(LISTENER), EventFlags::IN)?;
            stream.spare = Some(rustix::io::fcntl_dupfd_cloexec(&stream.epoll, 0)?);
        }
        Ok(stream)
    }

    fn new(listener: Option<OwnedFd>, mtu: u16) -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        Ok(Self { epoll, listener, clients: Clients::One, client: None, spare: None, mtu })
    }

    fn begin(&mut self, socket: OwnedFd) -> io::Result<()> {
        epoll::add(&self.epoll, &socket, EventData::new_u64(CLIENT), EventFlags::IN)?;
        let (inbox, outbox) = (Inbox::new(), Outbox::default());
        self.client = Some(Client { socket, inbox, outbox, blocked: false, drained: false });
        Ok(())
    }

    /// Takes those who want to connect.
    fn accept(&mut self) {
        while let Some(listener) = &self.listener {
            // syscalls(passt): accept4 getsockopt
            let socket = match accept_with(listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
                Ok(socket) => socket,
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR | Errno::CONNABORTED) => continue,
                Err(_) if self.spare.take().is_some() => continue,
                Err(error) => {
                    tracing::warn!("cannot accept a client: {error}");
                    // The listener would be ready again at once, and for nothing.
                    if self.client.is_some() {
                        self.watch_listener(EventFlags::empty());
                    }
                    return;
                }
            };
            let peer = sockopt::socket_peercred(&socket).map_or(0, |peer| peer.pid.as_raw_nonzero().get());
            if self.client.as_ref().is_some_and(|client| !client.has_gone()) {
                tracing::warn!("turned process {peer} away: there is a client already");
                continue;
            }
            match self.begin(socket) {
                Ok(()) => tracing::info!("process {peer} connected"),
                Err(error) => tracing::warn!("cannot serve process {peer}: {error}"),
            }
        }
    }

    /// The client is gone, or has to go. An error if nobody can come after it.
    fn end(&mut self, why: io::Error) -> io::Result<()> {
        // Its socket leaves the epoll when it is closed.
        self.client = None;
        if self.clients == Clients::One {
            return Err(why);
        }
        tracing::info!("waiting for another client: {why}");
        // syscalls(passt): fcntl
        self.spare = rustix::io::fcntl_dupfd_cloexec(&self.epoll, 0).ok();
        self.watch_listener(EventFlags::IN);
        Ok(())
    }

    fn watch_listener(&self, flags: EventFlags) {
        if let Some(listener) = &self.listener
            && let Err(error) = epoll::modify(&self.epoll, listener, EventData::new_u64(LISTENER), flags)
        {
            tracing::warn!("cannot watch for clients: {error}");
        }
    }
}

impl Client {
    /// Whether the other end is closed. What it sent before that is of no use any more.
    fn has_gone(&self) -> bool {
        let mut fds = [PollFd::new(&self.socket, PollFlags::RDHUP)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        // syscalls(passt): poll ppoll
        poll(&mut fds, Some(&now)).is_ok_and(|count| count > 0)
    }

    /// Takes the next frame into `buffer`; its length, if there is one.
    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match self.inbox.take() {
                Ok(Some(frame)) => {
                    // What does not fit is cut off, as a network card would.
                    let length = frame.len().min(buffer.len());
                    if let (Some(to), Some(from)) = (buffer.get_mut(..length), frame.get(..length)) {
                        to.copy_from_slice(from);
                    }
                    return Ok(Some(length));
                }
                Ok(None) => {}
                Err(bad) => return Err(io::Error::new(io::ErrorKind::InvalidData, bad)),
            }
            if std::mem::take(&mut self.drained) {
                return Ok(None);
            }
            let room = self.inbox.room();
            let asked = room.len();
            // syscalls(passt): recvfrom
            match recv(&self.socket, room, RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Err(gone(io::ErrorKind::UnexpectedEof)),
                Ok((count, _)) => {
                    self.inbox.received(count);
                    self.drained = count < asked;
                }
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Sends a frame or gathers it.
    fn send(&mut self, epoll: &OwnedFd, header: &[u8], payload: &[u8]) -> io::Result<Sent> {
        if self.blocked {
            return Ok(Sent::Full);
        }
        let prefix = prefix(header.len() + payload.len());
        if payload.len() < LONG {
            [&prefix, header, payload].into_iter().for_each(|part| self.outbox.push(part));
            if self.outbox.left().len() >= BATCH {
                self.flush(epoll)?;
            }
            return Ok(Sent::Yes);
        }
        let parts = [self.outbox.left(), &prefix, header, payload];
        let mut taken = write(&self.socket, &parts.map(IoSlice::new))?;
        let whole: usize = parts.iter().map(|part| part.len()).sum();
        let gathered = self.outbox.left().len();
        let blocked = taken < whole;
        self.outbox.sent(taken.min(gathered));
        taken = taken.saturating_sub(gathered);
        for part in [prefix.as_slice(), header, payload] {
            self.outbox.push(part.get(taken..).unwrap_or_default());
            taken = taken.saturating_sub(part.len());
        }
        if blocked {
            self.block(epoll)?;
        }
        Ok(Sent::Yes)
    }

    /// Sends what was gathered, as much as the socket takes.
    fn flush(&mut self, epoll: &OwnedFd) -> io::Result<()> {
        if self.blocked || self.outbox.left().is_empty() {
            return Ok(());
        }
        let taken = write(&self.socket, &[IoSlice::new(self.outbox.left())])?;
        self.outbox.sent(taken);
        if self.outbox.left().is_empty() { Ok(()) } else { self.block(epoll) }
    }

    /// The socket is full: wait until it is not.
    fn block(&mut self, epoll: &OwnedFd) -> io::Result<()> {
        self.blocked = true;
        let flags = EventFlags::IN | EventFlags::OUT;
        Ok(epoll::modify(epoll, &self.socket, EventData::new_u64(CLIENT), flags)?)
    }

    /// The socket has room again.
    fn unblock(&mut self, epoll: &OwnedFd) -> io::Result<()> {
        self.blocked = false;
        Ok(epoll::modify(epoll, &self.socket, EventData::new_u64(CLIENT), EventFlags::IN)?)
    }
}

/// Writes as much as the socket takes, perhaps nothing.
fn write(socket: &OwnedFd, parts: &[IoSlice<'_>]) -> io::Result<usize> {
    loop {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        // syscalls(passt): sendmsg
        match sendmsg(socket, parts, &mut SendAncillaryBuffer::default(), flags) {
            Ok(count) => return Ok(count),
            Err(Errno::AGAIN) => return Ok(0),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn gone(kind: io::ErrorKind) -> io::Error {
    io::Error::new(kind, "the client disconnected")
}

impl Tap for Stream {
    fn readiness(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    fn acknowledge(&mut self) {
        let mut events = Vec::<Event>::with_capacity(2);
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        // If a signal comes in between, they are reported again.
        let _ = epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&zero));
        for event in events {
            let Event { flags, data } = event;
            match data.u64() {
                LISTENER => self.accept(),
                _ if !flags.intersects(EventFlags::OUT | EventFlags::HUP | EventFlags::ERR) => {}
                _ => {
                    if let Some(client) = self.client.as_mut().filter(|client| client.blocked)
                        && let Err(error) = client.unblock(&self.epoll)
                    {
                        tracing::warn!("cannot watch the client's socket: {error}");
                    }
                }
            }
        }
    }

    fn abilities(&self) -> Abilities {
        Abilities { checksum: false, segmentation: [false; 2], datagrams: false, mtu: self.mtu }
    }

    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<Option<(usize, Offload)>> {
        let Some(client) = &mut self.client else { return Ok(None) };
        match client.receive(buffer) {
            Ok(length) => Ok(length.map(|length| (length, Offload::default()))),
            Err(why) => self.end(why).map(|()| None),
        }
    }

    fn send(&mut self, header: &[u8], payload: &[u8], _: Offload) -> io::Result<Sent> {
        let Some(client) = &mut self.client else { return Ok(Sent::Yes) };
        match client.send(&self.epoll, header, payload) {
            Ok(sent) => Ok(sent),
            Err(why) => self.end(why).map(|()| Sent::Yes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        let Some(client) = &mut self.client else { return Ok(()) };
        match client.flush(&self.epoll) {
            Ok(()) => Ok(()),
            Err(why) => self.end(why),
        }
    }
}

#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;

//! Which descriptor is ready: epoll, with tokens instead of numbers.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::fs::Timespec;

/// Who waits for a descriptor. The number is the owner's own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Token {
    /// The link to the guest.
    Tap,
    /// The engine is to look at what it was asked.
    Wake,
    /// A TCP flow.
    Tcp(u32),
    /// A TCP socket that listens.
    TcpListener(u32),
    /// A UDP flow.
    Udp(u32),
    /// A UDP socket that is forwarded.
    UdpListener(u32),
    /// A ping flow.
    Ping(u32),
}

impl Token {
    fn data(self) -> EventData {
        let (kind, number) = match self {
            Self::Tap => (0, 0),
            Self::Wake => (1, 0),
            Self::Tcp(n) => (2, n),
            Self::TcpListener(n) => (3, n),
            Self::Udp(n) => (4, n),
            Self::UdpListener(n) => (5, n),
            Self::Ping(n) => (6, n),
        };
        EventData::new_u64(kind << 32 | u64::from(number))
    }

    fn from_data(data: EventData) -> Self {
        let (kind, number) = (data.u64() >> 32, data.u64() as u32);
        match kind {
            0 => Self::Tap,
            2 => Self::Tcp(number),
            3 => Self::TcpListener(number),
            4 => Self::Udp(number),
            5 => Self::UdpListener(number),
            6 => Self::Ping(number),
            _ => Self::Wake,
        }
    }
}

/// What a descriptor is ready for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Ready {
    pub(crate) token: Token,
    pub(crate) flags: EventFlags,
}

/// An epoll instance.
pub(crate) struct Poller {
    epoll: OwnedFd,
}

/// The events of one wait.
pub(crate) struct Events(Vec<Event>);

impl Events {
    /// How many events one wait returns.
    const BATCH: usize = 256;

    pub(crate) fn new() -> Self {
        Self(Vec::with_capacity(Self::BATCH))
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = Ready> + '_ {
        self.0.iter().map(|event| Ready { token: Token::from_data(event.data), flags: event.flags })
    }
}

impl Poller {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { epoll: epoll::create(CreateFlags::CLOEXEC)? })
    }

    // syscalls: epoll_ctl
    /// Watches `fd`.
    pub(crate) fn add(&self, fd: impl AsFd, token: Token, flags: EventFlags) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, fd, token.data(), flags)?)
    }

    /// Watches `fd` for something else.
    pub(crate) fn modify(&self, fd: impl AsFd, token: Token, flags: EventFlags) -> io::Result<()> {
        Ok(epoll::modify(&self.epoll, fd, token.data(), flags)?)
    }

    // syscalls: epoll_wait epoll_pwait epoll_pwait2
    /// Waits until something is ready or `timeout` is over. A signal ends the wait too.
    pub(crate) fn wait(&self, events: &mut Events, timeout: Option<Duration>) -> io::Result<()> {
        let timeout = timeout.map(|t| Timespec {
            tv_sec: i64::try_from(t.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: t.subsec_nanos().into(),
        });
        events.0.clear();
        match epoll::wait(&self.epoll, spare_capacity(&mut events.0), timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

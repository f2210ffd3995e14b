//! Spliced TCP connections: an accepted socket, a socket that connects on the other side, and bytes between them.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{connect, sockopt};

use crate::config::Transport;
use crate::poller::{Poller, Token};

use super::relay::{Direction, Means, State};
use super::sockets::{Kind, Sockets};

/// What a socket is watched for: changes only, so that a side that cannot go on wakes nobody.
const EVENTS: EventFlags = EventFlags::IN
    .union(EventFlags::OUT)
    .union(EventFlags::PRI)
    .union(EventFlags::RDHUP)
    .union(EventFlags::ET);
/// What it is watched for while its bytes wait for the other one: not for more of them. Urgent data is told of by the
/// same wake-up, and again when all is watched.
const WITHOUT_BYTES: EventFlags = EventFlags::OUT.union(EventFlags::RDHUP).union(EventFlags::ET);
/// Those of them after which a queue holds more than bytes.
const MARKS: EventFlags = EventFlags::PRI.union(EventFlags::RDHUP).union(FAILED);
/// An error, or both directions have ended: any call will tell.
const FAILED: EventFlags = EventFlags::ERR.union(EventFlags::HUP);

/// Whether a connection is still there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fate {
    /// It waits for events.
    Waits,
    /// It can go on at once.
    Again,
    /// Both directions have ended.
    Over,
    /// One side was reset, and the other is to be.
    Reset,
}

/// A connection. Its ends are numbered: 0 was accepted, 1 connects. Direction `n` has end `n` as its source.
#[derive(Debug)]
struct Connection {
    ends: [OwnedFd; 2],
    directions: [Direction; 2],
    /// Ends that are not watched for bytes.
    unwatched: [bool; 2],
    queued: bool,
}

/// All spliced connections.
#[derive(Debug)]
pub(super) struct Tcp {
    connections: Vec<Option<Connection>>,
    free: Vec<u32>,
    /// Connections that can go on.
    work: VecDeque<u32>,
    means: Means,
    most: usize,
}

impl Tcp {
    /// With room for so many connections.
    pub(super) fn new(most: usize) -> Self {
        Self { connections: Vec::new(), free: Vec::new(), work: VecDeque::new(), means: Means::new(), most }
    }

    /// How many connections there are.
    pub(super) fn len(&self) -> usize {
        self.connections.len() - self.free.len()
    }

    /// How many bytes were moved.
    pub(super) fn bytes(&self) -> u64 {
        self.means.moved
    }

    /// Whether a connection can go on.
    pub(super) fn has_work(&self) -> bool {
        !self.work.is_empty()
    }

    /// Connects `accepted` with `target`, by a socket of `there`. If that is not possible `accepted` is reset.
    ///
    /// # Errors
    /// Why it was not possible: there are too many connections, or no descriptors, or nobody at the target.
    pub(super) fn open(
        &mut self,
        poller: &Poller,
        there: &dyn Sockets,
        accepted: OwnedFd,
        target: SocketAddr,
    ) -> Result<(), Errno> {
        let opened = self.connect(poller, there, &accepted, target);
        match opened {
            Ok((number, socket)) => {
                let connection = Connection {
                    ends: [accepted, socket],
                    directions: [Direction::new(), Direction::new()],
                    unwatched: [false; 2],
                    queued: false,
                };
                if let Some(place) = self.connections.get_mut(number as usize) {
                    *place = Some(connection);
                }
                Ok(())
            }
            Err(error) => {
                reset(accepted);
                Err(error)
            }
        }
    }

    /// A number for a connection, and its second socket, with both sockets watched.
    fn connect(
        &mut self,
        poller: &Poller,
        there: &dyn Sockets,
        accepted: &OwnedFd,
        target: SocketAddr,
    ) -> Result<(u32, OwnedFd), Errno> {
        if self.len() >= self.most {
            return Err(Errno::NOBUFS);
        }
        let kind = Kind::of(Transport::Tcp, target);
        let socket = there
            .socket(kind)
            .or_else(|_| {
                self.means.pipes.shrink();
                there.socket(kind)
            })
            .map_err(|error| errno(&error))?;
        // syscalls(pasta): connect
        match connect(&socket, &target) {
            Ok(()) | Err(Errno::INPROGRESS) => {}
            Err(error) => return Err(error),
        }
        let number = self.free.last().copied().unwrap_or(self.connections.len() as u32);
        for (end, fd) in [(0, accepted), (1, &socket)] {
            poller.add(fd, Token::Tcp(number << 1 | end), EVENTS).map_err(|error| errno(&error))?;
        }
        if self.free.pop().is_none() {
            self.connections.push(None);
        }
        Ok((number, socket))
    }

    /// A socket is ready. For what is a hint: it may be for a connection that had the number before.
    pub(super) fn ready(&mut self, token: u32, flags: EventFlags) {
        let (number, end) = (token >> 1, (token & 1) as usize);
        let Some(Some(connection)) = self.connections.get_mut(number as usize) else { return };
        if flags.intersects(MARKS | EventFlags::IN) {
            connection.directions[end].source_ready(flags.intersects(MARKS));
        }
        if flags.intersects(FAILED | EventFlags::OUT) {
            connection.directions[1 - end].sink_ready();
        }
        if !std::mem::replace(&mut connection.queued, true) {
            self.work.push_back(number);
        }
    }

    /// Lets each connection that can go on do so for one turn.
    pub(super) fn turn(&mut self, poller: &Poller) {
        for _ in 0..self.work.len() {
            let Some(number) = self.work.pop_front() else { return };
            let Some(place) = self.connections.get_mut(number as usize) else { continue };
            let Some(connection) = place else { continue };
            connection.queued = false;
            match connection.turn(&mut self.means) {
                Fate::Waits => connection.watch(poller, number),
                Fate::Again => {
                    connection.queued = true;
                    self.work.push_back(number);
                }
                fate => {
                    let Some(mut connection) = place.take() else { continue };
                    for direction in &mut connection.directions {
                        direction.release(&mut self.means);
                    }
                    if fate == Fate::Reset {
                        connection.ends.into_iter().for_each(reset);
                    }
                    self.free.push(number);
                }
            }
        }
    }

    #[cfg(test)]
    pub(super) fn set_most_pipes(&mut self, most: usize) {
        self.means.pipes = super::pipes::Pipes::with_most(most);
    }
}

impl Connection {
    /// Has each end watched for bytes unless they are known of and wait for the other end. Otherwise every segment that
    /// arrives would wake us, for nothing, until the queue is full.
    fn watch(&mut self, poller: &Poller, number: u32) {
        for (end, direction) in self.directions.iter().enumerate() {
            let unwatched = &mut self.unwatched[end];
            let events = match *unwatched {
                false if direction.is_pestered() => WITHOUT_BYTES,
                // The poller tells of what has come meanwhile.
                true if !direction.is_stopped() => EVENTS,
                _ => continue,
            };
            // syscalls(pasta): epoll_ctl
            // Refused to no socket that is watched; it would be woken for nothing.
            if poller.modify(&self.ends[end], Token::Tcp(number << 1 | end as u32), events).is_ok() {
                *unwatched = !*unwatched;
            }
        }
    }

    fn turn(&mut self, means: &mut Means) -> Fate {
        let mut again = false;
        for number in [0, 1] {
            let other = 1 - number;
            let last = self.directions[other].state() == State::Done;
            let direction = &mut self.directions[number];
            let turn = direction.turn(&self.ends[number], &self.ends[other], means, last);
            if direction.state() == State::Reset {
                return Fate::Reset;
            }
            again |= turn.again;
            if turn.sink_is_gone {
                let back = &mut self.directions[other];
                if back.state() == State::Done {
                    return Fate::Reset;
                }
                back.source_gone();
                again = true;
            }
        }
        if self.directions.iter().all(|direction| direction.state() == State::Done) {
            Fate::Over
        } else if again {
            Fate::Again
        } else {
            Fate::Waits
        }
    }
}

/// Closes a socket so that its peer sees a reset.
pub(super) fn reset(socket: OwnedFd) {
    // syscalls(pasta): setsockopt
    // Refused by no TCP socket; without it the peer sees an orderly end.
    let _ = sockopt::set_socket_linger(&socket, Some(Duration::ZERO));
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

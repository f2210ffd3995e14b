//! What the engines of one guest share.
//!
//! A guest with several queues has an engine for each, with its own thread, sockets and flows. They share three
//! things: whose a flow is ([`Directory`]), a way to hand a frame to the engine whose it is ([`Mailbox`]), and
//! what is known of the guest ([`Guest`]).
//!
//! A frame that came by another engine's queue is handed over and not dropped: when its owner's mailbox is full, the
//! engine that took it keeps it, and takes no more from its own queue, until there is room. Each goes on reading its
//! own mailbox meanwhile, so two that wait for each other cannot be stuck.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::claims::{Claims, Directory};
use crate::config::MacAddress;
use crate::icmp;
use crate::tap::Offload;
use crate::tcp;
use crate::udp;

/// Engines of one guest at most: virtio-net's queue pairs (5.1.5.6.5) are more, threads that help are fewer.
pub(crate) const MOST: usize = 64;

/// A frame for another engine.
pub(crate) struct Letter {
    pub(crate) frame: Vec<u8>,
    pub(crate) offload: Offload,
}

/// Frames for one engine that came by the queues of others.
struct Mailbox {
    letters: Mutex<Letters>,
    /// Wakes the engine.
    wake: Arc<OwnedFd>,
}

#[derive(Default)]
struct Letters {
    queue: VecDeque<Letter>,
    bytes: usize,
    /// Engines that found it full: a bit each.
    waiting: u64,
}

/// Bytes that a mailbox holds at most: some of the longest frames.
const MAILBOX: usize = 2 << 20;

/// What the guest was last seen with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Guest {
    pub(crate) mac: MacAddress,
    pub(crate) v4: Option<Ipv4Addr>,
    pub(crate) v6: Option<Ipv6Addr>,
}

/// What the engines of one guest share: see above.
pub(crate) struct Group {
    pub(crate) tcp: Arc<Directory<tcp::Ends>>,
    pub(crate) udp: Arc<Directory<udp::Key>>,
    pub(crate) ping: Arc<Directory<icmp::Key>>,
    mailboxes: Vec<Mailbox>,
    guest: Mutex<Option<Guest>>,
    /// Counts the changes of `guest`.
    changes: AtomicU64,
}

impl Group {
    /// For as many engines as there are events to wake them.
    pub(crate) fn new(wakes: &[Arc<OwnedFd>]) -> Self {
        let mailbox = |wake: &Arc<OwnedFd>| Mailbox { letters: Mutex::default(), wake: Arc::clone(wake) };
        Self {
            tcp: Arc::new(Directory::new()),
            udp: Arc::new(Directory::new()),
            ping: Arc::new(Directory::new()),
            mailboxes: wakes.iter().map(mailbox).collect(),
            guest: Mutex::new(None),
            changes: AtomicU64::new(0),
        }
    }
}

/// One engine's place in a [`Group`].
#[derive(Clone)]
pub(crate) struct Member {
    group: Arc<Group>,
    number: u16,
    /// The changes of the guest's that it has seen.
    seen: u64,
    /// What it last knew.
    known: Option<Guest>,
}

impl Member {
    pub(crate) fn new(group: Arc<Group>, number: u16) -> Self {
        Self { group, number, seen: 0, known: None }
    }

    /// Whether it is the one that does what is to be done once.
    pub(crate) fn is_first(&self) -> bool {
        self.number == 0
    }

    pub(crate) fn tcp(&self) -> Claims<tcp::Ends> {
        Claims::shared(Arc::clone(&self.group.tcp), self.number)
    }

    pub(crate) fn udp(&self) -> Claims<udp::Key> {
        Claims::shared(Arc::clone(&self.group.udp), self.number)
    }

    pub(crate) fn ping(&self) -> Claims<icmp::Key> {
        Claims::shared(Arc::clone(&self.group.ping), self.number)
    }

    /// Hands a frame to engine `to`.
    ///
    /// # Errors
    /// Gives the frame back if there is no room; this engine is then woken when there is.
    pub(crate) fn hand_over(&self, to: u16, letter: Letter) -> Result<(), Letter> {
        // An engine that is not there takes everything.
        let Some(mailbox) = self.group.mailboxes.get(usize::from(to)) else { return Ok(()) };
        {
            let mut letters = lock(&mailbox.letters);
            if letters.bytes > 0 && letters.bytes + letter.frame.len() > MAILBOX {
                letters.waiting |= 1 << self.number;
                return Err(letter);
            }
            letters.bytes += letter.frame.len();
            letters.queue.push_back(letter);
        }
        wake(&mailbox.wake);
        Ok(())
    }

    /// Takes the frames that others have handed over.
    pub(crate) fn letters(&self) -> VecDeque<Letter> {
        let Some(mailbox) = self.group.mailboxes.get(usize::from(self.number)) else {
            return VecDeque::new();
        };
        let Letters { queue, waiting, .. } = std::mem::take(&mut *lock(&mailbox.letters));
        for (number, mailbox) in self.group.mailboxes.iter().enumerate() {
            if waiting & 1 << number != 0 {
                wake(&mailbox.wake);
            }
        }
        queue
    }

    /// Tells the others what the guest was seen with.
    pub(crate) fn tell(&mut self, guest: Guest) {
        if self.known.replace(guest) != Some(guest) {
            *lock(&self.group.guest) = Some(guest);
            self.seen = self.group.changes.fetch_add(1, Ordering::Release) + 1;
        }
    }

    /// What others have seen of the guest since it was last asked.
    pub(crate) fn news(&mut self) -> Option<Guest> {
        let changes = self.group.changes.load(Ordering::Acquire);
        if std::mem::replace(&mut self.seen, changes) == changes {
            return None;
        }
        self.known = *lock(&self.group.guest);
        self.known
    }
}

/// Whole after a panic too: each change is one step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Wakes an engine.
pub(crate) fn wake(event: &OwnedFd) {
    // It can only fail when the counter is full, and then it is readable already.
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}

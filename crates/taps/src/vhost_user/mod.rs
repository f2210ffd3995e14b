//! vhost-user: a guest's queues in shared memory, set up by messages on a socket (QEMU, `docs/interop/vhost-user.rst`).
//!
//! # Theory of operation
//!
//! There are two sides to it. A thread of its own (`control`) reads the front end's messages, which come rarely, block,
//! and change everything: memory, addresses, features (`handler`). The frames are moved on the engines' threads: each
//! pair of queues is a link of its own ([`QueuePair`]), so that each can have an engine of its own. Both meet in a
//! `Slot` per pair, under a lock which is free but for those few moments.
//!
//! The crate `vhost` reads the messages. Its companion `vhost-user-backend` is not used, for it answers kicks on threads
//! of its own, from where every frame would have to be handed on; here the engine waits for the kicks themselves, in
//! one descriptor with everything else (`Slot::epoll`). A kick is watched edge-triggered and never read.
//!
//! - *Frames from the guest*: a chain is taken, walked and checked, copied, and given back at once (`pair`, `ring`).
//! - *Frames to the guest*: chains are taken until the frame fits, several if buffers can be merged. With too few of them
//!   the link is full, keeps those it has, and asks for a kick.
//! - The driver is notified once for all frames of an engine's turn, and only if it wants to be.
//! - A pair that the guest does not use gives its frames to the first one.
//! - A driver that breaks the rules of its rings has that ring stopped until it is set up again. It never ends the
//!   process, nor other guests' turns.
//!
//! Connections come one after the other, as with the stream socket. When one ends, the queues stop and the memory is
//! unmapped; frames for nobody are lost; flows and forwarded ports stay.
//!
//! Not offered: migration (dirty log, device state), in-flight descriptors, configuration space, packed rings.

#![forbid(unsafe_code)]

mod control;
mod features;
mod handler;
mod memory;
mod pair;
mod ring;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use usernet::tap::{Abilities, Offload, Sent, Tap};

pub use control::Source;
use pair::{Pair, Which};

/// Most pairs of queues: what the protocol can name.
pub const MOST_PAIRS: usize = 64;

/// A pair of queues, and what wakes its owner.
struct Slot {
    pair: Mutex<Pair>,
    /// Readable when one of the queues was kicked, or when what was agreed on has changed.
    epoll: OwnedFd,
    /// Says the latter.
    changed: OwnedFd,
}

impl Slot {
    fn new(mtu: u16) -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let changed = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        epoll::add(&epoll, &changed, EventData::new_u64(0), EventFlags::IN | EventFlags::ET)?;
        let pair = Pair::new(mtu).map_err(io::Error::other)?;
        Ok(Self { pair: Mutex::new(pair), epoll, changed })
    }

    fn pair(&self) -> MutexGuard<'_, Pair> {
        self.pair.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // It can only fail when the counter is full, after more changes than there can be.
        let _ = rustix::io::write(&self.changed, &1u64.to_ne_bytes());
    }
}

/// What all pairs share.
struct Device {
    slots: Vec<Slot>,
    /// No front end will come any more.
    ended: AtomicBool,
}

impl Device {
    /// The front end is gone, or wants everything to stop.
    fn stop(&self) {
        for slot in &self.slots {
            let mut pair = slot.pair();
            for which in [Which::ToGuest, Which::FromGuest] {
                pair.stop(which, &slot.epoll);
                let ring = pair.ring(which);
                ring.addresses = None;
                (ring.enabled, ring.placed) = (false, false);
            }
            pair.shared = None;
            drop(pair);
            slot.wake();
        }
    }

    fn end(&self) {
        self.ended.store(true, Ordering::Release);
        self.slots.iter().for_each(Slot::wake);
    }
}

/// A link by one pair of queues.
pub struct QueuePair {
    device: Arc<Device>,
    index: usize,
    abilities: Abilities,
    /// Whoever has the last of these ends the thread.
    _stop: Arc<control::Stop>,
}

/// What listens to front ends, on a thread of its own.
pub struct Control {
    source: Source,
    device: Arc<Device>,
    stopped: OwnedFd,
}

impl Control {
    /// Serves front ends until there can be no more, or until all links are dropped.
    pub fn run(self) {
        control::serve(&self.source, &self.device, &self.stopped);
    }
}

/// Links to the guests that come from `source`, one for each of `pairs` pairs of queues (1 to [`MOST_PAIRS`]). Nothing
/// happens by them before [`Control::run`]. Frames to the guest are up to `mtu` bytes long, without the Ethernet header.
///
/// # Errors
/// The host is out of descriptors, or there are too many pairs.
pub fn links(source: Source, pairs: usize, mtu: u16) -> io::Result<(Vec<QueuePair>, Control)> {
    if pairs == 0 || pairs > MOST_PAIRS {
        let what = format!("{pairs} pairs of queues, of which there can be 1 to {MOST_PAIRS}");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    let slots = (0..pairs).map(|_| Slot::new(mtu)).collect::<io::Result<_>>()?;
    let device = Arc::new(Device { slots, ended: AtomicBool::new(false) });
    let (stop, stopped) = control::Stop::new()?;
    let link = |(index, slot): (usize, &Slot)| QueuePair {
        abilities: slot.pair().abilities(),
        device: device.clone(),
        index,
        _stop: stop.clone(),
    };
    let links = device.slots.iter().enumerate().map(link).collect();
    Ok((links, Control { source, device, stopped }))
}

impl QueuePair {
    fn slot(&self) -> &Slot {
        // As many as links were made.
        &self.device.slots[self.index]
    }
}

impl Tap for QueuePair {
    fn readiness(&self) -> BorrowedFd<'_> {
        self.slot().epoll.as_fd()
    }

    fn acknowledge(&mut self) {
        let mut events = Vec::<Event>::with_capacity(4);
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        // If a signal comes in between, they are reported again.
        let _ = epoll::wait(&self.slot().epoll, spare_capacity(&mut events), Some(&zero));
        let abilities = self.slot().pair().abilities();
        self.abilities = abilities;
    }

    fn abilities(&self) -> Abilities {
        self.abilities
    }

    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<Option<(usize, Offload)>> {
        let frame = self.slot().pair().receive(buffer);
        if frame.is_none() && self.device.ended.load(Ordering::Acquire) {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the front end disconnected"));
        }
        Ok(frame)
    }

    fn send(&mut self, header: &[u8], payload: &[u8], offload: Offload) -> io::Result<Sent> {
        let mut pair = self.slot().pair();
        if pair.to_guest.runs() || self.index == 0 {
            return Ok(pair.send(header, payload, offload));
        }
        drop(pair);
        let Some(first) = self.device.slots.first() else { return Ok(Sent::Yes) };
        let mut pair = first.pair();
        // A full one would not wake this link. It is lost.
        let _ = pair.send(header, payload, offload);
        pair.flush();
        Ok(Sent::Yes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.slot().pair().flush();
        Ok(())
    }
}

#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;

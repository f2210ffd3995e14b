//! One pair of queues as a link of the engine's.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use usernet::tap::{Abilities, Offload, Sent, Tap};

use super::header;
use crate::device::GuestMem;
use crate::event::Event;
use crate::interrupt::Interrupts;
use crate::queue::{Chain, Virtq};

/// How long the end of the machine waits for the engine to take the guest's last frames.
const LAST_FRAMES: Duration = Duration::from_secs(1);

/// What the device and the tap of a pair of queues share.
pub(super) struct Link<M: GuestMem> {
    state: Mutex<State<M>>,
    /// The tap has seen the end of the driver's frames, or is gone.
    drained: Condvar,
    /// Readable when one of the two kicks or `changed` is.
    readiness: OwnedFd,
    /// The state is not what the tap last saw.
    changed: Event,
    mtu: u16,
}

struct State<M: GuestMem> {
    rings: Option<Rings<M>>,
    abilities: Abilities,
    /// The driver uses this pair.
    used: bool,
    /// Nothing of what the driver has sent was left.
    empty: bool,
    /// There is no tap any more.
    abandoned: bool,
}

/// The queues of a running driver.
pub(super) struct Rings<M: GuestMem> {
    receive: Virtq<M>,
    transmit: Virtq<M>,
    mem: M,
    interrupts: Arc<Interrupts>,
    /// A frame may take several chains.
    mergeable: bool,
    /// Chains for the next frame to the guest.
    spare: VecDeque<Chain<M>>,
    /// The bytes that they hold.
    room: usize,
    /// What the driver says that it has for the checksum flag.
    checked: bool,
}

impl<M: GuestMem> Link<M> {
    pub(super) fn new(mtu: u16) -> io::Result<Self> {
        let readiness = epoll::create(CreateFlags::CLOEXEC)?;
        let changed = Event::new()?;
        epoll::add(&readiness, &changed, EventData::new_u64(0), EventFlags::IN)?;
        let state = State {
            rings: None,
            abilities: without_driver(mtu),
            used: false,
            empty: false,
            abandoned: false,
        };
        Ok(Link { state: Mutex::new(state), drained: Condvar::new(), readiness, changed, mtu })
    }

    fn state(&self) -> MutexGuard<'_, State<M>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The driver runs; whether it uses this pair from the start.
    pub(super) fn attach(
        &self,
        mut rings: Rings<M>,
        checksum: bool,
        segmentation: [bool; 2],
        used: bool,
    ) -> io::Result<()> {
        for kick in [rings.receive.kick(), rings.transmit.kick()] {
            epoll::add(&self.readiness, kick, EventData::new_u64(0), EventFlags::IN)?;
        }
        rings.checked = checksum;
        let mut state = self.state();
        state.abilities = Abilities { checksum, segmentation, datagrams: false, mtu: self.mtu };
        state.used = used;
        state.rings = Some(rings);
        drop(state);
        self.changed.signal();
        Ok(())
    }

    /// The driver is gone.
    pub(super) fn detach(&self) {
        let mut state = self.state();
        state.abilities = without_driver(self.mtu);
        if let Some(rings) = state.rings.take() {
            for kick in [rings.receive.kick(), rings.transmit.kick()] {
                // A pair that could be attached only in part.
                let _ = epoll::delete(&self.readiness, kick);
            }
        }
    }

    /// Whether the driver uses this pair.
    pub(super) fn set_used(&self, used: bool) {
        self.state().used = used;
        self.changed.signal();
    }

    /// Waits until the engine has taken what the driver sent.
    pub(super) fn drain(&self) {
        let mut state = self.state();
        if state.rings.is_none() {
            return;
        }
        state.empty = false;
        self.changed.signal();
        let waiting = |state: &mut State<M>| !state.empty && !state.abandoned;
        let (_state, timeout) = self
            .drained
            .wait_timeout_while(state, LAST_FRAMES, waiting)
            .unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() {
            tracing::warn!("the guest's last frames were not taken");
        }
    }
}

/// What the link can do while nobody is at its other end.
fn without_driver(mtu: u16) -> Abilities {
    Abilities { checksum: false, segmentation: [false; 2], datagrams: false, mtu }
}

impl<M: GuestMem> Rings<M> {
    pub(super) fn new(
        receive: Virtq<M>,
        transmit: Virtq<M>,
        mem: M,
        interrupts: Arc<Interrupts>,
        mergeable: bool,
    ) -> Self {
        let (spare, room) = (VecDeque::new(), 0);
        Rings { receive, transmit, mem, interrupts, mergeable, spare, room, checked: false }
    }

    /// The driver's next frame.
    fn take(&mut self, buffer: &mut [u8]) -> Option<(usize, Offload)> {
        loop {
            if let Some(chain) = self.transmit.pop() {
                let frame = self.read(&chain, buffer);
                self.transmit.push(&chain, 0);
                // A frame that is none is left to the engine, as an empty one: it counts them, and has other things
                // to do after some.
                return Some(frame.unwrap_or_default());
            }
            if self.transmit.wait_for_kick() {
                return None;
            }
        }
    }

    fn read(&self, chain: &Chain<M>, buffer: &mut [u8]) -> Option<(usize, Offload)> {
        let mem = self.mem.memory();
        let mut bytes = [0; header::SIZE];
        chain.readable.read(&*mem, 0, &mut bytes);
        let Some(offload) = header::parse(&bytes) else {
            self.interrupts.warn(&format_args!("frame with an impossible header {bytes:02x?}"));
            return None;
        };
        let length = chain.readable.len().checked_sub(header::SIZE);
        let Some(frame) = length.and_then(|length| buffer.get_mut(..length)) else {
            self.interrupts.warn(&format_args!("frame in a buffer of {} bytes", chain.readable.len()));
            return None;
        };
        Some((chain.readable.read(&*mem, header::SIZE, frame), offload))
    }

    /// Gives the driver a frame.
    fn give(&mut self, head: &[u8], payload: &[u8], offload: Offload) -> Sent {
        let total = header::SIZE + head.len() + payload.len();
        let Some(count) = self.gather(total) else { return Sent::Full };
        if count == 0 {
            return Sent::Yes;
        }
        let buffers = u16::try_from(count).unwrap_or(u16::MAX);
        let first = header::build(head, offload, self.checked, buffers);
        let parts = [&first[..], head, payload];
        let mem = self.mem.memory();
        let chains: Vec<Chain<M>> = self.spare.drain(..count).collect();
        let mut written = Vec::with_capacity(count);
        let mut position = 0;
        for chain in &chains {
            let room = chain.writable.len();
            self.room -= room;
            let length = room.min(total - position);
            let mut at = 0;
            for part in pieces(parts, position, length) {
                at += chain.writable.write(&*mem, at, part);
            }
            position += length;
            written.push((chain, length));
        }
        self.receive.push_all(&written);
        Sent::Yes
    }

    /// Takes chains until the first ones hold `total` bytes; returns how many that are. None if the driver has to
    /// make more available first; zero if it could not, for it has given all it can.
    fn gather(&mut self, total: usize) -> Option<usize> {
        loop {
            let fits = if self.mergeable { self.room >= total } else { !self.spare.is_empty() };
            if fits {
                break;
            }
            if self.spare.len() >= self.receive.size() {
                self.interrupts
                    .warn(&format_args!("no room for a frame of {total} bytes in the whole queue"));
                return Some(0);
            }
            match self.receive.pop() {
                Some(chain) => {
                    self.room += chain.writable.len();
                    self.spare.push_back(chain);
                }
                None if self.receive.wait_for_kick() => return None,
                None => {}
            }
        }
        let mut room = 0;
        for (number, chain) in self.spare.iter().enumerate() {
            room += chain.writable.len();
            if room >= total {
                return Some(number + 1);
            }
            if !self.mergeable {
                break;
            }
        }
        // Without VIRTIO_NET_F_MRG_RXBUF buffers are to be long enough for any frame (5.1.6.3.1).
        self.interrupts.warn(&format_args!("no room for a frame of {total} bytes in a buffer of {room}"));
        Some(0)
    }

    fn signal(&mut self) {
        self.receive.signal();
        self.transmit.signal();
    }
}

/// The bytes `skip..skip + length` of `parts` put together.
fn pieces(parts: [&[u8]; 3], mut skip: usize, mut length: usize) -> impl Iterator<Item = &[u8]> {
    parts.into_iter().filter_map(move |part| {
        let rest = part.get(skip..).unwrap_or_default();
        skip = skip.saturating_sub(part.len());
        let piece = rest.get(..length).unwrap_or(rest);
        length -= piece.len();
        (!piece.is_empty()).then_some(piece)
    })
}

/// A pair of queues, for an engine.
pub struct QueueTap<M: GuestMem>(Arc<Link<M>>);

impl<M: GuestMem> std::fmt::Debug for QueueTap<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("QueueTap").field("mtu", &self.0.mtu).finish_non_exhaustive()
    }
}

impl<M: GuestMem> QueueTap<M> {
    pub(super) fn new(link: Arc<Link<M>>) -> Self {
        QueueTap(link)
    }
}

impl<M: GuestMem> Drop for QueueTap<M> {
    fn drop(&mut self) {
        self.0.state().abandoned = true;
        self.0.drained.notify_all();
    }
}

impl<M: GuestMem> Tap for QueueTap<M> {
    fn readiness(&self) -> BorrowedFd<'_> {
        self.0.readiness.as_fd()
    }

    fn acknowledge(&mut self) {
        self.0.changed.clear();
        if let Some(rings) = &self.0.state().rings {
            rings.receive.clear_kick();
            rings.transmit.clear_kick();
        }
    }

    fn abilities(&self) -> Abilities {
        self.0.state().abilities
    }

    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<Option<(usize, Offload)>> {
        let mut state = self.0.state();
        let frame = state.rings.as_mut().and_then(|rings| rings.take(buffer));
        if frame.is_none() && !state.empty {
            state.empty = true;
            self.0.drained.notify_all();
        }
        Ok(frame)
    }

    fn send(&mut self, header: &[u8], payload: &[u8], offload: Offload) -> io::Result<Sent> {
        let mut state = self.0.state();
        let used = state.used;
        Ok(match &mut state.rings {
            Some(rings) if used => rings.give(header, payload, offload),
            _ => Sent::Full,
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        if let Some(rings) = &mut self.0.state().rings {
            rings.signal();
        }
        Ok(())
    }
}

//! A tap device served by the kernel's vhost-net: two rings of ours instead of a read or a write for each frame.
//!
//! vhost-net is the data path of virtio-net for virtual machines: a kernel thread that moves frames between a tap device
//! and a pair of virtqueues in a process's memory. Nothing of it needs a virtual machine. Here the memory is our own,
//! and we are the driver of the queues (`ring`):
//!
//! ```text
//!   namespace's stack ── tap ── vhost-net's thread ═╦═ receive ring ═▶ receive()
//!                                                   ╚═ send ring ◀═ send(), flush()
//! ```
//!
//! Copies between the kernel's buffers and ours, and the protocols behind the tap device, which with
//! [`tun`](crate::tun) are work of the reader and writer, are done by that thread on another processor, and there is no
//! system call for each frame.
//!
//! **Memory.** One anonymous mapping holds both rings and all buffers. The device knows it by addresses of its own that
//! begin at [`MEMORY`], in a table of one entry; its kernel thread reads and writes it through this process's page
//! tables. So the tap must be made by the process that serves it ([`Device::serve`]): after a fork(2), the device still
//! means the parent's memory.
//!
//! **Negotiated**, not assumed: `VIRTIO_F_VERSION_1` has to be there. With `VIRTIO_NET_F_MRG_RXBUF` a frame takes as many
//! receive buffers as it needs; without it, each chain has room for the longest frame. With `VIRTIO_F_EVENT_IDX` either
//! side says at which index it wants to be woken; without it, only whether. Checksums and segmentation are between us and
//! the tap device, which has its own header before each frame ([`vnet`]): vhost-net hands it through.
//!
//! **Frames from the guest.** All free buffers are offered. A frame is put together from the buffers that its header
//! counts, which the device must have used together, and they are free again at once; when a quarter of
//! the ring is, or nothing is left to take, they are offered again. A frame longer than the engine's longest is cut
//! short, as read(2) would; its own lengths then give it away.
//!
//! **Frames to the guest** are copied to a chain of the send ring, and shown to the device a batch at a time. What it has
//! used is taken back once for each turn of the engine, or when there is no room. When there is still none, the device is
//! asked to notify us at half of what it has, and the frame is [`Sent::Full`].
//!
//! **Readiness** is an epoll instance: the call eventfds of both rings and the device's error eventfd. The call eventfds
//! are watched by edge, so they are never read. The tap device is not among them: the kernel cannot be asked
//! to wake us at its end and not at each of its frames, which are the device's. So its end is noticed by looking, at most
//! once in `LOOK`, when the engine has something to do.
//!
//! **The kernel is trusted to be the kernel, and yet** everything that arrives in the rings is checked: what the guest
//! sends, the header included, comes to us by it, and a fault here would be a fault in a process with open sockets. A
//! fault, or the device's own complaint, ends the link with an error that says what happened.

mod attach;
#[cfg(any(test, feature = "testing"))]
mod hostile;
#[cfg(any(test, feature = "testing"))]
mod software;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::epoll::{EpollEvent, epoll_wait};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use thiserror::Error;
use usernet::tap::{Abilities, LONGEST_FRAME, Offload, Sent, Tap};
use vhost::net::VhostNet;
use vhost::vhost_kern::net::Net;
use vhost::vhost_kern::vhost_binding::VHOST_NET_SET_BACKEND;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use attach::{Attached, ERROR, Opened};
pub use attach::{Error, MEMORY};
#[cfg(any(test, feature = "testing"))]
pub use hostile::any_completions;

use crate::ring::{Fault, Ring, Taken};
use crate::tun::Tun;
use crate::vnet;

/// The most that a device writes for one frame.
const LONGEST: usize = vnet::HEADER + LONGEST_FRAME;
/// Frames to the guest that are shown to the device together, if the turn does not end before.
const BATCH: usize = 16;
/// How often at most the tap device is looked after.
const LOOK: Duration = Duration::from_secs(1);

/// Whether vhost-net is to be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Mode {
    /// If the kernel has it and lets us.
    #[default]
    Auto,
    /// It has to be.
    On,
    /// No.
    Off,
}

/// A vhost-net device for one queue of a tap device, or the decision to do without.
pub struct Device {
    mode: Mode,
    opened: Option<Opened<Kernel>>,
}

impl Device {
    /// Opens `/dev/vhost-net`, as far as `mode` wants it, which may take privileges that the process gives up before it
    /// serves anybody.
    ///
    /// # Errors
    /// With [`Mode::On`], why the device cannot be opened.
    pub fn open(mode: Mode) -> Result<Self, Error> {
        let opened = if mode == Mode::Off { None } else { optional(mode, attach::open(Net::new))? };
        Ok(Self { mode, opened })
    }

    /// Puts a tap device behind it, or leaves it to itself. It is to be called by the process that serves the link, after the
    /// last fork(2).
    ///
    /// # Errors
    /// With [`Mode::On`], why the device cannot be used.
    pub fn serve(self, tun: Tun) -> Result<Box<dyn Tap>, Error> {
        let tap = match self.opened {
            Some(opened) => optional(self.mode, VhostTap::new(&tun, opened))?,
            None => None,
        };
        Ok(match tap {
            Some(tap) => {
                tracing::debug!("frames go by vhost-net");
                Box::new(tap)
            }
            None => Box::new(tun),
        })
    }
}

/// What came of an attempt, if it need not succeed.
fn optional<T>(mode: Mode, result: Result<T, Error>) -> Result<Option<T>, Error> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if mode == Mode::Auto => {
            tracing::debug!("without vhost-net: {error}");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// The request by which a device is stopped at the end of its use (`VHOST_NET_SET_BACKEND`): the only ioctl(2) after the
/// start.
#[must_use]
pub fn stop_request() -> u64 {
    VHOST_NET_SET_BACKEND()
}

/// The kernel's device.
type Kernel = Net<Arc<GuestMemoryMmap>>;

/// Why a link is gone.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
enum Broken {
    #[error("vhost-net's {ring} ring is broken: {fault}")]
    Ring { ring: &'static str, fault: Fault },
    #[error("vhost-net delivered {0} bytes, which is less than a header")]
    Short(u32),
    #[error("vhost-net delivered a frame of {buffers} buffers, of which it had used {used}")]
    Buffers { buffers: u16, used: u16 },
    #[error("vhost-net gave up: it could not read the rings, or what they point to")]
    Complaint,
    #[error("the tap device is gone")]
    TapGone,
}

/// A ring and how its sides wake each other.
struct Queue {
    ring: Ring,
    /// Wakes the device.
    kick: EventFd,
    /// The device wakes us: held here as long as it is watched.
    call: EventFd,
}

impl Queue {
    /// Shows the device what is prepared.
    // syscalls(pasta): write
    fn publish(&mut self) -> Result<(), Fault> {
        if self.ring.publish()? {
            // It can only fail when the counter is full, and then the device is awake already.
            let _ = self.kick.write(1);
        }
        Ok(())
    }
}

/// A tap device behind vhost-net.
struct VhostTap<B: VhostNet> {
    /// The device. It is stopped before the memory goes, which it also holds.
    backend: B,
    receive: Queue,
    send: Queue,
    /// See [`attach::watch`].
    readiness: OwnedFd,
    _errors: EventFd,
    /// Whether a frame may be spread over several receive buffers.
    mergeable: bool,
    abilities: Abilities,
    broken: Option<Broken>,
    /// The tap device, and when it was last seen to be there.
    tap: File,
    seen: Instant,
}

impl<B: VhostNet> VhostTap<B> {
    /// The tap device `tap` behind the device.
    fn new<T: AsFd + Tap>(tap: &T, opened: Opened<B>) -> Result<Self, Error> {
        let Attached { backend, receive, send, readiness, errors, tap: file, mergeable } =
            attach::attach(opened, tap.as_fd())?;
        Ok(Self {
            backend,
            receive,
            send,
            readiness,
            _errors: errors,
            mergeable,
            abilities: tap.abilities(),
            broken: None,
            tap: file,
            seen: Instant::now(),
        })
    }

    fn alive(&self) -> io::Result<()> {
        match &self.broken {
            None => Ok(()),
            Some(broken) => Err(io::Error::other(broken.clone())),
        }
    }

    /// The result of something by which the link may have broken.
    fn settle<T>(&mut self, result: Result<T, Broken>) -> io::Result<T> {
        result.map_err(|broken| {
            self.broken = Some(broken.clone());
            io::Error::other(broken)
        })
    }

    /// The next frame from the guest.
    fn next_frame(&mut self, buffer: &mut [u8]) -> Result<Option<(usize, Offload)>, Broken> {
        let first = match self.receive.ring.take().map_err(receive)? {
            Some(first) => first,
            None => {
                self.refill().map_err(receive)?;
                if !self.receive.ring.ask(1).map_err(receive)? {
                    return Ok(None);
                }
                // One came in between.
                match self.receive.ring.take().map_err(receive)? {
                    Some(first) => first,
                    None => return Ok(None),
                }
            }
        };
        let frame = self.assemble(first, buffer)?;
        if self.receive.ring.free() >= usize::from(self.receive.ring.shape().size) / 4 {
            self.refill().map_err(receive)?;
        }
        Ok(Some(frame))
    }

    /// Puts together the frame that begins in `first`.
    fn assemble(&mut self, first: Taken, buffer: &mut [u8]) -> Result<(usize, Offload), Broken> {
        let ring = &mut self.receive.ring;
        let mut header = [0; vnet::HEADER];
        if ring.read(&first, 0, &mut header).map_err(receive)? < vnet::HEADER {
            return Err(Broken::Short(first.length));
        }
        let buffers = if self.mergeable { vnet::buffers(&header) } else { 1 };
        if buffers == 0 {
            return Err(Broken::Buffers { buffers, used: 1 });
        }
        let mut length = ring.read(&first, vnet::HEADER, buffer).map_err(receive)?;
        ring.release(first).map_err(receive)?;
        for used in 1..buffers {
            let Some(next) = ring.take().map_err(receive)? else {
                return Err(Broken::Buffers { buffers, used });
            };
            let rest = buffer.get_mut(length..).unwrap_or_default();
            length += ring.read(&next, 0, rest).map_err(receive)?;
            ring.release(next).map_err(receive)?;
        }
        Ok((length, vnet::decode(&header)))
    }

    /// Offers all free buffers for frames.
    fn refill(&mut self) -> Result<(), Fault> {
        let bytes = if self.mergeable { 1 } else { LONGEST };
        while self.receive.ring.offer(bytes)? {}
        self.receive.publish()
    }

    /// Prepares a frame for the guest; whether there was room.
    fn prepare(&mut self, parts: &[&[u8]]) -> Result<bool, Fault> {
        if self.send.ring.send(parts)? {
            return Ok(true);
        }
        // Frames that the device was not shown would not come back.
        self.send.publish()?;
        loop {
            self.reclaim()?;
            if self.send.ring.send(parts)? {
                return Ok(true);
            }
            // Each time round, the device has used half of what it had: it ends.
            if !self.send.ring.ask(self.send.ring.outstanding() / 2)? {
                return Ok(false);
            }
        }
    }

    /// Looks whether the tap device is still there, if that was long ago.
    // syscalls(pasta): ppoll
    fn look(&mut self) -> Result<(), Broken> {
        if self.seen.elapsed() < LOOK {
            return Ok(());
        }
        self.seen = Instant::now();
        let mut tap = [PollFd::new(&self.tap, PollFlags::empty())];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        match poll(&mut tap, Some(&now)) {
            Ok(_) if tap[0].revents().intersects(PollFlags::ERR | PollFlags::HUP) => Err(Broken::TapGone),
            // A signal came first: the next time will do.
            _ => Ok(()),
        }
    }

    /// Takes back the buffers that the device has sent.
    fn reclaim(&mut self) -> Result<(), Fault> {
        while let Some(taken) = self.send.ring.take()? {
            self.send.ring.release(taken)?;
        }
        Ok(())
    }
}

impl<B: VhostNet + Send> Tap for VhostTap<B> {
    fn readiness(&self) -> BorrowedFd<'_> {
        self.readiness.as_fd()
    }

    // syscalls(pasta): epoll_wait
    fn acknowledge(&mut self) {
        let mut events = [EpollEvent::empty(); 4];
        // Only a signal can end it early; then the events are there the next time.
        let count = epoll_wait(self.readiness.as_raw_fd(), &mut events, 0).unwrap_or(0);
        for event in events.iter().take(count) {
            if event.data() == ERROR {
                self.broken.get_or_insert(Broken::Complaint);
            }
        }
    }

    fn abilities(&self) -> Abilities {
        self.abilities
    }

    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<Option<(usize, Offload)>> {
        self.alive()?;
        let frame = self.next_frame(buffer);
        self.settle(frame)
    }

    fn send(&mut self, header: &[u8], payload: &[u8], offload: Offload) -> io::Result<Sent> {
        self.alive()?;
        if header.len() + payload.len() > LONGEST_FRAME {
            let message = format!("a frame of {} bytes", header.len() + payload.len());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        let vnet = vnet::encode(header, offload);
        let prepared = self.prepare(&[&vnet, header, payload]).map_err(send);
        if !self.settle(prepared)? {
            return Ok(Sent::Full);
        }
        if self.send.ring.prepared() >= BATCH {
            let published = self.send.publish().map_err(send);
            self.settle(published)?;
        }
        Ok(Sent::Yes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.alive()?;
        let flushed = self.send.publish().and_then(|()| self.reclaim()).map_err(send);
        let flushed = flushed.and_then(|()| self.look());
        self.settle(flushed)
    }
}

impl<B: VhostNet> Drop for VhostTap<B> {
    // The memory is unmapped next, and the kernel's thread must not write to what is mapped there then. Closing the device
    // is not enough: a child between its fork and exec may still have it open.
    // syscalls(pasta): ioctl
    fn drop(&mut self) {
        attach::stop(&self.backend);
    }
}

fn receive(fault: Fault) -> Broken {
    Broken::Ring { ring: "receive", fault }
}

fn send(fault: Fault) -> Broken {
    Broken::Ring { ring: "send", fault }
}

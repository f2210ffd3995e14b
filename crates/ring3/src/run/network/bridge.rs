//! Frames from one link to another, as they are.
//!
//! Each direction has a frame in flight at most. One that the other side has no room for waits, and with it that
//! direction, until the side becomes ready again; so what is not taken stays in the queues of the sender's side.

use std::io;
use std::sync::Arc;

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use usernet::tap::{LONGEST_FRAME, Offload, Sent, Tap};
use virtio::event::Event;

/// Frames of one direction before the other has its turn.
const FRAMES: usize = 64;

/// Two links that are to be one.
pub(super) struct Bridge<A, B> {
    a: A,
    b: B,
    stop: Arc<Event>,
}

/// One direction.
struct Flow {
    buffer: Vec<u8>,
    /// The frame in the buffer that was not taken yet.
    waiting: Option<(usize, Offload)>,
}

impl<A: Tap, B: Tap> Bridge<A, B> {
    pub(super) fn new(a: A, b: B) -> io::Result<Self> {
        Ok(Self { a, b, stop: Arc::new(Event::new()?) })
    }

    /// Signalled, it has [`Self::run`] return.
    pub(super) fn stopper(&self) -> Arc<Event> {
        Arc::clone(&self.stop)
    }

    /// Moves frames until it is stopped or one of the links is gone.
    pub(super) fn run(mut self) -> io::Result<()> {
        const A: u64 = 0;
        const B: u64 = 1;
        const STOP: u64 = 2;
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, self.a.readiness(), EventData::new_u64(A), EventFlags::IN)?;
        epoll::add(&epoll, self.b.readiness(), EventData::new_u64(B), EventFlags::IN | EventFlags::ET)?;
        epoll::add(&epoll, &*self.stop, EventData::new_u64(STOP), EventFlags::IN)?;
        let (mut there, mut back) = (Flow::new(), Flow::new());
        let mut events = Vec::with_capacity(3);
        let now = rustix::fs::Timespec::default();
        let mut more = true;
        loop {
            events.clear();
            let timeout = if more { Some(&now) } else { None };
            match epoll::wait(&epoll, spare_capacity(&mut events), timeout) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            for event in &events {
                match event.data.u64() {
                    A => self.a.acknowledge(),
                    B => self.b.acknowledge(),
                    _ => return Ok(()),
                }
            }
            more = there.turn(&mut self.a, &mut self.b)?;
            more |= back.turn(&mut self.b, &mut self.a)?;
            self.a.flush()?;
            self.b.flush()?;
        }
    }
}

impl Flow {
    fn new() -> Self {
        Self { buffer: vec![0; LONGEST_FRAME], waiting: None }
    }

    /// Moves some frames; whether there may be more that can be moved.
    fn turn(&mut self, from: &mut impl Tap, to: &mut impl Tap) -> io::Result<bool> {
        for _ in 0..FRAMES {
            let next = match self.waiting.take() {
                Some(frame) => Some(frame),
                None => from.receive(&mut self.buffer)?,
            };
            let Some((length, offload)) = next else { return Ok(false) };
            let frame = self.buffer.get(..length).unwrap_or_default();
            if frame.is_empty() {
                continue;
            }
            if to.send(frame, &[], offload)? == Sent::Full {
                self.waiting = next;
                return Ok(false);
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use usernet::testing::{PLAIN, tap};

    #[test]
    fn frames_pass_both_ways_and_wait_for_room() {
        let (near, left) = tap(PLAIN, 2).unwrap();
        let (far, right) = tap(PLAIN, 100).unwrap();
        let bridge = Bridge::new(near, far).unwrap();
        let stop = bridge.stopper();
        let thread = std::thread::spawn(move || bridge.run());
        let offload = Offload { needs_checksum: true, segment: Some(1000) };
        for number in 0..100u8 {
            left.send_with([number; 60], offload);
            right.send([number; 80]);
        }
        let next = |guest: &usernet::testing::Guest| loop {
            match guest.receive() {
                Some(frame) => return frame,
                None => std::thread::yield_now(),
            }
        };
        for number in 0..100u8 {
            assert_eq!(next(&right), (vec![number; 60], offload));
            assert_eq!(next(&left), (vec![number; 80], Offload::default()));
        }
        stop.signal();
        thread.join().unwrap().unwrap();
    }

    #[test]
    fn a_link_that_is_gone_ends_it() {
        let (near, left) = tap(PLAIN, 2).unwrap();
        let (far, _right) = tap(PLAIN, 2).unwrap();
        let bridge = Bridge::new(near, far).unwrap();
        left.close();
        assert_eq!(bridge.run().unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }
}

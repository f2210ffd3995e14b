//! A link that somebody looks on at.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;

use usernet::tap::{Abilities, Offload, Sent, Tap};

/// Who looks on: told of each frame when it has crossed.
pub trait Observer: Send {
    /// The guest sent this one.
    fn received(&self, frame: &[u8]);

    /// The guest was sent this one, which `sent` is what became of.
    fn sent(&self, header: &[u8], payload: &[u8], sent: Sent);

    /// The engine has done a turn.
    fn flush(&self) {}
}

/// A link between the engine and another, whose frames an observer is told of.
pub struct Observed<O> {
    tap: Box<dyn Tap>,
    observer: O,
}

impl<O> fmt::Debug for Observed<O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Observed").finish_non_exhaustive()
    }
}

impl<O: Observer> Observed<O> {
    /// Tells `observer` what crosses `tap`.
    #[must_use]
    pub fn new(tap: Box<dyn Tap>, observer: O) -> Self {
        Self { tap, observer }
    }
}

impl<O: Observer> Tap for Observed<O> {
    fn readiness(&self) -> BorrowedFd<'_> {
        self.tap.readiness()
    }

    fn acknowledge(&mut self) {
        self.tap.acknowledge();
    }

    fn abilities(&self) -> Abilities {
        self.tap.abilities()
    }

    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<Option<(usize, Offload)>> {
        let received = self.tap.receive(buffer)?;
        if let Some((length, _)) = received {
            self.observer.received(buffer.get(..length).unwrap_or_default());
        }
        Ok(received)
    }

    fn send(&mut self, header: &[u8], payload: &[u8], offload: Offload) -> io::Result<Sent> {
        let sent = self.tap.send(header, payload, offload)?;
        self.observer.sent(header, payload, sent);
        Ok(sent)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.observer.flush();
        self.tap.flush()
    }
}

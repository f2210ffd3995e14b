//! From the device's eventfds to the guest's messages.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use cpu::GuestRam;
use pci::msix::{MsiSink, Msix};
use rustix::event::epoll;
use virtio::event::Event;

use super::memory::written_elsewhere;
use crate::vcpu::lock;

/// Part of a BAR that MSI-X takes, and where in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum MsixPart {
    /// The vector table.
    Table(u64),
    /// The pending bits.
    Pending(u64),
}

/// The epoll datum of the event that ends the thread; vectors are below.
const STOP: u64 = u64::MAX;
/// Events taken in one call.
const BATCH: usize = 32;

struct Shared {
    msix: Mutex<Msix>,
    sink: Arc<dyn MsiSink>,
    vectors: Vec<Event>,
    stop: Event,
    epoll: OwnedFd,
    /// Of a device that writes to it by itself.
    memory: Option<Arc<GuestRam>>,
}

/// The vectors of one function, and the thread that waits for them; it ends when this is dropped.
pub(super) struct Interrupts {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Interrupts {
    /// Waits for `vectors` vectors. `memory` is that of a device that writes there by itself.
    ///
    /// # Errors
    /// The host is out of descriptors or threads.
    pub(super) fn start(
        vectors: u16,
        sink: Arc<dyn MsiSink>,
        memory: Option<Arc<GuestRam>>,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            msix: Mutex::new(Msix::new(vectors)),
            sink,
            vectors: (0..vectors).map(|_| Event::new()).collect::<io::Result<_>>()?,
            stop: Event::new()?,
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            memory,
        });
        let events = (0..).zip(&shared.vectors).chain([(STOP, &shared.stop)]);
        for (datum, event) in events {
            epoll::add(&shared.epoll, event, epoll::EventData::new_u64(datum), epoll::EventFlags::IN)?;
        }
        let served = Arc::clone(&shared);
        let thread = thread::Builder::new().name("assigned".into()).spawn(move || served.serve())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// What the device is to signal, by vector.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub(super) fn eventfds(&self) -> io::Result<Vec<OwnedFd>> {
        let clone = |event: &Event| Ok(rustix::io::fcntl_dupfd_cloexec(event, 3)?);
        self.shared.vectors.iter().map(clone).collect()
    }

    /// Takes over the capability's control word, and whether the function may be bus master.
    pub(super) fn set_state(&self, control: u16, bus_master: bool) {
        let messages = {
            let mut msix = lock(&self.shared.msix);
            let mut messages = msix.set_bus_master(bus_master);
            messages.extend(msix.set_control(control));
            messages
        };
        self.shared.send(messages);
    }

    /// Reads a part of the BAR.
    pub(super) fn read(&self, part: MsixPart, data: &mut [u8]) {
        let msix = lock(&self.shared.msix);
        match part {
            MsixPart::Table(offset) => msix.table_read(offset, data),
            MsixPart::Pending(offset) => msix.pba_read(offset, data),
        }
    }

    /// Writes a part of the BAR. Pending bits cannot be written.
    pub(super) fn write(&self, part: MsixPart, data: &[u8]) {
        if let MsixPart::Table(offset) = part {
            let messages = lock(&self.shared.msix).table_write(offset, data);
            self.shared.send(messages);
        }
    }
}

impl Drop for Interrupts {
    fn drop(&mut self) {
        self.shared.stop.signal();
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

impl Shared {
    fn send(&self, messages: impl IntoIterator<Item = pci::msix::Message>) {
        for message in messages {
            self.sink.signal(message.address, message.data);
        }
    }

    /// The thread: until it is stopped.
    fn serve(&self) {
        let mut events =
            [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; BATCH];
        loop {
            let ready = match epoll::wait(&self.epoll, &mut events, None) {
                Ok(ready) => ready,
                Err(rustix::io::Errno::INTR) => continue,
                Err(errno) => {
                    tracing::error!(%errno, "cannot wait for an assigned device's interrupts any more");
                    return;
                }
            };
            let ready = events.get(..ready).unwrap_or_default();
            if ready.iter().any(|event| event.data.u64() == STOP) {
                return;
            }
            for event in ready {
                let vector = event.data.u64() as u16;
                if let Some(event) = self.vectors.get(usize::from(vector)) {
                    event.clear();
                    if let Some(memory) = &self.memory {
                        written_elsewhere(memory);
                    }
                    let message = lock(&self.msix).raise(vector);
                    self.send(message);
                }
            }
        }
    }
}

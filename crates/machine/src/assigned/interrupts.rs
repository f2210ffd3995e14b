//! From the device's eventfds to the guest's interrupts.
//!
//! # Theory of operation
//!
//! The guest chooses a kind: MSI-X or MSI by enabling it, else the wire. VFIO gives one kind at a time, so that is set up
//! with the device when the guest changes its mind, by the vCPU that writes to configuration space. One thread waits for
//! all eventfds.
//!
//! - **MSI-X, MSI**: an eventfd for each vector. Masks and pending bits are here (`pci::msix`, `pci::msi`): what a vector
//!   signals becomes the guest's message, or waits.
//! - **INTx** is a level, of which VFIO tells only the beginning: it signals once and masks the interrupt. The wire goes up
//!   then. When the guest has served the interrupt controller's pin, the wire goes down and the thread unmasks the
//!   interrupt; if the device still wants something, it is signalled again. A pin that is shared may be served for
//!   another's sake: then the device's interrupt comes once more, as it would from a wire that stayed up. While the guest has
//!   disabled INTx in the command register the wire is down; when it enables it again the device is asked anew.
//!
//! Whoever switches kinds holds no lock while the device is asked. `state` is locked for moments, and the wire is driven
//! under it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use pci::msi::{Msi, MsiLayout};
use pci::msix::{IntxLine, Message, MsiSink, Msix};
use rustix::event::epoll;
use uapi::vfio::{VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX};
use vfio::device::Device;
use vfio::irq::{IrqAction, IrqData, IrqSet};
use virtio::event::Event;

use crate::pci::intx::Served;
use crate::vcpu::lock;
use crate::writes::Exposed;

/// Part of a BAR that MSI-X takes, and where in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum MsixPart {
    /// The vector table.
    Table(u64),
    /// The pending bits.
    Pending(u64),
}

/// Which kinds a function has.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Kinds {
    /// A wire.
    pub(super) intx: bool,
    /// MSI.
    pub(super) msi: Option<MsiLayout>,
    /// How many vectors of MSI-X, or none.
    pub(super) msix: u16,
}

/// What configuration space says of interrupts, besides MSI's capability.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Control {
    /// The control word of MSI-X.
    pub(super) msix: u16,
    /// The function may send messages.
    pub(super) bus_master: bool,
    /// The command register forbids the wire.
    pub(super) intx_disabled: bool,
}

/// The kind in use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mode {
    None,
    Intx,
    /// With so many vectors.
    Msi(u32),
    Msix,
}

impl Mode {
    /// VFIO's number for it, and how many vectors are set up.
    fn index(self, kinds: &Kinds) -> Option<(u32, usize)> {
        match self {
            Self::None => None,
            Self::Intx => Some((VFIO_PCI_INTX_IRQ_INDEX, 1)),
            Self::Msi(vectors) => Some((VFIO_PCI_MSI_IRQ_INDEX, vectors as usize)),
            Self::Msix => Some((VFIO_PCI_MSIX_IRQ_INDEX, kinds.msix.into())),
        }
    }
}

/// The epoll data of what is no message; vectors are below.
const STOP: u64 = u64::MAX;
const INTX: u64 = u64::MAX - 1;
const UNMASK: u64 = u64::MAX - 2;
/// Events taken in one call.
const BATCH: usize = 32;

struct State {
    mode: Mode,
    msix: Msix,
    msi: Option<Msi>,
    /// INTx was signalled, and is masked by VFIO until it is unmasked.
    raised: bool,
    intx_disabled: bool,
}

struct Shared {
    device: Arc<dyn Device>,
    kinds: Kinds,
    state: Mutex<State>,
    sink: Arc<dyn MsiSink>,
    wire: Option<Box<dyn IntxLine>>,
    /// Signalled by the device: the vectors of MSI or MSI-X, and INTx.
    vectors: Vec<Event>,
    intx: Event,
    /// INTx is to be unmasked.
    unmask: Event,
    stop: Event,
    epoll: OwnedFd,
    /// What it writes to by itself.
    exposed: Option<Arc<Exposed>>,
}

/// The interrupts of one function, and the thread that waits for them; it ends when this is dropped.
pub(super) struct Interrupts {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Interrupts {
    /// Waits for the device's interrupts, of which none is set up yet. `exposed` is what the device writes to
    /// by itself.
    ///
    /// # Errors
    /// The host is out of descriptors or threads.
    pub(super) fn start(
        device: Arc<dyn Device>,
        kinds: Kinds,
        sink: Arc<dyn MsiSink>,
        wire: Option<Box<dyn IntxLine>>,
        exposed: Option<Arc<Exposed>>,
    ) -> io::Result<Self> {
        let vectors = kinds.msix.max(kinds.msi.map_or(0, |msi| msi.vectors.into()));
        let state = State {
            mode: Mode::None,
            msix: Msix::new(kinds.msix),
            msi: kinds.msi.map(Msi::new),
            raised: false,
            intx_disabled: false,
        };
        let shared = Arc::new(Shared {
            device,
            kinds,
            state: Mutex::new(state),
            sink,
            wire,
            vectors: (0..vectors).map(|_| Event::new()).collect::<io::Result<_>>()?,
            intx: Event::new()?,
            unmask: Event::new()?,
            stop: Event::new()?,
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            exposed,
        });
        let others = [(INTX, &shared.intx), (UNMASK, &shared.unmask), (STOP, &shared.stop)];
        for (datum, event) in (0..).zip(&shared.vectors).chain(others) {
            epoll::add(&shared.epoll, event, epoll::EventData::new_u64(datum), epoll::EventFlags::IN)?;
        }
        let served = Arc::clone(&shared);
        let thread = thread::Builder::new().name("assigned".into()).spawn(move || served.serve())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Who is to hear that the guest has served the pin that the wire leads to.
    pub(super) fn served(&self) -> Arc<dyn Served> {
        Arc::clone(&self.shared) as _
    }

    /// Takes over what configuration space says, and sets up with the device what follows from it. A device that does not
    /// want to does not interrupt: the guest's driver finds that out, or uses another kind.
    pub(super) fn set_control(&self, control: Control) {
        let shared = &*self.shared;
        let (messages, before, wanted) = {
            let mut state = lock(&shared.state);
            let mut messages = state.msix.set_bus_master(control.bus_master);
            messages.extend(state.msix.set_control(control.msix));
            if let Some(msi) = &mut state.msi {
                messages.extend(msi.set_bus_master(control.bus_master));
            }
            let enabled =
                std::mem::replace(&mut state.intx_disabled, control.intx_disabled) && !control.intx_disabled;
            if enabled && std::mem::take(&mut state.raised) {
                shared.unmask.signal();
            }
            let wanted = state.wanted(&shared.kinds);
            let before = state.mode;
            if before != wanted {
                state.mode = Mode::None;
                state.raised = false;
            }
            shared.drive(&state);
            (messages, before, wanted)
        };
        shared.send(messages);
        if before != wanted {
            shared.switch(before, wanted);
        }
    }

    /// Reads MSI's capability.
    pub(super) fn msi_read(&self, offset: u16, data: &mut [u8]) {
        if let Some(msi) = &lock(&self.shared.state).msi {
            msi.read(offset, data);
        }
    }

    /// Writes MSI's capability. What follows from it is set up by [`Self::set_control`].
    pub(super) fn msi_write(&self, offset: u16, data: &[u8]) {
        let messages = lock(&self.shared.state).msi.as_mut().map(|msi| msi.write(offset, data));
        self.shared.send(messages.unwrap_or_default());
    }

    /// Reads a part of the BAR.
    pub(super) fn read(&self, part: MsixPart, data: &mut [u8]) {
        let state = lock(&self.shared.state);
        match part {
            MsixPart::Table(offset) => state.msix.table_read(offset, data),
            MsixPart::Pending(offset) => state.msix.pba_read(offset, data),
        }
    }

    /// Writes a part of the BAR. Pending bits cannot be written.
    pub(super) fn write(&self, part: MsixPart, data: &[u8]) {
        if let MsixPart::Table(offset) = part {
            let messages = lock(&self.shared.state).msix.table_write(offset, data);
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

impl State {
    /// The kind that the guest has chosen.
    fn wanted(&self, kinds: &Kinds) -> Mode {
        match &self.msi {
            _ if kinds.msix > 0 && self.msix.enabled() => Mode::Msix,
            Some(msi) if let Some(vectors) = msi.enabled() => Mode::Msi(vectors),
            _ if kinds.intx => Mode::Intx,
            _ => Mode::None,
        }
    }
}

impl Shared {
    fn send(&self, messages: impl IntoIterator<Item = Message>) {
        for message in messages {
            self.sink.signal(message.address, message.data);
        }
    }

    fn drive(&self, state: &State) {
        if let Some(wire) = &self.wire {
            wire.set(state.mode == Mode::Intx && state.raised && !state.intx_disabled);
        }
    }

    /// Takes one kind back from the device and sets up another.
    fn switch(&self, before: Mode, wanted: Mode) {
        let trigger = |index, count, data| {
            self.device.set_irqs(IrqSet { index, start: 0, count, action: IrqAction::Trigger, data })
        };
        if let Some((index, _)) = before.index(&self.kinds)
            && let Err(errno) = trigger(index, 0, IrqData::None)
        {
            tracing::debug!(%errno, ?before, "the assigned device does not disable its interrupts");
        }
        let events = if wanted == Mode::Intx { std::slice::from_ref(&self.intx) } else { &self.vectors };
        events.iter().for_each(Event::clear);
        // From the first signal on the thread must know what it is.
        lock(&self.state).mode = wanted;
        let Some((index, count)) = wanted.index(&self.kinds) else { return };
        let clone = |event: &Event| rustix::io::fcntl_dupfd_cloexec(event, 3).map(Some);
        let eventfds: Result<Vec<_>, _> = events.iter().take(count).map(clone).collect();
        let set = eventfds.and_then(|fds| trigger(index, fds.len() as u32, IrqData::EventFd(fds)));
        if let Err(errno) = set {
            tracing::warn!(%errno, ?wanted, "the assigned device cannot be set up to interrupt");
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
            for event in events.get(..ready).unwrap_or_default() {
                match event.data.u64() {
                    STOP => return,
                    UNMASK => self.unmask_intx(),
                    INTX => self.raise_intx(),
                    vector => self.raise(vector as u32),
                }
            }
        }
    }

    /// The device has signalled a vector of MSI or MSI-X.
    fn raise(&self, vector: u32) {
        let Some(event) = self.vectors.get(vector as usize) else { return };
        event.clear();
        self.note_writes();
        let message = {
            let mut state = lock(&self.state);
            match state.mode {
                Mode::Msix => state.msix.raise(vector as u16),
                Mode::Msi(_) => state.msi.as_mut().and_then(|msi| msi.raise(vector)),
                Mode::None | Mode::Intx => None,
            }
        };
        self.send(message);
    }

    fn raise_intx(&self) {
        self.intx.clear();
        self.note_writes();
        let mut state = lock(&self.state);
        state.raised = state.mode == Mode::Intx;
        self.drive(&state);
    }

    fn unmask_intx(&self) {
        self.unmask.clear();
        let (index, action, data) = (VFIO_PCI_INTX_IRQ_INDEX, IrqAction::Unmask, IrqData::None);
        // The guest may use another kind meanwhile.
        if let Err(errno) = self.device.set_irqs(IrqSet { index, start: 0, count: 1, action, data }) {
            tracing::debug!(%errno, "the assigned device's INTx stays masked");
        }
    }

    /// Before the guest learns that data has come.
    fn note_writes(&self) {
        if let Some(exposed) = &self.exposed {
            exposed.note_writes();
        }
    }
}

impl Served for Shared {
    fn served(&self) {
        let mut state = lock(&self.state);
        // Disabled, it waits until it is enabled.
        if !state.intx_disabled && std::mem::take(&mut state.raised) {
            self.drive(&state);
            self.unmask.signal();
        }
    }
}

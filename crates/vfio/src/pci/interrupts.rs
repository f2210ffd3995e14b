//! The interrupts of a PCI function, as VFIO gives them away.
//!
//! # Theory of operation
//!
//! A function has INTx, MSI and MSI-X, of which one at a time is enabled, and two kinds that are VFIO's own: ERR (the
//! device has failed) and REQ (the user is asked to let go of it). Each vector is an eventfd.
//!
//! INTx is a level. VFIO makes an edge of it: when the level is high and the interrupt is not masked, it masks it and
//! signals the eventfd; the user unmasks it when it has served the device, and if the level is still high, it all
//! begins again. What the rules are, down to the errno, was asked of the kernel's vfio-pci.
//!
//! Eventfds are signalled with the lock held. So after [`Interrupts::clear`] has returned, none is.

use std::sync::{Arc, Mutex, Weak};

use uapi::vfio::{
    VFIO_PCI_ERR_IRQ_INDEX, VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX,
    VFIO_PCI_REQ_IRQ_INDEX,
};

use crate::{
    Errno, Result,
    eventfd::{EventFd, WatchId, Watcher, lock},
    irq::{IrqAction, IrqData, IrqFlags, IrqInfo, IrqSet},
};

/// Which interrupts a function has.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Kinds {
    /// INTA#.
    pub intx: bool,
    /// How many vectors of MSI: 0, or a power of two up to 32.
    pub msi: u8,
    /// How many vectors of MSI-X, up to 2048.
    pub msix: u16,
}

/// Which kind is in use.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Enabled {
    /// None.
    #[default]
    None,
    /// INTx.
    Intx,
    /// MSI, with so many vectors.
    Msi(u32),
    /// MSI-X.
    Msix,
}

#[derive(Debug, Default)]
struct Intx {
    trigger: Option<EventFd>,
    unmask: Option<WatchId>,
    /// What the device says.
    level: bool,
    /// By the user, or by VFIO since it signalled.
    masked: bool,
    /// By the command register.
    disabled: bool,
}

impl Intx {
    /// Signals it if it is due.
    fn update(&mut self) {
        if self.level
            && !self.masked
            && !self.disabled
            && let Some(trigger) = &self.trigger
        {
            self.masked = true;
            trigger.signal();
        }
    }
}

#[derive(Debug, Default)]
struct State {
    enabled: Enabled,
    intx: Intx,
    /// The vectors of MSI or MSI-X, whichever is enabled.
    vectors: Vec<Option<EventFd>>,
    error: Option<EventFd>,
    request: Option<EventFd>,
}

/// The interrupts of one function.
#[derive(Debug)]
pub struct Interrupts {
    kinds: Kinds,
    state: Mutex<State>,
    watcher: Watcher,
    me: Weak<Self>,
}

impl Interrupts {
    /// Nothing is enabled at first.
    #[must_use]
    pub fn new(kinds: Kinds) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            kinds,
            state: Mutex::default(),
            watcher: Watcher::default(),
            me: Weak::clone(me),
        })
    }

    /// What there is of kind `index`.
    ///
    /// # Errors
    /// EINVAL past the last kind.
    pub fn info(&self, index: u32) -> Result<IrqInfo> {
        let messages = IrqFlags::EVENTFD | IrqFlags::NORESIZE;
        let (flags, count) = match index {
            VFIO_PCI_INTX_IRQ_INDEX => {
                (IrqFlags::EVENTFD | IrqFlags::MASKABLE | IrqFlags::AUTOMASKED, u32::from(self.kinds.intx))
            }
            VFIO_PCI_MSI_IRQ_INDEX => (messages, u32::from(self.kinds.msi)),
            VFIO_PCI_MSIX_IRQ_INDEX => (IrqFlags::EVENTFD, u32::from(self.kinds.msix)),
            VFIO_PCI_ERR_IRQ_INDEX | VFIO_PCI_REQ_IRQ_INDEX => (messages, 1),
            _ => return Err(Errno::INVAL),
        };
        Ok(IrqInfo { flags, count })
    }

    /// Which kind is in use.
    pub fn enabled(&self) -> Enabled {
        lock(&self.state).enabled
    }

    /// Signals `vector` of the messages that are enabled. False when none are: the device should use INTx then.
    pub fn message(&self, vector: u32) -> bool {
        let state = lock(&self.state);
        match state.enabled {
            Enabled::None | Enabled::Intx => return false,
            // A function that was given fewer messages than it has uses the last one for the rest.
            Enabled::Msi(count) => signal(&state.vectors, vector.min(count.saturating_sub(1))),
            Enabled::Msix => signal(&state.vectors, vector),
        }
        true
    }

    /// Drives INTx.
    pub fn set_intx(&self, level: bool) {
        let mut state = lock(&self.state);
        state.intx.level = level;
        if state.enabled == Enabled::Intx {
            state.intx.update();
        }
    }

    /// Whether the device drives INTx.
    pub fn intx(&self) -> bool {
        lock(&self.state).intx.level
    }

    /// What the command register says: INTx is disabled.
    pub fn set_intx_disabled(&self, disabled: bool) {
        let mut state = lock(&self.state);
        state.intx.disabled = disabled;
        if state.enabled == Enabled::Intx {
            state.intx.update();
        }
    }

    /// The device has failed.
    pub fn error(&self) {
        if let Some(eventfd) = &lock(&self.state).error {
            eventfd.signal();
        }
    }

    /// The user is asked to let go of the device.
    pub fn request(&self) {
        if let Some(eventfd) = &lock(&self.state).request {
            eventfd.signal();
        }
    }

    /// Takes everything back. No eventfd is signalled after it.
    pub fn clear(&self) {
        let unmask = {
            let mut state = lock(&self.state);
            let unmask = state.intx.unmask.take();
            *state = State::default();
            unmask
        };
        // The action takes the lock.
        if let Some(id) = unmask {
            self.watcher.remove(id);
        }
    }

    /// `VFIO_DEVICE_SET_IRQS`.
    ///
    /// # Errors
    /// EINVAL, ENOTTY, EBUSY and ERANGE, as vfio-pci has them.
    pub fn set(&self, set: IrqSet) -> Result<()> {
        let info = self.info(set.index)?;
        if set.start >= info.count || set.count > info.count - set.start {
            return Err(Errno::INVAL);
        }
        match (set.index, set.action) {
            (VFIO_PCI_INTX_IRQ_INDEX, IrqAction::Trigger) => self.intx_trigger(set),
            (VFIO_PCI_INTX_IRQ_INDEX, IrqAction::Mask) => self.intx_mask(&set),
            (VFIO_PCI_INTX_IRQ_INDEX, IrqAction::Unmask) => self.intx_unmask(set),
            (VFIO_PCI_MSI_IRQ_INDEX | VFIO_PCI_MSIX_IRQ_INDEX, IrqAction::Trigger) => self.messages(set),
            (VFIO_PCI_ERR_IRQ_INDEX, IrqAction::Trigger) => single(&mut lock(&self.state).error, set),
            (VFIO_PCI_REQ_IRQ_INDEX, IrqAction::Trigger) => single(&mut lock(&self.state).request, set),
            _ => Err(Errno::NOTTY),
        }
    }

    fn intx_trigger(&self, set: IrqSet) -> Result<()> {
        let mut state = lock(&self.state);
        if state.enabled == Enabled::Intx && set.count == 0 && matches!(set.data, IrqData::None) {
            let unmask = state.intx.unmask.take();
            state.enabled = Enabled::None;
            state.intx.trigger = None;
            state.intx.masked = false;
            drop(state);
            if let Some(id) = unmask {
                self.watcher.remove(id);
            }
            return Ok(());
        }
        if !matches!(state.enabled, Enabled::Intx | Enabled::None) || set.count != 1 {
            return Err(Errno::INVAL);
        }
        match set.data {
            IrqData::EventFd(fds) => {
                let trigger = fds.into_iter().next().flatten().map(EventFd::new).transpose()?;
                state.enabled = Enabled::Intx;
                state.intx.trigger = trigger;
                state.intx.update();
                Ok(())
            }
            _ if state.enabled != Enabled::Intx => Err(Errno::INVAL),
            data => {
                if wanted(&data, 0)
                    && let Some(trigger) = &state.intx.trigger
                {
                    trigger.signal();
                }
                Ok(())
            }
        }
    }

    fn intx_mask(&self, set: &IrqSet) -> Result<()> {
        let mut state = lock(&self.state);
        if state.enabled != Enabled::Intx || set.count != 1 {
            return Err(Errno::INVAL);
        }
        if matches!(set.data, IrqData::EventFd(_)) {
            return Err(Errno::NOTTY);
        }
        if wanted(&set.data, 0) {
            state.intx.masked = true;
        }
        Ok(())
    }

    fn intx_unmask(&self, set: IrqSet) -> Result<()> {
        let mut state = lock(&self.state);
        if state.enabled != Enabled::Intx || set.count != 1 {
            return Err(Errno::INVAL);
        }
        match set.data {
            IrqData::EventFd(fds) => {
                let Some(fd) = fds.into_iter().next().flatten() else {
                    let unmask = state.intx.unmask.take();
                    drop(state);
                    if let Some(id) = unmask {
                        self.watcher.remove(id);
                    }
                    return Ok(());
                };
                if state.intx.unmask.is_some() {
                    return Err(Errno::BUSY);
                }
                let me = Weak::clone(&self.me);
                let action = move || {
                    if let Some(me) = me.upgrade() {
                        unmask(&mut lock(&me.state));
                    }
                };
                // The thread may begin to act at once, and waits for the lock then.
                state.intx.unmask = Some(self.watcher.add(EventFd::new(fd)?, Box::new(action))?);
                Ok(())
            }
            data => {
                if wanted(&data, 0) {
                    unmask(&mut state);
                }
                Ok(())
            }
        }
    }

    fn messages(&self, set: IrqSet) -> Result<()> {
        let mut state = lock(&self.state);
        let msix = set.index == VFIO_PCI_MSIX_IRQ_INDEX;
        let is_enabled = match state.enabled {
            Enabled::Msi(_) => !msix,
            Enabled::Msix => msix,
            Enabled::None | Enabled::Intx => false,
        };
        if is_enabled && set.count == 0 && matches!(set.data, IrqData::None) {
            state.enabled = Enabled::None;
            state.vectors = Vec::new();
            return Ok(());
        }
        if !is_enabled && state.enabled != Enabled::None {
            return Err(Errno::INVAL);
        }
        let end = set.start.saturating_add(set.count) as usize;
        match set.data {
            IrqData::EventFd(fds) => {
                let eventfds =
                    fds.into_iter().map(|fd| fd.map(EventFd::new).transpose()).collect::<Result<Vec<_>>>()?;
                if !is_enabled {
                    // As many vectors as this call names are allocated; those of MSI-X can grow.
                    if end == 0 {
                        return Err(Errno::RANGE);
                    }
                    state.enabled = if msix { Enabled::Msix } else { Enabled::Msi(end as u32) };
                    state.vectors.resize_with(end, || None);
                } else if end > state.vectors.len() {
                    if !msix {
                        return Err(Errno::INVAL);
                    }
                    state.vectors.resize_with(end, || None);
                }
                for (slot, eventfd) in state.vectors.iter_mut().skip(set.start as usize).zip(eventfds) {
                    *slot = eventfd;
                }
                Ok(())
            }
            _ if !is_enabled || (!msix && end > state.vectors.len()) => Err(Errno::INVAL),
            data => {
                for vector in 0..set.count {
                    if wanted(&data, vector) {
                        signal(&state.vectors, set.start.saturating_add(vector));
                    }
                }
                Ok(())
            }
        }
    }
}

fn signal(vectors: &[Option<EventFd>], vector: u32) {
    if let Some(Some(eventfd)) = vectors.get(vector as usize) {
        eventfd.signal();
    }
}

fn unmask(state: &mut State) {
    state.intx.masked = false;
    if state.enabled == Enabled::Intx {
        state.intx.update();
    }
}

/// Whether a call means the vector with number `at` among its own.
fn wanted(data: &IrqData, at: u32) -> bool {
    match data {
        IrqData::None => true,
        IrqData::Bool(flags) => flags.get(at as usize).copied().unwrap_or(false),
        IrqData::EventFd(_) => false,
    }
}

/// ERR and REQ: one eventfd, enabled when there is one.
fn single(slot: &mut Option<EventFd>, set: IrqSet) -> Result<()> {
    match set.data {
        IrqData::None => {
            let eventfd = slot.as_ref().ok_or(Errno::INVAL)?;
            if set.count == 0 {
                *slot = None;
            } else {
                eventfd.signal();
            }
        }
        _ if set.count == 0 => return Err(Errno::INVAL),
        IrqData::EventFd(fds) => *slot = fds.into_iter().next().flatten().map(EventFd::new).transpose()?,
        data => {
            if let Some(eventfd) = slot
                && wanted(&data, 0)
            {
                eventfd.signal();
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;

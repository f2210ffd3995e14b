//! The I/O APIC: 24 pins, each with an entry that says which message it sends (82093AA data sheet; the
//! EOI register of version 0x20).
//!
//! An edge pin sends when its line goes up, unless masked: then the edge is lost. A level pin sends when
//! its line is up, it is not masked, and no earlier message of it is still in service (remote IRR); EOI
//! of its vector ends the service, and if the line is still up it sends again. Between the two, who drives the line may
//! look whether it is still to be up ([`EoiListener`]): a device that only tells when its interrupt begins.

use super::bus::ApicBus;
use super::message::{DeliveryMode, Destination, Message, TriggerMode};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

/// Where the I/O APIC is, by convention.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// Size of its register page in bytes.
pub const IOAPIC_SIZE: u64 = 0x1000;
/// How many pins it has.
pub const IOAPIC_PINS: usize = 24;

/// Version 0x20 (has an EOI register); the highest entry is 23.
const VERSION: u32 = 0x20 | (IOAPIC_PINS as u32 - 1) << 16;

const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// What software may write: vector, modes, polarity, trigger, mask; destination with its extension.
const WRITABLE: u64 = 0xfffe_0000_0001_afff;

#[derive(Clone, Copy)]
struct Pin {
    entry: u64,
    /// The line is asserted.
    line: bool,
}

impl Pin {
    fn is_level(&self) -> bool {
        self.entry & LEVEL != 0
    }
}

struct State {
    id: u32,
    select: u8,
    pins: [Pin; IOAPIC_PINS],
}

/// Hears when interrupts of level pins have been served.
pub trait EoiListener: Send + Sync {
    /// The interrupt of `pin` has been served. The line may be driven from here; it is looked at afterwards. Called from
    /// a vCPU's thread, which should not be kept.
    fn served(&self, pin: usize);
}

/// The I/O APIC.
pub struct IoApic {
    bus: Arc<ApicBus>,
    state: Mutex<State>,
    listener: OnceLock<Weak<dyn EoiListener>>,
}

impl IoApic {
    /// An I/O APIC after reset, all pins masked, attached to `bus`.
    pub fn new(bus: &Arc<ApicBus>) -> Arc<Self> {
        let pins = [Pin { entry: MASKED, line: false }; IOAPIC_PINS];
        let state = Mutex::new(State { id: 0, select: 0, pins });
        let io_apic = Arc::new(Self { bus: bus.clone(), state, listener: OnceLock::new() });
        bus.attach(Arc::downgrade(&io_apic));
        io_apic
    }

    /// Who is told of interrupts that have been served; the first one stays.
    pub fn set_listener(&self, listener: Weak<dyn EoiListener>) {
        let _ = self.listener.set(listener);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// RESET: registers as new. Lines are what devices drive, and stay.
    pub fn reset(&self) {
        let mut state = self.lock();
        state.id = 0;
        state.select = 0;
        state.pins.iter_mut().for_each(|pin| pin.entry = MASKED);
    }

    /// A device asserts or releases its line. Asserted is asserted, whichever polarity the entry says.
    /// A pin that does not exist is ignored.
    pub fn set_irq(&self, pin: usize, asserted: bool) {
        let mut state = self.lock();
        let Some(pin) = state.pins.get_mut(pin) else { return };
        let rising = asserted && !pin.line;
        pin.line = asserted;
        if pin.is_level() || rising {
            self.send(pin);
        }
    }

    /// One edge on a pin: up and down again.
    pub fn pulse(&self, pin: usize) {
        self.set_irq(pin, true);
        self.set_irq(pin, false);
    }

    /// Sends the pin's message if its line, its mask and a message in service allow.
    fn send(&self, pin: &mut Pin) {
        if !pin.line || pin.entry & (MASKED | REMOTE_IRR) != 0 {
            return;
        }
        let Some(message) = decode(pin.entry, self.bus.extended_ids()) else { return };
        // Only an interrupt that an EOI will come for is in service.
        if self.bus.deliver(&message) > 0 && pin.is_level() && message.mode.has_vector() {
            pin.entry |= REMOTE_IRR;
        }
    }

    /// EOI of `vector`: over the bus, or by the EOI register.
    pub(crate) fn eoi(&self, vector: u8) {
        let served = |pin: &Pin| pin.is_level() && pin.entry & REMOTE_IRR != 0 && pin.entry as u8 == vector;
        if let Some(listener) = self.listener.get().and_then(Weak::upgrade) {
            // Their own state is not locked while others are called.
            let pins = self.lock().pins;
            (0..).zip(&pins).filter(|(_, pin)| served(pin)).for_each(|(pin, _)| listener.served(pin));
        }
        for pin in self.lock().pins.iter_mut().filter(|pin| served(pin)) {
            pin.entry &= !REMOTE_IRR;
            self.send(pin);
        }
    }

    /// Reads 32 bits at `offset` in the register page.
    pub fn mmio_read(&self, offset: u64) -> u32 {
        let state = self.lock();
        match offset {
            0x00 => state.select.into(),
            0x10 => match state.select {
                0 | 2 => state.id << 24,
                1 => VERSION,
                index => match state.pins.get(pin_of(index)) {
                    Some(pin) => (pin.entry >> (u32::from(index & 1) * 32)) as u32,
                    None => 0,
                },
            },
            _ => 0,
        }
    }

    /// Writes 32 bits at `offset` in the register page.
    pub fn mmio_write(&self, offset: u64, value: u32) {
        match offset {
            0x00 => self.lock().select = value as u8,
            0x10 => self.write_window(value),
            0x40 => self.eoi(value as u8),
            _ => {}
        }
    }

    fn write_window(&self, value: u32) {
        let mut state = self.lock();
        let index = state.select;
        if index == 0 {
            state.id = value >> 24 & 0xf;
            return;
        }
        let Some(pin) = state.pins.get_mut(pin_of(index)) else { return };
        let half = u32::from(index & 1) * 32;
        let writable = WRITABLE & (0xffff_ffff << half);
        pin.entry = pin.entry & !writable | u64::from(value) << half & writable;
        if pin.is_level() {
            self.send(pin);
        } else {
            // Nothing is in service on an edge pin: this is how drivers for older versions force an EOI.
            pin.entry &= !REMOTE_IRR;
        }
    }
}

/// The pin whose entry a register index is a half of; indexes below 0x10 give one that does not exist.
fn pin_of(index: u8) -> usize {
    index.checked_sub(0x10).map_or(IOAPIC_PINS, |index| usize::from(index / 2))
}

fn decode(entry: u64, extended_ids: bool) -> Option<Message> {
    let mode = DeliveryMode::from_bits((entry >> 8) as u32).filter(|&m| m != DeliveryMode::StartUp)?;
    let mut id = (entry >> 56) as u16;
    if extended_ids {
        id |= ((entry >> 49 & 0x7f) as u16) << 8;
    }
    Some(Message {
        destination: if entry & 1 << 11 != 0 { Destination::Logical(id) } else { Destination::Physical(id) },
        mode,
        vector: entry as u8,
        trigger: if entry & LEVEL != 0 { TriggerMode::Level } else { TriggerMode::Edge },
    })
}

#[cfg(test)]
mod tests;

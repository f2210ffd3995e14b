//! Interrupt wires: INTA# to INTD# of each slot, led to pins of the I/O APIC that several share.
//!
//! # Theory of operation
//!
//! A pin is up while any of its wires is ([`layout::intx_gsi`] says which those are). Most devices drive their wire as
//! they are, up and down. One that only tells that its interrupt has begun, as VFIO does, is told when the guest has
//! served the pin ([`Served`]); it lowers the wire then and looks whether its device still wants something.
//!
//! Lock order: a function's own state, then `pins`, then the I/O APIC. Nothing is locked while a [`Served`] is called.

use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

use ::pci::msix::IntxLine;

use super::lock;
use crate::apic::{EoiListener, IoApic};
use crate::layout;

/// Pins that wires are led to.
const PINS: usize = layout::INTX_GSIS as usize;

/// Hears that the guest has served an interrupt of the pin that its wire leads to, perhaps another's.
pub(crate) trait Served: Send + Sync {
    /// Called from a vCPU's thread, which should not be kept.
    fn served(&self);
}

/// All wires.
pub(crate) struct Wires {
    io_apic: Arc<IoApic>,
    /// For each pin the wires that are up, one bit each.
    pins: Mutex<[u128; PINS]>,
    listeners: RwLock<Vec<(usize, Weak<dyn Served>)>>,
}

impl Wires {
    /// None is up.
    pub(crate) fn new(io_apic: Arc<IoApic>) -> Arc<Self> {
        let wires = Arc::new(Self { io_apic, pins: Mutex::default(), listeners: RwLock::default() });
        let listener: Arc<dyn EoiListener> = wires.clone();
        wires.io_apic.set_listener(Arc::downgrade(&listener));
        wires
    }

    /// The wire of a slot's pin, INTA# (0) to INTD# (3).
    pub(crate) fn wire(self: &Arc<Self>, slot: usize, pin: u8) -> Wire {
        let gsi = layout::intx_gsi(slot, pin) as usize;
        Wire { wires: Arc::clone(self), gsi, bit: 1 << (slot % super::SLOTS * 4 + usize::from(pin % 4)) }
    }
}

impl EoiListener for Wires {
    fn served(&self, pin: usize) {
        let listeners = self.listeners.read().unwrap_or_else(PoisonError::into_inner);
        let of_pin = listeners.iter().filter(|(gsi, _)| *gsi == pin);
        let of_pin: Vec<_> = of_pin.filter_map(|(_, listener)| listener.upgrade()).collect();
        drop(listeners);
        of_pin.iter().for_each(|listener| listener.served());
    }
}

/// One wire.
#[derive(Clone)]
pub(crate) struct Wire {
    wires: Arc<Wires>,
    gsi: usize,
    bit: u128,
}

impl Wire {
    /// Who is told when the guest has served its pin.
    pub(crate) fn listen(&self, listener: Weak<dyn Served>) {
        self.wires.listeners.write().unwrap_or_else(PoisonError::into_inner).push((self.gsi, listener));
    }
}

impl IntxLine for Wire {
    fn set(&self, level: bool) {
        let mut pins = lock(&self.wires.pins);
        let Some(pin) = pins.get_mut(self.gsi.wrapping_sub(layout::INTX_GSI as usize)) else { return };
        let before = *pin != 0;
        *pin = if level { *pin | self.bit } else { *pin & !self.bit };
        if before != (*pin != 0) {
            self.wires.io_apic.set_irq(self.gsi, !before);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::apic::testing::Rig;

    #[derive(Default)]
    struct Count(AtomicU32);

    impl Served for Count {
        fn served(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn wires_share_pins_and_hear_when_they_are_served() {
        let rig = Rig::new(&[0], false);
        let io_apic = IoApic::new(&rig.bus);
        let wires = Wires::new(Arc::clone(&io_apic));
        // Level, vector 0x41, pin 17.
        io_apic.mmio_write(0, 0x10 + 2 * 17);
        io_apic.mmio_write(0x10, 1 << 15 | 0x41);
        let (one, other, apart) = (wires.wire(1, 0), wires.wire(9, 0), wires.wire(2, 0));
        let heard = Arc::new(Count::default());
        let listener: Arc<dyn Served> = heard.clone();
        one.listen(Arc::downgrade(&listener));
        apart.listen(Arc::downgrade(&listener));
        let local = rig.bus.local(0).unwrap();

        one.set(true);
        other.set(true);
        other.set(true);
        apart.set(true);
        assert_eq!(local.acknowledge(), Some(0x41));
        one.set(false);
        local.eoi();
        assert_eq!(heard.0.load(Ordering::Relaxed), 1, "one of them is on this pin");
        assert_eq!(local.acknowledge(), Some(0x41), "the other is up");
        other.set(false);
        local.eoi();
        assert_eq!(local.acknowledge(), None);
        drop(listener);
        drop(heard);
        one.set(true);
        assert_eq!(local.acknowledge(), Some(0x41));
        one.set(false);
        local.eoi();
        assert_eq!(local.acknowledge(), None);
    }
}

//! Events: the one place where exceptions and interrupts are delivered to the guest.

use crate::fault::{Exec, Fault};
use crate::vcpu::Vcpu;

/// Something to deliver to the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// An exception.
    Fault(Fault),
    /// An external interrupt.
    Interrupt(u8),
    /// A non-maskable interrupt.
    Nmi,
    /// INT n, INT3 or INTO: checked against the gate's DPL.
    Software(u8),
}

impl Vcpu {
    /// Delivers `event` through the IDT (or the real-mode vector table). RIP is where the guest is to
    /// resume: the faulting instruction for a fault, the next one for a trap or interrupt.
    ///
    /// A fault during delivery becomes a double fault, and then
    ///
    /// # Errors
    /// [`crate::Stop::TripleFault`].
    pub fn deliver(&mut self, event: Event) -> Exec {
        let _ = event;
        Err(Box::new(crate::fault::Stop::TripleFault))
    }
}

//! Interrupt controllers: local APICs, the I/O APIC, and the bus of messages between them.
//!
//! # Theory of operation
//!
//! Every interrupt is a *message*: a destination, a delivery mode, a vector and a trigger mode
//! ([`Message`]). Messages come from three places: a device writes an MSI ([`ApicBus::deliver_msi`]),
//! a device drives an I/O APIC pin ([`IoApic::set_irq`]), or a vCPU writes its interrupt command
//! register (through [`LocalApic::mmio_write`] or [`LocalApic::msr_write`]). [`ApicBus`] finds the
//! local APICs that a message names and gives it to them.
//!
//! A fixed or lowest-priority message sets a bit in the IRR of a [`LocalApic`]. If that makes a vector
//! deliverable (its priority class is above the processor priority, SDM vol. 3, 12.8.3), the APIC
//! publishes it in one atomic word and calls [`VcpuSignals::interrupt`]. The vCPU thread then polls
//! [`LocalApic::pending_vector`] (one atomic load) at instruction boundaries, and when the guest can
//! take an interrupt calls [`LocalApic::acknowledge`], which moves the vector from IRR to ISR. The
//! guest's EOI clears the ISR bit; for a level-triggered vector it also goes back over the bus to the
//! I/O APIC, which sends the interrupt anew while the line is still asserted.
//!
//! NMI, INIT and SIPI do not touch the IRR: they go straight to the vCPU through [`VcpuSignals`].
//!
//! Section numbers are those of the Intel SDM since 2024, where the APIC is chapter 12 (10 before 2022).
//!
//! # Timer
//!
//! The timer keeps no thread. It is a deadline: whoever runs the vCPU asks [`LocalApic::next_deadline`]
//! (or is told by [`VcpuSignals::timer_changed`]) how long the vCPU may sleep or run, and calls
//! [`LocalApic::fire_timer_if_due`] then. Reading and writing timer registers accounts for time that
//! has passed, so a late call changes when the interrupt comes, never what the registers say.
//!
//! # Lock order
//!
//! I/O APIC, then one local APIC. No lock of a local APIC is held while another lock is taken or while
//! [`VcpuSignals`] is called; the I/O APIC's lock may be held then. So `VcpuSignals` must not call the
//! I/O APIC. An [`EoiListener`] is called without a lock.

mod bus;
mod io;
mod local;
mod message;
mod msi;
mod registers;
#[cfg(test)]
pub(crate) mod testing;
mod timer;
mod vectors;

pub use bus::{ApicBus, ApicBusConfig, BusCounters, VcpuSignals};
pub use io::{EoiListener, IOAPIC_BASE, IOAPIC_PINS, IOAPIC_SIZE, IoApic};
pub use local::LocalApic;
pub use message::{DeliveryMode, Destination, Message, TriggerMode};
pub use registers::{ApicMode, LAPIC_BASE, LAPIC_SIZE};
pub use timer::TIMER_HZ;

/// IA32_APIC_BASE (SDM vol. 3, 12.4.4).
pub const MSR_APIC_BASE: u32 = 0x1b;
/// IA32_TSC_DEADLINE (SDM vol. 3, 12.5.4.1).
pub const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// First MSR of the x2APIC range (SDM vol. 3, 12.12.1.2).
pub const MSR_X2APIC_FIRST: u32 = 0x800;
/// Last MSR of the x2APIC range.
pub const MSR_X2APIC_LAST: u32 = 0x8ff;

/// Answers a read of any width from the 32-bit register `value` that holds `offset`; bytes past it are zero.
pub(crate) fn read_part(value: u32, offset: u64, data: &mut [u8]) {
    let value = value.to_le_bytes();
    for (n, byte) in data.iter_mut().enumerate() {
        *byte = value.get((offset & 3) as usize + n).copied().unwrap_or(0);
    }
}

/// The access is refused: the guest gets #GP(0).
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("general protection")]
pub struct GeneralProtection;

//! How a guest ends: power-off, reset and panic, and the registers that ask for them.
//!
//! A guest has several ways to say the same thing, and kernels try them in turn. Each ends as one
//! [`PowerEvent`] in one [`PowerSignal`]; the first event stays, because what follows it (a panicking
//! kernel that then reboots) is its consequence. Nothing is torn down here: the signal wakes the
//! machine, which stops its vCPUs when they next leave the guest.
//!
//! | where | what | event |
//! |---|---|---|
//! | sleep control register (ACPI 4.8.3.7) | SLP_EN with SLP_TYP of `_S5` | power-off |
//! | reset register (ACPI 4.8.3.6) | the value in the FADT | reset |
//! | port 0xcf9 | bit 2 goes from 0 to 1 | reset |
//! | port 0x64 | command 0xfe: pulse the reset line | reset |
//! | f000:fff0 | a jump there in real mode, to what on a PC is firmware | reset, by port 0x64 |
//! | pvpanic port | bit 0 | panic |

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::bus::{BusError, PortDevice};
use crate::layout;

/// What ended the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PowerEvent {
    /// The guest turned the machine off.
    PowerOff,
    /// The guest asked for a reset, by this means.
    Reset(ResetBy),
    /// The guest's kernel reported that it panicked (pvpanic).
    Panic,
    /// A vCPU could not deliver a double fault (SDM 3A, 7.15, interrupt 8), which shuts a processor down.
    /// Raised by the vCPU.
    TripleFault,
}

/// The means by which a guest asked for a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ResetBy {
    /// The reset register named in the FADT.
    Acpi,
    /// The keyboard controller's reset line.
    KeyboardController,
    /// The reset control register at port 0xcf9.
    Cf9,
}

impl fmt::Display for PowerEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PowerOff => "power-off",
            Self::Reset(ResetBy::Acpi) => "reset (ACPI reset register)",
            Self::Reset(ResetBy::KeyboardController) => "reset (keyboard controller)",
            Self::Reset(ResetBy::Cf9) => "reset (port 0xcf9)",
            Self::Panic => "kernel panic",
            Self::TripleFault => "triple fault",
        })
    }
}

/// Where a vCPU shut down: what there is to know of a [`PowerEvent::TripleFault`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shutdown {
    /// The vCPU's number.
    pub vcpu: usize,
    /// The vector of the event that could not be delivered; `None` if an instruction shut the vCPU down by itself.
    pub vector: Option<u8>,
    /// CS at that moment.
    pub cs: u16,
    /// RIP: of the instruction that faulted, or the next one.
    pub rip: u64,
}

impl fmt::Display for Shutdown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at RIP {:#x}, CS {:#x}, on vCPU {}", self.rip, self.cs, self.vcpu)?;
        self.vector.map_or(Ok(()), |vector| write!(f, ", delivering vector {vector}"))
    }
}

/// Keeps the first [`PowerEvent`] and tells somebody when it comes.
pub struct PowerSignal {
    event: Mutex<Option<PowerEvent>>,
    wake: Box<dyn Fn(PowerEvent) + Send + Sync>,
}

impl PowerSignal {
    /// A signal that calls `wake` once, with the first event, on the thread that raises it (usually
    /// a vCPU's): `wake` must be short and must not wait for a vCPU.
    pub fn new(wake: impl Fn(PowerEvent) + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self { event: Mutex::new(None), wake: Box::new(wake) })
    }

    fn slot(&self) -> MutexGuard<'_, Option<PowerEvent>> {
        self.event.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reports an event. Any but the first is dropped.
    pub fn raise(&self, event: PowerEvent) {
        let mut slot = self.slot();
        if slot.is_none() {
            *slot = Some(event);
            drop(slot);
            tracing::debug!(%event, "the guest ended");
            (self.wake)(event);
        }
    }

    /// The event, if there was one.
    pub fn event(&self) -> Option<PowerEvent> {
        *self.slot()
    }

    /// Forgets the event: the machine starts again.
    pub fn clear(&self) {
        *self.slot() = None;
    }
}

impl fmt::Debug for PowerSignal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PowerSignal").field(&self.event()).finish()
    }
}

/// SLP_TYP of S5, as `_S5` in the DSDT has it.
pub const SLEEP_TYPE_S5: u8 = 5;
/// Sleep control register: enter the sleep state.
const SLP_EN: u8 = 1 << 5;
/// Sleep control register: place of the sleep type, 3 bits.
const SLP_TYP_SHIFT: u8 = 2;

/// The ACPI sleep and reset registers.
struct AcpiPower(Arc<PowerSignal>);

impl PortDevice for AcpiPower {
    fn read(&self, _offset: u16, data: &mut [u8]) {
        // Sleep control reads as zero by specification; sleep status has no wake event, ever.
        data.fill(0);
    }

    fn write(&self, offset: u16, data: &[u8]) {
        for (register, &value) in (layout::SLEEP_CONTROL_PORT.wrapping_add(offset)..).zip(data) {
            match register {
                layout::SLEEP_CONTROL_PORT
                    if value & SLP_EN != 0 && (value >> SLP_TYP_SHIFT) & 7 == SLEEP_TYPE_S5 =>
                {
                    self.0.raise(PowerEvent::PowerOff);
                }
                layout::RESET_PORT if value == layout::RESET_VALUE => {
                    self.0.raise(PowerEvent::Reset(ResetBy::Acpi));
                }
                _ => {}
            }
        }
    }
}

/// Keyboard controller command: pulse output lines, of which line 0 (low in this value) is reset.
const I8042_PULSE_RESET: u8 = 0xfe;

/// Port 0x64 with no keyboard controller behind it. The status is zero, "nothing to read, ready
/// for a command", so that a kernel about to reset does not wait for the input buffer to drain.
struct ResetLine(Arc<PowerSignal>);

impl PortDevice for ResetLine {
    fn read(&self, _offset: u16, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u16, data: &[u8]) {
        if data.first() == Some(&I8042_PULSE_RESET) {
            self.0.raise(PowerEvent::Reset(ResetBy::KeyboardController));
        }
    }
}

/// `mov al, 0xfe; out 0x64, al`, then `hlt` for good.
const RESET_CODE: [u8; 7] = [0xb0, I8042_PULSE_RESET, 0xe6, 0x64, 0xf4, 0xeb, 0xfd];

/// Puts the code at the reset vector. Linux goes there first when ACPI says that the hardware is reduced and
/// there is no EFI to ask.
///
/// # Errors
/// When that is not in guest memory.
pub fn write_reset_vector(
    memory: &impl Bytes<GuestAddress, E = GuestMemoryError>,
) -> Result<(), GuestMemoryError> {
    memory.write_slice(&RESET_CODE, GuestAddress(layout::REAL_MODE_RESET.0))
}

/// The only event of the pvpanic interface that is offered: the guest has panicked.
const PVPANIC_PANICKED: u8 = 1 << 0;

/// The pvpanic device: reading tells which events it takes, writing reports one.
struct PvPanic(Arc<PowerSignal>);

impl PortDevice for PvPanic {
    fn read(&self, _offset: u16, data: &mut [u8]) {
        data.fill(PVPANIC_PANICKED);
    }

    fn write(&self, _offset: u16, data: &[u8]) {
        if data.first().is_some_and(|v| v & PVPANIC_PANICKED != 0) {
            self.0.raise(PowerEvent::Panic);
        }
    }
}

/// The reset control register, one byte at port 0xcf9, in the middle of PCI's configuration ports
/// (which pass it on).
#[derive(Debug)]
pub struct ResetControl {
    value: Mutex<u8>,
    signal: Arc<PowerSignal>,
}

impl ResetControl {
    /// Reset control: on a 0 to 1 transition, reset.
    const RST_CPU: u8 = 1 << 2;

    /// The register; a reset is raised in `signal`.
    pub fn new(signal: Arc<PowerSignal>) -> Self {
        Self { value: Mutex::new(0), signal }
    }

    fn value(&self) -> MutexGuard<'_, u8> {
        self.value.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads what was written.
    pub fn read(&self) -> u8 {
        *self.value()
    }

    /// Writes it, and resets if bit 2 rises.
    pub fn write(&self, value: u8) {
        let old = std::mem::replace(&mut *self.value(), value);
        if value & !old & Self::RST_CPU != 0 {
            self.signal.raise(PowerEvent::Reset(ResetBy::Cf9));
        }
    }
}

/// Puts the power registers of this module on a bus, at the ports in [`layout`]. Port 0xcf9 comes
/// with PCI, see [`ResetControl`].
///
/// # Errors
/// When one of the ports is taken.
pub fn attach(bus: &mut crate::bus::Bus, signal: &Arc<PowerSignal>) -> Result<(), BusError> {
    bus.add_ports("ACPI power", layout::SLEEP_CONTROL_PORT, 3, Arc::new(AcpiPower(signal.clone())))?;
    bus.add_ports("i8042 reset", layout::I8042_COMMAND_PORT, 1, Arc::new(ResetLine(signal.clone())))?;
    bus.add_ports("pvpanic", layout::PVPANIC_PORT, 1, Arc::new(PvPanic(signal.clone())))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::bus::Bus;

    fn bus() -> (Bus, Arc<PowerSignal>, Arc<AtomicU32>) {
        let woken = Arc::new(AtomicU32::new(0));
        let count = woken.clone();
        let signal = PowerSignal::new(move |_| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        let mut bus = Bus::new();
        attach(&mut bus, &signal).unwrap();
        (bus, signal, woken)
    }

    #[test]
    fn each_way_out_is_told_apart() {
        let ways: [(u16, &[u8], PowerEvent); 5] = [
            (0x600, &[0x34], PowerEvent::PowerOff),
            (0x602, &[1], PowerEvent::Reset(ResetBy::Acpi)),
            (0x600, &[0, 0x80, 1], PowerEvent::Reset(ResetBy::Acpi)),
            (0x64, &[0xfe], PowerEvent::Reset(ResetBy::KeyboardController)),
            (0x505, &[1], PowerEvent::Panic),
        ];
        for (port, bytes, event) in ways {
            let (bus, signal, woken) = bus();
            bus.port_write(port, bytes);
            assert_eq!(signal.event(), Some(event), "port {port:#x}");
            bus.port_write(0x602, &[1]);
            assert_eq!(signal.event(), Some(event), "the first event stays");
            assert_eq!(woken.load(Ordering::Relaxed), 1);
            signal.clear();
            assert_eq!(signal.event(), None);
        }
    }

    #[test]
    fn other_values_do_nothing() {
        let (bus, signal, _) = bus();
        let nothing: [(u16, &[u8]); 8] = [
            (0x600, &[0x14]),
            (0x600, &[0x24]),
            (0x601, &[0x80]),
            (0x602, &[0]),
            (0x64, &[0xd1]),
            (0x64, &[0xaa]),
            (0x505, &[2]),
            (0x505, &[]),
        ];
        for (port, bytes) in nothing {
            bus.port_write(port, bytes);
            assert_eq!(signal.event(), None, "{bytes:x?} to port {port:#x}");
        }
        let mut byte = [0xaa];
        bus.port_read(0x64, &mut byte);
        assert_eq!(byte, [0]);
        bus.port_read(0x505, &mut byte);
        assert_eq!(byte, [1]);
    }

    #[test]
    fn cf9_resets_on_a_rising_bit() {
        let signal = PowerSignal::new(|_| ());
        let register = ResetControl::new(signal.clone());
        register.write(2);
        assert_eq!((register.read(), signal.event()), (2, None));
        register.write(6);
        assert_eq!(signal.event(), Some(PowerEvent::Reset(ResetBy::Cf9)));
        signal.clear();
        register.write(6);
        assert_eq!(signal.event(), None, "no transition");
    }
}

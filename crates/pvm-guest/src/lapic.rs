//! The local APIC: timer, inter-processor interrupts, end of interrupt. By x2APIC's MSRs if CPUID offers them, else by
//! its page (Intel SDM vol. 3, 12). Both by plain instructions, which PVM traps and emulates.

use core::sync::atomic::{AtomicBool, Ordering};

use crate::insn;
use crate::memory::{self, Physical};

const APIC_BASE: u32 = 0x1b;
const X2APIC_ENABLE: u64 = 1 << 10;
const X2APIC_FIRST: u32 = 0x800;
const PAGE: Physical = Physical(0xfee0_0000);

/// Registers, by their number in x2APIC mode: the offset in the page divided by 16.
mod register {
    pub(super) const ID: u32 = 0x2;
    pub(super) const TASK_PRIORITY: u32 = 0x8;
    pub(super) const EOI: u32 = 0xb;
    pub(super) const SPURIOUS: u32 = 0xf;
    pub(super) const COMMAND: u32 = 0x30;
    pub(super) const COMMAND_HIGH: u32 = 0x31;
    pub(super) const TIMER: u32 = 0x32;
    pub(super) const INITIAL_COUNT: u32 = 0x38;
    pub(super) const DIVIDE: u32 = 0x3e;
}

/// Interrupt commands: delivery mode and level (Intel SDM vol. 3, 12.6.1).
pub mod command {
    /// A fixed interrupt; the vector is to be added.
    pub const FIXED: u32 = 0x4000;
    /// An NMI.
    pub const NMI: u32 = 0x4400;
    /// INIT.
    pub const INIT: u32 = 0x4500;
    /// Start-up; the page number is to be added.
    pub const STARTUP: u32 = 0x4600;
}

const ENABLED: u32 = 1 << 8;
const SPURIOUS_VECTOR: u32 = 0xff;
const MASKED: u32 = 1 << 16;
const DIVIDE_BY_1: u32 = 0xb;

static X2: AtomicBool = AtomicBool::new(false);

fn read(register: u32) -> u32 {
    if X2.load(Ordering::Relaxed) {
        insn::read_msr(X2APIC_FIRST + register) as u32
    } else {
        memory::read(Physical(PAGE.0 + u64::from(register) * 16))
    }
}

fn write(register: u32, value: u32) {
    if X2.load(Ordering::Relaxed) {
        insn::write_msr(X2APIC_FIRST + register, value.into());
    } else {
        // SAFETY: a device's register, not memory.
        unsafe { memory::write(Physical(PAGE.0 + u64::from(register) * 16), value) };
    }
}

/// Turns this processor's local APIC on.
pub fn set_up() {
    let x2 = insn::synthetic_cpuid(1, 0).ecx & 1 << 21 != 0;
    X2.store(x2, Ordering::Relaxed);
    if x2 {
        insn::write_msr(APIC_BASE, insn::read_msr(APIC_BASE) | X2APIC_ENABLE);
    }
    write(register::SPURIOUS, ENABLED | SPURIOUS_VECTOR);
    write(register::TASK_PRIORITY, 0);
    write(register::TIMER, MASKED);
    write(register::DIVIDE, DIVIDE_BY_1);
}

/// This processor's identifier.
pub fn id() -> u32 {
    let id = read(register::ID);
    if X2.load(Ordering::Relaxed) { id } else { id >> 24 }
}

/// The handler has done with an interrupt.
pub fn end_of_interrupt() {
    write(register::EOI, 0);
}

/// Sends an interrupt to the processor with this identifier.
pub fn send(to: u32, command: u32) {
    if X2.load(Ordering::Relaxed) {
        insn::write_msr(X2APIC_FIRST + register::COMMAND, u64::from(to) << 32 | u64::from(command));
    } else {
        write(register::COMMAND_HIGH, to << 24);
        write(register::COMMAND, command);
    }
}

/// Has the timer raise `vector` once, `count` ticks from now.
pub fn timer_once(vector: u8, count: u32) {
    write(register::TIMER, vector.into());
    write(register::INITIAL_COUNT, count);
}

/// Stops the timer.
pub fn timer_off() {
    write(register::TIMER, MASKED);
    write(register::INITIAL_COUNT, 0);
}

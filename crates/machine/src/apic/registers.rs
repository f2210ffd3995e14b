//! The registers of one local APIC (SDM vol. 3, chapter 12): a plain state machine without lock or
//! thread. Accesses go in, at most one [`Effect`] comes out.
//!
//! xAPIC and x2APIC show the same registers: an x2APIC MSR is 0x800 plus the xAPIC offset over 16.
//! That number, [`reg`], is how registers are named here; the two front ends differ in which exist and
//! in what a bad access does (ESR against #GP).

use super::message::{DeliveryMode, TriggerMode};
use super::timer::{Expiry, Timer, TimerMode};
use super::vectors::VectorSet;
use super::{GeneralProtection, MSR_X2APIC_FIRST};
use crate::clock::{Now, TscAdjust};

/// Where the xAPIC register page is after reset.
pub const LAPIC_BASE: u64 = 0xfee0_0000;
/// Size of the xAPIC register page in bytes.
pub const LAPIC_SIZE: u64 = 0x1000;

/// Integrated APIC, LVT entries 0 to 5, EOI-broadcast suppression (SDM vol. 3, 12.4.8).
const VERSION: u32 = 0x14 | 5 << 16 | 1 << 24;

/// Register numbers: xAPIC offset over 16, or x2APIC MSR less 0x800.
pub(crate) mod reg {
    pub(crate) const ID: u32 = 0x02;
    pub(crate) const VERSION: u32 = 0x03;
    pub(crate) const TPR: u32 = 0x08;
    pub(crate) const APR: u32 = 0x09;
    pub(crate) const PPR: u32 = 0x0a;
    pub(crate) const EOI: u32 = 0x0b;
    pub(crate) const RRD: u32 = 0x0c;
    pub(crate) const LDR: u32 = 0x0d;
    pub(crate) const DFR: u32 = 0x0e;
    pub(crate) const SVR: u32 = 0x0f;
    pub(crate) const ISR: u32 = 0x10;
    pub(crate) const ISR_END: u32 = 0x17;
    pub(crate) const TMR: u32 = 0x18;
    pub(crate) const TMR_END: u32 = 0x1f;
    pub(crate) const IRR: u32 = 0x20;
    pub(crate) const IRR_END: u32 = 0x27;
    pub(crate) const ESR: u32 = 0x28;
    pub(crate) const ICR: u32 = 0x30;
    pub(crate) const ICR_HIGH: u32 = 0x31;
    pub(crate) const LVT_TIMER: u32 = 0x32;
    pub(crate) const LVT_ERROR: u32 = 0x37;
    pub(crate) const INITIAL_COUNT: u32 = 0x38;
    pub(crate) const CURRENT_COUNT: u32 = 0x39;
    pub(crate) const DIVIDE: u32 = 0x3e;
    pub(crate) const SELF_IPI: u32 = 0x3f;
}

const SVR_ENABLE: u32 = 1 << 8;
const SVR_FOCUS_OFF: u32 = 1 << 9;
const SVR_NO_EOI_BROADCAST: u32 = 1 << 12;
const SVR_BITS: u32 = 0xff | SVR_ENABLE | SVR_FOCUS_OFF | SVR_NO_EOI_BROADCAST;

const LVT_MASKED: u32 = 1 << 16;
/// Delivery status and remote IRR: read-only, always 0 here.
const LVT_READ_ONLY: u32 = 1 << 12 | 1 << 14;

/// Bits that software may set per LVT entry (SDM vol. 3, figure 12-8): timer, thermal, performance,
/// LINT0, LINT1, error. Others are reserved.
const LVT_BITS: [u32; 6] = [0x7_00ff, 0x1_07ff, 0x1_07ff, 0x1_a7ff, 0x1_a7ff, 0x1_00ff];

/// ICR: delivery status, read-only.
const ICR_BUSY: u64 = 1 << 12;
/// ICR bits that software may set in its low half.
const ICR_LOW_BITS: u64 = 0x000c_cfff;

const ESR_SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
const ESR_RECEIVE_ILLEGAL_VECTOR: u32 = 1 << 6;
const ESR_ILLEGAL_REGISTER: u32 = 1 << 7;

const BASE_BSP: u64 = 1 << 8;
const BASE_X2APIC: u64 = 1 << 10;
const BASE_ENABLE: u64 = 1 << 11;

/// IA32_APIC_BASE bits 11:10 (SDM vol. 3, table 12-5).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ApicMode {
    /// Globally disabled: no registers, no messages.
    Disabled,
    /// Registers in memory, 8-bit ids.
    XApic,
    /// Registers as MSRs, 32-bit ids.
    X2Apic,
}

/// What an access asks of the world outside.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub(crate) enum Effect {
    None,
    /// EOI of a level-triggered vector, to the I/O APICs.
    BroadcastEoi(u8),
    /// The command in the ICR is to be sent.
    SendIpi(u64),
}

/// A pin of the local APIC with an LVT entry other than timer and error; the value is its LVT index.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum LocalPin {
    Lint0 = 3,
    Lint1 = 4,
}

/// What senders need to know to match a destination; published without a lock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Identity {
    pub(crate) mode: ApicMode,
    /// Software-enabled: takes fixed interrupts.
    pub(crate) enabled: bool,
    /// xAPIC: DFR says cluster model.
    pub(crate) cluster: bool,
    /// xAPIC: 8-bit logical id. x2APIC: the 32-bit LDR.
    pub(crate) logical: u32,
}

impl Identity {
    /// Packs into the word that [`Identity::unpack`] takes apart.
    pub(crate) fn pack(self) -> u64 {
        let mode = match self.mode {
            ApicMode::Disabled => 0,
            ApicMode::XApic => 1,
            ApicMode::X2Apic => 2,
        };
        u64::from(self.logical) | mode << 32 | u64::from(self.enabled) << 34 | u64::from(self.cluster) << 35
    }

    pub(crate) fn unpack(word: u64) -> Self {
        Self {
            mode: match word >> 32 & 3 {
                0 => ApicMode::Disabled,
                1 => ApicMode::XApic,
                _ => ApicMode::X2Apic,
            },
            enabled: word & 1 << 34 != 0,
            cluster: word & 1 << 35 != 0,
            logical: word as u32,
        }
    }
}

pub(crate) struct Registers {
    /// x2APIC id; the xAPIC id is its low byte.
    id: u32,
    /// IA32_APIC_BASE.
    base: u64,
    /// Bits of IA32_APIC_BASE that may be set.
    base_bits: u64,
    tpr: u8,
    irr: VectorSet,
    isr: VectorSet,
    tmr: VectorSet,
    svr: u32,
    ldr: u32,
    dfr: u32,
    lvt: [u32; 6],
    /// What a read of ESR yields.
    esr: u32,
    /// Errors since the last write to ESR.
    errors: u32,
    icr: u64,
    timer: Timer,
    pub(crate) tsc_adjust: TscAdjust,
}

impl Registers {
    /// State after RESET (SDM vol. 3, 12.4.7.1). `physical_bits`: MAXPHYADDR.
    pub(crate) fn new(id: u32, bsp: bool, physical_bits: u8) -> Self {
        let addresses = 1u64.checked_shl(physical_bits.into()).map_or(u64::MAX, |limit| limit - 1);
        let mut registers = Self {
            id,
            base: LAPIC_BASE | BASE_ENABLE | if bsp { BASE_BSP } else { 0 },
            base_bits: (addresses & !0xfff) | BASE_ENABLE | BASE_X2APIC | BASE_BSP,
            tpr: 0,
            irr: VectorSet::default(),
            isr: VectorSet::default(),
            tmr: VectorSet::default(),
            svr: 0,
            ldr: 0,
            dfr: 0,
            lvt: [0; 6],
            esr: 0,
            errors: 0,
            icr: 0,
            timer: Timer::new(),
            tsc_adjust: TscAdjust::default(),
        };
        registers.init();
        registers
    }

    /// RESET: as new, back in xAPIC mode.
    pub(crate) fn reset(&mut self) {
        self.base = LAPIC_BASE | BASE_ENABLE | (self.base & BASE_BSP);
        self.tsc_adjust = TscAdjust::default();
        self.init();
    }

    /// INIT: all but the id and IA32_APIC_BASE, so also the mode, is as after reset
    /// (SDM vol. 3, 12.4.7.3 and 12.12.5.1).
    pub(crate) fn init(&mut self) {
        self.tpr = 0;
        self.irr = VectorSet::default();
        self.isr = VectorSet::default();
        self.tmr = VectorSet::default();
        self.svr = 0xff;
        self.ldr = 0;
        self.dfr = u32::MAX;
        self.lvt = [LVT_MASKED; 6];
        self.esr = 0;
        self.errors = 0;
        self.icr = 0;
        self.timer = Timer::new();
    }

    pub(crate) fn mode(&self) -> ApicMode {
        match (self.base & BASE_ENABLE != 0, self.base & BASE_X2APIC != 0) {
            (false, _) => ApicMode::Disabled,
            (true, false) => ApicMode::XApic,
            (true, true) => ApicMode::X2Apic,
        }
    }

    pub(crate) fn base(&self) -> u64 {
        self.base
    }

    /// WRMSR to IA32_APIC_BASE: reserved bits and the transitions of SDM vol. 3, figure 12-27.
    pub(crate) fn set_base(&mut self, value: u64) -> Result<(), GeneralProtection> {
        let enable = value & BASE_ENABLE != 0;
        let x2apic = value & BASE_X2APIC != 0;
        let legal = match self.mode() {
            _ if value & !self.base_bits != 0 => false,
            ApicMode::Disabled => !x2apic,
            ApicMode::XApic => enable || !x2apic,
            ApicMode::X2Apic => enable == x2apic,
        };
        if !legal {
            return Err(GeneralProtection);
        }
        let before = self.mode();
        self.base = value;
        match (before, self.mode()) {
            (ApicMode::XApic | ApicMode::X2Apic, ApicMode::Disabled) => self.init(),
            // The upper half of the ICR has no meaning in common.
            (ApicMode::XApic, ApicMode::X2Apic) => self.icr &= ICR_LOW_BITS,
            _ => {}
        }
        Ok(())
    }

    fn software_enabled(&self) -> bool {
        self.mode() != ApicMode::Disabled && self.svr & SVR_ENABLE != 0
    }

    /// SDM vol. 3, 12.12.10.2.
    fn logical_x2apic_id(&self) -> u32 {
        (self.id >> 4) << 16 | 1 << (self.id & 15)
    }

    pub(crate) fn identity(&self) -> Identity {
        Identity {
            mode: self.mode(),
            enabled: self.software_enabled(),
            cluster: self.dfr >> 28 == 0,
            logical: match self.mode() {
                ApicMode::X2Apic => self.logical_x2apic_id(),
                _ => self.ldr >> 24,
            },
        }
    }

    // Priorities.

    pub(crate) fn tpr(&self) -> u8 {
        self.tpr
    }

    pub(crate) fn set_tpr(&mut self, tpr: u8) {
        self.tpr = tpr;
    }

    /// Processor priority (SDM vol. 3, 12.8.3.1).
    pub(crate) fn ppr(&self) -> u8 {
        let in_service = self.isr.highest().unwrap_or(0) & 0xf0;
        if self.tpr & 0xf0 >= in_service { self.tpr } else { in_service }
    }

    /// The vector to deliver now, if one is above the processor priority.
    pub(crate) fn deliverable(&self) -> Option<u8> {
        self.irr.highest().filter(|&v| v & 0xf0 > self.ppr() & 0xf0)
    }

    /// IRR to ISR: the processor takes the interrupt.
    pub(crate) fn acknowledge(&mut self) -> Option<u8> {
        let vector = self.deliverable()?;
        self.irr.remove(vector);
        self.isr.insert(vector);
        Some(vector)
    }

    /// Ends the interrupt in service of highest priority.
    pub(crate) fn eoi(&mut self) -> Effect {
        let Some(vector) = self.isr.highest() else { return Effect::None };
        self.isr.remove(vector);
        if self.tmr.contains(vector) && self.svr & SVR_NO_EOI_BROADCAST == 0 {
            Effect::BroadcastEoi(vector)
        } else {
            Effect::None
        }
    }

    /// Takes a fixed interrupt. False if the APIC does not take it: disabled, or no legal vector.
    pub(crate) fn accept(&mut self, vector: u8, trigger: TriggerMode) -> bool {
        if !self.software_enabled() {
            return false;
        }
        if vector < 16 {
            self.error(ESR_RECEIVE_ILLEGAL_VECTOR);
            return false;
        }
        self.irr.insert(vector);
        self.tmr.set(vector, trigger == TriggerMode::Level);
        true
    }

    // Local sources.

    /// Logs an error; the first since ESR was written raises the error interrupt (SDM vol. 3, 12.5.3).
    fn error(&mut self, bit: u32) {
        let armed = self.errors == 0;
        self.errors |= bit;
        if armed {
            self.raise_lvt(reg::LVT_ERROR);
        }
    }

    fn raise_lvt(&mut self, register: u32) {
        let entry = self.lvt.get((register - reg::LVT_TIMER) as usize).copied().unwrap_or(LVT_MASKED);
        if entry & LVT_MASKED == 0 {
            self.accept(entry as u8, TriggerMode::Edge);
        }
    }

    /// A pulse on LINT0 or LINT1. Fixed goes to the IRR; the mode is returned for the caller to act on
    /// others.
    pub(crate) fn pulse(&mut self, pin: LocalPin) -> Option<DeliveryMode> {
        let entry = self.lvt[pin as usize];
        if entry & LVT_MASKED != 0 || self.mode() == ApicMode::Disabled {
            return None;
        }
        let mode = DeliveryMode::from_bits(entry >> 8)?;
        if mode == DeliveryMode::Fixed {
            self.accept(entry as u8, TriggerMode::Edge);
        }
        Some(mode)
    }

    /// Brings the timer up to `now`, with the interrupt of an expiry. Every access comes through here
    /// first, so that it sees mask and mode as they were when the timer expired.
    pub(crate) fn advance(&mut self, now: Now) {
        if self.timer.advance(now, self.tsc_adjust.tsc(now.tsc)) {
            self.raise_lvt(reg::LVT_TIMER);
        }
    }

    /// The next expiry that would interrupt.
    pub(crate) fn next_expiry(&self) -> Option<Expiry> {
        if self.lvt[0] & LVT_MASKED != 0 { None } else { self.timer.expiry() }
    }

    pub(crate) fn tsc_deadline(&self) -> u64 {
        self.timer.tsc_deadline()
    }

    pub(crate) fn set_tsc_deadline(&mut self, tsc: u64, now: Now) {
        self.timer.set_tsc_deadline(tsc);
        self.advance(now);
    }

    // Register access.

    /// A register that both modes have, or `None`.
    fn read_common(&self, register: u32, now: Now) -> Option<u32> {
        Some(match register {
            reg::VERSION => VERSION,
            reg::TPR => self.tpr.into(),
            reg::PPR => self.ppr().into(),
            reg::SVR => self.svr,
            reg::ISR..=reg::ISR_END => self.isr.bank(register - reg::ISR),
            reg::TMR..=reg::TMR_END => self.tmr.bank(register - reg::TMR),
            reg::IRR..=reg::IRR_END => self.irr.bank(register - reg::IRR),
            reg::ESR => self.esr,
            reg::LVT_TIMER..=reg::LVT_ERROR => *self.lvt.get((register - reg::LVT_TIMER) as usize)?,
            reg::INITIAL_COUNT => self.timer.initial_count(),
            reg::CURRENT_COUNT => self.timer.current_count(now),
            reg::DIVIDE => self.timer.divide_config(),
            _ => return None,
        })
    }

    /// Bits that software may set in a writable register that both modes have; `None`: no such.
    fn writable_bits(register: u32) -> Option<u32> {
        Some(match register {
            reg::TPR => 0xff,
            reg::SVR => SVR_BITS,
            reg::LVT_TIMER..=reg::LVT_ERROR => *LVT_BITS.get((register - reg::LVT_TIMER) as usize)?,
            reg::INITIAL_COUNT => u32::MAX,
            reg::DIVIDE => 0b1011,
            // Writing ESR changes no bits of the writer's choice.
            reg::ESR | reg::EOI => 0,
            _ => return None,
        })
    }

    /// Writes a register that both modes have; reserved bits of `value` are dropped.
    fn write_common(&mut self, register: u32, value: u32, now: Now) -> Effect {
        let Some(bits) = Self::writable_bits(register) else { return Effect::None };
        let value = value & bits;
        match register {
            reg::TPR => self.tpr = value as u8,
            reg::EOI => return self.eoi(),
            reg::SVR => {
                self.svr = value;
                if value & SVR_ENABLE == 0 {
                    self.lvt.iter_mut().for_each(|entry| *entry |= LVT_MASKED);
                }
            }
            reg::ESR => self.esr = std::mem::take(&mut self.errors),
            reg::LVT_TIMER..=reg::LVT_ERROR => {
                let masked = if self.software_enabled() { 0 } else { LVT_MASKED };
                if let Some(entry) = self.lvt.get_mut((register - reg::LVT_TIMER) as usize) {
                    *entry = value | masked;
                }
                if register == reg::LVT_TIMER {
                    self.timer.set_mode(TimerMode::from_lvt(value));
                }
            }
            reg::INITIAL_COUNT => self.timer.set_initial_count(value, now),
            reg::DIVIDE => self.timer.set_divide_config(value, now),
            _ => {}
        }
        Effect::None
    }

    /// Checks the command in the ICR and hands it out (SDM vol. 3, 12.6.1).
    fn command(&mut self) -> Effect {
        let mode = DeliveryMode::from_bits((self.icr >> 8) as u32);
        if self.icr & 0xff < 16 && mode.is_some_and(DeliveryMode::has_vector) {
            self.error(ESR_SEND_ILLEGAL_VECTOR);
            return Effect::None;
        }
        Effect::SendIpi(self.icr)
    }

    /// Reads 32 bits at `offset` in the xAPIC page. Reads as 0 outside xAPIC mode and off the 16-byte
    /// steps.
    pub(crate) fn mmio_read(&mut self, offset: u64, now: Now) -> u32 {
        self.advance(now);
        let Some(register) = self.xapic_register(offset) else { return 0 };
        match register {
            reg::ID => self.id << 24,
            reg::LDR => self.ldr,
            reg::DFR => self.dfr,
            reg::ICR => self.icr as u32,
            reg::ICR_HIGH => (self.icr >> 32) as u32,
            // Write-only, or there only on old processors.
            reg::EOI | reg::APR | reg::RRD => 0,
            _ => self.read_common(register, now).unwrap_or_else(|| {
                self.error(ESR_ILLEGAL_REGISTER);
                0
            }),
        }
    }

    /// Writes 32 bits at `offset` in the xAPIC page. Reserved bits and read-only registers keep what
    /// they hold.
    pub(crate) fn mmio_write(&mut self, offset: u64, value: u32, now: Now) -> Effect {
        self.advance(now);
        let Some(register) = self.xapic_register(offset) else { return Effect::None };
        let effect = match register {
            reg::LDR => {
                self.ldr = value & 0xff00_0000;
                Effect::None
            }
            reg::DFR => {
                self.dfr = value | 0x0fff_ffff;
                Effect::None
            }
            reg::ICR => {
                self.icr = self.icr & !0xffff_ffff | u64::from(value) & ICR_LOW_BITS;
                self.command()
            }
            reg::ICR_HIGH => {
                self.icr = self.icr & 0xffff_ffff | u64::from(value & 0xff00_0000) << 32;
                Effect::None
            }
            reg::ID | reg::APR | reg::RRD => Effect::None,
            _ if Self::writable_bits(register).is_some() => self.write_common(register, value, now),
            _ => {
                if self.read_common(register, now).is_none() {
                    self.error(ESR_ILLEGAL_REGISTER);
                }
                Effect::None
            }
        };
        // A count so short that it has already run out.
        self.advance(now);
        effect
    }

    fn xapic_register(&self, offset: u64) -> Option<u32> {
        let aligned = offset.is_multiple_of(16) && offset < LAPIC_SIZE;
        if aligned && self.mode() == ApicMode::XApic { u32::try_from(offset / 16).ok() } else { None }
    }

    /// RDMSR in the x2APIC range (SDM vol. 3, table 12-6).
    pub(crate) fn msr_read(&mut self, index: u32, now: Now) -> Result<u64, GeneralProtection> {
        self.advance(now);
        match self.x2apic_register(index)? {
            reg::ID => Ok(self.id.into()),
            reg::LDR => Ok(self.logical_x2apic_id().into()),
            reg::ICR => Ok(self.icr),
            register => self.read_common(register, now).map(u64::from).ok_or(GeneralProtection),
        }
    }

    /// WRMSR in the x2APIC range. Read-only registers and reserved bits are #GP.
    pub(crate) fn msr_write(
        &mut self,
        index: u32,
        value: u64,
        now: Now,
    ) -> Result<Effect, GeneralProtection> {
        self.advance(now);
        let register = self.x2apic_register(index)?;
        if register == reg::ICR {
            if value & 0xffff_ffff & !ICR_LOW_BITS & !ICR_BUSY != 0 {
                return Err(GeneralProtection);
            }
            self.icr = value & !ICR_BUSY;
            return Ok(self.command());
        }
        let value = u32::try_from(value).map_err(|_| GeneralProtection)?;
        if register == reg::SELF_IPI {
            let vector = u8::try_from(value).map_err(|_| GeneralProtection)?;
            if vector < 16 {
                self.error(ESR_SEND_ILLEGAL_VECTOR);
            } else {
                self.accept(vector, TriggerMode::Edge);
            }
            return Ok(Effect::None);
        }
        let mut allowed = Self::writable_bits(register).ok_or(GeneralProtection)?;
        if (reg::LVT_TIMER..=reg::LVT_ERROR).contains(&register) {
            allowed |= LVT_READ_ONLY;
        }
        if value & !allowed != 0 {
            return Err(GeneralProtection);
        }
        let effect = self.write_common(register, value, now);
        self.advance(now);
        Ok(effect)
    }

    fn x2apic_register(&self, index: u32) -> Result<u32, GeneralProtection> {
        match index.checked_sub(MSR_X2APIC_FIRST) {
            Some(register) if self.mode() == ApicMode::X2Apic => Ok(register),
            _ => Err(GeneralProtection),
        }
    }
}

#[cfg(test)]
mod tests;

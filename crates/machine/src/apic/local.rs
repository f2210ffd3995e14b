//! A local APIC as the threads of the machine share it: [`Registers`] behind one lock, and what others
//! poll published in atomic words.

use super::bus::{ApicBus, VcpuSignals};
use super::message::{DeliveryMode, TriggerMode};
use super::registers::{ApicMode, Effect, Identity, LocalPin, Registers};
use super::timer::Expiry;
use super::{GeneralProtection, MSR_APIC_BASE, MSR_TSC_DEADLINE};
use crate::clock::{Clock, HostDeadline, Now, TscAdjust};
use mmu::Gpa;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// The timer will not expire.
const NEVER: u64 = u64::MAX;
/// The registers are not in memory.
const NOWHERE: u64 = u64::MAX;

/// The local APIC of one vCPU.
///
/// Register accesses come from the vCPU's own thread; [`LocalApic::inject`] and the polling methods from
/// any. All methods may be called from any thread.
pub struct LocalApic {
    vcpu: usize,
    id: u32,
    clock: Arc<Clock>,
    signals: Arc<dyn VcpuSignals>,
    bus: Weak<ApicBus>,
    registers: Mutex<Registers>,
    /// Bits 7:0: deliverable vector, or 0; bits 15:8: processor priority. Written under the lock.
    priority: AtomicU32,
    /// [`Identity`], packed. Written under the lock.
    identity: AtomicU64,
    /// Where the xAPIC registers are in memory, or [`NOWHERE`]. Written under the lock.
    mmio_base: AtomicU64,
    /// Base ticks at which the timer interrupts. Written under the lock.
    timer_tsc: AtomicU64,
}

impl LocalApic {
    /// An APIC after RESET. `physical_bits` is MAXPHYADDR.
    pub(crate) fn new(
        vcpu: usize,
        id: u32,
        physical_bits: u8,
        clock: Arc<Clock>,
        signals: Arc<dyn VcpuSignals>,
        bus: Weak<ApicBus>,
    ) -> Self {
        let registers = Registers::new(id, vcpu == 0, physical_bits);
        Self {
            vcpu,
            id,
            clock,
            signals,
            bus,
            priority: AtomicU32::new(0),
            identity: AtomicU64::new(registers.identity().pack()),
            mmio_base: AtomicU64::new(mmio_base(&registers)),
            timer_tsc: AtomicU64::new(NEVER),
            registers: Mutex::new(registers),
        }
    }

    /// The vCPU that this APIC belongs to.
    pub fn vcpu(&self) -> usize {
        self.vcpu
    }

    /// The x2APIC id; CPUID and the MADT must say the same.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Runs `f` on the registers, publishes what changed, and tells the vCPU what it must know.
    fn with<R>(&self, f: impl FnOnce(&mut Registers, Now) -> R) -> R {
        // A panic in another thread leaves registers that are odd at worst, never unsound.
        let mut registers = self.registers.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.clock.now();
        let result = f(&mut registers, now);

        let vector = registers.deliverable().unwrap_or(0);
        let priority = u32::from(vector) | u32::from(registers.ppr()) << 8;
        let before = self.priority.swap(priority, Ordering::AcqRel);
        self.identity.store(registers.identity().pack(), Ordering::Release);
        self.mmio_base.store(mmio_base(&registers), Ordering::Release);
        let timer = self.timer_ticks(&registers, now);
        let timer_before = self.timer_tsc.swap(timer, Ordering::AcqRel);
        drop(registers);

        if vector != 0 && before as u8 != vector {
            self.signals.interrupt(self.vcpu);
        }
        if timer != timer_before {
            self.signals.timer_changed(self.vcpu, self.deadline_of(timer));
        }
        result
    }

    fn timer_ticks(&self, registers: &Registers, now: Now) -> u64 {
        match registers.next_expiry() {
            None => NEVER,
            Some(Expiry::Ns(at)) => self.clock.ns_to_tsc(at),
            // Its distance from now is the same on either counter.
            Some(Expiry::Tsc(at)) => match at.checked_sub(registers.tsc_adjust.tsc(now.tsc)) {
                Some(left) => now.tsc.saturating_add(left),
                None => 0,
            },
        }
    }

    fn deadline_of(&self, tsc: u64) -> Option<HostDeadline> {
        (tsc != NEVER).then(|| self.clock.host_deadline(tsc))
    }

    fn act(&self, effect: Effect) {
        let (Some(bus), false) = (self.bus.upgrade(), effect == Effect::None) else { return };
        match effect {
            Effect::None => {}
            Effect::BroadcastEoi(vector) => bus.broadcast_eoi(vector),
            Effect::SendIpi(icr) => bus.send_ipi(self, icr),
        }
    }

    // Polling: no lock.

    /// The vector to deliver now, if one is above the processor priority: one atomic load.
    #[inline]
    pub fn pending_vector(&self) -> Option<u8> {
        let vector = self.priority.load(Ordering::Acquire) as u8;
        (vector != 0).then_some(vector)
    }

    /// The processor priority (SDM vol. 3, 12.8.3.1), as of the last change.
    pub(crate) fn processor_priority(&self) -> u8 {
        (self.priority.load(Ordering::Acquire) >> 8) as u8
    }

    pub(crate) fn identity(&self) -> Identity {
        Identity::unpack(self.identity.load(Ordering::Acquire))
    }

    /// Disabled, xAPIC or x2APIC. CPUID leaf 1 clears bit 9 (APIC) of EDX while disabled.
    pub fn mode(&self) -> ApicMode {
        self.identity().mode
    }

    /// Base ticks ([`Clock::now_tsc`]) at which the timer interrupts; `u64::MAX` for never: one atomic
    /// load, for a loop that reads the TSC anyway.
    #[inline]
    pub fn timer_tsc(&self) -> u64 {
        self.timer_tsc.load(Ordering::Acquire)
    }

    /// The host time by which [`LocalApic::fire_timer_if_due`] must be called: how long a halted vCPU may
    /// sleep.
    pub fn next_deadline(&self) -> Option<HostDeadline> {
        self.deadline_of(self.timer_tsc())
    }

    // What the vCPU does.

    /// Raises the timer interrupt if its time has come. Cheap, with no lock taken, if it has not. False:
    /// not due (ask [`LocalApic::next_deadline`] again).
    pub fn fire_timer_if_due(&self) -> bool {
        let due = self.clock.now_tsc() >= self.timer_tsc() && self.timer_tsc() != NEVER;
        if due {
            self.with(|registers, now| registers.advance(now));
        }
        due
    }

    /// The processor takes the interrupt: its vector goes from IRR to ISR. `None` if none is deliverable
    /// any more: there is nothing to inject then.
    pub fn acknowledge(&self) -> Option<u8> {
        self.with(|registers, _| registers.acknowledge())
    }

    /// Ends the interrupt in service, as a write to the EOI register does.
    pub fn eoi(&self) {
        let effect = self.with(|registers, _| registers.eoi());
        self.act(effect);
    }

    /// CR8: the upper half of TPR (SDM vol. 3, 12.8.6.1).
    pub fn cr8(&self) -> u64 {
        self.with(|registers, _| u64::from(registers.tpr() >> 4))
    }

    /// MOV to CR8; bits 63:4 set are #GP.
    pub fn set_cr8(&self, value: u64) -> Result<(), GeneralProtection> {
        let class = u8::try_from(value).ok().filter(|&class| class < 16).ok_or(GeneralProtection)?;
        self.with(|registers, _| registers.set_tpr(class << 4));
        Ok(())
    }

    /// IA32_TSC_ADJUST as the TSC deadline sees it.
    pub fn tsc_adjust(&self) -> TscAdjust {
        self.with(|registers, _| registers.tsc_adjust)
    }

    /// Follows a change of the vCPU's IA32_TSC or IA32_TSC_ADJUST: a TSC deadline moves with it.
    pub fn set_tsc_adjust(&self, adjust: TscAdjust) {
        self.with(|registers, now| {
            registers.tsc_adjust = adjust;
            registers.advance(now);
        });
    }

    /// RESET of the processor.
    pub fn reset(&self) {
        self.with(|registers, _| registers.reset());
    }

    /// The vCPU takes INIT ([`VcpuSignals::init`]): all but id and IA32_APIC_BASE go to their reset state.
    pub fn init(&self) {
        self.with(|registers, _| registers.init());
    }

    // Register access.

    /// Where the xAPIC registers are in memory, of [`super::LAPIC_SIZE`] bytes: only in xAPIC mode. One atomic
    /// load: each MMIO access of the vCPU asks.
    #[inline]
    pub fn mmio_base(&self) -> Option<Gpa> {
        let base = self.mmio_base.load(Ordering::Acquire);
        (base != NOWHERE).then_some(Gpa(base))
    }

    /// Reads 32 bits at `offset` in the register page. 0 off the 16-byte steps or not in xAPIC mode.
    pub fn mmio_read(&self, offset: u64) -> u32 {
        self.with(|registers, now| registers.mmio_read(offset, now))
    }

    /// Writes 32 bits at `offset` in the register page. Ignored off the 16-byte steps or not in xAPIC mode.
    pub fn mmio_write(&self, offset: u64, value: u32) {
        let effect = self.with(|registers, now| registers.mmio_write(offset, value, now));
        self.act(effect);
    }

    /// RDMSR of IA32_APIC_BASE, IA32_TSC_DEADLINE and the x2APIC range 0x800 to 0x8ff.
    pub fn msr_read(&self, index: u32) -> Result<u64, GeneralProtection> {
        self.with(|registers, now| match index {
            MSR_APIC_BASE => Ok(registers.base()),
            MSR_TSC_DEADLINE => {
                registers.advance(now);
                Ok(registers.tsc_deadline())
            }
            _ => registers.msr_read(index, now),
        })
    }

    /// WRMSR of the same.
    pub fn msr_write(&self, index: u32, value: u64) -> Result<(), GeneralProtection> {
        let effect = self.with(|registers, now| {
            registers.advance(now);
            match index {
                MSR_APIC_BASE => registers.set_base(value).map(|()| Effect::None),
                MSR_TSC_DEADLINE => {
                    registers.set_tsc_deadline(value, now);
                    Ok(Effect::None)
                }
                _ => registers.msr_write(index, value, now),
            }
        })?;
        self.act(effect);
        Ok(())
    }

    // What comes from outside.

    /// A fixed interrupt arrives. False if the APIC does not take it: disabled, or vector below 16.
    pub fn inject(&self, vector: u8, trigger: TriggerMode) -> bool {
        self.with(|registers, _| registers.accept(vector, trigger))
    }

    /// A pulse on LINT0 (0) or LINT1 (1): what its LVT entry says happens. Unmasked NMI on LINT1 is how
    /// firmware tables wire an NMI button.
    pub fn pulse_lint(&self, pin: u8) {
        let pin = match pin {
            0 => LocalPin::Lint0,
            1 => LocalPin::Lint1,
            _ => return,
        };
        match self.with(|registers, _| registers.pulse(pin)) {
            Some(DeliveryMode::Nmi) => self.signals.nmi(self.vcpu),
            Some(DeliveryMode::Init) => self.signals.init(self.vcpu),
            _ => {}
        }
    }
}

fn mmio_base(registers: &Registers) -> u64 {
    if registers.mode() == ApicMode::XApic { registers.base() & !0xfff } else { NOWHERE }
}

#[cfg(test)]
mod tests;

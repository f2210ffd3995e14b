//! A vCPU's thread: the processor, its platform, and what happens when it sleeps.
//!
//! # Theory of operation
//! Each vCPU has one thread, which runs the engine until that returns. HLT puts the thread to sleep on
//! the attention word until an interrupt (or INIT, or the end of the machine) is there, or its own local timer
//! is due; the timer thread serves the timers of vCPUs that are running. Exits of the processor are answered
//! in `VcpuPlatform`, on the same thread.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cpu::{
    Answer, Attention, CpuState, Exit, GuestRam, Interpreter, Outcome, Platform, Vcpu, VcpuStats, attention,
};
use mmu::Gpa;

use crate::apic::{self, LAPIC_SIZE, LocalApic, MSR_APIC_BASE, MSR_TSC_DEADLINE};
use crate::bus::Bus;
use crate::clock::{Clock, TscAdjust, monotonic_ns};
use crate::kvm::{self, KvmVcpu};
use crate::power::{PowerEvent, PowerSignal};

/// The KVM paravirtual state of a vCPU, shared by its platform and its thread.
pub(crate) type Paravirtual = Arc<Mutex<KvmVcpu<Arc<GuestRam>>>>;

/// The machine as one vCPU sees it.
pub(crate) struct VcpuPlatform {
    pub(crate) apic: Arc<LocalApic>,
    pub(crate) bus: Arc<Bus>,
    pub(crate) kvm: Paravirtual,
    pub(crate) clock: Arc<Clock>,
}

impl VcpuPlatform {
    /// The offset in the local APIC's page, if `gpa` is in it and the APIC is in xAPIC mode.
    fn apic_offset(&self, gpa: Gpa) -> Option<u64> {
        let base = self.apic.mmio_base()?;
        let offset = gpa.0.wrapping_sub(base.0);
        (offset < LAPIC_SIZE).then_some(offset)
    }

    fn mmio_read(&self, gpa: Gpa, data: &mut [u8]) {
        let Some(offset) = self.apic_offset(gpa) else {
            return self.bus.mmio_read(gpa, data);
        };
        // Registers are 32 bits wide on 16-byte steps; other widths read a part of one.
        apic::read_part(self.apic.mmio_read(offset & !3), offset, data);
    }

    fn mmio_write(&self, gpa: Gpa, data: &[u8]) {
        let Some(offset) = self.apic_offset(gpa) else {
            return self.bus.mmio_write(gpa, data);
        };
        // SDM vol. 3, 12.4.1: anything but aligned 32-bit accesses is undefined; here it is ignored.
        if let (0, Ok(bytes)) = (offset & 3, <[u8; 4]>::try_from(data)) {
            self.apic.mmio_write(offset, u32::from_le_bytes(bytes));
        }
    }
}

impl Platform for VcpuPlatform {
    fn exit(&mut self, exit: Exit<'_>) -> Answer {
        let answer = |result: Result<(), crate::apic::GeneralProtection>| match result {
            Ok(()) => Answer::Done,
            Err(_) => Answer::Refused,
        };
        match exit {
            Exit::PortIn { port, data } => self.bus.port_read(port, data),
            Exit::PortOut { port, data } => self.bus.port_write(port, data),
            Exit::MmioRead { gpa, data } => self.mmio_read(gpa, data),
            Exit::MmioWrite { gpa, data } => self.mmio_write(gpa, data),
            Exit::ReadMsr { index, value } => {
                let read = if is_apic_msr(index) {
                    self.apic.msr_read(index)
                } else {
                    lock(&self.kvm).msr_read(index)
                };
                return answer(read.map(|v| *value = v));
            }
            Exit::WriteMsr { index, value } => {
                return answer(if is_apic_msr(index) {
                    self.apic.msr_write(index, value)
                } else {
                    lock(&self.kvm).msr_write(index, value)
                });
            }
            Exit::ReadCr8 { value } => *value = self.apic.cr8(),
            Exit::WriteCr8 { value } => return answer(self.apic.set_cr8(value)),
            Exit::Hypercall { number, args, long_mode, cpl, result } => {
                *result = lock(&self.kvm).hypercall(&kvm::Hypercall { number, args, long_mode, cpl });
            }
        }
        Answer::Done
    }

    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        self.apic.acknowledge()
    }

    fn interrupt_pending(&mut self) -> bool {
        self.apic.pending_vector().is_some()
    }

    fn tsc(&self) -> u64 {
        self.clock.now_tsc()
    }

    fn tsc_adjusted(&mut self, adjust: u64) {
        let mut to = TscAdjust::default();
        to.set(adjust);
        self.apic.set_tsc_adjust(to);
        lock(&self.kvm).set_tsc_adjust(to);
    }

    fn init(&mut self) {
        self.apic.init();
    }
}

fn is_apic_msr(index: u32) -> bool {
    matches!(index, MSR_APIC_BASE | MSR_TSC_DEADLINE | 0x800..=0x8ff)
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a vCPU's thread works with.
pub(crate) struct VcpuThread {
    pub(crate) vcpu: Vcpu,
    pub(crate) apic: Arc<LocalApic>,
    pub(crate) kvm: Paravirtual,
    pub(crate) power: Arc<PowerSignal>,
}

/// What is left of a vCPU.
pub(crate) struct VcpuEnd {
    pub(crate) counted: VcpuStats,
    pub(crate) state: CpuState,
    /// Whether a triple fault shut it down.
    pub(crate) shut_down: bool,
    /// What PVM counted, if it was offered.
    pub(crate) pvm: Option<pvm::Stats>,
}

impl VcpuThread {
    /// Runs until [`attention::KICK`] is raised: the machine ends.
    pub(crate) fn run(mut self) -> VcpuEnd {
        let mut engine = Interpreter::new();
        let attention = Arc::clone(self.vcpu.attention());
        let shut_down = loop {
            match engine.run(&mut self.vcpu) {
                Outcome::Kicked => break false,
                Outcome::Halted => self.halt(&attention),
                Outcome::TripleFault => {
                    self.power.raise(PowerEvent::TripleFault);
                    attention.sleep(attention::KICK, None);
                    break true;
                }
            }
        };
        let pvm = self.vcpu.pvm_stats();
        VcpuEnd { counted: self.vcpu.stats, state: self.vcpu.state, shut_down, pvm }
    }

    /// Sleeps as HLT does.
    fn halt(&mut self, attention: &Attention) {
        let mask = self.vcpu.wake_mask();
        lock(&self.kvm).on_halt();
        while attention.peek() & mask == 0 {
            let deadline = self.apic.next_deadline().map(|deadline| {
                Instant::now() + Duration::from_nanos(deadline.0.saturating_sub(monotonic_ns()))
            });
            attention.sleep(mask, deadline);
            self.apic.fire_timer_if_due();
            if attention.peek() & mask == 0 && mask & attention::INTERRUPT == 0 && deadline.is_some() {
                // A timer cannot wake a vCPU that halted with interrupts off.
                attention.sleep(mask, None);
            }
        }
        if lock(&self.kvm).on_wake().0 {
            attention.raise(attention::FLUSH_TLB);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apic::testing::Rig;
    use crate::kvm::{KvmVm, MSR_SYSTEM_TIME};
    use crate::{layout, memory};
    use vm_memory::{Bytes as _, GuestAddress};

    fn vcpu(rig: &Rig) -> (Vcpu, Arc<GuestRam>) {
        let memory = Arc::new(memory::create(&layout::ram_regions(layout::MIN_RAM)).unwrap());
        let vm = KvmVm::new(rig.clock.clone(), rig.bus.clone());
        let platform = VcpuPlatform {
            apic: rig.bus.local(0).unwrap().clone(),
            bus: Arc::new(Bus::new()),
            kvm: Arc::new(Mutex::new(KvmVcpu::new(vm, memory.clone()))),
            clock: rig.clock.clone(),
        };
        let config = cpu::VcpuConfig { cpuid: cpu::Cpuid::default(), pvm: None };
        let ram = Arc::new(cpu::Ram::new((*memory).clone()));
        let vcpu = Vcpu::new(config, ram, Box::new(platform), Arc::new(Attention::new())).unwrap();
        (vcpu, memory)
    }

    #[test]
    fn a_moved_tsc_moves_deadline_and_clock() {
        const MSR_TSC_ADJUST: u32 = 0x3b;
        let rig = Rig::new(&[0], false);
        let (mut vcpu, memory) = vcpu(&rig);
        vcpu.write_msr(MSR_SYSTEM_TIME, 0x1000 | 1).unwrap();
        vcpu.write_msr(MSR_TSC_ADJUST, 5000).unwrap();
        assert_eq!(rig.bus.local(0).unwrap().tsc_adjust().get(), 5000);
        // The clock page's tsc_timestamp.
        assert_eq!(memory.read_obj::<u64>(GuestAddress(0x1008)).unwrap(), 5000);
    }

    /// On a host whose TSC is unfit the guest's counter is not the host's, and the guest sets its timers by what it reads.
    #[test]
    fn a_deadline_is_due_when_the_counter_that_the_guest_reads_is_there() {
        const LVT_TIMER: u32 = 0x832;
        const TSC_DEADLINE_MODE: u64 = 2 << 17;
        const VECTOR: u8 = 0xec;
        const TICKS: u64 = 8000;
        let rig = Rig::new(&[0], false).x2apic([0]);
        let (mut vcpu, _) = vcpu(&rig);
        rig.clock.advance_ns(1_000_000);
        vcpu.write_msr(LVT_TIMER, TSC_DEADLINE_MODE | u64::from(VECTOR)).unwrap();
        vcpu.write_msr(MSR_TSC_DEADLINE, vcpu.tsc() + TICKS).unwrap();
        let local = rig.bus.local(0).unwrap();
        assert_eq!(local.timer_tsc(), rig.clock.now_tsc() + TICKS);
        assert!(!local.fire_timer_if_due());
        rig.clock.advance_ns(rig.clock.tsc_to_ns(TICKS));
        assert!(local.fire_timer_if_due());
        assert_eq!(rig.drain(), [(0, VECTOR)]);
    }

    #[test]
    fn a_bitmap_of_vcpus_has_the_width_of_the_callers_registers() {
        const SEND_IPI: u64 = 10;
        let rig = Rig::new(&[0, 32, 64], false);
        let (mut vcpu, _) = vcpu(&rig);
        // The first bit of the second word.
        for (long_mode, taker) in [(false, 1), (true, 2)] {
            let mut result = 0;
            let args = [0, 1, 0, 0xf0];
            vcpu.exit(Exit::Hypercall { number: SEND_IPI, args, long_mode, cpl: 0, result: &mut result });
            assert_eq!((result, rig.drain()), (1, vec![(taker, 0xf0)]));
        }
    }
}

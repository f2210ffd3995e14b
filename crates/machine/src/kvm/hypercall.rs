//! Hypercalls: VMCALL or VMMCALL with a number in RAX and arguments in RBX, RCX, RDX, RSI
//! (`linux/kvm_para.h`; the kernel's documentation of KVM hypercalls).

use super::{KvmVcpu, pages};
use crate::apic::{DeliveryMode, Destination, Message, TriggerMode};
use crate::clock::realtime_ns;
use vm_memory::{GuestAddress, GuestAddressSpace};

const VAPIC_POLL_IRQ: u64 = 1;
const KICK_CPU: u64 = 5;
const CLOCK_PAIRING: u64 = 9;
const SEND_IPI: u64 = 10;
const SCHED_YIELD: u64 = 11;

/// KVM_CLOCK_PAIRING_WALLCLOCK.
const PAIRING_WALLCLOCK: u64 = 0;

/// Errors, as `linux/kvm_para.h` numbers them; the guest gets them negated.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Refusal {
    Eperm = 1,
    Efault = 14,
    Einval = 22,
    Eopnotsupp = 95,
    Enosys = 1000,
}

/// A hypercall as the guest makes it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hypercall {
    /// RAX.
    pub number: u64,
    /// RBX, RCX, RDX, RSI.
    pub args: [u64; 4],
    /// Called from 64-bit code. Elsewhere only the low halves of registers count.
    pub long_mode: bool,
    /// The caller's privilege level.
    pub cpl: u8,
}

impl<A: GuestAddressSpace> KvmVcpu<A> {
    /// Carries out a hypercall. Returns the guest's new RAX.
    pub fn hypercall(&mut self, call: &Hypercall) -> u64 {
        let mask = if call.long_mode { u64::MAX } else { u32::MAX.into() };
        let result = match self.carry_out(call.number & mask, call.args.map(|a| a & mask), call) {
            Ok(value) => value,
            Err(refusal) => (refusal as u64).wrapping_neg(),
        };
        result & mask
    }

    fn carry_out(&self, number: u64, args: [u64; 4], call: &Hypercall) -> Result<u64, Refusal> {
        if call.cpl != 0 {
            return Err(Refusal::Eperm);
        }
        let [a0, a1, a2, a3] = args;
        match number {
            // Only makes the vCPU look for interrupts, which it does after every exit.
            VAPIC_POLL_IRQ => Ok(0),
            KICK_CPU => {
                if let Some(vcpu) = self.vcpu_with_id(a1) {
                    self.vm.bus.signals().unhalt(vcpu);
                }
                Ok(0)
            }
            SCHED_YIELD => {
                std::thread::yield_now();
                Ok(0)
            }
            SEND_IPI => self.send_ipi(if call.long_mode { 64 } else { 32 }, [a0, a1], a2, a3),
            CLOCK_PAIRING if call.long_mode => self.clock_pairing(a0, a1),
            _ => Err(Refusal::Enosys),
        }
    }

    fn vcpu_with_id(&self, id: u64) -> Option<usize> {
        self.vm.bus.vcpu_with_id(u32::try_from(id).ok()?)
    }

    /// An interrupt to the vCPUs whose APIC ids are in a bitmap of two words of `width` bits that begins
    /// at id `first`. Returns how many took it.
    fn send_ipi(&self, width: u64, bitmap: [u64; 2], first: u64, icr: u64) -> Result<u64, Refusal> {
        let mode = match DeliveryMode::from_bits((icr >> 8) as u32) {
            Some(mode @ (DeliveryMode::Fixed | DeliveryMode::Nmi)) => mode,
            _ => return Err(Refusal::Einval),
        };
        // Nothing but vector and mode: the bitmap is the destination.
        if icr & !0x7ff != 0 {
            return Err(Refusal::Einval);
        }
        let mut taken = 0;
        for (word, bits) in (0u64..).zip(bitmap) {
            for bit in (0..width).filter(|&bit| bits >> bit & 1 != 0) {
                let id = first.checked_add(word * width + bit).and_then(|id| self.vcpu_with_id(id));
                if let Some(vcpu) = id {
                    taken += self.vm.bus.deliver(&Message {
                        destination: Destination::Vcpu(vcpu),
                        mode,
                        vector: icr as u8,
                        trigger: TriggerMode::Edge,
                    });
                }
            }
        }
        Ok(taken as u64)
    }

    /// The host's time of day and this vCPU's TSC at the same moment.
    fn clock_pairing(&self, at: u64, kind: u64) -> Result<u64, Refusal> {
        if kind != PAIRING_WALLCLOCK || !self.vm.clock.uses_host_tsc() {
            return Err(Refusal::Eopnotsupp);
        }
        let before = self.vm.clock.now_tsc();
        let realtime = realtime_ns();
        let tsc = before + (self.vm.clock.now_tsc().saturating_sub(before)) / 2;
        let tsc = self.tsc_adjust.tsc(tsc);
        pages::write_clock_pairing(&*self.memory.memory(), GuestAddress(at), realtime, tsc)
            .map_err(|_| Refusal::Efault)?;
        Ok(0)
    }
}

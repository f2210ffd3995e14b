//! CPUID leaves of the KVM interface.

use crate::apic::{ApicBus, TIMER_HZ};

/// First leaf: the signature, and which leaf is the last.
const LEAF_SIGNATURE: u32 = 0x4000_0000;
const LEAF_FEATURES: u32 = 0x4000_0001;
/// Frequencies of TSC and APIC timer, the leaf that hypervisors agree on.
const LEAF_TIMING: u32 = 0x4000_0010;

bitflags::bitflags! {
    /// Features in EAX of leaf 0x4000_0001 (`asm/kvm_para.h`, KVM_FEATURE_*).
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Features: u32 {
        /// The clock by the deprecated MSRs.
        const CLOCKSOURCE = 1 << 0;
        /// Port I/O needs no delays.
        const NOP_IO_DELAY = 1 << 1;
        /// The clock by the new MSRs.
        const CLOCKSOURCE2 = 1 << 3;
        /// Steal time, and whether a vCPU is asleep.
        const STEAL_TIME = 1 << 5;
        /// Spinlocks may halt: KVM_HC_KICK_CPU wakes.
        const PV_UNHALT = 1 << 7;
        /// TLB flushes for sleeping vCPUs are left in memory.
        const PV_TLB_FLUSH = 1 << 9;
        /// KVM_HC_SEND_IPI.
        const PV_SEND_IPI = 1 << 11;
        /// MSR_KVM_POLL_CONTROL.
        const POLL_CONTROL = 1 << 12;
        /// KVM_HC_SCHED_YIELD.
        const PV_SCHED_YIELD = 1 << 13;
        /// 15-bit destinations in MSIs and I/O APIC entries.
        const MSI_EXT_DEST_ID = 1 << 15;
        /// The stable flag of the clock means something.
        const CLOCKSOURCE_STABLE = 1 << 24;
    }
}

impl Features {
    /// All that this machine has.
    pub(super) fn offered(bus: &ApicBus) -> Self {
        if bus.extended_ids() { Self::all() } else { Self::all() - Self::MSI_EXT_DEST_ID }
    }
}

/// One CPUID leaf.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[expect(missing_docs, reason = "registers are called what they are called")]
pub struct CpuidLeaf {
    pub leaf: u32,
    pub subleaf: u32,
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

/// The leaves from 0x4000_0000 on. Those in between that are not listed are all zero.
pub fn cpuid_leaves(features: Features, tsc_khz: u32) -> Vec<CpuidLeaf> {
    let word = |bytes: &[u8; 4]| u32::from_le_bytes(*bytes);
    let zero = CpuidLeaf { leaf: 0, subleaf: 0, eax: 0, ebx: 0, ecx: 0, edx: 0 };
    vec![
        CpuidLeaf {
            leaf: LEAF_SIGNATURE,
            eax: LEAF_TIMING,
            ebx: word(b"KVMK"),
            ecx: word(b"VMKV"),
            edx: word(b"M\0\0\0"),
            ..zero
        },
        CpuidLeaf { leaf: LEAF_FEATURES, eax: features.bits(), ..zero },
        CpuidLeaf { leaf: LEAF_TIMING, eax: tsc_khz, ebx: TIMER_HZ / 1000, ..zero },
    ]
}

use super::*;
use crate::apic::testing::{Random, Rig, Signal};
use crate::clock::{Scale, monotonic_ns, realtime_ns};
use vm_memory::{Bytes, GuestMemoryMmap};

type Memory = Arc<GuestMemoryMmap>;

const MEMORY_SIZE: u64 = 0x10000;

struct Vm {
    rig: Rig,
    vm: Arc<KvmVm>,
    memory: Memory,
}

impl Vm {
    fn new(ids: &[u32]) -> Self {
        Self::of(Rig::new(ids, false))
    }

    fn of(rig: Rig) -> Self {
        let vm = KvmVm::new(rig.clock.clone(), rig.bus.clone());
        let ranges = [(GuestAddress(0), MEMORY_SIZE as usize)];
        Self { rig, vm, memory: Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap()) }
    }

    fn vcpu(&self) -> KvmVcpu<Memory> {
        KvmVcpu::new(self.vm.clone(), self.memory.clone())
    }

    fn get<T: vm_memory::ByteValued>(&self, at: u64) -> T {
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }

    fn put<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    /// Reads a clock page the way a guest does, for a vCPU whose TSC is `tsc`: (nanoseconds, flags).
    fn guest_clock(&self, page: u64, tsc: u64) -> (u64, u8) {
        assert_eq!(self.get::<u32>(page) % 2, 0, "version");
        let scale = Scale { mul: self.get(page + 24), shift: self.get(page + 28) };
        let delta = tsc.wrapping_sub(self.get::<u64>(page + 8));
        (self.get::<u64>(page + 16) + scale.ticks_to_ns(delta), self.get(page + 29))
    }
}

fn call(number: u64, args: [u64; 4]) -> Hypercall {
    Hypercall { number, args, long_mode: true, cpl: 0 }
}

fn error(number: i64) -> u64 {
    (-number) as u64
}

#[test]
fn cpuid_leaves_say_kvm() {
    let vm = Vm::new(&[0]);
    let leaves = vm.vm.cpuid_leaves();
    let leaf = |n| *leaves.iter().find(|l| l.leaf == n).unwrap();
    let signature = leaf(0x4000_0000);
    let mut text = Vec::new();
    for register in [signature.ebx, signature.ecx, signature.edx] {
        text.extend(register.to_le_bytes());
    }
    assert_eq!((signature.eax, &text[..]), (0x4000_0010, &b"KVMKVMKVM\0\0\0"[..]));
    // KVM_FEATURE_*: 0, 1, 3, 5, 7, 9, 11, 12, 13, 24; never 4, 10, 14 (async PF), 6 (PV EOI).
    assert_eq!(leaf(0x4000_0001).eax, 0x0100_3aab);
    assert_eq!(leaf(0x4000_0001).edx, 0, "no hint of dedicated CPUs");
    assert_eq!((leaf(0x4000_0010).eax, leaf(0x4000_0010).ebx), (2_000_000, 1_000_000));
    assert!(leaves.iter().all(|l| l.leaf <= signature.eax));
    let wide = Vm::of(Rig::new(&[0], true));
    assert_eq!(wide.vm.cpuid_leaves()[1].eax, 0x0100_baab);
}

#[test]
fn clock_page_follows_the_clock() {
    let vm = Vm::new(&[0]);
    let mut vcpu = vm.vcpu();
    vm.rig.clock.advance_ns(5_000_000_123);
    for (msr, page) in [(MSR_SYSTEM_TIME, 0x1000u64), (MSR_SYSTEM_TIME_OLD, 0x2004)] {
        vcpu.msr_write(msr, page | 1).unwrap();
        assert_eq!(vcpu.msr_read(msr), Ok(page | 1));
        for _ in 0..3 {
            let now = vm.rig.clock.now();
            assert_eq!(vm.guest_clock(page, now.tsc), (now.ns, 1));
            vm.rig.clock.advance_ns(1_234_567_891);
        }
    }
    // Nothing beside the structure.
    assert_eq!((vm.get::<u32>(0x1020), vm.get::<u32>(0x2000)), (0, 0));
    let version: u32 = vm.get(0x2004);
    vcpu.msr_write(MSR_SYSTEM_TIME, 0x2005).unwrap();
    assert_ne!(vm.get::<u32>(0x2004), version);
    vcpu.msr_write(MSR_SYSTEM_TIME, 0).unwrap();
    assert_eq!(vcpu.msr_read(MSR_SYSTEM_TIME), Ok(0));
}

/// The guest's own arithmetic on the page against the host's clock, with the host's real TSC.
#[test]
fn clock_page_agrees_with_clock_monotonic() {
    let rig = Rig::new(&[0], false);
    let clock = Arc::new(Clock::start());
    let vm = KvmVm::new(clock.clone(), rig.bus.clone());
    let vm = Vm { vm, ..Vm::of(rig) };
    let mut vcpu = vm.vcpu();
    vcpu.msr_write(MSR_SYSTEM_TIME, 0x1001).unwrap();
    let read = || vm.guest_clock(0x1000, clock.now_tsc()).0;
    let (before, host0, after) = (read(), monotonic_ns(), read());
    while monotonic_ns() - host0 < 10_000_000 {}
    let (before1, host1, after1) = (read(), monotonic_ns(), read());
    let host = host1 - host0;
    let tolerance = host / 1000 + 10_000;
    assert!(after1 - before + tolerance >= host && before1 - after <= host + tolerance);
}

#[test]
fn wall_clock_is_the_time_of_day_at_start() {
    let vm = Vm::new(&[0]);
    let mut vcpu = vm.vcpu();
    vm.rig.clock.advance_ns(100_000_000_000);
    let before = realtime_ns() - 100_000_000_000;
    for (msr, at) in [(MSR_WALL_CLOCK, 0x100u64), (MSR_WALL_CLOCK_OLD, 0x104)] {
        vm.put(at, 7u32);
        vcpu.msr_write(msr, at).unwrap();
        assert_eq!(vm.get::<u32>(at), 10, "an odd version is left behind for an even one");
        let ns = u64::from(vm.get::<u32>(at + 4)) * 1_000_000_000 + u64::from(vm.get::<u32>(at + 8));
        assert!((before - 1000..=realtime_ns() - 100_000_000_000).contains(&ns));
        assert_eq!(vcpu.msr_read(msr), Ok(at));
    }
}

#[test]
fn a_moved_tsc_keeps_time_and_costs_the_stable_flag() {
    let vm = Vm::new(&[0, 1]);
    let (mut a, mut b) = (vm.vcpu(), vm.vcpu());
    a.msr_write(MSR_SYSTEM_TIME, 0x1001).unwrap();
    b.msr_write(MSR_SYSTEM_TIME, 0x1041).unwrap();
    vm.rig.clock.advance_ns(1_000_000);
    let now = vm.rig.clock.now();
    let mut adjust = TscAdjust::default();
    for shift in [5_000_000, 5_000_000u64.wrapping_neg()] {
        adjust.set(shift);
        a.set_tsc_adjust(adjust);
        assert_eq!(vm.guest_clock(0x1000, adjust.tsc(now.tsc)), (now.ns, 0));
    }
    assert_eq!(vm.guest_clock(0x1040, now.tsc), (now.ns, 1), "not yet told");
    assert_eq!(b.on_wake(), FlushTlb(false));
    assert_eq!(vm.guest_clock(0x1040, now.tsc), (now.ns, 0));
}

#[test]
fn bad_addresses_and_reserved_bits_are_general_protection() {
    let vm = Vm::new(&[0]);
    let mut vcpu = vm.vcpu();
    let refused = [
        (MSR_SYSTEM_TIME, vec![0x1003, MEMORY_SIZE | 1, (MEMORY_SIZE - 28) | 1, u64::MAX, (1 << 63) | 1]),
        (MSR_STEAL_TIME, vec![0x1003, 0x1021, 0x1005, 0x1002, MEMORY_SIZE | 1, u64::MAX, !0x3f | 1]),
        (MSR_WALL_CLOCK, vec![0x1001, 0x1002, MEMORY_SIZE, MEMORY_SIZE - 8, u64::MAX, u64::MAX - 3]),
        (MSR_POLL_CONTROL, vec![2, 3, u64::MAX]),
    ];
    for (msr, values) in refused {
        let before = vcpu.msr_read(msr).unwrap();
        for value in values {
            assert_eq!(vcpu.msr_write(msr, value), Err(GeneralProtection), "{msr:#x} {value:#x}");
        }
        assert_eq!(vcpu.msr_read(msr), Ok(before));
    }
    // Async PF, PV EOI, migration control and the rest of the range.
    for msr in (0x4b56_4d00..=0x4b56_4dff).filter(|m| !matches!(m & 0xff, 0 | 1 | 3 | 5)) {
        assert!(is_kvm_msr(msr));
        assert_eq!(vcpu.msr_read(msr), Err(GeneralProtection), "{msr:#x}");
        assert_eq!(vcpu.msr_write(msr, 0), Err(GeneralProtection), "{msr:#x}");
    }
    assert!(is_kvm_msr(0x11) && is_kvm_msr(0x12));
    assert!(!is_kvm_msr(0x10) && !is_kvm_msr(0x4b56_4cff) && !is_kvm_msr(0x4b56_4e00));
}

#[test]
fn the_last_places_in_memory_are_good() {
    let vm = Vm::new(&[0]);
    let mut vcpu = vm.vcpu();
    assert_eq!(vcpu.msr_write(MSR_SYSTEM_TIME, (MEMORY_SIZE - 32) | 1), Ok(()));
    assert_eq!(vcpu.msr_write(MSR_STEAL_TIME, (MEMORY_SIZE - 64) | 1), Ok(()));
    assert_eq!(vcpu.msr_write(MSR_WALL_CLOCK, MEMORY_SIZE - 12), Ok(()));
}

#[test]
fn a_halted_vcpu_is_marked_and_finds_its_flush() {
    let vm = Vm::new(&[0]);
    let mut vcpu = vm.vcpu();
    vcpu.on_halt();
    assert_eq!(vcpu.on_wake(), FlushTlb(false), "not enabled");
    vm.put(0x1000 + 16, 0xffu8);
    vcpu.msr_write(MSR_STEAL_TIME, 0x1001).unwrap();
    let preempted = || vm.get::<u8>(0x1010);
    assert_eq!(preempted(), 0);
    vcpu.on_halt();
    assert_eq!(preempted(), 1);
    assert_eq!((vcpu.on_wake(), preempted()), (FlushTlb(false), 0));
    vcpu.on_halt();
    vm.put(0x1010, preempted() | 2);
    assert_eq!((vcpu.on_wake(), preempted()), (FlushTlb(true), 0));
    assert_eq!(vcpu.on_wake(), FlushTlb(false), "once");
    vcpu.msr_write(MSR_STEAL_TIME, 0).unwrap();
    vcpu.on_halt();
    assert_eq!(preempted(), 0, "disabled");
}

#[test]
fn steal_time_adds_up() {
    let vm = Vm::new(&[0]);
    let mut vcpu = vm.vcpu();
    vcpu.add_steal(5);
    vcpu.msr_write(MSR_STEAL_TIME, 0x1041).unwrap();
    vcpu.add_steal(1_000);
    vcpu.add_steal(234);
    assert_eq!((vm.get::<u64>(0x1040), vm.get::<u32>(0x1048)), (1_234, 4));
}

#[test]
fn reset_disables_everything() {
    let vm = Vm::new(&[0]);
    let mut vcpu = vm.vcpu();
    vcpu.msr_write(MSR_STEAL_TIME, 0x1041).unwrap();
    vcpu.msr_write(MSR_SYSTEM_TIME, 0x1001).unwrap();
    vcpu.msr_write(MSR_WALL_CLOCK, 0x2000).unwrap();
    vcpu.msr_write(MSR_POLL_CONTROL, 0).unwrap();
    vcpu.reset();
    vm.vm.reset();
    for (msr, value) in
        [(MSR_STEAL_TIME, 0), (MSR_SYSTEM_TIME, 0), (MSR_WALL_CLOCK, 0), (MSR_POLL_CONTROL, 1)]
    {
        assert_eq!(vcpu.msr_read(msr), Ok(value));
    }
}

#[test]
fn unknown_hypercalls_and_user_mode() {
    let vm = Vm::new(&[0]);
    let mut vcpu = vm.vcpu();
    for number in [0, 2, 3, 4, 6, 7, 8, 12, 13, 1 << 32 | 1, u64::MAX] {
        assert_eq!(vcpu.hypercall(&call(number, [0; 4])), error(1000), "{number}");
    }
    for number in 0..16 {
        for cpl in 1..4 {
            assert_eq!(vcpu.hypercall(&Hypercall { cpl, ..call(number, [0; 4]) }), error(1));
        }
    }
    assert_eq!(vcpu.hypercall(&call(1, [0; 4])), 0);
    let narrow = |number| Hypercall { long_mode: false, ..call(number, [0; 4]) };
    assert_eq!(vcpu.hypercall(&narrow(1 << 32 | 1)), 0, "only the low half counts");
    assert_eq!(vcpu.hypercall(&narrow(0)), error(1000) & 0xffff_ffff);
}

#[test]
fn kick_and_yield() {
    let vm = Vm::new(&[0, 4]);
    let mut vcpu = vm.vcpu();
    vm.rig.signals.take();
    assert_eq!(vcpu.hypercall(&call(5, [0, 4, 0, 0])), 0);
    assert_eq!(vcpu.hypercall(&call(5, [0, 3, 0, 0])), 0, "nobody");
    assert_eq!(vcpu.hypercall(&call(5, [0, 1 << 32 | 4, 0, 0])), 0, "nobody");
    assert_eq!(vcpu.hypercall(&call(11, [4, 0, 0, 0])), 0);
    assert_eq!(vm.rig.signals.take(), [Signal::Unhalt(1)]);
}

#[test]
fn send_ipi_to_a_bitmap() {
    let vm = Vm::new(&[0, 1, 63, 64, 127, 200]);
    let mut vcpu = vm.vcpu();
    let mut ipi = |low, high, first, icr, long_mode| {
        vcpu.hypercall(&Hypercall { long_mode, ..call(10, [low, high, first, icr]) })
    };
    assert_eq!(ipi(1 << 63 | 0b11, 1 << 63 | 1, 0, 0xf0, true), 5);
    assert_eq!(vm.rig.drain(), [(0, 0xf0), (1, 0xf0), (2, 0xf0), (3, 0xf0), (4, 0xf0)]);
    assert_eq!(ipi(1, 1 << 9, 127, 0xf0, true), 2);
    assert_eq!(vm.rig.drain(), [(4, 0xf0), (5, 0xf0)]);
    assert_eq!(ipi(2, 1 << 31, 0, 0xf0, false), 2);
    assert_eq!(vm.rig.drain(), [(1, 0xf0), (2, 0xf0)]);
    vm.rig.signals.take();
    assert_eq!(ipi(2, 0, 0, 0x400, true), 1);
    assert_eq!(vm.rig.signals.take(), [Signal::Nmi(1)]);
    assert_eq!(ipi(u64::MAX, u64::MAX, u64::MAX - 3, 0xf0, true), 0);
    assert_eq!(ipi(0, 0, 0, 0xf0, true), 0);
    for icr in [0x4_00f0, 0x8f0, 0x500, 0x600, 0x1f0, 0x3f0, 1 << 40 | 0xf0] {
        assert_eq!(ipi(2, 0, 0, icr, true), error(22), "{icr:#x}");
    }
}

#[test]
fn clock_pairing_needs_the_host_tsc() {
    let vm = Vm::new(&[0]);
    assert_eq!(vm.vcpu().hypercall(&call(9, [0x1000, 0, 0, 0])), error(95));
    let clock = Arc::new(Clock::start());
    if !clock.uses_host_tsc() {
        return;
    }
    let vm = Vm { vm: KvmVm::new(clock.clone(), vm.rig.bus.clone()), ..vm };
    let mut vcpu = vm.vcpu();
    let (tsc0, real0) = (clock.now_tsc(), realtime_ns());
    assert_eq!(vcpu.hypercall(&call(9, [0x1000, 0, 0, 0])), 0);
    let (tsc1, real1) = (clock.now_tsc(), realtime_ns());
    let realtime = vm.get::<u64>(0x1000) * 1_000_000_000 + vm.get::<u64>(0x1008);
    assert!((real0..=real1).contains(&realtime) && (tsc0..=tsc1).contains(&vm.get::<u64>(0x1010)));
    assert_eq!(vcpu.hypercall(&call(9, [0x1000, 1, 0, 0])), error(95));
    assert_eq!(vcpu.hypercall(&call(9, [MEMORY_SIZE - 63, 0, 0, 0])), error(14));
    assert_eq!(vcpu.hypercall(&call(9, [u64::MAX, 0, 0, 0])), error(14));
    assert_eq!(vcpu.hypercall(&Hypercall { long_mode: false, ..call(9, [0x1000, 0, 0, 0]) }), 0xffff_fc18);
}

#[test]
fn random_msrs_and_hypercalls_do_no_harm() {
    let vm = Vm::new(&[0, 1, 2]);
    let mut vcpu = vm.vcpu();
    let mut random = Random(0x4b56_4d00);
    for _ in 0..100_000 {
        let (a, b) = (random.next(), random.next() >> random.below(64));
        match random.below(8) {
            0..=2 => drop(vcpu.msr_write(0x4b56_4d00 + (a % 9) as u32, b)),
            3 => drop(vcpu.msr_write(0x11 + (a % 2) as u32, b & 0x1_ffff)),
            4 => vcpu.on_halt(),
            5 => drop(vcpu.on_wake()),
            6 => {
                vcpu.add_steal(b);
                let mut adjust = TscAdjust::default();
                adjust.set(b);
                vcpu.set_tsc_adjust(adjust);
            }
            _ => {
                let args = [b, random.next() >> random.below(64), random.below(1 << 17), a & 0x7ff];
                // Not yields: they are for the scheduler.
                let number = [1, 5, 9, 10, a][(a >> 32) as usize % 5];
                let call = Hypercall { number, args, long_mode: b & 1 == 0, cpl: (a >> 60 & 1) as u8 };
                vcpu.hypercall(&call);
            }
        }
    }
}

use super::*;
use crate::apic::testing::{Random, Rig, Signal};

const ICR: u64 = 0x300;
const ICR_HIGH: u64 = 0x310;

fn local(rig: &Rig, vcpu: usize) -> &LocalApic {
    rig.bus.local(vcpu).unwrap()
}

/// Sends from vCPU 0 in xAPIC mode; returns who took the interrupt.
fn xapic_ipi(rig: &Rig, destination: u32, low: u32) -> Vec<(usize, u8)> {
    local(rig, 0).mmio_write(ICR_HIGH, destination << 24);
    local(rig, 0).mmio_write(ICR, low);
    rig.drain()
}

fn x2apic_ipi(rig: &Rig, destination: u32, low: u32) -> Vec<(usize, u8)> {
    local(rig, 0).msr_write(0x830, u64::from(destination) << 32 | u64::from(low)).unwrap();
    rig.drain()
}

fn all(vcpus: impl IntoIterator<Item = usize>, vector: u8) -> Vec<(usize, u8)> {
    vcpus.into_iter().map(|vcpu| (vcpu, vector)).collect()
}

/// SDM 12.6.2.1.
#[test]
fn xapic_physical() {
    let rig = Rig::new(&[0, 1, 2, 5], false);
    assert_eq!(xapic_ipi(&rig, 2, 0x40), all([2], 0x40));
    assert_eq!(xapic_ipi(&rig, 0, 0x40), all([0], 0x40), "to itself");
    assert_eq!(xapic_ipi(&rig, 0xff, 0x40), all(0..4, 0x40), "broadcast has the sender too");
    assert_eq!(rig.bus.counters(), BusCounters::default());
    assert_eq!(xapic_ipi(&rig, 3, 0x40), []);
    assert_eq!(rig.bus.counters().undeliverable, 1);
}

/// SDM 12.6.2.2.
#[test]
fn xapic_logical_flat_and_cluster() {
    let rig = Rig::new(&[0, 1, 2, 3], false);
    for vcpu in 0..4 {
        local(&rig, vcpu).mmio_write(0xd0, 1 << (24 + vcpu));
    }
    assert_eq!(xapic_ipi(&rig, 0b0110, 0x0841), all([1, 2], 0x41));
    assert_eq!(xapic_ipi(&rig, 0b1_0000, 0x0841), []);
    assert_eq!(xapic_ipi(&rig, 0xff, 0x0841), all(0..4, 0x41));
    for vcpu in 0..4u32 {
        local(&rig, vcpu as usize).mmio_write(0xe0, 0x0fff_ffff);
        // vCPUs 0, 1 in cluster 0; 2, 3 in cluster 1.
        local(&rig, vcpu as usize).mmio_write(0xd0, ((vcpu / 2) << 4 | 1 << (vcpu % 2)) << 24);
    }
    assert_eq!(xapic_ipi(&rig, 0x01, 0x0841), all([0], 0x41));
    assert_eq!(xapic_ipi(&rig, 0x13, 0x0841), all([2, 3], 0x41));
    assert_eq!(xapic_ipi(&rig, 0x2f, 0x0841), []);
    assert_eq!(xapic_ipi(&rig, 0xff, 0x0841), all(0..4, 0x41));
}

/// SDM 12.12.9, 12.12.10.
#[test]
fn x2apic_physical_and_logical_with_wide_ids() {
    let ids = [0, 1, 16, 255, 256, 0x1_0003];
    let rig = Rig::new(&ids, false).x2apic(0..6);
    for (vcpu, &id) in ids.iter().enumerate() {
        assert_eq!(x2apic_ipi(&rig, id, 0x50), all([vcpu], 0x50), "id {id:#x}");
        let logical = (id >> 4) << 16 | 1 << (id & 15);
        assert_eq!(x2apic_ipi(&rig, logical, 0x850), all([vcpu], 0x50), "logical {logical:#x}");
    }
    assert_eq!(x2apic_ipi(&rig, 0xff, 0x50), all([3], 0x50), "255 is no broadcast here");
    assert_eq!(x2apic_ipi(&rig, 0x0000_ffff, 0x850), all([0, 1], 0x50));
    assert_eq!(x2apic_ipi(&rig, u32::MAX, 0x50), all(0..6, 0x50));
    assert_eq!(x2apic_ipi(&rig, u32::MAX, 0x850), all(0..6, 0x50));
    assert_eq!(x2apic_ipi(&rig, 2, 0x50), []);
}

/// Some vCPUs have not switched yet, as while a kernel starts its processors.
#[test]
fn mixed_modes() {
    let rig = Rig::new(&[0, 1, 2, 0x101], false).x2apic([0]);
    assert_eq!(x2apic_ipi(&rig, 1, 0x50), all([1], 0x50), "physical reaches an xAPIC");
    assert_eq!(x2apic_ipi(&rig, 0x101, 0x50), all([3], 0x50), "also one with a wide id");
    assert_eq!(x2apic_ipi(&rig, u32::MAX, 0x50), all(0..4, 0x50));
    local(&rig, 2).mmio_write(0xd0, 0x40 << 24);
    assert_eq!(x2apic_ipi(&rig, 0x40, 0x850), all([2], 0x50));
    assert_eq!(x2apic_ipi(&rig, 0x1_0040, 0x850), [], "a cluster is not an 8-bit set");

    let rig = Rig::new(&[0, 1, 0x101], false).x2apic([1, 2]);
    assert_eq!(xapic_ipi(&rig, 1, 0x40), all([1], 0x40), "an xAPIC reaches an x2APIC");
    assert_eq!(xapic_ipi(&rig, 0xff, 0x40), all(0..3, 0x40));
    let rig = Rig::new(&[0, 1, 0x101], false);
    assert_eq!(xapic_ipi(&rig, 1, 0x40), all([1], 0x40), "id 0x101 does not pass for 1");
}

/// SDM 12.6.1, table 12-3.
#[test]
fn shorthands() {
    let rig = Rig::new(&[0, 1, 2], false);
    assert_eq!(xapic_ipi(&rig, 2, 0x4_0042), all([0], 0x42), "self");
    assert_eq!(xapic_ipi(&rig, 2, 0x8_0042), all(0..3, 0x42), "all including self");
    assert_eq!(xapic_ipi(&rig, 2, 0xc_0042), all(1..3, 0x42), "all excluding self");
    rig.signals.take();
    xapic_ipi(&rig, 0, 0xc_0400);
    assert_eq!(rig.signals.take(), [Signal::Nmi(1), Signal::Nmi(2)]);
    xapic_ipi(&rig, 0, 0x4_0500);
    xapic_ipi(&rig, 0, 0x8_0608);
    assert_eq!((rig.signals.take(), rig.bus.counters().malformed), (vec![], 2), "nobody resets itself");
}

/// SDM 10.4.4: INIT, INIT de-assert, SIPI, SIPI.
#[test]
fn start_up_sequence() {
    let rig = Rig::new(&[0, 1], false);
    local(&rig, 0).mmio_write(ICR_HIGH, 1 << 24);
    for low in [0xc500, 0x8500, 0x0609, 0x0609] {
        local(&rig, 0).mmio_write(ICR, low);
    }
    assert_eq!(rig.signals.take(), [Signal::Init(1), Signal::Sipi(1, 9), Signal::Sipi(1, 9)]);
    // All but self, as broadcast start-up does it; also to a software-disabled APIC.
    local(&rig, 1).mmio_write(0xf0, 0xff);
    local(&rig, 0).mmio_write(ICR, 0xc_4500);
    local(&rig, 0).mmio_write(ICR, 0xc_469a);
    assert_eq!(rig.signals.take(), [Signal::Init(1), Signal::Sipi(1, 0x9a)]);
    assert_eq!(rig.bus.counters(), BusCounters::default());
}

#[test]
fn what_the_machine_has_not_is_counted() {
    let rig = Rig::new(&[0, 1], false);
    xapic_ipi(&rig, 1, 0x0200);
    xapic_ipi(&rig, 1, 0x0300);
    xapic_ipi(&rig, 1, 0x0700);
    assert_eq!(rig.bus.counters(), BusCounters { malformed: 2, unsupported: 1, undeliverable: 0 });
    rig.bus.deliver_msi(0xfee0_1000, 0x0700);
    rig.bus.deliver_msi(0xdead_0000, 0x0041);
    rig.bus.deliver_msi(0xfee0_7000, 0x0041);
    rig.bus.deliver_msi(0xfee0_1000, 0x0005);
    assert_eq!(rig.bus.counters(), BusCounters { malformed: 3, unsupported: 2, undeliverable: 2 });
    assert_eq!(rig.drain(), []);
}

/// SDM 12.6.2.4.
#[test]
fn lowest_priority_prefers_the_idle_and_takes_turns() {
    let rig = Rig::new(&[0, 1, 2], false);
    local(&rig, 0).mmio_write(0x80, 0x30);
    let mut seen = [0; 3];
    for _ in 0..8 {
        rig.bus.deliver_msi(0xfeef_f000, 0x0155);
        let taken = rig.drain();
        assert_eq!(taken.len(), 1);
        seen[taken[0].0] += 1;
    }
    assert_eq!(seen[0], 0, "it has the higher task priority");
    assert!(seen[1] > 0 && seen[2] > 0, "{seen:?}");
    local(&rig, 1).mmio_write(0xf0, 0xff);
    rig.bus.deliver_msi(0xfeef_f000, 0x0155);
    assert_eq!(rig.drain(), all([2], 0x55), "a disabled APIC is no candidate");
}

#[test]
fn msi_to_8_bit_and_15_bit_ids() {
    let rig = Rig::new(&[0, 255, 256], false).x2apic(0..3);
    assert_eq!(rig.bus.deliver_msi(0xfeef_f000, 0x41), 3, "broadcast");
    rig.drain();
    let rig = Rig::new(&[0, 255, 256], true).x2apic(0..3);
    rig.bus.deliver_msi(0xfeef_f000, 0x41);
    assert_eq!(rig.drain(), all([1], 0x41), "an id");
    rig.bus.deliver_msi(0xfee0_0020, 0x41);
    assert_eq!(rig.drain(), all([2], 0x41));
    let rig = Rig::new(&[0, 255, 256], true);
    assert_eq!(rig.bus.deliver_msi(0xfeef_f000, 0x41), 3, "xAPICs cannot have the id");
    assert_eq!(rig.bus.deliver_msi(0xfee0_0020, 0x41), 0, "nor one of 9 bits");
}

#[test]
fn a_disabled_apic_gets_nothing() {
    let rig = Rig::new(&[0, 1], false);
    local(&rig, 1).msr_write(0x1b, 0xfee0_0000).unwrap();
    rig.signals.take();
    for low in [0x40, 0x400, 0x4500, 0x608] {
        assert_eq!(xapic_ipi(&rig, 1, low), []);
    }
    assert_eq!((rig.signals.take(), rig.bus.counters().undeliverable), (vec![], 4));
}

/// Several threads send, one vCPU takes: every vector that was sent comes out, and nothing else.
#[test]
fn concurrent_senders_lose_nothing() {
    let rig = Rig::new(&[0, 1], false);
    let target = local(&rig, 1);
    let done = AtomicUsize::new(0);
    let mut taken = [0u32; 256];
    std::thread::scope(|scope| {
        for sender in 0..3u64 {
            let (bus, done) = (&rig.bus, &done);
            scope.spawn(move || {
                let mut random = Random(sender);
                for _ in 0..2000 {
                    let vector = 32 + 64 * sender + random.below(64);
                    assert_eq!(bus.deliver_msi(0xfee0_1000, vector as u32), 1);
                }
                // The last one of each sender is known.
                bus.deliver_msi(0xfee0_1000, (32 + 64 * sender) as u32);
                done.fetch_add(1, Ordering::SeqCst);
            });
        }
        loop {
            let finished = done.load(Ordering::SeqCst) == 3;
            while let Some(pending) = target.pending_vector() {
                // Another sender may have put a higher one on top meanwhile.
                let vector = target.acknowledge().unwrap();
                assert!(vector >= pending);
                taken[usize::from(vector)] += 1;
                target.eoi();
            }
            if finished {
                break;
            }
        }
    });
    assert!(taken[..32].iter().all(|&n| n == 0) && taken[224..].iter().all(|&n| n == 0));
    assert!((32..224).step_by(64).all(|v| taken[v] > 0));
    assert_eq!(target.pending_vector(), None);
}

#[test]
fn random_messages_do_no_harm() {
    let mut random = Random(0x1012);
    let rig = Rig::new(&[0, 1, 7, 255, 300], true).x2apic([1, 3]);
    for _ in 0..100_000 {
        let (a, b) = (random.next(), random.next());
        match random.below(4) {
            0 => drop(rig.bus.deliver_msi(a, b as u32)),
            1 => drop(rig.bus.deliver_msi(0xfee0_0000 | a & 0xf_ffff, b as u32)),
            2 => {
                let _ = local(&rig, (a % 5) as usize).msr_write(0x830, b);
            }
            _ => {
                local(&rig, (a % 5) as usize).mmio_write(ICR_HIGH, b as u32);
                local(&rig, (a % 5) as usize).mmio_write(ICR, (b >> 32) as u32);
            }
        }
    }
    assert!(rig.drain().iter().all(|&(_, v)| v >= 16));
    let c = rig.bus.counters();
    assert!(c.malformed > 0 && c.unsupported > 0 && c.undeliverable > 0, "{c:?}");
}

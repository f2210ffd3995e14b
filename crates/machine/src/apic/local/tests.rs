use crate::apic::testing::{Rig, Signal};
use crate::apic::{ApicMode, GeneralProtection, MSR_APIC_BASE, MSR_TSC_DEADLINE, TriggerMode};
use crate::clock::TscAdjust;
use mmu::Gpa;

const LVT_TIMER: u64 = 0x320;
const INITIAL: u64 = 0x380;
const CURRENT: u64 = 0x390;
const DIVIDE: u64 = 0x3e0;

#[test]
fn a_new_deliverable_vector_signals_once() {
    let rig = Rig::new(&[0, 1], false);
    let local = rig.bus.local(1).unwrap();
    assert!(local.inject(0x40, TriggerMode::Edge));
    assert_eq!(rig.signals.take(), [Signal::Interrupt(1)]);
    assert!(local.inject(0x40, TriggerMode::Edge));
    assert!(local.inject(0x30, TriggerMode::Edge));
    assert_eq!(rig.signals.take(), [], "nothing new to see");
    assert_eq!(local.pending_vector(), Some(0x40));
    assert_eq!(local.acknowledge(), Some(0x40));
    assert_eq!((local.pending_vector(), rig.signals.take()), (None, vec![]));
    local.eoi();
    assert_eq!((local.pending_vector(), rig.signals.take()), (Some(0x30), vec![Signal::Interrupt(1)]));
}

#[test]
fn cr8_is_the_upper_half_of_tpr() {
    let rig = Rig::new(&[0], false);
    let local = rig.bus.local(0).unwrap();
    local.inject(0x55, TriggerMode::Edge);
    rig.signals.take();
    assert_eq!(local.set_cr8(5), Ok(()));
    assert_eq!((local.pending_vector(), local.acknowledge()), (None, None));
    assert_eq!((local.cr8(), local.mmio_read(0x80)), (5, 0x50));
    local.mmio_write(0x80, 0x4f);
    assert_eq!((local.cr8(), rig.signals.take()), (4, vec![Signal::Interrupt(0)]));
    for bad in [16, 1 << 32, u64::MAX] {
        assert_eq!(local.set_cr8(bad), Err(GeneralProtection));
    }
}

#[test]
fn one_shot_timer_from_count_to_interrupt() {
    let rig = Rig::new(&[0], false);
    let local = rig.bus.local(0).unwrap();
    local.mmio_write(DIVIDE, 0b1011);
    local.mmio_write(LVT_TIMER, 0x40);
    assert_eq!((local.next_deadline(), local.timer_tsc(), rig.signals.take()), (None, u64::MAX, vec![]));
    local.mmio_write(INITIAL, 1_000_000);
    let deadline = local.next_deadline().unwrap();
    assert!((1_000_000..=1_000_001).contains(&deadline.0));
    assert_eq!(rig.signals.take(), [Signal::Timer(0, Some(deadline))]);
    assert_eq!(local.timer_tsc(), 2_000_000);
    rig.clock.advance_ns(999_999);
    assert!(!local.fire_timer_if_due());
    assert_eq!(local.mmio_read(CURRENT), 1);
    rig.clock.advance_ns(1);
    assert!(local.fire_timer_if_due());
    assert_eq!(rig.signals.take(), [Signal::Interrupt(0), Signal::Timer(0, None)]);
    assert_eq!(rig.drain(), [(0, 0x40)]);
    assert_eq!((local.mmio_read(CURRENT), local.fire_timer_if_due()), (0, false));
}

#[test]
fn periodic_timer_goes_on() {
    let rig = Rig::new(&[0], false);
    let local = rig.bus.local(0).unwrap();
    local.mmio_write(DIVIDE, 0b0011);
    local.mmio_write(LVT_TIMER, 1 << 17 | 0x41);
    local.mmio_write(INITIAL, 100_000);
    for tick in 1..=5u64 {
        rig.clock.advance_ns(1_600_000);
        assert!(local.fire_timer_if_due(), "tick {tick}");
        assert_eq!(rig.drain(), [(0, 0x41)]);
        assert_eq!(local.timer_tsc(), (tick + 1) * 3_200_000);
    }
    local.mmio_write(INITIAL, 0);
    assert_eq!(local.next_deadline(), None);
}

/// SDM 12.5.4.1.
#[test]
fn tsc_deadline_timer() {
    let rig = Rig::new(&[0], false).x2apic([0]);
    let local = rig.bus.local(0).unwrap();
    local.msr_write(0x832, 2 << 17 | 0x42).unwrap();
    rig.signals.take();
    local.msr_write(MSR_TSC_DEADLINE, 4_000).unwrap();
    assert_eq!((local.timer_tsc(), local.msr_read(MSR_TSC_DEADLINE)), (4_000, Ok(4_000)));
    assert_eq!(rig.signals.take(), [Signal::Timer(0, local.next_deadline())]);
    rig.clock.advance_ns(1_999);
    assert!(!local.fire_timer_if_due());
    rig.clock.advance_ns(1);
    assert!(local.fire_timer_if_due());
    assert_eq!((rig.drain(), local.msr_read(MSR_TSC_DEADLINE)), (vec![(0, 0x42)], Ok(0)));
    // In the past: at once.
    local.msr_write(MSR_TSC_DEADLINE, 1).unwrap();
    assert_eq!((local.pending_vector(), local.next_deadline()), (Some(0x42), None));
}

/// The deadline is in the vCPU's own TSC.
#[test]
fn tsc_deadline_moves_with_tsc_adjust() {
    let rig = Rig::new(&[0], false).x2apic([0]);
    let local = rig.bus.local(0).unwrap();
    local.msr_write(0x832, 2 << 17 | 0x42).unwrap();
    local.msr_write(MSR_TSC_DEADLINE, 10_000).unwrap();
    let mut adjust = TscAdjust::default();
    adjust.set(3_000);
    local.set_tsc_adjust(adjust);
    assert_eq!((local.timer_tsc(), local.tsc_adjust()), (7_000, adjust));
    adjust.set(3_000u64.wrapping_neg());
    // Its TSC is now just below 2^64: past any small deadline.
    local.set_tsc_adjust(adjust);
    assert_eq!(local.pending_vector(), Some(0x42));
}

#[test]
fn registers_move_with_apic_base_and_vanish_in_x2apic() {
    let rig = Rig::new(&[0], false);
    let local = rig.bus.local(0).unwrap();
    assert_eq!(local.mmio_base(), Some(Gpa(0xfee0_0000)));
    local.msr_write(MSR_APIC_BASE, 0x12_3456_7900).unwrap();
    assert_eq!(local.mmio_base(), Some(Gpa(0x12_3456_7000)));
    local.msr_write(MSR_APIC_BASE, 0xfee0_0d00).unwrap();
    assert_eq!((local.mmio_base(), local.mode()), (None, ApicMode::X2Apic));
    assert_eq!(local.msr_write(MSR_APIC_BASE, 0xfee0_0900), Err(GeneralProtection));
    assert_eq!(local.msr_read(0x7ff), Err(GeneralProtection));
    assert_eq!(local.msr_write(0x900, 0), Err(GeneralProtection));
}

#[test]
fn where_the_registers_are_takes_no_lock() {
    let rig = Rig::new(&[0], false);
    let local = rig.bus.local(0).unwrap();
    let _held = local.registers.lock().unwrap();
    assert_eq!(local.mmio_base(), Some(Gpa(0xfee0_0000)));
}

#[test]
fn lint1_as_nmi() {
    let rig = Rig::new(&[0], false);
    let local = rig.bus.local(0).unwrap();
    local.pulse_lint(1);
    local.mmio_write(0x360, 0x400);
    assert_eq!(rig.signals.take(), []);
    local.pulse_lint(1);
    local.pulse_lint(2);
    assert_eq!(rig.signals.take(), [Signal::Nmi(0)]);
}

#[test]
fn init_and_reset_drop_the_timer() {
    let rig = Rig::new(&[0], false);
    let local = rig.bus.local(0).unwrap();
    for reset in [|l: &super::LocalApic| l.init(), |l: &super::LocalApic| l.reset()] {
        local.mmio_write(0xf0, 0x1ff);
        local.mmio_write(LVT_TIMER, 0x40);
        local.mmio_write(INITIAL, 1000);
        assert!(local.next_deadline().is_some());
        reset(local);
        assert_eq!((local.next_deadline(), local.pending_vector()), (None, None));
    }
}

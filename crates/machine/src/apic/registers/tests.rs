use super::*;
use crate::apic::testing::Random;
use TriggerMode::{Edge, Level};
use std::collections::BTreeSet;

const T0: Now = Now { tsc: 0, ns: 0 };

/// Software-enabled, xAPIC mode.
fn enabled() -> Registers {
    let mut r = Registers::new(3, false, 40);
    assert_eq!(r.mmio_write(0xf0, 0x1ff, T0), Effect::None);
    r
}

fn x2apic() -> Registers {
    let mut r = enabled();
    r.set_base(r.base() | BASE_X2APIC).unwrap();
    r
}

fn write(r: &mut Registers, register: u32, value: u32) -> Effect {
    r.mmio_write(u64::from(register) * 16, value, T0)
}

fn read(r: &mut Registers, register: u32) -> u32 {
    r.mmio_read(u64::from(register) * 16, T0)
}

/// SDM 12.4.7.1.
#[test]
fn state_after_reset() {
    let mut r = Registers::new(3, true, 40);
    assert_eq!(r.base(), 0xfee0_0900);
    let want = [
        (reg::ID, 3 << 24),
        (reg::TPR, 0),
        (reg::PPR, 0),
        (reg::LDR, 0),
        (reg::DFR, u32::MAX),
        (reg::SVR, 0xff),
        (reg::ESR, 0),
        (reg::ICR, 0),
        (reg::ICR_HIGH, 0),
        (reg::INITIAL_COUNT, 0),
        (reg::CURRENT_COUNT, 0),
        (reg::DIVIDE, 0),
    ];
    for (register, value) in want {
        assert_eq!(read(&mut r, register), value, "{register:#x}");
    }
    for lvt in reg::LVT_TIMER..=reg::LVT_ERROR {
        assert_eq!(read(&mut r, lvt), LVT_MASKED);
    }
    for bank in reg::ISR..=reg::IRR_END {
        assert_eq!(read(&mut r, bank), 0);
    }
    assert_eq!(read(&mut r, reg::VERSION) & 0xff_00ff, 0x5_0014);
    assert_eq!(Registers::new(3, false, 40).base(), 0xfee0_0800);
}

/// SDM 12.4.7.3, 12.12.5.1: INIT keeps id, base and mode; RESET goes back to xAPIC.
#[test]
fn init_keeps_the_mode_reset_does_not() {
    let mut r = x2apic();
    assert!(r.accept(0x40, Edge));
    r.set_tpr(0x20);
    r.tsc_adjust.set(5);
    r.init();
    assert_eq!((r.mode(), r.tpr(), r.deliverable(), r.id), (ApicMode::X2Apic, 0, None, 3));
    assert_eq!(r.tsc_adjust.get(), 5);
    assert!(!r.accept(0x40, Edge), "software-disabled after INIT");
    r.reset();
    assert_eq!((r.mode(), r.tsc_adjust.get()), (ApicMode::XApic, 0));
}

/// SDM 12.8.3, 12.8.4: higher classes nest, the same class waits.
#[test]
fn nesting_by_priority_class() {
    let mut r = enabled();
    for v in [0x31, 0x45, 0x48, 0x92] {
        assert!(r.accept(v, Edge));
    }
    assert_eq!(r.acknowledge(), Some(0x92));
    assert_eq!((r.ppr(), r.acknowledge()), (0x90, None));
    assert!(r.accept(0x9f, Edge));
    assert_eq!(r.acknowledge(), None, "same class");
    assert!(r.accept(0xa0, Edge));
    assert_eq!((r.acknowledge(), r.ppr()), (Some(0xa0), 0xa0));
    let _ = r.eoi();
    assert_eq!((r.ppr(), r.deliverable()), (0x90, None));
    let _ = r.eoi();
    assert_eq!(r.acknowledge(), Some(0x9f));
    let _ = r.eoi();
    assert_eq!(r.acknowledge(), Some(0x48));
    let _ = r.eoi();
    assert_eq!(r.acknowledge(), Some(0x45));
    let _ = r.eoi();
    assert_eq!(r.acknowledge(), Some(0x31));
    let _ = r.eoi();
    assert_eq!((r.acknowledge(), r.ppr()), (None, 0));
    assert_eq!(r.eoi(), Effect::None, "EOI with nothing in service");
}

/// SDM 12.8.3.1: every TPR against every vector.
#[test]
fn task_priority_blocks_its_class_and_below() {
    for tpr in 0..=255u8 {
        for v in 16..=255u8 {
            let mut r = enabled();
            r.set_tpr(tpr);
            assert!(r.accept(v, Edge));
            assert_eq!(r.deliverable().is_some(), v >> 4 > tpr >> 4, "tpr {tpr:#x} vector {v:#x}");
        }
    }
}

#[test]
fn processor_priority_is_the_higher_of_task_and_service() {
    let mut r = enabled();
    assert!(r.accept(0x63, Edge));
    assert_eq!(r.acknowledge(), Some(0x63));
    for (tpr, ppr) in [(0, 0x60), (0x5f, 0x60), (0x60, 0x60), (0x6a, 0x6a), (0x70, 0x70)] {
        assert_eq!(write(&mut r, reg::TPR, tpr), Effect::None);
        assert_eq!(read(&mut r, reg::PPR), ppr, "tpr {tpr:#x}");
    }
}

/// SDM 12.8.4: one bit in IRR and one in ISR per vector.
#[test]
fn a_vector_can_wait_while_it_is_in_service() {
    let mut r = enabled();
    for _ in 0..3 {
        assert!(r.accept(0x55, Edge));
    }
    assert_eq!(r.acknowledge(), Some(0x55));
    assert!(r.accept(0x55, Edge));
    assert_eq!(read(&mut r, reg::ISR + 2), 1 << 0x15);
    assert_eq!(read(&mut r, reg::IRR + 2), 1 << 0x15);
    assert_eq!(r.acknowledge(), None);
    let _ = r.eoi();
    assert_eq!(r.acknowledge(), Some(0x55));
    let _ = r.eoi();
    assert_eq!(r.acknowledge(), None);
}

/// SDM 12.8.5.
#[test]
fn eoi_of_a_level_interrupt_is_broadcast_unless_suppressed() {
    let mut r = enabled();
    assert!(r.accept(0x70, Level) && r.accept(0x60, Edge));
    assert_eq!(read(&mut r, reg::TMR + 3), 1 << 0x10);
    assert_eq!(r.acknowledge(), Some(0x70));
    assert_eq!(write(&mut r, reg::EOI, 0), Effect::BroadcastEoi(0x70));
    assert_eq!(r.acknowledge(), Some(0x60));
    assert_eq!(write(&mut r, reg::EOI, 77), Effect::None);
    // The trigger mode is that of the latest message.
    assert!(r.accept(0x70, Edge));
    assert_eq!(r.acknowledge(), Some(0x70));
    assert_eq!(r.eoi(), Effect::None);
    let _ = write(&mut r, reg::SVR, 0x11ff);
    assert!(r.accept(0x70, Level));
    assert_eq!(r.acknowledge(), Some(0x70));
    assert_eq!(r.eoi(), Effect::None);
}

/// SDM 12.4.7.2.
#[test]
fn software_disable_masks_the_lvt_and_keeps_what_is_pending() {
    let mut r = enabled();
    let _ = write(&mut r, reg::LVT_TIMER, 0x40);
    assert!(r.accept(0x51, Edge));
    let _ = write(&mut r, reg::SVR, 0xff);
    assert!(!r.accept(0x52, Edge));
    assert_eq!(r.deliverable(), Some(0x51));
    for lvt in reg::LVT_TIMER..=reg::LVT_ERROR {
        assert_eq!(read(&mut r, lvt) & LVT_MASKED, LVT_MASKED);
        let _ = write(&mut r, lvt, 0x40);
        assert_eq!(read(&mut r, lvt), 0x40 | LVT_MASKED, "cannot be unmasked");
    }
    let _ = write(&mut r, reg::SVR, 0x1ff);
    assert_eq!(read(&mut r, reg::LVT_TIMER), 0x40 | LVT_MASKED);
}

/// SDM 12.5.3.
#[test]
fn errors_are_seen_after_a_write_to_esr_and_interrupt_once() {
    let mut r = enabled();
    let _ = write(&mut r, reg::LVT_ERROR, 0xfe);
    assert!(!r.accept(0x0f, Edge));
    assert_eq!(r.acknowledge(), Some(0xfe));
    let _ = r.eoi();
    assert_eq!(write(&mut r, reg::ICR, 0x0005), Effect::None, "illegal vector is not sent");
    assert_eq!(r.deliverable(), None, "not armed");
    assert_eq!(read(&mut r, reg::ESR), 0);
    let _ = write(&mut r, reg::ESR, 0xdead);
    assert_eq!(read(&mut r, reg::ESR), ESR_RECEIVE_ILLEGAL_VECTOR | ESR_SEND_ILLEGAL_VECTOR);
    assert_eq!(read(&mut r, 0x3b), 0, "reserved register");
    assert_eq!(r.acknowledge(), Some(0xfe), "armed again");
    let _ = write(&mut r, reg::ESR, 0);
    assert_eq!(read(&mut r, reg::ESR), ESR_ILLEGAL_REGISTER);
    let _ = write(&mut r, reg::ESR, 0);
    assert_eq!(read(&mut r, reg::ESR), 0);
    // An error vector that is itself illegal must not recurse.
    let _ = r.eoi();
    let _ = write(&mut r, reg::LVT_ERROR, 0x03);
    let _ = write(&mut r, 0x3b, 1);
    let _ = write(&mut r, reg::ESR, 0);
    assert_eq!(read(&mut r, reg::ESR), ESR_ILLEGAL_REGISTER | ESR_RECEIVE_ILLEGAL_VECTOR);
}

/// SDM 12.12.5, figure 12-27: every state to every state.
#[test]
fn apic_base_transitions() {
    let bits = |n: u64| LAPIC_BASE | n << 10;
    // Index: bit 1 enable, bit 0 x2APIC. Rows: from. 0b01 cannot be reached.
    let legal = |from, to| matches!((from, to), (0, 0 | 2) | (2, 0 | 2 | 3) | (3, 0 | 3));
    for from in [0, 2, 3] {
        for to in 0..4 {
            let mut r = enabled();
            r.set_base(bits(from)).unwrap();
            let want = if legal(from, to) { Ok(()) } else { Err(GeneralProtection) };
            assert_eq!(r.set_base(bits(to)), want, "{from:#b} to {to:#b}");
            assert_eq!(r.base(), bits(if want.is_ok() { to } else { from }));
        }
    }
}

#[test]
fn apic_base_reserved_bits_and_address() {
    let mut r = enabled();
    for bit in (0..8).chain([9]).chain(40..64) {
        assert_eq!(r.set_base(0xfee0_0800 | 1 << bit), Err(GeneralProtection), "bit {bit}");
    }
    r.set_base(0xff_ffff_f900).unwrap();
    assert_eq!(r.base(), 0xff_ffff_f900);
    // Widths that make no sense must not panic.
    for bits in [0, 12, 52, 64, 255] {
        let _ = Registers::new(0, true, bits).set_base(0xfee0_0800);
    }
}

#[test]
fn global_disable_loses_state_and_answers_nothing() {
    let mut r = enabled();
    assert!(r.accept(0x40, Edge));
    r.set_base(LAPIC_BASE).unwrap();
    assert_eq!((r.mode(), r.deliverable()), (ApicMode::Disabled, None));
    assert_eq!(read(&mut r, reg::VERSION), 0);
    assert_eq!(r.msr_read(0x803, T0), Err(GeneralProtection));
    let _ = write(&mut r, reg::SVR, 0x1ff);
    assert!(!r.accept(0x40, Edge));
    r.set_base(LAPIC_BASE | BASE_ENABLE).unwrap();
    assert_eq!(read(&mut r, reg::SVR), 0xff);
}

#[test]
fn xapic_to_x2apic_keeps_state() {
    let mut r = enabled();
    r.set_tpr(0x30);
    assert!(r.accept(0x77, Edge));
    let _ = write(&mut r, reg::ICR_HIGH, 0xff00_0000);
    r.set_base(r.base() | BASE_X2APIC).unwrap();
    assert_eq!(r.msr_read(0x808, T0), Ok(0x30));
    assert_eq!(r.msr_read(0x830, T0), Ok(0));
    assert_eq!(r.deliverable(), Some(0x77));
    assert_eq!(read(&mut r, reg::VERSION), 0, "no memory registers in x2APIC mode");
}

/// SDM table 12-6, with the reserved bits of each register: every MSR of the range, every bit.
#[test]
fn x2apic_general_protection() {
    let rw = |register| -> u64 {
        match register {
            reg::TPR => 0xff,
            reg::SVR => 0x13ff,
            reg::ICR => 0xffff_ffff_000c_dfff,
            reg::LVT_TIMER => 0x7_50ff,
            0x33 | 0x34 => 0x1_57ff,
            0x35 | 0x36 => 0x1_f7ff,
            reg::LVT_ERROR => 0x1_50ff,
            reg::INITIAL_COUNT => 0xffff_ffff,
            reg::DIVIDE => 0xb,
            _ => 0,
        }
    };
    for register in 0..=0xff {
        let index = MSR_X2APIC_FIRST + register;
        let readable = matches!(register, 2 | 3 | 8 | 0xa | 0xd | 0xf..=0x28 | 0x30 | 0x32..=0x39 | 0x3e);
        let writable = matches!(register, 8 | 0xb | 0xf | 0x28 | 0x30 | 0x32..=0x38 | 0x3e | 0x3f);
        assert_eq!(x2apic().msr_read(index, T0).is_ok(), readable, "read {register:#x}");
        assert_eq!(x2apic().msr_write(index, 0, T0).is_ok(), writable, "write {register:#x}");
        if !writable {
            continue;
        }
        let allowed = if register == reg::SELF_IPI { 0xff } else { rw(register) };
        for bit in 0..64 {
            let ok = x2apic().msr_write(index, 1 << bit, T0).is_ok();
            assert_eq!(ok, allowed >> bit & 1 != 0, "register {register:#x} bit {bit}");
        }
    }
    assert_eq!(enabled().msr_read(0x803, T0), Err(GeneralProtection), "xAPIC mode");
}

#[test]
fn xapic_registers_keep_only_their_bits() {
    for (register, kept) in [
        (reg::TPR, 0xff),
        (reg::LDR, 0xff00_0000),
        (reg::DFR, 0xffff_ffff),
        (reg::SVR, 0x13ff),
        (reg::ICR, 0x000c_cfff),
        (reg::ICR_HIGH, 0xff00_0000),
        (reg::LVT_TIMER, 0x7_00ff),
        (reg::LVT_TIMER + 3, 0x1_a7ff),
        (reg::INITIAL_COUNT, 0xffff_ffff),
        (reg::DIVIDE, 0xb),
        (reg::ID, 3 << 24),
        (reg::PPR, 0),
        (reg::IRR, 0),
    ] {
        let mut r = enabled();
        let _ = write(&mut r, register, u32::MAX);
        if register == reg::INITIAL_COUNT {
            assert_eq!(r.timer.initial_count(), kept);
        }
        assert_eq!(read(&mut r, register), kept, "{register:#x}");
    }
    let mut r = enabled();
    let _ = write(&mut r, reg::DFR, 0);
    assert_eq!(read(&mut r, reg::DFR), 0x0fff_ffff);
    for offset in [0xf1, 0xf4, 0xf8, 0x1000, u64::MAX] {
        assert_eq!(r.mmio_read(offset, T0), 0);
        assert_eq!(r.mmio_write(offset, 0, T0), Effect::None);
    }
    assert_eq!(read(&mut r, reg::SVR), 0x1ff);
}

#[test]
fn commands_leave_with_what_was_written() {
    let mut r = enabled();
    let _ = write(&mut r, reg::ICR_HIGH, 0x0500_0000);
    assert_eq!(write(&mut r, reg::ICR, 0x0000_4041), Effect::SendIpi(0x0500_0000_0000_4041));
    assert_eq!(
        write(&mut r, reg::ICR, 0x0000_0400),
        Effect::SendIpi(0x0500_0000_0000_0400),
        "NMI, no vector"
    );
    let mut r = x2apic();
    assert_eq!(r.msr_write(0x830, 0xabcd_1234_0000_1041, T0), Ok(Effect::SendIpi(0xabcd_1234_0000_0041)));
    assert_eq!(r.msr_write(0x83f, 0x80, T0), Ok(Effect::None));
    assert_eq!(r.deliverable(), Some(0x80));
    assert_eq!(r.msr_write(0x83f, 0x08, T0), Ok(Effect::None));
    assert_eq!(r.errors, ESR_SEND_ILLEGAL_VECTOR);
}

/// SDM 12.12.10.2.
#[test]
fn logical_x2apic_id_follows_from_the_id() {
    for (id, ldr) in [(0, 1), (3, 8), (15, 0x8000), (16, 0x1_0001), (0x1234, 0x0123_0010)] {
        let mut r = Registers::new(id, false, 40);
        r.set_base(r.base() | BASE_X2APIC).unwrap();
        assert_eq!(r.msr_read(0x80d, T0), Ok(ldr));
        assert_eq!(r.identity().logical, ldr as u32);
    }
}

#[test]
fn identity_survives_packing() {
    for mode in [ApicMode::Disabled, ApicMode::XApic, ApicMode::X2Apic] {
        for (enabled, cluster) in [(false, false), (true, false), (false, true), (true, true)] {
            let identity = Identity { mode, enabled, cluster, logical: 0xdead_beef };
            assert_eq!(Identity::unpack(identity.pack()), identity);
        }
    }
}

#[test]
fn a_timer_that_expires_masked_is_lost() {
    let at = |ns| Now { tsc: 2 * ns, ns };
    let mut r = enabled();
    let _ = write(&mut r, reg::LVT_TIMER, LVT_MASKED | 0x40);
    let _ = write(&mut r, reg::INITIAL_COUNT, 50);
    assert_eq!(r.next_expiry(), None);
    let _ = r.mmio_write(0x320, 0x40, at(101));
    assert_eq!((r.deliverable(), r.next_expiry()), (None, None));
    // Unmasked in time it fires.
    let _ = r.mmio_write(0x320, LVT_MASKED | 0x40, at(200));
    let _ = r.mmio_write(0x380, 50, at(200));
    let _ = r.mmio_write(0x320, 0x40, at(299));
    assert_eq!(r.next_expiry(), Some(Expiry::Ns(300)));
    r.advance(at(300));
    assert_eq!(r.deliverable(), Some(0x40));
}

#[test]
fn lint_pins_follow_their_entries() {
    let mut r = enabled();
    assert_eq!(r.pulse(LocalPin::Lint1), None, "masked");
    let _ = write(&mut r, reg::LVT_TIMER + 4, 0x400);
    assert_eq!(r.pulse(LocalPin::Lint1), Some(DeliveryMode::Nmi));
    let _ = write(&mut r, reg::LVT_TIMER + 3, 0x66);
    assert_eq!(r.pulse(LocalPin::Lint0), Some(DeliveryMode::Fixed));
    assert_eq!(r.deliverable(), Some(0x66));
    let _ = write(&mut r, reg::LVT_TIMER + 3, 0x366);
    assert_eq!(r.pulse(LocalPin::Lint0), None, "reserved mode");
}

/// A plain model of 12.8: sets of vectors, no bit tricks.
#[derive(Default)]
struct Model {
    irr: BTreeSet<u8>,
    isr: BTreeSet<u8>,
    level: BTreeSet<u8>,
    tpr: u8,
    on: bool,
}

impl Model {
    fn deliverable(&self) -> Option<u8> {
        let in_service = self.isr.last().map_or(0, |v| v / 16);
        self.irr.last().copied().filter(|v| v / 16 > in_service && v / 16 > self.tpr / 16)
    }
}

#[test]
fn random_interrupts_agree_with_a_plain_model() {
    let mut random = Random(0x1009);
    let (mut r, mut m) = (enabled(), Model { on: true, ..Model::default() });
    for step in 0..400_000 {
        let v = random.next() as u8;
        match random.below(16) {
            0..=5 => {
                let level = random.below(2) == 0;
                let accepted = r.accept(v, if level { Level } else { Edge });
                assert_eq!(accepted, m.on && v >= 16, "step {step}");
                if accepted {
                    m.irr.insert(v);
                    if level {
                        m.level.insert(v)
                    } else {
                        m.level.remove(&v)
                    };
                }
            }
            6..=9 => {
                let want = m.deliverable();
                assert_eq!(r.acknowledge(), want, "step {step}");
                if let Some(v) = want {
                    m.irr.remove(&v);
                    m.isr.insert(v);
                }
            }
            10..=12 => {
                let want = match m.isr.pop_last() {
                    Some(v) if m.level.contains(&v) => Effect::BroadcastEoi(v),
                    _ => Effect::None,
                };
                assert_eq!(write(&mut r, reg::EOI, 0), want, "step {step}");
            }
            13 => {
                m.tpr = if random.below(2) == 0 { 0 } else { v };
                let _ = write(&mut r, reg::TPR, m.tpr.into());
            }
            14 if random.below(8) == 0 => {
                m.on = !m.on;
                let _ = write(&mut r, reg::SVR, if m.on { 0x1ff } else { 0xff });
            }
            _ => {}
        }
        assert_eq!(r.deliverable(), m.deliverable(), "step {step}");
        if step % 64 == 0 {
            for v in 0..=255 {
                assert_eq!(r.irr.contains(v), m.irr.contains(&v));
                assert_eq!(r.isr.contains(v), m.isr.contains(&v));
            }
        }
    }
}

/// Random values to random registers in all modes, while time runs: no panic, and never a vector below
/// 16, nor two of one priority class in service.
#[test]
fn random_register_accesses_keep_the_invariants() {
    let mut random = Random(0x1010);
    let mut r = enabled();
    let mut now = T0;
    for step in 0..400_000 {
        // Mostly small steps, at times a leap.
        now.ns = now.ns.saturating_add(random.next() >> (24 + random.below(40)));
        now.tsc = now.ns.wrapping_mul(2);
        let value = random.next() >> random.below(64);
        let register = random.below(0x42) as u32;
        match random.below(8) {
            0 | 1 => {
                let _ = r.mmio_write(u64::from(register) * 16, value as u32, now);
            }
            2 | 3 => {
                let _ = r.msr_write(MSR_X2APIC_FIRST + register, value, now);
            }
            4 => {
                let _ = r.mmio_read(u64::from(register) * 16, now);
                let _ = r.msr_read(MSR_X2APIC_FIRST + register, now);
            }
            5 => {
                r.accept(value as u8, if value & 256 == 0 { Edge } else { Level });
                r.acknowledge();
            }
            6 => {
                r.set_tsc_deadline(value, now);
                r.tsc_adjust.set(random.next());
            }
            _ if random.below(16) == 0 => {
                let _ = r.set_base(LAPIC_BASE | random.below(4) << 10);
                // Software-enable, or nothing much happens.
                let _ = write(&mut r, reg::SVR, 0x1ff);
                let _ = r.msr_write(MSR_X2APIC_FIRST + reg::SVR, 0x1ff, now);
            }
            _ => {
                r.acknowledge();
            }
        }
        for set in [r.irr, r.isr] {
            assert_eq!(set.bank(0) & 0xffff, 0, "step {step}: vector below 16");
        }
        for bank in 0..8 {
            let bits = r.isr.bank(bank);
            assert!((bits & 0xffff).count_ones() <= 1 && (bits >> 16).count_ones() <= 1, "step {step}");
        }
        if let Some(v) = r.deliverable() {
            assert!(v >> 4 > r.ppr() >> 4);
        }
        if r.mode() == ApicMode::Disabled {
            assert_eq!((r.deliverable(), r.next_expiry()), (None, None));
        }
        if let Some(Expiry::Ns(at)) = r.next_expiry() {
            assert!(now.ns == u64::MAX || at > 0);
        }
    }
}

//! Events: what is saved where, what is loaded, and that nothing else changes.

use pvm::testing::Call;
use pvm::{Event, Mode, Next};

use crate::rig::*;

/// What every event from user mode to `entry` leaves, beside what it reports.
fn expected_entry_from_user(before: &Vcpu, entry: u64) -> Vcpu {
    let mut to = before.clone();
    let user = before.cpu.registers;
    to.put_u16(at::USER_CS, 0x33);
    to.put_u16(at::USER_SS, 0x2b);
    to.put_u64(at::USER_GSBASE, user.gs_base);
    to.put_u32(at::EFLAGS, user.rflags as u32);
    to.put_u32(at::PKRU, user.pkru as u32);
    to.put_u64(at::RIP, user.rip);
    to.put_u64(at::RSP, user.rsp);
    to.put_u64(at::RCX, user.rcx);
    to.put_u64(at::R11, user.r11);
    let r = &mut to.cpu.registers;
    (r.rip, r.rcx) = (entry, entry);
    (r.rflags, r.r11) = (ENTRY_FLAGS, ENTRY_FLAGS);
    r.rsp = SUPERVISOR_RSP;
    r.gs_base = SUPERVISOR_GS;
    r.cr3 = SUPERVISOR_ROOT;
    r.pkru = 0;
    to
}

/// The mode and MSR_PVM_SWITCH_CR3 cannot be set from outside: compares them apart from the rest.
#[track_caller]
fn assert_entered_supervisor(after: &mut Vcpu, expected: &mut Vcpu) {
    assert_eq!(after.pvm.mode(), Mode::Supervisor);
    assert_eq!(after.get(msr::SWITCH_CR3), Some(USER_ROOT));
    assert_eq!(expected.get(msr::SWITCH_CR3), Some(SUPERVISOR_ROOT));
    let (now, then) = (after.own_msrs(), expected.own_msrs());
    assert_eq!((&now[..7], now[8]), (&then[..7], then[8]));
    assert_eq!(
        after.cpu.take_calls(),
        [Call::EnterSupervisor(pvm::processor::Context { cr3: SUPERVISOR_ROOT, pkru: 0 })]
    );
    expected.pvm = after.pvm.clone();
    after.assert_is(expected);
}

#[test]
fn a_vector_from_user_mode_goes_through_the_shared_structure() {
    // Exceptions, the two user vectors, interrupts: one entry for all.
    for vector in [0, 1, 3, 4, 6, 16, 19, 31, 32, 0x80, 0xef, 255] {
        let mut v = Vcpu::user();
        let mut expected = expected_entry_from_user(&v, EVENT_ENTRY);
        expected.put_u32(at::EVENT_VECTOR, vector.into());
        assert_eq!(v.deliver(Event::new(vector)), Ok(()));
        assert_entered_supervisor(&mut v, &mut expected);
    }
}

#[test]
fn an_error_code_from_user_mode_goes_beside_the_vector() {
    for (vector, code) in [(8, 0), (10, 0x63), (13, 0xffff_ffff), (17, 0), (21, 3)] {
        let mut v = Vcpu::user();
        let mut expected = expected_entry_from_user(&v, EVENT_ENTRY);
        expected.put_u32(at::EVENT_VECTOR, vector.into());
        expected.put_u32(at::EVENT_ERRCODE, code);
        assert_eq!(v.deliver(Event::with_code(vector, code)), Ok(()));
        assert_entered_supervisor(&mut v, &mut expected);
        assert_eq!(v.cpu.bytes::<8>(PVCS + 8), [u32::to_le_bytes(code), [vector, 0, 0, 0]].concat()[..]);
    }
}

#[test]
fn a_page_fault_from_user_mode_saves_cr2() {
    let mut v = Vcpu::user();
    v.cpu.registers.cr2 = 0x0000_7123_4567_89ab;
    let mut expected = expected_entry_from_user(&v, EVENT_ENTRY);
    expected.put_u32(at::EVENT_VECTOR, 14);
    expected.put_u32(at::EVENT_ERRCODE, 0x15);
    expected.put_u64(at::CR2, 0x0000_7123_4567_89ab);
    assert_eq!(v.deliver(Event::with_code(14, 0x15)), Ok(()));
    assert_entered_supervisor(&mut v, &mut expected);
}

#[test]
fn a_system_call_reports_no_vector() {
    let mut v = Vcpu::user();
    v.cpu.registers.cr2 = 0x1234;
    let flags = v.cpu.registers.rflags;
    // What SYSCALL does to RCX and R11 comes first: it is what the guest finds in the structure.
    let mut at_syscall = v.clone();
    at_syscall.cpu.registers.rip = 0x40_2002;
    at_syscall.cpu.registers.rcx = 0x40_2002;
    at_syscall.cpu.registers.r11 = flags;
    let mut expected = expected_entry_from_user(&at_syscall, LSTAR);
    assert_eq!(v.syscall_at(0x40_2000), Ok(Next::Run));
    assert_entered_supervisor(&mut v, &mut expected);
    assert_eq!(v.cpu.bytes::<16>(PVCS + 8), std::array::from_fn(|n| 0x88 + n as u8), "vector, code, cr2");
    // The number and the arguments are where the user put them.
    assert_eq!(v.cpu.registers.rax, Vcpu::user().cpu.registers.rax);
}

#[test]
fn the_interrupt_flag_is_unchanged_from_user_mode() {
    for flags in [0, IF, IF | IP, u64::MAX] {
        for syscall in [false, true] {
            let mut v = Vcpu::user();
            v.put_u64(at::EVENT_FLAGS, flags);
            if syscall {
                assert_eq!(v.syscall_at(0x40_2000), Ok(Next::Run));
            } else {
                assert_eq!(v.deliver(Event::new(32)), Ok(()));
            }
            assert_eq!(v.pvcs_u64(at::EVENT_FLAGS), flags);
            // The flags that were saved are the user's, for whom IF is one.
            assert_eq!(v.pvcs_u64(at::EFLAGS) & IF, IF);
        }
    }
}

#[test]
fn protection_keys_are_saved_and_everything_is_allowed() {
    let mut v = Vcpu::user();
    v.cpu.registers.pkru = 0xffff_fff0;
    assert_eq!(v.deliver(Event::new(3)), Ok(()));
    assert_eq!(v.cpu.bytes(PVCS + 92), 0xffff_fff0u32.to_le_bytes());
    assert_eq!(v.cpu.registers.pkru, 0);
}

#[test]
fn supervisor_keys_are_loaded_if_they_are_on() {
    let mut v = Vcpu::supervisor();
    v.set(msr::PKRS, 0x0000_000c);
    assert_eq!(v.cpu.registers.pkru, 0, "CR4.PKS is clear");
    v.cpu.registers.cr4 |= CR4_PKS;
    v.set(msr::PKRS, 0x0000_00cc);
    assert_eq!(v.cpu.registers.pkru, 0xcc, "in supervisor mode PKRS is PKRU");
    v.put_u16(at::USER_CS, 0x33);
    v.put_u16(at::USER_SS, 0x2b);
    v.put_u32(at::PKRU, 0x5555_5554);
    assert_eq!(v.syscall_at(RETU_RIP), Ok(Next::Run));
    assert_eq!(v.cpu.registers.pkru, 0x5555_5554);
    for event in [true, false] {
        let mut v = v.clone();
        if event {
            assert_eq!(v.deliver(Event::new(14)), Ok(()));
        } else {
            assert_eq!(v.syscall_at(0), Ok(Next::Run));
        }
        assert_eq!(v.cpu.registers.pkru, 0xcc);
    }
}

/// The frame of an exception in supervisor mode, as bytes from its lowest address on.
fn frame_bytes(v: &Vcpu, vector: u8, code: u32, flags: u64) -> Vec<u8> {
    let r = &v.cpu.registers;
    let mut bytes = [code.to_le_bytes(), [vector, 0, 0, 0]].concat();
    for word in [r.rip, SUPERVISOR_CS, flags, r.rsp, SUPERVISOR_SS, r.rcx, r.r11] {
        bytes.extend(word.to_le_bytes());
    }
    assert_eq!(bytes.len(), 64);
    bytes
}

#[test]
fn an_exception_in_supervisor_mode_is_framed_below_the_red_zone() {
    for (rsp, redzone, stack) in [
        (STACK + 0x800, 0, STACK + 0x7c0),
        (STACK + 0x80f, 0, STACK + 0x7c0),
        (STACK + 0x808, 16, STACK + 0x7b0),
        (STACK + 0x800, 0x80, STACK + 0x740),
        (STACK + 0x801, 1, STACK + 0x7c0),
        (STACK + 0x800, 1, STACK + 0x7b0),
        (STACK + 0x7ff, 0x37, STACK + 0x780),
        (STACK + 0x1000, 0, STACK + 0xfc0),
        // Into the middle of the address space and back: only the sum counts.
        (0x10, 0u64.wrapping_sub(STACK + 0x800), STACK + 0x7d0),
    ] {
        for (vector, code) in [(0, None), (6, None), (13, Some(0xfff8)), (17, Some(0)), (31, None)] {
            let mut v = Vcpu::supervisor();
            v.set(msr::SUPERVISOR_REDZONE, redzone);
            v.cpu.registers.rsp = rsp;
            let mut expected = v.clone();
            let frame = frame_bytes(&v, vector, code.unwrap_or(0), 0x46);
            expected.cpu.poke(stack, &frame);
            let r = &mut expected.cpu.registers;
            (r.rip, r.rcx) = (EVENT_ENTRY + 256, EVENT_ENTRY + 256);
            (r.rflags, r.r11) = (ENTRY_FLAGS, ENTRY_FLAGS);
            r.rsp = stack;
            let mut event = Event::new(vector);
            event.error_code = code;
            assert_eq!(v.deliver(event), Ok(()));
            assert_eq!(v.cpu.take_calls(), [Call::WriteFrame(stack)]);
            v.assert_is(&mut expected);
        }
    }
}

#[test]
fn the_vector_is_in_the_upper_half_of_the_error_code() {
    let mut v = Vcpu::supervisor();
    assert_eq!(v.deliver(Event::with_code(13, 0x8765_4321)), Ok(()));
    assert_eq!(v.cpu.bytes(v.cpu.registers.rsp), [0x21, 0x43, 0x65, 0x87, 13, 0, 0, 0]);
}

#[test]
fn a_page_fault_in_supervisor_mode_saves_cr2_and_nothing_else_there() {
    let mut v = Vcpu::supervisor();
    v.cpu.registers.cr2 = 0xffff_c900_dead_beef;
    let mut expected = v.clone();
    let stack = STACK + 0xd40;
    expected.cpu.poke(stack, &frame_bytes(&v, 14, 2, 0x46));
    expected.put_u64(at::CR2, 0xffff_c900_dead_beef);
    let r = &mut expected.cpu.registers;
    (r.rip, r.rcx) = (EVENT_ENTRY + 256, EVENT_ENTRY + 256);
    (r.rflags, r.r11, r.rsp) = (ENTRY_FLAGS, ENTRY_FLAGS, stack);
    assert_eq!(v.deliver(Event::with_code(14, 2)), Ok(()));
    v.assert_is(&mut expected);
}

#[test]
fn an_exception_in_supervisor_mode_saves_and_clears_the_interrupt_flag() {
    for (flags, saved, left) in
        [(0, 0x46, 0), (IF, 0x246, 0), (IP, 0x46, IP), (IF | IP, 0x246, IP), (u64::MAX, 0x246, !IF)]
    {
        let mut v = Vcpu::supervisor();
        v.put_u64(at::EVENT_FLAGS, flags);
        assert_eq!(v.deliver(Event::new(6)), Ok(()));
        assert_eq!(v.cpu.bytes(v.cpu.registers.rsp + 24), u64::to_le_bytes(saved));
        assert_eq!(v.pvcs_u64(at::EVENT_FLAGS), left);
        assert_eq!(v.cpu.registers.rflags, ENTRY_FLAGS, "the underlying flag is always one");
    }
}

#[test]
fn exceptions_in_supervisor_mode_nest() {
    let mut v = Vcpu::supervisor();
    v.set(msr::SUPERVISOR_REDZONE, 0);
    let first = v.cpu.registers.rsp & !15;
    for depth in 1..=8 {
        assert_eq!(v.deliver(Event::new(6)), Ok(()));
        assert_eq!(v.cpu.registers.rsp, first - 64 * depth);
    }
    let outer = EVENT_ENTRY + 256;
    assert_eq!(v.cpu.bytes(v.cpu.registers.rsp + 8), outer.to_le_bytes(), "RIP");
    assert_eq!(v.cpu.bytes(v.cpu.registers.rsp + 48), outer.to_le_bytes(), "RCX");
    assert_eq!(v.cpu.bytes(v.cpu.registers.rsp + 56), ENTRY_FLAGS.to_le_bytes(), "R11");
}

#[test]
fn exceptions_in_supervisor_mode_need_no_shared_structure() {
    let mut v = Vcpu::supervisor();
    v.set(msr::VCPU_STRUCT, 0);
    assert_eq!(v.deliver(Event::new(6)), Ok(()));
    assert_eq!(v.cpu.registers.rip, EVENT_ENTRY + 256);
    assert_eq!(v.cpu.bytes(v.cpu.registers.rsp + 24), 0x46u64.to_le_bytes(), "IF reads as zero");
}

#[test]
fn an_interrupt_in_supervisor_mode_goes_through_the_shared_structure() {
    for (vector, flags, saved) in [(32, IF, 0x246), (0x80, IF | IP, 0x246), (0xec, 0, 0x46), (255, IF, 0x246)]
    {
        for (rsp, redzone, stack) in [
            (STACK + 0x808, 0x80, STACK + 0x780),
            (STACK + 0x800, 0, STACK + 0x800),
            (0, 0x20, u64::MAX - 31),
        ] {
            let mut v = Vcpu::supervisor();
            v.put_u64(at::EVENT_FLAGS, flags);
            v.set(msr::SUPERVISOR_REDZONE, redzone);
            v.cpu.registers.rsp = rsp;
            let before = v.cpu.registers;
            let mut expected = v.clone();
            expected.put_u64(at::EVENT_FLAGS, flags & !IF);
            expected.put_u32(at::EVENT_VECTOR, vector);
            expected.put_u32(at::EFLAGS, saved);
            expected.put_u64(at::RIP, before.rip);
            expected.put_u64(at::RSP, before.rsp);
            expected.put_u64(at::RCX, before.rcx);
            expected.put_u64(at::R11, before.r11);
            let r = &mut expected.cpu.registers;
            (r.rip, r.rcx) = (EVENT_ENTRY + 512, EVENT_ENTRY + 512);
            (r.rflags, r.r11) = (ENTRY_FLAGS, ENTRY_FLAGS);
            r.rsp = stack;
            assert_eq!(v.deliver(Event::new(vector as u8)), Ok(()));
            assert_eq!(v.cpu.take_calls(), [], "the stack is not written");
            v.assert_is(&mut expected);
        }
    }
}

#[test]
fn a_resume_flag_goes_to_the_saved_flags_only() {
    const RF: u64 = 1 << 16;
    let event = |vector| Event { flags: RF, ..Event::new(vector) };
    let mut v = Vcpu::user();
    assert_eq!(v.deliver(event(1)), Ok(()));
    assert_eq!(v.cpu.bytes(PVCS + 88), 0x0001_0ad7u32.to_le_bytes());
    assert_eq!(v.cpu.registers.rflags, ENTRY_FLAGS);
    assert_eq!(v.deliver(event(1)), Ok(()));
    assert_eq!(v.cpu.bytes(v.cpu.registers.rsp + 24), 0x1_0002u64.to_le_bytes());
    assert_eq!(v.cpu.registers.rflags, ENTRY_FLAGS);
}

#[test]
fn an_nmi_masks_nmis_until_a_return() {
    let masked = || {
        let mut v = Vcpu::supervisor();
        assert!(v.pvm.nmi_open());
        assert_eq!(v.deliver(Event::nmi()), Ok(()));
        assert!(!v.pvm.nmi_open());
        assert_eq!(v.cpu.bytes(v.cpu.registers.rsp), [0, 0, 0, 0, 2, 0, 0, 0]);
        v
    };
    // No other event and no hypercall opens them.
    let mut v = masked();
    assert_eq!(v.deliver(Event::new(6)), Ok(()));
    assert_eq!(v.deliver(Event::new(0x40)), Ok(()));
    for number in 0x1708_8200..=0x1708_8209 {
        let _ = v.pvm.clone();
        v.cpu.registers.rax = number;
        let _ = v.syscall_at(0x1000);
        assert!(!v.pvm.nmi_open(), "{number:#x}");
    }
    // ERETS does, from whatever frame.
    v.cpu.registers.rsp = STACK;
    assert_eq!(v.syscall_at(RETS_RIP), Ok(Next::Run));
    assert!(v.pvm.nmi_open());
    // So does ERETU; from user mode an NMI masks too.
    let mut v = masked();
    v.put_u16(at::USER_CS, 0x33);
    v.put_u16(at::USER_SS, 0x2b);
    assert_eq!(v.syscall_at(RETU_RIP), Ok(Next::Run));
    assert!(v.pvm.nmi_open());
    assert_eq!(v.deliver(Event::nmi()), Ok(()));
    assert!(!v.pvm.nmi_open());
    assert_eq!(v.cpu.bytes(PVCS + 12), 2u32.to_le_bytes());
    assert_eq!(v.cpu.registers.rip, EVENT_ENTRY);
    // An NMI is no maskable interrupt: the flag does not matter, and the exception entry is used.
    let v = masked();
    assert_eq!(v.cpu.registers.rip, EVENT_ENTRY + 256);
}

#[test]
fn interrupts_are_always_open_in_user_mode() {
    for flags in [0, IF, IP] {
        let mut v = Vcpu::user();
        v.put_u64(at::EVENT_FLAGS, flags);
        assert!(v.pvm.interrupts_open(&mut v.cpu));
    }
    // Even if there is nowhere to deliver them to.
    let mut v = Vcpu::user();
    v.cpu.pages.remove(&PVCS);
    assert!(v.pvm.interrupts_open(&mut v.cpu));
}

#[test]
fn in_supervisor_mode_the_structure_opens_interrupts() {
    let mut v = Vcpu::supervisor();
    for (flags, open) in [(0, false), (IF, true), (IP, false), (IF | IP, true), (!IF, false)] {
        v.put_u64(at::EVENT_FLAGS, flags);
        assert_eq!(v.pvm.interrupts_open(&mut v.cpu), open, "{flags:#x}");
    }
    // The underlying flag says nothing.
    v.put_u64(at::EVENT_FLAGS, 0);
    assert_eq!(v.cpu.registers.rflags & IF, IF);
    assert!(!v.pvm.interrupts_open(&mut v.cpu));
    // Without a structure the flag is zero.
    v.put_u64(at::EVENT_FLAGS, IF);
    v.set(msr::VCPU_STRUCT, 0);
    assert!(!v.pvm.interrupts_open(&mut v.cpu));
}

#[test]
fn a_waiting_interrupt_sets_the_pending_flag_alone() {
    let mut v = Vcpu::supervisor();
    let mut expected = v.clone();
    expected.put_u64(at::EVENT_FLAGS, IP);
    for _ in 0..2 {
        v.pvm.interrupt_waits(&mut v.cpu);
        assert_eq!(v.pvm.stats().interrupt_windows, 1, "counted when it is set");
        v.assert_is(&mut expected);
    }
    // With no structure there is nothing to tell.
    let mut v = Vcpu::supervisor();
    v.set(msr::VCPU_STRUCT, 0);
    let mut expected = v.clone();
    v.pvm.interrupt_waits(&mut v.cpu);
    v.assert_is(&mut expected);
    assert_eq!(v.pvm.stats().interrupt_windows, 0);
}

#[test]
fn mode_changes_flush_nothing() {
    let mut v = Vcpu::user();
    assert_eq!(v.deliver(Event::new(14)), Ok(()));
    v.put_u16(at::USER_CS, 0x33);
    v.put_u16(at::USER_SS, 0x2b);
    assert_eq!(v.syscall_at(RETU_RIP), Ok(Next::Run));
    assert_eq!(v.syscall_at(0x40_0000), Ok(Next::Run));
    let calls = v.cpu.take_calls();
    assert_eq!(calls.len(), 3);
    assert!(calls.iter().all(|c| matches!(c, Call::EnterUser(..) | Call::EnterSupervisor(_))), "{calls:?}");
}

#[test]
fn each_kind_of_event_is_counted() {
    let mut v = Vcpu::user();
    let before = *v.pvm.stats();
    assert_eq!(v.deliver(Event::new(32)), Ok(()));
    assert_eq!(v.deliver(Event::new(6)), Ok(()));
    assert_eq!(v.deliver(Event::new(32)), Ok(()));
    let now = v.pvm.stats();
    assert_eq!(now.user_events, before.user_events + 1);
    assert_eq!(now.supervisor_exceptions, before.supervisor_exceptions + 1);
    assert_eq!(now.supervisor_interrupts, before.supervisor_interrupts + 1);
    assert_eq!(now.events(), before.events() + 3);
    assert_eq!(now.switches(), before.switches() + 1);
}

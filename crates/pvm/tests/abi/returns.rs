//! ERETU and ERETS, and how a vCPU comes to be in PVM mode at all.

use pvm::processor::{Context, Selectors};
use pvm::testing::{Call, Plain, Use};
use pvm::{AddressRanges, Config, Event, Mode, Next, Pvm};

use crate::rig::*;

/// In supervisor mode with a user's state in the structure.
fn about_to_return() -> Vcpu {
    let mut v = Vcpu::supervisor();
    v.put_u64(at::EVENT_FLAGS, 0);
    v.put_u16(at::USER_CS, 0x33);
    v.put_u16(at::USER_SS, 0x2b);
    v.put_u64(at::USER_GSBASE, 0x0000_6666_0000_0008);
    v.put_u32(at::EFLAGS, 0x246);
    v.put_u32(at::PKRU, 0x5555_5554);
    v.put_u64(at::RIP, 0x40_1000);
    v.put_u64(at::RSP, 0x7fff_ffff_e008);
    v.put_u64(at::RCX, 0xc0c0_c0c0_0000_0009);
    v.put_u64(at::R11, 0x1b1b_1b1b_0000_000a);
    v
}

#[test]
fn eretu_loads_all_from_the_structure() {
    for (cs, flags, left) in [(0x33, 0, 0), (0x33, IF, IF), (0x23, IF | IP, IF), (0x23, IP, 0)] {
        let mut v = about_to_return();
        v.put_u16(at::USER_CS, cs);
        v.put_u64(at::EVENT_FLAGS, flags);
        let supervisor = v.cpu.registers;
        let mut expected = v.clone();
        expected.put_u64(at::EVENT_FLAGS, left);
        expected.set(msr::SUPERVISOR_RSP, supervisor.rsp);
        expected.set(msr::SWITCH_CR3, SUPERVISOR_ROOT);
        expected.cpu.selectors = Selectors { cs, ss: 0x2b };
        expected.cpu.registers = pvm::testing::Registers {
            rip: 0x40_1000,
            rflags: 0x246,
            rsp: 0x7fff_ffff_e008,
            rcx: 0xc0c0_c0c0_0000_0009,
            r11: 0x1b1b_1b1b_0000_000a,
            gs_base: 0x0000_6666_0000_0008,
            pkru: 0x5555_5554,
            cr3: USER_ROOT,
            ..supervisor
        };
        assert_eq!(v.syscall_at(RETU_RIP), Ok(Next::Run));
        assert_eq!(v.pvm.mode(), Mode::User);
        let context = Context { cr3: USER_ROOT, pkru: 0x5555_5554 };
        assert_eq!(v.cpu.take_calls(), [Call::EnterUser(Selectors { cs, ss: 0x2b }, context)]);
        assert_eq!(v.own_msrs(), expected.own_msrs());
        assert_eq!(v.get(msr::KERNEL_GS_BASE), Some(SUPERVISOR_GS), "not updated");
        expected.pvm = v.pvm.clone();
        v.assert_is(&mut expected);
    }
}

#[test]
fn eretu_ignores_the_privilege_in_the_selectors() {
    for (cs, ss) in [(0x30, 0x28), (0x31, 0x2a)] {
        let mut v = about_to_return();
        v.put_u16(at::USER_CS, cs);
        v.put_u16(at::USER_SS, ss);
        assert_eq!(v.syscall_at(RETU_RIP), Ok(Next::Run));
        assert_eq!(v.cpu.selectors, Selectors { cs: 0x33, ss: 0x2b });
        assert_eq!(v.cpu.registers.rip, 0x40_1000);
    }
}

#[test]
fn eretu_standardises_flags() {
    for (saved, loaded) in [
        (0, 0x202),
        (0xffff_ffff, 0x0025_4fd7),
        // IOPL, VM, VIF and VIP go; IF and the fixed bit come.
        (0x001a_3000, 0x202),
        (0x0000_0100, 0x302),
        (0x0024_4cd5, 0x0024_4ed7),
    ] {
        let mut v = about_to_return();
        v.put_u32(at::EFLAGS, saved);
        assert_eq!(v.syscall_at(RETU_RIP), Ok(Next::Run));
        assert_eq!(v.cpu.registers.rflags, loaded, "{saved:#x}");
    }
}

#[test]
fn eretu_makes_the_gs_base_canonical() {
    for (bits, saved, loaded) in [
        (48, 0x0000_7fff_ffff_ffff, 0x0000_7fff_ffff_ffff),
        (48, 0x0000_8000_0000_0000, 0xffff_8000_0000_0000),
        (48, 0x1234_0000_0000_5678, 0x0000_0000_0000_5678),
        (48, 0x1234_9000_0000_5678, 0xffff_9000_0000_5678),
        (57, 0x0000_8000_0000_0000, 0x0000_8000_0000_0000),
        (57, 0x0100_0000_0000_0000, 0xff00_0000_0000_0000),
        (57, 0xfe34_9000_0000_5678, 0x0034_9000_0000_5678),
        (57, 0x00ff_ffff_ffff_ffff, 0x00ff_ffff_ffff_ffff),
    ] {
        let mut v = about_to_return();
        if bits == 57 {
            v.cpu.registers.cr4 |= CR4_LA57;
        }
        v.put_u64(at::USER_GSBASE, saved);
        assert_eq!(v.syscall_at(RETU_RIP), Ok(Next::Run));
        assert_eq!(v.cpu.registers.gs_base, loaded, "{bits} bits, {saved:#x}");
    }
}

#[test]
fn eretu_with_bad_selectors_is_a_general_protection_fault_of_the_user() {
    for (cs, ss, code) in [
        (0x10, 0x2b, 0x10),
        (0, 0x2b, 0),
        (0x2b, 0x2b, 0x28),
        (0x34, 0x2b, 0x34),
        (0x33, 0, 0),
        (0x33, 0x33, 0x30),
        (0x23, 0xfff8, 0xfff8),
    ] {
        let mut v = about_to_return();
        v.put_u16(at::USER_CS, cs);
        v.put_u16(at::USER_SS, ss);
        v.put_u64(at::EVENT_FLAGS, IF | IP);
        v.put_u64(at::USER_GSBASE, 0x1234_9000_0000_5678);
        let supervisor = v.cpu.registers;
        let mut expected = v.clone();
        // As if the return had worked and the user's first instruction had raised it.
        expected.put_u64(at::EVENT_FLAGS, IF);
        expected.put_u32(at::EVENT_VECTOR, 13);
        expected.put_u32(at::EVENT_ERRCODE, code);
        expected.put_u16(at::USER_CS, cs | 3);
        expected.put_u16(at::USER_SS, ss | 3);
        expected.put_u64(at::USER_GSBASE, 0xffff_9000_0000_5678);
        expected.set(msr::SUPERVISOR_RSP, supervisor.rsp);
        expected.cpu.registers = pvm::testing::Registers {
            rip: EVENT_ENTRY,
            rcx: EVENT_ENTRY,
            rflags: ENTRY_FLAGS,
            r11: ENTRY_FLAGS,
            ..supervisor
        };
        assert_eq!(v.syscall_at(RETU_RIP), Ok(Next::Run));
        v.assert_is(&mut expected);
    }
}

#[test]
fn every_selector_is_loaded_or_refused() {
    let mut v = about_to_return();
    for selector in 0..=u16::MAX {
        for (cs, ss) in [(selector, 0x2b), (0x33, selector)] {
            v.put_u16(at::USER_CS, cs);
            v.put_u16(at::USER_SS, ss);
            assert_eq!(v.syscall_at(RETU_RIP), Ok(Next::Run));
            let good = matches!(cs | 3, 0x33 | 0x23) && ss | 3 == 0x2b;
            let mode = if good { Mode::User } else { Mode::Supervisor };
            assert_eq!(v.pvm.mode(), mode, "{cs:#x}, {ss:#x}");
            if good {
                assert_eq!(v.deliver(Event::new(3)), Ok(()));
            } else {
                assert_eq!(v.cpu.bytes(PVCS + 8), u32::from(selector & !3).to_le_bytes(), "the error code");
                assert_eq!(v.cpu.bytes(PVCS + 12), 13u32.to_le_bytes());
            }
        }
    }
}

#[test]
fn a_round_trip_to_user_mode_keeps_the_supervisors_stack_and_roots() {
    let mut v = about_to_return();
    let rsp = v.cpu.registers.rsp;
    let pvcs: [u8; 128] = v.cpu.bytes(PVCS);
    assert_eq!(v.syscall_at(RETU_RIP), Ok(Next::Run));
    assert_eq!((v.cpu.registers.cr3, v.get(msr::SWITCH_CR3)), (USER_ROOT, Some(SUPERVISOR_ROOT)));
    assert_eq!(v.deliver(Event::new(0x20)), Ok(()));
    assert_eq!((v.cpu.registers.cr3, v.get(msr::SWITCH_CR3)), (SUPERVISOR_ROOT, Some(USER_ROOT)));
    assert_eq!(v.cpu.registers.rsp, rsp);
    let mut expected = pvcs;
    expected[12..16].copy_from_slice(&0x20u32.to_le_bytes());
    assert_eq!(v.cpu.bytes(PVCS), expected);
}

#[test]
fn erets_pops_the_frame() {
    for (flags, before, left) in
        [(0x246, 0, IF), (0x46, 0, 0), (0x46, IF | IP, 0), (0x246, IP, IF), (0x246, u64::MAX, !IP)]
    {
        for rsp in [STACK, STACK + 0x808, STACK + 0xfc0] {
            let mut v = Vcpu::supervisor();
            v.put_u64(at::EVENT_FLAGS, before);
            v.cpu.registers.rsp = rsp;
            // Error code, CS and SS are ignored.
            let frame = [u64::MAX, 0x1111, 0x33, flags, 0x2222, u64::MAX, 0x3333, 0x4444];
            v.cpu.poke(rsp, frame.map(u64::to_le_bytes).as_flattened());
            let mut expected = v.clone();
            expected.put_u64(at::EVENT_FLAGS, left);
            let r = &mut expected.cpu.registers;
            (r.rip, r.rflags, r.rsp, r.rcx, r.r11) = (0x1111, 0x246, 0x2222, 0x3333, 0x4444);
            assert_eq!(v.syscall_at(RETS_RIP), Ok(Next::Run));
            assert_eq!(v.cpu.take_calls(), []);
            v.assert_is(&mut expected);
        }
    }
}

#[test]
fn erets_standardises_flags() {
    let mut v = Vcpu::supervisor();
    v.cpu.registers.rsp = STACK;
    v.cpu.poke(STACK + 24, &u64::MAX.to_le_bytes());
    assert_eq!(v.syscall_at(RETS_RIP), Ok(Next::Run));
    assert_eq!(v.cpu.registers.rflags, 0x0025_4fd7);
    assert_eq!(v.pvcs_u64(at::EVENT_FLAGS), IF);
}

#[test]
fn erets_works_without_a_structure() {
    let mut v = Vcpu::supervisor();
    v.set(msr::VCPU_STRUCT, 0);
    v.cpu.registers.rsp = STACK;
    v.cpu.poke(STACK + 8, &0x1234u64.to_le_bytes());
    assert_eq!(v.syscall_at(RETS_RIP), Ok(Next::Run));
    assert_eq!(v.cpu.registers.rip, 0x1234);
}

#[test]
fn erets_undoes_an_exception() {
    for flags in [0, IF] {
        let mut v = Vcpu::supervisor();
        v.put_u64(at::EVENT_FLAGS, flags);
        let before = v.cpu.registers;
        assert_eq!(v.deliver(Event::with_code(13, 8)), Ok(()));
        assert_eq!(v.pvcs_u64(at::EVENT_FLAGS), 0);
        assert_eq!(v.syscall_at(RETS_RIP), Ok(Next::Run));
        assert_eq!(v.cpu.registers, before);
        assert_eq!(v.pvcs_u64(at::EVENT_FLAGS), flags);
    }
}

#[test]
fn plain_x86_until_64_bit_supervisor_mode() {
    let ranges = AddressRanges::new(402..434, None).unwrap();
    let mut pvm = Pvm::new(Config { generation: &pvm::abi::GENERATION_1, ranges, cpu: 0 });
    assert_eq!(pvm.mode(), Mode::NonPvm);
    let mut cpu = Plain::new();
    cpu.map(PVCS, Use::Ram);
    let _ = pvm.write_msr(&mut cpu, msr::VCPU_STRUCT, PVCS);
    assert_eq!(cpu.calls, [], "nothing is confined yet");
    cpu.registers.rflags = 0x0020_3046;
    cpu.registers.cr3 = 0x9000;
    let before = cpu.registers;
    // The privilege level in CS is the bootstrap's affair.
    pvm.enter(&mut cpu, 0x13);
    assert_eq!(pvm.mode(), Mode::Supervisor);
    assert_eq!(pvm.supervisor_cs(), 0x10);
    assert_eq!(cpu.msrs[&msr::STAR], 0x0023_0010_0000_0000);
    let expected = pvm::testing::Registers { rflags: 0x0020_0246, ..before };
    assert_eq!(cpu.registers, expected, "IF and the fixed bit are one, IOPL is zero");
    let context = Context { cr3: 0x9000, pkru: 0 };
    assert_eq!(cpu.calls, [Call::Confine(ranges), Call::EnterSupervisor(context)]);
    assert_eq!(cpu.selectors, Selectors { cs: 0x33, ss: 0x2b }, "of the underlying processor");
}

#[test]
fn the_last_selector_of_a_table_has_no_successor() {
    let mut v = Vcpu::bare();
    v.pvm.reset();
    v.pvm.enter(&mut v.cpu, 0xfff8);
    v.cpu.registers.rsp = STACK + 0x800;
    assert_eq!(v.deliver(Event::new(6)), Ok(()));
    assert_eq!(v.cpu.bytes(v.cpu.registers.rsp + 16), 0xfff8u64.to_le_bytes());
    assert_eq!(v.cpu.bytes(v.cpu.registers.rsp + 40), [0; 8], "a selector has 16 bits");
}

#[test]
fn reset_forgets_all_but_the_counters() {
    let mut v = Vcpu::user();
    assert_eq!(v.deliver(Event::nmi()), Ok(()));
    assert_eq!(v.hypercall(0x1708_8209, [0x0040_f200_0000_ffff, 0, 0]), 12);
    v.set(msr::LINEAR_ADDRESS_RANGE, 0xffff_ffff_ffa0_ff9f);
    v.set(msr::PKRS, 4);
    let stats = *v.pvm.stats();
    v.pvm.reset();
    assert_eq!(v.pvm.mode(), Mode::NonPvm);
    assert!(v.pvm.nmi_open());
    assert_eq!(v.pvm.stats(), &stats);
    assert_eq!(v.pvm.gdt(), &pvm::Gdt::new(3));
    for index in msr::VCPU_STRUCT..=msr::SWITCH_CR3 {
        assert_eq!(v.get(index), Some(0), "{index:#x}");
    }
    assert_eq!(v.get(msr::LINEAR_ADDRESS_RANGE), Some(0xffff_ffff_ffb2_ff92));
    v.pvm.enter(&mut v.cpu, 0x10);
    assert_eq!(v.get(msr::PKRS), Some(0));
}

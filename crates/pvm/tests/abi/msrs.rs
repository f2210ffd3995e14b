//! The MSRs and their rules.

use pvm::processor::Flush;
use pvm::testing::{Call, Use};
use pvm::{Access, AddressRanges, Event, Next};

use crate::rig::*;

/// Reset value of LINEAR_ADDRESS_RANGE with PML4 slots 402 to 434 and no 5-level range.
const RANGE: u64 = 0xffff_ffff_ffb2_ff92;

#[test]
fn numbers() {
    let mut v = Vcpu::bare();
    for index in 0x4b56_4df0..=0x4b56_4df7 {
        assert!(v.get(index).is_some(), "{index:#x}");
    }
    for index in [0x4b56_4def, 0x4b56_4df8, 0x4b56_4d00, 0] {
        assert_eq!(v.pvm.read_msr(index), Access::Pass, "{index:#x}");
        assert_eq!(v.pvm.write_msr(&mut v.cpu, index, 0), Access::Pass, "{index:#x}");
    }
}

#[test]
fn a_range_encodes_its_indexes() {
    let five = AddressRanges::new(256..257, Some(300..310)).unwrap();
    let mut v = Vcpu::with_ranges(five);
    assert_eq!(v.get(msr::LINEAR_ADDRESS_RANGE), Some(0xff36_ff2c_ff01_ff00));
    // 0xff: the bits that are always one; then the lower eight bits of each index, whose ninth is one too.
    assert_eq!((0x136, 0x12c, 0x101, 0x100), (310, 300, 257, 256));
    assert_eq!(Vcpu::bare().get(msr::LINEAR_ADDRESS_RANGE), Some(RANGE));
}

#[test]
fn a_range_only_narrows() {
    let mut v = Vcpu::bare();
    for bad in [
        0,
        RANGE - 1,
        RANGE + 0x1_0000,
        // Empty, inverted, beyond 511, below 256.
        0xffff_ffff_ff93_ff93,
        0xffff_ffff_ff93_ff94,
        u64::MAX,
        0xffff_ffff_ffb2_fe92,
        0xffff_ffff_feb2_ff92,
        // A 5-level range where there is none.
        0xff36_ff2c_ffb2_ff92,
        // Bits that must be one.
        RANGE & !(1 << 9),
        RANGE & !(1 << 31),
        RANGE & !(1 << 63),
    ] {
        assert!(!v.try_set(msr::LINEAR_ADDRESS_RANGE, bad), "{bad:#x}");
    }
    assert_eq!(v.get(msr::LINEAR_ADDRESS_RANGE), Some(RANGE));
    assert_eq!(v.cpu.calls, []);
    v.set(msr::LINEAR_ADDRESS_RANGE, RANGE);
    v.cpu.take_calls();
    // One slot less on each side: what is translated from now on is confined, and the old translations go.
    let narrow = 0xffff_ffff_ffb1_ff93;
    v.set(msr::LINEAR_ADDRESS_RANGE, narrow);
    let ranges = AddressRanges::new(403..433, None).unwrap();
    assert_eq!(v.cpu.take_calls(), [Call::Confine(ranges), Call::Flush(Flush::All)]);
    assert_eq!(*v.pvm.ranges(), ranges);
    assert!(!v.try_set(msr::LINEAR_ADDRESS_RANGE, RANGE), "there is no way back");
    assert_eq!(v.get(msr::LINEAR_ADDRESS_RANGE), Some(narrow));
}

#[test]
fn a_five_level_range_only_narrows() {
    let five = AddressRanges::new(402..434, Some(300..310)).unwrap();
    let mut v = Vcpu::with_ranges(five);
    for bad in [0xff37_ff2c_ffb2_ff92, 0xff36_ff2b_ffb2_ff92, 0xff2c_ff2c_ffb2_ff92, RANGE] {
        assert!(!v.try_set(msr::LINEAR_ADDRESS_RANGE, bad), "{bad:#x}");
    }
    v.set(msr::LINEAR_ADDRESS_RANGE, 0xff2e_ff2d_ffb2_ff92);
    assert!(v.pvm.ranges().allows(0xff2d << 48));
    assert!(!v.pvm.ranges().allows(0xff2c << 48));
}

#[test]
fn the_structure_is_a_page_of_ram_or_none() {
    let mut v = Vcpu::bare();
    v.cpu.map(0x8000, Use::ReadOnly);
    v.cpu.map(0x9000, Use::Mmio);
    v.set(msr::VCPU_STRUCT, PVCS);
    for bad in [1, PVCS + 1, PVCS + 0x80, PVCS + 0xfff, 0x4000, 0x8000, 0x9000, u64::MAX, u64::MAX << 12] {
        assert!(!v.try_set(msr::VCPU_STRUCT, bad), "{bad:#x}");
        assert_eq!(v.get(msr::VCPU_STRUCT), Some(PVCS));
    }
    v.set(msr::VCPU_STRUCT, 0);
    assert_eq!(v.get(msr::VCPU_STRUCT), Some(0));
    assert_eq!(v.pvm.vcpu_struct(), 0);
}

#[test]
fn setting_the_structure_writes_nothing() {
    let mut v = Vcpu::bare();
    v.cpu.poke(PVCS, &[0x5a; 4096]);
    v.set(msr::VCPU_STRUCT, PVCS);
    assert_eq!(v.cpu.bytes::<4096>(PVCS), [0x5a; 4096]);
    v.set(msr::VCPU_STRUCT, 0);
    assert_eq!(v.cpu.bytes::<4096>(PVCS), [0x5a; 4096]);
}

#[test]
fn without_a_structure_interrupts_are_closed() {
    let mut v = Vcpu::bare();
    v.put_u64(at::EVENT_FLAGS, IF);
    assert!(!v.pvm.interrupts_open(&mut v.cpu));
    v.pvm.set_interrupt_flag(&mut v.cpu, true);
    assert!(!v.pvm.interrupts_open(&mut v.cpu));
    v.set(msr::VCPU_STRUCT, PVCS);
    assert!(v.pvm.interrupts_open(&mut v.cpu));
}

#[test]
fn values_without_a_rule_are_kept() {
    let mut v = Vcpu::bare();
    for index in [msr::SUPERVISOR_RSP, msr::SUPERVISOR_REDZONE, msr::RETU_RIP, msr::RETS_RIP] {
        for value in [0, 1, 0x0000_8000_0000_0000, u64::MAX] {
            v.set(index, value);
            assert_eq!(v.get(index), Some(value), "{index:#x}");
        }
    }
    assert_eq!(v.cpu.calls, []);
}

#[test]
fn supervisor_rsp_is_loaded_from_user_mode_and_saved_on_return() {
    let mut v = Vcpu::user();
    assert_eq!(v.deliver(Event::new(3)), Ok(()));
    assert_eq!(v.cpu.registers.rsp, SUPERVISOR_RSP);
    v.put_u16(at::USER_CS, 0x33);
    v.put_u16(at::USER_SS, 0x2b);
    v.cpu.registers.rsp = 0x1234_5678;
    assert_eq!(v.get(msr::SUPERVISOR_RSP), Some(SUPERVISOR_RSP));
    assert_eq!(v.syscall_at(RETU_RIP), Ok(Next::Run));
    assert_eq!(v.get(msr::SUPERVISOR_RSP), Some(0x1234_5678));
}

#[test]
fn the_red_zone_is_skipped_by_both_supervisor_entries_only() {
    for (redzone, rsp) in [(0, STACK + 0xe00), (16, STACK + 0xdf0), (0x100, STACK + 0xd00)] {
        let mut v = Vcpu::supervisor();
        v.set(msr::SUPERVISOR_REDZONE, redzone);
        let mut exception = v.clone();
        assert_eq!(exception.deliver(Event::new(0)), Ok(()));
        assert_eq!(exception.cpu.registers.rsp, rsp - 64);
        assert_eq!(v.deliver(Event::new(32)), Ok(()));
        assert_eq!(v.cpu.registers.rsp, rsp);
        let mut v = Vcpu::user();
        v.set(msr::SUPERVISOR_REDZONE, redzone);
        assert_eq!(v.deliver(Event::new(32)), Ok(()));
        assert_eq!(v.cpu.registers.rsp, SUPERVISOR_RSP);
    }
}

#[test]
fn three_entries_at_fixed_distances() {
    for (mut v, vector, entry) in [
        (Vcpu::user(), 0, EVENT_ENTRY),
        (Vcpu::user(), 255, EVENT_ENTRY),
        (Vcpu::supervisor(), 0, EVENT_ENTRY + 256),
        (Vcpu::supervisor(), 31, EVENT_ENTRY + 256),
        (Vcpu::supervisor(), 32, EVENT_ENTRY + 512),
        (Vcpu::supervisor(), 255, EVENT_ENTRY + 512),
    ] {
        assert_eq!(v.deliver(Event::new(vector)), Ok(()));
        assert_eq!((v.cpu.registers.rip, v.cpu.registers.rcx), (entry, entry));
    }
}

#[test]
fn every_entry_must_be_canonical() {
    const HOLE: u64 = 0x0000_8000_0000_0000;
    const HIGH: u64 = 0xffff_8000_0000_0000;
    let mut v = Vcpu::bare();
    for (value, good) in [
        (HOLE - 513, true),
        (HOLE - 512, false),
        (HOLE - 256, false),
        (HOLE, false),
        (HIGH - 512, false),
        (HIGH - 1, false),
        (HIGH, true),
        // The entries of the supervisor wrap to zero.
        (u64::MAX, true),
        // The guest's early handler, less 256.
        (0xffff_c900_0020_3007, true),
        (0, true),
    ] {
        assert_eq!(v.try_set(msr::EVENT_ENTRY, value), good, "{value:#x}");
        assert_eq!(v.get(msr::EVENT_ENTRY) == Some(value), good, "{value:#x}");
    }
    v.cpu.registers.cr4 |= CR4_LA57;
    v.set(msr::EVENT_ENTRY, HOLE);
}

#[test]
fn switch_cr3_is_a_root() {
    let mut v = Vcpu::bare();
    for (value, good) in [(0, true), (1, true), (0x7007, true), (0x3fff_ffff_f000, true), (1 << 46, false)] {
        assert_eq!(v.try_set(msr::SWITCH_CR3, value), good, "{value:#x}");
    }
    assert!(!v.try_set(msr::SWITCH_CR3, 1 << 63));
    assert_eq!(v.get(msr::SWITCH_CR3), Some(0x3fff_ffff_f000));
    assert_eq!(v.cpu.calls, [], "nothing is flushed");
    assert_eq!(v.cpu.registers.cr3, SUPERVISOR_ROOT);
}

#[test]
fn star_must_name_the_selectors_that_are_loaded() {
    for (value, good) in [
        (0x0023_0010_0000_0000, true),
        // The privilege level of the user's is of no account; the low half is not looked at.
        (0x0020_0010_ffff_ffff, true),
        (0x0021_0010_0000_0001, true),
        // 32-bit code in another place, 64-bit code instead.
        (0x002b_0010_0000_0000, false),
        (0x0033_0010_0000_0000, false),
        (0x0000_0010_0000_0000, false),
        // Not the supervisor's CS and SS, or with a privilege level.
        (0x0023_0008_0000_0000, false),
        (0x0023_0013_0000_0000, false),
        (0x0023_0000_0000_0000, false),
    ] {
        for mut v in [Vcpu::bare(), Vcpu::supervisor()] {
            assert_eq!(v.try_set(msr::STAR, value), good, "{value:#x}");
            let expected = if good { value } else { 0x0023_0010_0000_0000 };
            assert_eq!(v.get(msr::STAR), Some(expected));
        }
    }
}

#[test]
fn lstar_is_where_system_calls_enter() {
    let mut v = Vcpu::user();
    v.set(msr::LSTAR, 0x0000_1234_5678_9abc);
    assert_eq!(v.syscall_at(0x40_0000), Ok(Next::Run));
    assert_eq!((v.cpu.registers.rip, v.cpu.registers.rcx), (0x0000_1234_5678_9abc, 0x0000_1234_5678_9abc));
}

#[test]
fn gs_base_is_real_and_kernel_gs_base_waits() {
    let mut v = Vcpu::user();
    assert_eq!(v.get(msr::GS_BASE), Some(0x0000_6666_0000_0008));
    v.set(msr::GS_BASE, 0x0000_7777_0000_0000);
    v.set(msr::KERNEL_GS_BASE, 0xffff_c900_7777_0000);
    assert_eq!(v.deliver(Event::new(3)), Ok(()));
    assert_eq!(v.pvcs_u64(at::USER_GSBASE), 0x0000_7777_0000_0000);
    assert_eq!(v.get(msr::GS_BASE), Some(0xffff_c900_7777_0000));
    assert_eq!(v.get(msr::KERNEL_GS_BASE), Some(0xffff_c900_7777_0000));
}

#[test]
fn ignored_msrs_are_stored_without_effect() {
    // IA32_FMASK, CSTAR, SYSENTER_CS, ESP, EIP.
    let ignored = [0xc000_0084, 0xc000_0083, 0x174, 0x175, 0x176];
    let mut v = Vcpu::user();
    let mut plain = v.clone();
    for index in ignored {
        v.set(index, 0x0000_1111_2222_3333);
        assert_eq!(v.get(index), Some(0x0000_1111_2222_3333), "{index:#x}");
    }
    assert_eq!(v.syscall_at(0x40_0000), Ok(Next::Run));
    assert_eq!(plain.syscall_at(0x40_0000), Ok(Next::Run));
    assert_eq!(v.cpu.registers, plain.cpu.registers);
    assert_eq!(v.cpu.pages, plain.cpu.pages);
}

#[test]
fn pkrs_is_pkru_in_supervisor_mode() {
    let mut v = Vcpu::supervisor();
    v.cpu.registers.pkru = 0x30;
    v.set(msr::PKRS, 0xc);
    assert_eq!((v.get(msr::PKRS), v.cpu.registers.pkru), (Some(0xc), 0x30), "CR4.PKS is clear");
    v.cpu.registers.cr4 |= CR4_PKS;
    v.set(msr::PKRS, 0xffff_ffff);
    assert_eq!((v.get(msr::PKRS), v.cpu.registers.pkru), (Some(0xffff_ffff), 0xffff_ffff));
    assert!(!v.try_set(msr::PKRS, 0x1_0000_0000));
    assert_eq!((v.get(msr::PKRS), v.cpu.registers.pkru), (Some(0xffff_ffff), 0xffff_ffff));
    // WRPKRU in supervisor mode is not seen by the hypervisor: the next entry has the MSR's value.
    v.cpu.registers.pkru = 0x0;
    assert_eq!(v.get(msr::PKRS), Some(0xffff_ffff));
}

#[test]
fn pkrs_waits_while_the_user_runs() {
    let mut v = Vcpu::user();
    v.cpu.registers.cr4 |= CR4_PKS;
    v.set(msr::PKRS, 0xc);
    assert_eq!(v.cpu.registers.pkru, 0x5555_5554, "the user's");
    assert_eq!(v.deliver(Event::new(3)), Ok(()));
    assert_eq!(v.cpu.registers.pkru, 0xc);
}

#[test]
fn the_tsc_is_the_processors() {
    let mut v = Vcpu::supervisor();
    assert_eq!(v.pvm.read_msr(0x10), Access::Pass);
    assert_eq!(v.pvm.write_msr(&mut v.cpu, 0x10, 1), Access::Pass);
}

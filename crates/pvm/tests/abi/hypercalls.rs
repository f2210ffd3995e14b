//! The hypercalls: arguments, effects, results, and what they leave alone.

use pvm::Next;
use pvm::processor::{Flush, Roots};
use pvm::testing::Call;

use crate::rig::*;

const LOAD_PGTBL: u64 = 0x1708_8200;
const IRQ_WIN: u64 = LOAD_PGTBL + 1;
const IRQ_HALT: u64 = LOAD_PGTBL + 2;
const TLB_FLUSH: u64 = LOAD_PGTBL + 3;
const TLB_FLUSH_CURRENT: u64 = LOAD_PGTBL + 4;
const TLB_INVLPG: u64 = LOAD_PGTBL + 5;
const LOAD_GS: u64 = LOAD_PGTBL + 6;
const RDMSR: u64 = LOAD_PGTBL + 7;
const WRMSR: u64 = LOAD_PGTBL + 8;
const LOAD_TLS: u64 = LOAD_PGTBL + 9;
const EINVAL: u64 = -22i64 as u64;

#[test]
fn rcx_and_r11_are_lost_and_nothing_else() {
    for number in [TLB_FLUSH, IRQ_WIN, RDMSR, 0, 1, u64::MAX, LOAD_TLS + 1, LOAD_PGTBL - 1] {
        let mut v = Vcpu::supervisor();
        v.cpu.registers.rax = number;
        let before = v.cpu.registers;
        let mut expected = v.clone();
        let r = &mut expected.cpu.registers;
        (r.rip, r.rcx, r.r11) = (0x1002, 0x1002, before.rflags);
        assert_eq!(v.syscall_at(0x1000), Ok(Next::Run));
        expected.cpu.registers.rax = v.cpu.registers.rax;
        v.assert_is(&mut expected);
    }
}

#[test]
fn load_pgtbl_loads_both_roots() {
    for (flags, flush, five_level) in [(0, false, false), (1, true, false), (2, false, true), (3, true, true)]
    {
        for offered in [false, true] {
            let mut v = Vcpu::supervisor();
            v.cpu.five_level = offered;
            assert_eq!(v.hypercall(LOAD_PGTBL, [flags, 0x1_2000, 0x1_3000]), 0);
            let roots = Roots { supervisor: 0x1_2000, user: 0x1_3000, five_level, flush };
            assert_eq!(v.cpu.take_calls(), [Call::LoadRoots(roots)]);
            assert_eq!(v.cpu.registers.cr3, 0x1_2000);
            assert_eq!(v.get(msr::SWITCH_CR3), Some(0x1_3000));
            assert_eq!(v.cpu.registers.cr4 & CR4_LA57 != 0, five_level && offered);
        }
    }
}

#[test]
fn load_pgtbl_refuses_what_cannot_be_roots() {
    for args in [
        [4, 0x1_2000, 0x1_3000],
        [1 << 63, 0x1_2000, 0x1_3000],
        [0, 1 << 46, 0x1_3000],
        [0, 0x1_2000, 1 << 63],
        [3, u64::MAX, u64::MAX],
    ] {
        let mut v = Vcpu::supervisor();
        assert_eq!(v.hypercall(LOAD_PGTBL, args), EINVAL);
        assert_eq!(v.cpu.calls, []);
        assert_eq!((v.cpu.registers.cr3, v.get(msr::SWITCH_CR3)), (SUPERVISOR_ROOT, Some(USER_ROOT)));
    }
}

#[test]
fn irq_win_clears_the_pending_flag() {
    for (flags, left) in [(IF | IP, IF), (IP, 0), (IF, IF), (u64::MAX, !IP)] {
        let mut v = Vcpu::supervisor();
        v.put_u64(at::EVENT_FLAGS, flags);
        assert_eq!(v.hypercall(IRQ_WIN, [1, 2, 3]), 0);
        assert_eq!(v.pvcs_u64(at::EVENT_FLAGS), left);
        assert_eq!(v.pvm.interrupts_open(&mut v.cpu), left & IF != 0, "it opens nothing itself");
    }
}

#[test]
fn irq_halt_opens_interrupts_and_sleeps() {
    for flags in [0, IF, IP, IF | IP] {
        let mut v = Vcpu::supervisor();
        v.put_u64(at::EVENT_FLAGS, flags);
        v.cpu.registers.rax = IRQ_HALT;
        assert_eq!(v.syscall_at(0x1000), Ok(Next::Halt));
        assert_eq!(v.pvcs_u64(at::EVENT_FLAGS), IF);
        assert_eq!(v.cpu.registers.rax, 0);
        assert!(v.pvm.interrupts_open(&mut v.cpu));
    }
    // Without a structure it sleeps, and only an NMI can wake it.
    let mut v = Vcpu::supervisor();
    v.set(msr::VCPU_STRUCT, 0);
    v.cpu.registers.rax = IRQ_HALT;
    assert_eq!(v.syscall_at(0x1000), Ok(Next::Halt));
    assert!(!v.pvm.interrupts_open(&mut v.cpu));
}

#[test]
fn the_three_flushes_drop_what_they_name() {
    for (number, args, flush) in [
        (TLB_FLUSH, [1, 2, 3], Flush::All),
        (TLB_FLUSH_CURRENT, [1, 2, 3], Flush::Roots { switch_cr3: USER_ROOT }),
        (TLB_INVLPG, [0xffff_c900_0000_1234, 2, 3], Flush::Page(0xffff_c900_0000_1234)),
        (TLB_INVLPG, [u64::MAX / 3, 2, 3], Flush::Page(u64::MAX / 3)),
    ] {
        let mut v = Vcpu::supervisor();
        assert_eq!(v.hypercall(number, args), 0);
        assert_eq!(v.cpu.take_calls(), [Call::Flush(flush)]);
        assert_eq!((v.cpu.registers.cr3, v.get(msr::SWITCH_CR3)), (SUPERVISOR_ROOT, Some(USER_ROOT)));
    }
}

#[test]
fn load_gs_returns_the_base_and_leaves_the_one_in_force() {
    let mut v = Vcpu::supervisor();
    let tls = 0x1240_f334_5678_ffff;
    assert_eq!(v.hypercall(LOAD_TLS, [tls, 0, 0]), 12);
    // Only 16 bits of the argument are a selector; at CPL 3 its own privilege level does not matter.
    for (argument, selector, base) in [
        (0x63, 0x63, 0x1234_5678),
        (0xffff_0063, 0x63, 0x1234_5678),
        (0x60, 0x60, 0x1234_5678),
        (0x2b, 0x2b, 0),
        // An empty entry, the supervisor's own, the LDT, beyond the table, null.
        (0x6b, 0, 0),
        (0x10, 0, 0),
        (0x67, 0, 0),
        (0xfffb, 0, 0),
        (3, 0, 0),
    ] {
        v.cpu.take_calls();
        assert_eq!(v.hypercall(LOAD_GS, [argument, 0, 0]), base, "{argument:#x}");
        assert_eq!(v.cpu.gs, selector);
        let descriptor = v.pvm.gdt().descriptor(selector);
        assert_eq!(v.cpu.take_calls(), [Call::LoadGs(selector, descriptor)]);
        assert_eq!(v.get(msr::GS_BASE), Some(SUPERVISOR_GS));
        assert_eq!(v.get(msr::KERNEL_GS_BASE), Some(SUPERVISOR_GS));
    }
}

#[test]
fn rdmsr_reads_any_msr_and_zero_where_there_is_none() {
    let mut v = Vcpu::supervisor();
    for (index, value) in [
        (u64::from(msr::LSTAR), LSTAR),
        (u64::from(msr::GS_BASE), SUPERVISOR_GS),
        (u64::from(msr::RETU_RIP), RETU_RIP),
        (u64::from(msr::STAR), 0x0023_0010_0000_0000),
        (0x4b56_4df8, 0),
        (0xdead, 0),
        // The index has 32 bits.
        (0xffff_ffff_0000_0000 | u64::from(msr::LSTAR), LSTAR),
    ] {
        assert_eq!(v.hypercall(RDMSR, [index, 0, 0]), value, "{index:#x}");
    }
}

#[test]
fn wrmsr_writes_any_msr_or_says_einval() {
    let mut v = Vcpu::supervisor();
    for (index, value) in [
        (msr::LSTAR, 0x1234),
        (msr::GS_BASE, 0x5678),
        (msr::SUPERVISOR_REDZONE, 16),
        (msr::STAR, 0x0023_0010_0000_0001),
        (msr::LINEAR_ADDRESS_RANGE, 0xffff_ffff_ffb1_ff92),
        (msr::VCPU_STRUCT, 0),
    ] {
        assert_eq!(v.hypercall(WRMSR, [index.into(), value, 0]), 0, "{index:#x}");
        assert_eq!(v.get(index), Some(value), "{index:#x}");
    }
    for (index, value) in [
        (0xdead, 0),
        (0x4b56_4df8, 0),
        (msr::STAR, 0),
        (msr::LSTAR, 0x0000_8000_0000_0000),
        (msr::EVENT_ENTRY, 0x0000_8000_0000_0000),
        (msr::VCPU_STRUCT, 1),
        (msr::LINEAR_ADDRESS_RANGE, 0),
    ] {
        let before = v.get(index);
        assert_eq!(v.hypercall(WRMSR, [index.into(), value, 0]), EINVAL, "{index:#x}");
        assert_eq!(v.get(index), before);
    }
}

#[test]
fn load_tls_sanitises_three_descriptors_and_returns_the_index() {
    let mut v = Vcpu::supervisor();
    // DPL 0, system, 64-bit, not accessed; not present; code.
    let entries = [0x0063_8256_7812_3456, 0x00cf_7300_0000_ffff, 0x00cf_fb00_0000_ffff];
    assert_eq!(v.hypercall(LOAD_TLS, entries), 12);
    let gdt = v.pvm.gdt();
    assert_eq!(gdt.descriptor(12 << 3 | 3), Some(0x0043_f356_7812_3456));
    assert_eq!(gdt.descriptor(13 << 3 | 3), None);
    assert_eq!(gdt.descriptor(14 << 3 | 3), None);
    // A good one in each place.
    let good = 0x00cf_f300_0000_ffff;
    assert_eq!(v.hypercall(LOAD_TLS, [0, good, good]), 12);
    let at = [12, 13, 14, 15].map(|n| v.pvm.gdt().descriptor(n << 3 | 3));
    assert_eq!(at, [None, Some(good), Some(good), Some(0x0040_f100_0000_0003)]);
}

#[test]
fn other_numbers_are_kvms() {
    for (number, result) in
        [(1, 0), (0, -1000i64 as u64), (5, -1000i64 as u64), (LOAD_PGTBL - 1, -1000i64 as u64)]
    {
        let mut v = Vcpu::supervisor();
        v.cpu.registers.rsi = 4;
        assert_eq!(v.hypercall(number, [1, 2, 3]), result);
        // RBX, R10 for RCX, RDX, RSI.
        assert_eq!(v.cpu.take_calls(), [Call::KvmHypercall(number, [1, 2, 3, 4])]);
    }
    let mut v = Vcpu::supervisor();
    for number in [LOAD_TLS + 1, u64::MAX, LOAD_PGTBL | 1 << 32] {
        assert_eq!(v.hypercall(number, [0; 3]), -1000i64 as u64);
    }
}

#[test]
fn each_hypercall_is_counted() {
    let mut v = Vcpu::supervisor();
    for (n, number) in (LOAD_PGTBL..=LOAD_TLS).enumerate() {
        v.cpu.registers.rax = number;
        let _ = v.syscall_at(0x1000);
        assert_eq!(v.pvm.stats().hypercalls[n], 1);
    }
    let _ = v.hypercall(LOAD_TLS + 1, [0; 3]);
    let _ = v.hypercall(0, [0; 3]);
    assert_eq!(v.pvm.stats().kvm_hypercalls, 2);
    assert_eq!(v.pvm.stats().pvm_hypercalls(), 10);
}

//! CR, XCR, MSR and CPUID rules, hypercalls.

use cpu::state::{cr0, cr4, efer, reg};
use iced_x86::code_asm::*;

use crate::harness::*;

/// Writes `value` to control register `n` in a fresh long-mode guest; whether that is #GP.
fn refuses(n: u32, value: u64) -> bool {
    let mut g = Guest::long();
    g.code(|a| {
        a.mov(rax, value)?;
        match n {
            0 => a.mov(cr0, rax),
            3 => a.mov(cr3, rax),
            4 => a.mov(cr4, rax),
            _ => a.mov(cr8, rax),
        }
    });
    assert_eq!(g.run(), cpu::Outcome::Halted);
    match g.trap() {
        None => false,
        Some(t) => {
            assert_eq!((t.vector, t.error_code), (13, Some(0)));
            true
        }
    }
}

#[test]
fn control_registers_refuse_what_they_must() {
    let on = cr0::PE | cr0::PG | cr0::WP | cr0::NE | cr0::ET;
    assert!(!refuses(0, on));
    assert!(!refuses(0, on | cr0::CD));
    // NW without CD, PG without PE, the upper half, leaving long mode from 64-bit code.
    assert!(refuses(0, on | cr0::NW));
    assert!(refuses(0, on & !cr0::PE));
    assert!(refuses(0, on | 1 << 32));
    assert!(refuses(0, on & !cr0::PG));
    let on = cr4::PAE | cr4::PGE;
    assert!(!refuses(4, on | cr4::OSFXSR | cr4::UMIP | cr4::FSGSBASE | cr4::PCIDE));
    // VME is not offered; PAE and LA57 must stay; reserved bits.
    assert!(refuses(4, on | cr4::VME));
    assert!(refuses(4, cr4::PGE));
    assert!(refuses(4, on | cr4::LA57));
    assert!(refuses(4, on | 1 << 40));
    assert!(!refuses(3, TABLES | 0x18));
    assert!(refuses(3, TABLES | 1 << 63));
    assert!(refuses(3, TABLES | 1 << 47));
    assert!(!refuses(8, 15));
    assert!(refuses(8, 16));
}

#[test]
fn cr8_is_the_platforms() {
    let mut g = Guest::long();
    g.answer(&[9]);
    g.code(|a| {
        a.mov(eax, 5)?;
        a.mov(cr8, rax)?;
        a.mov(rbx, cr8)
    });
    g.finish();
    assert_eq!(g.reg(reg::RBX), 9);
    assert_eq!(g.seen(), [Seen::WriteCr8(5), Seen::ReadCr8]);
}

#[test]
fn user_code_may_not_touch_control_registers() {
    for bytes in [
        &[0x0f, 0x20, 0xc0][..],
        &[0x0f, 0x22, 0xd8],
        &[0x0f, 0x06],
        &[0x0f, 0x30],
        &[0x0f, 0x32],
        &[0x0f, 0x01, 0xf8],
        &[0x0f, 0x01, 0x3f],
        &[0x0f, 0x09],
        &[0xf4],
        &[0x0f, 0x01, 0x17],
        &[0x0f, 0x23, 0xc0],
    ] {
        let mut g = Guest::long();
        g.user(sel::USER_CODE64);
        g.bytes(bytes);
        assert_eq!(g.fault(13).error_code, Some(0), "{bytes:x?}");
    }
}

#[test]
fn lmsw_sets_pe_but_does_not_clear_it_and_clts_clears_ts() {
    let mut g = Guest::protected();
    g.code(|a| {
        a.mov(eax, 0xe)?;
        a.lmsw(ax)?;
        a.smsw(ebx)?;
        a.clts()?;
        a.smsw(ecx)
    });
    g.finish();
    assert_eq!(g.reg(reg::RBX) & 0xf, 0xf);
    assert_eq!(g.reg(reg::RCX) & 0xf, 0x7);
}

#[test]
fn xsetbv_checks_its_value_and_cpuid_follows() {
    let mut g = Guest::long();
    g.code(|a| a.xgetbv());
    g.fault(6);
    let mut g = Guest::long();
    g.code(|a| {
        a.mov(eax, (cr4::PAE | cr4::PGE | cr4::OSXSAVE) as u32)?;
        a.mov(cr4, rax)?;
        a.mov(eax, 3)?;
        a.xor(edx, edx)?;
        a.xor(ecx, ecx)?;
        a.xsetbv()?;
        a.mov(eax, 1)?;
        a.cpuid()?;
        a.mov(esi, ecx)?;
        a.xor(ecx, ecx)?;
        a.xgetbv()?;
        a.mov(edi, eax)?;
        // AVX without SSE.
        a.mov(eax, 5)?;
        a.xsetbv()
    });
    assert_eq!(g.fault(13).error_code, Some(0));
    assert_eq!((g.reg(reg::RSI) >> 27 & 1, g.reg(reg::RDI)), (1, 3));
}

#[test]
fn msrs_of_the_processor_and_of_the_platform() {
    let mut g = Guest::long();
    g.script.lock().unwrap().msrs.push(0x1b);
    g.answer(&[0x1122_3344_5566_7788]);
    g.code(|a| {
        a.mov(ecx, 0x1b)?;
        a.rdmsr()?;
        a.mov(esi, eax)?;
        a.mov(edi, edx)?;
        a.wrmsr()?;
        a.mov(ecx, 0xc000_0100u32)?;
        a.mov(eax, 0x5000)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.mov(rbx, qword_ptr(8).fs())?;
        // A register that nobody has.
        a.mov(ecx, 0x1234)?;
        a.rdmsr()
    });
    g.poke::<u64>(0x5008, 42);
    assert_eq!(g.fault(13).error_code, Some(0));
    assert_eq!((g.reg(reg::RSI), g.reg(reg::RDI)), (0x5566_7788, 0x1122_3344));
    assert_eq!(g.reg(reg::RBX), 42);
    assert_eq!(g.seen(), [Seen::ReadMsr(0x1b), Seen::WriteMsr(0x1b, 0x1122_3344_5566_7788)]);
}

#[test]
fn msrs_refuse_bad_values() {
    let mut g = Guest::long();
    let canonical = 0xffff_8000_0000_0000;
    for (index, good, bad) in [
        (0xc000_0080, efer::SCE | efer::LME | efer::NXE, 1 << 1),
        (0xc000_0080, efer::LME | efer::LMA | efer::NXE, efer::NXE),
        (0xc000_0082, canonical, 1 << 63),
        (0xc000_0100, canonical, 1 << 63),
        (0xc000_0103, 7, 1 << 32),
        (0x277, 0x0007_0106_0007_0106, 2),
        (0x2ff, 0xc06, 0xc02),
        (0x200, 6, 1 << 50),
        (0x48, 1, 1 << 5),
    ] {
        assert!(g.vcpu.write_msr(index, good).is_ok(), "{index:#x}");
        let before = g.vcpu.read_msr(index).unwrap();
        assert!(g.vcpu.write_msr(index, bad).is_err(), "{index:#x}");
        assert_eq!(g.vcpu.read_msr(index).unwrap(), before);
    }
    assert!(g.vcpu.write_msr(0x10a, 0).is_err());
    assert!(g.vcpu.read_msr(0x49).is_err());
}

#[test]
fn the_time_stamp_counter_is_the_platforms_and_can_be_moved() {
    let mut g = Guest::long();
    g.script.lock().unwrap().tsc = 0x5_0000_0007;
    g.code(|a| {
        a.rdtsc()?;
        a.mov(esi, edx)?;
        a.mov(edi, eax)
    });
    g.finish();
    assert_eq!((g.reg(reg::RSI), g.reg(reg::RDI)), (5, 7));

    let mut g = Guest::long();
    g.vcpu.write_msr(0x10, 1 << 40).unwrap();
    g.code(|a| {
        a.rdtscp()?;
        a.mov(esi, edx)?;
        a.mov(edi, ecx)
    });
    g.vcpu.write_msr(0xc000_0103, 3).unwrap();
    g.finish();
    assert_eq!((g.reg(reg::RSI), g.reg(reg::RDI)), (1 << 8, 3));
    let adjust = g.vcpu.read_msr(0x3b).unwrap();
    g.vcpu.write_msr(0x3b, adjust.wrapping_add(1 << 50)).unwrap();
    assert_eq!(g.vcpu.read_msr(0x10).unwrap(), (1 << 40) + (1 << 50));
    g.script.lock().unwrap().tsc += 9;
    assert_eq!(g.vcpu.tsc(), (1 << 40) + (1 << 50) + 9);
}

#[test]
fn tsd_keeps_the_counter_from_users() {
    let mut g = Guest::long();
    g.vcpu.state.cr4 |= cr4::TSD;
    g.user(sel::USER_CODE64);
    g.code(|a| a.rdtsc());
    g.fault(13);
}

#[test]
fn hypercalls_reach_the_platform_with_their_privilege() {
    let mut g = Guest::long();
    g.user(sel::USER_CODE64);
    g.answer(&[0xffff_ffff_ffff_fc18]);
    g.code(|a| {
        a.mov(eax, 1)?;
        a.mov(ebx, 2)?;
        a.mov(ecx, 3)?;
        a.mov(edx, 4)?;
        a.mov(esi, 5)?;
        a.vmcall()?;
        a.ud2()
    });
    g.fault(6);
    assert_eq!(g.reg(reg::RAX), 0xffff_ffff_ffff_fc18);
    assert_eq!(g.seen(), [Seen::Hypercall { number: 1, args: [2, 3, 4, 5], long_mode: true, cpl: 3 }]);
}

#[test]
fn hypercalls_say_whether_they_come_from_64_bit_code() {
    // In compatibility mode as in protected mode, only the low halves of the registers count.
    for (mut g, user) in [(Guest::long(), true), (Guest::protected(), false)] {
        if user {
            g.user(sel::USER_CODE32);
        }
        for register in [reg::RAX, reg::RBX, reg::RCX, reg::RDX, reg::RSI] {
            g.vcpu.set_reg(register, 0xffff_ffff_0000_0000 | u64::from(register));
        }
        g.answer(&[u64::MAX]);
        g.code(|a| {
            a.vmcall()?;
            a.ud2()
        });
        g.fault(6);
        assert_eq!(g.reg(reg::RAX), 0xffff_ffff);
        let args = [reg::RBX, reg::RCX, reg::RDX, reg::RSI].map(u64::from);
        let cpl = if user { 3 } else { 0 };
        assert_eq!(g.seen(), [Seen::Hypercall { number: 0, args, long_mode: false, cpl }]);
    }
}

#[test]
fn writes_of_the_tsc_reach_the_platform_as_its_adjustment() {
    let mut g = Guest::long();
    g.script.lock().unwrap().tsc = 300;
    g.code(|a| {
        // IA32_TSC_ADJUST, then IA32_TSC.
        a.mov(ecx, 0x3b)?;
        a.mov(eax, 1000)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.mov(ecx, 0x10)?;
        a.xor(eax, eax)?;
        a.wrmsr()
    });
    g.finish();
    // The counter stands at 300, and is told to be at 0.
    assert_eq!(g.seen(), [Seen::TscAdjusted(1000), Seen::TscAdjusted(300u64.wrapping_neg())]);
}

#[test]
fn cpuid_is_complete_for_x86_64_v3() {
    let cpuid = cpu::Cpuid::default();
    for name in [
        "CMOV",
        "CX8",
        "FPU",
        "FXSR",
        "MMX",
        "SSE",
        "SSE2",
        "SYSCALL",
        "CMPXCHG16B",
        "LAHF",
        "POPCNT",
        "SSE3",
        "SSSE3",
        "SSE4.1",
        "SSE4.2",
        "AVX",
        "AVX2",
        "BMI1",
        "BMI2",
        "F16C",
        "FMA",
        "LZCNT",
        "MOVBE",
        "XSAVE",
    ] {
        assert!(cpuid.has(name), "{name}: the host lacks it, or the table does");
    }
}

#[test]
fn what_is_not_offered_is_undefined() {
    // VMXON, SKINIT, MONITOR, MWAIT, ENCLS, TDCALL.
    for bytes in [
        &[0xf3, 0x0f, 0xc7, 0x30][..],
        &[0x0f, 0x01, 0xde],
        &[0x0f, 0x01, 0xc8],
        &[0x0f, 0x01, 0xc9],
        &[0x0f, 0x01, 0xcf],
        &[0x66, 0x0f, 0x01, 0xcc],
    ] {
        let mut g = Guest::long();
        g.bytes(bytes);
        g.fault(6);
    }
}

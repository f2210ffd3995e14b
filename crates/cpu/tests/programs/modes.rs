//! Changing modes: real, protected, compatibility, 64-bit, virtual-8086; tasks.

use cpu::flags;
use cpu::state::{CodeMode, cr0, cr4, efer, reg, seg};
use iced_x86::code_asm::*;

use crate::harness::*;

const MSR_EFER: u32 = 0xc000_0080;

/// From reset to 64-bit mode, on through compatibility mode, and back to real mode.
#[test]
fn real_to_protected_to_long_to_compatibility_and_back() {
    let mut g = Guest::real();
    // Page tables: the first 2 MiB in one page.
    g.poke(TABLES, TABLES + 0x1003);
    g.poke(TABLES + 0x1000, TABLES + 0x2003);
    g.poke::<u64>(TABLES + 0x2000, 0x83);
    // GDTR image.
    g.poke::<u16>(DATA, sel::LAST + 7);
    g.poke::<u32>(DATA + 2, GDT as u32);
    let (p32, p64, c32, p16, r16) = (0x9000u64, 0xa000u64, 0xb000u64, 0xc000u64, 0xd000u64);
    g.code(|a| {
        a.mov(ax, (DATA >> 4) as i32)?;
        a.mov(ds, ax)?;
        a.lgdt(ptr(0))?;
        a.mov(eax, cr0)?;
        a.or(eax, 1)?;
        a.mov(cr0, eax)?;
        a.db(&[0x66, 0xea])?;
        a.dd(&[p32 as u32])?;
        a.dw(&[sel::CODE32])
    });
    g.code_at(p32, 32, |a| {
        a.mov(eax, u32::from(sel::DATA))?;
        a.mov(ds, ax)?;
        a.mov(ss, ax)?;
        a.mov(esp, STACK as u32)?;
        a.mov(eax, cr4)?;
        a.or(eax, cr4::PAE as i32)?;
        a.mov(cr4, eax)?;
        a.mov(eax, TABLES as u32)?;
        a.mov(cr3, eax)?;
        a.mov(ecx, MSR_EFER)?;
        a.rdmsr()?;
        a.or(eax, efer::LME as i32)?;
        a.wrmsr()?;
        a.mov(eax, cr0)?;
        a.or(eax, cr0::PG as u32 as i32)?;
        a.mov(cr0, eax)?;
        a.db(&[0xea])?;
        a.dd(&[p64 as u32])?;
        a.dw(&[sel::CODE64])
    });
    g.code_at(p64, 64, |a| {
        // Only 64-bit code can do this.
        a.mov(r15, 0x1234_5678_9abc_def0u64)?;
        a.rdmsr()?;
        a.mov(r14d, eax)?;
        a.push(i32::from(sel::CODE32))?;
        a.push(c32 as i32)?;
        a.db(&[0x48, 0xcb])
    });
    g.code_at(c32, 32, |a| {
        // A compatibility-mode increment: 40h is a REX prefix elsewhere.
        a.xor(eax, eax)?;
        a.db(&[0x40])?;
        a.mov(ebx, eax)?;
        a.mov(eax, cr0)?;
        a.and(eax, 0x7fff_ffff)?;
        a.mov(cr0, eax)?;
        a.db(&[0xea])?;
        a.dd(&[p16 as u32])?;
        a.dw(&[sel::CODE16])
    });
    g.code_at(p16, 16, |a| {
        a.mov(eax, cr0)?;
        a.and(al, -2)?;
        a.mov(cr0, eax)?;
        a.db(&[0xea])?;
        a.dw(&[(r16 - 0x100) as u16, 0x10])
    });
    g.code_at(r16, 16, |a| a.mov(cx, cs));
    g.finish();
    let state = &g.vcpu.state;
    assert_eq!(state.code_mode, CodeMode::Bits16);
    assert_eq!(state.cr0 & (cr0::PE | cr0::PG), 0);
    assert_eq!(state.efer & (efer::LME | efer::LMA), efer::LME);
    assert_eq!(state.rip(), r16 - 0x100 + 3);
    assert_eq!(g.reg(reg::RCX) & 0xffff, 0x10);
    assert_eq!(g.reg(15), 0x1234_5678_9abc_def0);
    assert_eq!(g.reg(14) & (efer::LME | efer::LMA), efer::LME | efer::LMA);
    assert_eq!(g.reg(reg::RBX), 1);
}

#[test]
fn syscall_and_sysret_change_privilege_both_ways() {
    let mut g = Guest::long();
    g.user(sel::USER_CODE64);
    g.vcpu.write_msr(0xc000_0081, 0x0020_0008_0000_0000).unwrap();
    g.vcpu.write_msr(0xc000_0082, 0x9000).unwrap();
    g.vcpu.write_msr(0xc000_0084, flags::DF | flags::CF).unwrap();
    g.code_at(0x9000, 64, |a| {
        a.mov(ebx, cs)?;
        a.mov(edx, ss)?;
        a.mov(r12, rcx)?;
        a.pushfq()?;
        a.pop(r13)?;
        a.sysretq()
    });
    g.code(|a| {
        a.stc()?;
        a.std()?;
        a.syscall()?;
        a.mov(esi, cs)?;
        a.mov(edi, ss)?;
        a.ud2()
    });
    let t = g.fault(6);
    assert_eq!((g.reg(reg::RBX), g.reg(reg::RDX)), (sel::CODE64.into(), sel::DATA.into()));
    assert_eq!((g.reg(reg::RSI), g.reg(reg::RDI)), (sel::USER_CODE64.into(), sel::USER_DATA.into()));
    assert_eq!(g.reg(12), CODE + 4);
    assert_eq!(g.reg(13) & (flags::DF | flags::CF), 0);
    assert_eq!(t.rflags & (flags::DF | flags::CF), flags::DF | flags::CF);
    assert_eq!(t.cs, u64::from(sel::USER_CODE64));
}

#[test]
fn syscall_is_undefined_without_sce_and_outside_64_bit_mode() {
    let mut g = Guest::long();
    g.vcpu.write_msr(MSR_EFER, g.vcpu.state.efer & !efer::SCE).unwrap();
    g.code(|a| a.syscall());
    g.fault(6);
    let mut g = Guest::long();
    g.user(sel::USER_CODE32);
    g.bytes(&[0x0f, 0x05]);
    g.fault(6);
}

#[test]
fn sysret_to_a_non_canonical_address_faults_in_the_kernel() {
    let mut g = Guest::long();
    g.code(|a| {
        a.mov(rcx, 0x8000_0000_0000_0000u64)?;
        a.sysretq()
    });
    let t = g.fault(13);
    assert_eq!((t.error_code, t.cs), (Some(0), sel::CODE64.into()));
}

#[test]
fn sysenter_from_compatibility_mode_and_sysexit_back() {
    let mut g = Guest::long();
    g.vcpu.write_msr(0x174, sel::CODE64.into()).unwrap();
    g.vcpu.write_msr(0x175, STACK0).unwrap();
    g.vcpu.write_msr(0x176, 0x9000).unwrap();
    // SYSEXIT to 32-bit code takes the third and fourth descriptor from SYSENTER_CS.
    g.user(sel::USER_CODE32);
    g.code_at(0x9000, 64, |a| {
        a.mov(rbx, rsp)?;
        a.mov(edx, 0xa000)?;
        a.mov(ecx, 0x2_8000)?;
        a.sysexit()
    });
    g.code_at(0xa000, 32, |a| {
        a.mov(esi, cs)?;
        a.ud2()
    });
    g.code(|a| a.sysenter());
    let t = g.fault(6);
    assert_eq!(g.reg(reg::RBX), STACK0);
    assert_eq!((t.rip, t.rsp, g.reg(reg::RSI)), (0xa002, 0x2_8000, 0x18 + 3));
}

#[test]
fn iret_goes_to_compatibility_mode_and_int_comes_back() {
    let mut g = Guest::long();
    g.set_gate(0x80, sel::CODE64, HANDLERS + 0x800, 0xee);
    g.code_at(0x9000, 32, |a| {
        a.mov(eax, 5)?;
        a.int(0x80)
    });
    g.code(|a| {
        a.push(i32::from(sel::USER_DATA))?;
        a.push(0x2_8000)?;
        a.push(0x202)?;
        a.push(i32::from(sel::USER_CODE32))?;
        a.push(0x9000)?;
        a.iretq()
    });
    let t = g.fault(0x80);
    assert_eq!((t.rip, t.cs, t.rsp), (0x9007, sel::USER_CODE32.into(), 0x2_8000));
    assert_eq!((t.ss, t.rflags & flags::IF), (sel::USER_DATA.into(), flags::IF));
    assert_eq!(g.reg(reg::RAX), 5);
}

#[test]
fn iret_to_user_mode_takes_privileged_segments_away() {
    let mut g = Guest::long();
    g.vcpu.state.seg_base[usize::from(seg::FS)] = 0x1234;
    g.code_at(0x9000, 64, |a| a.ud2());
    g.code(|a| {
        a.push(i32::from(sel::USER_DATA))?;
        a.push(0x2_8000)?;
        a.push(2)?;
        a.push(i32::from(sel::USER_CODE64))?;
        a.push(0x9000)?;
        a.iretq()
    });
    g.fault(6);
    for s in [seg::DS, seg::ES, seg::FS, seg::GS] {
        assert_eq!(g.vcpu.state.segments[usize::from(s)].selector, 0);
    }
    assert_eq!(g.vcpu.state.seg_base[usize::from(seg::FS)], 0x1234);
}

#[test]
fn swapgs_and_the_base_instructions() {
    let mut g = Guest::long();
    g.vcpu.state.cr4 |= cr4::FSGSBASE;
    g.vcpu.refresh();
    g.vcpu.write_msr(0xc000_0102, 0xffff_8000_0000_0000).unwrap();
    g.code(|a| {
        a.mov(eax, 0x1111)?;
        a.wrgsbase(rax)?;
        a.swapgs()?;
        a.rdgsbase(rbx)?;
        a.swapgs()?;
        a.rdgsbase(rcx)?;
        a.mov(rax, 0x8000_0000_0000_0000u64)?;
        a.wrfsbase(rax)
    });
    let t = g.fault(13);
    assert_eq!(t.error_code, Some(0));
    assert_eq!((g.reg(reg::RBX), g.reg(reg::RCX)), (0xffff_8000_0000_0000, 0x1111));
}

#[test]
fn virtual_8086_mode_runs_and_its_events_bring_the_segments_along() {
    let mut g = Guest::protected();
    g.code_at(0x9000, 16, |a| {
        a.mov(ax, 0x1234)?;
        a.mov(ds, ax)?;
        a.mov(bx, ds)?;
        // IOPL is 0: #GP.
        a.cli()
    });
    g.code(|a| {
        for selector in [0x50, 0x40, 0x30, 0x20] {
            a.push(selector)?;
        }
        a.push(0x100)?;
        a.push(0x7000)?;
        a.pushfd()?;
        a.or(dword_ptr(esp), flags::VM as i32)?;
        a.push(0x900)?;
        a.push(0)?;
        a.iretd()
    });
    let t = g.fault(13);
    assert_eq!((t.error_code, t.rip, t.cs), (Some(0), 7, 0x900));
    assert_eq!((t.rflags & flags::VM, t.rsp, t.ss), (flags::VM, 0x7000, 0x100));
    assert_eq!(g.reg(reg::RBX) & 0xffff, 0x1234);
    // ES, DS, FS, GS lie above the frame: five words of it, and the error code.
    let above = STACK0 - 16;
    let pushed: Vec<u32> = (0..4).map(|n| g.peek(above + n * 4)).collect();
    assert_eq!(pushed, [0x20, 0x1234, 0x40, 0x50]);
    assert_eq!(g.vcpu.state.segments[usize::from(seg::DS)].selector, 0);
    assert_eq!(g.vcpu.state.cpl, 0);
}

#[test]
fn a_call_to_a_tss_switches_tasks_and_iret_returns() {
    let mut g = Guest::protected();
    let new = 0x3_0100u32;
    g.poke(GDT + u64::from(sel::SPARE), descriptor(new, 0x67, 0x8900));
    let set = |g: &Guest, offset: u32, value: u32| g.poke(u64::from(new + offset), value);
    set(&g, 32, 0x9000);
    set(&g, 36, 2);
    set(&g, 40, 0xaaaa);
    set(&g, 56, 0x2_c000);
    for (offset, selector) in
        [(72, sel::DATA), (76, sel::CODE32), (80, sel::DATA), (84, sel::DATA), (88, 0), (92, 0)]
    {
        set(&g, offset, selector.into());
    }
    g.code_at(0x9000, 32, |a| {
        a.mov(ebx, eax)?;
        a.pushfd()?;
        a.pop(esi)?;
        a.str(edi)?;
        a.iretd()
    });
    g.code(|a| {
        a.mov(ecx, 77)?;
        a.db(&[0x9a])?;
        a.dd(&[0])?;
        a.dw(&[sel::SPARE])?;
        a.inc(ecx)
    });
    g.finish();
    assert_eq!(g.reg(reg::RCX), 78);
    // What the other task left behind is in its TSS.
    assert_eq!(g.peek::<u32>(u64::from(new) + 52), 0xaaaa);
    assert_eq!(u64::from(g.peek::<u32>(u64::from(new) + 64)) & flags::NT, flags::NT);
    assert_eq!(g.peek::<u32>(u64::from(new) + 68), u32::from(sel::SPARE));
    assert_eq!(g.peek::<u16>(u64::from(new)), sel::TSS);
    // The TSS is available again, the first one busy.
    assert_eq!(g.peek::<u8>(GDT + u64::from(sel::SPARE) + 5), 0x89);
    assert_eq!(g.peek::<u8>(GDT + u64::from(sel::TSS) + 5), 0x8b);
    assert_ne!(g.vcpu.state.cr0 & cr0::TS, 0);
}

#[test]
fn an_exception_through_a_task_gate_brings_its_error_code() {
    let mut g = Guest::protected();
    let new = 0x3_0100u32;
    g.poke(GDT + u64::from(sel::SPARE), descriptor(new, 0x67, 0x8900));
    g.poke(IDT + 13 * 8, gate(sel::SPARE, 0, 0x85));
    let set = |g: &Guest, offset: u32, value: u32| g.poke(u64::from(new + offset), value);
    set(&g, 32, 0x9000);
    set(&g, 56, 0x2_c000);
    for (offset, selector) in [(72, sel::DATA), (76, sel::CODE32), (80, sel::DATA), (84, sel::DATA)] {
        set(&g, offset, selector.into());
    }
    g.code_at(0x9000, 32, |a| a.pop(ebx));
    g.code(|a| {
        a.mov(eax, 0x1000)?;
        a.mov(ds, ax)
    });
    g.finish();
    assert_eq!((g.reg(reg::RBX), g.reg(reg::RSP)), (0x1000, 0x2_c000));
    assert_eq!(g.peek::<u32>(TSS + 32), CODE as u32 + 5);
    assert_eq!(u64::from(g.peek::<u32>(TSS + 36)) & flags::RF, flags::RF);
}

//! Segment loads, call gates, LAR and LSL, accessed bits.

use cpu::flags;
use cpu::state::{cr4, reg, seg};
use iced_x86::code_asm::*;

use crate::harness::*;

#[test]
fn loading_a_segment_sets_its_accessed_bit() {
    let mut g = Guest::long();
    g.poke(GDT + u64::from(sel::SPARE), descriptor(0x1234_5678, 0xfff, 0x9200));
    g.code(|a| {
        a.mov(eax, u32::from(sel::SPARE))?;
        a.mov(fs, ax)
    });
    g.finish();
    assert_eq!(g.peek::<u8>(GDT + u64::from(sel::SPARE) + 5), 0x93);
    assert_eq!(g.vcpu.state.seg_base[usize::from(seg::FS)], 0x1234_5678);
}

#[test]
fn null_selectors_go_everywhere_but_into_a_users_ss() {
    let mut g = Guest::long();
    g.code(|a| {
        a.xor(eax, eax)?;
        a.mov(ds, ax)?;
        a.mov(gs, ax)?;
        a.mov(ss, ax)
    });
    g.finish();
    let mut g = Guest::long();
    g.user(sel::USER_CODE64);
    g.code(|a| {
        a.xor(eax, eax)?;
        a.mov(ds, ax)?;
        a.mov(ss, ax)
    });
    assert_eq!(g.fault(13).error_code, Some(0));
}

#[test]
fn push_pop_and_far_pointers_of_segments() {
    let mut g = Guest::protected();
    g.poke::<u32>(DATA, 0xdead_beef);
    g.poke::<u16>(DATA + 4, sel::READ_ONLY);
    g.code(|a| {
        a.push(cs)?;
        a.pop(eax)?;
        a.push(i32::from(sel::READ_ONLY))?;
        a.pop(fs)?;
        a.mov(ecx, fs)?;
        a.les(ebx, fword_ptr(DATA as i32))?;
        a.mov(edx, es)
    });
    g.finish();
    assert_eq!(g.reg(reg::RAX) & 0xffff, u64::from(sel::CODE32));
    assert_eq!((g.reg(reg::RCX), g.reg(reg::RDX)), (sel::READ_ONLY.into(), sel::READ_ONLY.into()));
    assert_eq!((g.reg(reg::RBX), g.reg(reg::RSP)), (0xdead_beef, STACK));
}

#[test]
fn a_call_gate_raises_privilege_and_retf_lowers_it() {
    let mut g = Guest::long();
    // A 64-bit call gate of two entries, for user mode.
    g.poke(GDT + u64::from(sel::SPARE), gate(sel::CODE64, 0x9000, 0xec));
    g.poke::<u64>(GDT + u64::from(sel::SPARE) + 8, 0);
    g.poke::<u32>(DATA, 0);
    g.poke::<u16>(DATA + 4, sel::SPARE | 3);
    g.user(sel::USER_CODE64);
    g.code_at(0x9000, 64, |a| {
        a.mov(rbx, rsp)?;
        a.mov(ecx, cs)?;
        a.mov(esi, ss)?;
        a.db(&[0x48, 0xcb])
    });
    g.code(|a| {
        a.mov(eax, DATA as u32)?;
        a.db(&[0xff, 0x18])?;
        a.mov(edx, cs)?;
        a.mov(rdi, rsp)?;
        a.ud2()
    });
    g.fault(6);
    assert_eq!((g.reg(reg::RBX), g.reg(reg::RCX)), (STACK0 - 32, sel::CODE64.into()));
    assert_eq!((g.reg(reg::RDX), g.reg(reg::RSI)), (sel::USER_CODE64.into(), 0));
    assert_eq!(g.reg(reg::RDI), STACK);
}

#[test]
fn a_legacy_call_gate_copies_parameters() {
    let mut g = Guest::protected();
    g.poke(GDT + u64::from(sel::SPARE), gate(sel::CODE32, 0x9000, 0xec) | 2 << 32);
    g.set_gate(3, sel::CODE32, HANDLERS + 3 * 16, 0xee);
    g.user(sel::USER_CODE32);
    g.code_at(0x9000, 32, |a| {
        a.mov(eax, dword_ptr(esp + 8))?;
        a.mov(ebx, dword_ptr(esp + 12))?;
        a.mov(ecx, dword_ptr(esp + 16))?;
        a.retf_1(8)
    });
    g.code(|a| {
        a.push(11)?;
        a.push(22)?;
        a.db(&[0x9a])?;
        a.dd(&[0])?;
        a.dw(&[sel::SPARE | 3])?;
        a.mov(edx, esp)?;
        a.int3()
    });
    g.fault(3);
    assert_eq!((g.reg(reg::RAX), g.reg(reg::RBX)), (22, 11));
    assert_eq!((g.reg(reg::RCX), g.reg(reg::RDX)), (STACK - 8, STACK));
}

#[test]
fn lar_lsl_verr_verw_answer_without_faults() {
    let mut g = Guest::long();
    g.code(|a| {
        a.mov(ecx, u32::from(sel::READ_ONLY))?;
        a.lar(eax, ecx)?;
        a.lsl(ebx, ecx)?;
        a.verr(cx)?;
        a.setz(dl)?;
        a.verw(cx)?;
        a.setz(dh)?;
        a.mov(ecx, 0x1000)?;
        a.lar(esi, ecx)?;
        a.setz(cl)
    });
    g.finish();
    assert_eq!(g.reg(reg::RAX), u64::from(FLAT_DATA & !0x200) | 0xf_0000);
    assert_eq!((g.reg(reg::RBX), g.reg(reg::RDX) & 0xffff), (0xffff_ffff, 0x0001));
    assert_eq!((g.reg(reg::RSI), g.reg(reg::RCX) & 0xff), (0, 0));
}

#[test]
fn umip_hides_tables_from_users() {
    for (umip, hidden) in [(false, false), (true, true)] {
        let mut g = Guest::long();
        if umip {
            g.vcpu.state.cr4 |= cr4::UMIP;
        }
        g.user(sel::USER_CODE64);
        g.code(|a| {
            a.sgdt(ptr(DATA))?;
            a.ud2()
        });
        g.fault(if hidden { 13 } else { 6 });
        if !hidden {
            assert_eq!((g.peek::<u16>(DATA), g.peek::<u64>(DATA + 2)), (sel::LAST + 7, GDT));
        }
    }
}

#[test]
fn ltr_marks_the_tss_busy_and_refuses_a_busy_one() {
    let mut g = Guest::long();
    g.poke(GDT + u64::from(sel::SPARE), descriptor(0x5000, 0x67, 0x8900));
    g.poke::<u64>(GDT + u64::from(sel::SPARE) + 8, 0xffff_8000);
    g.code(|a| {
        a.mov(eax, u32::from(sel::SPARE))?;
        a.ltr(ax)?;
        a.str(ebx)?;
        a.ltr(ax)
    });
    let t = g.fault(13);
    assert_eq!(t.error_code, Some(sel::SPARE.into()));
    assert_eq!(g.reg(reg::RBX), u64::from(sel::SPARE));
    assert_eq!(g.vcpu.state.tr.base, 0xffff_8000_0000_5000);
    assert_eq!(g.peek::<u8>(GDT + u64::from(sel::SPARE) + 5), 0x8b);
}

#[test]
fn arpl_raises_the_rpl() {
    let mut g = Guest::protected();
    g.code(|a| {
        a.mov(eax, 0x10)?;
        a.mov(ecx, 3)?;
        a.arpl(ax, cx)
    });
    g.finish();
    assert_eq!(g.reg(reg::RAX), 0x13);
    assert!(g.vcpu.state.flags.zf());
}

#[test]
fn popf_changes_what_the_privilege_allows() {
    let mut g = Guest::long();
    g.user(sel::USER_CODE64);
    g.vcpu.set_rflags(flags::IF, flags::IF);
    g.code(|a| {
        a.push(0x0020_3001)?;
        a.popfq()?;
        a.ud2()
    });
    let t = g.fault(6);
    let all = flags::IF | flags::IOPL | flags::ID | flags::CF;
    assert_eq!(t.rflags & all, flags::IF | flags::ID | flags::CF);
}

#[test]
fn segments_of_the_local_table() {
    let mut g = Guest::long();
    g.poke(GDT + u64::from(sel::SPARE), descriptor(DATA as u32, 15, 0x8200));
    g.poke::<u64>(GDT + u64::from(sel::SPARE) + 8, 0);
    g.poke(DATA + 8, descriptor(0x1000, 0xff, 0x9300 | DPL3));
    g.code(|a| {
        a.mov(eax, u32::from(sel::SPARE))?;
        a.lldt(ax)?;
        a.sldt(ebx)?;
        a.mov(eax, 0xc)?;
        a.mov(gs, ax)?;
        // Beyond its limit.
        a.mov(eax, 0x14)?;
        a.mov(gs, ax)
    });
    assert_eq!(g.fault(13).error_code, Some(0x14));
    assert_eq!(
        (g.reg(reg::RBX), g.vcpu.state.segments[usize::from(seg::GS)].selector),
        (sel::SPARE.into(), 0xc)
    );
    assert_eq!(g.vcpu.state.seg_base[usize::from(seg::GS)], 0x1000);
}

#[test]
fn limits_and_types_are_checked_outside_64_bit_mode() {
    let mut g = Guest::protected();
    g.poke(GDT + u64::from(sel::SPARE), descriptor(DATA as u32, 0xf, 0x9300));
    g.code(|a| {
        a.mov(eax, u32::from(sel::SPARE))?;
        a.mov(es, ax)?;
        a.mov(ebx, dword_ptr(0xc).es())?;
        a.mov(ecx, dword_ptr(0xd).es())
    });
    assert_eq!(g.fault(13).error_code, Some(0));
    let mut g = Guest::protected();
    g.code(|a| a.mov(dword_ptr(DATA as i32).cs(), eax));
    assert_eq!(g.fault(13).error_code, Some(0));
}

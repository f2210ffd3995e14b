//! Instructions in supervisor mode that are privileged, which trap and are emulated, and those whose behaviour PVM
//! changes (specification, "X86 Instructions with changed behavior"). Breakpoint registers are here too.

use super::prelude::*;
use crate::abi::control;
use crate::memory::PageFrame;
use crate::paging::rights;

pub(super) static GROUP: Group = group(
    "insn",
    &[
        check("pushf-shows-if", pushf_shows_if),
        check("popf-keeps-if", popf_keeps_if),
        check("cli-and-sti", cli_and_sti),
        check("int-other", int_other),
        check("sysenter", sysenter),
        check("table-registers-store", table_registers_store),
        check("table-registers-load", table_registers_load),
        check("smsw", smsw),
        check("lar-and-lsl", lar_and_lsl),
        check("verr-and-verw", verr_and_verw),
        check("data-segments", data_segments),
        check("underlying-selectors", underlying_selectors),
        check("in-and-out", in_and_out),
        check("cr0", cr0),
        check("cr2", cr2),
        check("cr3", cr3),
        check("cr4", cr4),
        check("wbinvd", wbinvd),
        check("breakpoint-registers", breakpoint_registers),
        check("breakpoint-data", breakpoint_data),
        check("breakpoint-user-code", breakpoint_user_code),
        check("breakpoint-outside-range", breakpoint_outside_range),
    ],
);

fn pushf_shows_if(m: &Machine) -> Verdict {
    for open in [false, true] {
        m.cpu.set_interrupt_flag(open);
        let mut r = Registers::default();
        let ended = m.cpu.run(s::s_pushf, &mut r);
        m.cpu.set_interrupt_flag(false);
        no_fault(ended)?;
        equal("IF", r.rax & rflags::IF, rflags::IF)?;
    }
    Ok(())
}

/// Neither the underlying flag nor the PVCS's.
fn popf_keeps_if(m: &Machine) -> Verdict {
    for open in [false, true] {
        m.cpu.set_interrupt_flag(open);
        let mut r = Registers { rax: rflags::FIXED, ..Registers::default() };
        let ended = m.cpu.run(s::s_popf, &mut r);
        let after = m.cpu.event_flags();
        m.cpu.set_interrupt_flag(false);
        no_fault(ended)?;
        equal("IF", r.rax & rflags::IF, rflags::IF)?;
        equal("PVCS.IF", after & event_flags::IF, if open { event_flags::IF } else { 0 })?;
    }
    Ok(())
}

/// They trap, and act on the PVCS.
fn cli_and_sti(m: &Machine) -> Verdict {
    let ended = m.cpu.run(s::s_sti, &mut Registers::default());
    let opened = m.cpu.event_flags();
    m.cpu.set_interrupt_flag(true);
    let ended_too = m.cpu.run(s::s_cli, &mut Registers::default());
    let closed = m.cpu.event_flags();
    m.cpu.set_interrupt_flag(false);
    no_fault(ended)?;
    no_fault(ended_too)?;
    equal("PVCS.IF after STI", opened & event_flags::IF, event_flags::IF)?;
    equal("PVCS.IF after CLI", closed & event_flags::IF, 0u64)
}

fn int_other(m: &Machine) -> Verdict {
    let event = fault(m.cpu.run(s::s_int21, &mut marked()), vector::GP, 0x21 << 3 | 2)?;
    equal("the frame's RIP", event.frame.rip, address(s::s_int21))
}

fn sysenter(m: &Machine) -> Verdict {
    fault(m.cpu.run(s::s_sysenter, &mut marked()), vector::GP, 0).map(drop)
}

/// The host's values, or (the host has UMIP on) what was written last: they do not fault.
fn table_registers_store(m: &Machine) -> Verdict {
    let mut r = Registers { rdi: m.space.test(), ..Registers::default() };
    m.space.map_kernel(r.rdi, PageFrame::new(), rights::DATA);
    for code in [s::s_sgdt as Code, s::s_sidt, s::s_sldt, s::s_str] {
        no_fault(m.cpu.run(code, &mut r))?;
    }
    Ok(())
}

/// Taken, and without effect: events still come, and segments load as before.
fn table_registers_load(m: &Machine) -> Verdict {
    let frame = PageFrame::new();
    frame.set_word(0, 0xffff);
    let mut r = Registers { rdi: m.space.test(), ..Registers::default() };
    m.space.map_kernel(r.rdi, frame, rights::DATA);
    no_fault(m.cpu.run(s::s_lgdt, &mut r))?;
    no_fault(m.cpu.run(s::s_lidt, &mut r))?;
    no_fault(m.cpu.run(s::s_lldt, &mut r))?;
    fault(m.cpu.run(s::s_ud2, &mut marked()), vector::UD, 0)?;
    let mut r = Registers { rax: selector::USER_DS.into(), ..Registers::default() };
    no_fault(m.cpu.run(s::s_load_ds, &mut r))?;
    equal("DS", r.rax, selector::USER_DS)
}

fn smsw(m: &Machine) -> Verdict {
    let mut r = Registers::default();
    no_fault(m.cpu.run(s::s_smsw, &mut r))?;
    // PE, MP, ET, NE.
    equal("its low bits", r.rax & 0x33, 0x33u64)
}

/// Those of the host's GDT that user mode may see.
fn lar_and_lsl(m: &Machine) -> Verdict {
    let ask = |code: Code, selector: u64| {
        let mut r = Registers { rax: selector, ..Registers::default() };
        no_fault(m.cpu.run(code, &mut r)).map(|()| (r.rdx == 1, r.rcx))
    };
    for good in [selector::USER_CS, selector::USER_DS, selector::USER32_CS] {
        let (ok, rights) = ask(s::s_lar, good.into())?;
        holds("LAR of a user segment", ok, good.into())?;
        equal("its DPL", rights >> 13 & 3, 3u64)?;
        let (ok, limit) = ask(s::s_lsl, good.into())?;
        holds("LSL of a user segment", ok, good.into())?;
        equal("its limit", limit & 0xffff_ffff, 0xffff_ffffu64)?;
    }
    for bad in [0, 0x10, 0x18, 0xfff8] {
        holds("LAR of a segment that is not the user's", !ask(s::s_lar, bad)?.0, bad)?;
        holds("LSL of a segment that is not the user's", !ask(s::s_lsl, bad)?.0, bad)?;
    }
    Ok(())
}

fn verr_and_verw(m: &Machine) -> Verdict {
    let ask = |code: Code, selector: u64| {
        let mut r = Registers { rax: selector, ..Registers::default() };
        no_fault(m.cpu.run(code, &mut r)).map(|()| r.rdx == 1)
    };
    let (code, data) = (selector::USER_CS.into(), selector::USER_DS.into());
    holds("VERR of user code", ask(s::s_verr, code)?, code)?;
    holds("VERW of user code", !ask(s::s_verw, code)?, code)?;
    holds("VERW of user data", ask(s::s_verw, data)?, data)?;
    holds("VERR of a host segment", !ask(s::s_verr, 0x10)?, 0x10)
}

/// Null or a segment of DPL 3; nothing of the guest's own GDT.
fn data_segments(m: &Machine) -> Verdict {
    for good in [0, selector::USER_DS.into()] {
        let mut r = Registers { rax: good, ..Registers::default() };
        no_fault(m.cpu.run(s::s_load_ds, &mut r))?;
        equal("DS", r.rax, good)?;
    }
    for bad in [0x10u64, 0x18] {
        let event = m.cpu.run(s::s_load_ds, &mut Registers { rax: bad, ..Registers::default() });
        fault(event, vector::GP, bad as u32)?;
    }
    Ok(())
}

/// What code sees of CS and SS is the underlying processor's.
fn underlying_selectors(m: &Machine) -> Verdict {
    let mut r = Registers::default();
    no_fault(m.cpu.run(s::s_get_cs, &mut r))?;
    equal("CS", r.rax & 0xffff, selector::USER_CS)?;
    equal("SS", r.rdx & 0xffff, selector::USER_DS)
}

/// The serial port's scratch register.
fn in_and_out(m: &Machine) -> Verdict {
    const SCRATCH: u64 = 0x3ff;
    let mut r = Registers { rdx: SCRATCH, rax: 0x5a, ..Registers::default() };
    no_fault(m.cpu.run(s::s_out, &mut r))?;
    r.rax = 0;
    no_fault(m.cpu.run(s::s_in, &mut r))?;
    equal("what was written", r.rax & 0xff, 0x5au64)
}

fn cr0(m: &Machine) -> Verdict {
    let mut r = Registers::default();
    no_fault(m.cpu.run(s::s_get_cr0, &mut r))?;
    no_fault(m.cpu.run(s::s_set_cr0, &mut r))?;
    no_fault(m.cpu.run(s::s_clts, &mut r))
}

fn cr2(m: &Machine) -> Verdict {
    let mut r = Registers { rax: 0x1234_5000, ..Registers::default() };
    no_fault(m.cpu.run(s::s_set_cr2, &mut r))?;
    r.rax = 0;
    no_fault(m.cpu.run(s::s_get_cr2, &mut r))?;
    equal("CR2", r.rax, 0x1234_5000u64)
}

fn cr3(m: &Machine) -> Verdict {
    let mut r = Registers::default();
    no_fault(m.cpu.run(s::s_get_cr3, &mut r))?;
    equal("CR3", r.rax, m.space.kernel.root())?;
    no_fault(m.cpu.run(s::s_set_cr3, &mut r))?;
    no_fault(m.cpu.run(s::s_get_cr3, &mut r))?;
    equal("CR3", r.rax, m.space.kernel.root())
}

/// What is offered can be changed; SMEP and SMAP are not offered; FSGSBASE stays.
fn cr4(m: &Machine) -> Verdict {
    let old = insn::cr4();
    no_fault(m.cpu.run(s::s_set_cr4, &mut Registers { rax: old, ..Registers::default() }))?;
    for bad in [control::CR4_SMEP, control::CR4_SMAP] {
        let ended = m.cpu.run(s::s_set_cr4, &mut Registers { rax: old | bad, ..Registers::default() });
        let after = insn::cr4();
        if ended.is_some() {
            fault(ended, vector::GP, 0)?;
        }
        equal("CR4's bit that is not offered", after & bad, 0u64)?;
    }
    equal("CR4.FSGSBASE", insn::cr4() & control::CR4_FSGSBASE, control::CR4_FSGSBASE)
}

fn wbinvd(m: &Machine) -> Verdict {
    no_fault(m.cpu.run(s::s_wbinvd, &mut Registers::default()))
}

// ---- breakpoints ----

const L0: u64 = 1 << 0;
const ON_WRITE: u64 = 1 << 16;
const FOUR_BYTES: u64 = 3 << 18;
const FIXED: u64 = 1 << 10;

/// Sets breakpoint 0; `control` says when it hits. Off with 0.
fn set_breakpoint(m: &Machine, at: u64, control: u64) -> Verdict {
    no_fault(m.cpu.run(s::s_set_dr0, &mut Registers { rax: at, ..Registers::default() }))?;
    no_fault(m.cpu.run(s::s_set_dr6, &mut Registers { rax: 0xffff_0ff0, ..Registers::default() }))?;
    no_fault(m.cpu.run(s::s_set_dr7, &mut Registers { rax: control | FIXED, ..Registers::default() }))
}

fn breakpoint_registers(m: &Machine) -> Verdict {
    let at = m.space.test();
    set_breakpoint(m, at, 0)?;
    let mut r = Registers::default();
    no_fault(m.cpu.run(s::s_get_dr0, &mut r))?;
    equal("DR0", r.rax, at)?;
    no_fault(m.cpu.run(s::s_get_dr6, &mut r))?;
    equal("DR6", r.rax, 0xffff_0ff0u64)?;
    no_fault(m.cpu.run(s::s_get_dr7, &mut r))?;
    equal("DR7", r.rax, FIXED)
}

fn breakpoint_data(m: &Machine) -> Verdict {
    let at = m.space.test();
    m.space.map_kernel(at, PageFrame::new(), rights::DATA);
    set_breakpoint(m, at + 8, L0 | ON_WRITE | FOUR_BYTES)?;
    let ended = m.cpu.run(s::s_store, &mut Registers { rdi: at + 8, ..marked() });
    let (count, event) = (m.cpu.events().count(), m.cpu.events().get(0));
    let elsewhere = m.cpu.run(s::s_store, &mut Registers { rdi: at + 16, ..marked() });
    let count_elsewhere = m.cpu.events().count();
    set_breakpoint(m, 0, 0)?;
    no_fault(ended)?;
    no_fault(elsewhere)?;
    equal("events", count as u64, 1u64)?;
    equal("the vector", event.vector, vector::DB)?;
    equal("the frame's RIP", event.frame.rip, address(s::s_store_after))?;
    equal("DR6.B0", event.dr6 & 1, 1u64)?;
    equal("events elsewhere", count_elsewhere as u64, 0u64)
}

fn breakpoint_user_code(m: &Machine) -> Verdict {
    set_breakpoint(m, user_address(u::u_syscall), L0)?;
    let exit = m.cpu.enter(&User::at(u::u_syscall));
    set_breakpoint(m, 0, 0)?;
    ended_by(&exit, vector::DB)?;
    equal("rip", exit.pvcs.rip, user_address(u::u_syscall))
}

/// It is not active, whatever DR7 says: an access there is a page fault and nothing else.
fn breakpoint_outside_range(m: &Machine) -> Verdict {
    let at = 0xffff_ffff_8000_0000;
    set_breakpoint(m, at, L0 | ON_WRITE | FOUR_BYTES)?;
    let event = m.cpu.run(s::s_store, &mut Registers { rdi: at, ..marked() });
    let count = m.cpu.events().count();
    set_breakpoint(m, 0, 0)?;
    equal("events", count as u64, 1u64)?;
    fault(event, vector::PF, crate::abi::pf::WRITE).map(drop)
}

//! Events in supervisor mode below vector 32, and ERETS (specification, "Vector events in supervisor mode",
//! "EVENT_RETURN_SUPERVISOR").

use super::prelude::*;
use crate::abi::pf;
use crate::memory::PageFrame;
use crate::paging::rights;

pub(super) static GROUP: Group = group(
    "event",
    &[
        check("undefined-opcode", undefined_opcode),
        check("divide", divide),
        check("general-protection", general_protection),
        check("page-fault-read", page_fault_read),
        check("page-fault-write", page_fault_write),
        check("page-fault-read-only", page_fault_read_only),
        check("page-fault-fetch", page_fault_fetch),
        check("breakpoint", breakpoint),
        check("int-4", int_4),
        check("single-step", single_step),
        check("entry-state", entry_state),
        check("entry-clears-flags", entry_clears_flags),
        check("frame", frame),
        check("frame-alignment", frame_alignment),
        check("red-zone", red_zone),
        check("interrupt-flag-closed", interrupt_flag_closed),
        check("interrupt-flag-open", interrupt_flag_open),
        check("vector-and-code-not-in-pvcs", not_in_pvcs),
        check("erets-restores", erets_restores),
        check("erets-ignores", erets_ignores),
        check("erets-sets-interrupt-flag", erets_sets_interrupt_flag),
        check("erets-flags", erets_flags),
        check("nested", nested),
    ],
);

fn undefined_opcode(m: &Machine) -> Verdict {
    let event = fault(m.cpu.run(s::s_ud2, &mut marked()), vector::UD, 0)?;
    equal("the frame's RIP", event.frame.rip, address(s::s_ud2))
}

fn divide(m: &Machine) -> Verdict {
    let mut r = Registers::default();
    fault(m.cpu.run(s::s_divide, &mut r), vector::DE, 0).map(drop)
}

fn general_protection(m: &Machine) -> Verdict {
    fault(m.cpu.run(s::s_noncanonical, &mut Registers::default()), vector::GP, 0).map(drop)
}

/// The address is in PVCS::cr2; the error code does not tell of user mode.
fn page_fault_read(m: &Machine) -> Verdict {
    let at = m.space.nowhere() + 0x1234;
    let event = fault(m.cpu.run(s::s_load, &mut Registers { rdi: at, ..marked() }), vector::PF, 0)?;
    equal("cr2", event.cr2, at)?;
    equal("the frame's RIP", event.frame.rip, address(s::s_load))
}

fn page_fault_write(m: &Machine) -> Verdict {
    let at = 0x7000_0ff8;
    let event = fault(m.cpu.run(s::s_store, &mut Registers { rdi: at, ..marked() }), vector::PF, pf::WRITE)?;
    equal("cr2", event.cr2, at)
}

/// CR0.WP is on.
fn page_fault_read_only(m: &Machine) -> Verdict {
    let at = m.space.test();
    let frame = PageFrame::new();
    m.space.map_kernel(at, frame, rights::CONSTANT);
    let event = m.cpu.run(s::s_store, &mut Registers { rdi: at + 8, ..marked() });
    m.space.kernel.unmap(at);
    let event = fault(event, vector::PF, pf::WRITE | pf::PRESENT)?;
    equal("cr2", event.cr2, at + 8)?;
    equal("the page", frame.word(1), 0u64)
}

fn page_fault_fetch(m: &Machine) -> Verdict {
    let at = m.space.test();
    m.space.map_kernel(at, PageFrame::new(), rights::DATA);
    let event = m.cpu.run(s::s_call, &mut Registers { rdi: at + 0x10, ..marked() });
    m.space.kernel.unmap(at);
    let event = fault(event, vector::PF, pf::FETCH | pf::PRESENT)?;
    equal("cr2", event.cr2, at + 0x10)?;
    equal("the frame's RIP", event.frame.rip, at + 0x10)
}

/// A trap: the frame's RIP is behind the instruction, and the code goes on.
fn breakpoint(m: &Machine) -> Verdict {
    no_fault(m.cpu.run(s::s_int3, &mut marked()))?;
    let events = m.cpu.events();
    equal("events", events.count() as u64, 1u64)?;
    equal("the vector", events.get(0).vector, vector::BP)?;
    equal("the frame's RIP", events.get(0).frame.rip, address(s::s_int3_after))
}

/// The specification allows it in the IDT's table, and not where it speaks of INT n.
fn int_4(m: &Machine) -> Verdict {
    let event = m.cpu.run(s::s_int4, &mut marked());
    let vector = event.map_or_else(|| m.cpu.events().get(0).vector, |e| e.vector);
    one_of("the vector", vector, &[vector::OF.into(), vector::GP.into()])
}

fn single_step(m: &Machine) -> Verdict {
    no_fault(m.cpu.run(s::s_step, &mut Registers::default()))?;
    let event = m.cpu.events().get(0);
    equal("events", m.cpu.events().count() as u64, 1u64)?;
    equal("the vector", event.vector, vector::DB)?;
    equal("the frame's RIP", event.frame.rip, address(s::s_stepped))?;
    equal("DR6.BS", event.dr6 >> 14 & 1, 1u64)?;
    equal("TF in the frame", event.frame.rflags & rflags::TF, rflags::TF)
}

/// What every event loads.
fn entered_well(event: &Event, offset: u64) -> Verdict {
    equal("RCX at entry", event.entry_rcx, address(crate::entry::event_entry) + offset)?;
    equal("R11 at entry", event.entry_r11, rflags::IF | rflags::FIXED)?;
    equal("RFLAGS at entry", event.entry_rflags, rflags::IF | rflags::FIXED)
}

fn entry_state(m: &Machine) -> Verdict {
    no_fault(m.cpu.run(s::s_int3, &mut marked()))?;
    entered_well(&m.cpu.events().get(0), 256)
}

/// All status flags, DF, AC and ID on before the event: off in the handler, in the frame, and on after ERETS.
fn entry_clears_flags(m: &Machine) -> Verdict {
    let flags = 0xcd5 | rflags::ID | rflags::FIXED;
    let mut r = Registers { rax: flags, ..Registers::default() };
    no_fault(m.cpu.run(s::s_int3_then_flags, &mut r))?;
    let event = m.cpu.events().get(0);
    entered_well(&event, 256)?;
    equal("RFLAGS in the frame", event.frame.rflags, flags)?;
    equal("RFLAGS after ERETS", r.rax & !rflags::IF, flags)
}

fn frame(m: &Machine) -> Verdict {
    let stack = Stack::new(m);
    let mut r = Registers { rsp: stack.top(), ..marked() };
    let before = r;
    no_fault(m.cpu.run(s::s_int3, &mut r))?;
    let frame = m.cpu.events().get(0).frame;
    let cs = rdmsr(x86_msr::STAR) >> 32 & 0xffff;
    equal("R11", frame.r11, before.r11)?;
    equal("RCX", frame.rcx, before.rcx)?;
    equal("SS", frame.ss, cs + 8)?;
    equal("RSP", frame.rsp, stack.top())?;
    equal("CS", frame.cs, cs)?;
    equal("RIP", frame.rip, address(s::s_int3_after))?;
    equal("the vector, in the upper half", frame.vector, vector::BP)
}

/// A stack of its own for code whose RSP matters: two pages, the upper half of the second unused.
struct Stack {
    at: u64,
}

impl Stack {
    fn new(m: &Machine) -> Self {
        let at = m.space.test() + 0x10_0000;
        for n in 0..2 {
            m.space.map_kernel(at + n * 0x1000, PageFrame::new(), rights::DATA);
        }
        Self { at }
    }

    fn top(&self) -> u64 {
        self.at + 0x1800
    }
}

/// RSP minus the red zone, rounded down to 16, minus the frame.
fn frame_alignment(m: &Machine) -> Verdict {
    let stack = Stack::new(m);
    for zone in [0, 1, 8, 128, 0x208] {
        wrmsr(msr(PvmMsr::SupervisorRedzone), zone);
        for offset in [0, 1, 8, 15] {
            let rsp = stack.top() + offset;
            no_fault(m.cpu.run(s::s_int3, &mut Registers { rsp, ..marked() }))?;
            let event = m.cpu.events().get(0);
            equal("RSP at entry", event.entry_rsp, ((rsp - zone) & !15) - 64)?;
            equal("RSP in the frame", event.frame.rsp, rsp)?;
        }
    }
    Ok(())
}

fn red_zone(m: &Machine) -> Verdict {
    let mut r = Registers { rsp: Stack::new(m).top() + 8, ..marked() };
    let before = r;
    no_fault(m.cpu.run(s::s_red_zone, &mut r))?;
    equal("the first word of the red zone", r.r8, before.rax)?;
    equal("the last word of the red zone", r.r9, before.rbx)
}

fn interrupt_flag_closed(m: &Machine) -> Verdict {
    no_fault(m.cpu.run(s::s_int3, &mut marked()))?;
    let event = m.cpu.events().get(0);
    equal("IF in the frame", event.frame.rflags & rflags::IF, 0u64)?;
    equal("PVCS.IF in the handler", event.event_flags & event_flags::IF, 0u64)?;
    equal("PVCS.IF afterwards", m.cpu.event_flags() & event_flags::IF, 0u64)
}

/// IF moves from the PVCS to the frame, and ERETS moves it back.
fn interrupt_flag_open(m: &Machine) -> Verdict {
    m.cpu.set_interrupt_flag(true);
    let fault = m.cpu.run(s::s_int3, &mut marked());
    let after = m.cpu.event_flags();
    m.cpu.set_interrupt_flag(false);
    no_fault(fault)?;
    let event = m.cpu.events().get(0);
    equal("IF in the frame", event.frame.rflags & rflags::IF, rflags::IF)?;
    equal("PVCS.IF in the handler", event.event_flags & event_flags::IF, 0u64)?;
    equal("PVCS.IF afterwards", after & event_flags::IF, event_flags::IF)
}

/// Those fields are for events from user mode and for interrupts.
fn not_in_pvcs(m: &Machine) -> Verdict {
    m.cpu.change_pvcs(|p| {
        (p.event_vector, p.event_errcode) = (0x77, 0x8888);
        (p.rip, p.rsp, p.rcx, p.r11, p.cr2) = (1, 2, 3, 4, 5);
    });
    let before = m.cpu.pvcs();
    fault(m.cpu.run(s::s_noncanonical, &mut marked()), vector::GP, 0)?;
    let after = m.cpu.pvcs();
    equal("event_vector", after.event_vector, before.event_vector)?;
    equal("event_errcode", after.event_errcode, before.event_errcode)?;
    holds("the PVCS changes with an exception in supervisor mode", after == before, after.rip)
}

fn erets_restores(m: &Machine) -> Verdict {
    let mut r = Registers { rsp: Stack::new(m).top() + 3, ..marked() };
    let before = r;
    no_fault(m.cpu.run(s::s_int3, &mut r))?;
    equal("RCX", r.rcx, before.rcx)?;
    equal("R11", r.r11, before.r11)?;
    equal("RSP", r.rsp, before.rsp)?;
    for (got, want) in [
        (r.rax, before.rax),
        (r.rbx, before.rbx),
        (r.rbp, before.rbp),
        (r.r10, before.r10),
        (r.r15, before.r15),
    ] {
        equal("a register", got, want)?;
    }
    Ok(())
}

/// CS, SS and the error code of the frame.
fn erets_ignores(m: &Machine) -> Verdict {
    let before = insn::cs();
    no_fault(m.cpu.run_with(
        |_, trap| {
            trap.frame.cs = 0xdead;
            trap.frame.ss = 0xbeef;
            trap.frame.errcode = 0x1234_5678;
            trap.frame.vector = 0x9abc_def0;
            true
        },
        s::s_int3,
        &mut marked(),
    ))?;
    equal("CS", insn::cs(), before)
}

fn erets_sets_interrupt_flag(m: &Machine) -> Verdict {
    for open in [true, false] {
        m.cpu.set_interrupt_flag(!open);
        let hook = if open { open_in_frame } else { close_in_frame };
        let fault = m.cpu.run_with(hook, s::s_int3, &mut marked());
        let after = m.cpu.event_flags();
        m.cpu.set_interrupt_flag(false);
        no_fault(fault)?;
        equal("PVCS.IF", after & event_flags::IF, if open { event_flags::IF } else { 0 })?;
    }
    Ok(())
}

fn open_in_frame(_: &Cpu, trap: &mut Trap) -> bool {
    trap.frame.rflags |= rflags::IF;
    true
}

fn close_in_frame(_: &Cpu, trap: &mut Trap) -> bool {
    trap.frame.rflags &= !rflags::IF;
    true
}

/// IOPL, VM, VIF and VIP cannot be set; the underlying IF cannot be cleared.
fn erets_flags(m: &Machine) -> Verdict {
    let mut r = Registers { rax: rflags::FIXED, ..Registers::default() };
    no_fault(m.cpu.run_with(
        |_, trap| {
            trap.frame.rflags = rflags::IOPL | rflags::VIF | rflags::VIP | 1;
            true
        },
        s::s_int3_then_flags,
        &mut r,
    ))?;
    equal("RFLAGS after ERETS", r.rax, 1 | rflags::FIXED | rflags::IF)
}

/// An exception in the handler of an exception is one more: there are no double faults.
fn nested(m: &Machine) -> Verdict {
    fn hook(cpu: &Cpu, trap: &mut Trap) -> bool {
        if trap.frame.vector == vector::BP && cpu.events().count() == 1 {
            // The registers' place is the outer run's: another run must not be within. A plain trap is enough.
            insn::int3();
        }
        trap.frame.vector == vector::BP
    }
    no_fault(m.cpu.run_with(hook, s::s_int3, &mut marked()))?;
    let events = m.cpu.events();
    equal("events", events.count() as u64, 2u64)?;
    let (outer, inner) = (events.get(0), events.get(1));
    equal("the inner vector", inner.vector, vector::BP)?;
    holds("the inner frame is not below the outer one", inner.entry_rsp < outer.entry_rsp, inner.entry_rsp)
}

//! Maskable interrupts: the timer, into supervisor and user mode, let in and kept out (specification,
//! "PVCS::event_flags", "PVM_HC_IRQ_WIN", "PVM_HC_IRQ_HLT").

use super::prelude::*;
use crate::cpu::wait_until;
use crate::lapic;

pub(super) static GROUP: Group = group(
    "irq",
    &[
        check("supervisor", supervisor),
        check("supervisor-entry-state", supervisor_entry_state),
        check("supervisor-stack", supervisor_stack),
        check("held-sets-ip", held_sets_ip),
        check("irq-win-delivers", irq_win_delivers),
        check("irq-win-without-if", irq_win_without_if),
        check("sti-delivers", sti_delivers),
        check("erets-delivers", erets_delivers),
        check("eretu-delivers", eretu_delivers),
        check("user", user),
        check("user-compat", user_compat),
        check("user-keeps-if", user_keeps_if),
        check("irq-halt", irq_halt),
        check("irq-halt-pending", irq_halt_pending),
        check("hlt", hlt),
        check("every-vector", every_vector),
    ],
);

/// The timer's vector.
const TIMER: u8 = 0x40;
/// Ticks of the timer: soon, but not at once.
const SOON: u32 = 20_000;

/// Takes what waits.
pub(super) fn drain(cpu: &Cpu) {
    cpu.clear_events();
    cpu.set_interrupt_flag(true);
    insn::hypercall(hc::IRQ_WIN, [0; 4]);
    cpu.wait_for_events(1);
    cpu.set_interrupt_flag(false);
    cpu.clear_events();
}

/// Has an interrupt wait with interrupts closed: whether IP was set.
fn make_pending(m: &Machine) -> Verdict {
    m.cpu.clear_events();
    m.cpu.set_interrupt_flag(false);
    lapic::timer_once(TIMER, 1000);
    let waits = wait_until(|| {
        // Something that the hypervisor sees, in case it does not look by itself.
        insn::hypercall(1, [0; 4]);
        m.cpu.event_flags() & event_flags::IP != 0
    });
    holds("PVCS.IP is not set while an interrupt waits", waits, m.cpu.event_flags())?;
    equal("interrupts delivered while closed", m.cpu.events().count() as u64, 0u64)
}

/// One interrupt came, by the entry for interrupts.
fn one_interrupt(cpu: &Cpu) -> Result<Event, Stop> {
    let events = cpu.events();
    equal("events", events.count() as u64, 1u64)?;
    let event = events.get(0);
    equal("by the entry for interrupts", u64::from(event.interrupt), 1u64)?;
    equal("the vector", event.vector, TIMER)?;
    Ok(event)
}

fn supervisor(m: &Machine) -> Verdict {
    m.cpu.clear_events();
    m.cpu.set_interrupt_flag(true);
    lapic::timer_once(TIMER, SOON);
    m.cpu.wait_for_events(1);
    let after = m.cpu.event_flags();
    m.cpu.set_interrupt_flag(false);
    let event = one_interrupt(m.cpu)?;
    equal("PVCS.IF in the handler", event.event_flags & event_flags::IF, 0u64)?;
    equal("IF as it was saved", event.frame.rflags & rflags::IF, rflags::IF)?;
    equal("PVCS.IF after ERETS", after & event_flags::IF, event_flags::IF)
}

fn supervisor_entry_state(m: &Machine) -> Verdict {
    make_pending(m)?;
    let mut r = Registers { rax: hc::IRQ_WIN, ..marked() };
    m.cpu.set_interrupt_flag(true);
    let ended = m.cpu.run(s::s_hypercall, &mut r);
    m.cpu.set_interrupt_flag(false);
    no_fault(ended)?;
    let event = one_interrupt(m.cpu)?;
    equal("RCX at entry", event.entry_rcx, address(crate::entry::event_entry) + 512)?;
    equal("R11 at entry", event.entry_r11, rflags::IF | rflags::FIXED)?;
    equal("RFLAGS at entry", event.entry_rflags, rflags::IF | rflags::FIXED)?;
    equal("RIP as it was saved", event.frame.rip, address(s::s_hypercall_after))
}

/// RSP minus the red zone, rounded down to 16; nothing pushed.
fn supervisor_stack(m: &Machine) -> Verdict {
    let rsp = m.space.test() + 0x10_0808;
    m.space.map_kernel(rsp & !0xfff, crate::memory::PageFrame::new(), crate::paging::rights::DATA);
    make_pending(m)?;
    m.cpu.set_interrupt_flag(true);
    let mut r = Registers { rax: hc::IRQ_WIN, rsp, ..marked() };
    let ended = m.cpu.run(s::s_hypercall, &mut r);
    m.cpu.set_interrupt_flag(false);
    no_fault(ended)?;
    let event = one_interrupt(m.cpu)?;
    equal("RSP at entry", event.entry_rsp, (rsp - crate::cpu::REDZONE) & !15)?;
    equal("RSP as it was saved", event.frame.rsp, rsp)?;
    equal("RSP after ERETS", r.rsp, rsp)
}

fn held_sets_ip(m: &Machine) -> Verdict {
    let verdict = make_pending(m);
    drain(m.cpu);
    verdict
}

fn irq_win_delivers(m: &Machine) -> Verdict {
    make_pending(m)?;
    m.cpu.set_interrupt_flag(true);
    insn::hypercall(hc::IRQ_WIN, [0; 4]);
    let count = m.cpu.events().count();
    let after = m.cpu.event_flags();
    m.cpu.set_interrupt_flag(false);
    equal("events right behind the hypercall", count as u64, 1u64)?;
    one_interrupt(m.cpu)?;
    equal("PVCS.IP", after & event_flags::IP, 0u64)
}

/// The hypercall does not open interrupts itself.
fn irq_win_without_if(m: &Machine) -> Verdict {
    make_pending(m)?;
    insn::hypercall(hc::IRQ_WIN, [0; 4]);
    let count = m.cpu.events().count();
    drain(m.cpu);
    equal("events", count as u64, 0u64)
}

/// STI traps, and is as good as setting IF and making the hypercall.
fn sti_delivers(m: &Machine) -> Verdict {
    make_pending(m)?;
    let ended = m.cpu.run(s::s_sti, &mut marked());
    let came = m.cpu.wait_for_events(1);
    let after = m.cpu.event_flags();
    m.cpu.set_interrupt_flag(false);
    no_fault(ended)?;
    holds("no interrupt after STI", came, after)?;
    one_interrupt(m.cpu).map(drop)
}

/// ERETS that sets IF clears IP, and the interrupt is delivered.
fn erets_delivers(m: &Machine) -> Verdict {
    make_pending(m)?;
    fn hook(_: &Cpu, trap: &mut Trap) -> bool {
        trap.frame.rflags |= rflags::IF;
        trap.frame.vector == vector::BP
    }
    let ended = m.cpu.run_with(hook, s::s_int3, &mut marked());
    let came = m.cpu.wait_for_events(2);
    let after = m.cpu.event_flags();
    m.cpu.set_interrupt_flag(false);
    no_fault(ended)?;
    holds("no interrupt after ERETS", came, after)?;
    equal("the first vector", m.cpu.events().get(0).vector, vector::BP)?;
    equal("the second vector", m.cpu.events().get(1).vector, u64::from(TIMER))?;
    equal("PVCS.IP", after & event_flags::IP, 0u64)
}

/// In user mode interrupts are open: one that waits comes at the first instruction.
fn eretu_delivers(m: &Machine) -> Verdict {
    make_pending(m)?;
    let exit = m.cpu.enter(&User::at(u::u_spin));
    lapic::end_of_interrupt();
    ended_by(&exit, TIMER.into())?;
    equal("PVCS.IP", exit.pvcs.event_flags & event_flags::IP, 0u64)?;
    equal("events in supervisor mode", m.cpu.events().count() as u64, 0u64)
}

fn user(m: &Machine) -> Verdict {
    lapic::timer_once(TIMER, SOON);
    let exit = m.cpu.enter(&User::at(u::u_spin));
    lapic::end_of_interrupt();
    ended_by(&exit, TIMER.into())?;
    equal("RIP at entry", exit.registers.rcx, address(crate::entry::event_entry))?;
    let program = user_address(u::u_spin)..user_address(u::u_spin) + 7;
    holds("the saved RIP is not in the program", program.contains(&exit.pvcs.rip), exit.pvcs.rip)
}

fn user_compat(m: &Machine) -> Verdict {
    lapic::timer_once(TIMER, SOON);
    let exit = m.cpu.enter(&User::compat(u::u32_spin));
    lapic::end_of_interrupt();
    ended_by(&exit, TIMER.into())?;
    equal("user_cs", exit.pvcs.user_cs, selector::USER32_CS)
}

/// PVCS.IF means supervisor mode's, and an event from user mode leaves it alone, either way.
fn user_keeps_if(m: &Machine) -> Verdict {
    for open in [false, true] {
        m.cpu.clear_events();
        m.cpu.set_interrupt_flag(open);
        lapic::timer_once(TIMER, SOON);
        let exit = m.cpu.enter(&User::at(u::u_spin));
        m.cpu.set_interrupt_flag(false);
        lapic::end_of_interrupt();
        ended_by(&exit, TIMER.into())?;
        equal("PVCS.IF", exit.pvcs.event_flags & event_flags::IF, if open { event_flags::IF } else { 0 })?;
        equal("events in supervisor mode", m.cpu.events().count() as u64, 0u64)?;
    }
    Ok(())
}

/// STI and HLT in one: the interrupt wakes, is delivered, and IF is on.
fn irq_halt(m: &Machine) -> Verdict {
    m.cpu.clear_events();
    lapic::timer_once(TIMER, SOON);
    insn::hypercall(hc::IRQ_HALT, [0; 4]);
    let (count, after) = (m.cpu.events().count(), m.cpu.event_flags());
    m.cpu.set_interrupt_flag(false);
    equal("events right behind the hypercall", count as u64, 1u64)?;
    one_interrupt(m.cpu)?;
    equal("PVCS.IF", after & event_flags::IF, event_flags::IF)
}

/// It does not sleep when an interrupt waits.
fn irq_halt_pending(m: &Machine) -> Verdict {
    make_pending(m)?;
    insn::hypercall(hc::IRQ_HALT, [0; 4]);
    let (count, after) = (m.cpu.events().count(), m.cpu.event_flags());
    m.cpu.set_interrupt_flag(false);
    equal("events right behind the hypercall", count as u64, 1u64)?;
    equal("PVCS.IP", after & event_flags::IP, 0u64)
}

/// The instruction, for a guest that makes no hypercalls.
fn hlt(m: &Machine) -> Verdict {
    m.cpu.set_interrupt_flag(true);
    lapic::timer_once(TIMER, SOON);
    let ended = m.cpu.run(s::s_hlt, &mut marked());
    m.cpu.set_interrupt_flag(false);
    no_fault(ended)?;
    one_interrupt(m.cpu).map(drop)
}

/// The lowest and the highest vectors take the same way.
fn every_vector(m: &Machine) -> Verdict {
    for vector in [0x20, 0x21, 0x80, 0xfe] {
        m.cpu.clear_events();
        m.cpu.set_interrupt_flag(true);
        lapic::send(lapic::id(), lapic::command::FIXED | vector);
        m.cpu.wait_for_events(1);
        m.cpu.set_interrupt_flag(false);
        let event = m.cpu.events().get(0);
        equal("by the entry for interrupts", u64::from(event.interrupt), 1u64)?;
        equal("the vector", event.vector, vector)?;
    }
    Ok(())
}

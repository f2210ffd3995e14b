//! The NMI: it has its own mask, which only ERETU and ERETS clear (specification, "NMI shadow mask").

use super::prelude::*;
use crate::lapic::{self, command};

pub(super) static GROUP: Group = group(
    "nmi",
    &[
        check("supervisor", supervisor),
        check("ignores-if", ignores_if),
        check("masked-until-erets", masked_until_erets),
        check("masked-until-eretu", masked_until_eretu),
    ],
);

fn send_to_self() {
    lapic::send(lapic::id(), command::NMI);
}

/// Enough exits for an NMI to be delivered, if it would be.
fn linger() {
    for _ in 0..200 {
        insn::hypercall(1, [0; 4]);
    }
}

fn one_nmi(cpu: &Cpu) -> Verdict {
    holds("the NMI does not come", cpu.wait_for_events(1), 0)?;
    let event = cpu.events().get(0);
    equal("events", cpu.events().count() as u64, 1u64)?;
    equal("the vector", event.vector, vector::NMI)?;
    equal("by the entry for interrupts", u64::from(event.interrupt), 0u64)
}

/// Below vector 32: it has a frame on the stack.
fn supervisor(m: &Machine) -> Verdict {
    m.cpu.set_interrupt_flag(true);
    m.cpu.clear_events();
    send_to_self();
    let verdict = one_nmi(m.cpu);
    m.cpu.set_interrupt_flag(false);
    verdict
}

fn ignores_if(m: &Machine) -> Verdict {
    m.cpu.clear_events();
    send_to_self();
    one_nmi(m.cpu)
}

/// The second NMI is sent in the first one's handler, and comes when that returns.
fn masked_until_erets(m: &Machine) -> Verdict {
    fn hook(cpu: &Cpu, trap: &mut Trap) -> bool {
        if trap.frame.vector == vector::NMI && cpu.events().count() == 1 {
            send_to_self();
            linger();
            cpu.set_note(cpu.events().count() as u64);
        }
        false
    }
    m.cpu.clear_events();
    m.cpu.set_note(0);
    m.cpu.set_hook(Some(hook));
    send_to_self();
    let came = m.cpu.wait_for_events(2);
    m.cpu.set_hook(None);
    holds("the second NMI does not come", came, m.cpu.events().count() as u64)?;
    equal("events in the first one's handler", m.cpu.note(), 1u64)?;
    equal("the second vector", m.cpu.events().get(1).vector, vector::NMI)
}

/// The second NMI is sent in the first one's handler, which then enters user mode: it comes from there. With the mask
/// on again a third one is sent, and waits for the handler's end.
fn masked_until_eretu(m: &Machine) -> Verdict {
    fn hook(cpu: &Cpu, trap: &mut Trap) -> bool {
        if trap.frame.vector == vector::NMI && cpu.events().count() == 1 {
            send_to_self();
            linger();
            let before = cpu.events().count();
            let exit = cpu.enter(&User::at(u::u_spin));
            send_to_self();
            linger();
            let vectors = u64::from(exit.vector()) << 16 | (before as u64) << 8 | cpu.events().count() as u64;
            cpu.set_note(vectors);
        }
        false
    }
    m.cpu.clear_events();
    m.cpu.set_note(0);
    m.cpu.set_hook(Some(hook));
    send_to_self();
    let came = m.cpu.wait_for_events(2);
    m.cpu.set_hook(None);
    holds("the third NMI does not come", came, m.cpu.events().count() as u64)?;
    let note = m.cpu.note();
    equal("events before user mode", note >> 8 & 0xff, 1u64)?;
    equal("the vector from user mode", note >> 16, vector::NMI)?;
    equal("events before ERETS", note & 0xff, 1u64)?;
    equal("the last vector", m.cpu.events().get(1).vector, vector::NMI)
}

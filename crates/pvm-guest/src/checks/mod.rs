//! The checks, by group. Each states what the specification says and looks whether it is so; none relies on another.

mod detect;
mod event;
mod hypercall;
mod insn;
mod irq;
mod keys;
mod msr;
mod nmi;
mod paging;
mod smp;
mod user;

use crate::report::Group;

/// All of them, in the order in which they are run.
pub static GROUPS: &[&Group] = &[
    &detect::GROUP,
    &msr::GROUP,
    &event::GROUP,
    &user::GROUP,
    &hypercall::GROUP,
    &irq::GROUP,
    &nmi::GROUP,
    &paging::GROUP,
    &insn::GROUP,
    &keys::GROUP,
    &smp::GROUP,
];

/// What all groups use.
mod prelude {
    pub(super) use crate::abi::{
        PvmMsr, event_flags, hypercall as hc, msr, rflags, selector, vector, x86_msr,
    };
    pub(super) use crate::cpu::{Cpu, Event, Exit, Registers, User, address, user_address, user_space};
    pub(super) use crate::entry::{Code, Trap, supervisor as s, user as u};
    pub(super) use crate::insn;
    pub(super) use crate::report::{Check, Group, Machine, Stop, Verdict, equal, holds, one_of};
    pub(super) use crate::space::{rdmsr, wrmsr};

    /// A check by name.
    pub(super) const fn check(name: &'static str, run: fn(&Machine) -> Verdict) -> Check {
        Check { name, run }
    }

    /// A group by name.
    pub(super) const fn group(name: &'static str, checks: &'static [Check]) -> Group {
        Group { name, checks }
    }

    /// Registers with a value in each that says which it is. RSP is the caller's.
    pub(super) fn marked() -> Registers {
        let mark = |n: u64| 0x0101_0101_0101_0101 * n;
        Registers {
            rax: mark(1),
            rbx: mark(2),
            rcx: mark(3),
            rdx: mark(4),
            rsi: mark(5),
            rdi: mark(6),
            rbp: mark(7),
            r8: mark(8),
            r9: mark(9),
            r10: mark(10),
            r11: mark(11),
            r12: mark(12),
            r13: mark(13),
            r14: mark(14),
            r15: mark(15),
            ..Registers::default()
        }
    }

    /// The supervisor code came to its end.
    pub(super) fn no_fault(fault: Option<Event>) -> Verdict {
        match fault {
            None => Ok(()),
            Some(event) => {
                let so = u64::from(event.vector) << 32 | u64::from(event.error);
                holds("supervisor code was ended by a fault: vector and error code", false, so)
            }
        }
    }

    /// The supervisor code was ended by this fault.
    pub(super) fn fault(fault: Option<Event>, vector: u32, error: u32) -> Result<Event, Stop> {
        let event = fault.ok_or(Stop::Wrong { what: "there was no fault", got: 0, want: None })?;
        equal("the vector", event.vector, vector)?;
        equal("the error code", event.error, error)?;
        Ok(event)
    }

    /// The user program was ended by this event.
    pub(super) fn ended_by(exit: &Exit, vector: u32) -> Verdict {
        equal("the vector (0x100 for SYSCALL)", exit.vector(), vector)
    }

    /// The user program was ended by this fault, which has an error code.
    pub(super) fn ended_by_fault(exit: &Exit, vector: u32, error: u32) -> Verdict {
        ended_by(exit, vector)?;
        equal("the error code", exit.pvcs.event_errcode, error)
    }

    /// WRMSR, the instruction.
    pub(super) fn plain_wrmsr(cpu: &Cpu, index: u32, value: u64) -> Option<Event> {
        let mut r = Registers {
            rcx: index.into(),
            rax: value & 0xffff_ffff,
            rdx: value >> 32,
            ..Registers::default()
        };
        cpu.run(s::s_wrmsr, &mut r)
    }

    /// RDMSR, the instruction, of an MSR that there is.
    pub(super) fn plain_rdmsr(cpu: &Cpu, index: u32) -> Result<u64, Stop> {
        let mut r = Registers { rcx: index.into(), ..Registers::default() };
        no_fault(cpu.run(s::s_rdmsr, &mut r))?;
        Ok(r.rdx << 32 | r.rax & 0xffff_ffff)
    }
}

//! Protection keys (specification, "Protection Keys", "RDPKRU/WRPKRU"). Without PKU in CPUID all are skipped.

use super::prelude::*;
use crate::abi::{control, pf};
use crate::paging::{bits::KEY_SHIFT, rights};

pub(super) static GROUP: Group = group(
    "keys",
    &[
        check("user-value-in-and-out", user_value),
        check("supervisor-default", supervisor_default),
        check("user-access-denied", user_access_denied),
        check("supervisor-access-denied", supervisor_access_denied),
        check("pkrs-is-pkru", pkrs_is_pkru),
    ],
);

const KEY: u64 = 5;
/// Access to pages of the key is denied.
const DENIED: u32 = 1 << (2 * KEY);

/// Turns protection keys on for user mode, and (if asked) for supervisor mode; back to what it was when dropped.
struct Keys {
    cr4: u64,
}

impl Keys {
    fn on(m: &Machine, supervisor: bool) -> Result<Self, Stop> {
        let features = insn::synthetic_cpuid(7, 0).ecx;
        if features >> 3 & 1 == 0 {
            return Err(Stop::Skip("no PKU"));
        }
        if supervisor && features >> 31 == 0 {
            return Err(Stop::Skip("no PKS"));
        }
        let cr4 = insn::cr4();
        let new = cr4 | control::CR4_PKE | if supervisor { control::CR4_PKS } else { 0 };
        no_fault(m.cpu.run(s::s_set_cr4, &mut Registers { rax: new, ..Registers::default() }))?;
        Ok(Self { cr4 })
    }
}

impl Drop for Keys {
    fn drop(&mut self) {
        insn::set_cr4(self.cr4);
    }
}

fn user_value(m: &Machine) -> Verdict {
    let _on = Keys::on(m, false)?;
    let mut program = User { pkru: 0x5555_5550, ..User::at(u::u_keys) };
    program.registers.rbx = 0xc0;
    let exit = m.cpu.enter(&program);
    ended_by(&exit, Exit::SYSCALL)?;
    equal("PKRU in user mode", exit.registers.rax, program.pkru)?;
    equal("PVCS.pkru", exit.pvcs.pkru, 0xc0u64)
}

/// Entry from user mode loads 0 while there are no supervisor keys.
fn supervisor_default(m: &Machine) -> Verdict {
    let _on = Keys::on(m, false)?;
    let exit = m.cpu.enter(&User { pkru: DENIED, ..User::at(u::u_syscall) });
    ended_by(&exit, Exit::SYSCALL)?;
    let mut r = Registers::default();
    no_fault(m.cpu.run(s::s_rdpkru, &mut r))?;
    equal("PKRU in supervisor mode", r.rax & 0xffff_ffff, 0u64)
}

fn user_access_denied(m: &Machine) -> Verdict {
    let _on = Keys::on(m, false)?;
    m.space.map_user(user_space::TEST, m.space.data[2], rights::USER_DATA | KEY << KEY_SHIFT);
    let program = |pkru| {
        let mut program = User { pkru, ..User::at(u::u_load) };
        program.registers.rdi = user_space::TEST;
        program
    };
    let allowed = m.cpu.enter(&program(0));
    let denied = m.cpu.enter(&program(DENIED));
    m.space.user.unmap(user_space::TEST);
    ended_by(&allowed, Exit::SYSCALL)?;
    ended_by_fault(&denied, vector::PF, pf::PRESENT | pf::USER | pf::KEYS)
}

/// PKRU protects in supervisor mode as well, if it is on: underneath, the modes are one.
fn supervisor_access_denied(m: &Machine) -> Verdict {
    let _on = Keys::on(m, true)?;
    m.space.map_user(user_space::TEST, m.space.data[2], rights::USER_DATA | KEY << KEY_SHIFT);
    let load = |keys: u32| {
        let mut r = Registers { rax: keys.into(), rdi: user_space::TEST, ..Registers::default() };
        let ended = m.cpu.run(s::s_load_with_keys, &mut r);
        // A fault leaves the keys as they were.
        let _ = m.cpu.run(s::s_wrpkru, &mut Registers::default());
        ended
    };
    let (allowed, denied) = (load(0), load(DENIED));
    m.space.user.unmap(user_space::TEST);
    no_fault(allowed)?;
    fault(denied, vector::PF, pf::PRESENT | pf::KEYS).map(drop)
}

/// With supervisor keys on, entry from user mode loads MSR_IA32_PKRS.
fn pkrs_is_pkru(m: &Machine) -> Verdict {
    let _on = Keys::on(m, true)?;
    wrmsr(x86_msr::PKRS, DENIED.into());
    let exit = m.cpu.enter(&User { pkru: 0x30, ..User::at(u::u_syscall) });
    let mut r = Registers::default();
    let ended = m.cpu.run(s::s_rdpkru, &mut r);
    let _ = m.cpu.run(s::s_wrpkru, &mut Registers::default());
    wrmsr(x86_msr::PKRS, 0);
    ended_by(&exit, Exit::SYSCALL)?;
    no_fault(ended)?;
    equal("PKRU in supervisor mode", r.rax & 0xffff_ffff, DENIED)?;
    equal("PVCS.pkru", exit.pvcs.pkru, 0x30u64)
}

//! `bench=NAME count=N`: round trips, for whoever measures from outside, with the time stamp's ticks they took.
//!
//! | name | one round is |
//! |---|---|
//! | `syscall` | SYSCALL in user mode and ERETU, nothing else: MSR_LSTAR points to the ERETU |
//! | `fault` | a page fault in user mode, one addition to PVCS::rip, and ERETU |
//! | `hypercall` | IRQ_WIN |

use core::arch::global_asm;
use core::mem::offset_of;

use crate::abi::{Pvcs, PvmMsr, msr, vector, x86_msr};
use crate::cpu::{self, Registers, User, address};
use crate::entry::{self, labels};
use crate::report::Machine;
use crate::space::wrmsr;
use crate::{insn, say};

global_asm!(
    include_str!("bench.s"),
    L_PVCS = const cpu::L_PVCS,
    P_RIP = const offset_of!(Pvcs, rip),
);

labels! { bench_event_entry s_bench_hypercall u_bench_syscall u_bench_fault }

/// Runs the bench with this name; whether there is one and it went as it should.
pub fn run(name: &str, rounds: u64, machine: &Machine) -> bool {
    let cpu = machine.cpu;
    let start = insn::time_stamp();
    let good = match name {
        "syscall" => {
            wrmsr(x86_msr::LSTAR, address(entry::retu));
            let mut program = User::at(u_bench_syscall);
            program.registers.rbx = rounds;
            cpu.enter(&program).vector() == vector::BP
        }
        "fault" => {
            wrmsr(msr(PvmMsr::EventEntry), address(bench_event_entry));
            let mut program = User::at(u_bench_fault);
            program.registers.rbx = rounds;
            program.registers.rdi = 0x1000;
            cpu.enter(&program).syscall
        }
        "hypercall" => {
            let mut registers = Registers { r12: rounds, ..Registers::default() };
            cpu.run(s_bench_hypercall, &mut registers).is_none()
        }
        _ => {
            say!("pvm-guest: no bench {name}");
            return false;
        }
    };
    let ticks = insn::time_stamp().wrapping_sub(start);
    say!("pvm-guest: bench {name}: {rounds} rounds, {ticks} ticks");
    good
}

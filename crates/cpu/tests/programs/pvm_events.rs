//! PVM mode: entering it, events, returns, hypercalls.

use cpu::state::reg;
use cpu::{Outcome, flags};
use iced_x86::code_asm::*;
use pvm::abi::{GENERATION_1, event_flags, hypercall};

use crate::harness::*;

#[test]
fn a_guest_in_64_bit_supervisor_mode_finds_itself_unprivileged() {
    let mut g = Guest::long_before_pvm();
    g.code(|a| {
        a.mov(ax, cs)?;
        a.mov(bx, ss)?;
        a.pushfq()?;
        a.pop(rcx)
    });
    assert_eq!(g.run(), Outcome::Halted);
    assert_eq!(g.reg(reg::RAX) & 0xffff, 0x33);
    assert_eq!(g.reg(reg::RBX) & 0xffff, 0x2b);
    assert_eq!(g.reg(reg::RCX) & flags::IF, flags::IF);
}

#[test]
fn synthetic_cpuid_answers_in_both_modes() {
    let mut g = Guest::pvm();
    let synthetic = |a: &mut CodeAssembler| {
        a.mov(eax, 0x4000_0002)?;
        a.db(&pvm::abi::cpuid::SYNTHETIC)
    };
    g.code(synthetic);
    assert_eq!(g.run(), Outcome::Halted);
    assert_eq!(g.reg(reg::RBX), 0x4d_5650);
    g.vcpu.set_reg(reg::RBX, 0);
    g.code_at(CODE, 64, |a| {
        synthetic(a)?;
        a.syscall()
    });
    g.pvm_user(CODE, STACK, 0x202);
    assert_eq!(g.run(), Outcome::Halted);
    assert_eq!(g.vcpu.state.rip(), LSTAR + 1);
    assert_eq!(g.reg(reg::RBX), 0x4d_5650);
}

#[test]
fn a_system_call_goes_to_lstar_and_eretu_comes_back() {
    let mut g = Guest::pvm();
    let p = &GENERATION_1.pvcs;
    g.code_at(CODE, 64, |a| {
        a.mov(eax, 39)?;
        a.syscall()?;
        a.mov(ebx, 5)?;
        a.syscall()
    });
    g.set_pvcs(p.event_vector, 0x77);
    g.pvm_user(CODE, STACK - 8, 0x202);
    assert_eq!(g.run(), Outcome::Halted);
    assert_eq!(g.vcpu.state.rip(), LSTAR + 1);
    assert_eq!(g.pvcs(p.rip), CODE + 7);
    assert_eq!((g.pvcs(p.rsp), g.pvcs(p.user_cs), g.pvcs(p.user_ss)), (STACK - 8, 0x33, 0x2b));
    assert_eq!(g.pvcs(p.event_vector), 0x77);
    // The stack is the one that ERETU left.
    assert_eq!((g.reg(reg::RCX), g.reg(reg::R11), g.reg(reg::RSP)), (LSTAR, 0x202, STACK));
    g.resume_at(RETU);
    assert_eq!(g.run(), Outcome::Halted);
    assert_eq!(g.vcpu.state.rip(), LSTAR + 1);
    assert_eq!((g.reg(reg::RBX), g.pvcs(p.rip)), (5, CODE + 14));
    let stats = g.vcpu.pvm_stats().unwrap();
    assert_eq!((stats.syscalls, stats.user_returns, stats.switches()), (2, 2, 4));
}

#[test]
fn an_exception_in_supervisor_mode_is_framed_and_erets_returns() {
    let mut g = Guest::pvm();
    g.vcpu.write_msr(0x4b56_4df3, 128).unwrap();
    g.set_pvcs(GENERATION_1.pvcs.event_flags, event_flags::IF);
    let before = g.code_at(CODE, 64, |a| a.mov(rsp, STACK - 3));
    let len = g.code_at(CODE + before, 64, |a| a.mov(rax, qword_ptr(0x4000_0000)));
    assert_eq!(g.run(), Outcome::Halted);
    assert_eq!(g.vcpu.state.rip(), ENTRY + 257);
    let frame = ((STACK - 3 - 128) & !15) - 64;
    assert_eq!(g.reg(reg::RSP), frame);
    let words: Vec<u64> = (0..8).map(|n| g.peek(frame + n * 8)).collect();
    assert_eq!(words[0], 14 << 32);
    assert_eq!(words[1], CODE + before);
    assert_eq!((words[2], words[5]), (0x08, 0x10));
    assert_eq!(words[3] & (flags::IF | flags::RF), flags::IF | flags::RF);
    assert_eq!(words[4], STACK - 3);
    assert_eq!(g.pvcs(GENERATION_1.pvcs.cr2), 0x4000_0000);
    assert_eq!(g.pvcs(GENERATION_1.pvcs.event_flags), 0);
    // The handler skips the instruction.
    g.poke(frame + 8, CODE + before + len);
    g.resume_at(RETS);
    assert_eq!(g.run(), Outcome::Halted);
    assert_eq!(g.vcpu.state.rip(), CODE + before + len + 1);
    assert_eq!(g.pvcs(GENERATION_1.pvcs.event_flags), event_flags::IF);
}

#[test]
fn a_closed_interrupt_sets_ip_and_irq_win_lets_it_in() {
    let mut g = Guest::pvm();
    let p = &GENERATION_1.pvcs;
    g.script.lock().unwrap().interrupts.push_back(0x41);
    g.attention.raise(cpu::attention::INTERRUPT);
    g.code(|a| {
        a.mov(rcx, qword_ptr(PVCS))?;
        a.or(qword_ptr(PVCS), event_flags::IF as i32)?;
        a.mov(rax, hypercall::IRQ_WIN)?;
        a.syscall()?;
        a.nop()
    });
    assert_eq!(g.run(), Outcome::Halted);
    assert_eq!(g.vcpu.state.rip(), ENTRY + 513);
    assert_eq!(g.pvcs(p.event_vector), 0x41);
    assert_eq!(g.pvcs(p.event_flags), 0);
    assert_eq!(g.vcpu.pvm_stats().unwrap().interrupt_windows, 1);
}

#[test]
fn without_a_shared_structure_user_events_shut_the_vcpu_down() {
    let mut g = Guest::pvm();
    g.code_at(CODE, 64, |a| a.ud2());
    g.pvm_user(CODE, STACK, 0x202);
    g.vcpu.write_msr(0x4b56_4df1, 0).unwrap();
    assert_eq!(g.run(), Outcome::TripleFault);
}

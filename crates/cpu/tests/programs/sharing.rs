//! Two vCPUs on one RAM.

use std::sync::Arc;
use std::thread;

use cpu::state::reg;
use cpu::{Outcome, attention};
use iced_x86::code_asm::*;

use crate::harness::*;

const ROUNDS: u32 = 20_000;

#[test]
fn locked_instructions_of_two_vcpus_lose_nothing() {
    let mut first = Guest::long();
    let mut second = Guest::long_on(Arc::clone(&first.ram));
    // Each its own code page; one counter across a cache line, one exchanged by compare and swap.
    let program = |a: &mut CodeAssembler| {
        a.mov(ecx, ROUNDS)?;
        let mut top = a.create_label();
        let mut retry = a.create_label();
        a.set_label(&mut top)?;
        a.lock().inc(qword_ptr(DATA))?;
        a.mov(ebx, 1)?;
        a.lock().xadd(dword_ptr(DATA + 62), ebx)?;
        a.mov(eax, dword_ptr(DATA + 128))?;
        a.set_label(&mut retry)?;
        a.lea(edx, ptr(rax + 3))?;
        a.lock().cmpxchg(dword_ptr(DATA + 128), edx)?;
        a.jne(retry)?;
        a.dec(ecx)?;
        a.jne(top)
    };
    first.code_at(CODE, 64, program);
    second.code_at(0x9000, 64, program);
    second.vcpu.state.set_rip(0x9000);
    second.vcpu.set_reg(reg::RSP, STACK - 0x4000);
    thread::scope(|scope| {
        scope.spawn(|| assert_eq!(first.run(), Outcome::Halted));
        assert_eq!(second.run(), Outcome::Halted);
    });
    assert_eq!(second.peek::<u64>(DATA), 2 * u64::from(ROUNDS));
    assert_eq!(second.peek::<u32>(DATA + 62), 2 * ROUNDS);
    assert_eq!(second.peek::<u32>(DATA + 128), 6 * ROUNDS);
}

#[test]
fn a_vcpu_sees_code_that_another_rewrites() {
    let mut runner = Guest::long();
    let mut writer = Guest::long_on(Arc::clone(&runner.ram));
    // The runner calls a function until it returns 7; the writer first makes its TLB entry for the page writable,
    // then waits until the runner has run the code, then rewrites it.
    runner.code_at(0x9000, 64, |a| {
        a.mov(eax, 1)?;
        a.ret()
    });
    runner.code(|a| {
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.call(0x9000)?;
        a.lock().inc(dword_ptr(DATA))?;
        a.cmp(eax, 7)?;
        a.jne(top)
    });
    writer.code_at(0xa000, 64, |a| {
        a.mov(byte_ptr(0x9100), 1)?;
        let mut wait = a.create_label();
        a.set_label(&mut wait)?;
        a.cmp(dword_ptr(DATA), 100)?;
        a.jb(wait)?;
        a.mov(dword_ptr(0x9001), 7)
    });
    writer.vcpu.state.set_rip(0xa000);
    writer.vcpu.set_reg(reg::RSP, STACK - 0x4000);
    thread::scope(|scope| {
        scope.spawn(|| assert_eq!(runner.run(), Outcome::Halted));
        assert_eq!(writer.run(), Outcome::Halted);
    });
    assert_eq!(runner.reg(reg::RAX), 7);
}

#[test]
fn a_start_up_ipi_starts_a_waiting_vcpu() {
    let mut g = Guest::long();
    g.vcpu.wait_for_sipi();
    assert_eq!(g.run(), Outcome::Halted);
    g.code_at(0x5000, 16, |a| a.mov(ax, cs));
    g.attention.raise_sipi(5);
    assert_eq!(g.run(), Outcome::Halted);
    assert_eq!((g.reg(reg::RAX), g.vcpu.state.rip()), (0x500, 3));
}

#[test]
fn a_kick_ends_the_run_of_a_guest_that_spins() {
    let mut g = Guest::long();
    g.bytes(&[0xeb, 0xfe]);
    let attention = Arc::clone(&g.attention);
    thread::scope(|scope| {
        scope.spawn(|| attention.raise(attention::KICK));
        assert_eq!(g.run(), Outcome::Kicked);
    });
}

//! The interpreter on small loops, each a different part of the way of a guest instruction.
//!
//! Every program is run once to count what it executes, so that criterion's `elem/s` are guest instructions per
//! second; `REP MOVSB` gives bytes instead. The guest is the one that the tests use.

use std::time::Duration;

use cpu::Outcome;
use cpu::state::{cr4, reg};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use harness::{CODE, DATA, Guest};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

#[allow(clippy::unwrap_used, reason = "it is the tests' own")]
#[path = "../tests/harness/mod.rs"]
mod harness;

/// Rounds of the loops.
const ROUNDS: u64 = 10_000;
/// Memory beyond what the first 2 MiB need, in large pages.
const SWEEP: u64 = 8 << 20;
/// 4 KiB pages from there to the end of RAM: twice what the TLB has entries for.
const SWEEP_PAGES: u64 = 2048;

type Program = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// A guest with the program in place and the vector units on.
fn guest(program: Program) -> Guest {
    let mut guest = Guest::long();
    let state = &mut guest.vcpu.state;
    state.cr4 |= cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
    state.xcr0 = 7;
    guest.vcpu.refresh();
    guest.code(program);
    guest
}

/// Runs the program from its start to its HLT.
fn once(guest: &mut Guest) {
    guest.resume_at(CODE);
    guest.vcpu.set_reg(reg::RCX, ROUNDS);
    guest.vcpu.set_reg(reg::RSI, DATA);
    guest.vcpu.set_reg(reg::RDI, DATA + 0x8000);
    assert_eq!(guest.run(), Outcome::Halted);
}

/// The instructions of one run; fails if the guest did anything but run the program to its end.
fn count(guest: &mut Guest) -> u64 {
    let before = guest.vcpu.stats.instructions;
    once(guest);
    assert_eq!(guest.trap(), None, "the program faulted");
    guest.vcpu.stats.instructions - before
}

/// The integer loop of `benches/peers.sh`, ten instructions a round.
fn integer(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut top = a.create_label();
    a.mov(eax, 1)?;
    a.mov(ebx, 3)?;
    a.set_label(&mut top)?;
    a.add(rax, rbx)?;
    a.xor(rbx, rax)?;
    a.lea(rdx, rax + rbx * 2)?;
    a.shr(rdx, 3)?;
    a.imul_2(rbx, rdx)?;
    a.and(rax, rdx)?;
    a.or(rax, 5)?;
    a.sub(rdx, rax)?;
    a.dec(rcx)?;
    a.jnz(top)
}

/// Loads, stores and read-modify-writes that hit the TLB.
fn memory(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut top = a.create_label();
    a.set_label(&mut top)?;
    a.mov(rax, qword_ptr(rsi))?;
    a.add(rax, qword_ptr(rsi + 8))?;
    a.mov(qword_ptr(rdi), rax)?;
    a.add(dword_ptr(rdi + 16), 1)?;
    a.movzx(edx, byte_ptr(rsi + 3))?;
    a.push(rdx)?;
    a.pop(rdx)?;
    a.dec(rcx)?;
    a.jnz(top)
}

/// A call to an empty function: a block for each part.
fn call(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let (mut top, mut function, mut end) = (a.create_label(), a.create_label(), a.create_label());
    a.set_label(&mut top)?;
    a.call(function)?;
    a.dec(rcx)?;
    a.jnz(top)?;
    a.jmp(end)?;
    a.set_label(&mut function)?;
    a.ret()?;
    a.set_label(&mut end)?;
    a.nop()
}

/// Accesses that lie in two pages.
fn crossing(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut top = a.create_label();
    a.set_label(&mut top)?;
    a.mov(rax, qword_ptr(rsi + 0xffc))?;
    a.mov(qword_ptr(rdi + 0xffc), rax)?;
    a.dec(rcx)?;
    a.jnz(top)
}

/// Vector instructions of 128 bits, which the host CPU executes.
fn sse(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut top = a.create_label();
    a.set_label(&mut top)?;
    a.movups(xmm0, xmmword_ptr(rsi))?;
    a.paddd(xmm0, xmm1)?;
    a.pshufd(xmm2, xmm0, 0x1b)?;
    a.mulps(xmm3, xmm4)?;
    a.pxor(xmm1, xmm2)?;
    a.movups(xmmword_ptr(rdi), xmm1)?;
    a.dec(rcx)?;
    a.jnz(top)
}

/// The same with 256 bits.
fn avx(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut top = a.create_label();
    a.set_label(&mut top)?;
    a.vmovups(ymm0, ymmword_ptr(rsi))?;
    a.vpaddd(ymm0, ymm0, ymm1)?;
    a.vpshufd(ymm2, ymm0, 0x1b)?;
    a.vmulps(ymm3, ymm3, ymm4)?;
    a.vpxor(ymm1, ymm1, ymm2)?;
    a.vmovups(ymmword_ptr(rdi), ymm1)?;
    a.dec(rcx)?;
    a.jnz(top)
}

/// One load from each of twice as many pages as the TLB holds.
fn sweep(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut top = a.create_label();
    a.mov(esi, SWEEP as u32)?;
    a.mov(ecx, SWEEP_PAGES as u32)?;
    a.set_label(&mut top)?;
    a.mov(rax, qword_ptr(rsi))?;
    a.add(rsi, 0x1000)?;
    a.dec(rcx)?;
    a.jnz(top)
}

/// A copy of `ROUNDS` bytes.
fn rep_movsb(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.rep().movsb()
}

fn interpret(c: &mut Criterion) {
    let mut group = c.benchmark_group("interpret");
    let loops: [(&str, Program); 7] = [
        ("integer loop", integer),
        ("memory loop, TLB hits", memory),
        ("call and ret", call),
        ("page-crossing accesses", crossing),
        ("SSE loop", sse),
        ("AVX loop", avx),
        ("TLB-miss sweep", sweep),
    ];
    for (name, program) in loops {
        let mut guest = guest(program);
        group.throughput(Throughput::Elements(count(&mut guest)));
        if name.starts_with("TLB-miss") {
            let before = guest.vcpu.stats.tlb_misses;
            count(&mut guest);
            assert!(guest.vcpu.stats.tlb_misses - before >= SWEEP_PAGES, "the sweep hits the TLB");
        }
        group.bench_function(name, |b| b.iter(|| once(&mut guest)));
    }
    let mut guest = guest(rep_movsb);
    count(&mut guest);
    group.throughput(Throughput::Bytes(ROUNDS));
    group.bench_function("REP MOVSB", |b| b.iter(|| once(&mut guest)));
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = interpret
}
criterion_main!(benches);

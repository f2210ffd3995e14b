//! Round trips between user and supervisor mode, by the PVM ABI and as x86 makes them, in one run.
//!
//! Each group is one trip, `pvm/syscall`, `pvm/hypercall` or `pvm/fault`, and its functions are the ways to make it. The
//! handlers do nothing but return. How many guest instructions a trip takes is printed first; criterion's `elem/s`
//! are trips per second.
//!
//! A fair comparison of system calls is `kpti` with `pvm`: both end on the supervisor's stack, with its GS base and its
//! page tables. `sysret` leaves all three to the user's.

use std::time::Duration;

use cpu::Outcome;
use cpu::state::{cr4, reg};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use harness::{CODE, DATA, ENTRY, Guest, LSTAR, PVCS, RETU, STACK, TABLES, sel};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use pvm::abi::{GENERATION_1, hypercall};

#[allow(clippy::unwrap_used, reason = "it is the tests' own")]
#[path = "../tests/harness/mod.rs"]
mod harness;

/// Round trips of a run, counted in RBX.
const ROUNDS: u64 = 2_000;
/// KVM_HC_VAPIC_POLL_IRQ, which does nothing.
const KVM_NOTHING: u32 = 1;

type Program = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// A loop around `body`, and a HLT, which in user mode is a #GP.
fn rounds(a: &mut CodeAssembler, body: Program) -> Result<(), IcedError> {
    let mut top = a.create_label();
    a.set_label(&mut top)?;
    body(a)?;
    a.dec(rbx)?;
    a.jnz(top)
}

/// One way to make a trip.
struct Way {
    guest: Guest,
    /// Goes to the start of the loop.
    start: fn(&mut Guest),
}

impl Way {
    fn once(&mut self) {
        (self.start)(&mut self.guest);
        self.guest.vcpu.set_reg(reg::RBX, ROUNDS);
        assert_eq!(self.guest.run(), Outcome::Halted);
        assert_eq!(self.guest.vcpu.reg(reg::RBX), 0, "the loop did not end");
    }
}

/// PVM: `user` runs as a user, SYSCALL comes back at once, and other events run `handler`.
fn pvm_user(user: Program, handler: Program) -> Way {
    let mut guest = Guest::pvm();
    // The entry for system calls is the SYSCALL that returns.
    guest.vcpu.write_msr(0xc000_0082, RETU).expect("LSTAR");
    guest.code(|a| rounds(a, user));
    guest.code_at(ENTRY, 64, handler);
    Way { guest, start: |g| g.pvm_user(CODE, STACK, 0x202) }
}

/// x86: `user` runs as a user, `syscall` is the handler of SYSCALL, `handler` of everything else.
fn x86_user(user: Program, syscall: Program, handler: Program) -> Way {
    let mut guest = Guest::long();
    guest.vcpu.state.cr4 |= cr4::PCIDE;
    let msrs = &mut guest.vcpu.state.msrs;
    msrs.star = u64::from(sel::USER_CODE32) << 48 | u64::from(sel::CODE64) << 32;
    msrs.lstar = LSTAR;
    msrs.kernel_gs_base = DATA;
    guest.poke::<u64>(DATA, harness::STACK0);
    guest.code(|a| rounds(a, user));
    guest.code_at(LSTAR, 64, syscall);
    for vector in [3, 6, 14, 0x80] {
        guest.set_gate(vector, sel::CODE64, ENTRY, 0xee);
    }
    guest.code_at(ENTRY, 64, handler);
    Way {
        guest,
        start: |g| {
            g.user(sel::USER_CODE64);
            g.resume_at(CODE);
            g.vcpu.set_reg(reg::RSP, STACK);
        },
    }
}

fn supervisor(mut guest: Guest, program: Program) -> Way {
    guest.code(|a| rounds(a, program));
    Way { guest, start: |g| g.resume_at(CODE) }
}

fn sysret(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.sysretq()
}

/// What a kernel with page-table isolation does around its system calls: GS, page tables, stack, and back.
fn kpti(a: &mut CodeAssembler) -> Result<(), IcedError> {
    const KEEP: u64 = 1 << 63;
    a.swapgs()?;
    a.mov(qword_ptr(8).gs(), rsp)?;
    a.mov(rsp, TABLES | KEEP)?;
    a.mov(cr3, rsp)?;
    a.mov(rsp, qword_ptr(0).gs())?;
    a.mov(rsp, TABLES | 1 | KEEP)?;
    a.mov(cr3, rsp)?;
    a.mov(rsp, qword_ptr(8).gs())?;
    a.swapgs()?;
    a.sysretq()
}

fn iretq(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.iretq()
}

/// Handlers stop at the #GP of the HLT behind the loop.
fn stop_at_end(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut more = a.create_label();
    a.test(rbx, rbx)?;
    a.jnz(more)?;
    a.hlt()?;
    a.set_label(&mut more)?;
    a.zero_bytes()
}

/// Skips a UD2 and returns.
fn skip_x86(a: &mut CodeAssembler) -> Result<(), IcedError> {
    stop_at_end(a)?;
    a.add(qword_ptr(rsp), 2)?;
    a.iretq()
}

/// Skips a UD2 and returns.
fn skip_pvm(a: &mut CodeAssembler) -> Result<(), IcedError> {
    skip_pvm_by(a, 2)
}

fn skip_pvm_by(a: &mut CodeAssembler, bytes: i32) -> Result<(), IcedError> {
    stop_at_end(a)?;
    a.add(qword_ptr(PVCS + u64::from(GENERATION_1.pvcs.rip.offset)), bytes)?;
    a.jmp(RETU)
}

/// A load of three bytes from nowhere.
fn unmapped(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(r8d, 0x4000_0000)?;
    a.mov(eax, dword_ptr(r8))
}

fn syscalls(c: &mut Criterion) {
    let user: Program = |a| a.syscall();
    run(
        c,
        "pvm/syscall",
        [
            ("pvm", pvm_user(user, skip_pvm)),
            ("kpti", x86_user(user, kpti, iretq)),
            ("sysret", x86_user(user, sysret, iretq)),
            ("idt", x86_user(|a| a.int(0x80), sysret, iretq)),
        ],
    );
}

fn hypercalls(c: &mut Criterion) {
    run(
        c,
        "pvm/hypercall",
        [
            (
                "pvm",
                supervisor(Guest::pvm(), |a| {
                    a.mov(eax, hypercall::IRQ_WIN as u32)?;
                    a.syscall()
                }),
            ),
            (
                "kvm-by-syscall",
                supervisor(Guest::pvm(), |a| {
                    a.mov(eax, KVM_NOTHING)?;
                    a.syscall()
                }),
            ),
            (
                "kvm-by-vmcall",
                supervisor(Guest::long(), |a| {
                    a.mov(eax, KVM_NOTHING)?;
                    a.vmcall()
                }),
            ),
        ],
    );
}

fn faults(c: &mut Criterion) {
    let invalid: Program = |a| a.ud2();
    run(c, "pvm/fault", [("pvm", pvm_user(invalid, skip_pvm)), ("idt", x86_user(invalid, sysret, skip_x86))]);
    run(
        c,
        "pvm/page-fault",
        [
            ("pvm", pvm_user(unmapped, |a| skip_pvm_by(a, 3))),
            (
                "idt",
                x86_user(unmapped, sysret, |a| {
                    stop_at_end(a)?;
                    a.add(rsp, 8)?;
                    a.add(qword_ptr(rsp), 3)?;
                    a.iretq()
                }),
            ),
        ],
    );
}

fn run<const N: usize>(c: &mut Criterion, name: &str, ways: [(&str, Way); N]) {
    let mut group = c.benchmark_group(name);
    group.throughput(Throughput::Elements(ROUNDS));
    for (way_name, mut way) in ways {
        way.once();
        let before = way.guest.vcpu.stats.instructions;
        way.once();
        let instructions = way.guest.vcpu.stats.instructions - before;
        println!("{name}/{way_name}: {:.1} guest instructions a trip", instructions as f64 / ROUNDS as f64);
        way.guest.script.lock().expect("script").seen.clear();
        group.bench_function(way_name, |b| {
            b.iter(|| {
                way.once();
                way.guest.script.lock().expect("script").seen.clear();
            });
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(2));
    targets = syscalls, hypercalls, faults
}
criterion_main!(benches);

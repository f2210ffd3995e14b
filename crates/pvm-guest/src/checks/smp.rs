//! Two processors: each with its own PVCS and MSRs; interrupts and TLB flushes between them.

use core::sync::atomic::{AtomicU64, Ordering};

use super::prelude::*;
use crate::cpu::wait_until;
use crate::lapic::{self, command};
use crate::memory::PageFrame;
use crate::paging::rights;
use crate::smp;

pub(super) static GROUP: Group = group(
    "smp",
    &[
        check("second-processor-starts", starts),
        check("own-pvcs", own_pvcs),
        check("own-msrs", own_msrs),
        check("user-mode", user_mode),
        check("both-in-user-mode", both_in_user_mode),
        check("ipi-there", ipi_there),
        check("ipi-back", ipi_back),
        check("ipi-into-user-mode", ipi_into_user_mode),
        check("ipi-wakes", ipi_wakes),
        check("nmi-there", nmi_there),
        check("kvm-send-ipi", kvm_send_ipi),
        check("tlb-shootdown", tlb_shootdown),
    ],
);

const IPI: u32 = 0x51;

fn second(m: &Machine) -> Result<u32, Stop> {
    m.second.ok_or(Stop::Skip("one processor"))
}

/// Runs a job on the second processor.
fn there(m: &Machine, job: smp::Job, argument: u64) -> Result<u64, Stop> {
    second(m)?;
    smp::post(job, argument);
    smp::wait().ok_or(Stop::Wrong { what: "the second processor does not answer", got: 0, want: None })
}

fn starts(m: &Machine) -> Verdict {
    let id = second(m)?;
    equal("its APIC's identifier", there(m, |_, _| lapic::id().into(), 0)?, id)
}

fn own_pvcs(m: &Machine) -> Verdict {
    let address = there(m, |_, _| rdmsr(msr(PvmMsr::VcpuStruct)), 0)?;
    equal("VCPU_STRUCT", address, Cpu::by_number(1).pvcs_address().0)?;
    m.cpu.change_pvcs(|p| p.cr2 = 1);
    let cr2 = there(
        m,
        |cpu, at| {
            let _ = cpu.run(s::s_load, &mut Registers { rdi: at, ..Registers::default() });
            cpu.pvcs().cr2
        },
        m.space.nowhere() + 0x789,
    )?;
    equal("cr2 of the second", cr2, m.space.nowhere() + 0x789)?;
    equal("cr2 of the first", m.cpu.pvcs().cr2, 1u64)
}

fn own_msrs(m: &Machine) -> Verdict {
    there(m, |_, value| wrmsr(msr(PvmMsr::SupervisorRedzone), value), 0x400)?;
    let own = rdmsr(msr(PvmMsr::SupervisorRedzone));
    let other = there(m, |_, _| rdmsr(msr(PvmMsr::SupervisorRedzone)), 0)?;
    there(m, |_, value| wrmsr(msr(PvmMsr::SupervisorRedzone), value), crate::cpu::REDZONE)?;
    equal("the first one's", own, crate::cpu::REDZONE)?;
    equal("the second one's", other, 0x400u64)
}

fn call_in_user_mode(cpu: &Cpu, argument: u64) -> u64 {
    let mut program = User::at(u::u_sum);
    program.registers.rdi = argument;
    let exit = cpu.enter(&program);
    if exit.syscall { exit.registers.rax } else { u64::MAX }
}

fn user_mode(m: &Machine) -> Verdict {
    equal("100 / 2 + 1", there(m, call_in_user_mode, 100)?, 51u64)
}

fn both_in_user_mode(m: &Machine) -> Verdict {
    second(m)?;
    smp::post(|cpu, n| (0..n).filter(|i| call_in_user_mode(cpu, i * 2) == i + 1).count() as u64, 200);
    let here = (0..200u64).filter(|i| call_in_user_mode(m.cpu, i * 2) == i + 1).count() as u64;
    let there = smp::wait();
    equal("right answers here", here, 200u64)?;
    equal("right answers there", there.unwrap_or(0), 200u64)
}

/// Opens interrupts until one has come; what it was.
fn wait_for_interrupt(cpu: &Cpu, _: u64) -> u64 {
    cpu.set_interrupt_flag(true);
    insn::hypercall(hc::IRQ_WIN, [0; 4]);
    cpu.wait_for_events(1);
    cpu.set_interrupt_flag(false);
    cpu.events().vectors()
}

fn forget(cpu: &Cpu, _: u64) -> u64 {
    cpu.clear_events();
    0
}

/// Exactly one event, of this vector, as `Events::vectors` has it.
fn only(vector: u32) -> u64 {
    0xff_ffff_ff00 | u64::from(vector)
}

fn ipi_there(m: &Machine) -> Verdict {
    let id = second(m)?;
    there(m, forget, 0)?;
    smp::post(wait_for_interrupt, 0);
    lapic::send(id, command::FIXED | IPI);
    equal("the vectors there", smp::wait().unwrap_or(0), only(IPI))
}

fn ipi_back(m: &Machine) -> Verdict {
    second(m)?;
    m.cpu.clear_events();
    smp::post(
        |_, to| {
            lapic::send(to as u32, command::FIXED | IPI);
            0
        },
        lapic::id().into(),
    );
    let here = wait_for_interrupt(m.cpu, 0);
    smp::wait();
    equal("the vectors here", here, only(IPI))
}

/// If it comes before the program runs, it waits for it: interrupts are closed in supervisor mode.
fn ipi_into_user_mode(m: &Machine) -> Verdict {
    let id = second(m)?;
    smp::post(
        |cpu, _| {
            let exit = cpu.enter(&User::at(u::u_spin));
            lapic::end_of_interrupt();
            exit.vector().into()
        },
        0,
    );
    lapic::send(id, command::FIXED | IPI);
    equal("the vector", smp::wait().unwrap_or(0), IPI)
}

/// The second sleeps by IRQ_HALT.
fn ipi_wakes(m: &Machine) -> Verdict {
    let id = second(m)?;
    there(m, forget, 0)?;
    smp::post(
        |cpu, _| {
            insn::hypercall(hc::IRQ_HALT, [0; 4]);
            cpu.set_interrupt_flag(false);
            cpu.events().vectors()
        },
        0,
    );
    lapic::send(id, command::FIXED | IPI);
    equal("the vectors there", smp::wait().unwrap_or(0), only(IPI))
}

fn nmi_there(m: &Machine) -> Verdict {
    let id = second(m)?;
    there(m, forget, 0)?;
    smp::post(
        |cpu, _| {
            cpu.wait_for_events(1);
            cpu.events().vectors()
        },
        0,
    );
    lapic::send(id, command::NMI);
    equal("the vectors there", smp::wait().unwrap_or(0), only(vector::NMI))
}

/// KVM_HC_SEND_IPI: a bitmap of two words from a lowest identifier on.
fn kvm_send_ipi(m: &Machine) -> Verdict {
    const SEND_IPI: u64 = 10;
    const FEATURE: u32 = 1 << 11;
    let id = second(m)?;
    if insn::synthetic_cpuid(0x4000_0001, 0).eax & FEATURE == 0 {
        return Err(Stop::Skip("no KVM_FEATURE_PV_SEND_IPI"));
    }
    there(m, forget, 0)?;
    smp::post(wait_for_interrupt, 0);
    let answer = insn::hypercall(SEND_IPI, [1, 0, id.into(), IPI.into()]);
    let vectors = smp::wait().unwrap_or(0);
    equal("the answer", answer, 1u64)?;
    equal("the vectors there", vectors, only(IPI))
}

static STAGE: AtomicU64 = AtomicU64::new(0);
static PLACE: AtomicU64 = AtomicU64::new(0);

/// The second processor reads a page; the first maps another there, and asks the second by an interrupt to drop its
/// translation, with interrupts only open after the change.
fn tlb_shootdown(m: &Machine) -> Verdict {
    fn hook(_: &Cpu, trap: &mut Trap) -> bool {
        if trap.frame.vector == IPI {
            insn::hypercall(hc::TLB_INVLPG, [PLACE.load(Ordering::Relaxed), 0, 0, 0]);
            STAGE.store(2, Ordering::Release);
        }
        false
    }
    fn load(cpu: &Cpu, at: u64) -> u64 {
        let mut r = Registers { rdi: at, ..Registers::default() };
        let _ = cpu.run(s::s_load, &mut r);
        r.rax
    }
    fn job(cpu: &Cpu, at: u64) -> u64 {
        let before = load(cpu, at);
        cpu.set_hook(Some(hook));
        cpu.set_interrupt_flag(true);
        insn::hypercall(hc::IRQ_WIN, [0; 4]);
        STAGE.store(1, Ordering::Release);
        let told = wait_until(|| STAGE.load(Ordering::Acquire) == 2);
        cpu.set_interrupt_flag(false);
        cpu.set_hook(None);
        before << 16 | load(cpu, at) << 8 | u64::from(told)
    }
    let id = second(m)?;
    let (old, new) = (PageFrame::new(), PageFrame::new());
    old.set_word(0, 0x11);
    new.set_word(0, 0x22);
    let at = m.space.test() + 0x40_0000;
    m.space.map_kernel(at, old, rights::DATA);
    STAGE.store(0, Ordering::Relaxed);
    PLACE.store(at, Ordering::Relaxed);
    smp::post(job, at);
    let ready = wait_until(|| STAGE.load(Ordering::Acquire) == 1);
    m.space.kernel.map(at, new.address(), rights::DATA);
    lapic::send(id, command::FIXED | IPI);
    let seen = smp::wait().unwrap_or(0);
    holds("the second processor is ready", ready, 0)?;
    equal("what it read before, afterwards, and that it was told", seen, 0x11_2201u64)
}

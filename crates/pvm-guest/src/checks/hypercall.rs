//! The hypercalls (specification, "Hypercall event in supervisor mode"). IRQ_WIN and IRQ_HALT are in `irq`, RDMSR and WRMSR
//! in `msr`, what the TLB's do in `paging`.

use super::prelude::*;
use crate::abi::control;
use crate::memory::PageFrame;
use crate::paging::Tree;

pub(super) static GROUP: Group = group(
    "hypercall",
    &[
        check("registers", registers),
        check("load-pgtbl", load_pgtbl),
        check("load-pgtbl-user-root", load_pgtbl_user_root),
        check("load-pgtbl-5-level", load_pgtbl_5_level),
        check("irq-win-idle", irq_win_idle),
        check("rdmsr", rdmsr_any),
        check("wrmsr", wrmsr_any),
        check("load-gs", load_gs),
        check("load-gs-bad", load_gs_bad),
        check("load-tls", load_tls),
        check("load-tls-64-bit", load_tls_64_bit),
        check("load-tls-sanitised", load_tls_sanitised),
        check("kvm-vapic-poll-irq", kvm_vapic_poll_irq),
        check("kvm-unknown", kvm_unknown),
        check("kvm-from-user", kvm_from_user),
    ],
);

/// RAX is the answer; RCX and R11 are the instruction's; all others stay, R10 (which stands for RCX) too.
fn registers(m: &Machine) -> Verdict {
    let mut r = Registers { rax: hc::RDMSR, rbx: 0x10, ..marked() };
    let before = r;
    no_fault(m.cpu.run(s::s_hypercall, &mut r))?;
    for (got, want) in [
        (r.rbx, before.rbx),
        (r.rdx, before.rdx),
        (r.rsi, before.rsi),
        (r.rdi, before.rdi),
        (r.rbp, before.rbp),
        (r.r8, before.r8),
        (r.r9, before.r9),
        (r.r10, before.r10),
        (r.r12, before.r12),
        (r.r15, before.r15),
    ] {
        equal("a register that a hypercall leaves alone", got, want)?;
    }
    equal("events", m.cpu.events().count() as u64, 0u64)
}

fn load_pgtbl(m: &Machine) -> Verdict {
    let other = copy_of(m.space.kernel);
    for flags in [0, hc::LOAD_PGTBL_FLUSH] {
        let answer = insn::hypercall(hc::LOAD_PGTBL, [flags, other.root(), m.space.user.root(), 0]);
        let cr3 = insn::cr3();
        insn::hypercall(hc::LOAD_PGTBL, [flags, m.space.kernel.root(), m.space.user.root(), 0]);
        equal("the answer", answer, 0u64)?;
        equal("CR3", cr3, other.root())?;
        equal("CR3 afterwards", insn::cr3(), m.space.kernel.root())?;
    }
    Ok(())
}

/// Another root with the same tables below.
fn copy_of(tree: Tree) -> Tree {
    let copy = Tree::new();
    for n in 0..512 {
        copy.root_frame().set_word(n, tree.root_frame().word(n));
    }
    copy
}

fn load_pgtbl_user_root(m: &Machine) -> Verdict {
    let other = copy_of(m.space.user);
    insn::hypercall(hc::LOAD_PGTBL, [0, m.space.kernel.root(), other.root(), 0]);
    equal("SWITCH_CR3", rdmsr(msr(PvmMsr::SwitchCr3)), other.root())?;
    let exit = m.cpu.enter(&User::at(u::u_syscall));
    ended_by(&exit, Exit::SYSCALL)?;
    equal("SWITCH_CR3 after user mode", rdmsr(msr(PvmMsr::SwitchCr3)), other.root())
}

/// Five levels and back, without leaving 64-bit mode; and an address that only five levels have.
fn load_pgtbl_5_level(m: &Machine) -> Verdict {
    let range = rdmsr(msr(PvmMsr::LinearAddressRange));
    let slot = range >> 32 & 0x1ff;
    if insn::synthetic_cpuid(7, 0).ecx >> 16 & 1 == 0 {
        return Err(Stop::Skip("no LA57"));
    }
    let (kernel, user) = (Tree::five_level(m.space.kernel), Tree::five_level(m.space.user));
    let frame = PageFrame::new();
    frame.set_word(5, 57);
    let at = 0x7f << 57 | slot << 48;
    if slot != 0x1ff {
        kernel.map(at, frame.address(), crate::paging::rights::DATA);
    }
    let flags = hc::LOAD_PGTBL_FLUSH | hc::LOAD_PGTBL_LA57;
    let answer = insn::hypercall(hc::LOAD_PGTBL, [flags, kernel.root(), user.root(), 0]);
    let cr4 = insn::cr4();
    let mut r = Registers { rdi: at + 40, ..Registers::default() };
    let read = m.cpu.run(s::s_load, &mut r);
    let exit = m.cpu.enter(&User::at(u::u_syscall));
    let flags = hc::LOAD_PGTBL_FLUSH;
    insn::hypercall(hc::LOAD_PGTBL, [flags, m.space.kernel.root(), m.space.user.root(), 0]);
    equal("the answer", answer, 0u64)?;
    equal("CR4.LA57", cr4 & control::CR4_LA57, control::CR4_LA57)?;
    equal("CR4.LA57 afterwards", insn::cr4() & control::CR4_LA57, 0u64)?;
    ended_by(&exit, Exit::SYSCALL)?;
    if slot == 0x1ff {
        return Ok(());
    }
    no_fault(read)?;
    equal("the word at a 57-bit address", r.rax, 57u64)
}

/// Nothing waits: nothing happens.
fn irq_win_idle(m: &Machine) -> Verdict {
    m.cpu.clear_events();
    insn::hypercall(hc::IRQ_WIN, [0; 4]);
    equal("PVCS.event_flags", m.cpu.event_flags(), 0u64)?;
    equal("events", m.cpu.events().count() as u64, 0u64)
}

fn rdmsr_any(m: &Machine) -> Verdict {
    equal("VCPU_STRUCT", rdmsr(msr(PvmMsr::VcpuStruct)), m.cpu.pvcs_address().0)?;
    equal("LSTAR", rdmsr(x86_msr::LSTAR), address(crate::entry::syscall_entry))
}

fn wrmsr_any(_: &Machine) -> Verdict {
    equal("a good value's answer", wrmsr(x86_msr::LSTAR, address(crate::entry::syscall_entry)), 0u64)?;
    equal("a bad value's answer", wrmsr(x86_msr::LSTAR, 1 << 63), hc::EINVAL)
}

/// LOAD_GS of `selector`: the answer, and the selector and base in force afterwards.
fn gs(m: &Machine, selector: u64) -> Result<(u64, u64, u64), Stop> {
    let base = m.cpu.gs_base();
    let mut r = Registers { rax: hc::LOAD_GS, rbx: selector, r12: base, ..Registers::default() };
    no_fault(m.cpu.run(s::s_load_gs, &mut r))?;
    Ok((r.rax, r.r9, r.r8))
}

/// The base of the descriptor is the answer, for PVCS::user_gsbase. The supervisor's own stays, as it is needed for the
/// next instruction.
fn load_gs(m: &Machine) -> Verdict {
    let (answer, selector, base) = gs(m, selector::USER_DS.into())?;
    equal("the answer", answer, 0u64)?;
    equal("GS", selector, selector::USER_DS)?;
    equal("the base in force", base, m.cpu.gs_base())?;
    let index = insn::hypercall(hc::LOAD_TLS, [descriptor(0x12_3000, DATA32), 0, 0, 0]);
    let tls = index << 3 | 3;
    let (answer, selector, base) = gs(m, tls)?;
    gs(m, 0)?;
    equal("the answer for a TLS segment", answer, 0x12_3000u64)?;
    equal("GS", selector, tls)?;
    equal("the base in force", base, m.cpu.gs_base())
}

fn load_gs_bad(m: &Machine) -> Verdict {
    for bad in [0x10, 0x18, selector::USER_CS as u64 & 4, 0xfffb, 0x27] {
        let (answer, selector, base) = gs(m, bad)?;
        equal("the answer", answer, 0u64)?;
        equal("GS but for its RPL", selector & !3, 0u64)?;
        equal("the base in force", base, m.cpu.gs_base())?;
    }
    Ok(())
}

/// Read and write data of DPL 3, 32-bit, limit in pages, present.
const DATA32: u64 = 0x00c0_f300_0000_0000;

/// A descriptor of 1 MiB (or what its granularity makes of that) at `base`.
fn descriptor(base: u64, kind: u64) -> u64 {
    kind | 0x0000_ffff | (base & 0xff_ffff) << 16 | (base >> 24) << 56
}

/// A thread's segment of 32-bit user mode.
fn load_tls(m: &Machine) -> Verdict {
    let base = user_space::DATA + 0x1000;
    let [first, second, _, _] = m.space.data;
    let _ = first;
    second.set_word(0, 0x2222_2222_1111_1111);
    let entries = [descriptor(base, DATA32), 0, descriptor(base + 4, DATA32), 0];
    let index = insn::hypercall(hc::LOAD_TLS, entries);
    let load = |code: Code, index: u64| {
        let mut program = User::compat(code);
        program.registers.rax = index << 3 | 3;
        m.cpu.enter(&program)
    };
    let exit = load(u::u32_load_fs, index);
    ended_by(&exit, 0x80)?;
    equal("the word at FS:4", exit.registers.rax, 0x2222_2222u64)?;
    let exit = load(u::u32_load_gs, index + 2);
    ended_by(&exit, 0x80)?;
    equal("the word at GS:0 of the third", exit.registers.rax, 0x2222_2222u64)?;
    // The empty one cannot be loaded.
    let exit = load(u::u32_load_gs, index + 1);
    one_of("the vector", exit.vector(), &[11, 13])?;
    equal("the selector in the error code", u64::from(exit.pvcs.event_errcode) >> 3, index + 1)
}

fn load_tls_64_bit(m: &Machine) -> Verdict {
    let base = user_space::DATA + 0x1000;
    m.space.data[1].set_word(0, 0x3333);
    let index = insn::hypercall(hc::LOAD_TLS, [descriptor(base, DATA32), 0, 0, 0]);
    let mut program = User::at(u::u_load_fs);
    program.registers.rax = index << 3 | 3;
    let exit = m.cpu.enter(&program);
    ended_by(&exit, Exit::SYSCALL)?;
    equal("the word at FS:0", exit.registers.rax, 0x3333u64)
}

/// Neither a gate nor code nor privilege comes of it.
fn load_tls_sanitised(m: &Machine) -> Verdict {
    let call_gate = 0x0000_ec00_0033_0000;
    let code_ring_0 = 0x00af_9b00_0000_ffff;
    let data_ring_0 = 0x00cf_9300_0000_ffff;
    let index = insn::hypercall(hc::LOAD_TLS, [call_gate, code_ring_0, data_ring_0, 0]);
    for n in 0..3 {
        let mut r = Registers { rax: (index + n) << 3 | 3, ..Registers::default() };
        no_fault(m.cpu.run(s::s_lar, &mut r))?;
        if r.rdx == 1 {
            let (kind, system, dpl) = (r.rcx >> 8 & 0xf, r.rcx >> 12 & 1, r.rcx >> 13 & 3);
            equal("a system descriptor's S bit", system, 1u64)?;
            equal("the DPL", dpl, 3u64)?;
            holds("the type is code", kind & 8 == 0, r.rcx)?;
        }
    }
    insn::hypercall(hc::LOAD_TLS, [0; 4]);
    Ok(())
}

fn kvm_vapic_poll_irq(_: &Machine) -> Verdict {
    equal("the answer", insn::hypercall(1, [0; 4]), 0u64)
}

fn kvm_unknown(_: &Machine) -> Verdict {
    for number in [0x1234_5678, hc::LOAD_PGTBL - 1, hc::LOAD_PGTBL + hc::COUNT as u64] {
        equal("the answer", insn::hypercall(number, [0; 4]), hc::KVM_ENOSYS)?;
    }
    Ok(())
}

/// In user mode the same instruction is a system call, whatever RAX says.
fn kvm_from_user(m: &Machine) -> Verdict {
    let mut program = User::at(u::u_syscall);
    program.registers.rax = hc::TLB_FLUSH;
    let exit = m.cpu.enter(&program);
    ended_by(&exit, Exit::SYSCALL)?;
    equal("RAX", exit.registers.rax, hc::TLB_FLUSH)
}

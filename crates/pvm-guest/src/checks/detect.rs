//! Detection, and what CPUID says (specification, "PVM booting sequence", "CPUID leaf").

use super::prelude::*;
use crate::abi::cpuid;
use crate::identify::KVM;
use crate::insn::synthetic_cpuid;

pub(super) static GROUP: Group = group(
    "detect",
    &[
        check("cpl-3-and-if", cpl_and_if),
        check("hypervisor-name", hypervisor_name),
        check("pvm-signature", pvm_signature),
        check("synthetic-cpuid-registers", synthetic_cpuid_registers),
        check("synthetic-cpuid-user", synthetic_cpuid_user),
        check("plain-cpuid", plain_cpuid),
        check("hidden-features", hidden_features),
        check("control-registers", control_registers),
    ],
);

fn cpl_and_if(_: &Machine) -> Verdict {
    equal("the underlying CPL", insn::cs() & 3, 3u64)?;
    equal("the underlying IF", insn::flags() & rflags::IF, rflags::IF)
}

fn hypervisor_name(_: &Machine) -> Verdict {
    let leaf = synthetic_cpuid(cpuid::SIGNATURE, 0);
    equal("EBX of leaf 0x40000000", leaf.ebx, KVM[0])?;
    equal("ECX of leaf 0x40000000", leaf.ecx, KVM[1])?;
    equal("EDX of leaf 0x40000000", leaf.edx, KVM[2])?;
    holds("the last hypervisor leaf is too low", leaf.eax >= cpuid::VENDOR_FEATURES, leaf.eax.into())
}

fn pvm_signature(_: &Machine) -> Verdict {
    let leaf = synthetic_cpuid(cpuid::VENDOR_FEATURES, 0);
    equal("EBX of leaf 0x40000002", leaf.ebx, cpuid::PVM)?;
    equal("ECX of leaf 0x40000002", leaf.ecx, 0u64)?;
    equal("EDX of leaf 0x40000002", leaf.edx, 0u64)
}

/// Both instructions are skipped, and nothing but the four registers changes.
fn synthetic_cpuid_registers(m: &Machine) -> Verdict {
    let mut r = marked();
    r.rax = cpuid::VENDOR_FEATURES.into();
    r.rcx = 0;
    let before = r;
    no_fault(m.cpu.run(s::s_synthetic_cpuid, &mut r))?;
    equal("RBX", r.rbx, cpuid::PVM)?;
    for (got, want) in [
        (r.rsi, before.rsi),
        (r.rdi, before.rdi),
        (r.rbp, before.rbp),
        (r.r8, before.r8),
        (r.r10, before.r10),
        (r.r11, before.r11),
        (r.r15, before.r15),
    ] {
        equal("a register that CPUID leaves alone", got, want)?;
    }
    Ok(())
}

/// In user mode INVLPG is as privileged as ever, whatever its operand; or the hypervisor answers.
fn synthetic_cpuid_user(m: &Machine) -> Verdict {
    let exit = m.cpu.enter(&User::at(u::u_synthetic_cpuid));
    one_of("the vector", exit.vector(), &[vector::GP.into(), Exit::SYSCALL.into()])
}

/// The host's or the guest's: it does not fault.
fn plain_cpuid(_: &Machine) -> Verdict {
    let highest = core::arch::x86_64::__cpuid(0).eax;
    holds("the last leaf is too low", highest >= 0xd, highest.into())
}

fn hidden_features(_: &Machine) -> Verdict {
    let features = synthetic_cpuid(7, 0);
    equal("SMEP", features.ebx >> 7 & 1, 0u64)?;
    equal("SMAP", features.ebx >> 20 & 1, 0u64)?;
    let more = if features.eax >= 1 { synthetic_cpuid(7, 1).eax } else { 0 };
    equal("LASS", more >> 6 & 1, 0u64)?;
    equal("XSAVES", synthetic_cpuid(0xd, 1).eax >> 3 & 1, 0u64)
}

/// As the specification has them in "States or registers on PVM modes".
fn control_registers(m: &Machine) -> Verdict {
    use pvm::abi::control::{CR0_ONE, CR0_ZERO, CR4_ONE, CR4_ZERO};
    let mut r = Registers::default();
    no_fault(m.cpu.run(s::s_get_cr0, &mut r))?;
    // AM is the one of these bits that is without consequence in supervisor mode.
    let am = 1 << 18;
    equal("CR0's ones", (r.rax | am) & CR0_ONE, CR0_ONE)?;
    equal("CR0's zeros", r.rax & CR0_ZERO, 0u64)?;
    no_fault(m.cpu.run(s::s_get_cr4, &mut r))?;
    equal("CR4's ones", r.rax & CR4_ONE, CR4_ONE)?;
    equal("CR4's zeros", r.rax & CR4_ZERO, 0u64)?;
    let efer = insn::read_msr(0xc000_0080);
    equal("EFER's ones", efer & pvm::abi::control::EFER_ONE, pvm::abi::control::EFER_ONE)
}

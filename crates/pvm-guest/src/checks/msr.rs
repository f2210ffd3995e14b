//! The MSRs and their rules, each by hypercall and by the instruction (specification, "X86 MSR", "PVM MSRs").

use super::prelude::*;

pub(super) static GROUP: Group = group(
    "msr",
    &[
        check("range-is-well-formed", range_is_well_formed),
        check("range-refuses-malformed", range_refuses_malformed),
        check("range-narrows", range_narrows),
        check("vcpu-struct", vcpu_struct),
        check("vcpu-struct-moves", vcpu_struct_moves),
        check("vcpu-struct-none", vcpu_struct_none),
        check("supervisor-rsp", supervisor_rsp),
        check("supervisor-redzone", supervisor_redzone),
        check("event-entry", event_entry),
        check("retu-rip", retu_rip),
        check("rets-rip", rets_rip),
        check("switch-cr3", switch_cr3),
        check("lstar", lstar),
        check("star", star),
        check("gs-base", gs_base),
        check("kernel-gs-base", kernel_gs_base),
        check("without-effect", without_effect),
        check("pkrs", pkrs),
        check("tsc", tsc),
        check("unknown", unknown),
    ],
);

/// A value that is refused: -EINVAL by hypercall, #GP(0) by WRMSR, and nothing changed.
fn refused(cpu: &Cpu, index: u32, value: u64) -> Verdict {
    let before = rdmsr(index);
    equal("the hypercall's answer", wrmsr(index, value), hc::EINVAL)?;
    fault(plain_wrmsr(cpu, index, value), vector::GP, 0)?;
    equal("the MSR after a refused write", rdmsr(index), before)
}

/// A value that is taken, both ways, and reads back both ways; `old` is there again afterwards.
fn taken(cpu: &Cpu, index: u32, value: u64) -> Verdict {
    let old = rdmsr(index);
    let by_hypercall = wrmsr(index, value);
    let read = plain_rdmsr(cpu, index)?;
    wrmsr(index, old);
    equal("the hypercall's answer", by_hypercall, 0u64)?;
    equal("the value by RDMSR", read, value)?;
    let by_instruction = plain_wrmsr(cpu, index, value);
    let read = rdmsr(index);
    wrmsr(index, old);
    no_fault(by_instruction)?;
    equal("the value by hypercall", read, value)
}

// ---- MSR_PVM_LINEAR_ADDRESS_RANGE ----

const ONES: u64 = 0xff00_ff00_ff00_ff00;

/// Its fields: start and end in the PML4, start and end in the PML5.
fn fields(value: u64) -> [u64; 4] {
    [0, 16, 32, 48].map(|shift| value >> shift & 0x1ff)
}

fn of_fields([start4, end4, start5, end5]: [u64; 4]) -> u64 {
    ONES | start4 | end4 << 16 | start5 << 32 | end5 << 48
}

fn has_la57() -> bool {
    insn::synthetic_cpuid(7, 0).ecx >> 16 & 1 == 1
}

fn range_is_well_formed(m: &Machine) -> Verdict {
    let value = rdmsr(msr(PvmMsr::LinearAddressRange));
    equal("RDMSR", plain_rdmsr(m.cpu, msr(PvmMsr::LinearAddressRange))?, value)?;
    equal("the bits that are one", value & ONES, ONES)?;
    let [start4, end4, start5, end5] = fields(value);
    holds("256 <= PML4 start < end < 511", 256 <= start4 && start4 < end4 && end4 < 511, value)?;
    let none = start5 == 0x1ff && end5 == 0x1ff;
    holds("the PML5 range", none || 256 <= start5 && start5 < end5 && end5 < 511, value)
}

fn range_refuses_malformed(m: &Machine) -> Verdict {
    let index = msr(PvmMsr::LinearAddressRange);
    let value = rdmsr(index);
    let [start4, end4, start5, end5] = fields(value);
    for bad in [
        0,
        value & !(1 << 9),
        value & !(1 << 63),
        of_fields([end4, start4, start5, end5]),
        of_fields([start4, start4, start5, end5]),
        of_fields([start4 - 1, end4, start5, end5]),
        of_fields([start4, end4 + 1, start5, end5]),
        of_fields([start4, 511, start5, end5]),
        value & !(1 << 8),
        value & !(1 << 24),
    ] {
        refused(m.cpu, index, bad)?;
    }
    if start5 == 0x1ff {
        refused(m.cpu, index, of_fields([start4, end4, 0x100, 0x101]))?;
    } else {
        refused(m.cpu, index, of_fields([start4, end4, start5, end5 + 1]))?;
    }
    holds("a PML5 range needs LA57", start5 == 0x1ff || has_la57(), value)
}

/// To what it is; and to less, if the range has more than the slot that the kernel is in. Whether it may
/// become wider again, up to what it was at reset, the specification leaves open.
fn range_narrows(m: &Machine) -> Verdict {
    let index = msr(PvmMsr::LinearAddressRange);
    let value = rdmsr(index);
    taken(m.cpu, index, value)?;
    let [start4, end4, start5, end5] = fields(value);
    if end4 - start4 < 2 {
        return Err(Stop::Skip("the range is one slot"));
    }
    let less = of_fields([start4, end4 - 1, start5, end5]);
    equal("the answer to less", wrmsr(index, less), 0u64)?;
    equal("less", rdmsr(index), less)?;
    let answer = wrmsr(index, value);
    one_of("the answer to what it was at reset", answer, &[0, hc::EINVAL])?;
    equal("the range then", rdmsr(index), if answer == 0 { value } else { less })
}

// ---- the others ----

fn vcpu_struct(m: &Machine) -> Verdict {
    let index = msr(PvmMsr::VcpuStruct);
    let own = m.cpu.pvcs_address().0;
    equal("the MSR", rdmsr(index), own)?;
    for bad in [own + 8, own + 0x800, 1] {
        refused(m.cpu, index, bad)?;
    }
    taken(m.cpu, index, own)
}

/// The structure in force is the one that the MSR names, at once.
fn vcpu_struct_moves(m: &Machine) -> Verdict {
    let index = msr(PvmMsr::VcpuStruct);
    let cr2_before = m.cpu.pvcs().cr2;
    wrmsr(index, m.cpu.spare_pvcs_address().0);
    let target = m.space.nowhere() + 0x123;
    let event = m.cpu.run(s::s_load, &mut Registers { rdi: target, ..Registers::default() });
    wrmsr(index, m.cpu.pvcs_address().0);
    fault(event, vector::PF, 0)?;
    equal("cr2 in the new structure", m.cpu.spare_pvcs().cr2, target)?;
    equal("cr2 in the old structure", m.cpu.pvcs().cr2, cr2_before)
}

/// Without a structure interrupts are closed, whatever the page says that was one.
fn vcpu_struct_none(m: &Machine) -> Verdict {
    let index = msr(PvmMsr::VcpuStruct);
    m.cpu.set_interrupt_flag(true);
    equal("the answer to 0", wrmsr(index, 0), 0u64)?;
    let read = rdmsr(index);
    crate::lapic::timer_once(0x40, 1000);
    // Enough exits for an interrupt to be delivered, if it would be.
    for _ in 0..2000 {
        insn::hypercall(1, [0; 4]);
    }
    let count = m.cpu.events().count();
    m.cpu.set_interrupt_flag(false);
    wrmsr(index, m.cpu.pvcs_address().0);
    // It waits still, and is taken now, for the next check to be alone.
    super::irq::drain(m.cpu);
    equal("the MSR", read, 0u64)?;
    equal("interrupts delivered", count as u64, 0u64)
}

/// Its effect is the entry from user mode's.
fn supervisor_rsp(m: &Machine) -> Verdict {
    taken(m.cpu, msr(PvmMsr::SupervisorRsp), m.space.test())
}

/// Its effect is the frame's place.
fn supervisor_redzone(m: &Machine) -> Verdict {
    taken(m.cpu, msr(PvmMsr::SupervisorRedzone), 256)
}

/// What comes of an entry that is not canonical, the specification leaves open: a triple fault will do, so it is
/// not tried here but by `hostile=entry-non-canonical`.
fn event_entry(m: &Machine) -> Verdict {
    let index = msr(PvmMsr::EventEntry);
    equal("the MSR", rdmsr(index), address(crate::entry::event_entry))?;
    taken(m.cpu, index, rdmsr(index))
}

fn retu_rip(m: &Machine) -> Verdict {
    taken(m.cpu, msr(PvmMsr::RetuRip), m.space.test())
}

/// Faults are returned from by ERETS here, so that WRMSR must not fault for this check to be.
fn rets_rip(m: &Machine) -> Verdict {
    taken(m.cpu, msr(PvmMsr::RetsRip), m.space.test())
}

fn switch_cr3(m: &Machine) -> Verdict {
    let index = msr(PvmMsr::SwitchCr3);
    equal("the MSR", rdmsr(index), m.space.user.root())?;
    taken(m.cpu, index, m.space.kernel.root())
}

fn lstar(m: &Machine) -> Verdict {
    refused(m.cpu, x86_msr::LSTAR, 0x8000_0000_0000_0000)?;
    taken(m.cpu, x86_msr::LSTAR, m.space.test())
}

/// STAR's selectors: those for user mode are the host's, those for supervisor mode the ones that are loaded.
fn star(m: &Machine) -> Verdict {
    let value = rdmsr(x86_msr::STAR);
    let (user, supervisor) = (value >> 48, value >> 32 & 0xffff);
    equal("the 32-bit user CS", user | 3, selector::USER32_CS)?;
    equal("the supervisor CS's RPL", supervisor & 3, 0u64)?;
    taken(m.cpu, x86_msr::STAR, value)?;
    // The RPL of the user's is not looked at.
    taken(m.cpu, x86_msr::STAR, value & !(3 << 48))?;
    for bad in [user + 8, user - 8, 0] {
        refused(m.cpu, x86_msr::STAR, bad << 48 | supervisor << 32)?;
    }
    for bad in [supervisor + 8, supervisor | 3, 0] {
        refused(m.cpu, x86_msr::STAR, user << 48 | bad << 32)?;
    }
    Ok(())
}

/// The MSR is the register.
fn gs_base(m: &Machine) -> Verdict {
    equal("the MSR", rdmsr(x86_msr::GS_BASE), insn::gs_base())?;
    equal("RDMSR", plain_rdmsr(m.cpu, x86_msr::GS_BASE)?, insn::gs_base())?;
    refused(m.cpu, x86_msr::GS_BASE, 0x8000_0000_0000_0000)
}

fn kernel_gs_base(m: &Machine) -> Verdict {
    refused(m.cpu, x86_msr::KERNEL_GS_BASE, 0x8000_0000_0000_0000)?;
    taken(m.cpu, x86_msr::KERNEL_GS_BASE, m.cpu.gs_base())
}

/// Stored and nothing else.
fn without_effect(m: &Machine) -> Verdict {
    const SYSENTER: [u32; 3] = [0x174, 0x175, 0x176];
    taken(m.cpu, x86_msr::CSTAR, m.space.test())?;
    taken(m.cpu, x86_msr::SYSCALL_MASK, rflags::TF | rflags::IF)?;
    for index in SYSENTER {
        taken(m.cpu, index, 0x10)?;
    }
    Ok(())
}

fn pkrs(m: &Machine) -> Verdict {
    if insn::synthetic_cpuid(7, 0).ecx >> 31 == 0 {
        return Err(Stop::Skip("no PKS"));
    }
    taken(m.cpu, x86_msr::PKRS, 0x5555_5540)?;
    refused(m.cpu, x86_msr::PKRS, 1 << 32)
}

/// The specification leaves the TSC open; it counts.
fn tsc(m: &Machine) -> Verdict {
    const TSC: u32 = 0x10;
    let first = plain_rdmsr(m.cpu, TSC)?;
    let second = rdmsr(TSC);
    holds("the TSC stands still", second > first, second)
}

fn unknown(m: &Machine) -> Verdict {
    const NONE: u32 = 0x4b56_4dff;
    equal("RDMSR by hypercall", rdmsr(NONE), 0u64)?;
    equal("WRMSR by hypercall", wrmsr(NONE, 0), hc::EINVAL)?;
    fault(plain_wrmsr(m.cpu, NONE, 0), vector::GP, 0)?;
    let mut r = Registers { rcx: NONE.into(), ..Registers::default() };
    fault(m.cpu.run(s::s_rdmsr, &mut r), vector::GP, 0).map(drop)
}

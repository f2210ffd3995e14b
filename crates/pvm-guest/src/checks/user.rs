//! User mode: ERETU, system calls and events from it (specification, "Vector events in user mode", "User SYSCALL event",
//! "EVENT_RETURN_USER").

use super::prelude::*;
use crate::abi::pf;
use crate::memory::PageFrame;
use crate::paging::rights;

pub(super) static GROUP: Group = group(
    "user",
    &[
        check("syscall", syscall),
        check("syscall-entry-state", syscall_entry_state),
        check("syscall-leaves-vector", syscall_leaves_vector),
        check("syscall-keeps-if", syscall_keeps_if),
        check("event-entry-state", event_entry_state),
        check("registers-in-and-out", registers_in_and_out),
        check("rcx-and-r11", rcx_and_r11),
        check("breakpoint", breakpoint),
        check("int-80", int_80),
        check("int-4", int_4),
        check("int-other", int_other),
        check("undefined-opcode", undefined_opcode),
        check("divide", divide),
        check("single-step", single_step),
        check("privileged", privileged),
        check("msr-writes", msr_writes),
        check("page-fault-read", page_fault_read),
        check("page-fault-write", page_fault_write),
        check("page-fault-read-only", page_fault_read_only),
        check("page-fault-fetch", page_fault_fetch),
        check("page-fault-kernel-address", page_fault_kernel_address),
        check("x87-error", x87_error),
        check("simd-error", simd_error),
        check("vector-units", vector_units),
        check("selectors", selectors),
        check("bad-selectors", bad_selectors),
        check("flags-are-standard", flags_are_standard),
        check("popf-keeps-if", popf_keeps_if),
        check("gs-base", gs_base),
        check("gs-base-semi-canonical", gs_base_semi_canonical),
        check("kernel-gs-base", kernel_gs_base),
        check("fs-base-stays", fs_base_stays),
        check("supervisor-rsp", supervisor_rsp),
        check("roots-switch", roots_switch),
        check("compat-int-80", compat_int_80),
        check("compat-page-fault", compat_page_fault),
        check("compat-breakpoint", compat_breakpoint),
        check("compat-sysenter", compat_sysenter),
    ],
);

fn syscall(m: &Machine) -> Verdict {
    let mut program = User::at(u::u_syscall);
    program.registers = Registers { rip: program.registers.rip, rsp: program.registers.rsp, ..marked() };
    let exit = m.cpu.enter(&program);
    ended_by(&exit, Exit::SYSCALL)?;
    equal("rip", exit.pvcs.rip, user_address(u::u_syscall_after))?;
    equal("rsp", exit.pvcs.rsp, program.registers.rsp)?;
    equal("user_cs", exit.pvcs.user_cs, selector::USER_CS)?;
    equal("user_ss", exit.pvcs.user_ss, selector::USER_DS)?;
    equal("eflags", exit.pvcs.eflags, rflags::IF | rflags::FIXED)?;
    // Underneath, SYSCALL has put RIP and RFLAGS there already; a hypervisor that emulates it may not.
    one_of("rcx", exit.pvcs.rcx, &[exit.pvcs.rip, program.registers.rcx])?;
    one_of("r11", exit.pvcs.r11, &[exit.pvcs.eflags.into(), program.registers.r11])?;
    equal("RAX", exit.registers.rax, program.registers.rax)?;
    equal("R10", exit.registers.r10, program.registers.r10)
}

/// What an entry from user mode loads, at `entry`.
fn entered_well(m: &Machine, exit: &Exit, entry: Code) -> Verdict {
    equal("RCX at entry", exit.registers.rcx, address(entry))?;
    equal("RIP at entry", exit.registers.rip, address(entry))?;
    equal("R11 at entry", exit.registers.r11, rflags::IF | rflags::FIXED)?;
    equal("RFLAGS at entry", exit.registers.rflags, rflags::IF | rflags::FIXED)?;
    equal("RSP at entry", exit.registers.rsp, exit.registers.exit_rsp)?;
    equal("GS base after entry", insn::gs_base(), m.cpu.gs_base())?;
    equal("CR3 after entry", insn::cr3(), m.space.kernel.root())?;
    equal("SWITCH_CR3 after entry", rdmsr(msr(PvmMsr::SwitchCr3)), m.space.user.root())?;
    equal("CS after entry", insn::cs() & 3, 3u64)
}

/// User flags are all on, so that it shows that they are not kept.
fn program_with_flags(code: Code) -> User {
    User { eflags: 0xcd5 | (rflags::ID | rflags::AC) as u32, ..User::at(code) }
}

fn syscall_entry_state(m: &Machine) -> Verdict {
    let exit = m.cpu.enter(&program_with_flags(u::u_syscall));
    ended_by(&exit, Exit::SYSCALL)?;
    entered_well(m, &exit, crate::entry::syscall_entry)
}

fn event_entry_state(m: &Machine) -> Verdict {
    let program = program_with_flags(u::u_int3);
    let exit = m.cpu.enter(&program);
    ended_by(&exit, vector::BP)?;
    entered_well(m, &exit, crate::entry::event_entry)?;
    equal("eflags", exit.pvcs.eflags, u64::from(program.eflags) | rflags::IF | rflags::FIXED)
}

fn syscall_leaves_vector(m: &Machine) -> Verdict {
    m.cpu.change_pvcs(|p| (p.event_vector, p.event_errcode, p.cr2) = (0x77, 0x8888, 0x9999));
    let exit = m.cpu.enter(&User::at(u::u_syscall));
    equal("a system call", u64::from(exit.syscall), 1u64)?;
    equal("event_vector", exit.pvcs.event_vector, 0x77u64)?;
    equal("event_errcode", exit.pvcs.event_errcode, 0x8888u64)?;
    equal("cr2", exit.pvcs.cr2, 0x9999u64)
}

fn syscall_keeps_if(m: &Machine) -> Verdict {
    for open in [false, true] {
        m.cpu.set_interrupt_flag(open);
        let exit = m.cpu.enter(&User::at(u::u_syscall));
        m.cpu.set_interrupt_flag(false);
        equal("PVCS.IF", exit.pvcs.event_flags & event_flags::IF, if open { event_flags::IF } else { 0 })?;
    }
    Ok(())
}

fn registers_in_and_out(m: &Machine) -> Verdict {
    let mut program = User::at(u::u_int3);
    program.registers = Registers { rip: program.registers.rip, rsp: program.registers.rsp, ..marked() };
    let exit = m.cpu.enter(&program);
    ended_by(&exit, vector::BP)?;
    let (got, want) = (&exit.registers, &program.registers);
    for (got, want) in [
        (got.rax, want.rax),
        (got.rbx, want.rbx),
        (got.rdx, want.rdx),
        (got.rsi, want.rsi),
        (got.rdi, want.rdi),
        (got.rbp, want.rbp),
        (got.r8, want.r8),
        (got.r9, want.r9),
        (got.r10, want.r10),
        (got.r12, want.r12),
        (got.r13, want.r13),
        (got.r14, want.r14),
        (got.r15, want.r15),
        (exit.pvcs.rcx, want.rcx),
        (exit.pvcs.r11, want.r11),
        (exit.pvcs.rsp, want.rsp),
        (exit.pvcs.rip, user_address(u::u_int3_after)),
    ] {
        equal("a register", got, want)?;
    }
    Ok(())
}

/// ERETU loads them from the PVCS, unlike SYSRET.
fn rcx_and_r11(m: &Machine) -> Verdict {
    let mut program = User::at(u::u_ud2);
    (program.registers.rcx, program.registers.r11) = (0x1111_2222_3333_4444, !0);
    let exit = m.cpu.enter(&program);
    equal("rcx", exit.pvcs.rcx, program.registers.rcx)?;
    equal("r11", exit.pvcs.r11, program.registers.r11)
}

fn breakpoint(m: &Machine) -> Verdict {
    let exit = m.cpu.enter(&User::at(u::u_int3));
    ended_by(&exit, vector::BP)?;
    equal("rip", exit.pvcs.rip, user_address(u::u_int3_after))
}

fn int_80(m: &Machine) -> Verdict {
    let exit = m.cpu.enter(&User::at(u::u_int80));
    ended_by(&exit, 0x80)?;
    equal("rip", exit.pvcs.rip, user_address(u::u_int80_after))
}

fn int_4(m: &Machine) -> Verdict {
    let exit = m.cpu.enter(&User::at(u::u_int4));
    one_of("the vector", exit.vector(), &[vector::OF.into(), vector::GP.into()])
}

/// Any other vector is #GP, with the gate's number in the error code.
fn int_other(m: &Machine) -> Verdict {
    let exit = m.cpu.enter(&User::at(u::u_int21));
    ended_by_fault(&exit, vector::GP, 0x21 << 3 | 2)?;
    equal("rip", exit.pvcs.rip, user_address(u::u_int21))
}

fn undefined_opcode(m: &Machine) -> Verdict {
    let exit = m.cpu.enter(&User::at(u::u_ud2));
    ended_by(&exit, vector::UD)?;
    equal("rip", exit.pvcs.rip, user_address(u::u_ud2))
}

fn divide(m: &Machine) -> Verdict {
    ended_by(&m.cpu.enter(&User::at(u::u_divide)), vector::DE)
}

fn single_step(m: &Machine) -> Verdict {
    let exit = m.cpu.enter(&User::at(u::u_step));
    ended_by(&exit, vector::DB)?;
    equal("rip", exit.pvcs.rip, user_address(u::u_stepped))?;
    equal("TF", u64::from(exit.pvcs.eflags) & rflags::TF, rflags::TF)
}

fn privileged(m: &Machine) -> Verdict {
    for code in [u::u_hlt as Code, u::u_cli, u::u_sti, u::u_in, u::u_rdmsr, u::u_get_cr3, u::u_swapgs] {
        let exit = m.cpu.enter(&User::at(code));
        ended_by_fault(&exit, vector::GP, 0)?;
        equal("rip", exit.pvcs.rip, user_address(code))?;
    }
    Ok(())
}

/// PVM's MSRs are the supervisor's.
fn msr_writes(m: &Machine) -> Verdict {
    for index in msr(PvmMsr::LinearAddressRange)..=msr(PvmMsr::SwitchCr3) {
        let before = rdmsr(index);
        let mut program = User::at(u::u_wrmsr);
        program.registers.rcx = index.into();
        ended_by_fault(&m.cpu.enter(&program), vector::GP, 0)?;
        if index != msr(PvmMsr::SupervisorRsp) {
            equal("the MSR", rdmsr(index), before)?;
        }
    }
    Ok(())
}

fn touching(code: Code, at: u64) -> User {
    let mut program = User::at(code);
    program.registers.rdi = at;
    program
}

fn page_fault_read(m: &Machine) -> Verdict {
    let exit = m.cpu.enter(&touching(u::u_load, 0x1234));
    ended_by_fault(&exit, vector::PF, pf::USER)?;
    equal("cr2", exit.pvcs.cr2, 0x1234u64)?;
    equal("rip", exit.pvcs.rip, user_address(u::u_load))
}

fn page_fault_write(m: &Machine) -> Verdict {
    let exit = m.cpu.enter(&touching(u::u_store, 0x7fff_ffff_f000));
    ended_by_fault(&exit, vector::PF, pf::USER | pf::WRITE)?;
    equal("cr2", exit.pvcs.cr2, 0x7fff_ffff_f000u64)
}

fn page_fault_read_only(m: &Machine) -> Verdict {
    m.space.map_user(user_space::TEST, PageFrame::new(), rights::USER_CONSTANT);
    let read = m.cpu.enter(&touching(u::u_load, user_space::TEST));
    let write = m.cpu.enter(&touching(u::u_store, user_space::TEST + 1));
    ended_by(&read, Exit::SYSCALL)?;
    ended_by_fault(&write, vector::PF, pf::USER | pf::WRITE | pf::PRESENT)?;
    equal("cr2", write.pvcs.cr2, user_space::TEST + 1)
}

fn page_fault_fetch(m: &Machine) -> Verdict {
    let exit = m.cpu.enter(&touching(u::u_jump, user_space::DATA + 0x2000));
    ended_by_fault(&exit, vector::PF, pf::USER | pf::FETCH | pf::PRESENT)?;
    equal("cr2", exit.pvcs.cr2, user_space::DATA + 0x2000)?;
    equal("rip", exit.pvcs.rip, user_space::DATA + 0x2000)
}

/// The user's root has no page of the kernel's.
fn page_fault_kernel_address(m: &Machine) -> Verdict {
    let at = address(s::s_nothing);
    let exit = m.cpu.enter(&touching(u::u_load, at));
    ended_by_fault(&exit, vector::PF, pf::USER)?;
    equal("cr2", exit.pvcs.cr2, at)
}

fn x87_error(m: &Machine) -> Verdict {
    ended_by(&m.cpu.enter(&User::at(u::u_x87)), vector::MF)
}

fn simd_error(m: &Machine) -> Verdict {
    ended_by(&m.cpu.enter(&User::at(u::u_sse)), vector::XM)
}

fn vector_units(m: &Machine) -> Verdict {
    let exit = m.cpu.enter(&touching(u::u_sum, 82));
    ended_by(&exit, Exit::SYSCALL)?;
    equal("82 / 2 + 1", exit.registers.rax, 42u64)
}

fn selectors(m: &Machine) -> Verdict {
    let exit = m.cpu.enter(&User::at(u::u_selectors));
    ended_by(&exit, Exit::SYSCALL)?;
    equal("CS", exit.registers.rax, selector::USER_CS)?;
    equal("SS", exit.registers.rbx, selector::USER_DS)
}

/// Selectors that cannot be CS and SS of user mode end in a fault of the user's, never in a mode that is not
/// user mode; or the hypervisor puts in what it has for user mode.
fn bad_selectors(m: &Machine) -> Verdict {
    for (cs, ss) in [
        (0, selector::USER_DS),
        (0x10, selector::USER_DS),
        (selector::USER_DS, selector::USER_DS),
        (selector::USER_CS, 0x18),
        (selector::USER_CS, selector::USER_CS),
        (0xffff, 0xffff),
    ] {
        let exit = m.cpu.enter(&User { cs, ss, ..User::at(u::u_selectors) });
        if exit.syscall {
            one_of("CS", exit.registers.rax, &[selector::USER_CS.into(), selector::USER32_CS.into()])?;
            equal("SS", exit.registers.rbx, selector::USER_DS)?;
        } else {
            one_of("the vector", exit.vector(), &[10, 11, 12, 13])?;
        }
    }
    Ok(())
}

/// IOPL, VM, VIF and VIP are cleared, IF and the fixed bit set.
fn flags_are_standard(m: &Machine) -> Verdict {
    let odd = rflags::IOPL | rflags::VM | rflags::VIF | rflags::VIP | 1;
    let exit = m.cpu.enter(&User { eflags: odd as u32, ..User::at(u::u_pushf) });
    ended_by(&exit, Exit::SYSCALL)?;
    equal("RFLAGS in user mode", exit.registers.rax, rflags::IF | rflags::FIXED | 1)
}

fn popf_keeps_if(m: &Machine) -> Verdict {
    let mut program = User::at(u::u_popf);
    program.registers.rax = rflags::FIXED;
    let exit = m.cpu.enter(&program);
    ended_by(&exit, Exit::SYSCALL)?;
    equal("IF", exit.registers.rax & rflags::IF, rflags::IF)?;
    equal("IF as it was saved", u64::from(exit.pvcs.eflags) & rflags::IF, rflags::IF)
}

fn gs_base(m: &Machine) -> Verdict {
    let mut program = User { gs_base: 0x1234_5678_9abc, ..User::at(u::u_gsbase) };
    program.registers.rdi = 0xffff_f000_0000_1000;
    let exit = m.cpu.enter(&program);
    ended_by(&exit, Exit::SYSCALL)?;
    equal("GS base in user mode", exit.registers.rax, program.gs_base)?;
    equal("user_gsbase", exit.pvcs.user_gsbase, program.registers.rdi)
}

/// The bits above the linear address width become copies of the highest one in it.
fn gs_base_semi_canonical(m: &Machine) -> Verdict {
    for (odd, standard) in [
        (0x8000_1234_5678_9abcu64, 0x0000_1234_5678_9abc),
        (0x7fff_f234_5678_9abc, 0xffff_f234_5678_9abc),
        (0x0000_8000_0000_0000, 0xffff_8000_0000_0000),
    ] {
        let exit = m.cpu.enter(&User { gs_base: odd, ..User::at(u::u_gsbase) });
        ended_by(&exit, Exit::SYSCALL)?;
        // On a host with 57-bit addresses, their bit 56 counts.
        let wide = ((odd << 7) as i64 >> 7) as u64;
        one_of("GS base in user mode", exit.registers.rax, &[standard, wide])?;
    }
    Ok(())
}

/// Entry from user mode loads it.
fn kernel_gs_base(m: &Machine) -> Verdict {
    let exit = m.cpu.enter(&User { gs_base: 0x5000, ..User::at(u::u_syscall) });
    ended_by(&exit, Exit::SYSCALL)?;
    equal("GS base", insn::gs_base(), m.cpu.gs_base())?;
    equal("KERNEL_GS_BASE", rdmsr(x86_msr::KERNEL_GS_BASE), m.cpu.gs_base())
}

fn fs_base_stays(m: &Machine) -> Verdict {
    let mut program = User::at(u::u_set_fsbase);
    program.registers.rdi = 0x7654_3210;
    ended_by(&m.cpu.enter(&program), Exit::SYSCALL)?;
    let exit = m.cpu.enter(&User::at(u::u_gsbase));
    equal("FS base", exit.registers.rbx, program.registers.rdi)
}

/// ERETU saves RSP there, and the next entry loads it.
fn supervisor_rsp(m: &Machine) -> Verdict {
    wrmsr(msr(PvmMsr::SupervisorRsp), 0x1234);
    let exit = m.cpu.enter(&User::at(u::u_syscall));
    equal("RSP at entry", exit.registers.rsp, exit.registers.exit_rsp)?;
    equal("SUPERVISOR_RSP", rdmsr(msr(PvmMsr::SupervisorRsp)), exit.registers.exit_rsp)
}

/// One address, two translations: each mode has its root's, both ways.
fn roots_switch(m: &Machine) -> Verdict {
    let (of_user, of_kernel) = (PageFrame::new(), PageFrame::new());
    of_user.set_word(0, 0x7573_6572);
    of_kernel.set_word(0, 0x6b65_726e);
    // A slot of the lower half that the roots do not share.
    let at = 3 << 39;
    m.space.user.map(at, of_user.address(), rights::USER_DATA);
    m.space.kernel.map(at, of_kernel.address(), rights::DATA);
    crate::space::flush();
    for _ in 0..3 {
        let exit = m.cpu.enter(&touching(u::u_load, at));
        ended_by(&exit, Exit::SYSCALL)?;
        equal("what user mode reads", exit.registers.rax, of_user.word(0))?;
        let mut r = Registers { rdi: at, ..Registers::default() };
        no_fault(m.cpu.run(s::s_load, &mut r))?;
        equal("what supervisor mode reads", r.rax, of_kernel.word(0))?;
    }
    Ok(())
}

// ---- 32-bit user mode ----

fn compat_int_80(m: &Machine) -> Verdict {
    let exit = m.cpu.enter(&User::compat(u::u32_int80));
    ended_by(&exit, 0x80)?;
    equal("CS in user mode", exit.registers.rax, selector::USER32_CS)?;
    equal("user_cs", exit.pvcs.user_cs, selector::USER32_CS)?;
    equal("rip", exit.pvcs.rip, user_address(u::u32_int80_after))
}

fn compat_page_fault(m: &Machine) -> Verdict {
    let exit =
        m.cpu.enter(&User { cs: selector::USER32_CS, ..touching(u::u32_store, 0xffff_ffff_8765_4321) });
    ended_by_fault(&exit, vector::PF, pf::USER | pf::WRITE)?;
    equal("cr2", exit.pvcs.cr2, 0x8765_4321u64)?;
    equal("user_cs", exit.pvcs.user_cs, selector::USER32_CS)
}

fn compat_breakpoint(m: &Machine) -> Verdict {
    ended_by(&m.cpu.enter(&User::compat(u::u32_int3)), vector::BP)
}

fn compat_sysenter(m: &Machine) -> Verdict {
    ended_by_fault(&m.cpu.enter(&User::compat(u::u32_sysenter)), vector::GP, 0)?;
    ended_by_fault(&m.cpu.enter(&User::at(u::u_sysenter)), vector::GP, 0)
}

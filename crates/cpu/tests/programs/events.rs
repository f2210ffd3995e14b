//! Faults and their frames, interrupts, IST, shadows, double faults.

use cpu::state::{cr0, reg, seg, slow};
use cpu::{Outcome, attention, flags};
use iced_x86::code_asm::*;

use crate::harness::*;

#[test]
fn a_fault_in_long_mode_pushes_the_whole_frame_on_an_aligned_stack() {
    let mut g = Guest::long();
    g.code(|a| {
        a.mov(rsp, STACK - 3)?;
        a.ud2()
    });
    let t = g.fault(6);
    assert_eq!(t.error_code, None);
    assert_eq!((t.rip, t.cs, t.ss), (CODE + 10, sel::CODE64.into(), sel::DATA.into()));
    assert_eq!(t.rsp, STACK - 3);
    assert_eq!(t.rflags & flags::RF, flags::RF);
    assert_eq!(g.reg(reg::RSP), ((STACK - 3) & !15) - 40);
}

#[test]
fn every_fault_has_its_error_code() {
    type Program = fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>;
    let cases: [(u8, Option<u64>, Program); 9] = [
        (0, None, |a| {
            a.xor(ecx, ecx)?;
            a.div(ecx)
        }),
        (3, None, |a| a.int3()),
        (6, None, |a| a.ud2()),
        // A non-canonical address.
        (13, Some(0), |a| {
            a.mov(rax, 0x8000_0000_0000_0000u64)?;
            a.mov(rax, qword_ptr(rax))
        }),
        (12, Some(0), |a| {
            a.mov(rbp, 0x8000_0000_0000_0000u64)?;
            a.mov(rax, qword_ptr(rbp))
        }),
        // Beyond the GDT.
        (13, Some(0x1000), |a| {
            a.mov(eax, 0x1000)?;
            a.mov(ds, ax)
        }),
        (11, Some(sel::ABSENT as u64), |a| {
            a.mov(eax, u32::from(sel::ABSENT))?;
            a.mov(ds, ax)
        }),
        (12, Some(sel::ABSENT as u64), |a| {
            a.mov(eax, u32::from(sel::ABSENT))?;
            a.mov(ss, ax)
        }),
        // Not mapped, written.
        (14, Some(2), |a| {
            a.mov(eax, 0x4000_0000)?;
            a.mov(qword_ptr(rax), rax)
        }),
    ];
    for (vector, code, program) in cases {
        let mut g = Guest::long();
        g.code(program);
        let t = g.fault(vector);
        assert_eq!(t.error_code, code, "vector {vector}");
        if vector == 14 {
            assert_eq!(g.vcpu.state.cr2, 0x4000_0000);
        }
    }
}

#[test]
fn a_fault_from_user_mode_switches_to_the_stack_of_the_tss() {
    let mut g = Guest::long();
    g.user(sel::USER_CODE64);
    g.code(|a| a.cli());
    let t = g.fault(13);
    assert_eq!((t.error_code, t.rip, t.cs), (Some(0), CODE, sel::USER_CODE64.into()));
    assert_eq!((t.rsp, t.ss), (STACK, sel::USER_DATA.into()));
    assert_eq!(g.reg(reg::RSP), STACK0 - 48);
    assert_eq!(g.vcpu.state.cpl, 0);
    assert_eq!(g.vcpu.state.segments[usize::from(seg::SS)].selector, 0);
}

#[test]
fn a_gate_with_an_ist_takes_its_stack_even_without_a_change_of_privilege() {
    let mut g = Guest::long();
    g.poke(IDT + 6 * 16, gate(sel::CODE64, HANDLERS + 6 * 16, 0x8e) | 1 << 32);
    g.code(|a| a.ud2());
    let t = g.fault(6);
    assert_eq!(t.rsp, STACK);
    assert_eq!(g.reg(reg::RSP), (IST1 & !15) - 40);
    assert_eq!(g.vcpu.state.segments[usize::from(seg::SS)].selector, sel::DATA);
}

#[test]
fn software_interrupts_check_the_gates_dpl() {
    let mut g = Guest::long();
    g.user(sel::USER_CODE64);
    g.code(|a| a.int(0x80));
    let t = g.fault(13);
    assert_eq!((t.error_code, t.rip), (Some(0x80 * 8 + 2), CODE));

    let mut g = Guest::long();
    g.set_gate(0x80, sel::CODE64, HANDLERS + 0x80 * 16, 0xee);
    g.user(sel::USER_CODE64);
    g.code(|a| a.int(0x80));
    let t = g.fault(0x80);
    assert_eq!((t.rip, t.rflags & flags::RF), (CODE + 2, 0));
}

#[test]
fn a_fault_of_the_processor_itself_names_the_gate_with_ext() {
    // The gate of #UD is not present: #NP with the gate's number, IDT and EXT.
    let mut g = Guest::long();
    g.set_gate(6, sel::CODE64, HANDLERS, 0x0e);
    g.code(|a| a.ud2());
    let t = g.fault(11);
    assert_eq!((t.error_code, t.rip), (Some(6 * 8 + 3), CODE));
}

#[test]
fn contributory_faults_double_and_then_shut_down() {
    let mut g = Guest::long();
    g.set_gate(13, sel::CODE64, HANDLERS, 0x0e);
    g.code(|a| {
        a.mov(eax, 0x1000)?;
        a.mov(ds, ax)
    });
    let t = g.fault(8);
    assert_eq!((t.error_code, t.rip), (Some(0), CODE + 5));

    let mut g = Guest::long();
    g.set_gate(13, sel::CODE64, HANDLERS, 0x0e);
    g.set_gate(8, sel::CODE64, HANDLERS, 0x0e);
    g.code(|a| {
        a.mov(eax, 0x1000)?;
        a.mov(ds, ax)
    });
    assert_eq!(g.run(), Outcome::TripleFault);
}

#[test]
fn a_page_fault_on_the_handlers_stack_doubles() {
    let mut g = Guest::long();
    g.poke(IDT + 8 * 16, gate(sel::CODE64, HANDLERS + 8 * 16, 0x8e) | 1 << 32);
    g.code(|a| {
        a.mov(rsp, 0x4000_0000u64)?;
        a.push(rax)
    });
    let t = g.fault(8);
    assert_eq!((t.error_code, t.rsp), (Some(0), 0x4000_0000));
    assert_eq!(g.vcpu.state.cr2, 0x4000_0000 - 16 + 8);
}

#[test]
fn a_delivery_that_fails_changes_no_register() {
    let mut g = Guest::long();
    g.user(sel::USER_CODE64);
    // RSP0 is not canonical: #SS, for which there is a good stack.
    g.poke(TSS + 4, 0x8000_0000_0000_0000u64);
    g.poke(IDT + 12 * 16, gate(sel::CODE64, HANDLERS + 12 * 16, 0x8e) | 1 << 32);
    g.code(|a| a.ud2());
    let t = g.fault(12);
    assert_eq!((t.error_code, t.rip, t.rsp), (Some(1), CODE, STACK));
    assert_eq!(t.cs, u64::from(sel::USER_CODE64));
}

#[test]
fn interrupts_wait_for_if_and_for_the_shadow_of_sti() {
    let mut g = Guest::long();
    g.code(|a| {
        a.nop()?;
        a.sti()?;
        a.nop()?;
        a.mov(eax, 1)
    });
    g.interrupt(0x40);
    let t = g.fault(0x40);
    assert_eq!((t.rip, t.rflags & flags::IF), (CODE + 3, flags::IF));
    assert_eq!(g.vcpu.state.flags.bits() & flags::IF, 0);
}

#[test]
fn a_trap_gate_leaves_interrupts_on() {
    let mut g = Guest::long();
    g.set_gate(0x40, sel::CODE64, HANDLERS + 0x400, 0x8f);
    g.code(|a| {
        a.sti()?;
        a.nop()
    });
    g.interrupt(0x40);
    g.fault(0x40);
    assert_eq!(g.vcpu.state.flags.bits() & flags::IF, flags::IF);
}

#[test]
fn a_load_of_ss_shadows_the_next_instruction() {
    let mut g = Guest::long();
    g.code(|a| {
        a.mov(eax, u32::from(sel::DATA))?;
        a.sti()?;
        a.mov(ss, ax)?;
        a.nop()?;
        a.nop()
    });
    g.interrupt(0x40);
    // STI at 5, MOV SS at 6 (three bytes), NOP at 9.
    assert_eq!(g.fault(0x40).rip, CODE + 10);
}

#[test]
fn hlt_ends_with_an_interrupt_and_goes_on_behind_it() {
    let mut g = Guest::long();
    g.code_at(HANDLERS + 0x400, 64, |a| {
        a.inc(ebx)?;
        a.iretq()
    });
    g.code(|a| {
        a.sti()?;
        a.hlt()?;
        a.mov(ecx, 7)?;
        a.cli()
    });
    assert_eq!(g.run(), Outcome::Halted);
    assert_eq!((g.reg(reg::RCX), g.vcpu.stats.halts), (0, 1));
    assert_eq!(g.run(), Outcome::Halted);
    g.interrupt(0x40);
    assert_eq!(g.run(), Outcome::Halted);
    assert_eq!((g.reg(reg::RBX), g.reg(reg::RCX), g.vcpu.stats.halts), (1, 7, 2));
}

#[test]
fn nmis_are_blocked_until_iret() {
    let mut g = Guest::long();
    g.code_at(HANDLERS + 2 * 16, 64, |a| {
        a.inc(ebx)?;
        a.hlt()?;
        a.iretq()
    });
    g.code(|a| a.nop());
    g.attention.raise(attention::NMI);
    assert_eq!(g.run(), Outcome::Halted);
    assert_eq!(g.reg(reg::RBX), 1);
    assert_ne!(g.vcpu.state.slow & slow::NMI_BLOCKED, 0);
    // A second one is latched: even HLT does not let it in. The handler must go on by itself.
    g.attention.raise(attention::NMI);
    assert_eq!(g.run(), Outcome::Halted);
    assert_eq!(g.reg(reg::RBX), 1);
    g.resume_at(g.vcpu.state.rip());
    assert_eq!(g.run(), Outcome::Halted);
    assert_eq!(g.reg(reg::RBX), 2);
}

#[test]
fn iret_restores_flags_by_privilege() {
    // At CPL 3 with IOPL 0, neither IF nor IOPL change.
    let mut g = Guest::long();
    g.user(sel::USER_CODE64);
    g.vcpu.set_rflags(flags::IF, flags::IF);
    g.code(|a| {
        let mut target = a.create_label();
        a.lea(rdx, ptr(target))?;
        a.push(i32::from(sel::USER_DATA))?;
        a.push(STACK as i32)?;
        a.push(0x3003)?;
        a.push(i32::from(sel::USER_CODE64))?;
        a.push(rdx)?;
        a.iretq()?;
        a.set_label(&mut target)?;
        a.ud2()
    });
    let t = g.fault(6);
    assert_eq!(t.rflags & (flags::IOPL | flags::IF | flags::CF), flags::IF | flags::CF);
}

#[test]
fn real_mode_events_use_the_vector_table() {
    let mut g = Guest::real();
    g.code(|a| {
        a.stc()?;
        a.int(0x21)
    });
    let t = g.fault(0x21);
    assert_eq!((t.rip, t.cs, t.rflags & 1), (CODE + 3, 0, 1));
    assert_eq!(g.reg(reg::RSP), 0x7000 - 6);
    // And back.
    g.code_at(HANDLERS + 0x21 * 16, 16, |a| a.iret());
    g.resume_at(CODE);
    g.vcpu.state.regs[usize::from(reg::RSP)] = 0x7000;
    g.finish();
    assert_eq!((g.vcpu.state.rip(), g.reg(reg::RSP)), (CODE + 4, 0x7000));
}

#[test]
fn protected_mode_faults_push_a_short_frame_at_the_same_level() {
    let mut g = Guest::protected();
    g.code(|a| {
        a.mov(eax, u32::from(sel::READ_ONLY))?;
        a.mov(ss, ax)
    });
    let t = g.fault(13);
    assert_eq!((t.error_code, t.rip, t.cs), (Some(sel::READ_ONLY.into()), CODE + 5, sel::CODE32.into()));
    assert_eq!(g.reg(reg::RSP), STACK - 16);
}

#[test]
fn protected_mode_faults_from_user_mode_push_the_stack_too() {
    let mut g = Guest::protected();
    g.user(sel::USER_CODE32);
    g.code(|a| a.hlt());
    let t = g.fault(13);
    assert_eq!((t.error_code, t.rip, t.cs), (Some(0), CODE, sel::USER_CODE32.into()));
    assert_eq!((t.rsp, t.ss), (STACK, sel::USER_DATA.into()));
    assert_eq!(g.reg(reg::RSP), STACK0 - 24);
    assert_eq!(g.vcpu.state.segments[usize::from(seg::SS)].selector, sel::DATA);
}

#[test]
fn a_bad_stack_in_the_tss_is_an_invalid_tss() {
    let mut g = Guest::protected();
    g.user(sel::USER_CODE32);
    g.poke::<u32>(TSS + 8, u32::from(sel::READ_ONLY));
    // #TS needs a stack as well: a conforming handler would do, a triple fault shows the same.
    g.code(|a| a.hlt());
    assert_eq!(g.run(), Outcome::TripleFault);
}

#[test]
fn a_benign_exception_that_raises_itself_shuts_the_vcpu_down() {
    // #AC at CPL 3 on a misaligned stack, whose handler also runs at CPL 3 on that stack.
    let mut g = Guest::protected();
    for vector in [13, 17] {
        g.set_gate(vector, sel::USER_CODE32, HANDLERS, 0x8e);
    }
    g.user(sel::USER_CODE32);
    g.vcpu.state.cr0 |= cr0::AM;
    g.vcpu.set_rflags(flags::AC, flags::AC);
    g.vcpu.set_reg(reg::RSP, STACK + 1);
    g.bytes(&[0xf4]);
    assert_eq!(g.run(), Outcome::TripleFault);
}

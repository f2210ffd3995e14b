//! Single step, breakpoints, and the debug registers.

use cpu::flags;
use cpu::state::{cr4, reg};
use iced_x86::code_asm::*;

use crate::harness::*;

const BS: u64 = 1 << 14;
const BD: u64 = 1 << 13;
const FIXED: u64 = 0xffff_0ff0;

#[test]
fn single_step_traps_after_each_instruction() {
    let mut g = Guest::long();
    g.code(|a| {
        a.pushfq()?;
        a.or(dword_ptr(rsp), flags::TF as i32)?;
        a.popfq()?;
        a.nop()?;
        a.nop()
    });
    let t = g.fault(1);
    // Not after POPF itself, but after the instruction behind it.
    let popf = (0..32).find(|n| g.peek::<u8>(CODE + n) == 0x9d).unwrap();
    assert_eq!(t.rip, CODE + popf + 2);
    assert_eq!((t.rflags & (flags::TF | flags::RF), g.vcpu.state.dr6), (flags::TF, FIXED | BS));
    assert_eq!(g.vcpu.state.flags.bits() & flags::TF, 0);
}

#[test]
fn a_handler_can_step_through_a_program() {
    let mut g = Guest::long();
    g.code_at(HANDLERS + 16, 64, |a| {
        a.inc(r15d)?;
        a.iretq()
    });
    g.vcpu.set_rflags(flags::TF, flags::TF);
    g.code(|a| {
        a.mov(ecx, 3)?;
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.dec(ecx)?;
        a.jne(top)?;
        a.pushfq()?;
        a.and(dword_ptr(rsp), !(flags::TF as i32))?;
        a.popfq()
    });
    g.finish();
    // One move, three rounds of two, PUSHF, AND, and POPF that ends it.
    assert_eq!(g.reg(15), 10);
}

#[test]
fn each_iteration_of_a_repeated_string_instruction_is_a_step() {
    let mut g = Guest::long();
    g.code_at(HANDLERS + 16, 64, |a| {
        a.inc(r15d)?;
        a.iretq()
    });
    g.vcpu.set_reg(reg::RCX, 3);
    g.vcpu.set_reg(reg::RDI, DATA);
    g.vcpu.set_reg(reg::RDX, 0x80);
    g.vcpu.set_rflags(flags::TF, flags::TF);
    g.code(|a| {
        a.rep().insb()?;
        a.mov(r14d, r15d)?;
        a.cli()
    });
    g.run();
    assert_eq!((g.reg(14), g.reg(reg::RCX)), (3, 0));
}

#[test]
fn int_n_does_not_step_into_its_handler() {
    let mut g = Guest::long();
    g.vcpu.set_rflags(flags::TF, flags::TF);
    g.code(|a| a.int(0x30));
    let t = g.fault(0x30);
    assert_eq!(t.rflags & flags::TF, flags::TF);
}

#[test]
fn an_instruction_breakpoint_is_a_fault_that_rf_gets_past() {
    let mut g = Guest::long();
    g.vcpu.state.dr[1] = CODE + 1;
    g.vcpu.state.dr7 = 0x400 | 1 << 2;
    g.vcpu.refresh();
    g.code(|a| {
        a.nop()?;
        a.nop()?;
        a.mov(eax, 5)
    });
    let t = g.fault(1);
    assert_eq!((t.rip, t.rflags & flags::RF), (CODE + 1, 0));
    assert_eq!(g.vcpu.state.dr6, FIXED | 2);
    // The handler sets RF and returns: the instruction runs once.
    g.code_at(HANDLERS + 16, 64, |a| {
        a.inc(r15d)?;
        a.or(dword_ptr(rsp + 16), flags::RF as i32)?;
        a.iretq()
    });
    g.resume_at(HANDLERS + 16);
    g.finish();
    assert_eq!((g.reg(reg::RAX), g.reg(15)), (5, 1));
    assert_eq!(g.vcpu.state.flags.bits() & flags::RF, 0);
}

#[test]
fn data_breakpoints_trap_after_the_access() {
    // Write of four bytes at DATA; read or write of one byte at DATA + 8.
    let watch = 0x400 | 1 | 0xd << 16 | 1 << 2 | 3 << 20;
    type Program = fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>;
    let cases: [(Program, u64); 5] = [
        (|a| a.mov(dword_ptr(DATA), eax), 1),
        (|a| a.mov(byte_ptr(DATA + 3), al), 1),
        (|a| a.mov(eax, dword_ptr(DATA)), 0),
        (|a| a.mov(rax, qword_ptr(DATA)), 0),
        (|a| a.mov(rax, qword_ptr(DATA + 1)), 2),
    ];
    for (program, hits) in cases {
        let mut g = Guest::long();
        g.vcpu.state.dr[0] = DATA;
        g.vcpu.state.dr[1] = DATA + 8;
        g.vcpu.state.dr7 = watch;
        g.vcpu.refresh();
        g.code(program);
        if hits == 0 {
            g.finish();
        } else {
            let t = g.fault(1);
            assert_eq!((g.peek::<u8>(t.rip), g.vcpu.state.dr6), (0xf4, FIXED | hits));
        }
    }
}

#[test]
fn io_breakpoints_need_cr4_de() {
    for de in [false, true] {
        let mut g = Guest::long();
        g.vcpu.state.dr[3] = 0x80;
        g.vcpu.state.dr7 = 0x400 | 1 << 6 | 2 << 28;
        if de {
            g.vcpu.state.cr4 |= cr4::DE;
        }
        g.vcpu.refresh();
        g.code(|a| a.out(0x80, al));
        if de {
            assert_eq!(g.fault(1).rip, CODE + 2);
            assert_eq!(g.vcpu.state.dr6, FIXED | 8);
        } else {
            g.finish();
        }
    }
}

#[test]
fn general_detect_catches_access_to_debug_registers() {
    let mut g = Guest::long();
    g.code(|a| {
        a.mov(eax, 0x2400)?;
        a.mov(dr7, rax)?;
        a.mov(rbx, dr6)
    });
    let t = g.fault(1);
    assert_eq!(t.rip, CODE + 8);
    assert_eq!((g.vcpu.state.dr6, g.vcpu.state.dr7), (FIXED | BD, 0x400));
}

#[test]
fn debug_registers_four_and_five() {
    let mut g = Guest::long();
    g.bytes(&[0x0f, 0x21, 0xe0]);
    g.finish();
    assert_eq!(g.reg(reg::RAX), FIXED);
    let mut g = Guest::long();
    g.vcpu.state.cr4 |= cr4::DE;
    g.bytes(&[0x0f, 0x21, 0xe0]);
    g.fault(6);
}

#[test]
fn int1_is_a_debug_trap_without_dr6() {
    let mut g = Guest::long();
    g.user(sel::USER_CODE64);
    g.bytes(&[0xf1]);
    let t = g.fault(1);
    assert_eq!((t.rip, g.vcpu.state.dr6), (CODE + 1, FIXED));
}

#[test]
fn a_debug_trap_waits_for_the_shadow_of_mov_ss() {
    let mut g = Guest::long();
    g.poke::<u16>(DATA, sel::DATA);
    g.vcpu.state.dr[0] = DATA;
    g.vcpu.state.dr7 = 0x400 | 1 | 3 << 16;
    g.vcpu.refresh();
    g.code(|a| {
        a.mov(ss, word_ptr(DATA))?;
        a.nop()?;
        a.nop()
    });
    let t = g.fault(1);
    let nop = (0..32).find(|n| g.peek::<u8>(CODE + n) == 0x90).unwrap();
    assert_eq!(t.rip, CODE + nop + 1);
}

#[test]
fn a_breakpoint_behind_mov_ss_is_not_met() {
    let mut g = Guest::long();
    g.vcpu.set_reg(reg::RAX, sel::DATA.into());
    g.code(|a| {
        a.mov(ss, eax)?;
        a.nop()?;
        a.nop()
    });
    let nop = (0..32).find(|n| g.peek::<u8>(CODE + n) == 0x90).unwrap();
    g.vcpu.state.dr = [CODE + nop, CODE + nop + 1, 0, 0];
    g.vcpu.state.dr7 = 0x400 | 1 | 1 << 2;
    g.vcpu.refresh();
    assert_eq!(g.fault(1).rip, CODE + nop + 1);
    assert_eq!(g.vcpu.state.dr6, FIXED | 2);
}

#[test]
fn cmpxchg16b_meets_data_breakpoints() {
    for (condition, at, hit) in [(0b01, DATA + 8, true), (0b11, DATA, true), (0b01, DATA + 16, false)] {
        let mut g = Guest::long();
        g.vcpu.state.dr[0] = at;
        // Local enable; 8 bytes long.
        g.vcpu.state.dr7 = 1 << 10 | 1 | condition << 16 | 0b10 << 18;
        g.vcpu.refresh();
        g.vcpu.set_reg(reg::RAX, 1);
        g.code(|a| {
            a.cmpxchg16b(xmmword_ptr(DATA))?;
            a.nop()
        });
        if hit {
            // The comparison fails; memory is written all the same.
            let t = g.fault(1);
            assert_eq!((g.vcpu.state.dr6, g.peek::<u8>(t.rip)), (FIXED | 1, 0x90));
        } else {
            g.finish();
        }
    }
}

#[test]
fn a_data_breakpoint_sees_an_access_that_wraps_around() {
    let mut g = Guest::wrapping();
    g.vcpu.state.dr[0] = 0;
    g.vcpu.state.dr7 = 1 << 10 | 1 | 0b01 << 16;
    g.vcpu.refresh();
    g.code(|a| {
        a.mov(dword_ptr(0xfffe), 0x1122_3344)?;
        a.nop()
    });
    g.fault(1);
    assert_eq!(
        (g.vcpu.state.dr6, g.peek::<u16>(LAST_PAGE + 0xffe), g.peek::<u16>(0)),
        (FIXED | 1, 0x3344, 0x1122)
    );
}

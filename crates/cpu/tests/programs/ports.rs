//! Port and MMIO exits, and who may use which port.

use cpu::flags;
use cpu::state::{Segment, reg};
use iced_x86::code_asm::*;
use mmu::Gpa;

use crate::harness::*;

#[test]
fn in_and_out_of_all_sizes() {
    let mut g = Guest::long();
    g.answer(&[0x11, 0x2222, 0x3333_3333]);
    g.code(|a| {
        a.mov(rax, -1i64 as u64)?;
        a.in_(al, 0x80)?;
        a.mov(rbx, rax)?;
        a.mov(dx, 0x3f8)?;
        a.in_(ax, dx)?;
        a.mov(rcx, rax)?;
        a.in_(eax, dx)?;
        a.out(0x70, al)?;
        a.out(dx, ax)?;
        a.out(dx, eax)
    });
    g.finish();
    assert_eq!(g.reg(reg::RBX), 0xffff_ffff_ffff_ff11);
    assert_eq!(g.reg(reg::RCX), 0xffff_ffff_ffff_2222);
    assert_eq!(g.reg(reg::RAX), 0x3333_3333);
    assert_eq!(
        g.seen(),
        [
            Seen::In { port: 0x80, size: 1 },
            Seen::In { port: 0x3f8, size: 2 },
            Seen::In { port: 0x3f8, size: 4 },
            Seen::Out { port: 0x70, data: vec![0x33] },
            Seen::Out { port: 0x3f8, data: vec![0x33; 2] },
            Seen::Out { port: 0x3f8, data: vec![0x33; 4] },
        ]
    );
}

#[test]
fn ins_and_outs_repeat() {
    let mut g = Guest::long();
    g.answer(&[1, 2, 3]);
    g.code(|a| {
        a.mov(edi, DATA as u32)?;
        a.mov(ecx, 3)?;
        a.mov(edx, 0x1f0)?;
        a.rep().insw()?;
        a.mov(esi, DATA as u32)?;
        a.mov(ecx, 2)?;
        a.rep().outsb()
    });
    g.finish();
    assert_eq!([0, 2, 4].map(|n| g.peek::<u16>(DATA + n)), [1, 2, 3]);
    assert_eq!((g.reg(reg::RDI), g.reg(reg::RSI), g.reg(reg::RCX)), (DATA + 6, DATA + 2, 0));
    assert_eq!(g.seen()[3..], [1u8, 0].map(|b| Seen::Out { port: 0x1f0, data: vec![b] }));
}

#[test]
fn a_page_fault_in_the_middle_of_ins_keeps_what_is_done() {
    let mut g = Guest::long();
    g.poke::<u64>(PT + ((DATA >> 12) + 1) * 8, 0);
    g.answer(&[7, 8, 9]);
    g.code(|a| {
        a.mov(edi, DATA as u32 + 0xffe)?;
        a.mov(ecx, 4)?;
        a.mov(edx, 0x1f0)?;
        a.rep().insb()
    });
    let t = g.fault(14);
    assert_eq!((t.error_code, t.rip), (Some(2), CODE + 15));
    assert_eq!((g.reg(reg::RCX), g.reg(reg::RDI)), (2, DATA + 0x1000));
    // The port was not read for the byte that could not be stored.
    assert_eq!(g.seen().len(), 2);
}

#[test]
fn an_interrupt_comes_in_between_two_iterations() {
    let mut g = Guest::long();
    g.vcpu.set_rflags(flags::IF, flags::IF);
    g.code(|a| {
        a.mov(edi, DATA as u32)?;
        a.mov(ecx, 5)?;
        a.mov(edx, 0x1f0)?;
        a.rep().insb()
    });
    g.script.lock().unwrap().interrupt_at_exit = Some(0x40);
    let trap = g.fault(0x40);
    assert_eq!((trap.rip, trap.rflags & flags::RF), (CODE + 15, flags::RF));
    assert_eq!((g.reg(reg::RCX), g.reg(reg::RDI)), (4, DATA + 1));
    // The rest follows when the handler returns.
    g.code_at(HANDLERS + 0x400, 64, |a| a.iretq());
    g.resume_at(HANDLERS + 0x400);
    g.finish();
    assert_eq!((g.reg(reg::RCX), g.seen().len()), (0, 5));
    assert_eq!(g.vcpu.state.flags.bits() & flags::RF, 0);
}

#[test]
fn the_tss_bitmap_decides_for_users() {
    let run = |port: u32, program: fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>| {
        let mut g = Guest::long();
        g.poke::<u16>(TSS + 0x66, 0x68);
        g.poke::<u64>(TSS + 0x68, !(1 << 9 | 1 << 15 | 1 << 16));
        g.poke::<u64>(TSS + 0x70, u64::MAX);
        g.vcpu.state.tr.segment = Segment { limit: 0x72, ..g.vcpu.state.tr.segment };
        g.user(sel::USER_CODE64);
        g.vcpu.set_reg(reg::RDX, port.into());
        g.code(|a| {
            program(a)?;
            a.ud2()
        });
        assert_eq!(g.run(), cpu::Outcome::Halted);
        g.trap().unwrap().vector
    };
    assert_eq!(run(9, |a| a.in_(al, dx)), 6);
    assert_eq!(run(8, |a| a.in_(al, dx)), 13);
    // Across two bytes of the map.
    assert_eq!(run(15, |a| a.in_(ax, dx)), 6);
    assert_eq!(run(15, |a| a.in_(eax, dx)), 13);
    // Beyond the limit.
    assert_eq!(run(0x1000, |a| a.in_(al, dx)), 13);
}

#[test]
fn iopl_allows_all_ports() {
    let mut g = Guest::long();
    g.user(sel::USER_CODE64);
    g.vcpu.set_rflags(flags::IOPL, flags::IOPL);
    g.code(|a| {
        a.in_(al, 0x80)?;
        a.cli()?;
        a.ud2()
    });
    g.fault(6);
}

#[test]
fn mmio_reads_and_writes_of_all_sizes() {
    let mut g = Guest::long();
    g.answer(&[0x1122_3344_5566_7788]);
    g.code(|a| {
        a.mov(ebx, MMIO as u32)?;
        a.mov(rax, qword_ptr(rbx + 8))?;
        a.mov(byte_ptr(rbx), 5)?;
        a.mov(word_ptr(rbx + 2), ax)?;
        a.mov(dword_ptr(rbx + 4), eax)
    });
    g.finish();
    assert_eq!(g.reg(reg::RAX), 0x1122_3344_5566_7788);
    assert_eq!(
        g.seen(),
        [
            Seen::Read { gpa: Gpa(MMIO + 8), size: 8 },
            Seen::Write { gpa: Gpa(MMIO), data: vec![5] },
            Seen::Write { gpa: Gpa(MMIO + 2), data: vec![0x88, 0x77] },
            Seen::Write { gpa: Gpa(MMIO + 4), data: vec![0x88, 0x77, 0x66, 0x55] },
        ]
    );
}

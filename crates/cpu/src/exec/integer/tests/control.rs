//! Branches, the stack and what faults on purpose.

use iced_x86::code_asm::*;

use super::{CODE, DATA, DATA_END, STACK, peek, put, run, run_bytes, vcpu};
use crate::fault::vector;
use crate::flags::{ARITHMETIC, CF, OF, PF, SF, ZF};
use crate::state::CodeMode::{Bits16, Bits32, Bits64};
use crate::state::{reg::*, seg};

#[test]
fn each_condition_reads_its_flags() {
    let holds: [fn(u64) -> bool; 8] = [
        |f| f & OF != 0,
        |f| f & CF != 0,
        |f| f & ZF != 0,
        |f| f & (CF | ZF) != 0,
        |f| f & SF != 0,
        |f| f & PF != 0,
        |f| (f & SF != 0) != (f & OF != 0),
        |f| f & ZF != 0 || (f & SF != 0) != (f & OF != 0),
    ];
    let mut vcpu = vcpu(Bits64);
    for bits in 0..32u64 {
        let flags = [CF, PF, ZF, SF, OF]
            .iter()
            .enumerate()
            .fold(0, |acc, (n, flag)| if bits >> n & 1 != 0 { acc | flag } else { acc });
        for code in 0..16u8 {
            let expected = holds[usize::from(code >> 1)](flags) != (code & 1 != 0);
            vcpu.state.flags.set_bits(flags);
            vcpu.set_reg(RAX, 0xff);
            vcpu.set_reg(RCX, 1);
            vcpu.set_reg(RDX, 0);
            // setcc al; cmovcc rdx, rcx; jcc over a one-byte CLC that tells
            run_bytes(&mut vcpu, &[0x0f, 0x90 + code, 0xc0]).unwrap();
            run_bytes(&mut vcpu, &[0x48, 0x0f, 0x40 + code, 0xd1]).unwrap();
            run_bytes(&mut vcpu, &[0x70 + code, 0x02, 0xff, 0xc1]).unwrap();
            let seen = (vcpu.reg(RAX) & 1, vcpu.reg(RDX), 2 - vcpu.reg(RCX));
            let e = u64::from(expected);
            assert_eq!(seen, (e, e, e), "condition {code} with {flags:#x}");
        }
    }
}

#[test]
fn calls_push_the_return_address_and_returns_drop_arguments() {
    let mut vcpu = vcpu(Bits64);
    run(&mut vcpu, |a| {
        let mut function = a.create_label();
        let mut end = a.create_label();
        a.push(1)?;
        a.push(-2)?;
        a.call(function)?;
        a.jmp(end)?;
        a.set_label(&mut function)?;
        a.mov(rax, qword_ptr(rsp + 8))?;
        a.ret_1(16)?;
        a.set_label(&mut end)?;
        a.nop()
    })
    .unwrap();
    assert_eq!((vcpu.reg(RAX), vcpu.reg(RSP)), ((-2i64) as u64, STACK));
    // Indirect, by register and by memory.
    vcpu.set_reg(RBX, DATA);
    vcpu.set_reg(RCX, 0x1234);
    run(&mut vcpu, |a| a.call(rcx)).unwrap();
    assert_eq!((vcpu.state.rip(), peek(&vcpu, STACK - 8)), (0x1234, CODE + 2));
    put(&vcpu, DATA, 0x4321);
    run(&mut vcpu, |a| a.jmp(qword_ptr(rbx))).unwrap();
    assert_eq!(vcpu.state.rip(), 0x4321);
}

#[test]
fn branches_to_nowhere_fault_before_anything_is_pushed() {
    let mut vcpu = vcpu(Bits64);
    vcpu.set_reg(RCX, 1 << 47);
    vcpu.set_reg(RBX, DATA);
    put(&vcpu, DATA, 1 << 62);
    for code in [&[0xff, 0xe1][..], &[0xff, 0xd1], &[0xff, 0x13], &[0xff, 0x23]] {
        let fault = run_bytes(&mut vcpu, code).unwrap_err();
        assert_eq!((fault.vector, fault.error_code), (vector::GP, Some(0)), "{code:x?}");
        assert_eq!((vcpu.state.rip(), vcpu.reg(RSP)), (CODE, STACK));
    }
    // RET checks what it popped before it moves the stack pointer.
    put(&vcpu, STACK, 1 << 47);
    assert_eq!(run_bytes(&mut vcpu, &[0xc3]).unwrap_err().vector, vector::GP);
    assert_eq!(vcpu.reg(RSP), STACK);
    // A non-canonical stack is #SS.
    vcpu.set_reg(RSP, (1 << 47) + 8);
    assert_eq!(run_bytes(&mut vcpu, &[0xc3]).unwrap_err().vector, vector::SS);
    assert_eq!(run_bytes(&mut vcpu, &[0x50]).unwrap_err().vector, vector::SS);
    // Outside 64-bit mode the code segment's limit decides.
    let mut vcpu = super::vcpu(Bits32);
    vcpu.state.segments[usize::from(seg::CS)].limit = 0x1_ffff;
    vcpu.set_reg(RCX, 0x2_0000);
    assert_eq!(run_bytes(&mut vcpu, &[0xff, 0xd1]).unwrap_err().vector, vector::GP);
    assert_eq!(vcpu.reg(RSP), STACK);
}

#[test]
fn sixteen_bit_branches_truncate_the_instruction_pointer() {
    let mut vcpu = vcpu(Bits16);
    // jmp $-4 at the start of the segment wraps to its end.
    vcpu.state.set_rip(0);
    super::execute(&mut vcpu, &[0xeb, 0xfa]).unwrap();
    assert_eq!(vcpu.state.rip(), 0xfffc);
    // A 16-bit operand size in 32-bit code truncates too, and pushes two bytes.
    let mut vcpu = super::vcpu(Bits32);
    vcpu.state.set_rip(0x1_0000);
    super::execute(&mut vcpu, &[0x66, 0xe8, 0x10, 0x00]).unwrap();
    assert_eq!((vcpu.state.rip(), vcpu.reg(RSP)), (0x14, STACK - 2));
}

#[test]
fn loops_count_in_the_size_of_the_address() {
    let mut vcpu = vcpu(Bits64);
    vcpu.set_reg(RCX, 5);
    vcpu.set_reg(RAX, 0);
    run(&mut vcpu, |a| {
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.inc(eax)?;
        a.loop_(top)
    })
    .unwrap();
    assert_eq!((vcpu.reg(RAX), vcpu.reg(RCX)), (5, 0));
    // loop with ECX (67 e2): clears the upper half, and 0 counts down from 2^32.
    vcpu.set_reg(RCX, 0xf_0000_0001);
    run_bytes(&mut vcpu, &[0x67, 0xe2, 0x00]).unwrap();
    assert_eq!(vcpu.reg(RCX), 0);
    // loopne stops at ZF, loope without it; both count.
    for (code, zf, taken) in
        [(0xe0, true, false), (0xe0, false, true), (0xe1, true, true), (0xe1, false, false)]
    {
        vcpu.set_reg(RCX, 9);
        vcpu.set_reg(RAX, 0);
        vcpu.state.flags.set_zf(zf);
        run_bytes(&mut vcpu, &[code, 0x02, 0xff, 0xc0]).unwrap();
        assert_eq!((vcpu.reg(RCX), vcpu.reg(RAX) == 0), (8, taken), "{code:x} {zf}");
    }
    // jrcxz, jecxz
    vcpu.set_reg(RCX, 1 << 32);
    vcpu.set_reg(RAX, 0);
    run_bytes(&mut vcpu, &[0xe3, 0x02, 0xff, 0xc0, 0x67, 0xe3, 0x02, 0xff, 0xc0]).unwrap();
    assert_eq!(vcpu.reg(RAX), 1);
}

#[test]
fn the_stack_pointer_as_operand() {
    let mut vcpu = vcpu(Bits64);
    // PUSH RSP pushes the old value, POP RSP takes the popped one.
    run(&mut vcpu, |a| a.push(rsp)).unwrap();
    assert_eq!((peek(&vcpu, STACK - 8), vcpu.reg(RSP)), (STACK, STACK - 8));
    put(&vcpu, STACK - 8, 0x7000);
    run(&mut vcpu, |a| a.pop(rsp)).unwrap();
    assert_eq!(vcpu.reg(RSP), 0x7000);
    // POP [RSP+8] computes its address after the pop; PUSH [RSP] before the push.
    put(&vcpu, 0x7000, 0xabc);
    run(&mut vcpu, |a| a.pop(qword_ptr(rsp + 8))).unwrap();
    assert_eq!((peek(&vcpu, 0x7010), vcpu.reg(RSP)), (0xabc, 0x7008));
    put(&vcpu, 0x7008, 0xdef);
    run(&mut vcpu, |a| a.push(qword_ptr(rsp))).unwrap();
    assert_eq!((peek(&vcpu, 0x7000), vcpu.reg(RSP)), (0xdef, 0x7000));
    // A POP whose store faults leaves the stack pointer.
    vcpu.set_reg(RBX, DATA_END);
    let fault = run(&mut vcpu, |a| a.pop(qword_ptr(rbx))).unwrap_err();
    assert_eq!((fault.vector, vcpu.reg(RSP)), (vector::PF, 0x7000));
    // 16-bit pushes in 64-bit mode.
    run(&mut vcpu, |a| a.push(cx)).unwrap();
    assert_eq!(vcpu.reg(RSP), 0x6ffe);
    // A 16-bit stack wraps, and keeps the upper half of ESP.
    let mut vcpu = super::vcpu(Bits16);
    vcpu.set_reg(RSP, 0x5_0000);
    run(&mut vcpu, |a| a.push(sp)).unwrap();
    assert_eq!((vcpu.reg(RSP), peek(&vcpu, 0xfffe) & 0xffff), (0x5_fffe, 0));
}

#[test]
fn all_registers_at_once() {
    let mut vcpu = vcpu(Bits32);
    for n in 0..8 {
        vcpu.set_reg(n, 0x100 + u64::from(n));
    }
    vcpu.set_reg(RSP, STACK);
    run(&mut vcpu, |a| a.pushad()).unwrap();
    assert_eq!(vcpu.reg(RSP), STACK - 32);
    let slot = |n: u64| peek(&vcpu, STACK - 4 - n * 4) & 0xffff_ffff;
    assert_eq!((slot(0), slot(4), slot(5), slot(7)), (0x100, STACK, 0x105, 0x107));
    for n in (0..8).filter(|n| *n != RSP) {
        vcpu.set_reg(n, 0);
    }
    run(&mut vcpu, |a| a.popad()).unwrap();
    for n in (0..8).filter(|n| *n != RSP) {
        assert_eq!(vcpu.reg(n), 0x100 + u64::from(n));
    }
    assert_eq!(vcpu.reg(RSP), STACK);
}

#[test]
fn frames() {
    let mut vcpu = vcpu(Bits64);
    vcpu.set_reg(RBP, 0x7f00);
    run(&mut vcpu, |a| {
        a.enter(0x20, 0)?;
        a.mov(rax, rbp)?;
        a.mov(rdx, rsp)?;
        a.leave()
    })
    .unwrap();
    assert_eq!((vcpu.reg(RAX), vcpu.reg(RDX)), (STACK - 8, STACK - 0x28));
    assert_eq!((vcpu.reg(RBP), vcpu.reg(RSP)), (0x7f00, STACK));
    // Level 3 copies two frame pointers and appends its own.
    put(&vcpu, 0x7f00 - 8, 0x11);
    put(&vcpu, 0x7f00 - 16, 0x22);
    run(&mut vcpu, |a| a.enter(8, 3)).unwrap();
    assert_eq!((vcpu.reg(RBP), vcpu.reg(RSP)), (STACK - 8, STACK - 8 - 24 - 8));
    assert_eq!([8, 16, 24, 32].map(|n| peek(&vcpu, STACK - n)), [0x7f00, 0x11, 0x22, STACK - 8]);
    // A frame that ends where nothing is mapped faults and changes nothing.
    vcpu.set_reg(RSP, DATA_END + 0x1010);
    vcpu.set_reg(RBP, 1);
    let fault = run(&mut vcpu, |a| a.enter(0x100, 0)).unwrap_err();
    assert_eq!((fault.vector, vcpu.reg(RSP), vcpu.reg(RBP)), (vector::PF, DATA_END + 0x1010, 1));
}

#[test]
fn bounds() {
    let mut vcpu = vcpu(Bits32);
    vcpu.set_reg(RBX, DATA);
    put(&vcpu, DATA, 0x0000_0010_ffff_fffe);
    for (index, inside) in
        [(0u32, true), (16, true), (17, false), (u32::MAX - 1, true), (u32::MAX - 2, false)]
    {
        vcpu.set_reg(RAX, index.into());
        let result = run_bytes(&mut vcpu, &[0x62, 0x03]);
        assert_eq!(result.map_err(|f| f.vector), if inside { Ok(()) } else { Err(vector::BR) }, "{index:#x}");
    }
}

#[test]
fn hints_and_flag_bits_do_what_little_they_do() {
    let mut vcpu = vcpu(Bits64);
    vcpu.set_reg(RBX, DATA_END);
    vcpu.state.flags.set_bits(0);
    // endbr64; nop dword [rbx]; prefetcht0 [rbx]; rdsspq rcx; pause; lfence; mfence; sfence
    let code = [
        0xf3, 0x0f, 0x1e, 0xfa, 0x0f, 0x1f, 0x03, 0x0f, 0x18, 0x0b, 0xf3, 0x48, 0x0f, 0x1e, 0xc9, 0xf3, 0x90,
        0x0f, 0xae, 0xe8, 0x0f, 0xae, 0xf0, 0x0f, 0xae, 0xf8,
    ];
    run_bytes(&mut vcpu, &code).unwrap();
    assert_eq!(vcpu.reg(RCX), 0);
    // clflush [rbx] reads.
    assert_eq!(run_bytes(&mut vcpu, &[0x0f, 0xae, 0x3b]).unwrap_err().vector, vector::PF);
    run(&mut vcpu, |a| {
        a.stc()?;
        a.cmc()?;
        a.cmc()?;
        a.std()
    })
    .unwrap();
    assert_eq!(vcpu.state.flags.bits() & (CF | crate::flags::DF), CF | crate::flags::DF);
    run(&mut vcpu, |a| a.rdrand(rax)).unwrap();
    assert_eq!(vcpu.state.flags.bits() & ARITHMETIC, CF);
    let first = vcpu.reg(RAX);
    run(&mut vcpu, |a| a.rdseed(rax)).unwrap();
    assert_ne!(vcpu.reg(RAX), first);
}

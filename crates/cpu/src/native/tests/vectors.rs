//! Vector arithmetic against intrinsics and known results; exceptions of MXCSR.

use iced_x86::code_asm::*;

use super::*;
use crate::fault::vector;
use crate::flags;

fn floats(v: [f32; 4]) -> u128 {
    v.iter().rev().fold(0, |acc, f| acc << 32 | u128::from(f.to_bits()))
}

fn doubles(v: [f64; 2]) -> u128 {
    u128::from(v[0].to_bits()) | u128::from(v[1].to_bits()) << 64
}

#[test]
fn integer_and_float_arithmetic() {
    let mut v = vcpu();
    v.state.fpu.set_xmm(9, 0x0000_0001_ffff_ffff_8000_0000_0000_0005);
    v.state.fpu.set_xmm(2, 0x0000_0002_0000_0001_8000_0000_0000_0007);
    v.state.fpu.ymm[9][16..].fill(0xee);
    run(&mut v, |a| a.paddd(xmm9, xmm2)).unwrap();
    assert_eq!(v.state.fpu.xmm(9), 0x0000_0003_0000_0000_0000_0000_0000_000c);
    assert_eq!(v.state.fpu.ymm[9][16..], [0xee; 16], "legacy SSE keeps the upper half");
    run(&mut v, |a| a.vpaddd(xmm9, xmm9, xmm2)).unwrap();
    assert_eq!(v.state.fpu.xmm(9), 0x0000_0005_0000_0001_8000_0000_0000_0013);
    assert_eq!(v.state.fpu.ymm[9][16..], [0; 16], "VEX clears it");
    v.state.fpu.set_xmm(0, floats([1.0, 2.0, 3.0, 4.0]));
    v.write_bytes(DATA, &floats([0.5, 0.25, 2.0, -1.0]).to_le_bytes()).unwrap();
    run(&mut v, |a| a.mulps(xmm0, xmmword_ptr(DATA))).unwrap();
    assert_eq!(v.state.fpu.xmm(0), floats([0.5, 0.5, 6.0, -4.0]));
    assert_eq!(v.state.fpu.mxcsr, 0x1f80);
}

#[test]
fn general_registers_take_part_whatever_their_number() {
    let mut v = vcpu();
    for (n, register) in [(4, rsp), (7, rdi), (3, rbx), (12, r12), (0, rax)] {
        v.set_reg(n, 1000 + u64::from(n));
        run(&mut v, |a| a.cvtsi2sd(xmm3, register)).unwrap();
        assert_eq!(f64::from_bits(v.state.fpu.xmm(3) as u64), 1000.0 + f64::from(n));
        v.set_reg(n, u64::MAX);
        v.state.fpu.set_xmm(5, doubles([-2.0, 7.0]));
        run(&mut v, |a| a.cvttsd2si(register, xmm5)).unwrap();
        assert_eq!(v.reg(n), -2i64 as u64);
    }
    for (n, register) in [(4, esp), (15, r15d)] {
        v.set_reg(n, u64::MAX);
        v.state.fpu.ymm[1] = [0x80; 32];
        v.state.fpu.ymm[1][1] = 0;
        run(&mut v, |a| a.pmovmskb(register, xmm1)).unwrap();
        assert_eq!(v.reg(n), 0xfffd);
        run(&mut v, |a| a.vpmovmskb(register, ymm1)).unwrap();
        assert_eq!(v.reg(n), 0xffff_fffd);
    }
}

#[test]
fn comparisons_set_flags() {
    let mut v = vcpu();
    v.state.flags.set_arithmetic(flags::ARITHMETIC);
    v.state.fpu.set_xmm(0, doubles([1.0, 0.0]));
    v.state.fpu.set_xmm(1, doubles([2.0, 0.0]));
    run(&mut v, |a| a.ucomisd(xmm0, xmm1)).unwrap();
    assert_eq!(v.state.flags.arithmetic(), flags::CF);
    run(&mut v, |a| a.ucomisd(xmm1, xmm0)).unwrap();
    assert_eq!(v.state.flags.arithmetic(), 0);
    run(&mut v, |a| a.ptest(xmm0, xmm0)).unwrap();
    assert_eq!(v.state.flags.arithmetic(), flags::CF);
    // PCMPISTRI: index of the first byte of "needle set" in the string; the index goes to ECX.
    v.state.fpu.set_xmm(6, u128::from_le_bytes(*b"x\0aaaaaaaaaaaaaa"));
    v.write_bytes(DATA + 1, b"abcxyz\0.........").unwrap();
    v.set_reg(1, u64::MAX);
    run(&mut v, |a| a.pcmpistri(xmm6, xmmword_ptr(DATA + 1), 0)).unwrap();
    assert_eq!(v.reg(1), 3);
    assert_eq!(v.state.flags.arithmetic(), flags::CF | flags::ZF | flags::SF);
    v.set_reg(0, 1);
    v.set_reg(2, 3);
    run(&mut v, |a| a.pcmpestri(xmm6, xmmword_ptr(DATA + 1), 0)).unwrap();
    assert_eq!(v.reg(1), 16, "the length in EDX hides the match");
}

#[test]
fn alignment_is_demanded_where_the_manual_says() {
    let mut v = vcpu();
    let before = snapshot(&v);
    assert_eq!(fault_of(run(&mut v, |a| a.paddd(xmm0, xmmword_ptr(DATA + 1)))), Fault::gp(0));
    assert_eq!(fault_of(run(&mut v, |a| a.movaps(xmm0, xmmword_ptr(DATA + 8)))), Fault::gp(0));
    assert_eq!(fault_of(run(&mut v, |a| a.vmovdqa(ymm0, ymmword_ptr(DATA + 16)))), Fault::gp(0));
    assert_eq!(fault_of(run(&mut v, |a| a.vmovntps(ymmword_ptr(DATA + 16), ymm0))), Fault::gp(0));
    assert_eq!(fault_of(run(&mut v, |a| a.pxor(xmm0, xmmword_ptr(DATA + 8)))), Fault::gp(0));
    assert_eq!(snapshot(&v), before);
    run(&mut v, |a| {
        a.movups(xmm0, xmmword_ptr(DATA + 1))?;
        a.lddqu(xmm0, xmmword_ptr(DATA + 1))?;
        a.vpaddd(xmm0, xmm1, xmmword_ptr(DATA + 1))?;
        a.vpxor(ymm0, ymm1, ymmword_ptr(DATA + 1))?;
        a.addsd(xmm0, qword_ptr(DATA + 1))?;
        a.pmovzxbw(xmm0, qword_ptr(DATA + 1))
    })
    .unwrap();
}

#[test]
fn what_is_not_enabled_faults() {
    type Change = fn(&mut Vcpu);
    let cases: [(Change, u8, u8, u8); 6] = [
        // The change; the vector of PADDD, VPADDD and FADD, 0 for none.
        (|v| v.state.cr0 |= cr0::TS, vector::NM, vector::NM, vector::NM),
        (|v| v.state.cr0 |= cr0::EM, vector::UD, 0, vector::NM),
        (|v| v.state.cr4 &= !cr4::OSFXSR, vector::UD, 0, 0),
        (|v| v.state.cr4 &= !cr4::OSXSAVE, 0, vector::UD, 0),
        (|v| v.state.xcr0 = 3, 0, vector::UD, 0),
        (|v| v.state.cr0 &= !cr0::PE, 0, vector::UD, 0),
    ];
    for (n, (change, sse, avx, x87)) in cases.into_iter().enumerate() {
        let mut v = vcpu();
        change(&mut v);
        v.refresh_mode();
        let mut expect = |bytes: &[u8], vector: u8| match run_bytes(&mut v, bytes) {
            Ok(()) => assert_eq!(vector, 0, "case {n} {bytes:02x?}"),
            stop => assert_eq!(fault_of(stop).vector, vector, "case {n} {bytes:02x?}"),
        };
        expect(&[0x66, 0x0f, 0xfe, 0xc1], sse);
        expect(&[0x66, 0x0f, 0x6f, 0xc1], sse);
        expect(&[0xc5, 0xf1, 0xfe, 0xc1], avx);
        expect(&[0xc5, 0xf9, 0x6f, 0xc1], avx);
        expect(&[0xd8, 0xc1], x87);
    }
}

#[test]
fn mxcsr_flags_gather_and_control_bits_work() {
    let mut v = vcpu();
    v.state.fpu.set_xmm(0, doubles([1.0, 0.0]));
    v.state.fpu.set_xmm(1, doubles([3.0, 0.0]));
    run(&mut v, |a| a.divsd(xmm0, xmm1)).unwrap();
    assert_eq!(v.state.fpu.mxcsr, 0x1fa0, "inexact");
    let nearest = v.state.fpu.xmm(0) as u64;
    assert_eq!(nearest, (1.0f64 / 3.0).to_bits());
    // Flags of the host's own arithmetic do not show.
    v.state.fpu.mxcsr = 0x1f80;
    assert!((std::hint::black_box(1.0f64) / std::hint::black_box(3.0)) < 1.0);
    v.state.fpu.set_xmm(0, doubles([1.0, 0.0]));
    run(&mut v, |a| a.addsd(xmm0, xmm1)).unwrap();
    assert_eq!(v.state.fpu.mxcsr, 0x1f80);
    // Round up.
    v.write(DATA, 0x5f80u32).unwrap();
    v.state.fpu.set_xmm(0, doubles([1.0, 0.0]));
    run(&mut v, |a| {
        a.ldmxcsr(dword_ptr(DATA))?;
        a.divsd(xmm0, xmm1)?;
        a.stmxcsr(dword_ptr(DATA + 4))
    })
    .unwrap();
    assert_eq!(v.state.fpu.xmm(0) as u64, nearest + 1);
    assert_eq!(v.read::<u32>(DATA + 4).unwrap(), 0x5fa0);
    assert_eq!(super::super::arena::host_flags() & !0x3f, 0);
    let third = std::hint::black_box(1.0f64) / std::hint::black_box(3.0);
    assert_eq!(third.to_bits(), nearest, "the host rounds to nearest");
    v.write(DATA, 0x0001_1f80u32).unwrap();
    assert_eq!(fault_of(run(&mut v, |a| a.ldmxcsr(dword_ptr(DATA)))), Fault::gp(0));
}

#[test]
fn unmasked_exceptions_leave_the_destination_alone() {
    let mut v = vcpu();
    // Division by zero unmasked; inexact in another element must not be reported with it.
    v.state.fpu.mxcsr = 0x1f80 & !(1 << 9);
    v.state.fpu.set_xmm(0, doubles([1.0, 1.0]));
    v.state.fpu.set_xmm(1, doubles([0.0, 3.0]));
    let ymm = v.state.fpu.ymm;
    assert_eq!(fault_of(run(&mut v, |a| a.divpd(xmm0, xmm1))).vector, vector::XM);
    assert_eq!(v.state.fpu.ymm, ymm);
    assert_eq!(v.state.fpu.mxcsr & 0x3f, 4);
    v.state.cr4 &= !cr4::OSXMMEXCPT;
    assert_eq!(fault_of(run(&mut v, |a| a.divpd(xmm0, xmm1))).vector, vector::UD);
    // A comparison with an unmasked invalid operand keeps EFLAGS.
    v.state.cr4 |= cr4::OSXMMEXCPT;
    v.state.fpu.mxcsr = 0x1f00;
    v.state.fpu.set_xmm(1, doubles([f64::NAN, 0.0]));
    v.state.flags.set_arithmetic(flags::OF);
    assert_eq!(fault_of(run(&mut v, |a| a.comisd(xmm0, xmm1))).vector, vector::XM);
    assert_eq!(v.state.flags.arithmetic(), flags::OF);
}

#[test]
fn a_fault_at_a_page_end_changes_nothing() {
    let mut v = vcpu();
    v.set_reg(6, EDGE);
    Random(7).fill_vectors(&mut v);
    let before = snapshot(&v);
    assert_eq!(fault_of(run(&mut v, |a| a.vaddps(ymm0, ymm1, ymmword_ptr(rsi)))).vector, vector::GP);
    assert_eq!(fault_of(run(&mut v, |a| a.movups(xmmword_ptr(rsi), xmm1))).vector, vector::GP);
    assert_eq!(fault_of(run(&mut v, |a| a.vcvtps2ph(xmmword_ptr(rsi), ymm1, 0))).vector, vector::GP);
    assert_eq!(fault_of(run(&mut v, |a| a.vextracti128(xmmword_ptr(rsi), ymm1, 1))).vector, vector::GP);
    assert_eq!(snapshot(&v), before);
}

#[test]
fn crossing_a_page_works() {
    let mut v = vcpu();
    let at = DATA + 0x1000 - 5;
    let bytes: [u8; 32] = std::array::from_fn(|n| n as u8);
    v.write_bytes(at, &bytes).unwrap();
    v.set_reg(6, at);
    run(&mut v, |a| {
        a.vmovdqu(ymm1, ymmword_ptr(rsi))?;
        a.vpaddb(ymm2, ymm1, ymmword_ptr(rsi))?;
        a.vmovdqu(ymmword_ptr(rsi), ymm2)
    })
    .unwrap();
    assert_eq!(v.state.fpu.ymm[1], bytes);
    let mut seen = [0; 32];
    v.read_bytes(at, &mut seen).unwrap();
    assert_eq!(seen, bytes.map(|b| b * 2));
}

#[test]
fn alignment_checks_of_user_code() {
    let mut v = vcpu();
    v.state.cpl = 3;
    v.state.cr0 |= cr0::AM;
    v.set_rflags(flags::AC, flags::AC);
    v.refresh_mode();
    assert_eq!(fault_of(run(&mut v, |a| a.fld(qword_ptr(DATA + 4)))).vector, vector::AC);
    assert_eq!(fault_of(run(&mut v, |a| a.fst(dword_ptr(DATA + 2)))).vector, vector::AC);
    assert_eq!(fault_of(run(&mut v, |a| a.addsd(xmm0, qword_ptr(DATA + 4)))).vector, vector::AC);
    assert_eq!(fault_of(run(&mut v, |a| a.movq(qword_ptr(DATA + 4), xmm0))).vector, vector::AC);
    run(&mut v, |a| {
        a.fld(qword_ptr(DATA + 8))?;
        a.addsd(xmm0, qword_ptr(DATA + 8))
    })
    .unwrap();
}

//! x87, its environment, FXSAVE and the XSAVE family.

use iced_x86::code_asm::*;

use super::*;
use crate::fault::vector;
use crate::flags;

fn float80(v: &Vcpu, n: usize) -> (u16, u64) {
    let bytes = v.state.fpu.st(n);
    (u16::from_le_bytes([bytes[8], bytes[9]]), u64::from_le_bytes(bytes[..8].try_into().unwrap()))
}

#[test]
fn the_stack_pushes_computes_and_pops() {
    let mut v = vcpu();
    v.write(DATA, 2.5f64.to_bits()).unwrap();
    v.write(DATA + 8, 4u32).unwrap();
    run(&mut v, |a| {
        a.fninit()?;
        a.fld(qword_ptr(DATA))?;
        a.fild(dword_ptr(DATA + 8))?;
        a.fmulp(st1, st0)?;
        a.fst(qword_ptr(DATA + 16))?;
        a.fistp(word_ptr(DATA + 24))?;
        a.fnstsw(ax)
    })
    .unwrap();
    assert_eq!(f64::from_bits(v.read(DATA + 16).unwrap()), 10.0);
    assert_eq!(v.read::<u16>(DATA + 24).unwrap(), 10);
    assert_eq!(v.state.fpu.tags(), 0);
    assert_eq!(v.get::<u16>(0), 0);
    run(&mut v, |a| {
        a.fldpi()?;
        a.fstp(tword_ptr(DATA))
    })
    .unwrap();
    assert_eq!(v.read::<u64>(DATA).unwrap(), 0xc90f_daa2_2168_c235);
    assert_eq!(v.read::<u16>(DATA + 8).unwrap(), 0x4000);
    // FISTTP truncates.
    v.write(DATA, (-2.75f64).to_bits()).unwrap();
    run(&mut v, |a| {
        a.fld(qword_ptr(DATA))?;
        a.fisttp(dword_ptr(DATA))
    })
    .unwrap();
    assert_eq!(v.read::<u32>(DATA).unwrap() as i32, -2);
}

#[test]
fn comparisons_and_conditional_moves_use_flags() {
    let mut v = vcpu();
    run(&mut v, |a| {
        a.fld1()?;
        a.fldz()?;
        a.fucomip(st0, st1)
    })
    .unwrap();
    assert_eq!(v.state.flags.arithmetic(), flags::CF);
    run(&mut v, |a| {
        a.fldz()?;
        a.fcmovb(st0, st1)
    })
    .unwrap();
    assert_eq!(float80(&v, 0), (0x3fff, 1 << 63), "below: moved");
    v.state.flags.set_arithmetic(0);
    run(&mut v, |a| {
        a.fldz()?;
        a.fcmovb(st0, st1)
    })
    .unwrap();
    assert_eq!(float80(&v, 0), (0, 0), "not below: stays");
}

#[test]
fn an_unmasked_exception_waits_for_the_next_waiting_instruction() {
    let mut v = vcpu();
    v.write(DATA, 0x037bu16).unwrap();
    run(&mut v, |a| {
        a.fldcw(word_ptr(DATA))?;
        a.fld1()?;
        a.fldz()?;
        a.fdivp(st1, st0)
    })
    .unwrap();
    assert_eq!(v.state.fpu.fsw() & 0x8084, 0x8084, "ES, B and ZE");
    let before = snapshot(&v);
    assert_eq!(fault_of(run(&mut v, |a| a.fld1())).vector, vector::MF);
    assert_eq!(fault_of(run(&mut v, |a| a.wait())).vector, vector::MF);
    assert_eq!(fault_of(run(&mut v, |a| a.paddb(mm0, mm1))).vector, vector::MF);
    assert_eq!(snapshot(&v), before);
    run(&mut v, |a| {
        a.fnstsw(word_ptr(DATA))?;
        a.fnclex()?;
        a.wait()?;
        a.fld1()
    })
    .unwrap();
    assert_eq!(v.state.fpu.fsw() & 0x80ff, 0);
    // The host's x87 unit is as it was.
    run(&mut v, |a| a.fldpi()).unwrap();
}

#[test]
fn an_unmasked_invalid_store_leaves_memory_alone() {
    let mut v = vcpu();
    v.write(DATA, 0x037eu16).unwrap();
    v.write(DATA + 8, 0x1111u16).unwrap();
    v.write(DATA + 16, 1e10f64.to_bits()).unwrap();
    run(&mut v, |a| {
        a.fldcw(word_ptr(DATA))?;
        a.fld(qword_ptr(DATA + 16))?;
        a.fistp(word_ptr(DATA + 8))
    })
    .unwrap();
    assert_eq!(v.read::<u16>(DATA + 8).unwrap(), 0x1111);
    assert_eq!(v.state.fpu.tags().count_ones(), 1, "not popped");
    assert_eq!(v.state.fpu.fsw() & 0x81, 0x81);
}

#[test]
fn mmx_shares_the_registers() {
    let mut v = vcpu();
    v.set_reg(0, 0x0102_0304_0506_0709);
    run(&mut v, |a| {
        a.movq(mm3, rax)?;
        a.paddb(mm3, mm3)?;
        a.movq(qword_ptr(DATA), mm3)?;
        a.movq2dq(xmm4, mm3)?;
        a.cvtpi2ps(xmm5, mm3)
    })
    .unwrap();
    assert_eq!(v.read::<u64>(DATA).unwrap(), 0x0204_0608_0a0c_0e12);
    assert_eq!(v.state.fpu.xmm(4), 0x0204_0608_0a0c_0e12);
    assert_eq!(f32::from_bits(v.state.fpu.xmm(5) as u32), 0x0a0c_0e12u32 as f32);
    assert_eq!(v.state.fpu.mxcsr & 0x20, 0x20, "the conversion was inexact");
    assert_eq!(v.state.fpu.tags(), 0xff);
    v.set_reg(7, DATA);
    v.set_reg(1, 0x80_0000_0000_0080);
    run(&mut v, |a| {
        a.movq(mm1, rcx)?;
        a.pxor(mm2, mm2)?;
        a.maskmovq(mm2, mm1)
    })
    .unwrap();
    assert_eq!(v.read::<u64>(DATA).unwrap(), 0x0200_0608_0a0c_0e00);
    run(&mut v, |a| a.emms()).unwrap();
    assert_eq!(v.state.fpu.tags(), 0);
}

#[test]
fn the_environment_survives_saving_and_restoring() {
    let mut v = vcpu();
    run(&mut v, |a| {
        a.fninit()?;
        a.fldz()?;
        a.fldpi()?;
        a.fld1()?;
        a.fnstenv(ptr(DATA))
    })
    .unwrap();
    let word = |v: &mut Vcpu, n: u64| v.read::<u32>(DATA + n * 4).unwrap();
    assert_eq!(word(&mut v, 0), 0xffff_037f);
    assert_eq!(word(&mut v, 1), 0xffff_2800);
    // Physical registers 7 zero, 6 and 5 valid, the others empty.
    assert_eq!(word(&mut v, 2), 0xffff_0000 | 0b01_00_00_11_11_11_11_11);
    let saved = v.state.fpu.clone();
    run(&mut v, |a| {
        a.fnsave(ptr(DATA + 0x100))?;
        a.fld1()?;
        a.fnop()
    })
    .unwrap();
    assert_eq!(v.state.fpu.tags(), 0x80);
    run(&mut v, |a| a.frstor(ptr(DATA + 0x100))).unwrap();
    assert_eq!(v.state.fpu.tags(), saved.tags());
    assert_eq!(v.state.fpu.fsw(), saved.fsw());
    for n in 0..8 {
        assert_eq!(v.state.fpu.st(n), saved.st(n), "ST{n}");
    }
    // FLDENV with another top turns the stack, not the registers.
    v.write(DATA + 4, 0xffff_3000u32).unwrap();
    run(&mut v, |a| a.fldenv(ptr(DATA))).unwrap();
    assert_eq!(v.state.fpu.top(), 6);
    assert_eq!(v.state.fpu.st(0), saved.st(1));
    assert_eq!(v.state.fpu.st(7), saved.st(0));
}

#[test]
fn fxsave_and_fxrstor_round_trip() {
    let mut v = vcpu();
    Random(3).fill_vectors(&mut v);
    run(&mut v, |a| a.fldpi()).unwrap();
    v.state.fpu.mxcsr = 0x1fa1;
    let saved = v.state.fpu.clone();
    v.write_bytes(DATA + 464, &[0x77; 48]).unwrap();
    run(&mut v, |a| a.fxsave64(ptr(DATA))).unwrap();
    assert_eq!(v.read::<u32>(DATA + 24).unwrap(), 0x1fa1);
    assert_eq!(v.read::<u8>(DATA + 464).unwrap(), 0x77);
    v.state.fpu = Default::default();
    run(&mut v, |a| a.fxrstor64(ptr(DATA))).unwrap();
    for n in 0..16 {
        assert_eq!(v.state.fpu.xmm(n), saved.xmm(n));
        assert_eq!(v.state.fpu.ymm[usize::from(n)][16..], [0; 16]);
    }
    assert_eq!((v.state.fpu.mxcsr, v.state.fpu.st(0), v.state.fpu.tags()), (0x1fa1, saved.st(0), 0x80));
    assert_eq!((v.state.fpu.fip, v.state.fpu.fdp), (saved.fip, saved.fdp));
    assert_eq!(fault_of(run(&mut v, |a| a.fxsave64(ptr(DATA + 8)))), Fault::gp(0));
    v.write(DATA + 24, 0x8000_0000u32).unwrap();
    let before = snapshot(&v);
    assert_eq!(fault_of(run(&mut v, |a| a.fxrstor(ptr(DATA)))), Fault::gp(0));
    assert_eq!(snapshot(&v), before);
}

#[test]
fn xsave_and_xrstor_round_trip_in_both_formats() {
    for compacted in [false, true] {
        let mut v = vcpu();
        v.state.xcr0 = component::ALL;
        v.state.pkru = 0x5555_0004;
        Random(4).fill_vectors(&mut v);
        run(&mut v, |a| a.fld1()).unwrap();
        let saved = v.state.fpu.clone();
        v.set_reg(0, 0xffff_ffff);
        v.set_reg(2, 0xffff_ffff);
        run(&mut v, |a| if compacted { a.xsavec64(ptr(DATA)) } else { a.xsave64(ptr(DATA)) }).unwrap();
        assert_eq!(v.read::<u64>(DATA + 512).unwrap(), component::ALL);
        let format = if compacted { 1 << 63 | component::ALL } else { 0 };
        assert_eq!(v.read::<u64>(DATA + 520).unwrap(), format);
        assert_eq!(v.read::<u32>(DATA + 832).unwrap(), 0x5555_0004);
        v.state.fpu = Default::default();
        v.state.pkru = 0;
        run(&mut v, |a| a.xrstor64(ptr(DATA))).unwrap();
        assert_eq!(v.state.fpu.ymm, saved.ymm);
        assert_eq!(v.state.fpu.st(0), saved.st(0));
        assert_eq!(v.state.pkru, 0x5555_0004);
        // Only AVX: the rest stays.
        v.set_reg(0, component::AVX);
        v.set_reg(2, 0);
        v.write(DATA + 512, component::X87 | component::SSE).unwrap();
        run(&mut v, |a| a.xrstor64(ptr(DATA))).unwrap();
        assert!(
            v.state.fpu.ymm.iter().zip(&saved.ymm).all(|(a, b)| a[..16] == b[..16] && a[16..] == [0; 16])
        );
        assert_eq!(v.state.fpu.st(0), saved.st(0));
    }
}

#[test]
fn xsavec_and_xsaveopt_leave_out_what_is_initial() {
    let mut v = vcpu();
    v.set_reg(0, 7);
    v.write_bytes(DATA, &[0x77; 840]).unwrap();
    assert_eq!(v.xinuse(), 0);
    v.state.fpu.ymm[3][20] = 1;
    assert_eq!(v.xinuse(), component::AVX);
    run(&mut v, |a| a.xsavec(ptr(DATA))).unwrap();
    assert_eq!(v.read::<u64>(DATA + 512).unwrap(), component::AVX);
    assert_eq!(v.read::<u64>(DATA + 520).unwrap(), 1 << 63 | 7);
    assert_eq!(v.read::<u8>(DATA).unwrap(), 0x77);
    assert_eq!(v.read::<u8>(DATA + 160).unwrap(), 0x77);
    assert_eq!(v.read::<u8>(DATA + 576 + 3 * 16 + 4).unwrap(), 1);
    // XSAVEOPT keeps bits of components not asked for.
    v.write(DATA + 512, component::X87 | component::SSE | component::AVX).unwrap();
    v.set_reg(0, 6);
    run(&mut v, |a| a.xsaveopt(ptr(DATA))).unwrap();
    assert_eq!(v.read::<u64>(DATA + 512).unwrap(), component::X87 | component::AVX);
}

#[test]
fn bad_xsave_areas_are_refused() {
    let mut v = vcpu();
    v.set_reg(0, 7);
    v.state.fpu.ymm[1] = [9; 32];
    let before = snapshot(&v);
    let bad: [(u64, u64); 6] =
        [(512, 1 << 5), (520, 1), (528, 1), (520, 1 << 63 | 1 << 5), (24, 1 << 30), (520, 1 << 63 | 2)];
    for (n, (at, value)) in bad.into_iter().enumerate() {
        v.write_bytes(DATA, &[0; 640]).unwrap();
        v.write(DATA + 512, 7u64).unwrap();
        v.write(DATA + at, value).unwrap();
        assert_eq!(fault_of(run(&mut v, |a| a.xrstor(ptr(DATA)))), Fault::gp(0), "case {n}");
    }
    assert_eq!(fault_of(run(&mut v, |a| a.xrstor(ptr(DATA + 32)))), Fault::gp(0));
    assert_eq!(fault_of(run(&mut v, |a| a.xsave(ptr(DATA + 32)))), Fault::gp(0));
    v.state.cr4 &= !cr4::OSXSAVE;
    assert_eq!(fault_of(run(&mut v, |a| a.xsave(ptr(DATA)))).vector, vector::UD);
    v.state.cr4 |= cr4::OSXSAVE;
    assert_eq!(snapshot(&v), before);
}

//! Native instructions inside the interpreter's loop, and in modes other than 64-bit.

use iced_x86::code_asm::*;

use super::super::Native;
use super::*;
use crate::fault::vector;
use crate::{Interpreter, Outcome};

/// Where the code of these tests lies.
const CODE: u64 = 0x1_0000;

/// Runs code in guest RAM until it ends with UD2 (there is no IDT: a triple fault).
fn run_engine(vcpu: &mut Vcpu, f: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) {
    let mut a = CodeAssembler::new(64).unwrap();
    f(&mut a).unwrap();
    a.ud2().unwrap();
    let bytes = a.assemble(CODE).unwrap();
    for (n, page) in bytes.chunks(0x1000).enumerate() {
        vcpu.write_bytes(CODE + n as u64 * 0x1000, page).unwrap();
    }
    vcpu.state.set_rip(CODE);
    assert_eq!(Interpreter::new().run(vcpu), Outcome::TripleFault);
}

#[test]
fn a_loop_of_vector_instructions_runs() {
    let mut v = vcpu();
    v.state.fpu.set_xmm(1, 3u128 << 64 | 1);
    v.state.fpu.set_xmm(2, u128::from(1f64.to_bits()));
    v.state.fpu.set_xmm(3, u128::from(3f64.to_bits()));
    run_engine(&mut v, |a| {
        let mut again = a.create_label();
        a.mov(ecx, 1000)?;
        a.set_label(&mut again)?;
        a.paddq(xmm0, xmm1)?;
        a.divsd(xmm2, xmm3)?;
        a.dec(ecx)?;
        a.jne(again)
    });
    assert_eq!(v.state.fpu.xmm(0), 3000u128 << 64 | 1000);
    assert_eq!(
        v.state.fpu.mxcsr,
        0x1f80 | 0x32,
        "inexact, underflow, denormal: up to date when the engine returns"
    );
}

#[test]
fn a_full_arena_is_given_up_and_filled_again() {
    let mut v = vcpu();
    v.native = Native::with_size(128 << 10).unwrap();
    v.state.fpu.set_xmm(1, 1);
    // A long run of distinct instructions, twice, so that the second time meets code forgotten since.
    run_engine(&mut v, |a| {
        let mut again = a.create_label();
        a.mov(ecx, 2)?;
        a.set_label(&mut again)?;
        for n in 0..4000u32 {
            let from = get_xmm(iced_x86::Register::XMM0 + 2 + n % 13).unwrap();
            a.psrldq(from, n / 13 % 256)?;
            a.paddd(xmm0, xmm1)?;
        }
        a.dec(ecx)?;
        a.jne(again)
    });
    assert_eq!(v.state.fpu.xmm(0), 8000);
    assert!(v.native.stub_count() < 4000, "{} stubs left", v.native.stub_count());
}

/// A vCPU in a 32-bit protected mode with flat segments.
fn vcpu32() -> Vcpu {
    let mut v = vcpu();
    v.state.efer = 0;
    for segment in &mut v.state.segments {
        segment.limit = u32::MAX;
        segment.attributes |= Segment::DEFAULT_BIG | Segment::GRANULARITY;
    }
    v.state.segments[usize::from(seg::CS)].attributes &= !Segment::LONG;
    v.refresh();
    assert_eq!(v.state.code_mode, CodeMode::Bits32);
    v
}

#[test]
fn protected_mode_has_eight_registers_and_segments() {
    let mut v = vcpu32();
    Random(11).fill_vectors(&mut v);
    let before = v.state.fpu.ymm;
    v.write_bytes(DATA, &[0x55; 512]).unwrap();
    v.set_reg(6, DATA - 0x100);
    v.state.seg_base[usize::from(seg::DS)] = 0x100;
    v.state.segments[usize::from(seg::DS)].limit = DATA as u32;
    run(&mut v, |a| {
        a.fxsave(ptr(esi))?;
        a.vzeroall()?;
        a.fxrstor(ptr(esi))
    })
    .unwrap_err();
    v.state.segments[usize::from(seg::DS)].limit = u32::MAX;
    run(&mut v, |a| {
        a.fxsave(ptr(esi))?;
        a.vzeroall()?;
        a.movd(xmm0, esi)?;
        a.movd(edi, xmm0)?;
        a.fxrstor(ptr(esi))
    })
    .unwrap();
    assert_eq!(v.reg(7), DATA - 0x100);
    assert_eq!(v.read::<u8>(DATA + 160 + 128).unwrap(), 0x55, "XMM8 is not stored");
    for (now, before) in v.state.fpu.ymm.iter().zip(before).take(8) {
        assert_eq!(now[..16], before[..16]);
        assert_eq!(now[16..], [0; 16]);
    }
    assert_eq!(v.state.fpu.ymm[8..], before[8..]);
    // A limit inside the operand.
    v.state.segments[usize::from(seg::DS)].limit = DATA as u32;
    v.set_reg(6, DATA - 8);
    assert_eq!(fault_of(run(&mut v, |a| a.movups(xmm0, xmmword_ptr(esi)))), Fault::gp(0));
    assert_eq!(fault_of(run(&mut v, |a| a.paddd(xmm0, xmmword_ptr(esi)))), Fault::gp(0));
    v.state.segments[usize::from(seg::SS)].limit = 8;
    assert_eq!(fault_of(run(&mut v, |a| a.movups(xmmword_ptr(esp), xmm0))).vector, vector::SS);
}

#[test]
fn real_mode_has_sse_and_x87_but_no_vex() {
    let mut v = vcpu();
    v.state.efer = 0;
    v.state.cr0 &= !cr0::PE;
    v.refresh();
    assert_eq!(v.state.code_mode, CodeMode::Bits16);
    v.state.seg_base[usize::from(seg::DS)] = DATA;
    v.state.fpu.set_xmm(1, 21);
    run(&mut v, |a| a.paddd(xmm1, xmm1)).unwrap();
    assert_eq!(v.state.fpu.xmm(1), 42);
    assert_eq!(fault_of(run_bytes(&mut v, &[0xc5, 0xf1, 0xfe, 0xc1])).vector, vector::UD);
    // FLDPI at 0x1_2345; FNSTENV stores its address in the pieces of real mode.
    run(&mut v, |a| a.fldpi()).unwrap();
    v.state.fpu.fip = 0x1_2345;
    v.state.fpu.fdp = 0xf_4321;
    v.set_reg(6, 0x10);
    run(&mut v, |a| a.fnstenv(ptr(si))).unwrap();
    let word = |v: &mut Vcpu, n: u64| v.read::<u16>(DATA + 0x10 + n * 2).unwrap();
    assert_eq!(word(&mut v, 0), 0x037f);
    assert_eq!(word(&mut v, 1), 0x3800);
    assert_eq!(word(&mut v, 2), 0x3fff);
    assert_eq!((word(&mut v, 3), word(&mut v, 4) & 0xf000), (0x2345, 0x1000));
    assert_eq!((word(&mut v, 5), word(&mut v, 6)), (0x4321, 0xf000));
    v.state.fpu.init_x87();
    run(&mut v, |a| a.fldenv(ptr(si))).unwrap();
    assert_eq!((v.state.fpu.fip, v.state.fpu.fdp, v.state.fpu.top()), (0x1_2345, 0xf_4321, 7));
}

#[test]
fn what_the_system_enables_works_at_once() {
    let mut v = vcpu();
    v.state.cr0 |= cr0::TS;
    v.refresh_mode();
    v.state.fpu.set_xmm(1, 21);
    assert_eq!(fault_of(run(&mut v, |a| a.paddd(xmm1, xmm1))).vector, vector::NM);
    run_engine(&mut v, |a| {
        a.clts()?;
        a.paddd(xmm1, xmm1)?;
        a.mov(ecx, 1)?;
        a.xgetbv()
    });
    assert_eq!(v.state.fpu.xmm(1), 42);
    assert_eq!(v.reg(0), component::SSE, "XGETBV of 1 tells what is in use");
}

//! Arithmetic, shifts, multiplication, bits, exchanges and moves.

use iced_x86::code_asm::*;

use super::{DATA, DATA_END, peek, put, run, run_bytes, vcpu};
use crate::Vcpu;
use crate::fault::vector;
use crate::flags::{AF, ARITHMETIC, CF, OF, PF, SF, ZF};
use crate::state::CodeMode::{Bits16, Bits32, Bits64};
use crate::state::reg::*;

/// An instruction as bytes, on RAX and RCX and with flags before; RAX and flags (under a mask) after.
struct Case {
    code: &'static [u8],
    rax: u64,
    rcx: u64,
    before: u64,
    result: u64,
    defined: u64,
    after: u64,
}

const fn case(code: &'static [u8], a: u64, c: u64, before: u64, result: u64, after: u64) -> Case {
    some(code, a, c, before, result, ARITHMETIC, after)
}

/// As [`case`], where only the flags in `defined` are defined.
const fn some(
    code: &'static [u8],
    a: u64,
    c: u64,
    before: u64,
    result: u64,
    defined: u64,
    after: u64,
) -> Case {
    Case { code, rax: a, rcx: c, before, result, defined, after }
}

fn check(cases: &[Case]) {
    for c in cases {
        let mut vcpu = vcpu(Bits64);
        vcpu.set_reg(RAX, c.rax);
        vcpu.set_reg(RCX, c.rcx);
        vcpu.state.flags.set_bits(c.before);
        run_bytes(&mut vcpu, c.code).unwrap();
        let flags = vcpu.state.flags.bits() & c.defined;
        assert_eq!(
            (vcpu.reg(RAX), flags),
            (c.result, c.after),
            "{:x?} on {:#x}, {:#x}: {:#x} flags {flags:#x}, expected {:#x} flags {:#x}",
            c.code,
            c.rax,
            c.rcx,
            vcpu.reg(RAX),
            c.result,
            c.after
        );
    }
}

#[test]
fn addition_subtraction_and_logic_set_all_flags() {
    check(&[
        // add al, cl: only the low byte changes.
        case(&[0x00, 0xc8], 0x11ff, 0x01, 0, 0x1100, CF | ZF | AF | PF),
        // add eax, ecx: clears the upper half.
        case(&[0x01, 0xc8], 0xffff_ffff_7fff_ffff, 1, 0, 0x8000_0000, OF | SF | AF | PF),
        // adc rax, rcx with carry in and out.
        case(&[0x48, 0x11, 0xc8], u64::MAX, 0, CF, 0, CF | ZF | AF | PF),
        // sbb rax, rax spreads the carry.
        case(&[0x48, 0x19, 0xc0], 5, 0, CF, u64::MAX, CF | SF | AF | PF),
        // sub ah, 1
        case(&[0x80, 0xec, 0x01], 0x0012, 0, 0, 0xff12, CF | SF | AF | PF),
        // cmp ax, cx leaves ax.
        case(&[0x66, 0x39, 0xc8], 0x8000, 1, 0, 0x8000, OF | AF | PF),
        // and, or, xor clear CF and OF.
        case(&[0x48, 0x21, 0xc8], 0xf0f0, 0x0f0f, CF | OF, 0, ZF | PF),
        case(&[0x09, 0xc8], 0x8000_0000, 1, CF | OF, 0x8000_0001, SF),
        case(&[0x48, 0x31, 0xc0], 7, 0, CF, 0, ZF | PF),
        // test eax, imm32
        case(&[0xa9, 0, 0, 0, 0x80], 0x8000_0000, 0, 0, 0x8000_0000, SF | PF),
        // inc and dec keep CF.
        case(&[0xff, 0xc0], 0x7fff_ffff, 0, CF, 0x8000_0000, CF | OF | SF | AF | PF),
        case(&[0x48, 0xff, 0xc8], 0, 0, 0, u64::MAX, SF | AF | PF),
        // neg: CF unless zero; OF for the least.
        case(&[0xf7, 0xd8], 0x8000_0000, 0, 0, 0x8000_0000, CF | OF | SF | PF),
        case(&[0xf6, 0xd8], 0, 0, CF, 0, ZF | PF),
        // not keeps all flags.
        case(&[0x48, 0xf7, 0xd0], 0, 0, CF | ZF, u64::MAX, CF | ZF),
        // adcx eax, ecx and adox rax, rcx change one flag each.
        case(&[0x66, 0x0f, 0x38, 0xf6, 0xc1], 0xffff_ffff, 0, CF | OF | ZF, 0, CF | OF | ZF),
        case(&[0xf3, 0x48, 0x0f, 0x38, 0xf6, 0xc1], 1, 1, OF | CF, 3, CF),
    ]);
}

#[test]
fn shift_and_rotate_counts_are_masked_and_flags_exact() {
    const NOAF: u64 = ARITHMETIC & !AF;
    const NOAF_NOOF: u64 = NOAF & !OF;
    check(&[
        // shl eax, cl with 32: nothing but the upper half, which is cleared.
        case(&[0xd3, 0xe0], 0xf_0000_0005, 32, CF | OF, 5, CF | OF),
        // shl rax, cl with 64 and 65.
        case(&[0x48, 0xd3, 0xe0], 5, 64, CF, 5, CF),
        some(&[0x48, 0xd3, 0xe0], 1 << 63, 65, 0, 0, NOAF, CF | OF | ZF | PF),
        // shl al, 8: the last bit out is bit 0. shl al, 9: zero.
        some(&[0xc0, 0xe0, 8], 0x9b, 0, 0, 0, NOAF_NOOF, CF | ZF | PF),
        some(&[0xc0, 0xe0, 9], 0x9b, 0, CF, 0, NOAF_NOOF, ZF | PF),
        // shr ax, 1: OF is the old sign.
        some(&[0x66, 0xd1, 0xe8], 0x8001, 0, 0, 0x4000, NOAF, CF | OF | PF),
        // sar al, 31
        some(&[0xc0, 0xf8, 31], 0x80, 0, 0, 0xff, NOAF_NOOF, CF | SF | PF),
        some(&[0x48, 0xd1, 0xf8], (-3i64) as u64, 0, OF, (-2i64) as u64, NOAF, CF | SF),
        // rol al, 8 changes CF (to bit 0) though not al; rol keeps SF, ZF, AF, PF.
        some(&[0xc0, 0xc0, 8], 0x9b, 0, ZF | AF, 0x9b, ARITHMETIC & !OF, CF | ZF | AF),
        case(&[0xd1, 0xc0], 0x8000_0000, 0, ZF | PF | SF | AF, 1, CF | OF | ZF | PF | SF | AF),
        // ror ax, 1
        case(&[0x66, 0xd1, 0xc8], 0x0001, 0, 0, 0x8000, CF | OF),
        // rcl al by 1, 9 (nothing), 10 and 31, CF set before: the values processors give.
        case(&[0xd0, 0xd0], 0x9a, 0, CF, 0x35, CF | OF),
        some(&[0xd2, 0xd0], 0x9a, 9, CF, 0x9a, ARITHMETIC & !OF, CF),
        some(&[0xd2, 0xd0], 0x9a, 10, CF, 0x35, ARITHMETIC & !OF, CF),
        some(&[0xd2, 0xd0], 0x9a, 31, CF, 0xac, ARITHMETIC & !OF, CF),
        // rcr al by 1, 8 and 17.
        case(&[0xd0, 0xd8], 0x9a, 0, CF, 0xcd, 0),
        some(&[0xd2, 0xd8], 0x9a, 8, CF, 0x35, ARITHMETIC & !OF, CF),
        some(&[0xd2, 0xd8], 0x9a, 17, CF, 0x35, ARITHMETIC & !OF, CF),
        // rcl rax, 1 and rcr rax, 63: 65-bit rotates.
        case(&[0x48, 0xd1, 0xd0], 1 << 63, 0, 0, 0, CF | OF),
        some(&[0x48, 0xc1, 0xd8, 63], 1 << 62, 0, CF, 0b10, ARITHMETIC & !OF, CF),
        // shld eax, ecx, 4; shrd rax, rcx, cl
        some(&[0x0f, 0xa4, 0xc8, 4], 0x1234_5678, 0x9abc_def0, 0, 0x2345_6789, NOAF_NOOF, CF),
        some(&[0x48, 0x0f, 0xad, 0xc8], 0x10, 4, 0, 0x4000_0000_0000_0001, NOAF_NOOF, 0),
        // shld ax, cx, 1: OF when the sign changes.
        some(&[0x66, 0x0f, 0xa4, 0xc8, 1], 0x4000, 0x8000, 0, 0x8001, NOAF, OF | SF),
        // shld ax, cx, 20: past the operand's size, undefined; this is one of the answers.
        some(&[0x66, 0x0f, 0xa4, 0xc8, 20], 0x9a35, 0x1234, 0, 0x2341, 0, 0),
        // shld with a count of 0 clears the upper half only.
        case(&[0x0f, 0xa4, 0xc8, 32], 0x1_0000_0002, 3, CF, 2, CF),
        // shlx eax, ecx, eax; rorx rax, rcx, 4; sarx eax, ecx, eax keep flags.
        case(&[0xc4, 0xe2, 0x79, 0xf7, 0xc1], 33, 3, CF, 6, CF),
        case(&[0xc4, 0xe3, 0xfb, 0xf0, 0xc1, 4], 0, 0x1f, CF, 0xf000_0000_0000_0001, CF),
        case(&[0xc4, 0xe2, 0x7a, 0xf7, 0xc1], 4, 0x8000_0000, 0, 0xf800_0000, 0),
    ]);
}

#[test]
fn multiplication_flags_say_whether_the_product_fits() {
    const D: u64 = CF | OF;
    check(&[
        // mul cl: ax = al * cl
        some(&[0xf6, 0xe1], 0x80, 2, 0, 0x100, D, D),
        some(&[0xf6, 0xe1], 0x7f, 2, D, 0xfe, D, 0),
        // imul cl
        some(&[0xf6, 0xe9], 0x80, 0xff, 0, 0x0080, D, D),
        some(&[0xf6, 0xe9], 0xff, 0xff, D, 0x0001, D, 0),
        // imul eax, ecx
        some(&[0x0f, 0xaf, 0xc1], 0x8000_0000, 0xffff_ffff, 0, 0x8000_0000, D, D),
        some(&[0x0f, 0xaf, 0xc1], 0xffff_fffe, 3, D, 0xffff_fffa, D, 0),
        // imul rax, rcx, -2
        some(&[0x48, 0x6b, 0xc1, 0xfe], 0, 1 << 62, 0, 1 << 63, D, 0),
        some(&[0x48, 0x6b, 0xc1, 0xfe], 0, 1 << 63, 0, 0, D, D),
        // imul ax, cx, 0x100
        some(&[0x66, 0x69, 0xc1, 0, 1], 0xffff_0000, 0x123, 0, 0xffff_2300, D, D),
    ]);
    let mut vcpu = vcpu(Bits64);
    vcpu.set_reg(RAX, u64::MAX);
    vcpu.set_reg(RDX, u64::MAX);
    run(&mut vcpu, |a| a.mul(rdx)).unwrap();
    assert_eq!((vcpu.reg(RAX), vcpu.reg(RDX)), (1, u64::MAX - 1));
    run(&mut vcpu, |a| a.mulx(rbx, rcx, rdx)).unwrap();
    assert_eq!((vcpu.reg(RCX), vcpu.reg(RBX)), (4, u64::MAX - 3));
}

#[test]
fn division_faults_where_the_quotient_does_not_fit() {
    // RDX, RAX, divisor, expected quotient and remainder.
    let unsigned = [
        (0, 100, 7, Some((14, 2))),
        (5, 3, 6, Some((0xd555_5555_5555_5556, 0xffff_ffff_ffff_ffff))),
        (6, 0, 6, None),
        (0, 1, 0, None),
    ];
    for (high, low, divisor, expected) in unsigned {
        let mut vcpu = vcpu(Bits64);
        vcpu.set_reg(RDX, high);
        vcpu.set_reg(RAX, low);
        vcpu.set_reg(RCX, divisor);
        let result = run(&mut vcpu, |a| a.div(rcx));
        match expected {
            // 5 * 2^64 + 3 = 6 * q + r is checked by multiplication, not by a second division.
            Some((quotient, _)) if high == 5 => {
                result.unwrap();
                let (q, r) = (u128::from(vcpu.reg(RAX)), u128::from(vcpu.reg(RDX)));
                assert_eq!(q * 6 + r, (5u128 << 64) + 3);
                assert!(r < 6 && q >> 60 == quotient >> 60);
            }
            Some(expected) => {
                result.unwrap();
                assert_eq!((u128::from(vcpu.reg(RAX)), vcpu.reg(RDX)), expected);
            }
            None => {
                assert_eq!(result.unwrap_err().vector, vector::DE);
                assert_eq!((vcpu.reg(RDX), vcpu.reg(RAX)), (high, low));
            }
        }
    }
    let signed = [
        (-1i64, -7i64, 2i64, Some((-3i64, -1i64))),
        (0, 7, -2, Some((-3, 1))),
        (-1, i64::MIN, -1, None),
        (-1, 0, 2, Some((i64::MIN, 0))),
        (1, 0, 2, None),
        (0, i64::MIN, -1, Some((i64::MIN, 0))),
    ];
    for (high, low, divisor, expected) in signed {
        let mut vcpu = vcpu(Bits64);
        vcpu.set_reg(RDX, high as u64);
        vcpu.set_reg(RAX, low as u64);
        vcpu.set_reg(RCX, divisor as u64);
        match (run(&mut vcpu, |a| a.idiv(rcx)), expected) {
            (Ok(()), Some(e)) => assert_eq!((vcpu.reg(RAX) as i64, vcpu.reg(RDX) as i64), e),
            (Err(f), None) => assert_eq!(f.vector, vector::DE),
            (result, _) => panic!("{high:x}:{low:x} / {divisor}: {result:?}"),
        }
    }
    let mut vcpu = vcpu(Bits64);
    for (ax_, divisor, expected) in
        [(0x00ff, 0x10, Some(0x0f0f)), (0x1000, 0x10, None), (0xff80, 0x01, None), (0x0080, 1, Some(0x80))]
    {
        vcpu.set_reg(RAX, ax_);
        vcpu.set_reg(RCX, divisor);
        let result = run(&mut vcpu, |a| a.div(cl)).ok().map(|()| vcpu.reg(RAX));
        assert_eq!(result, expected, "{ax_:#x} / {divisor:#x}");
    }
    // idiv cl: -128 / 1 fits, 128 / 1 does not.
    for (ax_, expected) in [(0xff80, Some(0x0080)), (0x0080, None)] {
        vcpu.set_reg(RAX, ax_);
        vcpu.set_reg(RCX, 1);
        assert_eq!(run(&mut vcpu, |a| a.idiv(cl)).ok().map(|()| vcpu.reg(RAX)), expected);
    }
    // idiv ecx with the least quotient, 32 bits.
    vcpu.set_reg(RAX, 0x8000_0000);
    vcpu.set_reg(RDX, 0xffff_ffff);
    vcpu.set_reg(RCX, 1);
    run(&mut vcpu, |a| a.idiv(ecx)).unwrap();
    assert_eq!((vcpu.reg(RAX), vcpu.reg(RDX)), (0x8000_0000, 0));
}

#[test]
fn bit_tests_reach_beyond_the_memory_operand() {
    let mut vcpu = vcpu(Bits64);
    vcpu.set_reg(RBX, DATA + 0x100);
    // Bit -1 of the operand is bit 63 of the word below it.
    put(&vcpu, DATA + 0xf8, 1 << 63);
    vcpu.set_reg(RCX, u64::MAX);
    run(&mut vcpu, |a| a.bt(qword_ptr(rbx), rcx)).unwrap();
    assert!(vcpu.state.flags.cf());
    // Bit 1000 by 32-bit units: word 31, bit 8.
    vcpu.set_reg(RCX, 1000);
    run(&mut vcpu, |a| a.lock().bts(dword_ptr(rbx), ecx)).unwrap();
    assert!(!vcpu.state.flags.cf());
    assert_eq!(peek(&vcpu, DATA + 0x100 + 31 * 4), 1 << 8);
    // A 16-bit offset is signed 16 bits.
    vcpu.set_reg(RCX, 0x1_8000);
    put(&vcpu, DATA + 0x1100 - 0x1000, 1);
    vcpu.set_reg(RBX, DATA + 0x1100);
    run(&mut vcpu, |a| a.btc(word_ptr(rbx), cx)).unwrap();
    assert!(vcpu.state.flags.cf());
    assert_eq!(peek(&vcpu, DATA + 0x100), 0);
    // An immediate wraps around the operand's size; a register operand too.
    put(&vcpu, DATA + 0x1100, 1 << 5);
    run(&mut vcpu, |a| a.btr(dword_ptr(rbx), 37)).unwrap();
    assert!(vcpu.state.flags.cf());
    assert_eq!(peek(&vcpu, DATA + 0x1100), 0);
    vcpu.set_reg(RAX, 1 << 3);
    vcpu.set_reg(RCX, 64 + 3);
    vcpu.state.flags.set_bits(ZF | SF);
    run(&mut vcpu, |a| a.bt(rax, rcx)).unwrap();
    assert_eq!(vcpu.state.flags.bits() & ARITHMETIC, CF | ZF | SF);
}

#[test]
fn scans_and_counts_of_zero_follow_their_own_rules() {
    const Z: u64 = ZF;
    const CZ: u64 = CF | ZF;
    check(&[
        // bsf eax, ecx of zero leaves all of rax.
        some(&[0x0f, 0xbc, 0xc1], 0x1_0000_0007, 0, 0, 0x1_0000_0007, Z, ZF),
        some(&[0x0f, 0xbc, 0xc1], 0x1_0000_0007, 0x50, ZF, 4, Z, 0),
        some(&[0x48, 0x0f, 0xbd, 0xc1], 0, 1 << 63 | 1, ZF, 63, Z, 0),
        // tzcnt, lzcnt of zero give the size and CF.
        some(&[0xf3, 0x0f, 0xbc, 0xc1], 0, 0, 0, 32, CZ, CF),
        some(&[0xf3, 0x0f, 0xbc, 0xc1], 0, 1, CF, 0, CZ, ZF),
        some(&[0x66, 0xf3, 0x0f, 0xbd, 0xc1], 0, 0, 0, 16, CZ, CF),
        some(&[0xf3, 0x48, 0x0f, 0xbd, 0xc1], 0, 0xff, CF, 56, CZ, 0),
        // popcnt clears all flags but ZF.
        case(&[0xf3, 0x48, 0x0f, 0xb8, 0xc1], 0, u64::MAX, ARITHMETIC, 64, 0),
        case(&[0xf3, 0x0f, 0xb8, 0xc1], 9, 1 << 40, 0, 0, ZF),
    ]);
}

#[test]
fn bit_manipulation_extensions() {
    const D: u64 = CF | OF | ZF;
    const DS: u64 = D | SF;
    check(&[
        // andn rax, rcx, rax
        some(&[0xc4, 0xe2, 0xf0, 0xf2, 0xc0], 0xff, 0x0f, CF | OF, 0xf0, DS, 0),
        // bextr eax, ecx, eax: 8 bits from bit 4; from bit 40; 0 bits.
        some(&[0xc4, 0xe2, 0x78, 0xf7, 0xc1], 0x0804, 0x1234, 0, 0x23, D, 0),
        some(&[0xc4, 0xe2, 0x78, 0xf7, 0xc1], 0x0828, 0xffff_ffff, 0, 0, D, ZF),
        some(&[0xc4, 0xe2, 0xf8, 0xf7, 0xc1], 0xff00, 0x1234, 0, 0x1234, D, 0),
        // blsi, blsr, blsmsk rax, rcx
        some(&[0xc4, 0xe2, 0xf8, 0xf3, 0xd9], 0, 0x18, 0, 0x08, DS, CF),
        some(&[0xc4, 0xe2, 0xf8, 0xf3, 0xc9], 0, 0x18, CF, 0x10, DS, 0),
        some(&[0xc4, 0xe2, 0xf8, 0xf3, 0xc9], 0, 0, 0, 0, DS, CF | ZF),
        some(&[0xc4, 0xe2, 0xf8, 0xf3, 0xd1], 0, 0x18, CF, 0x0f, CF | OF | SF, 0),
        // bzhi rax, rcx, rax
        some(&[0xc4, 0xe2, 0xf8, 0xf5, 0xc1], 4, 0xff, CF, 0x0f, DS, 0),
        some(&[0xc4, 0xe2, 0xf8, 0xf5, 0xc1], 64, 0xff, 0, 0xff, DS, CF),
        // pdep, pext rax, rcx, rax
        case(&[0xc4, 0xe2, 0xf3, 0xf5, 0xc0], 0xf0f0, 0xa5, CF, 0xa050, CF),
        case(&[0xc4, 0xe2, 0xf2, 0xf5, 0xc0], 0xf0f0, 0xa050, CF, 0xa5, CF),
        // crc32 eax, cl and rax, rcx: CRC-32C of "1" from all ones, and of eight bytes.
        case(&[0xf2, 0x0f, 0x38, 0xf0, 0xc1], 0xffff_ffff, 0x31, 0, !0x90f5_99e3 & 0xffff_ffff, 0),
        case(
            &[0xf2, 0x48, 0x0f, 0x38, 0xf1, 0xc1],
            0xffff_ffff,
            u64::from_le_bytes(*b"12345678"),
            0,
            !0x6087_809a & 0xffff_ffff,
            0,
        ),
    ]);
}

#[test]
fn exchanges_compare_add_and_swap() {
    check(&[
        // cmpxchg ecx, eax... with the accumulator as destination it always succeeds.
        case(&[0x0f, 0xb1, 0xc8], 5, 9, 0, 9, ZF | PF),
        // xadd ecx, eax: rax gets the old rcx.
        case(&[0x0f, 0xc1, 0xc1], 0xffff_ffff, 1, 0, 1, CF | ZF | AF | PF),
        // xchg eax, ecx by its short form, and xchg ah, al.
        case(&[0x91], 0xffff_ffff_0000_0001, 2, 0, 2, 0),
        case(&[0x86, 0xc4], 0x1234, 0, 0, 0x3412, 0),
    ]);
    let mut vcpu = vcpu(Bits64);
    vcpu.set_reg(RBX, DATA);
    put(&vcpu, DATA, 0x1_0000_0005);
    // A mismatch loads the accumulator, clearing its upper half.
    vcpu.set_reg(RAX, 0xf_0000_0004);
    vcpu.set_reg(RCX, 77);
    run(&mut vcpu, |a| a.lock().cmpxchg(dword_ptr(rbx), ecx)).unwrap();
    assert_eq!((vcpu.reg(RAX), peek(&vcpu, DATA)), (5, 0x1_0000_0005));
    assert!(!vcpu.state.flags.zf() && vcpu.state.flags.cf());
    // A match stores and leaves the accumulator's upper half.
    vcpu.set_reg(RAX, 0xf_0000_0005);
    run(&mut vcpu, |a| a.cmpxchg(dword_ptr(rbx), ecx)).unwrap();
    assert_eq!((vcpu.reg(RAX), peek(&vcpu, DATA)), (0xf_0000_0005, 0x1_0000_004d));
    run(&mut vcpu, |a| a.lock().xadd(qword_ptr(rbx), rcx)).unwrap();
    assert_eq!((vcpu.reg(RCX), peek(&vcpu, DATA)), (0x1_0000_004d, 0x1_0000_009a));
    run(&mut vcpu, |a| a.xchg(word_ptr(rbx), cx)).unwrap();
    assert_eq!((vcpu.reg(RCX), peek(&vcpu, DATA)), (0x1_0000_009a, 0x1_0000_004d));
}

#[test]
fn double_width_exchanges() {
    let mut vcpu = vcpu(Bits64);
    vcpu.set_reg(RDI, DATA);
    put(&vcpu, DATA, 1);
    put(&vcpu, DATA + 8, 2);
    for (n, value) in [(RAX, 9), (RDX, 9), (RBX, 3), (RCX, 4)] {
        vcpu.set_reg(n, value);
    }
    run(&mut vcpu, |a| a.lock().cmpxchg16b(xmmword_ptr(rdi))).unwrap();
    assert_eq!((vcpu.reg(RAX), vcpu.reg(RDX), vcpu.state.flags.zf()), (1, 2, false));
    run(&mut vcpu, |a| a.cmpxchg16b(xmmword_ptr(rdi))).unwrap();
    assert_eq!((peek(&vcpu, DATA), peek(&vcpu, DATA + 8), vcpu.state.flags.zf()), (3, 4, true));
    vcpu.set_reg(RDI, DATA + 8);
    assert_eq!(run(&mut vcpu, |a| a.cmpxchg16b(xmmword_ptr(rdi))).unwrap_err().vector, vector::GP);
    // The 8-byte form needs no alignment.
    vcpu.set_reg(RDI, DATA + 0x21);
    put(&vcpu, DATA + 0x21, 0x0000_0002_0000_0001);
    run(&mut vcpu, |a| a.lock().cmpxchg8b(qword_ptr(rdi))).unwrap();
    assert_eq!(peek(&vcpu, DATA + 0x21), 0x0000_0004_0000_0003);
    assert!(vcpu.state.flags.zf());
}

#[test]
fn lock_is_undefined_where_it_means_nothing() {
    let mut vcpu = vcpu(Bits64);
    vcpu.set_reg(RBX, DATA);
    // lock add eax, ecx; lock mov [rbx], eax; lock cmp [rbx], eax; lock bt [rbx], eax
    for code in [&[0xf0, 0x01, 0xc8][..], &[0xf0, 0x89, 0x03], &[0xf0, 0x39, 0x03], &[0xf0, 0x0f, 0xa3, 0x03]]
    {
        assert_eq!(run_bytes(&mut vcpu, code).unwrap_err().vector, vector::UD, "{code:x?}");
    }
    // ud2 is no unknown instruction.
    vcpu.stats.unimplemented.clear();
    assert_eq!(run(&mut vcpu, |a| a.ud2()).unwrap_err().vector, vector::UD);
    assert!(vcpu.stats.unimplemented.is_empty());
}

#[test]
fn faults_leave_everything_as_it_was() {
    let mut vcpu = vcpu(Bits64);
    vcpu.set_reg(RBX, DATA_END - 2);
    vcpu.set_reg(RAX, 7);
    vcpu.state.flags.set_bits(CF);
    put(&vcpu, DATA_END - 8, 0);
    for code in [
        &[0x01, 0x03][..],         // add [rbx], eax
        &[0x03, 0x03],             // add eax, [rbx]
        &[0xf0, 0x0f, 0xb1, 0x03], // lock cmpxchg [rbx], eax
        &[0xd1, 0x23],             // shl [rbx], 1
        &[0x0f, 0x47, 0x03],       // cmova eax, [rbx]: not taken, reads all the same
        &[0x87, 0x03],             // xchg [rbx], eax
        &[0xf7, 0x33],             // div dword [rbx]
    ] {
        let fault = run_bytes(&mut vcpu, code).unwrap_err();
        assert_eq!((fault.vector, fault.address.0), (vector::PF, DATA_END), "{code:x?}");
        assert_eq!((vcpu.reg(RAX), vcpu.state.flags.bits() & ARITHMETIC), (7, CF));
        assert_eq!(peek(&vcpu, DATA_END - 8), 0);
    }
}

#[test]
fn moves_extensions_and_addresses() {
    check(&[
        // mov ah, cl; mov ax, cx; mov eax, ecx; mov rax, imm32 sign-extended
        case(&[0x88, 0xcc], 0x1111, 0x22, 0, 0x2211, 0),
        case(&[0x66, 0x89, 0xc8], u64::MAX, 0x1234, 0, 0xffff_ffff_ffff_1234, 0),
        case(&[0x89, 0xc8], u64::MAX, u64::MAX, 0, 0xffff_ffff, 0),
        case(&[0x48, 0xc7, 0xc0, 0xfe, 0xff, 0xff, 0xff], 0, 0, 0, (-2i64) as u64, 0),
        // mov spl, al is the stack pointer, not ah: visible by the byte register of rsp.
        case(&[0x40, 0x88, 0xe0], 0xff, 0, 0, 0, 0),
        // movzx eax, ch; movsx rax, cl; movsxd rax, ecx; movsx ax, cl
        case(&[0x0f, 0xb6, 0xc5], u64::MAX, 0x8012, 0, 0x80, 0),
        case(&[0x48, 0x0f, 0xbe, 0xc1], 0, 0x80, 0, 0xffff_ffff_ffff_ff80, 0),
        case(&[0x48, 0x63, 0xc1], 0, 0x8000_0000, 0, 0xffff_ffff_8000_0000, 0),
        case(&[0x66, 0x0f, 0xbe, 0xc1], 0x11_0000, 0x80, 0, 0x11_ff80, 0),
        // cmove eax, ecx not taken clears the upper half.
        case(&[0x0f, 0x44, 0xc1], u64::MAX, 1, 0, 0xffff_ffff, 0),
        // lea rax, [rcx*8+5]; lea eax, [ecx+eax]; lea ax, [rcx-1]
        case(&[0x48, 0x8d, 0x04, 0xcd, 5, 0, 0, 0], 0, 1 << 61, 0, 5, 0),
        case(&[0x67, 0x8d, 0x04, 0x01], 1, u64::MAX, 0, 0, 0),
        case(&[0x67, 0x48, 0x8d, 0x41, 0xff], 1, 0, 0, 0xffff_ffff, 0),
        case(&[0x66, 0x8d, 0x41, 0xff], 0x5_0000, 0, 0, 0x5_ffff, 0),
        // bswap eax, rax
        case(&[0x0f, 0xc8], 0xffff_ffff_1122_3344, 0, 0, 0x4433_2211, 0),
        case(&[0x48, 0x0f, 0xc8], 0x1122_3344_5566_7788, 0, 0, 0x8877_6655_4433_2211, 0),
        // cbw, cwde, cdqe
        case(&[0x66, 0x98], 0xff_1180, 0, 0, 0xff_ff80, 0),
        case(&[0x98], u64::MAX << 32 | 0x8000, 0, 0, 0xffff_8000, 0),
        case(&[0x48, 0x98], 0x8000_0000, 0, 0, 0xffff_ffff_8000_0000, 0),
        // lahf, then sahf of what cx brought.
        case(&[0x9f], 0, 0, CF | ZF | OF, 0x4300, CF | ZF | OF),
        case(&[0x9e], 0x8100, 0, OF | ZF, 0x8100, OF | SF | CF),
        // setg cl then nothing: setle ah
        case(&[0x0f, 0x9e, 0xc4], 0, 0, SF, 0x100, SF),
    ]);
    let mut vcpu = vcpu(Bits64);
    vcpu.set_reg(RAX, 1 << 63);
    run(&mut vcpu, |a| a.cqo()).unwrap();
    assert_eq!(vcpu.reg(RDX), u64::MAX);
    put(&vcpu, DATA, 0x1122_3344_5566_7788);
    vcpu.set_reg(RBX, DATA);
    run(&mut vcpu, |a| {
        a.movbe(ax, word_ptr(rbx))?;
        a.movbe(dword_ptr(rbx + 8), ebx)?;
        a.movnti(dword_ptr(rbx + 16), ebx)
    })
    .unwrap();
    assert_eq!(vcpu.reg(RAX), 1 << 63 | 0x8877);
    assert_eq!(peek(&vcpu, DATA + 8), u64::from((DATA as u32).swap_bytes()));
    assert_eq!(peek(&vcpu, DATA + 16), DATA);
    // xlat takes AL alone as index.
    vcpu.set_reg(RAX, 0xff03);
    run(&mut vcpu, |a| a.xlatb()).unwrap();
    assert_eq!(vcpu.reg(RAX), 0xff55);
}

#[test]
fn memory_operand_forms_find_their_address() {
    let mut vcpu = vcpu(Bits64);
    put(&vcpu, DATA, 0x55);
    put(&vcpu, DATA + 8, 0x66);
    let load = |vcpu: &mut Vcpu, code: &[u8]| {
        vcpu.set_reg(RAX, 0);
        run_bytes(vcpu, code).unwrap();
        vcpu.reg(RAX)
    };
    // mov rax, [disp32]; mov eax, moffs64; mov eax, moffs32 (address-size prefix)
    assert_eq!(load(&mut vcpu, &[0x48, 0x8b, 0x04, 0x25, 0, 0, 2, 0]), 0x55);
    assert_eq!(load(&mut vcpu, &[0xa1, 0, 0, 2, 0, 0, 0, 0, 0]), 0x55);
    assert_eq!(load(&mut vcpu, &[0x67, 0xa1, 8, 0, 2, 0]), 0x66);
    // mov eax, [rip + disp32]: the instruction is 6 bytes at 0x10000.
    assert_eq!(load(&mut vcpu, &[0x8b, 0x05, 0x02, 0x00, 0x01, 0x00]), 0x66);
    // FS and GS have bases; an absolute address in them is negative or positive.
    vcpu.state.seg_base[5] = DATA + 8 + 0x10;
    assert_eq!(load(&mut vcpu, &[0x65, 0x8b, 0x04, 0x25, 0xf0, 0xff, 0xff, 0xff]), 0x66);
    // mov eax, [ebx + 8] wraps at 32 bits.
    vcpu.set_reg(RBX, 0xffff_ffff_0000_0000 | DATA);
    assert_eq!(load(&mut vcpu, &[0x67, 0x8b, 0x43, 0x08]), 0x66);
    // A non-canonical address: #GP, or #SS by way of RBP and RSP.
    vcpu.set_reg(RBX, 1 << 63);
    vcpu.set_reg(RBP, 1 << 63);
    assert_eq!(run_bytes(&mut vcpu, &[0x8b, 0x03]).unwrap_err().vector, vector::GP);
    assert_eq!(run_bytes(&mut vcpu, &[0x8b, 0x45, 0x00]).unwrap_err().vector, vector::SS);
}

#[test]
fn sixteen_bit_addresses_wrap() {
    let mut vcpu = vcpu(Bits16);
    put(&vcpu, 0x1234, 0x77);
    vcpu.set_reg(RBX, 0x8000_f000);
    vcpu.set_reg(RSI, 0x2200);
    // mov ax, [bx + si + 0x34]
    run_bytes(&mut vcpu, &[0x8b, 0x40, 0x34]).unwrap();
    assert_eq!(vcpu.reg(RAX), 0x77);
    // mov eax, [0x1234] with an operand-size prefix.
    run_bytes(&mut vcpu, &[0x66, 0xa1, 0x34, 0x12]).unwrap();
    assert_eq!(vcpu.reg(RAX), 0x77);
}

#[test]
fn decimal_adjustments() {
    // Code, AX before, flags before, AX after, flags after among CF, AF, SF, ZF, PF.
    let cases: [(&[u8], u64, u64, u64, u64); 10] = [
        // 0x79 + 0x35 = 0xae, decimal 114.
        (&[0x27], 0xae, 0, 0x14, CF | AF | PF),
        (&[0x27], 0x2e, 0, 0x34, AF),
        // 0x35 - 0x47 = 0xee with borrows: 88.
        (&[0x2f], 0xee, CF | AF, 0x88, CF | AF | SF | PF),
        (&[0x2f], 0x03, AF, 0xfd, CF | AF | SF),
        (&[0x37], 0x020b, 0, 0x0301, CF | AF),
        (&[0x37], 0x0209, CF, 0x0209, 0),
        (&[0x3f], 0x020b, 0, 0x0105, CF | AF),
        (&[0xd4, 0x0a], 0x0043, 0, 0x0607, 0),
        (&[0xd4, 0x10], 0xff43, CF, 0x0403, PF),
        (&[0xd5, 0x0a], 0x0607, 0, 0x0043, 0),
    ];
    for (code, ax_, before, after, flags) in cases {
        let mut vcpu = vcpu(Bits32);
        vcpu.set_reg(RAX, ax_);
        vcpu.state.flags.set_bits(before);
        run_bytes(&mut vcpu, code).unwrap();
        // AAA and AAS define CF and AF alone, AAM and AAD define SF, ZF and PF alone.
        let defined = match code[0] {
            0x37 | 0x3f => CF | AF,
            0xd4 | 0xd5 => SF | ZF | PF,
            _ => CF | AF | SF | ZF | PF,
        };
        assert_eq!(vcpu.reg(RAX), after, "{code:x?} {ax_:#x}");
        assert_eq!(vcpu.state.flags.bits() & defined, flags & defined, "{code:x?} {ax_:#x}");
    }
    let mut vcpu = vcpu(Bits32);
    assert_eq!(run_bytes(&mut vcpu, &[0xd4, 0]).unwrap_err().vector, vector::DE);
}

#[test]
fn movdiri_stores() {
    let mut vcpu = vcpu(Bits64);
    vcpu.set_reg(RCX, DATA + 3);
    vcpu.set_reg(RAX, 0x1122_3344_5566_7788);
    // movdiri [rcx], rax; movdiri [rcx+8], eax
    run_bytes(&mut vcpu, &[0x48, 0x0f, 0x38, 0xf9, 0x01, 0x0f, 0x38, 0xf9, 0x41, 0x08]).unwrap();
    assert_eq!(peek(&vcpu, DATA + 3), 0x1122_3344_5566_7788);
    assert_eq!(peek(&vcpu, DATA + 11), 0x5566_7788);
}

#[test]
fn without_lzcnt_its_bytes_are_bsr() {
    let mut vcpu = vcpu(Bits64);
    vcpu.cpuid.disable("LZCNT");
    vcpu.set_reg(RCX, 0x10);
    run_bytes(&mut vcpu, &[0xf3, 0x0f, 0xbd, 0xc1]).unwrap();
    assert_eq!(vcpu.reg(RAX), 4);
    vcpu.cpuid.disable("POPCNT");
    let popcnt = run_bytes(&mut vcpu, &[0xf3, 0x0f, 0xb8, 0xc1]);
    assert_eq!(popcnt.map_err(|f| f.vector), Err(vector::UD));
    assert!(vcpu.stats.unimplemented.is_empty(), "known, but not offered");
}

//! Every form of the moves and bitwise operations that are not run natively.

use iced_x86::code_asm::*;

use super::*;

const BYTES: [u8; 32] = {
    let mut bytes = [0; 32];
    let mut n = 0;
    while n < 32 {
        bytes[n] = n as u8 + 1;
        n += 1;
    }
    bytes
};

/// `BYTES` from `from` to `to`, then zeros, in the low half; `upper` in the upper.
fn expect(from: usize, to: usize, upper: [u8; 16]) -> [u8; 32] {
    let mut bytes = [0; 32];
    bytes[..to - from].copy_from_slice(&BYTES[from..to]);
    if to - from <= 16 {
        bytes[16..].copy_from_slice(&upper);
    }
    bytes
}

/// A vCPU with `BYTES` at [RSI], XMM1 = `BYTES`, XMM2 all 0xaa, RBX recognisable.
fn prepared() -> Vcpu {
    let mut v = vcpu();
    v.set_reg(6, DATA);
    v.set_reg(3, 0x8877_6655_4433_2211);
    v.write_bytes(DATA, &BYTES).unwrap();
    v.state.fpu.ymm[1] = BYTES;
    v.state.fpu.ymm[2] = [0xaa; 32];
    v
}

type Emit = fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>;

#[test]
fn loads_and_copies_into_a_register() {
    let keep = [0xaa; 16];
    let zero = [0; 16];
    let rbx_low = |n: usize, upper| {
        let mut bytes = [0; 32];
        bytes[..n].copy_from_slice(&0x8877_6655_4433_2211u64.to_le_bytes()[..n]);
        bytes[16..].copy_from_slice(upper);
        bytes
    };
    let merged = |n: usize, upper: [u8; 16]| {
        let mut bytes = [0xaa; 32];
        bytes[..n].copy_from_slice(&BYTES[..n]);
        bytes[16..].copy_from_slice(&upper);
        bytes
    };
    let high = |upper: [u8; 16]| {
        let mut bytes = [0xaa; 32];
        bytes[8..16].copy_from_slice(&BYTES[..8]);
        bytes[16..].copy_from_slice(&upper);
        bytes
    };
    let cases: Vec<(Emit, [u8; 32])> = vec![
        (|a| a.movups(xmm2, xmmword_ptr(rsi)), expect(0, 16, keep)),
        (|a| a.movdqa(xmm2, xmmword_ptr(rsi)), expect(0, 16, keep)),
        (|a| a.movntdqa(xmm2, xmmword_ptr(rsi)), expect(0, 16, keep)),
        (|a| a.movdqu(xmm2, xmmword_ptr(rsi + 3)), expect(3, 19, keep)),
        (|a| a.movapd(xmm2, xmm1), expect(0, 16, keep)),
        (|a| a.movq(xmm2, qword_ptr(rsi)), expect(0, 8, keep)),
        (|a| a.movq(xmm2, xmm1), expect(0, 8, keep)),
        (|a| a.movd(xmm2, dword_ptr(rsi)), expect(0, 4, keep)),
        (|a| a.movss(xmm2, dword_ptr(rsi)), expect(0, 4, keep)),
        (|a| a.movsd_2(xmm2, qword_ptr(rsi)), expect(0, 8, keep)),
        (|a| a.movss(xmm2, xmm1), merged(4, keep)),
        (|a| a.movsd_2(xmm2, xmm1), merged(8, keep)),
        (|a| a.movlps(xmm2, qword_ptr(rsi)), merged(8, keep)),
        (|a| a.movhpd(xmm2, qword_ptr(rsi)), high(keep)),
        (|a| a.movlhps(xmm2, xmm1), high(keep)),
        (|a| a.movd(xmm2, ebx), rbx_low(4, &keep)),
        (|a| a.movq(xmm2, rbx), rbx_low(8, &keep)),
        (|a| a.vmovups(xmm2, xmmword_ptr(rsi)), expect(0, 16, zero)),
        (|a| a.vmovups(ymm2, ymmword_ptr(rsi)), BYTES),
        (|a| a.vmovdqa(ymm2, ymmword_ptr(rsi)), BYTES),
        (|a| a.vmovdqa(ymm2, ymm1), BYTES),
        (|a| a.vmovaps(xmm2, xmm1), expect(0, 16, zero)),
        (|a| a.vmovq(xmm2, qword_ptr(rsi)), expect(0, 8, zero)),
        (|a| a.vmovq(xmm2, xmm1), expect(0, 8, zero)),
        (|a| a.vmovd(xmm2, dword_ptr(rsi)), expect(0, 4, zero)),
        (|a| a.vmovss(xmm2, dword_ptr(rsi)), expect(0, 4, zero)),
        (|a| a.vmovss_3(xmm2, xmm2, xmm1), merged(4, zero)),
        (|a| a.vmovsd_3(xmm2, xmm2, xmm1), merged(8, zero)),
        (|a| a.vmovlpd_3(xmm2, xmm2, qword_ptr(rsi)), merged(8, zero)),
        (|a| a.vmovhps_3(xmm2, xmm2, qword_ptr(rsi)), high(zero)),
        (|a| a.vmovd(xmm2, ebx), rbx_low(4, &zero)),
        (|a| a.vmovq(xmm2, rbx), rbx_low(8, &zero)),
        (|a| a.vzeroupper(), expect(0, 16, zero).map(|_| 0xaa).map_upper(0)),
        (|a| a.vzeroall(), [0; 32]),
        (|a| a.pxor(xmm2, xmm2), expect(0, 0, keep)),
        (|a| a.vpxor(xmm2, xmm2, xmm2), [0; 32]),
        (|a| a.andps(xmm2, xmm1), expect(0, 16, keep).map_low(|b| b & 0xaa)),
        (|a| a.orpd(xmm2, xmmword_ptr(rsi)), expect(0, 16, keep).map_low(|b| b | 0xaa)),
        (|a| a.pandn(xmm2, xmm1), expect(0, 16, keep).map_low(|b| b & 0x55)),
        (|a| a.vxorps(ymm2, ymm2, ymmword_ptr(rsi)), BYTES.map(|b| b ^ 0xaa)),
        (|a| a.vandnpd(ymm2, ymm2, ymm1), BYTES.map(|b| b & 0x55)),
        (|a| a.vpand(ymm2, ymm1, ymmword_ptr(rsi)), BYTES),
    ];
    for (n, (emit, expected)) in cases.into_iter().enumerate() {
        let mut v = prepared();
        run(&mut v, emit).unwrap();
        assert_eq!(v.state.fpu.ymm[2], expected, "case {n}");
        assert_eq!(v.native.stub_count(), usize::from(n == 14), "case {n} is not run natively, but MOVLHPS");
    }
}

trait Map {
    fn map_low(self, f: fn(u8) -> u8) -> Self;
    fn map_upper(self, to: u8) -> Self;
}

impl Map for [u8; 32] {
    fn map_low(mut self, f: fn(u8) -> u8) -> Self {
        self[..16].iter_mut().for_each(|b| *b = f(*b));
        self
    }

    fn map_upper(mut self, to: u8) -> Self {
        self[16..].fill(to);
        self
    }
}

#[test]
fn stores() {
    let cases: Vec<(Emit, std::ops::Range<usize>)> = vec![
        (|a| a.movups(xmmword_ptr(rdi + 1), xmm1), 0..16),
        (|a| a.movaps(xmmword_ptr(rdi), xmm1), 0..16),
        (|a| a.movntdq(xmmword_ptr(rdi), xmm1), 0..16),
        (|a| a.movq(qword_ptr(rdi), xmm1), 0..8),
        (|a| a.movsd_2(qword_ptr(rdi), xmm1), 0..8),
        (|a| a.movlpd(qword_ptr(rdi), xmm1), 0..8),
        (|a| a.movhps(qword_ptr(rdi), xmm1), 8..16),
        (|a| a.movd(dword_ptr(rdi), xmm1), 0..4),
        (|a| a.movss(dword_ptr(rdi), xmm1), 0..4),
        (|a| a.vmovups(xmmword_ptr(rdi), xmm1), 0..16),
        (|a| a.vmovdqu(ymmword_ptr(rdi + 1), ymm1), 0..32),
        (|a| a.vmovntps(ymmword_ptr(rdi), ymm1), 0..32),
        (|a| a.vmovss(dword_ptr(rdi), xmm1), 0..4),
        (|a| a.vmovhpd(qword_ptr(rdi), xmm1), 8..16),
        (|a| a.vmovq(qword_ptr(rdi), xmm1), 0..8),
        (|a| a.pextrd(dword_ptr(rdi), xmm1, 2), 8..12),
        (|a| a.pextrb(byte_ptr(rdi), xmm1, 5), 5..6),
        (|a| a.pextrw(word_ptr(rdi), xmm1, 3), 6..8),
        (|a| a.extractps(dword_ptr(rdi), xmm1, 1), 4..8),
        (|a| a.vextracti128(xmmword_ptr(rdi), ymm1, 1), 16..32),
    ];
    for (n, (emit, range)) in cases.into_iter().enumerate() {
        let mut v = prepared();
        let at = DATA + 0x100;
        v.set_reg(7, at);
        v.write_bytes(at, &[0xcc; 64]).unwrap();
        run(&mut v, emit).unwrap();
        let mut seen = [0; 64];
        v.read_bytes(at, &mut seen).unwrap();
        let shift = usize::from(seen[0] == 0xcc);
        let mut expected = [0xcc; 64];
        expected[shift..shift + range.len()].copy_from_slice(&BYTES[range]);
        assert_eq!(seen, expected, "case {n}");
    }
}

#[test]
fn to_general_registers() {
    let mut v = prepared();
    run(&mut v, |a| {
        a.movd(eax, xmm2)?;
        a.movq(rcx, xmm1)?;
        a.vmovd(r8d, xmm1)?;
        a.pextrw(r9d, xmm1, 7)?;
        a.pextrq(r10, xmm1, 1)?;
        a.movmskps(r11d, xmm2)
    })
    .unwrap();
    assert_eq!(v.reg(0), 0xaaaa_aaaa);
    assert_eq!(v.reg(1), 0x0807_0605_0403_0201);
    assert_eq!(v.reg(8), 0x0403_0201);
    assert_eq!(v.reg(9), 0x100f);
    assert_eq!(v.reg(10), 0x100f_0e0d_0c0b_0a09);
    assert_eq!(v.reg(11), 15);
}

#[test]
fn masked_moves_touch_only_what_the_mask_says() {
    let mut v = prepared();
    let ram = RAM - 8;
    for (base, faults) in [(EDGE, true), (ram, false)] {
        v.set_reg(6, base);
        // Elements 0 and 1 lie before the edge.
        v.state.fpu.ymm[3] = [0; 32];
        v.state.fpu.ymm[3][3] = 0x80;
        v.state.fpu.ymm[3][7] = 0x80;
        v.state.fpu.ymm[2] = [0xaa; 32];
        run(&mut v, |a| a.vpmaskmovd(ymmword_ptr(rsi), ymm3, ymm1)).unwrap();
        run(&mut v, |a| a.vmaskmovps(ymm2, ymm3, ymmword_ptr(rsi))).unwrap();
        if !faults {
            assert_eq!(v.state.fpu.ymm[2][..8], BYTES[..8]);
        }
        assert_eq!(v.state.fpu.ymm[2][8..], [0; 24]);
        v.state.fpu.ymm[3][31] = 0x80;
        if faults {
            let before = snapshot(&v);
            assert!(run(&mut v, |a| a.vpmaskmovd(ymmword_ptr(rsi), ymm3, ymm1)).is_err());
            assert!(run(&mut v, |a| a.vmaskmovps(ymm2, ymm3, ymmword_ptr(rsi))).is_err());
            assert_eq!(snapshot(&v), before);
        }
    }
    v.set_reg(7, DATA);
    v.state.fpu.ymm[4] = [0; 32];
    v.state.fpu.ymm[4][2] = 0xff;
    v.state.fpu.ymm[4][15] = 0x80;
    v.write_bytes(DATA, &[0; 32]).unwrap();
    run(&mut v, |a| a.maskmovdqu(xmm1, xmm4)).unwrap();
    let mut seen = [0; 17];
    v.read_bytes(DATA, &mut seen).unwrap();
    assert_eq!(
        seen,
        std::array::from_fn(|n| if n == 2 {
            3
        } else if n == 15 {
            16
        } else {
            0
        })
    );
}

#[test]
fn gathers_load_by_index_and_go_on_after_a_fault() {
    let mut v = prepared();
    let mut indices = [0; 32];
    for (n, chunk) in indices.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        *chunk = (7 - n as u32).to_le_bytes();
    }
    v.state.fpu.ymm[5] = indices;
    v.state.fpu.ymm[6] = [0xff; 32];
    v.state.fpu.ymm[6][4..8].fill(0);
    run(&mut v, |a| a.vpgatherdd_3(ymm2, dword_ptr(rsi + ymm5 * 4), ymm6)).unwrap();
    let mut expected = [0xaa; 32];
    for n in [0, 2, 3, 4, 5, 6, 7] {
        expected[n * 4..n * 4 + 4].copy_from_slice(&BYTES[(7 - n) * 4..(8 - n) * 4]);
    }
    assert_eq!(v.state.fpu.ymm[2], expected);
    assert_eq!(v.state.fpu.ymm[6], [0; 32]);
    // The second of two elements faults.
    v.state.fpu.ymm[5] = [0; 32];
    v.state.fpu.ymm[5][8..16].copy_from_slice(&(0x0000_8000_0000_0000u64 >> 3).to_le_bytes());
    v.state.fpu.ymm[6] = [0xff; 32];
    v.state.fpu.ymm[2] = [0xaa; 32];
    assert!(run(&mut v, |a| a.vgatherqpd_3(xmm2, qword_ptr(rsi + xmm5 * 8), xmm6)).is_err());
    assert_eq!(v.state.fpu.ymm[2][..8], BYTES[..8]);
    assert_eq!(v.state.fpu.ymm[2][8..16], [0xaa; 8]);
    assert_eq!(v.state.fpu.ymm[6][..8], [0; 8]);
    assert_eq!(v.state.fpu.ymm[6][8..16], [0xff; 8]);
    v.state.fpu.ymm[5] = [0; 32];
    run(&mut v, |a| a.vgatherqpd_3(xmm2, qword_ptr(rsi + xmm5 * 8), xmm6)).unwrap();
    assert_eq!(v.state.fpu.ymm[2], {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&BYTES[..8]);
        bytes[8..16].copy_from_slice(&BYTES[..8]);
        bytes
    });
}

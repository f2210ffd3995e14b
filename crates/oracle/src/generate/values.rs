//! Values that instructions find interesting.

use crate::case::VectorState;
use crate::random::Random;

/// A value for a general register.
pub(super) fn integer(random: &mut Random) -> u64 {
    let width = random.pick(&[8u32, 16, 32, 64]);
    let sign = 1u64 << (width - 1);
    match random.below(16) {
        0 => 0,
        1 => 1,
        2 => u64::MAX,
        3 => sign,
        4 => sign.wrapping_sub(1),
        5 => sign.wrapping_neg(),
        6 => 1 << random.below(64),
        7 => (1u64 << random.below(64)).wrapping_sub(1),
        8 => random.below(64),
        9 => (random.below(256) as i8) as i64 as u64,
        10 => random.next() & 0xffff_ffff,
        11 => (random.next() as i32) as i64 as u64,
        12 => (random.next() as u8 as u64).wrapping_mul(0x0101_0101_0101_0101),
        _ => random.next(),
    }
}

const F32: &[u32] = &[
    0,
    0x8000_0000,
    0x3f80_0000,
    0xbf80_0000,
    0x7f80_0000,
    0xff80_0000,
    0x7fc0_0000,
    0xffc0_0001,
    0x7f80_0001,
    0xffbf_ffff,
    0x0000_0001,
    0x807f_ffff,
    0x0080_0000,
    0x7f7f_ffff,
    0x4f00_0000,
    0xcf00_0000,
    0x5f00_0000,
    0x3f00_0000,
    0x3fc0_0000,
    0x4b80_0001,
];

const F64: &[u64] = &[
    0,
    0x8000_0000_0000_0000,
    0x3ff0_0000_0000_0000,
    0xbff0_0000_0000_0000,
    0x7ff0_0000_0000_0000,
    0xfff0_0000_0000_0000,
    0x7ff8_0000_0000_0000,
    0xfff8_0000_0000_0001,
    0x7ff0_0000_0000_0001,
    0xfff7_ffff_ffff_ffff,
    1,
    0x800f_ffff_ffff_ffff,
    0x0010_0000_0000_0000,
    0x7fef_ffff_ffff_ffff,
    0x41e0_0000_0000_0000,
    0xc1e0_0000_0000_0000,
    0x43e0_0000_0000_0000,
    0xc3e0_0000_0000_0000,
    0x3fe0_0000_0000_0000,
    0x3ff8_0000_0000_0000,
    0x36a0_0000_0000_0000,
    0x47ef_ffff_f000_0000,
];

/// Fills 8 bytes of a vector or of memory.
pub(super) fn lane(random: &mut Random) -> u64 {
    let f32s = |random: &mut Random| match random.below(3) {
        0 => u64::from(random.pick(F32)),
        1 => u64::from((random.below(2000) as f32 / 16.0 - 60.0).to_bits()),
        _ => random.next() & 0xffff_ffff,
    };
    match random.below(8) {
        0 => integer(random),
        1 => random.pick(F64),
        2 => (random.below(200_000) as f64 / 64.0 - 1500.0).to_bits(),
        3 | 4 => f32s(random) | f32s(random) << 32,
        5 => (0..8).fold(0, |v, _| v << 8 | u64::from(random.pick(&[0u8, 1, 0x7f, 0x80, 0xff, 0x41]))),
        _ => random.next(),
    }
}

fn st(random: &mut Random) -> [u8; 10] {
    const SIGNIFICANDS: &[u64] = &[
        0x8000_0000_0000_0000,
        0xc000_0000_0000_0000,
        u64::MAX,
        0x8000_0000_0000_0001,
        0xa000_0000_0000_0000,
    ];
    let sign = (random.below(2) << 15) as u16;
    let (significand, exponent) = match random.below(12) {
        0 => (0, 0),
        1 => (1 << 63, 0x7fff),
        2 => (0xc000_0000_0000_0000 | random.next() >> 8, 0x7fff),
        3 => (0x8000_0000_0000_0000 | random.next() >> 8, 0x7fff),
        // Denormal, pseudo-denormal, unnormal.
        4 => (random.next() >> random.below(64), 0),
        5 => (random.next() >> random.below(64), random.next() as u16 & 0x7fff),
        6 => (random.pick(SIGNIFICANDS), 0x3fff),
        7 => (random.next() | 1 << 63, random.next() as u16 & 0x7fff),
        // Integers, and numbers of everyday size.
        8 | 9 => {
            let shift = random.below(63);
            let n = (random.next() >> shift).max(1);
            let zeros = n.leading_zeros();
            (n << zeros, 0x3fff + 63 - zeros as u16)
        }
        _ => (random.next() | 1 << 63, 0x3fff - 20 + random.below(80) as u16),
    };
    let mut bytes = [0; 10];
    bytes[..8].copy_from_slice(&significand.to_le_bytes());
    bytes[8..].copy_from_slice(&(exponent | sign).to_le_bytes());
    bytes
}

/// Vector and x87 state; the x87 part consistent, so that an FXRSTOR gives it as it is.
pub(super) fn vector(random: &mut Random) -> VectorState {
    let mut v = VectorState::default();
    for ymm in &mut v.ymm {
        for part in ymm.chunks_exact_mut(8) {
            part.copy_from_slice(&lane(random).to_le_bytes());
        }
    }
    for bytes in &mut v.st {
        *bytes = st(random);
    }
    v.mxcsr = 0x1f80;
    if random.chance(1, 2) {
        v.mxcsr |= (random.next() as u32) & 0x3f;
        v.mxcsr |= (random.below(4) as u32) << 13;
    }
    if random.chance(1, 8) {
        v.mxcsr |= 1 << 6;
    }
    if random.chance(1, 8) {
        v.mxcsr |= 1 << 15;
    }
    if random.chance(1, 8) {
        v.mxcsr &= !((random.next() as u32) & 0x1f80);
    }
    if random.chance(1, 2) {
        // Precision and rounding; single precision, reserved, double, extended.
        v.fcw = v.fcw & !0xf00 | (random.below(16) as u16) << 8;
    }
    if random.chance(1, 6) {
        v.fcw &= !(random.next() as u16 & 0x3f);
    }
    let flags = if random.chance(1, 4) { random.next() as u16 & 0x7f } else { 0 };
    let conditions = random.next() as u16 & 0x4700;
    v.fsw = flags | conditions | (random.below(8) as u16) << 11;
    if flags & !v.fcw & 0x3f != 0 && random.chance(1, 2) {
        // Most cases should not begin with a pending exception.
        v.fsw &= !0x7f;
    }
    if v.fsw & !v.fcw & 0x3f != 0 {
        v.fsw |= 0x8080;
    }
    let some = random.next() as u8;
    v.tags = random.pick(&[0, 0xff, 0xff, 0xff, 0x0f, 0xf0, some]);
    v
}

/// The arithmetic flags and ID at random, DF and AC now and then; IF set, as in every user program.
pub(super) fn rflags(random: &mut Random) -> u64 {
    let mut flags = 0x202 | random.next() & (0x8d5 | 1 << 21);
    if random.chance(1, 4) {
        flags |= 1 << 10;
    }
    if random.chance(1, 40) {
        flags |= 1 << 18;
    }
    flags
}

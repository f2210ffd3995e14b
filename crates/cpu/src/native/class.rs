//! Which instructions run natively, and what must be known about each.

use std::arch::is_x86_feature_detected as host;

use iced_x86::{CpuidFeature, EncodingKind, Instruction, Mnemonic, OpKind, Register, RflagsBits};

use crate::fpu::ok;

/// How an instruction is run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Class {
    /// x87: with the guest's x87 state loaded.
    X87,
    /// Uses MMX registers: as x87, and perhaps XMM registers too.
    Mmx,
    /// Legacy-encoded vector instruction: keeps the upper halves of YMM registers.
    Sse,
    /// VEX-encoded vector instruction: clears what is above its destination.
    Avx,
}

impl Class {
    /// The class of `i`, if it computes with x87 or vector registers.
    pub(crate) fn of(i: &Instruction) -> Option<Self> {
        match i.encoding() {
            EncodingKind::VEX if has_register(i, Register::is_vector_register) || converts(i) => {
                Some(Self::Avx)
            }
            EncodingKind::Legacy if has_register(i, Register::is_mm) => Some(Self::Mmx),
            EncodingKind::Legacy if is_x87(i) => Some(Self::X87),
            EncodingKind::Legacy if has_register(i, Register::is_vector_register) || converts(i) => {
                Some(Self::Sse)
            }
            _ => None,
        }
    }

    /// What of [`ok`] the instruction `i` of this class needs.
    pub(crate) fn needs(self, i: &Instruction) -> u8 {
        match self {
            Self::X87 => ok::X87,
            Self::Mmx if has_register(i, Register::is_vector_register) || uses_mxcsr(i) => ok::MMX | ok::SSE,
            Self::Mmx => ok::MMX,
            Self::Sse => ok::SSE,
            Self::Avx => ok::AVX,
        }
    }
}

fn has_register(i: &Instruction, kind: fn(Register) -> bool) -> bool {
    (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && kind(i.op_register(n)))
}

/// Whether `i` converts a scalar, which may lie in memory, to an integer.
fn converts(i: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        i.mnemonic(),
        M::Cvtss2si
            | M::Cvtsd2si
            | M::Cvttss2si
            | M::Cvttsd2si
            | M::Vcvtss2si
            | M::Vcvtsd2si
            | M::Vcvttss2si
            | M::Vcvttsd2si
    )
}

fn is_x87(i: &Instruction) -> bool {
    use CpuidFeature as F;
    i.cpuid_features().iter().any(|f| matches!(f, F::FPU | F::FPU287 | F::FPU387))
}

/// Whether `i` only computes with x87, vector and general registers, flags and its memory operand, and the
/// host can execute it: then it may run natively.
pub(crate) fn computes(i: &Instruction) -> bool {
    Class::of(i).is_some() && !is_by_hand(i) && on_host(i)
}

/// Whether the host has all that `i` needs. What it lacks is #UD in the guest as well.
pub(crate) fn on_host(i: &Instruction) -> bool {
    use CpuidFeature as F;
    i.cpuid_features().iter().all(|f| match f {
        F::FPU | F::FPU287 | F::FPU387 | F::CMOV | F::MMX | F::SSE | F::SSE2 => true,
        F::SSE3 => host!("sse3"),
        F::SSSE3 => host!("ssse3"),
        F::SSE4_1 => host!("sse4.1"),
        F::SSE4_2 => host!("sse4.2"),
        F::AES => host!("aes"),
        F::PCLMULQDQ => host!("pclmulqdq"),
        F::SHA => host!("sha"),
        F::GFNI => host!("gfni"),
        F::AVX => host!("avx"),
        F::AVX2 => host!("avx2"),
        F::FMA => host!("fma"),
        F::F16C => host!("f16c"),
        F::VAES => host!("vaes"),
        F::VPCLMULQDQ => host!("vpclmulqdq"),
        F::AVX_VNNI => host!("avxvnni"),
        _ => false,
    })
}

/// Instructions that touch control words, implicit memory or memory element by element, and so are
/// written by hand in this crate; and those of other families.
fn is_by_hand(i: &Instruction) -> bool {
    use Mnemonic as M;
    i.is_vsib()
        || matches!(
            i.mnemonic(),
            M::Fninit
                | M::Finit
                | M::Fnclex
                | M::Fclex
                | M::Fnstcw
                | M::Fstcw
                | M::Fnstsw
                | M::Fstsw
                | M::Fnstenv
                | M::Fstenv
                | M::Fnsave
                | M::Fsave
                | M::Fldcw
                | M::Fldenv
                | M::Frstor
                | M::Wait
                | M::Fneni
                | M::Feni
                | M::Fndisi
                | M::Fdisi
                | M::Fnsetpm
                | M::Fsetpm
                | M::Frstpm
                | M::Emms
                | M::Maskmovdqu
                | M::Vmaskmovdqu
                | M::Maskmovq
                | M::Vmaskmovps
                | M::Vmaskmovpd
                | M::Vpmaskmovd
                | M::Vpmaskmovq
                | M::Vzeroupper
                | M::Vzeroall
        )
}

/// Whether `i` may raise SIMD floating-point exceptions or depends on MXCSR.
pub(crate) fn uses_mxcsr(i: &Instruction) -> bool {
    const STEMS: [&str; 14] = [
        "Add", "Sub", "Mul", "Div", "Sqrt", "Min", "Max", "Cmp", "Comi", "Ucomi", "Round", "Hadd", "Hsub",
        "Dp",
    ];
    let name = format!("{:?}", i.mnemonic());
    let name = match name.strip_prefix('V') {
        Some(rest) => format!("{}{}", rest[..1].to_uppercase(), &rest[1..]),
        None => name,
    };
    let floating = ["ps", "pd", "ss", "sd"].iter().any(|suffix| name.ends_with(suffix));
    name.starts_with("Cvt")
        || floating
            && (STEMS.iter().any(|stem| {
                name.strip_prefix(stem).is_some_and(|rest| rest.len() == 2 || rest.starts_with("sub"))
            }) || ["Fmadd", "Fmsub", "Fnmadd", "Fnmsub"].iter().any(|stem| name.starts_with(stem)))
}

/// Whether the memory operand of `i` must be aligned to its size: 16 bytes for legacy encodings but those
/// made for unaligned access, and the aligned and non-temporal moves of VEX.
pub(crate) fn must_align(i: &Instruction) -> bool {
    use Mnemonic as M;
    let size = i.memory_size().size();
    match i.encoding() {
        EncodingKind::Legacy => {
            size == 16
                && !matches!(
                    i.mnemonic(),
                    M::Movups
                        | M::Movupd
                        | M::Movdqu
                        | M::Lddqu
                        | M::Pcmpestri
                        | M::Pcmpestrm
                        | M::Pcmpistri
                        | M::Pcmpistrm
                        | M::Pcmpestri64
                        | M::Pcmpestrm64
                )
        }
        EncodingKind::VEX => matches!(
            i.mnemonic(),
            M::Vmovaps | M::Vmovapd | M::Vmovdqa | M::Vmovntps | M::Vmovntpd | M::Vmovntdq | M::Vmovntdqa
        ),
        _ => false,
    }
}

/// The arithmetic flags as `iced_x86` knows them, which counts x87 condition codes among flags too.
const ARITHMETIC: u32 =
    RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

/// Whether `i` reads the arithmetic flags (FCMOVcc).
pub(crate) fn reads_flags(i: &Instruction) -> bool {
    i.rflags_read() & ARITHMETIC != 0
}

/// Whether `i` changes the arithmetic flags.
pub(crate) fn writes_flags(i: &Instruction) -> bool {
    i.rflags_modified() & ARITHMETIC != 0
}

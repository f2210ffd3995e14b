//! Which instructions are tested, and which are not and why.

use iced_x86::{Code, CpuidFeature, EncodingKind, FlowControl, Mnemonic, OpCodeOperandKind as Op};

use crate::case::Mode;

/// Kinds of instructions.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Family {
    /// General-purpose instructions that are in no other family.
    Integer,
    /// String instructions.
    String,
    /// PUSH, POP and the like.
    Stack,
    /// Near branches.
    Branch,
    /// x87.
    X87,
    /// MMX.
    Mmx,
    /// SSE to SSE4.2.
    Sse,
    /// AVX, AVX2, FMA, F16C.
    Avx,
    /// AES, PCLMULQDQ, SHA.
    Crypto,
}

impl Family {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Integer,
        Self::String,
        Self::Stack,
        Self::Branch,
        Self::X87,
        Self::Mmx,
        Self::Sse,
        Self::Avx,
        Self::Crypto,
    ];

    /// Whether its instructions work on x87 or vector registers.
    pub const fn is_vector(self) -> bool {
        matches!(self, Self::X87 | Self::Mmx | Self::Sse | Self::Avx | Self::Crypto)
    }

    /// How many of 100 cases are of the family.
    pub(super) const fn weight(self) -> u64 {
        match self {
            Self::Integer => 40,
            Self::String => 7,
            Self::Stack => 6,
            Self::Branch => 5,
            Self::X87 => 10,
            Self::Mmx => 6,
            Self::Sse => 12,
            Self::Avx => 11,
            Self::Crypto => 3,
        }
    }
}

/// Instructions left out by name, and why.
pub const EXCLUDED: &[(Mnemonic, &str)] = {
    use Mnemonic as M;
    const SYSTEM: &str = "enters the kernel";
    const TABLES: &str = "depends on descriptor tables";
    const UMIP: &str = "emulated by the host's kernel under UMIP";
    const IMAGE: &str =
        "images contain fields that differ between processors; tested by hand-written programs";
    const FAR: &str = "far transfer";
    &[
        (M::Cpuid, "differs between processors"),
        (M::Rdtsc, "never the same twice"),
        (M::Ud0, "processors differ in its length"),
        (M::Ud1, "processors differ in its length"),
        (M::Syscall, SYSTEM),
        (M::Sysenter, SYSTEM),
        (M::Int, SYSTEM),
        (M::Int1, SYSTEM),
        (M::Int3, "marks the end of a case"),
        (M::Into, SYSTEM),
        (M::Iret, FAR),
        (M::Iretd, FAR),
        (M::Iretq, FAR),
        (M::Retf, FAR),
        (M::Cli, "the kernel may emulate it"),
        (M::Sti, "the kernel may emulate it"),
        (M::Sgdt, UMIP),
        (M::Sidt, UMIP),
        (M::Sldt, UMIP),
        (M::Str, UMIP),
        (M::Smsw, UMIP),
        (M::Lar, TABLES),
        (M::Lsl, TABLES),
        (M::Verr, TABLES),
        (M::Verw, TABLES),
        (M::Arpl, TABLES),
        (M::Lds, TABLES),
        (M::Les, TABLES),
        (M::Lfs, TABLES),
        (M::Lgs, TABLES),
        (M::Lss, TABLES),
        (M::Fldenv, IMAGE),
        (M::Fnstenv, IMAGE),
        (M::Fnsave, IMAGE),
        (M::Frstor, IMAGE),
        (M::Fxsave, IMAGE),
        (M::Fxsave64, IMAGE),
        (M::Fxrstor, IMAGE),
        (M::Fxrstor64, IMAGE),
    ]
};

/// Instruction forms left out, and why.
pub const EXCLUDED_FORMS: &[(Code, &str)] = {
    const HINT: &str = "with a register operand #UD on AMD processors";
    &[
        (Code::Reservednop_rm16_r16_0F0D, HINT),
        (Code::Reservednop_rm32_r32_0F0D, HINT),
        (Code::Reservednop_rm64_r64_0F0D, HINT),
        (Code::Movsxd_r16_rm16, "reads two bytes on Intel's processors, four on AMD's"),
    ]
};

/// Whether the host has a feature.
type Detect = fn() -> bool;

/// The CPUID features whose instructions are tested; those without a second part every x86-64 processor has.
const FEATURES: &[(CpuidFeature, Option<Detect>)] = {
    use CpuidFeature as F;
    macro_rules! detect {
        ($name:tt) => {
            Some(|| std::is_x86_feature_detected!($name))
        };
    }
    &[
        (F::INTEL8086, None),
        (F::INTEL186, None),
        (F::INTEL286, None),
        (F::INTEL386, None),
        (F::INTEL486, None),
        (F::X64, None),
        (F::CMOV, None),
        (F::CX8, None),
        (F::FPU, None),
        (F::FPU287, None),
        (F::FPU387, None),
        (F::MMX, None),
        (F::MULTIBYTENOP, None),
        (F::PAUSE, None),
        (F::SSE, None),
        (F::SSE2, None),
        (F::CLFSH, None),
        (F::SSE3, detect!("sse3")),
        (F::SSSE3, detect!("ssse3")),
        (F::SSE4_1, detect!("sse4.1")),
        (F::SSE4_2, detect!("sse4.2")),
        (F::CMPXCHG16B, detect!("cmpxchg16b")),
        (F::POPCNT, detect!("popcnt")),
        (F::LZCNT, detect!("lzcnt")),
        (F::MOVBE, detect!("movbe")),
        (F::BMI1, detect!("bmi1")),
        (F::BMI2, detect!("bmi2")),
        (F::ADX, detect!("adx")),
        (F::AVX, detect!("avx")),
        (F::AVX2, detect!("avx2")),
        (F::FMA, detect!("fma")),
        (F::F16C, detect!("f16c")),
        (F::AES, detect!("aes")),
        (F::PCLMULQDQ, detect!("pclmulqdq")),
        (F::SHA, detect!("sha")),
    ]
};

/// The features that the host lacks, whose instructions are therefore not tested.
pub fn lacking() -> Vec<CpuidFeature> {
    FEATURES.iter().filter(|(_, has)| has.is_some_and(|has| !has())).map(|(f, _)| *f).collect()
}

/// The instructions to test, by family.
pub(super) struct Catalog {
    codes: Vec<(Family, Vec<Code>)>,
    known: Vec<Option<Family>>,
}

impl Catalog {
    /// Those of `mode` that this host has and that `wanted` names.
    pub(super) fn new(mode: Mode, wanted: impl Fn(Code) -> bool) -> Self {
        let has: Vec<CpuidFeature> =
            FEATURES.iter().filter(|(_, has)| has.is_none_or(|has| has())).map(|(f, _)| *f).collect();
        let known: Vec<Option<Family>> = Code::values()
            .map(|code| {
                let tested = code.cpuid_features().iter().all(|f| has.contains(f)) && testable(code, mode);
                tested.then(|| family(code))
            })
            .collect();
        let codes = Family::ALL
            .iter()
            .map(|&f| {
                let codes = Code::values().filter(|&c| known[c as usize] == Some(f) && wanted(c)).collect();
                (f, codes)
            })
            .filter(|(_, codes): &(Family, Vec<Code>)| !codes.is_empty())
            .collect();
        Self { codes, known }
    }

    /// The families that have instructions, with these.
    pub(super) fn families(&self) -> &[(Family, Vec<Code>)] {
        &self.codes
    }

    /// The family of `code` if it may be executed at all.
    pub(super) fn family(&self, code: Code) -> Option<Family> {
        self.known.get(code as usize).copied().flatten()
    }
}

fn testable(code: Code, mode: Mode) -> bool {
    let op = code.op_code();
    let far_or_odd = |kind: &Op| {
        matches!(kind, Op::farbr2_2 | Op::farbr4_2 | Op::xbegin_2 | Op::xbegin_4 | Op::br16_1 | Op::br16_2)
    };
    op.is_instruction()
        && op.is_available_in_mode(mode.bitness())
        && op.cpl3()
        && !op.is_privileged()
        && !op.is_input_output()
        && !op.fwait()
        && matches!(op.encoding(), EncodingKind::Legacy | EncodingKind::VEX)
        && !EXCLUDED.iter().any(|(m, _)| *m == code.mnemonic())
        && !op.op_kinds().iter().any(far_or_odd)
        && !writes_segment(code)
        && !EXCLUDED_FORMS.iter().any(|(c, _)| *c == code)
        && !far(code)
        // 16-bit near branches: the vendors disagree on the operand size prefix.
        && !(op.operand_size() == 16 && branches(code))
}

/// Loads of segment registers depend on descriptor tables.
fn writes_segment(code: Code) -> bool {
    use Op as K;
    let op = code.op_code();
    let segment = matches!(op.op0_kind(), K::seg_reg | K::es | K::cs | K::ss | K::ds | K::fs | K::gs);
    segment && matches!(code.mnemonic(), Mnemonic::Mov | Mnemonic::Pop)
}

fn far(code: Code) -> bool {
    code.is_jmp_far() || code.is_jmp_far_indirect() || code.is_call_far() || code.is_call_far_indirect()
}

fn branches(code: Code) -> bool {
    !matches!(code.flow_control(), FlowControl::Next | FlowControl::Exception)
}

fn family(code: Code) -> Family {
    use CpuidFeature as F;
    let op = code.op_code();
    let features = code.cpuid_features();
    let any = |list: &[F]| features.iter().any(|f| list.contains(f));
    let mut instruction = iced_x86::Instruction::default();
    instruction.set_code(code);
    if any(&[F::AES, F::PCLMULQDQ, F::SHA]) {
        Family::Crypto
    } else if any(&[F::FPU, F::FPU287, F::FPU387]) {
        Family::X87
    } else if any(&[F::BMI1, F::BMI2]) {
        Family::Integer
    } else if op.encoding() == EncodingKind::VEX {
        Family::Avx
    } else if op.op_kinds().iter().any(|k| matches!(k, Op::mm_reg | Op::mm_rm | Op::mm_or_mem))
        || any(&[F::MMX])
    {
        Family::Mmx
    } else if instruction.is_string_instruction() {
        Family::String
    } else if branches(code) {
        Family::Branch
    } else if op.is_stack_instruction() {
        Family::Stack
    } else if any(&[F::SSE, F::SSE2, F::SSE3, F::SSSE3, F::SSE4_1, F::SSE4_2])
        && code.mnemonic() != Mnemonic::Crc32
    {
        Family::Sse
    } else {
        Family::Integer
    }
}

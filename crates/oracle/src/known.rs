//! Differences between the host CPU and the interpreter that are known and accepted, with their reasons.

use iced_x86::{Mnemonic, Register};

use crate::case::{Case, Mode, Outcome};
use crate::compare::Difference;
use crate::generate::Family;

/// An accepted difference.
#[derive(Debug)]
pub struct Known {
    /// A short name.
    pub name: &'static str,
    /// Why the two differ, and why that is accepted.
    pub reason: &'static str,
    /// Whether it explains a difference. Arguments: the case, the host's outcome, the interpreter's.
    applies: fn(&Case, &Outcome, &Outcome) -> bool,
    /// The parts of the outcome that it explains, by the beginning of their name; all if empty.
    parts: &'static [&'static str],
}

const SS: u8 = 12;
const GP: u8 = 13;
const PF: u8 = 14;
const AC: u8 = 17;
const XM: u8 = 19;
/// RFLAGS.AC.
const ALIGNMENT_CHECK: u64 = 1 << 18;
/// MXCSR.UM.
const UNDERFLOW_MASK: u32 = 1 << 11;

/// All of them.
pub const KNOWN: &[Known] = &[
    Known {
        name: "wide alignment check",
        reason: "which x87 and vector accesses #AC covers, and whether it comes before a page fault, differs \
                 between processors; the interpreter checks integer accesses only",
        applies: |case, host, other| {
            case.registers.rflags & ALIGNMENT_CHECK != 0
                && case.family.is_vector()
                && (raised(host) == Some(AC) || raised(other) == Some(AC))
        },
        parts: &[],
    },
    Known {
        name: "ENTER alignment check",
        reason: "some processors check the alignment of the final stack pointer, which ENTER only probes",
        applies: |case, host, _| case.instruction.mnemonic() == Mnemonic::Enter && raised(host) == Some(AC),
        parts: &[],
    },
    Known {
        name: "SHA alignment",
        reason: "Intel demands that the memory operand of SHA instructions is aligned (SDM vol. 2, exception \
                 class 4), AMD does not",
        applies: |case, host, other| {
            let sha = case.instruction.cpuid_features().contains(&iced_x86::CpuidFeature::SHA);
            sha && raised(other) == Some(GP) && raised(host) != Some(GP)
        },
        parts: &[],
    },
    Known {
        name: "masked byte store",
        reason: "whether bytes that MASKMOVDQU and MASKMOVQ do not store can fault, and which address a fault \
                 reports, is up to the implementation (SDM vol. 2, MASKMOVDQU)",
        applies: |case, host, _| {
            use Mnemonic as M;
            matches!(case.instruction.mnemonic(), M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu)
                && matches!(raised(host), Some(PF | GP))
        },
        parts: &[],
    },
    Known {
        name: "offset not canonical",
        reason: "with a segment base, AMD processors want offset and sum to be canonical, Intel's the sum only",
        applies: |case, host, _| {
            let i = &case.instruction;
            let gs = i.memory_segment() == Register::GS || i.segment_prefix() == Register::GS;
            gs && raised(host) == Some(GP)
        },
        parts: &[],
    },
    Known {
        name: "order in CALL",
        reason: "AMD processors store the return address before they look at the target, Intel's after",
        applies: |case, host, other| {
            case.instruction.is_call_near_indirect()
                && matches!(raised(host), Some(PF | AC | SS))
                && raised(other) == Some(GP)
        },
        parts: &[],
    },
    Known {
        name: "80-bit operand in two pieces",
        reason: "a ten-byte operand that runs out of canonical addresses or of the segment: AMD processors access \
                 eight bytes, which may fault, before they look at the other two",
        applies: |case, host, other| {
            case.instruction.memory_size().size() == 10
                && raised(host) == Some(PF)
                && matches!(raised(other), Some(GP | SS))
        },
        parts: &[],
    },
    Known {
        name: "upper half of a pushed selector",
        reason: "with a 32-bit operand size Intel's processors store two bytes (SDM vol. 2, PUSH), AMD's four",
        applies: |case, host, other| {
            let i = &case.instruction;
            let selector = i.mnemonic() == Mnemonic::Push && i.op0_register().is_segment_register();
            selector && (raised(host) == raised(other) || matches!(raised(host), Some(SS | AC)))
        },
        parts: &[],
    },
    Known {
        name: "POPA half done",
        reason: "registers popped before a page fault may have changed or not: the instruction starts again",
        applies: |case, host, other| {
            matches!(case.instruction.mnemonic(), Mnemonic::Popa | Mnemonic::Popad)
                && raised(host).is_some()
                && raised(host) == raised(other)
        },
        parts: &["R"],
    },
    Known {
        name: "misaligned beyond the limit",
        reason: "whether the segment limit (#GP, #SS) or the alignment (#GP, #AC) of an operand is looked at first \
                 differs",
        applies: |case, host, other| {
            case.mode == Mode::Bits32
                && matches!(raised(host), Some(GP | AC))
                && matches!(raised(other), Some(SS | GP))
                && raised(host) != raised(other)
        },
        parts: &["exception"],
    },
    Known {
        name: "order of operands of CMPS",
        reason: "when both operands fault, which one comes first differs",
        applies: |case, host, other| {
            use Mnemonic as M;
            let compares = [M::Cmpsb, M::Cmpsw, M::Cmpsd, M::Cmpsq];
            case.family == Family::String
                && compares.contains(&case.instruction.mnemonic())
                && raised(host).is_some()
                && raised(other).is_some()
        },
        parts: &["exception"],
    },
    Known {
        name: "masked elements beyond the limit",
        reason: "the limit may be checked for the whole operand or for the chosen elements only",
        applies: |case, host, _| {
            use Mnemonic as M;
            let masked = [M::Vmaskmovps, M::Vmaskmovpd, M::Vpmaskmovd, M::Vpmaskmovq];
            case.mode == Mode::Bits32
                && masked.contains(&case.instruction.mnemonic())
                && matches!(raised(host), Some(GP | SS))
        },
        parts: &[],
    },
    Known {
        name: "exact underflow",
        reason: "with underflow unmasked a tiny result raises #XM though it is exact; instructions that run \
                 with all exceptions masked do not show that",
        applies: |case, host, _| {
            let unmasked = case.registers.vector.mxcsr & UNDERFLOW_MASK == 0;
            unmasked && raised(host) == Some(XM)
        },
        parts: &[],
    },
    Known {
        name: "flags beside #XM",
        reason: "which exception flags of other elements are set when one element raises #XM differs between \
                 processors",
        applies: |_, host, other| raised(host) == Some(XM) && raised(other) == Some(XM),
        parts: &["MXCSR"],
    },
    Known {
        name: "x87 state after #XM",
        reason: "a conversion from or to an MMX register that raises #XM may have left x87 mode before",
        applies: |case, host, other| {
            case.family == Family::Mmx && raised(host) == Some(XM) && raised(other) == Some(XM)
        },
        parts: &["FSW", "x87 tags", "ST", "MXCSR"],
    },
];

fn raised(outcome: &Outcome) -> Option<u8> {
    outcome.exception.map(|e| e.vector)
}

/// The known difference that explains all of `differences`, if one does.
pub fn explain(
    case: &Case,
    host: &Outcome,
    other: &Outcome,
    differences: &[Difference],
) -> Option<&'static Known> {
    KNOWN.iter().find(|known| {
        let covers = |d: &Difference| known.parts.iter().any(|p| d.part.starts_with(p));
        (known.applies)(case, host, other) && (known.parts.is_empty() || differences.iter().all(covers))
    })
}

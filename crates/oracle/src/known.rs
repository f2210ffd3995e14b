//! Differences between the host CPU and the interpreter that are known and accepted, with their reasons.

use cpu::state::reg;
use iced_x86::{Mnemonic, OpKind, Register};

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

const BR: u8 = 5;
const SS: u8 = 12;
const GP: u8 = 13;
const PF: u8 = 14;
const AC: u8 = 17;
const XM: u8 = 19;
/// RFLAGS.AC.
const ALIGNMENT_CHECK: u64 = 1 << 18;
/// The x87 status word's ES: an exception that is not masked is pending.
const EXCEPTION_SUMMARY: u16 = 1 << 7;
/// The longest memory operand of the instructions tested, in bytes; PUSHA writes as much.
const LARGEST_OPERAND: u64 = 32;
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
        reason: "processors of both vendors may store the return address before they see that the target is not \
                 canonical; the interpreter looks at the target first",
        applies: |case, host, other| {
            case.instruction.is_call_near_indirect()
                && matches!(raised(host), Some(PF | AC | SS | GP))
                && raised(other) == Some(GP)
        },
        parts: &["exception", "memory"],
    },
    Known {
        name: "80-bit operand in two pieces",
        reason: "a ten-byte operand is accessed in two pieces: the first may fault, or be stored, before it is seen \
                 that the second cannot be (SDM vol. 3, \"Guaranteed Atomic Operations\")",
        applies: |case, host, other| {
            case.instruction.memory_size().size() == 10
                && raised(host) == Some(PF)
                && matches!(raised(other), Some(PF | GP | SS))
        },
        parts: &["exception", "memory"],
    },
    Known {
        name: "round the end of a 4 GiB segment",
        reason: "an operand that begins below 4 GiB and ends above: AMD processors raise #GP or #SS, Intel's may go \
                 on at address 0 (SDM vol. 3, \"Limit Checking\")",
        applies: |case, host, other| {
            let wraps = |address: u64| {
                let from_edge = u64::from((address.wrapping_add(LARGEST_OPERAND)) as u32);
                from_edge < 2 * LARGEST_OPERAND
            };
            case.mode == Mode::Bits32
                && host.exception.is_some_and(|e| e.vector == PF && wraps(e.address))
                && matches!(raised(other), Some(GP | SS))
        },
        parts: &["exception"],
    },
    Known {
        name: "x87 exception or fault",
        reason: "a store that raises an unmasked x87 exception stores nothing: Intel's processors then do not look \
                 at the operand, AMD's do and fault",
        applies: |case, host, other| {
            case.family == Family::X87
                && raised(host).is_none()
                && host.registers.vector.fsw & EXCEPTION_SUMMARY != 0
                && matches!(raised(other), Some(PF | GP | SS))
        },
        parts: &["exception", "RIP", "FSW"],
    },
    Known {
        name: "MXCSR or fault",
        reason: "VCVTPS2PH to memory that faults: Intel's processors set the flags of MXCSR, or raise #XM, before \
                 they look at the operand",
        applies: |case, host, other| {
            case.instruction.mnemonic() == Mnemonic::Vcvtps2ph
                && matches!(raised(host), Some(XM | PF | GP | SS))
                && matches!(raised(other), Some(PF | GP | SS))
        },
        parts: &["exception", "MXCSR"],
    },
    Known {
        name: "x87 mode left before a fault",
        reason: "an MMX instruction resets TOP and the tags: Intel's processors do so before the access that faults",
        applies: |case, host, other| {
            case.family == Family::Mmx
                && matches!(raised(host), Some(PF | GP | SS | AC))
                && matches!(raised(other), Some(PF | GP | SS | AC))
        },
        parts: &["FSW", "x87 tags", "ST"],
    },
    Known {
        name: "elements of a faulting gather",
        reason: "elements after the one that faults may have been gathered or not (SDM vol. 2, VPGATHERDD); which of \
                 several faults is reported is open too",
        applies: |case, host, other| {
            case.instruction.is_vsib() && raised(host).is_some() && raised(other).is_some()
        },
        parts: &["YMM", "exception"],
    },
    Known {
        name: "flags of a faulting REP CMPS",
        reason: "Intel's processors and the interpreter restore RFLAGS when a repeated CMPS or SCAS faults (SDM \
                 vol. 2, REP); AMD's keep those of the last comparison",
        applies: |case, host, other| {
            let i = &case.instruction;
            case.family == Family::String
                && (i.has_rep_prefix() || i.has_repne_prefix())
                && raised(host).is_some()
                && raised(host) == raised(other)
        },
        parts: &["RFLAGS"],
    },
    Known {
        name: "upper halves of string registers",
        reason: "with 32-bit addresses Intel's processors clear the upper halves of RCX, RSI and RDI even where the \
                 first element faults or ECX is zero, AMD's only where they change",
        applies: |case, host, other| {
            let (before, after) = (&other.registers.gpr, &host.registers.gpr);
            case.family == Family::String
                && case.mode == Mode::Bits64
                && [reg::RCX, reg::RSI, reg::RDI]
                    .map(usize::from)
                    .iter()
                    .all(|&n| after[n] == before[n] || after[n] == before[n] & 0xffff_ffff)
        },
        parts: &["RCX", "RSI", "RDI"],
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
        reason: "whether the limit of segment or canonical addresses (#GP, #SS) or the alignment (#GP, #AC) of an \
                 operand is looked at first differs",
        applies: |_, host, other| {
            matches!(raised(host), Some(GP | AC))
                && matches!(raised(other), Some(SS | GP))
                && raised(host) != raised(other)
        },
        parts: &["exception"],
    },
    Known {
        name: "order of operands of CMPS and MOVS",
        reason: "when both operands fault, which one comes first differs",
        applies: |case, host, other| {
            case.family == Family::String
                && [0, 1].iter().all(|&n| case.instruction.op_kind(n) != OpKind::Register)
                && raised(host).is_some()
                && raised(other).is_some()
        },
        parts: &["exception"],
    },
    Known {
        name: "BOUND with half an operand",
        reason: "Intel's processors compare with the lower bound before they read the upper one, which may fault",
        applies: |case, host, other| {
            let bound = case.instruction.mnemonic() == Mnemonic::Bound;
            bound && raised(host) == Some(BR) && matches!(raised(other), Some(PF | GP | SS))
        },
        parts: &["exception"],
    },
    Known {
        name: "address of masked elements",
        reason: "the address of a page fault may be that of the operand's part in the page or of the first chosen \
                 element there",
        applies: |case, host, other| {
            let page = |o: &Outcome| o.exception.filter(|e| e.vector == PF).map(|e| e.address >> 12);
            masked(case) && page(host).is_some() && page(host) == page(other)
        },
        parts: &["exception"],
    },
    Known {
        name: "masked elements beyond the limit",
        reason: "the limit, of the segment or of canonical addresses, may be checked for the whole operand or for \
                 the chosen elements only",
        applies: |case, host, _| masked(case) && matches!(raised(host), Some(GP | SS)),
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

/// Whether the instruction loads or stores chosen elements.
fn masked(case: &Case) -> bool {
    use Mnemonic as M;
    matches!(case.instruction.mnemonic(), M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq)
}

/// The known differences that together explain all of `differences`, if they do: the first of them.
pub fn explain(
    case: &Case,
    host: &Outcome,
    other: &Outcome,
    differences: &[Difference],
) -> Option<&'static Known> {
    let applying = || KNOWN.iter().filter(|known| (known.applies)(case, host, other));
    let covers = |known: &Known, d: &Difference| {
        known.parts.is_empty() || known.parts.iter().any(|p| d.part.starts_with(p))
    };
    let explained = differences.iter().all(|d| applying().any(|known| covers(known, d)));
    applying().find(|known| explained && differences.iter().any(|d| covers(known, d)))
}

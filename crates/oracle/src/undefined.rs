//! What the architecture leaves open about an instruction's results.

use iced_x86::{Mnemonic, OpKind, Register, RflagsBits};

use crate::case::Case;

/// The bits of RFLAGS that are compared: the arithmetic ones, TF, DF, NT, AC, ID.
const COMPARED: u64 = 0xd5 | 1 << 8 | 1 << 10 | 1 << 11 | 1 << 14 | 1 << 18 | 1 << 21;

const CF: u64 = 1 << 0;
const AF: u64 = 1 << 4;
const OF: u64 = 1 << 11;
/// All six.
const ARITHMETIC: u64 = 0x8d5;

/// The parts of an outcome that an instruction leaves undefined when it completes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Undefined {
    /// Bits of RFLAGS.
    pub rflags: u64,
    /// Whether the destination operand is.
    pub destination: bool,
}

impl Undefined {
    /// Those of the case's instruction with the case's operands (Intel SDM vol. 2, "Flags Affected").
    pub fn of(case: &Case) -> Self {
        let i = &case.instruction;
        use Mnemonic as M;
        match i.mnemonic() {
            M::Shl | M::Sal | M::Shr | M::Sar | M::Shld | M::Shrd | M::Rol | M::Ror | M::Rcl | M::Rcr => {
                shift(case)
            }
            _ => Self { rflags: rflags(i.rflags_undefined()), destination: false },
        }
    }

    /// The bits of RFLAGS to compare.
    pub fn compared(&self) -> u64 {
        COMPARED & !self.rflags
    }
}

/// The decoder's flag bits as RFLAGS has them.
fn rflags(bits: u32) -> u64 {
    let map = [
        (RflagsBits::CF, CF),
        (RflagsBits::PF, 1 << 2),
        (RflagsBits::AF, AF),
        (RflagsBits::ZF, 1 << 6),
        (RflagsBits::SF, 1 << 7),
        (RflagsBits::OF, OF),
    ];
    map.iter().filter(|(bit, _)| bits & bit != 0).fold(0, |all, (_, flag)| all | flag)
}

/// Shifts and rotates: a count of zero changes no flag; OF is defined for a count of one only.
fn shift(case: &Case) -> Undefined {
    use Mnemonic as M;
    let i = &case.instruction;
    let size = match i.op0_kind() {
        OpKind::Register => i.op0_register().size(),
        _ => i.memory_size().size(),
    } as u64;
    let last = i.op_count().saturating_sub(1);
    let count = match i.op_kind(last) {
        OpKind::Register if i.op_register(last) == Register::CL => case.registers.gpr[1],
        _ => i.immediate(last),
    };
    let count = count & if size == 8 { 0x3f } else { 0x1f };
    if count == 0 {
        return Undefined::default();
    }
    let double = matches!(i.mnemonic(), M::Shld | M::Shrd);
    let rotate = matches!(i.mnemonic(), M::Rol | M::Ror | M::Rcl | M::Rcr);
    let mut undefined = Undefined { rflags: if rotate { 0 } else { AF }, destination: false };
    if count > 1 {
        undefined.rflags |= OF;
    }
    if double && count > size * 8 {
        undefined = Undefined { rflags: ARITHMETIC, destination: true };
    } else if !rotate && i.mnemonic() != M::Sar && count >= size * 8 && !double {
        undefined.rflags |= CF;
    }
    undefined
}

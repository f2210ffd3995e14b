//! Vector and x87 instructions, executed by the host CPU on the guest's register image.

pub(crate) mod clock;

use iced_x86::Instruction;

use crate::insn::{Handler, Insn};
use crate::state::CodeMode;
use crate::vcpu::Vcpu;

/// The code that runs guest instructions on the host CPU.
pub(crate) struct Native {}

impl Native {
    pub(crate) fn new() -> std::io::Result<Self> {
        Ok(Self {})
    }
}

/// Chooses the handler of an x87 or vector instruction.
pub(crate) fn select(
    _vcpu: &mut Vcpu,
    _i: &Instruction,
    _mode: CodeMode,
    _insn: &mut Insn,
) -> Option<Handler> {
    None
}

//! Privileged and mode-changing instructions.

use iced_x86::Instruction;

use crate::insn::{Handler, Insn};
use crate::state::CodeMode;

/// Chooses the handler of a system instruction.
pub(super) fn select(_i: &Instruction, _mode: CodeMode, _insn: &mut Insn) -> Option<Handler> {
    None
}

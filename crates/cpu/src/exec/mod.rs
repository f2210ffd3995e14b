//! The instructions, by family. Each family chooses a handler for the instructions it knows.

mod integer;
mod offered;
pub(crate) mod system;

use iced_x86::Instruction;

use crate::fault::{Exec, Fault, fault};
use crate::insn::{Handler, Insn};
use crate::state::CodeMode;
use crate::vcpu::Vcpu;

/// Chooses the handler of `i`. Families may also change the operand fields of `insn` (but not its length).
pub(crate) fn select(vcpu: &mut Vcpu, i: &Instruction, mode: CodeMode, insn: &mut Insn) -> Handler {
    let Some(i) = &offered::decoded(&vcpu.cpuid, i) else { return system::not_offered };
    insn.code = i.code();
    integer::select(i, mode, insn)
        .or_else(|| system::select(i, mode, insn))
        .or_else(|| crate::native::select(vcpu, i, mode, insn))
        .unwrap_or(undefined)
}

/// The handler of what is not an instruction, or not implemented: #UD, counted by name.
pub(crate) fn undefined(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    vcpu.note_unimplemented(i.code);
    fault(Fault::ud())
}

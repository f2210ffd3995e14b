//! Integer, string, stack and near-branch instructions.
//!
//! # Theory of operation
//! A handler is a generic function over operand size, operation and operand form, so that what runs knows
//! all three at compile time. Each module's `select` reads as a table from mnemonic to handler; the macros
//! in `form` turn a decoded size, condition or instruction-pointer width into the type parameter.
//!
//! Handlers compute first and change state last: an instruction that faults has changed nothing (string
//! instructions excepted, which stop at the element that faults).

mod arithmetic;
mod bits;
mod branch;
mod condition;
mod decimal;
mod exchange;
mod extract;
mod form;
mod misc;
mod multiply;
mod shift;
mod stack;
mod string;
mod transfer;

#[cfg(test)]
mod tests;

use iced_x86::Instruction;

use crate::insn::{Handler, Insn};
use crate::state::CodeMode;

/// Chooses the handler of an integer instruction.
pub(super) fn select(i: &Instruction, mode: CodeMode, insn: &mut Insn) -> Option<Handler> {
    transfer::select(i, insn)
        .or_else(|| arithmetic::select(i, insn))
        .or_else(|| branch::select(i, insn))
        .or_else(|| stack::select(i, mode))
        .or_else(|| condition::select(i))
        .or_else(|| shift::select(i))
        .or_else(|| string::select(i, mode, insn))
        .or_else(|| multiply::select(i))
        .or_else(|| exchange::select(i, insn))
        .or_else(|| bits::select(i, insn))
        .or_else(|| extract::select(i))
        .or_else(|| decimal::select(i))
        .or_else(|| misc::select(i))
}

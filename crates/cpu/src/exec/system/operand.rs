//! Operands of system instructions.
//!
//! The family keeps two facts about an instruction in [`Insn::imm2`]: its size in bytes, where one instruction comes in
//! several, and whether its register-or-memory operand is memory. Nothing here is hot.

use crate::data::Data;
use crate::fault::Exec;
use crate::insn::Insn;
use crate::vcpu::Vcpu;

const MEMORY: u8 = 0x80;

/// Stores the facts.
pub(super) fn describe(insn: &mut Insn, size: u8, memory: bool) {
    insn.imm2 = size | if memory { MEMORY } else { 0 };
}

/// The operand size in bytes as the family's table gives it.
pub(super) fn size(i: &Insn) -> u64 {
    u64::from(i.imm2 & !MEMORY)
}

/// Whether there is a memory operand.
pub(super) fn is_memory(i: &Insn) -> bool {
    i.imm2 & MEMORY != 0
}

/// Reads the register-or-memory operand, which is `register` if it is a register.
pub(super) fn read<T: Data>(vcpu: &mut Vcpu, i: &Insn, register: u8) -> Exec<T> {
    if is_memory(i) { vcpu.load(i) } else { Ok(vcpu.get(register)) }
}

/// Writes operand 0 as SLDT, STR, SMSW and MOV from a segment register do: 16 bits to memory, the operand
/// size to a register.
pub(super) fn write_selector_like(vcpu: &mut Vcpu, i: &Insn, value: u64) -> Exec {
    if is_memory(i) {
        return vcpu.store(i, value as u16);
    }
    write_register(vcpu, i, i.dst, value);
    Ok(())
}

/// Writes `register` with the operand size.
pub(super) fn write_register(vcpu: &mut Vcpu, i: &Insn, register: u8, value: u64) {
    match size(i) {
        2 => vcpu.set(register, value as u16),
        4 => vcpu.set(register, value as u32),
        _ => vcpu.set(register, value),
    }
}

/// Reads the `size` bytes (2, 4 or 8) that lie `offset` bytes above the stack pointer.
pub(super) fn peek(vcpu: &mut Vcpu, size: u64, offset: u64) -> Exec<u64> {
    match size {
        2 => Ok(u64::from(vcpu.peek::<u16>(offset)?)),
        4 => Ok(u64::from(vcpu.peek::<u32>(offset)?)),
        _ => vcpu.peek::<u64>(offset),
    }
}

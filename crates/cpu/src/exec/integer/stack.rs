//! PUSH, POP, PUSHA, POPA, ENTER and LEAVE.

use iced_x86::{Code, Instruction};

use super::form::{Form, form};
use crate::data::Data;
use crate::fault::Exec;
use crate::insn::{Handler, Insn};
use crate::stack::as_stack_fault;
use crate::state::{CodeMode, reg};
use crate::vcpu::Vcpu;

/// How the stack is reached: fixed by the mode that an instruction was decoded in.
pub(super) trait Stack {
    /// Pushes.
    fn push<T: Data>(vcpu: &mut Vcpu, value: T) -> Exec;
    /// Reads the top.
    fn peek<T: Data>(vcpu: &mut Vcpu) -> Exec<T>;
    /// Moves the stack pointer up.
    fn release(vcpu: &mut Vcpu, size: u64);
}

/// 64-bit mode.
pub(super) struct Flat;
/// The other modes.
pub(super) struct Segmented;

impl Stack for Flat {
    #[inline(always)]
    fn push<T: Data>(vcpu: &mut Vcpu, value: T) -> Exec {
        vcpu.push_flat(value)
    }

    #[inline(always)]
    fn peek<T: Data>(vcpu: &mut Vcpu) -> Exec<T> {
        vcpu.peek_flat()
    }

    #[inline(always)]
    fn release(vcpu: &mut Vcpu, size: u64) {
        vcpu.set_reg(reg::RSP, vcpu.reg(reg::RSP).wrapping_add(size));
    }
}

impl Stack for Segmented {
    fn push<T: Data>(vcpu: &mut Vcpu, value: T) -> Exec {
        vcpu.push(value)
    }

    fn peek<T: Data>(vcpu: &mut Vcpu) -> Exec<T> {
        vcpu.peek(0)
    }

    fn release(vcpu: &mut Vcpu, size: u64) {
        vcpu.release(size);
    }
}

/// `stacked!(size, mode => handler::<_, A>)`: the handler for operands of `size` bytes on the stack of `mode`.
macro_rules! stacked {
    ($size:expr, $mode:expr => $handler:ident::<_, _>) => {
        match ($size, $mode) {
            (2, CodeMode::Bits64) => Some($handler::<u16, Flat> as Handler),
            (8, CodeMode::Bits64) => Some($handler::<u64, Flat> as Handler),
            (2, _) => Some($handler::<u16, Segmented> as Handler),
            (4, _) => Some($handler::<u32, Segmented> as Handler),
            _ => None,
        }
    };
}

/// Chooses the handler of a stack instruction.
pub(super) fn select(i: &Instruction, mode: CodeMode) -> Option<Handler> {
    match i.code() {
        Code::Push_r16 | Code::Push_rm16 => push(i, mode, 2),
        Code::Push_r32 | Code::Push_rm32 => push(i, mode, 4),
        Code::Push_r64 | Code::Push_rm64 => push(i, mode, 8),
        Code::Push_imm16 | Code::Pushw_imm8 => stacked!(2, mode => push_imm::<_, _>),
        Code::Pushd_imm32 | Code::Pushd_imm8 => stacked!(4, mode => push_imm::<_, _>),
        Code::Pushq_imm32 | Code::Pushq_imm8 => stacked!(8, mode => push_imm::<_, _>),
        Code::Pop_r16 | Code::Pop_rm16 => pop(i, mode, 2),
        Code::Pop_r32 | Code::Pop_rm32 => pop(i, mode, 4),
        Code::Pop_r64 | Code::Pop_rm64 => pop(i, mode, 8),
        Code::Pushaw => Some(push_all::<u16>),
        Code::Pushad => Some(push_all::<u32>),
        Code::Popaw => Some(pop_all::<u16>),
        Code::Popad => Some(pop_all::<u32>),
        Code::Enterw_imm16_imm8 => Some(enter::<u16>),
        Code::Enterd_imm16_imm8 => Some(enter::<u32>),
        Code::Enterq_imm16_imm8 => Some(enter::<u64>),
        Code::Leavew => Some(leave::<u16>),
        Code::Leaved => Some(leave::<u32>),
        Code::Leaveq => Some(leave::<u64>),
        _ => None,
    }
}

fn push(i: &Instruction, mode: CodeMode, size: usize) -> Option<Handler> {
    match form(i) {
        Form::Reg => stacked!(size, mode => push_reg::<_, _>),
        Form::Mem => stacked!(size, mode => push_mem::<_, _>),
        _ => None,
    }
}

fn pop(i: &Instruction, mode: CodeMode, size: usize) -> Option<Handler> {
    match form(i) {
        Form::Reg => stacked!(size, mode => pop_reg::<_, _>),
        Form::Mem => stacked!(size, mode => pop_mem::<_, _>),
        _ => None,
    }
}

/// PUSH of the stack pointer pushes its value before the push.
fn push_reg<T: Data, S: Stack>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let value: T = vcpu.get(i.dst);
    S::push(vcpu, value)
}

fn push_mem<T: Data, S: Stack>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let value: T = vcpu.load(i)?;
    S::push(vcpu, value)
}

fn push_imm<T: Data, S: Stack>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    S::push(vcpu, T::truncate(i.imm))
}

/// POP into the stack pointer leaves the popped value in it.
fn pop_reg<T: Data, S: Stack>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let value: T = S::peek(vcpu)?;
    S::release(vcpu, T::SIZE);
    vcpu.set(i.dst, value);
    Ok(())
}

/// The address is computed with the stack pointer after the pop.
fn pop_mem<T: Data, S: Stack>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let value: T = S::peek(vcpu)?;
    let before = vcpu.reg(reg::RSP);
    S::release(vcpu, T::SIZE);
    vcpu.store(i, value).inspect_err(|_| vcpu.set_reg(reg::RSP, before))
}

/// PUSHA and PUSHAD: AX, CX, DX, BX, the original SP, BP, SI, DI.
fn push_all<T: Data>(vcpu: &mut Vcpu, _: &Insn) -> Exec {
    let mut pointer = vcpu.stack_pointer();
    for n in 0..8 {
        pointer = pointer.wrapping_sub(T::SIZE);
        let address = vcpu.stack_address(pointer, T::SIZE, true)?;
        let value: T = vcpu.get(n);
        vcpu.write(address, value)?;
    }
    vcpu.set_stack_pointer(pointer);
    Ok(())
}

/// POPA and POPAD; the stack pointer's slot is skipped.
fn pop_all<T: Data>(vcpu: &mut Vcpu, _: &Insn) -> Exec {
    let mut values = [T::truncate(0); 8];
    for (n, value) in values.iter_mut().enumerate() {
        *value = vcpu.peek(n as u64 * T::SIZE)?;
    }
    vcpu.release(8 * T::SIZE);
    for (n, value) in (0..8).rev().zip(values) {
        if n != reg::RSP {
            vcpu.set(n, value);
        }
    }
    Ok(())
}

/// ENTER (Intel SDM vol. 1, 6.6): saves the frame pointer, copies `imm2` - 1 frame pointers of enclosing
/// procedures, and allocates `imm` bytes.
fn enter<T: Data>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let level = i.imm2 & 31;
    let mut pointer = vcpu.stack_pointer().wrapping_sub(T::SIZE);
    let put = |vcpu: &mut Vcpu, pointer, value: T| {
        let address = vcpu.stack_address(pointer, T::SIZE, true)?;
        vcpu.write(address, value).map_err(as_stack_fault)
    };
    let mut enclosing = vcpu.reg(reg::RBP);
    put(vcpu, pointer, T::truncate(enclosing))?;
    let frame = pointer & vcpu.state.stack_mask;
    if level > 0 {
        for _ in 1..level {
            enclosing = enclosing.wrapping_sub(T::SIZE);
            pointer = pointer.wrapping_sub(T::SIZE);
            let address = vcpu.stack_address(enclosing & vcpu.state.stack_mask, T::SIZE, false)?;
            let saved: T = vcpu.read(address).map_err(as_stack_fault)?;
            put(vcpu, pointer, saved)?;
        }
        pointer = pointer.wrapping_sub(T::SIZE);
        put(vcpu, pointer, T::truncate(frame))?;
    }
    pointer = pointer.wrapping_sub(i.imm & 0xffff);
    // The manual: a page fault if a write at the final stack pointer would have one.
    let address = vcpu.stack_address(pointer, T::SIZE, true)?;
    vcpu.probe_write(address, T::SIZE)?;
    vcpu.set(reg::RBP, T::truncate(frame));
    vcpu.set_stack_pointer(pointer);
    Ok(())
}

/// LEAVE: the frame pointer becomes the stack pointer, from where the caller's frame pointer is popped.
fn leave<T: Data>(vcpu: &mut Vcpu, _: &Insn) -> Exec {
    let pointer = vcpu.reg(reg::RBP) & vcpu.state.stack_mask;
    let address = vcpu.stack_address(pointer, T::SIZE, false)?;
    let value: T = vcpu.read(address).map_err(as_stack_fault)?;
    vcpu.set_stack_pointer(pointer.wrapping_add(T::SIZE));
    vcpu.set(reg::RBP, value);
    Ok(())
}

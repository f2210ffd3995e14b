//! Pushes and pops.

use mmu::Gva;

use crate::data::Data;
use crate::fault::{Exec, Fault, Stop, fault, vector};
use crate::state::{CodeMode, reg, seg};
use crate::vcpu::Vcpu;

impl Vcpu {
    /// The stack pointer, truncated to the stack's width.
    #[inline(always)]
    pub fn stack_pointer(&self) -> u64 {
        self.reg(reg::RSP) & self.state.stack_mask
    }

    /// Sets the stack pointer; outside 64-bit mode the bits above the stack's width stay.
    #[inline(always)]
    pub fn set_stack_pointer(&mut self, value: u64) {
        let mask = self.state.stack_mask;
        let old = self.reg(reg::RSP);
        // A 32-bit stack clears the upper half as any 32-bit register write does.
        let keep = if mask == 0xffff { old & !mask } else { 0 };
        self.set_reg(reg::RSP, keep | value & mask);
    }

    /// The linear address of `size` bytes at stack offset `pointer`.
    ///
    /// # Errors
    /// #SS(0) outside the stack segment, or not canonical.
    #[inline(always)]
    pub fn stack_address(&self, pointer: u64, size: u64, write: bool) -> Exec<u64> {
        if self.state.code_mode == CodeMode::Bits64 {
            if !self.walk.canonical(Gva(pointer)) {
                return fault(Fault::with_code(vector::SS, 0));
            }
            return Ok(pointer);
        }
        self.segmented(seg::SS, pointer & self.state.stack_mask, size, write)
    }

    /// Pushes a `T`.
    ///
    /// # Errors
    /// Any fault of a stack write; RSP is then unchanged.
    #[inline(always)]
    pub fn push<T: Data>(&mut self, value: T) -> Exec {
        let pointer = self.stack_pointer().wrapping_sub(T::SIZE);
        let address = self.stack_address(pointer, T::SIZE, true)?;
        self.write(address, value).map_err(as_stack_fault)?;
        self.set_stack_pointer(pointer);
        Ok(())
    }

    /// Pops a `T`.
    ///
    /// # Errors
    /// Any fault of a stack read; RSP is then unchanged.
    #[inline(always)]
    pub fn pop<T: Data>(&mut self) -> Exec<T> {
        let value = self.peek(0)?;
        self.release(T::SIZE);
        Ok(value)
    }

    /// Reads the `T` that lies `offset` bytes above the stack pointer, without popping it. For instructions
    /// that must check all that they pop before they change anything.
    ///
    /// # Errors
    /// Any fault of a stack read.
    #[inline(always)]
    pub fn peek<T: Data>(&mut self, offset: u64) -> Exec<T> {
        let pointer = self.stack_pointer().wrapping_add(offset);
        let address = self.stack_address(pointer, T::SIZE, false)?;
        self.read(address).map_err(as_stack_fault)
    }

    /// As [`Self::push`], in 64-bit mode.
    ///
    /// # Errors
    /// As [`Self::push`].
    #[inline(always)]
    pub fn push_flat<T: Data>(&mut self, value: T) -> Exec {
        let pointer = self.reg(reg::RSP).wrapping_sub(T::SIZE);
        self.write(pointer, value).map_err(as_stack_fault)?;
        self.set_reg(reg::RSP, pointer);
        Ok(())
    }

    /// As [`Self::peek`] at the stack pointer, in 64-bit mode.
    ///
    /// # Errors
    /// As [`Self::peek`].
    #[inline(always)]
    pub fn peek_flat<T: Data>(&mut self) -> Exec<T> {
        self.read(self.reg(reg::RSP)).map_err(as_stack_fault)
    }

    /// Moves the stack pointer up by `size` bytes.
    #[inline(always)]
    pub fn release(&mut self, size: u64) {
        self.set_stack_pointer(self.stack_pointer().wrapping_add(size));
    }
}

/// A non-canonical address of a stack access is #SS, not #GP.
#[cold]
pub(crate) fn as_stack_fault(stop: Box<Stop>) -> Box<Stop> {
    match *stop {
        Stop::Fault(Fault { vector: vector::GP, .. }) => Fault::with_code(vector::SS, 0).into(),
        _ => stop,
    }
}

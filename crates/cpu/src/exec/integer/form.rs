//! Operand forms of decoded instructions, and the macros from run-time sizes to type parameters.

use iced_x86::{Instruction, OpKind};

/// The kinds of the first two operands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Form {
    /// Register (then nothing).
    Reg,
    /// Memory (then nothing).
    Mem,
    /// Register, register.
    RegReg,
    /// Register, memory.
    RegMem,
    /// Register, immediate.
    RegImm,
    /// Memory, register.
    MemReg,
    /// Memory, immediate.
    MemImm,
    /// Anything else.
    Other,
}

/// The form of `i`. A segment, control or debug register makes it [`Form::Other`]: not this family's.
pub(super) fn form(i: &Instruction) -> Form {
    #[derive(PartialEq)]
    enum Kind {
        None,
        Reg,
        Mem,
        Imm,
        Other,
    }
    let kind = |n| {
        if n >= i.op_count() {
            return Kind::None;
        }
        match i.op_kind(n) {
            OpKind::Register if i.op_register(n).is_gpr() => Kind::Reg,
            OpKind::Register => Kind::Other,
            OpKind::Memory => Kind::Mem,
            OpKind::Immediate8
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64 => Kind::Imm,
            _ => Kind::Other,
        }
    };
    match (kind(0), kind(1)) {
        (Kind::Reg, Kind::None) => Form::Reg,
        (Kind::Mem, Kind::None) => Form::Mem,
        (Kind::Reg, Kind::Reg) => Form::RegReg,
        (Kind::Reg, Kind::Mem) => Form::RegMem,
        (Kind::Reg, Kind::Imm) => Form::RegImm,
        (Kind::Mem, Kind::Reg) => Form::MemReg,
        (Kind::Mem, Kind::Imm) => Form::MemImm,
        _ => Form::Other,
    }
}

/// The size in bytes of operand `n` if it is a register or memory, else 0.
pub(super) fn size(i: &Instruction, n: u32) -> usize {
    match i.op_kind(n) {
        OpKind::Register => i.op_register(n).size(),
        OpKind::Memory => i.memory_size().size(),
        _ => 0,
    }
}

/// `sized!(size => handler::<_, A, B>)`: the handler for the integer of `size` bytes, as `Option<Handler>`.
macro_rules! sized {
    ($size:expr => $handler:ident::<_ $(, $more:tt)*>) => {
        match $size {
            1 => Some($handler::<u8 $(, $more)*> as $crate::insn::Handler),
            2 => Some($handler::<u16 $(, $more)*> as $crate::insn::Handler),
            4 => Some($handler::<u32 $(, $more)*> as $crate::insn::Handler),
            8 => Some($handler::<u64 $(, $more)*> as $crate::insn::Handler),
            _ => None,
        }
    };
}

/// As [`sized`], for instructions without a byte form.
macro_rules! wide {
    ($size:expr => $handler:ident::<_ $(, $more:tt)*>) => {
        match $size {
            2 => Some($handler::<u16 $(, $more)*> as $crate::insn::Handler),
            4 => Some($handler::<u32 $(, $more)*> as $crate::insn::Handler),
            8 => Some($handler::<u64 $(, $more)*> as $crate::insn::Handler),
            _ => None,
        }
    };
}

/// As [`sized`], for instructions with 32-bit and 64-bit forms only.
macro_rules! large {
    ($size:expr => $handler:ident::<_ $(, $more:tt)*>) => {
        match $size {
            4 => Some($handler::<u32 $(, $more)*> as $crate::insn::Handler),
            8 => Some($handler::<u64 $(, $more)*> as $crate::insn::Handler),
            _ => None,
        }
    };
}

/// `lockable!(insn, sized, size => handler::<_, A>)`: the handler with a last parameter that says whether
/// the instruction has a LOCK prefix.
macro_rules! lockable {
    ($insn:expr, $by:ident, $size:expr => $handler:ident::<_ $(, $more:tt)*>) => {
        if $insn.has($crate::insn::insn_flags::LOCK) {
            $by!($size => $handler::<_ $(, $more)*, true>)
        } else {
            $by!($size => $handler::<_ $(, $more)*, false>)
        }
    };
}

/// `conditional!(condition => handler::<A, _>)`: the handler whose last parameter is the condition code.
macro_rules! conditional {
    ($condition:expr => $handler:ident::<$($more:ident,)* _>) => {
        match $condition {
            0 => Some($handler::<$($more,)* 0> as $crate::insn::Handler),
            1 => Some($handler::<$($more,)* 1> as $crate::insn::Handler),
            2 => Some($handler::<$($more,)* 2> as $crate::insn::Handler),
            3 => Some($handler::<$($more,)* 3> as $crate::insn::Handler),
            4 => Some($handler::<$($more,)* 4> as $crate::insn::Handler),
            5 => Some($handler::<$($more,)* 5> as $crate::insn::Handler),
            6 => Some($handler::<$($more,)* 6> as $crate::insn::Handler),
            7 => Some($handler::<$($more,)* 7> as $crate::insn::Handler),
            8 => Some($handler::<$($more,)* 8> as $crate::insn::Handler),
            9 => Some($handler::<$($more,)* 9> as $crate::insn::Handler),
            10 => Some($handler::<$($more,)* 10> as $crate::insn::Handler),
            11 => Some($handler::<$($more,)* 11> as $crate::insn::Handler),
            12 => Some($handler::<$($more,)* 12> as $crate::insn::Handler),
            13 => Some($handler::<$($more,)* 13> as $crate::insn::Handler),
            14 => Some($handler::<$($more,)* 14> as $crate::insn::Handler),
            15 => Some($handler::<$($more,)* 15> as $crate::insn::Handler),
            _ => None,
        }
    };
}

pub(super) use {conditional, large, lockable, sized, wide};

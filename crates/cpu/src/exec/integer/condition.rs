//! The sixteen conditions, SETcc and CMOVcc.

use iced_x86::{ConditionCode, Instruction, Mnemonic as M};

use super::form::{Form, conditional, form, size};
use crate::data::Data;
use crate::fault::Exec;
use crate::flags::Flags;
use crate::insn::{Handler, Insn};
use crate::vcpu::Vcpu;

/// Whether condition `C`, the low four bits of the opcode, holds (Intel SDM vol. 1, appendix B).
#[inline(always)]
pub(super) fn holds<const C: u8>(flags: &Flags) -> bool {
    let positive = match C >> 1 {
        0 => flags.of(),
        1 => flags.cf(),
        2 => flags.zf(),
        3 => flags.cf() || flags.zf(),
        4 => flags.sf(),
        5 => flags.pf(),
        6 => flags.sf() != flags.of(),
        _ => flags.zf() || flags.sf() != flags.of(),
    };
    positive != (C & 1 != 0)
}

/// The condition of `i` as the low four bits of its opcode.
pub(super) fn condition(i: &Instruction) -> Option<u8> {
    Some(match i.condition_code() {
        ConditionCode::None => return None,
        ConditionCode::o => 0,
        ConditionCode::no => 1,
        ConditionCode::b => 2,
        ConditionCode::ae => 3,
        ConditionCode::e => 4,
        ConditionCode::ne => 5,
        ConditionCode::be => 6,
        ConditionCode::a => 7,
        ConditionCode::s => 8,
        ConditionCode::ns => 9,
        ConditionCode::p => 10,
        ConditionCode::np => 11,
        ConditionCode::l => 12,
        ConditionCode::ge => 13,
        ConditionCode::le => 14,
        ConditionCode::g => 15,
    })
}

/// Chooses the handler of SETcc or CMOVcc.
pub(super) fn select(i: &Instruction) -> Option<Handler> {
    let condition = condition(i)?;
    match i.mnemonic() {
        M::Seto
        | M::Setno
        | M::Setb
        | M::Setae
        | M::Sete
        | M::Setne
        | M::Setbe
        | M::Seta
        | M::Sets
        | M::Setns
        | M::Setp
        | M::Setnp
        | M::Setl
        | M::Setge
        | M::Setle
        | M::Setg => match form(i) {
            Form::Reg => conditional!(condition => set_reg::<_>),
            Form::Mem => conditional!(condition => set_mem::<_>),
            _ => None,
        },
        M::Cmovo
        | M::Cmovno
        | M::Cmovb
        | M::Cmovae
        | M::Cmove
        | M::Cmovne
        | M::Cmovbe
        | M::Cmova
        | M::Cmovs
        | M::Cmovns
        | M::Cmovp
        | M::Cmovnp
        | M::Cmovl
        | M::Cmovge
        | M::Cmovle
        | M::Cmovg => match (form(i), size(i, 0)) {
            (Form::RegReg, 2) => conditional!(condition => move_reg::<u16, _>),
            (Form::RegReg, 4) => conditional!(condition => move_reg::<u32, _>),
            (Form::RegReg, 8) => conditional!(condition => move_reg::<u64, _>),
            (Form::RegMem, 2) => conditional!(condition => move_mem::<u16, _>),
            (Form::RegMem, 4) => conditional!(condition => move_mem::<u32, _>),
            (Form::RegMem, 8) => conditional!(condition => move_mem::<u64, _>),
            _ => None,
        },
        _ => None,
    }
}

fn set_reg<const C: u8>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let value = u8::from(holds::<C>(&vcpu.state.flags));
    vcpu.set(i.dst, value);
    Ok(())
}

fn set_mem<const C: u8>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let value = u8::from(holds::<C>(&vcpu.state.flags));
    vcpu.store(i, value)
}

/// The destination is written in either case: its upper half is cleared by the 32-bit form.
#[inline(always)]
fn conditional_move<T: Data, const C: u8>(vcpu: &mut Vcpu, i: &Insn, source: T) {
    let value = if holds::<C>(&vcpu.state.flags) { source } else { vcpu.get::<T>(i.dst) };
    vcpu.set(i.dst, value);
}

fn move_reg<T: Data, const C: u8>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    conditional_move::<T, C>(vcpu, i, vcpu.get(i.src));
    Ok(())
}

/// The source is read, and may fault, in either case.
fn move_mem<T: Data, const C: u8>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let source = vcpu.load(i)?;
    conditional_move::<T, C>(vcpu, i, source);
    Ok(())
}

//! Moves, extensions, address calculation and the other instructions that transfer data without arithmetic.

use iced_x86::{Instruction, Mnemonic as M};

use super::form::{Form, form, large, size, sized, wide};
use crate::data::Data;
use crate::fault::Exec;
use crate::flags::{AF, CF, FIXED, OF, PF, SF, ZF};
use crate::insn::{Handler, Insn, insn_flags};
use crate::state::{REG_ZERO, reg};
use crate::vcpu::Vcpu;

/// AH among the byte registers.
pub(super) const AH: u8 = 16;

/// Chooses the handler of a data movement instruction.
pub(super) fn select(i: &Instruction, insn: &mut Insn) -> Option<Handler> {
    let n = if i.op_count() > 0 { size(i, 0) } else { 0 };
    match i.mnemonic() {
        M::Mov => match form(i) {
            Form::RegReg => sized!(n => reg_reg::<_>),
            Form::RegImm => sized!(n => reg_imm::<_>),
            Form::RegMem => sized!(n => reg_mem::<_>),
            Form::MemReg => sized!(n => mem_reg::<_>),
            Form::MemImm => sized!(n => mem_imm::<_>),
            _ => None,
        },
        // Neither needs more than a store: there is no write combining here.
        M::Movnti | M::Movdiri => large!(n => mem_reg::<_>),
        M::Movzx => match (form(i), size(i, 1)) {
            (Form::RegReg, 1) => wide!(n => zero_extend_reg::<_, u8>),
            (Form::RegReg, 2) => wide!(n => zero_extend_reg::<_, u16>),
            (Form::RegMem, 1) => wide!(n => zero_extend_mem::<_, u8>),
            (Form::RegMem, 2) => wide!(n => zero_extend_mem::<_, u16>),
            _ => None,
        },
        M::Movsx | M::Movsxd => match (form(i), size(i, 1).min(n)) {
            (Form::RegReg, 1) => wide!(n => sign_extend_reg::<_, u8>),
            (Form::RegReg, 2) => wide!(n => sign_extend_reg::<_, u16>),
            (Form::RegReg, 4) => large!(n => sign_extend_reg::<_, u32>),
            (Form::RegMem, 1) => wide!(n => sign_extend_mem::<_, u8>),
            (Form::RegMem, 2) => wide!(n => sign_extend_mem::<_, u16>),
            (Form::RegMem, 4) => large!(n => sign_extend_mem::<_, u32>),
            _ => None,
        },
        M::Lea => {
            if insn.has(insn_flags::SEGMENTED) {
                wide!(n => lea_truncated::<_>)
            } else {
                wide!(n => lea::<_>)
            }
        }
        M::Bswap => match n {
            2 => Some(bswap16),
            4 => Some(bswap32),
            8 => Some(bswap64),
            _ => None,
        },
        M::Movbe => match form(i) {
            Form::RegMem => wide!(n => movbe_load::<_>),
            Form::MemReg => wide!(n => movbe_store::<_>),
            _ => None,
        },
        M::Xlatb => {
            // AL is added by the handler: a byte of a register is no index register.
            insn.index = REG_ZERO;
            Some(xlat)
        }
        M::Lahf => Some(lahf),
        M::Sahf => Some(sahf),
        M::Cbw => Some(widen_accumulator::<u8, u16>),
        M::Cwde => Some(widen_accumulator::<u16, u32>),
        M::Cdqe => Some(widen_accumulator::<u32, u64>),
        M::Cwd => Some(spread_sign::<u16>),
        M::Cdq => Some(spread_sign::<u32>),
        M::Cqo => Some(spread_sign::<u64>),
        _ => None,
    }
}

fn reg_reg<T: Data>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let value: T = vcpu.get(i.src);
    vcpu.set(i.dst, value);
    Ok(())
}

fn reg_imm<T: Data>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    vcpu.set(i.dst, T::truncate(i.imm));
    Ok(())
}

fn reg_mem<T: Data>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let value: T = vcpu.load(i)?;
    vcpu.set(i.dst, value);
    Ok(())
}

fn mem_reg<T: Data>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let value: T = vcpu.get(i.src);
    vcpu.store(i, value)
}

fn mem_imm<T: Data>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    vcpu.store(i, T::truncate(i.imm))
}

fn zero_extend_reg<D: Data, S: Data>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let value: S = vcpu.get(i.src);
    vcpu.set(i.dst, D::truncate(value.widen()));
    Ok(())
}

fn zero_extend_mem<D: Data, S: Data>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let value: S = vcpu.load(i)?;
    vcpu.set(i.dst, D::truncate(value.widen()));
    Ok(())
}

fn sign_extend_reg<D: Data, S: Data>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let value: S = vcpu.get(i.src);
    vcpu.set(i.dst, D::truncate(value.sign_extend()));
    Ok(())
}

fn sign_extend_mem<D: Data, S: Data>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let value: S = vcpu.load(i)?;
    vcpu.set(i.dst, D::truncate(value.sign_extend()));
    Ok(())
}

fn lea<T: Data>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let address = vcpu.offset(i);
    vcpu.set(i.dst, T::truncate(address));
    Ok(())
}

fn lea_truncated<T: Data>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let address = vcpu.effective_address(i);
    vcpu.set(i.dst, T::truncate(address));
    Ok(())
}

/// Undefined by the manual; processors give zero.
fn bswap16(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    vcpu.set(i.dst, 0u16);
    Ok(())
}

fn bswap32(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let value: u32 = vcpu.get(i.dst);
    vcpu.set(i.dst, value.swap_bytes());
    Ok(())
}

fn bswap64(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let value = vcpu.reg(i.dst);
    vcpu.set_reg(i.dst, value.swap_bytes());
    Ok(())
}

fn swap_bytes<T: Data>(value: T) -> T {
    T::truncate(value.widen().swap_bytes() >> (64 - T::BITS))
}

fn movbe_load<T: Data>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let value: T = vcpu.load(i)?;
    vcpu.set(i.dst, swap_bytes(value));
    Ok(())
}

fn movbe_store<T: Data>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let value: T = vcpu.get(i.src);
    vcpu.store(i, swap_bytes(value))
}

fn xlat(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let index: u8 = vcpu.get(reg::RAX);
    let value: u8 = vcpu.load(&i.displaced(index.into()))?;
    vcpu.set(reg::RAX, value);
    Ok(())
}

fn lahf(vcpu: &mut Vcpu, _: &Insn) -> Exec {
    let flags = vcpu.state.flags.arithmetic() & !OF | FIXED;
    vcpu.set(AH, flags as u8);
    Ok(())
}

fn sahf(vcpu: &mut Vcpu, _: &Insn) -> Exec {
    let new = u64::from(vcpu.get::<u8>(AH)) & (SF | ZF | AF | PF | CF);
    let flags = &mut vcpu.state.flags;
    flags.set_arithmetic(new | flags.arithmetic() & OF);
    Ok(())
}

/// CBW, CWDE, CDQE.
fn widen_accumulator<S: Data, D: Data>(vcpu: &mut Vcpu, _: &Insn) -> Exec {
    let value: S = vcpu.get(reg::RAX);
    vcpu.set(reg::RAX, D::truncate(value.sign_extend()));
    Ok(())
}

/// CWD, CDQ, CQO.
fn spread_sign<T: Data>(vcpu: &mut Vcpu, _: &Insn) -> Exec {
    let value: T = vcpu.get(reg::RAX);
    let sign = (value.sign_extend() as i64 >> 63) as u64;
    vcpu.set(reg::RDX, T::truncate(sign));
    Ok(())
}

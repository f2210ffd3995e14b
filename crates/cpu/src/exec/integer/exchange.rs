//! XCHG, XADD and the compare-and-exchange instructions.

use iced_x86::{Instruction, Mnemonic as M};

use super::form::{Form, form, lockable, size, sized};
use crate::data::Data;
use crate::fault::{Exec, Fault, fault};
use crate::insn::{Handler, Insn, insn_flags};
use crate::state::reg;
use crate::vcpu::Vcpu;

/// Chooses the handler of an exchange.
pub(super) fn select(i: &Instruction, insn: &mut Insn) -> Option<Handler> {
    let n = if i.op_count() > 0 { size(i, 0) } else { 0 };
    match i.mnemonic() {
        M::Xchg => match form(i) {
            Form::RegReg => sized!(n => xchg_reg::<_>),
            Form::MemReg => sized!(n => xchg_mem::<_>),
            Form::RegMem => {
                insn.src = insn.dst;
                sized!(n => xchg_mem::<_>)
            }
            _ => None,
        },
        M::Xadd => match form(i) {
            Form::RegReg => sized!(n => xadd_reg::<_>),
            Form::MemReg => lockable!(insn, sized, n => xadd_mem::<_>),
            _ => None,
        },
        M::Cmpxchg => match form(i) {
            Form::RegReg => sized!(n => cmpxchg_reg::<_>),
            Form::MemReg => lockable!(insn, sized, n => cmpxchg_mem::<_>),
            _ => None,
        },
        M::Cmpxchg8b if insn.has(insn_flags::LOCK) => Some(cmpxchg8b::<true>),
        M::Cmpxchg8b => Some(cmpxchg8b::<false>),
        M::Cmpxchg16b => Some(cmpxchg16b),
        _ => None,
    }
}

fn xchg_reg<T: Data>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let (a, b): (T, T) = (vcpu.get(i.dst), vcpu.get(i.src));
    vcpu.set(i.dst, b);
    vcpu.set(i.src, a);
    Ok(())
}

/// XCHG with memory is atomic without a LOCK prefix.
fn xchg_mem<T: Data>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let new: T = vcpu.get(i.src);
    let old = vcpu.exchange(i, new)?;
    vcpu.set(i.src, old);
    Ok(())
}

fn add<T: Data>(a: T, b: T) -> T {
    T::truncate(a.widen().wrapping_add(b.widen()))
}

fn xadd_reg<T: Data>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let (a, b): (T, T) = (vcpu.get(i.dst), vcpu.get(i.src));
    let sum = add(a, b);
    vcpu.state.flags.set_add(a, b, sum);
    vcpu.set(i.src, a);
    vcpu.set(i.dst, sum);
    Ok(())
}

fn xadd_mem<T: Data, const LOCK: bool>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let b: T = vcpu.get(i.src);
    let (a, sum) = vcpu.update(i, LOCK, |a| add(a, b))?;
    vcpu.state.flags.set_add(a, b, sum);
    vcpu.set(i.src, a);
    Ok(())
}

/// The flags of CMP accumulator, `seen`.
fn compare<T: Data>(vcpu: &mut Vcpu, accumulator: T, seen: T) {
    let difference = T::truncate(accumulator.widen().wrapping_sub(seen.widen()));
    vcpu.state.flags.set_sub(accumulator, seen, difference);
}

fn cmpxchg_reg<T: Data>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let (accumulator, seen, new): (T, T, T) = (vcpu.get(reg::RAX), vcpu.get(i.dst), vcpu.get(i.src));
    compare(vcpu, accumulator, seen);
    if seen == accumulator {
        vcpu.set(i.dst, new);
    } else {
        vcpu.set(reg::RAX, seen);
    }
    Ok(())
}

/// Memory is written in either case, with what was there if the comparison fails.
fn cmpxchg_mem<T: Data, const LOCK: bool>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let (accumulator, new): (T, T) = (vcpu.get(reg::RAX), vcpu.get(i.src));
    let (seen, _) = vcpu.update(i, LOCK, |seen| if seen == accumulator { new } else { seen })?;
    compare(vcpu, accumulator, seen);
    if seen != accumulator {
        vcpu.set(reg::RAX, seen);
    }
    Ok(())
}

fn cmpxchg8b<const LOCK: bool>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let pair = |high, low| vcpu.reg(high) << 32 | vcpu.reg(low) & 0xffff_ffff;
    let (expected, new) = (pair(reg::RDX, reg::RAX), pair(reg::RCX, reg::RBX));
    let (seen, _) = vcpu.update(i, LOCK, |seen: u64| if seen == expected { new } else { seen })?;
    vcpu.state.flags.set_zf(seen == expected);
    if seen != expected {
        vcpu.set_reg(reg::RAX, seen & 0xffff_ffff);
        vcpu.set_reg(reg::RDX, seen >> 32);
    }
    Ok(())
}

/// Executed atomically with or without a LOCK prefix.
fn cmpxchg16b(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let address = vcpu.linear(i, 16, true)?;
    if !address.is_multiple_of(16) {
        return fault(Fault::gp(0));
    }
    let pair = |high, low| u128::from(vcpu.reg(high)) << 64 | u128::from(vcpu.reg(low));
    let (expected, new) = (pair(reg::RDX, reg::RAX), pair(reg::RCX, reg::RBX));
    let seen = vcpu.compare_exchange_16(address, expected, new)?;
    vcpu.state.flags.set_zf(seen == expected);
    if seen != expected {
        vcpu.set_reg(reg::RAX, seen as u64);
        vcpu.set_reg(reg::RDX, (seen >> 64) as u64);
    }
    Ok(())
}

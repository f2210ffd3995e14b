//! Decimal adjustment (outside 64-bit mode) and SALC.

use iced_x86::{Instruction, Mnemonic as M};

use super::transfer::AH;
use crate::fault::{Exec, Fault, fault, vector};
use crate::insn::{Handler, Insn};
use crate::state::reg;
use crate::vcpu::Vcpu;

/// Chooses the handler of a decimal instruction.
pub(super) fn select(i: &Instruction) -> Option<Handler> {
    match i.mnemonic() {
        M::Daa => Some(daa),
        M::Das => Some(das),
        M::Aaa => Some(aaa),
        M::Aas => Some(aas),
        M::Aam => Some(aam),
        M::Aad => Some(aad),
        M::Salc => Some(salc),
        _ => None,
    }
}

fn al(vcpu: &Vcpu) -> u8 {
    vcpu.get(reg::RAX)
}

/// Stores AL and its SF, ZF and PF, with CF and AF as given and OF clear.
fn finish(vcpu: &mut Vcpu, al: u8, cf: bool, af: bool) {
    vcpu.set(reg::RAX, al);
    vcpu.state.flags.set_result(al);
    vcpu.state.flags.set_carry_overflow_adjust(cf, false, af);
}

fn daa(vcpu: &mut Vcpu, _: &Insn) -> Exec {
    let (old, old_cf) = (al(vcpu), vcpu.state.flags.cf());
    let low = old & 0xf > 9 || vcpu.state.flags.af();
    let high = old > 0x99 || old_cf;
    let adjusted = old.wrapping_add(if low { 6 } else { 0 }).wrapping_add(if high { 0x60 } else { 0 });
    finish(vcpu, adjusted, high, low);
    Ok(())
}

fn das(vcpu: &mut Vcpu, _: &Insn) -> Exec {
    let (old, old_cf) = (al(vcpu), vcpu.state.flags.cf());
    let low = old & 0xf > 9 || vcpu.state.flags.af();
    let high = old > 0x99 || old_cf;
    let adjusted = old.wrapping_sub(if low { 6 } else { 0 }).wrapping_sub(if high { 0x60 } else { 0 });
    // The borrow of the first subtraction counts too.
    finish(vcpu, adjusted, high || (low && old < 6), low);
    Ok(())
}

fn aaa(vcpu: &mut Vcpu, _: &Insn) -> Exec {
    ascii_adjust(vcpu, |ax| ax.wrapping_add(0x106))
}

fn aas(vcpu: &mut Vcpu, _: &Insn) -> Exec {
    ascii_adjust(vcpu, |ax| ax.wrapping_sub(0x106))
}

fn ascii_adjust(vcpu: &mut Vcpu, correct: impl Fn(u16) -> u16) -> Exec {
    let adjust = al(vcpu) & 0xf > 9 || vcpu.state.flags.af();
    let ax: u16 = vcpu.get(reg::RAX);
    let ax = if adjust { correct(ax) } else { ax } & 0xff0f;
    vcpu.set(reg::RAX, ax);
    vcpu.state.flags.set_result(ax as u8);
    vcpu.state.flags.set_carry_overflow_adjust(adjust, false, adjust);
    Ok(())
}

/// Divides AL by the immediate, 10 in the documented form.
fn aam(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let (al, base) = (al(vcpu), i.imm as u8);
    let (Some(high), Some(low)) = (al.checked_div(base), al.checked_rem(base)) else {
        return fault(Fault::new(vector::DE));
    };
    vcpu.set(AH, high);
    finish(vcpu, low, false, false);
    Ok(())
}

fn aad(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let high: u8 = vcpu.get(AH);
    let low = al(vcpu).wrapping_add(high.wrapping_mul(i.imm as u8));
    vcpu.set(AH, 0u8);
    finish(vcpu, low, false, false);
    Ok(())
}

/// AL becomes 0xff if CF is set, else 0 (undocumented, outside 64-bit mode).
fn salc(vcpu: &mut Vcpu, _: &Insn) -> Exec {
    let value: u8 = if vcpu.state.flags.cf() { 0xff } else { 0 };
    vcpu.set(reg::RAX, value);
    Ok(())
}

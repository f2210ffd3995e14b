//! Instructions on system flags: CLI, STI, CLAC, STAC, PUSHF, POPF; and HLT.

use crate::fault::{Exec, Fault, Stop, fault};
use crate::flags;
use crate::insn::Insn;
use crate::state::slow;
use crate::vcpu::Vcpu;

use super::operand;

/// The flags that POPF may change at any privilege: the arithmetic ones, TF, DF, NT, AC and ID.
const POPF: u64 = flags::ARITHMETIC | flags::TF | flags::DF | flags::NT | flags::AC | flags::ID;

/// CLI.
pub(super) fn cli(vcpu: &mut Vcpu, _i: &Insn) -> Exec {
    vcpu.require_iopl()?;
    if vcpu.state.deprivileged {
        return vcpu.set_pvm_interrupt_flag(false);
    }
    vcpu.state.flags.set_system(flags::IF, 0);
    Ok(())
}

/// STI: interrupts are taken after the next instruction.
pub(super) fn sti(vcpu: &mut Vcpu, _i: &Insn) -> Exec {
    vcpu.require_iopl()?;
    if vcpu.state.deprivileged {
        return vcpu.set_pvm_interrupt_flag(true);
    }
    if vcpu.state.flags.system() & flags::IF == 0 {
        vcpu.set_rflags(flags::IF, flags::IF);
        vcpu.state.slow |= slow::STI_SHADOW;
    }
    Ok(())
}

/// CLAC and STAC.
pub(super) fn set_ac<const AC: u64>(vcpu: &mut Vcpu, _i: &Insn) -> Exec {
    if vcpu.state.cpl != 0 || vcpu.state.virtual_8086() || vcpu.state.deprivileged {
        return fault(Fault::ud());
    }
    // At CPL 0, AC matters to SMAP alone: no mode, and no block, ends.
    vcpu.state.flags.set_system(flags::AC, AC);
    vcpu.refresh_table();
    Ok(())
}

/// PUSHF.
pub(super) fn pushf(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    if vcpu.state.virtual_8086() && vcpu.iopl() < 3 {
        return fault(Fault::gp(0));
    }
    let image = vcpu.state.flags.bits() & !(flags::RF | flags::VM);
    match operand::size(i) {
        2 => vcpu.push(image as u16),
        4 => vcpu.push(image as u32),
        _ => vcpu.push(image),
    }
}

/// POPF.
pub(super) fn popf(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    if vcpu.state.virtual_8086() && vcpu.iopl() < 3 {
        return fault(Fault::gp(0));
    }
    let size = operand::size(i);
    let image = operand::peek(vcpu, size, 0)?;
    vcpu.release(size);
    let mut mask = POPF;
    let cpl = vcpu.segment_cpl();
    if cpl <= vcpu.iopl() {
        mask |= flags::IF;
    }
    if cpl == 0 {
        mask |= flags::IOPL;
    }
    if size == 2 {
        mask &= 0xffff;
    } else {
        // RF, VIF and VIP are cleared, VM stays.
        vcpu.state.flags.set_system(flags::RF | flags::VIF | flags::VIP, 0);
    }
    vcpu.set_rflags(mask, image);
    Ok(())
}

/// HLT.
pub(super) fn hlt(vcpu: &mut Vcpu, _i: &Insn) -> Exec {
    vcpu.require_cpl0()?;
    Err(Box::new(Stop::Halt))
}

//! MOV with debug registers.

use crate::debug::{dr6, dr7};
use crate::fault::{Exec, Fault, fault};
use crate::insn::Insn;
use crate::state::cr4;
use crate::vcpu::Vcpu;

use super::operand;

/// The register that `number` means: 4 and 5 are 6 and 7 unless CR4.DE makes them undefined.
fn number(vcpu: &mut Vcpu, number: u8) -> Exec<u8> {
    if number > 7 || (matches!(number, 4 | 5) && vcpu.state.cr4 & cr4::DE != 0) {
        return fault(Fault::ud());
    }
    vcpu.require_cpl0()?;
    if vcpu.state.dr7 & dr7::GD != 0 {
        return fault(Fault::db(dr6::BD, false));
    }
    Ok(if number > 3 { number | 2 } else { number })
}

/// MOV from DRn.
pub(super) fn mov_from_dr(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let value = match number(vcpu, i.src)? {
        6 => vcpu.state.dr6,
        7 => vcpu.state.dr7,
        n => vcpu.state.dr[usize::from(n & 3)],
    };
    operand::write_register(vcpu, i, i.dst, value);
    Ok(())
}

/// MOV to DRn.
pub(super) fn mov_to_dr(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let n = number(vcpu, i.dst)?;
    let value = if operand::size(i) == 8 { vcpu.reg(i.src) } else { u64::from(vcpu.get::<u32>(i.src)) };
    if n >= 6 && value >> 32 != 0 {
        return fault(Fault::gp(0));
    }
    match n {
        6 => vcpu.state.dr6 = value & dr6::WRITABLE | dr6::FIXED,
        7 => {
            vcpu.state.dr7 = value & dr7::WRITABLE | dr7::FIXED;
            vcpu.refresh_mode();
        }
        n => vcpu.state.dr[usize::from(n & 3)] = value,
    }
    vcpu.end_block();
    Ok(())
}

//! MXCSR: its instructions, and where it is kept.

use iced_x86::{Instruction, Mnemonic};

use super::arena;
use super::run::check;
use crate::fault::{Exec, Fault, fault};
use crate::fpu::MXCSR_MASK;
use crate::insn::{Handler, Insn};
use crate::vcpu::Vcpu;

/// Chooses the handler of LDMXCSR and STMXCSR.
pub(super) fn select(i: &Instruction) -> Option<Handler> {
    Some(match i.mnemonic() {
        Mnemonic::Ldmxcsr => ldmxcsr::<false>,
        Mnemonic::Vldmxcsr => ldmxcsr::<true>,
        Mnemonic::Stmxcsr => stmxcsr::<false>,
        Mnemonic::Vstmxcsr => stmxcsr::<true>,
        _ => return None,
    })
}

fn ldmxcsr<const VEX: bool>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    check::<VEX>(vcpu)?;
    let value = vcpu.load::<u32>(i)?;
    if value & !MXCSR_MASK != 0 {
        return fault(Fault::gp(0));
    }
    vcpu.set_mxcsr(value);
    Ok(())
}

fn stmxcsr<const VEX: bool>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    check::<VEX>(vcpu)?;
    vcpu.sync_mxcsr();
    vcpu.store(i, vcpu.state.fpu.mxcsr)
}

impl Vcpu {
    /// Brings `state.fpu.mxcsr` up to date: exception flags gather in the host's register while the engine
    /// runs floating-point instructions. The engine does so before it calls its platform and before it
    /// returns.
    #[inline]
    pub fn sync_mxcsr(&mut self) {
        if self.native.live {
            self.native.live = false;
            self.state.fpu.mxcsr |= arena::host_flags();
        }
    }

    /// Replaces MXCSR.
    pub(crate) fn set_mxcsr(&mut self, value: u32) {
        self.native.live = false;
        self.state.fpu.mxcsr = value & MXCSR_MASK;
    }
}

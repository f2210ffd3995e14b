//! CPUID, MSRs, time stamps, RDPID, hypercalls.

use crate::exit::{Answer, Exit};
use crate::fault::{Exec, Fault, fault};
use crate::insn::Insn;
use crate::state::{CodeMode, cr4, reg};
use crate::vcpu::Vcpu;

use super::operand;

impl Vcpu {
    /// The guest's time-stamp counter: the platform's, moved by IA32_TSC_ADJUST.
    pub fn tsc(&self) -> u64 {
        self.platform.tsc().wrapping_add(self.state.msrs.tsc_adjust)
    }

    /// EDX:EAX.
    pub(crate) fn edx_eax(&self) -> u64 {
        u64::from(self.get::<u32>(reg::RDX)) << 32 | u64::from(self.get::<u32>(reg::RAX))
    }

    /// Puts what CPUID answers into the registers.
    pub(super) fn answer_cpuid(&mut self) {
        let leaf = self.cpuid.query(self.get(reg::RAX), self.get(reg::RCX), &self.state);
        self.set(reg::RAX, leaf.eax);
        self.set(reg::RBX, leaf.ebx);
        self.set(reg::RCX, leaf.ecx);
        self.set(reg::RDX, leaf.edx);
    }

    pub(crate) fn set_edx_eax(&mut self, value: u64) {
        self.set(reg::RAX, value as u32);
        self.set(reg::RDX, (value >> 32) as u32);
    }
}

/// CPUID.
pub(super) fn cpuid(vcpu: &mut Vcpu, _i: &Insn) -> Exec {
    vcpu.answer_cpuid();
    Ok(())
}

/// RDMSR.
pub(super) fn rdmsr(vcpu: &mut Vcpu, _i: &Insn) -> Exec {
    vcpu.require_cpl0()?;
    let value = vcpu.read_msr(vcpu.get(reg::RCX))?;
    vcpu.set_edx_eax(value);
    Ok(())
}

/// WRMSR.
pub(super) fn wrmsr(vcpu: &mut Vcpu, _i: &Insn) -> Exec {
    vcpu.require_cpl0()?;
    vcpu.write_msr(vcpu.get(reg::RCX), vcpu.edx_eax())?;
    vcpu.end_block();
    Ok(())
}

fn check_tsd(vcpu: &Vcpu) -> Exec {
    if vcpu.state.cr4 & cr4::TSD != 0 && vcpu.state.cpl != 0 { fault(Fault::gp(0)) } else { Ok(()) }
}

/// RDTSC.
pub(super) fn rdtsc(vcpu: &mut Vcpu, _i: &Insn) -> Exec {
    check_tsd(vcpu)?;
    let tsc = vcpu.tsc();
    vcpu.set_edx_eax(tsc);
    Ok(())
}

/// RDTSCP.
pub(super) fn rdtscp(vcpu: &mut Vcpu, _i: &Insn) -> Exec {
    check_tsd(vcpu)?;
    let tsc = vcpu.tsc();
    vcpu.set_edx_eax(tsc);
    let aux = vcpu.state.msrs.tsc_aux;
    vcpu.set(reg::RCX, aux as u32);
    Ok(())
}

/// RDPID.
pub(super) fn rdpid(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let aux = vcpu.state.msrs.tsc_aux;
    operand::write_register(vcpu, i, i.dst, aux);
    Ok(())
}

/// RDPMC: there are no performance counters.
pub(super) fn rdpmc(_vcpu: &mut Vcpu, _i: &Insn) -> Exec {
    fault(Fault::gp(0))
}

/// VMCALL and VMMCALL.
pub(super) fn hypercall(vcpu: &mut Vcpu, _i: &Insn) -> Exec {
    if vcpu.state.deprivileged {
        // Hypercalls are made by SYSCALL.
        return fault(Fault::ud());
    }
    let wide = vcpu.state.code_mode == CodeMode::Bits64;
    let register = |r: u8| if wide { vcpu.reg(r) } else { u64::from(vcpu.get::<u32>(r)) };
    let number = register(reg::RAX);
    let args = [register(reg::RBX), register(reg::RCX), register(reg::RDX), register(reg::RSI)];
    let cpl = vcpu.state.cpl;
    let mut result = 0;
    if vcpu.exit(Exit::Hypercall { number, args, long_mode: wide, cpl, result: &mut result })
        == Answer::Refused
    {
        return fault(Fault::ud());
    }
    if wide {
        vcpu.set_reg(reg::RAX, result);
    } else {
        vcpu.set(reg::RAX, result as u32);
    }
    vcpu.end_block();
    Ok(())
}

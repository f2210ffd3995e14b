//! The rules of MSRs (specification, "X86 MSR" and "PVM MSRs").

use crate::abi::{PvmMsr, control, selector, x86_msr};
use crate::processor::{Flush, Processor, Register};
use crate::vcpu::{Mode, Pvm};

/// What this crate says to an access to an MSR.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access<T> {
    /// Done.
    Done(T),
    /// #GP(0).
    Fault,
    /// The processor decides.
    Pass,
}

impl Pvm {
    /// RDMSR of `index`, at whatever privilege the processor has checked.
    pub fn read_msr(&self, index: u32) -> Access<u64> {
        if let Some(msr) = self.config.generation.msr(index) {
            return Access::Done(match msr {
                PvmMsr::LinearAddressRange => self.ranges.msr(),
                PvmMsr::VcpuStruct => self.vcpu_struct,
                PvmMsr::SupervisorRsp => self.supervisor_rsp,
                PvmMsr::SupervisorRedzone => self.supervisor_redzone,
                PvmMsr::EventEntry => self.event_entry,
                PvmMsr::RetuRip => self.retu_rip,
                PvmMsr::RetsRip => self.rets_rip,
                PvmMsr::SwitchCr3 => self.switch_cr3,
            });
        }
        match index {
            x86_msr::PKRS if self.mode != Mode::NonPvm => Access::Done(self.pkrs.into()),
            _ => Access::Pass,
        }
    }

    /// WRMSR of `value` to `index`.
    pub fn write_msr<P: Processor>(&mut self, cpu: &mut P, index: u32, value: u64) -> Access<()> {
        if let Some(msr) = self.config.generation.msr(index) {
            return self.write_own(cpu, msr, value);
        }
        if self.mode == Mode::NonPvm {
            return Access::Pass;
        }
        match index {
            x86_msr::STAR => self.check_star(value),
            x86_msr::PKRS => {
                let Ok(keys) = u32::try_from(value) else { return Access::Fault };
                self.pkrs = keys;
                // In supervisor mode PKRS is PKRU; the user's PKRU is not the supervisor's to change from here.
                if self.mode == Mode::Supervisor && cpu.register(Register::Cr4) & control::CR4_PKS != 0 {
                    cpu.set_register(Register::Pkru, value);
                }
                Access::Done(())
            }
            _ => Access::Pass,
        }
    }

    fn write_own<P: Processor>(&mut self, cpu: &mut P, msr: PvmMsr, value: u64) -> Access<()> {
        match msr {
            PvmMsr::LinearAddressRange => {
                let Some(ranges) = self.ranges.narrowed(value) else { return Access::Fault };
                self.ranges = ranges;
                if self.mode != Mode::NonPvm {
                    cpu.confine(ranges);
                    cpu.flush(Flush::All);
                }
            }
            PvmMsr::VcpuStruct => {
                const PAGE_OFFSET: u64 = 0xfff;
                if value & PAGE_OFFSET != 0 || value != 0 && cpu.shared(value).is_none() {
                    return Access::Fault;
                }
                self.vcpu_struct = value;
            }
            PvmMsr::SupervisorRsp => self.supervisor_rsp = value,
            PvmMsr::SupervisorRedzone => self.supervisor_redzone = value,
            PvmMsr::EventEntry => {
                let e = &self.config.generation.entries;
                let offsets = [e.user, e.supervisor_exception, e.supervisor_interrupt];
                if !offsets.iter().all(|o| cpu.is_canonical(value.wrapping_add(*o))) {
                    return Access::Fault;
                }
                self.event_entry = value;
            }
            PvmMsr::RetuRip => self.retu_rip = value,
            PvmMsr::RetsRip => self.rets_rip = value,
            PvmMsr::SwitchCr3 => {
                if !cpu.is_root(value) {
                    return Access::Fault;
                }
                self.switch_cr3 = value;
            }
        }
        Access::Done(())
    }

    /// STAR: its user selectors must be the hypervisor's, its supervisor ones those that are loaded.
    fn check_star(&self, value: u64) -> Access<()> {
        let user32 = (value >> 48) as u16 | 3;
        let supervisor = (value >> 32) as u16;
        if user32 == selector::USER32_CS && supervisor == self.supervisor_cs && supervisor != 0 {
            Access::Pass
        } else {
            Access::Fault
        }
    }

    /// RDMSR by hypercall: any MSR; `None` if there is none.
    pub(crate) fn read_any_msr<P: Processor>(&self, cpu: &mut P, index: u32) -> Option<u64> {
        match self.read_msr(index) {
            Access::Done(value) => Some(value),
            Access::Fault => None,
            Access::Pass => cpu.read_msr(index),
        }
    }

    /// WRMSR by hypercall; `false` where the instruction would raise #GP.
    pub(crate) fn write_any_msr<P: Processor>(&mut self, cpu: &mut P, index: u32, value: u64) -> bool {
        match self.write_msr(cpu, index, value) {
            Access::Done(()) => true,
            Access::Fault => false,
            Access::Pass => cpu.write_msr(index, value),
        }
    }
}

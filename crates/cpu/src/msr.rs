//! Model-specific registers.
//!
//! # Theory of operation
//! A table gives each register that the processor itself keeps with how it is read and written. Any other register goes
//! to the platform (local APIC, paravirtual clock), and what that refuses is #GP(0), as kernels that probe for
//! registers expect. Numbers and reserved bits are those of Intel SDM vol. 4.

use mmu::Gva;

use crate::exit::{Answer, Exit};
use crate::fault::{Exec, Fault, fault};
use crate::state::{cr4, seg};
use crate::vcpu::Vcpu;

const FIXED_MTRRS: usize = 11;
const VARIABLE_MTRRS: usize = 8;

/// The MSRs that the processor itself keeps.
#[derive(Clone, Debug)]
pub struct Msrs {
    /// IA32_STAR.
    pub star: u64,
    /// IA32_LSTAR.
    pub lstar: u64,
    /// IA32_CSTAR.
    pub cstar: u64,
    /// IA32_FMASK.
    pub fmask: u64,
    /// IA32_KERNEL_GS_BASE.
    pub kernel_gs_base: u64,
    /// IA32_SYSENTER_CS.
    pub sysenter_cs: u64,
    /// IA32_SYSENTER_ESP.
    pub sysenter_esp: u64,
    /// IA32_SYSENTER_EIP.
    pub sysenter_eip: u64,
    /// IA32_TSC_AUX.
    pub tsc_aux: u64,
    /// IA32_TSC_ADJUST.
    pub tsc_adjust: u64,
    /// IA32_PAT. Kept, but without effect: all memory is coherent.
    pub pat: u64,
    /// IA32_MTRR_DEF_TYPE; without effect, as all MTRRs.
    pub mtrr_def_type: u64,
    /// The fixed-range MTRRs in the order of their numbers.
    pub mtrr_fixed: [u64; FIXED_MTRRS],
    /// IA32_MTRR_PHYSBASEn and IA32_MTRR_PHYSMASKn, alternating.
    pub mtrr_variable: [u64; 2 * VARIABLE_MTRRS],
    /// IA32_MISC_ENABLE.
    pub misc_enable: u64,
    /// IA32_SPEC_CTRL; without effect.
    pub spec_ctrl: u64,
    /// IA32_DEBUGCTL; without effect.
    pub debugctl: u64,
    /// IA32_MCG_STATUS.
    pub mcg_status: u64,
    /// IA32_PKRS: as PKRU, for supervisor-mode pages.
    pub pkrs: u32,
}

/// Fast strings on; branch trace and event sampling unavailable.
const MISC_ENABLE: u64 = 1 | 1 << 11 | 1 << 12;
/// Locked, with nothing enabled.
const FEATURE_CONTROL: u64 = 1;
/// Eight variable ranges, fixed ranges, write combining.
const MTRR_CAP: u64 = VARIABLE_MTRRS as u64 | 1 << 8 | 1 << 10;
/// A revision that kernels know as recent, in the upper half.
const BIOS_SIGN_ID: u64 = 0x2b00_0603 << 32;

/// What IA32_ARCH_CAPABILITIES tells the guest: the virtual processor has none of the known flaws, and its kernel can
/// leave out the mitigations for them. None of the guest's instructions is executed speculatively, and the host's
/// units that these flaws are in do not execute the guest's loads, stores and branches.
///
/// It says nothing about the host. That does speculate while it interprets; what this could show of the host's memory is
/// held back by the host's own mitigations and by `tlb`, not by anything that the guest is told here.
const ARCH_CAPABILITIES: u64 = {
    const RDCL_NO: u64 = 1 << 0;
    const IBRS_ALL: u64 = 1 << 1;
    const SKIP_L1DFL_VMENTRY: u64 = 1 << 3;
    const SSB_NO: u64 = 1 << 4;
    const MDS_NO: u64 = 1 << 5;
    const PSCHANGE_MC_NO: u64 = 1 << 6;
    const TAA_NO: u64 = 1 << 8;
    const SBDR_SSDP_NO: u64 = 1 << 13;
    const FBSDP_NO: u64 = 1 << 14;
    const PSDP_NO: u64 = 1 << 15;
    const FB_CLEAR: u64 = 1 << 17;
    const BHI_NO: u64 = 1 << 20;
    const PBRSB_NO: u64 = 1 << 24;
    const GDS_NO: u64 = 1 << 26;
    const RFDS_NO: u64 = 1 << 27;
    const ITS_NO: u64 = 1 << 62;
    RDCL_NO
        | IBRS_ALL
        | SKIP_L1DFL_VMENTRY
        | SSB_NO
        | MDS_NO
        | PSCHANGE_MC_NO
        | TAA_NO
        | SBDR_SSDP_NO
        | FBSDP_NO
        | PSDP_NO
        | FB_CLEAR
        | BHI_NO
        | PBRSB_NO
        | GDS_NO
        | RFDS_NO
        | ITS_NO
};

impl Default for Msrs {
    /// The values after reset.
    fn default() -> Self {
        Self {
            star: 0,
            lstar: 0,
            cstar: 0,
            fmask: 0,
            kernel_gs_base: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            tsc_aux: 0,
            tsc_adjust: 0,
            // WB, WT, UC-, UC, twice.
            pat: 0x0007_0406_0007_0406,
            // Enabled, fixed ranges too, write-back by default: no firmware runs that would set it up.
            mtrr_def_type: 0xc06,
            mtrr_fixed: [0; FIXED_MTRRS],
            mtrr_variable: [0; 2 * VARIABLE_MTRRS],
            misc_enable: MISC_ENABLE,
            spec_ctrl: 0,
            debugctl: 0,
            mcg_status: 0,
            pkrs: 0,
        }
    }
}

/// How a register is read.
#[derive(Clone, Copy)]
enum Read {
    /// It always has this value.
    Constant(u64),
    /// From the state.
    Value(fn(&Vcpu) -> u64),
    /// As the function decides.
    Checked(fn(&Vcpu) -> Exec<u64>),
    /// Reading it is #GP(0).
    Never,
}

/// How a register is written.
#[derive(Clone, Copy)]
enum Write {
    /// Writing it is #GP(0).
    Never,
    /// Every write is accepted and changes nothing.
    Ignored,
    /// The value is stored if only these bits are set in it.
    Bits(u64, fn(&mut Vcpu, u64)),
    /// A canonical address is stored.
    Address(fn(&mut Vcpu, u64)),
    /// As the function decides.
    Checked(fn(&mut Vcpu, u64) -> Exec),
}

/// A register that the processor itself keeps.
struct Msr {
    index: u32,
    name: &'static str,
    read: Read,
    write: Write,
}

const ALL: u64 = u64::MAX;
const LOW: u64 = 0xffff_ffff;

macro_rules! field {
    ($field:ident) => {
        Read::Value(|v| v.state.msrs.$field)
    };
    ($field:ident, bits $bits:expr) => {
        Write::Bits($bits, |v, value| v.state.msrs.$field = value)
    };
    ($field:ident, address) => {
        Write::Address(|v, value| v.state.msrs.$field = value)
    };
}

const fn msr(index: u32, name: &'static str, read: Read, write: Write) -> Msr {
    Msr { index, name, read, write }
}

/// Sorted by number.
static TABLE: &[Msr] = &[
    msr(0x010, "IA32_TIME_STAMP_COUNTER", Read::Value(|v| v.tsc()), Write::Bits(ALL, Vcpu::write_tsc)),
    msr(0x017, "IA32_PLATFORM_ID", Read::Constant(0), Write::Never),
    msr(0x03a, "IA32_FEATURE_CONTROL", Read::Constant(FEATURE_CONTROL), Write::Never),
    msr(0x03b, "IA32_TSC_ADJUST", field!(tsc_adjust), Write::Bits(ALL, Vcpu::write_tsc_adjust)),
    // IBRS, STIBP, SSBD, BHI_DIS_S: taking them keeps kernels from mitigations in software.
    msr(0x048, "IA32_SPEC_CTRL", field!(spec_ctrl), field!(spec_ctrl, bits 0x407)),
    // IBPB.
    msr(0x049, "IA32_PRED_CMD", Read::Never, Write::Bits(1, |_, _| ())),
    msr(0x079, "IA32_BIOS_UPDT_TRIG", Read::Never, Write::Ignored),
    msr(0x08b, "IA32_BIOS_SIGN_ID", Read::Constant(BIOS_SIGN_ID), Write::Ignored),
    msr(0x0ce, "MSR_PLATFORM_INFO", Read::Constant(0), Write::Never),
    msr(0x0fe, "IA32_MTRRCAP", Read::Constant(MTRR_CAP), Write::Never),
    msr(0x10a, "IA32_ARCH_CAPABILITIES", Read::Constant(ARCH_CAPABILITIES), Write::Never),
    msr(0x174, "IA32_SYSENTER_CS", field!(sysenter_cs), field!(sysenter_cs, bits LOW)),
    msr(0x175, "IA32_SYSENTER_ESP", field!(sysenter_esp), field!(sysenter_esp, address)),
    msr(0x176, "IA32_SYSENTER_EIP", field!(sysenter_eip), field!(sysenter_eip, address)),
    msr(0x179, "IA32_MCG_CAP", Read::Constant(0), Write::Never),
    msr(0x17a, "IA32_MCG_STATUS", field!(mcg_status), field!(mcg_status, bits 0b111)),
    msr(0x1a0, "IA32_MISC_ENABLE", field!(misc_enable), field!(misc_enable, bits ALL)),
    // LBR and BTF.
    msr(0x1d9, "IA32_DEBUGCTL", field!(debugctl), field!(debugctl, bits 0b11)),
    msr(0x277, "IA32_PAT", field!(pat), Write::Checked(Vcpu::write_pat)),
    msr(0x2ff, "IA32_MTRR_DEF_TYPE", field!(mtrr_def_type), Write::Checked(Vcpu::write_mtrr_def_type)),
    msr(0x6e1, "IA32_PKRS", Read::Checked(Vcpu::read_pkrs), Write::Checked(Vcpu::write_pkrs)),
    msr(0xc000_0080, "IA32_EFER", Read::Value(|v| v.state.efer), Write::Checked(Vcpu::load_efer)),
    msr(0xc000_0081, "IA32_STAR", field!(star), field!(star, bits ALL)),
    msr(0xc000_0082, "IA32_LSTAR", field!(lstar), field!(lstar, address)),
    msr(0xc000_0083, "IA32_CSTAR", field!(cstar), field!(cstar, address)),
    msr(0xc000_0084, "IA32_FMASK", field!(fmask), field!(fmask, bits LOW)),
    msr(
        0xc000_0100,
        "IA32_FS_BASE",
        Read::Value(|v| v.state.seg_base[seg::FS as usize]),
        Write::Address(|v, value| v.state.seg_base[seg::FS as usize] = value),
    ),
    msr(
        0xc000_0101,
        "IA32_GS_BASE",
        Read::Value(|v| v.state.seg_base[seg::GS as usize]),
        Write::Address(|v, value| v.state.seg_base[seg::GS as usize] = value),
    ),
    msr(0xc000_0102, "IA32_KERNEL_GS_BASE", field!(kernel_gs_base), field!(kernel_gs_base, address)),
    msr(0xc000_0103, "IA32_TSC_AUX", field!(tsc_aux), field!(tsc_aux, bits LOW)),
];

/// The numbers of the fixed-range MTRRs.
const MTRR_FIXED: [u32; FIXED_MTRRS] =
    [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];

/// Whether `kind` is a memory type that MTRRs know: UC, WC, WT, WP, WB.
fn is_mtrr_type(kind: u64) -> bool {
    matches!(kind & 0xff, 0 | 1 | 4 | 5 | 6)
}

fn find(index: u32) -> Option<&'static Msr> {
    TABLE.binary_search_by_key(&index, |m| m.index).ok().and_then(|at| TABLE.get(at))
}

/// The name of the MSR `index` if the processor itself keeps it, for diagnostics.
pub fn name(index: u32) -> Option<&'static str> {
    find(index).map(|m| m.name)
}

impl Vcpu {
    /// Reads an MSR as RDMSR at CPL 0 does.
    ///
    /// # Errors
    /// #GP(0) if there is no such register.
    pub fn read_msr(&mut self, index: u32) -> Exec<u64> {
        if let Some(pvm) = &self.pvm {
            match pvm.read_msr(index) {
                pvm::Access::Done(value) => return Ok(value),
                pvm::Access::Fault => return fault(Fault::gp(0)),
                pvm::Access::Pass => {}
            }
        }
        if let Some(msr) = find(index) {
            return match msr.read {
                Read::Constant(value) => Ok(value),
                Read::Value(read) => Ok(read(self)),
                Read::Checked(read) => read(self),
                Read::Never => fault(Fault::gp(0)),
            };
        }
        if let Some(slot) = self.mtrr(index) {
            return Ok(*slot);
        }
        let mut value = 0;
        match self.exit(Exit::ReadMsr { index, value: &mut value }) {
            Answer::Done => Ok(value),
            Answer::Refused => fault(Fault::gp(0)),
        }
    }

    /// Writes an MSR as WRMSR at CPL 0 does.
    ///
    /// # Errors
    /// #GP(0) if there is no such register, or not with this value.
    pub fn write_msr(&mut self, index: u32, value: u64) -> Exec {
        if let Some(access) = self.with_pvm(|pvm, vcpu| pvm.write_msr(vcpu, index, value)) {
            match access {
                pvm::Access::Done(()) => return Ok(()),
                pvm::Access::Fault => return fault(Fault::gp(0)),
                pvm::Access::Pass => {}
            }
        }
        if let Some(msr) = find(index) {
            match msr.write {
                Write::Ignored => return Ok(()),
                Write::Bits(bits, write) if value & !bits == 0 => write(self, value),
                Write::Address(write) if self.walk.canonical(Gva(value)) => write(self, value),
                Write::Checked(write) => return write(self, value),
                Write::Never | Write::Bits(..) | Write::Address(_) => return fault(Fault::gp(0)),
            }
            return Ok(());
        }
        if self.mtrr(index).is_some() {
            return self.write_mtrr(index, value);
        }
        match self.exit(Exit::WriteMsr { index, value }) {
            Answer::Done => Ok(()),
            Answer::Refused => fault(Fault::gp(0)),
        }
    }

    /// A change of the TSC shows in TSC_ADJUST, and the other way round.
    fn write_tsc(&mut self, value: u64) {
        let delta = value.wrapping_sub(self.tsc());
        self.write_tsc_adjust(self.state.msrs.tsc_adjust.wrapping_add(delta));
    }

    fn write_tsc_adjust(&mut self, value: u64) {
        self.state.msrs.tsc_adjust = value;
        self.outside(|vcpu| vcpu.platform.tsc_adjusted(value));
    }

    fn write_pat(&mut self, value: u64) -> Exec {
        // Also UC-.
        if !value.to_le_bytes().iter().all(|&kind| is_mtrr_type(kind.into()) || kind == 7) {
            return fault(Fault::gp(0));
        }
        self.state.msrs.pat = value;
        Ok(())
    }

    fn write_mtrr_def_type(&mut self, value: u64) -> Exec {
        if value & !0xcff != 0 || !is_mtrr_type(value) {
            return fault(Fault::gp(0));
        }
        self.state.msrs.mtrr_def_type = value;
        Ok(())
    }

    /// There is no IA32_PKRS without its feature.
    fn read_pkrs(&self) -> Exec<u64> {
        if self.cpuid.cr4_bits() & cr4::PKS == 0 {
            return fault(Fault::gp(0));
        }
        Ok(self.state.msrs.pkrs.into())
    }

    fn write_pkrs(&mut self, value: u64) -> Exec {
        let Ok(value) = u32::try_from(value) else { return fault(Fault::gp(0)) };
        self.read_pkrs()?;
        self.load_pkrs(value);
        Ok(())
    }

    /// The storage of the fixed or variable MTRR `index`.
    fn mtrr(&mut self, index: u32) -> Option<&mut u64> {
        let msrs = &mut self.state.msrs;
        if let Some(n) = MTRR_FIXED.iter().position(|&m| m == index) {
            return msrs.mtrr_fixed.get_mut(n);
        }
        msrs.mtrr_variable.get_mut(index.checked_sub(0x200)? as usize)
    }

    fn write_mtrr(&mut self, index: u32, value: u64) -> Exec {
        let physical = (1u64 << self.cpuid.maxphyaddr()) - 1;
        let good = if MTRR_FIXED.contains(&index) {
            value.to_le_bytes().iter().all(|&kind| is_mtrr_type(kind.into()))
        } else if index & 1 == 0 {
            value & (!physical | 0xf00) == 0 && is_mtrr_type(value)
        } else {
            value & (!physical | 0x7ff) == 0
        };
        match self.mtrr(index) {
            Some(slot) if good => {
                *slot = value;
                Ok(())
            }
            _ => fault(Fault::gp(0)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted() {
        assert!(TABLE.is_sorted_by_key(|m| m.index));
        assert_eq!(name(0xc000_0082), Some("IA32_LSTAR"));
        assert_eq!(name(0x1b), None);
    }
}

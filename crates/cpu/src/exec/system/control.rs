//! Control registers: CR0, CR2, CR3, CR4, CR8, XCR0, EFER, and what a change of them flushes.
//!
//! # Theory of operation
//! The software TLB holds decisions, not entries: whatever takes part in one (CR0.WP, CR4.SMEP, CR4.SMAP, CR4.PKE,
//! EFER.NXE) flushes when it changes, which is more than the architecture asks for (Intel SDM vol. 3,
//! 4.10.4.1). PKRU and IA32_PKRS drop only what lost a right ([`crate::tlb`]). CR3 flushes exactly what it must: with PCIDs the new one's translations, unless bit 63 says not to.

use crate::exit::{Answer, Exit};
use crate::fault::{Exec, Fault, fault};
use crate::insn::Insn;
use crate::segment::system_type;
use crate::state::{CodeMode, Segment, cr0, cr4, efer, reg, seg};
use crate::vcpu::Vcpu;

use super::operand;

/// The CR0 bits that exist.
const CR0_BITS: u64 = cr0::PE
    | cr0::MP
    | cr0::EM
    | cr0::TS
    | cr0::ET
    | cr0::NE
    | cr0::WP
    | cr0::AM
    | cr0::NW
    | cr0::CD
    | cr0::PG;
/// CR4 bits that decide about translations or rights held in the TLB.
const CR4_TLB: u64 =
    cr4::PSE | cr4::PAE | cr4::PGE | cr4::LA57 | cr4::PCIDE | cr4::SMEP | cr4::SMAP | cr4::PKE | cr4::PKS;
/// Bit 63 of a value for CR3: keep the new PCID's translations.
const CR3_NO_FLUSH: u64 = 1 << 63;

impl Vcpu {
    /// Whether PAE paging, the mode with page-directory-pointer registers, is in use with these registers.
    fn is_pae_paging(cr0: u64, cr4: u64, efer: u64) -> bool {
        cr0 & cr0::PG != 0 && cr4 & cr4::PAE != 0 && efer & efer::LMA == 0
    }

    /// The page-directory-pointer entries at `cr3`.
    fn pdptrs(&self, cr3: u64) -> Exec<[u64; 4]> {
        match mmu::load_pdptrs(&*self.ram, cr3, self.cpuid.maxphyaddr()) {
            Ok(pdptrs) => Ok(pdptrs),
            Err(_) => fault(Fault::gp(0)),
        }
    }

    /// Sets CR0 as MOV does.
    ///
    /// # Errors
    /// #GP(0).
    pub(crate) fn load_cr0(&mut self, value: u64) -> Exec {
        let state = &self.state;
        let old = state.cr0;
        if value >> 32 != 0 {
            return fault(Fault::gp(0));
        }
        let mut new = value & CR0_BITS | cr0::ET;
        if state.deprivileged {
            new = new & !pvm::abi::control::CR0_ZERO | pvm::abi::control::CR0_ONE;
        }
        let bad = (new & cr0::PG != 0 && new & cr0::PE == 0) || (new & cr0::NW != 0 && new & cr0::CD == 0);
        if bad {
            return fault(Fault::gp(0));
        }
        let changed = old ^ new;
        let mut efer = state.efer;
        let in_64_bit_mode = state.code_mode == CodeMode::Bits64;
        if changed & cr0::PG != 0 {
            if new & cr0::PG != 0 && efer & efer::LME != 0 {
                let tss = state.tr.segment.attributes >> 8 & 15;
                let tss16 = matches!(tss, system_type::TSS16 | system_type::TSS16_BUSY);
                let long_code = state.segments[usize::from(seg::CS)].has(Segment::LONG);
                if state.cr4 & cr4::PAE == 0 || long_code || tss16 {
                    return fault(Fault::gp(0));
                }
                efer |= efer::LMA;
            } else if new & cr0::PG == 0 {
                if in_64_bit_mode || state.cr4 & cr4::PCIDE != 0 {
                    return fault(Fault::gp(0));
                }
                efer &= !efer::LMA;
            }
        }
        if changed & (cr0::PG | cr0::CD | cr0::NW) != 0 && Self::is_pae_paging(new, state.cr4, efer) {
            self.state.pdptrs = self.pdptrs(self.state.cr3)?;
        }
        self.state.cr0 = new;
        self.state.efer = efer;
        if changed & (cr0::PG | cr0::WP | cr0::PE) != 0 {
            self.refresh_paging();
            self.tlb.flush_all();
        }
        self.refresh_mode();
        self.end_block();
        Ok(())
    }

    /// Sets CR3 as MOV does.
    ///
    /// # Errors
    /// #GP(0).
    pub(crate) fn load_cr3(&mut self, value: u64) -> Exec {
        let state = &self.state;
        let pcids = state.cr4 & cr4::PCIDE != 0;
        let mut new = value;
        let mut keep = false;
        if state.long_mode() {
            if pcids {
                keep = value & CR3_NO_FLUSH != 0;
                new &= !CR3_NO_FLUSH;
            }
            if new >> self.cpuid.maxphyaddr() != 0 {
                return fault(Fault::gp(0));
            }
        }
        if state.deprivileged {
            self.load_pvm_root(new, !keep);
            self.end_block();
            return Ok(());
        }
        if Self::is_pae_paging(state.cr0, state.cr4, state.efer) {
            self.state.pdptrs = self.pdptrs(new)?;
        }
        let old = std::mem::replace(&mut self.state.cr3, new);
        self.refresh_paging();
        if !pcids {
            self.tlb.flush_non_global();
        } else {
            // PCIDs 0xffe and 0xfff share a tag: changing to either drops what the other may have left.
            let shared = new & 0xfff >= 0xffe && (old ^ new) & 0xfff != 0;
            if !keep || shared {
                self.tlb.flush_pcid(self.state.tlb_tag);
            }
        }
        self.end_block();
        Ok(())
    }

    /// Sets CR4 as MOV does.
    ///
    /// # Errors
    /// #GP(0).
    pub(crate) fn load_cr4(&mut self, value: u64) -> Exec {
        let state = &self.state;
        let old = state.cr4;
        let value = if state.deprivileged { self.pvm_cr4(value) } else { value };
        let changed = old ^ value;
        if value & !self.cpuid.cr4_bits() != 0 {
            return fault(Fault::gp(0));
        }
        if state.deprivileged && !pvm::abi::control::keys_are_possible(value) {
            return fault(Fault::gp(0));
        }
        if state.long_mode() && (value & cr4::PAE == 0 || changed & cr4::LA57 != 0) {
            return fault(Fault::gp(0));
        }
        if value & !old & cr4::PCIDE != 0 && (!state.long_mode() || state.cr3 & 0xfff != 0) {
            return fault(Fault::gp(0));
        }
        let reload = cr4::PAE | cr4::PSE | cr4::PGE | cr4::SMEP;
        if changed & reload != 0 && Self::is_pae_paging(state.cr0, value, state.efer) {
            self.state.pdptrs = self.pdptrs(self.state.cr3)?;
        }
        self.state.cr4 = value;
        if changed & CR4_TLB != 0 {
            self.refresh_paging();
            self.tlb.flush_all();
        }
        self.refresh_mode();
        self.end_block();
        Ok(())
    }

    /// Sets EFER as WRMSR does.
    ///
    /// # Errors
    /// #GP(0).
    pub(crate) fn load_efer(&mut self, value: u64) -> Exec {
        let old = self.state.efer;
        let value = if self.state.deprivileged { value | pvm::abi::control::EFER_ONE } else { value };
        let writable = efer::SCE | efer::LME | efer::NXE;
        if value & !(writable | efer::LMA) != 0
            || (old ^ value) & efer::LME != 0 && self.state.cr0 & cr0::PG != 0
        {
            return fault(Fault::gp(0));
        }
        self.state.efer = old & efer::LMA | value & writable;
        if (old ^ value) & efer::NXE != 0 {
            self.refresh_paging();
            self.tlb.flush_all();
        }
        Ok(())
    }

    /// Sets PKRU, as WRPKRU and XRSTOR do. The running block may go on: keys do not judge fetches.
    pub(crate) fn load_pkru(&mut self, value: u32) {
        if self.state.deprivileged {
            // Translations have tags for root and keys: another tag, and nothing to drop.
            self.state.pkru = value;
            self.refresh_pvm_keys();
            self.end_block();
            return;
        }
        let old = std::mem::replace(&mut self.state.pkru, value);
        self.walk.set_keys(value, self.state.msrs.pkrs);
        self.tlb.deny_keys(true, value & !old);
    }

    /// Sets IA32_PKRS, as WRMSR does. (In PVM mode the ABI answers for that register.)
    pub(crate) fn load_pkrs(&mut self, value: u32) {
        let old = std::mem::replace(&mut self.state.msrs.pkrs, value);
        self.walk.set_keys(self.state.pkru, value);
        self.tlb.deny_keys(false, value & !old);
    }
}

/// MOV from CRn.
pub(super) fn mov_from_cr(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    vcpu.require_cpl0()?;
    let value = match i.src {
        0 => vcpu.state.cr0,
        2 => vcpu.state.cr2,
        3 => vcpu.state.cr3,
        4 => vcpu.state.cr4,
        8 => {
            let mut value = 0;
            vcpu.exit(Exit::ReadCr8 { value: &mut value });
            value
        }
        _ => return fault(Fault::ud()),
    };
    if operand::size(i) == 8 {
        vcpu.set_reg(i.dst, value);
    } else {
        vcpu.set(i.dst, value as u32);
    }
    Ok(())
}

/// MOV to CRn.
pub(super) fn mov_to_cr(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    vcpu.require_cpl0()?;
    let value = if operand::size(i) == 8 { vcpu.reg(i.src) } else { u64::from(vcpu.get::<u32>(i.src)) };
    match i.dst {
        0 => vcpu.load_cr0(value),
        2 => {
            vcpu.state.cr2 = value;
            Ok(())
        }
        3 => vcpu.load_cr3(value),
        4 => vcpu.load_cr4(value),
        8 => {
            if value > 15 || vcpu.exit(Exit::WriteCr8 { value }) == Answer::Refused {
                return fault(Fault::gp(0));
            }
            vcpu.end_block();
            Ok(())
        }
        _ => fault(Fault::ud()),
    }
}

/// CLTS.
pub(super) fn clts(vcpu: &mut Vcpu, _i: &Insn) -> Exec {
    vcpu.require_cpl0()?;
    vcpu.state.cr0 &= !cr0::TS;
    // Vector and x87 instructions may execute now.
    vcpu.refresh_mode();
    Ok(())
}

/// LMSW: PE (only to one), MP, EM and TS.
pub(super) fn lmsw(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    vcpu.require_cpl0()?;
    let value = u64::from(operand::read::<u16>(vcpu, i, i.dst)?);
    let mask = cr0::MP | cr0::EM | cr0::TS;
    let pe = value & cr0::PE;
    vcpu.load_cr0(vcpu.state.cr0 & !mask | value & mask | pe)
}

/// SMSW: the low bits of CR0; with a register operand more than 16 of them.
pub(super) fn smsw(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    vcpu.check_umip()?;
    let value = vcpu.state.cr0;
    operand::write_selector_like(vcpu, i, value)
}

/// XGETBV.
pub(super) fn xgetbv(vcpu: &mut Vcpu, _i: &Insn) -> Exec {
    if vcpu.state.cr4 & cr4::OSXSAVE == 0 {
        return fault(Fault::ud());
    }
    let value = match vcpu.get::<u32>(reg::RCX) {
        0 => vcpu.state.xcr0,
        1 => vcpu.state.xcr0 & vcpu.xinuse(),
        _ => return fault(Fault::gp(0)),
    };
    vcpu.set(reg::RAX, value as u32);
    vcpu.set(reg::RDX, (value >> 32) as u32);
    Ok(())
}

/// XSETBV.
pub(super) fn xsetbv(vcpu: &mut Vcpu, _i: &Insn) -> Exec {
    if vcpu.state.cr4 & cr4::OSXSAVE == 0 {
        return fault(Fault::ud());
    }
    vcpu.require_cpl0()?;
    let value = vcpu.edx_eax();
    // x87 is always on, and AVX needs SSE.
    let bad =
        value & !vcpu.cpuid.xcr0_bits() != 0 || value & 1 == 0 || (value & 0b100 != 0 && value & 0b010 == 0);
    if vcpu.get::<u32>(reg::RCX) != 0 || bad {
        return fault(Fault::gp(0));
    }
    vcpu.state.xcr0 = value;
    vcpu.refresh_mode();
    vcpu.end_block();
    Ok(())
}

/// RDPKRU.
pub(super) fn rdpkru(vcpu: &mut Vcpu, _i: &Insn) -> Exec {
    if vcpu.state.cr4 & cr4::PKE == 0 {
        return fault(Fault::ud());
    }
    if vcpu.get::<u32>(reg::RCX) != 0 {
        return fault(Fault::gp(0));
    }
    let pkru = vcpu.state.pkru;
    vcpu.set(reg::RAX, pkru);
    vcpu.set(reg::RDX, 0u32);
    Ok(())
}

/// WRPKRU.
pub(super) fn wrpkru(vcpu: &mut Vcpu, _i: &Insn) -> Exec {
    if vcpu.state.cr4 & cr4::PKE == 0 {
        return fault(Fault::ud());
    }
    if vcpu.get::<u32>(reg::RCX) != 0 || vcpu.get::<u32>(reg::RDX) != 0 {
        return fault(Fault::gp(0));
    }
    let value = vcpu.get(reg::RAX);
    vcpu.load_pkru(value);
    Ok(())
}

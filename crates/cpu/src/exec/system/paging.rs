//! INVLPG, INVPCID, and the cache instructions that have nothing to do here.

use mmu::Gva;

use crate::fault::{Exec, Fault, fault};
use crate::insn::Insn;
use crate::state::{CodeMode, cr4};
use crate::vcpu::Vcpu;

/// The bytes of CPUID.
const CPUID: [u8; 2] = [0x0f, 0xa2];

impl Vcpu {
    /// Whether the next instruction is CPUID: with the INVLPG before it, PVM's synthetic CPUID.
    fn is_cpuid_next(&mut self) -> bool {
        let mut bytes = [0; CPUID.len()];
        self.read_bytes(self.state.rip(), &mut bytes).is_ok() && bytes == CPUID
    }
}

/// INVLPG.
pub(super) fn invlpg(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let base = vcpu.state.seg_base[usize::from(i.seg & 7)];
    let mut address = vcpu.effective_address(i).wrapping_add(base);
    if vcpu.state.code_mode != CodeMode::Bits64 {
        address &= 0xffff_ffff;
    }
    if vcpu.state.deprivileged && address == pvm::abi::cpuid::SYNTHETIC_ADDRESS && vcpu.is_cpuid_next() {
        // One instruction, in either mode.
        vcpu.state.set_rip(vcpu.state.rip().wrapping_add(CPUID.len() as u64));
        vcpu.answer_cpuid();
        vcpu.end_block();
        return Ok(());
    }
    vcpu.require_cpl0()?;
    vcpu.tlb.flush_page(Gva(address));
    vcpu.end_block();
    Ok(())
}

/// INVPCID: one address, one PCID, everything, everything but global pages.
pub(super) fn invpcid(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    vcpu.require_cpl0()?;
    let kind = if vcpu.state.code_mode == CodeMode::Bits64 {
        vcpu.reg(i.dst)
    } else {
        u64::from(vcpu.get::<u32>(i.dst))
    };
    let gva = vcpu.linear(i, 16, false)?;
    let pcid: u64 = vcpu.read(gva)?;
    let address: u64 = vcpu.read(gva.wrapping_add(8))?;
    let pcids = vcpu.state.cr4 & cr4::PCIDE != 0;
    if kind > 3 || pcid >> 12 != 0 || (kind < 2 && pcid != 0 && !pcids) {
        return fault(Fault::gp(0));
    }
    match kind {
        0 if !vcpu.walk.canonical(Gva(address)) => return fault(Fault::gp(0)),
        0 => vcpu.tlb.flush_page(Gva(address)),
        // PVM's tags are not PCIDs.
        1 if vcpu.state.deprivileged => vcpu.tlb.flush_all(),
        // A tag as `refresh_paging` makes it.
        1 => vcpu.tlb.flush_pcid(pcid.min(0xffe)),
        2 => vcpu.tlb.flush_all(),
        _ => vcpu.tlb.flush_non_global(),
    }
    vcpu.end_block();
    Ok(())
}

/// INVD, WBINVD, WBNOINVD: memory is always coherent.
pub(super) fn cache(vcpu: &mut Vcpu, _i: &Insn) -> Exec {
    vcpu.require_cpl0()
}

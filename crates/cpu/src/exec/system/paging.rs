//! INVLPG, INVPCID, and the cache instructions that have nothing to do here.

use mmu::Gva;

use crate::fault::{Exec, Fault, fault};
use crate::insn::Insn;
use crate::state::{CodeMode, cr4};
use crate::vcpu::Vcpu;

/// INVLPG.
pub(super) fn invlpg(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    vcpu.require_cpl0()?;
    let base = vcpu.state.seg_base[usize::from(i.seg & 7)];
    let mut address = vcpu.effective_address(i).wrapping_add(base);
    if vcpu.state.code_mode != CodeMode::Bits64 {
        address &= 0xffff_ffff;
    }
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

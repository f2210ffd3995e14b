//! Descriptor-table registers, LDTR and TR, and the instructions that look into descriptors.

use mmu::{Gva, Privilege};

use crate::fault::{Exec, Fault, fault, vector};
use crate::insn::Insn;
use crate::segment::{Descriptor, is_null, rpl, selector_code, system_type};
use crate::state::{CodeMode, Segment, SystemSegment, TableRegister, cr4};
use crate::vcpu::Vcpu;

use super::operand;

impl Vcpu {
    /// #GP(0) where UMIP hides the system's registers from user code.
    pub(crate) fn check_umip(&self) -> Exec {
        if self.state.cr4 & cr4::UMIP != 0 && self.state.cpl > 0 { fault(Fault::gp(0)) } else { Ok(()) }
    }

    /// #UD in real and virtual-8086 mode, which do not know descriptors.
    fn require_protected(&self) -> Exec {
        if self.state.protected() && !self.state.virtual_8086() { Ok(()) } else { fault(Fault::ud()) }
    }

    /// The descriptor of `selector` for LAR, LSL, VERR and VERW: `None` instead of a fault.
    fn look_up(&mut self, selector: u16) -> Exec<Option<Descriptor>> {
        if is_null(selector) {
            return Ok(None);
        }
        if self.state.deprivileged {
            return Ok(self.pvm_descriptor(selector));
        }
        match self.descriptor_address(selector, 8) {
            Some(address) => Ok(Some(Descriptor(self.read_as(address, Privilege::Implicit)?))),
            None => Ok(None),
        }
    }

    /// Whether LAR, LSL, VERR and VERW may see `d` through `selector`.
    fn is_visible(&self, selector: u16, d: Descriptor) -> bool {
        d.is_code() && d.is_conforming() || d.dpl() >= self.segment_cpl().max(rpl(selector))
    }
}

/// LGDT and LIDT.
pub(super) fn load_table<const INTERRUPT: bool>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    vcpu.require_cpl0()?;
    let wide = vcpu.state.code_mode == CodeMode::Bits64;
    let gva = vcpu.linear(i, if wide { 10 } else { 6 }, false)?;
    let limit: u16 = vcpu.read(gva)?;
    let base = if wide {
        vcpu.read::<u64>(gva.wrapping_add(2))?
    } else {
        let base = vcpu.read::<u32>(gva.wrapping_add(2) & 0xffff_ffff)?;
        // A 16-bit operand size loads 24 bits.
        u64::from(if operand::size(i) == 2 { base & 0xff_ffff } else { base })
    };
    if !vcpu.walk.canonical(Gva(base)) {
        return fault(Fault::gp(0));
    }
    let table = TableRegister { base, limit };
    if INTERRUPT {
        vcpu.state.idtr = table;
    } else {
        vcpu.state.gdtr = table;
    }
    Ok(())
}

/// SGDT and SIDT.
pub(super) fn store_table<const INTERRUPT: bool>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    vcpu.check_umip()?;
    let table = if INTERRUPT { vcpu.state.idtr } else { vcpu.state.gdtr };
    let len = if vcpu.state.code_mode == CodeMode::Bits64 { 10 } else { 6 };
    let mut bytes = [0; 10];
    bytes[..2].copy_from_slice(&table.limit.to_le_bytes());
    bytes[2..].copy_from_slice(&table.base.to_le_bytes());
    let gva = vcpu.linear(i, len as u64, true)?;
    vcpu.write_bytes(gva, &bytes[..len])
}

/// LLDT.
pub(super) fn lldt(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    vcpu.require_protected()?;
    vcpu.require_cpl0()?;
    let selector: u16 = operand::read(vcpu, i, i.dst)?;
    let code = selector_code(selector);
    if is_null(selector) || vcpu.state.deprivileged {
        vcpu.state.ldtr = SystemSegment { segment: Segment { selector, limit: 0, attributes: 0 }, base: 0 };
        return Ok(());
    }
    if selector & 4 != 0 {
        return fault(Fault::gp(code));
    }
    let (d, upper) = vcpu.read_system_descriptor(selector)?;
    if !d.is_system() || d.kind() != system_type::LDT {
        return fault(Fault::gp(code));
    }
    if !d.present() {
        return fault(Fault::with_code(vector::NP, code));
    }
    let base = d.base() | upper << 32;
    if !vcpu.walk.canonical(Gva(base)) {
        return fault(Fault::gp(code));
    }
    vcpu.state.ldtr = SystemSegment { segment: d.segment(selector), base };
    Ok(())
}

/// LTR: also marks the TSS busy.
pub(super) fn ltr(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    vcpu.require_protected()?;
    vcpu.require_cpl0()?;
    let selector: u16 = operand::read(vcpu, i, i.dst)?;
    let code = selector_code(selector);
    if vcpu.state.deprivileged {
        // Kept to be read, without effect.
        vcpu.state.tr.segment.selector = selector;
        return Ok(());
    }
    if is_null(selector) {
        return fault(Fault::gp(0));
    }
    if selector & 4 != 0 {
        return fault(Fault::gp(code));
    }
    let (d, upper) = vcpu.read_system_descriptor(selector)?;
    let available = d.kind() == system_type::TSS || d.kind() == system_type::TSS16 && !vcpu.state.long_mode();
    if !d.is_system() || !available {
        return fault(Fault::gp(code));
    }
    if !d.present() {
        return fault(Fault::with_code(vector::NP, code));
    }
    let base = d.base() | upper << 32;
    if !vcpu.walk.canonical(Gva(base)) {
        return fault(Fault::gp(code));
    }
    if let Some(address) = vcpu.descriptor_address(selector, 8) {
        let kind = vcpu.table_address(address, 5);
        vcpu.modify_as::<u8>(kind, Privilege::Implicit, |kind| kind | 2)?;
    }
    let mut segment = d.segment(selector);
    segment.attributes |= 2 << 8;
    vcpu.state.tr = SystemSegment { segment, base };
    Ok(())
}

/// SLDT.
pub(super) fn sldt(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    vcpu.require_protected()?;
    vcpu.check_umip()?;
    let selector = vcpu.state.ldtr.segment.selector;
    operand::write_selector_like(vcpu, i, u64::from(selector))
}

/// STR.
pub(super) fn str_(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    vcpu.require_protected()?;
    vcpu.check_umip()?;
    let selector = vcpu.state.tr.segment.selector;
    operand::write_selector_like(vcpu, i, u64::from(selector))
}

/// LAR: the descriptor's second half, masked.
pub(super) fn lar(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    vcpu.require_protected()?;
    let selector: u16 = operand::read(vcpu, i, i.src)?;
    let long = vcpu.state.long_mode();
    let found = vcpu.look_up(selector)?.filter(|d| vcpu.is_visible(selector, *d)).filter(|d| {
        let kind = d.kind();
        !d.is_system()
            || match kind {
                system_type::LDT | system_type::TSS | system_type::TSS_BUSY | system_type::CALL_GATE => true,
                system_type::TSS16
                | system_type::TSS16_BUSY
                | system_type::CALL_GATE16
                | system_type::TASK_GATE => !long,
                _ => false,
            }
    });
    if let Some(d) = found {
        operand::write_register(vcpu, i, i.dst, d.0 >> 32 & 0x00ff_ff00);
    }
    vcpu.state.flags.set_zf(found.is_some());
    Ok(())
}

/// LSL: the limit in bytes.
pub(super) fn lsl(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    vcpu.require_protected()?;
    let selector: u16 = operand::read(vcpu, i, i.src)?;
    let long = vcpu.state.long_mode();
    let found = vcpu.look_up(selector)?.filter(|d| vcpu.is_visible(selector, *d)).filter(|d| {
        !d.is_system()
            || match d.kind() {
                system_type::LDT | system_type::TSS | system_type::TSS_BUSY => true,
                system_type::TSS16 | system_type::TSS16_BUSY => !long,
                _ => false,
            }
    });
    if let Some(d) = found {
        operand::write_register(vcpu, i, i.dst, u64::from(d.limit()));
    }
    vcpu.state.flags.set_zf(found.is_some());
    Ok(())
}

/// VERR and VERW.
pub(super) fn verify<const WRITE: bool>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    vcpu.require_protected()?;
    let selector: u16 = operand::read(vcpu, i, i.dst)?;
    let good = match vcpu.look_up(selector)? {
        Some(d) => vcpu.is_visible(selector, d) && if WRITE { d.is_writable_data() } else { d.is_readable() },
        None => false,
    };
    vcpu.state.flags.set_zf(good);
    Ok(())
}

/// ARPL: raises the RPL of operand 0 to that of operand 1.
pub(super) fn arpl(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    vcpu.require_protected()?;
    let wanted = vcpu.get::<u16>(i.src) & 3;
    let raised = |old: u16| if old & 3 < wanted { old & !3 | wanted } else { old };
    let old = if operand::is_memory(i) {
        vcpu.update::<u16>(i, false, raised)?.0
    } else {
        let old = vcpu.get::<u16>(i.dst);
        vcpu.set(i.dst, raised(old));
        old
    };
    vcpu.state.flags.set_zf(old & 3 < wanted);
    Ok(())
}

//! Loading and storing segment registers: MOV, PUSH, POP, LDS and its kin.

use crate::fault::{Exec, Fault, fault};
use crate::insn::Insn;
use crate::state::{CodeMode, seg, slow};
use crate::vcpu::Vcpu;

use super::operand;

impl Vcpu {
    /// Interrupts and debug traps wait for one instruction after a load of SS. (In PVM mode too: the processor below does
    /// so, whatever the ABI thinks of shadows.)
    fn shadow_stack_load(&mut self, register: u8) {
        if register == seg::SS {
            self.state.slow |= slow::SS_SHADOW;
            self.end_block();
        }
    }
}

/// MOV to a segment register.
pub(super) fn mov_to_sreg(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    if i.dst == seg::CS || i.dst > seg::GS {
        return fault(Fault::ud());
    }
    let selector = operand::read::<u16>(vcpu, i, i.src)?;
    let loaded = vcpu.check_segment_load(i.dst, selector)?;
    vcpu.put_segment(i.dst, loaded);
    vcpu.shadow_stack_load(i.dst);
    Ok(())
}

/// MOV from a segment register.
pub(super) fn mov_from_sreg(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let Some(segment) = vcpu.state.segments.get(usize::from(i.src)) else {
        return fault(Fault::ud());
    };
    let selector = u64::from(segment.selector);
    operand::write_selector_like(vcpu, i, selector)
}

/// PUSH of a segment register: a whole slot, of which only the low 16 bits are written for a 32-bit one.
pub(super) fn push(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let selector = vcpu.state.segments[usize::from(i.dst)].selector;
    match operand::size(i) {
        2 => vcpu.push(selector),
        4 => {
            let pointer = vcpu.stack_pointer().wrapping_sub(4);
            let address = vcpu.stack_address(pointer, 2, true)?;
            vcpu.write(address, selector)?;
            vcpu.set_stack_pointer(pointer);
            Ok(())
        }
        _ => vcpu.push(u64::from(selector)),
    }
}

/// POP of a segment register.
pub(super) fn pop(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let selector: u16 = vcpu.peek(0)?;
    let loaded = vcpu.check_segment_load(i.dst, selector)?;
    // The stack pointer has the width of the old stack.
    vcpu.release(operand::size(i));
    vcpu.put_segment(i.dst, loaded);
    vcpu.shadow_stack_load(i.dst);
    Ok(())
}

/// LDS, LES, LFS, LGS and LSS.
pub(super) fn load_far_pointer<const SEGMENT: u8>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let size = operand::size(i);
    let gva = vcpu.linear(i, size + 2, false)?;
    let offset = match size {
        2 => u64::from(vcpu.read::<u16>(gva)?),
        4 => u64::from(vcpu.read::<u32>(gva)?),
        _ => vcpu.read(gva)?,
    };
    let wide = vcpu.state.code_mode == CodeMode::Bits64;
    let next = gva.wrapping_add(size);
    let selector: u16 = vcpu.read(if wide { next } else { next & 0xffff_ffff })?;
    let loaded = vcpu.check_segment_load(SEGMENT, selector)?;
    operand::write_register(vcpu, i, i.dst, offset);
    vcpu.put_segment(SEGMENT, loaded);
    Ok(())
}

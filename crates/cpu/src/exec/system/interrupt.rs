//! Software interrupts and IRET.

use crate::fault::{Exec, Fault, fault, vector};
use crate::flags;
use crate::insn::Insn;
use crate::segment::virtual_8086_segment;
use crate::state::{CodeMode, Segment, seg, slow};
use crate::vcpu::Vcpu;

use super::operand;

/// The flags that IRET takes from the frame at any privilege.
const IRET: u64 = flags::ARITHMETIC | flags::TF | flags::DF | flags::NT | flags::RF | flags::AC | flags::ID;

/// INT n.
pub(super) fn int(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    if vcpu.state.virtual_8086() && vcpu.iopl() < 3 {
        return fault(Fault::gp(0));
    }
    vcpu.software_interrupt(i.imm as u8)
}

/// INT3.
pub(super) fn int3(vcpu: &mut Vcpu, _i: &Insn) -> Exec {
    vcpu.software_interrupt(vector::BP)
}

/// INT1.
pub(super) fn int1(vcpu: &mut Vcpu, _i: &Insn) -> Exec {
    vcpu.debug_interrupt()
}

/// INTO.
pub(super) fn into(vcpu: &mut Vcpu, _i: &Insn) -> Exec {
    if vcpu.state.flags.of() { vcpu.software_interrupt(vector::OF) } else { Ok(()) }
}

/// IRET.
pub(super) fn iret(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    // NMIs are unblocked even if IRET then faults.
    vcpu.state.slow &= !slow::NMI_BLOCKED;
    vcpu.end_block();
    let size = operand::size(i);
    if !vcpu.state.protected() {
        return iret_real(vcpu, size, IRET | flags::IF | flags::IOPL);
    }
    if vcpu.state.virtual_8086() {
        if vcpu.iopl() < 3 {
            return fault(Fault::gp(0));
        }
        return iret_real(vcpu, size, IRET | flags::IF);
    }
    if vcpu.state.flags.system() & flags::NT != 0 {
        if vcpu.state.long_mode() {
            return fault(Fault::gp(0));
        }
        return vcpu.return_from_task();
    }
    let rip = operand::peek(vcpu, size, 0)?;
    let selector = operand::peek(vcpu, size, size)? as u16;
    let image = operand::peek(vcpu, size, 2 * size)?;
    if size != 2 && image & flags::VM != 0 && vcpu.state.cpl == 0 && !vcpu.state.long_mode() {
        return iret_to_virtual_8086(vcpu, rip, selector, image);
    }
    iret_protected(vcpu, size, rip, selector, image)
}

/// Real mode, or virtual-8086 mode with IOPL 3: the mode stays.
fn iret_real(vcpu: &mut Vcpu, size: u64, mask: u64) -> Exec {
    let rip = operand::peek(vcpu, size, 0)?;
    let selector = operand::peek(vcpu, size, size)? as u16;
    let image = operand::peek(vcpu, size, 2 * size)?;
    if rip > u64::from(vcpu.state.segments[usize::from(seg::CS)].limit) {
        return fault(Fault::gp(0));
    }
    vcpu.release(3 * size);
    vcpu.load_real_segment(seg::CS, selector);
    vcpu.state.set_rip(rip);
    set_flags(vcpu, size, mask, image);
    Ok(())
}

fn iret_to_virtual_8086(vcpu: &mut Vcpu, rip: u64, selector: u16, image: u64) -> Exec {
    let mut words = [0; 6];
    for (n, word) in (3..).zip(&mut words) {
        *word = operand::peek(vcpu, 4, n * 4)?;
    }
    let [pointer, ss, es, ds, fs, gs] = words;
    if rip > 0xffff {
        return fault(Fault::gp(0));
    }
    let segments = [
        (seg::CS, u64::from(selector)),
        (seg::SS, ss),
        (seg::ES, es),
        (seg::DS, ds),
        (seg::FS, fs),
        (seg::GS, gs),
    ];
    for (register, value) in segments {
        let selector = value as u16;
        vcpu.state.segments[usize::from(register)] = virtual_8086_segment(selector);
        vcpu.state.seg_base[usize::from(register)] = u64::from(selector) << 4;
    }
    vcpu.set_reg(crate::state::reg::RSP, pointer);
    vcpu.state.set_rip(rip);
    vcpu.state.cpl = 3;
    set_flags(vcpu, 4, u64::MAX, image);
    Ok(())
}

fn iret_protected(vcpu: &mut Vcpu, size: u64, rip: u64, selector: u16, image: u64) -> Exec {
    let named = selector;
    let selector = vcpu.pvm_code_selector(named);
    let target = vcpu.check_return_code(selector, rip)?;
    let (old_cpl, iopl) = (vcpu.segment_cpl(), vcpu.iopl());
    let from_64_bit = vcpu.state.code_mode == CodeMode::Bits64;
    if target.cpl != old_cpl || from_64_bit {
        let pointer = operand::peek(vcpu, size, 3 * size)?;
        let ss = operand::peek(vcpu, size, 4 * size)? as u16;
        let stack = vcpu.check_return_stack(ss, &target)?;
        let long_target = vcpu.state.long_mode() && target.segment.has(Segment::LONG);
        vcpu.put_code_segment(target.segment, target.base, target.cpl);
        vcpu.put_segment(seg::SS, stack);
        vcpu.set_returned_pointer(pointer, long_target);
        if target.cpl != old_cpl {
            vcpu.null_privileged_segments();
        }
    } else {
        vcpu.accept_return_code(&target)?;
        vcpu.release(3 * size);
        vcpu.put_code_segment(target.segment, target.base, target.cpl);
    }
    vcpu.accept_pvm_code(named, selector);
    vcpu.state.set_rip(rip);
    let mut mask = IRET;
    if old_cpl <= iopl {
        mask |= flags::IF;
    }
    if old_cpl == 0 {
        mask |= flags::IOPL | flags::VIF | flags::VIP;
    }
    set_flags(vcpu, size, mask, image);
    Ok(())
}

fn set_flags(vcpu: &mut Vcpu, size: u64, mask: u64, image: u64) {
    let mask = if size == 2 { mask & 0xffff } else { mask };
    let old = vcpu.state.flags.bits();
    vcpu.state.flags.set_bits(old & !mask | image & mask);
    vcpu.refresh_mode();
}

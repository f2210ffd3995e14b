//! Far jumps, calls and returns.
//!
//! # Theory of operation
//! A far pointer names code, a call gate, or in legacy mode a task. Direct targets keep the CPL; a call gate may
//! raise it, and then takes a stack from the TSS; a return may lower it, and then takes the stack pointer from
//! the stack and gives up the segments that the outer level may not have. All checks come first, then the pushes,
//! then the registers.

use crate::fault::{Exec, Fault, fault, vector};
use crate::frame::Frame;
use crate::insn::Insn;
use crate::segment::{Descriptor, is_null, rpl, selector_code, system_type};
use crate::state::{CodeMode, Segment, seg};
use crate::task::TaskSwitch;
use crate::vcpu::Vcpu;

use super::operand;

/// JMP or CALL.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Jump,
    Call,
}

/// The offset `rip`, truncated to `size` bytes.
fn truncate(rip: u64, size: u64) -> u64 {
    match size {
        2 => rip & 0xffff,
        4 => rip & 0xffff_ffff,
        _ => rip,
    }
}

/// CALL or JMP to a pointer in the instruction.
pub(super) fn direct<const CALL: bool>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let (offset, selector) = (i.imm & 0xffff_ffff, (i.imm >> 32) as u16);
    transfer(vcpu, kind::<CALL>(), operand::size(i), selector, offset)
}

/// CALL or JMP to a pointer in memory.
pub(super) fn indirect<const CALL: bool>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let size = operand::size(i);
    let gva = vcpu.linear(i, size + 2, false)?;
    let offset = match size {
        2 => u64::from(vcpu.read::<u16>(gva)?),
        4 => u64::from(vcpu.read::<u32>(gva)?),
        _ => vcpu.read(gva)?,
    };
    let next = gva.wrapping_add(size);
    let wide = vcpu.state.code_mode == CodeMode::Bits64;
    let selector = vcpu.read(if wide { next } else { next & 0xffff_ffff })?;
    transfer(vcpu, kind::<CALL>(), size, selector, offset)
}

fn kind<const CALL: bool>() -> Kind {
    if CALL { Kind::Call } else { Kind::Jump }
}

fn transfer(vcpu: &mut Vcpu, kind: Kind, size: u64, selector: u16, offset: u64) -> Exec {
    vcpu.end_block();
    if !vcpu.state.protected() || vcpu.state.virtual_8086() {
        return transfer_real(vcpu, kind, size, selector, offset);
    }
    let named = selector;
    let selector = vcpu.pvm_code_selector(named);
    if is_null(selector) {
        return fault(Fault::gp(0));
    }
    let d = vcpu.read_descriptor(selector, vector::GP, 0)?;
    if !d.is_system() {
        transfer_to_code(vcpu, kind, size, selector, offset, d)?;
        vcpu.accept_pvm_code(named, selector);
        return Ok(());
    }
    let code = selector_code(selector);
    let long = vcpu.state.long_mode();
    if d.dpl() < vcpu.state.cpl.max(rpl(selector)) {
        return fault(Fault::gp(code));
    }
    let task = match d.kind() {
        system_type::CALL_GATE => return transfer_through_gate(vcpu, kind, selector, d),
        system_type::CALL_GATE16 if !long => return transfer_through_gate(vcpu, kind, selector, d),
        system_type::TSS | system_type::TSS16 if !long => selector,
        system_type::TASK_GATE if !long => {
            if !d.present() {
                return fault(Fault::with_code(vector::NP, code));
            }
            d.gate_selector()
        }
        _ => return fault(Fault::gp(code)),
    };
    vcpu.switch_task(match kind {
        Kind::Call => TaskSwitch::call(task),
        Kind::Jump => TaskSwitch::jump(task),
    })
}

fn transfer_real(vcpu: &mut Vcpu, kind: Kind, size: u64, selector: u16, offset: u64) -> Exec {
    let cs = vcpu.state.segments[usize::from(seg::CS)];
    if offset > u64::from(cs.limit) {
        return fault(Fault::gp(0));
    }
    if kind == Kind::Call {
        let mut frame = Frame::current(vcpu, 0);
        frame.push(vcpu, size, u64::from(cs.selector))?;
        frame.push(vcpu, size, vcpu.state.rip())?;
        frame.install_pointer(vcpu);
    }
    vcpu.load_real_segment(seg::CS, selector);
    vcpu.state.set_rip(offset);
    vcpu.refresh_mode();
    Ok(())
}

fn transfer_to_code(
    vcpu: &mut Vcpu,
    kind: Kind,
    size: u64,
    selector: u16,
    offset: u64,
    d: Descriptor,
) -> Exec {
    let (cpl, code) = (vcpu.segment_cpl(), selector_code(selector));
    let level_fits = if d.is_conforming() { d.dpl() <= cpl } else { d.dpl() == cpl && rpl(selector) <= cpl };
    if !d.is_code() || !level_fits || vcpu.is_reserved_code(d) || !vcpu.pvm_mode_keeps(d) {
        return fault(Fault::gp(code));
    }
    if !d.present() {
        return fault(Fault::with_code(vector::NP, code));
    }
    let segment = d.segment(selector);
    let offset = truncate(offset, size);
    let mut frame = Frame::current(vcpu, 0);
    if kind == Kind::Call {
        let cs = vcpu.state.segments[usize::from(seg::CS)].selector;
        frame.push(vcpu, size, u64::from(cs))?;
        frame.push(vcpu, size, vcpu.state.rip())?;
    }
    vcpu.check_code_offset(&segment, offset, 0)?;
    vcpu.mark_accessed(selector, d)?;
    frame.install_pointer(vcpu);
    vcpu.put_code_segment(segment, d.base(), cpl);
    vcpu.state.set_rip(offset);
    vcpu.refresh_mode();
    Ok(())
}

fn transfer_through_gate(vcpu: &mut Vcpu, kind: Kind, gate_selector: u16, gate: Descriptor) -> Exec {
    let long = vcpu.state.long_mode();
    let code = selector_code(gate_selector);
    let wide = gate.kind() == system_type::CALL_GATE;
    let mut offset = if wide { gate.gate_offset() } else { gate.gate_offset() & 0xffff };
    if long {
        let (_, upper) = vcpu.read_system_descriptor(gate_selector)?;
        // The type field of the upper half must be zero, so that it is not taken for a descriptor.
        if upper >> 40 & 0x1f != 0 {
            return fault(Fault::gp(code));
        }
        offset |= upper << 32;
    }
    if !gate.present() {
        return fault(Fault::with_code(vector::NP, code));
    }
    let selector = gate.gate_selector();
    if is_null(selector) {
        return fault(Fault::gp(0));
    }
    let code = selector_code(selector);
    let d = vcpu.read_descriptor(selector, vector::GP, 0)?;
    let cpl = vcpu.state.cpl;
    if !d.is_code() || d.dpl() > cpl {
        return fault(Fault::gp(code));
    }
    if long && (!d.has(Segment::LONG) || d.has(Segment::DEFAULT_BIG)) {
        return fault(Fault::gp(code));
    }
    if kind == Kind::Jump && !d.is_conforming() && d.dpl() != cpl {
        return fault(Fault::gp(code));
    }
    if !d.present() {
        return fault(Fault::with_code(vector::NP, code));
    }
    let segment = d.segment(selector);
    let size = if long {
        8
    } else if wide {
        4
    } else {
        2
    };
    let inner = kind == Kind::Call && !d.is_conforming() && d.dpl() < cpl;
    let new_cpl = if inner { d.dpl() } else { cpl };
    let return_cs = u64::from(vcpu.state.segments[usize::from(seg::CS)].selector);
    let return_rip = vcpu.state.rip();

    let mut frame = if !inner {
        Frame::current(vcpu, 0)
    } else if long {
        let pointer = vcpu.long_stack_pointer(4 + u64::from(new_cpl) * 8, 0)?;
        Frame::long(pointer, new_cpl, 0)
    } else {
        vcpu.inner_stack(new_cpl, 0)?
    };
    vcpu.check_code_offset(&segment, offset, 0)?;
    if inner {
        let old_ss = u64::from(vcpu.state.segments[usize::from(seg::SS)].selector);
        let old_pointer = vcpu.reg(crate::state::reg::RSP);
        // Legacy gates copy parameters from the old stack to the new one.
        let count = if long { 0 } else { gate.0 >> 32 & 31 };
        let mut parameters = Vec::new();
        for n in 0..count {
            parameters.push(operand::peek(vcpu, size, n * size)?);
        }
        frame.push(vcpu, size, old_ss)?;
        frame.push(vcpu, size, old_pointer)?;
        for parameter in parameters.into_iter().rev() {
            frame.push(vcpu, size, parameter)?;
        }
    }
    if kind == Kind::Call {
        frame.push(vcpu, size, return_cs)?;
        frame.push(vcpu, size, return_rip)?;
    }
    vcpu.mark_accessed(selector, d)?;
    if inner {
        frame.install(vcpu);
    } else {
        frame.install_pointer(vcpu);
    }
    vcpu.put_code_segment(segment, d.base(), new_cpl);
    vcpu.state.set_rip(offset);
    vcpu.refresh_mode();
    Ok(())
}

/// A code segment to return to, checked.
pub(super) struct ReturnTarget {
    pub(super) segment: Segment,
    pub(super) base: u64,
    pub(super) cpl: u8,
    descriptor: Descriptor,
}

impl Vcpu {
    /// Checks the code segment that RETF or IRET returns to.
    ///
    /// # Errors
    /// #GP, #NP, #PF.
    pub(super) fn check_return_code(&mut self, selector: u16, rip: u64) -> Exec<ReturnTarget> {
        if is_null(selector) {
            return fault(Fault::gp(0));
        }
        let code = selector_code(selector);
        let d = self.read_descriptor(selector, vector::GP, 0)?;
        let cpl = rpl(selector);
        let level_fits = if d.is_conforming() { d.dpl() <= cpl } else { d.dpl() == cpl };
        let refused = self.is_reserved_code(d) || !self.pvm_mode_keeps(d);
        if !d.is_code() || cpl < self.segment_cpl() || !level_fits || refused {
            return fault(Fault::gp(code));
        }
        if !d.present() {
            return fault(Fault::with_code(vector::NP, code));
        }
        let segment = d.segment(selector);
        self.check_code_offset(&segment, rip, 0)?;
        Ok(ReturnTarget { segment, base: d.base(), cpl, descriptor: d })
    }

    /// Checks the stack segment that RETF or IRET to `target` returns to, and sets the accessed bits of both.
    ///
    /// # Errors
    /// #GP, #SS, #PF.
    pub(super) fn check_return_stack(
        &mut self,
        selector: u16,
        target: &ReturnTarget,
    ) -> Exec<(Segment, u64)> {
        let selector = self.pvm_return_stack_selector(selector);
        let code = selector_code(selector);
        if is_null(selector) {
            let to_64_bit = self.state.long_mode() && target.segment.has(Segment::LONG);
            if !to_64_bit || target.cpl == 3 || rpl(selector) != target.cpl {
                return fault(Fault::gp(0));
            }
            self.mark_accessed(target.segment.selector, target.descriptor)?;
            return Ok((Segment { selector, limit: 0, attributes: 0 }, 0));
        }
        let d = self.read_descriptor(selector, vector::GP, 0)?;
        if rpl(selector) != target.cpl || d.dpl() != target.cpl || !d.is_writable_data() {
            return fault(Fault::gp(code));
        }
        if !d.present() {
            return fault(Fault::with_code(vector::SS, code));
        }
        self.mark_accessed(target.segment.selector, target.descriptor)?;
        self.mark_accessed(selector, d)?;
        Ok((d.segment(selector), d.base()))
    }

    /// Sets the accessed bit of the code segment that is returned to, where the stack stays.
    ///
    /// # Errors
    /// #PF.
    pub(super) fn accept_return_code(&mut self, target: &ReturnTarget) -> Exec {
        self.mark_accessed(target.segment.selector, target.descriptor)
    }

    /// Sets the stack pointer for a stack segment just loaded: a 16-bit stack keeps the upper bits.
    pub(super) fn set_returned_pointer(&mut self, pointer: u64, long_target: bool) {
        use crate::state::reg::RSP;
        let big = self.state.segments[usize::from(seg::SS)].has(Segment::DEFAULT_BIG);
        let value = if long_target {
            pointer
        } else if big {
            pointer & 0xffff_ffff
        } else {
            self.reg(RSP) & !0xffff | pointer & 0xffff
        };
        self.set_reg(RSP, value);
    }
}

/// RETF, with the bytes of parameters to release in the immediate.
pub(super) fn ret(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let (size, parameters) = (operand::size(i), i.imm & 0xffff);
    let rip = operand::peek(vcpu, size, 0)?;
    let selector = operand::peek(vcpu, size, size)? as u16;
    vcpu.end_block();
    if !vcpu.state.protected() || vcpu.state.virtual_8086() {
        if rip > u64::from(vcpu.state.segments[usize::from(seg::CS)].limit) {
            return fault(Fault::gp(0));
        }
        vcpu.release(2 * size + parameters);
        vcpu.load_real_segment(seg::CS, selector);
        vcpu.state.set_rip(rip);
        vcpu.refresh_mode();
        return Ok(());
    }
    let named = selector;
    let selector = vcpu.pvm_code_selector(named);
    let target = vcpu.check_return_code(selector, rip)?;
    if target.cpl == vcpu.segment_cpl() {
        vcpu.accept_return_code(&target)?;
        vcpu.release(2 * size + parameters);
        vcpu.put_code_segment(target.segment, target.base, target.cpl);
    } else {
        let pointer = operand::peek(vcpu, size, 2 * size + parameters)?;
        let ss = operand::peek(vcpu, size, 3 * size + parameters)? as u16;
        let stack = vcpu.check_return_stack(ss, &target)?;
        let long_target = vcpu.state.long_mode() && target.segment.has(Segment::LONG);
        vcpu.put_code_segment(target.segment, target.base, target.cpl);
        vcpu.put_segment(seg::SS, stack);
        vcpu.set_returned_pointer(pointer.wrapping_add(parameters), long_target);
        vcpu.null_privileged_segments();
    }
    vcpu.accept_pvm_code(named, selector);
    vcpu.state.set_rip(rip);
    vcpu.refresh_mode();
    Ok(())
}

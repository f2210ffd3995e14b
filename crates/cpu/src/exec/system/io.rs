//! IN, OUT, INS, OUTS, and who may use which port.

use mmu::Privilege;

use crate::attention;
use crate::exit::Exit;
use crate::fault::{Exec, Fault, Stop, fault};
use crate::insn::{Insn, insn_flags};
use crate::state::{CodeMode, reg, seg, slow};
use crate::vcpu::Vcpu;

use super::operand;

impl Vcpu {
    /// Checks access to `size` ports from `port`: by IOPL, else by the TSS's permission bitmap.
    ///
    /// # Errors
    /// #GP(0); #PF in reading the bitmap.
    fn check_port(&mut self, port: u16, size: u64) -> Exec {
        let state = &self.state;
        if !state.protected() || (state.cpl <= self.iopl() && !state.virtual_8086()) {
            return Ok(());
        }
        if state.deprivileged {
            return fault(Fault::gp(0));
        }
        let (tr, limit) = (state.tr, u64::from(state.tr.segment.limit));
        if !self.tss_is_wide() || limit < 0x67 {
            return fault(Fault::gp(0));
        }
        let map: u16 = self.read_as(self.table_address(tr.base, 0x66), Privilege::Implicit)?;
        // Two bytes, as the bits of one access may be in both.
        let offset = u64::from(map) + u64::from(port / 8);
        if offset + 1 > limit {
            return fault(Fault::gp(0));
        }
        let bits: u16 = self.read_as(self.table_address(tr.base, offset), Privilege::Implicit)?;
        let mask = ((1u16 << size) - 1) << (port % 8);
        if bits & mask != 0 { fault(Fault::gp(0)) } else { Ok(()) }
    }

    fn port_in(&mut self, port: u16, size: u64) -> u32 {
        let mut bytes = [0; 4];
        let len = (size as usize).min(4);
        self.exit(Exit::PortIn { port, data: &mut bytes[..len] });
        self.io_breakpoint(port, size);
        u32::from_le_bytes(bytes)
    }

    fn port_out(&mut self, port: u16, size: u64, value: u32) {
        let len = (size as usize).min(4);
        self.exit(Exit::PortOut { port, data: &value.to_le_bytes()[..len] });
        self.io_breakpoint(port, size);
    }
}

fn port_of(vcpu: &Vcpu, i: &Insn, immediate: bool) -> u16 {
    if immediate { (i.imm & 0xff) as u16 } else { vcpu.get(reg::RDX) }
}

/// IN.
pub(super) fn port_in<const IMMEDIATE: bool>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let (port, size) = (port_of(vcpu, i, IMMEDIATE), operand::size(i));
    vcpu.check_port(port, size)?;
    let value = vcpu.port_in(port, size);
    match size {
        1 => vcpu.set(reg::RAX, value as u8),
        2 => vcpu.set(reg::RAX, value as u16),
        _ => vcpu.set(reg::RAX, value),
    }
    vcpu.end_block();
    Ok(())
}

/// OUT.
pub(super) fn port_out<const IMMEDIATE: bool>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let (port, size) = (port_of(vcpu, i, IMMEDIATE), operand::size(i));
    vcpu.check_port(port, size)?;
    vcpu.port_out(port, size, vcpu.get(reg::RAX));
    vcpu.end_block();
    Ok(())
}

/// A register, truncated to the address size.
fn address_register(vcpu: &Vcpu, i: &Insn, r: u8) -> u64 {
    match i.address_size {
        2 => u64::from(vcpu.get::<u16>(r)),
        4 => u64::from(vcpu.get::<u32>(r)),
        _ => vcpu.reg(r),
    }
}

fn set_address_register(vcpu: &mut Vcpu, i: &Insn, r: u8, value: u64) {
    match i.address_size {
        2 => vcpu.set(r, value as u16),
        4 => vcpu.set(r, value as u32),
        _ => vcpu.set_reg(r, value),
    }
}

/// Runs `element` once, or with a REP prefix RCX times, moving `pointer` each time. Between elements an event may
/// come in: the registers then stand for what is left, and the instruction is run again.
fn repeat(vcpu: &mut Vcpu, i: &Insn, pointer: u8, mut element: impl FnMut(&mut Vcpu, u64) -> Exec) -> Exec {
    let size = operand::size(i);
    let step = if vcpu.state.flags.df() { size.wrapping_neg() } else { size };
    let rep = i.has(insn_flags::REP) || i.has(insn_flags::REPNE);
    if rep && address_register(vcpu, i, reg::RCX) == 0 {
        return Ok(());
    }
    loop {
        let at = address_register(vcpu, i, pointer);
        element(vcpu, at)?;
        set_address_register(vcpu, i, pointer, at.wrapping_add(step));
        if !rep {
            break;
        }
        let left = address_register(vcpu, i, reg::RCX).wrapping_sub(1);
        set_address_register(vcpu, i, reg::RCX, left);
        if left == 0 {
            break;
        }
        let due = slow::SINGLE_STEP | slow::DEBUG_TRAP;
        let asked = vcpu.attention.peek() & !attention::SIPI;
        if asked != 0 || vcpu.state.slow & due != 0 {
            return Err(Box::new(Stop::Restart));
        }
    }
    vcpu.end_block();
    Ok(())
}

/// INS: from port DX to ES:rDI.
pub(super) fn ins(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let (port, size) = (vcpu.get(reg::RDX), operand::size(i));
    vcpu.check_port(port, size)?;
    let es = if vcpu.state.code_mode == CodeMode::Bits64 { seg::FLAT } else { seg::ES };
    repeat(vcpu, i, reg::RDI, |vcpu, at| {
        let gva = vcpu.segmented(es, at, size, true)?;
        // The port is not read if the byte cannot be stored.
        vcpu.probe_write(gva, size)?;
        let value = vcpu.port_in(port, size);
        match size {
            1 => vcpu.write(gva, value as u8),
            2 => vcpu.write(gva, value as u16),
            _ => vcpu.write(gva, value),
        }
    })
}

/// OUTS: from DS:rSI, or another segment, to port DX.
pub(super) fn outs(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let (port, size) = (vcpu.get(reg::RDX), operand::size(i));
    vcpu.check_port(port, size)?;
    repeat(vcpu, i, reg::RSI, |vcpu, at| {
        let gva = vcpu.segmented(i.seg, at, size, false)?;
        let value = match size {
            1 => u32::from(vcpu.read::<u8>(gva)?),
            2 => u32::from(vcpu.read::<u16>(gva)?),
            _ => vcpu.read::<u32>(gva)?,
        };
        vcpu.port_out(port, size, value);
        Ok(())
    })
}

//! Fast system calls, and the FS and GS bases of 64-bit code.

use mmu::Gva;

use crate::fault::{Exec, Fault, fault};
use crate::flags;
use crate::insn::Insn;
use crate::state::{CodeMode, Segment, cr4, efer, reg, seg, slow};
use crate::vcpu::Vcpu;

use super::operand;

/// The flags that SYSRET takes from R11.
const SYSRET_FLAGS: u64 = 0x3c_7fd7;

/// What the fast instructions load instead of reading descriptors: 4 GiB from zero.
fn flat(selector: u16, dpl: u8, kind: u32) -> Segment {
    let common = Segment::PRESENT | Segment::NON_SYSTEM | Segment::GRANULARITY | Segment::ACCESSED;
    let attributes = common | Segment::WRITABLE | u32::from(dpl) << 13 | kind;
    Segment { selector, limit: 0xffff_ffff, attributes }
}

const CODE64: u32 = Segment::CODE | Segment::LONG;
const CODE32: u32 = Segment::CODE | Segment::DEFAULT_BIG;
const STACK: u32 = Segment::DEFAULT_BIG;

impl Vcpu {
    /// Loads CS and SS flat, with CS's RPL and the CPL `cpl`.
    fn load_flat(&mut self, cs: u16, ss: u16, cpl: u8, code: u32) {
        let level = u16::from(cpl);
        self.state.segments[usize::from(seg::CS)] = flat(cs & !3 | level, cpl, code);
        self.state.segments[usize::from(seg::SS)] = flat(ss & !3 | level, cpl, STACK);
        self.state.seg_base[usize::from(seg::CS)] = 0;
        self.state.seg_base[usize::from(seg::SS)] = 0;
        self.state.cpl = cpl;
    }
}

fn require_syscall(vcpu: &Vcpu) -> Exec {
    if vcpu.state.code_mode != CodeMode::Bits64 || vcpu.state.efer & efer::SCE == 0 {
        return fault(Fault::ud());
    }
    Ok(())
}

/// SYSCALL.
pub(super) fn syscall(vcpu: &mut Vcpu, _i: &Insn) -> Exec {
    require_syscall(vcpu)?;
    if vcpu.state.deprivileged {
        return vcpu.syscall_pvm();
    }
    let msrs = &vcpu.state.msrs;
    let (cs, entry, mask) = ((msrs.star >> 32) as u16, msrs.lstar, msrs.fmask);
    let image = vcpu.state.flags.bits() & !flags::RF;
    vcpu.set_reg(reg::RCX, vcpu.state.rip());
    vcpu.set_reg(reg::R11, image);
    vcpu.load_flat(cs, (cs & !3).wrapping_add(8), 0, CODE64);
    vcpu.state.set_rip(entry);
    vcpu.state.flags.set_bits(image & !mask);
    if image & mask & flags::TF != 0 {
        vcpu.state.slow |= slow::NO_STEP_TRAP;
    }
    vcpu.refresh_mode();
    vcpu.end_block();
    Ok(())
}

/// SYSRET.
pub(super) fn sysret(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    require_syscall(vcpu)?;
    vcpu.require_cpl0()?;
    vcpu.forbid_in_pvm_mode()?;
    let selector = (vcpu.state.msrs.star >> 48) as u16;
    let wide = operand::size(i) == 8;
    let target = vcpu.reg(reg::RCX);
    if wide && !vcpu.walk.canonical(Gva(target)) {
        return fault(Fault::gp(0));
    }
    let (offset, code) = if wide { (16, CODE64) } else { (0, CODE32) };
    vcpu.load_flat(selector.wrapping_add(offset), selector.wrapping_add(8), 3, code);
    vcpu.state.set_rip(if wide { target } else { target & 0xffff_ffff });
    let image = vcpu.reg(reg::R11) & SYSRET_FLAGS;
    vcpu.state.flags.set_bits(image);
    vcpu.refresh_mode();
    vcpu.end_block();
    Ok(())
}

/// SYSENTER.
pub(super) fn sysenter(vcpu: &mut Vcpu, _i: &Insn) -> Exec {
    vcpu.forbid_in_pvm_mode()?;
    let msrs = &vcpu.state.msrs;
    let cs = msrs.sysenter_cs as u16;
    let (esp, eip) = (msrs.sysenter_esp, msrs.sysenter_eip);
    if !vcpu.state.protected() || cs & !3 == 0 {
        return fault(Fault::gp(0));
    }
    let long = vcpu.state.long_mode();
    let width = if long { u64::MAX } else { 0xffff_ffff };
    vcpu.load_flat(cs, (cs & !3).wrapping_add(8), 0, if long { CODE64 } else { CODE32 });
    vcpu.set_reg(reg::RSP, esp & width);
    vcpu.state.set_rip(eip & width);
    vcpu.state.flags.set_system(flags::VM | flags::IF | flags::RF, 0);
    vcpu.refresh_mode();
    vcpu.end_block();
    Ok(())
}

/// SYSEXIT.
pub(super) fn sysexit(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    vcpu.forbid_in_pvm_mode()?;
    let cs = vcpu.state.msrs.sysenter_cs as u16;
    if !vcpu.state.protected() || vcpu.state.cpl != 0 || cs & !3 == 0 {
        return fault(Fault::gp(0));
    }
    let wide = operand::size(i) == 8;
    let (rsp, rip) = (vcpu.reg(reg::RCX), vcpu.reg(reg::RDX));
    if wide && !(vcpu.walk.canonical(Gva(rsp)) && vcpu.walk.canonical(Gva(rip))) {
        return fault(Fault::gp(0));
    }
    let (offset, code, width) = if wide { (32, CODE64, u64::MAX) } else { (16, CODE32, 0xffff_ffff) };
    let cs = cs & !3;
    vcpu.load_flat(cs.wrapping_add(offset), cs.wrapping_add(offset + 8), 3, code);
    vcpu.set_reg(reg::RSP, rsp & width);
    vcpu.state.set_rip(rip & width);
    vcpu.refresh_mode();
    vcpu.end_block();
    Ok(())
}

/// SWAPGS.
pub(super) fn swapgs(vcpu: &mut Vcpu, _i: &Insn) -> Exec {
    if vcpu.state.code_mode != CodeMode::Bits64 {
        return fault(Fault::ud());
    }
    vcpu.require_cpl0()?;
    vcpu.forbid_in_pvm_mode()?;
    let state = &mut vcpu.state;
    std::mem::swap(&mut state.seg_base[usize::from(seg::GS)], &mut state.msrs.kernel_gs_base);
    Ok(())
}

fn require_fsgsbase(vcpu: &Vcpu) -> Exec {
    if vcpu.state.code_mode != CodeMode::Bits64 || vcpu.state.cr4 & cr4::FSGSBASE == 0 {
        return fault(Fault::ud());
    }
    Ok(())
}

/// RDFSBASE and RDGSBASE.
pub(super) fn read_base<const SEGMENT: u8>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    require_fsgsbase(vcpu)?;
    let base = vcpu.state.seg_base[usize::from(SEGMENT)];
    operand::write_register(vcpu, i, i.dst, base);
    Ok(())
}

/// WRFSBASE and WRGSBASE.
pub(super) fn write_base<const SEGMENT: u8>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    require_fsgsbase(vcpu)?;
    let base = if operand::size(i) == 8 { vcpu.reg(i.dst) } else { u64::from(vcpu.get::<u32>(i.dst)) };
    if !vcpu.walk.canonical(Gva(base)) {
        return fault(Fault::gp(0));
    }
    vcpu.state.seg_base[usize::from(SEGMENT)] = base;
    Ok(())
}

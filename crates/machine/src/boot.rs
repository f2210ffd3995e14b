//! Writes a loader's [`BootState`] into a processor.

use cpu::Vcpu;
use cpu::state::{Segment, SystemSegment, TableRegister, reg, seg};

use crate::loader::{BootGdt, BootSegment, BootState};

/// Gives the bootstrap processor the state that the boot protocol promises.
pub(crate) fn apply(vcpu: &mut Vcpu, boot: &BootState) {
    let state = &mut vcpu.state;
    match boot {
        BootState::Long64(long) => {
            state.set_rip(long.rip);
            state.regs[usize::from(reg::RSI)] = long.rsi;
            state.regs[usize::from(reg::RSP)] = long.rsp;
            state.regs[usize::from(reg::RDX)] = 0;
            state.flags.set_bits(long.rflags);
            state.cr0 = long.cr0;
            state.cr3 = long.cr3;
            state.cr4 = long.cr4;
            state.efer = long.efer;
            segments(state, long.gdt, long.cs, long.data, long.tr);
        }
        BootState::Pvh(pvh) => {
            state.set_rip(pvh.eip.into());
            state.regs[usize::from(reg::RBX)] = pvh.ebx.into();
            state.regs[usize::from(reg::RDX)] = 0;
            state.flags.set_bits(pvh.eflags.into());
            state.cr0 = pvh.cr0.into();
            state.cr4 = pvh.cr4.into();
            segments(state, pvh.gdt, pvh.cs, pvh.data, pvh.tr);
        }
    }
    vcpu.refresh();
}

fn segments(state: &mut cpu::CpuState, gdt: BootGdt, cs: BootSegment, data: BootSegment, tr: BootSegment) {
    state.gdtr = TableRegister { base: gdt.base, limit: gdt.limit };
    state.idtr = TableRegister { base: 0, limit: 0 };
    state.ldtr = SystemSegment::default();
    let (segment, base) = hidden(tr);
    state.tr = SystemSegment { segment, base };
    for number in [seg::ES, seg::CS, seg::SS, seg::DS, seg::FS, seg::GS] {
        let (segment, base) = hidden(if number == seg::CS { cs } else { data });
        state.segments[usize::from(number)] = segment;
        state.seg_base[usize::from(number)] = base;
    }
}

/// The hidden part of a segment register, from its descriptor (Intel SDM vol. 3, 3.4.5).
fn hidden(from: BootSegment) -> (Segment, u64) {
    let d = from.descriptor;
    let attributes = (d >> 32) as u32 & 0x00f0_ff00;
    let limit = (d & 0xffff | d >> 32 & 0xf_0000) as u32;
    let limit = if attributes & Segment::GRANULARITY != 0 { limit << 12 | 0xfff } else { limit };
    let base = d >> 16 & 0xff_ffff | d >> 32 & 0xff00_0000;
    (Segment { selector: from.selector, limit, attributes }, base)
}

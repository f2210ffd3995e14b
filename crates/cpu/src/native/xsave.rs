//! FXSAVE, FXRSTOR and the XSAVE family (Intel SDM vol. 1, chapters 10.5 and 13).

use iced_x86::{Instruction, Mnemonic};

use super::moves::accessible;
use super::run::refused;
use crate::fault::{Exec, Fault, fault, vector};
use crate::fpu::{Fpu, MXCSR_DEFAULT, MXCSR_MASK, component, layout, ok};
use crate::insn::{Handler, Insn};
use crate::state::{cr0, cr4, reg};
use crate::vcpu::Vcpu;

/// Chooses the handler of an instruction that saves or restores the whole state. `WIDE`: with REX.W, which
/// makes the x87 pointers 64 bits wide.
pub(super) fn select(i: &Instruction) -> Option<Handler> {
    use Mnemonic as M;
    Some(match i.mnemonic() {
        M::Fxsave => fxsave::<false>,
        M::Fxsave64 => fxsave::<true>,
        M::Fxrstor => fxrstor::<false>,
        M::Fxrstor64 => fxrstor::<true>,
        M::Xsave => save::<PLAIN, false>,
        M::Xsave64 => save::<PLAIN, true>,
        M::Xsaveopt => save::<OPTIMIZED, false>,
        M::Xsaveopt64 => save::<OPTIMIZED, true>,
        M::Xsavec => save::<COMPACT, false>,
        M::Xsavec64 => save::<COMPACT, true>,
        M::Xsaves => save::<SUPERVISOR, false>,
        M::Xsaves64 => save::<SUPERVISOR, true>,
        M::Xrstor => restore::<false, false>,
        M::Xrstor64 => restore::<false, true>,
        M::Xrstors => restore::<true, false>,
        M::Xrstors64 => restore::<true, true>,
        _ => return None,
    })
}

/// XSAVE.
const PLAIN: u8 = 0;
/// XSAVEOPT: leaves out components in their initial state.
const OPTIMIZED: u8 = 1;
/// XSAVEC: that, in the compacted format.
const COMPACT: u8 = 2;
/// XSAVES: that, for CPL 0. (IA32_XSS has no bits here.)
const SUPERVISOR: u8 = 3;

/// Bit 63 of XCOMP_BV: the area is in the compacted format.
const COMPACTED: u64 = 1 << 63;

const HEADER: usize = 512;
const EXTENDED: usize = layout::EXTENDED;
/// The end of the largest area.
const END: usize = layout::PKRU + layout::PKRU_SIZE;

// ---- the legacy region ----

/// Where parts of the legacy region lie.
mod at {
    use std::ops::Range;
    pub(super) const X87: Range<usize> = 0..24;
    pub(super) const MXCSR: Range<usize> = 24..28;
    pub(super) const MXCSR_AND_MASK: Range<usize> = 24..32;
    pub(super) const ST: Range<usize> = 32..160;
    pub(super) const XMM: usize = 160;
}

/// Lays out the x87 part.
fn put_x87<const WIDE: bool>(fpu: &Fpu, area: &mut [u8; END]) {
    area[..2].copy_from_slice(&fpu.fcw().to_le_bytes());
    area[2..4].copy_from_slice(&fpu.fsw().to_le_bytes());
    area[4] = fpu.tags();
    area[5] = 0;
    area[6..8].copy_from_slice(&(fpu.fop & 0x7ff).to_le_bytes());
    // Without REX.W the upper halves hold selectors, which are zero.
    let pointer = |p: u64| if WIDE { p } else { p & 0xffff_ffff };
    area[8..16].copy_from_slice(&pointer(fpu.fip).to_le_bytes());
    area[16..24].copy_from_slice(&pointer(fpu.fdp).to_le_bytes());
    area[at::ST].copy_from_slice(&fpu.legacy[at::ST]);
}

fn take_x87<const WIDE: bool>(fpu: &mut Fpu, area: &[u8; END]) {
    let word = |n: usize| u16::from_le_bytes([area[n], area[n + 1]]);
    let pointer = |n: usize| {
        let mut bytes = [0; 8];
        let size = if WIDE { 8 } else { 4 };
        bytes[..size].copy_from_slice(&area[n..n + size]);
        u64::from_le_bytes(bytes)
    };
    fpu.set_fcw(word(0));
    fpu.set_fsw(word(2));
    fpu.set_tags(area[4]);
    fpu.update_summary();
    (fpu.fop, fpu.fip, fpu.fdp) = (word(6) & 0x7ff, pointer(8), pointer(16));
    for n in 0..8 {
        let mut value = [0; 10];
        value.copy_from_slice(&area[32 + n * 16..42 + n * 16]);
        fpu.set_st(n, value);
    }
}

fn put_mxcsr(fpu: &Fpu, area: &mut [u8; END]) {
    area[24..28].copy_from_slice(&fpu.mxcsr.to_le_bytes());
    area[28..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
}

/// MXCSR in `area`.
///
/// # Errors
/// #GP(0) if it has reserved bits.
fn mxcsr_of(area: &[u8; END]) -> Exec<u32> {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&area[at::MXCSR]);
    let value = u32::from_le_bytes(bytes);
    if value & !MXCSR_MASK != 0 { fault(Fault::gp(0)) } else { Ok(value) }
}

/// Copies the first `count` halves of the vector registers (low ones at offset 0, upper ones at 16) out.
fn put_halves(fpu: &Fpu, half: usize, count: usize, to: &mut [u8]) {
    for (to, register) in to.as_chunks_mut::<16>().0.iter_mut().zip(&fpu.ymm).take(count) {
        to.copy_from_slice(&register[half..half + 16]);
    }
}

fn take_halves(fpu: &mut Fpu, half: usize, count: usize, from: &[u8]) {
    for (from, register) in from.as_chunks::<16>().0.iter().zip(&mut fpu.ymm).take(count) {
        register[half..half + 16].copy_from_slice(from);
    }
}

fn clear_halves(fpu: &mut Fpu, half: usize, count: usize) {
    for register in fpu.ymm.iter_mut().take(count) {
        register[half..half + 16].fill(0);
    }
}

/// The linear address of an area of `size` bytes.
///
/// # Errors
/// #GP(0) if it is not aligned to `align`.
fn area_address(vcpu: &Vcpu, i: &Insn, size: usize, align: u64, write: bool) -> Exec<u64> {
    let gva = vcpu.linear(i, size as u64, write)?;
    if gva & (align - 1) != 0 {
        return fault(Fault::gp(0));
    }
    Ok(gva)
}

fn fxsave<const WIDE: bool>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    if vcpu.state.fpu_ok & ok::X87 == 0 {
        return refused(vcpu, ok::X87);
    }
    vcpu.sync_mxcsr();
    let gva = area_address(vcpu, i, 512, 16, true)?;
    let mut area = [0; END];
    let count = accessible(vcpu);
    put_x87::<WIDE>(&vcpu.state.fpu, &mut area);
    put_mxcsr(&vcpu.state.fpu, &mut area);
    put_halves(&vcpu.state.fpu, 0, count, &mut area[at::XMM..at::XMM + 256]);
    vcpu.write_bytes(gva, &area[..at::XMM + count * 16])
}

fn fxrstor<const WIDE: bool>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    if vcpu.state.fpu_ok & ok::X87 == 0 {
        return refused(vcpu, ok::X87);
    }
    let gva = area_address(vcpu, i, 512, 16, false)?;
    let mut area = [0; END];
    vcpu.read_bytes(gva, &mut area[..512])?;
    let mxcsr = mxcsr_of(&area)?;
    let count = accessible(vcpu);
    take_x87::<WIDE>(&mut vcpu.state.fpu, &area);
    take_halves(&mut vcpu.state.fpu, 0, count, &area[at::XMM..at::XMM + 256]);
    vcpu.set_mxcsr(mxcsr);
    Ok(())
}

// ---- XSAVE ----

/// Checks that the XSAVE family may execute.
fn check(vcpu: &Vcpu, supervisor: bool) -> Exec {
    let state = &vcpu.state;
    if state.cr4 & cr4::OSXSAVE == 0 {
        return fault(Fault::ud());
    }
    if state.cr0 & cr0::TS != 0 {
        return fault(Fault::new(vector::NM));
    }
    if supervisor && state.cpl != 0 {
        return fault(Fault::gp(0));
    }
    Ok(())
}

/// The requested-feature bitmap: EDX:EAX and XCR0.
fn requested(vcpu: &Vcpu) -> u64 {
    let mask = u64::from(vcpu.get::<u32>(reg::RAX)) | u64::from(vcpu.get::<u32>(reg::RDX)) << 32;
    mask & vcpu.state.xcr0 & component::ALL
}

/// Where AVX and PKRU state lie in an area: at fixed places, or packed if `compacted` (then only those in
/// `components`).
fn places(compacted: bool, components: u64) -> (usize, usize) {
    if !compacted {
        return (layout::AVX, layout::PKRU);
    }
    let pkru = if components & component::AVX != 0 { EXTENDED + layout::AVX_SIZE } else { EXTENDED };
    (EXTENDED, pkru)
}

fn save<const FORM: u8, const WIDE: bool>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let compacted = FORM == COMPACT || FORM == SUPERVISOR;
    check(vcpu, FORM == SUPERVISOR)?;
    vcpu.sync_mxcsr();
    let requested = requested(vcpu);
    let mut in_use = vcpu.xinuse();
    if compacted && vcpu.state.fpu.mxcsr != MXCSR_DEFAULT {
        in_use |= component::SSE;
    }
    let saved = if FORM == PLAIN { requested } else { requested & in_use };
    let has = |bit: u64| saved & bit != 0;
    let (avx, pkru) = places(compacted, requested);
    let end = match requested {
        r if r & component::PKRU != 0 => pkru + layout::PKRU_SIZE,
        r if r & component::AVX != 0 => avx + layout::AVX_SIZE,
        _ => EXTENDED,
    };
    let gva = area_address(vcpu, i, end, 64, true)?;
    vcpu.probe_write(gva, end as u64)?;
    let count = accessible(vcpu);
    let mut header = [0; 16];
    vcpu.read_bytes(gva.wrapping_add(HEADER as u64), &mut header[..8])?;
    let mut old = [0; 8];
    old.copy_from_slice(&header[..8]);
    let bitmap = if compacted {
        header[8..].copy_from_slice(&(requested | COMPACTED).to_le_bytes());
        saved
    } else {
        u64::from_le_bytes(old) & !requested | requested & in_use
    };
    header[..8].copy_from_slice(&bitmap.to_le_bytes());

    // Parts that are not saved keep their bytes, so each part is written on its own.
    let mut area = [0; END];
    let mut parts: [Option<std::ops::Range<usize>>; 7] = Default::default();
    let fpu = &vcpu.state.fpu;
    if has(component::X87) {
        put_x87::<WIDE>(fpu, &mut area);
        parts[0] = Some(at::X87);
        parts[1] = Some(at::ST);
    }
    if if compacted { has(component::SSE) } else { requested & (component::SSE | component::AVX) != 0 } {
        put_mxcsr(fpu, &mut area);
        parts[2] = Some(at::MXCSR_AND_MASK);
    }
    if has(component::SSE) {
        put_halves(fpu, 0, count, &mut area[at::XMM..at::XMM + 256]);
        parts[3] = Some(at::XMM..at::XMM + count * 16);
    }
    if has(component::AVX) {
        put_halves(fpu, 16, count, &mut area[avx..avx + layout::AVX_SIZE]);
        parts[4] = Some(avx..avx + count * 16);
    }
    if has(component::PKRU) {
        area[pkru..pkru + 4].copy_from_slice(&vcpu.state.pkru.to_le_bytes());
        parts[5] = Some(pkru..pkru + layout::PKRU_SIZE);
    }
    area[HEADER..HEADER + 16].copy_from_slice(&header);
    parts[6] = Some(HEADER..HEADER + if compacted { 16 } else { 8 });
    for part in parts.into_iter().flatten() {
        vcpu.write_bytes(gva.wrapping_add(part.start as u64), &area[part])?;
    }
    Ok(())
}

fn restore<const SUPERVISOR: bool, const WIDE: bool>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    check(vcpu, SUPERVISOR)?;
    let requested = requested(vcpu);
    let gva = area_address(vcpu, i, EXTENDED, 64, false)?;
    let mut area = [0; END];
    vcpu.read_bytes(gva, &mut area[..EXTENDED])?;
    let word = |n: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&area[HEADER + n * 8..HEADER + (n + 1) * 8]);
        u64::from_le_bytes(bytes)
    };
    let (present, format) = (word(0), word(1));
    let compacted = format & COMPACTED != 0;
    let components = format & !COMPACTED;
    let bad = if compacted {
        components & !vcpu.state.xcr0 != 0 || present & !components != 0 || (2..8).any(|n| word(n) != 0)
    } else {
        SUPERVISOR || format != 0 || present & !vcpu.state.xcr0 != 0 || word(2) != 0
    };
    if bad {
        return fault(Fault::gp(0));
    }
    let load = requested & present;
    let clear = requested & !present;
    let mxcsr = if compacted {
        match () {
            () if load & component::SSE != 0 => Some(mxcsr_of(&area)?),
            () if clear & component::SSE != 0 => Some(MXCSR_DEFAULT),
            () => None,
        }
    } else if requested & (component::SSE | component::AVX) != 0 {
        Some(mxcsr_of(&area)?)
    } else {
        None
    };
    let (avx, pkru) = places(compacted, components);
    for (bit, start, size) in
        [(component::AVX, avx, layout::AVX_SIZE), (component::PKRU, pkru, layout::PKRU_SIZE)]
    {
        if load & bit != 0 {
            vcpu.read_bytes(gva.wrapping_add(start as u64), &mut area[start..start + size])?;
        }
    }

    // Nothing can fail from here on.
    vcpu.sync_mxcsr();
    let count = accessible(vcpu);
    let fpu = &mut vcpu.state.fpu;
    if load & component::X87 != 0 {
        take_x87::<WIDE>(fpu, &area);
    } else if clear & component::X87 != 0 {
        fpu.init_x87();
        (0..8).for_each(|n| fpu.set_st(n, [0; 10]));
    }
    for (bit, half, start) in [(component::SSE, 0, at::XMM), (component::AVX, 16, avx)] {
        if load & bit != 0 {
            take_halves(fpu, half, count, &area[start..start + 256]);
        } else if clear & bit != 0 {
            clear_halves(fpu, half, count);
        }
    }
    if let Some(mxcsr) = mxcsr {
        vcpu.set_mxcsr(mxcsr);
    }
    if requested & component::PKRU != 0 {
        let mut bytes = [0; 4];
        if load & component::PKRU != 0 {
            bytes.copy_from_slice(&area[pkru..pkru + 4]);
        }
        vcpu.load_pkru(u32::from_le_bytes(bytes));
    }
    Ok(())
}

impl Vcpu {
    /// XINUSE: which state components are not in their initial state (what XGETBV of 1 gives, with XCR0).
    pub fn xinuse(&self) -> u64 {
        let pkru = if self.state.pkru != 0 { component::PKRU } else { 0 };
        self.state.fpu.in_use() | pkru
    }
}

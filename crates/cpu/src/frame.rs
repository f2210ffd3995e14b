//! Stacks that events, call gates and task switches push to: the present one, or one from the TSS.
//!
//! A [`Frame`] collects pushes with the checks of the stack's own segment and privilege; the stack pointer
//! register and SS change only when the caller, past its last fault, installs it.

use mmu::{Gva, Privilege};

use crate::fault::{Exec, Fault, fault, vector};
use crate::segment::{is_null, rpl, selector_code};
use crate::state::{Segment, reg, seg};
use crate::vcpu::Vcpu;

/// A stack being pushed to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Frame {
    /// SS as it will be.
    pub(crate) segment: Segment,
    /// The base of SS, zero in 64-bit mode.
    pub(crate) base: u64,
    /// The stack pointer.
    pub(crate) pointer: u64,
    /// Its width.
    mask: u64,
    privilege: Privilege,
    /// Error code of #SS.
    code: u32,
}

/// The privilege of explicit accesses at `cpl`.
pub(crate) fn privilege_at(cpl: u8) -> Privilege {
    if cpl == 3 { Privilege::User } else { Privilege::Supervisor }
}

impl Frame {
    /// The present stack, with `code` as error code of #SS.
    pub(crate) fn current(vcpu: &Vcpu, code: u32) -> Self {
        Self {
            segment: vcpu.state.segments[usize::from(seg::SS)],
            base: vcpu.state.seg_base[usize::from(seg::SS)],
            pointer: vcpu.stack_pointer(),
            mask: vcpu.state.stack_mask,
            privilege: vcpu.privilege(),
            code,
        }
    }

    /// A 64-bit stack at `pointer` for code at `cpl`, with `code` as error code of #SS.
    pub(crate) fn long(pointer: u64, cpl: u8, code: u32) -> Self {
        Self {
            // The null selector with the new CPL.
            segment: Segment { selector: u16::from(cpl), limit: 0, attributes: 0 },
            base: 0,
            pointer,
            mask: u64::MAX,
            privilege: privilege_at(cpl),
            code,
        }
    }

    /// Pushes the low `size` bytes (2, 4 or 8) of `value`.
    ///
    /// # Errors
    /// #SS, #PF.
    pub(crate) fn push(&mut self, vcpu: &mut Vcpu, size: u64, value: u64) -> Exec {
        let pointer = self.pointer.wrapping_sub(size) & self.mask;
        let address = if self.mask == u64::MAX {
            if !vcpu.walk.canonical(Gva(pointer)) {
                return fault(Fault::with_code(vector::SS, self.code));
            }
            pointer
        } else {
            if !self.segment.contains(pointer, size) {
                return fault(Fault::with_code(vector::SS, self.code));
            }
            self.base.wrapping_add(pointer) & 0xffff_ffff
        };
        match size {
            2 => vcpu.write_as(address, value as u16, self.privilege)?,
            4 => vcpu.write_as(address, value as u32, self.privilege)?,
            _ => vcpu.write_as(address, value, self.privilege)?,
        }
        self.pointer = pointer;
        Ok(())
    }

    /// Makes this the present stack: only the pointer.
    pub(crate) fn install_pointer(&self, vcpu: &mut Vcpu) {
        let keep = if self.mask == 0xffff { vcpu.reg(reg::RSP) & !0xffff } else { 0 };
        vcpu.set_reg(reg::RSP, keep | self.pointer);
    }

    /// Makes this the present stack: SS and the pointer. The caller calls [`Vcpu::refresh_mode`].
    pub(crate) fn install(&self, vcpu: &mut Vcpu) {
        vcpu.state.segments[usize::from(seg::SS)] = self.segment;
        vcpu.state.seg_base[usize::from(seg::SS)] = self.base;
        self.install_pointer(vcpu);
    }
}

impl Vcpu {
    /// Whether the TSS in TR is a 32-bit (or 64-bit) one.
    pub(crate) fn tss_is_wide(&self) -> bool {
        self.state.tr.segment.attributes >> 8 & 8 != 0
    }

    /// The stack for code at privilege level `cpl` from a 16- or 32-bit TSS.
    ///
    /// # Errors
    /// #TS, #SS with `ext` in the error code; #PF.
    pub(crate) fn inner_stack(&mut self, cpl: u8, ext: u32) -> Exec<Frame> {
        let wide = self.tss_is_wide();
        let tr = self.state.tr;
        let level = u64::from(cpl);
        let (offset, size) = if wide { (4 + level * 8, 6) } else { (2 + level * 4, 4) };
        if offset + size - 1 > u64::from(tr.segment.limit) {
            return fault(Fault::with_code(vector::TS, selector_code(tr.segment.selector) | ext));
        }
        let address = self.table_address(tr.base, offset);
        let (pointer, selector) = if wide {
            let pointer = u64::from(self.read_as::<u32>(address, Privilege::Implicit)?);
            (pointer, self.read_as::<u16>(self.table_address(address, 4), Privilege::Implicit)?)
        } else {
            let pointer = u64::from(self.read_as::<u16>(address, Privilege::Implicit)?);
            (pointer, self.read_as::<u16>(self.table_address(address, 2), Privilege::Implicit)?)
        };
        if is_null(selector) {
            return fault(Fault::with_code(vector::TS, ext));
        }
        let code = selector_code(selector) | ext;
        let d = self.read_descriptor(selector, vector::TS, ext)?;
        if rpl(selector) != cpl || d.dpl() != cpl || !d.is_writable_data() {
            return fault(Fault::with_code(vector::TS, code));
        }
        if !d.present() {
            return fault(Fault::with_code(vector::SS, code));
        }
        self.mark_accessed(selector, d)?;
        let mask = if d.has(Segment::DEFAULT_BIG) { 0xffff_ffff } else { 0xffff };
        Ok(Frame {
            segment: d.segment(selector),
            base: d.base(),
            pointer: pointer & mask,
            mask,
            privilege: privilege_at(cpl),
            code,
        })
    }

    /// The 64-bit stack pointer at byte `offset` of the 64-bit TSS.
    ///
    /// # Errors
    /// #TS with `ext` in the error code; #PF.
    pub(crate) fn long_stack_pointer(&mut self, offset: u64, ext: u32) -> Exec<u64> {
        let tr = self.state.tr;
        if offset + 7 > u64::from(tr.segment.limit) {
            return fault(Fault::with_code(vector::TS, selector_code(tr.segment.selector) | ext));
        }
        self.read_as(tr.base.wrapping_add(offset), Privilege::Implicit)
    }
}

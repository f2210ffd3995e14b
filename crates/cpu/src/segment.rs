//! Segment descriptors: reading, checking and loading them.
//!
//! # Theory of operation
//! A segment register is its visible selector and a hidden copy of its descriptor ([`Segment`], with the base
//! apart in `CpuState::seg_base`). Whoever loads one reads the descriptor, makes all the checks that the
//! instruction calls for, sets the accessed bit in the table, and only then changes the register. Reading and
//! checking are here; which checks with which exception an instruction or event makes is up to it.
//!
//! Descriptor tables are read as implicit supervisor accesses, whatever the CPL.

use mmu::{Gva, Privilege};

use crate::fault::{Exec, Fault, fault, vector};
use crate::flags;
use crate::state::{CodeMode, Segment, seg};
use crate::vcpu::Vcpu;

/// The part of a selector that error codes carry: index and table.
#[inline]
pub(crate) const fn selector_code(selector: u16) -> u32 {
    selector as u32 & 0xfffc
}

/// Whether `selector` is a null selector (any RPL).
#[inline]
pub(crate) const fn is_null(selector: u16) -> bool {
    selector & 0xfffc == 0
}

/// The requested privilege level of `selector`.
#[inline]
pub(crate) const fn rpl(selector: u16) -> u8 {
    (selector & 3) as u8
}

/// Types of system descriptors (Intel SDM vol. 3, table 3-2); 32-bit ones are the 64-bit ones of long mode.
pub(crate) mod system_type {
    pub(crate) const TSS16: u32 = 1;
    pub(crate) const LDT: u32 = 2;
    pub(crate) const TSS16_BUSY: u32 = 3;
    pub(crate) const CALL_GATE16: u32 = 4;
    pub(crate) const TASK_GATE: u32 = 5;
    pub(crate) const INTERRUPT_GATE16: u32 = 6;
    pub(crate) const TRAP_GATE16: u32 = 7;
    pub(crate) const TSS: u32 = 9;
    pub(crate) const TSS_BUSY: u32 = 11;
    pub(crate) const CALL_GATE: u32 = 12;
    pub(crate) const INTERRUPT_GATE: u32 = 14;
    pub(crate) const TRAP_GATE: u32 = 15;
}

/// The eight bytes of a segment or gate descriptor (Intel SDM vol. 3, 3.4.5 and 5.8.3).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Descriptor(pub(crate) u64);

impl Descriptor {
    const fn high(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// Base address of a segment, 32 bits.
    pub(crate) const fn base(self) -> u64 {
        self.0 >> 16 & 0xff_ffff | self.0 >> 32 & 0xff00_0000
    }

    /// Limit of a segment in bytes.
    pub(crate) const fn limit(self) -> u32 {
        let limit = (self.0 & 0xffff) as u32 | self.high() & 0xf_0000;
        if self.high() & Segment::GRANULARITY != 0 { limit << 12 | 0xfff } else { limit }
    }

    /// The attributes as [`Segment`] keeps them.
    pub(crate) const fn attributes(self) -> u32 {
        self.high() & 0x00f0_ff00
    }

    /// The type field: four bits.
    pub(crate) const fn kind(self) -> u32 {
        self.high() >> 8 & 15
    }

    pub(crate) const fn has(self, attribute: u32) -> bool {
        self.high() & attribute != 0
    }

    pub(crate) const fn dpl(self) -> u8 {
        (self.high() >> 13 & 3) as u8
    }

    pub(crate) const fn present(self) -> bool {
        self.has(Segment::PRESENT)
    }

    /// A system segment or gate.
    pub(crate) const fn is_system(self) -> bool {
        !self.has(Segment::NON_SYSTEM)
    }

    pub(crate) const fn is_code(self) -> bool {
        self.has(Segment::NON_SYSTEM) && self.has(Segment::CODE)
    }

    /// Conforming code (only meaningful for code).
    pub(crate) const fn is_conforming(self) -> bool {
        self.has(Segment::EXPAND_DOWN)
    }

    pub(crate) const fn is_writable_data(self) -> bool {
        self.has(Segment::NON_SYSTEM) && !self.has(Segment::CODE) && self.has(Segment::WRITABLE)
    }

    /// Data, or readable code.
    pub(crate) const fn is_readable(self) -> bool {
        self.has(Segment::NON_SYSTEM) && (!self.has(Segment::CODE) || self.has(Segment::WRITABLE))
    }

    /// Target selector of a gate.
    pub(crate) const fn gate_selector(self) -> u16 {
        (self.0 >> 16) as u16
    }

    /// Target offset of a gate, 32 bits.
    pub(crate) const fn gate_offset(self) -> u64 {
        self.0 & 0xffff | self.0 >> 32 & 0xffff_0000
    }

    /// The segment as a register holds it, with its accessed bit set.
    pub(crate) const fn segment(self, selector: u16) -> Segment {
        let accessed = if self.is_system() { 0 } else { Segment::ACCESSED };
        Segment { selector, limit: self.limit(), attributes: self.attributes() | accessed }
    }
}

impl Segment {
    /// Whether `size` bytes at `offset` are inside the limit.
    pub(crate) fn contains(&self, offset: u64, size: u64) -> bool {
        let last = offset.wrapping_add(size.saturating_sub(1));
        if self.has(Self::EXPAND_DOWN) && !self.has(Self::CODE) {
            let top = if self.has(Self::DEFAULT_BIG) { 0xffff_ffff } else { 0xffff };
            offset > u64::from(self.limit) && last <= top
        } else {
            offset <= last && last <= u64::from(self.limit)
        }
    }
}

impl Vcpu {
    /// Sets segment register `register` ([`seg`]) with its hidden part, without any check, as boot code, state
    /// restore and debuggers want it. The CPL is [`crate::CpuState::cpl`]; it is the caller's to keep SS and CS
    /// in accord with it.
    pub fn set_segment(&mut self, register: u8, segment: Segment, base: u64) {
        if let Some(s) = self.state.segments.get_mut(usize::from(register)) {
            *s = segment;
            self.state.seg_base[usize::from(register)] = base;
            self.refresh_mode();
        }
    }

    /// Segment register `register` ([`seg`]) as real mode (or, with DPL 3, virtual-8086 mode) loads it.
    pub(crate) fn load_real_segment(&mut self, register: u8, selector: u16) {
        let virtual_8086 = self.state.protected();
        if let Some(s) = self.state.segments.get_mut(usize::from(register)) {
            s.selector = selector;
            if virtual_8086 {
                *s = virtual_8086_segment(selector);
            }
            self.state.seg_base[usize::from(register)] = u64::from(selector) << 4;
        }
    }

    /// An address inside a table of the processor: 32 bits wide outside long mode.
    #[inline]
    pub(crate) fn table_address(&self, base: u64, offset: u64) -> u64 {
        let address = base.wrapping_add(offset);
        if self.state.long_mode() { address } else { address & 0xffff_ffff }
    }

    /// Where the descriptor of `selector` is, if `size` bytes there are inside its table.
    pub(crate) fn descriptor_address(&self, selector: u16, size: u64) -> Option<u64> {
        let offset = u64::from(selector & 0xfff8);
        let (base, limit) = if selector & 4 == 0 {
            (self.state.gdtr.base, u64::from(self.state.gdtr.limit))
        } else {
            let ldt = &self.state.ldtr;
            if !ldt.segment.has(Segment::PRESENT) || is_null(ldt.segment.selector) {
                return None;
            }
            (ldt.base, u64::from(ldt.segment.limit))
        };
        (offset + size - 1 <= limit).then(|| self.table_address(base, offset))
    }

    /// Reads the descriptor of `selector`, which the caller knows not to be null.
    ///
    /// # Errors
    /// The exception `vector` with the selector and `ext` as error code if it lies outside its table; #PF.
    pub(crate) fn read_descriptor(&mut self, selector: u16, vector: u8, ext: u32) -> Exec<Descriptor> {
        if self.state.deprivileged {
            return match self.pvm_descriptor(selector) {
                Some(descriptor) => Ok(descriptor),
                None => fault(Fault::with_code(vector, selector_code(selector) | ext)),
            };
        }
        match self.descriptor_address(selector, 8) {
            Some(address) => Ok(Descriptor(self.read_as(address, Privilege::Implicit)?)),
            None => fault(Fault::with_code(vector, selector_code(selector) | ext)),
        }
    }

    /// Reads a system descriptor, which has 16 bytes in long mode; the second value is its upper half.
    ///
    /// # Errors
    /// #GP with the selector as error code if it lies outside the table; #PF.
    pub(crate) fn read_system_descriptor(&mut self, selector: u16) -> Exec<(Descriptor, u64)> {
        let long = self.state.long_mode();
        match self.descriptor_address(selector, if long { 16 } else { 8 }) {
            None => fault(Fault::gp(selector_code(selector))),
            Some(address) => {
                let low = Descriptor(self.read_as(address, Privilege::Implicit)?);
                let upper_address = self.table_address(address, 8);
                let high = if long { self.read_as(upper_address, Privilege::Implicit)? } else { 0 };
                Ok((low, high))
            }
        }
    }

    /// Sets the accessed bit of a code or data segment in its table.
    ///
    /// # Errors
    /// #PF.
    pub(crate) fn mark_accessed(&mut self, selector: u16, descriptor: Descriptor) -> Exec {
        if !descriptor.is_system()
            && !descriptor.has(Segment::ACCESSED)
            && !self.state.deprivileged
            && let Some(address) = self.descriptor_address(selector, 8)
        {
            // One byte, so that a change to the rest of the descriptor meanwhile is not undone.
            let kind = self.table_address(address, 5);
            self.modify_as::<u8>(kind, Privilege::Implicit, |b| b | 1)?;
        }
        Ok(())
    }

    /// What loading `selector` into `register` (not CS) as MOV does would put there: all checks, and the
    /// accessed bit, but no change of the register.
    ///
    /// # Errors
    /// #GP, #NP, #SS, #PF.
    pub(crate) fn check_segment_load(&mut self, register: u8, selector: u16) -> Exec<(Segment, u64)> {
        let state = &self.state;
        if !state.protected() {
            let old = state.segments[usize::from(register)];
            return Ok((Segment { selector, ..old }, u64::from(selector) << 4));
        }
        if state.virtual_8086() {
            return Ok((virtual_8086_segment(selector), u64::from(selector) << 4));
        }
        if let Some(emulated) = self.pvm_supervisor_load(register, selector) {
            return Ok(emulated);
        }
        let state = &self.state;
        let cpl = self.segment_cpl();
        let code = selector_code(selector);
        if is_null(selector) {
            let allowed = state.code_mode == CodeMode::Bits64 && cpl < 3 && rpl(selector) == cpl;
            if register == seg::SS && !allowed {
                return fault(Fault::gp(0));
            }
            return Ok((Segment { selector, limit: 0, attributes: 0 }, 0));
        }
        let d = self.read_descriptor(selector, vector::GP, 0)?;
        if register == seg::SS {
            if rpl(selector) != cpl || !d.is_writable_data() || d.dpl() != cpl {
                return fault(Fault::gp(code));
            }
            if !d.present() {
                return fault(Fault::with_code(vector::SS, code));
            }
        } else {
            let any_level = d.is_code() && d.is_conforming();
            if !d.is_readable() || (!any_level && d.dpl() < cpl.max(rpl(selector))) {
                return fault(Fault::gp(code));
            }
            if !d.present() {
                return fault(Fault::with_code(vector::NP, code));
            }
        }
        self.mark_accessed(selector, d)?;
        Ok((d.segment(selector), d.base()))
    }

    /// Puts what [`Self::check_segment_load`] returned into `register`.
    pub(crate) fn put_segment(&mut self, register: u8, (segment, base): (Segment, u64)) {
        self.state.segments[usize::from(register)] = segment;
        self.state.seg_base[usize::from(register)] = base;
        if register == seg::SS {
            self.refresh_mode();
        }
    }

    /// Puts a code segment into CS and sets the CPL; the selector's RPL becomes the CPL. The caller calls
    /// [`Vcpu::refresh_mode`] when SS is as it will be.
    pub(crate) fn put_code_segment(&mut self, mut segment: Segment, base: u64, cpl: u8) {
        segment.selector = segment.selector & !3 | u16::from(cpl);
        self.state.segments[usize::from(seg::CS)] = segment;
        self.state.seg_base[usize::from(seg::CS)] = base;
        if !self.state.deprivileged {
            // In PVM mode only events and returns change the mode.
            self.state.cpl = cpl;
        }
    }

    /// Whether `rip` may be jumped to in the code segment `segment`.
    ///
    /// # Errors
    /// #GP with error code `ext` if not canonical (64-bit code), or beyond the limit.
    pub(crate) fn check_code_offset(&self, segment: &Segment, rip: u64, ext: u32) -> Exec {
        let good = if self.state.long_mode() && segment.has(Segment::LONG) {
            self.walk.canonical(Gva(rip))
        } else {
            rip & 0xffff_ffff <= u64::from(segment.limit)
        };
        if good { Ok(()) } else { fault(Fault::gp(ext)) }
    }

    /// Whether `d` is a code segment that long mode cannot run: both L and D set.
    pub(crate) fn is_reserved_code(&self, d: Descriptor) -> bool {
        self.state.long_mode() && d.has(Segment::LONG) && d.has(Segment::DEFAULT_BIG)
    }

    /// Makes ES, DS, FS and GS null where the CPL, just raised, may not use them any more.
    pub(crate) fn null_privileged_segments(&mut self) {
        for register in [seg::ES, seg::DS, seg::FS, seg::GS] {
            let s = &mut self.state.segments[usize::from(register)];
            let conforming = s.has(Segment::CODE) && s.has(Segment::EXPAND_DOWN);
            // A null FS or GS keeps its base, which 64-bit code set by other means.
            if s.attributes != 0 && !conforming && s.dpl() < self.state.cpl {
                *s = Segment::default();
            }
        }
    }

    /// The I/O privilege level.
    pub(crate) fn iopl(&self) -> u8 {
        ((self.state.flags.system() & flags::IOPL) >> 12) as u8
    }
}

/// A segment of virtual-8086 mode: 64 KiB of writable data at privilege level 3.
pub(crate) const fn virtual_8086_segment(selector: u16) -> Segment {
    Segment { selector, limit: 0xffff, attributes: 0xf300 }
}

//! x87, MMX, SSE and AVX state.

use crate::state::{CpuState, cr0, cr4};

/// MXCSR after reset: all exceptions masked, round to nearest.
pub const MXCSR_DEFAULT: u32 = 0x1f80;
/// The MXCSR bits that exist; the others are reserved (Intel SDM vol. 1, 10.2.3).
pub const MXCSR_MASK: u32 = 0xffff;
/// The exception flags of MXCSR.
pub(crate) const MXCSR_FLAGS: u32 = 0x3f;

/// State components by their bit in XCR0 and XSTATE_BV (Intel SDM vol. 1, 13.1).
pub mod component {
    /// x87 (and MMX).
    pub const X87: u64 = 1 << 0;
    /// XMM registers and MXCSR.
    pub const SSE: u64 = 1 << 1;
    /// Upper halves of the YMM registers.
    pub const AVX: u64 = 1 << 2;
    /// PKRU.
    pub const PKRU: u64 = 1 << 9;
    /// All that this processor can have.
    pub const ALL: u64 = X87 | SSE | AVX | PKRU;
}

/// Where state components lie in an XSAVE area of the standard format, as CPUID leaf 0DH is to say.
pub mod layout {
    /// The end of the legacy region and header.
    pub const EXTENDED: usize = 576;
    /// AVX state (component 2): offset in bytes.
    pub const AVX: usize = 576;
    /// AVX state: size in bytes.
    pub const AVX_SIZE: usize = 256;
    /// PKRU (component 9): offset in bytes.
    pub const PKRU: usize = 832;
    /// PKRU: size in bytes.
    pub const PKRU_SIZE: usize = 8;
}

/// Which instructions may execute without #UD or #NM, in [`CpuState::fpu_ok`]: bits of what an instruction
/// class needs.
pub(crate) mod ok {
    /// x87 instructions.
    pub(crate) const X87: u8 = 1 << 0;
    /// MMX instructions.
    pub(crate) const MMX: u8 = 1 << 1;
    /// SSE instructions.
    pub(crate) const SSE: u8 = 1 << 2;
    /// VEX-encoded vector instructions.
    pub(crate) const AVX: u8 = 1 << 3;
    /// WAIT.
    pub(crate) const WAIT: u8 = 1 << 4;
}

/// Working memory of native code, for memory operands.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct Scratch(pub(crate) [u8; 64]);

/// The floating-point and vector registers of a vCPU.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub struct Fpu {
    /// YMM0 to YMM15, XMM in the low half.
    pub ymm: [[u8; 32]; 16],
    /// The 64-bit FXSAVE image; only its x87 part (FCW, FSW, FTW, bytes 0 to 4, and ST0 to ST7, bytes 32
    /// to 159) means something.
    pub legacy: [u8; 512],
    /// Where native code finds memory operands and leaves results for memory.
    pub(crate) scratch: Scratch,
    /// MXCSR. While the engine runs, exception flags may still be in the host's register: see
    /// [`crate::Vcpu::sync_mxcsr`].
    pub mxcsr: u32,
    /// The arithmetic flags as native code takes them (low byte) and gives them (AX after LAHF, SETO).
    pub(crate) native_flags: u32,
    /// The address of the last x87 instruction.
    pub fip: u64,
    /// The address of the last x87 memory operand.
    pub fdp: u64,
    /// The last x87 opcode, 11 bits: what was loaded, for instructions do not set it (as on processors
    /// without the opcode compatibility mode).
    pub fop: u16,
}

impl Default for Fpu {
    fn default() -> Self {
        let mut fpu = Self {
            ymm: [[0; 32]; 16],
            legacy: [0; 512],
            scratch: Scratch([0; 64]),
            mxcsr: MXCSR_DEFAULT,
            native_flags: 0,
            fip: 0,
            fdp: 0,
            fop: 0,
        };
        fpu.init_x87();
        fpu
    }
}

impl Fpu {
    /// FNINIT: all x87 exceptions masked, extended precision, registers empty; their bits stay.
    pub fn init_x87(&mut self) {
        self.set_fcw(0x37f);
        self.set_fsw(0);
        self.set_tags(0);
        (self.fip, self.fdp, self.fop) = (0, 0, 0);
    }

    /// The x87 control word.
    pub fn fcw(&self) -> u16 {
        u16::from_le_bytes([self.legacy[0], self.legacy[1]])
    }

    /// Sets the x87 control word; bit 6 is always set.
    pub fn set_fcw(&mut self, value: u16) {
        let value = value & 0x1f7f | 0x40;
        self.legacy[..2].copy_from_slice(&value.to_le_bytes());
    }

    /// The x87 status word.
    pub fn fsw(&self) -> u16 {
        u16::from_le_bytes([self.legacy[2], self.legacy[3]])
    }

    /// Sets the x87 status word.
    pub fn set_fsw(&mut self, value: u16) {
        self.legacy[2..4].copy_from_slice(&value.to_le_bytes());
    }

    /// The abridged tags: bit n is set if physical register n is not empty.
    pub fn tags(&self) -> u8 {
        self.legacy[4]
    }

    /// Sets the abridged tags.
    pub fn set_tags(&mut self, value: u8) {
        self.legacy[4] = value;
        self.legacy[5] = 0;
    }

    /// The physical register that ST0 is.
    pub fn top(&self) -> usize {
        usize::from(self.fsw() >> 11 & 7)
    }

    /// The ten bytes of ST(`n`).
    pub fn st(&self, n: usize) -> [u8; 10] {
        let mut bytes = [0; 10];
        let at = 32 + (n & 7) * 16;
        bytes.copy_from_slice(&self.legacy[at..at + 10]);
        bytes
    }

    /// Sets the ten bytes of ST(`n`).
    pub fn set_st(&mut self, n: usize, bytes: [u8; 10]) {
        let at = 32 + (n & 7) * 16;
        self.legacy[at..at + 10].copy_from_slice(&bytes);
        self.legacy[at + 10..at + 16].fill(0);
    }

    /// Sets or clears ES and B in the status word according to the unmasked exceptions.
    pub(crate) fn update_summary(&mut self) {
        let fsw = self.fsw() & !0x8080;
        let pending = fsw & !self.fcw() & 0x3f != 0;
        self.set_fsw(if pending { fsw | 0x8080 } else { fsw });
    }

    /// Whether an unmasked x87 exception waits for the next waiting instruction.
    pub(crate) fn x87_pending(&self) -> bool {
        let fsw = self.fsw();
        fsw & 0x80 != 0 || fsw & !self.fcw() & 0x3f != 0
    }

    /// The low half of vector register `n`.
    #[inline(always)]
    pub fn xmm(&self, n: u8) -> u128 {
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&self.ymm[usize::from(n & 15)][..16]);
        u128::from_le_bytes(bytes)
    }

    /// Sets the low half of vector register `n` and keeps the upper one, as legacy SSE instructions do.
    #[inline(always)]
    pub fn set_xmm(&mut self, n: u8, value: u128) {
        self.ymm[usize::from(n & 15)][..16].copy_from_slice(&value.to_le_bytes());
    }

    /// Which components of [`component`] but PKRU are not in their initial state.
    pub fn in_use(&self) -> u64 {
        let mut bits = 0;
        let registers = (0..8).any(|n| self.st(n) != [0; 10]);
        let pointers = self.fip != 0 || self.fdp != 0 || self.fop != 0;
        if self.fcw() != 0x37f || self.fsw() != 0 || self.tags() != 0 || registers || pointers {
            bits |= component::X87;
        }
        if self.ymm.iter().any(|r| r[..16] != [0; 16]) {
            bits |= component::SSE;
        }
        if self.ymm.iter().any(|r| r[16..] != [0; 16]) {
            bits |= component::AVX;
        }
        bits
    }
}

/// Which instruction classes the control registers allow: bits of [`ok`]. Their absence is #UD or #NM,
/// decided when it happens.
pub(crate) fn allowed(state: &CpuState) -> u8 {
    let mut bits = 0;
    let (em, ts, mp) = (state.cr0 & cr0::EM != 0, state.cr0 & cr0::TS != 0, state.cr0 & cr0::MP != 0);
    if !em && !ts {
        bits |= ok::X87 | ok::MMX;
        if state.cr4 & cr4::OSFXSR != 0 {
            bits |= ok::SSE;
        }
    }
    if !(mp && ts) {
        bits |= ok::WAIT;
    }
    if !ts && avx_enabled(state) {
        bits |= ok::AVX;
    }
    bits
}

/// Whether VEX-encoded vector instructions exist in the present mode.
pub(crate) fn avx_enabled(state: &CpuState) -> bool {
    let both = component::SSE | component::AVX;
    state.cr4 & cr4::OSXSAVE != 0
        && state.xcr0 & both == both
        && state.cr0 & cr0::PE != 0
        && !state.virtual_8086()
}

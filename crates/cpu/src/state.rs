//! The architectural state of one vCPU.
//!
//! `CpuState` is `#[repr(C)]` and its hot part comes first, at fixed small offsets: translated code will
//! address it from one base register. Everything else follows in the order of convenience.

use std::mem::offset_of;

use crate::flags::Flags;
use crate::fpu::Fpu;
use crate::msr::Msrs;

/// Index of the pseudo-register that is always zero, for address forms without base or index.
pub const REG_ZERO: u8 = 16;
/// Index of RIP among the registers. While an instruction executes it is the address of the next one.
pub const REG_RIP: u8 = 17;
/// Index of the first spill slot of translated code; slots run to 31.
pub const REG_SPILL: u8 = 18;

/// General registers by their encoding.
pub mod reg {
    /// RAX.
    pub const RAX: u8 = 0;
    /// RCX.
    pub const RCX: u8 = 1;
    /// RDX.
    pub const RDX: u8 = 2;
    /// RBX.
    pub const RBX: u8 = 3;
    /// RSP.
    pub const RSP: u8 = 4;
    /// RBP.
    pub const RBP: u8 = 5;
    /// RSI.
    pub const RSI: u8 = 6;
    /// RDI.
    pub const RDI: u8 = 7;
    /// R8.
    pub const R8: u8 = 8;
    /// R11.
    pub const R11: u8 = 11;
}

/// Segment registers by their encoding; [`FLAT`](seg::FLAT) is the pseudo-segment with base zero that 64-bit mode uses.
pub mod seg {
    /// ES.
    pub const ES: u8 = 0;
    /// CS.
    pub const CS: u8 = 1;
    /// SS.
    pub const SS: u8 = 2;
    /// DS.
    pub const DS: u8 = 3;
    /// FS.
    pub const FS: u8 = 4;
    /// GS.
    pub const GS: u8 = 5;
    /// No segment: base zero, no checks.
    pub const FLAT: u8 = 6;
}

/// The hidden part of a segment register, without the base (that is in [`CpuState::seg_base`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// The visible selector.
    pub selector: u16,
    /// The limit in bytes, granularity applied: the last valid offset (first invalid for expand-down).
    pub limit: u32,
    /// Bits 8 to 15 and 20 to 23 of the descriptor's second half, in place (type, S, DPL, P, AVL, L, D/B,
    /// G), as in the VMX access-rights format shifted left by 8. Zero means unusable.
    pub attributes: u32,
}

impl Segment {
    /// Attribute bit: accessed.
    pub const ACCESSED: u32 = 1 << 8;
    /// Attribute bit: writable data, readable code.
    pub const WRITABLE: u32 = 1 << 9;
    /// Attribute bit: expand-down data, conforming code.
    pub const EXPAND_DOWN: u32 = 1 << 10;
    /// Attribute bit: code.
    pub const CODE: u32 = 1 << 11;
    /// Attribute bit: code or data, not system.
    pub const NON_SYSTEM: u32 = 1 << 12;
    /// Attribute bit: present.
    pub const PRESENT: u32 = 1 << 15;
    /// Attribute bit: 64-bit code.
    pub const LONG: u32 = 1 << 21;
    /// Attribute bit: 32-bit default size, or big stack.
    pub const DEFAULT_BIG: u32 = 1 << 22;
    /// Attribute bit: limit in 4 KiB units.
    pub const GRANULARITY: u32 = 1 << 23;

    /// The descriptor privilege level.
    pub const fn dpl(&self) -> u8 {
        (self.attributes >> 13 & 3) as u8
    }

    /// Whether attribute `bit` is set.
    pub const fn has(&self, bit: u32) -> bool {
        self.attributes & bit != 0
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableRegister {
    /// Linear base address.
    pub base: u64,
    /// Last valid offset.
    pub limit: u16,
}

/// LDTR or TR: a system segment with its own base.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SystemSegment {
    /// Selector, limit, attributes.
    pub segment: Segment,
    /// Linear base address.
    pub base: u64,
}

/// How code is decoded now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum CodeMode {
    /// 16-bit: real mode, virtual-8086 mode, or a 16-bit code segment.
    Bits16 = 0,
    /// 32-bit: protected or compatibility mode.
    Bits32 = 1,
    /// 64-bit mode.
    Bits64 = 2,
}

impl CodeMode {
    /// The width in bits, as the decoder wants it.
    pub const fn bitness(self) -> u32 {
        match self {
            Self::Bits16 => 16,
            Self::Bits32 => 32,
            Self::Bits64 => 64,
        }
    }
}

/// Reasons to run instruction by instruction, in [`CpuState::slow`].
pub mod slow {
    /// RFLAGS.TF is set.
    pub const SINGLE_STEP: u32 = 1 << 0;
    /// The previous instruction was STI: interrupts wait for one more instruction.
    pub const STI_SHADOW: u32 = 1 << 1;
    /// The previous instruction loaded SS: interrupts, NMIs and debug traps wait for one instruction.
    pub const SS_SHADOW: u32 = 1 << 2;
    /// An instruction or data breakpoint is armed in DR7.
    pub const BREAKPOINTS: u32 = 1 << 3;
    /// The vCPU sleeps in HLT.
    pub const HALTED: u32 = 1 << 4;
    /// A debug trap is pending; its DR6 bits are in [`super::CpuState::pending_dr6`].
    pub const DEBUG_TRAP: u32 = 1 << 5;
    /// The vCPU waits for a start-up IPI.
    pub const WAIT_FOR_SIPI: u32 = 1 << 6;
    /// An NMI handler has not executed IRET yet.
    pub const NMI_BLOCKED: u32 = 1 << 7;
    /// An NMI is latched.
    pub const NMI_PENDING: u32 = 1 << 8;
    /// RFLAGS.RF is set: it lasts for one instruction.
    pub const RESUME: u32 = 1 << 9;
    /// The present instruction entered a handler: no single-step trap follows it.
    pub const NO_STEP_TRAP: u32 = 1 << 10;
    /// The vCPU has come to 64-bit supervisor mode, and is to enter PVM mode.
    pub const ENTER_PVM: u32 = 1 << 11;
}

/// CR0 bits (Intel SDM vol. 3, 2.5).
pub mod cr0 {
    #![allow(missing_docs, reason = "the names are the manual's")]
    pub const PE: u64 = 1 << 0;
    pub const MP: u64 = 1 << 1;
    pub const EM: u64 = 1 << 2;
    pub const TS: u64 = 1 << 3;
    pub const ET: u64 = 1 << 4;
    pub const NE: u64 = 1 << 5;
    pub const WP: u64 = 1 << 16;
    pub const AM: u64 = 1 << 18;
    pub const NW: u64 = 1 << 29;
    pub const CD: u64 = 1 << 30;
    pub const PG: u64 = 1 << 31;
}

/// CR4 bits (Intel SDM vol. 3, 2.5).
pub mod cr4 {
    #![allow(missing_docs, reason = "the names are the manual's")]
    pub const VME: u64 = 1 << 0;
    pub const PVI: u64 = 1 << 1;
    pub const TSD: u64 = 1 << 2;
    pub const DE: u64 = 1 << 3;
    pub const PSE: u64 = 1 << 4;
    pub const PAE: u64 = 1 << 5;
    pub const MCE: u64 = 1 << 6;
    pub const PGE: u64 = 1 << 7;
    pub const PCE: u64 = 1 << 8;
    pub const OSFXSR: u64 = 1 << 9;
    pub const OSXMMEXCPT: u64 = 1 << 10;
    pub const UMIP: u64 = 1 << 11;
    pub const LA57: u64 = 1 << 12;
    pub const FSGSBASE: u64 = 1 << 16;
    pub const PCIDE: u64 = 1 << 17;
    pub const OSXSAVE: u64 = 1 << 18;
    pub const SMEP: u64 = 1 << 20;
    pub const SMAP: u64 = 1 << 21;
    pub const PKE: u64 = 1 << 22;
    pub const PKS: u64 = 1 << 24;
}

/// EFER bits (Intel SDM vol. 3, 2.2.1).
pub mod efer {
    #![allow(missing_docs, reason = "the names are the manual's")]
    pub const SCE: u64 = 1 << 0;
    pub const LME: u64 = 1 << 8;
    pub const LMA: u64 = 1 << 10;
    pub const NXE: u64 = 1 << 11;
}

/// The architectural state of one vCPU.
#[derive(Clone, Debug)]
#[repr(C)]
pub struct CpuState {
    // ---- hot part: addressed by translated code; offsets are checked below ----
    /// General registers 0 to 15, the zero register, RIP, spill slots.
    pub regs: [u64; 32],
    /// RFLAGS.
    pub flags: Flags,
    /// Segment bases by encoding; entry 6 is always zero, 7 unused.
    pub seg_base: [u64; 8],
    /// What the low 12 bits of a TLB tag must be: the PCID.
    pub(crate) tlb_tag: u64,
    /// Where the TLB table of the present privilege starts.
    pub(crate) tlb_base: u64,
    /// The instruction after which the running block ends; lowered to end it early.
    pub(crate) block_end: u32,
    /// Reasons to run instruction by instruction, see [`slow`].
    pub slow: u32,
    /// Current privilege level.
    pub cpl: u8,
    /// How code is decoded.
    pub code_mode: CodeMode,
    /// Which vector and x87 instructions may execute now; kept by [`crate::Vcpu::refresh_mode`].
    pub(crate) fpu_ok: u8,
    /// PVM mode: the guest runs without privileges and knows it. CPL, control registers and the like are as the guest
    /// believes them to be; CS, SS and RFLAGS.IF are those of the unprivileged program that it is. Kept by
    /// `pvm_mode`.
    pub(crate) deprivileged: bool,
    /// Whether the stack pointer is 64, 32 or 16 bits wide, as a mask.
    pub stack_mask: u64,

    // ---- cold part ----
    /// Segment registers by encoding, without bases.
    pub segments: [Segment; 6],
    /// LDTR.
    pub ldtr: SystemSegment,
    /// TR.
    pub tr: SystemSegment,
    /// GDTR.
    pub gdtr: TableRegister,
    /// IDTR.
    pub idtr: TableRegister,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// XCR0.
    pub xcr0: u64,
    /// EFER.
    pub efer: u64,
    /// PAE page-directory-pointer entries, loaded with CR3.
    pub pdptrs: [u64; 4],
    /// Debug address registers DR0 to DR3.
    pub dr: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
    /// DR6 bits of a debug trap that is due after the present instruction.
    pub pending_dr6: u64,
    /// A paravirtual kick arrived: the next HLT ends at once.
    pub(crate) unhalted: bool,
    /// PKRU.
    pub pkru: u32,
    /// Model-specific registers.
    pub msrs: Msrs,
    /// x87, MMX, SSE and AVX state.
    pub fpu: Fpu,
}

const _: () = {
    assert!(offset_of!(CpuState, regs) == 0);
    assert!(offset_of!(CpuState, flags) == 0x100);
    assert!(offset_of!(CpuState, seg_base) == 0x120);
    assert!(offset_of!(CpuState, tlb_tag) == 0x160);
    assert!(offset_of!(CpuState, tlb_base) == 0x168);
    assert!(offset_of!(CpuState, block_end) == 0x170);
};

impl Default for CpuState {
    fn default() -> Self {
        let mut state = Self {
            regs: [0; 32],
            flags: Flags::default(),
            seg_base: [0; 8],
            tlb_tag: 0,
            tlb_base: 0,
            block_end: 0,
            slow: 0,
            cpl: 0,
            code_mode: CodeMode::Bits16,
            fpu_ok: 0,
            deprivileged: false,
            stack_mask: 0xffff,
            segments: [Segment::default(); 6],
            ldtr: SystemSegment::default(),
            tr: SystemSegment::default(),
            gdtr: TableRegister::default(),
            idtr: TableRegister::default(),
            cr0: 0,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            xcr0: 1,
            efer: 0,
            pdptrs: [0; 4],
            dr: [0; 4],
            dr6: 0,
            dr7: 0,
            pending_dr6: 0,
            unhalted: false,
            pkru: 0,
            msrs: Msrs::default(),
            fpu: Fpu::default(),
        };
        state.reset();
        state
    }
}

impl CpuState {
    /// The state after power-up or RESET (Intel SDM vol. 3, table 10-1): real mode at the reset vector.
    pub fn reset(&mut self) {
        self.fpu = Fpu::default();
        self.msrs = Msrs::default();
        self.xcr0 = 1;
        self.cr0 = cr0::CD | cr0::NW | cr0::ET;
        self.init();
    }

    /// The state after INIT: as RESET, but caches, floating-point state and most MSRs stay.
    pub fn init(&mut self) {
        self.regs = [0; 32];
        self.regs[usize::from(REG_RIP)] = 0xfff0;
        self.regs[usize::from(reg::RDX)] = 0x600;
        self.flags.set_bits(0);
        self.seg_base = [0; 8];
        let data = Segment::PRESENT | Segment::NON_SYSTEM | Segment::WRITABLE | Segment::ACCESSED;
        self.segments = [Segment { selector: 0, limit: 0xffff, attributes: data }; 6];
        self.segments[usize::from(seg::CS)].attributes = data | Segment::CODE;
        self.set_real_mode_cs(0xf000);
        self.seg_base[usize::from(seg::CS)] = 0xffff_0000;
        self.ldtr =
            SystemSegment { segment: Segment { selector: 0, limit: 0xffff, attributes: 0x8200 }, base: 0 };
        self.tr =
            SystemSegment { segment: Segment { selector: 0, limit: 0xffff, attributes: 0x8b00 }, base: 0 };
        self.gdtr = TableRegister { base: 0, limit: 0xffff };
        self.idtr = TableRegister { base: 0, limit: 0xffff };
        self.cr0 = (self.cr0 & (cr0::CD | cr0::NW)) | cr0::ET;
        self.cr2 = 0;
        self.cr3 = 0;
        self.cr4 = 0;
        self.efer = 0;
        self.dr = [0; 4];
        self.dr6 = 0xffff_0ff0;
        self.dr7 = 0x400;
        self.pending_dr6 = 0;
        self.pkru = 0;
        self.slow = 0;
        self.cpl = 0;
        self.deprivileged = false;
    }

    /// CS for real mode: selector and base from `selector`, 64 KiB limit.
    pub fn set_real_mode_cs(&mut self, selector: u16) {
        let cs = &mut self.segments[usize::from(seg::CS)];
        cs.selector = selector;
        cs.limit = 0xffff;
        self.seg_base[usize::from(seg::CS)] = u64::from(selector) << 4;
    }

    /// RIP: while an instruction executes, the address of the next one.
    #[inline(always)]
    pub fn rip(&self) -> u64 {
        self.regs[usize::from(REG_RIP)]
    }

    /// Sets RIP.
    #[inline(always)]
    pub fn set_rip(&mut self, rip: u64) {
        self.regs[usize::from(REG_RIP)] = rip;
    }

    /// Whether protected mode is on.
    pub fn protected(&self) -> bool {
        self.cr0 & cr0::PE != 0
    }

    /// Whether long mode is active (64-bit or compatibility).
    pub fn long_mode(&self) -> bool {
        self.efer & efer::LMA != 0
    }

    /// Whether virtual-8086 mode is on.
    pub fn virtual_8086(&self) -> bool {
        self.flags.system() & crate::flags::VM != 0
    }
}

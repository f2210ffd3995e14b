//! Debug registers: breakpoints and single-step (Intel SDM vol. 3, chapter 18).
//!
//! Conditions that are met during an instruction collect in `CpuState::pending_dr6`; the loop delivers one #DB
//! for all of them after the instruction. Instruction breakpoints are faults, found before it.

use crate::flags;
use crate::state::{CodeMode, cr4, slow};
use crate::vcpu::Vcpu;

/// DR6 bits.
pub(crate) mod dr6 {
    /// A MOV with a debug register while DR7.GD was set.
    pub(crate) const BD: u64 = 1 << 13;
    /// Single step.
    pub(crate) const BS: u64 = 1 << 14;
    /// A task switch to a TSS with its T bit set.
    pub(crate) const BT: u64 = 1 << 15;
    /// The bits that always read as one: no bus-lock and no RTM debug exceptions here.
    pub(crate) const FIXED: u64 = 0xffff_0ff0;
    /// The bits that can be written.
    pub(crate) const WRITABLE: u64 = 0xf | BD | BS | BT;
}

/// DR7 bits.
pub(crate) mod dr7 {
    /// General detect: MOV with a debug register is #DB.
    pub(crate) const GD: u64 = 1 << 13;
    /// Bit 10, which always reads as one.
    pub(crate) const FIXED: u64 = 1 << 10;
    /// The bits that can be written.
    pub(crate) const WRITABLE: u64 = 0xffff_23ff;
}

/// What a breakpoint waits for: the R/W field of DR7.
mod condition {
    pub(super) const EXECUTE: u64 = 0;
    pub(super) const WRITE: u64 = 1;
    pub(super) const IO: u64 = 2;
    pub(super) const ACCESS: u64 = 3;
}

impl Vcpu {
    /// The DR6 bits of the enabled breakpoints with one of `conditions` that cover any of `size` bytes at
    /// `address`.
    fn breakpoints(&self, address: u64, size: u64, conditions: &[u64]) -> u64 {
        let dr7 = self.state.dr7;
        // Outside 64-bit mode addresses wrap around at 4 GiB. (The processor's own tables may lie above.)
        let narrow = self.state.code_mode != CodeMode::Bits64 && address <= 0xffff_ffff;
        let mask = if narrow { 0xffff_ffff } else { u64::MAX };
        let mut hits = 0;
        for (n, base) in (0u32..).zip(self.state.dr) {
            let enabled = dr7 >> (n * 2) & 3 != 0;
            let field = dr7 >> (16 + n * 4);
            if !enabled || !conditions.contains(&(field & 3)) || !self.breakpoint_is_allowed(base) {
                continue;
            }
            let len = if field & 3 == condition::EXECUTE {
                1
            } else {
                // The length field: 1, 2, 8, 4 bytes; the address is aligned to it.
                [1, 2, 8, 4][(field >> 2 & 3) as usize]
            };
            let start = base & !(len - 1);
            // Distances, so that ranges at the end of the address space work.
            let reached =
                address.wrapping_sub(start) & mask < len || start.wrapping_sub(address) & mask < size;
            if base <= mask && reached {
                hits |= 1 << n;
            }
        }
        hits
    }

    /// Makes a #DB with the DR6 bits `bits` due after the present instruction.
    fn debug_trap(&mut self, bits: u64) {
        if bits != 0 {
            self.state.pending_dr6 |= bits;
            self.state.slow |= slow::DEBUG_TRAP;
            self.end_block();
        }
    }

    /// Notes a data access that a breakpoint in DR0 to DR3 may cover.
    #[inline]
    pub(crate) fn data_breakpoint(&mut self, gva: u64, size: u64, write: bool) {
        if self.state.slow & slow::BREAKPOINTS != 0 {
            let conditions: &[u64] =
                if write { &[condition::WRITE, condition::ACCESS] } else { &[condition::ACCESS] };
            self.debug_trap(self.breakpoints(gva, size, conditions));
        }
    }

    /// Notes an access to `size` I/O ports from `port`.
    pub(crate) fn io_breakpoint(&mut self, port: u16, size: u64) {
        if self.state.slow & slow::BREAKPOINTS != 0 && self.state.cr4 & cr4::DE != 0 {
            self.debug_trap(self.breakpoints(u64::from(port), size, &[condition::IO]));
        }
    }

    /// The DR6 bits of the instruction breakpoints that match the linear address `gva`, or 0.
    pub(crate) fn instruction_breakpoint(&self, gva: u64) -> u64 {
        if self.state.slow & slow::BREAKPOINTS == 0 || self.state.flags.system() & flags::RF != 0 {
            return 0;
        }
        self.breakpoints(gva, 1, &[condition::EXECUTE])
    }

    /// What a #DB does to DR6 and DR7 before it is delivered: the breakpoint bits are replaced, the others
    /// accumulate, and general detect is switched off.
    pub(crate) fn note_debug_exception(&mut self, bits: u64) {
        let state = &mut self.state;
        state.dr6 = (state.dr6 & !0xf) | bits & dr6::WRITABLE | dr6::FIXED;
        state.dr7 &= !dr7::GD;
    }
}

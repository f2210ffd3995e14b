//! Debug registers: breakpoints and single-step.

use crate::vcpu::Vcpu;

impl Vcpu {
    /// Notes a data access that a breakpoint in DR0 to DR3 may cover.
    #[inline]
    pub(crate) fn data_breakpoint(&mut self, gva: u64, size: u64, write: bool) {
        let _ = (gva, size, write);
    }

    /// The DR6 bits of the instruction breakpoints that match the linear address `gva`, or 0.
    pub(crate) fn instruction_breakpoint(&self, gva: u64) -> u64 {
        let _ = gva;
        0
    }
}

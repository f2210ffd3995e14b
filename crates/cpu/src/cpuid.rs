//! What CPUID answers.

/// The CPUID table of a vCPU.
#[derive(Clone, Debug, Default)]
pub struct Cpuid {}

impl Cpuid {
    /// TODO
    pub fn new(_index: u32, _cpus: u32, _maxphyaddr: u8, _tsc_khz: u32) -> Self {
        Self {}
    }
    /// TODO
    pub fn set_leaf(&mut self, _leaf: u32, _subleaf: u32, _regs: [u32; 4]) {}
    /// The width of guest-physical addresses in bits.
    pub fn maxphyaddr(&self) -> u8 {
        46
    }
}

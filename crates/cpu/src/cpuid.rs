//! What CPUID answers.

/// The CPUID table of a vCPU.
#[derive(Clone, Debug, Default)]
pub struct Cpuid {}

impl Cpuid {
    /// The width of guest-physical addresses in bits.
    pub fn maxphyaddr(&self) -> u8 {
        46
    }
}

//! x87, MMX, SSE and AVX state.

/// The floating-point and vector registers of a vCPU.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub struct Fpu {
    /// YMM0 to YMM15, XMM in the low half.
    pub ymm: [[u8; 32]; 16],
    /// The legacy FXSAVE image; only its x87 part (bytes 0 to 159 but MXCSR) is used.
    pub legacy: [u8; 512],
    /// MXCSR.
    pub mxcsr: u32,
}

impl Default for Fpu {
    fn default() -> Self {
        let mut legacy = [0; 512];
        // FCW after FNINIT: all exceptions masked, extended precision.
        legacy[0] = 0x7f;
        legacy[1] = 0x03;
        Self { ymm: [[0; 32]; 16], legacy, mxcsr: 0x1f80 }
    }
}

//! The integer operand sizes of the architecture as a trait.

mod sealed {
    pub trait Sealed {}
    impl Sealed for u8 {}
    impl Sealed for u16 {}
    impl Sealed for u32 {}
    impl Sealed for u64 {}
}

/// An integer operand: `u8`, `u16`, `u32` or `u64`.
///
/// Instruction handlers are generic over it, so that one definition of an instruction serves its four
/// operand sizes.
pub trait Data: Copy + Eq + Ord + std::fmt::Debug + Send + Sync + 'static + sealed::Sealed {
    /// Size in bytes.
    const SIZE: u64;
    /// Size in bits.
    const BITS: u32;

    /// Zero-extends to 64 bits.
    fn widen(self) -> u64;
    /// Sign-extends to 64 bits.
    fn sign_extend(self) -> u64;
    /// Keeps the low bits.
    fn truncate(value: u64) -> Self;
}

macro_rules! data {
    ($($unsigned:ty, $signed:ty);*) => {$(
        impl Data for $unsigned {
            const SIZE: u64 = size_of::<$unsigned>() as u64;
            const BITS: u32 = <$unsigned>::BITS;

            #[inline(always)]
            fn widen(self) -> u64 {
                self as u64
            }

            #[inline(always)]
            fn sign_extend(self) -> u64 {
                self as $signed as i64 as u64
            }

            #[inline(always)]
            fn truncate(value: u64) -> Self {
                value as $unsigned
            }
        }
    )*};
}

data!(u8, i8; u16, i16; u32, i32; u64, i64);

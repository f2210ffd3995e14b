//! Where random choices come from.

/// A stream of choices: first the given bytes, then pseudo-random numbers (SplitMix64) without end.
#[derive(Clone, Debug)]
pub struct Choices<'a> {
    bytes: &'a [u8],
    state: u64,
}

impl Choices<'static> {
    /// Choices from a seed alone.
    pub const fn seeded(seed: u64) -> Self {
        Self { bytes: &[], state: seed }
    }
}

impl<'a> Choices<'a> {
    /// Choices from `bytes`, such as a fuzzer's input.
    pub const fn from_bytes(bytes: &'a [u8]) -> Self {
        Self { bytes, state: bytes.len() as u64 }
    }

    /// The next 64 bits.
    pub fn word(&mut self) -> u64 {
        if let Some((word, rest)) = self.bytes.split_first_chunk() {
            self.bytes = rest;
            return u64::from_le_bytes(*word);
        }
        self.bytes = &[];
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// A number below `limit`; 0 if that is 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.word().checked_rem(limit).unwrap_or(0)
    }

    /// True once in `times`.
    pub fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    /// `mask` or nothing, evenly.
    pub fn maybe(&mut self, mask: u64) -> u64 {
        if self.word() & 1 != 0 { mask } else { 0 }
    }

    /// `mask`, but once in `times` nothing.
    pub fn mostly(&mut self, mask: u64, times: u64) -> u64 {
        if self.once_in(times) { 0 } else { mask }
    }

    /// One of `options`, which must not be empty.
    pub fn one_of<T: Copy>(&mut self, options: &[T]) -> T {
        let at = self.below(options.len() as u64) as usize;
        options[at]
    }
}

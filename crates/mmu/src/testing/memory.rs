//! Guest memory for tests.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Gpa, PageTableMemory};

/// RAM from address 0 up to its size, and nothing above.
#[derive(Debug)]
pub struct FlatMemory {
    words: Vec<AtomicU64>,
}

impl Clone for FlatMemory {
    fn clone(&self) -> Self {
        let copy = |word: &AtomicU64| AtomicU64::new(word.load(Ordering::SeqCst));
        Self { words: self.words.iter().map(copy).collect() }
    }
}

impl PartialEq for FlatMemory {
    fn eq(&self, other: &Self) -> bool {
        let value = |word: &AtomicU64| word.load(Ordering::SeqCst);
        self.words.iter().map(value).eq(other.words.iter().map(value))
    }
}

impl FlatMemory {
    /// So many bytes of zeroes, rounded up to eight.
    pub fn new(bytes: usize) -> Self {
        Self { words: (0..bytes.div_ceil(8)).map(|_| AtomicU64::new(0)).collect() }
    }

    /// The size in bytes.
    pub fn size(&self) -> u64 {
        self.words.len() as u64 * 8
    }

    /// Stores 64 bits at `address`, which is aligned to them; nowhere if there is no RAM.
    pub fn set_u64(&mut self, address: u64, value: u64) {
        if let Some(word) = self.words.get_mut((address / 8) as usize) {
            *word.get_mut() = value;
        }
    }

    /// The same for 32 bits.
    pub fn set_u32(&mut self, address: u64, value: u32) {
        if let Some(word) = self.words.get_mut((address / 8) as usize) {
            let word = word.get_mut();
            *word = with_half(*word, address, value);
        }
    }

    fn word(&self, gpa: Gpa) -> Option<&AtomicU64> {
        self.words.get(usize::try_from(gpa.0 / 8).ok()?)
    }
}

/// The 32 bits of `word` that are at `address`.
fn half(word: u64, address: u64) -> u32 {
    (word >> (address % 8 * 8)) as u32
}

/// `word` with the 32 bits at `address` replaced.
fn with_half(word: u64, address: u64, value: u32) -> u64 {
    let shift = address % 8 * 8;
    word & !(0xffff_ffff << shift) | u64::from(value) << shift
}

impl PageTableMemory for FlatMemory {
    #[inline]
    fn read_u32(&self, gpa: Gpa) -> Option<u32> {
        Some(half(self.word(gpa)?.load(Ordering::Acquire), gpa.0))
    }

    #[inline]
    fn read_u64(&self, gpa: Gpa) -> Option<u64> {
        Some(self.word(gpa)?.load(Ordering::Acquire))
    }

    fn compare_exchange_u32(&self, gpa: Gpa, old: u32, new: u32) -> Option<bool> {
        let word = self.word(gpa)?;
        let mut seen = word.load(Ordering::Acquire);
        while half(seen, gpa.0) == old {
            let wanted = with_half(seen, gpa.0, new);
            match word.compare_exchange(seen, wanted, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) => return Some(true),
                // The other half may be what changed.
                Err(now) => seen = now,
            }
        }
        Some(false)
    }

    fn compare_exchange_u64(&self, gpa: Gpa, old: u64, new: u64) -> Option<bool> {
        Some(self.word(gpa)?.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst).is_ok())
    }
}

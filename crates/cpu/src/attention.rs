//! The one word by which other threads ask for a vCPU's attention.
//!
//! # Theory of operation
//! The vCPU looks at [`Attention`]'s word before each block of instructions: one relaxed load. Any
//! thread sets bits in it, and wakes the vCPU's thread if that sleeps. What a bit means in detail (which
//! interrupt, which page) is asked of its owner afterwards.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Instant;

/// The interrupt controller has something to deliver.
pub const INTERRUPT: u32 = 1 << 0;
/// A non-maskable interrupt is pending.
pub const NMI: u32 = 1 << 1;
/// INIT was received.
pub const INIT: u32 = 1 << 2;
/// A start-up IPI was received; its vector is in [`Attention::take_sipi`].
pub const SIPI: u32 = 1 << 3;
/// [`crate::Interpreter::run`] is to return to its caller.
pub const KICK: u32 = 1 << 4;
/// Pages became write-watched: writable TLB entries for them are to be dropped.
pub const WATCH: u32 = 1 << 5;
/// The whole TLB is to be flushed (paravirtual TLB shootdown).
pub const FLUSH_TLB: u32 = 1 << 6;
/// A halted vCPU goes on without an interrupt; if it is not halted, its next HLT ends at once
/// (KVM_HC_KICK_CPU).
pub const UNHALT: u32 = 1 << 7;
/// The vCPU is not to run guest code until the bit is cleared: another one is alone in RAM.
pub const STOP: u32 = 1 << 8;

/// A vCPU's attention word, with the means to sleep until it is set.
#[derive(Debug, Default)]
pub struct Attention {
    word: AtomicU32,
    sipi: AtomicU32,
    sleeping: Mutex<()>,
    wake: Condvar,
}

impl Attention {
    /// A word with no bit set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets `bits` and wakes the vCPU's thread.
    pub fn raise(&self, bits: u32) {
        let before = self.word.fetch_or(bits, Ordering::SeqCst);
        if before & bits != bits {
            // Taking the lock orders this wake-up after a sleeper's last look at the word.
            drop(self.sleeping.lock().unwrap_or_else(PoisonError::into_inner));
            self.wake.notify_all();
        }
    }

    /// Sets `bits`, for what can wait until the vCPU runs: a sleeping thread sleeps on.
    pub(crate) fn mark(&self, bits: u32) {
        self.word.fetch_or(bits, Ordering::SeqCst);
    }

    /// Raises [`SIPI`] with its vector.
    pub fn raise_sipi(&self, vector: u8) {
        self.sipi.store(u32::from(vector), Ordering::SeqCst);
        self.raise(SIPI);
    }

    /// The vector of the last start-up IPI.
    pub fn take_sipi(&self) -> u8 {
        self.sipi.load(Ordering::SeqCst) as u8
    }

    /// The word, as the hot loop looks at it.
    #[inline(always)]
    pub fn peek(&self) -> u32 {
        self.word.load(Ordering::Relaxed)
    }

    /// The word, in order with what the thread did before.
    pub(crate) fn look(&self) -> u32 {
        self.word.load(Ordering::SeqCst)
    }

    /// Clears `bits` and returns which of them were set.
    pub fn take(&self, bits: u32) -> u32 {
        self.word.fetch_and(!bits, Ordering::SeqCst) & bits
    }

    /// Sleeps until a bit of `mask` is set or `deadline` has passed.
    pub fn sleep(&self, mask: u32, deadline: Option<Instant>) {
        let mut guard = self.sleeping.lock().unwrap_or_else(PoisonError::into_inner);
        while self.word.load(Ordering::SeqCst) & mask == 0 {
            guard = match deadline {
                None => self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return;
                    }
                    self.wake.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}

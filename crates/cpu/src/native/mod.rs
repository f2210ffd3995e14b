//! Vector and x87 instructions, executed by the host CPU on the guest's register image.
//!
//! # Theory of operation
//! Writing out a thousand arithmetic instructions by hand would mean writing a thousand chances to differ
//! from the processor. Instead each distinct instruction gets, once, a few bytes of native code ([`stub`]):
//! load the registers that it names from the vCPU's state, execute it, store the results. A memory operand
//! never reaches native code: the handler ([`run`]) reads it from guest memory through the TLB into a
//! scratch buffer before, or writes it from there after. Before code may run it is checked by [`verify`];
//! [`arena`] holds it.
//!
//! Plain moves, most frequent by far, need no native code ([`moves`]). What touches control words
//! ([`mxcsr`], [`x87`]), memory element by element ([`masked`]) or the whole state ([`xsave`]) is written
//! by hand.
//!
//! # MXCSR
//! As long as the guest's control bits are the default ones, its floating-point instructions run with the
//! host's MXCSR as it is, and exception flags gather there: the register is then *live*. It is read back by
//! [`Vcpu::sync_mxcsr`] before anything looks at the guest's MXCSR, and before foreign Rust code runs. Under
//! other control bits each instruction is wrapped in a switch, with all exceptions masked; one that the
//! guest did not mask is raised afterwards, from the flags, with the registers put back.

mod arena;
mod class;
mod masked;
mod moves;
mod mxcsr;
mod run;
mod stub;
#[cfg(test)]
mod tests;
mod verify;
mod x87;
mod xsave;

use std::collections::HashMap;

use iced_x86::{EncodingKind, Instruction};

use self::arena::{Arena, StubId};
use self::run::Lowered;
use self::stub::{Key, Rewritten};
use crate::insn::{Handler, Insn};
use crate::state::CodeMode;
use crate::vcpu::Vcpu;

/// Size of the arena in bytes: room for more than a hundred thousand distinct instructions.
const ARENA_SIZE: usize = 8 << 20;

/// The code that runs guest instructions on the host CPU.
#[derive(Debug)]
pub(crate) struct Native {
    arena: Arena,
    /// How to run each instruction seen so far.
    stubs: HashMap<Key, Lowered>,
    /// Whether the guest's MXCSR flags gather in the host's register.
    live: bool,
}

impl Native {
    /// Nothing generated yet.
    ///
    /// # Errors
    /// When the host refuses executable memory.
    pub(crate) fn new() -> std::io::Result<Self> {
        Self::with_size(ARENA_SIZE)
    }

    fn with_size(size: usize) -> std::io::Result<Self> {
        Ok(Self { arena: Arena::new(size)?, stubs: HashMap::new(), live: false })
    }

    /// Whether there may not be room for the code of one more block. Then all decoded instructions are to
    /// be forgotten, and [`Self::reset`] called, before the next is decoded.
    pub(crate) fn is_nearly_full(&self) -> bool {
        self.arena.is_nearly_full()
    }

    /// Forgets all code. Instructions lowered before must not be run any more (nothing unsafe would
    /// happen, but not what they say).
    pub(crate) fn reset(&mut self) {
        self.arena.reset();
        self.stubs.clear();
    }

    /// How many stubs there are.
    #[cfg(test)]
    fn stub_count(&self) -> usize {
        self.stubs.len()
    }

    /// The stub for a rewritten instruction: generated, checked and added now.
    fn generate(&mut self, rewritten: &Rewritten) -> Option<StubId> {
        let code = verify::verify(rewritten.code()?);
        debug_assert!(code.is_ok(), "{code:?}");
        self.arena.add(&code.ok()?)
    }
}

/// Chooses the handler of an x87 or vector instruction.
pub(crate) fn select(vcpu: &mut Vcpu, i: &Instruction, _mode: CodeMode, insn: &mut Insn) -> Option<Handler> {
    if !matches!(i.encoding(), EncodingKind::Legacy | EncodingKind::VEX) || i.has_lock_prefix() {
        return None;
    }
    if let Some(handler) = mxcsr::select(i).or_else(|| xsave::select(i)).or_else(|| x87::select(i)) {
        return Some(handler);
    }
    if !class::on_host(i) {
        return None;
    }
    moves::select(i).or_else(|| masked::select(i, insn)).or_else(|| run::select(vcpu, i, insn))
}

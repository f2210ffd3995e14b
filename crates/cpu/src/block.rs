//! Decoded blocks, cached by guest-physical address.
//!
//! A block is a run of instructions inside one page, up to the first that may not fall through. It is
//! found by the physical address of its first byte and the code mode, and is valid as long as its page's
//! stamp (see [`crate::ram`]) is what it was when the block was decoded.

use mmu::Gpa;

use crate::insn::Insn;
use crate::state::CodeMode;

const SLOTS: usize = 1 << 16;

/// A decoded block.
pub(crate) struct Block {
    key: u64,
    stamp: u32,
    /// The instructions; never empty.
    pub(crate) insns: Box<[Insn]>,
}

/// The decoded blocks of one vCPU: a direct-mapped table.
pub(crate) struct BlockCache {
    slots: Box<[Option<Block>]>,
}

impl BlockCache {
    pub(crate) fn new() -> Self {
        Self { slots: std::iter::repeat_with(|| None).take(SLOTS).collect() }
    }

    #[inline(always)]
    fn key(gpa: Gpa, mode: CodeMode) -> u64 {
        gpa.0 | (mode as u64) << 62
    }

    #[inline(always)]
    fn slot(key: u64) -> usize {
        (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - SLOTS.trailing_zeros())) as usize & (SLOTS - 1)
    }

    /// The valid block at `gpa`, if there is one.
    #[inline(always)]
    pub(crate) fn get(&self, gpa: Gpa, mode: CodeMode, stamp: u32) -> Option<&Block> {
        let key = Self::key(gpa, mode);
        match &self.slots[Self::slot(key)] {
            Some(block) if block.key == key && block.stamp == stamp => Some(block),
            _ => None,
        }
    }

    /// Keeps a block.
    pub(crate) fn insert(&mut self, gpa: Gpa, mode: CodeMode, stamp: u32, insns: Box<[Insn]>) -> &Block {
        let key = Self::key(gpa, mode);
        self.slots[Self::slot(key)].insert(Block { key, stamp, insns })
    }

    /// Forgets every block.
    pub(crate) fn clear(&mut self) {
        self.slots.fill_with(|| None);
    }
}

//! Decoded blocks, cached by guest-physical address.
//!
//! # Theory of operation
//! A block is a run of instructions inside one page, up to the first that may not fall through. It is
//! found by the physical address of its first byte and the code mode, and is valid as long as its page's
//! stamp (see [`crate::ram`]) is what it was when the block was decoded.
//!
//! The instructions of all blocks lie one after the other in one arena, in the order in which they were
//! first executed, so that code that runs together lies together. A hash table with linear probing says where
//! a block starts; it is so large that it never fills. A block decoded again takes over its slot, and what
//! it had in the arena becomes waste. When the arena is full, everything is forgotten. The table is larger than
//! the host's nearer caches, so the blocks found last are also in a small direct-mapped one before it.
//!
//! An instruction that crosses into another page is a block of its own, in a small table: its validity
//! depends on both pages' stamps, and on which page is mapped behind the first.

use mmu::Gpa;

use crate::insn::Insn;
use crate::state::CodeMode;

/// The longest block, in instructions.
pub(crate) const BLOCK_LENGTH: usize = 48;

/// Instructions in the arena: 40 MiB.
const ARENA: usize = 1 << 20;
const SLOTS: usize = 1 << 19;
/// Blocks that the table holds at most, so that probing stays short.
const MOST_BLOCKS: usize = SLOTS / 2;

/// Where a block is in the arena.
#[derive(Clone, Copy)]
struct Slot {
    key: u64,
    stamp: u32,
    /// The index of the first instruction, and in the low bits the number of instructions.
    place: u32,
}

const LENGTH_BITS: u32 = 6;
const _: () = assert!(BLOCK_LENGTH < 1 << LENGTH_BITS && ARENA <= 1 << (32 - LENGTH_BITS));

/// Slots of the table of blocks found last: small enough for the host's second-level cache.
const RECENT: usize = 1 << 12;

/// A block in the arena. Valid until the cache is changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Place(u32);

/// No key: addresses are smaller.
const NO_KEY: u64 = u64::MAX;
const EMPTY: Slot = Slot { key: NO_KEY, stamp: 0, place: 0 };

/// Slots for instructions that cross a page.
const CROSSINGS: usize = 1 << 10;

/// An instruction that crosses a page.
#[derive(Clone, Copy)]
pub(crate) struct Crossing {
    /// Where it starts.
    pub(crate) gpa: Gpa,
    /// The mode it was decoded in.
    pub(crate) mode: CodeMode,
    /// The stamp of the page in which it starts.
    pub(crate) stamp: u32,
    /// The page in which it ends.
    pub(crate) second: Gpa,
    /// That page's stamp.
    pub(crate) second_stamp: u32,
    /// The instruction.
    pub(crate) insn: Insn,
}

/// The decoded blocks of one vCPU.
pub(crate) struct BlockCache {
    slots: Box<[Slot; SLOTS]>,
    recent: Box<[Slot; RECENT]>,
    blocks: usize,
    arena: Vec<Insn>,
    /// Direct-mapped by the page in which they start.
    crossings: Box<[Option<Crossing>]>,
}

impl BlockCache {
    pub(crate) fn new() -> Self {
        let Ok(slots) = vec![EMPTY; SLOTS].into_boxed_slice().try_into() else {
            unreachable!("the vector has exactly the array's length")
        };
        // The host gives memory for the arena as it is touched.
        let arena = Vec::with_capacity(ARENA);
        let recent = Box::new([EMPTY; RECENT]);
        Self { slots, recent, blocks: 0, arena, crossings: vec![None; CROSSINGS].into_boxed_slice() }
    }

    #[inline(always)]
    fn key(gpa: Gpa, mode: CodeMode) -> u64 {
        gpa.0 | (mode as u64) << 62
    }

    /// The slot of `key`, or the empty one where it belongs.
    #[inline(always)]
    fn probe(&self, key: u64) -> usize {
        let hash = key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - SLOTS.trailing_zeros());
        let mut n = hash as usize % SLOTS;
        while self.slots[n].key != key && self.slots[n].key != NO_KEY {
            n = (n + 1) % SLOTS;
        }
        n
    }

    /// The valid block at `gpa`, if there is one.
    #[inline(always)]
    pub(crate) fn find(&mut self, gpa: Gpa, mode: CodeMode, stamp: u32) -> Option<Place> {
        let key = Self::key(gpa, mode);
        let recent = &self.recent[Self::recent_slot(key)];
        if recent.key == key && recent.stamp == stamp {
            return Some(Place(recent.place));
        }
        self.find_in_table(key, stamp)
    }

    fn find_in_table(&mut self, key: u64, stamp: u32) -> Option<Place> {
        let slot = self.slots[self.probe(key)];
        if slot.key != key || slot.stamp != stamp {
            return None;
        }
        self.recent[Self::recent_slot(key)] = slot;
        Some(Place(slot.place))
    }

    #[inline(always)]
    fn recent_slot(key: u64) -> usize {
        (key ^ key >> 12) as usize % RECENT
    }

    /// The instructions of a block.
    #[inline(always)]
    pub(crate) fn insns(&self, place: Place) -> &[Insn] {
        let start = (place.0 >> LENGTH_BITS) as usize;
        let length = (place.0 & ((1 << LENGTH_BITS) - 1)) as usize;
        self.arena.get(start..start + length).unwrap_or_default()
    }

    /// Where the next block's instructions are to be put, up to [`BLOCK_LENGTH`] of them. What is put there and
    /// not kept by [`Self::keep`] is waste.
    pub(crate) fn arena(&mut self) -> &mut Vec<Insn> {
        if self.arena.len() + BLOCK_LENGTH > ARENA || self.blocks >= MOST_BLOCKS {
            self.clear();
        }
        &mut self.arena
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.slots.fill(EMPTY);
        self.recent.fill(EMPTY);
        self.blocks = 0;
        self.arena.clear();
        self.crossings.fill(None);
    }

    /// Makes the instructions in the arena from `start` on, at least one, a block.
    pub(crate) fn keep(&mut self, gpa: Gpa, mode: CodeMode, stamp: u32, start: usize) -> &[Insn] {
        let key = Self::key(gpa, mode);
        let insns = self.arena.get(start..).unwrap_or_default();
        let n = self.probe(key);
        self.blocks += usize::from(self.slots[n].key == NO_KEY);
        self.slots[n] = Slot { key, stamp, place: (start << LENGTH_BITS | insns.len()) as u32 };
        insns
    }
    /// The instruction that crosses a page from `gpa`, valid as far as the first page goes.
    pub(crate) fn crossing(&self, gpa: Gpa, mode: CodeMode, stamp: u32) -> Option<&Crossing> {
        let crossing = self.crossings[Self::crossing_slot(gpa)].as_ref();
        crossing.filter(|c| c.gpa == gpa && c.mode == mode && c.stamp == stamp)
    }

    /// Keeps an instruction that crosses a page.
    pub(crate) fn keep_crossing(&mut self, crossing: Crossing) -> &Insn {
        &self.crossings[Self::crossing_slot(crossing.gpa)].insert(crossing).insn
    }

    fn crossing_slot(gpa: Gpa) -> usize {
        (gpa.0 >> 12) as usize % CROSSINGS
    }
}

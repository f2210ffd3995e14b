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
//! The bytes that a block was decoded from are kept. A page may be written to, or a device may have written to it for all that
//! is known, and a block of it be what it was: a kernel patches one branch of a page, code and data share one, an interrupt
//! comes from a device that writes unseen. So before a block is decoded again its bytes are compared
//! ([`BlockCache::find_again`]), which costs a small part of that.
//!
//! An instruction that crosses into another page is a block of its own, in a small table: its validity
//! depends on both pages' stamps, and on which page is mapped behind the first.

use mmu::Gpa;

use crate::insn::{INSTRUCTION_LENGTH, Insn};
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

/// What the block in a slot was decoded from: which of the kept bytes.
#[derive(Clone, Copy, Default)]
struct Origin {
    start: u32,
    length: u32,
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
    /// What it was decoded from.
    pub(crate) bytes: [u8; INSTRUCTION_LENGTH],
    /// The instruction.
    pub(crate) insn: Insn,
}

/// The decoded blocks of one vCPU.
pub(crate) struct BlockCache {
    slots: Box<[Slot; SLOTS]>,
    recent: Box<[Slot; RECENT]>,
    blocks: usize,
    arena: Vec<Insn>,
    /// By slots. Apart from them, because it is seldom looked at.
    origins: Box<[Origin]>,
    bytes: Vec<u8>,
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
        Self {
            slots,
            recent,
            blocks: 0,
            arena,
            origins: vec![Origin::default(); SLOTS].into_boxed_slice(),
            bytes: Vec::new(),
            crossings: vec![None; CROSSINGS].into_boxed_slice(),
        }
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
        self.bytes.clear();
        self.crossings.fill(None);
    }

    /// Makes the instructions in the arena from `start` on, at least one, a block. Nothing but `bytes`, from the block's
    /// address on, has decided what they are.
    pub(crate) fn keep(
        &mut self,
        gpa: Gpa,
        mode: CodeMode,
        stamp: u32,
        start: usize,
        bytes: &[u8],
    ) -> &[Insn] {
        let key = Self::key(gpa, mode);
        let insns = self.arena.get(start..).unwrap_or_default();
        let n = self.probe(key);
        self.blocks += usize::from(self.slots[n].key == NO_KEY);
        self.slots[n] = Slot { key, stamp, place: (start << LENGTH_BITS | insns.len()) as u32 };
        // Both fit: the arena is full long before so many bytes are kept.
        self.origins[n] = Origin { start: self.bytes.len() as u32, length: bytes.len() as u32 };
        self.bytes.extend_from_slice(bytes);
        insns
    }

    /// The block that was decoded at `gpa` when its page had another stamp, if it was decoded from what `bytes` begins with.
    /// It is valid by `stamp` from now on.
    pub(crate) fn find_again(&mut self, gpa: Gpa, mode: CodeMode, stamp: u32, bytes: &[u8]) -> Option<Place> {
        let key = Self::key(gpa, mode);
        let n = self.probe(key);
        let Origin { start, length } = self.origins[n];
        let from = self.bytes.get(start as usize..)?.get(..length as usize)?;
        if self.slots[n].key != key || !bytes.starts_with(from) {
            return None;
        }
        self.slots[n].stamp = stamp;
        Some(Place(self.slots[n].place))
    }

    /// The instruction that crosses a page from `gpa`, valid as far as the first page goes.
    pub(crate) fn crossing(&self, gpa: Gpa, mode: CodeMode, stamp: u32) -> Option<&Crossing> {
        let crossing = self.crossings[Self::crossing_slot(gpa)].as_ref();
        crossing.filter(|c| c.gpa == gpa && c.mode == mode && c.stamp == stamp)
    }

    /// The instruction at `gpa` if it was decoded from these bytes before, whatever the stamps were.
    pub(crate) fn crossing_again(
        &self,
        gpa: Gpa,
        mode: CodeMode,
        bytes: &[u8; INSTRUCTION_LENGTH],
    ) -> Option<Insn> {
        let crossing = self.crossings[Self::crossing_slot(gpa)].as_ref();
        crossing.filter(|c| c.gpa == gpa && c.mode == mode && c.bytes == *bytes).map(|c| c.insn)
    }

    /// Keeps an instruction that crosses a page.
    pub(crate) fn keep_crossing(&mut self, crossing: Crossing) -> &Insn {
        &self.crossings[Self::crossing_slot(crossing.gpa)].insert(crossing).insn
    }

    fn crossing_slot(gpa: Gpa) -> usize {
        (gpa.0 >> 12) as usize % CROSSINGS
    }
}

//! Every combination of entry bits, accesses and control bits at every level, for linear addresses.
//!
//! All bits at once would be too many to walk, but they fall into groups that do not touch each other in any
//! format: what makes an entry present, a page, or malformed; what the rights, accessed and dirty are; and the
//! protection keys. Each group is enumerated in full. The random tables (`random`) mix them.

use mmu::testing::FlatMemory;
use mmu::{
    Access, AccessKind, Gpa, PageTableMemory, PageWalk, PagingFeatures, PagingMode, PagingState, Privilege,
    cr0, cr4, efer,
};

use crate::model::compare;

const P: u64 = 1 << 0;
const RW: u64 = 1 << 1;
const US: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const G: u64 = 1 << 8;
const XD: u64 = 1 << 63;

/// The subsets of the bits of `mask`.
pub(crate) fn subsets(mask: u64) -> impl Iterator<Item = u64> {
    let mut next = Some(0_u64);
    std::iter::from_fn(move || {
        let this = next?;
        let following = this.wrapping_sub(mask) & mask;
        next = (following != 0).then_some(following);
        Some(this)
    })
}

/// All accesses.
pub(crate) fn accesses() -> Vec<Access> {
    let mut all = Vec::new();
    for kind in [AccessKind::Read, AccessKind::Write, AccessKind::Fetch] {
        for privilege in [Privilege::User, Privilege::Supervisor, Privilege::Implicit] {
            for ac in [false, true] {
                all.push(Access { kind, privilege, ac });
            }
        }
    }
    all
}

/// An entry with the bits `bits`, cut to what entries of `mode` have.
fn cut(mode: PagingMode, bits: u64) -> u64 {
    if mode == PagingMode::Bits32 { bits & 0xffff_ffff } else { bits }
}

/// One chain of tables from the root to a page, twice: for the crate and for the model.
struct Chain {
    state: PagingState,
    memory: FlatMemory,
    twin: FlatMemory,
    /// The place of the entry of each level, level 1 first.
    places: Vec<u64>,
    bytes: u64,
    gva: u64,
}

impl Chain {
    /// The levels that are in memory.
    fn levels(mode: PagingMode) -> u64 {
        match mode {
            PagingMode::Bits32 | PagingMode::Pae => 2,
            PagingMode::Level4 => 4,
            _ => 5,
        }
    }

    /// The table of level `n` is page `n`. The index differs by level, so that none is mistaken for another.
    fn new(mode: PagingMode) -> Self {
        let levels = Self::levels(mode);
        let (bytes, index_bits) = if mode == PagingMode::Bits32 { (4, 10) } else { (8, 9) };
        let mut gva = 0xabc;
        let mut places = Vec::new();
        for level in 1..=levels {
            let index = 3 + 5 * level;
            gva |= index << (12 + index_bits * (level - 1));
            places.push((level << 12) + index * bytes);
        }
        let fixed = match mode {
            PagingMode::Bits32 => 0,
            PagingMode::Level5 => cr4::PAE | cr4::LA57,
            _ => cr4::PAE,
        };
        let mut pdptrs = [0; 4];
        pdptrs[(gva >> 30 & 3) as usize] = 2 << 12 | P;
        let long = matches!(mode, PagingMode::Level4 | PagingMode::Level5);
        let state = PagingState {
            cr0: cr0::PG,
            cr3: levels << 12,
            cr4: fixed,
            efer: if long { efer::LMA } else { 0 },
            maxphyaddr: 40,
            pdptrs,
            ..PagingState::default()
        };
        let memory = FlatMemory::new(16 << 12);
        let twin = memory.clone();
        let mut chain = Self { state, memory, twin, places, bytes, gva };
        for level in 1..=levels {
            chain.set(level, chain.lead(level));
        }
        chain
    }

    /// An entry of `level` that leads on and allows everything.
    fn lead(&self, level: u64) -> u64 {
        P | RW | US | if level == 1 { 9 << 12 } else { (level - 1) << 12 }
    }

    fn set(&mut self, level: u64, entry: u64) {
        let at = self.places[(level - 1) as usize];
        for memory in [&mut self.memory, &mut self.twin] {
            if self.bytes == 4 {
                memory.set_u32(at, entry as u32);
            } else {
                memory.set_u64(at, entry);
            }
        }
    }

    /// Walks by both and compares what they return and what they leave in the entries.
    #[track_caller]
    fn compare(&mut self, walk: &PageWalk, access: Access) -> bool {
        let found =
            compare::linear_walk(walk, &self.state, &self.memory, &mut self.twin, self.gva, access).is_some();
        for &at in &self.places {
            let at = Gpa(at & !7);
            let (ours, model) = (self.memory.read_u64(at), self.twin.read_u64(at));
            assert_eq!(ours, model, "entry at {at} after {access:?}, {:x?}", self.state);
        }
        found
    }
}

/// Present, page size, and every bit that is part of an address or reserved somewhere.
fn shapes(mode: PagingMode) {
    let mut chain = Chain::new(mode);
    let base = chain.state;
    let accesses = [
        Access::new(AccessKind::Read, Privilege::User),
        Access::new(AccessKind::Write, Privilege::Supervisor),
        Access::new(AccessKind::Fetch, Privilege::User),
    ];
    let (mut found, mut walked) = (0_u64, 0_u64);
    for maxphyaddr in [32, 36, 40, 52] {
        for controls in subsets(cr4::PSE | cr4::PGE) {
            // PSE means something in 32-bit paging only, and so on: see that the others ignore it.
            if controls & cr4::PGE != 0 && maxphyaddr != 40 {
                continue;
            }
            for nxe in [0, efer::NXE] {
                for features in [PagingFeatures::empty(), PagingFeatures::GIB_PAGES | PagingFeatures::PSE36] {
                    chain.state = PagingState {
                        cr4: base.cr4 | controls,
                        efer: base.efer | nxe,
                        maxphyaddr,
                        features,
                        ..base
                    };
                    if mode != PagingMode::Bits32 && controls & cr4::PSE != 0 && nxe != 0 {
                        continue;
                    }
                    let walk = PageWalk::new(&chain.state);
                    let width_bits = 1 << (maxphyaddr - 1) | 1_u64 << maxphyaddr;
                    let mask = P | A | PS | width_bits | cut(mode, XD | 1 << 62 | 1 << 52 | 1 << 51);
                    let offsets =
                        1 << 12 | 1 << 13 | 1 << 17 | 1 << 20 | 1 << 21 | 1 << 22 | 1 << 29 | 1 << 30;
                    for level in 1..=Chain::levels(mode) {
                        // Bits below a large page's address matter only where there are large pages.
                        let offsets = if level <= 3 { offsets } else { 1 << 13 | 1 << 30 };
                        for bits in subsets(cut(mode, mask | offsets)) {
                            let entry = RW | US | bits;
                            for access in accesses {
                                chain.set(level, entry);
                                found += u64::from(chain.compare(&walk, access));
                                walked += 1;
                            }
                        }
                        for level in 1..=Chain::levels(mode) {
                            chain.set(level, chain.lead(level));
                        }
                    }
                }
            }
        }
    }
    println!("{mode:?} shapes: {found} of {walked} found");
    assert!(found > 0 && found < walked);
}

/// Rights, accessed, dirty and global, in an entry and in one above it, for every access.
fn rights(mode: PagingMode) {
    let mut chain = Chain::new(mode);
    let base = chain.state;
    let accesses = accesses();
    let (mut found, mut walked) = (0_u64, 0_u64);
    for controls in subsets(cr4::SMEP | cr4::SMAP | cr4::PGE) {
        for write_protect in [0, cr0::WP] {
            for nxe in [0, efer::NXE] {
                chain.state = PagingState {
                    cr0: base.cr0 | write_protect,
                    cr4: base.cr4 | cr4::PSE | controls,
                    efer: base.efer | nxe,
                    features: PagingFeatures::all(),
                    ..base
                };
                let walk = PageWalk::new(&chain.state);
                for level in 1..=Chain::levels(mode).min(3) {
                    // A page of the level's size at 0, or at level 1 of 4 KiB.
                    let size = if level == 1 { 0 } else { PS };
                    let above = (level + 1).min(Chain::levels(mode));
                    for upper in subsets(cut(mode, P | RW | US | A | XD)) {
                        if upper & P == 0 && upper & A != 0 {
                            continue;
                        }
                        for lower in subsets(cut(mode, P | RW | US | A | D | G | XD)) {
                            for &access in &accesses {
                                if above != level {
                                    chain.set(above, level << 12 | upper);
                                } else if upper != 0 {
                                    continue;
                                }
                                chain.set(level, size | lower);
                                found += u64::from(chain.compare(&walk, access));
                                walked += 1;
                            }
                        }
                    }
                    for level in 1..=Chain::levels(mode) {
                        chain.set(level, chain.lead(level));
                    }
                }
            }
        }
    }
    println!("{mode:?} rights: {found} of {walked} found");
    assert!(found > 0 && found < walked);
}

/// Keys: each key with each setting of its bits in PKRU and IA32_PKRS, and all other keys the opposite.
fn keys(mode: PagingMode) {
    let mut chain = Chain::new(mode);
    let base = chain.state;
    let accesses = accesses();
    let (mut found, mut walked) = (0_u64, 0_u64);
    for controls in subsets(cr4::PKE | cr4::PKS | cr4::SMAP) {
        for write_protect in [0, cr0::WP] {
            for user_bits in 0..4_u32 {
                for supervisor_bits in 0..4_u32 {
                    for key in 0..16_u64 {
                        let register = |bits: u32| {
                            let others = 0x5555_5555 * (bits ^ 3);
                            others & !(3 << (2 * key)) | bits << (2 * key)
                        };
                        chain.state = PagingState {
                            cr0: base.cr0 | write_protect,
                            cr4: base.cr4 | controls,
                            pkru: register(user_bits),
                            pkrs: register(supervisor_bits),
                            features: PagingFeatures::all(),
                            ..base
                        };
                        let mut walk = PageWalk::new(&PagingState { pkru: 0, pkrs: 0, ..chain.state });
                        walk.set_keys(chain.state.pkru, chain.state.pkrs);
                        let level = 1 + key % 3;
                        let size = if level == 1 { 0 } else { PS };
                        for upper in [P | RW, P | RW | US] {
                            for lower in subsets(RW | US) {
                                for &access in &accesses {
                                    chain.set(level + 1, level << 12 | upper);
                                    chain.set(level, P | size | lower | key << 59);
                                    found += u64::from(chain.compare(&walk, access));
                                    walked += 1;
                                }
                            }
                        }
                        for level in 1..=Chain::levels(mode) {
                            chain.set(level, chain.lead(level));
                        }
                    }
                }
            }
        }
    }
    println!("{mode:?} keys: {found} of {walked} found");
    assert!(found > 0 && found < walked);
}

#[test]
fn bits32_shapes() {
    shapes(PagingMode::Bits32);
}

#[test]
fn pae_shapes() {
    shapes(PagingMode::Pae);
}

#[test]
fn level4_shapes() {
    shapes(PagingMode::Level4);
}

#[test]
fn level5_shapes() {
    shapes(PagingMode::Level5);
}

#[test]
fn bits32_rights() {
    rights(PagingMode::Bits32);
}

#[test]
fn pae_rights() {
    rights(PagingMode::Pae);
}

#[test]
fn level4_rights() {
    rights(PagingMode::Level4);
}

#[test]
fn level5_rights() {
    rights(PagingMode::Level5);
}

#[test]
fn level4_keys() {
    keys(PagingMode::Level4);
}

#[test]
fn level5_keys() {
    keys(PagingMode::Level5);
}

/// The modes without keys must not look at PKRU, whatever CR4 says.
#[test]
fn other_modes_have_no_keys() {
    for mode in [PagingMode::Bits32, PagingMode::Pae] {
        let mut chain = Chain::new(mode);
        chain.state.cr4 |= cr4::PKE | cr4::PKS;
        chain.state.pkru = u32::MAX;
        chain.state.pkrs = u32::MAX;
        let walk = PageWalk::new(&chain.state);
        for access in accesses() {
            assert!(chain.compare(&walk, access));
        }
    }
}

/// One walk answers for all accesses: what `permits` says of a page found by a read is what a walk would.
#[test]
fn a_translation_answers_for_every_access() {
    let mut chain = Chain::new(PagingMode::Level4);
    let base = chain.state;
    for controls in subsets(cr4::SMEP | cr4::SMAP | cr4::PKE | cr4::PKS) {
        for write_protect in [0, cr0::WP] {
            for lower in subsets(RW | US | XD) {
                for key_bits in 0..4 {
                    chain.state = PagingState {
                        cr0: base.cr0 | write_protect,
                        cr4: base.cr4 | controls,
                        efer: base.efer | efer::NXE,
                        pkru: key_bits << 14,
                        pkrs: (key_bits ^ 1) << 14,
                        ..base
                    };
                    let walk = PageWalk::new(&chain.state);
                    let gva = mmu::Gva(chain.gva);
                    chain.set(1, P | lower | 9 << 12 | 7 << 59);
                    let found = accesses().into_iter().find_map(|a| walk.probe(&chain.memory, gva, a).ok());
                    for access in accesses() {
                        let walked = walk.probe(&chain.memory, gva, access);
                        let permitted = found.is_some_and(|t| walk.permits(&t, access));
                        assert_eq!(walked.is_ok(), permitted, "{access:?} {:x?}", chain.state);
                    }
                }
            }
        }
    }
}

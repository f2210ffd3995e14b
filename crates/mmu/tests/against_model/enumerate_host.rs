//! Every combination of entry bits at every level of EPT and NPT, under a guest with two levels of its own.

use mmu::testing::{FlatMemory, Host};
use mmu::{
    Access, AccessKind, EptFeatures, Gpa, NestedWalk, PageTableMemory, PageWalk, PagingFeatures, PagingState,
    Privilege, cr0, cr4, efer,
};

use crate::enumerate::subsets;
use crate::model::compare;

/// Guest-physical pages of the guest's directory, its table, and the page that it maps.
const DIRECTORY: u64 = 0x10;
const TABLE: u64 = 0x11;
const PAGE: u64 = 0x12;

/// The guest's address: entry 1 of the directory, entry 2 of the table.
const GVA: u64 = 1 << 22 | 2 << 12 | 0x123;

/// A guest in 32-bit paging, all of it mapped one to one by a chain of the host's tables at page `level`.
struct Nest {
    host: Host,
    memory: FlatMemory,
    twin: FlatMemory,
    levels: u64,
    /// What an entry of the host's needs to lead on and allow everything.
    lead: u64,
    /// Bits beside, for an entry of level 1.
    leaf: u64,
    state: PagingState,
}

impl Nest {
    fn new(host: Host, levels: u64, lead: u64, leaf: u64) -> Self {
        let state =
            PagingState { cr0: cr0::PG, cr3: DIRECTORY << 12, maxphyaddr: 40, ..PagingState::default() };
        let memory = FlatMemory::new(0x20 << 12);
        let twin = memory.clone();
        let mut nest = Self { host, memory, twin, levels, lead, leaf, state };
        for page in 0..0x20 {
            nest.set((1 << 12) + page * 8, page << 12 | lead | leaf);
        }
        nest.reset();
        nest
    }

    fn set(&mut self, at: u64, value: u64) {
        self.memory.set_u64(at, value);
        self.twin.set_u64(at, value);
    }

    /// The place of the host's entry of `level` for the guest's page `page`.
    fn place(level: u64, page: u64) -> u64 {
        (level << 12) + if level == 1 { page * 8 } else { 0 }
    }

    /// Puts everything that a walk changes back as it was.
    fn reset(&mut self) {
        for level in 2..=self.levels {
            self.set(Self::place(level, 0), (level - 1) << 12 | self.lead);
        }
        for page in [DIRECTORY, TABLE, PAGE] {
            self.set(Self::place(1, page), page << 12 | self.lead | self.leaf);
        }
        self.guest(true);
    }

    /// Writes the guest's entries, accessed and dirty clear.
    fn guest(&mut self, user: bool) {
        let rights = if user { 0b111 } else { 0b011 };
        for memory in [&mut self.memory, &mut self.twin] {
            memory.set_u32((DIRECTORY << 12) + 4, (TABLE << 12 | rights) as u32);
            memory.set_u32((TABLE << 12) + 8, (PAGE << 12 | rights) as u32);
        }
    }

    #[track_caller]
    fn compare(&mut self, walk: &NestedWalk, kind: AccessKind) -> bool {
        let access = Access::new(kind, Privilege::Supervisor);
        let host = self.host;
        let found = compare::nested_walk(walk, &self.state, host, &self.memory, &mut self.twin, GVA, access);
        let guest = [(DIRECTORY << 12), (TABLE << 12) + 8];
        let chain = (2..=self.levels).map(|level| Self::place(level, 0));
        let pages = [DIRECTORY, TABLE, PAGE].map(|page| Self::place(1, page));
        for at in guest.into_iter().chain(chain).chain(pages) {
            let (ours, model) = (self.memory.read_u64(Gpa(at)), self.twin.read_u64(Gpa(at)));
            assert_eq!(ours, model, "entry at {at:#x} after {kind:?}, {host:x?}");
        }
        found
    }

    /// Tries `entries` as the host's entry at `level` (of the page that `page` says), with `upper` above it.
    fn try_all(
        &mut self,
        places: &[(u64, u64)],
        upper: &[u64],
        lower: u64,
        fixed: u64,
        kinds: &[AccessKind],
    ) -> (u64, u64) {
        let Some(host) = self.host.walk() else { panic!("{:x?} is not valid", self.host) };
        let (mut found, mut walked) = (0, 0);
        for user in [false, true] {
            for &(level, page) in places {
                for &above in upper {
                    for bits in subsets(lower) {
                        for &kind in kinds {
                            self.guest(user);
                            let walk = NestedWalk { guest: PageWalk::new(&self.state), host };
                            if level < self.levels {
                                let entry = level << 12 | above;
                                self.set(Self::place(level + 1, page), entry);
                            } else if above != upper[0] {
                                continue;
                            }
                            // A large page at 0 maps one to one, too.
                            let frame = if level == 1 { page << 12 } else { (level - 1) << 12 };
                            let frame = if bits & 0x80 != 0 && level > 1 { 0 } else { frame };
                            self.set(Self::place(level, page), frame ^ bits | fixed);
                            found += u64::from(self.compare(&walk, kind));
                            walked += 1;
                        }
                    }
                }
                self.reset();
            }
        }
        (found, walked)
    }
}

const KINDS: [AccessKind; 3] = [AccessKind::Read, AccessKind::Write, AccessKind::Fetch];

/// Level and page of the entries to vary: of the final page, of a table's page, and all above.
fn places(levels: u64) -> Vec<(u64, u64)> {
    let mut places = vec![(1, PAGE), (1, TABLE)];
    places.extend((2..=levels).map(|level| (level, 0)));
    places
}

fn ept(levels: u64, accessed_dirty: bool, features: EptFeatures, maxphyaddr: u8) -> Nest {
    let eptp = levels << 12 | (levels - 1) << 3 | 6 | if accessed_dirty { 1 << 6 } else { 0 };
    // R, W, X, and XU; write-back.
    Nest::new(Host::Ept { eptp, features, maxphyaddr }, levels, 0x407, 6 << 3)
}

/// R, W, X, XU, accessed, dirty, page size, memory type: all, under all rights of the entry above.
fn ept_rights(levels: u64) {
    let (mut found, mut walked) = (0, 0);
    for features in [0, 0b1000, 0b0111, 0b1111].map(EptFeatures::from_bits_truncate) {
        for accessed_dirty in [false, true] {
            let mut nest = ept(levels, accessed_dirty, features, 40);
            let upper = [0x407, 0x403, 0x007, 0x005, 0x001, 0x404, 0x002, 0x000, 0x400, 0x507];
            let (f, w) = nest.try_all(&places(levels), &upper, 0x787, 0, &KINDS);
            found += f;
            walked += w;
            // The memory type, without regard to what is above.
            let (f, w) = nest.try_all(&places(levels), &[0x407], 0x4ff, 0, &KINDS[..2]);
            found += f;
            walked += w;
        }
    }
    println!("EPT of {levels} levels, rights: {found} of {walked} found");
    assert!(found > 0 && found < walked);
}

/// Every bit that is part of an address or reserved somewhere.
fn ept_shapes(levels: u64) {
    let (mut found, mut walked) = (0, 0);
    for features in [0, 0b0010, 0b0100, 0b0110].map(EptFeatures::from_bits_truncate) {
        for maxphyaddr in [36, 40, 52] {
            let mut nest = ept(levels, true, features, maxphyaddr);
            let bits =
                1 | 1 << 3 | 1 << 6 | 1 << 7 | 1 << 11 | 1 << 12 | 1 << 20 | 1 << 21 | 1 << 29 | 1 << 51;
            let bits = bits | 1 << 52 | 1 << 63 | 1 << (maxphyaddr - 1) | 1_u64 << maxphyaddr;
            let (f, w) = nest.try_all(&places(levels), &[0x407], bits & !1, 0x407, &KINDS[..1]);
            found += f;
            walked += w;
        }
    }
    println!("EPT of {levels} levels, shapes: {found} of {walked} found");
    assert!(found > 0 && found < walked);
}

fn npt(levels: u64, nxe: bool, gib_pages: bool, maxphyaddr: u8) -> Nest {
    let host = PagingState {
        cr3: levels << 12,
        // The host's SMEP, SMAP and keys do not reach nested tables.
        cr4: cr4::PAE | cr4::SMEP | cr4::SMAP | cr4::PKE | if levels == 5 { cr4::LA57 } else { 0 },
        efer: efer::LMA | if nxe { efer::NXE } else { 0 },
        pkru: u32::MAX,
        maxphyaddr,
        features: if gib_pages { PagingFeatures::GIB_PAGES } else { PagingFeatures::empty() },
        ..PagingState::default()
    };
    Nest::new(Host::Npt(host), levels, 0b111, 0)
}

fn npt_all(levels: u64) {
    let (mut found, mut walked) = (0, 0);
    for nxe in [false, true] {
        for gib_pages in [false, true] {
            let mut nest = npt(levels, nxe, gib_pages, 40);
            let upper = subsets(0b10_0111 | 1 << 63).collect::<Vec<_>>();
            let (f, w) = nest.try_all(&places(levels), &upper, 0xe7 | 1 << 63, 0, &KINDS);
            found += f;
            walked += w;
            let bits = 1 << 7 | 1 << 8 | 1 << 12 | 1 << 13 | 1 << 20 | 1 << 21 | 1 << 29 | 1 << 39 | 1 << 40;
            let bits = bits | 1 << 51 | 1 << 52 | 1 << 59 | 1 << 63;
            let (f, w) = nest.try_all(&places(levels), &[0b111], bits, 0b111, &KINDS[1..2]);
            found += f;
            walked += w;
        }
    }
    println!("NPT of {levels} levels: {found} of {walked} found");
    assert!(found > 0 && found < walked);
}

#[test]
fn ept_of_4_levels() {
    ept_rights(4);
    ept_shapes(4);
}

#[test]
fn ept_of_5_levels() {
    ept_rights(5);
    ept_shapes(5);
}

#[test]
fn npt_of_4_levels() {
    npt_all(4);
}

#[test]
fn npt_of_5_levels() {
    npt_all(5);
}

/// What the tables cannot reach is not mapped, however the lower bits look.
#[test]
fn addresses_above_the_tables() {
    for levels in [4, 5] {
        let top = if levels == 4 { 48 } else { 57 };
        for nest in [ept(levels, false, EptFeatures::all(), 52), npt(levels, true, true, 52)] {
            let Some(host) = nest.host.walk() else { panic!("not valid") };
            let walk = NestedWalk { guest: PageWalk::new(&nest.state), host };
            let access = Access::new(AccessKind::Read, Privilege::User);
            assert!(walk.translate_gpa(&nest.memory, Gpa(PAGE << 12), access).is_ok());
            let fault = walk.translate_gpa(&nest.memory, Gpa(1 << top | PAGE << 12), access);
            let kind = fault.map_err(|f| (f.gva, f.kind));
            let expected = match nest.host {
                Host::Ept { .. } => mmu::HostFaultKind::EptViolation { qualification: 1 },
                Host::Npt(_) => mmu::HostFaultKind::NestedPageFault { exit_info: 1 << 32 | 4 },
            };
            assert_eq!(kind, Err((None, expected)));
        }
    }
}

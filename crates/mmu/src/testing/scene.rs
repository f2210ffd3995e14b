//! Whole scenes: registers, and memory full of page tables that lead somewhere, mostly.

use crate::testing::{Choices, FlatMemory};
use crate::{
    Access, AccessKind, EntryFlags, EptFeatures, Gpa, NestedWalk, PageFormat, PageRights, PageWalk,
    PagingFeatures, PagingMode, PagingState, Privilege, cr0, cr4, efer,
};

/// Pages of memory in a scene.
const PAGES: u64 = 64;
/// So many of them, at the start, hold the host's tables.
const HOST_PAGES: u64 = 8;

/// Any access.
pub fn any_access(choices: &mut Choices<'_>) -> Access {
    Access {
        kind: choices.one_of(&[AccessKind::Read, AccessKind::Write, AccessKind::Fetch]),
        privilege: choices.one_of(&[Privilege::User, Privilege::Supervisor, Privilege::Implicit]),
        ac: choices.once_in(2),
    }
}

/// Any registers, even ones that no processor would take.
pub fn any_state(choices: &mut Choices<'_>) -> PagingState {
    PagingState {
        cr0: choices.word() | choices.mostly(cr0::PG, 8),
        cr3: choices.word() & if choices.once_in(4) { u64::MAX } else { 0x7fff },
        cr4: choices.word(),
        efer: choices.word(),
        pkru: choices.word() as u32,
        pkrs: choices.word() as u32,
        maxphyaddr: choices.word() as u8,
        pdptrs: [choices.word(), choices.word() & 0x7fff, choices.word() | 1, choices.word() & 0x7fff | 1],
        features: PagingFeatures::from_bits_truncate(choices.word() as u32),
    }
}

/// The host's half of a nested scene.
#[derive(Clone, Copy, Debug)]
pub enum Host {
    /// Extended page tables.
    Ept {
        /// The EPT pointer.
        eptp: u64,
        /// What the processor has.
        features: EptFeatures,
        /// The width of physical addresses.
        maxphyaddr: u8,
    },
    /// Nested page tables, in the format that these registers say.
    Npt(PagingState),
}

impl Host {
    /// Any host, its tables at any place.
    pub fn any(choices: &mut Choices<'_>) -> Self {
        let maxphyaddr = choices.one_of(&[36, 39, 46, 52]);
        if choices.once_in(2) {
            let eptp = choices.word() & 0x7040 | choices.one_of(&[3 << 3, 4 << 3, 7 << 3]) | 6;
            let features = EptFeatures::from_bits_truncate(choices.word() as u32);
            Self::Ept { eptp, features, maxphyaddr }
        } else {
            Self::Npt(PagingState { maxphyaddr, ..any_state(choices) })
        }
    }

    /// The host's walk. `None` if the EPT pointer is not valid.
    pub fn walk(&self) -> Option<PageWalk> {
        match *self {
            Self::Ept { eptp, features, maxphyaddr } => PageWalk::ept(eptp, features, maxphyaddr).ok(),
            Self::Npt(state) => Some(PageWalk::npt(&state)),
        }
    }
}

/// Registers and memory to translate addresses with.
#[derive(Clone, Debug)]
pub struct Scene {
    /// The guest's registers.
    pub state: PagingState,
    /// The host's tables, if the scene is nested.
    pub host: Option<Host>,
    /// The memory that all tables are in.
    pub memory: FlatMemory,
}

impl Scene {
    /// A guest that uses `mode`, which is not one of a host.
    pub fn new(choices: &mut Choices<'_>, mode: PagingMode) -> Self {
        let state = state_of(choices, mode);
        let mut scene = Self { state, host: None, memory: FlatMemory::new((PAGES << 12) as usize) };
        scene.fill(choices, 0);
        scene
    }

    /// The same inside a host with EPT or NPT.
    pub fn nested(choices: &mut Choices<'_>, mode: PagingMode) -> Self {
        let mut scene = Self::new(choices, mode);
        let maxphyaddr = choices.one_of(&[36, 40, 52]);
        let five = choices.once_in(2);
        let host = if choices.once_in(2) {
            let features = EptFeatures::from_bits_truncate(choices.word() as u32);
            let eptp = choices.maybe(1 << 6) | if five { 4 << 3 } else { 3 << 3 } | 6;
            Host::Ept { eptp, features, maxphyaddr }
        } else {
            let la57 = if five { cr4::LA57 } else { 0 };
            let state = state_of(choices, PagingMode::Level4);
            Host::Npt(PagingState { cr3: 0, cr4: state.cr4 | la57, maxphyaddr, ..state })
        };
        scene.host = Some(host);
        if let Some(walk) = host.walk() {
            scene.fill_host(choices, walk.format());
        }
        scene
    }

    /// The guest's walk.
    pub fn walk(&self) -> PageWalk {
        PageWalk::new(&self.state)
    }

    /// The nested walk, if the scene has a host.
    pub fn nested_walk(&self) -> Option<NestedWalk> {
        Some(NestedWalk { guest: self.walk(), host: self.host?.walk()? })
    }

    /// An address of the guest's, canonical as a rule.
    pub fn any_address(&self, choices: &mut Choices<'_>) -> u64 {
        let address = choices.word();
        match PageFormat::new(&self.state).mode() {
            // Without paging, only what the memory has is worth looking at.
            PagingMode::None => address % (PAGES << 12),
            PagingMode::Level4 => (address << 16).cast_signed().wrapping_shr(16).cast_unsigned(),
            PagingMode::Level5 => (address << 7).cast_signed().wrapping_shr(7).cast_unsigned(),
            _ => address & 0xffff_ffff,
        }
    }

    /// Fills all memory from page `first` with entries of the guest's format that mostly lead on.
    fn fill(&mut self, choices: &mut Choices<'_>, first: u64) {
        let format = PageFormat::new(&self.state);
        for address in (first << 12..PAGES << 12).step_by(usize::from(format.entry_bytes())) {
            let entry = guest_entry(choices, &format);
            if format.entry_bytes() == 4 {
                self.memory.set_u32(address, entry as u32);
            } else {
                self.memory.set_u64(address, entry);
            }
        }
    }

    /// Makes the host's tables: every page of the scene is mapped to some page, then a little is spoilt.
    fn fill_host(&mut self, choices: &mut Choices<'_>, format: &PageFormat) {
        for address in (0..HOST_PAGES << 12).step_by(8) {
            self.memory.set_u64(address, 0);
        }
        let mut table = 0;
        for level in (2..=format.levels()).rev() {
            let next = Gpa(table + 0x1000);
            let entry = format.make_table(next, level, PageRights::all()).unwrap_or(0);
            self.memory.set_u64(table, entry | choices.maybe(format.accessed_bit()));
            table = next.0;
        }
        for page in 0..PAGES {
            let frame = Gpa((HOST_PAGES + choices.below(PAGES - HOST_PAGES)) << 12);
            let lost = if choices.once_in(16) { choices.word() as u8 } else { 0 };
            let rights = PageRights::from_bits_truncate(!lost);
            let flags = EntryFlags::from_bits_truncate(choices.word() as u8 & 3);
            let entry = format.make_leaf(frame, 1, rights, flags).unwrap_or(0);
            self.memory.set_u64(table + page * 8, entry);
        }
        if choices.once_in(4)
            && let Some(entry) = format.make_leaf(Gpa(0), 2, PageRights::all(), EntryFlags::empty())
        {
            self.memory.set_u64(table - 0x1000, entry);
        }
        for _ in 0..choices.below(4) {
            let level = choices.below(u64::from(format.levels()));
            let bit = 1 << choices.below(64);
            let at = level << 12;
            let entry = crate::PageTableMemory::read_u64(&self.memory, Gpa(at)).unwrap_or(0);
            self.memory.set_u64(at, entry ^ bit);
        }
    }
}

/// Registers that make the processor use `mode`, everything else by choice.
fn state_of(choices: &mut Choices<'_>, mode: PagingMode) -> PagingState {
    let free = cr4::PSE | cr4::PGE | cr4::SMEP | cr4::SMAP | cr4::PKE | cr4::PKS;
    let (paging, fixed, long) = match mode {
        PagingMode::None => (0, 0, 0),
        PagingMode::Bits32 => (cr0::PG, 0, 0),
        PagingMode::Pae => (cr0::PG, cr4::PAE, 0),
        PagingMode::Level5 => (cr0::PG, cr4::PAE | cr4::LA57, efer::LMA),
        _ => (cr0::PG, cr4::PAE, efer::LMA),
    };
    let mut pdptrs = [0; 4];
    for pointer in &mut pdptrs {
        *pointer = choices.below(PAGES) << 12 | choices.mostly(1, 8);
    }
    PagingState {
        cr0: paging | choices.maybe(cr0::WP),
        cr3: choices.below(PAGES) << 12 | choices.word() & 0x18,
        cr4: choices.word() & free | fixed,
        efer: long | choices.mostly(efer::NXE, 4),
        pkru: choices.word() as u32 & choices.word() as u32,
        pkrs: choices.word() as u32 & choices.word() as u32,
        maxphyaddr: choices.one_of(&[32, 36, 40, 46, 52]),
        pdptrs,
        features: PagingFeatures::from_bits_truncate(choices.word() as u32),
    }
}

/// An entry of the guest's: seldom missing or nonsense, else one that leads to a page of the scene.
fn guest_entry(choices: &mut Choices<'_>, format: &PageFormat) -> u64 {
    match choices.below(32) {
        0 => return choices.word() & !1,
        1 => return choices.word(),
        _ => {}
    }
    let dice = choices.word();
    // Each bit of `mostly` is set in seven of eight.
    let mostly = dice | dice >> 16 | dice >> 32;
    let seldom = dice & dice >> 16 & dice >> 32;
    let mut entry = 1 | mostly & 0b110 | dice & 0x160 | (seldom & 1) << 63;
    entry |= choices.below(PAGES) << 12;
    if seldom & 2 != 0 {
        // A large page, half of them placed as they must be.
        entry |= 0x80;
        if dice & 1 != 0 {
            entry &= !0x3fff_f000;
        }
    }
    if format.protection_keys() {
        entry |= dice & 0xf << 59;
    }
    if !format.no_execute() && dice & 2 != 0 {
        entry &= !(1 << 63);
    }
    entry
}

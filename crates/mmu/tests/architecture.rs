//! Single facts of the architecture that the comparison with the model takes for granted or leaves out.

use mmu::testing::FlatMemory;
use mmu::{
    Access, AccessKind, EptFeatures, Gpa, Gva, HostFaultKind, HostStage, NestedFault, NestedPdptrFault,
    NestedWalk, PageRights, PageSize, PageTableMemory, PageWalk, PagingFeatures, PagingMode, PagingState,
    Privilege, cr0, cr4, efer, is_canonical, load_pdptrs,
};

const READ: Access = Access::new(AccessKind::Read, Privilege::Supervisor);
const WRITE: Access = Access::new(AccessKind::Write, Privilege::Supervisor);

/// Long mode with tables at pages 1 to 4 that map address 0 to page 5.
fn long_mode() -> (PagingState, FlatMemory) {
    let state = PagingState {
        cr0: cr0::PG | cr0::WP,
        cr3: 0x1000,
        cr4: cr4::PAE | cr4::PGE,
        efer: efer::LMA | efer::NXE,
        maxphyaddr: 46,
        features: PagingFeatures::all(),
        ..PagingState::default()
    };
    let mut memory = FlatMemory::new(6 << 12);
    for level in 1..5 {
        memory.set_u64(level << 12, (level + 1) << 12 | 7);
    }
    (state, memory)
}

#[test]
fn the_mode_follows_the_registers() {
    let (long, _) = long_mode();
    let mode = |state: PagingState| PageWalk::new(&state).format().mode();
    assert_eq!(mode(PagingState::default()), PagingMode::None);
    assert_eq!(mode(PagingState { cr0: cr0::PG, ..PagingState::default() }), PagingMode::Bits32);
    assert_eq!(mode(PagingState { efer: 0, ..long }), PagingMode::Pae);
    assert_eq!(mode(long), PagingMode::Level4);
    assert_eq!(mode(PagingState { cr4: long.cr4 | cr4::LA57, ..long }), PagingMode::Level5);
}

#[test]
fn canonical_addresses() {
    for (address, four, five) in [
        (0, true, true),
        (0x0000_7fff_ffff_ffff, true, true),
        (0x0000_8000_0000_0000, false, true),
        (0x00ff_ffff_ffff_ffff, false, true),
        (0x0100_0000_0000_0000, false, false),
        (0xfeff_ffff_ffff_ffff, false, false),
        (0xff00_0000_0000_0000, false, true),
        (0xffff_7fff_ffff_ffff, false, true),
        (0xffff_8000_0000_0000, true, true),
        (u64::MAX, true, true),
    ] {
        assert_eq!(is_canonical(Gva(address), 4), four, "{address:#x}");
        assert_eq!(is_canonical(Gva(address), 5), five, "{address:#x}");
    }
    let (state, _) = long_mode();
    assert!(PageWalk::new(&state).canonical(Gva(u64::MAX)));
    let legacy = PageWalk::new(&PagingState::default());
    assert!(legacy.canonical(Gva(0xffff_ffff)) && !legacy.canonical(Gva(1 << 32)));
}

#[test]
fn a_first_read_then_a_first_write() {
    let (state, memory) = long_mode();
    let walk = PageWalk::new(&state);
    let found = walk.translate(&memory, Gva(0x123), READ).unwrap();
    assert_eq!((found.gpa, found.page_size, found.level), (Gpa(0x5123), PageSize::Size4K, 1));
    assert_eq!(found.rights, PageRights::all());
    assert!(found.accessed && !found.dirty);
    assert!(walk.permits(&found, WRITE), "allowed, once the dirty bit is set");
    assert!(walk.translate(&memory, Gva(0x123), WRITE).unwrap().dirty);
    assert!(walk.probe(&memory, Gva(0x123), READ).unwrap().dirty);
}

#[test]
fn setters_do_what_a_new_walk_does() {
    let (state, _) = long_mode();
    let changed = PagingState { cr3: 0x3018, pkru: 4, pkrs: 8, pdptrs: [1, 2, 3, 4], ..state };
    for efer in [state.efer, 0] {
        let mut walk = PageWalk::new(&PagingState { efer, ..state });
        walk.set_cr3(changed.cr3);
        walk.set_keys(changed.pkru, changed.pkrs);
        walk.set_pdptrs(changed.pdptrs);
        assert_eq!(walk, PageWalk::new(&PagingState { efer, ..changed }));
        assert_eq!(walk.root(), Gpa(0x3000));
    }
}

#[test]
fn global_needs_cr4_pge() {
    let (state, mut memory) = long_mode();
    memory.set_u64(0x4000, 0x5107);
    assert!(PageWalk::new(&state).probe(&memory, Gva(0), READ).unwrap().global);
    let without = PagingState { cr4: cr4::PAE, ..state };
    assert!(!PageWalk::new(&without).probe(&memory, Gva(0), READ).unwrap().global);
}

#[test]
fn page_directory_pointers() {
    let mut memory = FlatMemory::new(0x3000);
    let entries = [0x5001, 0, 0xffff_ffff_ffff_fffe, 0x6e19];
    for (offset, entry) in (0..).step_by(8).zip(entries) {
        memory.set_u64(0x2fe0 + offset, entry);
    }
    // Bits 4:0 of CR3 are not part of the address; an entry that is not present has no reserved bits.
    assert_eq!(load_pdptrs(&memory, 0x2ff8, 36), Ok(entries));
    for (entry, width) in [(0x5003, 36), (0x5021, 36), (0x5101, 36), (1 << 36 | 1, 36), (1 << 63 | 1, 52)] {
        memory.set_u64(0x2fe8, entry);
        let error = load_pdptrs(&memory, 0x2fe0, width).unwrap_err();
        assert_eq!((error.index, error.entry), (1, entry));
        assert_eq!(error.reserved, entry & !0x5001);
    }
}

#[test]
fn ept_pointers() {
    let ept = |eptp| PageWalk::ept(eptp, EptFeatures::empty(), 40).map(|walk| walk.format().levels());
    assert_eq!(ept(0x1000 | 3 << 3 | 6), Ok(4));
    assert_eq!(ept(0x1000 | 4 << 3), Ok(5));
    for bad in [0x1000 | 2 << 3 | 6, 0x1000 | 3 << 3 | 1, 3 << 3 | 6 | 1 << 7, 3 << 3 | 6 | 1 << 40] {
        assert_eq!(ept(bad).unwrap_err().eptp, bad);
    }
}

/// EPT at pages 8 to 11 under the guest of `long_mode`, with everything but page `lost` mapped one to one.
fn under_ept(lost: u64, accessed_dirty: u64) -> (NestedWalk, FlatMemory) {
    let (state, guest_memory) = long_mode();
    let mut memory = FlatMemory::new(12 << 12);
    for level in 1..5 {
        memory.set_u64(level << 12, guest_memory.read_u64(Gpa(level << 12)).unwrap_or(0));
    }
    for page in 8..11 {
        memory.set_u64(page << 12, (page + 1) << 12 | 7);
    }
    for page in (0..8).filter(|&page| page != lost) {
        memory.set_u64((11 << 12) + page * 8, page << 12 | 6 << 3 | 7);
    }
    let eptp = 0x8000 | 3 << 3 | 6 | accessed_dirty;
    let Ok(host) = PageWalk::ept(eptp, EptFeatures::empty(), 40) else { panic!("{eptp:#x} is not valid") };
    (NestedWalk { guest: PageWalk::new(&state), host }, memory)
}

#[test]
fn an_ept_violation_says_where_and_why() {
    for (lost, gpa, stage, accessed_dirty, qualification) in [
        (1, 0x1000, HostStage::TableWalk, 0, 0x81),
        (4, 0x4000, HostStage::TableWalk, 1 << 6, 0x83),
        (5, 0x5008, HostStage::FinalPage, 0, 0x182),
    ] {
        let (walk, memory) = under_ept(lost, accessed_dirty);
        let Err(NestedFault::Host(fault)) = walk.translate(&memory, Gva(8), WRITE) else {
            panic!("no fault in the host's tables")
        };
        assert_eq!((fault.gpa, fault.gva, fault.stage), (Gpa(gpa), Some(Gva(8)), stage));
        assert_eq!(fault.kind, HostFaultKind::EptViolation { qualification });
        // The guest's dirty bit waits for the page to be there.
        assert_eq!(memory.read_u64(Gpa(0x4000)), Some(0x5007));
    }
}

#[test]
fn loading_pointers_in_a_nested_guest() {
    let (walk, mut memory) = under_ept(0, 1 << 6);
    memory.set_u64(0x3008, 0x5001);
    memory.set_u64(0x3000, 0);
    assert_eq!(walk.load_pdptrs(&memory, 0x3000, 36), Ok([0, 0x5001, 0, 0]));
    memory.set_u64(0x3018, 3);
    assert!(matches!(walk.load_pdptrs(&memory, 0x3000, 36), Err(NestedPdptrFault::Guest(e)) if e.index == 3));
    let Err(NestedPdptrFault::Host(fault)) = walk.load_pdptrs(&memory, 0x20, 36) else { panic!("no fault") };
    assert_eq!((fault.gpa, fault.gva, fault.stage), (Gpa(0x20), None, HostStage::TableWalk));
    assert_eq!(fault.kind, HostFaultKind::EptViolation { qualification: 1 });
}

#[test]
fn messages_name_the_values() {
    let (walk, memory) = under_ept(5, 0);
    let message = walk.translate(&memory, Gva(8), WRITE).unwrap_err().to_string();
    assert!(message.contains("0x5008"), "{message}");
    let (state, memory) = long_mode();
    let message = PageWalk::new(&state).translate(&memory, Gva(0x3008), WRITE).unwrap_err().to_string();
    assert_eq!(message, "page fault at 0x3008, error code 0x2");
}

//! The crate's answer and the model's, in the same terms.

use mmu::testing::FlatMemory;
use mmu::{
    Access, Gva, HostFaultKind, HostStage, NestedFault, NestedWalk, PageRights, PageWalk, PagingState,
    Translation,
};

use super::host::Guest;
use super::{Exit, Page, Ram, Stop, linear};
use mmu::testing::Host;

/// A translation in the model's terms.
pub(crate) fn page_of(t: &Translation) -> Page {
    Page {
        gpa: t.gpa.0,
        size: t.page_size.bytes(),
        level: t.level,
        global: t.global,
        readable: t.rights.contains(PageRights::READ),
        writable: t.rights.contains(PageRights::WRITE),
        user: t.rights.contains(PageRights::USER),
        executable: t.rights.contains(PageRights::EXECUTE),
        pkey: t.pkey,
        dirty: t.dirty,
        accessed: t.accessed,
    }
}

/// Walks `memory` by the crate and `twin` by the model, and checks that they agree; memory is for the caller to
/// compare.
#[track_caller]
pub(crate) fn linear_walk(
    walk: &PageWalk,
    state: &PagingState,
    memory: &FlatMemory,
    twin: &mut FlatMemory,
    gva: u64,
    access: Access,
) -> Option<Translation> {
    let real = walk.translate(memory, Gva(gva), access);
    let plain = linear::translate(state, &mut Ram { memory: twin, frozen: false }, gva, access);
    match (real, plain) {
        (Ok(t), Ok((page, None))) if page_of(&t) == page => {
            assert!(walk.permits(&t, access), "{t:?} does not permit the {access:?} that made it");
            return Some(t);
        }
        (Err(f), Err(Stop::PageFault(code))) if f.error_code == code && f.gva == Gva(gva) => {}
        (real, plain) => panic!("{gva:#x} {access:x?}\n{state:x?}\ncrate: {real:x?}\nmodel: {plain:x?}"),
    }
    None
}

/// The same for a nested walk.
#[track_caller]
pub(crate) fn nested_walk(
    walk: &NestedWalk,
    state: &PagingState,
    host: Host,
    memory: &FlatMemory,
    twin: &mut FlatMemory,
    gva: u64,
    access: Access,
) -> bool {
    let real = walk.translate(memory, Gva(gva), access);
    let ram = Ram { memory: twin, frozen: false };
    let plain = linear::translate(state, &mut Guest { ram, host, linear: true }, gva, access);
    let context =
        || format!("{gva:#x} {access:x?}\n{state:x?}\n{host:x?}\ncrate: {real:x?}\nmodel: {plain:x?}");
    match (&real, &plain) {
        (Ok(t), Ok((guest, Some(behind)))) => {
            assert_eq!(page_of(&t.guest), *guest, "{}", context());
            assert_eq!(page_of(&t.host), *behind, "{}", context());
            assert_eq!(t.gpa.0, behind.gpa, "{}", context());
            assert_eq!(t.page_size.bytes(), guest.size.min(behind.size), "{}", context());
            assert_eq!(t.dirty(), guest.dirty && behind.dirty, "{}", context());
            assert!(walk.permits(t, access), "{}", context());
            return true;
        }
        (Err(NestedFault::Guest(f)), Err(Stop::PageFault(code))) => {
            assert_eq!(f.error_code, *code, "{}", context());
        }
        (Err(NestedFault::Host(f)), Err(Stop::Exit(exit))) => {
            let gpa = f.gpa.0;
            let ours = match f.kind {
                HostFaultKind::EptViolation { qualification } => {
                    let last = f.stage == HostStage::FinalPage;
                    assert_eq!(qualification >> 8 & 1 == 1, last, "{}", context());
                    Exit::EptViolation { gpa, qualification }
                }
                HostFaultKind::EptMisconfiguration => Exit::EptMisconfiguration { gpa },
                HostFaultKind::NestedPageFault { exit_info } => {
                    let last = f.stage == HostStage::FinalPage;
                    assert_eq!(exit_info >> 32 & 3, if last { 1 } else { 2 }, "{}", context());
                    Exit::NestedPageFault { gpa, info: exit_info }
                }
            };
            assert_eq!(ours, *exit, "{}", context());
            assert_eq!(f.gva, Some(Gva(gva)));
        }
        _ => panic!("{}", context()),
    }
    false
}

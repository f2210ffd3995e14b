//! Every step of every call fails once: then nothing has changed.

use std::sync::{Arc, Weak};

use super::{
    PAGE,
    domain::TestDomain,
    process::{Buffer, TestProcess, memory_file},
    range,
};
use crate::{
    Errno, Result,
    account::Accounting,
    domain::{Domain, Prot},
    inject,
    ioas::{AccessOps, DirtyBitmap, Ioas, Owner, Pinned},
    iova::{Iova, IovaRange},
    pages::Pages,
    process::Process,
};

const RW: Prot = Prot::READ.union(Prot::WRITE);

/// Two address spaces with memory of a process and of a file, a domain, and a pin.
struct World {
    process: Arc<TestProcess>,
    ioas: Arc<Ioas>,
    other: Arc<Ioas>,
    stores: [Arc<Pages>; 2],
    tables: [Arc<TestDomain>; 2],
    _pinned: Pinned,
    /// Dropped last: another test may be given its addresses then, and must not find pins there.
    buffer: Buffer,
}

impl World {
    fn new() -> Self {
        let (process, buffer, file) = (TestProcess::new(), Buffer::new(8), memory_file(8));
        process.limit(100);
        let dynamic: Arc<dyn Process> = process.clone();
        let of_user =
            Pages::user(dynamic.clone(), buffer.start(), 8 * PAGE, true, Accounting::Process).unwrap();
        let of_file = Pages::file(dynamic, &file, 0, 8 * PAGE, true, Accounting::Process).unwrap();
        let (ioas, other) = (Ioas::new(), Ioas::new());
        other.set_huge_pages(false).unwrap();
        let tables = [TestDomain::any(), TestDomain::new(4096, range(0, 1 << 30))];
        let domain: Arc<dyn Domain> = tables[0].clone();
        other.attach_domain(&domain).unwrap();
        ioas.map(&of_user, 0, 4 * PAGE, Some(Iova(0)), RW).unwrap();
        ioas.map(&of_user, 2 * PAGE, 4 * PAGE, Some(Iova(4 * PAGE)), RW).unwrap();
        other.map(&of_file, 0, 8 * PAGE, Some(Iova(0)), RW).unwrap();
        let pinned = ioas.pin(Iova(PAGE), PAGE, true, true).unwrap();
        Self { process, buffer, ioas, other, stores: [of_user, of_file], tables, _pinned: pinned }
    }

    fn domain(&self, index: usize) -> Arc<dyn Domain> {
        self.tables[index].clone()
    }

    /// All that a call that fails must leave as it was.
    fn state(&self) -> String {
        let pins: Vec<_> =
            (0..8).map(|page| self.process.pin_count(self.buffer.page(page)).unwrap()).collect();
        let usage = (self.process.usage().pinned(), self.process.usage().locked());
        let tables: Vec<_> = self.tables.iter().map(|table| (table.bytes(), table.mappings())).collect();
        let spaces: Vec<_> = [&self.ioas, &self.other]
            .iter()
            .map(|ioas| (ioas.layout(), ioas.iova_ranges(), ioas.iova_alignment(), ioas.huge_pages()))
            .collect();
        format!("{pins:?} {usage:?} {tables:?} {spaces:?}")
    }
}

struct Nobody;

impl AccessOps for Nobody {
    fn unmap(&self, _: IovaRange) {}
}

/// Makes each step of `call` fail in turn. `steps` is how many there are at least.
fn sweep(steps: u64, call: impl Fn(&World) -> Result<()>) {
    for nth in 1.. {
        let world = World::new();
        let before = world.state();
        inject::fail_nth(nth);
        let result = call(&world);
        let left = inject::remaining();
        inject::fail_nth(0);
        if left > 0 {
            assert_eq!(result, Ok(()), "no step failed");
            assert!(nth > steps, "only {} steps can fail", nth - 1);
            return;
        }
        assert_eq!(result, Err(Errno::NOMEM), "step {nth} failed");
        assert_eq!(world.state(), before, "step {nth} failed");
        assert_eq!(call(&world), Ok(()), "again, after step {nth} failed");
    }
}

#[test]
fn mapping_fails_without_a_trace() {
    sweep(1, |world| world.ioas.map(&world.stores[1], 0, 3 * PAGE, Some(Iova(64 * PAGE)), RW).map(|_| ()));
    sweep(5, |world| world.other.map(&world.stores[0], PAGE, 3 * PAGE, None, RW).map(|_| ()));
    sweep(8, |world| {
        let from = range(2 * PAGE, 4 * PAGE);
        world.other.copy_from(&world.ioas, from, Some(Iova(64 * PAGE)), RW).map(|_| ())
    });
}

#[test]
fn opening_a_store_fails_without_a_trace() {
    sweep(1, |world| {
        let process: Arc<dyn Process> = world.process.clone();
        Pages::user(process, world.buffer.start(), PAGE, true, Accounting::User).map(|_| ())
    });
}

#[test]
fn attaching_fails_without_a_trace() {
    sweep(6, |world| {
        let attached = world.ioas.attach_domain(&world.domain(1));
        if attached.is_ok() {
            assert_eq!(world.tables[1].bytes(), 8 * PAGE);
        }
        attached
    });
    sweep(8, |world| world.other.attach_domain(&world.domain(1)));
}

#[test]
fn pinning_and_copying_fail_without_a_trace() {
    sweep(5, |world| {
        let before = world.state();
        let pinned = world.ioas.pin(Iova(0), 8 * PAGE, true, false).map(drop);
        assert_eq!(world.state(), before, "it is unpinned again");
        pinned
    });
    sweep(1, |world| world.ioas.read(Iova(0), &mut [0; 9000]));
    sweep(1, |world| world.ioas.write(Iova(0), &[0; 9000]));
}

#[test]
fn changes_of_a_space_fail_without_a_trace() {
    sweep(1, |world| world.ioas.reserve(range(64 * PAGE, PAGE), Owner::new()));
    sweep(1, |world| world.ioas.set_allowed(&[range(0, 64 * PAGE)]));
    sweep(1, |world| world.other.set_huge_pages(true));
    sweep(1, |world| {
        let nobody: Weak<Nobody> = Weak::new();
        world.ioas.add_access(nobody, PAGE).map(|_| ())
    });
    sweep(1, |world| world.other.cut(&[Iova(PAGE)]));
    sweep(1, |world| {
        let to: Arc<dyn Process> = TestProcess::new();
        Ioas::change_process(std::slice::from_ref(&world.other), &to)?;
        let back: Arc<dyn Process> = world.process.clone();
        Ioas::change_process(std::slice::from_ref(&world.other), &back).inspect_err(|_| {
            // That was the way back; take it again for the comparison.
            Ioas::change_process(std::slice::from_ref(&world.other), &back).unwrap();
        })
    });
    sweep(1, |world| world.other.set_dirty_tracking(&world.domain(0), true));
    sweep(1, |world| {
        let bits = Buffer::new(1);
        let bitmap = DirtyBitmap {
            range: range(0, 8 * PAGE),
            page_size: PAGE,
            process: &*world.process,
            at: bits.start(),
        };
        world.other.read_dirty(&world.domain(0), &bitmap, false)
    });
}

#[test]
fn unmapping_needs_no_memory() {
    let world = World::new();
    inject::fail_nth(1);
    let unmapped = world.other.unmap(IovaRange::ALL);
    world.other.detach_domain(&world.domain(0));
    let left = inject::remaining();
    inject::fail_nth(0);
    assert_eq!((unmapped, left), (Ok(8 * PAGE), 1));
}

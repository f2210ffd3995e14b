//! The address space against a plain model, page by page.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, Weak},
};

use proptest::{prelude::*, test_runner::RngSeed};

use super::{
    PAGE,
    domain::TestDomain,
    process::{Buffer, TestProcess, pattern},
    range, store,
};
use crate::{
    Errno, Result,
    domain::{Domain, HostAddr, Prot},
    ioas::{AccessOps, DirtyBitmap, Ioas, Pinned},
    iova::{Iova, IovaRange},
    pages::Pages,
    process::{Process, local::pins},
};

const RW: Prot = Prot::READ.union(Prot::WRITE);
/// Pages of memory, and of addresses.
const MEMORY: u64 = 12;
const SPACE: u64 = 24;

#[derive(Clone, Debug)]
enum Op {
    Map { space: usize, store: usize, page: u64, pages: u64, at: Option<u64>, write: bool },
    Unmap { space: usize, at: u64, pages: u64 },
    Copy { from: usize, to: usize, at: u64, pages: u64, target: Option<u64>, write: bool },
    Attach { space: usize, table: usize },
    Detach { space: usize, table: usize },
    Pin { space: usize, at: u64, pages: u64, write: bool, owner: bool },
    Unpin { which: usize },
    Dirty { space: usize, table: usize, at: u64 },
    ReadDirty { space: usize, table: usize, keep: bool },
    Read { space: usize, at: u64, bytes: u64 },
    Miss { page: u64, pages: u64 },
}

fn op() -> impl Strategy<Value = Op> {
    let (space, table, at, pages) = (0..2_usize, 0..2_usize, 0..SPACE, 1..6_u64);
    let write = prop::bool::weighted(0.7);
    prop_oneof![
        6 => (space.clone(), 0..2_usize, 0..MEMORY, pages.clone(), prop::option::of(at.clone()), write)
            .prop_map(|(space, store, page, pages, at, write)| Op::Map {
                space, store, page, pages: pages.min(MEMORY - page), at, write
            }),
        3 => (space.clone(), at.clone(), 1..SPACE).prop_map(|(space, at, pages)| Op::Unmap { space, at, pages }),
        3 => (space.clone(), space.clone(), at.clone(), pages.clone(), prop::option::of(at.clone()), write)
            .prop_map(|(from, to, at, pages, target, write)| Op::Copy { from, to, at, pages, target, write }),
        2 => (space.clone(), table.clone()).prop_map(|(space, table)| Op::Attach { space, table }),
        1 => (space.clone(), table.clone()).prop_map(|(space, table)| Op::Detach { space, table }),
        4 => (space.clone(), at.clone(), pages.clone(), write, prop::bool::weighted(0.2))
            .prop_map(|(space, at, pages, write, owner)| Op::Pin { space, at, pages, write, owner }),
        3 => (0..8_usize).prop_map(|which| Op::Unpin { which }),
        2 => (space.clone(), table.clone(), at.clone()).prop_map(|(space, table, at)| Op::Dirty { space, table, at }),
        1 => (space.clone(), table, any::<bool>())
            .prop_map(|(space, table, keep)| Op::ReadDirty { space, table, keep }),
        2 => (space, 0..SPACE * PAGE, 1..3 * PAGE).prop_map(|(space, at, bytes)| Op::Read { space, at, bytes }),
        1 => (0..MEMORY, 0..2_u64).prop_map(|(page, pages)| Op::Miss { page, pages }),
    ]
}

/// An area: which pages of which store.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Area {
    pages: u64,
    store: usize,
    first: u64,
    write: bool,
}

/// A pin: its parts with the areas (by space and start) that they are in.
#[derive(Clone, Debug)]
struct Pin {
    space: usize,
    at: u64,
    pages: u64,
    owner: bool,
}

#[derive(Default)]
struct Space {
    areas: BTreeMap<u64, Area>,
    tables: Vec<usize>,
}

impl Space {
    fn overlapping(&self, at: u64, pages: u64) -> Vec<(u64, Area)> {
        self.areas
            .iter()
            .filter(|(start, area)| **start < at + pages && at < *start + area.pages)
            .map(|(start, area)| (*start, *area))
            .collect()
    }

    /// The parts of areas in a range up to the first hole: start, area, pages; and whether there was none.
    fn walk(&self, at: u64, pages: u64) -> (Vec<(u64, Area)>, bool) {
        let (mut parts, mut next) = (Vec::new(), at);
        for (start, area) in self.overlapping(at, pages) {
            if start > next {
                return (parts, false);
            }
            let end = (start + area.pages).min(at + pages);
            parts.push((next, Area { first: area.first + (next - start), pages: end - next, ..area }));
            next = end;
        }
        (parts, next == at + pages)
    }
}

/// The access that all pins are made through.
#[derive(Default)]
struct Access {
    pinned: Mutex<Vec<(Pin, Pinned)>>,
    spaces: Mutex<Vec<Weak<Ioas>>>,
}

/// An access of one space.
struct AccessOf {
    access: Arc<Access>,
    space: usize,
}

impl AccessOps for AccessOf {
    fn unmap(&self, range: IovaRange) {
        let (first, last) = (range.start().0 / PAGE, range.last().0 / PAGE);
        self.access.pinned.lock().unwrap().retain(|(pin, _)| {
            pin.space != self.space || pin.owner || pin.at > last || pin.at + pin.pages <= first
        });
    }
}

struct World {
    process: Arc<TestProcess>,
    buffer: Buffer,
    bits: Buffer,
    ioas: [Arc<Ioas>; 2],
    /// Writable, and not.
    stores: [Arc<Pages>; 2],
    tables: [[Arc<TestDomain>; 2]; 2],
    access: Arc<Access>,
    _ops: [Arc<AccessOf>; 2],
    spaces: [Space; 2],
    missing: Option<(u64, u64)>,
    dirty: BTreeMap<(usize, usize), Vec<u64>>,
}

impl World {
    fn new() -> Self {
        let (process, buffer) = (TestProcess::new(), Buffer::new(MEMORY));
        buffer.number();
        let dynamic: Arc<dyn Process> = process.clone();
        let accounting = crate::account::Accounting::User;
        let read_only = Pages::user(dynamic, buffer.start(), MEMORY * PAGE, false, accounting).unwrap();
        let stores = [store(&process, buffer.start(), MEMORY * PAGE), read_only];
        let access = Arc::new(Access::default());
        let ioas = [(); 2].map(|()| Ioas::new());
        let ops = [0, 1].map(|space| Arc::new(AccessOf { access: access.clone(), space }));
        for (ioas, ops) in ioas.iter().zip(&ops) {
            ioas.reserve(
                IovaRange::new(Iova(SPACE * PAGE), Iova(u64::MAX)).unwrap(),
                crate::ioas::Owner::new(),
            )
            .unwrap();
            let ops: Weak<AccessOf> = Arc::downgrade(ops);
            ioas.add_access(ops, PAGE).unwrap();
        }
        access.spaces.lock().unwrap().extend(ioas.iter().map(Arc::downgrade));
        let tables = [(); 2].map(|()| [(); 2].map(|()| TestDomain::any()));
        Self {
            process,
            buffer,
            bits: Buffer::new(1),
            ioas,
            stores,
            tables,
            access,
            _ops: ops,
            spaces: Default::default(),
            missing: None,
            dirty: BTreeMap::new(),
        }
    }

    fn table(&self, space: usize, table: usize) -> Arc<dyn Domain> {
        self.tables[space][table].clone()
    }

    /// How many users each page of a store has.
    fn users(&self, store: usize) -> Vec<u64> {
        let mut users = vec![0; MEMORY as usize];
        let mut use_pages = |area: &Area, times: u64| {
            for page in area.first..area.first + area.pages {
                users[page as usize] += times;
            }
        };
        for space in &self.spaces {
            for area in space.areas.values().filter(|area| area.store == store) {
                use_pages(area, space.tables.len() as u64);
            }
        }
        for (pin, _) in self.access.pinned.lock().unwrap().iter() {
            for (_, part) in self.spaces[pin.space].walk(pin.at, pin.pages).0 {
                if part.store == store {
                    use_pages(&part, 1);
                }
            }
        }
        users
    }

    /// Whether pinning these pages of a store meets a page that is missing: those that are pinned stay.
    fn faults(&self, area: &Area) -> bool {
        let Some((from, to)) = self.missing else { return false };
        let users = self.users(area.store);
        let mut page = area.first;
        while page < area.first + area.pages {
            if users[page as usize] == 0 && (from..to).contains(&page) {
                return true;
            }
            page += 1;
        }
        false
    }

    /// What mapping areas one after the other says when domains need them, or whether it works.
    fn fill(&self, space: usize, areas: &[Area]) -> Result<()> {
        let pinned = !self.spaces[space].tables.is_empty();
        if pinned && areas.iter().any(|area| self.faults(area)) { Err(Errno::FAULT) } else { Ok(()) }
    }

    /// Enters `areas` into the model, at `at` or where the address space has put them.
    fn place(&mut self, space: usize, areas: &[Area], at: Option<u64>, done: Result<Iova>) {
        let pages: u64 = areas.iter().map(|area| area.pages).sum();
        let free = |at: u64| at + pages <= SPACE && self.spaces[space].overlapping(at, pages).is_empty();
        let expected = match at {
            Some(at) if at + pages > SPACE => Err(Errno::INVAL),
            Some(at) if !free(at) => Err(Errno::EXIST),
            Some(at) => Ok(at),
            None => {
                // As long as it is, or as its memory lies.
                let memory = self.buffer.page(areas[0].first).0 / PAGE;
                let step = pages.next_power_of_two().min(1 << memory.trailing_zeros());
                (0..SPACE).step_by(step as usize).find(|at| free(*at)).ok_or(Errno::NOSPC)
            }
        };
        let expected = expected.and_then(|at| self.fill(space, areas).map(|()| at));
        assert_eq!(done.map(|iova| iova.0 / PAGE), expected);
        let Ok(mut next) = expected else { return };
        for area in areas {
            self.spaces[space].areas.insert(next, *area);
            next += area.pages;
        }
    }

    fn unmap(&mut self, space: usize, at: u64, pages: u64) {
        let done = self.ioas[space].unmap(range(at * PAGE, pages * PAGE));
        let mut expected = Ok(0);
        for (start, area) in self.spaces[space].overlapping(at, pages) {
            let owned = self.access.pinned.lock().unwrap().iter().any(|(pin, _)| {
                pin.owner && pin.space == space && pin.at < start + area.pages && start < pin.at + pin.pages
            });
            if owned {
                expected = Err(Errno::BUSY);
                break;
            }
            if start < at || start + area.pages > at + pages {
                expected = Err(Errno::NOENT);
                break;
            }
            self.spaces[space].areas.remove(&start);
            expected = expected.map(|bytes| bytes + area.pages * PAGE);
        }
        assert_eq!(done, expected);
    }

    fn pin(&mut self, space: usize, at: u64, pages: u64, write: bool, owner: bool) {
        let done = self.ioas[space].pin(Iova(at * PAGE), pages * PAGE, write, owner);
        let (parts, whole) = self.spaces[space].walk(at, pages);
        let mut expected = if whole { Ok(()) } else { Err(Errno::NOENT) };
        for (_, part) in &parts {
            if write && !part.write {
                expected = Err(Errno::PERM);
                break;
            }
            if self.faults(part) {
                expected = Err(Errno::FAULT);
                break;
            }
        }
        match done {
            Ok(pinned) => {
                assert_eq!(expected, Ok(()));
                let mut byte = [0];
                pinned.read(0, &mut byte).unwrap();
                assert_eq!(byte, [pattern(parts[0].1.first * PAGE)]);
                self.access.pinned.lock().unwrap().push((Pin { space, at, pages, owner }, pinned));
            }
            Err(errno) => assert_eq!(Err(errno), expected),
        }
    }

    fn read(&self, space: usize, at: u64, bytes: u64) {
        let mut read = vec![0; bytes as usize];
        let done = self.ioas[space].read(Iova(at), &mut read);
        let (first, last) = (at / PAGE, (at + bytes - 1) / PAGE);
        let (parts, whole) = self.spaces[space].walk(first, last - first + 1);
        if parts.iter().any(|(_, part)| self.missing_part(part)) {
            // Whether it fails depends on which pages are pinned; it is enough that it does not lie.
            if done.is_err() {
                return;
            }
        }
        assert_eq!(done, if whole { Ok(()) } else { Err(Errno::NOENT) });
        if whole {
            let memory: Vec<u8> = parts
                .iter()
                .flat_map(|(_, part)| part.first * PAGE..(part.first + part.pages) * PAGE)
                .map(pattern)
                .skip((at % PAGE) as usize)
                .take(bytes as usize)
                .collect();
            assert_eq!(read, memory);
        }
    }

    fn missing_part(&self, area: &Area) -> bool {
        self.missing.is_some_and(|(from, to)| from < area.first + area.pages && area.first < to)
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Map { space, store, page, pages, at, write } => {
                let prot = if write { RW } else { Prot::READ };
                let at_iova = at.map(|at| Iova(at * PAGE));
                let store_pages = self.stores[store].clone();
                let done = self.ioas[space].map(&store_pages, page * PAGE, pages * PAGE, at_iova, prot);
                if write && store == 1 {
                    assert_eq!(done, Err(Errno::PERM));
                } else {
                    self.place(space, &[Area { pages, store, first: page, write }], at, done);
                }
            }
            Op::Unmap { space, at, pages } => self.unmap(space, at, pages),
            Op::Copy { from, to, at, pages, target, write } => {
                let prot = if write { RW } else { Prot::READ };
                let target_iova = target.map(|at| Iova(at * PAGE));
                let source = range(at * PAGE, pages * PAGE);
                let done = self.ioas[to].copy_from(&self.ioas[from], source, target_iova, prot);
                let (parts, whole) = self.spaces[from].walk(at, pages);
                if !whole {
                    assert_eq!(done, Err(Errno::NOENT));
                } else if write && parts.iter().any(|(_, part)| part.store == 1) {
                    assert_eq!(done, Err(Errno::PERM));
                } else {
                    let areas: Vec<Area> = parts.iter().map(|(_, part)| Area { write, ..*part }).collect();
                    self.place(to, &areas, target, done);
                }
            }
            Op::Attach { space, table } => {
                let done = self.ioas[space].attach_domain(&self.table(space, table));
                let areas: Vec<Area> = self.spaces[space].areas.values().copied().collect();
                if self.spaces[space].tables.contains(&table) {
                    assert_eq!(done, Err(Errno::EXIST));
                } else if areas.iter().any(|area| self.faults(area)) {
                    assert_eq!(done, Err(Errno::FAULT));
                } else {
                    assert_eq!(done, Ok(()));
                    self.spaces[space].tables.push(table);
                }
            }
            Op::Detach { space, table } => {
                self.ioas[space].detach_domain(&self.table(space, table));
                self.spaces[space].tables.retain(|attached| *attached != table);
            }
            Op::Pin { space, at, pages, write, owner } => self.pin(space, at, pages, write, owner),
            Op::Unpin { which } => {
                let mut pinned = self.access.pinned.lock().unwrap();
                if which < pinned.len() {
                    pinned.swap_remove(which);
                }
            }
            Op::Dirty { space, table, at } => {
                let attached = self.spaces[space].tables.contains(&table);
                if attached && !self.spaces[space].overlapping(at, 1).is_empty() {
                    self.tables[space][table].write(at * PAGE);
                    self.dirty.entry((space, table)).or_default().push(at);
                }
            }
            Op::ReadDirty { space, table, keep } => self.read_dirty(space, table, keep),
            Op::Read { space, at, bytes } => self.read(space, at, bytes),
            Op::Miss { page, pages } => {
                self.process.miss(self.buffer.page(page), pages);
                self.missing = (pages > 0).then_some((page, page + pages));
            }
        }
    }

    fn read_dirty(&mut self, space: usize, table: usize, keep: bool) {
        self.process.write(self.bits.start(), &[0; 8]).unwrap();
        let bitmap = DirtyBitmap {
            range: range(0, SPACE * PAGE),
            page_size: PAGE,
            process: &*self.process,
            at: self.bits.start(),
        };
        let done = self.ioas[space].read_dirty(&self.table(space, table), &bitmap, keep);
        if !self.spaces[space].tables.contains(&table) {
            assert_eq!(done, Err(Errno::INVAL));
            return;
        }
        assert_eq!(done, Ok(()));
        let bits = u64::from_ne_bytes(self.bits.bytes(0, 8).try_into().unwrap());
        let mapped = |at: &u64| !self.spaces[space].overlapping(*at, 1).is_empty();
        let dirty = self.dirty.entry((space, table)).or_default();
        let expected = dirty.iter().filter(|at| mapped(at)).fold(0, |bits, at| bits | 1 << at);
        assert_eq!(bits, expected);
        if !keep {
            dirty.retain(|at| !mapped(at));
        }
    }

    fn check(&self) {
        let users: Vec<_> = [0, 1].map(|store| self.users(store)).into();
        let mut pinned = 0;
        for page in 0..MEMORY {
            let expected: u64 = users.iter().map(|users| u64::from(users[page as usize] > 0)).sum();
            assert_eq!(pins::count(HostAddr(self.buffer.page(page).0)), expected, "page {page}");
            pinned += expected;
        }
        assert_eq!(self.process.usage().pinned(), pinned);
        for (index, space) in self.spaces.iter().enumerate() {
            for (number, table) in self.tables[index].iter().enumerate() {
                let attached = space.tables.contains(&number);
                for at in 0..SPACE {
                    let area = space.overlapping(at, 1).into_iter().next().filter(|_| attached);
                    let expected = area.map(|(start, area)| {
                        let host = self.buffer.page(area.first + (at - start));
                        (HostAddr(host.0), if area.write { RW } else { Prot::READ })
                    });
                    let found = table.lookup(Iova(at * PAGE));
                    assert_eq!(found.zip(table.prot(at * PAGE)), expected, "table {number} at page {at}");
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, rng_seed: RngSeed::Fixed(5), failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn an_address_space_is_what_the_model_says(ops in prop::collection::vec(op(), 1..60)) {
        let mut world = World::new();
        for op in &ops {
            world.apply(op);
            world.check();
        }
        world.access.pinned.lock().unwrap().clear();
        for (space, ioas) in world.ioas.iter().enumerate() {
            let mapped: u64 = world.spaces[space].areas.values().map(|area| area.pages * PAGE).sum();
            prop_assert_eq!(ioas.unmap(IovaRange::ALL), Ok(mapped));
        }
        prop_assert_eq!(world.process.usage().pinned(), 0);
    }
}

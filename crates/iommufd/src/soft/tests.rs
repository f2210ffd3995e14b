//! The software IOMMU against a plain model, and under threads.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Barrier, mpsc},
    thread,
};

use proptest::{
    prelude::*,
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};

use crate::{
    Errno,
    domain::{DirtySink, Domain, HostAddr, Prot},
    hardware::{Attachment, Hardware},
    iova::{Iova, IovaRange, PAGE_SIZE},
};

mod epoch;

use super::*;

const MIB2: u64 = 2 << 20;
const GIB: u64 = 1 << 30;
const RW: Prot = Prot::READ.union(Prot::WRITE);

fn range(start: u64, length: u64) -> IovaRange {
    IovaRange::with_length(Iova(start), length).unwrap()
}

fn runner(cases: u32) -> TestRunner {
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]))
}

fn at(domain: &SoftDomain, iova: u64, access: Access) -> Result<HostAddr, FaultReason> {
    let mut reader = domain.reader();
    let section = reader.section();
    section.translate(Iova(iova), access).map(|found| found.host).map_err(|fault| fault.reason)
}

/// Mappings that do not overlap, by their first address.
#[derive(Default, Debug)]
struct Model(BTreeMap<u64, Piece>);

#[derive(Clone, Copy, Debug)]
struct Piece {
    length: u64,
    host: u64,
    prot: Prot,
}

impl Model {
    fn find(&self, iova: u64) -> Option<(u64, Prot)> {
        let (start, piece) = self.0.range(..=iova).next_back()?;
        (iova - start < piece.length).then(|| (piece.host + (iova - start), piece.prot))
    }

    fn overlaps(&self, start: u64, length: u64) -> bool {
        self.0.range(..start + length).next_back().is_some_and(|(at, piece)| at + piece.length > start)
    }

    fn unmap(&mut self, start: u64, length: u64) {
        let end = start + length;
        let cut: Vec<_> = self
            .0
            .range(..end)
            .rev()
            .take_while(|(at, piece)| *at + piece.length > start)
            .map(|(at, piece)| (*at, *piece))
            .collect();
        for (at, piece) in cut {
            self.0.remove(&at);
            if at < start {
                self.0.insert(at, Piece { length: start - at, ..piece });
            }
            if at + piece.length > end {
                let skip = end - at;
                let rest = Piece { length: piece.length - skip, host: piece.host + skip, ..piece };
                self.0.insert(end, rest);
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Map { start: u64, length: u64, host: u64, prot: Prot },
    Unmap { start: u64, length: u64 },
    Sync,
}

/// Addresses in a few GiB whose alignment is often that of a large leaf, and lengths to go with them.
fn place() -> impl Strategy<Value = (u64, u64)> {
    let units = prop_oneof![Just(PAGE_SIZE), Just(MIB2), Just(GIB)];
    (units.clone(), 0..1100u64, units, 1..1100u64, 0..3u64).prop_map(|(unit, n, length_unit, m, odd)| {
        let start = (unit * n) % (6 * GIB);
        (start, (length_unit * m) % (3 * GIB) + odd * PAGE_SIZE + PAGE_SIZE)
    })
}

fn step() -> impl Strategy<Value = Step> {
    let prots = prop_oneof![Just(Prot::READ), Just(Prot::WRITE), Just(RW)];
    prop_oneof![
        4 => (place(), 1..1u64 << 35, prots).prop_map(|((start, length), page, prot)| Step::Map {
            start, length, host: page * PAGE_SIZE, prot
        }),
        4 => place().prop_map(|(start, length)| Step::Unmap { start, length }),
        1 => Just(Step::Sync),
    ]
}

#[test]
fn it_translates_as_a_plain_map_does() {
    let steps = (prop::collection::vec(step(), 1..40), prop::collection::vec(0..9 * GIB, 50));
    runner(300)
        .run(&steps, |(steps, probes)| {
            let domain = SoftDomain::new();
            let mut model = Model::default();
            let mut edges = probes;
            for step in steps {
                match step {
                    Step::Map { start, length, host, prot } => {
                        let taken = model.overlaps(start, length);
                        let result = domain.map(Iova(start), HostAddr(host), length, prot);
                        prop_assert_eq!(result, if taken { Err(Errno::EXIST) } else { Ok(()) });
                        if !taken {
                            model.0.insert(start, Piece { length, host, prot });
                        }
                        edges.extend([start, start + length, start.wrapping_sub(1), start + length - 1]);
                    }
                    Step::Unmap { start, length } => {
                        domain.unmap(range(start, length));
                        model.unmap(start, length);
                        edges.extend([start, start + length, start.wrapping_sub(1), start + length - 1]);
                    }
                    Step::Sync => domain.sync(),
                }
                let mut reader = domain.reader();
                let section = reader.section();
                for &iova in &edges {
                    for (access, right) in [(Access::Read, Prot::READ), (Access::Write, Prot::WRITE)] {
                        let found = section.translate(Iova(iova), access);
                        let expected = match model.find(iova) {
                            None => Err(FaultReason::Unmapped),
                            Some((_, prot)) if !prot.contains(right) => Err(FaultReason::Permission),
                            Some(found) => Ok(found),
                        };
                        let seen = found.map(|f| (f.host.0, f.prot)).map_err(|fault| fault.reason);
                        prop_assert_eq!(seen, expected, "at {:#x}", iova);
                        if let (Ok(found), Some((host, _))) = (found, model.find(iova)) {
                            // All of what it promises lies in one mapping.
                            let last = found.length - 1;
                            prop_assert_eq!(model.find(iova + last).map(|f| f.0), Some(host + last));
                        }
                    }
                }
                drop(section);
                prop_assert_eq!(domain.lookup(Iova(edges[0])), model.find(edges[0]).map(|f| HostAddr(f.0)));
            }
            domain.unmap(IovaRange::ALL);
            prop_assert_eq!(domain.nodes(), 1, "only the root is left");
            Ok(())
        })
        .unwrap();
}

#[test]
fn what_cannot_be_mapped_is_refused() {
    let domain = SoftDomain::new();
    let map = |iova, host, length| domain.map(Iova(iova), HostAddr(host), length, RW);
    assert_eq!(map(1, 0, PAGE_SIZE), Err(Errno::INVAL));
    assert_eq!(map(0, 0x800, PAGE_SIZE), Err(Errno::INVAL));
    assert_eq!(map(0, 0, 0), Err(Errno::INVAL));
    assert_eq!(map(u64::MAX - 4095, 0, 2 * PAGE_SIZE), Err(Errno::OVERFLOW));
    assert_eq!(map((1 << 48) - PAGE_SIZE, 0, 2 * PAGE_SIZE), Err(Errno::OVERFLOW));
    assert_eq!(map(0, u64::MAX - 4095, PAGE_SIZE), Err(Errno::OVERFLOW));
    assert_eq!(map((1 << 48) - PAGE_SIZE, PAGE_SIZE, PAGE_SIZE), Ok(()));
    assert_eq!(at(&domain, (1 << 48) - 1, Access::Read), Ok(HostAddr(2 * PAGE_SIZE - 1)));
    assert_eq!(at(&domain, 1 << 48, Access::Read), Err(FaultReason::Unmapped));
    assert_eq!(at(&domain, u64::MAX, Access::Read), Err(FaultReason::Unmapped));
}

#[test]
fn a_mapping_that_meets_another_leaves_nothing_behind() {
    let domain = SoftDomain::new();
    domain.map(Iova(GIB + MIB2), HostAddr(GIB), PAGE_SIZE, RW).unwrap();
    let nodes = domain.nodes();
    assert_eq!(domain.map(Iova(0), HostAddr(0), 2 * GIB, RW), Err(Errno::EXIST));
    assert_eq!(domain.nodes(), nodes);
    assert_eq!(at(&domain, 0, Access::Read), Err(FaultReason::Unmapped));
    assert_eq!(at(&domain, GIB + MIB2, Access::Read), Ok(HostAddr(GIB)));
}

/// Pages, one by one, of what is reported.
#[derive(Default)]
struct Pages(BTreeSet<u64>);

impl DirtySink for Pages {
    fn dirty(&mut self, iova: Iova, length: u64) {
        self.0.extend((iova.0 / PAGE_SIZE)..(iova.0 + length).div_ceil(PAGE_SIZE));
    }
}

fn dirty(domain: &SoftDomain, range: IovaRange, keep: bool) -> BTreeSet<u64> {
    let mut pages = Pages::default();
    domain.read_and_clear_dirty(range, keep, &mut pages).unwrap();
    pages.0
}

#[test]
fn writes_are_noted_as_a_plain_set_does() {
    const PAGES: u64 = 1200;
    let steps = prop::collection::vec((0..6u8, 0..PAGES, 0..PAGES), 1..200);
    runner(100)
        .run(&steps, |steps| {
            let domain = SoftDomain::new();
            // Small pages: a map for each.
            for page in 0..PAGES {
                domain.map(Iova(page * PAGE_SIZE), HostAddr(page * PAGE_SIZE), PAGE_SIZE, RW).unwrap();
            }
            let (mut model, mut tracking) = (BTreeSet::new(), false);
            for (what, a, b) in steps {
                match what {
                    0 => {
                        let enable = a % 2 == 0;
                        domain.set_dirty_tracking(enable).unwrap();
                        if enable && !tracking {
                            model.clear();
                        }
                        tracking = enable;
                    }
                    1 => {
                        let (first, last) = (a.min(b), a.max(b));
                        let keep = a % 3 == 0;
                        let asked = range(first * PAGE_SIZE, (last - first + 1) * PAGE_SIZE);
                        let expected: BTreeSet<_> = model.range(first..=last).copied().collect();
                        prop_assert_eq!(dirty(&domain, asked, keep), expected.clone());
                        if !keep {
                            model.retain(|page| !expected.contains(page));
                        }
                    }
                    2 => {
                        at(&domain, a * PAGE_SIZE + 17, Access::Read).unwrap();
                    }
                    _ => {
                        at(&domain, a * PAGE_SIZE + b, Access::Write).unwrap();
                        if tracking {
                            model.insert((a * PAGE_SIZE + b) / PAGE_SIZE);
                        }
                    }
                }
            }
            Ok(())
        })
        .unwrap();
}

#[test]
fn a_large_leaf_is_dirty_as_a_whole_and_stays_so_when_it_is_cut() {
    let domain = SoftDomain::new();
    domain.map(Iova(0), HostAddr(0), 2 * MIB2, RW).unwrap();
    domain.set_dirty_tracking(true).unwrap();
    at(&domain, 5, Access::Write).unwrap();
    let whole: BTreeSet<_> = (0..512).collect();
    assert_eq!(dirty(&domain, IovaRange::ALL, true), whole);
    // As far as it is asked for.
    assert_eq!(dirty(&domain, range(PAGE_SIZE, PAGE_SIZE), true), BTreeSet::from([1]));
    domain.unmap(range(0, PAGE_SIZE));
    assert_eq!(dirty(&domain, IovaRange::ALL, false), (1..512).collect());
    assert_eq!(dirty(&domain, IovaRange::ALL, false), BTreeSet::new());
}

#[test]
fn an_open_section_holds_up_sync_and_nothing_else() {
    let domain = SoftDomain::new();
    domain.map(Iova(0), HostAddr(PAGE_SIZE), PAGE_SIZE, RW).unwrap();
    let mut reader = domain.reader();
    let section = reader.section();
    section.translate(Iova(0), Access::Write).unwrap();
    thread::scope(|scope| {
        let (unmapped, is_unmapped) = mpsc::channel();
        let (synced, is_synced) = mpsc::channel();
        let theirs = domain.clone();
        scope.spawn(move || {
            theirs.unmap(range(0, PAGE_SIZE));
            unmapped.send(()).unwrap();
            theirs.sync();
            synced.send(()).unwrap();
        });
        is_unmapped.recv().unwrap();
        // Others map, unmap, translate and come and go; also this section goes on.
        domain.map(Iova(GIB), HostAddr(GIB), MIB2, RW).unwrap();
        assert_eq!(at(&domain, GIB + 1, Access::Read), Ok(HostAddr(GIB + 1)));
        domain.unmap(range(GIB, PAGE_SIZE));
        assert!(section.translate(Iova(GIB + PAGE_SIZE), Access::Read).is_ok());
        assert_eq!(is_synced.try_recv(), Err(mpsc::TryRecvError::Empty));
        let reader = section.close().unwrap();
        is_synced.recv().unwrap();
        assert_eq!(
            reader.section().translate(Iova(0), Access::Read).map_err(|fault| fault.reason),
            Err(FaultReason::Unmapped)
        );
    });
}

/// What the threads below do; `unit` is the size of the pieces.
fn readers_see_only_what_may_be_seen(unit: u64) {
    // Each unit of the address space is mapped to host address `serial * 2^40 + iova`. After unmap and sync, its serial
    // number is withdrawn: a reader must not be in a section where it found a withdrawn one.
    const UNITS: u64 = 24;
    const ROUNDS: u64 = 400;
    let domain = SoftDomain::new();
    let withdrawn: Vec<AtomicU64> = (0..UNITS).map(|_| AtomicU64::new(0)).collect();
    let (end, start) = (AtomicBool::new(false), Barrier::new(3));
    thread::scope(|scope| {
        for thread in 0..2u64 {
            let (domain, withdrawn, end, start) = (&domain, &withdrawn, &end, &start);
            scope.spawn(move || {
                let mut reader = domain.reader();
                let mut random = 0x9e37_79b9 + thread;
                start.wait();
                loop {
                    let section = reader.section();
                    for _ in 0..16 {
                        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                        let iova = (random >> 20) % (UNITS * unit);
                        let access = if random & 1 << 60 == 0 { Access::Read } else { Access::Write };
                        let Ok(found) = section.translate(Iova(iova), access) else { continue };
                        assert_eq!(found.host.0 & ((1 << 40) - 1), iova);
                        let serial = found.host.0 >> 40;
                        let gone = withdrawn[(iova / unit) as usize].load(Ordering::Acquire);
                        assert!(
                            serial > gone,
                            "{iova:#x}: mapping {serial} is in use after it was withdrawn"
                        );
                    }
                    if end.load(Ordering::Relaxed) {
                        break;
                    }
                }
            });
        }
        let cutter = domain.clone();
        scope.spawn(move || {
            // A neighbour that is mapped, cut and unmapped elsewhere, under its own tables and in those of others.
            for round in 0..ROUNDS {
                let base = UNITS * unit + (round % 3) * GIB;
                cutter.map(Iova(base), HostAddr(base), 3 * MIB2, RW).unwrap();
                cutter.unmap(range(base + MIB2 + PAGE_SIZE, PAGE_SIZE));
                cutter.unmap(range(base, 3 * MIB2));
                if round % 8 == 0 {
                    cutter.set_dirty_tracking(round % 16 == 0).unwrap();
                    dirty(&cutter, IovaRange::ALL, false);
                }
            }
        });
        start.wait();
        for round in 1..=ROUNDS {
            let serial = round;
            for which in 0..UNITS {
                let iova = which * unit;
                domain.map(Iova(iova), HostAddr(serial << 40 | iova), unit, RW).unwrap();
            }
            domain.unmap(range(0, UNITS * unit));
            domain.sync();
            for gone in &withdrawn {
                gone.store(serial, Ordering::Release);
            }
        }
        end.store(true, Ordering::Relaxed);
    });
    let counted = domain.counters();
    assert_ne!(counted, Counters::default());
}

#[test]
fn readers_of_small_pages_see_only_what_may_be_seen() {
    readers_see_only_what_may_be_seen(PAGE_SIZE);
}

#[test]
fn readers_of_large_pages_see_only_what_may_be_seen() {
    readers_see_only_what_may_be_seen(MIB2);
}

#[test]
fn a_port_follows_its_device() {
    let device = SoftDevice::new(1, vec![]);
    let port = device.port(None);
    let mut reader = port.reader();
    let look = |reader: &mut PortReader| {
        reader.section().translate(Iova(0), Access::Read).map(|f| f.host.0).map_err(|fault| fault.reason)
    };
    assert_eq!(look(&mut reader), Err(FaultReason::Detached));
    let domains: Vec<Arc<dyn Domain>> = (1..=2)
        .map(|n| {
            let domain = device.alloc_paging(None, Default::default(), Default::default()).unwrap();
            domain.map(Iova(0), HostAddr(n * PAGE_SIZE), PAGE_SIZE, RW).unwrap();
            domain
        })
        .collect();
    for (domain, host) in domains.iter().zip([PAGE_SIZE, 2 * PAGE_SIZE]) {
        device.attach(None, Some(&Attachment::Paging(Arc::clone(domain)))).unwrap();
        assert_eq!(look(&mut reader), Ok(host));
    }
    // A PASID has an attachment of its own.
    device.attach(Some(3), Some(&Attachment::Paging(Arc::clone(&domains[0])))).unwrap();
    assert_eq!(look(&mut device.port(Some(3)).reader()), Ok(PAGE_SIZE));
    assert_eq!(look(&mut reader), Ok(2 * PAGE_SIZE));
    assert_eq!(device.attach(Some(1 << 20), None), Err(Errno::INVAL));

    // Detaching waits for an open section.
    let section = reader.section();
    assert!(section.translate(Iova(0), Access::Read).is_ok());
    thread::scope(|scope| {
        let (done, is_done) = mpsc::channel();
        let theirs = Arc::clone(&device);
        scope.spawn(move || {
            theirs.attach(None, None).unwrap();
            done.send(()).unwrap();
        });
        // The domain is gone from the port before the wait begins.
        while port.is_attached() {
            thread::yield_now();
        }
        assert!(section.translate(Iova(0), Access::Read).is_ok());
        assert_eq!(is_done.try_recv(), Err(mpsc::TryRecvError::Empty));
        drop(section);
        is_done.recv().unwrap();
    });
    assert_eq!(look(&mut reader), Err(FaultReason::Detached));
}

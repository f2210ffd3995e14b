//! The rules of the kernel's interface, one by one. Most are cases of its own selftests
//! (tools/testing/selftests/iommu/iommufd.c) without the ioctls.

use std::sync::{Arc, Mutex, Weak};

use super::{
    PAGE,
    domain::TestDomain,
    process::{Buffer, TestProcess, pattern},
    range, store,
};
use crate::{
    Errno, Result,
    account::Accounting,
    domain::{Domain, Prot},
    ioas::{AccessOps, DirtyBitmap, Ioas, Owner, Pinned},
    iova::{Iova, IovaRange},
    pages::Pages,
    process::{Process, UserAddr},
};

const RW: Prot = Prot::READ.union(Prot::WRITE);
const BASE: u64 = 1 << 24;

/// An address space, memory of 16 pages with a pattern, and a store of it.
struct Bench {
    ioas: Arc<Ioas>,
    process: Arc<TestProcess>,
    buffer: Buffer,
    pages: Arc<Pages>,
}

impl Bench {
    fn new() -> Self {
        let (process, buffer) = (TestProcess::new(), Buffer::new(16));
        buffer.number();
        let pages = store(&process, buffer.start(), 16 * PAGE);
        Self { ioas: Ioas::new(), process, buffer, pages }
    }

    fn map(&self, page: u64, pages: u64, at: u64) -> Result<Iova> {
        self.ioas.map(&self.pages, page * PAGE, pages * PAGE, Some(Iova(at)), RW)
    }

    fn map_somewhere(&self, length: u64) -> Result<u64> {
        self.ioas.map(&self.pages, 0, length, None, RW).map(|iova| iova.0)
    }

    fn unmap(&self, at: u64, length: u64) -> Result<u64> {
        self.ioas.unmap(range(at, length))
    }

    fn attach(&self, domain: &Arc<TestDomain>) -> Result<Arc<dyn Domain>> {
        let domain: Arc<dyn Domain> = domain.clone();
        self.ioas.attach_domain(&domain).map(|()| domain)
    }

    /// How often each page of the buffer is pinned.
    fn pins(&self) -> Vec<u64> {
        (0..16).map(|page| self.process.pin_count(self.buffer.page(page)).unwrap()).collect()
    }
}

/// An access that drops its pins when it is told to, unless it is stubborn.
#[derive(Default)]
struct Access {
    pinned: Mutex<Vec<Pinned>>,
    told: Mutex<Vec<IovaRange>>,
    stubborn: bool,
}

impl AccessOps for Access {
    fn unmap(&self, range: IovaRange) {
        self.told.lock().unwrap().push(range);
        if !self.stubborn {
            self.pinned.lock().unwrap().clear();
        }
    }
}

fn weak(access: &Arc<Access>) -> Weak<dyn AccessOps> {
    let weak: Weak<Access> = Arc::downgrade(access);
    weak
}

#[test]
fn areas_do_not_overlap_and_are_not_split() {
    let bench = Bench::new();
    assert_eq!(bench.unmap(BASE, PAGE), Ok(0));
    for page in 0..10 {
        assert_eq!(bench.map(0, 1, BASE + page * PAGE), Ok(Iova(BASE + page * PAGE)));
    }
    for page in 0..10 {
        assert_eq!(bench.unmap(BASE + page * PAGE, PAGE), Ok(PAGE));
    }
    bench.map(0, 2, BASE + 16 * PAGE).unwrap();
    assert_eq!(bench.unmap(BASE + 16 * PAGE, PAGE), Err(Errno::NOENT));
    assert_eq!(bench.unmap(BASE + 17 * PAGE, PAGE), Err(Errno::NOENT));
    for (page, pages) in [(16, 2), (16, 1), (17, 1), (15, 2), (15, 3)] {
        assert_eq!(bench.map(0, pages, BASE + page * PAGE), Err(Errno::EXIST));
    }
    assert_eq!(bench.ioas.unmap(IovaRange::ALL), Ok(2 * PAGE));
    assert_eq!(bench.ioas.unmap(IovaRange::ALL), Ok(0));
}

#[test]
fn unmapping_takes_whole_areas_and_stops_at_the_first_that_is_not() {
    let bench = Bench::new();
    for index in 0..4 {
        bench.map(0, 8, BASE + index * 16 * PAGE).unwrap();
    }
    assert_eq!(bench.unmap(BASE - 4 * PAGE, 8 * PAGE), Err(Errno::NOENT));
    assert_eq!(bench.unmap(BASE + (3 * 16 + 4) * PAGE, 8 * PAGE), Err(Errno::NOENT));
    assert_eq!(bench.unmap(BASE + 12 * PAGE, 20 * PAGE), Ok(8 * PAGE));
    assert_eq!(bench.unmap(BASE - 4 * PAGE, 36 * PAGE), Ok(8 * PAGE));
    assert_eq!(bench.unmap(BASE + 32 * PAGE, 20 * PAGE), Err(Errno::NOENT), "and the third is gone");
    assert_eq!(bench.ioas.unmap(IovaRange::ALL), Ok(8 * PAGE));
}

#[test]
fn bad_ranges_are_refused_in_order() {
    let bench = Bench::new();
    let map = |offset, length, at| bench.ioas.map(&bench.pages, offset, length, Some(Iova(at)), RW);
    assert_eq!(map(0, 0, BASE), Err(Errno::INVAL));
    assert_eq!(map(0, 16 * PAGE + 1, BASE), Err(Errno::INVAL));
    assert_eq!(map(u64::MAX, PAGE, BASE), Err(Errno::OVERFLOW));
    assert_eq!(map(0, PAGE, u64::MAX - 10), Err(Errno::OVERFLOW));
    assert_eq!(map(0, PAGE, u64::MAX - PAGE + 1), Ok(Iova(u64::MAX - PAGE + 1)), "the last page of all");
    bench.ioas.reserve(range(BASE, PAGE), Owner::new()).unwrap();
    assert_eq!(map(0, 2 * PAGE, BASE - PAGE), Err(Errno::INVAL));
    let user = |start, length| {
        Pages::user(bench.process.clone(), UserAddr(start), length, true, Accounting::None).map(|_| ())
    };
    assert_eq!(user(0, 0), Err(Errno::INVAL));
    assert_eq!(user(u64::MAX, 2), Err(Errno::OVERFLOW));
    assert_eq!(user(u64::MAX, 1), Err(Errno::OVERFLOW));
    assert_eq!(user(u64::MAX - 1, 1), Ok(()));
}

#[test]
fn automatic_addresses_are_aligned_and_avoid_what_is_reserved() {
    let bench = Bench::new();
    let aligned = store(&bench.process, UserAddr(1 << 31), 16 * PAGE);
    let map = |pages| bench.ioas.map(&aligned, 0, pages * PAGE, None, RW).map(|iova| iova.0);
    let map_ten = || {
        let at: Vec<u64> = (1..=10).map(|pages| map(pages).unwrap()).collect();
        for (at, pages) in at.iter().zip(1..) {
            assert_eq!(at % (1_u64 << (pages * PAGE).trailing_zeros()), 0);
        }
        at
    };
    let unmap_ten = |at: &[u64]| {
        for (&at, pages) in at.iter().zip(1..) {
            assert_eq!(bench.unmap(at, pages * PAGE), Ok(pages * PAGE));
        }
    };
    let first = map_ten();
    assert_eq!(first[0], 0, "from below");
    unmap_ten(&first);
    assert_eq!(map_ten(), first, "what was unmapped is used again");
    unmap_ten(&first);

    bench.ioas.reserve(range(4 * PAGE, 100 * PAGE), Owner::new()).unwrap();
    let at = map_ten();
    assert!(at.iter().zip(1..).all(|(at, pages)| at + pages * PAGE <= 4 * PAGE || *at >= 104 * PAGE));
    unmap_ten(&at);

    let allowed = IovaRange::new(Iova(200 * PAGE), Iova(600 * PAGE - 1)).unwrap();
    let overlapping = IovaRange::new(Iova(PAGE), Iova(600 * PAGE)).unwrap();
    assert_eq!(bench.ioas.set_allowed(&[overlapping]), Err(Errno::ADDRINUSE));
    bench.ioas.set_allowed(&[allowed]).unwrap();
    let at = map_ten();
    assert!(at.iter().zip(1..).all(|(&at, pages)| allowed.covers(range(at, pages * PAGE))));
    assert_eq!(bench.map(0, 1, 0), Ok(Iova(0)), "a fixed address need not be allowed");
    unmap_ten(&at);
    assert_eq!(bench.ioas.reserve(range(300 * PAGE, PAGE), Owner::new()), Err(Errno::ADDRINUSE));
    bench.ioas.set_allowed(&[range(1000 * PAGE, 2 * PAGE)]).unwrap();
    assert_eq!(map(3), Err(Errno::NOSPC));
}

#[test]
fn a_reserved_range_that_leaves_only_the_end_has_room_for_nothing() {
    let bench = Bench::new();
    bench.ioas.reserve(range(6, 0xffff_ffff_ffff_8001), Owner::new()).unwrap();
    let aligned = store(&bench.process, UserAddr(1 << 31), 16 * PAGE);
    assert_eq!(bench.ioas.map(&aligned, 0, 5 * PAGE, None, RW), Err(Errno::NOSPC));
}

#[test]
fn any_length_and_address_goes_without_a_domain_and_only_whole_pages_with_one() {
    let bench = Bench::new();
    for length in 1..2 * PAGE {
        let at = bench.map_somewhere(length).unwrap();
        assert_eq!(bench.unmap(at, length), Ok(length));
    }
    assert_eq!(bench.ioas.iova_alignment(), 1);
    bench.attach(&TestDomain::new(2048, range(BASE, 1 << 30))).unwrap();
    assert_eq!(bench.ioas.iova_alignment(), 2048);
    assert_eq!(bench.ioas.iova_ranges(), [range(BASE, 1 << 30)]);
    for length in 1..2 * PAGE {
        match bench.map_somewhere(length) {
            Ok(at) => {
                assert_eq!(length % 2048, 0);
                assert_eq!(bench.unmap(at, length), Ok(length));
            }
            Err(errno) => assert_eq!((errno, length % 2048 == 0), (Errno::INVAL, false)),
        }
    }
}

#[test]
fn every_alignment_reaches_the_page_table() {
    let bench = Bench::new();
    let table = TestDomain::new(2048, range(BASE, 1 << 30));
    bench.attach(&table).unwrap();
    for start in (0..16 * PAGE).step_by(2048) {
        for end in (start + 2048..=16 * PAGE).step_by(2048) {
            let at = bench.ioas.map(&bench.pages, start, end - start, None, RW).unwrap();
            for offset in (start..end).step_by(2048) {
                let host = table.lookup(Iova(at.0 + offset - start)).unwrap();
                assert_eq!(host.0, bench.buffer.start().0 + offset);
            }
            let pins = bench.pins();
            for page in 0..16 {
                let used = page * PAGE < end && start < (page + 1) * PAGE;
                assert_eq!(pins[page as usize], u64::from(used));
            }
            assert_eq!(bench.unmap(at.0, end - start), Ok(end - start));
            assert_eq!(table.bytes(), 0);
        }
    }
    assert_eq!(bench.pins(), [0; 16]);
}

#[test]
fn a_domain_gets_what_is_mapped_before_and_after_and_pages_are_pinned_once() {
    let bench = Bench::new();
    bench.map(0, 4, BASE).unwrap();
    assert_eq!(bench.pins(), [0; 16], "nobody needs them");
    let (one, two) = (TestDomain::any(), TestDomain::any());
    let first = bench.attach(&one).unwrap();
    assert_eq!(bench.attach(&one).map(|_| ()), Err(Errno::EXIST));
    bench.map(2, 4, BASE + 8 * PAGE).unwrap();
    let second = bench.attach(&two).unwrap();
    assert_eq!((one.bytes(), two.bytes()), (8 * PAGE, 8 * PAGE));
    assert_eq!(one.mappings(), 2, "memory that lies together is mapped at once");
    assert_eq!(bench.pins()[..7], [1, 1, 1, 1, 1, 1, 0]);
    assert_eq!(bench.process.usage().pinned(), 6);
    bench.ioas.detach_domain(&first);
    assert_eq!((one.bytes(), two.bytes()), (0, 8 * PAGE));
    assert_eq!(bench.pins()[..7], [1, 1, 1, 1, 1, 1, 0]);
    assert_eq!(bench.unmap(BASE, 4 * PAGE), Ok(4 * PAGE));
    assert_eq!(bench.pins()[..7], [0, 0, 1, 1, 1, 1, 0]);
    bench.ioas.detach_domain(&second);
    assert_eq!(bench.pins(), [0; 16]);
    assert_eq!((two.bytes(), bench.process.usage().pinned()), (0, 0));
}

#[test]
fn a_domain_that_does_not_fit_is_refused() {
    let bench = Bench::new();
    let high = range(1 << 32, 1 << 20);
    bench.map(0, 1, BASE).unwrap();
    assert_eq!(bench.attach(&TestDomain::new(4096, high)).map(|_| ()), Err(Errno::ADDRINUSE));
    assert_eq!(bench.ioas.iova_ranges(), [IovaRange::ALL], "nothing stays reserved");
    assert_eq!(bench.attach(&TestDomain::new(8192, IovaRange::ALL)).map(|_| ()), Err(Errno::INVAL));
    assert_eq!(bench.attach(&TestDomain::new(0, IovaRange::ALL)).map(|_| ()), Err(Errno::INVAL));
    bench.ioas.map(&bench.pages, 0, 100, Some(Iova(BASE + PAGE)), RW).unwrap();
    assert_eq!(bench.attach(&TestDomain::any()).map(|_| ()), Err(Errno::ADDRINUSE));
    assert_eq!(bench.ioas.iova_alignment(), 1);
    bench.unmap(BASE + PAGE, 100).unwrap();
    bench.process.miss(bench.buffer.page(0), 1);
    assert_eq!(bench.attach(&TestDomain::any()).map(|_| ()), Err(Errno::FAULT));
    assert_eq!((bench.ioas.iova_alignment(), bench.pins()), (1, vec![0; 16]));
}

#[test]
fn missing_memory_is_noticed_when_it_is_needed() {
    let bench = Bench::new();
    bench.process.miss(bench.buffer.page(8), 8);
    bench.map(0, 16, BASE).unwrap();
    assert_eq!(bench.ioas.read(Iova(BASE), &mut [0; 16]), Ok(()));
    assert_eq!(bench.ioas.read(Iova(BASE + 8 * PAGE - 8), &mut [0; 16]), Err(Errno::FAULT));
    bench.unmap(BASE, 16 * PAGE).unwrap();
    let table = TestDomain::any();
    bench.attach(&table).unwrap();
    assert_eq!(bench.map(0, 16, BASE), Err(Errno::FAULT));
    assert_eq!((table.bytes(), bench.pins()), (0, vec![0; 16]));
    assert_eq!(bench.ioas.unmap(IovaRange::ALL), Ok(0));
    assert_eq!(bench.map(0, 8, BASE), Ok(Iova(BASE)));
}

#[test]
fn copies_share_the_pages() {
    let bench = Bench::new();
    let other = Ioas::new();
    bench.map(0, 4, BASE).unwrap();
    let copy = |from, length, at| other.copy_from(&bench.ioas, range(from, length), Some(Iova(at)), RW);
    assert_eq!(copy(BASE, 4 * PAGE, 0), Ok(Iova(0)));
    assert_eq!(copy(BASE + 511, 2048, 0x10_0000), Ok(Iova(0x10_0000)));
    assert_eq!(copy(BASE - 1, 2048, 0x20_0000), Err(Errno::NOENT));
    assert_eq!(copy(BASE + 4 * PAGE - 2047, 2048, 0x20_0000), Err(Errno::NOENT));
    let mut bytes = [0; 4];
    other.read(Iova(0x10_0000 + 5), &mut bytes).unwrap();
    assert_eq!(bytes, [516, 517, 518, 519].map(pattern));
    let itself = bench.ioas.copy_from(&bench.ioas, range(BASE, 2 * PAGE), None, Prot::READ).unwrap();
    assert_eq!(bench.ioas.write(itself, &[1]), Err(Errno::PERM));

    let (one, two) = (TestDomain::any(), TestDomain::any());
    bench.attach(&one).unwrap();
    other.unmap(range(0x10_0000, 2048)).unwrap();
    let domain: Arc<dyn Domain> = two.clone();
    other.attach_domain(&domain).unwrap();
    assert_eq!(bench.pins()[..5], [1, 1, 1, 1, 0]);
    assert_eq!(bench.process.usage().pinned(), 4);
    assert_eq!(bench.ioas.unmap(IovaRange::ALL), Ok(6 * PAGE));
    assert_eq!(bench.pins()[..5], [1, 1, 1, 1, 0]);
    assert_eq!(two.lookup(Iova(0)).map(|host| host.0), Some(bench.buffer.start().0));
    drop(other);
    assert_eq!((bench.pins(), two.bytes()), (vec![0; 16], 0));
}

#[test]
fn a_copy_of_several_areas_is_several_areas() {
    let bench = Bench::new();
    bench.map(4, 2, BASE).unwrap();
    bench.map(0, 2, BASE + 2 * PAGE).unwrap();
    let other = Ioas::new();
    let at = other.copy_from(&bench.ioas, range(BASE + PAGE, 2 * PAGE), None, RW).unwrap();
    let mut bytes = vec![0; 2 * PAGE as usize];
    other.read(at, &mut bytes).unwrap();
    let expected: Vec<u8> = (5 * PAGE..6 * PAGE).chain(0..PAGE).map(pattern).collect();
    assert_eq!(bytes, expected);
    assert_eq!(other.unmap(range(at.0, PAGE)), Ok(PAGE));
}

#[test]
fn read_only_memory_stays_so() {
    let bench = Bench::new();
    let process: Arc<dyn Process> = bench.process.clone();
    let pages = Pages::user(process, bench.buffer.start(), PAGE, false, Accounting::None).unwrap();
    let map = |prot| bench.ioas.map(&pages, 0, PAGE, Some(Iova(BASE)), prot);
    assert_eq!(map(RW), Err(Errno::PERM));
    let table = TestDomain::any();
    bench.attach(&table).unwrap();
    map(Prot::READ).unwrap();
    assert_eq!(table.prot(BASE), Some(Prot::READ));
    assert_eq!(bench.ioas.write(Iova(BASE), &[1]), Err(Errno::PERM));
    assert_eq!(bench.ioas.pin(Iova(BASE), PAGE, true, false).map(|_| ()), Err(Errno::PERM));
    assert_eq!(bench.ioas.copy_from(&bench.ioas, range(BASE, PAGE), None, RW), Err(Errno::PERM));
    let pinned = bench.ioas.pin(Iova(BASE), PAGE, false, false).unwrap();
    assert_eq!(pinned.write(0, &[1]), Err(Errno::PERM));
    assert_eq!(pinned.store(0, 1_u32, std::sync::atomic::Ordering::Relaxed), Err(Errno::PERM));
}

#[test]
fn a_pin_has_the_errors_of_the_interface() {
    let bench = Bench::new();
    let pin = |at, length, write| bench.ioas.pin(Iova(at), length, write, false).map(|_| ());
    assert_eq!(pin(BASE, 0, false), Err(Errno::INVAL));
    assert_eq!(pin(u64::MAX, PAGE, false), Err(Errno::OVERFLOW));
    assert_eq!(pin(BASE, PAGE, false), Err(Errno::NOENT));
    bench.map(0, 4, BASE).unwrap();
    assert_eq!(pin(BASE + 1, 8, false), Err(Errno::INVAL));
    assert_eq!(pin(BASE, 8, false), Ok(()), "the last page need not be whole");
    assert_eq!(pin(BASE, 5 * PAGE, false), Err(Errno::NOENT));
    bench.ioas.map(&bench.pages, 100, 2 * PAGE, Some(Iova(BASE + 4 * PAGE)), RW).unwrap();
    assert_eq!(pin(BASE, 5 * PAGE, false), Err(Errno::INVAL), "the next area begins within a page");
    bench.unmap(BASE + 4 * PAGE, 2 * PAGE).unwrap();
    bench.ioas.map(&bench.pages, 0, PAGE, Some(Iova(BASE + 4 * PAGE)), Prot::READ).unwrap();
    assert_eq!(pin(BASE, 5 * PAGE, true), Err(Errno::PERM));
    assert_eq!(pin(BASE, 5 * PAGE, false), Ok(()));
    bench.process.miss(bench.buffer.page(3), 1);
    assert_eq!(pin(BASE, 5 * PAGE, true), Err(Errno::FAULT), "it comes before the area that is read-only");
    assert_eq!(bench.pins(), [0; 16], "and nothing stays pinned");
    assert_eq!(bench.unmap(BASE, 5 * PAGE), Ok(5 * PAGE));
}

#[test]
fn a_pin_reads_and_writes_its_pages() {
    use std::sync::atomic::Ordering::{Acquire, Release};
    let bench = Bench::new();
    bench.map(6, 2, BASE).unwrap();
    bench.map(1, 2, BASE + 2 * PAGE).unwrap();
    let pinned = bench.ioas.pin(Iova(BASE + PAGE), 3 * PAGE, true, false).unwrap();
    assert_eq!(pinned.length(), 3 * PAGE);
    let runs: Vec<(u64, u64)> = pinned.runs().iter().map(|run| (run.start.0, run.pages)).collect();
    assert_eq!(runs, [(bench.buffer.page(7).0, 1), (bench.buffer.page(1).0, 2)]);
    let mut bytes = [0; 8];
    pinned.read(PAGE - 4, &mut bytes).unwrap();
    let expected: Vec<u8> = (8 * PAGE - 4..8 * PAGE).chain(PAGE..PAGE + 4).map(pattern).collect();
    assert_eq!(bytes, expected[..]);
    pinned.write(PAGE - 2, &[1, 2, 3, 4]).unwrap();
    assert_eq!(bench.buffer.bytes(8 * PAGE - 2, 2), [1, 2]);
    assert_eq!(bench.buffer.bytes(PAGE, 2), [3, 4]);
    pinned.store(8, 0x0102_0304_u32, Release).unwrap();
    assert_eq!(pinned.load(8, Acquire), Ok(0x0102_0304_u32));
    assert_eq!(bench.buffer.bytes(7 * PAGE + 8, 4), 0x0102_0304_u32.to_ne_bytes());
    assert_eq!(pinned.load::<u32>(2, Acquire), Err(Errno::INVAL));
    assert_eq!(pinned.load::<u64>(PAGE - 4, Acquire), Err(Errno::INVAL), "two areas are not loaded at once");
    assert_eq!(pinned.read(3 * PAGE - 7, &mut bytes), Err(Errno::INVAL));
    assert_eq!(pinned.write(u64::MAX, &[1]), Err(Errno::INVAL));
}

#[test]
fn unmapping_asks_accesses_to_let_go() {
    let bench = Bench::new();
    let access = Arc::new(Access::default());
    let id = bench.ioas.add_access(weak(&access), PAGE).unwrap();
    bench.map(0, 4, BASE).unwrap();
    bench.map(4, 4, BASE + 8 * PAGE).unwrap();
    let pin = |page| bench.ioas.pin(Iova(BASE + page * PAGE), PAGE, true, false).unwrap();
    *access.pinned.lock().unwrap() = vec![pin(1), pin(1), pin(8)];
    assert_eq!(bench.pins()[..5], [0, 1, 0, 0, 1]);
    assert_eq!(bench.unmap(BASE, 4 * PAGE), Ok(4 * PAGE));
    assert_eq!(*access.told.lock().unwrap(), [range(BASE, 4 * PAGE)]);
    assert_eq!(bench.pins(), [0; 16]);

    let kept = pin(9);
    assert_eq!(bench.unmap(BASE + 8 * PAGE, 4 * PAGE), Err(Errno::DEADLK));
    assert_eq!(pin(10).length(), PAGE, "whoever asked has given up");
    drop(kept);
    bench.ioas.remove_access(id);
    assert_eq!(bench.unmap(BASE + 8 * PAGE, 4 * PAGE), Ok(4 * PAGE));
}

#[test]
fn what_is_being_unmapped_cannot_be_pinned() {
    struct Greedy {
        ioas: Weak<Ioas>,
        pinned: Mutex<Option<Pinned>>,
        again: Mutex<Vec<Errno>>,
    }
    impl AccessOps for Greedy {
        fn unmap(&self, range: IovaRange) {
            let ioas = self.ioas.upgrade().unwrap();
            let again = ioas.pin(range.start(), PAGE, false, false).unwrap_err();
            let copied = ioas.read(range.start(), &mut [0]).unwrap_err();
            self.again.lock().unwrap().extend([again, copied]);
            self.pinned.lock().unwrap().take();
        }
    }
    let bench = Bench::new();
    bench.map(0, 1, BASE).unwrap();
    let pinned = bench.ioas.pin(Iova(BASE), PAGE, false, false).unwrap();
    let greedy = Arc::new(Greedy {
        ioas: Arc::downgrade(&bench.ioas),
        pinned: Mutex::new(Some(pinned)),
        again: Mutex::default(),
    });
    let ops: Weak<Greedy> = Arc::downgrade(&greedy);
    bench.ioas.add_access(ops, PAGE).unwrap();
    assert_eq!(bench.unmap(BASE, PAGE), Ok(PAGE));
    assert_eq!(*greedy.again.lock().unwrap(), [Errno::INVAL, Errno::BUSY]);
}

#[test]
fn an_owner_keeps_its_areas_mapped() {
    let bench = Bench::new();
    let access = Arc::new(Access::default());
    bench.ioas.add_access(weak(&access), PAGE).unwrap();
    bench.map(0, 1, BASE).unwrap();
    bench.map(1, 1, BASE + PAGE).unwrap();
    let queue = bench.ioas.pin(Iova(BASE), PAGE, true, true).unwrap();
    let second = bench.ioas.pin(Iova(BASE), PAGE / 2, true, true).unwrap();
    assert_eq!(bench.unmap(BASE, PAGE), Err(Errno::BUSY));
    assert_eq!(bench.unmap(BASE + PAGE, PAGE), Ok(PAGE));
    drop(queue);
    assert_eq!(bench.unmap(BASE, PAGE), Err(Errno::BUSY));
    drop(second);
    assert_eq!(bench.unmap(BASE, PAGE), Ok(PAGE));
    assert!(access.told.lock().unwrap().is_empty(), "an owner is not asked");
}

#[test]
fn copies_go_across_areas_at_any_byte() {
    let bench = Bench::new();
    bench.ioas.map(&bench.pages, 2048, 3000, Some(Iova(BASE + 2048)), RW).unwrap();
    bench.ioas.map(&bench.pages, 8000, 3000, Some(Iova(BASE + 5048)), RW).unwrap();
    let expected: Vec<u8> = (2048..5048).chain(8000..11000).map(pattern).collect();
    bench.pages.pin(8192, 1).unwrap();
    for (start, length) in [(0, 6000), (2990, 20), (17, 1), (2999, 2), (5999, 1)] {
        let mut bytes = vec![0; length];
        bench.ioas.read(Iova(BASE + 2048 + start as u64), &mut bytes).unwrap();
        assert_eq!(bytes, expected[start..start + length]);
    }
    assert_eq!(bench.ioas.read(Iova(BASE), &mut [0; 1]), Err(Errno::NOENT));
    assert_eq!(bench.ioas.read(Iova(BASE + 8047), &mut [0; 2]), Err(Errno::NOENT));
    assert_eq!(bench.ioas.read(Iova(BASE + 2048), &mut []), Err(Errno::INVAL));
    assert_eq!(bench.ioas.read(Iova(u64::MAX), &mut [0; 2]), Err(Errno::OVERFLOW));
    bench.ioas.write(Iova(BASE + 5046), &[9, 8, 7, 6]).unwrap();
    assert_eq!(bench.buffer.bytes(5046, 2), [9, 8]);
    assert_eq!(bench.buffer.bytes(8000, 2), [7, 6]);
    bench.pages.unpin(8192, 1);
}

#[test]
fn huge_pages_are_an_option() {
    let bench = Bench::new();
    assert!(bench.ioas.huge_pages());
    bench.map(0, 1, BASE).unwrap();
    bench.ioas.set_huge_pages(false).unwrap();
    assert_eq!(bench.ioas.iova_alignment(), PAGE);
    let misaligned = || bench.ioas.map(&bench.pages, 2048, PAGE, Some(Iova(BASE + PAGE)), RW);
    assert_eq!(misaligned(), Err(Errno::INVAL));
    bench.ioas.set_huge_pages(true).unwrap();
    misaligned().unwrap();
    assert_eq!(bench.ioas.set_huge_pages(false), Err(Errno::ADDRINUSE));
    assert!(bench.ioas.huge_pages());
    bench.unmap(BASE + PAGE, PAGE).unwrap();
    let table = TestDomain::any();
    bench.attach(&table).unwrap();
    assert_eq!(bench.ioas.set_huge_pages(false), Err(Errno::INVAL));
    bench.unmap(BASE, PAGE).unwrap();
    bench.ioas.set_huge_pages(false).unwrap();
    bench.map(0, 4, BASE).unwrap();
    assert_eq!(table.mappings(), 4);
}

#[test]
fn areas_are_cut_without_huge_pages() {
    let bench = Bench::new();
    let table = TestDomain::any();
    bench.attach(&table).unwrap();
    bench.map(0, 16, BASE).unwrap();
    assert_eq!(bench.ioas.cut(&[Iova(BASE + PAGE)]), Err(Errno::INVAL));
    bench.unmap(BASE, 16 * PAGE).unwrap();
    bench.ioas.set_huge_pages(false).unwrap();
    bench.map(0, 16, BASE).unwrap();
    assert_eq!(bench.ioas.cut(&[Iova(BASE + 1)]), Err(Errno::INVAL));
    let pinned = bench.ioas.pin(Iova(BASE), PAGE, false, false).unwrap();
    assert_eq!(bench.ioas.cut(&[Iova(BASE + PAGE)]), Err(Errno::BUSY));
    drop(pinned);
    for page in [5, 2, 9, 0, 15] {
        let (from, to) = (BASE + page * PAGE, BASE + (page + 1) * PAGE);
        bench.ioas.cut(&[Iova(from), Iova(to)]).unwrap();
        assert_eq!(bench.unmap(from, PAGE), Ok(PAGE));
        assert_eq!(bench.pins()[page as usize], 0);
    }
    assert_eq!(table.bytes(), 11 * PAGE);
    assert_eq!(bench.pins().iter().sum::<u64>(), 11);
    bench.ioas.cut(&[Iova(0), Iova(BASE), Iova(BASE + 3 * PAGE), Iova(u64::MAX)]).unwrap();
    assert_eq!(bench.unmap(BASE + 3 * PAGE, 2 * PAGE), Ok(2 * PAGE));
    assert_eq!(bench.ioas.unmap(IovaRange::ALL), Ok(9 * PAGE));
    assert_eq!((bench.pins(), table.bytes()), (vec![0; 16], 0));
}

#[test]
fn dirty_pages_are_bits_in_user_memory() {
    let bench = Bench::new();
    let table = TestDomain::any();
    let domain = bench.attach(&table).unwrap();
    bench.map(0, 8, BASE).unwrap();
    bench.map(8, 8, BASE + 8 * PAGE).unwrap();
    table.write(BASE);
    bench.ioas.set_dirty_tracking(&domain, true).unwrap();
    let bits = Buffer::new(1);
    let read = |start, length, page_size, at, keep| {
        let bitmap = DirtyBitmap {
            range: range(start, length),
            page_size,
            process: &*bench.process,
            at: UserAddr(bits.start().0.wrapping_add(at)),
        };
        bench.ioas.read_dirty(&domain, &bitmap, keep)
    };
    let pages = |list: &[u64]| list.iter().for_each(|page| table.write(BASE + page * PAGE));
    pages(&[1, 7, 8, 15]);
    read(BASE, 16 * PAGE, PAGE, 0, true).unwrap();
    assert_eq!(bits.bytes(0, 3), [0b1000_0010, 0b1000_0001, 0]);
    read(BASE, 16 * PAGE, 2048, 0x11, false).unwrap();
    assert_eq!(bits.bytes(0x11, 4), [0b0000_1100, 0b1100_0000, 0b0000_0011, 0b1100_0000]);
    read(BASE, 16 * PAGE, PAGE, 0x20, false).unwrap();
    assert_eq!(bits.bytes(0x20, 2), [0, 0], "they are forgotten");
    pages(&[3, 9]);
    read(BASE + 8 * PAGE, 8 * PAGE, 2 * PAGE, 0x30, false).unwrap();
    assert_eq!(bits.bytes(0x30, 1), [0b0000_0001]);
    read(BASE, 16 * PAGE, PAGE, 0x40, false).unwrap();
    assert_eq!(bits.bytes(0x40, 2), [0b0000_1000, 0], "another part was not asked for");

    assert_eq!(read(BASE, 16 * PAGE, 0, 0, false), Err(Errno::INVAL));
    assert_eq!(read(BASE, 15 * PAGE, 2 * PAGE, 0, false), Err(Errno::INVAL));
    assert_eq!(read(BASE + 100, PAGE, PAGE, 0, false), Err(Errno::INVAL));
    pages(&[15]);
    read(BASE - 2 * PAGE, 30 * PAGE, PAGE, 0x50, true).unwrap();
    assert_eq!(bits.bytes(0x50, 4), [0, 0, 2, 0], "holes are clean");
    let nowhere = bits.start().0.wrapping_neg() + 1;
    assert_eq!(read(BASE, 16 * PAGE, PAGE, nowhere, true), Err(Errno::FAULT));
    assert_eq!(
        read(BASE, 8 * PAGE, PAGE, nowhere, true),
        Ok(()),
        "a bitmap that is not needed need not be there"
    );
}

//! Walks that race with each other and with a guest that changes its tables.

use std::sync::Barrier;
use std::thread;

use mmu::testing::FlatMemory;
use mmu::{Access, AccessKind, Gpa, Gva, PageTableMemory, PageWalk, PagingState, Privilege, cr0, cr4, efer};

const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const READ: Access = Access::new(AccessKind::Read, Privilege::Supervisor);
const WRITE: Access = Access::new(AccessKind::Write, Privilege::Supervisor);
const PAGES: u64 = 512;

/// 4-level tables at pages 1 to 4 that map `PAGES` pages at 0 to page 16 and on.
fn tables() -> (PageWalk, FlatMemory) {
    let state = PagingState {
        cr0: cr0::PG | cr0::WP,
        cr3: 1 << 12,
        cr4: cr4::PAE,
        efer: efer::LMA,
        maxphyaddr: 40,
        ..PagingState::default()
    };
    let mut memory = FlatMemory::new(5 << 12);
    for level in 1..4 {
        memory.set_u64(level << 12, (level + 1) << 12 | 7);
    }
    for page in 0..PAGES {
        memory.set_u64((4 << 12) + page * 8, (16 + page) << 12 | 7);
    }
    (PageWalk::new(&state), memory)
}

fn entry(memory: &FlatMemory, page: u64) -> u64 {
    memory.read_u64(Gpa((4 << 12) + page * 8)).unwrap_or(u64::MAX)
}

/// Two walkers set the bits of the same entries, one by reading and one by writing: every bit is there in the
/// end, and every translation was right.
#[test]
fn two_walkers_lose_nothing() {
    for _ in 0..400 {
        let (walk, memory) = tables();
        let start = Barrier::new(2);
        thread::scope(|scope| {
            for access in [READ, WRITE] {
                let (walk, memory, start) = (&walk, &memory, &start);
                scope.spawn(move || {
                    start.wait();
                    for page in 0..PAGES {
                        let found = walk.translate(memory, Gva(page << 12 | 5), access).unwrap();
                        assert_eq!(found.gpa, Gpa((16 + page) << 12 | 5));
                        assert!(found.accessed && (found.dirty || !access.is_write()));
                    }
                });
            }
        });
        for page in 0..PAGES {
            assert_eq!(entry(&memory, page), (16 + page) << 12 | 7 | A | D);
        }
        for level in 1..4 {
            assert_eq!(memory.read_u64(Gpa(level << 12)).unwrap(), (level + 1) << 12 | 7 | A);
        }
    }
}

/// A guest takes pages away by exchanging the entry for 0, as an operating system does when it swaps out. If it
/// got an entry without the dirty bit, no write may have been allowed since; and an entry that is 0 stays 0.
#[test]
fn no_write_passes_after_the_page_was_taken_away_clean() {
    for _ in 0..400 {
        let (walk, memory) = tables();
        let start = Barrier::new(2);
        let (allowed, taken) = thread::scope(|scope| {
            let walker = scope.spawn(|| {
                start.wait();
                let try_write = |page| walk.translate(&memory, Gva(page << 12), WRITE).is_ok();
                (0..PAGES).map(try_write).collect::<Vec<_>>()
            });
            let guest = scope.spawn(|| {
                start.wait();
                let take = |page| {
                    let at = Gpa((4 << 12) + page * 8);
                    loop {
                        let old = memory.read_u64(at).unwrap();
                        if memory.compare_exchange_u64(at, old, 0).unwrap() {
                            break old;
                        }
                    }
                };
                (0..PAGES).map(take).collect::<Vec<_>>()
            });
            (walker.join().unwrap(), guest.join().unwrap())
        });
        for (page, (allowed, taken)) in (0..).zip(allowed.into_iter().zip(taken)) {
            assert_eq!(entry(&memory, page), 0, "an entry came back");
            assert_eq!(
                allowed,
                taken & D != 0,
                "page {page}: a write was allowed and not recorded, or not allowed"
            );
        }
    }
}

/// The two entries in one 64-bit word of a 32-bit table are independent.
#[test]
fn neighbours_in_a_32_bit_table() {
    let state = PagingState { cr0: cr0::PG, cr3: 1 << 12, maxphyaddr: 36, ..PagingState::default() };
    let walk = PageWalk::new(&state);
    for _ in 0..200 {
        let mut memory = FlatMemory::new(3 << 12);
        memory.set_u32(1 << 12, 2 << 12 | 7);
        for page in 0..1024 {
            memory.set_u32((2 << 12) + page * 4, (page as u32) << 12 | 7);
        }
        let start = Barrier::new(2);
        thread::scope(|scope| {
            for odd in 0..2 {
                let (walk, memory, start) = (&walk, &memory, &start);
                scope.spawn(move || {
                    start.wait();
                    for page in (odd..1024).step_by(2) {
                        let access = if odd == 0 { READ } else { WRITE };
                        assert!(walk.translate(memory, Gva(page << 12), access).is_ok());
                    }
                });
            }
        });
        for page in 0..1024_u32 {
            let expected = page << 12 | 7 | if page % 2 == 0 { A as u32 } else { (A | D) as u32 };
            assert_eq!(memory.read_u32(Gpa((2 << 12) + u64::from(page) * 4)), Some(expected));
        }
    }
}

/// A memory in which somebody changes the entry just before each of the first exchanges.
struct Contended {
    memory: FlatMemory,
    intrusions: std::cell::RefCell<Vec<(u64, u64)>>,
}

impl PageTableMemory for Contended {
    fn read_u32(&self, gpa: Gpa) -> Option<u32> {
        self.memory.read_u32(gpa)
    }

    fn read_u64(&self, gpa: Gpa) -> Option<u64> {
        self.memory.read_u64(gpa)
    }

    fn compare_exchange_u32(&self, gpa: Gpa, old: u32, new: u32) -> Option<bool> {
        self.memory.compare_exchange_u32(gpa, old, new)
    }

    fn compare_exchange_u64(&self, gpa: Gpa, old: u64, new: u64) -> Option<bool> {
        if let Some((at, value)) = self.intrusions.borrow_mut().pop() {
            let now = self.memory.read_u64(Gpa(at))?;
            self.memory.compare_exchange_u64(Gpa(at), now, value)?;
        }
        self.memory.compare_exchange_u64(gpa, old, new)
    }
}

/// Losing a race starts the walk again, with what is there now, step by step and without any chance.
#[test]
fn a_lost_race_starts_again_at_the_root() {
    let pte = 4 << 12;
    let translate = |intrusions: Vec<(u64, u64)>| {
        let (walk, memory) = tables();
        let contended =
            Contended { memory, intrusions: intrusions.into_iter().rev().collect::<Vec<_>>().into() };
        let found = walk.translate(&contended, Gva(0x10), WRITE);
        (found, contended.memory)
    };

    // The exchanges in order: three tables, then the page. The page's entry changes under the last one.
    let quiet = [(0x10_0000, 0); 3];
    let with_last = |entry| [quiet.as_slice(), &[(pte, entry)]].concat();

    let (found, memory) = translate(with_last(0x99 << 12 | 7));
    assert_eq!(found.unwrap().gpa, Gpa(0x99010), "the new page");
    assert_eq!(entry(&memory, 0), 0x99 << 12 | 7 | A | D);

    let (found, memory) = translate(with_last(0));
    assert_eq!(found.unwrap_err().error_code, 2, "not present by now");
    assert_eq!(entry(&memory, 0), 0);

    let (found, memory) = translate(with_last(16 << 12 | 5));
    assert_eq!(found.unwrap_err().error_code, 3, "read-only by now");
    assert_eq!(entry(&memory, 0), 16 << 12 | 5, "a fault sets neither bit");

    // A table that goes away under the exchange in its own entry.
    let (found, memory) = translate(vec![(0x10_0000, 0), (2 << 12, 0)]);
    assert_eq!(found.unwrap_err().error_code, 2);
    assert_eq!(memory.read_u64(Gpa(2 << 12)), Some(0));
    assert_eq!(entry(&memory, 0), 16 << 12 | 7, "never reached");
}

//! Threads that map, unmap, pin, copy, attach and move at the same time. The page table checks its contract, and at the
//! end nothing is left.

use std::sync::{
    Arc, Weak,
    atomic::{AtomicBool, Ordering},
};

use super::{
    PAGE,
    domain::TestDomain,
    process::{Buffer, TestProcess, pattern},
    range, store,
};
use crate::{
    Errno,
    domain::{Domain, HostAddr, Prot},
    ioas::{AccessOps, Ioas},
    iova::{Iova, IovaRange},
    process::{Process, vacate},
};

const RW: Prot = Prot::READ.union(Prot::WRITE);
const ROUNDS: u64 = 300;

struct Nobody;

impl AccessOps for Nobody {
    fn unmap(&self, _: IovaRange) {}
}

/// Unmaps although somebody has pages pinned for a moment.
fn unmap(ioas: &Ioas, range: IovaRange) -> u64 {
    loop {
        match ioas.unmap(range) {
            Ok(bytes) => return bytes,
            Err(errno) => assert!(matches!(errno, Errno::DEADLK | Errno::BUSY), "{errno:?}"),
        }
    }
}

#[test]
fn whoever_maps_does_not_disturb_whoever_pins() {
    let (process, buffer) = (TestProcess::new(), Buffer::new(16));
    buffer.number();
    let pages = store(&process, buffer.start(), 16 * PAGE);
    let (ioas, other) = (Ioas::new(), Ioas::new());
    let nobody = Arc::new(Nobody);
    let ops: Weak<Nobody> = Arc::downgrade(&nobody);
    ioas.add_access(ops, PAGE).unwrap();
    ioas.map(&pages, 0, 16 * PAGE, Some(Iova(0)), RW).unwrap();
    let (one, two) = (TestDomain::any(), TestDomain::any());
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let mapper = scope.spawn(|| {
            for round in 0..ROUNDS {
                let at = (1 << 30) + (round % 3) * PAGE;
                ioas.map(&pages, 4 * PAGE, 8 * PAGE, Some(Iova(at)), RW).unwrap();
                assert_eq!(unmap(&ioas, range(at, 8 * PAGE)), 8 * PAGE);
            }
        });
        let attacher = scope.spawn(|| {
            for round in 0..ROUNDS {
                let table: Arc<dyn Domain> = if round % 2 == 0 { one.clone() } else { two.clone() };
                ioas.attach_domain(&table).unwrap();
                assert!(table.lookup(Iova(5 * PAGE)).is_some());
                ioas.detach_domain(&table);
                assert_eq!(table.lookup(Iova(5 * PAGE)), None);
            }
        });
        let copier = scope.spawn(|| {
            for _ in 0..ROUNDS {
                let at = other.copy_from(&ioas, range(2 * PAGE, 4 * PAGE), None, RW).unwrap();
                let mut byte = [0];
                other.read(Iova(at.0 + 7), &mut byte).unwrap();
                assert_eq!(byte, [pattern(2 * PAGE + 7)]);
                assert_eq!(unmap(&other, range(at.0, 4 * PAGE)), 4 * PAGE);
            }
        });
        // Who reads what is always mapped finds it always.
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let pinned = ioas.pin(Iova(6 * PAGE), 2 * PAGE, false, false).unwrap();
                let mut bytes = [0; 2];
                pinned.read(PAGE - 1, &mut bytes).unwrap();
                assert_eq!(bytes, [7 * PAGE - 1, 7 * PAGE].map(pattern));
                ioas.read(Iova(9), &mut bytes).unwrap();
                assert_eq!(bytes, [9, 10].map(pattern));
            }
        });
        // And who reads what comes and goes finds it or does not.
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let at = Iova((1 << 30) + 4 * PAGE);
                match ioas.pin(at, PAGE, true, false) {
                    Ok(pinned) => assert_eq!(pinned.runs().len(), 1),
                    Err(errno) => assert!(matches!(errno, Errno::NOENT | Errno::INVAL), "{errno:?}"),
                }
                if let Err(errno) = ioas.read(at, &mut [0; 64]) {
                    assert!(matches!(errno, Errno::NOENT | Errno::BUSY), "{errno:?}");
                }
            }
        });
        let done = [mapper.join(), attacher.join(), copier.join()];
        over.store(true, Ordering::Relaxed);
        for done in done {
            done.unwrap();
        }
    });
    assert_eq!(process.usage().pinned(), 0);
    assert_eq!(unmap(&ioas, IovaRange::ALL), 16 * PAGE);
    assert_eq!((one.bytes(), two.bytes()), (0, 0));
}

#[test]
fn two_who_unmap_the_same_do_it_once() {
    let (process, buffer) = (TestProcess::new(), Buffer::new(4));
    let pages = store(&process, buffer.start(), 4 * PAGE);
    let ioas = Ioas::new();
    let domain: Arc<dyn Domain> = TestDomain::any();
    ioas.attach_domain(&domain).unwrap();
    for _ in 0..ROUNDS {
        for page in 0..4 {
            ioas.map(&pages, page * PAGE, PAGE, Some(Iova(page * PAGE)), RW).unwrap();
        }
        let bytes: u64 = std::thread::scope(|scope| {
            let unmappers = [(); 2].map(|()| scope.spawn(|| unmap(&ioas, range(0, 4 * PAGE))));
            unmappers.map(|unmapper| unmapper.join().unwrap()).iter().sum()
        });
        assert_eq!(bytes, 4 * PAGE);
        assert_eq!(process.usage().pinned(), 0);
    }
}

#[test]
fn memory_moves_while_it_is_used() {
    let (process, ioas) = (TestProcess::new(), Ioas::new());
    let table = TestDomain::any();
    let domain: Arc<dyn Domain> = table.clone();
    ioas.attach_domain(&domain).unwrap();
    for round in 0..40 {
        let buffer = std::mem::ManuallyDrop::new(Buffer::new(8));
        buffer.number();
        let pages = store(&process, buffer.start(), 8 * PAGE);
        ioas.map(&pages, 0, 8 * PAGE, Some(Iova(0)), RW).unwrap();
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    let mut bytes = [0; 2];
                    ioas.read(Iova(4 * PAGE - 1), &mut bytes).unwrap();
                    assert_eq!(bytes, [4 * PAGE - 1, 4 * PAGE].map(pattern));
                }
            });
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    ioas.map(&pages, 2 * PAGE, 4 * PAGE, Some(Iova(1 << 20)), RW).unwrap();
                    assert!(ioas.pin(Iova(1 << 20), 4 * PAGE, true, false).is_ok());
                    assert_eq!(unmap(&ioas, range(1 << 20, 4 * PAGE)), 4 * PAGE);
                }
            });
            for page in 0..8 {
                let at = buffer.page((page * 3 + round) % 8);
                assert_eq!(vacate(HostAddr(at.0), PAGE), Ok(true));
            }
            over.store(true, Ordering::Relaxed);
        });
        assert_eq!(unmap(&ioas, IovaRange::ALL), 8 * PAGE);
        assert_eq!((table.bytes(), process.usage().pinned()), (0, 0));
    }
}

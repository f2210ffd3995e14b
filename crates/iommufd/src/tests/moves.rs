//! Pinned memory that the program unmaps.

use std::{
    mem::ManuallyDrop,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use super::{
    PAGE,
    domain::TestDomain,
    process::{Buffer, TestProcess, memory_file, pattern},
    range, store,
};
use crate::{
    Context, Errno, Result,
    domain::{DirtySink, Domain, Geometry, HostAddr, Prot},
    ioas::Ioas,
    iova::{Iova, IovaRange},
    pages::Pages,
    process::{LocalProcess, Process, vacate},
    soft::SoftDevice,
};

const RW: Prot = Prot::READ.union(Prot::WRITE);

/// Two address spaces with the same memory, one of them with a domain.
struct Bench {
    process: Arc<TestProcess>,
    /// Parts of it are gone when the test ends, and somebody else's memory may be in their place.
    buffer: ManuallyDrop<Buffer>,
    pages: Arc<Pages>,
    ioas: Arc<Ioas>,
    other: Arc<Ioas>,
    table: Arc<TestDomain>,
}

impl Bench {
    fn new(buffer: Buffer) -> Self {
        buffer.number();
        let process = TestProcess::new();
        let pages = store(&process, buffer.start(), 16 * PAGE);
        let (ioas, other, table) = (Ioas::new(), Ioas::new(), TestDomain::any());
        let domain: Arc<dyn Domain> = table.clone();
        ioas.attach_domain(&domain).unwrap();
        other.map(&pages, 0, 16 * PAGE, Some(Iova(0)), RW).unwrap();
        Self { process, buffer: ManuallyDrop::new(buffer), pages, ioas, other, table }
    }

    /// The program is about to unmap pages.
    fn vacate(&self, page: u64, pages: u64) -> Result<bool> {
        vacate(HostAddr(self.buffer.page(page).0), pages * PAGE)
    }

    /// What a device finds at `iova`.
    fn device_reads(&self, iova: u64) -> Vec<u8> {
        let host = self.table.lookup(Iova(iova)).unwrap();
        let mut bytes = vec![0; 16];
        LocalProcess::get().read(crate::process::UserAddr(host.0), &mut bytes).unwrap();
        bytes
    }

    fn check_pages(&self, pages: std::ops::Range<u64>) {
        for page in pages {
            let expected: Vec<u8> = (page * PAGE..page * PAGE + 16).map(pattern).collect();
            assert_eq!(self.device_reads(page * PAGE), expected, "page {page}");
            let mut bytes = vec![0; 16];
            self.ioas.read(Iova(page * PAGE), &mut bytes).unwrap();
            assert_eq!(bytes, expected, "page {page}");
        }
    }
}

#[test]
fn pinned_pages_survive_what_the_program_does_with_their_addresses() {
    for shared in [false, true] {
        let file = memory_file(16);
        let buffer = if shared { Buffer::of(&file, 16) } else { Buffer::new(16) };
        let bench = Bench::new(buffer);
        bench.ioas.map(&bench.pages, 0, 16 * PAGE, Some(Iova(0)), RW).unwrap();
        let pinned = bench.other.pin(Iova(5 * PAGE), 4 * PAGE, true, false).unwrap();
        let before = bench.table.lookup(Iova(3 * PAGE)).unwrap();

        assert_eq!(bench.vacate(3, 4), Ok(true));
        assert_ne!(bench.table.lookup(Iova(3 * PAGE)), Some(before));
        assert_eq!(bench.table.mappings(), 3, "what stayed, what moved, what stayed");
        bench.check_pages(0..16);
        let mut bytes = [0; 4];
        pinned.read(2 * PAGE - 2, &mut bytes).unwrap();
        assert_eq!(bytes, [7 * PAGE - 2, 7 * PAGE - 1, 7 * PAGE, 7 * PAGE + 1].map(pattern));
        assert_eq!(pinned.runs().len(), 2);

        assert_eq!(bench.vacate(0, 16), Ok(true), "the others, and not those that are gone");
        assert_eq!(bench.vacate(0, 16), Ok(false));
        bench.check_pages(0..16);
        pinned.write(0, &[1, 2, 3]).unwrap();
        assert_eq!(bench.device_reads(5 * PAGE)[..3], [1, 2, 3]);
        assert_eq!(bench.process.usage().pinned(), 16);
        assert_eq!(bench.ioas.unmap(IovaRange::ALL), Ok(16 * PAGE));
        pinned.read(0, &mut bytes[..3]).unwrap();
        assert_eq!(bytes[..3], [1, 2, 3], "its own pages are still pinned");
        drop(pinned);
        assert_eq!((bench.table.bytes(), bench.process.usage().pinned()), (0, 0));
    }
}

#[test]
fn pages_that_nobody_pinned_are_not_moved() {
    let bench = Bench::new(Buffer::new(16));
    assert_eq!(bench.vacate(0, 16), Ok(false));
    bench.ioas.map(&bench.pages, 4 * PAGE, PAGE, Some(Iova(4 * PAGE)), RW).unwrap();
    assert_eq!(bench.vacate(0, 4), Ok(false));
    assert_eq!(bench.vacate(5, 11), Ok(false));
    assert_eq!(bench.vacate(0, 0), Ok(false));
    assert_eq!(bench.table.suspended(), 0);
    assert_eq!(bench.vacate(0, 16), Ok(true));
    assert_eq!(bench.table.suspended(), 1);
    bench.check_pages(4..5);
}

#[test]
fn a_moved_page_keeps_its_identity_as_shared_memory() {
    let file = memory_file(16);
    let second = Buffer::of(&file, 16);
    let bench = Bench::new(Buffer::of(&file, 16));
    bench.ioas.map(&bench.pages, 0, PAGE, Some(Iova(0)), RW).unwrap();
    assert_eq!(bench.process.pin_count(second.page(0)), Ok(1));
    bench.vacate(0, 1).unwrap();
    assert_eq!(bench.process.pin_count(second.page(0)), Ok(1));
    let host = bench.table.lookup(Iova(0)).unwrap();
    assert_eq!(bench.process.host_page_id(host), bench.process.page_id(second.page(0)));
    bench.ioas.unmap(IovaRange::ALL).unwrap();
    assert_eq!(bench.process.pin_count(second.page(0)), Ok(0));
}

#[test]
fn two_stores_of_the_same_memory_move_together() {
    let bench = Bench::new(Buffer::new(16));
    let again = store(&bench.process, bench.buffer.page(2), 8 * PAGE);
    bench.ioas.map(&bench.pages, 0, 16 * PAGE, Some(Iova(0)), RW).unwrap();
    bench.ioas.map(&again, PAGE, 4 * PAGE, Some(Iova(1 << 20)), RW).unwrap();
    bench.vacate(4, 4).unwrap();
    bench.check_pages(0..16);
    assert_eq!(bench.device_reads((1 << 20) + PAGE), bench.device_reads(4 * PAGE));
    assert_eq!(bench.table.lookup(Iova((1 << 20) + PAGE)), bench.table.lookup(Iova(4 * PAGE)));
    bench.ioas.unmap(range(0, 16 * PAGE)).unwrap();
    let expected: Vec<u8> = (4 * PAGE..4 * PAGE + 16).map(pattern).collect();
    assert_eq!(bench.device_reads((1 << 20) + PAGE), expected);
    bench.ioas.unmap(IovaRange::ALL).unwrap();
    assert_eq!(bench.table.bytes(), 0);
}

/// A domain that stops in the middle of a move until it is told to go on.
#[derive(Debug)]
struct Slow {
    inner: Arc<TestDomain>,
    stopped: Mutex<(bool, bool)>,
    changed: Condvar,
}

impl Slow {
    /// Waits until a move has come to its middle.
    fn await_stop(&self) {
        let stopped = self.stopped.lock().unwrap();
        drop(self.changed.wait_while(stopped, |(stopped, _)| !*stopped).unwrap());
    }

    fn go_on(&self) {
        self.stopped.lock().unwrap().1 = true;
        self.changed.notify_all();
    }
}

impl Domain for Slow {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn map(&self, iova: Iova, host: HostAddr, length: u64, prot: Prot) -> Result<()> {
        self.inner.map(iova, host, length, prot)
    }

    fn unmap(&self, range: IovaRange) {
        self.inner.unmap(range);
    }

    fn sync(&self) {
        self.inner.sync();
    }

    fn suspend(&self, range: IovaRange) {
        self.inner.suspend(range);
        let mut stopped = self.stopped.lock().unwrap();
        stopped.0 = true;
        self.changed.notify_all();
        drop(self.changed.wait_while(stopped, |(_, go_on)| !*go_on).unwrap());
    }

    fn lookup(&self, iova: Iova) -> Option<HostAddr> {
        self.inner.lookup(iova)
    }

    fn read_and_clear_dirty(&self, _: IovaRange, _: bool, _: &mut dyn DirtySink) -> Result<()> {
        Err(Errno::OPNOTSUPP)
    }
}

#[test]
fn copies_wait_for_pages_that_move() {
    let bench = Bench::new(Buffer::new(16));
    let slow =
        Arc::new(Slow { inner: TestDomain::any(), stopped: Mutex::default(), changed: Condvar::new() });
    let domain: Arc<dyn Domain> = slow.clone();
    bench.other.attach_domain(&domain).unwrap();
    let arrived = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let mover = scope.spawn(|| {
            let moved = bench.vacate(0, 16);
            arrived.store(true, Ordering::SeqCst);
            moved
        });
        slow.await_stop();
        let reader = scope.spawn(|| {
            let mut byte = [0];
            bench.other.read(Iova(PAGE + 1), &mut byte).map(|()| byte)
        });
        let unmapper = scope.spawn(|| bench.other.unmap(IovaRange::ALL));
        assert!(!reader.is_finished() && !arrived.load(Ordering::SeqCst));
        slow.go_on();
        assert_eq!(mover.join().unwrap(), Ok(true));
        // The reader may come before or after who unmaps.
        let read = reader.join().unwrap();
        assert!(
            read == Ok([pattern(PAGE + 1)]) || matches!(read, Err(Errno::NOENT | Errno::BUSY)),
            "{read:?}"
        );
        assert_eq!(unmapper.join().unwrap(), Ok(16 * PAGE));
    });
    assert_eq!((slow.inner.bytes(), bench.process.usage().pinned()), (0, 0));
}

/// A device behind the software IOMMU waits for memory that moves, and does not fault.
#[test]
fn a_device_in_software_reads_on_while_its_memory_moves() {
    for _ in 0..20 {
        let context = Context::new();
        let device = context.bind(SoftDevice::new(1, Vec::new())).unwrap();
        let ioas = context.ioas_alloc().unwrap();
        let bench = Bench::new(Buffer::new(16));
        let process: Arc<dyn Process> = bench.process.clone();
        context.ioas_map(ioas, &process, bench.buffer.start(), 16 * PAGE, Some(Iova(0)), RW).unwrap();
        device.attach(None, ioas).unwrap();
        let (dma, end) = (device.dma(), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut read = 0;
                while !end.load(Ordering::Relaxed) || read == 0 {
                    let mut bytes = vec![0; 16 * PAGE as usize - 7];
                    dma.read(Iova(3), &mut bytes).unwrap();
                    let wrong = bytes.iter().zip(3..).position(|(byte, at)| *byte != pattern(at));
                    assert_eq!(wrong, None);
                    read += 1;
                }
            });
            for page in 0..16 {
                assert_eq!(bench.vacate(page, 1), Ok(true));
            }
            end.store(true, Ordering::Relaxed);
            reader.join().unwrap();
        });
        // What does not come back is not waited for.
        context.ioas_unmap(ioas, IovaRange::ALL).unwrap();
        assert_eq!(dma.read(Iova(0), &mut [0]), Err(Errno::NOENT));
    }
}

#[test]
fn copies_of_a_device_in_software_have_the_errors_of_the_address_space() {
    let context = Context::new();
    let device = context.bind(SoftDevice::new(1, Vec::new())).unwrap();
    let dma = device.dma();
    let mut two = [0; 2];
    assert_eq!(dma.read(Iova(0), &mut two), Err(Errno::NOENT));
    let ioas = context.ioas_alloc().unwrap();
    let buffer = Buffer::new(4);
    buffer.number();
    let process: Arc<dyn Process> = TestProcess::new();
    let map = |page: u64, at, prot| {
        context.ioas_map(ioas, &process, buffer.page(page), PAGE, Some(Iova(at)), prot).unwrap();
    };
    map(0, 0, RW);
    map(1, PAGE, Prot::READ);
    map(2, 8 * PAGE, Prot::WRITE);
    device.attach(None, ioas).unwrap();
    assert_eq!(dma.read(Iova(PAGE - 1), &mut two), Ok(()));
    assert_eq!(two, [pattern(PAGE - 1), pattern(PAGE)]);
    assert_eq!(dma.write(Iova(PAGE - 1), &[1, 2]), Err(Errno::PERM));
    assert_eq!(dma.read(Iova(PAGE - 1), &mut two), Ok(()));
    assert_eq!(two, [1, pattern(PAGE)], "what comes before a fault is done");
    assert_eq!(dma.read(Iova(8 * PAGE), &mut two), Err(Errno::PERM));
    assert_eq!(dma.read(Iova(2 * PAGE - 1), &mut two), Err(Errno::NOENT));
    assert_eq!(dma.read(Iova(0), &mut []), Err(Errno::INVAL));
    assert_eq!(dma.read(Iova(u64::MAX), &mut two), Err(Errno::OVERFLOW));
    assert_eq!(dma.read(Iova(u64::MAX - 1), &mut two), Err(Errno::NOENT));
    assert!(dma.translate(Iova(8 * PAGE)).is_ok());
    assert_eq!(dma.pasid(3).read(Iova(0), &mut two), Err(Errno::NOENT));
    drop(device);
    assert_eq!(dma.read(Iova(0), &mut two), Err(Errno::NOENT));
}

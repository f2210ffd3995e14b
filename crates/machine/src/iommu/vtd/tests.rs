//! The unit as a guest's driver and a device see it, without a guest.

mod hosts;

use std::sync::atomic::AtomicUsize;

use virtio::device::Reach;
use vm_memory::{Bytes, GuestAddressSpace};

use super::registers::at;
use super::*;
use crate::dma::DeviceMemory;

const MIB: u64 = 1 << 20;
const HIGH: u64 = 4 << 30;
const PAGE: u64 = 0x1000;

const ROOT: u64 = 0x1_0000;
const CONTEXTS: u64 = 0x1_1000;
const QUEUE: u64 = 0x1_2000;
const STATUS: u64 = 0x1_3000;
/// Four levels of tables.
const TABLES: u64 = 0x2_0000;
const SOURCES: [u16; 2] = [0x08, 0x10];

#[derive(Default)]
struct Sink(Mutex<Vec<Message>>);

impl MsiSink for Sink {
    fn signal(&self, address: u64, data: u32) {
        lock(&self.0).push(Message { address, data });
    }
}

struct Setup {
    ram: Arc<GuestRam>,
    unit: Vtd,
    sink: Arc<Sink>,
    memory: Vec<DeviceMemory>,
    tail: u64,
}

fn setup() -> Setup {
    let regions = [(GuestAddress(0), 4 * MIB as usize), (GuestAddress(HIGH), MIB as usize)];
    let ram = Arc::new(GuestRam::from_ranges(&regions).unwrap());
    let sink = Arc::new(Sink::default());
    let unit = Vtd::new(&ram, Arc::clone(&sink) as _).unwrap();
    let memory = SOURCES.map(|source| {
        let (port, remapper) = unit.add_endpoint(source).unwrap();
        DeviceMemory::translated(&ram, port, remapper)
    });
    Setup { ram, unit, sink, memory: memory.into(), tail: 0 }
}

impl Setup {
    fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        MmioDevice::read(&*self.unit.unit, offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, offset: u64, value: u32) {
        MmioDevice::write(&*self.unit.unit, offset, &value.to_le_bytes());
    }

    fn write64(&self, offset: u64, value: u64) {
        MmioDevice::write(&*self.unit.unit, offset, &value.to_le_bytes());
    }

    fn put(&self, at: u64, value: u64) {
        self.ram.write_obj(value, GuestAddress(at)).unwrap();
    }

    /// A context entry of device `index`, with table `root` for the domain 5 + index.
    fn context(&self, index: usize, root: u64) {
        let at = CONTEXTS + u64::from(SOURCES[index]) * 16;
        self.put(at + 8, (5 + index as u64) << 8 | 2);
        self.put(at, root | 1);
    }

    /// The entry for the page of `iova`, below 1 GiB, in tables that begin at `root`.
    fn map(&self, root: u64, iova: u64, entry: u64) {
        for (level, shift) in [(0, 39), (1, 30), (2, 21)] {
            self.put(root + level * PAGE + (iova >> shift & 511) * 8, (root + (level + 1) * PAGE) | 3);
        }
        self.put(root + 3 * PAGE + (iova >> 12 & 511) * 8, entry);
    }

    /// Root table, queue, translation, as a driver begins; interrupts are unmasked.
    fn enable(&mut self) {
        self.put(ROOT, CONTEXTS | 1);
        self.write64(at::ROOT, ROOT);
        self.write(at::COMMAND, 1 << 30);
        self.write64(at::QUEUE_BASE, QUEUE);
        self.write(at::COMMAND, 1 << 26);
        self.write(at::COMMAND, 1 << 26 | 1 << 31);
        for event in [at::FAULT_EVENT, at::COMPLETION_EVENT] {
            self.write(event + 4, 0x30 + event as u32);
            self.write(event + 8, 0xfee0_0000);
            self.write(event, 0);
        }
        assert_eq!(self.read(at::STATUS), 0b11 << 30 | 1 << 26);
    }

    /// Puts descriptors into the queue, and a wait descriptor behind them: whether that has written its status.
    fn submit(&mut self, descriptors: &[(u64, u64)]) -> bool {
        self.ram.write_obj(0u32, GuestAddress(STATUS)).unwrap();
        let wait = (5 | 1 << 5 | 0x77 << 32, STATUS);
        for (low, high) in descriptors.iter().chain([&wait]) {
            self.put(QUEUE + self.tail, *low);
            self.put(QUEUE + self.tail + 8, *high);
            self.tail = (self.tail + 16) % PAGE;
        }
        self.write64(at::QUEUE_TAIL, self.tail);
        self.waited()
    }

    /// Waits for the status of a wait descriptor, or until the queue has stopped.
    fn waited(&self) -> bool {
        loop {
            if self.ram.read_obj::<u32>(GuestAddress(STATUS)).unwrap() == 0x77 {
                return true;
            }
            if self.read(at::FAULT_STATUS) & 1 << 4 != 0 {
                return false;
            }
            std::thread::yield_now();
        }
    }

    /// What a device reads.
    fn dma(&self, index: usize, iova: u64) -> Option<u64> {
        self.memory[index].memory().read_obj(GuestAddress(iova)).ok()
    }

    /// The faults that are recorded, whose registers are free then: reason, address, device, and whether it was a read. The same
    /// ones in a row are one: an access may be tried in several ways.
    fn faults(&self) -> Vec<(u32, u64, u16, bool)> {
        let status = self.read(at::FAULT_STATUS);
        let mut faults = Vec::new();
        let first = u64::from(status >> 8 & 0xff);
        for register in (first..first + 8).map(|index| at::RECORDS + index % 8 * 16) {
            let upper = self.read(register + 12);
            if upper >> 31 == 0 {
                break;
            }
            let address = u64::from(self.read(register)) | u64::from(self.read(register + 4)) << 32;
            faults.push((upper & 0xff, address, self.read(register + 8) as u16, upper & 1 << 30 != 0));
            self.write(register + 12, 1 << 31);
        }
        assert_eq!(self.read(at::FAULT_STATUS) & 2, 0);
        faults.dedup();
        faults
    }
}

const FORGET_ALL: (u64, u64) = (2 | 1 << 4, 0);
const CONTEXTS_AGAIN: (u64, u64) = (1 | 1 << 4, 0);

#[test]
fn nothing_is_translated_until_the_guest_says_so() {
    let mut setup = setup();
    setup.put(HIGH + 8, 7);
    assert_eq!(setup.dma(0, HIGH + 8), Some(7));
    assert_eq!(setup.dma(0, 4 * MIB), None);
    setup.enable();
    // That was no fault of translation. This is one: nobody has a context entry.
    assert_eq!(setup.faults(), []);
    assert_eq!(setup.dma(0, HIGH + 8), None);
    assert_eq!(setup.faults(), [(2, HIGH, 0x08, true)]);
    assert_eq!(*lock(&setup.sink.0), [Message { address: 0xfee0_0000, data: 0x30 + 0x38 }]);
    setup.write(at::COMMAND, 1 << 26);
    assert_eq!(setup.read(at::STATUS), 1 << 30 | 1 << 26);
    assert_eq!(setup.dma(0, HIGH + 8), Some(7));
}

#[test]
fn what_becomes_present_needs_no_invalidation() {
    let mut setup = setup();
    setup.enable();
    setup.put(HIGH + 8, 7);
    assert_eq!(setup.dma(0, 0x5008), None);
    setup.context(0, TABLES);
    assert_eq!(setup.dma(0, 0x5008), None);
    setup.map(TABLES, 0x5000, HIGH | 1);
    assert_eq!(setup.dma(0, 0x5008), Some(7));
    assert_eq!(setup.faults(), [(2, 0x5000, 0x08, true), (6, 0x5000, 0x08, true)]);
    // More rights, too.
    assert!(!setup.memory[0].memory().may_write(GuestAddress(0x5010), 8));
    assert_eq!(setup.faults(), [(5, 0x5000, 0x08, false)]);
    setup.map(TABLES, 0x5000, HIGH | 3);
    assert!(setup.memory[0].memory().may_write(GuestAddress(0x5010), 8));
    // The other device is not concerned.
    assert_eq!(setup.dma(1, 0x5008), None);
    assert_eq!(setup.faults(), [(2, 0x5000, 0x10, true)]);
}

#[test]
fn what_is_known_is_used_until_it_is_invalidated() {
    let mut setup = setup();
    setup.enable();
    setup.context(0, TABLES);
    setup.context(1, TABLES);
    for (page, value) in [(0x5000, 1), (0x6000, 2)] {
        setup.put(HIGH + page, value);
        setup.map(TABLES, page, (HIGH + page) | 3);
    }
    let both = |setup: &Setup| [setup.dma(0, 0x5000), setup.dma(0, 0x6000)];
    assert_eq!(both(&setup), [Some(1), Some(2)]);
    setup.map(TABLES, 0x5000, 0);
    setup.map(TABLES, 0x6000, 0);
    assert_eq!(both(&setup), [Some(1), Some(2)]);
    // Another domain, another page, and then the page.
    assert!(setup.submit(&[(2 | 2 << 4 | 6 << 16, 0), (2 | 3 << 4 | 5 << 16, 0x7000)]));
    assert_eq!(both(&setup), [Some(1), Some(2)]);
    assert!(setup.submit(&[(2 | 3 << 4 | 5 << 16, 0x5000)]));
    assert_eq!(both(&setup), [None, Some(2)]);
    // The domain.
    assert!(setup.submit(&[(2 | 2 << 4 | 5 << 16, 0)]));
    assert_eq!(both(&setup), [None, None]);
    // All, by register, of both domains, which have one table in memory.
    setup.map(TABLES, 0x5000, (HIGH + 0x5000) | 3);
    assert_eq!((setup.dma(0, 0x5000), setup.dma(1, 0x5000)), (Some(1), Some(1)));
    setup.map(TABLES, 0x5000, 0);
    setup.write64(at::IOTLB, 1 << 63 | 1 << 60);
    assert_eq!(setup.read(at::IOTLB + 4) >> 31, 0);
    assert_eq!((setup.dma(0, 0x5000), setup.dma(1, 0x5000)), (None, None));
}

#[test]
fn a_page_of_a_large_one_invalidates_all_of_it() {
    let mut setup = setup();
    setup.enable();
    setup.context(0, TABLES);
    setup.map(TABLES, 0, 0);
    setup.put(TABLES + 2 * PAGE, 0x20_0083);
    setup.put(0x20_0000, 1);
    setup.put(0x3f_f000, 2);
    assert_eq!((setup.dma(0, 0), setup.dma(0, 0x1f_f000)), (Some(1), Some(2)));
    setup.put(TABLES + 2 * PAGE, 0);
    assert!(setup.submit(&[(2 | 3 << 4 | 5 << 16, 0x5000)]));
    assert_eq!((setup.dma(0, 0), setup.dma(0, 0x1f_f000)), (None, None));
    assert_eq!(setup.faults(), [(6, 0, 0x08, true), (6, 0x1f_f000, 0x08, true)]);
    // One that begins in memory, and goes on past it.
    setup.put(TABLES + 2 * PAGE, 0);
    setup.put(TABLES + PAGE, 0x83);
    assert!(setup.submit(&[FORGET_ALL]));
    assert_eq!(setup.dma(0, 0x20_0000), Some(1));
    assert_eq!(setup.dma(0, 4 * MIB), None);
    // It was translated, but there is nothing.
    assert_eq!(setup.faults(), []);
}

#[test]
fn a_context_entry_is_looked_at_again_when_it_is_invalidated() {
    let mut setup = setup();
    setup.enable();
    for (table, value) in [(TABLES, 1), (TABLES + 0x8000, 2)] {
        setup.put(HIGH + value * PAGE, value);
        setup.map(table, 0x5000, (HIGH + value * PAGE) | 3);
    }
    setup.context(0, TABLES);
    assert_eq!(setup.dma(0, 0x5000), Some(1));
    setup.context(0, TABLES + 0x8000);
    assert_eq!(setup.dma(0, 0x5000), Some(1));
    // Another device, another domain; then the device.
    let device = |source: u64| (1 | 3 << 4 | 5 << 16 | source << 32, 0);
    assert!(setup.submit(&[device(0x10), (1 | 2 << 4 | 6 << 16, 0)]));
    assert_eq!(setup.dma(0, 0x5000), Some(1));
    assert!(setup.submit(&[device(0x08)]));
    assert_eq!(setup.dma(0, 0x5000), Some(2));
    // Gone, by register.
    setup.put(CONTEXTS + 0x80, 0);
    setup.write64(at::CONTEXT, 1 << 63 | 1 << 61);
    assert_eq!(setup.dma(0, 0x5000), None);
    // Pass-through.
    setup.put(CONTEXTS + 0x80, 0b1001);
    assert_eq!(setup.dma(0, HIGH + PAGE), Some(1));
    assert_eq!(setup.dma(0, 0x5000), Some(0));
}

#[test]
fn faults_are_recorded_unless_the_context_entry_says_no() {
    let mut setup = setup();
    setup.enable();
    setup.context(0, TABLES | 2);
    assert_eq!(setup.dma(0, 0x5000), None);
    assert_eq!(setup.faults(), []);
    setup.put(CONTEXTS + 0x80, 2);
    assert!(setup.submit(&[CONTEXTS_AGAIN]));
    assert_eq!(setup.dma(0, 0x5000), None);
    assert_eq!(setup.faults(), []);
    assert_ne!(setup.unit.stats().faults, 0);
}

#[test]
fn a_bad_descriptor_stops_the_queue_and_interrupts() {
    let mut setup = setup();
    setup.enable();
    assert!(!setup.submit(&[(0xf, 0)]));
    assert_eq!(setup.read(at::FAULT_STATUS), 1 << 4);
    assert_eq!(setup.read(at::QUEUE_HEAD), 0);
    assert!(!setup.submit(&[]));
    // The driver puts something else there, and clears the error: all goes on.
    setup.put(QUEUE, FORGET_ALL.0);
    setup.write(at::FAULT_STATUS, 1 << 4);
    assert!(setup.waited());
    assert_eq!(setup.read(at::FAULT_STATUS), 0);
    assert_eq!(lock(&setup.sink.0).len(), 1);
}

#[test]
fn a_wait_descriptor_may_interrupt() {
    let mut setup = setup();
    setup.enable();
    assert!(setup.submit(&[(5 | 1 << 4, 0)]));
    while setup.read(at::COMPLETION) == 0 {
        std::thread::yield_now();
    }
    // The register says so just before the message is sent; what follows in the queue is carried out after that.
    assert!(setup.submit(&[]));
    assert_eq!(*lock(&setup.sink.0), [Message { address: 0xfee0_0000, data: 0x30 + 0xa0 }]);
}

/// Root table, queue and page tables anywhere, and in each other: nothing panics, hangs, or reaches what is not there.
#[test]
fn tables_that_are_anywhere_are_harmless() {
    let places = [0, ROOT, 4 * MIB - PAGE, 4 * MIB, HIGH + MIB, (1 << 40) - PAGE, 1 << 52, !0xfff];
    for place in places {
        let mut setup = setup();
        setup.write64(at::ROOT, place);
        setup.write64(at::QUEUE_BASE, place | 7);
        setup.write(at::COMMAND, 1 << 30);
        setup.write(at::COMMAND, 1 << 26 | 1 << 31);
        for tail in [0x10, 0xff0, 0x7_fff0, 0] {
            setup.write64(at::QUEUE_TAIL, tail);
            setup.write(at::FAULT_STATUS, u32::MAX);
        }
        let _ = setup.dma(0, 0x5000);
        setup.write(at::COMMAND, 0);
        setup.write64(at::QUEUE_TAIL, 0);
        setup.write(at::FAULT_STATUS, u32::MAX);
        setup.enable();
        for entry in [place | 1, place | 3, place | 0x83, u64::MAX] {
            setup.put(ROOT, CONTEXTS | 1);
            setup.context(0, place & 0xff_ffff_f000);
            assert!(setup.submit(&[CONTEXTS_AGAIN, FORGET_ALL]));
            let _ = setup.dma(0, 0x5000);
            setup.context(0, TABLES);
            setup.map(TABLES, 0x5000, entry);
            assert!(setup.submit(&[CONTEXTS_AGAIN, FORGET_ALL]));
            let _ = setup.dma(0, 0x5000);
            for level in 0..3 {
                setup.put(TABLES + level * PAGE, entry);
                let _ = setup.dma(0, 0x5000);
            }
            setup.put(ROOT, entry);
            assert!(setup.submit(&[CONTEXTS_AGAIN]));
            let _ = setup.dma(0, 0x5000);
        }
    }
    // A table that contains itself at every level maps itself.
    let mut setup = setup();
    setup.enable();
    setup.context(0, TABLES);
    setup.put(TABLES, TABLES | 3);
    assert_eq!(setup.dma(0, 0), Some(TABLES | 3));
}

#[test]
fn odd_accesses_to_registers_are_not_writes() {
    let setup = setup();
    for (offset, length) in
        [(at::ROOT, 1), (at::ROOT + 2, 4), (at::ROOT + 4, 8), (at::ROOT, 16), (at::ROOT, 3)]
    {
        MmioDevice::write(&*setup.unit.unit, offset, &vec![0xff; length]);
        assert_eq!(setup.read(at::ROOT), 0, "{offset:#x} {length}");
    }
    let mut bytes = [0; 64];
    MmioDevice::read(&*setup.unit.unit, SIZE - 64, &mut bytes);
    MmioDevice::read(&*setup.unit.unit, 1, &mut bytes[..2]);
    assert_eq!(bytes[..2], [0, 0]);
}

/// An invalidation returns when the devices that were using a page have ended, and devices attach and leave meanwhile.
#[test]
fn devices_never_see_a_page_that_was_invalidated() {
    const ROUNDS: u64 = 300;
    let mut setup = setup();
    setup.enable();
    setup.context(0, TABLES);
    setup.context(1, TABLES);
    let current = AtomicU64::new(0);
    let stop = AtomicUsize::new(0);
    let page = |round: u64| HIGH + (round % 64) * PAGE;
    setup.put(page(0), 1);
    setup.map(TABLES, 0x5000, page(0) | 3);
    std::thread::scope(|scope| {
        for memory in setup.memory.clone() {
            let (current, stop) = (&current, &stop);
            scope.spawn(move || {
                while stop.load(Ordering::Relaxed) == 0 {
                    let before = current.load(Ordering::SeqCst);
                    let found = memory.memory().read_obj::<u64>(GuestAddress(0x5000));
                    // Pages that were invalidated are zero. What is read is of a round not before the one that was over.
                    if let Ok(value) = found {
                        assert!(value > before, "{value} in or after round {before}");
                    }
                }
            });
        }
        for round in 1..ROUNDS {
            setup.put(page(round), round + 1);
            setup.map(TABLES, 0x5000, page(round) | 3);
            let forget = [(2 | 3 << 4 | 5 << 16, 0x5000), (2 | 2 << 4 | 6 << 16, 0)];
            assert!(setup.submit(&forget));
            current.store(round, Ordering::SeqCst);
            setup.put(page(round - 1), 0);
            if round % 16 == 0 {
                setup.put(CONTEXTS + 0x80, 0);
                assert!(setup.submit(&[CONTEXTS_AGAIN]));
                setup.context(0, TABLES);
            }
        }
        stop.store(1, Ordering::Relaxed);
    });
    assert_eq!(setup.dma(0, 0x5000), Some(ROUNDS));
}

/// Two processors write anything to any register while a device works: nothing panics, and nothing waits for ever.
#[test]
fn any_writes_to_registers_are_harmless() {
    const WRITES: usize = 2000;
    let mut setup = setup();
    setup.enable();
    setup.context(0, TABLES);
    setup.map(TABLES, 0x5000, HIGH | 3);
    let writing = AtomicUsize::new(2);
    std::thread::scope(|scope| {
        for mut random in [0x9e37_79b9_7f4a_7c15u64, 0xd1b5_4a32_d192_ed03] {
            let (setup, writing) = (&setup, &writing);
            scope.spawn(move || {
                for _ in 0..WRITES {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    let known = [ROOT, QUEUE, 0x20, 7 << 26, 1 << 31, 5 << 29, 0, random >> 32];
                    let value = known[(random >> 8 & 7) as usize];
                    setup.write(((random >> 16) % 0x2b0) & !3, value as u32);
                }
                writing.fetch_sub(1, Ordering::Relaxed);
            });
        }
        while writing.load(Ordering::Relaxed) > 0 {
            let _ = setup.dma(0, 0x5000);
        }
    });
    // A driver that begins anew finds a unit that works.
    for _ in 0..2 {
        setup.write(at::COMMAND, 0);
        setup.write(at::COMMAND, 7 << 26);
    }
    setup.write(at::COMMAND, 0);
    setup.write64(at::QUEUE_TAIL, 0);
    setup.write(at::FAULT_STATUS, u32::MAX);
    setup.enable();
    assert!(setup.submit(&[CONTEXTS_AGAIN, FORGET_ALL]));
}

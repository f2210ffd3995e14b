//! A guest's unit from its memory to its devices.

use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, Sender, channel},
    },
    thread,
};

use proptest::{prelude::*, test_runner};
use zerocopy::FromBytes;

use super::*;
use crate::{
    BoundDevice, Context, Errno, HwptOptions,
    caller::{File, LibraryCaller},
    domain::Prot,
    hardware::UserData,
    iova::{Iova, IovaRange, PAGE_SIZE},
    process::UserAddr,
    soft::{Access, Fault, FaultReason, Port, SoftDevice},
    testing::{LENGTH, MEMORY, Program},
};

const RW: Prot = Prot::READ.union(Prot::WRITE);
/// The id of the guest's device, and of the domain that it is in.
const SOURCE: u16 = 0x18;
const DOMAIN: u16 = 5;
/// Where the guest has what: pages of its memory.
const ROOT: u64 = PAGE_SIZE;
const MIDDLE: u64 = 2 * PAGE_SIZE;
const TABLE: u64 = 3 * PAGE_SIZE;
const RING: u64 = 4 * PAGE_SIZE;
const STATUS: u64 = 5 * PAGE_SIZE;
const OTHER_RING: u64 = 6 * PAGE_SIZE;
/// Pages from here on are the devices'.
const FREE: u64 = 8 * PAGE_SIZE;
/// How much memory it has. The program has one page more, for its ioctls.
const GUEST: u64 = LENGTH - PAGE_SIZE;
const R: u64 = 1;
const W: u64 = 2;

/// Descriptors.
const GLOBAL: [u64; 2] = [0x12, 0];

fn domain_selective() -> [u64; 2] {
    [0x22 | u64::from(DOMAIN) << 16, 0]
}

fn page_selective(iova: u64) -> [u64; 2] {
    [0x32 | u64::from(DOMAIN) << 16, iova & !(PAGE_SIZE - 1)]
}

fn wait(status: u32) -> [u64; 2] {
    [0x25 | u64::from(status) << 32, STATUS]
}

const INTERRUPT: [u64; 2] = [0x15, 0];

/// What a monitor hears.
#[derive(Debug)]
enum Heard {
    Contexts(ContextScope),
    Fault(FaultRecord),
    Completed(u32),
    Stopped(u32, QueueError),
}

#[derive(Debug)]
struct Ear(Mutex<Sender<Heard>>);

impl Ear {
    fn tell(&self, heard: Heard) {
        // A test that does not listen any more is over.
        let _ = self.0.lock().unwrap().send(heard);
    }
}

impl Listener for Ear {
    fn contexts(&self, scope: ContextScope) {
        self.tell(Heard::Contexts(scope));
    }

    fn fault(&self, record: FaultRecord) {
        self.tell(Heard::Fault(record));
    }

    fn completed(&self, queue: u32) {
        self.tell(Heard::Completed(queue));
    }

    fn stopped(&self, queue: u32, error: QueueError) {
        self.tell(Heard::Stopped(queue, error));
    }
}

/// A guest with a device behind its unit.
struct Guest {
    program: Program,
    context: Arc<Context>,
    device: BoundDevice,
    port: Arc<Port>,
    ioas: u32,
    parent: u32,
    viommu: u32,
    unit: Arc<VtdIommu>,
    heard: Receiver<Heard>,
}

impl Guest {
    fn new() -> Self {
        let (program, context) = (Program::new().unwrap(), Context::new());
        let hardware = SoftDevice::new(1, vec![]);
        let port = hardware.port(None);
        let device = context.bind(hardware).unwrap();
        let ioas = context.ioas_alloc().unwrap();
        context.ioas_map_by(ioas, &program, UserAddr(MEMORY), GUEST, Some(Iova(0)), RW).unwrap();
        let options = HwptOptions { nest_parent: true, dirty_tracking: true, ..Default::default() };
        let parent = context.hwpt_alloc(&program, device.id(), ioas, options, UserData::default()).unwrap();
        let data = UserData { kind: VIOMMU_TYPE, ..UserData::default() };
        let viommu = context.viommu_alloc(&program, device.id(), parent, data).unwrap();
        context.vdevice_alloc(viommu, device.id(), SOURCE.into()).unwrap();
        let unit = context.viommu(viommu).unwrap().as_any().downcast::<VtdIommu>().unwrap();
        let (ear, heard) = channel();
        unit.listen(Some(Arc::new(Ear(Mutex::new(ear)))));
        let guest = Self { program, context, device, port, ioas, parent, viommu, unit, heard };
        guest.write(ROOT, MIDDLE | R | W);
        guest.write(MIDDLE, TABLE | R | W);
        guest
    }

    /// One whose device is attached to its page table.
    fn attached() -> Self {
        let guest = Self::new();
        guest.device.attach(None, guest.table(ROOT, 39)).unwrap();
        guest
    }

    fn table_data(&self, data: TableData) -> Result<u32, Errno> {
        let caller = LibraryCaller::new(&data);
        let options = HwptOptions::default();
        self.context.hwpt_alloc(&caller, self.device.id(), self.viommu, options, caller.data(HWPT_DATA_TYPE))
    }

    /// A nested page table.
    fn table(&self, root: u64, address_bits: u32) -> u32 {
        self.table_data(TableData { root, domain: DOMAIN.into(), address_bits }).unwrap()
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.program.put(UserAddr(MEMORY + at), bytes).unwrap();
    }

    fn write(&self, at: u64, value: u64) {
        self.put(at, &value.to_le_bytes());
    }

    fn read(&self, at: u64) -> u64 {
        self.program.take::<u64>(UserAddr(MEMORY + at)).unwrap()
    }

    /// Maps a page of the first 2 MiB.
    fn map(&self, iova: u64, to: u64, rights: u64) {
        self.write(TABLE + iova / PAGE_SIZE * 8, to | rights);
    }

    fn queue(&self, index: u32, ring: u64) -> (u32, Arc<Queue>) {
        let id = self.context.hw_queue_alloc(self.viommu, QUEUE_TYPE, index, Iova(ring), PAGE_SIZE).unwrap();
        (id, self.unit.queue(index).unwrap())
    }

    /// Puts descriptors into a ring from `at` on, and rings: where the tail is now.
    fn submit(&self, queue: &Queue, ring: u64, at: u32, descriptors: &[[u64; 2]]) -> u32 {
        let mut tail = at;
        for [low, high] in descriptors {
            self.write(ring + u64::from(tail), *low);
            self.write(ring + u64::from(tail) + 8, *high);
            tail = (tail + 16) % PAGE_SIZE as u32;
        }
        queue.set_tail(tail);
        tail
    }

    fn hear(&self) -> Heard {
        self.heard.recv_timeout(core::time::Duration::from_secs(20)).expect("nothing was heard")
    }

    fn load(&self, iova: u64) -> Result<u64, FaultReason> {
        let mut bytes = [0; 8];
        let result = self.port.reader().section().read(Iova(iova), &mut bytes);
        result.map(|n| assert_eq!(n, 8)).map_err(|fault| fault.reason)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn store(&self, iova: u64, value: u64) -> Result<(), FaultReason> {
        let result = self.port.reader().section().write(Iova(iova), &value.to_le_bytes());
        result.map(|n| assert_eq!(n, 8)).map_err(|fault| fault.reason)
    }
}

#[test]
fn a_device_translates_by_the_guests_table() {
    let guest = Guest::attached();
    guest.map(0, FREE, R | W);
    guest.map(PAGE_SIZE, FREE + PAGE_SIZE, R);
    guest.map(2 * PAGE_SIZE, FREE + 2 * PAGE_SIZE, W);
    guest.map(4 * PAGE_SIZE, GUEST, R | W);
    guest.write(FREE + PAGE_SIZE + 16, 77);
    assert_eq!(guest.store(8, 5), Ok(()));
    assert_eq!((guest.read(FREE + 8), guest.load(8)), (5, Ok(5)));
    assert_eq!(guest.load(PAGE_SIZE + 16), Ok(77));
    assert_eq!(guest.store(PAGE_SIZE, 1), Err(FaultReason::Permission));
    assert_eq!(guest.store(2 * PAGE_SIZE, 9), Ok(()));
    assert_eq!(guest.read(FREE + 2 * PAGE_SIZE), 9);
    assert_eq!(guest.load(2 * PAGE_SIZE), Err(FaultReason::Permission));
    assert_eq!(guest.load(3 * PAGE_SIZE), Err(FaultReason::Unmapped));
    assert_eq!(guest.load(4 * PAGE_SIZE), Err(FaultReason::Target));
    assert_eq!(guest.load(1 << 39), Err(FaultReason::Range));
    // What is added, or allowed in addition, needs no invalidation.
    guest.map(3 * PAGE_SIZE, FREE, R);
    assert_eq!(guest.load(3 * PAGE_SIZE + 8), Ok(5));
    guest.map(PAGE_SIZE, FREE + PAGE_SIZE, R | W);
    assert_eq!(guest.store(PAGE_SIZE + 16, 78), Ok(()));
    assert_eq!(guest.load(PAGE_SIZE + 16), Ok(78));
    // A section counts each of them once.
    let before = guest.port.counters();
    guest.map(5 * PAGE_SIZE, FREE, R);
    assert!(guest.load(5 * PAGE_SIZE).is_ok() && guest.load(5 * PAGE_SIZE).is_ok());
    assert!(guest.load(6 * PAGE_SIZE).is_err());
    let counted = guest.port.counters();
    assert_eq!((counted.translations - before.translations, counted.faults - before.faults), (2, 1));
}

#[test]
fn large_pages_and_four_levels() {
    let guest = Guest::new();
    // 512 GiB and 2 MiB up, a page of 2 MiB whose memory ends early, and one of 1 GiB.
    let (top, middle, low) = (FREE, FREE + PAGE_SIZE, FREE + 2 * PAGE_SIZE);
    guest.write(top + 8, middle | R | W);
    guest.write(middle, low | R | W);
    guest.write(low + 8, 1 << 7 | R | W);
    guest.write(middle + 8, 1 << 7 | R);
    guest.device.attach(None, guest.table(top, 48)).unwrap();
    let base = 1 << 39;
    guest.write(FREE + 5 * PAGE_SIZE + 8, 4711);
    for _ in 0..2 {
        assert_eq!(guest.load(base + (2 << 20) + FREE + 5 * PAGE_SIZE + 8), Ok(4711));
        assert_eq!(guest.load(base + (1 << 30) + FREE + 5 * PAGE_SIZE + 8), Ok(4711));
        assert_eq!(guest.store(base + (1 << 30), 1), Err(FaultReason::Permission));
        assert_eq!(guest.load(base + (2 << 20) + GUEST), Err(FaultReason::Target));
    }
    let found = guest.port.reader().section().translate(Iova(base + (2 << 20) + 5), Access::Read).unwrap();
    assert_eq!(found.prot, RW);
}

/// VT-d 3.14: whatever the table has there.
#[test]
fn addresses_of_interrupt_requests_are_not_translated() {
    const FIRST: u64 = 0xfee0_0000;
    const BEHIND: u64 = 0xfef0_0000;
    let guest = Guest::new();
    // Pages on both sides and in it; and the same by one page of 1 GiB, where the guest has memory for that.
    let (top, middle, low) = (FREE, FREE + PAGE_SIZE, FREE + 2 * PAGE_SIZE);
    guest.write(top, middle | R | W);
    guest.write(middle + 3 * 8, low | R | W);
    for half in [FIRST - (2 << 20), FIRST] {
        guest.write(low + (half >> 21 & 511) * 8, TABLE | R | W);
    }
    for page in [FIRST - PAGE_SIZE, FIRST, BEHIND - PAGE_SIZE, BEHIND] {
        guest.write(TABLE + (page >> 12 & 511) * 8, (FREE + 4 * PAGE_SIZE) | R | W);
    }
    guest.write(FREE + 4 * PAGE_SIZE + 8, 4711);
    let (from, at) = (UserAddr(MEMORY + FREE + 4 * PAGE_SIZE), Some(Iova(FIRST % (1 << 30) - PAGE_SIZE)));
    guest.context.ioas_map_by(guest.ioas, &guest.program, from, 2 * PAGE_SIZE, at, RW).unwrap();
    guest.device.attach(None, guest.table(top, 48)).unwrap();
    for large in [false, true] {
        if large {
            guest.write(middle + 3 * 8, 1 << 7 | R | W);
            guest.unit.invalidate(Invalidation::Iotlb(IotlbScope::Global));
        }
        assert_eq!(guest.load(FIRST - PAGE_SIZE + 8), Ok(4711));
        for (at, inside) in [(FIRST, true), (FIRST + 8, true), (BEHIND - 8, true), (BEHIND + 8, false)] {
            let expected = match (inside, large) {
                (true, _) => Err(FaultReason::Interrupt),
                (false, false) => Ok(4711),
                (false, true) => Err(FaultReason::Target),
            };
            assert_eq!(guest.load(at), expected, "{at:#x}");
            assert_eq!(guest.store(at, 4711), expected.map(|_| ()), "{at:#x}");
        }
        let last = guest.port.reader().section().translate(Iova(FIRST - 16), Access::Read).unwrap();
        assert_eq!(last.length, 16);
    }
    let fault = Fault { iova: Iova(FIRST), access: Access::Write, reason: FaultReason::Interrupt };
    assert_eq!(FaultRecord::new(SOURCE, &fault), None);
}

#[test]
fn tables_that_cannot_be_are_refused() {
    let guest = Guest::new();
    let data = |root, domain, address_bits| guest.table_data(TableData { root, domain, address_bits });
    assert_eq!(data(1, 0, 39), Err(Errno::INVAL));
    assert_eq!(data(0, 0x1_0000, 39), Err(Errno::INVAL));
    assert_eq!(data(0, 0, 57), Err(Errno::INVAL));
    assert_eq!(data(0, 0, 48).map(|_| ()), Ok(()));
    // A device that the guest does not know.
    let stranger = SoftDevice::new(9, vec![]);
    let bound = guest.context.bind(stranger).unwrap();
    assert_eq!(bound.attach(None, guest.table(ROOT, 39)), Err(Errno::INVAL));
    // Its own tables, a root outside of its memory, reserved bits.
    for (root, entry, reason) in [
        (GUEST, 0, FaultReason::Table),
        (FREE, FREE | R, FaultReason::Unmapped),
        (FREE, 1 << 62, FaultReason::Unmapped),
        (FREE, 0x5000 | 1 << 7 | R, FaultReason::Reserved),
    ] {
        if root < GUEST {
            guest.write(root, entry);
        }
        guest.device.attach(None, guest.table(root, 39)).unwrap();
        assert_eq!(guest.load(1 << 12), Err(reason), "{root:#x}: {entry:#x}");
        guest.device.detach(None);
    }
}

fn events(file: &Arc<dyn File>) -> Vec<Result<Event, u32>> {
    let mut bytes = [0; 16 * EVENT_LENGTH];
    let n = file.read(&mut bytes).unwrap();
    let mut rest = &bytes[..n];
    let mut events = Vec::new();
    while let Ok((header, after)) = <[u32; 2]>::read_from_prefix(rest) {
        rest = after;
        if header[0] & 1 != 0 {
            events.push(Err(header[1]));
        } else {
            let (event, after) = Event::read_from_prefix(rest).unwrap();
            events.push(Ok(event));
            rest = after;
        }
    }
    events
}

/// A guest whose table has every address, and a device that comes to very many.
#[test]
fn an_iotlb_has_a_limit() {
    let guest = Guest::new();
    for entry in 0..PAGE_SIZE / 8 {
        guest.write(FREE + entry * 8, FREE | R | W);
    }
    guest.device.attach(None, guest.table(FREE, 48)).unwrap();
    let mut reader = guest.port.reader();
    for at in 0..(table::LIMIT as u64 * 5 / 4) {
        let section = reader.section();
        // None of interrupt requests' addresses.
        let found = section.translate(Iova((at << 21) + (1 << 20) + 8), Access::Read).unwrap();
        assert_eq!(found.host.0, guest.host(FREE) + 8);
        drop(section);
    }
    let nodes = guest.unit.largest_iotlb();
    assert!((2..=table::LIMIT + 4).contains(&nodes), "{nodes}");
}

#[test]
fn faults_are_told_and_lost_ones_too() {
    let guest = Guest::attached();
    let (_, file) = guest.context.veventq_alloc(guest.viommu, EVENT_TYPE, 2).unwrap();
    let fault = |iova, access| {
        let found = guest.port.reader().section().translate(Iova(iova), access);
        found.unwrap_err()
    };
    let read = fault(0x1234, Access::Read);
    // Who only looks does not fault.
    assert_eq!(events(&file), []);
    guest.port.report(&read);
    let Heard::Fault(record) = guest.hear() else { panic!("no fault") };
    assert_eq!(record, FaultRecord { source: SOURCE, reason: 6, access: Access::Read, address: 0x1000 });
    let told = Event { kind: event::FAULT, queue: 0, data: record.to_words() };
    assert_eq!(events(&file), [Ok(told)]);
    for _ in 0..4 {
        guest.port.report(&fault(1 << 40, Access::Write));
    }
    let told = Event { data: [1 << 40, 1 << 63 | 4 << 32 | u64::from(SOURCE)], ..told };
    // Numbers 1 and 2 have room, 4 is the last one that has not.
    assert_eq!(events(&file), [Ok(told), Ok(told), Err(4)]);
    // What is none of the guest's.
    guest.port.report(&Fault { reason: FaultReason::Target, ..read });
    assert_eq!(events(&file), []);
}

#[test]
fn the_queue_invalidates_and_says_so() {
    let guest = Guest::attached();
    let (_, queue) = guest.queue(0, RING);
    guest.map(0, FREE, R | W);
    guest.map(PAGE_SIZE, FREE, R);
    guest.write(FREE, 1);
    guest.write(FREE + PAGE_SIZE, 2);
    let mut at = 0;
    let other = [0x22 | u64::from(DOMAIN + 1) << 16, 0];
    let scopes = [page_selective(0), page_selective(PAGE_SIZE), other, domain_selective(), GLOBAL];
    for (round, scope) in scopes.into_iter().enumerate() {
        guest.map(0, FREE, R | W);
        at = guest.submit(&queue, RING, at, &[GLOBAL, INTERRUPT]);
        assert!(matches!(guest.hear(), Heard::Completed(0)));
        assert_eq!(guest.load(0), Ok(1));
        guest.map(0, FREE + PAGE_SIZE, R | W);
        assert_eq!(guest.load(0), Ok(1), "it is cached");
        let status = 100 + round as u32;
        at = guest.submit(&queue, RING, at, &[scope, wait(status), INTERRUPT]);
        assert!(matches!(guest.hear(), Heard::Completed(0)));
        assert_eq!(guest.read(STATUS), u64::from(status));
        let hit = [0, 3, 4].contains(&round);
        assert_eq!(guest.load(0), Ok(if hit { 2 } else { 1 }), "{round}");
    }
    // Context entries are the monitor's, and told before what follows.
    let device = [0x31 | u64::from(DOMAIN) << 16 | u64::from(SOURCE) << 32, 0];
    guest.submit(&queue, RING, at, &[device, INTERRUPT]);
    let scope = ContextScope::Device { domain: DOMAIN, source: SOURCE, mask: 0 };
    assert!(matches!(guest.hear(), Heard::Contexts(heard) if heard == scope));
    assert!(matches!(guest.hear(), Heard::Completed(0)));
    // The ring is one: past its end it goes on at its start.
    let mut at = queue.head();
    for round in 0..3u32 {
        let many = vec![GLOBAL; 200];
        at = guest.submit(&queue, RING, at, &many);
        at = guest.submit(&queue, RING, at, &[wait(round), INTERRUPT]);
        assert!(matches!(guest.hear(), Heard::Completed(0)));
        assert_eq!(guest.read(STATUS), u64::from(round));
        assert_eq!(queue.head(), at);
    }
    // A register does the same.
    guest.map(0, FREE, R | W);
    guest.unit.invalidate(Invalidation::Iotlb(IotlbScope::Domain(DOMAIN)));
    assert_eq!(guest.load(0), Ok(1));
}

#[test]
fn a_wait_waits_for_who_uses_the_old_translation() {
    let guest = Guest::attached();
    let (_, queue) = guest.queue(0, RING);
    guest.map(0, FREE, R);
    guest.write(FREE, 1);
    guest.write(FREE + PAGE_SIZE, 2);
    let mut reader = guest.port.reader();
    let section = reader.section();
    let old = section.translate(Iova(0), Access::Read).unwrap();
    guest.map(0, FREE + PAGE_SIZE, R);
    guest.submit(&queue, RING, 0, &[page_selective(0), wait(1), INTERRUPT]);
    // Others see the new one soon.
    while guest.load(0) != Ok(2) {
        thread::yield_now();
    }
    assert_eq!((guest.read(STATUS), queue.head()), (0, 16));
    assert!(guest.heard.try_recv().is_err());
    assert_ne!(section.translate(Iova(0), Access::Read).unwrap().host, old.host);
    drop(section);
    assert!(matches!(guest.hear(), Heard::Completed(0)));
    assert_eq!(guest.read(STATUS), 1);
}

#[test]
fn what_is_no_descriptor_stops_the_queue_until_it_is_told_to_go_on() {
    let guest = Guest::attached();
    let (_, file) = guest.context.veventq_alloc(guest.viommu, EVENT_TYPE, 16).unwrap();
    let (_, queue) = guest.queue(0, RING);
    let tail = guest.submit(&queue, RING, 0, &[GLOBAL, [0xf, 0], wait(1), INTERRUPT]);
    assert!(matches!(guest.hear(), Heard::Stopped(0, QueueError::Type)));
    assert_eq!((queue.head(), queue.error(), guest.read(STATUS)), (16, Some(QueueError::Type), 0));
    let stopped = Event { kind: event::QUEUE_STOPPED, queue: 0, data: [QueueError::Type as u64, 16] };
    assert_eq!(events(&file), [Ok(stopped)]);
    // Still wrong.
    queue.clear_error();
    assert!(matches!(guest.hear(), Heard::Stopped(0, QueueError::Type)));
    guest.write(RING + 16, GLOBAL[0]);
    queue.clear_error();
    assert!(matches!(guest.hear(), Heard::Completed(0)));
    assert_eq!((queue.head(), queue.error(), guest.read(STATUS)), (tail, None, 1));
    for wrong in [PAGE_SIZE as u32, u32::MAX, tail + 8] {
        queue.set_tail(wrong);
        assert!(matches!(guest.hear(), Heard::Stopped(0, QueueError::Tail)));
        queue.set_tail(tail);
        queue.clear_error();
    }
    // A status that has nowhere to go is lost.
    guest.submit(&queue, RING, tail, &[[0x25 | 7 << 32, GUEST], INTERRUPT]);
    assert!(matches!(guest.hear(), Heard::Completed(0)));
}

#[test]
fn a_queue_owns_its_memory_and_ends_with_its_object() {
    let guest = Guest::attached();
    let alloc =
        |index, at, length| guest.context.hw_queue_alloc(guest.viommu, QUEUE_TYPE, index, Iova(at), length);
    assert_eq!(alloc(0, RING, 3 * PAGE_SIZE), Err(Errno::INVAL));
    assert_eq!(alloc(0, RING, PAGE_SIZE / 2), Err(Errno::INVAL));
    assert_eq!(alloc(0, RING + 16, PAGE_SIZE), Err(Errno::INVAL));
    assert_eq!(alloc(0, GUEST, PAGE_SIZE), Err(Errno::NOENT));
    assert_eq!(alloc(QUEUES, RING, PAGE_SIZE), Err(Errno::INVAL));
    assert_eq!(alloc(1, RING, PAGE_SIZE), Err(Errno::IO));
    let (first, queue) = guest.queue(0, RING);
    let (second, other) = guest.queue(1, OTHER_RING);
    assert_eq!(guest.context.ioas_unmap(guest.ioas, IovaRange::ALL), Err(Errno::BUSY));
    // Each has a thread.
    guest.submit(&other, OTHER_RING, 0, &[wait(3), INTERRUPT]);
    assert!(matches!(guest.hear(), Heard::Completed(1)));
    guest.submit(&queue, RING, 0, &[wait(4), INTERRUPT]);
    assert!(matches!(guest.hear(), Heard::Completed(0)));
    assert_eq!(guest.context.destroy(first), Err(Errno::BUSY));
    guest.context.destroy(second).unwrap();
    guest.context.destroy(first).unwrap();
    assert!(guest.unit.queue(0).is_none());
    // Nobody reads it any more.
    guest.submit(&queue, RING, 32, &[wait(5)]);
    assert_eq!((queue.head(), guest.read(STATUS)), (32, 4));
    assert_eq!(guest.context.ioas_unmap(guest.ioas, IovaRange::ALL), Ok(GUEST));
    // Nor has a device what its guest's memory was.
    guest.map(0, FREE, R);
    assert_eq!(guest.load(0), Err(FaultReason::Table));
}

/// What a program does that has the doorbells mapped.
#[test]
fn a_program_rings_by_the_page_that_it_maps() {
    let guest = Guest::attached();
    let caller = LibraryCaller::new(&ViommuData::default());
    let viommu = guest
        .context
        .viommu_alloc(&caller, guest.device.id(), guest.parent, caller.data(VIOMMU_TYPE))
        .unwrap();
    let told: ViommuData = caller.value().unwrap();
    assert_eq!(told.doorbell_length, PAGE_SIZE);
    let (prot, flags) = (rustix::mm::ProtFlags::READ, rustix::mm::MapFlags::SHARED);
    let mapping = guest.context.mmap(told.doorbell_offset, told.doorbell_length, prot, flags).unwrap();
    let page = crate::hostmem::FileMapping::new(mapping.file(), PAGE_SIZE as usize, true).unwrap();
    let word = |offset: usize| page.word(64 + offset);
    for index in 0..2 {
        let ring = Iova([OTHER_RING, RING][index as usize]);
        guest.context.hw_queue_alloc(viommu, QUEUE_TYPE, index, ring, PAGE_SIZE).unwrap();
    }
    let ring = || {
        word(core::mem::offset_of!(Doorbell, wake)).fetch_add(1, Ordering::SeqCst);
        let flags = rustix::thread::futex::Flags::empty();
        rustix::thread::futex::wake(word(core::mem::offset_of!(Doorbell, wake)), flags, 1).unwrap();
    };
    guest.write(RING, wait(9)[0]);
    guest.write(RING + 8, wait(9)[1]);
    guest.write(RING + 16, INTERRUPT[0]);
    guest.write(RING + 24, 0);
    word(core::mem::offset_of!(Doorbell, tail)).store(32, Ordering::SeqCst);
    ring();
    let completed: &AtomicU32 = word(core::mem::offset_of!(Doorbell, completed));
    while completed.load(Ordering::SeqCst) == 0 {
        let flags = rustix::thread::futex::Flags::empty();
        // EAGAIN when it is not 0 any more.
        let _ = rustix::thread::futex::wait(completed, flags, 0, None);
    }
    assert_eq!(guest.read(STATUS), 9);
    assert_eq!(word(core::mem::offset_of!(Doorbell, head)).load(Ordering::SeqCst), 32);
    // It stops, and goes on when the program clears the error.
    word(core::mem::offset_of!(Doorbell, tail)).store(7, Ordering::SeqCst);
    ring();
    let error = word(core::mem::offset_of!(Doorbell, error));
    while error.load(Ordering::SeqCst) != QueueError::Tail as u32 {
        thread::yield_now();
    }
    guest.write(RING + 32, wait(10)[0]);
    guest.write(RING + 40, wait(10)[1]);
    word(core::mem::offset_of!(Doorbell, tail)).store(48, Ordering::SeqCst);
    error.store(0, Ordering::SeqCst);
    ring();
    while guest.read(STATUS) != 10 {
        thread::yield_now();
    }
    drop(mapping);
}

#[test]
fn what_the_parent_loses_no_iotlb_keeps() {
    let guest = Guest::attached();
    let other = guest.context.ioas_alloc().unwrap();
    // A second piece of memory, which can go.
    let from = UserAddr(MEMORY + FREE);
    guest.context.ioas_map_by(guest.ioas, &guest.program, from, PAGE_SIZE, Some(Iova(1 << 30)), RW).unwrap();
    guest.map(0, 1 << 30, R | W);
    guest.write(FREE, 42);
    assert_eq!(guest.load(0), Ok(42));
    let range = IovaRange::with_length(Iova(1 << 30), PAGE_SIZE).unwrap();
    guest.context.ioas_unmap(guest.ioas, range).unwrap();
    assert_eq!(guest.load(0), Err(FaultReason::Target));
    guest.context.destroy(other).unwrap();
}

#[test]
fn writes_through_a_guests_table_are_noted_in_the_parent() {
    let guest = Guest::attached();
    guest.map(0, FREE, R | W);
    guest.map(PAGE_SIZE, FREE + PAGE_SIZE, R | W);
    let dirty = || {
        let bitmap_at = UserAddr(MEMORY + GUEST);
        guest.program.put(bitmap_at, &[0; 8]).unwrap();
        let bitmap = crate::ioas::DirtyBitmap {
            process: guest.program_process(),
            range: IovaRange::with_length(Iova(0), GUEST).unwrap(),
            page_size: PAGE_SIZE,
            at: bitmap_at,
        };
        guest.context.read_dirty(guest.parent, &bitmap, false).unwrap();
        guest.program.take::<u64>(bitmap_at).unwrap()
    };
    assert_eq!(guest.store(0, 1), Ok(()));
    guest.context.set_dirty_tracking(guest.parent, true).unwrap();
    assert_eq!(guest.load(0), Ok(1));
    let large = dirty();
    assert_eq!(large, 0, "nothing was written to since");
    assert_eq!(guest.store(0, 2), Ok(()));
    assert_ne!(dirty() & 1 << (FREE / PAGE_SIZE), 0);
    assert_eq!(dirty(), 0);
    assert_eq!(guest.store(8, 3), Ok(()));
    assert_ne!(dirty() & 1 << (FREE / PAGE_SIZE), 0, "the IOTLB forgot that it may be written to");
}

impl Guest {
    fn program_process(&self) -> &dyn crate::process::Process {
        &**crate::caller::Caller::process(&self.program)
    }
}

/// A step of a guest.
#[derive(Clone, Copy, Debug)]
enum Step {
    Map { page: u64, to: u64, rights: u64 },
    Unmap { page: u64 },
    Page { page: u64 },
    Domain,
    Global,
    Access { page: u64, write: bool },
}

const PAGES: u64 = 24;

fn step() -> impl Strategy<Value = Step> {
    let page = 0..PAGES;
    prop_oneof![
        4 => (page.clone(), 0..PAGES, 1..4u64).prop_map(|(page, to, rights)| Step::Map { page, to, rights }),
        2 => page.clone().prop_map(|page| Step::Unmap { page }),
        2 => page.clone().prop_map(|page| Step::Page { page }),
        1 => Just(Step::Domain),
        1 => Just(Step::Global),
        8 => (page, any::<bool>()).prop_map(|(page, write)| Step::Access { page, write }),
    ]
}

/// An access must find what the table says, or what it said at some time since the page was last invalidated.
#[test]
fn translations_are_those_of_the_table_or_not_yet_invalidated() {
    let config = test_runner::Config { cases: 60, failure_persistence: None, ..Default::default() };
    let seed = test_runner::TestRng::deterministic_rng(test_runner::RngAlgorithm::ChaCha);
    test_runner::TestRunner::new_with_rng(config, seed)
        .run(&prop::collection::vec(step(), 1..120), |steps| {
            let guest = Guest::attached();
            let (_, queue) = guest.queue(0, RING);
            let mut at = 0;
            let mut invalidate = |descriptor| {
                at = guest.submit(&queue, RING, at, &[descriptor, INTERRUPT]);
                assert!(matches!(guest.hear(), Heard::Completed(0)));
            };
            // Entries by pages; the last one is that of now.
            let mut known: BTreeMap<u64, Vec<u64>> = (0..PAGES).map(|page| (page, vec![0])).collect();
            for step in steps {
                match step {
                    Step::Map { page, to, rights } => {
                        let entry = (FREE + to * PAGE_SIZE) | rights;
                        guest.map(page * PAGE_SIZE, FREE + to * PAGE_SIZE, rights);
                        known.get_mut(&page).unwrap().push(entry);
                    }
                    Step::Unmap { page } => {
                        guest.map(page * PAGE_SIZE, 0, 0);
                        known.get_mut(&page).unwrap().push(0);
                    }
                    Step::Page { page } => {
                        invalidate(page_selective(page * PAGE_SIZE));
                        let entries = known.get_mut(&page).unwrap();
                        *entries = vec![*entries.last().unwrap()];
                    }
                    Step::Domain | Step::Global => {
                        let global = matches!(step, Step::Global);
                        invalidate(if global { GLOBAL } else { domain_selective() });
                        known.values_mut().for_each(|entries| *entries = vec![*entries.last().unwrap()]);
                    }
                    Step::Access { page, write } => {
                        let (access, right) = if write { (Access::Write, W) } else { (Access::Read, R) };
                        let mut reader = guest.port.reader();
                        let section = reader.section();
                        let found = section.translate(Iova(page * PAGE_SIZE), access);
                        let entries = &known[&page];
                        match found {
                            Ok(found) => {
                                // Where the guest's first page is, by the address of one that is mapped.
                                let allowed = entries.iter().any(|entry| {
                                    entry & right != 0 && guest.host(entry & !(PAGE_SIZE - 1)) == found.host.0
                                });
                                prop_assert!(allowed, "{found:?} in page {page}: {entries:x?}");
                            }
                            // A fault is never cached.
                            Err(_) => prop_assert_eq!(entries.last().unwrap() & right, 0),
                        }
                    }
                }
            }
            Ok(())
        })
        .unwrap();
}

impl Guest {
    /// Where a page of its memory is in this process.
    fn host(&self, at: u64) -> u64 {
        self.unit.host(at).unwrap_or(0)
    }
}

#[test]
fn readers_never_see_what_was_invalidated() {
    const POISON: u64 = u64::MAX;
    const ROUNDS: u64 = 300;
    let guest = Guest::attached();
    let (_, queue) = guest.queue(0, RING);
    // Each page of the device's is in one of two of the guest's; the other one is poisoned once that is complete.
    let place = |page: u64, side: u64| FREE + (2 * page + side) * PAGE_SIZE;
    for page in 0..8 {
        guest.write(place(page, 0), page);
        guest.map(page * PAGE_SIZE, place(page, 0), R);
    }
    let end = AtomicBool::new(false);
    thread::scope(|scope| {
        for thread in 0..2u64 {
            let (port, end) = (&guest.port, &end);
            scope.spawn(move || {
                let mut reader = port.reader();
                let mut random = 7 + thread;
                while !end.load(Ordering::Relaxed) {
                    let section = reader.section();
                    for _ in 0..8 {
                        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                        let page = (random >> 33) % 8;
                        let mut bytes = [0; 8];
                        section.read(Iova(page * PAGE_SIZE), &mut bytes).unwrap();
                        assert_eq!(u64::from_le_bytes(bytes), page);
                    }
                }
            });
        }
        let mut at = 0;
        for round in 0..ROUNDS {
            let (old, new) = (round % 2, (round + 1) % 2);
            let mut descriptors = Vec::new();
            for page in 0..8 {
                guest.write(place(page, new), page);
                guest.map(page * PAGE_SIZE, place(page, new), R);
                descriptors.push(page_selective(page * PAGE_SIZE));
            }
            if round % 3 == 0 {
                descriptors = vec![domain_selective()];
            }
            descriptors.push(INTERRUPT);
            at = guest.submit(&queue, RING, at, &descriptors);
            assert!(matches!(guest.hear(), Heard::Completed(0)));
            for page in 0..8 {
                guest.write(place(page, old), POISON);
            }
        }
        end.store(true, Ordering::Relaxed);
    });
}

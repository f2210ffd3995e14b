//! Translations through a guest's page table: random 4 KiB hits of the IOTLB over 1 GiB, walks of what it has not, and an
//! invalidation with its wait by the queue. A thread's rates are counted in its own processor time, the last in real time.
//! Medians of several runs. `cargo bench -p iommufd --bench guest_table`.

mod measure;

use core::hint::black_box;
use std::{
    os::{fd::OwnedFd, unix::fs::FileExt},
    sync::{Arc, mpsc},
    time::Instant,
};

use iommufd::{
    Context, HwptOptions,
    account::Accounting,
    caller::LibraryCaller,
    domain::Prot,
    hardware::UserData,
    iova::{Iova, PAGE_SIZE},
    process::{LocalProcess, Process},
    soft::{
        Access, PortReader, SoftDevice,
        vtd::{
            ContextScope, FaultRecord, HWPT_DATA_TYPE, Invalidation, IotlbScope, Listener, QUEUE_TYPE,
            QueueError, TableData, VIOMMU_TYPE, VtdIommu,
        },
    },
};
use measure::{median, thread_seconds};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

const GIB: u64 = 1 << 30;
const PAGES: u64 = GIB / PAGE_SIZE;
const RUNS: usize = 7;
const TRANSLATIONS: u64 = 10_000_000;
/// Translations in one section.
const SECTION: u64 = 32;
/// How much memory the guest has, and where it has what.
const MEMORY: u64 = 64 << 20;
const ROOT: u64 = 0;
const MIDDLE: u64 = PAGE_SIZE;
const RING: u64 = 2 * PAGE_SIZE;
const TABLES: u64 = 4 << 20;
const DATA: u64 = 8 << 20;
const DOMAIN: u16 = 1;
/// Invalidations of the queue in one run.
const INVALIDATIONS: u32 = 2000;

/// Says when a wait is done.
#[derive(Debug)]
struct Done(mpsc::SyncSender<()>);

impl Listener for Done {
    fn contexts(&self, _scope: ContextScope) {}

    fn fault(&self, _record: FaultRecord) {}

    fn completed(&self, _queue: u32) {
        self.0.send(()).expect("the bench waits");
    }

    fn stopped(&self, queue: u32, error: QueueError) {
        panic!("queue {queue}: {error}");
    }
}

/// The guest's memory: tables for 1 GiB in pages of 4 KiB, each of them somewhere.
fn memory() -> OwnedFd {
    let file = memfd_create("guest", MemfdFlags::CLOEXEC).expect("there is memory");
    ftruncate(&file, MEMORY).expect("there is memory");
    let file = std::fs::File::from(file);
    let write = |at, value: u64| file.write_all_at(&value.to_le_bytes(), at).expect("it is in the file");
    write(ROOT, MIDDLE | 3);
    for table in 0..PAGES / 512 {
        write(MIDDLE + table * 8, (TABLES + table * PAGE_SIZE) | 3);
    }
    let entries: Vec<u8> = (0..PAGES)
        .map(|page| DATA + page.wrapping_mul(0x9e37_79b9) % ((MEMORY - DATA) / PAGE_SIZE) * PAGE_SIZE)
        .flat_map(|at| (at | 3).to_le_bytes())
        .collect();
    file.write_all_at(&entries, TABLES).expect("it is in the file");
    // Invalidate a page, and wait with an interrupt, all along the ring.
    for pair in 0..PAGE_SIZE / 32 {
        write(RING + pair * 32, 0x32 | u64::from(DOMAIN) << 16);
        write(RING + pair * 32 + 16, 0x15);
    }
    file.into()
}

fn hits(reader: &mut PortReader, among: u64) -> f64 {
    let mut random = 0x9e37_79b9u64;
    let begin = thread_seconds();
    for _ in 0..TRANSLATIONS / SECTION {
        let section = reader.section();
        for _ in 0..SECTION {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            assert!(black_box(section.translate(Iova(random % among), Access::Read)).is_ok());
        }
    }
    TRANSLATIONS as f64 / (thread_seconds() - begin)
}

fn walks(reader: &mut PortReader) -> f64 {
    let begin = thread_seconds();
    for page in 0..PAGES {
        let section = reader.section();
        assert!(black_box(section.translate(Iova(page * PAGE_SIZE), Access::Read)).is_ok());
    }
    PAGES as f64 / (thread_seconds() - begin)
}

fn main() -> Result<(), iommufd::Errno> {
    let (context, file) = (Context::new(), memory());
    context.set_accounting(Accounting::None)?;
    let process: Arc<dyn Process> = LocalProcess::get();
    let ioas = context.ioas_alloc()?;
    context.ioas_map_file(ioas, &process, &file, 0, MEMORY, Some(Iova(0)), Prot::READ | Prot::WRITE)?;
    let hardware = SoftDevice::new(1, Vec::new());
    let port = hardware.port(None);
    let device = context.bind(hardware)?;
    let root = TableData { root: ROOT, domain: DOMAIN.into(), address_bits: 39 };
    let caller = LibraryCaller::new(&root);
    let options = HwptOptions { nest_parent: true, ..HwptOptions::default() };
    let parent = context.hwpt_alloc(&caller, device.id(), ioas, options, UserData::default())?;
    let kind = UserData { kind: VIOMMU_TYPE, ..UserData::default() };
    let viommu = context.viommu_alloc(&caller, device.id(), parent, kind)?;
    let unit = context.viommu(viommu)?.as_any().downcast::<VtdIommu>().expect("it is of that type");
    context.vdevice_alloc(viommu, device.id(), 8)?;
    let data = caller.data(HWPT_DATA_TYPE);
    let table = context.hwpt_alloc(&caller, device.id(), viommu, HwptOptions::default(), data)?;
    device.attach(None, table)?;

    let mut reader = port.reader();
    let forget = || unit.invalidate(Invalidation::Iotlb(IotlbScope::Domain(DOMAIN)));
    let walked = (0..RUNS).map(|_| {
        forget();
        walks(&mut reader)
    });
    println!("walks        {:8.2} million a second", median(walked.collect()) / 1e6);
    let hit = (0..RUNS).map(|_| hits(&mut reader, GIB));
    println!("hits         {:8.1} million a second", median(hit.collect()) / 1e6);
    // The control: as many addresses as the guest has memory, through the guest's table and through the host's.
    let few = (0..RUNS).map(|_| hits(&mut reader, MEMORY));
    println!("of 64 MiB    {:8.1} million a second", median(few.collect()) / 1e6);
    device.replace(None, parent)?;
    let few = (0..RUNS).map(|_| hits(&mut reader, MEMORY));
    println!("by the host's{:8.1} million a second", median(few.collect()) / 1e6);
    device.replace(None, table)?;

    let (done, is_done) = mpsc::sync_channel(1);
    unit.listen(Some(Arc::new(Done(done))));
    context.hw_queue_alloc(viommu, QUEUE_TYPE, 0, Iova(RING), PAGE_SIZE)?;
    let queue = unit.queue(0).expect("it was made");
    let mut tail = 0;
    let waits = (0..RUNS).map(|_| {
        let begin = Instant::now();
        for _ in 0..INVALIDATIONS {
            tail = (tail + 32) % PAGE_SIZE as u32;
            queue.set_tail(tail);
            is_done.recv().expect("the queue lives");
        }
        begin.elapsed().as_secs_f64() / f64::from(INVALIDATIONS)
    });
    println!(
        "invalidation {:8.1} us, with the wait for it and both threads' waking",
        median(waits.collect()) * 1e6
    );
    unit.listen(None);
    Ok(())
}

//! A context above a container that is not the kernel's.

use std::collections::BTreeMap;

use iommufd::{
    BoundDevice, Context,
    account::Accounting,
    process::{LocalProcess, Process},
};
use rustix::{
    fd::OwnedFd,
    fs::{MemfdFlags, ftruncate, memfd_create},
};

use super::*;

const PAGE: u64 = PAGE_SIZE;
const BOTH: Prot = Prot::READ.union(Prot::WRITE);

/// A container with the rules of type 1, version 2: nothing is mapped twice, whole mappings are unmapped, and there are not
/// more than `limit`.
#[derive(Default)]
struct Fake {
    mapped: Mutex<BTreeMap<u64, (u64, Prot)>>,
    limit: Mutex<Option<usize>>,
    /// Calls since the last look: mappings, unmappings.
    calls: Mutex<(u32, u32)>,
}

impl DmaMap for Fake {
    unsafe fn map(&self, iova: Iova, _host: HostAddr, length: u64, prot: Prot) -> Result<()> {
        let mut mapped = lock(&self.mapped);
        lock(&self.calls).0 += 1;
        let new = IovaRange::with_length(iova, length)?;
        let overlaps = |(at, (length, _)): (&u64, &(u64, Prot))| {
            IovaRange::with_length(Iova(*at), *length).unwrap().intersection(new).is_some()
        };
        if !prot.intersects(BOTH) {
            return Err(Errno::INVAL);
        }
        if mapped.iter().any(overlaps) {
            return Err(Errno::EXIST);
        }
        if lock(&self.limit).is_some_and(|limit| mapped.len() >= limit) {
            return Err(Errno::NOSPC);
        }
        mapped.insert(iova.0, (length, prot));
        Ok(())
    }

    fn unmap(&self, range: IovaRange) -> Result<()> {
        lock(&self.calls).1 += 1;
        let found = lock(&self.mapped).remove(&range.start().0);
        assert_eq!(found.map(|(length, _)| length), range.length(), "not a whole mapping: {range:?}");
        Ok(())
    }
}

impl Fake {
    /// What is mapped: where, how many pages, and for what.
    fn has(&self) -> Vec<(u64, u64, Prot)> {
        lock(&self.mapped).iter().map(|(at, (length, prot))| (*at, length / PAGE, *prot)).collect()
    }

    fn calls(&self) -> (u32, u32) {
        std::mem::take(&mut lock(&self.calls))
    }
}

struct Setup {
    fake: Arc<Fake>,
    context: Arc<Context>,
    device: BoundDevice,
    process: Arc<dyn Process>,
    file: OwnedFd,
}

/// A device whose IOMMU has 39 bits, and messages of interrupts where x86 has them.
fn setup() -> Setup {
    let fake = Arc::new(Fake::default());
    let range = |start, last| IovaRange::new(Iova(start), Iova(last)).unwrap();
    let ranges = vec![range(0, 0xfedf_ffff), range(0xfef0_0000, (1 << 39) - 1)];
    // SAFETY: nothing reaches the memory.
    let hardware = unsafe { ContainerHardware::new(Arc::clone(&fake) as _, ranges, 7) };
    let context = Context::new();
    context.set_accounting(Accounting::None).unwrap();
    let device = context.bind(Arc::new(hardware)).unwrap();
    let file = memfd_create("memory", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, 64 * PAGE).unwrap();
    Setup { fake, context, device, process: LocalProcess::get(), file }
}

impl Setup {
    fn map(&self, ioas: u32, page: u64, at: u64, pages: u64, prot: Prot) -> Result<Iova> {
        let (process, file) = (&self.process, &self.file);
        self.context.ioas_map_file(ioas, process, file, page * PAGE, pages * PAGE, Some(Iova(at)), prot)
    }

    fn unmap(&self, ioas: u32, at: u64, pages: u64) -> Result<u64> {
        self.context.ioas_unmap(ioas, IovaRange::with_length(Iova(at), pages * PAGE)?)
    }
}

#[test]
fn the_container_has_what_the_attached_address_space_has() {
    let it = setup();
    let ioas = it.context.ioas_alloc().unwrap();
    it.map(ioas, 0, 0x1000, 2, Prot::READ).unwrap();
    assert_eq!(it.fake.has(), []);
    it.device.attach(None, ioas).unwrap();
    it.map(ioas, 2, 0x1_0000_0000, 1, BOTH).unwrap();
    assert_eq!(it.fake.has(), [(0x1000, 2, Prot::READ), (0x1_0000_0000, 1, BOTH)]);
    assert_eq!(it.unmap(ioas, 0x1000, 2), Ok(2 * PAGE));
    assert_eq!(it.fake.has(), [(0x1_0000_0000, 1, BOTH)]);
    // What it cannot translate is refused before it is asked.
    assert_eq!(it.map(ioas, 0, 0xfee0_0000, 1, BOTH), Err(Errno::INVAL));
    assert_eq!(it.map(ioas, 0, 1 << 39, 1, BOTH), Err(Errno::INVAL));
    it.device.detach(None);
    assert_eq!(it.fake.has(), []);
    assert_eq!(it.fake.calls(), (2, 2));
}

#[test]
fn another_address_space_takes_the_place_and_what_both_have_stays() {
    let it = setup();
    let [one, other] = [(); 2].map(|()| it.context.ioas_alloc().unwrap());
    it.map(one, 0, 0x1000, 4, BOTH).unwrap();
    it.map(one, 8, 0x8000, 1, BOTH).unwrap();
    it.map(other, 8, 0x8000, 1, Prot::READ).unwrap();
    it.map(other, 9, 0x9000, 1, BOTH).unwrap();
    it.device.attach(None, one).unwrap();
    it.fake.calls();
    it.device.replace(None, other).unwrap();
    assert_eq!(it.fake.has(), [(0x8000, 1, Prot::READ), (0x9000, 1, BOTH)]);
    assert_eq!(it.fake.calls(), (2, 2));
    // The first is nobody's: it changes, and the container does not.
    it.map(one, 9, 0x9000, 1, BOTH).unwrap();
    assert_eq!(it.fake.calls(), (0, 0));
    it.device.replace(None, one).unwrap();
    assert_eq!(it.fake.has(), [(0x1000, 4, BOTH), (0x8000, 1, BOTH), (0x9000, 1, BOTH)]);
    drop(it.device);
    assert_eq!(it.fake.has(), []);
}

#[test]
fn the_same_mapping_is_not_made_anew() {
    let it = setup();
    let [one, other] = [(); 2].map(|()| it.context.ioas_alloc().unwrap());
    it.map(one, 0, 0x1000, 4, BOTH).unwrap();
    it.map(one, 8, 0x8000, 1, BOTH).unwrap();
    let both = IovaRange::with_length(Iova(0x1000), 4 * PAGE).unwrap();
    let (from, to) = (it.context.ioas_space(one).unwrap(), it.context.ioas_space(other).unwrap());
    to.copy_from(&from, both, Some(Iova(0x1000)), BOTH).unwrap();
    it.device.attach(None, one).unwrap();
    it.fake.calls();
    it.device.replace(None, other).unwrap();
    assert_eq!((it.fake.calls(), it.fake.has()), ((0, 1), vec![(0x1000, 4, BOTH)]));
}

#[test]
fn what_the_container_refuses_changes_nothing() {
    let it = setup();
    let [one, other] = [(); 2].map(|()| it.context.ioas_alloc().unwrap());
    for page in 0..2 {
        it.map(one, page, page * PAGE, 1, BOTH).unwrap();
    }
    for page in 0..4 {
        it.map(other, page + 8, page * PAGE, 1, BOTH).unwrap();
    }
    *lock(&it.fake.limit) = Some(3);
    it.device.attach(None, one).unwrap();
    let before = it.fake.has();
    // One mapping more is possible, and no second one.
    it.map(one, 2, 0x2000, 1, BOTH).unwrap();
    assert_eq!(it.map(one, 3, 0x3000, 1, BOTH), Err(Errno::NOSPC));
    it.unmap(one, 0x2000, 1).unwrap();
    assert_eq!(it.device.replace(None, other), Err(Errno::NOSPC));
    assert_eq!(it.fake.has(), before);
    // It is attached where it was, and nothing of what failed is left over.
    it.map(one, 3, 0x3000, 1, BOTH).unwrap();
    assert_eq!(it.fake.has().len(), 3);
    it.unmap(other, 0, 1).unwrap();
    it.device.replace(None, other).unwrap();
    assert_eq!(it.fake.has().len(), 3);
}

#[test]
fn a_mapping_that_allows_nothing_is_not_the_containers() {
    let it = setup();
    let ioas = it.context.ioas_alloc().unwrap();
    it.device.attach(None, ioas).unwrap();
    it.map(ioas, 0, 0x1000, 1, Prot::empty()).unwrap();
    assert_eq!(it.map(ioas, 0, 0x1000, 1, BOTH), Err(Errno::EXIST));
    it.unmap(ioas, 0x1000, 1).unwrap();
    assert_eq!(it.fake.calls(), (0, 0));
}

#[test]
fn each_container_has_domains_of_its_own() {
    let (it, fake) = (setup(), Arc::new(Fake::default()));
    let ranges = vec![IovaRange::ALL];
    // SAFETY: nothing reaches the memory.
    let hardware = unsafe { ContainerHardware::new(Arc::clone(&fake) as _, ranges, 8) };
    let second = it.context.bind(Arc::new(hardware)).unwrap();
    let ioas = it.context.ioas_alloc().unwrap();
    let page_table = it.device.attach(None, ioas).unwrap();
    assert_ne!(second.attach(None, ioas).unwrap(), page_table);
    it.map(ioas, 0, 0x1000, 1, BOTH).unwrap();
    assert_eq!((it.fake.has().len(), fake.has().len()), (1, 1));
    // When one refuses, the other has not got it either.
    *lock(&fake.limit) = Some(1);
    assert_eq!(it.map(ioas, 1, 0x2000, 1, BOTH), Err(Errno::NOSPC));
    assert_eq!((it.fake.has().len(), fake.has().len()), (1, 1));
    assert_eq!(second.replace(None, page_table), Err(Errno::INVAL));
}

#[test]
fn what_a_refusal_means_is_said_with_the_way_out() {
    let explain = |errno| MapError::explain(Iova(0x1000), PAGE, PAGE, errno, &[IovaRange::ALL]);
    let full = explain(Errno::NOSPC);
    assert_eq!(full.errno(), Errno::NOSPC);
    assert!(
        full.to_string().contains("dma_entry_limit=") && full.to_string().contains("door=cdev"),
        "{full}"
    );
    assert_eq!(explain(Errno::FAULT).errno(), Errno::FAULT);
}

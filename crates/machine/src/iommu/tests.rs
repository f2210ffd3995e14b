//! Requests against guest memory, without a guest.

mod hosts;

use std::sync::atomic::{AtomicBool, Ordering};

use cpu::GuestRam;
use virtio::device::Reach;
use virtio::iommu::FaultRecord;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryRegion};

use super::*;
use crate::dma::DeviceMemory;

const MIB: u64 = 1 << 20;
const HIGH: u64 = 4 << 30;
const RW: MapFlags = MapFlags { read: true, write: true };
const PAGE: u64 = PAGE_SIZE;

struct Setup {
    ram: Arc<GuestRam>,
    iommu: GuestIommu,
    faults: Arc<Faults>,
    memory: Vec<DeviceMemory>,
}

/// Two regions of RAM, and two endpoints, 8 and 16.
fn setup() -> Setup {
    let regions = [(GuestAddress(0), MIB as usize), (GuestAddress(HIGH), MIB as usize)];
    let ram = Arc::new(GuestRam::from_ranges(&regions).unwrap());
    let faults = Faults::new().unwrap();
    let mut iommu = GuestIommu::new(&ram, Arc::clone(&faults)).unwrap();
    let memory = [8, 16].map(|endpoint| {
        let (port, remapper) = iommu.add_endpoint(endpoint).unwrap();
        DeviceMemory::translated(&ram, port, remapper)
    });
    Setup { ram, iommu, faults, memory: memory.into() }
}

fn read(memory: &DeviceMemory, at: u64) -> Option<u64> {
    memory.memory().read_obj(GuestAddress(at)).ok()
}

#[test]
fn an_endpoint_without_a_domain_reaches_memory_if_the_guest_allows_it() {
    let Setup { ram, mut iommu, faults, memory } = setup();
    ram.write_obj(7u64, GuestAddress(HIGH + 8)).unwrap();
    assert_eq!(read(&memory[0], HIGH + 8), None);
    assert_eq!(faults.count(), 1);
    iommu.set_bypass(true);
    assert_eq!(read(&memory[0], HIGH + 8), Some(7));
    assert_eq!(read(&memory[0], MIB), None);
    iommu.set_bypass(false);
    assert_eq!(read(&memory[0], HIGH + 8), None);
}

#[test]
fn a_domain_maps_what_the_guest_says() {
    let Setup { ram, mut iommu, faults, memory } = setup();
    iommu.set_bypass(true);
    ram.write_obj(7u64, GuestAddress(HIGH + 8)).unwrap();
    iommu.attach(3, 8, false).unwrap();
    assert_eq!(read(&memory[0], HIGH + 8), None);
    // The other endpoint is not concerned.
    assert_eq!(read(&memory[1], HIGH + 8), Some(7));
    let at = 0x7_0000_0000;
    iommu.map(3, at, at + (PAGE - 1), HIGH, RW).unwrap();
    assert_eq!(read(&memory[0], at + 8), Some(7));
    memory[0].memory().write_obj(9u64, GuestAddress(at + 16)).unwrap();
    assert_eq!(ram.read_obj::<u64>(GuestAddress(HIGH + 16)).unwrap(), 9);
    // A second endpoint in the same domain, then both out: the domain is gone.
    iommu.attach(3, 16, false).unwrap();
    assert_eq!(read(&memory[1], at + 8), Some(7));
    iommu.detach(3, 8).unwrap();
    iommu.detach(3, 16).unwrap();
    assert_eq!(read(&memory[1], HIGH + 8), Some(7));
    assert_eq!(iommu.unmap(3, at, at), Err(Refusal::NoEntry));
    assert!(iommu.domains.is_empty());
    let counted = iommu.stats();
    assert_eq!(counted.work, Work::Requests { maps: 1, unmaps: 0 });
    assert_ne!(counted.translations, 0);
    assert_eq!((counted.faults, faults.count()), (1, 1));
}

#[test]
fn what_may_not_be_written_is_not() {
    let Setup { ram: _ram, mut iommu, faults, memory } = setup();
    iommu.attach(1, 8, false).unwrap();
    let (read, write) = (MapFlags { read: true, write: false }, MapFlags { read: false, write: true });
    iommu.map(1, 0, PAGE - 1, 0, read).unwrap();
    iommu.map(1, PAGE, 2 * PAGE - 1, PAGE, write).unwrap();
    let view = memory[0].memory();
    let may = |at, len| (view.may_read(GuestAddress(at), len), view.may_write(GuestAddress(at), len));
    assert_eq!(may(0, 4096), (true, false));
    assert_eq!(may(PAGE, 4096), (false, true));
    assert_eq!(may(PAGE - 1, 2), (false, false));
    assert_eq!(may(2 * PAGE - 1, 2), (false, false));
    assert_eq!(may(u64::MAX, 2), (false, false));
    assert_eq!(faults.count(), 8);
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let Setup { ram: _ram, mut iommu, .. } = setup();
    assert_eq!(iommu.attach(1, 9, false), Err(Refusal::NoEntry));
    assert!(iommu.domains.is_empty());
    assert_eq!(iommu.detach(1, 8), Err(Refusal::Invalid));
    assert_eq!(iommu.map(1, 0, PAGE - 1, 0, RW), Err(Refusal::NoEntry));
    iommu.attach(1, 8, false).unwrap();
    assert_eq!(iommu.attach(1, 16, true), Err(Refusal::Invalid));
    iommu.attach(2, 16, true).unwrap();
    assert_eq!(iommu.map(2, 0, PAGE - 1, 0, RW), Err(Refusal::Invalid));
    assert_eq!(iommu.unmap(2, 0, PAGE - 1), Err(Refusal::Invalid));
    for (start, last, to) in [
        (1, PAGE, 0),
        (0, PAGE, 0),
        (0, PAGE - 1, 8),
        // Past RAM, in a hole, across regions, past what is translated.
        (0, 2 * PAGE - 1, MIB - PAGE),
        (0, PAGE - 1, 2 * MIB),
        (0, PAGE - 1, u64::MAX - (PAGE - 1)),
        (0, u64::MAX, 0),
        (1 << 48, (1 << 48) + (PAGE - 1), 0),
    ] {
        assert_eq!(iommu.map(1, start, last, to, RW), Err(Refusal::Range), "{start:#x} {last:#x} {to:#x}");
    }
    // Where interrupts are.
    assert_eq!(iommu.map(1, 0xfee0_0000, 0xfee0_0fff, 0, RW), Err(Refusal::Invalid));
    iommu.map(1, 2 * PAGE, 4 * PAGE - 1, 0, RW).unwrap();
    assert_eq!(iommu.map(1, 3 * PAGE, 4 * PAGE - 1, 0, RW), Err(Refusal::Invalid));
    assert_eq!(iommu.unmap(1, 3 * PAGE, 5 * PAGE - 1), Err(Refusal::Range));
    assert_eq!(iommu.unmap(1, 0, 3 * PAGE - 1), Err(Refusal::Range));
    assert_eq!(iommu.unmap(1, 8 * PAGE, 9 * PAGE - 1), Ok(()));
    assert_eq!(iommu.unmap(1, 0, u64::MAX), Ok(()));
    iommu.map(1, 3 * PAGE, 4 * PAGE - 1, 0, RW).unwrap();
    iommu.reset();
    assert!(iommu.domains.is_empty());
}

#[test]
fn a_buffer_lies_in_as_few_pieces_as_its_pages() {
    let Setup { ram, mut iommu, memory, .. } = setup();
    iommu.attach(1, 8, false).unwrap();
    // Four pages: two that lie together in memory, and two that do not.
    for (page, to) in [(0, 4), (1, 5), (2, 9), (3, 1)] {
        iommu.map(1, page * PAGE, (page + 1) * PAGE - 1, to * PAGE, RW).unwrap();
    }
    let view = memory[0].memory();
    let bytes: Vec<u8> = (0..4 * PAGE).map(|at| (at / 64) as u8).collect();
    view.write_slice(&bytes, GuestAddress(0)).unwrap();
    let mut back = vec![0; bytes.len()];
    view.read_slice(&mut back, GuestAddress(0)).unwrap();
    assert_eq!(back, bytes);
    ram.read_slice(&mut back[..4096], GuestAddress(9 * PAGE)).unwrap();
    assert_eq!(back[..4096], bytes[2 * 4096..3 * 4096]);
    // A library that looks for a region gets what lies together.
    assert_eq!(view.find_region(GuestAddress(16)).unwrap().len(), 2 * PAGE - 16);
    assert!(!view.check_range(GuestAddress(0), 4 * 4096 + 1));
}

#[test]
fn unmapping_waits_for_who_is_reading() {
    let Setup { ram: _ram, mut iommu, memory, .. } = setup();
    iommu.attach(1, 8, false).unwrap();
    iommu.map(1, 0, PAGE - 1, PAGE, RW).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let view = memory[0].memory();
        let slice = view.get_slice(GuestAddress(0), 8).unwrap();
        let unmapper = scope.spawn(|| {
            iommu.unmap(1, 0, PAGE - 1).unwrap();
            done.store(true, Ordering::SeqCst);
        });
        // It is unmapped for others before the wait ends.
        while read(&memory[0], 0).is_some() {
            std::thread::yield_now();
        }
        assert!(!done.load(Ordering::SeqCst));
        slice.write_obj(5u64, 0).unwrap();
        drop(view);
        unmapper.join().unwrap();
    });
}

#[test]
fn a_fault_says_where() {
    let Setup { ram: _ram, mut iommu, faults, memory } = setup();
    iommu.attach(1, 16, false).unwrap();
    assert!(!memory[1].memory().may_write(GuestAddress(0x5008), 1));
    let expected = FaultRecord { endpoint: 16, address: 0x5008, write: true, mapped_domain: true };
    assert_eq!(faults.oldest(), Some(expected));
}

//! Where the kernel's vfio-pci was asked the same, its answer is what is expected here.

use std::sync::atomic::AtomicU32;

use pci::config::PciIds;
use uapi::vfio::{VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_VGA_REGION_INDEX};

use super::*;
use crate::{
    device::Area,
    eventfd::tests::{count, pair},
    irq::{IrqAction, IrqData},
    pci::{
        interrupts::Kinds,
        layout::{MsixLayout, SriovLayout},
    },
};

const CONFIG: u32 = VFIO_PCI_CONFIG_REGION_INDEX;

/// One access: whether it writes, the BAR, the offset, and the bytes.
type Access = (bool, u8, u64, Vec<u8>);

/// Notes accesses. A read gives its own width.
#[derive(Debug)]
struct Recorder {
    link: Arc<Link>,
    seen: Mutex<Vec<Access>>,
    resets: AtomicU32,
}

impl Model for Recorder {
    fn read(&self, bar: u8, offset: u64, to: &mut [u8]) {
        lock(&self.seen).push((false, bar, offset, vec![0; to.len()]));
        to.fill(to.len() as u8);
    }

    fn write(&self, bar: u8, offset: u64, from: &[u8]) {
        lock(&self.seen).push((true, bar, offset, from.to_vec()));
    }

    fn reset(&self) {
        self.resets.fetch_add(1, Ordering::Relaxed);
    }
}

fn layout() -> Layout {
    Layout {
        bars: vec![
            BarLayout { index: 0, kind: BarKind::Memory32, size: 0x4000, memory: Mappable::No },
            BarLayout { index: 1, kind: BarKind::Io, size: 32, memory: Mappable::No },
            BarLayout {
                index: 2,
                kind: BarKind::Memory64 { prefetchable: true },
                size: 0x10000,
                memory: Mappable::Areas(vec![Area { offset: 0x8000, size: 0x4000 }]),
            },
        ],
        rom: (0..2048u32).map(|byte| byte as u8).collect(),
        interrupts: Kinds { intx: true, msi: 2, msix: 3 },
        msix: Some(MsixLayout { bar: 0, table: 0x1000, pba: 0x2000 }),
        express: true,
        power_management: true,
        atomic_completer: Some(3),
        sriov: Some(SriovLayout { total: 7, offset: 1, stride: 1, device: 0x99 }),
        dma_logging: true,
        ..Layout::new(PciIds { vendor: 0x1234, device: 0x5678, ..PciIds::default() })
    }
}

fn function() -> Function<Recorder> {
    let model = |link| Recorder { link, seen: Mutex::default(), resets: AtomicU32::new(0) };
    let function = Function::new(layout(), model).unwrap();
    function.open(Arc::new(NoDma)).unwrap();
    function
}

fn read<const N: usize>(function: &Function<Recorder>, region: u32, offset: u64) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    assert_eq!(function.read(region, offset, &mut bytes)?, N);
    Ok(bytes)
}

fn config16(function: &Function<Recorder>, offset: u64) -> u16 {
    u16::from_le_bytes(read(function, CONFIG, offset).unwrap())
}

/// The offset of a capability.
fn capability(function: &Function<Recorder>, id: u8) -> u64 {
    let mut at = u64::from(read::<1>(function, CONFIG, 0x34).unwrap()[0]);
    while at != 0 {
        let [found, next] = read(function, CONFIG, at).unwrap();
        if found == id {
            return at;
        }
        at = next.into();
    }
    panic!("no capability {id:#x}");
}

#[test]
fn regions_are_told() {
    let function = function();
    let of = |index| function.region(index).map(|region| (region.flags.bits(), region.size));
    assert_eq!(of(0), Ok((3, 0x4000)));
    assert_eq!(of(1), Ok((3, 32)));
    assert_eq!(of(2), Ok((3, 0x10000)));
    for absent in 3..6 {
        assert_eq!(of(absent), Ok((0, 0)));
    }
    assert_eq!(of(VFIO_PCI_ROM_REGION_INDEX), Ok((1, 2048)));
    assert_eq!(of(CONFIG), Ok((3, 4096)));
    assert_eq!(of(VFIO_PCI_VGA_REGION_INDEX), Err(Errno::INVAL));
    assert_eq!(of(u32::MAX), Err(Errno::INVAL));
    assert!(function.region(0).unwrap().msix_mappable && function.region(0).unwrap().registers);
    assert!(!function.region(1).unwrap().registers);
    assert_eq!(function.region(2).unwrap().mappable.areas(0x10000), [Area { offset: 0x8000, size: 0x4000 }]);
    assert!(function.region_file(2).is_some() && function.region_file(0).is_none());
    let info = function.info().unwrap();
    assert_eq!((info.flags.bits(), info.regions, info.irqs), (3, 9, 5));
}

#[test]
fn the_edges_of_a_bar() {
    let function = function();
    let mut bytes = [0; 4];
    assert_eq!(function.read(0, 0x3ffe, &mut bytes), Ok(2));
    assert_eq!(function.read(0, 0x4000, &mut bytes), Err(Errno::INVAL));
    assert_eq!(function.write(0, 0x4000, &bytes), Err(Errno::INVAL));
    assert_eq!(function.read(0, u64::MAX, &mut bytes), Err(Errno::INVAL));
    assert_eq!(function.read(3, 0, &mut bytes), Err(Errno::INVAL), "the upper half of BAR 2");
    assert_eq!(function.read(5, 0, &mut bytes), Err(Errno::INVAL));
    assert_eq!(function.read(8, 0, &mut bytes), Err(Errno::INVAL));
    assert_eq!(function.read(9, 0, &mut bytes), Err(Errno::INVAL));
    assert_eq!(function.write(VFIO_PCI_ROM_REGION_INDEX, 0, &bytes), Err(Errno::INVAL));
    assert_eq!(read(&function, VFIO_PCI_ROM_REGION_INDEX, 0x102), Ok([2, 3, 4]));
}

#[test]
fn a_model_sees_natural_accesses() {
    let function = function();
    assert_eq!(read(&function, 0, 1), Ok([1, 2, 2, 4, 4, 4, 4, 8, 8, 8, 8, 8, 8, 8, 8, 1]));
    function.write(1, 2, &[1, 2, 3]).unwrap();
    let seen = std::mem::take(&mut *lock(&function.model().seen));
    let widths: Vec<_> = seen.iter().map(|(_, _, offset, bytes)| (*offset, bytes.len())).collect();
    assert_eq!(widths, [(1, 1), (2, 2), (4, 4), (8, 8), (16, 1), (2, 2), (4, 1)]);
    assert_eq!(seen[5], (true, 1, 2, vec![1, 2]));
}

#[test]
fn a_function_that_does_not_decode_answers_eio() {
    let function = function();
    assert_eq!(config16(&function, 4), 3, "decoding, and not bus master");
    function.write(CONFIG, 4, &[1]).unwrap();
    assert_eq!(read::<4>(&function, 0, 0), Err(Errno::IO));
    assert_eq!(function.write(0, 0, &[0; 4]), Err(Errno::IO));
    assert!(read::<4>(&function, 1, 0).is_ok(), "ports are on");
    function.write(CONFIG, 4, &[2]).unwrap();
    assert!(read::<4>(&function, 0, 0).is_ok());
    assert_eq!(read::<4>(&function, 1, 0), Err(Errno::IO));
    // D3hot.
    let power = capability(&function, 1);
    function.write(CONFIG, power + 4, &[3]).unwrap();
    assert_eq!(read::<4>(&function, 0, 0), Err(Errno::IO));
    function.write(CONFIG, power + 4, &[0]).unwrap();
    assert!(read::<4>(&function, 0, 0).is_ok());
}

#[test]
fn the_configuration_space() {
    let function = function();
    assert_eq!(read(&function, CONFIG, 0), Ok([0x34, 0x12, 0x78, 0x56]));
    function.write(CONFIG, 0, &[0xff; 4]).unwrap();
    assert_eq!(config16(&function, 0), 0x1234);
    for (offset, length) in [(0xffe, 4), (0x1000, 1), (u64::MAX, 1), (0x1_0000, 2)] {
        assert_eq!(function.read(CONFIG, offset, &mut vec![0; length]), Err(Errno::FAULT));
        assert_eq!(function.write(CONFIG, offset, &vec![0; length]), Err(Errno::FAULT));
    }
    function.write(CONFIG, 0x10, &[0xff; 0x18]).unwrap();
    assert_eq!(read(&function, CONFIG, 0x10), Ok(0xffff_c000u32.to_le_bytes()));
    assert_eq!(read(&function, CONFIG, 0x14), Ok(0xffff_ffe1u32.to_le_bytes()));
    assert_eq!(read(&function, CONFIG, 0x18), Ok(0xffff_ffff_ffff_000cu64.to_le_bytes()));
    // SR-IOV, as software finds it.
    assert_eq!(read(&function, CONFIG, 0x100), Ok(0x0001_0010u32.to_le_bytes()));
    assert_eq!(config16(&function, 0x10e), 7);
    function.set_num_vfs(2);
    assert_eq!(config16(&function, 0x110), 2);
    function.write(CONFIG, 0x110, &[7, 0]).unwrap();
    assert_eq!(config16(&function, 0x110), 2, "the user has no say in it");
}

#[test]
fn a_reset_keeps_what_software_programs() {
    let function = function();
    let express = capability(&function, 0x10);
    let resets = || function.model().resets.load(Ordering::Relaxed);
    let before = resets();
    function.write(2, 0x8000, &[5; 8]).unwrap();
    function.write(0, 0x1000, &[6; 8]).unwrap();
    function.write(CONFIG, 0x10, &[0, 0, 0, 0xfe]).unwrap();
    function.reset().unwrap();
    assert_eq!(resets(), before + 1);
    assert_eq!(read(&function, CONFIG, 0x10), Ok([0, 0, 0, 0xfe]));
    assert_eq!(read(&function, 2, 0x8000), Ok([0; 8]));
    assert_eq!(read(&function, 0, 0x1000), Ok([0; 8]));
    // The same by the configuration space, whatever the write's width.
    function.write(CONFIG, express + 8, &[0, 0x80]).unwrap();
    function.write(CONFIG, express + 9, &[0x80]).unwrap();
    function.write(CONFIG, express, &[0xff; 12]).unwrap();
    function.write(CONFIG, express + 8, &[0xff, 0x7f]).unwrap();
    assert_eq!(resets(), before + 4);
    assert_eq!(config16(&function, express + 8) & 0x8000, 0);
    // A user who comes later finds nothing of it.
    function.close();
    function.open(Arc::new(NoDma)).unwrap();
    assert_eq!(read(&function, CONFIG, 0x10), Ok([0; 4]));
}

#[test]
fn messages_show_in_the_configuration_space() {
    let function = function();
    let msix = capability(&function, 0x11);
    let (ours, theirs) = pair();
    let eventfd = |fd, count| IrqSet {
        index: VFIO_PCI_MSIX_IRQ_INDEX,
        start: 0,
        count,
        action: IrqAction::Trigger,
        data: fd,
    };
    assert_eq!(config16(&function, msix + 2), 2);
    function.set_irqs(eventfd(IrqData::EventFd(vec![Some(theirs)]), 1)).unwrap();
    assert_eq!(config16(&function, msix + 2), 0x8002);
    function.write(CONFIG, msix + 2, &[0, 0]).unwrap();
    assert_eq!(config16(&function, msix + 2), 0x8002, "only VFIO's call enables them");
    assert!(function.model().link.interrupts().message(0));
    assert_eq!(count(&ours), 1);
    function.reset().unwrap();
    assert!(function.model().link.interrupts().message(0));
    assert_eq!(count(&ours), 1, "they stay set up");
    function.close();
    assert!(!function.model().link.interrupts().message(0));
    assert_eq!(config16(&function, msix + 2), 2);
}

#[test]
fn memory_is_reached_by_a_bus_master_only() {
    let function = function();
    let link = &function.model().link;
    assert_eq!(link.write(Iova(0), &[1]), Err(DmaFault::Disabled));
    function.write(CONFIG, 4, &[6]).unwrap();
    assert_eq!(link.write(Iova(0), &[1]), Err(DmaFault::Unmapped(Iova(0))));
    function.write(CONFIG, capability(&function, 1) + 4, &[3]).unwrap();
    assert_eq!(link.read(Iova(0), &mut [1]), Err(DmaFault::Disabled), "asleep");
}

#[test]
fn ioeventfds() {
    let function = function();
    let make = |region, offset, width, data, eventfd| IoEventFd { region, offset, width, data, eventfd };
    let (ours, theirs) = pair();
    let new = || Some(rustix::io::fcntl_dupfd_cloexec(&theirs, 0).unwrap());
    assert_eq!(function.ioeventfd(make(0, 8, 4, 0x1_0000_0007, new())), Ok(()));
    assert_eq!(function.ioeventfd(make(0, 8, 4, 0x1_0000_0007, new())), Err(Errno::EXIST));
    assert_eq!(function.ioeventfd(make(0, 8, 2, 0, None)), Err(Errno::NODEV));
    assert_eq!(function.ioeventfd(make(0, 0x3ffe, 4, 0, new())), Err(Errno::INVAL), "across the end");
    assert_eq!(function.ioeventfd(make(0, u64::MAX, 4, 0, new())), Err(Errno::INVAL));
    assert_eq!(function.ioeventfd(make(0, 0xffc, 8, 0, new())), Err(Errno::INVAL), "MSI-X's table");
    assert_eq!(function.ioeventfd(make(5, 0, 4, 0, new())), Err(Errno::INVAL));
    assert_eq!(function.ioeventfd(make(CONFIG, 0, 4, 0, new())), Err(Errno::INVAL));
    rustix::io::write(&ours, &1u64.to_ne_bytes()).unwrap();
    // Its thread writes; taking it away waits for that.
    while lock(&function.model().seen).is_empty() {
        std::thread::yield_now();
    }
    assert_eq!(function.ioeventfd(make(0, 8, 4, 0x1_0000_0007, None)), Ok(()));
    assert_eq!(*lock(&function.model().seen), [(true, 0, 8, vec![7, 0, 0, 0])]);
}

#[test]
fn low_power() {
    let function = function();
    let (ours, theirs) = pair();
    assert_eq!(function.low_power(LowPower::EnterWithWakeup(theirs)), Ok(()));
    assert_eq!(function.low_power(LowPower::Enter), Err(Errno::INVAL));
    assert_eq!(count(&ours), 0);
    let _ = read::<4>(&function, CONFIG, 0);
    assert_eq!(count(&ours), 1);
    assert_eq!(function.low_power(LowPower::Enter), Ok(()));
    assert_eq!(function.low_power(LowPower::Exit), Ok(()));
    assert_eq!(function.low_power(LowPower::Exit), Ok(()));
    assert_eq!(count(&ours), 0);
}

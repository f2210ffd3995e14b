mod direct;

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::sync::mpsc;

use iommufd::domain::Prot;
use iommufd::iova::{Iova, IovaRange};
use mmu::Gpa;
use uapi::vfio::{
    VFIO_PCI_INTX_IRQ_INDEX as INTX, VFIO_PCI_MSI_IRQ_INDEX as MSI, VFIO_PCI_MSIX_IRQ_INDEX as MSIX,
};
use vfio::Result;
use vfio::device::{DeviceInfo, RegionFlags, RegionInfo};
use vfio::dma::{Dma, DmaFault};
use vfio::irq::{IrqAction, IrqData, IrqFlags, IrqInfo, IrqSet};
use vfio::user::client::{self, RemoteDevice};
use vfio::user::server::{self, Server};
use virtio::iommu::{Faults, MapFlags, Translator};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::apic::IoApic;
use crate::apic::testing::Rig;
use crate::iommu::GuestIommu;
use crate::memory;

/// A function with a 64-bit BAR 0 of 16 KiB, an I/O BAR 2, INTB#, and MSI-X with 3 vectors (table at 0x1000, pending bits at
/// 0x2000) between MSI with 2 vectors and a vendor's own capability.
#[derive(Default)]
struct Model {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    config: Vec<u8>,
    registers: Vec<(u64, Vec<u8>)>,
    dma: Option<Arc<dyn Dma>>,
    /// What is set up, by kind.
    eventfds: BTreeMap<u32, Vec<OwnedFd>>,
    unmasked: Option<mpsc::Sender<()>>,
    no_msi: bool,
    closed: bool,
    /// What it does when the register at 0x20 is read.
    on_register: Option<Box<dyn Fn() + Send>>,
}

impl fmt::Debug for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Model").finish_non_exhaustive()
    }
}

impl Model {
    fn new() -> Arc<Self> {
        let mut config = vec![0; 256];
        config[..4].copy_from_slice(&[0xf4, 0x1a, 0x34, 0x12]);
        config[6] = 0x10;
        config[0x10] = 0x0c;
        config[0x18] = 0x01;
        config[0x34] = 0x40;
        config[0x3d] = 2;
        config[0x40..0x44].copy_from_slice(&[0x05, 0x50, 0x82, 0x00]);
        config[0x50..0x5c].copy_from_slice(&[0x11, 0x60, 2, 0, 0, 0x10, 0, 0, 0, 0x20, 0, 0]);
        config[0x60..0x64].copy_from_slice(&[0x09, 0x00, 4, 0x77]);
        Arc::new(Self { state: Mutex::new(State { config, ..State::default() }) })
    }

    fn with<R>(&self, f: impl FnOnce(&mut State) -> R) -> R {
        f(&mut self.state.lock().unwrap())
    }
}

impl Device for Model {
    fn info(&self) -> Result<DeviceInfo> {
        Ok(DeviceInfo { flags: DeviceFlags::PCI, regions: 9, irqs: 5, atomic_completer: None })
    }

    fn region(&self, index: u32) -> Result<RegionInfo> {
        let size = match index {
            0 => 0x4000,
            2 => 0x20,
            7 => 0x100,
            _ => 0,
        };
        Ok(RegionInfo { flags: RegionFlags::READ | RegionFlags::WRITE, size, ..RegionInfo::default() })
    }

    fn read(&self, index: u32, offset: u64, to: &mut [u8]) -> Result<usize> {
        match index {
            VFIO_PCI_CONFIG_REGION_INDEX => {
                self.with(|s| to.copy_from_slice(&s.config[offset as usize..][..to.len()]));
            }
            0 if offset == 0xffc => return Err(Errno::IO),
            0 if offset == 0x20 => {
                self.with(|s| s.on_register.iter().for_each(|act| act()));
                to.fill(0);
            }
            0 => to.fill(offset as u8),
            _ => return Err(Errno::INVAL),
        }
        Ok(to.len())
    }

    fn write(&self, index: u32, offset: u64, from: &[u8]) -> Result<usize> {
        match index {
            VFIO_PCI_CONFIG_REGION_INDEX => {
                self.with(|s| s.config[offset as usize..][..from.len()].copy_from_slice(from));
            }
            0 => self.with(|s| s.registers.push((offset, from.to_vec()))),
            _ => return Err(Errno::INVAL),
        }
        Ok(from.len())
    }

    fn irq(&self, index: u32) -> Result<IrqInfo> {
        let count = match index {
            INTX => 1,
            MSI if self.with(|s| s.no_msi) => 0,
            MSI => 2,
            MSIX => 3,
            _ => 0,
        };
        Ok(IrqInfo { flags: IrqFlags::EVENTFD, count })
    }

    /// One kind at a time, as VFIO has it.
    fn set_irqs(&self, set: IrqSet) -> Result<()> {
        self.with(|s| match (set.action, set.data) {
            (IrqAction::Trigger, IrqData::None) => {
                s.eventfds.remove(&set.index).map(drop).ok_or(Errno::INVAL)
            }
            (IrqAction::Trigger, IrqData::EventFd(fds)) if s.eventfds.is_empty() => {
                s.eventfds.insert(set.index, fds.into_iter().flatten().collect());
                Ok(())
            }
            (IrqAction::Unmask, IrqData::None) if s.eventfds.contains_key(&INTX) => {
                s.unmasked.iter().for_each(|unmasked| unmasked.send(()).unwrap());
                Ok(())
            }
            _ => Err(Errno::INVAL),
        })
    }

    fn reset(&self) -> Result<()> {
        Ok(())
    }

    fn open(&self, dma: Arc<dyn Dma>) -> Result<()> {
        self.with(|s| s.dma = Some(dma));
        Ok(())
    }

    fn close(&self) {
        self.with(|s| s.closed = true);
    }
}

struct Sink(mpsc::Sender<(u64, u32)>);

impl MsiSink for Sink {
    fn signal(&self, address: u64, data: u32) {
        self.0.send((address, data)).unwrap();
    }
}

struct Assigned {
    model: Arc<Model>,
    function: AssignedFunction,
    messages: mpsc::Receiver<(u64, u32)>,
    unmasked: mpsc::Receiver<()>,
    rig: Rig,
    io_apic: Arc<IoApic>,
}

/// The slot that it is in.
const SLOT: usize = 4;

fn assigned() -> Assigned {
    assigned_with(|_| ())
}

fn seat(io_apic: &Arc<IoApic>) -> (Seat, mpsc::Receiver<(u64, u32)>) {
    let memory = Arc::new(memory::create(&[(Gpa(0), 1 << 20)]).unwrap());
    let (sender, messages) = mpsc::channel();
    let seat = Seat {
        reached: DeviceMemory::whole(&memory),
        exposed: None,
        msi: Arc::new(Sink(sender)),
        wires: Wires::new(Arc::clone(io_apic)),
        slot: SLOT,
    };
    (seat, messages)
}

fn assigned_with(change: impl FnOnce(&mut State)) -> Assigned {
    let model = Model::new();
    let (unmask, unmasked) = mpsc::channel();
    model.with(|s| s.unmasked = Some(unmask));
    model.with(change);
    let rig = Rig::new(&[0], false);
    let io_apic = IoApic::new(&rig.bus);
    let device = Arc::clone(&model) as Arc<dyn Device>;
    let (seat, messages) = seat(&io_apic);
    let function = AssignedFunction::new(device, seat).unwrap();
    Assigned { model, function, messages, unmasked, rig, io_apic }
}

impl Assigned {
    fn config<const N: usize>(&mut self, offset: u16) -> [u8; N] {
        let mut data = [0; N];
        self.function.config_read(offset, &mut data);
        data
    }

    fn signal(&self, kind: u32, vector: usize) {
        self.model.with(|s| rustix::io::write(&s.eventfds[&kind][vector], &1u64.to_ne_bytes())).unwrap();
    }

    /// The kinds that are set up with the device, with their vectors.
    fn set_up(&self) -> Vec<(u32, usize)> {
        self.model.with(|s| s.eventfds.iter().map(|(kind, fds)| (*kind, fds.len())).collect())
    }

    /// Waits for the function's wire.
    fn interrupted(&self) -> u8 {
        loop {
            match self.rig.bus.local(0).unwrap().acknowledge() {
                Some(vector) => return vector,
                None => std::thread::yield_now(),
            }
        }
    }

    fn eoi(&self) {
        self.rig.bus.local(0).unwrap().eoi();
    }

    /// What the driver of an interrupt controller does: a level-triggered pin with this vector.
    fn program_pin(&self, vector: u32) {
        let pin = crate::layout::intx_gsi(SLOT, 1);
        self.io_apic.mmio_write(0, 0x10 + 2 * pin);
        self.io_apic.mmio_write(0x10, 1 << 15 | vector);
    }
}

#[test]
fn the_guest_sees_the_device_but_for_what_the_machine_lacks() {
    let mut it = assigned();
    assert_eq!(it.config(0), [0xf4, 0x1a, 0x34, 0x12]);
    assert_eq!(it.config(0x3d), [2], "INTB#");
    assert_eq!(it.config(0x34), [0x40]);
    assert_eq!(it.config(0x40), [0x05, 0x50, 0x82, 0x00]);
    assert_eq!(it.config(0x50), [0x11, 0x60]);
    assert_eq!(it.config(0x60), [0x09, 0x00, 4, 0x77]);
    assert_eq!(it.config(0x100), [0; 4], "no extended capability");
    it.function.config_write(0x3c, &[11]);
    assert_eq!((it.config(0x3c), it.model.with(|s| s.config[0x3d])), ([11], 2));
    let bar = BarInfo { index: 0, address: 0, size: 0x4000, wide: true, enabled: false };
    assert_eq!(it.function.bars(), [bar], "no I/O BAR");
    let mut it = assigned_with(|s| s.no_msi = true);
    assert_eq!(it.config(0x34), [0x50], "VFIO does not offer MSI");
    let mut it = assigned_with(|s| s.config[0x3d] = 0);
    assert_eq!((it.config(0x3d), it.set_up()), ([0], vec![]), "no wire");
}

#[test]
fn bars_are_the_guests_and_the_command_register_both_sides() {
    let mut it = assigned();
    it.function.config_write(0x10, &[0xff; 4]);
    assert_eq!(it.config(0x10), 0xffff_c00cu32.to_le_bytes());
    it.function.config_write(0x10, &0xe000_0000u32.to_le_bytes());
    it.function.config_write(0x04, &[6, 0]);
    let bar = BarInfo { index: 0, address: 0xe000_0000, size: 0x4000, wide: true, enabled: true };
    assert_eq!(it.function.bars(), [bar]);
    assert_eq!(it.model.with(|s| (s.config[4], s.config[0x13])), (6, 0), "the address stays here");
    assert_eq!(it.config(4), [6, 0]);
}

#[test]
fn registers_are_the_devices_and_the_msix_table_is_not() {
    let mut it = assigned();
    let mut data = [0; 4];
    it.function.bar_read(0, 0x24, &mut data);
    assert_eq!(data, [0x24; 4]);
    it.function.bar_read(0, 0xffc, &mut data);
    assert_eq!(data, [0xff; 4], "no answer");
    it.function.bar_write(0, 0x3ff8, &[1, 2]);
    it.function.bar_write(0, 0x1008, &[3; 4]);
    assert_eq!(it.model.with(|s| s.registers.clone()), [(0x3ff8, vec![1, 2])]);
    it.function.bar_read(0, 0x1008, &mut data);
    assert_eq!(data, [3; 4]);
    it.function.bar_read(0, 0x1030, &mut data);
    assert_eq!(data, [0x30; 4], "past the table");
}

#[test]
fn an_eventfd_becomes_a_message() {
    let mut it = assigned();
    it.function.bar_write(0, 0x1010, &0xfee0_1000u32.to_le_bytes());
    it.function.bar_write(0, 0x1018, &0x41u32.to_le_bytes());
    it.function.config_write(0x04, &[6, 0]);
    it.function.config_write(0x52, &[0, 0x80]);
    assert_eq!(it.config(0x52), [2, 0x80]);
    assert_eq!(it.set_up(), [(MSIX, 3)]);
    // Masked: it is pending, and goes when it is unmasked. Vector 0 follows only to know that 1 was seen.
    it.signal(MSIX, 1);
    let mut pending = [0];
    while pending == [0] {
        it.function.bar_read(0, 0x2000, &mut pending);
        std::thread::yield_now();
    }
    assert_eq!(pending, [0b10]);
    assert_eq!(it.messages.try_recv(), Err(mpsc::TryRecvError::Empty));
    it.function.bar_write(0, 0x101c, &[0; 4]);
    assert_eq!(it.messages.recv(), Ok((0xfee0_1000, 0x41)));
    it.signal(MSIX, 1);
    assert_eq!(it.messages.recv(), Ok((0xfee0_1000, 0x41)));
}

#[test]
fn msi_is_set_up_with_as_many_vectors_as_the_driver_uses() {
    let mut it = assigned();
    it.function.config_write(0x04, &[6, 0]);
    it.function.config_write(0x44, &0xfee0_1000u32.to_le_bytes());
    it.function.config_write(0x4c, &[0x41, 0]);
    assert_eq!(it.config(0x44), 0xfee0_1000u32.to_le_bytes());
    it.function.config_write(0x42, &[0x83, 0]);
    assert_eq!((it.config(0x42), it.set_up()), ([0x83, 0], vec![(MSI, 1)]));
    it.signal(MSI, 0);
    assert_eq!(it.messages.recv(), Ok((0xfee0_1000, 0x41)));
    it.function.config_write(0x42, &[0x93, 0]);
    assert_eq!(it.set_up(), [(MSI, 2)]);
    it.signal(MSI, 1);
    assert_eq!(it.messages.recv(), Ok((0xfee0_1000, 0x41)));
    it.signal(MSI, 0);
    assert_eq!(it.messages.recv(), Ok((0xfee0_1000, 0x40)));
    it.function.config_write(0x42, &[0x82, 0]);
    assert_eq!(it.set_up(), [(INTX, 1)]);
}

/// All vectors of MSI, from a driver's writes to a device behind a socket and back. Linux has no driver that would ask for several
/// on x86 without an IOMMU that remaps interrupts.
#[test]
fn each_vector_of_msi_has_its_message_over_vfio_user() {
    const TEST_RAISE: u64 = vfio::devices::test::registers::RAISE;
    let (ours, theirs) = UnixStream::pair().unwrap();
    let device = Arc::new(vfio::devices::test::function().unwrap());
    let mut server = Server::new(device, server::Options::default());
    let server = std::thread::spawn(move || server.serve(theirs.into()));
    let device = RemoteDevice::connect(ours.into(), client::Options::default()).unwrap();
    let rig = Rig::new(&[0], false);
    let (seat, messages) = seat(&IoApic::new(&rig.bus));
    let mut function = AssignedFunction::new(Arc::new(device), seat).unwrap();

    let read = |function: &mut AssignedFunction, at: u16| {
        let mut byte = [0];
        function.config_read(at, &mut byte);
        byte[0]
    };
    let mut msi = read(&mut function, 0x34);
    while read(&mut function, msi.into()) != 0x05 {
        msi = read(&mut function, u16::from(msi) + 1);
    }
    let msi = u16::from(msi);
    let control = read(&mut function, msi + 2);
    assert_eq!(control >> 1 & 7, 2, "four vectors");
    let data = if control & 0x80 == 0 { 8 } else { 12 };
    function.config_write(0x04, &[6, 0]);
    function.config_write(msi + 4, &0xfee0_2000u32.to_le_bytes());
    function.config_write(msi + data, &[0x64, 0]);
    function.config_write(msi + 2, &[control | 2 << 4 | 1, 0]);
    for vector in [3, 0, 2, 1, 3] {
        function.bar_write(0, TEST_RAISE, &u32::to_le_bytes(vector));
        assert_eq!(messages.recv(), Ok((0xfee0_2000, 0x64 + vector)));
    }
    drop(function);
    server.join().unwrap();
}

#[test]
fn the_wire_is_up_until_the_guest_has_served_it() {
    let it = assigned();
    it.program_pin(0x41);
    assert_eq!(it.set_up(), [(INTX, 1)]);
    it.signal(INTX, 0);
    assert_eq!(it.interrupted(), 0x41);
    assert_eq!(it.unmasked.try_recv(), Err(mpsc::TryRecvError::Empty));
    it.eoi();
    it.unmasked.recv().unwrap();
    // The device still wants something: VFIO signals again.
    it.signal(INTX, 0);
    assert_eq!(it.interrupted(), 0x41);
    it.eoi();
    it.unmasked.recv().unwrap();
    assert_eq!(it.rig.bus.local(0).unwrap().acknowledge(), None);
}

#[test]
fn a_disabled_wire_is_down_and_enabled_asks_anew() {
    let mut it = assigned();
    it.program_pin(0x41);
    it.function.config_write(0x04, &[0, 4]);
    it.signal(INTX, 0);
    // Until it was seen.
    while it.model.with(|s| {
        let mut fds = [rustix::event::PollFd::new(&s.eventfds[&INTX][0], rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut fds, Some(&rustix::event::Timespec::default())).unwrap() > 0
    }) {
        std::thread::yield_now();
    }
    assert_eq!(it.rig.bus.local(0).unwrap().acknowledge(), None);
    it.function.config_write(0x04, &[0, 0]);
    loop {
        // The signal may have been taken, and not yet noted.
        match it.unmasked.try_recv() {
            Ok(()) => break,
            Err(_) if it.rig.bus.local(0).unwrap().acknowledge() == Some(0x41) => it.eoi(),
            Err(_) => std::thread::yield_now(),
        }
    }
}

#[test]
fn messages_take_the_wires_place() {
    let mut it = assigned();
    it.program_pin(0x41);
    it.signal(INTX, 0);
    assert_eq!(it.interrupted(), 0x41);
    it.function.config_write(0x52, &[0, 0x80]);
    assert_eq!(it.set_up(), [(MSIX, 3)]);
    it.eoi();
    assert_eq!(it.rig.bus.local(0).unwrap().acknowledge(), None, "the wire is down");
    it.function.config_write(0x52, &[0, 0]);
    assert_eq!(it.set_up(), [(INTX, 1)]);
    it.signal(INTX, 0);
    assert_eq!(it.interrupted(), 0x41);
}

#[test]
fn guest_memory_is_reached_by_its_physical_addresses() {
    let it = assigned();
    let dma = it.model.with(|s| s.dma.clone()).unwrap();
    dma.write(Iova(0x1ffe), &[1, 2, 3]).unwrap();
    let mut data = [0; 4];
    dma.read(Iova(0x1ffe), &mut data).unwrap();
    assert_eq!(data, [1, 2, 3, 0]);
    let outside = Iova((1 << 20) - 1);
    assert_eq!(dma.write(outside, &[0; 2]), Err(DmaFault::Unmapped(outside)));
    let all = IovaRange::ALL;
    assert_eq!(dma.translate(all, Prot::READ), Err(DmaFault::Overflow(Iova(0))));
}

#[test]
fn behind_an_iommu_memory_is_what_the_guest_maps() {
    const ENDPOINT: u32 = 8;
    let rw = MapFlags { read: true, write: true };
    let ram = Arc::new(memory::create(&[(Gpa(0), 1 << 20)]).unwrap());
    let faults = Faults::new().unwrap();
    let mut iommu = GuestIommu::new(&ram, Arc::clone(&faults)).unwrap();
    let (port, remapper) = iommu.add_endpoint(ENDPOINT).unwrap();
    let dma = GuestDma::new(DeviceMemory::translated(&ram, port, remapper));
    let at = Iova(0x7_0000_0000);
    assert_eq!(dma.read(at, &mut [0]), Err(DmaFault::Unmapped(at)));
    iommu.attach(1, ENDPOINT, false).unwrap();
    iommu.map(1, at.0, at.0 + 0xfff, 0x8000, rw).unwrap();
    iommu.map(1, at.0 + 0x1000, at.0 + 0x1fff, 0x3000, MapFlags { read: true, write: false }).unwrap();
    // Across two pages that are apart in memory, the second of which can only be read.
    ram.write_slice(&[1, 2], GuestAddress(0x8ffe)).unwrap();
    ram.write_slice(&[3, 4], GuestAddress(0x3000)).unwrap();
    let mut data = [0; 4];
    dma.read(Iova(at.0 + 0xffe), &mut data).unwrap();
    assert_eq!(data, [1, 2, 3, 4]);
    let second = Iova(at.0 + 0x1000);
    assert_eq!(dma.write(Iova(at.0 + 0xffe), &[9; 4]), Err(DmaFault::Forbidden(second)));
    dma.write(at, &[7]).unwrap();
    assert_eq!(ram.read_obj::<u8>(GuestAddress(0x8000)).unwrap(), 7);
    let both = IovaRange::with_length(at, 0x2000).unwrap();
    assert_eq!(dma.translate(both, Prot::READ), Ok(()));
    assert_eq!(dma.translate(both, Prot::READ | Prot::WRITE), Err(DmaFault::Forbidden(second)));
    let before = faults.count();
    iommu.unmap(1, at.0, at.0 + 0xfff).unwrap();
    assert_eq!(dma.write(at, &[8]), Err(DmaFault::Unmapped(at)));
    assert_eq!(faults.count(), before + 1, "the guest is told");
    assert_eq!(dma.read(Iova(u64::MAX), &mut [0; 2]), Err(DmaFault::Unmapped(Iova(u64::MAX))));
}

#[test]
fn a_device_that_makes_no_sense_is_refused_and_closed() {
    let refused = |spoil: fn(&mut State)| {
        let model = Model::new();
        model.with(spoil);
        let memory = Arc::new(memory::create(&[(Gpa(0), 1 << 20)]).unwrap());
        let device = Arc::clone(&model) as Arc<dyn Device>;
        let seat = Seat {
            reached: DeviceMemory::whole(&memory),
            exposed: None,
            msi: Arc::new(Sink(mpsc::channel().0)),
            wires: Wires::new(IoApic::new(&Rig::new(&[0], false).bus)),
            slot: SLOT,
        };
        let error = AssignedFunction::new(device, seat).map(drop).unwrap_err();
        assert!(model.with(|s| s.closed));
        error.to_string()
    };
    assert!(refused(|s| s.config[0..2].fill(0xff)).contains("no function"));
    assert!(refused(|s| s.config[0x0e] = 1).contains("bridge"));
    assert!(refused(|s| s.config[0x61] = 0x40).contains("no end"));
    assert!(refused(|s| s.config[0x52] = 7).contains("number of vectors"));
    assert!(refused(|s| s.config[0x42] = 0x8c).contains("MSI has a number of vectors"));
}

use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::mpsc;

use iommufd::iova::{Iova, IovaRange};
use mmu::Gpa;
use vfio::Result;
use vfio::device::{DeviceInfo, RegionFlags, RegionInfo};
use vfio::dma::{Dma, DmaFault};
use vfio::irq::{IrqFlags, IrqInfo};

use super::*;
use crate::memory;

/// A function with a 64-bit BAR 0 of 16 KiB, an I/O BAR 2, MSI-X with 3 vectors (table at 0x1000, pending bits at 0x2000)
/// between an MSI capability and a vendor's own.
#[derive(Debug, Default)]
struct Model {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    config: Vec<u8>,
    registers: Vec<(u64, Vec<u8>)>,
    dma: Option<Arc<dyn Dma>>,
    eventfds: Vec<OwnedFd>,
    closed: bool,
}

impl Model {
    fn new() -> Arc<Self> {
        let mut config = vec![0; 256];
        config[..4].copy_from_slice(&[0xf4, 0x1a, 0x34, 0x12]);
        config[6] = 0x10;
        config[0x10] = 0x0c;
        config[0x18] = 0x01;
        config[0x34] = 0x40;
        config[0x3d] = 1;
        config[0x40..0x42].copy_from_slice(&[0x05, 0x50]);
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
        let count = if index == uapi::vfio::VFIO_PCI_MSIX_IRQ_INDEX { 3 } else { 0 };
        Ok(IrqInfo { flags: IrqFlags::EVENTFD, count })
    }

    fn set_irqs(&self, set: IrqSet) -> Result<()> {
        if let IrqData::EventFd(eventfds) = set.data {
            self.with(|s| s.eventfds = eventfds.into_iter().flatten().collect());
        }
        Ok(())
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
}

fn assigned() -> Assigned {
    let model = Model::new();
    let memory = Arc::new(memory::create(&[(Gpa(0), 1 << 20)]).unwrap());
    let (sender, messages) = mpsc::channel();
    let device = Arc::clone(&model) as Arc<dyn Device>;
    let function = AssignedFunction::new(device, memory, Reach::Called, Arc::new(Sink(sender))).unwrap();
    Assigned { model, function, messages }
}

impl Assigned {
    fn config<const N: usize>(&mut self, offset: u16) -> [u8; N] {
        let mut data = [0; N];
        self.function.config_read(offset, &mut data);
        data
    }

    fn signal(&self, vector: usize) {
        self.model.with(|s| rustix::io::write(&s.eventfds[vector], &1u64.to_ne_bytes())).unwrap();
    }
}

#[test]
fn the_guest_sees_the_device_but_for_what_the_machine_lacks() {
    let mut it = assigned();
    assert_eq!(it.config(0), [0xf4, 0x1a, 0x34, 0x12]);
    assert_eq!(it.config(0x3d), [0], "no interrupt pin");
    assert_eq!(it.config(0x34), [0x50], "no MSI");
    assert_eq!(it.config(0x50), [0x11, 0x60]);
    assert_eq!(it.config(0x60), [0x09, 0x00, 4, 0x77]);
    assert_eq!(it.config(0x100), [0; 4], "no extended capability");
    let bar = BarInfo { index: 0, address: 0, size: 0x4000, wide: true, enabled: false };
    assert_eq!(it.function.bars(), [bar], "no I/O BAR");
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
    // Masked: it is pending, and goes when it is unmasked. Vector 0 follows only to know that 1 was seen.
    it.signal(1);
    let mut pending = [0];
    while pending == [0] {
        it.function.bar_read(0, 0x2000, &mut pending);
        std::thread::yield_now();
    }
    assert_eq!(pending, [0b10]);
    assert_eq!(it.messages.try_recv(), Err(mpsc::TryRecvError::Empty));
    it.function.bar_write(0, 0x101c, &[0; 4]);
    assert_eq!(it.messages.recv(), Ok((0xfee0_1000, 0x41)));
    it.signal(1);
    assert_eq!(it.messages.recv(), Ok((0xfee0_1000, 0x41)));
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
    assert_eq!(dma.translate(all, iommufd::domain::Prot::READ), Err(DmaFault::Overflow(Iova(0))));
}

#[test]
fn a_device_that_makes_no_sense_is_refused_and_closed() {
    let refused = |spoil: fn(&mut State)| {
        let model = Model::new();
        model.with(spoil);
        let memory = Arc::new(memory::create(&[(Gpa(0), 1 << 20)]).unwrap());
        let sink = Arc::new(Sink(mpsc::channel().0));
        let device = Arc::clone(&model) as Arc<dyn Device>;
        let error = AssignedFunction::new(device, memory, Reach::Called, sink).map(drop).unwrap_err();
        assert!(model.with(|s| s.closed));
        error.to_string()
    };
    assert!(refused(|s| s.config[0..2].fill(0xff)).contains("no function"));
    assert!(refused(|s| s.config[0x0e] = 1).contains("bridge"));
    assert!(refused(|s| s.config[0x61] = 0x40).contains("no end"));
    assert!(refused(|s| s.config[0x52] = 7).contains("number of vectors"));
}

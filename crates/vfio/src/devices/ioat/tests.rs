use std::sync::Mutex;

use iommufd::{
    domain::Prot,
    iova::{Iova, IovaRange},
};
use uapi::vfio::{VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_MSIX_IRQ_INDEX};

use super::{registers as reg, *};
use crate::{
    device::Device,
    dma::{Dma, DmaFault},
    eventfd::{
        lock,
        tests::{count, pair},
    },
    irq::{IrqAction, IrqData, IrqSet},
};

/// Memory from address 0 on.
#[derive(Debug)]
struct Ram(Mutex<Vec<u8>>);

impl Ram {
    fn with<R>(&self, iova: Iova, length: usize, f: impl FnOnce(&mut [u8]) -> R) -> Result<R, DmaFault> {
        let mut ram = lock(&self.0);
        let start = usize::try_from(iova.0).unwrap_or(usize::MAX);
        ram.get_mut(start..start.saturating_add(length)).map(f).ok_or(DmaFault::Unmapped(iova))
    }
}

impl Dma for Ram {
    fn read(&self, iova: Iova, to: &mut [u8]) -> Result<(), DmaFault> {
        self.with(iova, to.len(), |ram| to.copy_from_slice(ram))
    }

    fn write(&self, iova: Iova, from: &[u8]) -> Result<(), DmaFault> {
        self.with(iova, from.len(), |ram| ram.copy_from_slice(from))
    }

    fn translate(&self, range: IovaRange, _access: Prot) -> Result<(), DmaFault> {
        self.with(range.start(), range.length().unwrap_or(u64::MAX) as usize, |_| ())
    }
}

struct World {
    device: Function<Ioat>,
    ram: Arc<Ram>,
}

const DESCRIPTOR: u64 = 0x40;
const SOURCE: u64 = 0x1000;
const TARGET: u64 = 0x2_0000;

impl World {
    fn new() -> Self {
        let device = physical().unwrap();
        let ram = Arc::new(Ram(Mutex::new(vec![0; 0x10_0000])));
        device.open(Arc::clone(&ram) as Arc<dyn Dma>).unwrap();
        device.write(VFIO_PCI_CONFIG_REGION_INDEX, 4, &6u16.to_le_bytes()).unwrap();
        Self { device, ram }
    }

    fn put(&self, register: u64, value: &[u8]) {
        assert_eq!(self.device.write(0, reg::CHANNEL + register, value), Ok(value.len()));
    }

    fn get(&self, register: u64) -> u64 {
        let mut bytes = [0; 8];
        self.device.read(0, reg::CHANNEL + register, &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }

    fn descriptor(&self, at: u64, size: u32, control: u32, source: u64, target: u64, next: u64) {
        let mut bytes = Vec::new();
        bytes.extend(size.to_le_bytes());
        bytes.extend(control.to_le_bytes());
        for word in [source, target, next, 0, 0, 0, 0] {
            bytes.extend(word.to_le_bytes());
        }
        self.ram.write(Iova(at), &bytes).unwrap();
    }

    fn start(&self, chain: u64, count: u16) -> u64 {
        self.put(reg::CHAINADDR, &chain.to_le_bytes());
        self.put(reg::CHANCTRL, &[9, 0]);
        self.put(reg::DMACOUNT, &count.to_le_bytes());
        loop {
            match self.get(reg::CHANSTS) & 7 {
                0 => std::thread::yield_now(),
                status => return status,
            }
        }
    }

    fn messages(&self) -> std::os::fd::OwnedFd {
        let (ours, theirs) = pair();
        let data = IrqData::EventFd(vec![Some(theirs)]);
        let index = VFIO_PCI_MSIX_IRQ_INDEX;
        self.device.set_irqs(IrqSet { index, start: 0, count: 1, action: IrqAction::Trigger, data }).unwrap();
        ours
    }
}

#[test]
fn it_copies_and_interrupts_once() {
    let world = World::new();
    let irq = world.messages();
    world.ram.write(Iova(SOURCE), &[0x5a; 300]).unwrap();
    world.descriptor(DESCRIPTOR, 300, 0, SOURCE, TARGET, DESCRIPTOR);
    assert_eq!(world.start(DESCRIPTOR, 5), 1);
    let mut bytes = [0; 301];
    world.ram.read(Iova(TARGET), &mut bytes).unwrap();
    assert!(bytes[..300] == [0x5a; 300] && bytes[300] == 0);
    assert_eq!(count(&irq), 0);
    world.put(reg::CHANCMD, &[reg::CHANCMD_SUSPEND]);
    assert_eq!(world.get(reg::CHANSTS) & 7, 2);
    world.descriptor(DESCRIPTOR, 8, reg::CONTROL_INT_EN, SOURCE, TARGET, DESCRIPTOR);
    assert_eq!(world.start(DESCRIPTOR, 3), 1);
    assert_eq!(count(&irq), 1, "software must arm it again");
}

#[test]
fn a_fault_halts_the_channel() {
    let far = 1 << 40;
    for (size, control, source, target, error) in [
        (8, 0, far, TARGET, reg::ERR_SRC_ADDR),
        (8, 0, SOURCE, far, reg::ERR_DEST_ADDR),
        (0, 0, SOURCE, TARGET, reg::ERR_LENGTH),
        (0x8001, 0, SOURCE, TARGET, reg::ERR_LENGTH),
        (u32::MAX, 0, SOURCE, TARGET, reg::ERR_LENGTH),
        (8, 0x8700_0000, SOURCE, TARGET, reg::ERR_CONTROL),
    ] {
        let world = World::new();
        let irq = world.messages();
        world.descriptor(DESCRIPTOR, size, control, source, target, DESCRIPTOR);
        assert_eq!(world.start(DESCRIPTOR, 9), 3);
        assert_eq!(world.get(reg::CHANERR) as u32, error);
        assert_eq!(count(&irq), 0);
        world.put(reg::CHANERR, &error.to_le_bytes());
        assert_eq!(world.get(reg::CHANERR) as u32, 0);
        world.put(reg::CHANCMD, &[reg::CHANCMD_RESET]);
        world.descriptor(DESCRIPTOR, 8, 0, SOURCE, TARGET, DESCRIPTOR);
        assert_eq!(world.start(DESCRIPTOR, 1), 1);
    }
    let world = World::new();
    assert_eq!(world.start(DESCRIPTOR + 8, 1), 3);
    assert_eq!(world.get(reg::CHANERR) as u32, reg::ERR_NEXT_DESC_ALIGN);
    let world = World::new();
    assert_eq!(world.start(1 << 40, 1), 3);
    assert_eq!(world.get(reg::CHANERR) as u32, reg::ERR_NEXT_ADDR);
}

#[test]
fn closing_ends_what_runs() {
    let world = World::new();
    world.descriptor(DESCRIPTOR, 0x8000, 0, SOURCE, TARGET, DESCRIPTOR);
    world.put(reg::CHAINADDR, &DESCRIPTOR.to_le_bytes());
    world.put(reg::DMACOUNT, &u16::MAX.to_le_bytes());
    world.device.close();
    world.ram.write(Iova(TARGET), &[1]).unwrap();
    assert_eq!(Arc::strong_count(&world.ram), 1, "it has let go of memory");
    world.device.open(Arc::clone(&world.ram) as Arc<dyn Dma>).unwrap();
    assert_eq!(world.get(reg::CHANSTS) & 7, 3);
}

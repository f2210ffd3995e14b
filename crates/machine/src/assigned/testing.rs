//! A hostile device, and a hostile guest that it is given to: the body of a fuzz target, and of a second of it in the tests.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use mmu::Gpa;
use pci::msix::MsiSink;
use uapi::vfio::{VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_NUM_IRQS, VFIO_PCI_NUM_REGIONS};
use vfio::device::{Device, DeviceFlags, DeviceInfo, RegionFlags, RegionInfo};
use vfio::dma::Dma;
use vfio::irq::{IrqData, IrqFlags, IrqInfo, IrqSet};
use vfio::{Errno, Result};

use super::{AssignedFunction, Seat};
use crate::apic::{ApicBus, ApicBusConfig, IoApic, VcpuSignals};
use crate::clock::{Clock, HostDeadline};
use crate::dma::DeviceMemory;
use crate::memory;
use crate::pci::PciFunction;
use crate::pci::intx::Wires;
use crate::vcpu::lock;

const CONFIG: usize = 256;

/// A device that says of itself what it likes.
#[derive(Debug)]
struct Hostile {
    config: Mutex<[u8; CONFIG]>,
    /// Log2 of the BARs' sizes, and how many interrupts of each kind.
    sizes: [u8; 6],
    irqs: [u8; 4],
    eventfds: Mutex<Vec<OwnedFd>>,
    /// It does not answer.
    dead: AtomicBool,
    open: AtomicBool,
}

impl Hostile {
    fn answer(&self) -> Result<()> {
        if self.dead.load(Ordering::Relaxed) { Err(Errno::IO) } else { Ok(()) }
    }

    fn signal(&self, which: u8) {
        let eventfds = lock(&self.eventfds);
        if let Some(eventfd) = eventfds.get(usize::from(which) % eventfds.len().max(1)) {
            let _ = rustix::io::write(eventfd, &1u64.to_ne_bytes());
        }
    }
}

impl Device for Hostile {
    fn info(&self) -> Result<DeviceInfo> {
        let (regions, irqs) = (VFIO_PCI_NUM_REGIONS, VFIO_PCI_NUM_IRQS);
        Ok(DeviceInfo { flags: DeviceFlags::PCI, regions, irqs, atomic_completer: None })
    }

    fn region(&self, index: u32) -> Result<RegionInfo> {
        let size = match self.sizes.get(index as usize) {
            Some(0) => 0,
            Some(size) => 1 << (size % 64),
            None => CONFIG as u64,
        };
        Ok(RegionInfo { flags: RegionFlags::READ | RegionFlags::WRITE, size, ..RegionInfo::default() })
    }

    fn read(&self, index: u32, offset: u64, to: &mut [u8]) -> Result<usize> {
        self.answer()?;
        if index != VFIO_PCI_CONFIG_REGION_INDEX {
            to.fill(0x11);
            return Ok(to.len());
        }
        let config = lock(&self.config);
        let from = config.get(offset as usize..).and_then(|from| from.get(..to.len()));
        to.copy_from_slice(from.ok_or(Errno::INVAL)?);
        Ok(to.len())
    }

    fn write(&self, index: u32, offset: u64, from: &[u8]) -> Result<usize> {
        self.answer()?;
        if index == VFIO_PCI_CONFIG_REGION_INDEX {
            let mut config = lock(&self.config);
            let to = config.get_mut(offset as usize..).and_then(|to| to.get_mut(..from.len()));
            to.ok_or(Errno::INVAL)?.copy_from_slice(from);
        }
        Ok(from.len())
    }

    fn irq(&self, index: u32) -> Result<IrqInfo> {
        let count = self.irqs.get(index as usize).copied().unwrap_or(0);
        Ok(IrqInfo { flags: IrqFlags::EVENTFD, count: count.into() })
    }

    fn set_irqs(&self, set: IrqSet) -> Result<()> {
        self.answer()?;
        let mut eventfds = lock(&self.eventfds);
        match set.data {
            IrqData::EventFd(fds) => *eventfds = fds.into_iter().flatten().collect(),
            _ => eventfds.clear(),
        }
        Ok(())
    }

    fn reset(&self) -> Result<()> {
        self.answer()
    }

    fn open(&self, _dma: Arc<dyn Dma>) -> Result<()> {
        self.open.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn close(&self) {
        self.open.store(false, Ordering::Relaxed);
    }
}

/// Where messages and interrupts end.
struct Nowhere;

impl MsiSink for Nowhere {
    fn signal(&self, _address: u64, _data: u32) {}
}

impl VcpuSignals for Nowhere {
    fn interrupt(&self, _vcpu: usize) {}
    fn nmi(&self, _vcpu: usize) {}
    fn init(&self, _vcpu: usize) {}
    fn sipi(&self, _vcpu: usize, _vector: u8) {}
    fn timer_changed(&self, _vcpu: usize, _deadline: Option<HostDeadline>) {}
    fn unhalt(&self, _vcpu: usize) {}
}

fn seat() -> Option<Seat> {
    let ram = Arc::new(memory::create(&[(Gpa(0), 1 << 16)]).ok()?);
    let config = ApicBusConfig { ids: vec![0], physical_bits: 40, extended_ids: false };
    let bus = ApicBus::new(&config, &Arc::new(Clock::manual(1_000_000)), Arc::new(Nowhere));
    let wires = Wires::new(IoApic::new(&bus));
    Some(Seat { reached: DeviceMemory::whole(&ram), exposed: None, msi: Arc::new(Nowhere), wires, slot: 4 })
}

/// A configuration space that is a function's at least, with the capabilities of MSI and MSI-X where the first byte says so.
fn config(data: &[u8; CONFIG]) -> [u8; CONFIG] {
    let mut config = *data;
    let mut put = |at: usize, bytes: &[u8]| {
        let place = config.get_mut(at..).and_then(|place| place.get_mut(..bytes.len()));
        place.unwrap_or_default().copy_from_slice(bytes);
    };
    let [choice, tables, ..] = *data;
    put(0, &[0xf4, 0x1a]);
    if choice & 1 == 0 {
        put(0x06, &[0x10]);
        put(0x0e, &[0]);
        put(0x34, &[0x40]);
        put(0x40, &[0x05, 0x60, choice & 0xfe, 0]);
        // Few vectors, whose table and pending bits are in BAR 0 or nowhere.
        put(0x60, &[0x11, if choice & 2 == 0 { 0 } else { tables & 0xfc }, tables & 31, 0]);
    }
    config
}

/// Any configuration space and any answers of a device, and any accesses of a guest to configuration space and BARs, with
/// interrupts between them. Nothing may panic or hang, and the device is closed at the end.
///
/// # Panics
/// It was not closed.
pub fn drive(data: &[u8]) {
    let Some((head, steps)) = data.split_first_chunk::<CONFIG>() else { return };
    let Some(([s0, s1, s2, s3, s4, s5, irqs @ ..], steps)) = steps.split_first_chunk::<10>() else { return };
    let Some(seat) = seat() else { return };
    let device = Arc::new(Hostile {
        config: Mutex::new(config(head)),
        sizes: [*s0, *s1, *s2, *s3, *s4, *s5],
        irqs: *irqs,
        eventfds: Mutex::default(),
        dead: AtomicBool::new(false),
        open: AtomicBool::new(false),
    });
    if let Ok(mut function) = AssignedFunction::new(Arc::clone(&device) as _, seat) {
        for [kind, at, choice, value @ ..] in steps.as_chunks::<7>().0 {
            step(&device, &mut function, *kind, *at, *choice, *value);
        }
    }
    assert!(!device.open.load(Ordering::Relaxed), "the device stays open");
}

fn step(device: &Hostile, function: &mut AssignedFunction, kind: u8, at: u8, choice: u8, mut value: [u8; 4]) {
    // 1, 2 or 4 bytes in an aligned double word.
    let length = 1 << (choice % 3);
    let within = usize::from(choice >> 4 & 3) / length * length;
    let config = u16::from(at) / 4 * 4 + within as u16 + u16::from(choice & 0x80 != 0) * 256;
    match kind % 8 {
        0..=2 => function.config_write(config, value.get(..length).unwrap_or_default()),
        3 => function.config_read(config, value.get_mut(..length).unwrap_or_default()),
        4 | 5 => {
            let bars = function.bars();
            let Some(bar) = bars.get(usize::from(at) % bars.len().max(1)) else { return };
            let offset = u64::from(u32::from_le_bytes(value)) << (choice >> 6);
            let offset = offset % bar.size / length as u64 * length as u64;
            if bar.size < length as u64 {
                return;
            }
            let data = value.get_mut(..length).unwrap_or_default();
            if kind % 8 == 4 {
                function.bar_write(bar.index, offset, data);
            } else {
                function.bar_read(bar.index, offset, data);
            }
        }
        6 => device.signal(at),
        _ => device.dead.store(at & 15 == 0, Ordering::Relaxed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apic::testing::Random;

    #[test]
    fn any_device_and_guest_do_no_harm() {
        let mut random = Random(11);
        for _ in 0..300 {
            let mut data: Vec<u8> = (0..CONFIG + 10 + 7 * 100).map(|_| random.next() as u8).collect();
            // BARs of 4 KiB to 64 KiB, so that most of the devices can be.
            data[CONFIG..CONFIG + 6].iter_mut().for_each(|size| *size = 12 + *size % 5);
            data[0x10..0x28].fill(0);
            drive(&data);
        }
    }

    #[test]
    fn the_device_of_the_target_can_be_given_to_a_guest() {
        let mut data = [0; CONFIG];
        data[1] = 3;
        let device = Arc::new(Hostile {
            config: Mutex::new(config(&data)),
            sizes: [12, 0, 0, 0, 0, 0],
            irqs: [0, 1, 4, 0],
            eventfds: Mutex::default(),
            dead: AtomicBool::new(false),
            open: AtomicBool::new(false),
        });
        let mut function = AssignedFunction::new(Arc::clone(&device) as _, seat().unwrap()).unwrap();
        function.config_write(0x04, &[4, 0]);
        function.config_write(0x62, &[0, 0x80]);
        assert_eq!(lock(&device.eventfds).len(), 4);
    }
}

//! A hostile guest of the unit: the body of a fuzz target, and of a second of it in the tests.

use std::sync::Arc;

use cpu::GuestRam;
use pci::msix::MsiSink;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::Vtd;
use super::registers::at;
use crate::bus::MmioDevice;
use crate::dma::DeviceMemory;

/// Bytes of guest RAM: a megabyte from 0 on, and 64 KiB from 4 GiB on.
const REGIONS: [(GuestAddress, usize); 2] = [(GuestAddress(0), 1 << 20), (GuestAddress(4 << 30), 1 << 16)];
/// The guest has its tables and its queue in the first pages.
const PAGES: u64 = 16;
const SOURCES: [u16; 2] = [0x08, 0x10];
/// What a driver writes to.
const REGISTERS: [u64; 14] = [
    at::COMMAND,
    at::ROOT,
    at::CONTEXT,
    at::FAULT_STATUS,
    at::FAULT_EVENT,
    at::QUEUE_TAIL,
    at::QUEUE_BASE,
    at::COMPLETION,
    at::COMPLETION_EVENT,
    at::COMPLETION_EVENT + 8,
    at::IOTLB_ADDRESS,
    at::IOTLB,
    at::RECORDS,
    at::RECORDS + 12,
];

/// Where its messages end.
struct Nowhere;

impl MsiSink for Nowhere {
    fn signal(&self, _address: u64, _data: u32) {}
}

struct Guest {
    ram: Arc<GuestRam>,
    unit: Vtd,
    registers: Arc<dyn MmioDevice>,
    memory: Vec<DeviceMemory>,
}

impl Guest {
    fn new() -> Option<Self> {
        let ram = Arc::new(GuestRam::from_ranges(&REGIONS).ok()?);
        let unit = Vtd::new(&ram, Arc::new(Nowhere)).ok()?;
        let device = |source| {
            let (port, remapper) = unit.add_endpoint(source).ok()?;
            Some(DeviceMemory::translated(&ram, port, remapper))
        };
        let memory = SOURCES.into_iter().map(device).collect::<Option<_>>()?;
        Some(Self { registers: unit.registers(), ram, unit, memory })
    }

    /// What a driver might write to a register: for one that commands, the bits that do; else a page of its tables.
    fn write(&self, which: u8, choice: u8, value: u64) {
        let Some(offset) = REGISTERS.get(usize::from(which) % REGISTERS.len()).copied() else { return };
        let value = match offset {
            _ if choice & 1 != 0 => value,
            at::COMMAND => value << 24,
            at::CONTEXT | at::IOTLB => (value << 56) | 5,
            at::QUEUE_TAIL => value % 512 * 16,
            _ => ((value % PAGES) << 12) | ((value >> 8) & 3),
        };
        match choice & 2 {
            0 if offset.is_multiple_of(8) => self.registers.write(offset, &value.to_le_bytes()),
            _ => self.registers.write(offset, &(value as u32).to_le_bytes()),
        }
    }

    /// An entry of a root, context or page table, or half a descriptor.
    fn put(&self, page: u8, choice: u8, index: u8, value: u64) {
        let value = match choice & 7 {
            0..=2 => ((value % PAGES) << 12) | u64::from((choice >> 3) & 3) | u64::from(choice & 0x80),
            3 => (5 << 8) | u64::from((choice >> 3) & 3),
            4 => {
                (value << 32)
                    | (5 << 16)
                    | (u64::from((choice >> 3) & 3) << 4)
                    | (1 + u64::from(choice >> 5) % 5)
            }
            _ => value,
        };
        let at = ((u64::from(page) % PAGES) << 12) | (u64::from(index) << 3);
        // All of it is RAM.
        let _ = self.ram.write_obj(value, GuestAddress(at));
    }

    fn access(&self, device: u8, choice: u8, value: u64) {
        let Some(memory) = self.memory.get(usize::from(device) % SOURCES.len()) else { return };
        let address = match choice & 3 {
            0 | 1 => value & 0x1f_ffff,
            2 => value & 0x7f_ffff_ffff,
            _ => value,
        };
        let mut buffer = [0xa5; 96];
        let buffer = buffer.get_mut(..usize::from(choice >> 3) * 3).unwrap_or_default();
        let view = memory.memory();
        // What is not translated fails.
        let _ = if choice & 4 == 0 {
            view.read(buffer, GuestAddress(address))
        } else {
            view.write(buffer, GuestAddress(address))
        };
    }

    /// Without translation a device reads what is there, whatever was before.
    fn assert_untranslated(&self) {
        self.registers.write(at::COMMAND, &[0; 4]);
        for (start, _) in REGIONS {
            let there = self.ram.read_obj::<u64>(start).ok();
            for memory in &self.memory {
                assert_eq!(memory.memory().read_obj::<u64>(start).ok(), there, "{start:?}");
            }
        }
    }
}

/// Any register accesses, tables and invalidation queues of a guest, and accesses of its devices between them. Nothing may panic or
/// hang; and when the guest turns translation off, its devices reach memory as it is.
///
/// # Panics
/// They do not.
pub fn drive(data: &[u8]) {
    let Some(guest) = Guest::new() else { return };
    for [kind, a, b, c, value @ ..] in data.as_chunks::<12>().0 {
        let value = u64::from_le_bytes(*value);
        match kind % 8 {
            0..=2 => guest.write(*a, *b, value),
            3..=5 => guest.put(*a, *b, *c, value),
            6 => guest.access(*a, *b, value),
            _ => {
                let offset = (u64::from(*a) << 3) | u64::from(*b & 7);
                let mut buffer = [0; 16];
                guest.registers.read(offset, buffer.get_mut(..usize::from(c % 17)).unwrap_or_default());
            }
        }
    }
    guest.assert_untranslated();
    let _ = guest.unit.stats();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apic::testing::Random;

    #[test]
    fn any_guest_does_no_harm() {
        let mut random = Random(7);
        for _ in 0..100 {
            let data: Vec<u8> = (0..12 * 200).map(|_| random.next() as u8).collect();
            drive(&data);
        }
    }
}

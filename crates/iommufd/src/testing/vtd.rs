//! A hostile guest of the software VT-d unit, and a hostile program that holds it: the body of a fuzz target.

use std::sync::Arc;

use uapi::iommufd::{IOMMUFD_CMD_HWPT_INVALIDATE, iommu_hwpt_invalidate};

use super::{LENGTH, MEMORY, Program, fuzz::Bytes};
use crate::{
    BoundDevice, Context, HwptOptions, Mapping, Result,
    caller::LibraryCaller,
    domain::Prot,
    hardware::UserData,
    iova::{Iova, IovaRange, PAGE_SIZE},
    process::UserAddr,
    soft::{
        Port, SoftDevice,
        vtd::{
            Doorbell, HWPT_DATA_TYPE, INVALIDATE_TYPE, QUEUE_TYPE, QUEUES, Queue, TableData, VIOMMU_TYPE,
            ViommuData, VtdIommu,
        },
    },
};

/// How much memory the guest has. The program has one page more, for its ioctls.
const GUEST: u64 = LENGTH - PAGE_SIZE;
/// By what id the guest knows its device.
const SOURCE: u64 = 0x18;
/// The guest's page tables are in its first pages, and a program's invalidations and queues in those after them.
const TABLES: u64 = 4;
const RING: u64 = TABLES * PAGE_SIZE;

/// A guest's memory as that of a program, and its unit.
struct Guest {
    program: Program,
    context: Arc<Context>,
    device: BoundDevice,
    port: Arc<Port>,
    ioas: u32,
    viommu: u32,
    unit: Arc<VtdIommu>,
    doorbells: Mapping,
    /// Nested page tables and queues, of any of which there are few.
    tables: Vec<u32>,
    queues: Vec<(u32, Arc<Queue>)>,
}

impl Guest {
    fn new() -> Result<Self> {
        let (program, context) = (Program::new()?, Context::new());
        let hardware = SoftDevice::new(1, Vec::new());
        let port = hardware.port(None);
        let device = context.bind(hardware)?;
        let ioas = context.ioas_alloc()?;
        let prot = Prot::READ | Prot::WRITE;
        context.ioas_map_by(ioas, &program, UserAddr(MEMORY), GUEST, Some(Iova(0)), prot)?;
        let options = HwptOptions { nest_parent: true, dirty_tracking: true, ..Default::default() };
        let parent = context.hwpt_alloc(&program, device.id(), ioas, options, UserData::default())?;
        let caller = LibraryCaller::new(&ViommuData { address_bits: 40, ..Default::default() });
        let viommu = context.viommu_alloc(&caller, device.id(), parent, caller.data(VIOMMU_TYPE))?;
        context.vdevice_alloc(viommu, device.id(), SOURCE)?;
        let unit = context.viommu(viommu)?.as_any().downcast().map_err(|_| crate::Errno::INVAL)?;
        let data: ViommuData = caller.value().ok_or(crate::Errno::INVAL)?;
        let (prot, flags) = (rustix::mm::ProtFlags::WRITE, rustix::mm::MapFlags::SHARED);
        let doorbells = context.mmap(data.doorbell_offset, data.doorbell_length, prot, flags)?;
        let (tables, queues) = Default::default();
        Ok(Self { program, context, device, port, ioas, viommu, unit, doorbells, tables, queues })
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        // What is outside of the program's memory is not written.
        let _ = self.program.put(UserAddr(MEMORY.wrapping_add(at)), bytes);
    }

    /// An entry of a page table, mostly one that leads on.
    fn entry(&self, bytes: &mut Bytes<'_>) -> Option<()> {
        let (table, index, to) = (bytes.byte()?, bytes.byte()?, bytes.byte()?);
        let at = u64::from(table) % TABLES * PAGE_SIZE + u64::from(index % 16) * 8;
        let entry = match table {
            0..=191 => u64::from(to % 64) << 12 | u64::from(table >> 4 & 3) | u64::from(table >> 6 & 1) << 7,
            _ => bytes.number()?,
        };
        self.put(at, &entry.to_le_bytes());
        Some(())
    }

    /// A descriptor somewhere in the rings, mostly one of those that there are.
    fn descriptor(&self, bytes: &mut Bytes<'_>) -> Option<()> {
        let (slot, kind) = (bytes.byte()?, bytes.byte()?);
        let (low, high) = match kind {
            0..=31 => (u64::from(kind % 4) << 4 | 1 | bytes.number()? << 16, 0),
            32..=127 => (u64::from(kind % 4) << 4 | 2 | 5 << 16, bytes.number()?),
            128..=191 => (u64::from(kind % 4) << 4 | 5 | 7 << 32, bytes.number()? & !3),
            _ => (bytes.number()?, bytes.number()?),
        };
        let at = RING + u64::from(slot) * 16;
        self.put(at, &low.to_le_bytes());
        self.put(at + 8, &high.to_le_bytes());
        Some(())
    }

    fn table(&mut self, bytes: &mut Bytes<'_>) -> Option<()> {
        let choice = bytes.byte()?;
        let address_bits = if choice & 1 == 0 { 39 } else { 48 };
        let mut data = TableData { root: u64::from(choice >> 4) * PAGE_SIZE, domain: 5, address_bits };
        if choice & 14 == 14 {
            let number = bytes.number()?;
            data = TableData { root: number, domain: number as u32 >> 8, address_bits: number as u32 & 63 };
        }
        let (caller, options) = (LibraryCaller::new(&data), HwptOptions::default());
        let data = caller.data(HWPT_DATA_TYPE);
        if self.tables.len() < 8
            && let Ok(table) = self.context.hwpt_alloc(&caller, self.device.id(), self.viommu, options, data)
        {
            self.tables.push(table);
        }
        Some(())
    }

    fn queue(&mut self, bytes: &mut Bytes<'_>) -> Option<()> {
        let (index, page) = (bytes.byte()?, bytes.byte()?);
        let length = if page & 0x80 == 0 { PAGE_SIZE << (page >> 4 & 3) } else { bytes.number()? };
        let (index, at) = (u32::from(index % 5), Iova(RING + u64::from(page % 4) * PAGE_SIZE));
        let queue = self.context.hw_queue_alloc(self.viommu, QUEUE_TYPE, index, at, length);
        if let (Ok(id), Some(queue)) = (queue, self.unit.queue(index)) {
            self.queues.push((id, queue));
        }
        Some(())
    }

    /// What a program does that has the doorbells mapped: any word of any of them.
    fn ring(&self, bytes: &mut Bytes<'_>) -> Option<()> {
        let (word, value) = (bytes.byte()?, bytes.number()?);
        let words = u64::from(QUEUES) * (size_of::<Doorbell>() / 4) as u64;
        let at = self.doorbells.offset() + u64::from(word) % words * 4;
        let _ = rustix::io::pwrite(self.doorbells.file(), &(value as u32).to_ne_bytes(), at);
        Some(())
    }

    fn access(&self, bytes: &mut Bytes<'_>, write: bool) -> Option<()> {
        let iova = match bytes.byte()? {
            page @ 0..=127 => u64::from(page) << 12 | u64::from(bytes.byte()?) << 4,
            choice @ 128..=191 => u64::from(bytes.byte()?) << 21 | u64::from(choice % 2) << 39,
            _ => bytes.number()?,
        };
        let mut reader = self.port.reader();
        let mut buffer = [0x5a; 64];
        let section = reader.section();
        let result =
            if write { section.write(Iova(iova), &buffer) } else { section.read(Iova(iova), &mut buffer) };
        drop(section);
        if let Err(fault) = result {
            self.port.report(&fault);
        }
        Some(())
    }

    /// The program's own invalidations, from the rings.
    fn invalidate(&self, bytes: &mut Bytes<'_>) -> Option<()> {
        let (slot, count) = (bytes.byte()?, bytes.byte()?);
        let mut args = iommu_hwpt_invalidate {
            size: size_of::<iommu_hwpt_invalidate>() as u32,
            hwpt_id: self.viommu,
            data_uptr: MEMORY + RING + u64::from(slot) * 16,
            data_type: INVALIDATE_TYPE,
            entry_len: 16,
            entry_num: u32::from(count % 32),
            ..Default::default()
        };
        if count & 0x80 != 0 {
            args.entry_len = bytes.number()? as u32;
        }
        let _ = self.program.ioctl(&self.context, 0x3b00 | IOMMUFD_CMD_HWPT_INVALIDATE, &mut args);
        Some(())
    }

    fn unmap(&self, bytes: &mut Bytes<'_>) -> Option<()> {
        let (all, caller) = (IovaRange::with_length(Iova(0), GUEST).ok(), &self.program);
        if bytes.byte()? & 1 == 0 {
            // EBUSY while a queue has its ring there.
            let _ = all.map(|range| self.context.ioas_unmap(self.ioas, range));
        } else {
            let (from, prot) = (UserAddr(MEMORY), Prot::READ | Prot::WRITE);
            let _ = self.context.ioas_map_by(self.ioas, caller, from, GUEST, Some(Iova(0)), prot);
        }
        Some(())
    }

    fn step(&mut self, kind: u8, bytes: &mut Bytes<'_>) -> Option<()> {
        match kind % 16 {
            0..=2 => self.entry(bytes),
            3 | 4 => self.descriptor(bytes),
            5 => self.table(bytes),
            6 => {
                let chosen = self.tables.get(usize::from(kind >> 4)).or(self.tables.first());
                let _ = chosen.map(|table| self.device.attach(None, *table).map(drop));
                Some(())
            }
            7 if kind & 0x80 != 0 => {
                self.device.detach(None);
                self.tables.retain(|table| self.context.destroy(*table).is_err());
                Some(())
            }
            7 | 8 => self.access(bytes, true),
            9 => self.access(bytes, false),
            10 => self.queue(bytes),
            11 if kind & 0x40 != 0 => {
                for (id, _) in self.queues.drain(..) {
                    let _ = self.context.destroy(id);
                }
                Some(())
            }
            11 | 12 => {
                let tail = bytes.number()? as u32;
                let tail = if kind & 0x80 == 0 { tail % 256 * 16 } else { tail };
                self.queues.iter().for_each(|(_, queue)| queue.set_tail(tail));
                Some(())
            }
            13 => {
                self.queues.iter().for_each(|(_, queue)| queue.clear_error());
                self.ring(bytes)
            }
            14 => self.invalidate(bytes),
            _ => self.unmap(bytes),
        }
    }
}

/// Any page tables, queues, doorbells and calls of a guest with a VT-d unit, and of the program that gave it that, while its device
/// accesses memory. Nothing may panic, nor hang, nor stay pinned at the end.
pub fn run_vtd(data: &[u8]) {
    let Ok(mut guest) = Guest::new() else { return };
    let mut bytes = Bytes(data);
    while let Some(kind) = bytes.byte() {
        if guest.step(kind, &mut bytes).is_none() {
            break;
        }
    }
    let Guest { program, context, device, port, unit, doorbells, queues, .. } = guest;
    drop((queues, doorbells, unit, port, device, context));
    program.assert_unpinned();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::fuzz::for_a_second;

    #[test]
    fn any_guest_does_no_harm() {
        for_a_second(run_vtd);
    }

    #[test]
    fn the_guest_of_the_target_can_do_what_guests_do() {
        let mut guest = Guest::new().unwrap();
        for at in 0..3 {
            guest.put(at * PAGE_SIZE, &((at + 1) * PAGE_SIZE + 3).to_le_bytes());
        }
        assert!(guest.table(&mut Bytes(&[0])).is_some() && guest.tables.len() == 1);
        guest.device.attach(None, guest.tables[0]).unwrap();
        assert_eq!(guest.port.reader().section().write(Iova(16), &[7; 8]), Ok(8));
        assert_eq!(guest.program.take::<[u8; 8]>(UserAddr(MEMORY + 3 * PAGE_SIZE + 16)), Ok([7; 8]));
        assert!(guest.queue(&mut Bytes(&[0, 0])).is_some() && guest.queues.len() == 1);
        assert!(guest.ring(&mut Bytes(&[0, 0, 3])).is_some());
    }
}

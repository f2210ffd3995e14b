//! A driver, in a few lines, against the controller.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use disk::Disk;
use iommufd::domain::Prot;
use iommufd::iova::{Iova, IovaRange};
use proptest::prelude::*;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use uapi::vfio::{
    VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_INTX_IRQ_INDEX,
    VFIO_PCI_MSIX_IRQ_INDEX,
};
use zerocopy::{FromBytes, IntoBytes};

use super::spec::{
    Command, Completion, DatasetRange, NAMESPACE, Status, admin, csts, feature, io as opcode, log, register,
};
use super::{MAX_QUEUES, Nvme, NvmeError, Options, new};
use crate::device::Device;
use crate::dma::{Dma, DmaFault};
use crate::irq::{IrqAction, IrqData, IrqSet};
use crate::pci::function::Function;

/// Bytes of memory.
const RAM: usize = 8 << 20;
/// Where queue number n has its submission queue; its completion queue is a page further.
const QUEUES: u64 = 0x10_0000;
const QUEUE_BYTES: u64 = 0x2000;
/// Where data is.
const DATA: u64 = 0x20_0000;
const DISK_BLOCKS: u64 = 4096;

#[derive(Debug)]
struct Ram(Mutex<Vec<u8>>);

impl Ram {
    fn part(iova: Iova, length: usize) -> Option<std::ops::Range<usize>> {
        let at = usize::try_from(iova.0).ok()?;
        Some(at..at.checked_add(length)?)
    }
}

impl Dma for Ram {
    fn read(&self, iova: Iova, to: &mut [u8]) -> Result<(), DmaFault> {
        let ram = self.0.lock().unwrap();
        let from = Self::part(iova, to.len()).and_then(|part| ram.get(part));
        to.copy_from_slice(from.ok_or(DmaFault::Unmapped(iova))?);
        Ok(())
    }

    fn write(&self, iova: Iova, from: &[u8]) -> Result<(), DmaFault> {
        let mut ram = self.0.lock().unwrap();
        let to = Self::part(iova, from.len()).and_then(|part| ram.get_mut(part));
        to.ok_or(DmaFault::Unmapped(iova))?.copy_from_slice(from);
        Ok(())
    }

    fn translate(&self, range: IovaRange, _: Prot) -> Result<(), DmaFault> {
        Err(DmaFault::Unmapped(range.start()))
    }
}

/// A queue pair as the driver sees it.
#[derive(Debug, Clone, Copy)]
struct Pair {
    id: u16,
    size: u32,
    tail: u32,
    head: u32,
    phase: u16,
}

struct Driver {
    function: Function<Nvme>,
    ram: Arc<Ram>,
    file: File,
    pairs: Vec<Pair>,
}

impl Driver {
    /// With the controller not enabled.
    fn new(read_only: bool) -> Self {
        let file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..DISK_BLOCKS * 512).map(|at| (at / 512 % 251) as u8).collect();
        file.write_all_at(&bytes, 0).unwrap();
        let disk = Disk::new(file.try_clone().unwrap(), read_only).unwrap();
        let function = new(disk, &Options { serial: "test".into(), queues: 4, workers: 2 }).unwrap();
        let ram = Arc::new(Ram(Mutex::new(vec![0; RAM])));
        function.open(Arc::clone(&ram) as Arc<dyn Dma>).unwrap();
        // Memory, bus master.
        function.write(VFIO_PCI_CONFIG_REGION_INDEX, 4, &[6, 0]).unwrap();
        Self { function, ram, file, pairs: Vec::new() }
    }

    fn write32(&self, offset: u64, value: u32) {
        assert_eq!(self.function.write(VFIO_PCI_BAR0_REGION_INDEX, offset, value.as_bytes()), Ok(4));
    }

    fn read32(&self, offset: u64) -> u32 {
        let mut value = [0; 4];
        assert_eq!(self.function.read(VFIO_PCI_BAR0_REGION_INDEX, offset, &mut value), Ok(4));
        u32::from_le_bytes(value)
    }

    fn enable(&mut self) {
        self.write32(register::AQA, 15 | 15 << 16);
        assert_eq!(self.function.write(VFIO_PCI_BAR0_REGION_INDEX, register::ASQ, QUEUES.as_bytes()), Ok(8));
        self.write32(register::ACQ, (QUEUES + 0x1000) as u32);
        self.write32(register::ACQ + 4, 0);
        self.ram.write(Iova(QUEUES), &[0; QUEUE_BYTES as usize]).unwrap();
        self.write32(register::CC, 0x46_0001);
        assert_eq!(self.read32(register::CSTS), csts::READY);
        self.pairs = vec![Pair { id: 0, size: 16, tail: 0, head: 0, phase: 1 }];
    }

    /// Puts a command into a queue.
    fn submit(&mut self, pair: usize, command: Command) {
        let Pair { id, tail, size, .. } = self.pairs[pair];
        let at = QUEUES + u64::from(id) * QUEUE_BYTES + u64::from(tail) * 64;
        self.ram.write(Iova(at), command.as_bytes()).unwrap();
        self.pairs[pair].tail = (tail + 1) % size;
        self.write32(register::DOORBELLS + u64::from(id) * 8, self.pairs[pair].tail);
    }

    fn look(&self, pair: usize) -> Option<Completion> {
        let Pair { id, head, phase, .. } = self.pairs[pair];
        let at = QUEUES + u64::from(id) * QUEUE_BYTES + 0x1000 + u64::from(head) * 16;
        let mut bytes = [0; 16];
        self.ram.read(Iova(at), &mut bytes).unwrap();
        let completion = Completion::read_from_bytes(&bytes).unwrap();
        (completion.status & 1 == phase).then_some(completion)
    }

    /// Waits for the next completion, without telling the controller that it was seen.
    fn wait(&mut self, pair: usize) -> Completion {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(completion) = self.look(pair) {
                let Pair { size, head, .. } = self.pairs[pair];
                self.pairs[pair].head = (head + 1) % size;
                self.pairs[pair].phase ^= u16::from(head + 1 == size);
                return completion;
            }
            assert!(Instant::now() < end, "a command is not completed");
            std::thread::yield_now();
        }
    }

    fn seen(&self, pair: usize) {
        let Pair { id, head, .. } = self.pairs[pair];
        self.write32(register::DOORBELLS + u64::from(id) * 8 + 4, head);
    }

    /// Carries out a command: its result and status.
    fn run(&mut self, pair: usize, command: Command) -> (u32, Status) {
        let id = 0x1200 + command.id + pair as u16;
        self.submit(pair, Command { id, ..command });
        let completion = self.wait(pair);
        assert_eq!((completion.command_id, completion.sq_id), (id, self.pairs[pair].id));
        assert_eq!(u32::from(completion.sq_head), self.pairs[pair].tail);
        self.seen(pair);
        (completion.result, Status(completion.status >> 1))
    }

    fn admin(&mut self, opcode: u8, cdw10: u32, cdw11: u32) -> Result<u32, Status> {
        let command = Command { opcode, prp1: DATA, prp2: DATA + 0x1000, cdw10, cdw11, ..Default::default() };
        match self.run(0, command) {
            (result, Status::SUCCESS) => Ok(result),
            (_, status) => Err(status),
        }
    }

    /// Makes I/O queue pair `id`.
    fn create(&mut self, id: u16, size: u32, vector: u32) {
        let base = QUEUES + u64::from(id) * QUEUE_BYTES;
        self.ram.write(Iova(base), &[0; QUEUE_BYTES as usize]).unwrap();
        let cdw10 = u32::from(id) | (size - 1) << 16;
        let cq = Command {
            opcode: admin::CREATE_CQ,
            prp1: base + 0x1000,
            cdw10,
            cdw11: 3 | vector << 16,
            ..Default::default()
        };
        assert_eq!(self.run(0, cq), (0, Status::SUCCESS));
        let cdw11 = 1 | u32::from(id) << 16;
        let sq = Command { opcode: admin::CREATE_SQ, prp1: base, cdw10, cdw11, ..Default::default() };
        assert_eq!(self.run(0, sq), (0, Status::SUCCESS));
        self.pairs.push(Pair { id, size, tail: 0, head: 0, phase: 1 });
    }

    /// One that is ready, with I/O queue pair 1.
    fn ready() -> Self {
        let mut driver = Self::new(false);
        driver.enable();
        driver.create(1, 8, 1);
        driver
    }

    fn io(&mut self, opcode: u8, block: u64, blocks: u32) -> Status {
        self.run(1, transfer(opcode, block, blocks)).1
    }

    fn data(&self, at: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.ram.read(Iova(at), &mut data).unwrap();
        data
    }
}

/// A command that moves data at [`DATA`], which is contiguous; lists lie before it.
fn transfer(opcode: u8, block: u64, blocks: u32) -> Command {
    Command {
        opcode,
        namespace: NAMESPACE,
        prp1: DATA,
        prp2: if blocks * 512 > 0x2000 { DATA - 0x1000 } else { DATA + 0x1000 },
        cdw10: block as u32,
        cdw11: (block >> 32) as u32,
        cdw12: blocks.wrapping_sub(1) & 0xffff,
        ..Default::default()
    }
}

#[test]
fn registers() {
    let mut driver = Driver::new(false);
    assert_eq!(driver.read32(register::CAP) & 0xffff, 1023);
    assert_eq!(driver.read32(register::VS), 0x1_0400);
    assert_eq!((driver.read32(register::CC), driver.read32(register::CSTS)), (0, 0));
    assert_eq!(driver.function.read(VFIO_PCI_BAR0_REGION_INDEX, 0, &mut [0; 8]), Ok(8));
    // Doorbells read as zero; odd accesses are harmless.
    assert_eq!(driver.read32(register::DOORBELLS), 0);
    driver.function.write(VFIO_PCI_BAR0_REGION_INDEX, register::CC + 1, &[0xff]).unwrap();
    assert_eq!(driver.read32(register::CC), 0);
    driver.write32(register::INTMS, 5);
    driver.write32(register::INTMC, 1);
    assert_eq!(driver.read32(register::INTMC), 4);
    driver.enable();
    assert!(driver.admin(admin::IDENTIFY, 1, 0).is_ok());
    // Shutting down does not stop it; disabling does, and the admin queues' places stay.
    driver.write32(register::CC, 0x46_4001);
    assert_eq!(driver.read32(register::CSTS), csts::READY | csts::SHUTDOWN_COMPLETE);
    driver.write32(register::CC, 0);
    assert_eq!(driver.read32(register::CSTS), 0);
    assert_eq!((driver.read32(register::AQA), driver.read32(register::ASQ)), (0xf_000f, QUEUES as u32));
    driver.enable();
    assert!(driver.admin(admin::IDENTIFY, 1, 0).is_ok());
    // A reset of the function forgets them.
    driver.function.reset().unwrap();
    driver.function.write(VFIO_PCI_CONFIG_REGION_INDEX, 4, &[6, 0]).unwrap();
    assert_eq!((driver.read32(register::AQA), driver.read32(register::CSTS)), (0, 0));
    driver.enable();
}

#[test]
fn configurations_that_cannot_be() {
    let mut driver = Driver::new(false);
    for (aqa, cc) in [
        (0, 0x46_0001),
        (15, 0x46_0001),
        (0xfff_000f, 0x46_0001),
        (0xf_000f, 0x46_0081),
        (0xf_000f, 0x46_0011),
    ] {
        driver.write32(register::AQA, aqa);
        driver.write32(register::CC, cc);
        assert_eq!(driver.read32(register::CSTS), csts::FATAL, "{aqa:#x} {cc:#x}");
        driver.write32(register::DOORBELLS, 1);
        driver.write32(register::CC, 0);
        assert_eq!(driver.read32(register::CSTS), 0);
    }
    // Queues that are not in memory: the first command finds out.
    driver.write32(register::AQA, 0xf_000f);
    driver.write32(register::ASQ + 4, 1);
    driver.write32(register::CC, 0x46_0001);
    assert_eq!(driver.read32(register::CSTS), csts::READY);
    driver.write32(register::DOORBELLS, 1);
    let end = Instant::now() + Duration::from_secs(60);
    while driver.read32(register::CSTS) != csts::READY | csts::FATAL {
        assert!(Instant::now() < end);
        std::thread::yield_now();
    }
    driver.write32(register::CC, 0);
    driver.write32(register::ASQ + 4, 0);
    driver.enable();
    assert!(driver.admin(admin::IDENTIFY, 1, 0).is_ok());
    let file = tempfile::tempfile().unwrap();
    file.set_len(512).unwrap();
    for queues in [0, MAX_QUEUES + 1] {
        let disk = Disk::new(file.try_clone().unwrap(), false).unwrap();
        assert!(matches!(new(disk, &Options { queues, ..Default::default() }), Err(NvmeError::Queues(_))));
    }
}

#[test]
fn what_it_says_of_itself() {
    let mut driver = Driver::new(true);
    driver.enable();
    driver.admin(admin::IDENTIFY, 1, 0).unwrap();
    let controller = driver.data(DATA, 4096);
    assert_eq!(&controller[4..24], b"test                ");
    assert_eq!(controller[77], 8);
    assert_eq!((&controller[512..514], &controller[516..520]), (&[0x66, 0x44][..], &[1, 0, 0, 0][..]));
    let identify = |driver: &mut Driver, cdw10, namespace| {
        let command = Command { opcode: admin::IDENTIFY, namespace, prp1: DATA, cdw10, ..Default::default() };
        driver.run(0, command).1
    };
    assert_eq!(identify(&mut driver, 0, 1), Status::SUCCESS);
    let namespace = driver.data(DATA, 4096);
    assert_eq!(&namespace[..8], DISK_BLOCKS.as_bytes());
    assert_eq!((namespace[99], namespace[130]), (1, 9), "read-only, blocks of 2^9 bytes");
    assert_eq!(identify(&mut driver, 2, 0), Status::SUCCESS);
    assert_eq!(driver.data(DATA, 8), [1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(identify(&mut driver, 2, 1), Status::SUCCESS);
    assert_eq!(driver.data(DATA, 8), [0; 8]);
    assert_eq!(identify(&mut driver, 3, 1), Status::SUCCESS);
    assert_eq!((driver.data(DATA, 2), driver.data(DATA + 10, 1)[0] >> 4), (vec![3, 16], 8));
    for (what, namespace, status) in [
        (0, 0, Status::INVALID_NAMESPACE),
        (0, 2, Status::INVALID_NAMESPACE),
        (2, u32::MAX, Status::INVALID_NAMESPACE),
        (3, 7, Status::INVALID_NAMESPACE),
        (0x55, 0, Status::INVALID_FIELD),
    ] {
        assert_eq!(identify(&mut driver, what, namespace), status);
    }
    for (page, length, ok) in [
        (log::ERRORS, 16, true),
        (log::HEALTH, 128, true),
        (log::FIRMWARE, 128, true),
        (log::EFFECTS, 1024, true),
        (0x70, 1, false),
    ] {
        let page = driver.admin(admin::GET_LOG_PAGE, u32::from(page) | (length - 1) << 16, 0);
        assert_eq!(page, if ok { Ok(0) } else { Err(Status::INVALID_LOG_PAGE) });
    }
    assert_eq!(driver.admin(admin::GET_LOG_PAGE, 2, 0xffff), Err(Status::INVALID_FIELD), "17 GiB");
    let offset = |driver: &mut Driver, cdw12| {
        let command =
            Command { opcode: admin::GET_LOG_PAGE, prp1: DATA, cdw10: 3, cdw12, ..Default::default() };
        driver.run(0, command).1
    };
    assert_eq!(offset(&mut driver, 8), Status::SUCCESS);
    assert_eq!(driver.data(DATA, 4), env!("CARGO_PKG_VERSION").as_bytes()[..4]);
    assert_eq!(
        (offset(&mut driver, 6), offset(&mut driver, 516)),
        (Status::INVALID_FIELD, Status::INVALID_FIELD)
    );
    assert_eq!(driver.admin(0x99, 0, 0), Err(Status::INVALID_OPCODE));
    assert_eq!(driver.admin(admin::ABORT, 0, 0), Ok(1));
}

#[test]
fn features() {
    let mut driver = Driver::new(false);
    driver.enable();
    assert_eq!(driver.admin(admin::SET_FEATURES, feature::QUEUES.into(), 0x3f_003f), Ok(0x3_0003));
    assert_eq!(driver.admin(admin::SET_FEATURES, feature::QUEUES.into(), 0xffff), Err(Status::INVALID_FIELD));
    assert_eq!(driver.admin(admin::GET_FEATURES, feature::QUEUES.into(), 0), Ok(0x3_0003));
    assert_eq!(driver.admin(admin::GET_FEATURES, feature::WRITE_CACHE.into(), 0), Ok(1));
    assert_eq!(driver.admin(admin::SET_FEATURES, feature::WRITE_CACHE.into(), 0), Ok(0));
    assert_eq!(driver.admin(admin::GET_FEATURES, feature::WRITE_CACHE.into(), 0), Ok(0));
    assert_eq!(driver.admin(admin::SET_FEATURES, feature::TEMPERATURE.into(), 300), Ok(0));
    assert_eq!(driver.admin(admin::GET_FEATURES, feature::TEMPERATURE.into(), 0), Ok(300));
    assert_eq!(driver.admin(admin::GET_FEATURES, feature::VECTOR.into(), 9), Err(Status::INVALID_FIELD));
    assert_eq!(driver.admin(admin::SET_FEATURES, 1 << 31 | 4, 0), Err(Status::NOT_SAVEABLE));
    assert_eq!(driver.admin(admin::SET_FEATURES, 0x50, 0), Err(Status::INVALID_FIELD));
    assert_eq!(driver.admin(admin::GET_FEATURES, 0x50, 0), Err(Status::INVALID_FIELD));
    // A controller reset puts them back.
    driver.write32(register::CC, 0);
    driver.enable();
    assert_eq!(driver.admin(admin::GET_FEATURES, feature::WRITE_CACHE.into(), 0), Ok(1));
    assert_eq!(driver.admin(admin::GET_FEATURES, feature::TEMPERATURE.into(), 0), Ok(343));
}

#[test]
fn queues_are_made_and_deleted() {
    let mut driver = Driver::ready();
    for (what, opcode, cdw10, cdw11, prp1, status) in [
        ("queue 0", admin::CREATE_CQ, 7 << 16, 1, DATA, Status::INVALID_QUEUE),
        ("a queue too many", admin::CREATE_CQ, 7 << 16 | 5, 1, DATA, Status::INVALID_QUEUE),
        ("one that exists", admin::CREATE_CQ, 7 << 16 | 1, 1, DATA, Status::INVALID_QUEUE),
        ("one entry", admin::CREATE_CQ, 2, 1, DATA, Status::INVALID_QUEUE_SIZE),
        ("1025 entries", admin::CREATE_CQ, 1024 << 16 | 2, 1, DATA, Status::INVALID_QUEUE_SIZE),
        ("in pieces", admin::CREATE_CQ, 7 << 16 | 2, 0, DATA, Status::INVALID_FIELD),
        ("not at a page", admin::CREATE_CQ, 7 << 16 | 2, 1, DATA + 8, Status::INVALID_PRP),
        ("vector 5", admin::CREATE_CQ, 7 << 16 | 2, 3 | 5 << 16, DATA, Status::INVALID_VECTOR),
        ("without completions", admin::CREATE_SQ, 7 << 16 | 2, 1 | 2 << 16, DATA, Status::CQ_INVALID),
        ("the admin queue's", admin::CREATE_SQ, 7 << 16 | 2, 1, DATA, Status::CQ_INVALID),
        ("number 9's", admin::CREATE_SQ, 7 << 16 | 2, 1 | 9 << 16, DATA, Status::CQ_INVALID),
        ("one that exists", admin::CREATE_SQ, 7 << 16 | 1, 1 | 1 << 16, DATA, Status::INVALID_QUEUE),
        ("in use", admin::DELETE_CQ, 1, 0, 0, Status::INVALID_DELETION),
        ("the admin queue", admin::DELETE_CQ, 0, 0, 0, Status::INVALID_QUEUE),
        ("the admin queue", admin::DELETE_SQ, 0, 0, 0, Status::INVALID_QUEUE),
        ("none", admin::DELETE_SQ, 3, 0, 0, Status::INVALID_QUEUE),
        ("none", admin::DELETE_CQ, 3, 0, 0, Status::INVALID_QUEUE),
        ("far away", admin::DELETE_SQ, 0xffff, 0, 0, Status::INVALID_QUEUE),
    ] {
        let command = Command { opcode, prp1, cdw10, cdw11, ..Default::default() };
        assert_eq!(driver.run(0, command).1, status, "{what}, {opcode}");
    }
    assert_eq!(driver.io(opcode::READ, 0, 1), Status::SUCCESS);
    assert_eq!(driver.admin(admin::DELETE_SQ, 1, 0), Ok(0));
    assert_eq!(driver.admin(admin::DELETE_CQ, 1, 0), Ok(0));
    driver.pairs.pop();
    driver.create(1, 4, 1);
    // Round the ring, more than once.
    for block in 0..11 {
        assert_eq!(driver.io(opcode::READ, block, 1), Status::SUCCESS);
        assert_eq!(driver.data(DATA, 1), [block as u8]);
    }
}

#[test]
fn data_moves() {
    let mut driver = Driver::ready();
    assert_eq!(driver.io(opcode::READ, 7, 16), Status::SUCCESS);
    let mut expected = vec![0; 0x2000];
    driver.file.read_exact_at(&mut expected, 7 * 512).unwrap();
    assert!(driver.data(DATA, 0x2000) == expected);

    // The longest transfer, with a list of pages that lie backwards, and back again.
    let pages: Vec<u64> = (1..256u64).map(|page| DATA + 0x10_0000 + (256 - page) * 0x1000).collect();
    driver.ram.write(Iova(DATA - 0x1000), pages.as_bytes()).unwrap();
    let bytes: Vec<u8> = (0..1u32 << 20).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    for (page, at) in bytes.chunks(4096).zip([DATA].iter().chain(&pages)) {
        driver.ram.write(Iova(*at), page).unwrap();
    }
    assert_eq!(driver.io(opcode::WRITE, 1024, 2048), Status::SUCCESS);
    let mut back = vec![0; 1 << 20];
    driver.file.read_exact_at(&mut back, 1024 * 512).unwrap();
    assert!(back == bytes);
    driver.ram.write(Iova(DATA + 0x10_0000), &[0; 1 << 20]).unwrap();
    assert_eq!(driver.io(opcode::READ, 1024, 2048), Status::SUCCESS);
    assert!(driver.data(pages[254], 4096) == bytes[255 * 4096..]);
    assert_eq!(driver.io(opcode::COMPARE, 1024, 2048), Status::SUCCESS);
    driver.ram.write(Iova(pages[100]), &[bytes[101 * 4096] ^ 1]).unwrap();
    assert_eq!(driver.io(opcode::COMPARE, 1024, 2048), Status::COMPARE_FAILURE);

    assert_eq!(driver.io(opcode::WRITE_ZEROES, 1030, 3), Status::SUCCESS);
    let trim = [
        DatasetRange { attributes: 0, blocks: 8, start: 2048 },
        DatasetRange { start: 4095, blocks: 1, attributes: 0 },
    ];
    driver.ram.write(Iova(DATA), trim.as_bytes()).unwrap();
    let command = Command {
        opcode: opcode::DATASET_MANAGEMENT,
        namespace: 1,
        prp1: DATA,
        cdw10: 1,
        cdw11: 4,
        ..Default::default()
    };
    assert_eq!(driver.run(1, command).1, Status::SUCCESS);
    driver.file.read_exact_at(&mut back, 1024 * 512).unwrap();
    assert_eq!(back[6 * 512..9 * 512], [0; 3 * 512]);
    assert!(back[9 * 512..][..512 * 1015] == bytes[9 * 512..][..512 * 1015]);
    assert_eq!(back[1024 * 512..1032 * 512], [0; 8 * 512]);
    assert_eq!(driver.io(opcode::VERIFY, 0, 0x1000), Status::SUCCESS);
    assert_eq!(driver.io(opcode::FLUSH, 0, 1), Status::SUCCESS);
    // With the cache turned off, and forced past it.
    driver.admin(admin::SET_FEATURES, feature::WRITE_CACHE.into(), 0).unwrap();
    assert_eq!(driver.io(opcode::WRITE, 0, 1), Status::SUCCESS);
    let forced = Command { cdw12: 1 << 30, ..transfer(opcode::WRITE, 1, 1) };
    assert_eq!(driver.run(1, forced).1, Status::SUCCESS);
}

#[test]
fn commands_that_fail() {
    let mut driver = Driver::ready();
    for (what, command, status) in [
        ("beyond the disk", transfer(opcode::READ, DISK_BLOCKS, 1), Status::OUT_OF_RANGE),
        ("across its end", transfer(opcode::WRITE, DISK_BLOCKS - 1, 2), Status::OUT_OF_RANGE),
        ("around", transfer(opcode::WRITE_ZEROES, u64::MAX, 2), Status::OUT_OF_RANGE),
        ("too long", transfer(opcode::READ, 0, 2049), Status::INVALID_FIELD),
        (
            "another namespace",
            Command { namespace: 2, ..transfer(opcode::READ, 0, 1) },
            Status::INVALID_NAMESPACE,
        ),
        (
            "all namespaces",
            Command { namespace: !0, ..transfer(opcode::READ, 0, 1) },
            Status::INVALID_NAMESPACE,
        ),
        (
            "no namespace",
            Command { namespace: 0, ..transfer(opcode::FLUSH, 0, 1) },
            Status::INVALID_NAMESPACE,
        ),
        ("no command", transfer(0x7f, 0, 1), Status::INVALID_OPCODE),
        ("fused", Command { flags: 1, ..transfer(opcode::READ, 0, 1) }, Status::INVALID_FIELD),
        ("SGL", Command { flags: 0x40, ..transfer(opcode::READ, 0, 1) }, Status::INVALID_FIELD),
        (
            "memory that is not there",
            Command { prp1: RAM as u64, ..transfer(opcode::READ, 0, 1) },
            Status::DATA_TRANSFER,
        ),
        ("half of it", Command { prp2: 1 << 40, ..transfer(opcode::READ, 0, 16) }, Status::DATA_TRANSFER),
        ("odd memory", Command { prp1: DATA + 1, ..transfer(opcode::WRITE, 0, 1) }, Status::INVALID_PRP),
        (
            "a list nowhere",
            Command { prp2: u64::MAX - 7, ..transfer(opcode::WRITE, 0, 64) },
            Status::DATA_TRANSFER,
        ),
    ] {
        assert_eq!(driver.run(1, command).1, status, "{what}");
    }
    let mut driver = Driver::new(true);
    driver.enable();
    driver.create(1, 8, 1);
    for opcode in [opcode::WRITE, opcode::WRITE_ZEROES] {
        assert_eq!(driver.io(opcode, 0, 1), Status::WRITE_PROTECTED);
    }
    assert_eq!(driver.io(opcode::READ, 0, 1), Status::SUCCESS);
    // What the host fails at: the file is not open for writing after all.
    let path = tempfile::NamedTempFile::new().unwrap();
    path.as_file().set_len(1 << 20).unwrap();
    let disk = Disk::new(File::open(path.path()).unwrap(), false).unwrap();
    let function = new(disk, &Options::default()).unwrap();
    function.open(Arc::clone(&driver.ram) as Arc<dyn Dma>).unwrap();
    function.write(VFIO_PCI_CONFIG_REGION_INDEX, 4, &[6, 0]).unwrap();
    driver.function = function;
    driver.enable();
    driver.create(1, 8, 1);
    assert_eq!(driver.io(opcode::WRITE, 0, 1), Status::WRITE_FAULT);
    assert_eq!(driver.io(opcode::READ, 0, 1), Status::SUCCESS);
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap()
}

/// How often it was signalled. Waits for the first time.
fn signals(event: &OwnedFd) -> u64 {
    let mut fds = [PollFd::new(event, PollFlags::IN)];
    assert_eq!(poll(&mut fds, Some(&Timespec { tv_sec: 60, tv_nsec: 0 })), Ok(1), "no interrupt");
    let mut count = [0; 8];
    rustix::io::read(event, &mut count).unwrap();
    u64::from_ne_bytes(count)
}

fn is_quiet(event: &OwnedFd) -> bool {
    rustix::io::read(event, &mut [0; 8]) == Err(rustix::io::Errno::AGAIN)
}

#[test]
fn message_interrupts() {
    let mut driver = Driver::new(false);
    let events: Vec<_> = (0..5).map(|_| event()).collect();
    let given = events.iter().map(|event| Some(event.try_clone().unwrap())).collect();
    let set = IrqSet {
        index: VFIO_PCI_MSIX_IRQ_INDEX,
        start: 0,
        count: 5,
        action: IrqAction::Trigger,
        data: IrqData::EventFd(given),
    };
    driver.function.set_irqs(set).unwrap();
    driver.enable();
    driver.create(1, 16, 3);
    assert!(signals(&events[0]) >= 2);
    for number in 0..10 {
        driver.submit(1, Command { id: number, ..transfer(opcode::READ, 0, 1) });
    }
    let mut count = 0;
    for number in 0..10 {
        assert_eq!(driver.wait(1).command_id, number);
    }
    // As many as ten, and fewer when several were done at a time.
    while count == 0 {
        count += signals(&events[3]);
    }
    assert!((1..=10).contains(&count));
    assert!(is_quiet(&events[1]) && is_quiet(&events[2]) && is_quiet(&events[4]));
}

#[test]
fn the_interrupt_pin() {
    let mut driver = Driver::new(false);
    let event = event();
    let intx = |driver: &Driver, action, data| {
        let set = IrqSet { index: VFIO_PCI_INTX_IRQ_INDEX, start: 0, count: 1, action, data };
        driver.function.set_irqs(set).unwrap();
    };
    let given = IrqData::EventFd(vec![Some(event.try_clone().unwrap())]);
    intx(&driver, IrqAction::Trigger, given);
    driver.enable();
    driver.submit(0, Command { opcode: admin::ABORT, ..Default::default() });
    driver.wait(0);
    assert_eq!(signals(&event), 1);
    // It is still high, since the driver has not said that it has seen the completion.
    intx(&driver, IrqAction::Unmask, IrqData::None);
    assert_eq!(signals(&event), 1);
    driver.seen(0);
    intx(&driver, IrqAction::Unmask, IrqData::None);
    assert!(is_quiet(&event));
    // Masked in the controller.
    driver.write32(register::INTMS, 1);
    driver.submit(0, Command { opcode: admin::ABORT, ..Default::default() });
    driver.wait(0);
    driver.write32(register::INTMC, 1);
    assert_eq!(signals(&event), 1);
}

#[test]
fn completions_wait_for_room() {
    let mut driver = Driver::new(false);
    driver.enable();
    driver.create(1, 4, 1);
    // Two submission queues for one completion queue of four entries, three of which can be used.
    let base = QUEUES + 2 * QUEUE_BYTES;
    let cdw10 = 2 | 15 << 16;
    let sq =
        Command { opcode: admin::CREATE_SQ, prp1: base, cdw10, cdw11: 1 | 1 << 16, ..Default::default() };
    assert_eq!(driver.run(0, sq).1, Status::SUCCESS);
    driver.pairs.push(Pair { id: 2, size: 16, tail: 0, head: 0, phase: 1 });
    for number in 0..12 {
        driver.submit(2, Command { id: 100 + number, ..transfer(opcode::READ, 0, 1) });
    }
    for number in 0..3 {
        driver.submit(1, Command { id: number, ..transfer(opcode::READ, 0, 1) });
    }
    let mut first = Vec::new();
    let mut second = Vec::new();
    for _ in 0..15 {
        let completion = driver.wait(1);
        match completion.sq_id {
            1 => first.push(completion.command_id),
            _ => second.push(completion.command_id),
        }
        driver.seen(1);
    }
    assert_eq!((first, second), ((0..3).collect::<Vec<_>>(), (100..112).collect::<Vec<_>>()));
}

#[test]
fn events_are_reported() {
    let mut driver = Driver::ready();
    for id in 0..4 {
        driver.submit(0, Command { opcode: admin::ASYNC_EVENT, id, ..Default::default() });
    }
    assert_eq!(driver.admin(admin::ASYNC_EVENT, 0, 0), Err(Status::TOO_MANY_EVENTS));
    // A doorbell of a queue that is not there.
    driver.write32(register::DOORBELLS + 8 * 3, 1);
    let completion = driver.wait(0);
    assert_eq!((completion.command_id, completion.result, completion.status >> 1), (0, 0x1_0000, 0));
    driver.seen(0);
    // No other of its kind until the log was read.
    driver.write32(register::DOORBELLS + 8, 99);
    driver.admin(admin::GET_LOG_PAGE, 15 << 16 | 1 << 15 | u32::from(log::ERRORS), 0).unwrap();
    driver.admin(admin::GET_LOG_PAGE, 15 << 16 | u32::from(log::ERRORS), 0).unwrap();
    driver.write32(register::DOORBELLS + 8, 99);
    let completion = driver.wait(0);
    assert_eq!((completion.command_id, completion.result), (1, 0x1_0100), "a value that cannot be");
}

#[test]
fn a_driver_without_bus_mastering() {
    let mut driver = Driver::ready();
    driver.function.write(VFIO_PCI_CONFIG_REGION_INDEX, 4, &[2, 0]).unwrap();
    driver.submit(1, transfer(opcode::READ, 0, 1));
    let end = Instant::now() + Duration::from_secs(60);
    while driver.read32(register::CSTS) & csts::FATAL == 0 {
        assert!(Instant::now() < end);
        std::thread::yield_now();
    }
    assert!(driver.look(1).is_none());
    driver.function.close();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 50, failure_persistence: None, ..Default::default() })]

    /// Any commands, with whatever is in memory.
    #[test]
    fn any_commands(
        commands in prop::collection::vec((any::<bool>(), any::<u8>(), any::<[u32; 8]>(), any::<[u16; 4]>()), 1..60),
    ) {
        let mut driver = Driver::ready();
        for (admin, opcode, words, small) in commands {
            let [cdw10, cdw11, cdw12, namespace, a, b, c, d] = words;
            // Mostly something that nearly makes sense.
            let shrink = |word: u32, by: u16| if by & 3 == 0 { word } else { word & u32::from(by >> 4) };
            let command = Command {
                opcode: if small[0] & 1 == 0 { opcode & 0xf } else { opcode },
                flags: if small[0] & 0xf0 == 0 { opcode } else { 0 },
                id: 7,
                namespace: if small[0] & 6 == 0 { namespace } else { 1 },
                prp1: (u64::from(shrink(a, small[3])) << 32 | u64::from(b)) & !3 & if small[0] & 8 == 0 { !0 } else { 0x3f_fffc },
                prp2: (u64::from(shrink(c, small[3])) << 32 | u64::from(d)) & !0xfff,
                cdw10: shrink(cdw10, small[1]),
                cdw11: shrink(cdw11, small[2]),
                cdw12: shrink(cdw12, small[1]),
                ..Default::default()
            };
            // Events and queues change what the driver would have to do next.
            let pair = usize::from(!admin);
            if admin && (command.opcode < 2 || (4..6).contains(&command.opcode) || command.opcode == 0xc) {
                continue;
            }
            driver.submit(pair, command);
            let mut seen = None;
            while driver.read32(register::CSTS) & csts::FATAL == 0 && seen.is_none() {
                seen = driver.look(pair);
                std::thread::yield_now();
            }
            if seen.is_none() || driver.look(pair).is_none_or(|completion| completion.command_id != 7) {
                // The data of a command has hit the queues: a driver's mistake, and its end.
                break;
            }
            driver.wait(pair);
            driver.seen(pair);
        }
        driver.function.reset().unwrap();
        prop_assert_eq!(driver.read32(register::CSTS), 0);
    }

    /// Any writes to registers.
    #[test]
    fn any_registers(writes in prop::collection::vec((0u64..0x1020, any::<u32>(), 0u8..6), 0..80)) {
        let mut driver = Driver::ready();
        for (offset, value, kind) in writes {
            let (offset, value) = match kind {
                0 => (register::CC, 0x46_0000 | value & 1),
                1 => (register::DOORBELLS + (offset & 0x1c), value & 0xf),
                2 => (offset & !3, value & 0xff),
                _ => (offset & !3, value),
            };
            driver.write32(offset, value);
            driver.read32(offset & 0x3c);
        }
        driver.function.reset().unwrap();
        driver.function.write(VFIO_PCI_CONFIG_REGION_INDEX, 4, &[6, 0]).unwrap();
        driver.enable();
        prop_assert!(driver.admin(admin::IDENTIFY, 1, 0).is_ok());
    }
}

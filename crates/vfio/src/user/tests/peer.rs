//! Our client on a server of crate `vfio_user`, which is rust-vmm's, and its client on our server.
//!
//! What that crate has not cannot be tested with it: DMA by messages, WRITE_MULTI, DEVICE_FEATURE, posted writes of its client.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use tempfile::TempDir;
use uapi::vfio::{
    VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE,
    VFIO_PCI_CONFIG_REGION_INDEX as CONFIG, VFIO_PCI_MSIX_IRQ_INDEX as MSIX, VFIO_PCI_NUM_IRQS,
    VFIO_PCI_NUM_REGIONS, VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_READ,
    VFIO_REGION_INFO_FLAG_WRITE,
};
use vfio_bindings::bindings::vfio as theirs;
use vfio_user::{Client, DmaMapFlags, DmaUnmapFlags, ServerBackend, ServerRegion, SparseArea};

use super::*;
use crate::device::{Area, DeviceFlags, Mappable, RegionFlags};
use crate::devices::test;
use crate::user::testing::VECTORS;

/// BAR 0 of [`Theirs`]: 4 KiB.
const BAR: u32 = 0;
/// Writing an address here inverts 16 bytes there, and signals a vector by whether that was possible.
const INVERT: u64 = 0x800;
const DONE: usize = 0;
const FAULT: usize = 2;

/// A device behind their server, and what it was told.
#[derive(Default)]
struct Theirs {
    config: Vec<u8>,
    registers: Vec<u8>,
    memory: BTreeMap<u64, (File, u64, u64)>,
    eventfds: BTreeMap<u32, File>,
    resets: usize,
}

impl Theirs {
    fn new() -> Self {
        let mut config = vec![0; 256];
        config[..4].copy_from_slice(&[0xf4, 0x1a, 0x78, 0x56]);
        Self { config, registers: vec![0; 0x1000], ..Self::default() }
    }

    fn bytes(&mut self, region: u32) -> io::Result<&mut Vec<u8>> {
        match region {
            BAR => Ok(&mut self.registers),
            CONFIG => Ok(&mut self.config),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    fn invert(&self, at: u64) -> io::Result<()> {
        let found =
            self.memory.range(..=at).next_back().filter(|(start, (_, _, size))| at + 16 <= *start + size);
        let (start, (file, offset, _)) = found.ok_or(io::ErrorKind::NotFound)?;
        let mut bytes = [0; 16];
        file.read_exact_at(&mut bytes, at - start + offset)?;
        file.write_all_at(&bytes.map(|byte| !byte), at - start + offset)
    }
}

impl ServerBackend for Theirs {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        data.copy_from_slice(&self.bytes(region)?[offset as usize..][..data.len()]);
        Ok(())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        self.bytes(region)?[offset as usize..][..data.len()].copy_from_slice(data);
        if (region, offset) == (BAR, INVERT) {
            let done = self.invert(u64::from_le_bytes(data.try_into().unwrap())).is_ok();
            let vector = if done { DONE } else { FAULT };
            rustix::io::write(&self.eventfds[&(vector as u32)], &1u64.to_ne_bytes())?;
        }
        Ok(())
    }

    fn dma_map(
        &mut self,
        flags: DmaMapFlags,
        offset: u64,
        address: u64,
        size: u64,
        fd: Option<File>,
    ) -> io::Result<()> {
        assert_eq!(flags, DmaMapFlags::READ_WRITE);
        self.memory.insert(address, (fd.ok_or(io::ErrorKind::InvalidInput)?, offset, size));
        Ok(())
    }

    fn dma_unmap(&mut self, _flags: DmaUnmapFlags, address: u64, size: u64) -> io::Result<()> {
        let (_, _, length) = self.memory.remove(&address).ok_or(io::ErrorKind::NotFound)?;
        assert_eq!(length, size);
        Ok(())
    }

    fn reset(&mut self) -> io::Result<()> {
        self.registers.fill(0);
        self.resets += 1;
        Ok(())
    }

    fn set_irqs(&mut self, index: u32, flags: u32, start: u32, count: u32, fds: Vec<File>) -> io::Result<()> {
        assert_eq!(index, MSIX);
        if flags == VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER && count == 0 {
            self.eventfds.clear();
            return Ok(());
        }
        assert_eq!(flags, VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER);
        assert_eq!(fds.len(), count as usize);
        self.eventfds.extend((start..).zip(fds));
        Ok(())
    }
}

/// A directory for a socket.
fn place() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    (directory, path)
}

/// Their server with [`Theirs`], whose region 2 is a file of 3 pages that can be mapped but for the second.
fn their_server(path: &std::path::Path, pages: &File) -> vfio_user::Server {
    let read_write = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;
    let region = |index| {
        let (size, flags) = match index {
            BAR => (0x1000, read_write),
            2 => (0x3000, read_write | VFIO_REGION_INFO_FLAG_MMAP),
            CONFIG => (256, read_write),
            _ => (0, 0),
        };
        let argsz = size_of::<theirs::vfio_region_info>() as u32;
        let region_info = theirs::vfio_region_info { argsz, flags, index, size, ..Default::default() };
        let area =
            |offset| SparseArea { area: theirs::vfio_region_sparse_mmap_area { offset, size: 0x1000 } };
        let sparse_areas = if index == 2 { vec![area(0), area(0x2000)] } else { Vec::new() };
        ServerRegion { region_info, sparse_areas, mmap_fd: (index == 2).then(|| pages.as_raw_fd()) }
    };
    let irq = |index| vfio_user::IrqInfo {
        index,
        flags: VFIO_IRQ_INFO_EVENTFD,
        count: if index == MSIX { 3 } else { 0 },
    };
    let regions = (0..VFIO_PCI_NUM_REGIONS).map(region).collect();
    vfio_user::Server::new(path, true, (0..VFIO_PCI_NUM_IRQS).map(irq).collect(), regions).unwrap()
}

fn signals(eventfd: &OwnedFd) -> u64 {
    let mut count = [0; 8];
    rustix::io::read(eventfd, &mut count).unwrap();
    u64::from_ne_bytes(count)
}

#[test]
fn our_client_uses_their_server() {
    let ((_directory, path), pages) = (place(), memfd(0x3000));
    pages.write_all_at(b"pages", 0x2000).unwrap();
    let server = their_server(&path, &pages);
    let thread = thread::spawn(move || {
        let mut device = Theirs::new();
        server.run(&mut device).map(|()| (device, server))
    });
    let options = client::Options { patience: LONG, export: None, ..Default::default() };
    let device = RemoteDevice::connect(UnixStream::connect(&path).unwrap().into(), options).unwrap();

    // What it is.
    let info = device.info().unwrap();
    assert_eq!((info.flags, info.regions), (DeviceFlags::PCI | DeviceFlags::RESET, VFIO_PCI_NUM_REGIONS));
    let bar = Device::region(&device, 2).unwrap();
    let areas = [0, 0x2000].map(|offset| Area { offset, size: 0x1000 });
    assert_eq!(bar.mappable, Mappable::Areas(areas.into()));
    assert_eq!((bar.size, bar.flags), (0x3000, RegionFlags::READ | RegionFlags::WRITE));
    let mut bytes = [0; 5];
    rustix::io::pread(device.region_file(2).unwrap().file, &mut bytes, 0x2000).unwrap();
    assert_eq!(&bytes, b"pages");
    assert_eq!((device.irq(MSIX).unwrap().count, device.irq(0).unwrap().count), (3, 0));
    assert!(device.migration().is_none() && device.dma_logging().is_none());

    // Configuration space and registers, waited for and not.
    device.open(Arc::new(NoDma)).unwrap();
    let mut ids = [0; 4];
    assert_eq!(device.read(CONFIG, 0, &mut ids), Ok(4));
    assert_eq!(ids, [0xf4, 0x1a, 0x78, 0x56]);
    assert_eq!(device.write(CONFIG, 4, &[6, 4]), Ok(2));
    let writes = [(8, &[1; 4]), (16, &[2; 4])];
    device.write_many(&writes.map(|(offset, data)| RegionWrite { region: BAR, offset, data })).unwrap();
    let mut registers = [0; 12];
    assert_eq!(device.read(BAR, 8, &mut registers), Ok(12));
    assert_eq!(registers, [1, 1, 1, 1, 0, 0, 0, 0, 2, 2, 2, 2]);

    // Memory and interrupts: its server takes one descriptor a message.
    let eventfds = [(); 3].map(|()| eventfd(0, EventfdFlags::empty()).unwrap());
    let given = eventfds.each_ref().map(|it| Some(it.try_clone().unwrap())).into();
    let (action, data) = (IrqAction::Trigger, IrqData::EventFd(given));
    device.set_irqs(IrqSet { index: MSIX, start: 0, count: 3, action, data }).unwrap();
    let memory = memfd(0x4000);
    memory.write_all_at(&[0xf0; 16], 0x1020).unwrap();
    let (range, file) = (range(0x10_0000, 0x2000), Some((memory.as_fd(), 0x1000)));
    device.map_memory(&MemoryWindow { range, prot: Prot::READ | Prot::WRITE, file }).unwrap();
    device.write(BAR, INVERT, &0x10_0020u64.to_le_bytes()).unwrap();
    assert_eq!(signals(&eventfds[DONE]), 1);
    let mut inverted = [0; 16];
    memory.read_exact_at(&mut inverted, 0x1020).unwrap();
    assert_eq!(inverted, [0x0f; 16]);
    device.unmap_memory(range).unwrap();
    device.write(BAR, INVERT, &0x10_0020u64.to_le_bytes()).unwrap();
    assert_eq!(signals(&eventfds[FAULT]), 1);

    device.reset().unwrap();
    assert_eq!(device.read(BAR, 8, &mut registers), Ok(12));
    assert_eq!(registers, [0; 12]);
    device.close();
    drop(device);
    let (device, _server) = thread.join().unwrap().unwrap();
    assert_eq!((device.resets, &device.config[4..6]), (1, &[6, 4][..]));
    assert!(device.eventfds.is_empty() && device.memory.is_empty());
}

/// Serves one connection.
fn our_server(device: Arc<dyn Device>) -> (TempDir, Client, JoinHandle<Broken>) {
    let (directory, path) = place();
    let listener = UnixListener::bind(&path).unwrap();
    let options = server::Options { patience: LONG, ..Default::default() };
    let thread = thread::spawn(move || {
        let (socket, _) = listener.accept().unwrap();
        Server::new(device, options).serve(socket.into())
    });
    (directory, Client::new(&path).unwrap(), thread)
}

#[test]
fn their_client_uses_our_server() {
    let model = Arc::new(Model::new());
    let (_directory, mut client, thread) = our_server(Arc::clone(&model) as _);
    // Not `resettable`, whose answer of this client (0.1.7) is the opposite of what it was told.
    let bar = client.region(MEMORY).unwrap();
    let areas: Vec<_> = bar.sparse_areas.iter().map(|area| (area.offset, area.size)).collect();
    assert_eq!(areas, [(0, 0x1000), (0x2000, 0x2000)]);
    assert!(bar.file_offset.is_some());
    let irq = client.get_irq_info(IRQ).unwrap();
    assert_eq!((irq.count, irq.flags & VFIO_IRQ_INFO_EVENTFD), (VECTORS, VFIO_IRQ_INFO_EVENTFD));

    let data = noise(1, 0x1_2345);
    client.region_write(REGISTERS, 0x77, &data).unwrap();
    let mut back = vec![0; data.len()];
    client.region_read(REGISTERS, 0x77, &mut back).unwrap();
    assert_eq!(back, data);

    // The device copies within the client's memory, and signals.
    let (memory, length) = (memfd(2 * COPY_LENGTH as u64 + 0x1000), 2 * COPY_LENGTH as u64);
    let data = noise(2, COPY_LENGTH);
    memory.write_all_at(&data, 0x1000).unwrap();
    client.dma_map(0x1000, 0x40_0000, length, memory.as_raw_fd()).unwrap();
    model.calls();
    client.region_write(REGISTERS, COPY, &0x40_0000u64.to_le_bytes()).unwrap();
    assert_eq!(model.calls(), ["copy Ok(())"]);
    let mut copied = vec![0; COPY_LENGTH];
    memory.read_exact_at(&mut copied, 0x1000 + COPY_LENGTH as u64).unwrap();
    assert!(copied == data);
    let eventfds = [(); VECTORS as usize].map(|()| eventfd(0, EventfdFlags::empty()).unwrap());
    let raw = eventfds.each_ref().map(|eventfd| eventfd.as_raw_fd());
    let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
    client.set_irqs(IRQ, flags, 0, VECTORS, &raw).unwrap();
    assert!(model.signal(3));
    assert_eq!(signals(&eventfds[3]), 1);

    client.dma_unmap(0x40_0000, length).unwrap();
    model.calls();
    client.region_write(REGISTERS, COPY, &0x40_0000u64.to_le_bytes()).unwrap();
    assert_eq!(model.calls(), ["copy Err(Unmapped(iova 0x400000))"]);
    client.reset().unwrap();
    client.region_read(REGISTERS, 0x77, &mut back).unwrap();
    assert!(back.iter().all(|byte| *byte == 0));
    client.shutdown().unwrap();
    assert!(matches!(thread.join().unwrap(), Broken::Closed), "it ends when the client goes");
}

/// Configuration space of a device that has one.
#[test]
fn their_client_uses_our_function() {
    let (_directory, mut client, thread) = our_server(Arc::new(test::function().unwrap()));
    let mut header = [0; 64];
    client.region_read(CONFIG, 0, &mut header).unwrap();
    let mut expected = [0; 64];
    test::function().unwrap().read(CONFIG, 0, &mut expected).unwrap();
    // Of a device that is open BARs are on.
    expected[4] = 3;
    assert_eq!(header, expected);
    // Memory is enabled, and its device master of the bus.
    client.region_write(CONFIG, 4, &[6, 0]).unwrap();
    client.region_read(CONFIG, 0, &mut header).unwrap();
    assert_eq!(header[4], 6);
    assert!(client.get_irq_info(MSIX).unwrap().count > 0);
    client.shutdown().unwrap();
    assert!(matches!(thread.join().unwrap(), Broken::Closed), "it ends when the client goes");
}

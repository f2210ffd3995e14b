//! Client against server.

mod hostile;
mod peer;
mod transport;

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use iommufd::domain::{DirtySink, Prot};
use iommufd::iova::{Iova, IovaRange};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::MemfdFlags;
use zerocopy::FromBytes;

use super::Errno;
use super::client::{self, MemoryWindow, RegionWrite, RemoteDevice};
use super::connection::Patience;
use super::server::{self, Server};
use super::testing::{COPY, COPY_LENGTH, IRQ, MEMORY, Model, REGISTERS, SCRATCH_SIZE};
use super::transport::Broken;
use super::version::Capabilities;
use crate::device::Device;
use crate::dma::{Dma, DmaFault, NoDma};
use crate::irq::{IrqAction, IrqData, IrqSet};
use crate::migration::State;

/// Long enough that it never ends a test that does not hang.
const LONG: Patience = Patience { message: Duration::from_secs(60), reply: Duration::from_secs(60) };

/// A device, and the thread that serves it.
struct Served {
    model: Arc<Model>,
    thread: JoinHandle<Broken>,
}

fn serve(socket: UnixStream, capabilities: Capabilities, patience: Patience) -> Served {
    let model = Arc::new(Model::new());
    let device = Arc::clone(&model);
    let options = server::Options { patience, capabilities };
    let thread = thread::spawn(move || Server::new(device, options).serve(socket.into()));
    Served { model, thread }
}

fn connected(capabilities: Capabilities, options: client::Options) -> (Served, RemoteDevice) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let served = serve(theirs, capabilities, LONG);
    let device = RemoteDevice::connect(ours.into(), client::Options { patience: LONG, ..options }).unwrap();
    (served, device)
}

fn plain() -> (Served, RemoteDevice) {
    connected(Capabilities::OURS, client::Options::default())
}

/// The ways in which commands can cross.
fn all_ways() -> [(Served, RemoteDevice); 3] {
    let no_twin = Capabilities { twin_socket: false, ..Capabilities::OURS };
    let small = Capabilities { max_transfer: 4096, max_fds: 2, write_multiple: false, ..no_twin };
    [
        plain(),
        connected(no_twin, client::Options { posted_writes: false, ..Default::default() }),
        connected(Capabilities::OURS, client::Options { capabilities: small, ..Default::default() }),
    ]
}

fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..length).map(|_| next()).collect()
}

fn memfd(length: u64) -> File {
    let file = File::from(rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(length).unwrap();
    file
}

fn range(start: u64, length: u64) -> IovaRange {
    IovaRange::with_length(Iova(start), length).unwrap()
}

/// Memory of the client that has no file.
#[derive(Debug, Default)]
struct Private(Mutex<Vec<u8>>);

impl Dma for Private {
    fn read(&self, iova: Iova, to: &mut [u8]) -> Result<(), DmaFault> {
        let bytes = self.0.lock().unwrap();
        let at = iova.0 as usize;
        to.copy_from_slice(bytes.get(at..at + to.len()).ok_or(DmaFault::Unmapped(iova))?);
        Ok(())
    }

    fn write(&self, iova: Iova, from: &[u8]) -> Result<(), DmaFault> {
        let mut bytes = self.0.lock().unwrap();
        let at = iova.0 as usize;
        bytes.get_mut(at..at + from.len()).ok_or(DmaFault::Unmapped(iova))?.copy_from_slice(from);
        Ok(())
    }

    fn translate(&self, range: IovaRange, _access: Prot) -> Result<(), DmaFault> {
        Err(DmaFault::Unmapped(range.start()))
    }
}

#[test]
fn what_the_device_is_arrives() {
    for (served, device) in all_ways() {
        let info = device.info().unwrap();
        assert_eq!(info, served.model.info().unwrap());
        for index in 0..info.regions {
            assert_eq!(Device::region(&device, index), served.model.region(index), "region {index}");
        }
        for index in 0..info.irqs {
            assert_eq!(device.irq(index), served.model.irq(index), "irq {index}");
        }
        assert_eq!(Device::region(&device, info.regions), Err(Errno::INVAL));
        assert_eq!(device.irq(info.irqs), Err(Errno::INVAL));
        device.reset().unwrap();
        assert_eq!(served.model.calls(), ["reset"]);
        drop(device);
        assert_eq!(served.thread.join().unwrap(), Broken::Closed);
    }
}

#[test]
fn registers_are_read_and_written() {
    for (served, device) in all_ways() {
        let bytes = noise(1, SCRATCH_SIZE - 7);
        assert_eq!(device.write(REGISTERS, 3, &bytes), Ok(bytes.len()));
        let mut back = vec![0; bytes.len()];
        assert_eq!(device.read(REGISTERS, 3, &mut back), Ok(bytes.len()));
        assert!(back == bytes);
        // Cut at the end.
        assert_eq!(device.read(REGISTERS, SCRATCH_SIZE as u64 - 2, &mut [0; 8]), Ok(2));
        assert_eq!(device.read(1, 0, &mut [0; 8]), Err(Errno::INVAL));
        assert_eq!(device.read(99, 0, &mut [0; 8]), Err(Errno::INVAL));
        assert_eq!(device.read(REGISTERS, u64::MAX, &mut [0; 8]), Err(Errno::INVAL));

        let writes: Vec<_> = (0..1000u64).map(|number| (number * 8, number.to_ne_bytes())).collect();
        let writes: Vec<_> = writes
            .iter()
            .map(|(offset, data)| RegionWrite { region: REGISTERS, offset: *offset, data: &data[..] })
            .collect();
        device.write_many(&writes).unwrap();
        let mut back = vec![0; 8000];
        device.read(REGISTERS, 0, &mut back).unwrap();
        let numbers = back.chunks(8).map(|bytes| u64::read_from_bytes(bytes).unwrap());
        assert!(numbers.eq(0..1000));
        drop((device, served));
    }
}

#[test]
fn memory_with_a_file_is_mapped() {
    for (served, device) in all_ways() {
        device.open(Arc::new(NoDma)).unwrap();
        let _ = device.unmap_memory(range(0, 1 << 42));
        let file = memfd(0x40_0000 * 2);
        let both = Prot::READ | Prot::WRITE;
        let window = |start, length, at| MemoryWindow {
            range: range(start, length),
            prot: both,
            file: Some((file.as_fd(), at)),
        };
        // Two windows, the other way round in the file.
        device.map_memory(&window(0x10_0000, 0x40_0000, 0x40_0000)).unwrap();
        device.map_memory(&window(0x50_0000, 0x40_0000, 0)).unwrap();
        let bytes = noise(2, COPY_LENGTH);
        let address = 0x40_1234u64;
        served.model.dma().write(Iova(address), &bytes).unwrap();
        let first = 0x50_0000 - address as usize;
        let mut back = vec![0; first];
        file.read_exact_at(&mut back, 0x40_0000 + address - 0x10_0000).unwrap();
        assert!(back == bytes[..first]);
        let mut back = vec![0; COPY_LENGTH - first];
        file.read_exact_at(&mut back, 0).unwrap();
        assert!(back == bytes[first..]);

        let dma = served.model.dma();
        assert_eq!(dma.translate(range(0x10_0000, 0x80_0000), both), Ok(()));
        assert_eq!(
            dma.translate(range(0x10_0000, 0x80_0001), both),
            Err(DmaFault::Unmapped(Iova(0x90_0000)))
        );
        assert_eq!(dma.read(Iova(0x8f_ffff), &mut [0; 2]), Err(DmaFault::Unmapped(Iova(0x90_0000))));
        device.unmap_memory(range(0x50_0000, 0x40_0000)).unwrap();
        assert_eq!(dma.read(Iova(0x50_0000), &mut [0]), Err(DmaFault::Unmapped(Iova(0x50_0000))));
        assert_eq!(dma.read(Iova(0x4f_ffff), &mut [0]), Ok(()));
        device.close();
    }
}

#[test]
fn memory_without_a_file_is_asked_for() {
    for (served, device) in all_ways() {
        let memory = Arc::new(Private(Mutex::new(noise(3, 2 * COPY_LENGTH))));
        device.open(Arc::clone(&memory) as Arc<dyn Dma>).unwrap();
        // The command makes the device ask for memory before it is answered.
        assert_eq!(device.write(REGISTERS, COPY, &0u64.to_ne_bytes()), Ok(8));
        device.read(REGISTERS, 0, &mut [0]).unwrap();
        assert_eq!(served.model.calls(), ["copy Ok(())"]);
        {
            let bytes = memory.0.lock().unwrap();
            assert!(bytes[..COPY_LENGTH] == bytes[COPY_LENGTH..]);
        }
        // Its fault comes back.
        assert_eq!(device.write(REGISTERS, COPY, &1u64.to_ne_bytes()), Ok(8));
        device.read(REGISTERS, 0, &mut [0]).unwrap();
        let expected = format!("copy {:?}", Err::<(), _>(DmaFault::Remote(Errno::FAULT)));
        assert_eq!(served.model.calls(), [expected]);
        device.close();
    }
}

#[test]
fn many_threads_use_one_connection() {
    for (served, device) in all_ways() {
        let memory = Arc::new(Private(Mutex::new(noise(4, 8 << 16))));
        device.open(Arc::clone(&memory) as Arc<dyn Dma>).unwrap();
        thread::scope(|scope| {
            for number in 0..4u64 {
                let (device, dma) = (&device, served.model.dma());
                scope.spawn(move || {
                    for round in 0..50 {
                        let bytes = noise(number * 1000 + round, 1000);
                        let at = number << 16;
                        device.write(REGISTERS, at, &bytes).unwrap();
                        let mut back = vec![0; 1000];
                        device.read(REGISTERS, at, &mut back).unwrap();
                        assert!(bytes == back);
                    }
                });
                scope.spawn(move || {
                    for round in 0..50 {
                        let bytes = noise(number * 2000 + round, 1000);
                        let at = Iova(number << 16);
                        dma.write(at, &bytes).unwrap();
                        let mut back = vec![0; 1000];
                        dma.read(at, &mut back).unwrap();
                        assert!(bytes == back);
                    }
                });
            }
        });
        device.close();
    }
}

/// Memory whose first access waits until it is told to go on.
#[derive(Debug)]
struct Slow {
    begun: mpsc::SyncSender<()>,
    go_on: Mutex<mpsc::Receiver<()>>,
}

impl Dma for Slow {
    fn read(&self, _: Iova, _: &mut [u8]) -> Result<(), DmaFault> {
        self.begun.send(()).unwrap();
        self.go_on.lock().unwrap().recv().unwrap();
        Ok(())
    }

    fn write(&self, iova: Iova, _: &[u8]) -> Result<(), DmaFault> {
        Err(DmaFault::Forbidden(iova))
    }

    fn translate(&self, range: IovaRange, _: Prot) -> Result<(), DmaFault> {
        Err(DmaFault::Unmapped(range.start()))
    }
}

#[test]
fn unmapping_waits_for_accesses_and_nothing_else_does() {
    let (served, device) =
        connected(Capabilities::OURS, client::Options { export: None, ..Default::default() });
    let ((begun, has_begun), (tell, go_on)) = (mpsc::sync_channel(0), mpsc::channel());
    device.open(Arc::new(Slow { begun, go_on: Mutex::new(go_on) })).unwrap();
    let slow = range(0x1000, 0x1000);
    let prot = Prot::READ | Prot::WRITE;
    device.map_memory(&MemoryWindow { range: slow, prot, file: None }).unwrap();
    let dma = served.model.dma();
    let reader = thread::spawn(move || dma.read(Iova(0x1000), &mut [0; 4]));
    has_begun.recv().unwrap();
    // While the client takes its time, everything else goes on.
    device.write(REGISTERS, 0, &[7]).unwrap();
    let mut byte = [0];
    device.read(REGISTERS, 0, &mut byte).unwrap();
    assert_eq!(byte, [7]);
    device.map_memory(&MemoryWindow { range: range(0x2000, 0x1000), prot, file: None }).unwrap();
    device.unmap_memory(range(0x2000, 0x1000)).unwrap();
    thread::scope(|scope| {
        let (unmapped, is_unmapped) = mpsc::channel();
        let device = &device;
        scope.spawn(move || {
            device.unmap_memory(slow).unwrap();
            unmapped.send(()).unwrap();
        });
        // It cannot have been answered: the access is under way.
        assert_eq!(is_unmapped.try_recv(), Err(mpsc::TryRecvError::Empty));
        tell.send(()).unwrap();
        is_unmapped.recv().unwrap();
    });
    assert_eq!(reader.join().unwrap(), Ok(()));
}

#[test]
fn windows_are_checked() {
    let (served, device) =
        connected(Capabilities::OURS, client::Options { export: None, ..Default::default() });
    device.open(Arc::new(NoDma)).unwrap();
    let file = memfd(0x3000);
    let both = Prot::READ | Prot::WRITE;
    let map = |start, length, prot, file: Option<(BorrowedFd<'_>, u64)>| {
        device.map_memory(&MemoryWindow { range: range(start, length), prot, file })
    };
    map(0x1000, 0x2000, both, Some((file.as_fd(), 0x1000))).unwrap();
    for (start, length) in [(0x1000, 0x2000), (0, 0x1001), (0x2fff, 1), (0x1800, 0x10), (0, u64::MAX)] {
        assert_eq!(map(start, length, both, None), Err(Errno::EXIST), "{start:#x} {length:#x}");
    }
    let null = File::open("/dev/null").unwrap();
    let read_only = File::open("/proc/self/exe").unwrap();
    let (pipe, _other) = std::io::pipe().unwrap();
    for (what, start, length, prot, fd, at) in [
        ("beyond the end of the file", 0x8000, 0x3000, both, file.as_fd(), 0x1000),
        ("far beyond the end", 0x8000, 1 << 60, both, file.as_fd(), 0),
        ("not at a page of the file", 0x8000, 0x1000, both, file.as_fd(), 0x801),
        ("a device", 0x8000, 0x1000, both, null.as_fd(), 0),
        ("a pipe", 0x8000, 0x1000, both, pipe.as_fd(), 0),
    ] {
        assert_eq!(map(start, length, prot, Some((fd, at))), Err(Errno::INVAL), "{what}");
    }
    let offset = map(0x8000, 0x1000, both, Some((file.as_fd(), u64::MAX - 0xfff)));
    assert_eq!(offset, Err(Errno::OVERFLOW));
    assert_eq!(map(0x8000, 0x1000, both, Some((read_only.as_fd(), 0))), Err(Errno::ACCESS));
    map(0x8000, 0x1000, Prot::READ, Some((read_only.as_fd(), 0))).unwrap();
    let dma = served.model.dma();
    assert_eq!(dma.write(Iova(0x8000), &[1]), Err(DmaFault::Forbidden(Iova(0x8000))));
    for (start, length) in [(0x1000, 0x1000), (0x1001, 0x1fff), (0x4000, 0x1000)] {
        assert_eq!(device.unmap_memory(range(start, length)), Err(Errno::NOENT));
    }
    device.unmap_memory(range(0x1000, 0x2000)).unwrap();
    // The last address of all can be in a window.
    map(u64::MAX - 0xfff, 0x1000, both, None).unwrap();
    assert_eq!(dma.read(Iova(u64::MAX), &mut [0; 2]), Err(DmaFault::Remote(Errno::FAULT)));
}

#[test]
fn interrupts_arrive() {
    for (served, device) in all_ways() {
        let event = || eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let (first, second) = (event(), event());
        let given = |event: &OwnedFd| Some(event.try_clone().unwrap());
        let data = IrqData::EventFd(vec![given(&first), None, given(&second), given(&first), given(&first)]);
        let set = IrqSet { index: IRQ, start: 0, count: 5, action: IrqAction::Trigger, data };
        device.set_irqs(set).unwrap();
        assert!(served.model.signal(2) && served.model.signal(0) && !served.model.signal(1));
        assert!(served.model.signal(4));
        let mut count = [0; 8];
        assert_eq!(rustix::io::read(&first, &mut count), Ok(8));
        assert_eq!(u64::from_ne_bytes(count), 2);
        assert_eq!(rustix::io::read(&second, &mut count), Ok(8));
        served.model.calls();
        let none = IrqSet { index: IRQ, start: 0, count: 0, action: IrqAction::Trigger, data: IrqData::None };
        device.set_irqs(none).unwrap();
        assert!(!served.model.signal(0));
        let data = IrqData::Bool(vec![true, false]);
        device.set_irqs(IrqSet { index: IRQ, start: 3, count: 2, action: IrqAction::Mask, data }).unwrap();
        assert_eq!(served.model.calls(), ["irqs 2 0+0 Trigger none", "irqs 2 3+2 Mask [true, false]"],);
        for (index, start, count) in
            [(IRQ, 4, 2), (IRQ, u32::MAX, 2), (IRQ, 0, u32::MAX), (0, 0, 1), (77, 0, 0)]
        {
            let set = IrqSet { index, start, count, action: IrqAction::Unmask, data: IrqData::None };
            assert_eq!(device.set_irqs(set), Err(Errno::INVAL), "{index} {start} {count}");
        }
        assert_eq!(served.model.calls(), [""; 0]);
    }
}

#[test]
fn memory_of_the_device_is_shared() {
    let (served, device) = plain();
    let region = device.region_file(MEMORY).unwrap();
    rustix::io::pwrite(region.file, b"seen", region.offset + 0x2010).unwrap();
    let mut back = [0; 4];
    served.model.read(MEMORY, 0x2010, &mut back).unwrap();
    assert_eq!(&back, b"seen");
    assert!(device.region_file(REGISTERS).is_none());
}

#[test]
fn state_is_saved_and_restored() {
    for (served, device) in all_ways() {
        let migration = device.migration().unwrap();
        let bytes = noise(5, 3 << 19);
        device.write(REGISTERS, 0, &bytes).unwrap();
        assert_eq!(migration.state(), Ok(State::Running));
        assert_eq!(migration.stop_copy_length(), Ok(3 << 19));
        let stream = migration.set_state(State::StopCopy).unwrap().unwrap();
        let mut saved = Vec::new();
        let mut part = vec![0; 100_000];
        loop {
            match stream.read(&mut part).unwrap() {
                0 => break,
                count => saved.extend_from_slice(&part[..count]),
            }
        }
        assert!(saved == bytes);
        assert!(migration.set_state(State::Stop).unwrap().is_none());
        assert_eq!(stream.read(&mut part), Err(Errno::INVAL));
        device.reset().unwrap();
        let stream = migration.set_state(State::Resuming).unwrap().unwrap();
        let mut rest = &saved[..];
        while !rest.is_empty() {
            let count = stream.write(rest).unwrap();
            rest = &rest[count..];
        }
        assert_eq!(stream.write(&[1]), Err(Errno::INVAL), "more than a state has");
        migration.set_state(State::Stop).unwrap();
        let mut back = vec![0; bytes.len()];
        served.model.read(REGISTERS, 0, &mut back).unwrap();
        assert!(back == bytes);
        assert!(migration.set_state(State::PreCopy).is_err());
    }
}

#[derive(Default)]
struct Pages(Vec<u64>);

impl DirtySink for Pages {
    fn dirty(&mut self, iova: Iova, length: u64) {
        assert_eq!(length, 4096);
        self.0.push(iova.0 / 4096);
    }
}

#[test]
fn writes_are_logged() {
    for (served, device) in all_ways() {
        device.open(Arc::new(NoDma)).unwrap();
        device.unmap_memory(range(0, 1 << 42)).unwrap();
        let file = memfd(64 << 20);
        let window = range(0, 64 << 20);
        let prot = Prot::READ | Prot::WRITE;
        device.map_memory(&MemoryWindow { range: window, prot, file: Some((file.as_fd(), 0)) }).unwrap();
        let log = device.dma_logging().unwrap();
        assert_eq!(log.report(window, &mut Pages::default()), Err(Errno::INVAL));
        assert_eq!(log.start(4096, &[range(0x1000, 32 << 20)]), Ok(4096));
        assert_eq!(log.start(4096, &[]), Err(Errno::INVAL));
        let dma = served.model.dma();
        dma.write(Iova(0x5fff), &[1, 2]).unwrap();
        dma.write(Iova(20 << 20), &[1]).unwrap();
        dma.write(Iova(40 << 20), &[1]).unwrap();
        dma.read(Iova(0x9000), &mut [1]).unwrap();
        let mut pages = Pages::default();
        log.report(range(0, 128 << 20), &mut pages).unwrap();
        assert_eq!(pages.0, [5, 6, 20 << 8]);
        let mut pages = Pages::default();
        log.report(range(0, 128 << 20), &mut pages).unwrap();
        assert_eq!(pages.0, [0; 0]);
        log.stop();
        log.start(4096, &[]).unwrap();
        device.close();
    }
}

//! Client against server, and peers that break the protocol.

use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use iommufd::domain::{DirtySink, Prot};
use iommufd::iova::{Iova, IovaRange};
use proptest::prelude::*;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::MemfdFlags;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use zerocopy::{FromBytes, IntoBytes};

use super::Errno;
use super::client::{self, MemoryWindow, RegionWrite, RemoteDevice};
use super::connection::Patience;
use super::server::{self, Server};
use super::testing::{self, COPY, COPY_LENGTH, IRQ, MEMORY, Model, REGISTERS, SCRATCH_SIZE, SHORT};
use super::transport::Broken;
use super::version::{self, Capabilities, MAX_FDS, MAX_MESSAGE};
use super::wire::{self, COMMANDS, Command, Flags, Header};
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

/// A client by hand.
struct Raw(UnixStream);

impl Raw {
    /// One that has been greeted.
    fn new(capabilities: Capabilities) -> (Served, Self) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let served = serve(theirs, Capabilities::OURS, SHORT);
        let mut raw = Raw(ours);
        let payload = version::encode(wire::Version { major: 0, minor: 0 }, capabilities);
        raw.send(Header::command(9, Command::Version, payload.len(), false), &payload, &[]);
        let (header, payload) = raw.receive();
        assert_eq!((header.id, header.command, header.flags), (9, 1, 1));
        assert_eq!(version::decode(&payload).unwrap().0, wire::Version { major: 0, minor: 0 });
        (served, raw)
    }

    fn plain() -> (Served, Self) {
        Self::new(Capabilities::DEFAULT)
    }

    fn send(&mut self, header: Header, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let parts = [IoSlice::new(header.as_bytes()), IoSlice::new(payload)];
        // A server that has ended the connection is found out when it does not answer.
        let _ = sendmsg(&self.0, &parts, &mut control, SendFlags::NOSIGNAL);
    }

    fn receive(&mut self) -> (Header, Vec<u8>) {
        let mut header = [0; Header::SIZE];
        self.0.read_exact(&mut header).unwrap();
        let header = Header::read_from_bytes(&header).unwrap();
        let mut payload = vec![0; header.size as usize - Header::SIZE];
        self.0.read_exact(&mut payload).unwrap();
        (header, payload)
    }

    /// Sends a command: the errno of its reply, or its payload.
    fn ask(&mut self, command: Command, payload: &[u8]) -> Result<Vec<u8>, Errno> {
        self.send(Header::command(3, command, payload.len(), false), payload, &[]);
        let (header, reply) = self.receive();
        assert_eq!((header.id, header.command), (3, command as u16));
        match header.failure() {
            Some(errno) => {
                assert!(reply.is_empty());
                Err(errno)
            }
            None => Ok(reply),
        }
    }
}

#[test]
fn commands_that_are_wrong_are_refused_and_do_no_harm() {
    let (served, mut raw) = Raw::plain();
    let access = |region: u32, offset: u64, count: u32| wire::RegionAccess { offset, region, count };
    for row in COMMANDS {
        for length in 0..row.request {
            let answer = raw.ask(row.command, &vec![0; length]);
            assert_eq!(answer, Err(Errno::INVAL), "{} with {length} bytes", row.name);
        }
        if row.sender == wire::Sender::Server {
            assert_eq!(raw.ask(row.command, &[0; 64]), Err(Errno::INVAL), "{}", row.name);
        }
    }
    let nine = wire::SingleWrite { access: access(REGISTERS, 0, 9), data: [0; 8] };
    let nine = [1u64.as_bytes(), nine.as_bytes()].concat();
    for (what, command, payload) in [
        ("reads too much", Command::RegionRead, access(REGISTERS, 0, u32::MAX).as_bytes()),
        ("reads 1 MiB and a byte", Command::RegionRead, access(REGISTERS, 0, (1 << 20) + 1).as_bytes()),
        (
            "writes less than it says",
            Command::RegionWrite,
            &[access(REGISTERS, 0, 5).as_bytes(), &[0; 4]].concat(),
        ),
        (
            "writes more than it says",
            Command::RegionWrite,
            &[access(REGISTERS, 0, 3).as_bytes(), &[0; 4]].concat(),
        ),
        ("writes many that are not there", Command::RegionWriteMulti, &u64::MAX.to_ne_bytes()),
        ("writes nine bytes", Command::RegionWriteMulti, &nine),
        ("a feature with unknown flags", Command::DeviceFeature, &[64u32, 1 << 20].as_bytes().to_vec()),
        ("greets twice", Command::Version, &[0, 0, 1, 0]),
    ] {
        assert_eq!(raw.ask(command, payload), Err(Errno::INVAL), "{what}");
    }
    assert_eq!(raw.ask(Command::DeviceFeature, [64u32, 1 << 16 | 3].as_bytes()), Err(Errno::NOTTY));
    let all = wire::DmaUnmap { argsz: 24, flags: wire::DMA_UNMAP_ALL, address: 0, size: 0 };
    raw.ask(Command::DmaUnmap, all.as_bytes()).unwrap();
    assert_eq!(raw.ask(Command::DmaUnmap, wire::DmaUnmap { flags: 1, ..all }.as_bytes()), Err(Errno::NOTSUP));
    let unknown = Header { id: 8, command: 14, size: 16, flags: 0, error: 0 };
    raw.send(unknown, &[], &[]);
    assert_eq!(raw.receive().0, unknown.failed(Errno::NOTSUP));
    // Nobody is told of what nobody waits for.
    let quiet = Header { flags: Flags::NO_REPLY.bits(), ..unknown };
    raw.send(quiet, &[], &[]);
    let info =
        raw.ask(Command::DeviceGetInfo, wire::DeviceInfo { argsz: 16, ..Default::default() }.as_bytes());
    assert_eq!(wire::DeviceInfo::read_from_bytes(&info.unwrap()).unwrap().num_regions, 9);
    drop(raw);
    assert_eq!(served.thread.join().unwrap(), Broken::Closed);
    assert_eq!(served.model.calls(), [""; 0]);
}

#[test]
fn answers_are_as_long_as_the_client_has_room() {
    let (_served, mut raw) = Raw::plain();
    use uapi::vfio::vfio_region_info;
    let ask = |raw: &mut Raw, argsz| {
        let asked = vfio_region_info { argsz, index: MEMORY, ..Default::default() };
        let reply = raw.ask(Command::DeviceGetRegionInfo, asked.as_bytes()).unwrap();
        let (info, chain) = vfio_region_info::read_from_prefix(&reply).unwrap();
        (info, chain.len())
    };
    let (info, chain) = ask(&mut raw, 32);
    assert_eq!((info.flags, info.cap_offset, chain), (15, 32, 0));
    // Headers, two areas, the type.
    let full = 32 + (8 + 8 + 32) + (8 + 8) + 8;
    assert_eq!(info.argsz, full);
    let (info, chain) = ask(&mut raw, full);
    assert_eq!((info.argsz, info.cap_offset, chain), (full, 32, full as usize - 32));
    let short = vfio_region_info { argsz: 31, ..Default::default() };
    assert_eq!(raw.ask(Command::DeviceGetRegionInfo, short.as_bytes()), Err(Errno::INVAL));
}

#[test]
fn eventfds_for_writes() {
    let (served, mut raw) = Raw::new(Capabilities { max_fds: 2, ..Capabilities::DEFAULT });
    let mut ask = |argsz, index| {
        raw.ask(
            Command::DeviceGetRegionIoFds,
            wire::RegionIoFds { argsz, index, ..Default::default() }.as_bytes(),
        )
    };
    let (info, rest) =
        wire::split::<wire::RegionIoFds>(&ask(16, REGISTERS).unwrap()).map(|(i, r)| (i, r.len())).unwrap();
    assert_eq!((info.argsz, info.count, rest), (16 + 2 * 40, 2, 0));
    assert_eq!(served.model.calls(), [""; 0]);
    let reply = ask(200, REGISTERS).unwrap();
    let second = wire::SubRegion::read_from_bytes(&reply[56..]).unwrap();
    let expected =
        wire::SubRegion { offset: 16, size: 4, fd_index: 1, flags: 1, datamatch: 1, ..Default::default() };
    assert_eq!(second, expected);
    assert_eq!(served.model.calls(), ["ioeventfd 0 0x0 4 0 true", "ioeventfd 0 0x10 4 1 true"]);
    assert_eq!(ask(200, 99), Err(Errno::INVAL));
}

#[test]
fn descriptors_that_nobody_wants_are_closed() {
    let (served, mut raw) = Raw::plain();
    let (mut reader, writer) = std::io::pipe().unwrap();
    {
        let many = vec![writer.as_fd(); 3];
        // Where none may come, where one may, and in a reply that nobody asked for.
        let header = |command| Header::command(1, command, 0, false);
        raw.send(header(Command::DeviceReset), &[], &many);
        assert_eq!(raw.receive().0.failure(), Some(Errno::INVAL));
        let map = wire::DmaMap { argsz: 32, flags: 3, size: 0x1000, ..Default::default() };
        raw.send(Header::command(1, Command::DmaMap, 32, false), map.as_bytes(), &many);
        assert_eq!(raw.receive().0.failure(), Some(Errno::INVAL));
        let irqs = wire::IrqSet { argsz: 20, flags: 4 | 32, index: IRQ, start: 0, count: 2 };
        raw.send(Header::command(1, Command::DeviceSetIrqs, 20, false), irqs.as_bytes(), &many);
        assert_eq!(raw.receive().0.failure(), Some(Errno::INVAL));
        // These are taken, and closed when the client goes.
        let irqs = wire::IrqSet { count: 3, ..irqs };
        raw.send(Header::command(1, Command::DeviceSetIrqs, 20, false), irqs.as_bytes(), &many);
        assert_eq!(raw.receive().0.failure(), None);
        let reply = header(Command::DeviceReset).reply(0);
        raw.send(reply, &[], &many);
    }
    assert_eq!(served.thread.join().unwrap(), Broken::Protocol("a reply that nobody waits for"));
    drop((raw, writer));
    let mut nothing = Vec::new();
    reader.read_to_end(&mut nothing).unwrap();
}

#[test]
fn messages_that_cannot_be_ends_the_connection() {
    let header = |size, flags| Header { id: 1, command: 4, size, flags, error: 0 };
    for (what, header, expected) in [
        ("shorter than a header", header(15, 0), "a message is shorter than its header"),
        ("size 0", header(0, 0), "a message is shorter than its header"),
        ("too long", header(MAX_MESSAGE as u32 + 1, 0), "a message is too long"),
        ("2 GiB", header(u32::MAX, 0), "a message is too long"),
        ("a type that is none", header(16, 2), "a message is neither command nor reply"),
        ("a reply", header(16, 1), "a reply that nobody waits for"),
    ] {
        let (served, mut raw) = Raw::plain();
        raw.send(header, &[], &[]);
        assert_eq!(served.thread.join().unwrap(), Broken::Protocol(expected), "{what}");
    }
    let (served, mut raw) = Raw::plain();
    let null = File::open("/dev/null").unwrap();
    raw.send(header(16, 0), &[], &vec![null.as_fd(); MAX_FDS + 1]);
    assert_eq!(served.thread.join().unwrap(), Broken::Protocol("too many descriptors"));
}

#[test]
fn a_client_that_goes_or_stops_in_the_middle() {
    for length in [1, 15, 16, 20, 47] {
        let message = [Header::command(1, Command::DmaMap, 32, false).as_bytes(), &[0; 32]].concat();
        let (served, mut raw) = Raw::plain();
        raw.0.write_all(&message[..length]).unwrap();
        drop(raw);
        assert_eq!(served.thread.join().unwrap(), Broken::Closed, "{length} bytes, gone");
        let (served, mut raw) = Raw::plain();
        raw.0.write_all(&message[..length]).unwrap();
        assert_eq!(served.thread.join().unwrap(), Broken::TimedOut, "{length} bytes, silent");
    }
    // One that does not take what it is sent.
    let (served, mut raw) = Raw::plain();
    let access = wire::RegionAccess { offset: 0, region: REGISTERS, count: 1 << 20 };
    raw.send(Header::command(1, Command::RegionRead, 16, false), access.as_bytes(), &[]);
    assert_eq!(served.thread.join().unwrap(), Broken::TimedOut);
    // One that does not answer the device.
    let (served, mut raw) = Raw::plain();
    let map = wire::DmaMap { argsz: 32, flags: 3, size: 1 << 30, ..Default::default() };
    raw.ask(Command::DmaMap, map.as_bytes()).unwrap();
    let mut write = access.as_bytes().to_vec();
    wire::RegionAccess { offset: COPY, region: REGISTERS, count: 8 }.write_to_prefix(&mut write).unwrap();
    write.extend_from_slice(&[0; 8]);
    raw.send(Header::command(1, Command::RegionWrite, 24, false), &write, &[]);
    assert_eq!(served.thread.join().unwrap(), Broken::TimedOut);
    let expected = format!("copy {:?}", Err::<(), _>(DmaFault::Remote(Errno::TIMEDOUT)));
    assert_eq!(served.model.calls(), [expected]);
}

#[test]
fn a_client_that_sends_too_much_at_a_time() {
    let (served, mut raw) = Raw::plain();
    let map = wire::DmaMap { argsz: 32, flags: 3, size: 1 << 30, ..Default::default() };
    raw.ask(Command::DmaMap, map.as_bytes()).unwrap();
    let access = wire::RegionAccess { offset: COPY, region: REGISTERS, count: 8 };
    let write = [access.as_bytes(), &[0; 8]].concat();
    raw.send(Header::command(1, Command::RegionWrite, 24, false), &write, &[]);
    // The device waits for memory; meanwhile commands come, and not the reply.
    for _ in 0..2000 {
        raw.send(Header::command(1, Command::DeviceReset, 0, true), &[], &[]);
    }
    assert_eq!(served.thread.join().unwrap(), Broken::Protocol("too many commands at a time"));
}

#[test]
fn versions_that_are_not_served() {
    let long = [&[0, 0, 1, 0][..], &[b' '; 20_000], b"{}\0"].concat();
    for (what, command, payload) in [
        ("another major version", Command::Version, &[1, 0, 0, 0][..]),
        ("no version", Command::Version, &[0, 0]),
        ("no JSON", Command::Version, b"\0\0\x01\0nonsense\0"),
        ("JSON without its end", Command::Version, b"\0\0\x01\0{}"),
        ("much JSON", Command::Version, &long),
        ("another command", Command::DeviceReset, &[]),
    ] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let served = serve(theirs, Capabilities::OURS, SHORT);
        let mut raw = Raw(ours);
        assert_eq!(raw.ask(command, payload), Err(Errno::INVAL), "{what}");
        assert!(matches!(served.thread.join().unwrap(), Broken::Protocol(_)), "{what}");
    }
}

#[test]
fn the_device_serves_one_client_after_the_other() {
    let model = Arc::new(Model::new());
    let mut server = Server::new(Arc::clone(&model) as Arc<dyn Device>, server::Options::default());
    for round in 0..3u8 {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let client = thread::spawn(move || {
            let device = RemoteDevice::connect(ours.into(), client::Options::default()).unwrap();
            let mut byte = [9];
            device.read(REGISTERS, 0, &mut byte).unwrap();
            assert_eq!(byte, [round], "the device's state stays");
            device.write(REGISTERS, 0, &[round + 1]).unwrap();
            device.read(REGISTERS, 0, &mut byte).unwrap();
        });
        assert_eq!(server.serve(theirs.into()), Broken::Closed);
        client.join().unwrap();
        assert_eq!(model.dma().read(Iova(0), &mut [0]), Err(DmaFault::Unmapped(Iova(0))));
    }
}

/// A server that answers VERSION, and then as `answer` says: nothing, or the bytes of the whole reply.
fn with_server(answer: impl Fn(Header) -> Option<Vec<u8>> + Send + 'static) -> Errno {
    with_server_for(LONG, answer)
}

fn with_server_for(patience: Patience, answer: impl Fn(Header) -> Option<Vec<u8>> + Send + 'static) -> Errno {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = thread::spawn(move || {
        let mut raw = Raw(theirs);
        let mut header = [0; Header::SIZE];
        while raw.0.read_exact(&mut header).is_ok() {
            let header = Header::read_from_bytes(&header).unwrap();
            raw.0.read_exact(&mut vec![0; header.size as usize - Header::SIZE]).unwrap();
            if let Some(bytes) = answer(header) {
                let _ = raw.0.write_all(&bytes);
            }
        }
    });
    let options = client::Options { patience, ..Default::default() };
    let errno = RemoteDevice::connect(ours.into(), options).unwrap_err();
    server.join().unwrap();
    errno
}

#[test]
fn servers_that_lie_or_hang() {
    let answer =
        |header: Header, payload: &[u8]| Some([header.reply(payload.len()).as_bytes(), payload].concat());
    let greeting = move |header: Header| {
        let payload = version::encode(wire::Version { major: 0, minor: 1 }, Capabilities::DEFAULT);
        answer(header, &payload)
    };
    let greets = move |header: Header| header.command == Command::Version as u16;
    assert_eq!(with_server_for(SHORT, |_| None), Errno::TIMEDOUT);
    let hangs = move |header| greets(header).then(|| greeting(header)).flatten();
    assert_eq!(with_server_for(SHORT, hangs), Errno::TIMEDOUT);
    assert_eq!(
        with_server(move |header| answer(header, &[1, 0, 0, 0])),
        Errno::PROTO,
        "another major version"
    );
    assert_eq!(
        with_server(move |header| answer(header, &[0, 0, 9, 0])),
        Errno::PROTO,
        "a newer minor version"
    );
    assert_eq!(with_server(move |header| answer(header, &[0, 0])), Errno::PROTO, "a short reply");
    assert_eq!(with_server(|header| Some(header.failed(Errno::PERM).as_bytes().to_vec())), Errno::PERM);
    let twin = br#"....{"capabilities":{"twin_socket":{"supported":true,"fd_index":0}}}."#;
    let mut twin = twin.to_vec();
    twin[..4].fill(0);
    *twin.last_mut().unwrap() = 0;
    assert_eq!(with_server(move |header| answer(header, &twin)), Errno::PROTO, "a socket that did not come");
    let other_id = move |header: Header| answer(Header { id: header.id.wrapping_add(1), ..header }, &[0; 64]);
    assert_eq!(with_server(other_id), Errno::PROTO, "a reply to something else");
    let other_command = move |header: Header| answer(Header { command: 13, ..header }, &[0; 64]);
    assert_eq!(with_server(other_command), Errno::PROTO, "a reply of another command");
    // Numbers of regions that nobody has.
    let many = wire::DeviceInfo { argsz: 16, flags: 2, num_regions: u32::MAX, num_irqs: 5 };
    let lies =
        move |header: Header| if greets(header) { greeting(header) } else { answer(header, many.as_bytes()) };
    assert_eq!(with_server(lies), Errno::PROTO);
    // Chains of capabilities that lead astray.
    use uapi::vfio::{vfio_info_cap_header, vfio_region_info};
    for (what, cap_offset, next) in [("itself", 32, 32), ("outside", 32, 1000), ("far outside", u32::MAX, 0)]
    {
        let info = vfio_region_info { argsz: 64, flags: 8, index: 0, cap_offset, size: 0, offset: 0 };
        let cap = vfio_info_cap_header { id: 77, version: 1, next };
        let region = [info.as_bytes(), cap.as_bytes(), &[0; 24]].concat();
        let one = wire::DeviceInfo { num_regions: 1, ..many };
        let lies = move |header: Header| match header.command {
            1 => greeting(header),
            4 => answer(header, one.as_bytes()),
            _ => answer(header, &region),
        };
        assert_eq!(with_server(lies), Errno::PROTO, "a chain that leads to {what}");
    }
}

#[test]
fn a_connection_that_ended_fails_at_once() {
    let (served, device) = plain();
    let (ours, theirs) = UnixStream::pair().unwrap();
    drop((ours, theirs));
    served.model.dma();
    // The server is told to end by whoever holds a duplicate of its socket; here the device's end does it.
    drop(device);
    assert_eq!(served.thread.join().unwrap(), Broken::Closed);

    let (ours, theirs) = UnixStream::pair().unwrap();
    let theirs_too = theirs.try_clone().unwrap();
    let served = serve(theirs, Capabilities::OURS, LONG);
    let device =
        RemoteDevice::connect(ours.into(), client::Options { patience: LONG, ..Default::default() }).unwrap();
    theirs_too.shutdown(std::net::Shutdown::Both).unwrap();
    assert_eq!(served.thread.join().unwrap(), Broken::Closed);
    assert_eq!(device.read(REGISTERS, 0, &mut [0]), Err(Errno::NODEV));
    assert_eq!(device.reset(), Err(Errno::NODEV));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..Default::default() })]

    #[test]
    fn any_bytes_from_a_client(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        testing::serve_anything(&bytes);
    }

    /// Messages that are whole, with payloads of any bytes.
    #[test]
    fn any_messages_from_a_client(
        twin in any::<bool>(),
        messages in prop::collection::vec((0usize..20, any::<bool>(), prop::collection::vec(any::<u8>(), 0..80)), 0..40),
    ) {
        let mut bytes = vec![u8::from(twin) * 2];
        for (command, small, mut payload) in messages {
            if small {
                // Small numbers mean something more often.
                payload.iter_mut().enumerate().filter(|(at, _)| at % 4 != 0).for_each(|(_, byte)| *byte = 0);
            }
            let command = COMMANDS.get(command).map_or(command as u16, |row| row.command as u16);
            let size = (payload.len() + Header::SIZE) as u32;
            bytes.extend_from_slice(Header { id: 0, command, size, flags: 0, error: 0 }.as_bytes());
            bytes.extend_from_slice(&payload);
        }
        testing::serve_anything(&bytes);
    }

    #[test]
    fn any_answers_of_a_server(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        testing::connect_to_anything(&bytes);
    }

    #[test]
    fn headers_survive(id: u16, number in 0usize..17, payload in 0usize..(1 << 20), no_reply: bool) {
        let command = COMMANDS[number].command;
        prop_assert_eq!(Command::from_number(command as u16), Ok(command));
        let header = Header::command(id, command, payload, no_reply);
        let back = Header::read_from_bytes(header.as_bytes()).unwrap();
        prop_assert_eq!(back, header);
        prop_assert_eq!(back.is_reply(), Ok(false));
        prop_assert_eq!(back.no_reply(), no_reply);
        prop_assert_eq!(back.size as usize, payload + 16);
        let failed = back.failed(Errno::NOENT);
        prop_assert_eq!((failed.is_reply(), failed.failure(), failed.size), (Ok(true), Some(Errno::NOENT), 16));
    }
}

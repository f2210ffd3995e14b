//! vfio-user between two threads of one process: registers, and memory.
//!
//! `cargo bench -p vfio --bench vfio_user --features testing`. The device does nothing but keep what is written: what is
//! measured is the protocol.
//!
//! Beside it stands crate `vfio_user` of rust-vmm, each side of it with the other of its own and with ours, in the same run. It
//! has reads and writes that are waited for; DMA by messages, posted writes, and several writes in a message it has not, and
//! memory that is announced with a file is the business of the device behind it.

#![allow(clippy::unwrap_used, missing_docs, reason = "a benchmark that cannot go on is to fail")]

use std::fs::File;
use std::hint::black_box;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use iommufd::domain::Prot;
use iommufd::iova::{Iova, IovaRange};
use rustix::fs::MemfdFlags;
use tempfile::TempDir;
use vfio::device::Device;
use vfio::dma::{Dma, DmaFault};
use vfio::user::client::{MemoryWindow, Options, RegionWrite, RemoteDevice};
use vfio::user::server::{self, Server};
use vfio::user::testing::{Model, REGISTERS};
use vfio::user::transport::Broken;
use vfio::user::version::Capabilities;
use vfio_bindings::bindings::vfio::{
    VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE, vfio_region_info,
};
use vfio_user::{DmaMapFlags, DmaUnmapFlags, ServerBackend, ServerRegion};

/// The client's memory, in the client.
#[derive(Debug)]
struct Private(Mutex<Vec<u8>>);

impl Dma for Private {
    fn read(&self, iova: Iova, to: &mut [u8]) -> Result<(), DmaFault> {
        let bytes = self.0.lock().unwrap();
        let at = usize::try_from(iova.0).unwrap();
        to.copy_from_slice(&bytes[at..at + to.len()]);
        Ok(())
    }

    fn write(&self, iova: Iova, from: &[u8]) -> Result<(), DmaFault> {
        let mut bytes = self.0.lock().unwrap();
        let at = usize::try_from(iova.0).unwrap();
        bytes[at..at + from.len()].copy_from_slice(from);
        Ok(())
    }

    fn translate(&self, _: IovaRange, _: Prot) -> Result<(), DmaFault> {
        Ok(())
    }
}

struct Pair {
    model: Arc<Model>,
    device: RemoteDevice,
    _server: JoinHandle<Broken>,
}

fn pair(twin_socket: bool, posted_writes: bool) -> Pair {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let model = Arc::new(Model::new());
    let device = Arc::clone(&model) as Arc<dyn Device>;
    let server = thread::spawn(move || Server::new(device, server::Options::default()).serve(theirs.into()));
    let capabilities = Capabilities { twin_socket, ..Capabilities::OURS };
    let options = Options { capabilities, posted_writes, export: None, ..Default::default() };
    let device = RemoteDevice::connect(ours.into(), options).unwrap();
    device.open(Arc::new(Private(Mutex::new(vec![0; 1 << 20])))).unwrap();
    Pair { model, device, _server: server }
}

/// Registers behind rust-vmm's server.
struct Registers(Vec<u8>);

impl ServerBackend for Registers {
    fn region_read(&mut self, _: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        data.copy_from_slice(&self.0[offset as usize..][..data.len()]);
        Ok(())
    }

    fn region_write(&mut self, _: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    fn dma_map(&mut self, _: DmaMapFlags, _: u64, _: u64, _: u64, _: Option<File>) -> io::Result<()> {
        Ok(())
    }

    fn dma_unmap(&mut self, _: DmaUnmapFlags, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn reset(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn set_irqs(&mut self, _: u32, _: u32, _: u32, _: u32, _: Vec<File>) -> io::Result<()> {
        Ok(())
    }
}

/// The socket's place, and what serves one connection there: ours, or rust-vmm's.
fn listen(theirs: bool) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    if theirs {
        let region_info = vfio_region_info {
            argsz: size_of::<vfio_region_info>() as u32,
            flags: VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE,
            index: REGISTERS,
            size: 0x1000,
            ..Default::default()
        };
        let region = ServerRegion { region_info, sparse_areas: Vec::new(), mmap_fd: None };
        let server = vfio_user::Server::new(&path, false, Vec::new(), vec![region]).unwrap();
        thread::spawn(move || server.run(&mut Registers(vec![0; 0x1000])).unwrap());
    } else {
        let listener = UnixListener::bind(&path).unwrap();
        thread::spawn(move || {
            let (socket, _) = listener.accept().unwrap();
            Server::new(Arc::new(Model::new()), server::Options::default()).serve(socket.into())
        });
    }
    directory
}

fn beside(c: &mut Criterion) {
    let mut group = c.benchmark_group("beside");
    for (server, theirs) in [("ours", false), ("rust-vmm's", true)] {
        let directory = listen(theirs);
        let socket = UnixStream::connect(directory.path().join("socket")).unwrap();
        let options = Options { posted_writes: false, export: None, ..Default::default() };
        let ours = RemoteDevice::connect(socket.into(), options).unwrap();
        group.bench_function(format!("read of 4 bytes, our client, server {server}"), |b| {
            b.iter(|| ours.read(REGISTERS, 0, black_box(&mut [0; 4])).unwrap());
        });
        group.bench_function(format!("write of 4 bytes, our client, server {server}"), |b| {
            b.iter(|| ours.write(REGISTERS, 0, black_box(&[1; 4])).unwrap());
        });
        drop((ours, directory));
        let directory = listen(theirs);
        let mut client = vfio_user::Client::new(&directory.path().join("socket")).unwrap();
        group.bench_function(format!("read of 4 bytes, rust-vmm's client, server {server}"), |b| {
            b.iter(|| client.region_read(REGISTERS, 0, black_box(&mut [0; 4])).unwrap());
        });
        group.bench_function(format!("write of 4 bytes, rust-vmm's client, server {server}"), |b| {
            b.iter(|| client.region_write(REGISTERS, 0, black_box(&[1; 4])).unwrap());
        });
    }
    group.finish();
}

fn regions(c: &mut Criterion) {
    let mut group = c.benchmark_group("region");
    let waited = pair(true, false);
    group.bench_function("read of 4 bytes", |b| {
        b.iter(|| waited.device.read(REGISTERS, 0, black_box(&mut [0; 4])).unwrap());
    });
    group.bench_function("write of 4 bytes, waited for", |b| {
        b.iter(|| waited.device.write(REGISTERS, 0, black_box(&[1; 4])).unwrap());
    });
    let posted = pair(true, true);
    group.throughput(Throughput::Elements(64));
    group.bench_function("64 posted writes of 4 bytes", |b| {
        b.iter(|| {
            for at in 0..64 {
                posted.device.write(REGISTERS, at * 4, black_box(&[1; 4])).unwrap();
            }
            posted.device.read(REGISTERS, 0, &mut [0; 4]).unwrap()
        });
    });
    let writes: Vec<_> =
        (0..64).map(|at| RegionWrite { region: REGISTERS, offset: at * 4, data: &[1; 4] }).collect();
    group.bench_function("64 writes of 4 bytes in one message", |b| {
        b.iter(|| {
            posted.device.write_many(black_box(&writes)).unwrap();
            posted.device.read(REGISTERS, 0, &mut [0; 4]).unwrap()
        });
    });
    group.finish();
}

fn memory(c: &mut Criterion) {
    let mut group = c.benchmark_group("memory");
    let file = File::from(rustix::fs::memfd_create("bench", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(1 << 20).unwrap();
    for (name, twin, mapped) in
        [("mapped", true, true), ("asked for", false, false), ("asked for by the twin socket", true, false)]
    {
        let pair = pair(twin, true);
        let range = IovaRange::with_length(Iova(0), 1 << 20).unwrap();
        let file = mapped.then(|| (file.as_fd(), 0));
        pair.device.map_memory(&MemoryWindow { range, prot: Prot::READ | Prot::WRITE, file }).unwrap();
        let dma = pair.model.dma();
        for length in [64usize, 4096, 65_536] {
            let mut bytes = vec![0; length];
            group.throughput(Throughput::Bytes(length as u64));
            group.bench_function(format!("{name}: read of {length}"), |b| {
                b.iter(|| dma.read(Iova(0x1000), black_box(&mut bytes)).unwrap());
            });
        }
    }
    group.finish();
}

criterion_group!(benches, regions, beside, memory);
criterion_main!(benches);

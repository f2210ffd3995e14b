//! vfio-user between two threads of one process: registers, and memory.
//!
//! `cargo bench -p vfio --bench vfio_user --features testing`. The device does nothing but keep what is written: what is
//! measured is the protocol.

#![allow(clippy::unwrap_used, missing_docs, reason = "a benchmark that cannot go on is to fail")]

use std::fs::File;
use std::hint::black_box;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use iommufd::domain::Prot;
use iommufd::iova::{Iova, IovaRange};
use rustix::fs::MemfdFlags;
use vfio::device::Device;
use vfio::dma::{Dma, DmaFault};
use vfio::user::client::{MemoryWindow, Options, RegionWrite, RemoteDevice};
use vfio::user::server::{self, Server};
use vfio::user::testing::{Model, REGISTERS};
use vfio::user::transport::Broken;
use vfio::user::version::Capabilities;

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

criterion_group!(benches, regions, memory);
criterion_main!(benches);

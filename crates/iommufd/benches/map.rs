//! An address space over a gigabyte of this process's memory: mapping and unmapping it in pieces of 4 KiB and 2 MiB, with
//! and without a page table, and pinning and unpinning it page by page. The memory is present from the beginning.
//!
//! Nanoseconds of processor time for each piece or page, the medians of several runs.
//! `cargo bench -p iommufd --bench map`.

mod measure;

use core::hint::black_box;
use std::sync::Arc;

use iommufd::{
    account::Accounting,
    domain::{Domain, Prot},
    ioas::Ioas,
    iova::{Iova, IovaRange, PAGE_SIZE},
    pages::Pages,
    process::{LocalProcess, Process, UserAddr},
    soft::SoftDomain,
};
use measure::{median, thread_seconds};
use vm_memory::mmap::MmapRegion;

const GIB: u64 = 1 << 30;
const RUNS: usize = 3;
const RW: Prot = Prot::READ.union(Prot::WRITE);

/// The memory, and an address space with or without a page table.
struct Bench {
    process: Arc<dyn Process>,
    start: u64,
    ioas: Arc<Ioas>,
}

impl Bench {
    fn new(memory: &MmapRegion, domain: bool) -> Self {
        let ioas = Ioas::new();
        if domain {
            let domain: Arc<dyn Domain> = Arc::new(SoftDomain::new());
            ioas.attach_domain(&domain).expect("an empty one fits");
        }
        Self { process: LocalProcess::get(), start: memory.as_ptr() as u64, ioas }
    }

    fn store(&self, offset: u64, length: u64) -> Arc<Pages> {
        let start = UserAddr(self.start + offset);
        Pages::user(self.process.clone(), start, length, true, Accounting::None).expect("it is memory")
    }

    /// Maps the gigabyte in pieces: seconds for mapping and for unmapping.
    fn map(&self, piece: u64, fixed: bool) -> (f64, f64) {
        let mut at = Vec::with_capacity((GIB / piece) as usize);
        let begin = thread_seconds();
        for offset in (0..GIB).step_by(piece as usize) {
            let pages = self.store(offset, piece);
            let iova = fixed.then_some(Iova(offset));
            at.push(self.ioas.map(&pages, 0, piece, iova, RW).expect("there is room"));
        }
        let mapped = thread_seconds();
        for at in at {
            let range = IovaRange::with_length(at, piece).expect("it was mapped");
            assert_eq!(self.ioas.unmap(range), Ok(piece));
        }
        (mapped - begin, thread_seconds() - mapped)
    }

    /// Pins and unpins each page alone: seconds.
    fn pin(&self) -> f64 {
        let pages = self.store(0, GIB);
        self.ioas.map(&pages, 0, GIB, Some(Iova(0)), RW).expect("there is room");
        let begin = thread_seconds();
        for offset in (0..GIB).step_by(PAGE_SIZE as usize) {
            black_box(self.ioas.pin(Iova(offset), PAGE_SIZE, true, false).expect("it is mapped"));
        }
        let end = thread_seconds();
        self.ioas.unmap(IovaRange::ALL).expect("nothing is pinned");
        end - begin
    }

    /// Pins every page, in a mixed order, and then unpins them: seconds for both.
    fn keep(&self) -> (f64, f64) {
        let pages = self.store(0, GIB);
        self.ioas.map(&pages, 0, GIB, Some(Iova(0)), RW).expect("there is room");
        let count = GIB / PAGE_SIZE;
        let mut pinned = Vec::with_capacity(count as usize);
        let begin = thread_seconds();
        for index in 0..count {
            // An odd factor reaches every page once.
            let page = index.wrapping_mul(0x9e37_79b1) % count;
            pinned.push(self.ioas.pin(Iova(page * PAGE_SIZE), PAGE_SIZE, true, false).expect("it is mapped"));
        }
        let kept = thread_seconds();
        drop(pinned);
        let end = thread_seconds();
        self.ioas.unmap(IovaRange::ALL).expect("nothing is pinned");
        (kept - begin, end - kept)
    }

    /// Copies 64 bytes at a time from mapped memory: seconds.
    fn read(&self) -> f64 {
        let pages = self.store(0, GIB);
        self.ioas.map(&pages, 0, GIB, Some(Iova(0)), RW).expect("there is room");
        let begin = thread_seconds();
        let mut bytes = [0; 64];
        for offset in (0..GIB).step_by(PAGE_SIZE as usize) {
            self.ioas.read(Iova(offset + 100), &mut bytes).expect("it is mapped");
            black_box(&bytes);
        }
        let end = thread_seconds();
        self.ioas.unmap(IovaRange::ALL).expect("nothing is pinned");
        end - begin
    }
}

/// Prints the median for each of the pieces of a gigabyte.
fn tell(what: &str, piece: u64, seconds: Vec<f64>) {
    let each = median(seconds) / (GIB / piece) as f64;
    println!("{what:<58} {:>9.0} ns", each * 1e9);
}

fn main() {
    let memory = MmapRegion::new(GIB as usize).expect("a gigabyte of memory");
    let everything = Bench::new(&memory, false).store(0, GIB);
    let warm = Ioas::new();
    warm.map(&everything, 0, GIB, Some(Iova(0)), RW).expect("there is room");
    drop(warm.pin(Iova(0), GIB, true, false).expect("the memory is there"));
    for (domain, with) in [(false, "no domain"), (true, "a domain")] {
        let bench = Bench::new(&memory, domain);
        for (piece, name) in [(PAGE_SIZE, "4 KiB"), (2 << 20, "2 MiB"), (GIB, "1 GiB")] {
            for (fixed, place) in [(true, "a given"), (false, "a found")] {
                let (map, unmap): (Vec<_>, Vec<_>) = (0..RUNS).map(|_| bench.map(piece, fixed)).unzip();
                tell(&format!("map {name} at {place} address, {with}"), piece, map);
                tell(&format!("unmap {name} at {place} address, {with}"), piece, unmap);
            }
        }
        let pin = (0..RUNS).map(|_| bench.pin()).collect();
        tell(&format!("pin and unpin a page, {with}"), PAGE_SIZE, pin);
        let (pin, unpin): (Vec<_>, Vec<_>) = (0..RUNS).map(|_| bench.keep()).unzip();
        tell(&format!("pin a page of all, in a mixed order, {with}"), PAGE_SIZE, pin);
        tell(&format!("unpin it, {with}"), PAGE_SIZE, unpin);
        let read = (0..RUNS).map(|_| bench.read()).collect();
        tell(&format!("copy 64 bytes, {with}"), PAGE_SIZE, read);
    }
}

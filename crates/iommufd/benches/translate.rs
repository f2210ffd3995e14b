//! Translations by the software IOMMU: random 4 KiB hits over 1 GiB, by one thread and by two, alone and while another thread
//! maps and unmaps elsewhere in the same domain. The control is a thread that does the same in a domain of its own: what
//! two threads of one core, or one cache, cost each other is not the table's doing.
//!
//! A thread's rate is counted in its own processor time, so that a machine with fewer processors than threads tells
//! what one thread costs the other, not that they share. Medians of several runs. `cargo bench -p iommufd --bench translate`.

mod measure;

use core::{
    hint::black_box,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};
use std::{
    sync::{Arc, Barrier},
    thread,
};

use iommufd::{
    domain::{Domain, HostAddr, Prot},
    iova::{Iova, IovaRange, PAGE_SIZE},
    soft::{Access, SoftDomain},
};
use measure::{median, thread_seconds};

const GIB: u64 = 1 << 30;
const RUNS: usize = 7;
/// Translations of one thread in one run.
const TRANSLATIONS: u64 = 20_000_000;
/// Translations in one section: what a device does for one request, at the least.
const SECTION: u64 = 32;
const RW: Prot = Prot::READ.union(Prot::WRITE);

/// Translations per second of this thread's processor time.
fn translate(domain: &SoftDomain, seed: u64, access: Access) -> f64 {
    let mut reader = domain.reader();
    let mut random = seed;
    let begin = thread_seconds();
    for _ in 0..TRANSLATIONS / SECTION {
        let section = reader.section();
        for _ in 0..SECTION {
            // xorshift64: no more than a few cycles.
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let found = section.translate(Iova(random % GIB), access);
            assert!(black_box(found).is_ok());
        }
    }
    TRANSLATIONS as f64 / (thread_seconds() - begin)
}

/// Maps and unmaps until `end`, with a sync for each unmap as an IOAS does: how many times.
fn churn(domain: &SoftDomain, end: &AtomicBool, done: &AtomicU64) {
    while !end.load(Ordering::Relaxed) {
        for page in 0..64 {
            let iova = Iova(2 * GIB + page * PAGE_SIZE);
            domain.map(iova, HostAddr(GIB), PAGE_SIZE, RW).expect("nothing is mapped there");
        }
        for page in 0..64 {
            let range = IovaRange::with_length(Iova(2 * GIB + page * PAGE_SIZE), PAGE_SIZE);
            domain.unmap(range.expect("it is a range"));
            domain.sync();
        }
        done.fetch_add(64, Ordering::Relaxed);
    }
}

/// The median of a thread's rate, and how many pages the writer mapped and unmapped.
fn measure(domain: &SoftDomain, readers: usize, writer: Option<&SoftDomain>, access: Access) -> (f64, u64) {
    let done = Arc::new(AtomicU64::new(0));
    let rates = (0..RUNS).flat_map(|run| {
        let (end, start) = (AtomicBool::new(false), Barrier::new(readers));
        thread::scope(|scope| {
            if let Some(changed) = writer {
                let (end, done) = (&end, &done);
                scope.spawn(move || churn(changed, end, done));
            }
            let threads: Vec<_> = (0..readers)
                .map(|reader| {
                    let start = &start;
                    scope.spawn(move || {
                        start.wait();
                        translate(domain, 0x9e37_79b9 + (run * readers + reader) as u64, access)
                    })
                })
                .collect();
            let rates: Vec<_> =
                threads.into_iter().map(|thread| thread.join().expect("a reader ends")).collect();
            end.store(true, Ordering::Relaxed);
            rates
        })
    });
    (median(rates.collect()), done.load(Ordering::Relaxed))
}

fn main() {
    let domain = SoftDomain::new();
    for page in 0..GIB / PAGE_SIZE {
        // Each page elsewhere, as in a process that has run for a while.
        let host = HostAddr((page.wrapping_mul(0x9e37_79b9) % (GIB / PAGE_SIZE)) * PAGE_SIZE);
        domain.map(Iova(page * PAGE_SIZE), host, PAGE_SIZE, RW).expect("nothing is mapped yet");
    }
    println!("million translations per second and thread (processor time), median of {RUNS} runs");
    for (access, name) in [(Access::Read, "read"), (Access::Write, "write")] {
        for readers in [1, 2] {
            let (alone, _) = measure(&domain, readers, None, access);
            let (control, _) = measure(&domain, readers, Some(&SoftDomain::new()), access);
            let (beside, pages) = measure(&domain, readers, Some(&domain), access);
            println!(
                "{name:5}  {readers} thread(s)  alone {:6.1}  control {:6.1}  beside a writer {:6.1} ({:+.1} % of the \
                 control; {pages} pages mapped, unmapped and synced)",
                alone / 1e6,
                control / 1e6,
                beside / 1e6,
                (beside / control - 1.0) * 100.0,
            );
        }
    }
    domain.set_dirty_tracking(true).expect("it can note writes");
    let (tracked, _) = measure(&domain, 1, None, Access::Write);
    println!("write  1 thread, writes tracked  {:6.1}", tracked / 1e6);
}

//! Page walking: what a TLB miss, a look at a TLB entry's rights, and a change of control registers cost.

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use mmu::testing::FlatMemory;
use mmu::{Access, AccessKind, Gva, PageWalk, PagingFeatures, PagingState, Privilege, cr0, cr4, efer};

/// The level-4 table; one table of each lower level follows it.
const ROOT: u64 = 0x1000;
/// Present, writable, user, accessed, dirty.
const ENTRY: u64 = 0x67;

fn long_mode() -> PagingState {
    PagingState {
        cr0: cr0::PG | cr0::WP,
        cr3: ROOT,
        cr4: cr4::PAE | cr4::PGE | cr4::SMEP | cr4::SMAP,
        efer: efer::LMA | efer::NXE,
        maxphyaddr: 46,
        features: PagingFeatures::all(),
        ..PagingState::default()
    }
}

/// The first 2 MiB in pages of 4 KiB; accessed and dirty bits are set already.
fn tables() -> FlatMemory {
    let mut memory = FlatMemory::new(0x5000);
    for level in 0..3 {
        memory.set_u64(ROOT + level * 0x1000, (ROOT + (level + 1) * 0x1000) | ENTRY);
    }
    for page in 0..512 {
        memory.set_u64(ROOT + 0x3000 + page * 8, page << 12 | ENTRY);
    }
    memory
}

fn walk(c: &mut Criterion) {
    let state = long_mode();
    let memory = tables();
    let walk = PageWalk::new(&state);
    let read = Access::new(AccessKind::Read, Privilege::User);
    let write = Access::new(AccessKind::Write, Privilege::User);

    let mut group = c.benchmark_group("walk");
    group.bench_function("translate, 4 levels, warm", |b| {
        let mut page = 0u64;
        b.iter(|| {
            page = (page + 1) % 512;
            walk.translate(&memory, Gva(page << 12), read)
        });
    });
    group.bench_function("translate, fault at the last level", |b| {
        let supervisor_fetch = Access::new(AccessKind::Fetch, Privilege::Supervisor);
        b.iter(|| walk.translate(&memory, black_box(Gva(0x1000)), supervisor_fetch));
    });
    let found = walk.translate(&memory, Gva(0x1000), write);
    if let Ok(found) = found {
        group.bench_function("permits", |b| b.iter(|| walk.permits(black_box(&found), black_box(write))));
    }
    group.bench_function("PageWalk::new", |b| b.iter(|| PageWalk::new(black_box(&state))));
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = walk
}
criterion_main!(benches);

//! Tests of the address space as a whole; those of its parts stand beside them.

mod concurrency;
mod domain;
mod injection;
mod memory;
mod model;
mod moves;
mod process;
mod rules;

use std::sync::Arc;

use crate::{
    account::Accounting,
    iova::{Iova, IovaRange, PAGE_SIZE},
    pages::Pages,
    process::{Process, UserAddr},
};

pub(crate) const PAGE: u64 = PAGE_SIZE;

/// `length` bytes at `start`.
fn range(start: u64, length: u64) -> IovaRange {
    IovaRange::with_length(Iova(start), length).unwrap()
}

/// A writable store of a process's memory that nobody's limit counts.
fn store(process: &Arc<process::TestProcess>, start: UserAddr, length: u64) -> Arc<Pages> {
    let process: Arc<dyn Process> = process.clone();
    Pages::user(process, start, length, true, Accounting::None).unwrap()
}

#[test]
fn the_first_program_is_an_example() {
    let (_, program) = include_str!("../../../../docs/iommufd.md").split_once("```rust\n").unwrap();
    let (program, _) = program.split_once("```").unwrap();
    let example = include_str!("../../examples/first_program.rs");
    assert!(example.contains(program), "the example has no:\n{program}");
}

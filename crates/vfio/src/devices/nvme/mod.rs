//! An NVMe controller with one namespace, on a file or block device of the host (NVM Express 1.4).
//!
//! # Theory of operation
//!
//! The driver puts commands into submission queues in its memory and writes a queue's tail to its doorbell; the
//! controller carries them out, puts completions into completion queues and signals an interrupt.
//!
//! - `controller` has the registers: who writes the doorbells wakes a worker, and enabling and disabling make and
//!   drop everything else.
//! - A few worker threads share the submission queues; each queue belongs to one of them, so that its commands are carried
//!   out in order. A worker fetches commands in batches, moves data through a buffer of its own (one read or write of the
//!   file for each command, however scattered its memory is), posts the completions of a batch and then signals once.
//! - `admin` has the commands that configure, `io` those that move data, `prp` finds the memory that they mean.
//!
//! **Durability.** A write is done when the host's page cache has it; Flush waits for the medium. The driver is told so
//! (volatile write cache), and may turn it off, which makes every write wait.
//!
//! **A driver that errs** gets the status that the specification has for it. What leaves nowhere to put a status (a queue
//! that is not in memory, a configuration that cannot be) sets CSTS.CFS and stops the controller until it is reset.
//!
//! **Reset.** A batch holds `running` for reading; disabling the controller takes it for writing. So when a
//! reset returns, no worker touches memory.
//!
//! **Locks**, in the order in which they may be taken: `running`, a submission queue's head, `tables` or `state` or
//! `registers` (each alone), a completion queue's tail.

mod admin;
mod controller;
mod identify;
mod io;
mod prp;
mod queue;
mod spec;
#[cfg(test)]
mod tests;
mod worker;

use std::sync::{Mutex, MutexGuard, PoisonError};

use disk::Disk;
use pci::config::{BarKind, PciIds};

pub use self::controller::Nvme;
use crate::device::Mappable;
use crate::pci::function::{Function, FunctionError};
use crate::pci::interrupts::Kinds;
use crate::pci::layout::{BarLayout, Layout, MsixLayout};

/// Mass storage controller, non-volatile memory, NVM Express I/O controller (PCI Code and ID Assignment 1.16, 1.1).
const CLASS: u32 = 0x01_08_02;
/// The vendor that nobody is, as QEMU's own models have it.
const VENDOR: u16 = 0x1234;
const DEVICE: u16 = 0x1de0;
/// Registers and doorbells, MSI-X's table, its pending bits: a page or two each.
const BAR_SIZE: u64 = 0x4000;
const MSIX_TABLE: u32 = 0x2000;
const MSIX_PBA: u32 = 0x3000;

/// Pairs of I/O queues that a controller has room for.
pub const MAX_QUEUES: u16 = 64;

/// What a controller may be told.
#[derive(Clone, Debug)]
pub struct Options {
    /// Its serial number: printable ASCII, cut to 20 characters. What the namespace is called by follows from it, too.
    pub serial: String,
    /// Pairs of I/O queues, 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// Threads that carry out commands, at least 1.
    pub workers: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { serial: "ring3".into(), queues: 16, workers: 2 }
    }
}

/// A controller cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NvmeError {
    /// See [`Options`].
    #[error("an NVMe controller has 1 to {MAX_QUEUES} pairs of queues, not {0}")]
    Queues(u16),
    /// The function cannot be made.
    #[error(transparent)]
    Function(#[from] FunctionError),
    /// The host has no threads left.
    #[error("cannot start a thread")]
    Thread(#[from] std::io::Error),
}

/// The controller as a PCI function.
///
/// # Errors
/// [`NvmeError`].
pub fn new(disk: Disk, options: &Options) -> Result<Function<Nvme>, NvmeError> {
    if !(1..=MAX_QUEUES).contains(&options.queues) {
        return Err(NvmeError::Queues(options.queues));
    }
    // A vector for each completion queue, the admin queue's included.
    let vectors = options.queues + 1;
    let layout = Layout {
        bars: vec![BarLayout {
            index: 0,
            kind: BarKind::Memory64 { prefetchable: false },
            size: BAR_SIZE,
            memory: Mappable::No,
        }],
        interrupts: Kinds { intx: true, msi: 0, msix: vectors },
        msix: Some(MsixLayout { bar: 0, table: MSIX_TABLE, pba: MSIX_PBA }),
        express: true,
        power_management: true,
        dma_logging: true,
        ..Layout::new(PciIds { vendor: VENDOR, device: DEVICE, class: CLASS, ..Default::default() })
    };
    let mut started = Ok(());
    let function = Function::new(layout, |link| {
        let mut nvme = Nvme::new(link, disk, options);
        started = nvme.start(options.workers.max(1));
        nvme
    })?;
    started?;
    Ok(function)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

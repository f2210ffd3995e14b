//! What devices write to guest memory by themselves, unseen.
//!
//! # Theory of operation
//!
//! The processor keeps decoded code, and must see who writes to it (`cpu::ram`). A device of the host, or one in a process that has
//! the memory mapped, is not seen. But the guest cannot know that data has come before something tells it: an interrupt, a
//! register that it reads, or that a buffer is not the device's any more. So before each of these, all pages that the device
//! may have written to are suspected: what was decoded from them is compared with what is there now, and runs again if it is
//! the same.
//!
//! Without an IOMMU of the guest's that is all of memory. Behind one it is what the guest has mapped for the device, and
//! lets it write to: little, most of the time, and nothing of it is code.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use cpu::GuestRam;
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryRegion, MmapRegion};

use crate::vcpu::lock;

/// Guest memory that a device may write to by itself, now.
#[derive(Debug)]
pub(crate) struct Exposed {
    ram: Arc<GuestRam>,
    what: Mutex<What>,
}

/// How much that is.
#[derive(Debug)]
pub(crate) enum What {
    /// All of it.
    All,
    /// Runs of it, by the device's addresses.
    Runs(BTreeMap<u64, Run>),
}

/// A run of guest memory, which lies in one region.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Run {
    /// Its guest-physical address.
    pub(crate) physical: u64,
    /// Bytes.
    pub(crate) length: u64,
}

impl Exposed {
    /// What a device may write to at first.
    pub(crate) fn new(ram: &Arc<GuestRam>, what: What) -> Arc<Self> {
        Arc::new(Self { ram: Arc::clone(ram), what: Mutex::new(what) })
    }

    /// The guest is about to learn that the device has written.
    pub(crate) fn note_writes(&self) {
        self.note(&lock(&self.what));
    }

    /// From now on it is this. What it was is noted as written: the device does not write there any more.
    pub(crate) fn change(&self, to: What) {
        let before = std::mem::replace(&mut *lock(&self.what), to);
        self.note(&before);
    }

    /// The device may write there, too.
    pub(crate) fn add(&self, iova: u64, run: Run) {
        if let What::Runs(runs) = &mut *lock(&self.what) {
            runs.insert(iova, run);
        }
    }

    /// The device does not write to the run at `iova` any more, if there is one.
    pub(crate) fn remove(&self, iova: u64) {
        let run = match &mut *lock(&self.what) {
            What::Runs(runs) => runs.remove(&iova),
            What::All => None,
        };
        if let Some(run) = run {
            self.note_run(run);
        }
    }

    /// The runs; none when it is all.
    #[cfg(test)]
    pub(crate) fn runs(&self) -> Option<Vec<(u64, Run)>> {
        match &*lock(&self.what) {
            What::All => None,
            What::Runs(runs) => Some(runs.iter().map(|(at, run)| (*at, *run)).collect()),
        }
    }

    fn note(&self, what: &What) {
        match what {
            What::All => {
                for region in self.ram.iter() {
                    MmapRegion::bitmap(region).suspect(0, region.len() as usize);
                }
            }
            What::Runs(runs) => runs.values().for_each(|run| self.note_run(*run)),
        }
    }

    fn note_run(&self, run: Run) {
        if let Some((region, at)) = self.ram.to_region_addr(GuestAddress(run.physical)) {
            MmapRegion::bitmap(region).suspect(at.0 as usize, run.length as usize);
        }
    }
}

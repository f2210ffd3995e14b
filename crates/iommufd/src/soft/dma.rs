//! Copies by a device's address, as a device with no thread of its own makes them.

use std::sync::{Arc, Mutex};

use super::{
    access::{Access, Fault, FaultReason},
    port::{Port, PortReader, PortSection},
};
use crate::{domain::HostAddr, iova::Iova};

/// How many readers are kept for the next access.
const IDLE: usize = 16;
/// How many bytes are copied in one section, at the most: those who unmap wait for it.
const LONGEST: usize = 256 << 10;

/// DMA through a [`Port`], from any thread. Nothing that is mapped or unmapped elsewhere holds it up; memory that is just
/// being moved it waits for. Faults are reported ([`Port::report`]).
#[derive(Debug)]
pub struct PortDma {
    port: Arc<Port>,
    idle: Mutex<Vec<PortReader>>,
}

impl PortDma {
    /// One that goes through `port`.
    #[must_use]
    pub fn new(port: Arc<Port>) -> Self {
        Self { port, idle: Mutex::default() }
    }

    /// With a reader that nobody else uses. No thread waits for another here: who does not get a reader makes one.
    fn with<T>(&self, f: impl FnOnce(&mut PortReader) -> T) -> T {
        let kept = self.idle.try_lock().ok().and_then(|mut idle| idle.pop());
        let mut reader = kept.unwrap_or_else(|| self.port.reader());
        let result = f(&mut reader);
        if let Ok(mut idle) = self.idle.try_lock()
            && idle.len() < IDLE
        {
            idle.push(reader);
        }
        result
    }

    /// Does `length` bytes from `iova` on, by sections; `copy` does what lies together from a byte on. What comes before a
    /// fault is done.
    fn copy(
        &self,
        iova: Iova,
        length: usize,
        access: Access,
        mut copy: impl FnMut(&PortSection<&mut PortReader>, Iova, usize) -> Result<usize, Fault>,
    ) -> Result<(), Fault> {
        let result = self.with(|reader| {
            let mut done = 0;
            while done < length {
                let section = reader.section();
                let end = length.min(done.saturating_add(LONGEST));
                let mut fault = None;
                while done < end && fault.is_none() {
                    let at = iova.0.checked_add(done as u64).map(Iova);
                    // What is past the last address nobody maps.
                    let beyond = Fault { iova: Iova(u64::MAX), access, reason: FaultReason::Unmapped };
                    match at.ok_or(beyond).and_then(|at| copy(&section, at, done)) {
                        Ok(n) => done += n,
                        Err(why) => fault = Some(why),
                    }
                }
                drop(section);
                match fault {
                    Some(Fault { reason: FaultReason::Moving, .. }) => reader.settle(),
                    Some(fault) => return Err(fault),
                    None => {}
                }
            }
            Ok(())
        });
        result.inspect_err(|fault| self.port.report(fault))
    }

    /// Copies from the memory at `iova`.
    ///
    /// # Errors
    /// The first fault.
    pub fn read(&self, iova: Iova, to: &mut [u8]) -> Result<(), Fault> {
        self.copy(iova, to.len(), Access::Read, |section, at, done| {
            section.read(at, to.get_mut(done..).unwrap_or_default())
        })
    }

    /// Copies to it.
    ///
    /// # Errors
    /// The first fault.
    pub fn write(&self, iova: Iova, from: &[u8]) -> Result<(), Fault> {
        self.copy(iova, from.len(), Access::Write, |section, at, done| {
            section.write(at, from.get(done..).unwrap_or_default())
        })
    }

    /// Where `iova` is now, whatever may be done there.
    ///
    /// # Errors
    /// What an access would meet; it is not reported.
    pub fn locate(&self, iova: Iova) -> Result<HostAddr, Fault> {
        self.with(|reader| {
            loop {
                let section = reader.section();
                let found = match section.translate(iova, Access::Read) {
                    Err(fault) if fault.reason == FaultReason::Permission => {
                        section.translate(iova, Access::Write)
                    }
                    found => found,
                };
                drop(section);
                match found {
                    Err(fault) if fault.reason == FaultReason::Moving => reader.settle(),
                    found => return found.map(|found| found.host),
                }
            }
        })
    }
}

//! HW_QUEUE: a queue in the guest's memory that the hardware reads itself.
//!
//! Its memory is pinned for as long as it lives, by the functions that accesses use, as an owner: nobody can unmap it
//! meanwhile. Queues of a type are made from index 0 upwards and destroyed downwards: each one uses the one below it.

use core::fmt;
use std::sync::{Arc, Weak};

use super::{Pending, ioas::IoasObject, table::Use, viommu::Viommu};
use crate::{
    Context, Errno, Result,
    domain::HostAddr,
    inject,
    ioas::{AccessId, AccessOps, Ioas, Pinned},
    iova::{Iova, IovaRange, PAGE_SIZE},
    viommu::{HardwareQueue, QueueAddressing, QueueRequest},
};

/// The pinned memory of a queue. It may be kept for as long as the queue: its pages stay pinned.
#[derive(Clone, Debug)]
pub struct QueueMemory {
    pinned: Arc<Pinned>,
    /// Where the queue begins in the pinned pages.
    offset: u64,
    length: u64,
    host: Option<HostAddr>,
}

impl QueueMemory {
    /// How many bytes it has.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Where it is in host memory; none when the hardware reads it through a page table and its pages need not lie together.
    pub fn host(&self) -> Option<HostAddr> {
        self.host
    }

    fn at(&self, offset: u64, length: usize) -> Result<u64> {
        let length = u64::try_from(length).map_err(|_| Errno::INVAL)?;
        let end = offset.checked_add(length).ok_or(Errno::INVAL)?;
        if end > self.length { Err(Errno::INVAL) } else { Ok(self.offset + offset) }
    }

    /// Copies from byte `offset` of the queue on. EINVAL past its end.
    pub fn read(&self, offset: u64, to: &mut [u8]) -> Result<()> {
        self.pinned.read(self.at(offset, to.len())?, to)
    }

    /// Copies to it. EINVAL past its end, EPERM when the guest may only read there.
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<()> {
        self.pinned.write(self.at(offset, from.len())?, from)
    }
}

/// A hardware queue.
pub(crate) struct HwQueue {
    kind: u32,
    index: u32,
    /// None while it is dropped. It goes before the memory.
    driver: Option<Box<dyn HardwareQueue>>,
    _memory: QueueMemory,
    _access: QueueAccess,
    _below: Option<Use<HwQueue>>,
    viommu: Use<Viommu>,
}

impl fmt::Debug for HwQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HwQueue")
            .field("index", &self.index)
            .field("driver", &self.driver)
            .finish_non_exhaustive()
    }
}

impl Drop for HwQueue {
    fn drop(&mut self) {
        // Its index stays taken until the driver has ended it. That may wait for a thread that is just calling somebody who
        // wants something of the vIOMMU, so nothing is locked meanwhile.
        self.driver = None;
        self.viommu.parts().queues.remove(&(self.kind, self.index));
    }
}

impl Context {
    /// - EOPNOTSUPP: the vIOMMU has no queues of this type.
    /// - EINVAL: the length is 0, or the index is past the last one; EOVERFLOW: it goes past the last address.
    /// - ENOENT: no such vIOMMU, or not all of it is mapped.
    /// - EFAULT: the hardware reads by host addresses, and its pages do not lie together.
    /// - EEXIST: there is one of the index; EIO: there is none of the index below.
    pub(crate) fn prepare_hw_queue(
        &self,
        viommu: u32,
        kind: u32,
        index: u32,
        iova: Iova,
        length: u64,
    ) -> Result<Pending<HwQueue>> {
        inject::check()?;
        let range = IovaRange::with_length(iova, length)?;
        let viommu = self.table().get::<Viommu>(viommu)?;
        let (addressing, count) = viommu.driver.queues(kind).ok_or(Errno::OPNOTSUPP)?;
        // The space is aligned to pages from now on, as for whoever pins.
        let access = QueueAccess::new(&viommu.parent.ioas)?;
        let memory = pin(&viommu, range, length, addressing)?;
        if index >= count {
            return Err(Errno::INVAL);
        }
        let reservation = self.table().reserve()?;
        let mut parts = viommu.parts();
        if parts.queues.contains_key(&(kind, index)) {
            return Err(Errno::EXIST);
        }
        let below = match index.checked_sub(1) {
            Some(below) => {
                let id = parts.queues.get(&(kind, below)).ok_or(Errno::IO)?;
                // One that is only just being made, or destroyed, is not there.
                Some(self.table().get::<HwQueue>(*id).map_err(|_| Errno::IO)?.hold())
            }
            None => None,
        };
        let request = QueueRequest { kind, index, iova: range, memory: memory.clone() };
        let driver = Some(viommu.driver.create_queue(request)?);
        parts.queues.insert((kind, index), reservation.id());
        drop(parts);
        let queue = HwQueue {
            kind,
            index,
            driver,
            _memory: memory,
            _access: access,
            _below: below,
            viommu: viommu.hold(),
        };
        Ok(Pending::new(reservation, queue))
    }
}

/// A queue's being an access of the address space: what is mapped there must be whole pages.
struct QueueAccess {
    id: AccessId,
    space: Arc<Ioas>,
}

/// Nobody asks a queue to let go.
struct Owner;

impl AccessOps for Owner {
    fn unmap(&self, _range: IovaRange) {}
}

impl QueueAccess {
    fn new(ioas: &IoasObject) -> Result<Self> {
        let id = ioas.space.add_access(Weak::<Owner>::new(), PAGE_SIZE)?;
        Ok(Self { id, space: ioas.space.clone() })
    }
}

impl Drop for QueueAccess {
    fn drop(&mut self) {
        self.space.remove_access(self.id);
    }
}

/// Pins whole pages around a queue.
fn pin(viommu: &Viommu, range: IovaRange, length: u64, addressing: QueueAddressing) -> Result<QueueMemory> {
    let offset = range.start().0 % PAGE_SIZE;
    let start = range.start().0 - offset;
    // The last page may be the last of all.
    let pages = (range.last().0 - start) / PAGE_SIZE + 1;
    let pinned_length = pages.checked_mul(PAGE_SIZE).ok_or(Errno::OVERFLOW)?;
    let space = &viommu.parent.ioas.space;
    let pinned = match space.pin(Iova(start), pinned_length, true, true) {
        // A queue that is only read may be where the guest's devices may only read.
        Err(Errno::PERM) => space.pin(Iova(start), pinned_length, false, true),
        pinned => pinned,
    };
    let pinned = Arc::new(pinned?);
    let host = match addressing {
        QueueAddressing::Translated => None,
        QueueAddressing::Contiguous => match pinned.runs().as_slice() {
            [run] => Some(HostAddr(run.start.0 + offset)),
            _ => return Err(Errno::FAULT),
        },
    };
    Ok(QueueMemory { pinned, offset, length, host })
}

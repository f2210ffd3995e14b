//! What a driver of an IOMMU provides for a guest: virtual IOMMUs, and what belongs to them.
//!
//! A vIOMMU (`IOMMU_VIOMMU_ALLOC`) is a guest's slice of an IOMMU: its device ids (vDEVICEs), its own command queues, its
//! events. The objects, their ids and their lifetimes are this crate's affair; what a driver has to say to them is in
//! [`VirtualIommu`], and what it may ask for in [`ViommuPort`].

use core::{any::Any, fmt};
use std::sync::Arc;

use crate::{
    Errno, Result,
    caller::Caller,
    hardware::{Entries, Hardware, Nested, UserData},
    iova::IovaRange,
};

pub use crate::object::{Published, QueueMemory, ViommuPort};

/// How the hardware reads a guest's queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum QueueAddressing {
    /// By host addresses: the queue must be one run of host memory.
    Contiguous,
    /// Through the page table of the nesting parent: its pages may lie anywhere.
    Translated,
}

/// A queue that a guest wants to hand to the hardware (`IOMMU_HW_QUEUE_ALLOC`).
#[derive(Debug)]
pub struct QueueRequest {
    /// `enum iommu_hw_queue_type`.
    pub kind: u32,
    /// Which queue of that type it is.
    pub index: u32,
    /// Where it is for the guest: in the address space of the nesting parent.
    pub iova: IovaRange,
    /// Its memory, pinned: nobody can unmap it while this lives.
    pub memory: QueueMemory,
}

/// A queue that the hardware has. Dropping it takes the queue away from the hardware.
pub trait HardwareQueue: Send + Sync + fmt::Debug {}

/// A guest's slice of an IOMMU. Dropping it ends it; devices, queues and page tables of it are gone by then.
pub trait VirtualIommu: Send + Sync + fmt::Debug {
    /// A guest's page table, for devices of this vIOMMU. EOPNOTSUPP without nesting.
    fn alloc_nested(&self, caller: &dyn Caller, data: UserData) -> Result<Arc<dyn Nested>> {
        let _ = (caller, data);
        Err(Errno::OPNOTSUPP)
    }

    /// Runs invalidations that the guest asks for: `done` says how many entries were run, also on an error.
    fn invalidate(&self, caller: &dyn Caller, entries: Entries, done: &mut u32) -> Result<()> {
        let _ = (caller, entries, done);
        Err(Errno::OPNOTSUPP)
    }

    /// The guest knows `hardware` by `virt_id` from now on (a stream id, a requester id).
    fn add_device(&self, hardware: &Arc<dyn Hardware>, virt_id: u64) -> Result<()> {
        let _ = (hardware, virt_id);
        Ok(())
    }

    /// The guest knows no device by `virt_id` any more.
    fn remove_device(&self, virt_id: u64) {
        let _ = virt_id;
    }

    /// Whether it has events of this type (`enum iommu_veventq_type`).
    fn has_events(&self, kind: u32) -> bool {
        let _ = kind;
        false
    }

    /// How the hardware reads queues of this type (`enum iommu_hw_queue_type`), and how many it has; none when it has no
    /// such type.
    fn queues(&self, kind: u32) -> Option<(QueueAddressing, u32)> {
        let _ = kind;
        None
    }

    /// Gives the hardware a queue. The queues before it are there, and stay for as long as it does.
    fn create_queue(&self, request: QueueRequest) -> Result<Box<dyn HardwareQueue>> {
        let _ = request;
        Err(Errno::OPNOTSUPP)
    }

    /// The concrete type, for the driver that made it.
    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync>;
}

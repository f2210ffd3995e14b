//! A vIOMMU in software: an Intel VT-d unit in legacy mode, whose page tables and invalidation queues are in a guest's memory.
//!
//! # Theory of operation
//!
//! A guest's driver of VT-d writes page tables and descriptors into its memory. A monitor shows it the registers, and makes
//! what they say into objects here:
//!
//! | the guest's | here |
//! |---|---|
//! | memory | an IOAS, and a HWPT on it, made as a parent of nested ones |
//! | unit | a vIOMMU of type [`VIOMMU_TYPE`] above that parent |
//! | requester id of a device | a vDEVICE; `virt_id` is bus, device and function |
//! | context entry: page table, width, domain id | a nested HWPT ([`TableData`]), which the device is attached to |
//! | invalidation queue | a HW_QUEUE of type [`QUEUE_TYPE`], which a thread serves ([`Queue`]) |
//! | fault recording registers | a VEVENTQ of [`Event`]s, and [`Listener::fault`] |
//!
//! Devices translate by what they are attached to, through [`Port`](super::Port)s as ever: from an IOTLB without a lock, and by
//! a walk of the guest's table for what that has not (`table`). The guest moves its queue's tail; no call is
//! necessary for what follows (`queue`): invalidations, statuses, and events.
//!
//! What is not here: root and context tables, which a monitor reads when the guest says that they have changed
//! ([`Listener::contexts`]) or when a device that is attached to nothing faults; interrupt remapping; device TLBs; scalable mode.
//!
//! A monitor whose guest has devices of another IOMMU behind the unit carries the guest's tables over to that: it hears what the
//! guest wants forgotten ([`Listener::translations`]), which in caching mode includes what was not there, and looks for
//! what is there now ([`Stage::pages`]).
//!
//! Section numbers are those of Intel's "Virtualization Technology for Directed I/O", revision 3 and later.
//!
//! Locks: the vIOMMU's are leaves, and nobody waits for readers, nor calls a [`Listener`], with one held.

mod abi;
mod descriptor;
mod doorbell;
mod queue;
mod record;
mod stage;
mod table;
#[cfg(test)]
mod tests;
mod unit;

pub use abi::{
    Doorbell, EVENT_LENGTH, EVENT_TYPE, Event, HWPT_DATA_TYPE, INVALIDATE_TYPE, QUEUE_TYPE, QUEUES,
    TableData, VIOMMU_TYPE, ViommuData, event,
};
pub use descriptor::{ContextScope, Invalidation, IotlbScope, MAX_MASK, QueueError};
pub use queue::Queue;
pub use record::FaultRecord;
pub use stage::{Leaf, Pages, Stage};
pub use unit::{Listener, VtdIommu};

pub(super) use table::{GuestTable, NestedTable};

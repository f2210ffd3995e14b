//! The numbers and structures of the software vIOMMU, which are ring3's own: the kernel has no such type.
//!
//! The numbers are "r3" and a serial number, far from those that the kernel gives out.

use uapi::iommufd::iommufd_vevent_header;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `IOMMU_VIOMMU_ALLOC`: a VT-d unit in legacy mode. The data is a [`ViommuData`], or nothing.
pub const VIOMMU_TYPE: u32 = 0x7233_0001;
/// `IOMMU_HWPT_ALLOC` on such a vIOMMU: the data is a [`TableData`].
pub const HWPT_DATA_TYPE: u32 = 0x7233_0002;
/// `IOMMU_HW_QUEUE_ALLOC`: an invalidation queue of 128-bit descriptors (VT-d 6.5.2). Its length is a power of two from 4 KiB
/// to 512 KiB, and it begins at a page.
pub const QUEUE_TYPE: u32 = 0x7233_0003;
/// `IOMMU_VEVENTQ_ALLOC`: the events are [`Event`]s.
pub const EVENT_TYPE: u32 = 0x7233_0004;
/// `IOMMU_HWPT_INVALIDATE` on the vIOMMU: the entries are descriptors of 16 bytes as in the queue, but no wait descriptors.
pub const INVALIDATE_TYPE: u32 = 0x7233_0005;

/// How many queues a vIOMMU has.
pub const QUEUES: u32 = 4;

/// What comes with `IOMMU_VIOMMU_ALLOC`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ViommuData {
    /// 0.
    pub flags: u32,
    /// Bits of an address in the guest's memory: what is above them in an entry of a page table is reserved. 0 for 52.
    pub address_bits: u32,
    /// Out: the offset for `mmap` of the page with the queues' doorbells.
    pub doorbell_offset: u64,
    /// Out: how long that is.
    pub doorbell_length: u64,
}

/// What comes with `IOMMU_HWPT_ALLOC`: what a context entry (VT-d 9.3) says of a page table.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct TableData {
    /// Where the top table is in the guest's memory (SLPTPTR); a multiple of 4096.
    pub root: u64,
    /// The domain id that invalidations name, below 65536 (DID).
    pub domain: u32,
    /// Bits of an address that is translated: 39 or 48 (AW).
    pub address_bits: u32,
}

/// A queue's words in the doorbell page: those of queue `i` begin at `i * 64`. All are 32 bits, in the machine's order.
///
/// A program that moves the tail writes it, adds one to `wake`, and calls `futex(FUTEX_WAKE)` on that, which may be left out
/// while `idle` is 0. There is nothing else that reads the words but the thread of the queue.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Doorbell {
    /// Written by the program: the byte in the queue behind the last descriptor (IQT).
    pub tail: u32,
    /// Written by the thread: the byte of the next descriptor (IQH).
    pub head: u32,
    /// Written by the thread: why the queue stopped at `head`, a number of [`QueueError`](super::QueueError); 0 while it runs.
    /// The program writes 0, and rings, to have it go on there.
    pub error: u32,
    /// The futex word.
    pub wake: u32,
    /// Not 0 while the thread sleeps.
    pub idle: u32,
    /// Added to by the thread for each wait descriptor that asks for an interrupt: a futex word to wait for it.
    pub completed: u32,
    /// 0.
    pub reserved: [u32; 10],
}

/// What follows a [`iommufd_vevent_header`] in the event queue.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Event {
    /// One of [`event`].
    pub kind: u32,
    /// Of a queue's event: which queue.
    pub queue: u32,
    /// Of a fault: the record as in a fault recording register (VT-d 10.4.14), low half first. Of a queue that stopped: the
    /// number of the [`QueueError`](super::QueueError), and the head. Else 0.
    pub data: [u64; 2],
}

/// Kinds of [`Event`]s.
pub mod event {
    /// A device's access could not be translated.
    pub const FAULT: u32 = 1;
    /// A queue stopped at a descriptor that is none.
    pub const QUEUE_STOPPED: u32 = 2;
    /// A wait descriptor that asks for an interrupt was executed.
    pub const COMPLETED: u32 = 3;
}

/// How long a record in the event queue is.
pub const EVENT_LENGTH: usize = size_of::<iommufd_vevent_header>() + size_of::<Event>();

//! Virtio devices over PCI (virtio 1.2): console, disk, file system, network, entropy, IOMMU.
//!
//! The crate knows nothing of the machine. The machine gives it guest memory, a place for its interrupts
//! ([`MsiSink`](::pci::msix::MsiSink)) and the accesses of the guest; it gives back what the registers say.
//!
//! # A buffer's way from driver to device and back
//!
//! 1. The driver writes a request into guest memory, describes its parts by descriptors, and puts the index of
//!    the first one into the available ring of a queue.
//! 2. It writes to the queue's doorbell. The vCPU leaves the guest, and the machine finds the BAR and calls
//!    [`pci::VirtioPci::bar_write`], which signals the queue's [`event::Event`] and is done.
//! 3. The device's thread wakes up in epoll and calls [`queue::Virtq::pop`]. The chain of descriptors is
//!    walked, checked and turned into two runs of bytes: [`queue::Chain::readable`] and
//!    [`queue::Chain::writable`].
//! 4. The device does what is asked, and system calls move the data between the host's file and the guest's
//!    own pages ([`queue::Buffers::slices`]); pages that were written are marked in the dirty bitmap.
//! 5. [`queue::Virtq::push`] puts the chain into the used ring, and [`queue::Virtq::signal`] looks at the
//!    driver's event index, whether it wants to know.
//! 6. If so, [`interrupt::Interrupts`] takes the queue's vector from the MSI-X table ([`::pci::msix`]) and hands the message to
//!    the machine, which interrupts a vCPU.
//!
//! Nothing on this way trusts the guest. Register accesses of any offset and width have a meaning; a chain
//! that breaks the rules puts the device into the state DEVICE_NEEDS_RESET, with a warning at a bounded rate,
//! until the driver resets it.
//!
//! # Contents
//!
//! Virtio itself: [`pci`], the registers and the status protocol; [`queue`], queues and chains; [`interrupt`],
//! the way back; [`device`], what a device kind implements; [`event`], the eventfd in between.
//!
//! The devices: [`console`], [`block`], [`fs`], [`net`], [`rng`], [`iommu`].
#![forbid(unsafe_code)]

pub mod block;
pub mod console;
pub mod device;
pub mod event;
pub mod fs;
pub mod interrupt;
pub mod iommu;
pub mod net;
pub mod pci;
pub mod queue;
pub mod rng;
mod serve;
mod warn;
mod worker;

//! Accesses of devices, and what becomes of them.

use crate::{
    domain::{HostAddr, Prot},
    iova::Iova,
};

/// What a device wants to do with memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Read it.
    Read,
    /// Write it, or change it atomically.
    Write,
}

/// Why a translation failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FaultReason {
    /// Nothing is mapped there.
    #[error("nothing is mapped")]
    Unmapped,
    /// What is mapped there does not allow the access.
    #[error("the mapping does not allow it")]
    Permission,
    /// The device is attached to nothing.
    #[error("the device is attached to no address space")]
    Detached,
    /// The memory is just being moved: try again, in another section, once it has arrived
    /// ([`PortReader::settle`](super::PortReader::settle)).
    #[error("the memory is being moved")]
    Moving,
    /// The address is beyond what the guest's page table translates.
    #[error("the address is beyond the guest's page table")]
    Range,
    /// A page table of the guest's is where it has no memory.
    #[error("a page table of the guest's is not in its memory")]
    Table,
    /// An entry of the guest's page table has reserved bits.
    #[error("an entry of the guest's page table has reserved bits set")]
    Reserved,
    /// The guest's page table leads to where the guest has no memory.
    #[error("the guest's page table leads to no memory")]
    Target,
    /// The address is not the guest's page table's to translate: a write of four bytes there would be an interrupt request, and
    /// nothing else is answered.
    #[error("the address is one of interrupt requests")]
    Interrupt,
    /// It is mapped, but not known to be memory of this process.
    #[error("what is mapped cannot be accessed by its address")]
    Foreign,
}

/// An access of a device that could not be translated.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{access:?} at {iova:?}: {reason}")]
pub struct Fault {
    /// Where.
    pub iova: Iova,
    /// What it wanted.
    pub access: Access,
    /// Why it got nothing.
    pub reason: FaultReason,
}

/// Where an address is mapped to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Translation {
    /// The address in this process. Memory (or registers) to be accessed as such as long as the section is open.
    pub host: HostAddr,
    /// How many bytes from there on belong to the same leaf; at least one.
    pub length: u64,
    /// What may be done with them.
    pub prot: Prot,
}

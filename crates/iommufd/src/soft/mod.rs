//! An IOMMU in software: page tables that devices of this process translate by, without a lock.
//!
//! # Theory of operation
//!
//! A [`SoftDomain`] is a radix table of atomic entries, four levels of 512 as on x86, so that it translates 48 bits; leaves
//! are of 4 KiB, 2 MiB and 1 GiB. Whoever maps and unmaps holds the table's mutex. A device does not: it has a
//! [`Reader`], begins a [`Section`], and translates as often as it likes by plain loads.
//!
//! A section is what a transaction on a bus is to hardware. What [`Section::translate`] returned stays good until the section
//! ends, also when the address is unmapped meanwhile; [`Domain::sync`](crate::domain::Domain::sync) waits for the
//! sections that may have seen the old entry (`epoch`). So memory may be given away after unmap and sync, and so may the
//! table's own nodes, which the table collects until then. A section should be short: what it holds up are the calls that unmap,
//! never another device, and never a call that maps.
//!
//! The price of a section are two exchanges on a cache line of the reader's own, some 15 ns.
//!
//! While writes are tracked, a translation for writing sets the leaf's dirty bit by compare-exchange, unless it is set.
//! Clearing it is followed by a sync: a section that found the bit set has ended then, and the next one sets it anew.
//!
//! Memory that moves is not unmapped: who comes to it finds [`FaultReason::Moving`], leaves its section, and waits until it
//! has arrived.
//!
//! Contents: `epoch`, who waits for whom, made of `sync`; `table`, the radix table, and `section`, reading it; `domain`, the
//! [`Domain`](crate::domain::Domain) made of it; `hardware`, the IOMMU that `iommufd` binds devices to; `port`, what a device's
//! DMA goes through, and `dma`, copies by that; [`vtd`], a vIOMMU for guests, whose page tables are translated by the same.
//! `unsafe` code is in `table`, `section` and `port`, where memory is looked at, and in `domain` and `vtd::table`, where it is
//! entered.

mod access;
mod counters;
mod dma;
mod domain;
mod epoch;
mod hardware;
mod port;
mod section;
mod sync;
mod table;
#[cfg(test)]
mod tests;
pub mod vtd;

pub use access::{Access, Fault, FaultReason, Translation};
pub use counters::Counters;
pub use dma::PortDma;
pub use domain::SoftDomain;
pub(crate) use domain::map_memory;
pub use hardware::SoftDevice;
pub use port::{Port, PortReader, PortSection};
pub use section::{Reader, Section};

//! User-mode networking: Ethernet frames on one side, ordinary host sockets on the other.
//!
//! A guest, or a network namespace, is given a network card on which everything works, by a process without
//! any privilege: each flow of the guest's is one socket of the host's. There is no address translation by default:
//! the guest has the host's address.
//!
//! The engine knows frames and sockets. Where frames come from, a queue of a virtual machine, a tap device,
//! a socket to another VMM, is a [`tap::Tap`]; nothing here knows which. Everything that arrives by it is
//! hostile.

// `tcp::kernel` alone allows it.
#![deny(unsafe_code)]

mod arp;
mod claims;
pub mod config;
mod context;
mod dhcp;
mod dhcpv6;
mod engine;
mod flow;
pub mod follow;
mod forward;
mod frame;
mod group;
mod host;
mod icmp;
mod ndp;
mod network;
mod packet;
mod poller;
mod slots;
mod socket;
pub mod splice;
pub mod stats;
pub mod tap;
mod tcp;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;

pub use config::Config;
pub use engine::{Engine, Handle};
pub use host::{ALONE, ALONE_V6, GATEWAY_MAC, HostNetwork, Interface, Template};
pub use network::Network;
mod udp;
mod warn;

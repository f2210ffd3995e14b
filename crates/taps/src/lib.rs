//! Where `usernet`'s frames come from: the front ends of user-mode networking.
//!
//! Each module here is one kind of link to a guest, and implements [`usernet::tap::Tap`]. They know nothing of flows,
//! and the engine knows nothing of them.

// `tun::ioctl` alone allows it.
#![deny(unsafe_code)]

pub mod observed;
pub mod pcap;
pub mod ring;
pub mod stream;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod trace;
pub mod tun;
pub mod vhost_net;
pub mod vhost_user;
pub mod vnet;

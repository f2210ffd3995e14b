//! vfio-user: a device at the other end of a UNIX socket.
//!
//! # Theory of operation
//!
//! The protocol is QEMU's `docs/interop/vfio-user.rst`. A *client* (a monitor) connects to a *server* (who has the device);
//! one connection is one device. Both sides send commands and replies: the client asks for information, accesses regions,
//! gives eventfds for interrupts and announces memory; the server reads and writes that of the client's memory which came
//! without a descriptor to map.
//!
//! - [`wire`] has the layouts, and the table of commands that everything else follows.
//! - [`version`] is the first exchange.
//! - [`transport`] moves single messages and their descriptors over a socket.
//! - [`connection`] makes commands and replies of them, in both directions at a time.
//! - [`server`] serves any [`Device`](crate::device::Device); [`client`] is a `Device` whose other end is a server.
//!
//! # What a peer cannot do
//!
//! Neither side trusts the other. A message is at most [`version::MAX_MESSAGE`] bytes long and carries at most
//! [`version::MAX_FDS`] descriptors, which are closed when nobody takes them. What a command says about lengths is compared
//! with what came. A wrong command gets an errno; what leaves no way to find the next message (a wrong size in a
//! header, an impossible type, a reply that nobody waits for) ends the connection, for every waiter at once. So does a
//! peer that stops in the middle of a message, does not take what it is sent or does not answer: after
//! [`connection::Patience`]. Nobody holds a lock that another part needs while he waits for the peer.

pub mod client;
pub mod connection;
pub mod server;
pub mod transport;
pub mod version;
pub mod wire;

#[cfg(test)]
mod table;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;

pub use crate::{Errno, Result};

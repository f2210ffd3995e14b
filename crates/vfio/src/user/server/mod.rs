//! The side that has the device.
//!
//! # Theory of operation
//!
//! A [`Server`] serves one client after the other. A thread takes the client's commands, one at a time and in order, and
//! calls the device; the device's own threads reach the client's memory meanwhile (`memory`). What a command asks
//! for is decoded, checked and answered in `session`, features of the device in `feature`.
//!
//! When the client goes, the device is closed: it accesses no memory and signals no eventfd any more, and everything that
//! the client gave is unmapped and closed. What of the device's own state the next client finds is the device's matter
//! ([`Device::open`]).

mod dirty;
mod feature;
mod info;
mod memory;
mod session;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::connection::{Connection, Patience};
use super::transport::Broken;
use super::version::Capabilities;
use crate::device::Device;

/// What a server may be told.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How long the client may take.
    pub patience: Patience,
    /// What the server says that it can do, at most [`Capabilities::OURS`].
    pub capabilities: Capabilities,
}

impl Default for Options {
    fn default() -> Self {
        Self { patience: Patience::default(), capabilities: Capabilities::OURS }
    }
}

/// Gives one device to clients, one at a time.
#[derive(Debug)]
pub struct Server {
    device: Arc<dyn Device>,
    options: Options,
}

impl Server {
    /// A server of this device, which nobody else has open.
    pub fn new(device: Arc<dyn Device>, options: Options) -> Self {
        Self { device, options }
    }

    /// Serves the client at the other end of this UNIX stream socket until it goes: why the connection ended.
    ///
    /// The calling thread does it. To end it from elsewhere, shut down a duplicate of the socket.
    pub fn serve(&mut self, socket: OwnedFd) -> Broken {
        let connection = Arc::new(Connection::new(socket, true, self.options.patience));
        session::run(&self.device, &connection, &self.options)
    }
}

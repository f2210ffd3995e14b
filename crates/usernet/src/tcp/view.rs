//! A TCP segment of the guest's, parsed.

use std::net::IpAddr;

/// The control bits of a segment that matter here.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct TcpFlags {
    pub(crate) syn: bool,
    pub(crate) ack: bool,
    pub(crate) fin: bool,
    pub(crate) rst: bool,
    pub(crate) psh: bool,
}

/// A segment whose lengths agree with its frame's and whose checksum is right, or vouched for by the front end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct TcpView<'a> {
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    pub(crate) source_port: u16,
    pub(crate) destination_port: u16,
    pub(crate) seq: u32,
    pub(crate) ack: u32,
    pub(crate) flags: TcpFlags,
    /// As sent, not scaled.
    pub(crate) window: u16,
    /// The options' bytes.
    pub(crate) options: &'a [u8],
    pub(crate) payload: &'a [u8],
}

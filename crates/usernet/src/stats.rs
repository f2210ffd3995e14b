//! What the engine counts.

use std::ops::AddAssign;

use crate::packet::Refused;

/// Counters since the engine was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stats {
    /// Frames from the guest, and their bytes.
    pub frames_in: u64,
    /// Bytes of the frames from the guest.
    pub bytes_in: u64,
    /// Frames to the guest.
    pub frames_out: u64,
    /// Bytes of the frames to the guest.
    pub bytes_out: u64,
    /// Frames from the guest that led to nothing.
    pub dropped: Dropped,
    /// Frames and datagrams for the guest that were lost because it took none in time.
    pub overruns: u64,
    /// Flows that are open now: TCP.
    pub tcp_flows: usize,
    /// Flows that are open now: UDP.
    pub udp_flows: usize,
    /// Flows that are open now: ping.
    pub ping_flows: usize,
    /// Flows that ended before their time because a table was full.
    pub evicted: u64,
}

/// Frames from the guest that led to nothing, by reason.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Dropped {
    /// Headers that are cut short, or lengths that lie.
    pub malformed: u64,
    /// A wrong checksum.
    pub checksum: u64,
    /// Fragments: they are not put together.
    pub fragment: u64,
    /// Addresses that may not be on a wire.
    pub address: u64,
    /// Protocols that are not carried.
    pub unsupported: u64,
    /// Frames to the Ethernet address of somebody else.
    pub other_mac: u64,
    /// Multicast and broadcast, which do not leave the guest's link.
    pub multicast: u64,
    /// Protocols that the configuration turns off.
    pub disabled: u64,
    /// Datagrams that the host did not take.
    pub host: u64,
}

impl AddAssign for Stats {
    fn add_assign(&mut self, other: Self) {
        self.frames_in += other.frames_in;
        self.bytes_in += other.bytes_in;
        self.frames_out += other.frames_out;
        self.bytes_out += other.bytes_out;
        self.dropped += other.dropped;
        self.overruns += other.overruns;
        self.tcp_flows += other.tcp_flows;
        self.udp_flows += other.udp_flows;
        self.ping_flows += other.ping_flows;
        self.evicted += other.evicted;
    }
}

impl AddAssign for Dropped {
    fn add_assign(&mut self, other: Self) {
        self.malformed += other.malformed;
        self.checksum += other.checksum;
        self.fragment += other.fragment;
        self.address += other.address;
        self.unsupported += other.unsupported;
        self.other_mac += other.other_mac;
        self.multicast += other.multicast;
        self.disabled += other.disabled;
        self.host += other.host;
    }
}

impl Stats {
    pub(crate) fn refused(&mut self, why: Refused) {
        let counter = match why {
            Refused::Malformed => &mut self.dropped.malformed,
            Refused::Checksum => &mut self.dropped.checksum,
            Refused::Fragment => &mut self.dropped.fragment,
            Refused::Address => &mut self.dropped.address,
            Refused::Unsupported => &mut self.dropped.unsupported,
        };
        *counter += 1;
    }
}

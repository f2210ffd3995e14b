//! What the engine counts.

use std::fmt;
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

impl Dropped {
    /// All of them.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.by_reason().iter().map(|(_, count)| count).sum()
    }

    /// The counters, by name.
    #[must_use]
    pub fn by_reason(&self) -> [(&'static str, u64); 9] {
        let Self {
            malformed,
            checksum,
            fragment,
            address,
            unsupported,
            other_mac,
            multicast,
            disabled,
            host,
        } = *self;
        [
            ("malformed", malformed),
            ("checksum", checksum),
            ("fragment", fragment),
            ("address", address),
            ("unsupported", unsupported),
            ("other MAC", other_mac),
            ("multicast", multicast),
            ("disabled", disabled),
            ("host", host),
        ]
    }
}

/// In one line, without what did not happen:
/// `in 12 frames 1.5 kB, out 9 frames 900 B, flows 1 TCP 2 UDP 0 ping, dropped 3 (fragment 1, multicast 2)`.
impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "in {} frames {}, ", self.frames_in, Bytes(self.bytes_in))?;
        write!(f, "out {} frames {}, ", self.frames_out, Bytes(self.bytes_out))?;
        write!(f, "flows {} TCP {} UDP {} ping", self.tcp_flows, self.udp_flows, self.ping_flows)?;
        let dropped = self.dropped.total();
        if dropped > 0 {
            write!(f, ", dropped {dropped} (")?;
            let happened = self.dropped.by_reason().into_iter().filter(|(_, count)| *count > 0);
            for (index, (reason, count)) in happened.enumerate() {
                let comma = if index > 0 { ", " } else { "" };
                write!(f, "{comma}{reason} {count}")?;
            }
            write!(f, ")")?;
        }
        for (name, count) in [("overruns", self.overruns), ("evicted", self.evicted)] {
            if count > 0 {
                write!(f, ", {name} {count}")?;
            }
        }
        Ok(())
    }
}

/// Bytes as people read them, in powers of 1000.
struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 6] = ["kB", "MB", "GB", "TB", "PB", "EB"];
        if self.0 < 1000 {
            return write!(f, "{} B", self.0);
        }
        // Tenths of the unit, rounded down: counters do not run ahead.
        let mut tenths = self.0 / 100;
        let mut unit = 0;
        while tenths >= 10_000 {
            tenths /= 1000;
            unit += 1;
        }
        write!(f, "{}.{} {}", tenths / 10, tenths % 10, UNITS[unit])
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_says_what_happened() {
        let mut stats =
            Stats { frames_in: 12, bytes_in: 1_599, frames_out: 9, bytes_out: 999, ..Stats::default() };
        let flows = "in 12 frames 1.5 kB, out 9 frames 999 B, flows 0 TCP 0 UDP 0 ping";
        assert_eq!(stats.to_string(), flows);
        stats.dropped = Dropped { fragment: 1, multicast: 2, ..Dropped::default() };
        stats.evicted = 4;
        assert_eq!(stats.to_string(), format!("{flows}, dropped 3 (fragment 1, multicast 2), evicted 4"));
    }

    #[test]
    fn bytes_have_units() {
        for (bytes, text) in [
            (0, "0 B"),
            (1000, "1.0 kB"),
            (999_999, "999.9 kB"),
            (1_000_000, "1.0 MB"),
            (12_345_678_901, "12.3 GB"),
            (u64::MAX, "18.4 EB"),
        ] {
            assert_eq!(Bytes(bytes).to_string(), text);
        }
    }
}

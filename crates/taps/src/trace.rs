//! A link whose packets are logged, one line each, at `tracing`'s level of traces.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use etherparse::{IpNumber, LaxPacketHeaders, NetHeaders, TransportHeader};
use usernet::tap::Sent;

use crate::observed::Observer;

/// Logs the packets of an [`Observed`](crate::observed::Observed) link.
#[derive(Debug)]
pub struct PacketLog;

impl Observer for PacketLog {
    fn received(&self, frame: &[u8]) {
        tracing::trace!("from the guest: {}", Line { headers: frame, length: frame.len() });
    }

    fn sent(&self, header: &[u8], payload: &[u8], sent: Sent) {
        let full = if sent == Sent::Full { ", which has no room for it" } else { "" };
        let line = Line { headers: header, length: header.len() + payload.len() };
        tracing::trace!("to the guest{full}: {line}");
    }
}

/// What a frame is, as far as its headers tell.
struct Line<'a> {
    headers: &'a [u8],
    /// Of the whole frame.
    length: usize,
}

impl fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Ok(LaxPacketHeaders { net, transport, .. }) = LaxPacketHeaders::from_ethernet(self.headers)
        else {
            return write!(f, "no frame, {} bytes", self.length);
        };
        let (from, to, protocol): (IpAddr, IpAddr, IpNumber) = match net {
            Some(NetHeaders::Ipv4(ip, _)) => (ip.source.into(), ip.destination.into(), ip.protocol),
            Some(NetHeaders::Ipv6(ip, _)) => (ip.source.into(), ip.destination.into(), ip.next_header),
            Some(NetHeaders::Arp(_)) => return write!(f, "ARP, {} bytes", self.length),
            None => return write!(f, "neither IP nor ARP, {} bytes", self.length),
        };
        let pair = |from_port, to_port| (SocketAddr::new(from, from_port), SocketAddr::new(to, to_port));
        match transport {
            Some(TransportHeader::Tcp(tcp)) => {
                let (from, to) = pair(tcp.source_port, tcp.destination_port);
                write!(f, "TCP {from} to {to}")?;
                let flags = [tcp.syn, tcp.fin, tcp.rst, tcp.psh, tcp.urg];
                for (_, name) in
                    flags.iter().zip(["SYN", "FIN", "RST", "PSH", "URG"]).filter(|(set, _)| **set)
                {
                    write!(f, " {name}")?;
                }
                write!(f, " seq {}", tcp.sequence_number)?;
                if tcp.ack {
                    write!(f, " ack {}", tcp.acknowledgment_number)?;
                }
                write!(f, " window {}", tcp.window_size)?;
            }
            Some(TransportHeader::Udp(udp)) => {
                let (from, to) = pair(udp.source_port, udp.destination_port);
                write!(f, "UDP {from} to {to}")?;
            }
            Some(TransportHeader::Icmpv4(icmp)) => {
                let [kind, code, ..] = *icmp.to_bytes() else { return Ok(()) };
                write!(f, "ICMP {from} to {to} type {kind} code {code}")?;
            }
            Some(TransportHeader::Icmpv6(icmp)) => {
                let [kind, code, ..] = *icmp.to_bytes() else { return Ok(()) };
                write!(f, "ICMPv6 {from} to {to} type {kind} code {code}")?;
            }
            None => write!(f, "IP protocol {} {from} to {to}", protocol.0)?,
        }
        write!(f, ", {} bytes", self.length)
    }
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;

    use super::*;

    fn line(headers: &[u8], length: usize) -> String {
        Line { headers, length }.to_string()
    }

    #[test]
    fn packets_have_a_line() {
        let ethernet = || PacketBuilder::ethernet2([2; 6], [4; 6]);
        let v4 = || ethernet().ipv4([192, 0, 2, 15], [192, 0, 2, 2], 64);
        let mut tcp = Vec::new();
        v4().tcp(4000, 80, 7, 512).syn().ack(9).write(&mut tcp, b"payload").unwrap();
        let expected = "TCP 192.0.2.15:4000 to 192.0.2.2:80 SYN seq 7 ack 9 window 512";
        assert_eq!(line(&tcp, tcp.len()), format!("{expected}, 61 bytes"));
        // The payload may be elsewhere.
        assert_eq!(line(&tcp[..54], 1514), format!("{expected}, 1514 bytes"));
        let mut udp = Vec::new();
        let v6 = ethernet().ipv6([0x20; 16], [0x30; 16], 64).udp(53, 5353);
        v6.write(&mut udp, b"payload").unwrap();
        let (from, to) = ([0x20; 16], [0x30; 16]);
        let expected = format!("UDP [{}]:53 to [{}]:5353, 62 bytes", IpAddr::from(from), IpAddr::from(to));
        assert_eq!(line(&udp[..62], 62), expected);
        let mut ping = Vec::new();
        v4().icmpv4_echo_request(1, 2).write(&mut ping, b"").unwrap();
        assert_eq!(line(&ping, 42), "ICMP 192.0.2.15 to 192.0.2.2 type 8 code 0, 42 bytes");
        let mut other = tcp.clone();
        other[23] = 132;
        assert_eq!(line(&other, 61), "IP protocol 132 192.0.2.15 to 192.0.2.2, 61 bytes");
        assert_eq!(line(&[0; 3], 3), "no frame, 3 bytes");
        assert_eq!(line(&[0x88; 60], 60), "neither IP nor ARP, 60 bytes");
    }

    #[test]
    fn any_bytes_have_one() {
        for length in 0..100 {
            for byte in [0x00, 0x08, 0x45, 0x60, 0x86, 0xff] {
                assert!(!line(&vec![byte; length], length).is_empty());
            }
        }
    }
}

//! Segments of ours on their way to the guest: headers, checksums, offloads.

use std::net::IpAddr;

use etherparse::checksum::Sum16BitWords;
use etherparse::{EtherType, Ethernet2Header, IpNumber, Ipv4Header, Ipv6FlowLabel, Ipv6Header, TcpHeader};

use super::options::Options;
use super::seq::Seq;
use super::view::TcpView;
use crate::context::Context;
use crate::tap::{Offload, Sent};

/// Hops that our packets may take, as from a neighbour.
const HOP_LIMIT: u8 = 64;

/// The two ends of a flow as the guest sees them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Ends {
    pub(super) guest: IpAddr,
    pub(super) peer: IpAddr,
    pub(super) guest_port: u16,
    pub(super) peer_port: u16,
}

impl Ends {
    /// The ends of the flow that a segment of the guest's belongs to.
    pub(super) fn of(view: &TcpView<'_>) -> Self {
        Self {
            guest: view.source,
            peer: view.destination,
            guest_port: view.source_port,
            peer_port: view.destination_port,
        }
    }

    pub(super) fn is_ipv6(&self) -> bool {
        self.guest.is_ipv6()
    }

    /// The bytes of an IP and a TCP header without options.
    pub(super) fn headers(&self) -> u16 {
        if self.is_ipv6() { 40 + 20 } else { 20 + 20 }
    }
}

/// The control bits of a segment of ours. All but a SYN and a few RSTs have ACK.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Control {
    pub(super) syn: bool,
    pub(super) fin: bool,
    pub(super) rst: bool,
    pub(super) psh: bool,
}

/// A segment of ours, without its payload.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment {
    pub(super) seq: Seq,
    pub(super) ack: Option<Seq>,
    pub(super) control: Control,
    /// As sent, scaled already.
    pub(super) window: u16,
    pub(super) options: Options,
    /// Cut into pieces of so many bytes by the guest's end of the link.
    pub(super) cut: Option<u16>,
}

/// Headers in the making: Ethernet, IPv6 without extensions, TCP with all its options.
struct Headers {
    bytes: [u8; 14 + 40 + 60],
    length: usize,
}

impl Headers {
    fn push(&mut self, bytes: &[u8]) {
        self.bytes[self.length..self.length + bytes.len()].copy_from_slice(bytes);
        self.length += bytes.len();
    }
}

/// Sends a segment. A link that is gone takes everything: whoever reads from it learns of that.
pub(super) fn emit(cx: &mut Context<'_>, ends: &Ends, segment: &Segment, payload: &[u8]) -> Sent {
    let abilities = cx.link.abilities();
    let mut tcp = TcpHeader::new(ends.peer_port, ends.guest_port, segment.seq.0, segment.window);
    tcp.syn = segment.control.syn;
    tcp.fin = segment.control.fin;
    tcp.rst = segment.control.rst;
    tcp.psh = segment.control.psh;
    tcp.ack = segment.ack.is_some();
    tcp.acknowledgment_number = segment.ack.unwrap_or_default().0;
    if tcp.set_options_raw(segment.options.as_slice()).is_err() {
        tracing::error!("options of a segment of ours do not fit: sent without");
    }
    let length = tcp.header_len() + payload.len();
    let Ok(length_field) = u16::try_from(length) else {
        tracing::error!(length, "a segment of ours is longer than a packet: not sent");
        return Sent::Yes;
    };

    let mut headers = Headers { bytes: [0; _], length: 0 };
    let ether_type = if ends.is_ipv6() { EtherType::IPV6 } else { EtherType::IPV4 };
    let (source, destination) = (cx.config.gateway_mac, cx.link.guest_mac);
    headers.push(&Ethernet2Header { source, destination, ether_type }.to_bytes());
    let offload =
        Offload { needs_checksum: abilities.checksum || segment.cut.is_some(), segment: segment.cut };
    let pseudo = Sum16BitWords::new().add_2bytes([0, IpNumber::TCP.0]).add_2bytes(length_field.to_be_bytes());
    let pseudo = match (ends.peer, ends.guest) {
        (IpAddr::V4(peer), IpAddr::V4(guest)) => {
            let mut ip = Ipv4Header {
                total_len: 20 + length_field.min(u16::MAX - 20),
                dont_fragment: true,
                time_to_live: HOP_LIMIT,
                protocol: IpNumber::TCP,
                source: peer.octets(),
                destination: guest.octets(),
                ..Ipv4Header::default()
            };
            ip.header_checksum = ip.calc_header_checksum();
            headers.push(&ip.to_bytes());
            pseudo.add_slice(&ip.source).add_slice(&ip.destination)
        }
        (IpAddr::V6(peer), IpAddr::V6(guest)) => {
            let ip = Ipv6Header {
                traffic_class: 0,
                flow_label: Ipv6FlowLabel::ZERO,
                payload_length: length_field,
                next_header: IpNumber::TCP,
                hop_limit: HOP_LIMIT,
                source: peer.octets(),
                destination: guest.octets(),
            };
            headers.push(&ip.to_bytes());
            pseudo.add_slice(&ip.source).add_slice(&ip.destination)
        }
        _ => {
            tracing::error!(?ends, "a flow between two families");
            return Sent::Yes;
        }
    };
    tcp.checksum = if offload.needs_checksum {
        // The sum alone: whoever finishes it inverts it.
        (!pseudo.ones_complement()).to_be()
    } else {
        pseudo.add_slice(&tcp.to_bytes()).add_slice(payload).ones_complement().to_be()
    };
    headers.push(&tcp.to_bytes());
    cx.link.send(&headers.bytes[..headers.length], payload, offload).unwrap_or(Sent::Yes)
}

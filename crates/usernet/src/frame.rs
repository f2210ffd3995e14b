//! Frames to the guest.
//!
//! A frame is a [`Header`] built here, from Ethernet to the transport, and a payload that stays where it is. The
//! checksum of UDP is left to the guest where the link allows it. A UDP datagram that is longer than the link's MTU
//! is cut into fragments (RFC 791 3.2, RFC 8200 4.5): a socket of the host's has no smaller pieces to offer.

use std::net::{IpAddr, Ipv6Addr};

use etherparse::checksum::Sum16BitWords;
use etherparse::{EtherType, IpNumber, TcpHeader};

use crate::config::MacAddress;
use crate::context::Context;
use crate::icmp::protocol;
use crate::packet::{Addresses, Datagrams, ETHERNET};
use crate::tap::Offload;

/// The hop limit of packets whose own did not survive the host's socket.
pub(crate) const HOP_LIMIT: u8 = 64;

/// The hop limit of neighbour discovery, which shows that a packet was not forwarded (RFC 4861 11.2).
pub(crate) const ON_LINK: u8 = 255;

/// Bytes of a UDP header.
const UDP: usize = 8;

/// The longest packet around an ICMP error (RFC 1812 4.3.2.3).
const ICMP_ERROR_V4: usize = 576;
/// The longest packet around an ICMPv6 error: the least MTU of IPv6 (RFC 4443 2.4 c).
const ICMP_ERROR_V6: usize = 1280;

/// The headers of a frame: Ethernet, IPv6 with a fragment header or IPv4, TCP with all options at most.
#[derive(Clone, Debug)]
pub(crate) struct Header {
    bytes: [u8; Self::MOST],
    length: usize,
}

impl Header {
    const MOST: usize = ETHERNET + 40 + 8 + 60;

    fn new() -> Self {
        Self { bytes: [0; Self::MOST], length: 0 }
    }

    /// Ethernet's header.
    pub(crate) fn ethernet(destination: MacAddress, source: MacAddress, kind: EtherType) -> Self {
        let mut header = Self::new();
        header.push(&destination);
        header.push(&source);
        header.push(&kind.0.to_be_bytes());
        header
    }

    /// Adds `bytes` at the end. There is room for all headers that are built here.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        let room = self.bytes.get_mut(self.length..self.length + bytes.len());
        debug_assert!(room.is_some(), "a header longer than any");
        if let Some(room) = room {
            room.copy_from_slice(bytes);
            self.length += bytes.len();
        }
    }

    /// Adds an IP header for `length` bytes of `protocol`, which is not to be cut further.
    pub(crate) fn push_ip(&mut self, addresses: Addresses, protocol: IpNumber, hop_limit: u8, length: usize) {
        // RFC 6864: an atomic datagram needs no identification.
        const DO_NOT_FRAGMENT: u16 = 1 << 14;
        match addresses {
            Addresses::V4 { .. } => {
                self.push_ipv4(addresses, protocol, hop_limit, length, 0, DO_NOT_FRAGMENT)
            }
            Addresses::V6 { .. } => self.push_ipv6(addresses, protocol, hop_limit, length),
        }
    }

    fn push_ipv4(
        &mut self,
        addresses: Addresses,
        protocol: IpNumber,
        hop_limit: u8,
        length: usize,
        identification: u16,
        fragment: u16,
    ) {
        let Addresses::V4 { source, destination } = addresses else { return };
        let mut ip = [0; 20];
        ip[0] = 0x45;
        ip[2..4].copy_from_slice(&length_field(20 + length));
        ip[4..6].copy_from_slice(&identification.to_be_bytes());
        ip[6..8].copy_from_slice(&fragment.to_be_bytes());
        ip[8] = hop_limit;
        ip[9] = protocol.0;
        ip[12..16].copy_from_slice(&source.octets());
        ip[16..].copy_from_slice(&destination.octets());
        let sum = Sum16BitWords::new().add_slice(&ip).ones_complement();
        ip[10..12].copy_from_slice(&sum.to_ne_bytes());
        self.push(&ip);
    }

    fn push_ipv6(&mut self, addresses: Addresses, next: IpNumber, hop_limit: u8, length: usize) {
        let Addresses::V6 { source, destination } = addresses else { return };
        self.push(&[0x60, 0, 0, 0]);
        self.push(&length_field(length));
        self.push(&[next.0, hop_limit]);
        self.push(&source.octets());
        self.push(&destination.octets());
    }

    /// Adds a UDP header. Without a checksum of its own the guest is to complete it.
    fn push_udp(&mut self, addresses: Addresses, ports: (u16, u16), payload: &[u8], leave_checksum: bool) {
        let length = UDP + payload.len();
        let mut udp = [0; UDP];
        udp[..2].copy_from_slice(&ports.0.to_be_bytes());
        udp[2..4].copy_from_slice(&ports.1.to_be_bytes());
        udp[4..6].copy_from_slice(&length_field(length));
        let pseudo = addresses.pseudo_header(IpNumber::UDP, length);
        let sum = if leave_checksum {
            !pseudo.ones_complement()
        } else {
            pseudo.add_slice(&udp).add_slice(payload).to_ones_complement_with_no_zero()
        };
        udp[6..].copy_from_slice(&sum.to_ne_bytes());
        self.push(&udp);
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }
}

/// A length as it stands in a header. Nothing longer than 65535 bytes is ever built: datagrams are limited by
/// the sockets, segments by the link.
fn length_field(length: usize) -> [u8; 2] {
    u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes()
}

/// What an ICMP or ICMPv6 error says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct IcmpError {
    pub(crate) kind: u8,
    pub(crate) code: u8,
    pub(crate) word: u32,
}

impl IcmpError {
    /// Nobody listens to that port.
    pub(crate) fn port_unreachable(v6: bool) -> Self {
        let (kind, code) = if v6 { (1, 4) } else { (3, 3) };
        Self { kind, code, word: 0 }
    }

    /// There is no way to that address.
    pub(crate) fn host_unreachable(v6: bool) -> Self {
        let (kind, code) = if v6 { (1, 3) } else { (3, 1) };
        Self { kind, code, word: 0 }
    }

    /// There is no route to that network.
    pub(crate) fn net_unreachable(v6: bool) -> Self {
        Self { kind: if v6 { 1 } else { 3 }, code: 0, word: 0 }
    }

    /// The host's rules forbid it.
    pub(crate) fn prohibited(v6: bool) -> Self {
        let (kind, code) = if v6 { (1, 1) } else { (3, 13) };
        Self { kind, code, word: 0 }
    }

    /// Longer than `mtu`, which is the longest that goes through.
    pub(crate) fn too_big(v6: bool, mtu: u32) -> Self {
        let (kind, code) = if v6 { (2, 0) } else { (3, 4) };
        Self { kind, code, word: mtu }
    }

    /// The other fragments of a packet did not come in time.
    pub(crate) fn not_reassembled(v6: bool) -> Self {
        Self { kind: if v6 { 3 } else { 11 }, code: 1, word: 0 }
    }

    /// That protocol is not carried. (ICMPv6: the next header, at this place of the packet, is not known.)
    pub(crate) fn protocol_unreachable(v6: bool) -> Self {
        let (kind, code, word) = if v6 { (4, 1, 6) } else { (3, 2, 0) };
        Self { kind, code, word }
    }
}

/// The UDP packet that an error is about, made again: the host's kernel keeps the payload alone.
pub(crate) fn quoted_udp(addresses: Addresses, ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
    let mut header = Header::new();
    header.push_ip(addresses, IpNumber::UDP, HOP_LIMIT, UDP + payload.len());
    header.push_udp(addresses, ports, payload, false);
    [header.as_slice(), payload].concat()
}

/// The SYN that an error is about, made again.
pub(crate) fn quoted_syn(addresses: Addresses, ports: (u16, u16), seq: u32) -> Vec<u8> {
    let mut tcp = TcpHeader::new(ports.0, ports.1, seq, u16::MAX);
    tcp.syn = true;
    let mut header = Header::new();
    header.push_ip(addresses, IpNumber::TCP, HOP_LIMIT, tcp.header_len());
    [header.as_slice(), &tcp.to_bytes()].concat()
}

/// The echo request that an error is about: as the host's socket sent it, with the guest's identifier put back.
pub(crate) fn quoted_icmp(addresses: Addresses, identifier: u16, message: &[u8]) -> Vec<u8> {
    let mut header = Header::new();
    header.push_ip(addresses, protocol(addresses.is_v6()), HOP_LIMIT, message.len());
    let mut packet = [header.as_slice(), message].concat();
    let at = header.as_slice().len() + 4;
    if let Some(place) = packet.get_mut(at..at + 2) {
        place.copy_from_slice(&identifier.to_be_bytes());
    }
    packet
}

/// The Ethernet address of an IPv6 multicast group (RFC 2464 7).
fn multicast_mac(group: Ipv6Addr) -> MacAddress {
    let [.., a, b, c, d] = group.octets();
    [0x33, 0x33, a, b, c, d]
}

impl Context<'_> {
    /// An Ethernet header to the guest.
    pub(crate) fn ethernet(&self, kind: EtherType) -> Header {
        Header::ethernet(self.link.guest_mac, self.config.gateway_mac, kind)
    }

    /// The Ethernet header of a packet with these addresses.
    fn ethernet_for(&self, addresses: Addresses) -> Header {
        let guest = self.link.guest_mac;
        let (destination, kind) = match addresses {
            Addresses::V4 { destination, .. } if destination.is_broadcast() => ([0xff; 6], EtherType::IPV4),
            Addresses::V4 { .. } => (guest, EtherType::IPV4),
            Addresses::V6 { destination, .. } if destination.is_multicast() => {
                (multicast_mac(destination), EtherType::IPV6)
            }
            Addresses::V6 { .. } => (guest, EtherType::IPV6),
        };
        Header::ethernet(destination, self.config.gateway_mac, kind)
    }

    /// Ethernet and IP headers for `length` bytes of `protocol`, which fit the link.
    pub(crate) fn ip(
        &self,
        addresses: Addresses,
        protocol: IpNumber,
        hop_limit: u8,
        length: usize,
    ) -> Header {
        let mut header = self.ethernet_for(addresses);
        header.push_ip(addresses, protocol, hop_limit, length);
        header
    }

    /// Sends the guest datagrams, in one frame if the link takes them so.
    pub(crate) fn send_datagrams(
        &mut self,
        addresses: Addresses,
        ports: (u16, u16),
        datagrams: Datagrams<'_>,
    ) {
        let abilities = self.link.abilities();
        let headers = UDP + if addresses.is_v6() { 40 } else { 20 };
        let Datagrams { bytes, segment } = datagrams;
        match segment {
            Some(length)
                if abilities.datagrams
                    && bytes.len() > usize::from(length)
                    && headers + usize::from(length) <= abilities.mtu.into()
                    && headers + bytes.len() <= u16::MAX.into() =>
            {
                let mut header = self.ip(addresses, IpNumber::UDP, HOP_LIMIT, UDP + bytes.len());
                header.push_udp(addresses, ports, bytes, true);
                let offload = Offload { needs_checksum: true, segment };
                self.link.send_or_hold(header.as_slice(), bytes, offload);
            }
            _ => datagrams.each().for_each(|payload| self.send_udp(addresses, ports, payload)),
        }
    }

    /// Sends the guest a UDP datagram.
    pub(crate) fn send_udp(&mut self, addresses: Addresses, ports: (u16, u16), payload: &[u8]) {
        let abilities = self.link.abilities();
        let ip_header = if addresses.is_v6() { 40 } else { 20 };
        if ip_header + UDP + payload.len() > usize::from(abilities.mtu) {
            self.send_udp_fragments(addresses, ports, payload, abilities.mtu);
            return;
        }
        let mut header = self.ip(addresses, IpNumber::UDP, HOP_LIMIT, UDP + payload.len());
        header.push_udp(addresses, ports, payload, abilities.checksum);
        let offload = Offload { needs_checksum: abilities.checksum, segment: None };
        self.link.send_or_hold(header.as_slice(), payload, offload);
    }

    fn send_udp_fragments(&mut self, addresses: Addresses, ports: (u16, u16), payload: &[u8], mtu: u16) {
        let mut udp = Header::new();
        udp.push_udp(addresses, ports, payload, false);
        let whole = [udp.as_slice(), payload].concat();
        let identification = self.link.next_identification();
        let headers = if addresses.is_v6() { 48 } else { 20 };
        // Offsets count units of eight bytes. No link has an MTU too small for one of them.
        let step = (usize::from(mtu).saturating_sub(headers) / 8).max(1) * 8;
        for (index, piece) in whole.chunks(step).enumerate() {
            let offset = index * step;
            let more = offset + piece.len() < whole.len();
            // A datagram is at most 64 KiB, so that offsets have 16 bits.
            let offset = offset as u16;
            let mut header = self.ethernet_for(addresses);
            match addresses {
                Addresses::V4 { .. } => {
                    let fragment = (offset / 8) | if more { 1 << 13 } else { 0 };
                    // The lower half names a fragment's datagram well enough.
                    let identification = identification as u16;
                    header.push_ipv4(
                        addresses,
                        IpNumber::UDP,
                        HOP_LIMIT,
                        piece.len(),
                        identification,
                        fragment,
                    );
                }
                Addresses::V6 { .. } => {
                    header.push_ipv6(
                        addresses,
                        IpNumber::IPV6_FRAGMENTATION_HEADER,
                        HOP_LIMIT,
                        8 + piece.len(),
                    );
                    header.push(&[IpNumber::UDP.0, 0]);
                    header.push(&(offset | u16::from(more)).to_be_bytes());
                    header.push(&identification.to_be_bytes());
                }
            }
            self.link.send_or_hold(header.as_slice(), piece, Offload::default());
        }
    }

    /// Sends the guest an ICMP message, of the addresses' family.
    pub(crate) fn send_icmp(
        &mut self,
        addresses: Addresses,
        hop_limit: u8,
        (kind, code): (u8, u8),
        word: [u8; 4],
        payload: &[u8],
    ) {
        let length = 8 + payload.len();
        let protocol = protocol(addresses.is_v6());
        let sum = match addresses {
            Addresses::V4 { .. } => Sum16BitWords::new(),
            Addresses::V6 { .. } => addresses.pseudo_header(protocol, length),
        };
        let sum = sum.add_2bytes([kind, code]).add_slice(&word).add_slice(payload).ones_complement();
        let mut header = self.ip(addresses, protocol, hop_limit, length);
        header.push(&[kind, code]);
        header.push(&sum.to_ne_bytes());
        header.push(&word);
        self.link.send_or_hold(header.as_slice(), payload, Offload::default());
    }

    /// Tells the guest that its packet `original`, with these addresses, did not get through. `from` is who says so;
    /// the packet's destination, if it is of another family.
    pub(crate) fn send_icmp_error(
        &mut self,
        error: IcmpError,
        from: IpAddr,
        addresses: Addresses,
        original: &[u8],
    ) {
        let addresses = Addresses::new(from, addresses.source()).unwrap_or(addresses.reversed());
        let most = if addresses.is_v6() { ICMP_ERROR_V6 - 48 } else { ICMP_ERROR_V4 - 28 };
        let quoted = original.get(..most).unwrap_or(original);
        self.send_icmp(addresses, HOP_LIMIT, (error.kind, error.code), error.word.to_be_bytes(), quoted);
    }
}

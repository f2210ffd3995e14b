//! What a frame from the guest says: Ethernet, ARP, IPv4, IPv6, and the transport inside.
//!
//! [`parse`] answers with a [`Frame`] whose parts borrow from the frame's bytes, or with the reason for which it is
//! refused. `etherparse` bounds every header; this file decides what is let through:
//!
//! - IPv4 with any options (they are not acted upon) and IPv6 with extension headers up to the transport.
//! - No fragments: there is no reassembly. A guest learns the link's MTU and sends none of its own accord, except
//!   for datagrams longer than that. Of the first fragment so much is told that it can be answered for
//!   ([`Packet::Fragment`]).
//! - No addresses that may not be on a wire (RFC 1122 3.2.1.3, RFC 4291 2.5 and 2.7): sources that are multicast or
//!   loopback, destinations that are loopback or unspecified. They are more than untidy: given to a
//!   socket of the host's, `0.0.0.0`, `127.0.0.1` and `::ffff:127.0.0.1` all lead to the host itself.
//! - No wrong checksums, unless the link says that they are left to do. The length of an IP packet says where it
//!   ends; Ethernet's padding is not part of it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use etherparse::checksum::Sum16BitWords;
use etherparse::{
    ArpEthIpv4Packet, ArpPacketSlice, EtherType, Ethernet2Slice, IpNumber, Ipv4Slice, Ipv6ExtensionSlice,
    Ipv6Slice, TcpSlice, UdpSlice,
};

use crate::config::MacAddress;
use crate::tap::Offload;
use crate::tcp::view::{TcpFlags, TcpView};

/// Bytes of an Ethernet header.
pub(crate) const ETHERNET: usize = 14;

/// The two ends of an IP packet: both of one family.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Addresses {
    V4 { source: Ipv4Addr, destination: Ipv4Addr },
    V6 { source: Ipv6Addr, destination: Ipv6Addr },
}

impl Addresses {
    /// The pair, if both are of one family.
    pub(crate) fn new(source: IpAddr, destination: IpAddr) -> Option<Self> {
        match (source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => Some(Self::V4 { source, destination }),
            (IpAddr::V6(source), IpAddr::V6(destination)) => Some(Self::V6 { source, destination }),
            _ => None,
        }
    }

    pub(crate) fn source(&self) -> IpAddr {
        match *self {
            Self::V4 { source, .. } => source.into(),
            Self::V6 { source, .. } => source.into(),
        }
    }

    pub(crate) fn destination(&self) -> IpAddr {
        match *self {
            Self::V4 { destination, .. } => destination.into(),
            Self::V6 { destination, .. } => destination.into(),
        }
    }

    /// As the answer has them.
    pub(crate) fn reversed(&self) -> Self {
        match *self {
            Self::V4 { source, destination } => Self::V4 { source: destination, destination: source },
            Self::V6 { source, destination } => Self::V6 { source: destination, destination: source },
        }
    }

    /// Whether it is IPv6.
    pub(crate) fn is_v6(&self) -> bool {
        matches!(self, Self::V6 { .. })
    }

    /// Whether the packet may be on a wire at all.
    pub(crate) fn plausible(&self) -> bool {
        let (wrong_source, wrong_destination) = match self {
            Self::V4 { source, destination } => (
                source.is_multicast() || source.is_broadcast() || source.is_loopback(),
                destination.is_loopback() || destination.octets()[0] == 0,
            ),
            // An IPv4 address in disguise, which the loopback's and no address at all are too, by their form.
            Self::V6 { source, destination } => (
                source.is_multicast() || (source.to_ipv4().is_some() && !source.is_unspecified()),
                destination.to_ipv4().is_some(),
            ),
        };
        !wrong_source && !wrong_destination
    }

    /// The sum of the pseudo-header (RFC 9293 3.1, RFC 8200 8.1) for `length` bytes of `protocol`.
    pub(crate) fn pseudo_header(&self, protocol: IpNumber, length: usize) -> Sum16BitWords {
        let sum = Sum16BitWords::new();
        let sum = match self {
            Self::V4 { source, destination } => {
                sum.add_slice(&source.octets()).add_slice(&destination.octets())
            }
            Self::V6 { source, destination } => {
                sum.add_slice(&source.octets()).add_slice(&destination.octets())
            }
        };
        // Lengths are those of frames: 17 bits at most.
        sum.add_slice(&(length as u32).to_be_bytes()).add_2bytes([0, protocol.0])
    }
}

/// An IP packet around a transport.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Ip<'a> {
    pub(crate) addresses: Addresses,
    /// TTL or hop limit: not 0.
    pub(crate) hop_limit: u8,
    /// All of it, from its header on: what an ICMP error about it quotes.
    pub(crate) bytes: &'a [u8],
}

/// Datagrams of one sender's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Datagrams<'a> {
    pub(crate) bytes: &'a [u8],
    /// The length of each but the last; `None` if it is one alone.
    pub(crate) segment: Option<u16>,
}

impl<'a> Datagrams<'a> {
    /// How many there are.
    pub(crate) fn count(self) -> usize {
        self.each().count()
    }

    /// The payload of each.
    pub(crate) fn each(self) -> impl Iterator<Item = &'a [u8]> {
        let empty = self.bytes.is_empty().then_some(self.bytes);
        let length = self.segment.filter(|&length| length > 0).map_or(usize::MAX, usize::from);
        empty.into_iter().chain(self.bytes.chunks(length))
    }
}

/// A UDP datagram.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct UdpView<'a> {
    pub(crate) ip: Ip<'a>,
    pub(crate) source_port: u16,
    pub(crate) destination_port: u16,
    /// As a rule one datagram.
    pub(crate) payload: Datagrams<'a>,
}

impl UdpView<'_> {
    /// The guest's end.
    pub(crate) fn source(&self) -> SocketAddr {
        SocketAddr::new(self.ip.addresses.source(), self.source_port)
    }

    /// The other end, as the guest names it.
    pub(crate) fn destination(&self) -> SocketAddr {
        SocketAddr::new(self.ip.addresses.destination(), self.destination_port)
    }
}

/// An ICMP message, of the family of the addresses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct IcmpView<'a> {
    pub(crate) ip: Ip<'a>,
    pub(crate) kind: u8,
    pub(crate) code: u8,
    /// The four bytes after the checksum: their meaning is the kind's.
    pub(crate) word: [u8; 4],
    /// What follows them.
    pub(crate) payload: &'a [u8],
}

/// What is in a frame.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Packet<'a> {
    Arp(ArpEthIpv4Packet),
    Tcp(TcpView<'a>),
    Udp(UdpView<'a>),
    Icmp(IcmpView<'a>),
    /// The first fragment of a packet.
    Fragment(Ip<'a>),
    /// A transport that is not carried.
    Other(Ip<'a>),
}

/// A frame from the guest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Frame<'a> {
    pub(crate) source: MacAddress,
    pub(crate) destination: MacAddress,
    pub(crate) packet: Packet<'a>,
}

/// Why a frame is not looked at any further.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Refused {
    /// Headers that are cut short, or lengths that lie.
    Malformed,
    /// A checksum is wrong.
    Checksum,
    /// A part of a packet, but not the first.
    Fragment,
    /// Addresses that may not be on a wire.
    Address,
    /// Not IPv4, IPv6 or ARP for IPv4.
    Unsupported,
}

/// Datagrams in one frame at most: what a socket takes together (UDP_MAX_SEGMENTS in linux/udp.h).
const MOST_DATAGRAMS: usize = 128;

/// Takes a frame apart. `offload` is what the link says about it.
pub(crate) fn parse(frame: &[u8], offload: Offload) -> Result<Frame<'_>, Refused> {
    let ethernet = Ethernet2Slice::from_slice_without_fcs(frame).map_err(|_| Refused::Malformed)?;
    let payload = ethernet.payload_slice();
    let packet = match ethernet.ether_type() {
        EtherType::ARP => arp(payload)?,
        EtherType::IPV4 => ipv4(payload, offload)?,
        EtherType::IPV6 => ipv6(payload, offload)?,
        _ => return Err(Refused::Unsupported),
    };
    Ok(Frame { source: ethernet.source(), destination: ethernet.destination(), packet })
}

fn arp(bytes: &[u8]) -> Result<Packet<'_>, Refused> {
    let packet = ArpPacketSlice::from_slice(bytes).map_err(|_| Refused::Malformed)?;
    Ok(Packet::Arp(packet.to_packet().try_eth_ipv4().map_err(|_| Refused::Unsupported)?))
}

fn ipv4(bytes: &[u8], offload: Offload) -> Result<Packet<'_>, Refused> {
    let packet = Ipv4Slice::from_slice(bytes).map_err(|_| Refused::Malformed)?;
    let header = packet.header();
    if Sum16BitWords::new().add_slice(header.slice()).ones_complement() != 0 {
        return Err(Refused::Checksum);
    }
    let addresses = Addresses::V4 { source: header.source_addr(), destination: header.destination_addr() };
    let bytes = bytes.get(..usize::from(header.total_len())).ok_or(Refused::Malformed)?;
    let ip = Ip { addresses, hop_limit: header.ttl(), bytes };
    let payload = packet.payload();
    if payload.fragmented {
        return fragment(ip, header.fragments_offset().value() == 0);
    }
    transport(ip, payload.ip_number, payload.payload, offload)
}

fn ipv6(bytes: &[u8], offload: Offload) -> Result<Packet<'_>, Refused> {
    let packet = Ipv6Slice::from_slice(bytes).map_err(|_| Refused::Malformed)?;
    let header = packet.header();
    let addresses = Addresses::V6 { source: header.source_addr(), destination: header.destination_addr() };
    let ip = Ip { addresses, hop_limit: header.hop_limit(), bytes };
    let payload = packet.payload();
    if payload.fragmented {
        let first = packet.extensions().clone().into_iter().any(|extension| {
            matches!(extension, Ipv6ExtensionSlice::Fragment(header) if header.fragment_offset().value() == 0)
        });
        return fragment(ip, first);
    }
    transport(ip, payload.ip_number, payload.payload, offload)
}

fn fragment(ip: Ip<'_>, first: bool) -> Result<Packet<'_>, Refused> {
    if !first {
        return Err(Refused::Fragment);
    }
    if !ip.addresses.plausible() || ip.hop_limit == 0 {
        return Err(Refused::Address);
    }
    Ok(Packet::Fragment(ip))
}

fn transport<'a>(
    ip: Ip<'a>,
    protocol: IpNumber,
    bytes: &'a [u8],
    offload: Offload,
) -> Result<Packet<'a>, Refused> {
    if !ip.addresses.plausible() || ip.hop_limit == 0 {
        return Err(Refused::Address);
    }
    match protocol {
        IpNumber::TCP => {
            verify(ip.addresses, protocol, bytes, offload)?;
            tcp(ip, bytes)
        }
        IpNumber::UDP => udp(ip, bytes, offload),
        IpNumber::ICMP if !ip.addresses.is_v6() => {
            if Sum16BitWords::new().add_slice(bytes).ones_complement() != 0 {
                return Err(Refused::Checksum);
            }
            icmp(ip, bytes)
        }
        IpNumber::IPV6_ICMP if ip.addresses.is_v6() => {
            verify(ip.addresses, protocol, bytes, Offload::default())?;
            icmp(ip, bytes)
        }
        _ => Ok(Packet::Other(ip)),
    }
}

/// Checks a checksum that covers a pseudo-header and `bytes`, if it is there already.
fn verify(addresses: Addresses, protocol: IpNumber, bytes: &[u8], offload: Offload) -> Result<(), Refused> {
    if offload.needs_checksum
        || addresses.pseudo_header(protocol, bytes.len()).add_slice(bytes).ones_complement() == 0
    {
        return Ok(());
    }
    Err(Refused::Checksum)
}

fn tcp<'a>(ip: Ip<'a>, bytes: &'a [u8]) -> Result<Packet<'a>, Refused> {
    let segment = TcpSlice::from_slice(bytes).map_err(|_| Refused::Malformed)?;
    // The header is 20 bytes long at least: etherparse checked the data offset.
    let options = segment.header_slice().get(20..).ok_or(Refused::Malformed)?;
    Ok(Packet::Tcp(TcpView {
        source: ip.addresses.source(),
        destination: ip.addresses.destination(),
        source_port: segment.source_port(),
        destination_port: segment.destination_port(),
        seq: segment.sequence_number(),
        ack: segment.acknowledgment_number(),
        flags: TcpFlags {
            syn: segment.syn(),
            ack: segment.ack(),
            fin: segment.fin(),
            rst: segment.rst(),
            psh: segment.psh(),
        },
        window: segment.window_size(),
        options,
        payload: segment.payload(),
    }))
}

fn udp<'a>(ip: Ip<'a>, bytes: &'a [u8], offload: Offload) -> Result<Packet<'a>, Refused> {
    let datagram = UdpSlice::from_slice(bytes).map_err(|_| Refused::Malformed)?;
    // A datagram may be shorter than the packet around it, never the other way round. No checksum is none over IPv4
    // (RFC 768) and an error over IPv6 (RFC 8200 8.1).
    match (datagram.checksum(), ip.addresses.is_v6()) {
        (0, false) => {}
        (0, true) => return Err(Refused::Checksum),
        _ => verify(ip.addresses, IpNumber::UDP, datagram.slice(), offload)?,
    }
    let segment = offload.segment.filter(|&length| length > 0);
    let payload = Datagrams { bytes: datagram.payload(), segment };
    if payload.count() > MOST_DATAGRAMS {
        return Err(Refused::Malformed);
    }
    Ok(Packet::Udp(UdpView {
        ip,
        source_port: datagram.source_port(),
        destination_port: datagram.destination_port(),
        payload,
    }))
}

fn icmp<'a>(ip: Ip<'a>, bytes: &'a [u8]) -> Result<Packet<'a>, Refused> {
    let [kind, code, _, _, a, b, c, d, payload @ ..] = bytes else { return Err(Refused::Malformed) };
    Ok(Packet::Icmp(IcmpView { ip, kind: *kind, code: *code, word: [*a, *b, *c, *d], payload }))
}

//! The engine from outside: a guest in memory on one side, sockets of the host's loopback on the other.

mod change;
mod dhcp;
mod engine;
mod exhaustion;
mod forward;
mod hostile;
mod icmp;
mod link;
mod outbound;
mod process;
mod several;
mod tcp;
mod translation;
mod udp;

pub(crate) use process::{has_ipv6, skip};

use std::net::{IpAddr, SocketAddr};

use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TransportSlice};

use crate::testing::{GATEWAY_MAC, GUEST_MAC, GUEST_V4, GUEST_V6};

/// A UDP frame as a guest sends it.
fn udp_frame(source: SocketAddr, destination: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(GUEST_MAC, GATEWAY_MAC);
    let builder = match (source.ip(), destination.ip()) {
        (IpAddr::V4(s), IpAddr::V4(d)) => builder.ipv4(s.octets(), d.octets(), 64),
        (IpAddr::V6(s), IpAddr::V6(d)) => builder.ipv6(s.octets(), d.octets(), 64),
        _ => panic!("two families"),
    };
    let mut frame = Vec::new();
    builder.udp(source.port(), destination.port()).write(&mut frame, payload).unwrap();
    frame
}

fn guest_v4(port: u16) -> SocketAddr {
    (GUEST_V4, port).into()
}

fn guest_v6(port: u16) -> SocketAddr {
    (GUEST_V6, port).into()
}

/// A UDP datagram that the guest was sent: from, to, payload. Its checksums must be right.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Datagram {
    from: SocketAddr,
    to: SocketAddr,
    payload: Vec<u8>,
}

fn as_udp(frame: &[u8]) -> Option<Datagram> {
    let packet = SlicedPacket::from_ethernet(frame).unwrap();
    let Some(TransportSlice::Udp(udp)) = &packet.transport else { return None };
    let (from, to): (IpAddr, IpAddr) = match packet.net? {
        NetSlice::Ipv4(ip) => {
            let header = ip.header().to_header();
            assert_eq!(header.header_checksum, header.calc_header_checksum());
            let sum = udp.to_header().calc_checksum_ipv4(&header, udp.payload()).unwrap();
            assert_eq!(udp.checksum(), sum);
            (header.source.into(), header.destination.into())
        }
        NetSlice::Ipv6(ip) => {
            let header = ip.header().to_header();
            assert_eq!(udp.checksum(), udp.to_header().calc_checksum_ipv6(&header, udp.payload()).unwrap());
            (header.source.into(), header.destination.into())
        }
        NetSlice::Arp(_) => return None,
    };
    Some(Datagram {
        from: SocketAddr::new(from, udp.source_port()),
        to: SocketAddr::new(to, udp.destination_port()),
        payload: udp.payload().to_vec(),
    })
}

/// An ICMP message that the guest was sent: from, kind, code, and all after the checksum. Its checksums must be right.
#[derive(PartialEq, Eq, Debug)]
struct Icmp {
    from: IpAddr,
    to: IpAddr,
    hop_limit: u8,
    kind: u8,
    code: u8,
    body: Vec<u8>,
}

fn as_icmp(frame: &[u8]) -> Option<Icmp> {
    let packet = SlicedPacket::from_ethernet(frame).unwrap();
    match (packet.net?, packet.transport?) {
        (NetSlice::Ipv4(ip), TransportSlice::Icmpv4(icmp)) => {
            let header = ip.header();
            assert_eq!(header.header_checksum(), header.to_header().calc_header_checksum());
            let sum = etherparse::checksum::Sum16BitWords::new().add_slice(icmp.slice());
            assert_eq!(sum.ones_complement(), 0);
            Some(Icmp {
                from: header.source_addr().into(),
                to: header.destination_addr().into(),
                hop_limit: header.ttl(),
                kind: icmp.type_u8(),
                code: icmp.code_u8(),
                body: icmp.slice()[4..].to_vec(),
            })
        }
        (NetSlice::Ipv6(ip), TransportSlice::Icmpv6(icmp)) => {
            let header = ip.header();
            assert!(icmp.is_checksum_valid(header.source(), header.destination()));
            Some(Icmp {
                from: header.source_addr().into(),
                to: header.destination_addr().into(),
                hop_limit: header.hop_limit(),
                kind: icmp.type_u8(),
                code: icmp.code_u8(),
                body: icmp.slice()[4..].to_vec(),
            })
        }
        _ => None,
    }
}

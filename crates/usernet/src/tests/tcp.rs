//! TCP through the engine: that it is called when it is to be. What it does then is tested where it is.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};

use etherparse::{PacketBuilder, SlicedPacket, TcpHeader, TransportSlice};

use crate::config::{Config, Forward, Transport};
use crate::testing::{GATEWAY_MAC, GATEWAY_V4, GUEST_MAC, GUEST_V4, Net, config};

/// A segment as a guest sends it to the gateway.
pub(super) fn segment(port: u16, to: u16, set: impl FnOnce(&mut TcpHeader), payload: &[u8]) -> Vec<u8> {
    segment_to((GATEWAY_V4, to).into(), port, set, payload)
}

/// A segment as a guest sends it from `port` to an address of IPv4.
pub(super) fn segment_to(
    to: SocketAddr,
    port: u16,
    set: impl FnOnce(&mut TcpHeader),
    payload: &[u8],
) -> Vec<u8> {
    let IpAddr::V4(address) = to.ip() else { panic!("not an address of IPv4") };
    let mut header = TcpHeader::new(port, to.port(), 0, 65535);
    set(&mut header);
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(GUEST_MAC, GATEWAY_MAC)
        .ipv4(GUEST_V4.octets(), address.octets(), 64)
        .tcp_header(header)
        .write(&mut frame, payload)
        .unwrap();
    frame
}

pub(super) fn as_tcp(frame: &[u8]) -> Option<(TcpHeader, Vec<u8>)> {
    match SlicedPacket::from_ethernet(frame).unwrap().transport? {
        TransportSlice::Tcp(tcp) => Some((tcp.to_header(), tcp.payload().to_vec())),
        _ => None,
    }
}

#[test]
fn a_connection_of_the_guests_and_its_bytes() {
    let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = server.local_addr().unwrap().port();
    let mut net = Net::new(config());
    net.guest.send(segment(4000, port, |h| (h.syn, h.sequence_number) = (true, 100), b""));
    let (answer, _) = net.expect(as_tcp);
    assert!(answer.syn && answer.ack && answer.acknowledgment_number == 101);
    let next = answer.sequence_number.wrapping_add(1);
    let acknowledged = |h: &mut TcpHeader| {
        (h.ack, h.psh, h.sequence_number, h.acknowledgment_number) = (true, true, 101, next);
    };
    net.guest.send(segment(4000, port, acknowledged, b"hello"));
    net.settle();
    let (mut stream, _) = server.accept().unwrap();
    let mut hello = [0; 5];
    stream.read_exact(&mut hello).unwrap();
    assert_eq!(&hello, b"hello");
    stream.write_all(b"world").unwrap();
    let (data, payload) = net.expect(|f| as_tcp(f).filter(|(_, payload)| !payload.is_empty()));
    assert_eq!((data.sequence_number, payload.as_slice()), (next, b"world".as_slice()));
    assert_eq!(net.stats().tcp_flows, 1);
}

#[test]
fn a_forwarded_port_asks_the_guest() {
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let mut net = Net::new(config());
    let bound = net.engine.add_forward(Forward::new(Transport::Tcp, listen, 80)).unwrap();
    assert_ne!(bound.listen.port(), 0);
    let client = TcpStream::connect(bound.listen).unwrap();
    let (syn, _) = net.expect(|f| as_tcp(f).filter(|(h, _)| h.syn));
    assert_eq!((syn.destination_port, syn.source_port), (80, client.local_addr().unwrap().port()));
}

#[test]
fn tcp_can_be_off() {
    let mut services = config().services;
    services.tcp = false;
    let mut net = Net::new(Config { services, ..config() });
    net.guest.send(segment(4000, 80, |h| h.syn = true, b""));
    net.settle();
    assert_eq!((net.stats().tcp_flows, net.stats().dropped.disabled), (0, 1));
}

/// Nothing but the loopback is there.
#[test]
fn a_host_that_cannot_be_reached_is_told_by_icmp() {
    if !super::process::in_namespace() {
        return;
    }
    let mut net = Net::new(config());
    let to = SocketAddr::from(([203, 0, 113, 1], 80));
    let syn = segment_to(to, 4000, |h| (h.syn, h.sequence_number) = (true, 12345), b"");
    net.guest.send(syn.clone());
    let told = net.expect(super::as_icmp);
    assert_eq!((told.kind, told.code), (3, 0), "no route to the network");
    // The addresses, the ports and the sequence number, by which the guest finds its connection.
    assert_eq!(told.body[4..][12..28], syn[14..][12..28]);
    assert_eq!(net.stats().tcp_flows, 0);
}

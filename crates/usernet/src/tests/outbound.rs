//! What the host's outbound sockets are bound to.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};

use super::icmp::{may_ping, ping};
use super::process::{in_namespace, ip};
use super::tcp::{as_tcp, segment_to};
use super::{as_icmp, as_udp, guest_v4, udp_frame};
use crate::config::{Config, Outbound};
use crate::testing::{GATEWAY_V4, Net, config};

const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const SOURCE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);

fn outbound(address: Option<Ipv4Addr>, interface: &str) -> Config {
    let interface_v4 = Some(interface.to_owned());
    Config { outbound: Outbound { address_v4: address, interface_v4, ..Outbound::default() }, ..config() }
}

#[test]
fn sockets_have_the_address_and_the_interface() {
    if !in_namespace() {
        return;
    }
    ip("address add 198.51.100.1/24 dev lo");
    ip("address add 198.51.100.2/24 dev lo");
    let mut net = Net::new(outbound(Some(SOURCE), "lo"));

    let server = UdpSocket::bind((SERVER, 0)).unwrap();
    let to = server.local_addr().unwrap();
    for port in [5000, to.port()] {
        net.guest.send(udp_frame(guest_v4(port), to, b"?"));
        net.settle();
        let (_, from) = server.recv_from(&mut [0; 8]).unwrap();
        assert_eq!(from.ip(), IpAddr::from(SOURCE));
        assert_eq!(from.port() == port, port == 5000, "the guest's port if it is free");
        server.send_to(b"!", from).unwrap();
        assert_eq!(net.expect(as_udp).from, to);
    }

    let server = TcpListener::bind((SERVER, 0)).unwrap();
    net.guest.send(segment_to(server.local_addr().unwrap(), 5000, |h| h.syn = true, b""));
    net.expect(|f| as_tcp(f).filter(|(h, _)| h.syn && h.ack));
    assert_eq!(server.accept().unwrap().1.ip(), IpAddr::from(SOURCE));

    std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 0").unwrap();
    assert!(may_ping());
    net.guest.send(ping(SERVER.into(), [1, 2, 3, 4], b"payload"));
    assert_eq!(net.expect(|f| as_icmp(f).filter(|m| m.kind == 0)).from, IpAddr::from(SERVER));

    // The host itself has no such address.
    let server = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = server.local_addr().unwrap().port();
    net.guest.send(udp_frame(guest_v4(5000), (GATEWAY_V4, port).into(), b"?"));
    net.settle();
    assert_eq!(server.recv_from(&mut [0; 8]).unwrap().1.ip(), IpAddr::from(Ipv4Addr::LOCALHOST));
}

#[test]
fn what_cannot_be_bound_does_not_go_another_way() {
    let to = SocketAddr::from(([203, 0, 113, 1], 9));
    for config in [outbound(None, "no-such-one"), outbound(Some(SOURCE), "lo")] {
        let mut net = Net::new(config);
        net.guest.send(udp_frame(guest_v4(5000), to, b"?"));
        assert_eq!(net.expect(as_icmp).kind, 3);
        net.guest.send(segment_to(to, 5000, |h| h.syn = true, b""));
        assert!(net.expect(as_tcp).0.rst);
        let stats = net.stats();
        assert_eq!((stats.udp_flows, stats.tcp_flows), (0, 0));
    }
}

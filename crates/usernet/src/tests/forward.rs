//! Which sockets listen for forwarded ports, and where they lead.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};

use super::process::{has_ipv6, in_namespace, ip};
use super::tcp::as_tcp;
use super::{as_udp, udp_frame};
use crate::config::{Config, Forward, Transport};
use crate::testing::{GATEWAY_V4, GUEST_V4, Net, config};

const TRANSPORTS: [Transport; 2] = [Transport::Tcp, Transport::Udp];

fn any_port(address: impl Into<IpAddr>) -> SocketAddr {
    SocketAddr::new(address.into(), 0)
}

#[test]
fn a_forward_can_name_another_address() {
    let behind = Ipv4Addr::new(10, 9, 9, 9);
    let mut net = Net::new(config());
    let forward = |transport| Forward {
        guest_address: Some(behind.into()),
        ..Forward::new(transport, any_port(Ipv4Addr::LOCALHOST), 80)
    };
    let udp = net.engine.add_forward(forward(Transport::Udp)).unwrap();
    let client = UdpSocket::bind(any_port(Ipv4Addr::LOCALHOST)).unwrap();
    client.send_to(b"question", udp.listen).unwrap();
    let arrived = net.expect(as_udp);
    assert_eq!(arrived.to, (behind, 80).into());
    net.guest.send(udp_frame(arrived.to, arrived.from, b"answer"));
    net.settle();
    let mut buffer = [0; 16];
    assert_eq!(client.recv_from(&mut buffer).unwrap(), (6, udp.listen));

    let tcp = net.engine.add_forward(forward(Transport::Tcp)).unwrap();
    let _stream = TcpStream::connect(tcp.listen).unwrap();
    let (to, _) = net.expect(|f| {
        let destination = <[u8; 4]>::try_from(&f[30..34]).unwrap();
        as_tcp(f).map(|(header, _)| (Ipv4Addr::from(destination), header))
    });
    assert_eq!(to, behind);
}

#[test]
fn peers_that_look_the_same_to_the_guest_have_different_ports() {
    if !has_ipv6() {
        return;
    }
    let mut net = Net::new(Config { ipv6: None, ..config() });
    let forward =
        net.engine.add_forward(Forward::new(Transport::Udp, any_port(Ipv6Addr::UNSPECIFIED), 53)).unwrap();
    let port = forward.listen.port();
    // Both are the gateway to a guest without IPv6.
    let v6 = UdpSocket::bind(any_port(Ipv6Addr::LOCALHOST)).unwrap();
    let client = v6.local_addr().unwrap().port();
    let v4 = match UdpSocket::bind((Ipv4Addr::LOCALHOST, client)) {
        Ok(v4) => v4,
        // Somebody else's just now: another address of the loopback does as well.
        Err(_) => UdpSocket::bind((Ipv4Addr::new(127, 7, 7, 7), client)).unwrap(),
    };
    v6.send_to(b"six", (Ipv6Addr::LOCALHOST, port)).unwrap();
    let six = net.expect(as_udp);
    v4.send_to(b"four", (Ipv4Addr::LOCALHOST, port)).unwrap();
    let four = net.expect(as_udp);
    assert_eq!((six.from, six.to), ((GATEWAY_V4, client).into(), (GUEST_V4, 53).into()));
    assert_eq!(four.from.ip(), IpAddr::from(GATEWAY_V4));
    assert_ne!(four.from, six.from);
    // Each is answered, and is still the same when it asks again.
    for (arrived, socket) in [(&six, &v6), (&four, &v4)] {
        net.guest.send(udp_frame(arrived.to, arrived.from, b"answer"));
        net.settle();
        assert_eq!(socket.recv_from(&mut [0; 16]).unwrap().0, 6);
    }
    v4.send_to(b"again", (Ipv4Addr::LOCALHOST, port)).unwrap();
    assert_eq!(net.expect(as_udp).from, four.from);
    assert_eq!(net.stats().udp_flows, 2);
}

#[test]
fn a_port_can_be_reached_by_its_interface_alone() {
    if !in_namespace() {
        return;
    }
    // What is sent to an address of the host's own comes by its loopback, whatever interface the address is on.
    ip("link add pair0 type veth peer name pair1");
    for transport in TRANSPORTS {
        let mut net = Net::new(config());
        let forward = |interface: &str| Forward {
            interface: Some(interface.to_owned()),
            ..Forward::new(transport, any_port(Ipv4Addr::UNSPECIFIED), 80)
        };
        let by_lo = net.engine.add_forward(forward("lo")).unwrap();
        let by_pair = net.engine.add_forward(forward("pair0")).unwrap();
        let reached = |net: &mut Net, port| match transport {
            Transport::Tcp => TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok(),
            Transport::Udp => {
                let client = UdpSocket::bind(any_port(Ipv4Addr::LOCALHOST)).unwrap();
                client.send_to(b"?", (Ipv4Addr::LOCALHOST, port)).unwrap();
                net.settle();
                net.frames().iter().any(|f| as_udp(f).is_some())
            }
        };
        assert!(reached(&mut net, by_lo.listen.port()), "{transport:?}");
        assert!(!reached(&mut net, by_pair.listen.port()), "{transport:?}");
    }
}

#[test]
fn an_interface_that_is_not_there_is_named() {
    for transport in TRANSPORTS {
        let mut net = Net::new(config());
        let forward = Forward {
            interface: Some("no-such-one".to_owned()),
            ..Forward::new(transport, any_port(Ipv4Addr::LOCALHOST), 80)
        };
        let error = net.engine.add_forward(forward).unwrap_err().to_string();
        assert!(error.contains("no-such-one") && error.contains("127.0.0.1:0"), "{error}");
    }
}

#[test]
fn an_address_that_the_host_does_not_have_needs_leave() {
    for address in ["203.0.113.77", "2001:db8::77"] {
        let address: IpAddr = address.parse().unwrap();
        if address.is_ipv6() && !has_ipv6() {
            return;
        }
        for transport in TRANSPORTS {
            let forward = Forward::new(transport, any_port(address), 80);
            let error = Net::new(config()).engine.add_forward(forward.clone()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::AddrNotAvailable);
            assert!(error.to_string().contains("freebind"), "{error}");
            let mut net = Net::new(Config { freebind: true, ..config() });
            assert_eq!(net.engine.add_forward(forward).unwrap().listen.ip(), address);
        }
    }
}

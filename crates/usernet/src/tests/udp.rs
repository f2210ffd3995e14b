//! UDP, with real sockets of the host's loopback as the other side.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use etherparse::checksum::Sum16BitWords;
use etherparse::{PacketBuilder, SlicedPacket};

use super::{Datagram, as_icmp, as_udp, guest_v4, guest_v6, has_ipv6, udp_frame};
use crate::config::{Config, Forward, Services, Transport};
use crate::engine::Engine;
use crate::tap::{Abilities, Offload};
use crate::testing::{GATEWAY_MAC, GATEWAY_V4, GATEWAY_V6, GUEST_MAC, GUEST_V4, Net, PLAIN, config, tap};

/// A socket of the host's.
fn host(address: impl Into<IpAddr>) -> (UdpSocket, u16) {
    let socket = UdpSocket::bind((address.into(), 0)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let port = socket.local_addr().unwrap().port();
    (socket, port)
}

fn receive(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut buffer = vec![0; 70000];
    let (length, from) = socket.recv_from(&mut buffer).unwrap();
    (buffer[..length].to_vec(), from)
}

/// A port that nobody has now.
fn free_port(address: impl Into<IpAddr>) -> u16 {
    host(address).1
}

fn forwarding(listen: SocketAddr, guest_port: u16) -> Config {
    Config { forwards: vec![Forward::new(Transport::Udp, listen, guest_port)], ..config() }
}

#[test]
fn the_gateway_is_the_hosts_loopback() {
    for (address, gateway, guest) in [
        (IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(GATEWAY_V4), guest_v4(4000)),
        (Ipv6Addr::LOCALHOST.into(), GATEWAY_V6.into(), guest_v6(4000)),
    ] {
        if address.is_ipv6() && !has_ipv6() {
            continue;
        }
        let (server, port) = host(address);
        let remote = SocketAddr::new(gateway, port);
        let mut net = Net::new(config());
        net.guest.send(udp_frame(guest, remote, b"question"));
        net.settle();
        let (question, from) = receive(&server);
        assert_eq!(question, b"question");
        server.send_to(b"answer", from).unwrap();
        let expected = Datagram { from: remote, to: guest, payload: b"answer".to_vec() };
        assert_eq!(net.expect(as_udp), expected);
        // The same flow, both ways and again.
        net.guest.send(udp_frame(guest, remote, b""));
        net.settle();
        assert_eq!(receive(&server), (vec![], from));
        assert_eq!(net.stats().udp_flows, 1);
    }
}

#[test]
fn a_resolver_goes_by_another_address() {
    let (server, port) = host(Ipv4Addr::LOCALHOST);
    let alias = Ipv4Addr::new(192, 0, 2, 3);
    let mut config = config();
    config.dns_forward = vec![(alias.into(), Ipv4Addr::LOCALHOST.into())];
    let mut net = Net::new(config);
    let cx_outside = |net: &mut Net, port| net.engine.outside((alias, port).into());
    assert_eq!(cx_outside(&mut net, 53), (Ipv4Addr::LOCALHOST, 53).into());
    assert_eq!(cx_outside(&mut net, 853), (Ipv4Addr::LOCALHOST, 853).into());
    assert_eq!(cx_outside(&mut net, port), (alias, port).into(), "other ports are the address's own");
    drop(server);
}

#[test]
fn flows_end_after_their_time() {
    let (server, port) = host(Ipv4Addr::LOCALHOST);
    let remote = SocketAddr::from((GATEWAY_V4, port));
    let mut net = Net::new(config());
    net.guest.send(udp_frame(guest_v4(1), remote, b"never answered"));
    net.guest.send(udp_frame(guest_v4(2), remote, b"answered"));
    net.settle();
    receive(&server);
    let (_, from) = receive(&server);
    server.send_to(b"answer", from).unwrap();
    net.expect(as_udp);
    net.advance(Duration::from_secs(29));
    assert_eq!(net.stats().udp_flows, 2);
    net.advance(Duration::from_secs(2));
    assert_eq!(net.stats().udp_flows, 1);
    net.advance(Duration::from_secs(148));
    assert_eq!(net.stats().udp_flows, 1);
    net.advance(Duration::from_secs(5));
    assert_eq!(net.stats().udp_flows, 0);
}

#[test]
fn a_closed_port_is_unreachable() {
    for (address, gateway, guest, error) in [
        (IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(GATEWAY_V4), guest_v4(4000), (3, 3)),
        (Ipv6Addr::LOCALHOST.into(), GATEWAY_V6.into(), guest_v6(4000), (1, 4)),
    ] {
        if address.is_ipv6() && !has_ipv6() {
            continue;
        }
        let remote = SocketAddr::new(gateway, free_port(address));
        let mut net = Net::new(config());
        net.guest.send(udp_frame(guest, remote, b"anybody?"));
        let message = net.expect(|f| as_icmp(f).filter(|m| (m.kind, m.code) == error));
        assert_eq!((message.from, message.to), (gateway, guest.ip()));
        // The packet that it is about, which the guest's kernel finds its socket by.
        let quoted = SlicedPacket::from_ip(&message.body[4..]).unwrap();
        let mut frame = vec![0; 12];
        frame.extend(if guest.is_ipv4() { [8, 0] } else { [0x86, 0xdd] });
        frame.extend(&message.body[4..]);
        assert!(quoted.net.is_some());
        assert_eq!(
            as_udp(&frame).unwrap(),
            Datagram { from: guest, to: remote, payload: b"anybody?".to_vec() }
        );
    }
}

#[test]
fn a_forwarded_port_leads_to_the_guest_and_back() {
    for (address, gateway, guest) in [
        (IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(GATEWAY_V4), guest_v4(53)),
        (Ipv6Addr::LOCALHOST.into(), GATEWAY_V6.into(), guest_v6(53)),
    ] {
        if address.is_ipv6() && !has_ipv6() {
            continue;
        }
        let listen = SocketAddr::new(address, free_port(address));
        let mut net = Net::new(forwarding(listen, 53));
        let (client, port) = host(address);
        client.send_to(b"question", listen).unwrap();
        let remote = SocketAddr::new(gateway, port);
        let arrived = net.expect(as_udp);
        assert_eq!(arrived, Datagram { from: remote, to: guest, payload: b"question".to_vec() });
        net.guest.send(udp_frame(guest, remote, b"answer"));
        net.settle();
        assert_eq!(receive(&client), (b"answer".to_vec(), listen), "from the port that it had asked");
        // A flow is not the forward's only one.
        let (other, other_port) = host(address);
        other.send_to(b"me too", listen).unwrap();
        assert_eq!(net.expect(as_udp).from.port(), other_port);
        assert_eq!(net.stats().udp_flows, 2);
    }
}

#[test]
fn an_answer_comes_from_the_address_that_was_asked() {
    let port = free_port(Ipv4Addr::UNSPECIFIED);
    // Any address of IPv6 serves IPv4 too.
    for any in [IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()] {
        if any.is_ipv6() && !has_ipv6() {
            continue;
        }
        let mut net = Net::new(forwarding(SocketAddr::new(any, port), 53));
        let (client, client_port) = host(Ipv4Addr::LOCALHOST);
        let asked = SocketAddr::from((Ipv4Addr::new(127, 0, 0, 9), port));
        client.send_to(b"question", asked).unwrap();
        let arrived = net.expect(as_udp);
        assert_eq!(arrived.from, (GATEWAY_V4, client_port).into());
        net.guest.send(udp_frame(arrived.to, arrived.from, b"answer"));
        net.settle();
        assert_eq!(receive(&client), (b"answer".to_vec(), asked));
    }
}

#[test]
fn forwards_come_and_go() {
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port(Ipv4Addr::LOCALHOST)));
    let forward = Forward::new(Transport::Udp, listen, 7);
    let (tap, guest) = tap(PLAIN, 16).unwrap();
    let engine = Engine::new(config(), Box::new(tap)).unwrap();
    let handle = engine.handle();
    let thread = std::thread::spawn(move || engine.run());
    assert_eq!(handle.forwards().unwrap(), []);
    assert_eq!(handle.add_forward(forward.clone()).unwrap(), forward);
    assert_eq!(handle.forwards().unwrap(), std::slice::from_ref(&forward));
    assert_eq!(handle.add_forward(forward.clone()).unwrap_err().kind(), std::io::ErrorKind::AlreadyExists);
    let same_port = Forward { guest_port: 8, ..forward.clone() };
    assert_eq!(handle.add_forward(same_port).unwrap_err().kind(), std::io::ErrorKind::AddrInUse);
    assert!(handle.remove_forward(forward.clone()).unwrap());
    assert!(!handle.remove_forward(forward.clone()).unwrap());
    assert_eq!(handle.forwards().unwrap(), []);
    UdpSocket::bind(listen).expect("the port is free again");
    handle.stop();
    thread.join().unwrap().unwrap();
    assert_eq!(handle.stats().unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
    drop(guest);
}

#[test]
fn a_guest_that_closes_its_port_closes_the_hosts() {
    let (server, port) = host(Ipv4Addr::LOCALHOST);
    let remote = SocketAddr::from((GATEWAY_V4, port));
    let mut net = Net::new(config());
    net.guest.send(udp_frame(guest_v4(4000), remote, b"question"));
    net.settle();
    let (_, from) = receive(&server);
    server.send_to(b"answer", from).unwrap();
    let answer = net.expect(|f| as_udp(f).map(|_| f.to_vec()));
    let mut refusal = Vec::new();
    PacketBuilder::ethernet2(GUEST_MAC, GATEWAY_MAC)
        .ipv4(GUEST_V4.octets(), GATEWAY_V4.octets(), 64)
        .icmpv4_raw(3, 3, [0; 4])
        .write(&mut refusal, &answer[14..])
        .unwrap();
    net.guest.send(refusal);
    net.settle();
    assert_eq!(net.stats().udp_flows, 0);
    server.connect(from).unwrap();
    server.send(b"another").unwrap();
    assert_eq!(server.recv(&mut [0; 8]).unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
}

#[test]
fn long_datagrams_come_in_fragments() {
    let payload: Vec<u8> = (0..20000u32).map(|i| (i % 251) as u8).collect();
    for (address, gateway, guest, header) in [
        (IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(GATEWAY_V4), guest_v4(4000), 20),
        (Ipv6Addr::LOCALHOST.into(), GATEWAY_V6.into(), guest_v6(4000), 48),
    ] {
        if address.is_ipv6() && !has_ipv6() {
            continue;
        }
        let (server, port) = host(address);
        let mut net = Net::new(config());
        net.guest.send(udp_frame(guest, SocketAddr::new(gateway, port), b"more"));
        net.settle();
        let (_, from) = receive(&server);
        drop(net.frames());
        server.send_to(&payload, from).unwrap();
        net.settle();
        let frames = net.frames();
        let mut whole: Vec<u8> = Vec::new();
        for (index, frame) in frames.iter().enumerate() {
            assert!(frame.len() <= 14 + 1500);
            let (offset, more) = if guest.is_ipv4() {
                let field = u16::from_be_bytes([frame[20], frame[21]]);
                (usize::from(field & 0x1fff) * 8, field & 0x2000 != 0)
            } else {
                let field = u16::from_be_bytes([frame[56], frame[57]]);
                (usize::from(field & !7), field & 1 != 0)
            };
            assert_eq!((offset, more), (whole.len(), index + 1 < frames.len()));
            assert!(SlicedPacket::from_ethernet(frame).unwrap().is_ip_payload_fragmented());
            whole.extend(&frame[14 + header..]);
        }
        assert_eq!(whole[8..], payload);
        let mut frame = udp_frame(SocketAddr::new(gateway, port), guest, &payload);
        let headers = frame.len() - payload.len() - 8;
        assert_eq!(whole[..8], frame.split_off(headers)[..8], "a checksum over all of it");
    }
}

#[test]
fn a_link_that_completes_checksums_is_given_the_pseudo_headers() {
    let (server, port) = host(Ipv4Addr::LOCALHOST);
    let mut net = Net::with(config(), Abilities { checksum: true, ..PLAIN }, 16);
    let (guest, remote) = (guest_v4(9), SocketAddr::from((GATEWAY_V4, port)));
    net.guest.send(udp_frame(guest, remote, b"?"));
    net.settle();
    let (_, from) = receive(&server);
    drop(net.frames());
    server.send_to(b"odd", from).unwrap();
    net.settle();
    let (mut frame, offload) = net.guest.receive().unwrap();
    assert!(offload.needs_checksum);
    // What the guest's driver does (virtio 1.2, 5.1.6.2): the sum of all from the header on, the partial one included.
    let sum = Sum16BitWords::new().add_slice(&frame[34..]).ones_complement();
    frame[40..42].copy_from_slice(&sum.to_ne_bytes());
    assert_eq!(as_udp(&frame).unwrap().payload, b"odd");
}

/// Sends datagrams of `length` bytes by one call.
fn send_together(from: &UdpSocket, to: SocketAddr, bytes: &[u8], length: u16) {
    let from = from.try_clone().unwrap().into();
    crate::socket::send(&from, bytes, Some(length), None, Some(to)).unwrap();
}

#[test]
fn what_the_host_has_together_the_guest_gets_as_its_link_can() {
    let bytes: Vec<u8> = (0..10_100u32).map(|n| (n % 251) as u8).collect();
    let (server, port) = host(Ipv4Addr::LOCALHOST);
    for datagrams in [true, false] {
        let mut net = Net::with(config(), Abilities { checksum: true, datagrams, ..PLAIN }, 64);
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let forward = net.engine.add_forward(Forward::new(Transport::Udp, any, 53)).unwrap();
        net.guest.send(udp_frame(guest_v4(9), (GATEWAY_V4, port).into(), b"?"));
        net.settle();
        let (_, from) = receive(&server);
        // By a flow of the guest's, and by a forwarded port.
        for to in [from, forward.listen] {
            drop(net.frames());
            send_together(&server, to, &bytes, 1000);
            net.settle();
            let frames: Vec<_> = std::iter::from_fn(|| net.guest.receive()).collect();
            let count = if datagrams { 1 } else { 11 };
            assert_eq!(frames.len(), count, "{to}");
            let mut whole = Vec::new();
            for (mut frame, offload) in frames {
                assert_eq!(offload, Offload { needs_checksum: true, segment: datagrams.then_some(1000) });
                let sum = Sum16BitWords::new().add_slice(&frame[34..]).ones_complement();
                frame[40..42].copy_from_slice(&sum.to_ne_bytes());
                whole.extend(as_udp(&frame).unwrap().payload);
            }
            assert!(whole == bytes, "{to}");
        }
    }
}

#[test]
fn what_does_not_fit_the_link_is_given_one_by_one() {
    let (server, port) = host(Ipv4Addr::LOCALHOST);
    let abilities = Abilities { checksum: true, datagrams: true, mtu: 1000, ..PLAIN };
    let mut net = Net::with(config(), abilities, 64);
    net.guest.send(udp_frame(guest_v4(9), (GATEWAY_V4, port).into(), b"?"));
    net.settle();
    let (_, from) = receive(&server);
    drop(net.frames());
    send_together(&server, from, &[7; 3000], 1500);
    net.settle();
    let frames: Vec<_> = std::iter::from_fn(|| net.guest.receive()).collect();
    assert_eq!(frames.len(), 4, "two fragments each");
    assert!(frames.iter().all(|(frame, offload)| frame.len() <= 1014 && *offload == Offload::default()));
}

#[test]
fn what_the_guest_has_together_leaves_as_many() {
    let (server, port) = host(Ipv4Addr::LOCALHOST);
    let mut net = Net::new(config());
    let remote = SocketAddr::from((GATEWAY_V4, port));
    let bytes: Vec<u8> = (0..50_000u32).map(|n| (n % 253) as u8).collect();
    let send = |net: &mut Net, segment| {
        let offload = Offload { needs_checksum: true, segment: Some(segment) };
        net.guest.send_with(udp_frame(guest_v4(9), remote, &bytes), offload);
        net.settle();
    };
    send(&mut net, 1200);
    let got: Vec<Vec<u8>> = (0..42).map(|_| receive(&server).0).collect();
    assert!(got.iter().take(41).all(|datagram| datagram.len() == 1200));
    assert!(got.concat() == bytes);
    // As many as no socket sends together, and as no driver may.
    send(&mut net, 10);
    assert_eq!(net.stats().dropped.malformed, 1);
    server.set_nonblocking(true).unwrap();
    assert!(server.recv(&mut [0; 10]).is_err());
}

#[test]
fn a_full_link_loses_nothing_that_the_host_can_hold() {
    let (server, port) = host(Ipv4Addr::LOCALHOST);
    let mut net = Net::with(config(), PLAIN, 4);
    net.guest.send(udp_frame(guest_v4(9), (GATEWAY_V4, port).into(), b"?"));
    net.settle();
    let (_, from) = receive(&server);
    for number in 0..100u8 {
        server.send_to(&[number], from).unwrap();
    }
    net.settle();
    assert_eq!(net.stats().frames_out, 4);
    for number in 0..100u8 {
        assert_eq!(net.expect(as_udp).payload, [number]);
    }
    assert_eq!(net.stats().overruns, 0);
}

#[test]
fn what_stays_on_the_link_makes_no_flows() {
    let mut net = Net::new(config());
    let destinations = ["224.0.0.251:5353", "255.255.255.255:9", "192.0.2.255:9"];
    for destination in destinations {
        net.guest.send(udp_frame(guest_v4(5353), destination.parse().unwrap(), b""));
    }
    net.guest.send(udp_frame(guest_v6(5353), "[ff02::fb]:5353".parse().unwrap(), b""));
    net.guest.send(udp_frame("0.0.0.0:5".parse().unwrap(), (GATEWAY_V4, 9).into(), b""));
    net.guest.send(udp_frame(guest_v4(0), (GATEWAY_V4, 9).into(), b""));
    net.guest.send(udp_frame(guest_v4(9), (GATEWAY_V4, 0).into(), b""));
    net.settle();
    let stats = net.stats();
    assert_eq!((stats.udp_flows, stats.dropped.multicast, stats.dropped.address), (0, 4, 3));
}

#[test]
fn udp_can_be_off() {
    let (server, port) = host(Ipv4Addr::LOCALHOST);
    let mut net = Net::new(Config { services: Services { udp: false, ..Services::default() }, ..config() });
    net.guest.send(udp_frame(guest_v4(9), (GATEWAY_V4, port).into(), b"?"));
    net.settle();
    server.set_nonblocking(true).unwrap();
    assert_eq!(server.recv(&mut [0; 8]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    assert_eq!((net.stats().dropped.disabled, net.stats().udp_flows), (1, 0));
}

#[test]
fn more_flows_than_the_table_holds_push_the_oldest_out() {
    let (_server, port) = host(Ipv4Addr::LOCALHOST);
    let mut net = Net::new(config());
    // Descriptors may be fewer than flows: then it is they who say which flow goes.
    for number in 1..=5000u16 {
        net.guest.send(udp_frame(guest_v4(number), (GATEWAY_V4, port).into(), b""));
        if number % 64 == 0 {
            net.settle();
        }
    }
    net.settle();
    let stats = net.stats();
    assert!(stats.udp_flows <= 4096);
    assert_eq!(stats.evicted + stats.udp_flows as u64, 5000);
}

#[test]
fn what_is_sent_in_one_go_arrives_as_it_was_sent() {
    let (server, port) = host(Ipv4Addr::LOCALHOST);
    let (other, other_port) = host(Ipv4Addr::LOCALHOST);
    let mut net = Net::new(config());
    let (remote, other_remote) = (SocketAddr::from((GATEWAY_V4, port)), (GATEWAY_V4, other_port).into());
    // Runs of one length, a shorter one, a longer one, none at all, and another flow in between.
    let lengths = [[700; 40].as_slice(), &[1, 700, 700, 800, 800, 0, 0, 3, 3, 2]].concat();
    for (number, &length) in lengths.iter().enumerate() {
        net.guest.send(udp_frame(guest_v4(9), remote, &vec![number as u8; length]));
        if number % 20 == 19 {
            net.guest.send(udp_frame(guest_v4(9), other_remote, b"other"));
        }
    }
    net.settle();
    for (number, &length) in lengths.iter().enumerate() {
        assert_eq!(receive(&server).0, vec![number as u8; length], "{number}");
    }
    assert_eq!([receive(&other).0, receive(&other).0], [b"other", b"other"]);
    assert_eq!((net.stats().udp_flows, net.stats().dropped.host), (2, 0));
}

#[test]
fn answers_by_a_forwarded_port_in_one_go() {
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port(Ipv4Addr::LOCALHOST)));
    let mut net = Net::new(forwarding(listen, 53));
    let (client, port) = host(Ipv4Addr::LOCALHOST);
    client.send_to(b"question", listen).unwrap();
    net.expect(as_udp);
    for number in 0..50u8 {
        net.guest.send(udp_frame(guest_v4(53), (GATEWAY_V4, port).into(), &[number; 1000]));
    }
    net.settle();
    for number in 0..50u8 {
        assert_eq!(receive(&client), (vec![number; 1000], listen));
    }
}

#[test]
fn many_datagrams_to_a_closed_port_are_answered_for() {
    let remote = SocketAddr::from((GATEWAY_V4, free_port(Ipv4Addr::LOCALHOST)));
    let mut net = Net::new(config());
    for _ in 0..10 {
        net.guest.send(udp_frame(guest_v4(4000), remote, b"anybody?"));
    }
    let message = net.expect(|f| as_icmp(f).filter(|m| (m.kind, m.code) == (3, 3)));
    // Of datagrams that went together the kernel may answer for all at once.
    assert!(message.body[4 + 28..].starts_with(b"anybody?"));
}

/// The datagrams in a frame of a link that takes several in one.
fn datagrams_of(mut frame: Vec<u8>, offload: Offload) -> Vec<Datagram> {
    let sum = Sum16BitWords::new().add_slice(&frame[34..]).ones_complement();
    frame[40..42].copy_from_slice(&sum.to_ne_bytes());
    let whole = as_udp(&frame).unwrap();
    let length = offload.segment.map_or(usize::MAX, usize::from);
    let pieces =
        if whole.payload.is_empty() { vec![&[][..]] } else { whole.payload.chunks(length).collect() };
    pieces.into_iter().map(|payload| Datagram { payload: payload.to_vec(), ..whole.clone() }).collect()
}

#[test]
fn what_waits_for_the_guest_goes_together_as_it_was_sent() {
    // Runs of one length, a shorter one, a longer one, none at all; more than one call takes.
    let lengths = [[700; 40].as_slice(), &[1, 700, 700, 800, 800, 0, 0, 3, 3, 2]].concat();
    let (server, port) = host(Ipv4Addr::LOCALHOST);
    let (other, other_port) = host(Ipv4Addr::LOCALHOST);
    let mut net = Net::with(config(), Abilities { checksum: true, datagrams: true, ..PLAIN }, 256);
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let forward = net.engine.add_forward(Forward::new(Transport::Udp, any, 53)).unwrap();
    net.guest.send(udp_frame(guest_v4(9), (GATEWAY_V4, port).into(), b"?"));
    net.settle();
    let (_, from) = receive(&server);
    // By a flow of the guest's, and by a forwarded port, where another peer's may come in between.
    for (to, guest, others) in [(from, guest_v4(9), 0), (forward.listen, guest_v4(53), 2)] {
        drop(net.frames());
        for (number, &length) in lengths.iter().enumerate() {
            server.send_to(&vec![number as u8; length], to).unwrap();
            if others > 0 && number % 20 == 19 {
                other.send_to(b"other", to).unwrap();
            }
        }
        net.settle();
        let frames: Vec<_> = std::iter::from_fn(|| net.guest.receive()).collect();
        assert!(frames.len() < lengths.len() / 2, "{to}: {} frames", frames.len());
        let (own, strange): (Vec<_>, Vec<_>) = frames
            .into_iter()
            .flat_map(|(frame, offload)| datagrams_of(frame, offload))
            .partition(|datagram| datagram.from.port() == port);
        assert_eq!(own.len(), lengths.len(), "{to}");
        for (number, (datagram, &length)) in own.iter().zip(&lengths).enumerate() {
            let payload = vec![number as u8; length];
            let from = (GATEWAY_V4, port).into();
            assert_eq!(*datagram, Datagram { from, to: guest, payload }, "{number} to {to}");
        }
        let expected =
            Datagram { from: (GATEWAY_V4, other_port).into(), to: guest, payload: b"other".to_vec() };
        assert_eq!(strange, vec![expected; others]);
    }
}

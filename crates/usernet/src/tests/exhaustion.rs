//! What happens when the host has no more to give, and afterwards.

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use super::process::with_descriptors;
use super::tcp::{as_tcp, segment};
use super::{as_icmp, as_udp, guest_v4, udp_frame};
use crate::config::{Forward, Transport};
use crate::testing::{GATEWAY_V4, Net, config};

/// Takes all descriptors that are left.
fn all_descriptors() -> Vec<File> {
    std::iter::from_fn(|| File::open("/dev/null").ok()).collect()
}

#[test]
fn without_descriptors_the_guest_is_told_and_afterwards_all_is_well() {
    if !with_descriptors(200) {
        return;
    }
    let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = server.local_addr().unwrap().port();
    let datagrams = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let remote = SocketAddr::from((GATEWAY_V4, datagrams.local_addr().unwrap().port()));
    let mut net = Net::new(config());
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let forward = net.engine.add_forward(Forward::new(Transport::Tcp, any, 80)).unwrap();
    let syn = |port| segment(4000, port, |h| h.syn = true, b"");
    let _peer = TcpStream::connect(forward.listen).unwrap();

    let taken = all_descriptors();
    net.guest.send(syn(port));
    assert!(net.expect(as_tcp).0.rst, "refused");
    net.guest.send(udp_frame(guest_v4(4000), remote, b"?"));
    assert_eq!(net.expect(|f| as_icmp(f).filter(|m| m.kind == 3)).from, IpAddr::from(GATEWAY_V4));
    assert_eq!((net.stats().tcp_flows, net.stats().udp_flows), (0, 0));
    let another = net.engine.add_forward(Forward::new(Transport::Udp, any, 80)).unwrap_err();
    assert!(another.to_string().contains("ulimit -n"), "{another}");

    drop(taken);
    // The connection that could not be accepted has waited.
    net.advance(Duration::from_secs(1));
    net.expect(|f| as_tcp(f).filter(|(h, _)| h.syn && !h.ack && h.destination_port == 80));
    net.guest.send(syn(port));
    net.expect(|f| as_tcp(f).filter(|(h, _)| h.syn && h.ack));
    net.guest.send(udp_frame(guest_v4(4000), remote, b"!"));
    net.settle();
    let mut buffer = [0; 8];
    let (length, from) = datagrams.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"!");
    datagrams.send_to(b"!", from).unwrap();
    net.expect(as_udp);
}

#[test]
fn flows_that_are_not_needed_give_their_descriptors_to_others() {
    if !with_descriptors(100) {
        return;
    }
    let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    server.set_nonblocking(true).unwrap();
    let port = server.local_addr().unwrap().port();
    let mut net = Net::new(config());
    // The server's own descriptor.
    let mut spare = Some(File::open("/dev/null").unwrap());
    // The handshake of each is left half-done: a flood of SYNs.
    for source in 1..=500 {
        net.guest.send(segment(source, port, |h| h.syn = true, b""));
        net.settle();
        // The kernel has room for some that are not accepted, whether they still stand or not.
        drop(spare.take());
        while server.accept().is_ok() {}
        spare = Some(File::open("/dev/null").unwrap());
    }
    let answered = net.frames().iter().filter_map(|f| as_tcp(f)).filter(|(h, _)| h.syn && h.ack).count();
    assert_eq!(answered, 500, "each drives out an older one, not itself");
    let stats = net.stats();
    assert!((50..100).contains(&stats.tcp_flows), "{}", stats.tcp_flows);
    assert_eq!(stats.evicted + stats.tcp_flows as u64, 500);
}

#[test]
fn datagrams_that_nobody_sends_any_more_give_their_descriptors_to_connections() {
    if !with_descriptors(100) {
        return;
    }
    let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = server.local_addr().unwrap().port();
    let datagrams = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let remote = SocketAddr::from((GATEWAY_V4, datagrams.local_addr().unwrap().port()));
    let mut net = Net::new(config());
    for source in 1000..1020 {
        net.guest.send(udp_frame(guest_v4(source), remote, b"!"));
        net.settle();
    }
    let _taken = all_descriptors();
    let connect = |net: &mut Net, source| {
        net.guest.send(segment(source, port, |h| h.syn = true, b""));
        net.expect(as_tcp).0
    };
    assert!(connect(&mut net, 4000).rst, "datagrams may still be answered");
    net.advance(Duration::from_secs(11));
    let answer = connect(&mut net, 4001);
    assert!(answer.syn && answer.ack);
    assert_eq!((net.stats().tcp_flows, net.stats().udp_flows, net.stats().evicted), (1, 19, 1));
}

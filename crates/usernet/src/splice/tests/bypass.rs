//! What an engine hands over.

use std::io::{Read, Write};
use std::net::{IpAddr, UdpSocket};

use etherparse::{SlicedPacket, TransportSlice};

use super::super::Bypass;
use super::*;
use crate::config::Forward;
use crate::testing::{Net, config};

/// An engine whose forwarded port `listen` leads to the guest's `port`, with a bypass to the guest's loopback.
fn engine(running: &Running, transport: Transport, listen: SocketAddr, port: u16) -> (Net, Forward) {
    let mut net = Net::new(config());
    net.engine.set_bypass(Bypass::new(running.handle.clone(), true));
    let forward = net.engine.add_forward(Forward::new(transport, listen, port)).unwrap();
    (net, forward)
}

#[test]
fn a_connection_of_the_loopback_needs_no_frames() {
    let running = Running::new();
    let listener = TcpListener::bind(any()).unwrap();
    let port = listener.local_addr().unwrap().port();
    let (mut net, forward) = engine(&running, Transport::Tcp, any(), port);
    let mut client = TcpStream::connect(forward.listen).unwrap();
    client.write_all(b"hello").unwrap();
    net.until(|_| running.stats().tcp_connections == 1);
    let mut hello = [0; 5];
    listener.accept().unwrap().0.read_exact(&mut hello).unwrap();
    assert_eq!(&hello, b"hello");
    assert_eq!((net.stats().tcp_flows, net.frames().len()), (0, 0));
}

#[test]
fn datagrams_of_the_loopback_need_no_frames() {
    let running = Running::new();
    let server = UdpSocket::bind(any()).unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    let listen = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
    let (mut net, forward) = engine(&running, Transport::Udp, listen, server.local_addr().unwrap().port());
    let client = UdpSocket::bind(any()).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.connect((Ipv4Addr::LOCALHOST, forward.listen.port())).unwrap();
    client.send(b"hello").unwrap();
    net.until(|_| running.stats().udp_flows == 1);
    let mut word = [0; 8];
    // The engine has nothing to do with what follows.
    for _ in 0..3 {
        let (n, from) = server.recv_from(&mut word).unwrap();
        server.send_to(&word[..n], from).unwrap();
        let n = client.recv(&mut word).unwrap();
        assert_eq!(&word[..n], b"hello");
        client.send(b"hello").unwrap();
    }
    assert_eq!((net.stats().udp_flows, net.frames().len()), (0, 0));
    // Its port is free again as soon as it is not forwarded.
    let handle = net.engine.handle();
    let removed = forward.clone();
    let remove = std::thread::spawn(move || handle.remove_forward(removed).unwrap());
    net.until(|_| remove.is_finished());
    assert!(remove.join().unwrap());
    UdpSocket::bind(forward.listen).unwrap();
}

#[test]
fn without_a_splicer_frames_carry_it() {
    let running = Running::new();
    let (mut net, forward) = engine(&running, Transport::Tcp, any(), 80);
    drop(running);
    let _client = TcpStream::connect(forward.listen).unwrap();
    net.expect(|frame| match SlicedPacket::from_ethernet(frame).unwrap().transport? {
        TransportSlice::Tcp(tcp) => tcp.syn().then_some(()),
        _ => None,
    });
}

#[test]
fn only_the_loopbacks_own_is_taken() {
    let running = Running::new();
    let guest: IpAddr = [192, 0, 2, 15].into();
    let at = |text: &str| -> SocketAddr { text.parse().unwrap() };
    let target = |to_loopback, peer, local, guest| {
        Bypass::new(running.handle.clone(), to_loopback).target(at(peer), at(local), guest, 80)
    };
    let (lo, mapped) = ("127.0.0.1:4000", "[::ffff:127.0.0.1]:4000");
    assert_eq!(target(false, lo, lo, Some(guest)), Some(at("192.0.2.15:80")));
    assert_eq!(target(false, mapped, mapped, Some(guest)), Some(at("192.0.2.15:80")));
    assert_eq!(target(false, lo, lo, None), None, "the guest has no IPv4");
    assert_eq!(target(true, lo, lo, None), Some(at("127.0.0.1:80")));
    assert_eq!(target(true, mapped, mapped, None), Some(at("127.0.0.1:80")));
    assert_eq!(target(true, "[::1]:4000", "[::1]:4000", None), Some(at("[::1]:80")));
    // The host's own address, and somebody else.
    assert_eq!(target(true, "192.0.2.15:4000", "192.0.2.15:80", None), None);
    assert_eq!(target(true, lo, "192.0.2.15:80", None), None);
    assert_eq!(target(true, "198.51.100.1:4000", "127.0.0.1:80", None), None);
}

//! Datagrams: there and back.

use std::net::UdpSocket;
use std::os::fd::OwnedFd;

use super::super::sockets::Kind;
use super::*;

fn bound() -> UdpSocket {
    let socket = UdpSocket::bind(any()).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// Asks and answers once. The client is connected: only an answer from where it asked reaches it.
fn exchange(client: &UdpSocket, server: &UdpSocket, word: &[u8]) -> SocketAddr {
    let mut buffer = [0; 70_000];
    client.send(word).unwrap();
    let (n, from) = server.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..n], word);
    server.send_to(word, from).unwrap();
    let n = client.recv(&mut buffer).unwrap();
    assert_eq!(&buffer[..n], word);
    from
}

#[test]
fn datagrams_there_and_back() {
    let running = Running::new();
    let server = bound();
    let port = running.forward(Transport::Udp, server.local_addr().unwrap());
    let (one, two) = (bound(), bound());
    one.connect(port).unwrap();
    two.connect(port).unwrap();
    let mut seen = Vec::new();
    for word in [&b"first"[..], b"", b"third", &[3; 65_507]] {
        seen.push(exchange(&one, &server, word));
    }
    seen.dedup();
    assert_eq!(seen.len(), 1, "one peer is one flow");
    assert_ne!(exchange(&two, &server, b"another"), seen[0]);
    assert_eq!(running.stats().udp_flows, 2);
}

/// A namespace in which the second socket of a flow cannot be bound.
struct NoSecond;

impl Sockets for NoSecond {
    fn socket(&self, _: Kind) -> io::Result<OwnedFd> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn bind(&self, transport: Transport, address: SocketAddr, on: Option<&str>) -> io::Result<OwnedFd> {
        Here.bind(transport, address, on)
    }
}

#[test]
fn the_listening_socket_answers_if_no_other_can() {
    let running = Running::with(Config::default(), NoSecond, |_| ());
    let server = bound();
    let listen = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
    let forward = Forward::new(Side::Guest, Transport::Udp, listen, server.local_addr().unwrap().port());
    let port = running.handle.add_forward(forward).unwrap().listen.port();
    let client = bound();
    // Not the address that the kernel would answer from by itself.
    client.connect((Ipv4Addr::new(127, 0, 0, 9), port)).unwrap();
    for word in [&b"first"[..], b"second"] {
        exchange(&client, &server, word);
    }
}

#[test]
fn many_peers_at_once() {
    let running = Running::new();
    let server = bound();
    let port = running.forward(Transport::Udp, server.local_addr().unwrap());
    let clients: Vec<_> = (0..100).map(|_| bound()).collect();
    for (number, client) in (0u32..).zip(&clients) {
        client.connect(port).unwrap();
        client.send(&number.to_le_bytes()).unwrap();
    }
    for _ in &clients {
        let mut word = [0; 4];
        let (_, from) = server.recv_from(&mut word).unwrap();
        server.send_to(&word, from).unwrap();
    }
    for (number, client) in (0u32..).zip(&clients) {
        let mut word = [0; 4];
        client.recv(&mut word).unwrap();
        assert_eq!(u32::from_le_bytes(word), number);
    }
    assert_eq!(running.stats().udp_flows, 100);
}

#[test]
fn a_target_may_refuse_and_come_back() {
    let running = Running::new();
    let target = bound().local_addr().unwrap();
    let client = bound();
    client.connect(running.forward(Transport::Udp, target)).unwrap();
    client.send(b"anybody?").unwrap();
    running.until(|stats| stats.udp_refused == 1);
    let server = UdpSocket::bind(target).unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    exchange(&client, &server, b"now");
}

#[test]
fn a_port_is_free_once_it_is_not_forwarded() {
    let running = Running::new();
    let server = bound();
    let forward = Forward::new(Side::Host, Transport::Udp, any(), server.local_addr().unwrap().port());
    let named = running.handle.add_forward(forward).unwrap();
    let client = bound();
    client.connect(named.listen).unwrap();
    exchange(&client, &server, b"hello");
    assert!(UdpSocket::bind(named.listen).is_err());
    assert!(running.handle.remove_forward(named.clone()).unwrap());
    assert_eq!(running.stats().udp_flows, 0);
    UdpSocket::bind(named.listen).unwrap();
}

#[test]
fn a_full_table_makes_room() {
    let running = Running::with(Config { most_flows: 2, ..Config::default() }, Here, |_| ());
    let server = bound();
    let port = running.forward(Transport::Udp, server.local_addr().unwrap());
    for _ in 0..5 {
        let client = bound();
        client.connect(port).unwrap();
        exchange(&client, &server, b"hello");
    }
    assert_eq!(running.stats().udp_flows, 2);
}

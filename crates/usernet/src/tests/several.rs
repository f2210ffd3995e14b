//! Several engines for one guest: a flow is one engine's, whichever queue its frames come by.

use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use super::tcp::{as_tcp, segment};
use super::{as_icmp, as_udp, guest_v4, udp_frame};
use crate::config::{Config, Forward, Transport};
use crate::engine::Engine;
use crate::network::Network;
use crate::poller::Events;
use crate::tap::Tap;
use crate::testing::{GATEWAY_V4, Guest, PLAIN, config, tap};

/// A guest with several queues and an engine for each, on one thread.
struct Queues {
    engines: Vec<Engine>,
    guests: Vec<Guest>,
    events: Events,
}

impl Queues {
    fn new(count: usize, config: Config) -> Self {
        let (taps, guests) = queues(count);
        Self { engines: Engine::several(config, taps).unwrap(), guests, events: Events::new() }
    }

    /// Runs engine `number` until it has nothing to do. Whether it had.
    fn settle_one(&mut self, number: usize) -> bool {
        let mut busy = false;
        while self.engines[number].turn(&mut self.events, Some(Duration::ZERO)).unwrap() {
            busy = true;
        }
        busy
    }

    fn settle(&mut self) {
        // One has work for the next.
        while (0..self.engines.len()).any(|number| self.settle_one(number)) {}
    }

    /// Runs all until a queue brings the guest a frame of which `look` makes something: which queue, and what.
    fn expect<T>(&mut self, look: impl Fn(&[u8]) -> Option<T>) -> (usize, T) {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            for (number, guest) in self.guests.iter().enumerate() {
                while let Some((frame, _)) = guest.receive() {
                    if let Some(found) = look(&frame) {
                        return (number, found);
                    }
                }
            }
            assert!(Instant::now() < end, "the guest was not sent what it should be");
            self.settle();
        }
    }

    fn flows(&self) -> Vec<usize> {
        self.engines.iter().map(|engine| engine.stats().tcp_flows).collect()
    }
}

fn queues(count: usize) -> (Vec<Box<dyn Tap>>, Vec<Guest>) {
    let pairs = (0..count).map(|_| tap(PLAIN, 1024).unwrap());
    pairs.map(|(tap, guest)| (Box::new(tap) as Box<dyn Tap>, guest)).unzip()
}

#[test]
fn a_connection_stays_with_its_engine_whatever_queue_it_comes_by() {
    let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = server.local_addr().unwrap().port();
    let mut net = Queues::new(3, config());
    net.guests[1].send(segment(4000, port, |h| (h.syn, h.sequence_number) = (true, 100), b""));
    let (queue, (answer, _)) = net.expect(as_tcp);
    assert!(answer.syn && answer.ack && queue == 1);
    let next = answer.sequence_number.wrapping_add(1);
    let mut seq = 101;
    for queue in [0, 1, 2, 0, 2] {
        let text = format!("by queue {queue};");
        net.guests[queue].send(segment(
            4000,
            port,
            |h| (h.ack, h.sequence_number, h.acknowledgment_number) = (true, seq, next),
            text.as_bytes(),
        ));
        net.settle();
        seq += text.len() as u32;
    }
    net.guests[0].send(segment(
        4000,
        port,
        |h| (h.ack, h.fin, h.sequence_number, h.acknowledgment_number) = (true, true, seq, next),
        b"",
    ));
    net.settle();
    assert_eq!(net.flows(), [0, 1, 0]);
    let (mut stream, _) = server.accept().unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert_eq!(text, "by queue 0;by queue 1;by queue 2;by queue 0;by queue 2;");
    let others: Vec<_> = [0, 2].into_iter().filter_map(|queue| net.guests[queue].receive()).collect();
    assert!(others.is_empty(), "answers went by another engine's queue");
    drop(stream);
    let (queue, _) = net.expect(|f| as_tcp(f).filter(|(h, _)| h.fin));
    assert_eq!(queue, 1);
    net.guests[2].send(segment(
        4000,
        port,
        |h| {
            (h.ack, h.sequence_number, h.acknowledgment_number) = (true, seq + 1, next.wrapping_add(1));
        },
        b"",
    ));
    net.settle();
    assert_eq!(net.flows(), [0, 0, 0]);
    // Nobody's any more: the next of the same name may be any engine's.
    net.guests[2].send(segment(4000, port, |h| (h.syn, h.sequence_number) = (true, 900_000), b""));
    let (queue, _) = net.expect(|f| as_tcp(f).filter(|(h, _)| h.syn));
    assert_eq!((queue, net.flows()), (2, vec![0, 0, 1]));
}

#[test]
fn datagrams_of_one_flow_leave_by_one_socket() {
    let server = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = server.local_addr().unwrap().port();
    let mut net = Queues::new(2, config());
    let mut peers = Vec::new();
    for queue in [0, 1, 1, 0] {
        net.guests[queue].send(udp_frame(guest_v4(5000), (GATEWAY_V4, port).into(), b"?"));
        net.settle();
        let mut buffer = [0; 8];
        let (_, peer) = server.recv_from(&mut buffer).unwrap();
        peers.push(peer);
    }
    assert!(peers.iter().all(|peer| *peer == peers[0]), "{peers:?}");
    server.send_to(b"!", peers[0]).unwrap();
    let (queue, datagram) = net.expect(as_udp);
    assert_eq!((queue, datagram.payload.as_slice()), (0, b"!".as_slice()));
}

#[test]
fn what_the_guest_refuses_ends_the_flow_of_another_queue() {
    let server = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = server.local_addr().unwrap().port();
    let mut net = Queues::new(2, config());
    let frame = udp_frame((GATEWAY_V4, port).into(), guest_v4(5000), b"an answer");
    net.guests[0].send(udp_frame(guest_v4(5000), (GATEWAY_V4, port).into(), b"?"));
    net.settle();
    assert_eq!(net.engines[0].stats().udp_flows, 1);
    // Destination unreachable, port unreachable (RFC 792), about the answer.
    let mut refusal = Vec::new();
    etherparse::PacketBuilder::ethernet2(crate::testing::GUEST_MAC, crate::testing::GATEWAY_MAC)
        .ipv4(crate::testing::GUEST_V4.octets(), GATEWAY_V4.octets(), 64)
        .icmpv4(etherparse::Icmpv4Type::DestinationUnreachable(
            etherparse::icmpv4::DestUnreachableHeader::Port,
        ))
        .write(&mut refusal, &frame[14..])
        .unwrap();
    net.guests[1].send(refusal);
    net.settle();
    assert_eq!(net.engines[0].stats().udp_flows, 0);
    assert!(
        net.guests
            .iter()
            .all(|guest| guest.receive().and_then(|(f, _)| as_icmp(&f)).is_none_or(|i| i.kind != 3))
    );
}

#[test]
fn the_guest_is_known_to_all_once_it_is_to_one() {
    let mut net = Queues::new(2, config());
    let forward = Forward::new(Transport::Udp, (Ipv4Addr::LOCALHOST, 0).into(), 7);
    let mut bound = forward;
    for engine in &mut net.engines {
        bound = engine.add_forward(bound).unwrap();
    }
    // From an address that is not the configured one.
    let source: SocketAddr = "10.0.2.77:1".parse().unwrap();
    net.guests[0].send(udp_frame(source, (GATEWAY_V4, 9).into(), b""));
    net.settle();
    let mut seen = [false; 2];
    // The kernel chooses which of the two sockets a peer's datagrams come to.
    for _ in 0..1000 {
        let client = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        client.send_to(b"hello", bound.listen).unwrap();
        let (queue, datagram) = net.expect(as_udp);
        assert_eq!(datagram.to, "10.0.2.77:7".parse().unwrap());
        seen[queue] = true;
        if seen == [true; 2] {
            return;
        }
    }
    panic!("all peers came by one engine: {seen:?}");
}

#[test]
fn a_full_mailbox_stops_the_queue_and_loses_nothing() {
    let server = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = server.local_addr().unwrap().port();
    server.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut net = Queues::new(2, config());
    net.guests[0].send(udp_frame(guest_v4(5000), (GATEWAY_V4, port).into(), b"first"));
    net.settle();
    let mut buffer = vec![0; 70_000];
    server.recv(&mut buffer).unwrap();
    // The owner does not run: twice what its mailbox holds, and more than fits the server's buffer.
    const COUNT: u32 = 80;
    for number in 0..COUNT {
        let mut payload = vec![0; 60_000];
        payload[..4].copy_from_slice(&number.to_be_bytes());
        net.guests[1].send(udp_frame(guest_v4(5000), (GATEWAY_V4, port).into(), &payload));
    }
    net.settle_one(1);
    let taken = net.engines[1].stats().frames_in;
    assert!((20..60).contains(&taken), "{taken} frames were taken for an engine that takes none");
    assert!(!net.settle_one(1), "it is busy with waiting");
    server.set_nonblocking(true).unwrap();
    let mut next = 0;
    while next < COUNT {
        net.engines[0].turn(&mut net.events, Some(Duration::ZERO)).unwrap();
        while let Ok(length) = server.recv(&mut buffer) {
            assert_eq!(length, 60_000);
            // The server's own buffer may have been too small for a whole mailbox: order is what counts.
            let number = u32::from_be_bytes(buffer[..4].try_into().unwrap());
            assert!(number >= next, "{number} after {next}");
            next = number + 1;
        }
        net.settle_one(1);
        if net.engines[1].stats().frames_in == u64::from(COUNT) && !net.settle_one(0) {
            break;
        }
    }
    assert_eq!(net.engines[1].stats().frames_in, u64::from(COUNT));
    assert_eq!(net.engines[0].stats().dropped.malformed, 0);
}

#[test]
fn connections_to_a_forwarded_port_are_spread() {
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let mut net =
        Queues::new(2, Config { forwards: vec![Forward::new(Transport::Tcp, listen, 80)], ..config() });
    let listen = net.engines[1].forwards()[0].listen;
    let mut clients = Vec::new();
    for _ in 0..1000 {
        clients.push(TcpStream::connect(listen).unwrap());
        net.settle();
        if net.flows().iter().all(|flows| *flows > 0) {
            assert_eq!(net.flows().iter().sum::<usize>(), clients.len());
            return;
        }
    }
    panic!("all connections came by one engine: {:?}", net.flows());
}

#[test]
fn threads_begin_and_end_together() {
    let (taps, guests) = queues(3);
    let network = Network::new(config(), taps).unwrap();
    let handle = network.handle();
    let running = std::thread::spawn(move || network.run());
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let bound = handle.add_forward(Forward::new(Transport::Tcp, listen, 80)).unwrap();
    assert_eq!(handle.forwards().unwrap(), std::slice::from_ref(&bound));
    let _client = TcpStream::connect(bound.listen).unwrap();
    assert!(handle.remove_forward(bound.clone()).unwrap());
    assert!(!handle.remove_forward(bound).unwrap());
    assert_eq!(handle.stats().unwrap().frames_in, 0);
    // The end of one queue is the end of the link.
    guests[1].close();
    running.join().unwrap().unwrap_err();
    assert_eq!(handle.stats().unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
}

#[test]
fn a_link_has_queues() {
    let none = Network::new(config(), Vec::new()).err().unwrap();
    assert_eq!(none.to_string(), "a link has 1 to 64 queues, not 0");
    assert!(Network::new(config(), queues(65).0).is_err());
}

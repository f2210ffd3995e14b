//! Connections: bytes, ends, resets.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::Duration;

use rustix::net::{SendFlags, sockopt};

use super::super::{Splicer, tcp};
use super::*;
use crate::poller::{Events, Poller, Token};

/// Bytes in an order that shows when some are missing, doubled or exchanged.
struct Bytes(u64);

impl Bytes {
    fn fill(&mut self, buffer: &mut [u8]) {
        for byte in buffer {
            // Knuth's constants: the upper bits do not repeat soon.
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *byte = (self.0 >> 56) as u8;
        }
    }
}

fn send(mut stream: &TcpStream, seed: u64, mut left: usize, block: usize) {
    let mut bytes = Bytes(seed);
    let mut buffer = vec![0; block];
    while left > 0 {
        let part = left.min(block);
        bytes.fill(&mut buffer[..part]);
        stream.write_all(&buffer[..part]).unwrap();
        left -= part;
    }
    stream.shutdown(Shutdown::Write).unwrap();
}

/// Reads to the end, in portions of `block` bytes; all must be as sent.
fn check(mut stream: &TcpStream, seed: u64, length: usize, block: usize) {
    let mut bytes = Bytes(seed);
    let (mut buffer, mut expected) = (vec![0; block], vec![0; block]);
    let mut seen = 0;
    loop {
        let n = stream.read(&mut buffer).unwrap();
        if n == 0 {
            break;
        }
        bytes.fill(&mut expected[..n]);
        assert!(buffer[..n] == expected[..n], "wrong bytes after {seen}");
        seen += n;
    }
    assert_eq!(seen, length);
}

/// Both ways at once; the server reads in small portions from a small buffer.
fn both_ways(running: &Running, length: usize) {
    let (client, server) = pair(running);
    sockopt::set_socket_recv_buffer_size(&server, 16 << 10).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| send(&client, 1, length, 100_000));
        scope.spawn(|| send(&server, 2, length, 1 << 20));
        scope.spawn(|| check(&server, 1, length, 3001));
        scope.spawn(|| check(&client, 2, length, 1 << 20));
    });
    running.until(|stats| stats.tcp_connections == 0);
    assert_eq!(running.stats().tcp_bytes, 2 * length as u64);
}

#[test]
fn bytes_both_ways() {
    both_ways(&Running::new(), 32 << 20);
}

#[test]
fn bytes_both_ways_without_pipes() {
    both_ways(
        &Running::with(Config::default(), Here, |splicer: &mut Splicer| splicer.set_most_pipes(0)),
        8 << 20,
    );
}

/// One direction has the pipe, the other copies; and they change.
#[test]
fn bytes_both_ways_with_one_pipe() {
    both_ways(
        &Running::with(Config::default(), Here, |splicer: &mut Splicer| splicer.set_most_pipes(1)),
        8 << 20,
    );
}

#[test]
fn nothing_is_lost_while_nobody_reads() {
    let running = Running::new();
    let (client, server) = pair(&running);
    client.set_nonblocking(true).unwrap();
    let block = vec![7; 1 << 16];
    let mut sent = 0;
    let mut before = u64::MAX;
    // Until neither the client's kernel nor the splicer takes any more.
    loop {
        match (&client).write(&block) {
            Ok(n) => sent += n,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                let moved = running.stats().tcp_bytes;
                if moved == before {
                    break;
                }
                before = moved;
            }
        }
    }
    client.shutdown(Shutdown::Write).unwrap();
    let mut all = Vec::new();
    (&server).read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), sent);
    assert!(all.iter().all(|byte| *byte == 7));
}

#[test]
fn a_source_that_was_not_listened_to_loses_nothing() {
    let listener = TcpListener::bind(any()).unwrap();
    let (poller, mut events, mut splicer) = (Poller::new().unwrap(), Events::new(), tcp::Tcp::new(1));
    let entrance = TcpListener::bind(any()).unwrap();
    let mut client = TcpStream::connect(entrance.local_addr().unwrap()).unwrap();
    let (accepted, _) = entrance.accept().unwrap();
    accepted.set_nonblocking(true).unwrap();
    splicer.open(&poller, &Here, accepted.into(), listener.local_addr().unwrap()).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    client.set_nonblocking(true).unwrap();
    server.set_nonblocking(true).unwrap();
    // One turn of the splicer's loop: whether bytes moved.
    let mut turn = move || {
        poller.wait(&mut events, Some(Duration::ZERO)).unwrap();
        for ready in events.iter() {
            let Token::Tcp(number) = ready.token else { panic!("{ready:?}") };
            splicer.ready(number, ready.flags);
        }
        let before = splicer.bytes();
        splicer.turn(&poller);
        splicer.bytes() > before
    };
    let block = [7; 4096];
    // The sink is full before the source is, which goes on telling of what arrives.
    let (mut sent, mut stopped) = (0, 0);
    while let Ok(n) = client.write(&block) {
        sent += n;
        stopped = if turn() { 0 } else { stopped + 1 };
    }
    assert!(stopped > 16, "the source took {stopped} blocks more when the sink was full");
    drop(client);
    let (mut got, mut buffer) = (0, vec![0; 1 << 20]);
    let end = Instant::now() + PATIENCE;
    loop {
        match server.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        turn();
        assert!(Instant::now() < end, "{got} of {sent} bytes");
    }
    assert_eq!(got, sent);
}

#[test]
fn each_way_ends_by_itself() {
    let running = Running::new();
    let (mut client, mut server) = pair(&running);
    client.write_all(b"question").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut text = String::new();
    server.read_to_string(&mut text).unwrap();
    assert_eq!(text, "question");
    assert_eq!(running.stats().tcp_connections, 1);
    server.write_all(b"answer").unwrap();
    let mut answer = [0; 6];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"answer");
    drop(server);
    assert_eq!(client.read(&mut answer).unwrap(), 0);
    running.until(|stats| stats.tcp_connections == 0);
}

/// Closes so that the other end sees a reset.
fn reset(stream: TcpStream) {
    sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
}

fn assert_reset(mut stream: TcpStream) {
    let error = stream.read(&mut [0; 16]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

#[test]
fn resets_cross_after_the_bytes_before_them() {
    let running = Running::new();
    for clients in [true, false] {
        let (client, server) = pair(&running);
        let (mut near, mut far) = if clients { (client, server) } else { (server, client) };
        near.write_all(b"last words").unwrap();
        let mut words = [0; 10];
        far.read_exact(&mut words).unwrap();
        assert_eq!(&words, b"last words");
        reset(near);
        assert_reset(far);
    }
    running.until(|stats| stats.tcp_connections == 0);
}

/// The kernel resets a connection that is closed with something unread in it.
#[test]
fn a_reset_is_noticed_when_writing() {
    let running = Running::new();
    let (client, mut server) = pair(&running);
    server.shutdown(Shutdown::Write).unwrap();
    assert_eq!((&client).read(&mut [0; 16]).unwrap(), 0);
    // The way back is over: only writing can tell that the server has gone.
    reset(std::mem::replace(
        &mut server,
        TcpStream::connect(running.forward(Transport::Tcp, any())).unwrap(),
    ));
    let end = Instant::now() + PATIENCE;
    while (&client).write_all(b"anybody?").is_ok() {
        assert!(Instant::now() < end, "the client was not told");
        std::thread::yield_now();
    }
    drop(server);
    running.until(|stats| stats.tcp_connections == 0);
}

#[test]
fn a_reset_reaches_who_is_writing() {
    let running = Running::new();
    let (client, server) = pair(&running);
    let writer = std::thread::spawn(move || {
        let block = vec![0; 1 << 16];
        loop {
            if let Err(error) = (&client).write_all(&block) {
                return error.kind();
            }
        }
    });
    (&server).read_exact(&mut vec![0; 1 << 20]).unwrap();
    reset(server);
    let kind = writer.join().unwrap();
    assert!(matches!(kind, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe), "{kind}");
    running.until(|stats| stats.tcp_connections == 0);
}

#[test]
fn nobody_at_the_target_is_a_reset() {
    let running = Running::new();
    let closed = TcpListener::bind(any()).unwrap().local_addr().unwrap();
    let port = running.forward(Transport::Tcp, closed);
    for _ in 0..10 {
        match TcpStream::connect(port) {
            Ok(client) => assert_reset(client),
            // It was faster than connect(2).
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
        }
    }
    running.until(|stats| stats.tcp_connections == 0);
}

#[test]
fn urgent_data_comes_in_line() {
    let running = Running::new();
    let (mut client, mut server) = pair(&running);
    client.write_all(b"calm ").unwrap();
    rustix::net::send(&client, b"!", SendFlags::OOB).unwrap();
    client.write_all(b" calm").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut text = String::new();
    server.read_to_string(&mut text).unwrap();
    assert_eq!(text, "calm ! calm");
    // At the very end, where splice(2) takes it for the end.
    let (client, mut server) = pair(&running);
    rustix::net::send(&client, b"!", SendFlags::OOB).unwrap();
    drop(client);
    let mut text = String::new();
    server.read_to_string(&mut text).unwrap();
    assert_eq!(text, "!");
}

#[test]
fn ten_thousand_connections() {
    let running = Running::new();
    let listener = TcpListener::bind(any()).unwrap();
    let port = running.forward(Transport::Tcp, listener.local_addr().unwrap());
    let server = std::thread::spawn(move || {
        for _ in 0..10_000 {
            let (mut stream, _) = listener.accept().unwrap();
            let mut number = [0; 4];
            stream.read_exact(&mut number).unwrap();
            stream.write_all(&number).unwrap();
            // The client closes first, so that its own ports wait and not the splicer's.
            assert_eq!(stream.read(&mut number).unwrap(), 0);
        }
    });
    for number in 0..10_000u32 {
        let mut client = TcpStream::connect(port).unwrap();
        client.write_all(&number.to_le_bytes()).unwrap();
        let mut answer = [0; 4];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(u32::from_le_bytes(answer), number);
        // No TIME-WAIT: there are not that many ports.
        reset_after_end(client);
    }
    server.join().unwrap();
    running.until(|stats| stats.tcp_connections == 0);
    assert_eq!(running.stats().tcp_bytes, 80_000);
}

/// Closes in an orderly way, and once the other end has closed too leaves nothing behind.
fn reset_after_end(mut client: TcpStream) {
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(client.read(&mut [0; 4]).unwrap(), 0);
    reset(client);
}

#[test]
fn ports_come_and_go() {
    let running = Running::new();
    let listener = TcpListener::bind(any()).unwrap();
    let target = listener.local_addr().unwrap();
    let forward = Forward::new(Side::Guest, Transport::Tcp, any(), target.port());
    let named = running.handle.add_forward(forward).unwrap();
    assert_eq!(running.handle.forwards().unwrap(), std::slice::from_ref(&named));
    let error = running.handle.add_forward(named.clone()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    assert!(error.to_string().contains(&named.listen.to_string()), "{error}");
    let (mut client, mut server) = (TcpStream::connect(named.listen).unwrap(), listener.accept().unwrap().0);
    assert!(running.handle.remove_forward(named.clone()).unwrap());
    assert!(!running.handle.remove_forward(named.clone()).unwrap());
    assert_eq!(TcpStream::connect(named.listen).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    // What came by it goes on.
    client.write_all(b"still").unwrap();
    server.read_exact(&mut [0; 5]).unwrap();
}

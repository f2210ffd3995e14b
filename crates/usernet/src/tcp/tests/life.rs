//! How connections begin and end.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use rustix::net::SendFlags;
use smoltcp::socket::tcp::State;

use super::sim::{Dice, Harm, Setup, Sim, Talk, accept, listener};
use crate::config::{Forward, Transport};
use crate::tests::has_ipv6;

/// A connection of the guest's that stands.
fn connected(sim: &mut Sim) -> (smoltcp::iface::SocketHandle, TcpStream) {
    let (listener, port) = listener(false);
    let handle = sim.connect(port, false, 10_000);
    let mut stream = None;
    sim.run(|sim| {
        stream = stream.take().or_else(|| accept(&listener));
        (stream.is_some() && sim.guest(handle).state() == State::Established, false)
    });
    sim.pass(Duration::from_millis(1));
    (handle, stream.unwrap())
}

fn forward(sim: &mut Sim, listen: &str, guest_port: u16) -> Forward {
    let mut forward = Forward::new(Transport::Tcp, listen.parse().unwrap(), guest_port);
    forward.listen = sim.listen(&forward);
    forward
}

fn ends_with_reset(sim: &mut Sim, stream: &mut TcpStream) {
    let mut buffer = [0; 100];
    sim.run(|_| match stream.read(&mut buffer) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => (false, false),
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::ConnectionReset);
            (true, true)
        }
        Ok(0) => panic!("an end instead of a reset"),
        Ok(_) => (false, true),
    });
}

#[test]
fn refused_and_unreachable_are_resets() {
    let mut sim = Sim::new(Setup::default());
    let (taken, port) = listener(false);
    drop(taken);
    for to in [SocketAddr::from(([10, 0, 2, 2], port)), SocketAddr::from(([127, 0, 0, 1], port))] {
        let handle = sim.connect_to(to, 1000);
        sim.run(|sim| (sim.guest(handle).state() == State::Closed, false));
        assert_eq!(sim.tcp.flows(), 0);
    }
    // The addresses that mean nobody and everybody.
    for to in [[0, 0, 0, 0], [255, 255, 255, 255]] {
        let packet = super::hostile::packet(to, 1, 80, 77, 0, super::hostile::SYN, &[], &[]);
        let view = super::sim::view(&packet).unwrap();
        sim.engine(|tcp, cx| tcp.segment(cx, &view));
        assert_eq!(sim.tcp.flows(), 0, "{to:?}");
    }
}

#[test]
fn guest_resets() {
    let mut sim = Sim::new(Setup::default());
    let (handle, mut stream) = connected(&mut sim);
    sim.guest(handle).abort();
    ends_with_reset(&mut sim, &mut stream);
    assert_eq!(sim.tcp.flows(), 0);
}

#[test]
fn world_resets_after_its_bytes() {
    let mut sim = Sim::new(Setup::default());
    let (handle, mut stream) = connected(&mut sim);
    stream.write_all(b"last words").unwrap();
    sim.pass(Duration::from_millis(50));
    rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
    drop(stream);
    sim.run(|sim| (sim.guest(handle).state() == State::Closed, false));
    let mut buffer = [0; 100];
    let n = sim.guest(handle).recv_slice(&mut buffer).unwrap_or(0);
    assert_eq!(&buffer[..n], b"last words");
    assert_eq!(sim.tcp.flows(), 0);
}

/// Reading stops at the mark of urgent data, and no event says that there is more behind it.
#[test]
fn urgent_data_comes_in_line() {
    for peek_offset in [true, false] {
        let mut sim = Sim::new(Setup::default());
        if !peek_offset {
            sim.tcp.forget_peek_offset();
        }
        let (handle, mut stream) = connected(&mut sim);
        let mut heard = Vec::new();
        for (before, after) in [("calm ", " calm"), ("", "at the start"), ("at the end", "")] {
            heard.clear();
            stream.write_all(before.as_bytes()).unwrap();
            rustix::net::send(&stream, b"!", SendFlags::OOB).unwrap();
            stream.write_all(after.as_bytes()).unwrap();
            let expected = format!("{before}!{after}").into_bytes();
            sim.run(|sim| {
                let mut buffer = [0; 100];
                let n = sim.guest(handle).recv_slice(&mut buffer).unwrap();
                heard.extend_from_slice(&buffer[..n]);
                (heard.len() >= expected.len(), n > 0)
            });
            assert_eq!(heard, expected, "{peek_offset}");
        }
    }
}

/// The world resets while our FIN is out already.
#[test]
fn world_closes_and_then_refuses() {
    let mut sim = Sim::new(Setup::default());
    let (handle, stream) = connected(&mut sim);
    drop(stream);
    sim.run(|sim| (sim.guest(handle).state() == State::CloseWait, false));
    sim.guest(handle).send_slice(b"nobody listens").unwrap();
    sim.run(|sim| (sim.guest(handle).state() == State::Closed, false));
    assert_eq!(sim.tcp.flows(), 0);
}

/// A guest that lingers after closing waits for it, and after a question and its answer nothing else is acknowledged at once.
#[test]
fn the_guests_fin_is_acknowledged_without_delay() {
    let mut sim = Sim::new(Setup::default());
    let (handle, mut stream) = connected(&mut sim);
    for _ in 0..3 {
        sim.guest(handle).send_slice(b"question").unwrap();
        let mut buffer = [0; 8];
        sim.run(|_| (stream.read(&mut buffer).is_ok(), false));
        stream.write_all(b"answer").unwrap();
        sim.run(|sim| (sim.guest(handle).recv_slice(&mut buffer).unwrap() == 6, false));
    }
    sim.pass(Duration::from_secs(1));
    sim.guest(handle).close();
    sim.pass(Duration::ZERO);
    assert_eq!(sim.guest(handle).state(), State::FinWait2, "no time has passed");
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    assert_eq!(sim.tcp.flows(), 1);
}

#[test]
fn half_closed_by_the_guest() {
    let mut sim = Sim::new(Setup::default());
    let (handle, mut stream) = connected(&mut sim);
    let (mut guest, mut world) = (Talk::new(b"question".to_vec()), Talk::new(Vec::new()));
    world.close = false;
    sim.run(|sim| {
        let active = guest.guest(sim.guest(handle)) | world.world(&mut stream);
        (world.ended, active)
    });
    assert_eq!(world.heard, b"question");
    sim.pass(Duration::from_secs(600));
    assert_eq!(sim.tcp.flows(), 1, "the other half stays open");
    world.say = Dice::new(8).bytes(100_000);
    world.close = true;
    sim.run(|sim| {
        let active = guest.guest(sim.guest(handle)) | world.world(&mut stream);
        (guest.finished() && world.finished(), active)
    });
    assert!(guest.heard == world.say);
    sim.pass(Duration::from_secs(5));
    assert_eq!(sim.tcp.flows(), 0);
}

#[test]
fn half_closed_by_the_world() {
    let mut sim = Sim::new(Setup::default());
    let (handle, mut stream) = connected(&mut sim);
    let (mut guest, mut world) = (Talk::new(Vec::new()), Talk::new(b"question".to_vec()));
    guest.close = false;
    sim.run(|sim| {
        let active = guest.guest(sim.guest(handle)) | world.world(&mut stream);
        (guest.ended, active)
    });
    assert_eq!(guest.heard, b"question");
    sim.pass(Duration::from_secs(600));
    guest.say = Dice::new(9).bytes(100_000);
    guest.close = true;
    sim.run(|sim| {
        let active = guest.guest(sim.guest(handle)) | world.world(&mut stream);
        (guest.finished() && world.finished(), active)
    });
    assert!(world.heard == guest.say);
    sim.pass(Duration::from_secs(5));
    assert_eq!(sim.tcp.flows(), 0);
}

#[test]
fn idle_flows_live_while_the_guest_answers_and_no_longer() {
    let mut sim = Sim::new(Setup::default());
    let (_, mut stream) = connected(&mut sim);
    sim.pass(Duration::from_secs(24 * 3600));
    assert_eq!(sim.tcp.flows(), 1);
    // The guest is gone, without a word.
    sim.sockets = smoltcp::iface::SocketSet::new(Vec::new());
    sim.pass(Duration::from_secs(24 * 3600));
    assert_eq!(sim.tcp.flows(), 0);
    ends_with_reset(&mut sim, &mut stream);
}

#[test]
fn forwards_reach_the_guest() {
    for (listen, peer) in [("127.0.0.1:0", "10.0.2.2"), ("[::1]:0", "fd00::2"), ("[::]:0", "10.0.2.2")] {
        if listen.starts_with('[') && !has_ipv6() {
            continue;
        }
        let harm = Harm { lost: 10, twice: 5, swapped: 5 };
        let mut sim = Sim::new(Setup { to_guest: harm, from_guest: harm, ..Setup::default() });
        let forward = forward(&mut sim, listen, 80);
        let handle = sim.socket(50_000);
        sim.guest(handle).listen(80).unwrap();
        let mut to = forward.listen;
        if to.ip().is_unspecified() {
            to.set_ip([127, 0, 0, 1].into());
        }
        let mut stream = TcpStream::connect(to).unwrap();
        stream.set_nonblocking(true).unwrap();
        let mut dice = Dice::new(5);
        let (mut guest, mut world) = (Talk::new(dice.bytes(200_000)), Talk::new(dice.bytes(300_000)));
        let mut from = None;
        sim.run(|sim| {
            let active = guest.guest(sim.guest(handle)) | world.world(&mut stream);
            from = from.or(sim.guest(handle).remote_endpoint());
            (guest.finished() && world.finished(), active)
        });
        assert!(guest.heard == world.say && world.heard == guest.say);
        assert_eq!(from.unwrap().addr.to_string(), peer);
        assert!(sim.tcp.unlisten(&forward));
        assert!(!sim.tcp.unlisten(&forward));
        assert!(TcpStream::connect(to).is_err());
    }
}

#[test]
fn forwards_to_closed_ports_are_resets() {
    let mut sim = Sim::new(Setup::default());
    let forward = forward(&mut sim, "127.0.0.1:0", 81);
    let mut stream = TcpStream::connect(forward.listen).unwrap();
    stream.set_nonblocking(true).unwrap();
    ends_with_reset(&mut sim, &mut stream);
    assert_eq!(sim.tcp.flows(), 0);
}

#[test]
fn forwards_to_a_silent_guest_give_up() {
    let lost = Harm { lost: 100, ..Harm::default() };
    let mut sim = Sim::new(Setup { to_guest: lost, ..Setup::default() });
    let forward = forward(&mut sim, "127.0.0.1:0", 81);
    let mut stream = TcpStream::connect(forward.listen).unwrap();
    stream.set_nonblocking(true).unwrap();
    ends_with_reset(&mut sim, &mut stream);
    assert_eq!(sim.tcp.flows(), 0);
}

#[test]
fn thousands_of_short_connections() {
    let mut sim = Sim::new(Setup::default());
    let (listener, port) = listener(false);
    for batch in 0..60u64 {
        let handles: Vec<_> = (0..50).map(|_| sim.connect(port, false, 2000)).collect();
        let mut guests: Vec<_> =
            (0..50).map(|i| Talk::new(Dice::new(batch * 50 + i + 1).bytes(300))).collect();
        let mut worlds: Vec<(TcpStream, Talk)> = Vec::new();
        sim.run(|sim| {
            let mut active = false;
            while let Some(stream) = accept(&listener) {
                let mut talk = Talk::new(Vec::new());
                talk.close = false;
                worlds.push((stream, talk));
            }
            for (guest, handle) in guests.iter_mut().zip(&handles) {
                active |= guest.guest(sim.guest(*handle));
            }
            for (stream, talk) in &mut worlds {
                active |= talk.world(stream);
                if talk.ended && !talk.close {
                    // An echo, when all has been heard.
                    (talk.say, talk.close) = (talk.heard.clone(), true);
                }
            }
            let finished = worlds.len() == 50
                && guests.iter().all(Talk::finished)
                && worlds.iter().all(|(_, talk)| talk.finished());
            (finished, active)
        });
        assert!(guests.iter().all(|guest| guest.heard == guest.say));
        for handle in handles {
            sim.sockets.remove(handle);
        }
    }
    sim.pass(Duration::from_secs(5));
    assert_eq!(sim.tcp.flows(), 0);
}

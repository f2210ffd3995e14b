//! The loop itself.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, UdpSocket};

use super::{guest_v4, udp_frame};
use crate::config::{Config, Forward, Transport};
use crate::engine::Engine;
use crate::testing::{GATEWAY_V4, Net, PLAIN, config, tap};

#[test]
fn a_link_that_is_cut_ends_the_engine() {
    let (tap, guest) = tap(PLAIN, 16).unwrap();
    let engine = Engine::new(config(), Box::new(tap)).unwrap();
    let thread = std::thread::spawn(move || engine.run());
    guest.close();
    assert_eq!(thread.join().unwrap().unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn a_handle_of_an_engine_that_was_never_run_does_not_wait() {
    let (tap, _guest) = tap(PLAIN, 16).unwrap();
    let engine = Engine::new(config(), Box::new(tap)).unwrap();
    let handle = engine.handle();
    drop(engine);
    assert_eq!(handle.forwards().unwrap_err().kind(), ErrorKind::BrokenPipe);
    handle.stop();
}

#[test]
fn a_port_that_is_taken_is_named() {
    let taken = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let listen = taken.local_addr().unwrap();
    let forwards = vec![Forward::new(Transport::Udp, listen, 1)];
    let (tap, _guest) = tap(PLAIN, 16).unwrap();
    let error = Engine::new(Config { forwards, ..config() }, Box::new(tap)).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::AddrInUse);
    assert!(error.to_string().contains(&listen.to_string()), "{error}");
}

#[test]
fn a_flood_of_frames_does_not_keep_the_engine_from_its_other_work() {
    let listen = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
    let forwards = vec![Forward::new(Transport::Udp, listen, 1)];
    let mut net = Net::new(Config { forwards, ..config() });
    for _ in 0..10_000 {
        net.guest.send(vec![0; 60]);
    }
    let client = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    client.send_to(b"hello", listen).unwrap();
    net.expect(super::as_udp);
    assert!(net.stats().frames_in < 1000, "the frames that were before it did not all come first");
}

#[test]
fn frames_to_others_are_not_taken() {
    let server = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = server.local_addr().unwrap().port();
    let mut net = Net::new(config());
    let mut frame = udp_frame(guest_v4(1), (GATEWAY_V4, port).into(), b"");
    frame[5] ^= 1;
    net.guest.send(frame);
    net.settle();
    assert_eq!((net.stats().dropped.other_mac, net.stats().udp_flows), (1, 0));
}

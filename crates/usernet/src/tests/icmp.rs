//! Echo, and protocols that are not carried.

use std::net::{IpAddr, Ipv4Addr};

use etherparse::{IpNumber, PacketBuilder};

use super::as_icmp;
use super::process::skip;
use crate::config::Services;
use crate::frame::quoted_icmp;
use crate::packet::Addresses;
use crate::testing::{GATEWAY_MAC, GATEWAY_V4, GATEWAY_V6, GUEST_MAC, GUEST_V4, GUEST_V6, Net, config};

pub(super) fn ping(target: IpAddr, word: [u8; 4], payload: &[u8]) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(GUEST_MAC, GATEWAY_MAC);
    let mut frame = Vec::new();
    match target {
        IpAddr::V4(target) => {
            let builder = builder.ipv4(GUEST_V4.octets(), target.octets(), 64);
            builder.icmpv4_raw(8, 0, word).write(&mut frame, payload).unwrap();
        }
        IpAddr::V6(target) => {
            let builder = builder.ipv6(GUEST_V6.octets(), target.octets(), 64);
            builder.icmpv6_raw(128, 0, word).write(&mut frame, payload).unwrap();
        }
    }
    frame
}

#[test]
fn the_gateway_answers_whatever_the_host_allows() {
    let mut net = Net::new(config());
    for (target, reply) in [(IpAddr::from(GATEWAY_V4), 0), (GATEWAY_V6.into(), 129)] {
        net.guest.send(ping(target, [1, 2, 3, 4], b"payload"));
        let answer = net.expect(|f| as_icmp(f).filter(|m| m.kind == reply));
        assert_eq!((answer.from, answer.code), (target, 0));
        assert_eq!(answer.body, b"\x01\x02\x03\x04payload");
    }
    assert_eq!(net.stats().ping_flows, 0);
}

/// Whether this host allows ping sockets.
pub(super) fn may_ping() -> bool {
    crate::socket::ping(Ipv4Addr::LOCALHOST.into(), 1, &Default::default()).is_ok()
}

#[test]
fn others_are_pinged_by_the_host() {
    if !may_ping() {
        skip("the sysctl net.ipv4.ping_group_range allows no ping sockets here");
        return;
    }
    let mut config = config();
    // Not the host's loopback by name: 127.0.0.1 is pinged through a resolver's address.
    let alias = Ipv4Addr::new(192, 0, 2, 77);
    config.ipv4.as_mut().unwrap().host_loopback = None;
    let mut net = Net::new(config);
    net.engine.contain(0);
    for round in 0..3u8 {
        net.guest.send(ping(alias.into(), [0xab, 0xcd, 0, round], b"payload"));
        let answer = net.expect(|f| as_icmp(f).filter(|m| m.kind == 0));
        assert_eq!(answer.from, IpAddr::from(alias));
        assert_eq!(answer.body, [&[0xab, 0xcd, 0, round], b"payload".as_slice()].concat());
    }
    assert_eq!(net.stats().ping_flows, 1);
}

#[test]
fn a_host_that_forbids_it_costs_the_guest_its_answer_alone() {
    if may_ping() {
        skip("the sysctl net.ipv4.ping_group_range allows ping sockets here");
        return;
    }
    let mut net = Net::new(config());
    net.engine.contain(0);
    for _ in 0..3 {
        net.guest.send(ping(Ipv4Addr::new(198, 51, 100, 1).into(), [0; 4], b""));
    }
    net.settle();
    assert_eq!((net.stats().ping_flows, net.stats().dropped.host), (0, 3));
}

#[test]
fn ping_can_be_off() {
    let mut config = config();
    config.services = Services { icmp: false, ..Services::default() };
    let mut net = Net::new(config);
    // The gateway, which would answer by itself, does not.
    for target in [Ipv4Addr::new(198, 51, 100, 1), GATEWAY_V4] {
        net.guest.send(ping(target.into(), [0; 4], b""));
    }
    net.settle();
    assert_eq!((net.stats().ping_flows, net.stats().dropped.disabled), (0, 2));
    assert!(net.frames().iter().all(|frame| as_icmp(frame).is_none_or(|message| message.kind != 0)));
}

#[test]
fn errors_quote_the_guests_identifier() {
    let addresses = Addresses::V4 { source: GUEST_V4, destination: GATEWAY_V4 };
    let quoted = quoted_icmp(addresses, 0xabcd, &[8, 0, 9, 9, 1, 2, 3, 4, 5]);
    assert_eq!(quoted[20..], [8, 0, 9, 9, 0xab, 0xcd, 3, 4, 5]);
    assert_eq!(quoted_icmp(addresses, 0xabcd, &[8, 0])[20..], [8, 0], "too short to have one");
}

#[test]
fn other_protocols_are_unreachable() {
    const SCTP: IpNumber = IpNumber(132);
    let mut net = Net::new(config());
    let frame = |destination: Ipv4Addr| {
        let mut frame = Vec::new();
        PacketBuilder::ethernet2(GUEST_MAC, GATEWAY_MAC)
            .ipv4(GUEST_V4.octets(), destination.octets(), 64)
            .write(&mut frame, SCTP, b"12345678")
            .unwrap();
        frame
    };
    net.guest.send(frame(Ipv4Addr::new(198, 51, 100, 1)));
    let error = net.expect(as_icmp);
    assert_eq!((error.kind, error.code), (3, 2));
    assert_eq!(error.body[4..], frame(Ipv4Addr::new(198, 51, 100, 1))[14..]);
    net.guest.send(frame(Ipv4Addr::new(224, 0, 0, 22)));
    net.settle();
    assert_eq!(net.frames().iter().filter_map(|f| as_icmp(f)).filter(|m| m.kind == 3).count(), 0);
}

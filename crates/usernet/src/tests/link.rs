//! ARP and neighbour discovery.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use etherparse::{ArpEthIpv4Packet, ArpOperation, ArpPacketSlice, EtherType, PacketBuilder};

use super::{as_icmp, guest_v6, udp_frame};
use crate::config::Services;
use crate::frame::Header;
use crate::testing::{GATEWAY_MAC, GATEWAY_V4, GATEWAY_V6, GUEST_MAC, GUEST_V4, GUEST_V6, Net, config};

const ALL_NODES: &str = "ff02::1";

fn ask(sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let packet = ArpEthIpv4Packet {
        operation: ArpOperation::REQUEST,
        sender_mac: GUEST_MAC,
        sender_ipv4: sender.octets(),
        target_mac: [0; 6],
        target_ipv4: target.octets(),
    };
    let header = Header::ethernet([0xff; 6], GUEST_MAC, EtherType::ARP);
    [header.as_slice(), &packet.to_bytes()].concat()
}

fn as_arp(frame: &[u8]) -> Option<ArpEthIpv4Packet> {
    (frame[12..14] == [8, 6])
        .then(|| ArpPacketSlice::from_slice(&frame[14..]).unwrap().to_packet().try_eth_ipv4().unwrap())
}

#[test]
fn arp_answers_for_everybody_but_the_guest() {
    let mut net = Net::new(config());
    for target in [GATEWAY_V4, Ipv4Addr::new(192, 0, 2, 99), Ipv4Addr::new(198, 51, 100, 1)] {
        net.guest.send(ask(GUEST_V4, target));
        let answer = net.expect(as_arp);
        assert_eq!(answer.operation, ArpOperation::REPLY);
        assert_eq!((answer.sender_mac, answer.sender_ipv4_addr()), (GATEWAY_MAC, target));
        assert_eq!((answer.target_mac, answer.target_ipv4_addr()), (GUEST_MAC, GUEST_V4));
    }
    let other = Ipv4Addr::new(192, 0, 2, 77);
    for (sender, target) in [
        (GUEST_V4, GUEST_V4),
        (other, GUEST_V4),
        (other, other),
        // Probes.
        (Ipv4Addr::UNSPECIFIED, GUEST_V4),
        (Ipv4Addr::UNSPECIFIED, other),
    ] {
        net.guest.send(ask(sender, target));
        net.settle();
        assert!(!net.frames().iter().any(|f| as_arp(f).is_some()), "{sender} asked for {target}");
    }
    net.guest.send(ask(Ipv4Addr::UNSPECIFIED, GATEWAY_V4));
    assert_eq!(net.expect(as_arp).sender_ipv4_addr(), GATEWAY_V4, "the gateway defends its address");
}

fn solicitation(source: Ipv6Addr, kind: u8, body: &[u8], hop_limit: u8) -> Vec<u8> {
    let mut frame = Vec::new();
    let all_routers: Ipv6Addr = "ff02::2".parse().unwrap();
    PacketBuilder::ethernet2(GUEST_MAC, [0x33, 0x33, 0, 0, 0, 2])
        .ipv6(source.octets(), all_routers.octets(), hop_limit)
        .icmpv6_raw(kind, 0, [0; 4])
        .write(&mut frame, body)
        .unwrap();
    frame
}

#[test]
fn neighbours_are_everybody_but_the_guest() {
    let mut net = Net::new(config());
    let other: Ipv6Addr = "2001:db8::99".parse().unwrap();
    let link_local: Ipv6Addr = "fe80::77".parse().unwrap();
    let advertisement = |frame: &[u8]| as_icmp(frame).filter(|m| m.kind == 136);
    for target in [GATEWAY_V6, other] {
        net.guest.send(solicitation(GUEST_V6, 135, &target.octets(), 255));
        let answer = net.expect(advertisement);
        assert_eq!((answer.from, answer.to), (IpAddr::from(target), IpAddr::from(GUEST_V6)));
        assert_eq!(answer.hop_limit, 255);
        let expected = [&[0xe0, 0, 0, 0][..], &target.octets(), &[2, 1], &GATEWAY_MAC].concat();
        assert_eq!(answer.body, expected);
    }
    let unanswered = [
        (GUEST_V6, GUEST_V6, 255),
        (link_local, GUEST_V6, 255),
        // Duplicate address detection.
        (Ipv6Addr::UNSPECIFIED, GUEST_V6, 255),
        (Ipv6Addr::UNSPECIFIED, link_local, 255),
        // A router has forwarded it.
        (GUEST_V6, other, 254),
    ];
    for (source, target, hops) in unanswered {
        net.guest.send(solicitation(source, 135, &target.octets(), hops));
        net.settle();
        assert!(!net.frames().iter().any(|f| advertisement(f).is_some()), "{source} asked for {target}");
    }
    net.guest.send(solicitation(Ipv6Addr::UNSPECIFIED, 135, &GATEWAY_V6.octets(), 255));
    let defended = net.expect(advertisement);
    assert_eq!(defended.to, ALL_NODES.parse::<IpAddr>().unwrap());
    assert_eq!(defended.body[0], 0xa0, "router, override, not solicited");
}

/// The options of an advertisement, by kind.
pub(super) fn options(mut bytes: &[u8]) -> Vec<(u8, &[u8])> {
    let mut options = Vec::new();
    while let [kind, units, ..] = bytes {
        let (option, rest) = bytes.split_at(usize::from(*units) * 8);
        options.push((*kind, &option[2..]));
        bytes = rest;
    }
    options
}

#[test]
fn a_router_advertises_all_that_there_is() {
    let mut net = Net::new(config());
    let advertisement = |frame: &[u8]| as_icmp(frame).filter(|m| m.kind == 134);
    let asker: Ipv6Addr = "fe80::77".parse().unwrap();
    net.guest.send(solicitation(asker, 133, &[], 255));
    let answer = net.expect(|f| advertisement(f).filter(|m| m.to == IpAddr::from(asker)));
    assert_eq!((answer.from, answer.hop_limit), (GATEWAY_V6.into(), 255));
    assert_eq!(answer.body[..4], [64, 0xc0, 255, 255]);
    let options = options(&answer.body[12..]);
    let option = |kind| options.iter().find(|o| o.0 == kind).unwrap_or_else(|| panic!("option {kind}")).1;
    assert_eq!(option(1), GATEWAY_MAC);
    assert_eq!(option(5), [0, 0, 0, 0, 5, 220]);
    let prefix: Ipv6Addr = "2001:db8::".parse().unwrap();
    assert_eq!(option(3)[..2], [64, 0xc0]);
    assert_eq!(option(3)[14..], prefix.octets());
    let resolver: Ipv6Addr = "2001:db8::35".parse().unwrap();
    assert_eq!(option(25)[6..], resolver.octets());
    assert_eq!(option(31)[6..], *b"\x07example\x03org\0\x07example\x03net\0\0\0\0\0\0\0");
}

#[test]
fn advertisements_come_unasked_and_again() {
    let mut net = Net::new(config());
    let advertised =
        |net: &Net| net.frames().iter().filter_map(|f| as_icmp(f)).filter(|m| m.kind == 134).count();
    net.settle();
    assert_eq!(advertised(&net), 0, "nobody is there to be told");
    net.guest.send(udp_frame(guest_v6(1), "[ff02::99]:9".parse().unwrap(), b""));
    net.settle();
    assert_eq!(advertised(&net), 1);
    net.advance(Duration::from_secs(299));
    assert_eq!(advertised(&net), 0);
    net.advance(Duration::from_secs(2));
    assert_eq!(advertised(&net), 1);

    let mut quiet = config();
    quiet.services = Services { ra: false, ..Services::default() };
    let mut net = Net::new(quiet);
    net.guest.send(solicitation("fe80::77".parse().unwrap(), 133, &[], 255));
    net.advance(Duration::from_secs(1000));
    assert_eq!(advertised(&net), 0);
}

#[test]
fn names_that_are_none_are_not_advertised() {
    use crate::ndp::encoded_name;
    assert_eq!(encoded_name("a.b.").unwrap(), b"\x01a\x01b\0");
    for bad in ["", ".", "a..b", &"x".repeat(64), &["abcdefg"; 40].join(".")] {
        assert_eq!(encoded_name(bad), None, "{bad:?}");
    }
}

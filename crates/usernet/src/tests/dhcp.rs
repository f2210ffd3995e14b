//! DHCP and DHCPv6, as a client sees them.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use dhcproto::v4::{self, DhcpOption, OptionCode};
use dhcproto::{Decodable, Encodable, Name, v6};

use super::{as_udp, udp_frame};
use crate::config::Services;
use crate::testing::{GATEWAY_MAC, GATEWAY_V4, GATEWAY_V6, GUEST_MAC, GUEST_V4, GUEST_V6, Net, config};

const XID: u32 = 0x1234_5678;

fn request(kind: v4::MessageType, options: impl IntoIterator<Item = DhcpOption>) -> v4::Message {
    let any = Ipv4Addr::UNSPECIFIED;
    let mut message = v4::Message::new_with_id(XID, any, any, any, any, &GUEST_MAC);
    message.opts_mut().insert(DhcpOption::MessageType(kind));
    for option in options {
        message.opts_mut().insert(option);
    }
    message
}

fn send(net: &mut Net, message: &v4::Message) {
    let from = SocketAddr::from((message.ciaddr(), 68));
    net.guest.send(udp_frame(from, "255.255.255.255:67".parse().unwrap(), &message.to_vec().unwrap()));
}

/// What the server says, and where to.
fn reply(net: &mut Net) -> (v4::Message, SocketAddr) {
    let datagram = net.expect(|f| as_udp(f).filter(|d| d.to.port() == 68));
    assert_eq!(datagram.from, (GATEWAY_V4, 67).into());
    assert!(datagram.payload.len() >= 300);
    (v4::Message::from_bytes(&datagram.payload).unwrap(), datagram.to)
}

fn names(domains: &[&str]) -> Vec<Name> {
    domains.iter().map(|d| Name::from_ascii(d).unwrap()).collect()
}

fn no_answer(net: &mut Net) {
    net.settle();
    assert!(net.frames().iter().all(|f| as_udp(f).is_none()));
}

#[test]
fn a_lease_is_discovered_and_requested() {
    let mut net = Net::new(config());
    send(&mut net, &request(v4::MessageType::Discover, []));
    let (offer, to) = reply(&mut net);
    assert_eq!(to, (GUEST_V4, 68).into());
    assert!(offer.opts().has_msg_type(v4::MessageType::Offer));
    assert_eq!((offer.xid(), offer.yiaddr(), offer.chaddr()), (XID, GUEST_V4, &GUEST_MAC[..]));

    let options = [DhcpOption::RequestedIpAddress(offer.yiaddr()), DhcpOption::ServerIdentifier(GATEWAY_V4)];
    send(&mut net, &request(v4::MessageType::Request, options));
    let (ack, _) = reply(&mut net);
    let option = |code| ack.opts().get(code).unwrap_or_else(|| panic!("{code:?}")).clone();
    assert!(ack.opts().has_msg_type(v4::MessageType::Ack));
    assert_eq!(ack.yiaddr(), GUEST_V4);
    let expected = [
        (OptionCode::SubnetMask, DhcpOption::SubnetMask(Ipv4Addr::new(255, 255, 255, 0))),
        (OptionCode::Router, DhcpOption::Router(vec![GATEWAY_V4])),
        (OptionCode::DomainNameServer, DhcpOption::DomainNameServer(vec![Ipv4Addr::new(192, 0, 2, 53)])),
        (OptionCode::Hostname, DhcpOption::Hostname("guest".to_owned())),
        (OptionCode::InterfaceMtu, DhcpOption::InterfaceMtu(1500)),
        (OptionCode::AddressLeaseTime, DhcpOption::AddressLeaseTime(3600)),
        (OptionCode::ServerIdentifier, DhcpOption::ServerIdentifier(GATEWAY_V4)),
    ];
    for (code, value) in expected {
        assert_eq!(option(code), value);
    }
    let DhcpOption::DomainSearch(search) = option(OptionCode::DomainSearch) else { panic!() };
    let text = |names: &[Name]| {
        names.iter().map(|n| n.to_string().trim_end_matches('.').to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(text(&search), text(&names(&["example.org", "example.net"])));
    let DhcpOption::ClientFQDN(fqdn) = option(OptionCode::ClientFQDN) else { panic!() };
    assert_eq!(fqdn.domain().to_string().trim_end_matches('.'), "guest.example.org");
    assert!(!ack.opts().contains(OptionCode::ClasslessStaticRoute), "the gateway is on the guest's network");
}

#[test]
fn rapid_commit_needs_no_request() {
    let mut net = Net::new(config());
    send(&mut net, &request(v4::MessageType::Discover, [DhcpOption::RapidCommit]));
    let (ack, _) = reply(&mut net);
    assert!(ack.opts().has_msg_type(v4::MessageType::Ack));
    assert!(ack.opts().contains(OptionCode::RapidCommit));
}

#[test]
fn the_broadcast_flag_is_honoured() {
    let mut net = Net::new(config());
    let mut message = request(v4::MessageType::Discover, []);
    message.set_flags(v4::Flags::default().set_broadcast());
    send(&mut net, &message);
    assert_eq!(reply(&mut net).1, (Ipv4Addr::BROADCAST, 68).into());
}

#[test]
fn another_address_is_refused_and_another_server_left_alone() {
    let mut net = Net::new(config());
    let other = Ipv4Addr::new(10, 0, 2, 15);
    send(&mut net, &request(v4::MessageType::Request, [DhcpOption::RequestedIpAddress(other)]));
    let (nak, to) = reply(&mut net);
    assert!(nak.opts().has_msg_type(v4::MessageType::Nak));
    assert_eq!((nak.yiaddr(), to), (Ipv4Addr::UNSPECIFIED, (Ipv4Addr::BROADCAST, 68).into()));

    let elsewhere = [DhcpOption::RequestedIpAddress(GUEST_V4), DhcpOption::ServerIdentifier(other)];
    send(&mut net, &request(v4::MessageType::Request, elsewhere));
    send(&mut net, &request(v4::MessageType::Release, []));
    send(&mut net, &request(v4::MessageType::Decline, []));
    no_answer(&mut net);
}

#[test]
fn a_client_with_an_address_is_informed() {
    let mut net = Net::new(config());
    let mut message = request(v4::MessageType::Inform, []);
    message.set_ciaddr(GUEST_V4);
    send(&mut net, &message);
    let (ack, to) = reply(&mut net);
    assert_eq!((ack.yiaddr(), to), (Ipv4Addr::UNSPECIFIED, (GUEST_V4, 68).into()));
    assert!(!ack.opts().contains(OptionCode::AddressLeaseTime));
    assert!(ack.opts().contains(OptionCode::Router));
}

#[test]
fn a_gateway_elsewhere_gets_a_route() {
    let mut config = config();
    config.ipv4.as_mut().unwrap().prefix = 32;
    let mut net = Net::new(config);
    send(&mut net, &request(v4::MessageType::Discover, []));
    let (offer, _) = reply(&mut net);
    let routes = vec![
        ("192.0.2.2/32".parse().unwrap(), Ipv4Addr::UNSPECIFIED),
        ("0.0.0.0/0".parse().unwrap(), GATEWAY_V4),
    ];
    let Some(DhcpOption::ClasslessStaticRoute(told)) = offer.opts().get(OptionCode::ClasslessStaticRoute)
    else {
        panic!("no routes");
    };
    assert_eq!(*told, routes);
}

#[test]
fn messages_that_are_none_get_no_answer() {
    let mut net = Net::new(config());
    let good = request(v4::MessageType::Discover, []).to_vec().unwrap();
    let with = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        bytes
    };
    // A reply, and hardware addresses of other lengths, among them some longer than their field.
    for bytes in [with(0, 2), with(2, 0), with(2, 16), with(2, 17), with(2, 255)] {
        net.guest.send(udp_frame(
            "0.0.0.0:68".parse().unwrap(),
            "255.255.255.255:67".parse().unwrap(),
            &bytes,
        ));
    }
    for length in 0..good.len() - 1 {
        let cut = &good[..length];
        net.guest.send(udp_frame("0.0.0.0:68".parse().unwrap(), "255.255.255.255:67".parse().unwrap(), cut));
        net.settle();
        let answers = net.frames().into_iter().filter_map(|f| as_udp(&f)).count();
        assert!(length >= 243 || answers == 0, "an answer to {length} bytes");
    }
}

#[test]
fn dhcp_can_be_off() {
    let mut config = config();
    config.services = Services { dhcp: false, dhcpv6: false, ..Services::default() };
    let mut net = Net::new(config);
    send(&mut net, &request(v4::MessageType::Discover, []));
    ask6(&mut net, v6::MessageType::InformationRequest, [client_id()]);
    no_answer(&mut net);
}

fn client_id() -> v6::DhcpOption {
    v6::DhcpOption::ClientId(vec![0, 3, 0, 1, 1, 2, 3, 4, 5, 6])
}

fn server_id() -> v6::DhcpOption {
    v6::DhcpOption::ServerId([&[0, 3, 0, 1][..], &GATEWAY_MAC].concat())
}

fn ask6(net: &mut Net, kind: v6::MessageType, options: impl IntoIterator<Item = v6::DhcpOption>) {
    let mut message = v6::Message::new_with_id(kind, [1, 2, 3]);
    for option in options {
        message.opts_mut().insert(option);
    }
    let to = "[ff02::1:2]:547".parse().unwrap();
    net.guest.send(udp_frame("[fe80::77]:546".parse().unwrap(), to, &message.to_vec().unwrap()));
}

fn reply6(net: &mut Net) -> v6::Message {
    let datagram = net.expect(as_udp);
    assert_eq!(datagram.from, (GATEWAY_V6, 547).into());
    assert_eq!(datagram.to, "[fe80::77]:546".parse().unwrap());
    let message = v6::Message::from_bytes(&datagram.payload).unwrap();
    assert_eq!(message.xid(), [1, 2, 3]);
    assert_eq!(message.opts().get(v6::OptionCode::ServerId), Some(&server_id()));
    assert_eq!(message.opts().get(v6::OptionCode::ClientId), Some(&client_id()));
    message
}

fn association(addresses: &[Ipv6Addr]) -> v6::DhcpOption {
    let lease = |addr| {
        v6::DhcpOption::IAAddr(v6::IAAddr {
            addr,
            preferred_life: 1,
            valid_life: 1,
            opts: v6::DhcpOptions::new(),
        })
    };
    let opts = addresses.iter().map(|a| lease(*a)).collect();
    v6::DhcpOption::IANA(v6::IANA { id: 7, t1: 0, t2: 0, opts })
}

/// The addresses of the association in a reply, each with its lifetime, and its status.
fn assigned(message: &v6::Message) -> (Vec<(Ipv6Addr, u32)>, Option<v6::Status>) {
    let Some(v6::DhcpOption::IANA(ia)) = message.opts().get(v6::OptionCode::IANA) else {
        panic!("no association")
    };
    assert_eq!(ia.id, 7);
    let mut addresses: Vec<_> = ia
        .opts
        .iter()
        .filter_map(|o| if let v6::DhcpOption::IAAddr(a) = o { Some((a.addr, a.valid_life)) } else { None })
        .collect();
    addresses.sort();
    (addresses, status_of(&ia.opts))
}

fn status_of(options: &v6::DhcpOptions) -> Option<v6::Status> {
    match options.get(v6::OptionCode::StatusCode) {
        Some(v6::DhcpOption::StatusCode(code)) => Some(code.status),
        _ => None,
    }
}

#[test]
fn an_address_is_solicited_and_requested() {
    let mut net = Net::new(config());
    ask6(&mut net, v6::MessageType::Solicit, [client_id(), association(&[])]);
    let advertised = reply6(&mut net);
    assert_eq!(advertised.msg_type(), v6::MessageType::Advertise);
    assert_eq!(assigned(&advertised), (vec![(GUEST_V6, 7200)], None));

    ask6(&mut net, v6::MessageType::Request, [client_id(), server_id(), association(&[GUEST_V6])]);
    let reply = reply6(&mut net);
    assert_eq!(reply.msg_type(), v6::MessageType::Reply);
    assert_eq!(assigned(&reply), (vec![(GUEST_V6, 7200)], None));
    let resolver = "2001:db8::35".parse().unwrap();
    assert_eq!(
        reply.opts().get(v6::OptionCode::DomainNameServers),
        Some(&v6::DhcpOption::DomainNameServers(vec![resolver]))
    );
    assert!(reply.opts().get(v6::OptionCode::DomainSearchList).is_some());
    let Some(v6::DhcpOption::Unknown(fqdn)) = reply.opts().get(v6::OptionCode::from(39)) else { panic!() };
    assert_eq!(fqdn.data(), b"\0\x05guest\x07example\x03org\0");

    ask6(&mut net, v6::MessageType::Solicit, [client_id(), association(&[]), v6::DhcpOption::RapidCommit]);
    let rapid = reply6(&mut net);
    assert_eq!(rapid.msg_type(), v6::MessageType::Reply);
    assert_eq!(rapid.opts().get(v6::OptionCode::RapidCommit), Some(&v6::DhcpOption::RapidCommit));
}

#[test]
fn other_addresses_are_not_on_the_link() {
    let other: Ipv6Addr = "2001:db8:1::1".parse().unwrap();
    let mut net = Net::new(config());
    ask6(&mut net, v6::MessageType::Request, [client_id(), server_id(), association(&[other])]);
    assert_eq!(assigned(&reply6(&mut net)), (vec![], Some(v6::Status::NotOnLink)));
    ask6(&mut net, v6::MessageType::Rebind, [client_id(), association(&[other])]);
    assert_eq!(assigned(&reply6(&mut net)), (vec![(GUEST_V6, 7200), (other, 0)], None));
    for (address, status) in [(other, v6::Status::NotOnLink), (GUEST_V6, v6::Status::Success)] {
        ask6(&mut net, v6::MessageType::Confirm, [client_id(), association(&[address])]);
        assert_eq!(status_of(reply6(&mut net).opts()), Some(status));
    }
}

#[test]
fn messages_for_others_get_no_answer() {
    let mut net = Net::new(config());
    let other = v6::DhcpOption::ServerId(vec![0, 3, 0, 1, 9, 9, 9, 9, 9, 9]);
    ask6(&mut net, v6::MessageType::Request, [client_id(), other, association(&[])]);
    ask6(&mut net, v6::MessageType::Request, [client_id(), association(&[])]);
    ask6(&mut net, v6::MessageType::Solicit, [association(&[])]);
    ask6(&mut net, v6::MessageType::Solicit, [client_id(), server_id(), association(&[])]);
    ask6(&mut net, v6::MessageType::Confirm, [client_id(), association(&[])]);
    ask6(&mut net, v6::MessageType::Reply, [client_id(), server_id()]);
    no_answer(&mut net);
}

#[test]
fn options_within_options_within_options_do_no_harm() {
    // Associations that hold associations, as deep as a datagram of 64 KiB and one of 1500 bytes go.
    for levels in [90usize, 4000] {
        let mut bytes = vec![1, 1, 2, 3];
        for level in (0..levels).rev() {
            bytes.extend(3u16.to_be_bytes());
            bytes.extend(((level * 16 + 12) as u16).to_be_bytes());
            bytes.extend([0; 12]);
        }
        let mut net = Net::new(config());
        let to = "[ff02::1:2]:547".parse().unwrap();
        net.guest.send(udp_frame("[fe80::77]:546".parse().unwrap(), to, &bytes));
        no_answer(&mut net);
    }
}

mod any_options {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// All options that there are, in all lengths: the parser believes in some of them too firmly.
        #[test]
        fn do_no_harm(options in vec((any::<u8>(), vec(any::<u8>(), 0..20)), 0..12)) {
            let mut bytes = request(v4::MessageType::Discover, []).to_vec().unwrap();
            bytes.truncate(240);
            for (code, value) in &options {
                bytes.extend([*code, value.len() as u8]);
                bytes.extend(value);
            }
            let mut net = Net::new(config());
            net.guest.send(udp_frame("0.0.0.0:68".parse().unwrap(), "255.255.255.255:67".parse().unwrap(), &bytes));
            for kind in [1, 3, 5, 11] {
                let mut bytes = vec![kind, 1, 2, 3];
                for (code, value) in &options {
                    bytes.extend([0, *code % 64, 0, value.len() as u8]);
                    bytes.extend(value);
                }
                let to = "[ff02::1:2]:547".parse().unwrap();
                net.guest.send(udp_frame("[fe80::77]:546".parse().unwrap(), to, &bytes));
            }
            net.settle();
        }
    }
}

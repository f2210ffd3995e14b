//! A network that changes while the guest runs.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, UdpSocket};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use super::process::{in_namespace, ip};
use super::tcp::{as_tcp, segment};
use super::{as_icmp, as_udp, guest_v4, guest_v6, udp_frame};
use crate::config::{Config, Family};
use crate::follow::{Follower, Following};
use crate::host::{ALONE, HostNetwork, Template};
use crate::testing::{GATEWAY_V4, GATEWAY_V6, Net, config};

/// The usual network, elsewhere.
fn elsewhere() -> Config {
    let mut config = config();
    config.ipv4 = config.ipv4.map(|family| Family { guest: Ipv4Addr::new(192, 0, 2, 99), ..family });
    config.ipv6 = config.ipv6.map(|family| Family { guest: "2001:db8:1::99".parse().unwrap(), ..family });
    config.dns = vec!["2001:db8:1::53".parse().unwrap()];
    config.search = vec!["example.net".to_owned()];
    config
}

/// Router advertisements that the guest was sent: lifetime, and options.
fn advertisements(net: &Net) -> Vec<(u16, Vec<u8>)> {
    let advertisement = |frame: &Vec<u8>| as_icmp(frame).filter(|m| m.kind == 134);
    let told = |m: super::Icmp| (u16::from_be_bytes([m.body[2], m.body[3]]), m.body[12..].to_vec());
    net.frames().iter().filter_map(advertisement).map(told).collect()
}

/// The value of an option.
fn option(options: &[u8], kind: u8) -> Option<&[u8]> {
    super::link::options(options).into_iter().find(|o| o.0 == kind).map(|o| o.1)
}

#[test]
fn the_guest_is_told_at_once_what_has_changed() {
    let mut net = Net::new(config());
    net.engine.reconfigure(config());
    net.settle();
    assert_eq!(advertisements(&net), [], "nobody is there to be told");
    net.guest.send(udp_frame(guest_v6(1), "[ff02::99]:9".parse().unwrap(), b""));
    net.settle();
    drop(net.frames());

    net.engine.reconfigure(elsewhere());
    net.settle();
    let told = advertisements(&net);
    let [(old_router, old), (new_router, new)] = told.as_slice() else { panic!("{told:?}") };
    assert_eq!((*old_router, *new_router), (65535, 65535), "the router is the same");
    let prefix = |options| {
        let option: [u8; 30] = option(options, 3).unwrap().try_into().unwrap();
        let number = |at: usize| u32::from_be_bytes(option[at..at + 4].try_into().unwrap());
        let octets: [u8; 16] = option[14..].try_into().unwrap();
        (Ipv6Addr::from(octets).to_string(), number(2), number(6))
    };
    assert_eq!(prefix(old), ("2001:db8::".to_owned(), 7200, 0));
    assert_eq!(prefix(new), ("2001:db8:1::".to_owned(), u32::MAX, u32::MAX));
    let lifetime = |options, kind| option(options, kind).map(|option| option[2..6].to_vec());
    assert_eq!((lifetime(old, 25), lifetime(new, 25)), (Some(vec![0; 4]), Some(vec![0, 0, 3, 132])));
    assert_eq!(option(old, 31).unwrap()[6..19], *b"\x07example\x03org\0", "the domain that is gone, alone");
    assert_eq!(option(new, 31).unwrap()[6..19], *b"\x07example\x03net\0");

    let v4_alone = Config { ipv6: None, ..elsewhere() };
    net.engine.reconfigure(v4_alone);
    net.settle();
    let told = advertisements(&net);
    assert_eq!(told.len(), 1);
    assert_eq!(told[0].0, 0, "it is no router any more");
    net.engine.reconfigure(elsewhere());
    net.settle();
    assert_eq!(advertisements(&net).len(), 1);
}

#[test]
fn flows_go_on_and_ports_stay() {
    let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let datagrams = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let mut net = Net::new(config());
    let port = server.local_addr().unwrap().port();
    net.guest.send(segment(4000, port, |h| h.syn = true, b""));
    net.expect(|f| as_tcp(f).filter(|(h, _)| h.syn && h.ack));
    let remote = (GATEWAY_V4, datagrams.local_addr().unwrap().port()).into();
    net.guest.send(udp_frame(guest_v4(4000), remote, b"before"));
    net.settle();
    let (_, from) = datagrams.recv_from(&mut [0; 16]).unwrap();

    let mut other = elsewhere();
    other.ipv4.as_mut().unwrap().gateway = Ipv4Addr::new(192, 0, 2, 1);
    net.engine.reconfigure(other);
    datagrams.send_to(b"after", from).unwrap();
    let answer = net.expect(as_udp);
    assert_eq!((answer.from, answer.to), (remote, guest_v4(4000)), "as if nothing had happened");
    assert_eq!((net.stats().tcp_flows, net.stats().udp_flows), (1, 1));
}

#[test]
fn a_resolver_that_is_another_now_is_asked() {
    let (old, new) = (Ipv4Addr::new(127, 0, 0, 1), Ipv4Addr::new(127, 0, 0, 2));
    let forwarding = |resolver: Ipv4Addr| Config {
        dns_forward: vec![
            (GATEWAY_V6.into(), IpAddr::V6(resolver.to_ipv6_mapped())),
            (GATEWAY_V4.into(), resolver.into()),
        ],
        ..config()
    };
    let mut net = Net::new(forwarding(old));
    net.guest.send(udp_frame(guest_v4(4000), (GATEWAY_V4, 53).into(), b"?"));
    net.guest.send(udp_frame(guest_v4(4000), (GATEWAY_V4, 54).into(), b"?"));
    net.settle();
    assert_eq!(net.stats().udp_flows, 2);
    net.engine.reconfigure(forwarding(old));
    assert_eq!(net.stats().udp_flows, 2);
    net.engine.reconfigure(forwarding(new));
    assert_eq!(net.stats().udp_flows, 1, "the flow to a resolver alone ends");
}

fn follow(template: Template) -> (Following, Receiver<(HostNetwork, Config)>, Config) {
    let mut follower = Follower::open(template).unwrap();
    let now = follower.config().unwrap();
    let config = now.1.clone();
    let (told, changes) = channel();
    let following = follower.start(now, move |network, config| told.send((network.clone(), config)).unwrap());
    (following.unwrap(), changes, config)
}

/// How long a change may take to be noticed.
const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn a_network_that_comes_later_is_followed() {
    if !in_namespace() {
        return;
    }
    let (following, changes, config) = follow(Template::default());
    assert_eq!(config.ipv4.unwrap().guest, ALONE.0);
    ip("link add eth7 type veth peer name peer7");
    ip("address add 198.51.100.7/24 dev eth7");
    ip("link set eth7 up");
    ip("link set peer7 up");
    ip("route add default via 198.51.100.1");
    // Half of it may have been seen.
    let whole = |guest: [u8; 4], gateway: [u8; 4]| loop {
        let (network, config) = changes.recv_timeout(PATIENCE).unwrap();
        let family = config.ipv4.unwrap();
        if (family.guest, family.gateway) == (guest.into(), gateway.into()) {
            assert_eq!(network.ipv4.unwrap().name, "eth7");
            break;
        }
    };
    whole([198, 51, 100, 7], [198, 51, 100, 1]);
    // Gone, and there again: nothing that the guest should know.
    ip("route del default");
    ip("route add default via 198.51.100.1");
    // And elsewhere.
    ip("address flush dev eth7");
    ip("address add 203.0.113.7/24 dev eth7");
    ip("route add default via 203.0.113.1");
    whole([203, 0, 113, 7], [203, 0, 113, 1]);
    drop(following);
    assert!(changes.recv().is_err(), "the thread has ended, and let go of its closure");
}

#[test]
fn what_is_lost_is_kept() {
    if !in_namespace() {
        return;
    }
    ip("link add eth7 type veth peer name peer7");
    ip("address add 198.51.100.7/24 dev eth7");
    ip("link set eth7 up");
    ip("route add default via 198.51.100.1");
    let mut follower = Follower::open(Template::default()).unwrap();
    let (network, before) = follower.config().unwrap();
    ip("link set eth7 down");
    let (_, after) = follower.host.config_after(&Template::default(), &network).unwrap();
    assert_eq!(after, before);
}

//! What is chosen of a host's network, and what a guest's becomes by it.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::route::{RouteAttribute, RouteHeader, RouteMessage, RouteNextHop, RouteType};

use super::netlink::Tables;
use super::resolv::Resolvers;
use super::*;

fn family(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet }
}

/// A route to everywhere; without a router if that is unspecified.
fn default(gateway: &str, interface: u32, metric: u32) -> RouteMessage {
    let gateway: IpAddr = gateway.parse().unwrap();
    let mut route = RouteMessage::default();
    route.header.address_family = family(gateway);
    route.header.table = RouteHeader::RT_TABLE_MAIN;
    route.header.kind = RouteType::Unicast;
    route.attributes = vec![RouteAttribute::Oif(interface), RouteAttribute::Priority(metric)];
    if !gateway.is_unspecified() {
        route.attributes.push(RouteAttribute::Gateway(gateway.into()));
    }
    route
}

/// A route to the interface's own network.
fn network(prefix: &str, length: u8, interface: u32) -> RouteMessage {
    let prefix: IpAddr = prefix.parse().unwrap();
    let mut route = default("0.0.0.0", interface, 0);
    route.header.address_family = family(prefix);
    route.header.destination_prefix_length = length;
    route.attributes.push(RouteAttribute::Destination(prefix.into()));
    route
}

fn multipath(hops: &[(&str, u32, u8)]) -> RouteMessage {
    let mut route = default("0.0.0.0", 0, 0);
    let hops = hops.iter().map(|&(gateway, interface, weight)| {
        let mut hop = RouteNextHop::default();
        (hop.interface_index, hop.hops) = (interface, weight);
        hop.attributes = vec![RouteAttribute::Gateway(gateway.parse::<IpAddr>().unwrap().into())];
        hop
    });
    route.attributes = vec![RouteAttribute::MultiPath(hops.collect())];
    route
}

fn address(address: &str, prefix: u8, interface: u32) -> AddressMessage {
    let ip: IpAddr = address.parse().unwrap();
    let mut message = AddressMessage::default();
    message.header.family = family(ip);
    (message.header.prefix_len, message.header.index) = (prefix, interface);
    message.attributes = vec![AddressAttribute::Address(ip)];
    message
}

/// A host with interfaces 1 to 4, of which the first is the loopback.
fn host(routes: Vec<RouteMessage>, addresses: Vec<AddressMessage>) -> Tables {
    let links = [(1, "lo"), (2, "eth0"), (3, "wlan0"), (4, "tun0")].map(|(n, name)| (n, name.to_owned()));
    Tables { links: links.into(), addresses, routes }
}

fn config(tables: &Tables, template: &Template, resolv: &str) -> Config {
    let network = HostNetwork::chosen(tables, template).unwrap();
    Config::after(&network, template, &Resolvers::parse(resolv))
}

fn alone_v4() -> Option<Family<Ipv4Addr>> {
    let (guest, gateway) = ALONE;
    Some(Family { guest, prefix: 16, gateway, host_loopback: None, host_global: None })
}

fn two_ways_out() -> Tables {
    let mut temporary = address("2001:db8::ffff", 64, 3);
    temporary.header.flags = AddressHeaderFlags::Secondary;
    host(
        vec![
            default("198.51.100.1", 2, 600),
            network("198.51.100.0", 24, 2),
            default("192.0.2.1", 3, 100),
            network("192.0.2.0", 25, 3),
            default("fe80::1:1", 3, 100),
        ],
        vec![
            address("198.51.100.7", 24, 2),
            address("192.0.2.7", 25, 3),
            address("192.0.2.8", 25, 3),
            temporary,
            address("2001:db8::7", 56, 3),
        ],
    )
}

#[test]
fn the_guest_has_what_the_host_has() {
    let text = "nameserver 192.0.2.53\nnameserver 2001:db8::53\nsearch example.org\n";
    let config = config(&two_ways_out(), &Template::default(), text);
    let gateway = Ipv4Addr::new(192, 0, 2, 1);
    let guest = Ipv4Addr::new(192, 0, 2, 7);
    assert_eq!(
        config.ipv4,
        Some(Family { guest, prefix: 25, gateway, host_loopback: Some(gateway), host_global: None })
    );
    let v6 = config.ipv6.unwrap();
    assert_eq!((v6.guest, v6.prefix), ("2001:db8::7".parse().unwrap(), 64));
    assert_eq!(v6.gateway, "fe80::1:1".parse::<Ipv6Addr>().unwrap());
    assert_eq!(v6.host_loopback, Some(v6.gateway));
    assert_eq!(config.dns, ["192.0.2.53", "2001:db8::53"].map(|a| a.parse::<IpAddr>().unwrap()));
    assert_eq!(config.dns_forward, []);
    assert_eq!(config.search, ["example.org"]);
    assert!(config.services.dhcp);
}

#[test]
fn an_interface_can_be_named() {
    let template = Template { interface_v4: Some("eth0".to_owned()), ..Template::default() };
    let chosen = HostNetwork::chosen(&two_ways_out(), &template).unwrap();
    let v4 = chosen.ipv4.unwrap();
    assert_eq!((v4.name.as_str(), v4.index), ("eth0", 2));
    assert_eq!((v4.address, v4.prefix), ("198.51.100.7".parse().unwrap(), 24));
    assert_eq!(v4.gateway, Some("198.51.100.1".parse().unwrap()));
    assert_eq!(chosen.ipv6.unwrap().name, "wlan0", "the other family chooses for itself");
}

#[test]
fn all_that_the_interface_has_is_there_to_be_copied() {
    let chosen = HostNetwork::chosen(&two_ways_out(), &Template::default()).unwrap();
    let v4 = chosen.ipv4.unwrap();
    assert_eq!(v4.addresses, [address("192.0.2.7", 25, 3), address("192.0.2.8", 25, 3)]);
    assert_eq!(v4.routes, [default("192.0.2.1", 3, 100), network("192.0.2.0", 25, 3)]);
}

#[test]
fn what_a_template_names_must_be_there() {
    let mut template = Template { interface_v6: Some("eth9".to_owned()), ..Template::default() };
    let error = HostNetwork::chosen(&two_ways_out(), &template).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert_eq!(error.to_string(), "there is no interface eth9; there are: lo, eth0, wlan0, tun0");
    // Nobody minds the name if the guest is not to have that family.
    template.ipv6 = false;
    assert!(HostNetwork::chosen(&two_ways_out(), &template).unwrap().ipv4.is_some());

    let both = Some("tun0".to_owned());
    let template = Template { interface_v4: both.clone(), interface_v6: both, ..Template::default() };
    let error = HostNetwork::chosen(&two_ways_out(), &template).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AddrNotAvailable);
    assert!(error.to_string().contains("interface tun0"), "{error}");
}

#[test]
fn an_interface_with_one_family_gives_that() {
    let both = Some("eth0".to_owned());
    let template = Template { interface_v4: both.clone(), interface_v6: both, ..Template::default() };
    let chosen = HostNetwork::chosen(&two_ways_out(), &template).unwrap();
    assert_eq!((chosen.ipv4.unwrap().index, chosen.ipv6), (2, None));
}

#[test]
fn the_heaviest_hop_is_the_gateway_and_the_first_of_equals() {
    let hops = [("192.0.2.1", 2, 0), ("192.0.2.2", 3, 9), ("192.0.2.3", 4, 9)];
    let addresses = (2..=4).map(|n| address(&format!("192.0.2.1{n}"), 24, n)).collect();
    let tables = host(vec![multipath(&hops)], addresses);
    let chosen = |name: Option<&str>| {
        let template = Template { interface_v4: name.map(str::to_owned), ..Template::default() };
        let v4 = HostNetwork::chosen(&tables, &template).unwrap().ipv4.unwrap();
        (v4.index, v4.gateway.unwrap().to_string(), v4.routes.len())
    };
    assert_eq!(chosen(None), (3, "192.0.2.2".to_owned(), 1));
    assert_eq!(chosen(Some("tun0")), (4, "192.0.2.3".to_owned(), 1));
}

#[test]
fn a_route_without_gateway_gives_no_dhcp() {
    let tables = host(vec![default("0.0.0.0", 4, 0)], vec![address("192.0.2.7", 32, 4)]);
    let config = config(&tables, &Template::default(), "");
    let v4 = config.ipv4.unwrap();
    assert_eq!((v4.guest, v4.gateway), (Ipv4Addr::new(192, 0, 2, 7), ALONE.1));
    assert_eq!(v4.host_loopback, None);
    assert!(!config.services.dhcp);
}

#[test]
fn the_only_interface_is_the_template_without_a_default_route() {
    let both = vec![address("192.0.2.7", 24, 2), address("198.51.100.7", 24, 3), address("127.0.0.1", 8, 1)];
    let one = host(vec![network("192.0.2.0", 24, 2)], both.clone());
    let chosen = HostNetwork::chosen(&one, &Template::default()).unwrap();
    let v4 = chosen.ipv4.unwrap();
    assert_eq!((v4.index, v4.gateway), (2, None));
    let two = host(vec![network("192.0.2.0", 24, 2), network("198.51.100.0", 24, 3)], both);
    assert_eq!(HostNetwork::chosen(&two, &Template::default()).unwrap(), HostNetwork::default());
}

#[test]
fn a_host_without_network_gives_addresses_all_the_same() {
    let nothing = Tables::default();
    let both = config(&nothing, &Template::default(), "");
    assert_eq!((both.ipv4, both.ipv6), (alone_v4(), None));
    assert!(both.services.dhcp);
    let v6 = config(&nothing, &Template { ipv4: false, ..Template::default() }, "");
    assert_eq!((v6.ipv4, v6.ipv6.unwrap().guest), (None, ALONE_V6.0));
}

#[test]
fn one_family_is_enough() {
    let addresses = vec![address("2001:db8::7", 64, 2), address("192.0.2.7", 24, 2)];
    let tables = host(vec![default("::", 2, 0)], addresses);
    let both = config(&tables, &Template::default(), "nameserver 2001:db8::53\nnameserver ::1\n");
    assert_eq!(both.ipv4, alone_v4(), "no route leads anywhere");
    assert!(both.services.dhcp);
    assert_eq!(both.ipv6.unwrap().gateway, ALONE_V6.1);
    assert_eq!(both.dns_forward, [(IpAddr::from(ALONE.1), "::1".parse().unwrap())]);
    let v6 = config(&tables, &Template { ipv4: false, ..Template::default() }, "");
    assert_eq!((v6.ipv4, v6.ipv6), (None, both.ipv6));
}

#[test]
fn a_family_can_be_left_out() {
    let v4 = config(&two_ways_out(), &Template { ipv6: false, ..Template::default() }, "");
    assert!(v4.ipv4.is_some() && v4.ipv6.is_none());
    let v6 = config(&two_ways_out(), &Template { ipv4: false, ..Template::default() }, "");
    assert!(v6.ipv4.is_none() && v6.ipv6.is_some());
}

#[test]
fn a_resolver_on_the_hosts_loopback_is_the_gateways() {
    let tables = host(vec![default("192.0.2.1", 2, 0)], vec![address("192.0.2.7", 24, 2)]);
    let gateway: IpAddr = "192.0.2.1".parse().unwrap();
    for own in ["127.0.0.53", "::1", "192.0.2.7"] {
        let text = format!("nameserver {own}\nnameserver 127.0.0.54\nnameserver 9.9.9.9\n");
        let config = config(&tables, &Template::default(), &text);
        assert_eq!(config.dns, [gateway, "9.9.9.9".parse().unwrap()]);
        assert_eq!(config.dns_forward, [(gateway, own.parse().unwrap())]);
    }
}

/// The kernel is asked for real; what it says depends on the machine.
#[test]
fn the_kernel_answers() {
    let config = Config::from_host().unwrap();
    assert!(config.ipv4.is_some() || config.ipv6.is_some());
    let template = Template { interface_v4: Some("no such one".to_owned()), ..Template::default() };
    let error = Config::from_template(&template).unwrap_err();
    assert!(error.to_string().contains("lo"), "{error}");
}

//! Whom addresses mean on the other side.

use std::net::{IpAddr, SocketAddr};

use crate::config::{Config, Outbound};
use crate::context::{Context, Link};
use crate::poller::Poller;
use crate::testing::{PLAIN, config, tap};

/// The usual network, with a resolver on the host's loopback.
fn network() -> Config {
    Config { dns_forward: vec![("192.0.2.3".parse().unwrap(), "127.0.0.53".parse().unwrap())], ..config() }
}

/// Asks a context of the usual network.
fn ask<T>(question: impl FnOnce(&mut Context<'_>) -> T) -> T {
    ask_of(network(), question)
}

fn ask_of<T>(config: Config, question: impl FnOnce(&mut Context<'_>) -> T) -> T {
    let (tap, _guest) = tap(PLAIN, 1).unwrap();
    let mut link = Link::new(Box::new(tap), &config);
    let poller = Poller::new().unwrap();
    question(&mut Context {
        config: &config,
        link: &mut link,
        poller: &poller,
        now: std::time::Instant::now(),
        spare: None,
    })
}

#[test]
fn the_hosts_loopback_and_a_resolver_go_by_other_names() {
    for (destination, outside) in [
        ("192.0.2.2:80", "127.0.0.1:80"),
        ("[fe80::2]:80", "[::1]:80"),
        ("192.0.2.3:53", "127.0.0.53:53"),
        ("192.0.2.3:853", "127.0.0.53:853"),
        ("192.0.2.3:80", "192.0.2.3:80"),
        ("198.51.100.7:53", "198.51.100.7:53"),
    ] {
        let outside: SocketAddr = outside.parse().unwrap();
        assert_eq!(ask(|cx| cx.outside(destination.parse().unwrap())), outside, "{destination}");
    }
}

#[test]
fn peers_that_would_be_the_guest_itself_come_from_the_gateway() {
    for (peer, inside) in [
        ("127.0.0.1", "192.0.2.2"),
        ("::ffff:127.0.0.1", "192.0.2.2"),
        ("192.0.2.15", "192.0.2.2"),
        ("198.51.100.9", "198.51.100.9"),
        ("::ffff:198.51.100.9", "198.51.100.9"),
        ("::1", "fe80::2"),
        ("2001:db8::f", "fe80::2"),
        ("fe80::99", "fe80::2"),
        ("2001:db8:1::1", "2001:db8:1::1"),
    ] {
        let inside: IpAddr = inside.parse().unwrap();
        assert_eq!(
            ask(|cx| cx.inside(SocketAddr::new(peer.parse().unwrap(), 9))),
            SocketAddr::new(inside, 9),
            "{peer}"
        );
    }
}

/// A network with an address for the host's own, and another guest behind the guest.
fn with_global() -> Config {
    let mut config = network();
    config.ipv4.as_mut().unwrap().host_global = Some("192.0.2.4".parse().unwrap());
    config.ipv6.as_mut().unwrap().host_global = Some("2001:db8::4".parse().unwrap());
    config
}

#[test]
fn the_hosts_own_address_goes_by_another_name() {
    for (destination, outside) in [
        ("192.0.2.4:80", "192.0.2.15:80"),
        ("[2001:db8::4]:80", "[2001:db8::f]:80"),
        ("192.0.2.2:80", "127.0.0.1:80"),
    ] {
        let outside: SocketAddr = outside.parse().unwrap();
        let found = ask_of(with_global(), |cx| cx.outside(destination.parse().unwrap()));
        assert_eq!(found, outside, "{destination}");
    }
    for (peer, inside) in [
        ("192.0.2.15", "192.0.2.4"),
        ("2001:db8::f", "2001:db8::4"),
        ("127.0.0.1", "192.0.2.2"),
        ("::1", "fe80::2"),
        ("198.51.100.9", "198.51.100.9"),
    ] {
        let inside: IpAddr = inside.parse().unwrap();
        let found = ask_of(with_global(), |cx| cx.inside(SocketAddr::new(peer.parse().unwrap(), 9)));
        assert_eq!(found, SocketAddr::new(inside, 9), "{peer}");
    }
    assert!(ask_of(with_global(), |cx| cx.is_ours("192.0.2.4".parse().unwrap())));
    assert!(!ask(|cx| cx.is_ours("192.0.2.4".parse().unwrap())));
}

#[test]
fn sockets_that_leave_the_host_alone_are_bound() {
    let outbound = Outbound {
        address_v4: Some("198.51.100.1".parse().unwrap()),
        address_v6: None,
        interface_v4: Some("eth7".to_owned()),
        interface_v6: Some("eth8".to_owned()),
    };
    let bound = |peer: &str| {
        let config = Config { outbound: outbound.clone(), ..network() };
        ask_of(config, |cx| {
            let binding = cx.binding(peer.parse().unwrap());
            (binding.address.map(|a| a.to_string()), binding.interface.map(str::to_owned))
        })
    };
    assert_eq!(bound("203.0.113.1"), (Some("198.51.100.1".to_owned()), Some("eth7".to_owned())));
    assert_eq!(bound("2001:db8:1::1"), (None, Some("eth8".to_owned())));
    // The host itself: its loopback, and the address that the guest has of it.
    for own in ["127.0.0.1", "127.0.0.53", "::1", "192.0.2.15", "2001:db8::f"] {
        assert_eq!(bound(own), (None, None), "{own}");
    }
}

#[test]
fn a_forward_leads_to_whom_it_names_by_the_family_that_there_is() {
    let arrival = |config: Config, peer: &str, target: Option<&str>| {
        let target = target.map(|t| t.parse().unwrap());
        ask_of(config, |cx| cx.arrival(SocketAddr::new(peer.parse().unwrap(), 9), target))
            .map(|(address, peer)| (address.to_string(), peer.ip().to_string()))
    };
    let told = |address: &str, peer: &str| Some((address.to_owned(), peer.to_owned()));
    for (peer, target, expected) in [
        ("198.51.100.9", None, told("192.0.2.15", "198.51.100.9")),
        ("2001:db8:1::1", None, told("2001:db8::f", "2001:db8:1::1")),
        ("198.51.100.9", Some("10.9.9.9"), told("10.9.9.9", "198.51.100.9")),
        ("2001:db8:1::1", Some("10.9.9.9"), told("10.9.9.9", "192.0.2.2")),
        ("198.51.100.9", Some("fd00::9"), told("fd00::9", "fe80::2")),
    ] {
        assert_eq!(arrival(network(), peer, target), expected, "{peer} to {target:?}");
    }
    let v4_alone = || Config { ipv6: None, ..network() };
    assert_eq!(arrival(v4_alone(), "2001:db8:1::1", None), told("192.0.2.15", "192.0.2.2"));
    assert_eq!(arrival(v4_alone(), "2001:db8:1::1", Some("fd00::9")), told("fd00::9", "2001:db8:1::1"));
    let neither = Config { ipv4: None, ipv6: None, ..network() };
    assert_eq!(arrival(neither, "198.51.100.9", None), None);
}

#[test]
fn a_guest_is_reached_by_the_address_that_it_uses() {
    let own = "2001:db8::1234".parse().unwrap();
    let peer = SocketAddr::new("2001:db8:1::1".parse().unwrap(), 9);
    let address = |cx: &mut Context<'_>| cx.arrival(peer, None).map(|(address, _)| address);
    assert_eq!(ask(address), Some("2001:db8::f".parse().unwrap()));
    let learnt = ask(|cx| {
        cx.link.guest_v6 = Some(own);
        address(cx)
    });
    assert_eq!(learnt, Some(IpAddr::from(own)));
    let none = ask(|cx| {
        (cx.link.guest_v4, cx.link.guest_v6) = (None, None);
        address(cx)
    });
    assert_eq!(none, None);
}

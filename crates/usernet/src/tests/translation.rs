//! Whom addresses mean on the other side.

use std::net::{IpAddr, SocketAddr};

use crate::context::{Context, Link};
use crate::poller::Poller;
use crate::testing::{PLAIN, config, tap};

/// Asks a context of the usual network, with a resolver on the host's loopback.
fn ask<T>(question: impl FnOnce(&mut Context<'_>) -> T) -> T {
    let mut config = config();
    config.dns_forward = vec![("192.0.2.3".parse().unwrap(), "127.0.0.53".parse().unwrap())];
    let (tap, _guest) = tap(PLAIN, 1).unwrap();
    let mut link = Link::new(Box::new(tap), &config);
    let poller = Poller::new().unwrap();
    question(&mut Context {
        config: &config,
        link: &mut link,
        poller: &poller,
        now: std::time::Instant::now(),
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

#[test]
fn a_guest_is_reached_by_the_address_that_it_uses() {
    let own = "2001:db8::1234".parse().unwrap();
    let peer = "2001:db8:1::1".parse().unwrap();
    assert_eq!(ask(|cx| cx.guest_address(peer)), Some("2001:db8::f".parse().unwrap()));
    let learnt = ask(|cx| {
        cx.link.guest_v6 = Some(own);
        cx.guest_address(peer)
    });
    assert_eq!(learnt, Some(IpAddr::from(own)));
    let none = ask(|cx| {
        cx.link.guest_v6 = None;
        cx.guest_address(peer)
    });
    assert_eq!(none, None);
}

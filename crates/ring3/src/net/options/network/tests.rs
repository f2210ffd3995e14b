use std::net::IpAddr;

use clap::Parser;
use usernet::Config;
use usernet::config::{Family, Outbound, Services};

use super::super::{Common, PasstArgs, PasstSettings, PastaArgs, PastaSettings};

/// The host's: connected by both families, its resolver on its loopback first.
fn host() -> Config {
    let gateway = "192.0.2.1".parse().unwrap();
    let router = "fe80::1".parse().unwrap();
    Config {
        guest_mac: None,
        gateway_mac: usernet::GATEWAY_MAC,
        ipv4: Some(Family {
            guest: "192.0.2.7".parse().unwrap(),
            prefix: 25,
            gateway,
            host_loopback: Some(gateway),
            host_global: None,
        }),
        ipv6: Some(Family {
            guest: "2001:db8::7".parse().unwrap(),
            prefix: 64,
            gateway: router,
            host_loopback: Some(router),
            host_global: None,
        }),
        mtu: 65520,
        dns: vec![gateway.into(), "9.9.9.9".parse().unwrap()],
        dns_forward: vec![(gateway.into(), "127.0.0.53".parse().unwrap())],
        search: vec!["example.org".into()],
        hostname: None,
        fqdn: None,
        services: Services::default(),
        forwards: Vec::new(),
        freebind: false,
        outbound: Outbound::default(),
    }
}

/// A host with an address but no gateway, and no resolver.
fn without_gateway() -> Config {
    let mut host = host();
    host.ipv6 = None;
    host.services.dhcp = false;
    if let Some(family) = &mut host.ipv4 {
        family.gateway = usernet::ALONE.1;
        family.host_loopback = None;
    }
    (host.dns, host.dns_forward) = (Vec::new(), Vec::new());
    host
}

fn common(words: &[&str]) -> Common {
    let args = PasstArgs::try_parse_from(["passt"].iter().chain(words)).unwrap();
    PasstSettings::try_from(args).unwrap().common
}

fn on(host: Config, words: &[&str]) -> Config {
    common(words).network.apply(host).unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn without_options_it_is_the_hosts() {
    assert_eq!(on(host(), &[]), host());
    assert_eq!(on(without_gateway(), &[]), without_gateway());
}

#[test]
fn addresses_and_their_prefixes() {
    for (words, guest, prefix) in [
        (&["-a", "198.51.100.9"][..], "198.51.100.9", 24),
        (&["-a", "10.1.2.3"], "10.1.2.3", 8),
        (&["-a", "172.16.0.9"], "172.16.0.9", 16),
        (&["-a", "10.1.2.3/30"], "10.1.2.3", 30),
        (&["-a", "10.1.2.3", "-n", "255.255.254.0"], "10.1.2.3", 23),
        (&["-n", "20"], "192.0.2.7", 20),
        (&["-a", "10.1.2.3", "-a", "10.1.2.4/9"], "10.1.2.4", 9),
    ] {
        let family = on(host(), words).ipv4.unwrap();
        assert_eq!((family.guest.to_string().as_str(), family.prefix), (guest, prefix), "{words:?}");
    }
    let family = on(host(), &["-a", "2001:db8::9/48"]).ipv6.unwrap();
    assert_eq!((IpAddr::from(family.guest), family.prefix), (ip("2001:db8::9"), 64));
    // A family that the host does not have.
    let family = on(without_gateway(), &["-a", "2001:db8::9"]).ipv6.unwrap();
    assert_eq!((family.gateway, family.host_loopback), (usernet::ALONE_V6.1, None));
}

#[test]
fn the_gateway_stands_for_the_host_if_there_is_one() {
    let v4 = |host, words: &[&str]| {
        let config = on(host, words);
        let family = config.ipv4.unwrap();
        (family.gateway.to_string(), family.host_loopback.map(|a| a.to_string()), config.services.dhcp)
    };
    let some = |text: &str| Some(text.to_owned());
    assert_eq!(v4(host(), &["-g", "192.0.2.2"]), ("192.0.2.2".into(), some("192.0.2.2"), true));
    assert_eq!(v4(host(), &["--no-map-gw"]), ("192.0.2.1".into(), None, true));
    assert_eq!(v4(host(), &["--map-host-loopback", "none"]), ("192.0.2.1".into(), None, true));
    assert_eq!(
        v4(host(), &["--map-host-loopback", "192.0.2.9", "--no-map-gw"]),
        ("192.0.2.1".into(), some("192.0.2.9"), true)
    );
    assert_eq!(v4(without_gateway(), &[]), ("169.254.2.2".into(), None, false));
    assert_eq!(v4(without_gateway(), &["-g", "192.0.2.2"]), ("192.0.2.2".into(), some("192.0.2.2"), true));
    let both = on(host(), &["--map-host-loopback", "192.0.2.9"]);
    assert_eq!(
        both.ipv6.unwrap().host_loopback.map(IpAddr::from),
        Some(ip("fe80::1")),
        "IPv6's is as it was"
    );
    let global = on(host(), &["--map-guest-addr", "169.254.1.2"]).ipv4.unwrap().host_global;
    assert_eq!(global.map(IpAddr::from), Some(ip("169.254.1.2")));
}

#[test]
fn one_address_has_one_meaning() {
    for words in [
        &["--map-host-loopback", "192.0.2.7"][..],
        &["--map-guest-addr", "192.0.2.1"],
        &["--map-guest-addr", "192.0.2.7"],
        &["-a", "192.0.2.1"],
        &["--dns-forward", "192.0.2.7"],
        &["--dns-forward", "2001:db8::7"],
    ] {
        let error = common(words).network.apply(host()).unwrap_err().to_string();
        assert!(error.contains("cannot mean both"), "{words:?}: {error}");
    }
}

#[test]
fn packets_too_short_for_ipv6_leave_it_out() {
    assert!(on(host(), &["-m", "1280"]).ipv6.is_some());
    assert!(on(host(), &["-m", "0"]).ipv6.is_some(), "the guest is told none");
    let short = on(host(), &["-m", "1279"]);
    assert!(short.ipv4.is_some() && short.ipv6.is_none());
    let error = common(&["-6", "-m", "1279"]).network.apply(Config { ipv4: None, ..host() }).unwrap_err();
    assert!(error.to_string().contains("--mtu 1279 is too little for IPv6"), "{error}");
}

#[test]
fn resolvers_are_told_forwarded_or_left_out() {
    let gateway = ip("192.0.2.1");
    let local = ip("127.0.0.53");
    let stub = ip("169.254.1.1");
    let other = ip("9.9.9.9");
    for (words, told, forwards) in [
        // The gateway's address moves, and the forward with it.
        (&["-g", "192.0.2.2"][..], vec![ip("192.0.2.2"), other], vec![(ip("192.0.2.2"), local)]),
        // No address leads to the host's loopback.
        (&["--map-host-loopback", "none"], vec![other], vec![]),
        (&["--dns-forward", "169.254.1.1"], vec![stub, other], vec![(stub, local)]),
        (&["--dns-forward", "169.254.1.1", "--no-map-gw"], vec![stub, other], vec![(stub, local)]),
        (
            &["--dns-forward", "169.254.1.1", "--dns-host", "8.8.8.8"],
            vec![stub, other],
            vec![(stub, ip("8.8.8.8"))],
        ),
        // What is named is told as it is.
        (
            &["-D", "127.0.0.1", "-D", "192.0.2.9"],
            vec![ip("127.0.0.1"), ip("192.0.2.9")],
            vec![(gateway, local)],
        ),
        (&["-D", "none"], vec![], vec![(gateway, local)]),
        (&["--no-dhcp-dns"], vec![], vec![(gateway, local)]),
        // The resolver that is not on the host's loopback becomes the guest's own.
        (&["-a", "9.9.9.9"], vec![gateway], vec![(gateway, local)]),
    ] {
        let config = on(host(), words);
        assert_eq!(config.dns, told, "{words:?}");
        assert_eq!(config.dns_forward, forwards, "{words:?}");
    }
}

#[test]
fn a_gateway_that_is_the_resolver_is_not_hidden() {
    let gateway = ip("192.0.2.1");
    let host = Config { dns: vec![gateway], dns_forward: vec![], ..host() };
    let config = on(host, &[]);
    assert_eq!((config.dns, config.dns_forward), (vec![gateway], vec![(gateway, gateway)]));
}

#[test]
fn pasta_tells_resolvers_only_if_asked() {
    let pasta = |words: &[&str]| {
        let args = PastaArgs::try_parse_from(["pasta"].iter().chain(words)).unwrap();
        PastaSettings::try_from(args).unwrap().common.network.apply(host()).unwrap()
    };
    let quiet = pasta(&[]);
    assert_eq!((quiet.dns.len(), quiet.search.len()), (0, 0));
    let told = pasta(&["--dhcp-dns", "--dhcp-search", "-S", "one.example two.example"]);
    assert_eq!(told.dns, host().dns);
    assert_eq!(told.search, ["one.example", "two.example"]);
}

#[test]
fn services_and_the_rest() {
    let config = on(
        host(),
        &[
            "--no-icmp",
            "--no-ra",
            "-m",
            "1500",
            "-M",
            "02:00:00:00:00:01",
            "-H",
            "box",
            "--fqdn",
            "box.example.",
            "--freebind",
            "--outbound-if4",
            "eth0",
            "-o",
            "192.0.2.8",
            "-o",
            "2001:db8::8",
            "-S",
            "none",
        ],
    );
    assert_eq!(config.services, Services { icmp: false, ndp: false, ra: false, ..Services::default() });
    assert_eq!((config.mtu, config.gateway_mac), (1500, [2, 0, 0, 0, 0, 1]));
    assert_eq!((config.hostname.as_deref(), config.fqdn.as_deref()), (Some("box"), Some("box.example")));
    assert!(config.freebind && config.search.is_empty());
    assert_eq!(config.outbound.interface_v4.as_deref(), Some("eth0"));
    assert_eq!(config.outbound.address_v4.map(IpAddr::from), Some(ip("192.0.2.8")));
    assert_eq!(config.outbound.address_v6.map(IpAddr::from), Some(ip("2001:db8::8")));
}

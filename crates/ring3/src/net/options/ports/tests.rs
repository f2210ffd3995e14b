use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use super::*;

fn table(specs: &[&str]) -> Result<PortTable, BadPorts> {
    PortTable::new(specs.iter().map(|spec| spec.parse().unwrap()).collect())
}

/// The rules as text, `!` for best effort.
fn rules(specs: &[&str]) -> Vec<String> {
    let show = |rule: &Rule| format!("{rule}{}", if rule.best_effort { "!" } else { "" });
    table(specs).unwrap().rules(DEFAULT_EPHEMERAL).iter().map(show).collect()
}

#[test]
fn the_manual_pages_examples() {
    for (spec, expected) in [
        ("none", &[][..]),
        ("22", &["22"]),
        ("22:23", &["22:23"]),
        ("22,25", &["22", "25"]),
        ("22-80", &["22-80"]),
        ("22-80:32-90", &["22-80:32-90"]),
        ("192.0.2.1/22", &["192.0.2.1/22"]),
        ("192.0.2.1%eth0/22", &["192.0.2.1%eth0/22"]),
        ("%eth0/22", &["%eth0/22"]),
        ("0.0.0.0/5000:192.0.2.5/6000", &["0.0.0.0/5000:192.0.2.5/6000"]),
        ("2000-5000,~3000-3010", &["2000-2999", "3011-5000"]),
        ("192.0.2.1/20-30,~25", &["192.0.2.1/20-24", "192.0.2.1/26-30"]),
        ("8000-8010,auto", &["8000-8010,auto"]),
        ("all", &["1-32767!", "61000-65535!"]),
        ("::1/all", &["::1/1-32767!", "::1/61000-65535!"]),
        ("127.0.0.6/all:192.0.2.6", &["127.0.0.6/1-32767:192.0.2.6!", "127.0.0.6/61000-65535:192.0.2.6!"]),
        ("~20000-20010", &["1-19999!", "20011-32767!", "61000-65535!"]),
        ("auto", &["1-32767,auto!", "61000-65535,auto!"]),
        ("::1/auto", &["::1/1-32767,auto!", "::1/61000-65535,auto!"]),
    ] {
        assert_eq!(rules(&[spec]), expected, "{spec}");
    }
}

#[test]
fn targets_are_addresses_or_ports() {
    for (spec, expected) in [
        ("5000:192.0.2.5", "5000:192.0.2.5"),
        ("5000:192.0.2.5/6000", "5000:192.0.2.5/6000"),
        ("80,5000:192.0.2.5/6000", "5000:192.0.2.5/6000"),
        ("5000:2001:db8::5", "5000:[2001:db8::5]"),
        ("5000:[2001:db8::5]/6000", "5000:[2001:db8::5]/6000"),
        ("::/5000:2001:db8::5/6000", "::/5000:[2001:db8::5]/6000"),
        ("[::1]/80", "::1/80"),
        // What is an address as a whole is where is listened.
        ("5000:2001:db8::5/6000", "5000:2001:db8::5/6000"),
        ("80-90:80-90", "80-90"),
    ] {
        assert_eq!(rules(&[spec]).last().unwrap(), expected, "{spec}");
    }
}

#[test]
fn options_accumulate_and_all_takes_what_is_left() {
    assert_eq!(rules(&["all,~1-1000", "2000:80"]), ["2000:80", "1001-1999!", "2001-32767!", "61000-65535!"]);
    // In one value, too.
    let both = rules(&["all,~1-1000,2000:80"]);
    assert_eq!(both, ["2000:80", "1001-1999!", "2001-32767!", "61000-65535!"]);
    assert_eq!(rules(&["all:192.0.2.5,~1-60999,61000"]), ["61000", "61001-65535:192.0.2.5!"]);
    assert_eq!(rules(&["22", "%eth0/23", "192.0.2.1/24"]), ["22", "%eth0/23", "192.0.2.1/24"]);
    // Elsewhere the port is still free.
    assert_eq!(
        rules(&["192.0.2.1/all,~1-32700", "192.0.2.2/32767"]),
        ["192.0.2.2/32767", "192.0.2.1/32701-32767!", "192.0.2.1/61000-65535!"]
    );
    assert_eq!(rules(&["192.0.2.1/22", "192.0.2.2/22"]).len(), 2);
    assert_eq!(rules(&["%eth0/22", "%eth1/22"]).len(), 2);
    assert_eq!(rules(&["none", "none"]), [""; 0]);
    // The default is turned off, then there are others.
    assert_eq!(rules(&["none", "22", "23"]), ["22", "23"]);
}

#[test]
fn one_port_has_one_meaning() {
    for specs in [
        &["22", "22"][..],
        &["22,22:23"],
        &["20-30", "25:80"],
        &["22", "192.0.2.1/22"],
        &["22", "%eth0/22"],
        &["0.0.0.0/22", "192.0.2.1/22"],
        &["::/22", "192.0.2.1/22"],
    ] {
        let error = table(specs).unwrap_err();
        assert!(matches!(error, BadPorts::Twice(..)), "{specs:?}: {error}");
    }
    assert_eq!(table(&["0.0.0.0/22", "::1/22"]).unwrap().rules(DEFAULT_EPHEMERAL).len(), 2);
    // What is excluded is not forwarded.
    assert_eq!(table(&["20-30,~25", "25:80"]).unwrap().rules(DEFAULT_EPHEMERAL).len(), 3);
}

#[test]
fn mistakes_are_named() {
    for (specs, words) in [
        (&["0"][..], "'0' is not a port"),
        (&["65536"], "'65536' is not a port"),
        (&["+22"], "'+22' is not a port"),
        (&["-22"], "'' is not a port"),
        (&["22-"], "'' is not a port"),
        (&[""], "an item is empty"),
        (&["22,"], "an item is empty"),
        (&["~"], "an item is empty"),
        (&["ssh"], "'ssh' is not a port"),
        (&["80-22"], "80-22 ends before it begins"),
        (&["22-80:32-91"], "22-80 are 59 ports, but 32-91 are 60"),
        (&["22-80:32"], "32 are 1"),
        (&["22:localhost"], "'localhost' is neither an address nor a port"),
        (&["22:"], "'' is neither"),
        (&["22:192.0.2.256"], "'192.0.2.256' is neither"),
        (&["22:192.0.2.5/"], "an item is empty"),
        (&["~22:23"], "what is excluded cannot have a target"),
        (&["192.0.2/22"], "'192.0.2' is not an address"),
        (&["/22"], "'' is not an address"),
        (&["%/22"], "'' cannot be the name of an interface"),
        (&["%much-too-long-name/22"], "cannot be the name"),
        (&["192.0.2.1%a:b/22"], "'a:b' cannot be the name"),
        (&["all,all:192.0.2.5"], "'all' leads to two places"),
        (&["none,22"], "'none' means no port"),
        (&["22", "none"], "cannot stand beside '22'"),
        (&["none", "22", "none"], "cannot stand beside '22'"),
        (&["22,~22"], "no port is left"),
        (&["all:eth0"], "'eth0' is neither"),
    ] {
        let parsed: Result<Vec<PortSpec>, BadPorts> = specs.iter().map(|spec| spec.parse()).collect();
        let error = parsed.and_then(PortTable::new).unwrap_err().to_string();
        assert!(error.contains(words), "{specs:?}: {error}");
    }
}

#[test]
fn a_rule_leads_both_ways() {
    let specs = table(&["8000-8010:192.0.2.5/80-90"]).unwrap().rules(DEFAULT_EPHEMERAL);
    let rule = &specs[0];
    assert_eq!(rule.leads_to(8003), 83);
    assert_eq!(rule.leading_to(83), Some(8003));
    assert_eq!((rule.leading_to(79), rule.leading_to(91)), (None, None));
    let forward = rule.forward(Transport::Tcp, 8003, true);
    assert_eq!(forward.listen, "0.0.0.0:8003".parse().unwrap());
    assert_eq!((forward.guest_address, forward.guest_port), (Some("192.0.2.5".parse().unwrap()), 83));
    let plain = &table(&["%eth0/22"]).unwrap().rules(DEFAULT_EPHEMERAL)[0];
    let forward = plain.forward(Transport::Udp, 22, true);
    assert_eq!((forward.listen, forward.interface.as_deref()), ("[::]:22".parse().unwrap(), Some("eth0")));
    assert_eq!(plain.forward(Transport::Udp, 22, false).listen, "0.0.0.0:22".parse().unwrap());
}

fn range() -> impl Strategy<Value = PortRange> {
    (1..=u16::MAX, 1..=u16::MAX).prop_map(|(a, b)| PortRange { first: a.min(b), last: a.max(b) })
}

fn address() -> impl Strategy<Value = IpAddr> {
    prop_oneof![any::<Ipv4Addr>().prop_map(IpAddr::V4), any::<Ipv6Addr>().prop_map(IpAddr::V6)]
}

fn mapping() -> impl Strategy<Value = Mapping> {
    (range(), any::<u16>(), proptest::option::of(address())).prop_map(|(ports, to, to_address)| {
        // Anywhere that the whole range fits.
        let to = 1 + to % (u16::MAX - ports.span());
        Mapping { ports, to, to_address }
    })
}

/// `all`, or ports that are named, or both.
fn include() -> impl Strategy<Value = (Option<AllPorts>, Vec<Mapping>)> {
    let all = || proptest::option::of(address()).prop_map(|to_address| AllPorts { to_address });
    let named = proptest::collection::vec(mapping(), 1..4);
    prop_oneof![all().prop_map(|all| (Some(all), Vec::new())), (proptest::option::of(all()), named),]
}

fn spec() -> impl Strategy<Value = PortSpec> {
    let listen = (proptest::option::of(address()), proptest::option::of("[a-z][a-z0-9.@_-]{0,14}"))
        .prop_map(|(address, interface)| Listen { address, interface });
    let list = (listen, include(), proptest::collection::vec(range(), 0..3), any::<bool>());
    prop_oneof![
        1 => Just(PortSpec::None),
        9 => list.prop_map(|(listen, (all, named), exclude, auto)| {
            PortSpec::Ports(PortList { listen, all, named, exclude, auto })
        }),
    ]
}

/// Always the same cases.
fn runner() -> TestRunner {
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    TestRunner::new_with_rng(Config { failure_persistence: None, ..Config::default() }, rng)
}

#[test]
fn what_is_printed_is_read_back() {
    let check = |spec: PortSpec| {
        let text = spec.to_string();
        prop_assert_eq!(text.parse::<PortSpec>(), Ok(spec), "{}", text);
        Ok(())
    };
    runner().run(&spec(), check).unwrap();
}

#[test]
fn any_text_is_read_or_refused() {
    let items = "(all|none|auto|[0-9~:,/%.a-f-]){0,12}";
    runner()
        .run(&items, |text| {
            if let Ok(spec) = text.parse::<PortSpec>() {
                prop_assert_eq!(spec.to_string().parse::<PortSpec>(), Ok(spec), "{}", text);
            }
            Ok(())
        })
        .unwrap();
}

/// Against the plainest reading: port by port.
#[test]
fn rules_forward_what_the_values_say() {
    let check = |(spec, probes): (PortSpec, Vec<u16>)| {
        let PortSpec::Ports(list) = &spec else { return Ok(()) };
        let Ok(table) = PortTable::new(vec![spec.clone()]) else { return Ok(()) };
        let rules = table.rules(DEFAULT_EPHEMERAL);
        let edges = list.exclude.iter().flat_map(|r| [r.first, r.last, r.first.saturating_sub(1), r.last]);
        for port in probes.into_iter().chain(edges).filter(|port| *port > 0) {
            let by_number = list.named.iter().find(|mapping| mapping.ports.contains(port));
            let leads_to = match by_number {
                _ if list.exclude.iter().any(|range| range.contains(port)) => None,
                Some(mapping) => Some(mapping.to + (port - mapping.ports.first)),
                None => (list.all.is_some() && !DEFAULT_EPHEMERAL.contains(port)).then_some(port),
            };
            let found: Vec<&Rule> = rules.iter().filter(|rule| rule.mapping.ports.contains(port)).collect();
            prop_assert!(found.len() <= 1, "{}: {} is in several rules", spec, port);
            prop_assert_eq!(found.first().map(|rule| rule.leads_to(port)), leads_to, "{}: {}", spec, port);
            for rule in found {
                prop_assert_eq!(rule.leading_to(rule.leads_to(port)), Some(port));
            }
        }
        Ok(())
    };
    runner().run(&(spec(), proptest::collection::vec(any::<u16>(), 1..20)), check).unwrap();
}

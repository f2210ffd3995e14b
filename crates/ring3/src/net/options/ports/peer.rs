//! The grammar beside that of passt 0.0~git20261002, as observed: what it listens on when it is given a value with `-t`
//! on a host with both families, and may listen on every port; and where ours differs, why.

use super::*;

/// What the peer makes of a value.
#[derive(Clone, Copy)]
enum Peer {
    Refuses,
    /// It listens on these at once: what is forwarded as long as it is bound (`auto`) is not among them.
    Listens(&'static str),
}

/// What ours makes of it.
#[derive(Clone, Copy)]
enum Ours {
    Same,
    /// We refuse it, with these words.
    Refuses(&'static str),
    /// We listen on these.
    Listens(&'static str),
}

use Ours::Same;
use Peer::{Listens, Refuses};

/// Not a port forwarded: the value had no effect.
const NOTHING: Ours = Ours::Refuses("no port is left");
/// `all` takes what is left beside ports that are named. The peer's manual has it so, too; the peer listens on those
/// that are named alone.
const AND_ALL: Ours = Ours::Listens("1-32767 61000-65535");
/// The peer asks for `0.0.0.0/`; what leads to an IPv4 address is listened for by IPv4 alone.
const BY_IPV4: Ours = Ours::Listens("22");
/// Likewise.
const ALL_BY_IPV4: Ours = Ours::Listens("1-32767 61000-65535");
/// Likewise `::/`.
const BY_IPV6: Ours = Ours::Listens("22");
/// The peer reads numbers as strtoul(3) does.
const NO_NUMBER: Ours = Ours::Refuses("is not a port");

const VALUES: &[(&str, Peer, Ours)] = &[
    ("none", Listens(""), Same),
    ("22", Listens("22"), Same),
    ("022", Listens("22"), Same),
    ("+22", Listens("22"), NO_NUMBER),
    (" 22", Listens("22"), NO_NUMBER),
    ("22 ", Refuses, Same),
    ("0x16", Refuses, Same),
    ("ssh", Refuses, Same),
    ("0", Refuses, Same),
    ("0-10", Refuses, Same),
    ("65535", Listens("65535"), Same),
    ("65536", Refuses, Same),
    ("99999999999", Refuses, Same),
    ("-22", Refuses, Same),
    ("22-", Refuses, Same),
    ("80-22", Refuses, Same),
    ("22-80", Listens("22-80"), Same),
    ("60990-61010", Listens("60990-61010"), Same),
    ("22,25", Listens("22 25"), Same),
    ("22,", Refuses, Same),
    (",22", Refuses, Same),
    ("22,,23", Refuses, Same),
    ("22;23", Refuses, Same),
    ("22/tcp", Refuses, Same),
    // Others, and elsewhere.
    ("22:23", Listens("22"), Same),
    ("22-80:32-90", Listens("22-80"), Same),
    ("65530-65535:1-6", Listens("65530-65535"), Same),
    ("22-80:32", Refuses, Same),
    ("22-80:32-91", Refuses, Same),
    ("22:0", Refuses, Same),
    ("22:65536", Refuses, Same),
    ("22:", Refuses, Same),
    (":22", Refuses, Same),
    ("22:localhost", Refuses, Same),
    ("127.0.0.1/22:192.0.2.5/80", Listens("22"), Same),
    ("0.0.0.0/22:192.0.2.5", Listens("22"), Same),
    ("0.0.0.0/22:192.0.2.5/", Refuses, Same),
    ("::/22:2001:db8::5", Listens("22"), Same),
    ("[::]/22:[2001:db8::5]/80", Listens("22"), Same),
    ("22:192.0.2.5", Refuses, BY_IPV4),
    ("22:192.0.2.5/80", Refuses, BY_IPV4),
    ("22:2001:db8::5", Refuses, BY_IPV6),
    ("22:[2001:db8::5]/80", Refuses, BY_IPV6),
    ("22-23:192.0.2.5/80", Refuses, Same),
    // Where is listened.
    ("127.0.0.1/22", Listens("22"), Same),
    ("127.0.0.1/22,23", Listens("22-23"), Same),
    ("127.0.0.1%lo/22", Listens("22"), Same),
    ("%eth0/22", Listens("22"), Same),
    ("%eth0/22,~23", Listens("22"), Same),
    ("::1/22", Listens("22"), Same),
    ("[::1]/22", Listens("22"), Same),
    ("22:2001:db8::5/80", Listens("80"), Same),
    ("/22", Listens("22"), Ours::Refuses("'' is not an address")),
    ("%/22", Refuses, Same),
    ("%verylonginterfacename/22", Refuses, Same),
    ("localhost/22", Refuses, Same),
    ("127.0.0.1/", Refuses, Same),
    ("127.0.0.1/none", Refuses, Same),
    ("22,127.0.0.1/23", Refuses, Same),
    ("127.0.0.1/22,127.0.0.1/23", Refuses, Same),
    // What is not.
    ("2000-2020,~2010-2012", Listens("2000-2009 2013-2020"), Same),
    ("22-30,~20-24,~28-40", Listens("25-27"), Same),
    ("1-10,~5,~6,~1", Listens("2-4 7-10"), Same),
    ("22,~23", Listens("22"), Same),
    ("22,~22", Listens(""), NOTHING),
    ("~22,22", Listens(""), NOTHING),
    ("~1-65535", Listens(""), NOTHING),
    ("all,~1-65535", Listens(""), NOTHING),
    ("~1-60990", Listens("61000-65535"), Same),
    ("~1-60990,~61000-65530", Listens("65531-65535"), Same),
    ("~", Refuses, Same),
    ("~22:23", Refuses, Same),
    ("~22/23", Refuses, Same),
    ("~all", Refuses, Same),
    ("~auto", Refuses, Same),
    // All.
    ("all", Listens("1-32767 61000-65535"), Same),
    ("all,all", Listens("1-32767 61000-65535"), Same),
    ("all,~1-60990,~61000-65530", Listens("65531-65535"), Same),
    ("::1/all,~1-65530", Listens("65531-65535"), Same),
    ("0.0.0.0/all:192.0.2.5,~1-65530", Listens("65531-65535"), Same),
    ("all:192.0.2.5", Refuses, ALL_BY_IPV4),
    ("all,2222", Listens("2222"), AND_ALL),
    ("2222,all", Listens("2222"), AND_ALL),
    ("all,2222:80", Listens("2222"), AND_ALL),
    ("all:192.0.2.5,2222", Listens("2222"), AND_ALL),
    ("all,40000", Listens("40000"), Ours::Listens("1-32767 40000 61000-65535")),
    ("2222,~2222,all", Listens(""), Ours::Listens("1-2221 2223-32767 61000-65535")),
    ("all,~1-60990,2222", Listens(""), Ours::Listens("61000-65535")),
    ("ALL", Refuses, Same),
    ("all:22", Refuses, Same),
    ("all:80-90", Refuses, Same),
    ("all-22", Refuses, Same),
    ("1-all", Refuses, Same),
    ("22:all", Refuses, Same),
    ("all/22", Refuses, Same),
    // As long as it is bound.
    ("auto", Listens(""), Same),
    ("auto,auto", Listens(""), Same),
    ("22,auto", Listens(""), Same),
    ("auto,22", Listens(""), Same),
    ("22-23,auto,24", Listens(""), Same),
    ("all,auto", Listens(""), Same),
    ("auto,all,22", Listens(""), Same),
    ("~22,auto", Listens(""), Same),
    ("22-30,~25,auto", Listens(""), Same),
    ("127.0.0.1/auto", Listens(""), Same),
    ("22,auto,~22", Listens(""), NOTHING),
    ("Auto", Refuses, Same),
    ("auto:22", Refuses, Same),
    ("auto:192.0.2.5", Refuses, Same),
    ("auto/22", Refuses, Same),
    ("22:auto", Refuses, Same),
    // Nothing, and twice.
    ("none,none", Refuses, Same),
    ("none,22", Refuses, Same),
    ("22,none", Refuses, Same),
    ("none,auto", Refuses, Same),
    ("22,22", Refuses, Same),
    ("22,22:23", Refuses, Same),
    ("22-30,25", Refuses, Same),
    ("22-30,28-40:50-62", Refuses, Same),
    ("1000-2000,1500:80", Refuses, Same),
    ("1000-2000,~1500,1500:80", Listens("1000-1499 1501-2000"), Same),
];

/// What is listened on at once.
fn listens(value: &str) -> Result<String, BadPorts> {
    let rules = PortTable::new(vec![value.parse()?])?.rules(DEFAULT_EPHEMERAL);
    let mut ranges: Vec<PortRange> =
        rules.iter().filter(|rule| !rule.auto).map(|rule| rule.mapping.ports).collect();
    ranges.sort_by_key(|range| range.first);
    let mut joined: Vec<PortRange> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.first <= last.last.saturating_add(1) => last.last = last.last.max(range.last),
            _ => joined.push(range),
        }
    }
    Ok(joined.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "))
}

#[test]
fn values_mean_what_they_mean_to_the_peer() {
    for &(value, peer, ours) in VALUES {
        let found = listens(value);
        match (ours, peer) {
            (Same, Refuses) => assert!(found.is_err(), "'{value}': {found:?}"),
            (Same, Listens(ports)) | (Ours::Listens(ports), _) => {
                assert_eq!(found, Ok(ports.to_owned()), "'{value}'");
            }
            (Ours::Refuses(words), _) => {
                let error = found.unwrap_err().to_string();
                assert!(error.contains(words), "'{value}': {error}");
            }
        }
    }
}

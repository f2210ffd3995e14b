//! The grammar of forwarded ports (`-t`, `-u`, `-T`, `-U`), and the rules that follow from it.
//!
//! One option's value is a [`PortSpec`]:
//!
//! ```text
//! SPEC   = none | [LISTEN/]ITEM[,ITEM...]
//! LISTEN = ADDRESS | ADDRESS%INTERFACE | %INTERFACE
//! ITEM   = FIRST[-LAST]                                  the same ports on the other side
//!        | FIRST[-LAST]:TOFIRST[-TOLAST]                 others, as many
//!        | FIRST[-LAST]:TOADDRESS[/TOFIRST[-TOLAST]]     at an address of the other side's
//!        | ~FIRST[-LAST]                                 not these
//!        | all[:TOADDRESS]                               all that are not ephemeral
//!        | auto                                          only while something listens on the other side
//! ```
//!
//! - Exclusions win over whatever else the same value says. A value that says only what to exclude, or only
//!   `auto`, means `all` besides.
//! - What is asked for by number must work. `all` takes what it can get, and what is left: ports that are named, in the same
//!   value or in another, are theirs.
//! - Several options accumulate ([`PortTable`]), and `none` may come before them, but not after.
//!
//! [`PortTable::rules`] turns a table into [`Rule`]s: ranges that do not overlap, each with one meaning.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use usernet::config::{Forward, Transport};

/// The kernel's own choice of ephemeral ports (ip(7), `ip_local_port_range`).
pub const DEFAULT_EPHEMERAL: PortRange = PortRange { first: 32768, last: 60999 };

/// Every port that there is.
const ALL: PortRange = PortRange { first: 1, last: u16::MAX };

/// Longest name of an interface (IFNAMSIZ, without the end).
const LONGEST_INTERFACE: usize = 15;

/// Ports from one to another, both included.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct PortRange {
    /// The first of them, never 0.
    pub first: u16,
    /// The last of them, never below the first.
    pub last: u16,
}

impl PortRange {
    /// A single port.
    #[must_use]
    pub const fn one(port: u16) -> Self {
        Self { first: port, last: port }
    }

    /// Whether `port` is one of them.
    #[must_use]
    pub const fn contains(self, port: u16) -> bool {
        self.first <= port && port <= self.last
    }

    /// The ports in order.
    pub fn ports(self) -> impl Iterator<Item = u16> {
        self.first..=self.last
    }

    fn overlap(self, other: Self) -> Option<Self> {
        let (first, last) = (self.first.max(other.first), self.last.min(other.last));
        (first <= last).then_some(Self { first, last })
    }

    /// How far the last port is from the first.
    const fn span(self) -> u16 {
        self.last - self.first
    }

    /// What is left of these ports without `other`: what is below it, and what is above.
    fn without(self, other: Self) -> impl Iterator<Item = Self> {
        let (below, above) = match self.overlap(other) {
            None => (Some(self), None),
            Some(hole) => (
                (self.first < hole.first).then(|| Self { first: self.first, last: hole.first - 1 }),
                (hole.last < self.last).then(|| Self { first: hole.last + 1, last: self.last }),
            ),
        };
        below.into_iter().chain(above)
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.first)?;
        if self.first == self.last { Ok(()) } else { write!(f, "-{}", self.last) }
    }
}

/// Where is listened.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Listen {
    /// At this address; at every one of both families if `None`.
    pub address: Option<IpAddr>,
    /// By this interface alone (`SO_BINDTODEVICE`, without privileges since Linux 5.7).
    pub interface: Option<String>,
}

impl Listen {
    /// Whether a socket of the one could be in the way of a socket of the other.
    fn meets(&self, other: &Self) -> bool {
        let interfaces = match (&self.interface, &other.interface) {
            (Some(one), Some(other)) => one == other,
            _ => true,
        };
        let addresses = match (self.address, other.address) {
            (Some(one), Some(other)) if one.is_unspecified() || other.is_unspecified() => {
                // "Any" of IPv6 is any of IPv4 too.
                one.is_ipv4() == other.is_ipv4()
                    || one == Ipv6Addr::UNSPECIFIED
                    || other == Ipv6Addr::UNSPECIFIED
            }
            (Some(one), Some(other)) => one == other,
            _ => true,
        };
        interfaces && addresses
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(address) = self.address {
            write!(f, "{address}")?;
        }
        if let Some(interface) = &self.interface {
            write!(f, "%{interface}")?;
        }
        if *self == Self::default() { Ok(()) } else { f.write_str("/") }
    }
}

/// A range of ports and what it leads to.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Mapping {
    /// The ports that are listened on.
    pub ports: PortRange,
    /// What the first of them leads to; the others follow in order.
    pub to: u16,
    /// The other side's address; that side's own if `None`.
    pub to_address: Option<IpAddr>,
}

impl fmt::Display for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.ports)?;
        let to = PortRange { first: self.to, last: self.to.saturating_add(self.ports.span()) };
        match self.to_address {
            None if self.to == self.ports.first => Ok(()),
            None => write!(f, ":{to}"),
            Some(address) => {
                write!(f, ":{}", Target(address))?;
                if self.to == self.ports.first { Ok(()) } else { write!(f, "/{to}") }
            }
        }
    }
}

/// An address to lead to. `5000:dead::1/80` begins with what is an address as a whole, and so the brackets.
struct Target(IpAddr);

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            IpAddr::V4(address) => write!(f, "{address}"),
            IpAddr::V6(address) => write!(f, "[{address}]"),
        }
    }
}

/// All ports that are not ephemeral, as many as can be had.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct AllPorts {
    /// The other side's address that they lead to; that side's own if `None`.
    pub to_address: Option<IpAddr>,
}

/// Ports of one value: `all`, or some that are named, or both.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct PortList {
    /// Where is listened.
    pub listen: Listen,
    /// `all`, if that is said or follows.
    pub all: Option<AllPorts>,
    /// Those that are named.
    pub named: Vec<Mapping>,
    /// Which are not forwarded, whatever the rest says.
    pub exclude: Vec<PortRange>,
    /// Whether each is forwarded only while something listens on the port that it leads to.
    pub auto: bool,
}

/// The value of one option.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum PortSpec {
    /// `none`.
    None,
    /// Anything else.
    Ports(PortList),
}

impl PortSpec {
    /// The value `auto`: what is bound on the other side, as long as it is.
    #[must_use]
    pub fn auto() -> Self {
        let all = Some(AllPorts { to_address: None });
        let (named, exclude) = (Vec::new(), Vec::new());
        Self::Ports(PortList { listen: Listen::default(), all, named, exclude, auto: true })
    }
}

impl fmt::Display for PortSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::Ports(list) = self else { return f.write_str("none") };
        let mut items: Vec<String> = match list.all {
            // Said by the rest, unless there is none.
            Some(AllPorts { to_address: None })
                if list.named.is_empty() && (list.auto || !list.exclude.is_empty()) =>
            {
                Vec::new()
            }
            Some(AllPorts { to_address: None }) => vec!["all".to_owned()],
            Some(AllPorts { to_address: Some(address) }) => vec![format!("all:{}", Target(address))],
            None => Vec::new(),
        };
        items.extend(list.named.iter().map(ToString::to_string));
        items.extend(list.exclude.iter().map(|range| format!("~{range}")));
        if list.auto {
            items.push("auto".to_owned());
        }
        write!(f, "{}{}", list.listen, items.join(","))
    }
}

/// Why a value is no [`PortSpec`], or cannot stand beside others.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadPorts {
    /// Nothing where a port, range or word must be.
    #[error("an item is empty: give a port, a range as in 22-80, ~RANGE, all or auto")]
    Empty,
    /// Neither a port nor a word.
    #[error("'{0}' is not a port: give a number from 1 to 65535, or a range as in 22-80")]
    NotAPort(String),
    /// A range backwards.
    #[error("the range {0} ends before it begins")]
    Backwards(String),
    /// Ranges of unequal length.
    #[error("{from} are {} ports, but {to} are {}: both ranges need the same length", count(.from), count(.to))]
    Unequal {
        /// The ports that are listened on.
        from: PortRange,
        /// The ports that they should lead to.
        to: PortRange,
    },
    /// Something that is neither an address nor ports after the colon.
    #[error("'{0}' is neither an address nor a port: what follows the colon is where the ports lead to")]
    NotATarget(String),
    /// Not an interface.
    #[error("'{0}' cannot be the name of an interface: those have 1 to 15 bytes, and no / : or white space")]
    NotAnInterface(String),
    /// Not an address before the slash.
    #[error(
        "'{0}' is not an address: what stands before the slash is where is listened, as in 192.0.2.1%eth0/22"
    )]
    NotAnAddress(String),
    /// `none` is not alone.
    #[error("'none' means no port at all, and so cannot stand beside '{0}'")]
    NoneAndMore(String),
    /// `all` with two targets.
    #[error("'all' leads to two places in '{0}': give one, or ports by their numbers")]
    AllTwice(String),
    /// An exclusion with a target.
    #[error("'~{0}' leads nowhere: what is excluded cannot have a target")]
    ExcludedTarget(String),
    /// One port, two meanings.
    #[error("port {0} is forwarded twice: by '{1}' and by '{2}'")]
    Twice(PortRange, String, String),
    /// Everything is excluded.
    #[error("'{0}' excludes all that it includes: no port is left")]
    NothingLeft(String),
}

fn count(range: &PortRange) -> u32 {
    u32::from(range.span()) + 1
}

impl FromStr for PortSpec {
    type Err = BadPorts;

    fn from_str(text: &str) -> Result<Self, BadPorts> {
        if text == "none" {
            return Ok(Self::None);
        }
        let (listen, items) = split_listen(text)?;
        let (named, exclude) = (Vec::new(), Vec::new());
        let mut list = PortList { listen, all: None, named, exclude, auto: false };
        for item in items.split(',') {
            if item == "auto" {
                list.auto = true;
            } else if item == "none" {
                return Err(BadPorts::NoneAndMore(text.to_owned()));
            } else if let Some(to) =
                item.strip_prefix("all").filter(|to| to.is_empty() || to.starts_with(':'))
            {
                let bad = || BadPorts::NotATarget(to.trim_start_matches(':').to_owned());
                let to_address =
                    to.strip_prefix(':').map(|to| parse_address(to).ok_or_else(bad)).transpose()?;
                let all = AllPorts { to_address };
                if list.all.is_some_and(|other| other != all) {
                    return Err(BadPorts::AllTwice(text.to_owned()));
                }
                list.all = Some(all);
            } else if let Some(excluded) = item.strip_prefix('~') {
                if excluded.contains(':') {
                    return Err(BadPorts::ExcludedTarget(excluded.to_owned()));
                }
                list.exclude.push(parse_range(excluded)?);
            } else {
                list.named.push(item.parse()?);
            }
        }
        if list.named.is_empty() {
            list.all.get_or_insert(AllPorts { to_address: None });
        }
        Ok(Self::Ports(list))
    }
}

impl FromStr for Mapping {
    type Err = BadPorts;

    fn from_str(item: &str) -> Result<Self, BadPorts> {
        let Some((from, target)) = item.split_once(':') else {
            let ports = parse_range(item)?;
            return Ok(Self { ports, to: ports.first, to_address: None });
        };
        let ports = parse_range(from)?;
        let (to_address, to) = match target.split_once('/') {
            Some((address, to)) => {
                let bad = || BadPorts::NotATarget(target.to_owned());
                (Some(parse_address(address).ok_or_else(bad)?), Some(parse_range(to)?))
            }
            None => match parse_address(target) {
                Some(address) => (Some(address), None),
                None if target.starts_with(|c: char| c.is_ascii_digit()) && !target.contains(['.', ':']) => {
                    (None, Some(parse_range(target)?))
                }
                None => return Err(BadPorts::NotATarget(target.to_owned())),
            },
        };
        let to = to.unwrap_or(ports);
        if to.span() != ports.span() {
            return Err(BadPorts::Unequal { from: ports, to });
        }
        Ok(Self { ports, to: to.first, to_address })
    }
}

/// Takes off where is listened. Only what is an address as a whole, or has an interface, is that: other slashes belong
/// to targets.
fn split_listen(text: &str) -> Result<(Listen, &str), BadPorts> {
    let Some((before, after)) = text.split_once('/') else { return Ok((Listen::default(), text)) };
    let (address, interface) = match before.split_once('%') {
        Some((address, interface)) => (address, Some(interface)),
        None => (before, None),
    };
    let parsed = parse_address(address);
    if parsed.is_none() && interface.is_none() && before.contains([':', ',']) {
        return Ok((Listen::default(), text));
    }
    if parsed.is_none() && !(address.is_empty() && interface.is_some()) {
        return Err(BadPorts::NotAnAddress(before.to_owned()));
    }
    let interface = interface.map(parse_interface).transpose()?;
    Ok((Listen { address: parsed, interface }, after))
}

/// An IP address, of which IPv6's may stand in brackets.
fn parse_address(text: &str) -> Option<IpAddr> {
    match text.strip_prefix('[').and_then(|text| text.strip_suffix(']')) {
        Some(inner) => inner.parse().ok().map(IpAddr::V6),
        None => text.parse().ok(),
    }
}

/// The name of an interface, as the kernel would take it (`dev_valid_name`).
///
/// # Errors
/// It would not.
pub fn parse_interface(text: &str) -> Result<String, BadPorts> {
    let bad = text.is_empty()
        || text.len() > LONGEST_INTERFACE
        || text == "."
        || text == ".."
        || text.contains(|c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control());
    if bad { Err(BadPorts::NotAnInterface(text.to_owned())) } else { Ok(text.to_owned()) }
}

fn parse_range(text: &str) -> Result<PortRange, BadPorts> {
    let port = |word: &str| match word.parse() {
        Ok(port) if port > 0 && word.bytes().all(|b| b.is_ascii_digit()) => Ok(port),
        _ => Err(BadPorts::NotAPort(word.to_owned())),
    };
    if text.is_empty() {
        return Err(BadPorts::Empty);
    }
    let (first, last) = match text.split_once('-') {
        Some((first, last)) => (port(first)?, port(last)?),
        None => (port(text)?, port(text)?),
    };
    if first > last { Err(BadPorts::Backwards(text.to_owned())) } else { Ok(PortRange { first, last }) }
}

/// The ports from which the kernel takes those that nobody chose (ip(7)).
#[must_use]
pub fn ephemeral_ports() -> PortRange {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let mut words = text.split_whitespace().map(str::parse);
    match (words.next(), words.next()) {
        (Some(Ok(first)), Some(Ok(last))) if first <= last => PortRange { first, last },
        _ => DEFAULT_EPHEMERAL,
    }
}

/// Ports that are forwarded alike.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Rule {
    /// Where is listened.
    pub listen: Listen,
    /// Which ports, and where they lead to.
    pub mapping: Mapping,
    /// Whether each is forwarded only while something listens on the port that it leads to.
    pub auto: bool,
    /// Whether it does not matter if some of the ports cannot be had, as long as others can.
    pub best_effort: bool,
}

impl Rule {
    /// The forward of `port`, one of the rule's. Without an address it listens on all of IPv6's and IPv4's; on IPv4's alone
    /// if it leads to an IPv4 address, or without `v6`.
    #[must_use]
    pub fn forward(&self, transport: Transport, port: u16, v6: bool) -> Forward {
        let v6 = v6 && !self.mapping.to_address.is_some_and(|address| address.is_ipv4());
        let any = if v6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
        let listen = SocketAddr::new(self.listen.address.unwrap_or(any), port);
        Forward {
            interface: self.listen.interface.clone(),
            guest_address: self.mapping.to_address,
            ..Forward::new(transport, listen, self.leads_to(port))
        }
    }

    /// What `port`, one of the rule's, leads to.
    #[must_use]
    pub fn leads_to(&self, port: u16) -> u16 {
        // Both ranges have the same length, so this does not overflow.
        self.mapping.to.saturating_add(port.saturating_sub(self.mapping.ports.first))
    }

    /// The port of the rule's that leads to `target`, if one does.
    #[must_use]
    pub fn leading_to(&self, target: u16) -> Option<u16> {
        let port = self.mapping.ports.first.checked_add(target.checked_sub(self.mapping.to)?)?;
        self.mapping.ports.contains(port).then_some(port)
    }

    /// The rule for a part of its ports.
    fn narrowed(&self, ports: PortRange) -> Self {
        let mapping = Mapping { ports, to: self.leads_to(ports.first), ..self.mapping };
        Self { mapping, ..self.clone() }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let auto = if self.auto { ",auto" } else { "" };
        write!(f, "{}{}{auto}", self.listen, self.mapping)
    }
}

/// The values of all options of one kind.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PortTable {
    specs: Vec<PortSpec>,
}

impl PortTable {
    /// A table of values in the order in which they were given. `none` before ports turns off the default, no more.
    ///
    /// # Errors
    /// `none` comes after ports, or one port has two meanings.
    pub fn new(mut specs: Vec<PortSpec>) -> Result<Self, BadPorts> {
        if let Some(first) = specs.iter().position(|spec| *spec != PortSpec::None) {
            specs.drain(..first);
        }
        if specs.contains(&PortSpec::None)
            && let Some(other) = specs.iter().find(|spec| **spec != PortSpec::None)
        {
            return Err(BadPorts::NoneAndMore(other.to_string()));
        }
        let table = Self { specs };
        table.check()?;
        Ok(table)
    }

    /// The values.
    #[must_use]
    pub fn specs(&self) -> &[PortSpec] {
        &self.specs
    }

    /// What follows: rules that do not overlap where they listen, those for named ports first.
    #[must_use]
    pub fn rules(&self, ephemeral: PortRange) -> Vec<Rule> {
        // Those were checked not to meet.
        let mut rules: Vec<Rule> = self.lists().flat_map(PortList::named_rules).collect();
        for rule in self.lists().flat_map(|list| list.all_rules(ephemeral)) {
            let mut left = vec![rule.mapping.ports];
            for other in rules.iter().filter(|other| other.listen.meets(&rule.listen)) {
                left = left.into_iter().flat_map(|range| range.without(other.mapping.ports)).collect();
            }
            rules.extend(left.into_iter().map(|range| rule.narrowed(range)));
        }
        rules
    }

    fn lists(&self) -> impl Iterator<Item = &PortList> {
        self.specs.iter().filter_map(|spec| if let PortSpec::Ports(list) = spec { Some(list) } else { None })
    }

    fn check(&self) -> Result<(), BadPorts> {
        let mut named: Vec<Rule> = Vec::new();
        for spec in &self.specs {
            let PortSpec::Ports(list) = spec else { continue };
            let rules = list.named_rules();
            if rules.is_empty() && list.all_rules(DEFAULT_EPHEMERAL).is_empty() {
                return Err(BadPorts::NothingLeft(spec.to_string()));
            }
            for rule in rules {
                for other in named.iter().filter(|other| other.listen.meets(&rule.listen)) {
                    if let Some(both) = other.mapping.ports.overlap(rule.mapping.ports) {
                        return Err(BadPorts::Twice(both, other.to_string(), rule.to_string()));
                    }
                }
                named.push(rule);
            }
        }
        Ok(())
    }
}

impl PortList {
    /// The rules for ports that are named.
    fn named_rules(&self) -> Vec<Rule> {
        self.named.iter().flat_map(|mapping| self.rules(*mapping, false)).collect()
    }

    /// The rules for `all`, if that is said.
    fn all_rules(&self, ephemeral: PortRange) -> Vec<Rule> {
        let Some(AllPorts { to_address }) = self.all else { return Vec::new() };
        let mapping = |ports: PortRange| Mapping { ports, to: ports.first, to_address };
        ALL.without(ephemeral).flat_map(|ports| self.rules(mapping(ports), true)).collect()
    }

    /// What is left of a mapping without the ports that are excluded.
    fn rules(&self, mapping: Mapping, best_effort: bool) -> Vec<Rule> {
        let rule = Rule { listen: self.listen.clone(), mapping, auto: self.auto, best_effort };
        let mut left = vec![mapping.ports];
        for excluded in &self.exclude {
            left = left.into_iter().flat_map(|range| range.without(*excluded)).collect();
        }
        left.into_iter().map(|range| rule.narrowed(range)).collect()
    }
}

#[cfg(test)]
mod peer;
#[cfg(test)]
mod tests;

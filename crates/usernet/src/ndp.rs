//! Neighbour discovery (RFC 4861): the guest's router, its prefix, and its neighbours, which are all the router.
//!
//! Solicitations for anything but the guest's own addresses are answered with the gateway's Ethernet address, as
//! ARP is in IPv4. Duplicate address detection (RFC 4862 5.4: the source is unspecified) is not, except for the gateway's
//! own addresses.
//!
//! Router advertisements carry the MTU, the prefix, from which the guest may make itself an address, resolvers
//! (RDNSS) and search domains (DNSSL, both RFC 8106). They are sent when the guest asks, once it is first heard of, and
//! then every few minutes. When its network changes it is told at once: first that what was advertised is not so any
//! more, then what is.

use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

use crate::config::{Config, Family, Services};
use crate::context::Context;
use crate::frame::ON_LINK;
use crate::packet::{Addresses, IcmpView};

pub(crate) const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
pub(crate) const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;

/// All nodes of the link.
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// Between two advertisements: within the limits of RFC 4861 6.2.1, where 600 s are the default maximum.
const ADVERTISEMENT_INTERVAL: Duration = Duration::from_secs(300);

/// A router for good: the longest lifetime (RFC 8319 4).
const ROUTER_LIFETIME: u16 = 65535;

/// Resolvers and search domains are valid for three intervals (RFC 8106 5.1).
const DNS_LIFETIME: u32 = 900;

/// How long a prefix is valid, and addresses from it are preferred: until the guest is told otherwise.
const FOREVER: (u32, u32) = (u32::MAX, u32::MAX);

/// And of a prefix that is another now. No advertisement ends an address earlier than after two hours (RFC 4862 5.5.3 e).
const DEPRECATED: (u32, u32) = (7200, 0);

/// The prefix of autoconfiguration, which has no other length on Ethernet (RFC 2464 4).
const PREFIX_LENGTH: u8 = 64;

/// When the guest is told next without having asked.
#[derive(Debug, Default)]
pub(crate) struct Ndp {
    /// Whether there is somebody to tell.
    heard: bool,
    next: Option<Instant>,
    /// What was advertised and is not so any more.
    farewell: Option<Advertisement>,
}

impl Ndp {
    /// The guest was heard of.
    pub(crate) fn guest_is_there(&mut self, cx: &Context<'_>) {
        let Services { ndp, ra, .. } = cx.config.services;
        self.heard = true;
        if self.next.is_none() && ndp && ra && cx.config.ipv6.is_some() {
            self.next = Some(cx.now);
        }
    }

    /// The guest's network is another.
    pub(crate) fn reconfigured(&mut self, old: &Config, new: &Config, now: Instant) {
        let Services { ndp, ra, .. } = new.services;
        if !(self.heard && ndp && ra) {
            return;
        }
        self.farewell = Advertisement::of(old).and_then(|old| old.without(Advertisement::of(new).as_ref()));
        self.next = new.ipv6.map(|_| now);
    }

    /// Advertises when it is time, and says when it is again.
    pub(crate) fn timers(&mut self, cx: &mut Context<'_>) -> Option<Instant> {
        if let Some(farewell) = self.farewell.take() {
            farewell.send(cx, ALL_NODES);
        }
        if self.next? <= cx.now {
            advertise(cx, ALL_NODES);
            self.next = Some(cx.now + ADVERTISEMENT_INTERVAL);
        }
        self.next
    }
}

/// Handles a solicitation.
pub(crate) fn packet(cx: &mut Context<'_>, message: &IcmpView<'_>) {
    let Addresses::V6 { source, .. } = message.ip.addresses else { return };
    // RFC 4861 6.1.1 and 7.1.1.
    if message.ip.hop_limit != ON_LINK || message.code != 0 || !cx.config.services.ndp {
        return;
    }
    match message.kind {
        ROUTER_SOLICITATION if cx.config.services.ra => {
            advertise(cx, if source.is_unspecified() { ALL_NODES } else { source });
        }
        NEIGHBOUR_SOLICITATION => {
            if let Some(target) = message.payload.first_chunk::<16>() {
                solicitation(cx, source, Ipv6Addr::from(*target));
            }
        }
        _ => {}
    }
}

fn solicitation(cx: &mut Context<'_>, source: Ipv6Addr, target: Ipv6Addr) {
    let Some(family) = cx.config.ipv6 else { return };
    let guests_own = target == source || target == family.guest || Some(target) == cx.link.guest_v6;
    let ours = [Some(family.gateway), family.host_loopback, family.host_global].contains(&Some(target))
        || target == link_local(&family);
    let may_be_guests = guests_own || source.is_unspecified();
    if target.is_multicast() || target.is_unspecified() || (may_be_guests && !ours) {
        return;
    }
    const ROUTER: u8 = 0x80;
    const SOLICITED: u8 = 0x40;
    const OVERRIDE: u8 = 0x20;
    let (to, flags) = if source.is_unspecified() {
        (ALL_NODES, ROUTER | OVERRIDE)
    } else {
        (source, ROUTER | SOLICITED | OVERRIDE)
    };
    let mut answer = target.octets().to_vec();
    // The target's link-layer address.
    answer.extend([2, 1]);
    answer.extend(cx.config.gateway_mac);
    let addresses = Addresses::V6 { source: target, destination: to };
    cx.send_icmp(addresses, ON_LINK, (NEIGHBOUR_ADVERTISEMENT, 0), [flags, 0, 0, 0], &answer);
}

/// The router's own address on the link: advertisements must come from a link-local one.
pub(crate) fn link_local(family: &Family<Ipv6Addr>) -> Ipv6Addr {
    if family.gateway.is_unicast_link_local() {
        family.gateway
    } else {
        Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1)
    }
}

fn advertise(cx: &mut Context<'_>, to: Ipv6Addr) {
    if let Some(advertisement) = Advertisement::of(cx.config) {
        advertisement.send(cx, to);
    }
}

/// What an advertisement says.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Advertisement {
    router: Ipv6Addr,
    /// How long it is one, in seconds.
    lifetime: u16,
    flags: u8,
    mtu: u16,
    /// A prefix, and for how many seconds it is valid and preferred.
    prefix: Option<(Ipv6Addr, (u32, u32))>,
    resolvers: Vec<Ipv6Addr>,
    search: Vec<String>,
    /// How long these two are valid, in seconds.
    dns_lifetime: u32,
}

impl Advertisement {
    /// Of the guest's network; `None` if it has no IPv6.
    fn of(config: &Config) -> Option<Self> {
        const MANAGED: u8 = 0x80;
        const OTHER: u8 = 0x40;
        let family = config.ipv6?;
        let prefix = family.guest.to_bits() & (u128::MAX << (128 - u32::from(PREFIX_LENGTH)));
        let v6 = |address: &IpAddr| if let IpAddr::V6(address) = address { Some(*address) } else { None };
        Some(Self {
            router: link_local(&family),
            lifetime: ROUTER_LIFETIME,
            flags: if config.services.dhcpv6 { MANAGED | OTHER } else { 0 },
            mtu: config.mtu,
            prefix: Some((Ipv6Addr::from_bits(prefix), FOREVER)),
            resolvers: config.dns.iter().filter_map(v6).collect(),
            search: config.search.clone(),
            dns_lifetime: DNS_LIFETIME,
        })
    }

    /// That what is not in `new` is not so any more, if there is anything.
    fn without(mut self, new: Option<&Self>) -> Option<Self> {
        let old = self.clone();
        if new.is_none_or(|new| new.router != self.router) {
            self.lifetime = 0;
        }
        self.prefix = self.prefix.filter(|_| new.is_none_or(|new| new.prefix != old.prefix));
        self.prefix = self.prefix.map(|(prefix, _)| (prefix, DEPRECATED));
        self.resolvers.retain(|resolver| new.is_none_or(|new| !new.resolvers.contains(resolver)));
        self.search.retain(|domain| new.is_none_or(|new| !new.search.contains(domain)));
        self.dns_lifetime = 0;
        let empty = self.prefix.is_none() && self.resolvers.is_empty() && self.search.is_empty();
        (self.lifetime == 0 || !empty).then_some(self)
    }

    fn send(&self, cx: &mut Context<'_>, to: Ipv6Addr) {
        const HOPS: u8 = 64;
        let [a, b] = self.lifetime.to_be_bytes();
        // Reachable time and retransmission timer: not ours to say.
        let mut body = vec![0; 8];
        // Our link-layer address.
        body.extend([1, 1]);
        body.extend(cx.config.gateway_mac);
        if self.mtu != 0 {
            body.extend([5, 1, 0, 0]);
            body.extend(u32::from(self.mtu).to_be_bytes());
        }
        if let Some((prefix, lifetimes)) = self.prefix {
            prefix_option(&mut body, prefix, lifetimes);
        }
        resolver_option(&mut body, &self.resolvers, self.dns_lifetime);
        search_option(&mut body, &self.search, self.dns_lifetime);
        let addresses = Addresses::V6 { source: self.router, destination: to };
        cx.send_icmp(addresses, ON_LINK, (ROUTER_ADVERTISEMENT, 0), [HOPS, self.flags, a, b], &body);
    }
}

fn prefix_option(body: &mut Vec<u8>, prefix: Ipv6Addr, (valid, preferred): (u32, u32)) {
    const ON_LINK_AND_AUTONOMOUS: u8 = 0xc0;
    body.extend([3, 4, PREFIX_LENGTH, ON_LINK_AND_AUTONOMOUS]);
    body.extend(valid.to_be_bytes());
    body.extend(preferred.to_be_bytes());
    body.extend([0; 4]);
    body.extend(prefix.octets());
}

/// RFC 8106 5.1.
fn resolver_option(body: &mut Vec<u8>, resolvers: &[Ipv6Addr], lifetime: u32) {
    // The option's length is one byte, in units of 8 bytes.
    const MOST: usize = 127;
    let resolvers = resolvers.get(..MOST).unwrap_or(resolvers);
    if resolvers.is_empty() {
        return;
    }
    body.extend([25, 1 + 2 * resolvers.len() as u8, 0, 0]);
    body.extend(lifetime.to_be_bytes());
    for resolver in resolvers {
        body.extend(resolver.octets());
    }
}

/// RFC 8106 5.2.
fn search_option(body: &mut Vec<u8>, domains: &[String], lifetime: u32) {
    // With the longest names, an advertisement stays below the least MTU.
    const MOST: usize = 768;
    let mut names = Vec::new();
    for domain in domains {
        if let Some(name) = encoded_name(domain)
            && names.len() + name.len() <= MOST
        {
            names.extend(name);
        }
    }
    if names.is_empty() {
        return;
    }
    names.resize(names.len().next_multiple_of(8), 0);
    body.extend([31, 1 + (names.len() / 8) as u8, 0, 0]);
    body.extend(lifetime.to_be_bytes());
    body.extend(names);
}

/// A domain name as on the wire (RFC 1035 3.1); `None` if it is none.
pub(crate) fn encoded_name(domain: &str) -> Option<Vec<u8>> {
    let mut name = Vec::with_capacity(domain.len() + 2);
    for label in domain.trim_end_matches('.').split('.') {
        if label.is_empty() || label.len() > 63 {
            return None;
        }
        name.push(label.len() as u8);
        name.extend(label.as_bytes());
    }
    name.push(0);
    (name.len() <= 255).then_some(name)
}

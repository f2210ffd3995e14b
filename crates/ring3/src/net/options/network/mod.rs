//! The guest's network: the host's as a template, changed by what the options say.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use usernet::config::{Family, MacAddress, Outbound, Services};
use usernet::{ALONE, ALONE_V6, Config, Template};

/// The least MTU of IPv6 (RFC 8200, 5).
const IPV6_MTU: u16 = 1280;

/// What the options say about the guest's network; `None` is the host's own.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Network {
    /// Whether the guest may have IPv4, and IPv6.
    pub families: [bool; 2],
    /// The interfaces that addresses and routes are taken from, by family; that of the default route if `None`.
    pub template: [Option<String>; 2],
    /// The guest's IPv4 address, and its prefix's length if that was said with it.
    pub address_v4: Option<(Ipv4Addr, Option<u8>)>,
    /// The guest's IPv6 address.
    pub address_v6: Option<Ipv6Addr>,
    /// The length of IPv4's prefix.
    pub netmask: Option<u8>,
    /// The gateway's IPv4 address.
    pub gateway_v4: Option<Ipv4Addr>,
    /// The gateway's IPv6 address.
    pub gateway_v6: Option<Ipv6Addr>,
    /// The gateway's Ethernet address.
    pub gateway_mac: MacAddress,
    /// The MTU, 0 to tell none.
    pub mtu: u16,
    /// Resolvers for the guest.
    pub dns: Option<Vec<IpAddr>>,
    /// Guest-side addresses that lead to a resolver of the host's: at most one per family.
    pub dns_forward: Vec<IpAddr>,
    /// Those resolvers: at most one per family.
    pub dns_host: Vec<IpAddr>,
    /// Search domains for the guest.
    pub search: Option<Vec<String>>,
    /// Whether resolvers are told to the guest.
    pub tell_dns: bool,
    /// Whether search domains are.
    pub tell_search: bool,
    /// Which addresses mean the host's loopback.
    pub host_loopback: HostLoopback,
    /// Which address means the host's own, by family.
    pub host_global_v4: Option<Ipv4Addr>,
    /// Likewise.
    pub host_global_v6: Option<Ipv6Addr>,
    /// The guest's name.
    pub hostname: Option<String>,
    /// The guest's fully qualified name.
    pub fqdn: Option<String>,
    /// What the guest is served.
    pub services: Services,
    /// Whether forwards may listen on addresses that the host does not have.
    pub freebind: bool,
    /// What outbound sockets are bound to.
    pub outbound: Outbound,
}

/// Which addresses mean the host's loopback to the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HostLoopback {
    /// IPv4's.
    pub v4: Option<Ipv4Addr>,
    /// IPv6's.
    pub v6: Option<Ipv6Addr>,
    /// Whether the gateway's does in a family for which none is named.
    pub gateway: bool,
}

impl Network {
    /// The part of the host's network that the guest takes after.
    #[must_use]
    pub fn template(&self) -> Template {
        let [ipv4, ipv6] = self.families;
        let [interface_v4, interface_v6] = self.template.clone();
        Template { ipv4, ipv6, interface_v4, interface_v6 }
    }

    /// Applies what the options say to a network after [`Self::template`].
    ///
    /// # Errors
    /// The options do not fit it: two things would have one address, or the MTU is too little.
    pub fn apply(&self, mut config: Config) -> io::Result<Config> {
        let had_gateway = config.services.dhcp;
        config.ipv4 = self.ipv4(config.ipv4);
        config.ipv6 = self.ipv6(config.ipv6);
        self.apply_names(&mut config);
        config.gateway_mac = self.gateway_mac;
        config.mtu = self.mtu;
        config.services = self.services;
        // Option 3 could not say that there is no router.
        config.services.dhcp &= had_gateway || self.gateway_v4.is_some();
        config.freebind = self.freebind;
        config.outbound = self.outbound.clone();
        check_distinct(config.ipv4.map(each_address))?;
        check_distinct(config.ipv6.map(each_address))?;
        self.check_reachable(&config)?;
        self.fit_mtu(&mut config)?;
        Ok(config)
    }

    /// What the guest sends to its own address it never sends.
    fn check_reachable(&self, config: &Config) -> io::Result<()> {
        let own = [config.ipv4.map(|f| IpAddr::V4(f.guest)), config.ipv6.map(|f| IpAddr::V6(f.guest))];
        match self.dns_forward.iter().find(|inside| own.contains(&Some(**inside))) {
            Some(inside) => {
                invalid(format!("{inside} cannot mean both the guest (--address) and --dns-forward"))
            }
            None => Ok(()),
        }
    }

    /// Leaves out IPv6 where packets are too short for it, as the guest's kernel does.
    fn fit_mtu(&self, config: &mut Config) -> io::Result<()> {
        let mtu = self.mtu;
        if config.ipv6.is_none() || mtu == 0 || mtu >= IPV6_MTU {
            return Ok(());
        }
        if config.ipv4.is_none() {
            return invalid(format!(
                "--mtu {mtu} is too little for IPv6, which needs {IPV6_MTU}, and there is no IPv4"
            ));
        }
        tracing::warn!("the guest has no IPv6: that needs an MTU of {IPV6_MTU}, and --mtu is {mtu}");
        config.ipv6 = None;
        Ok(())
    }

    fn ipv4(&self, host: Option<Family<Ipv4Addr>>) -> Option<Family<Ipv4Addr>> {
        let host_prefix = host.map(|family| family.prefix);
        let (guest, prefix) = match (self.address_v4, host) {
            (Some((address, prefix)), _) => {
                (address, prefix.or(self.netmask).unwrap_or_else(|| class_prefix(address)))
            }
            (None, Some(family)) => (family.guest, self.netmask.or(host_prefix)?),
            (None, None) => return None,
        };
        let gateway = self.gateway_v4.or(host.map(|family| family.gateway)).unwrap_or(ALONE.1);
        let real = self.gateway_v4.or(host.and_then(|family| family.host_loopback));
        let by_gateway = real.filter(|_| self.host_loopback.gateway);
        let host_loopback = self.host_loopback.v4.or(by_gateway);
        Some(Family { guest, prefix, gateway, host_loopback, host_global: self.host_global_v4 })
    }

    fn ipv6(&self, host: Option<Family<Ipv6Addr>>) -> Option<Family<Ipv6Addr>> {
        let guest = self.address_v6.or(host.map(|family| family.guest))?;
        let gateway = self.gateway_v6.or(host.map(|family| family.gateway)).unwrap_or(ALONE_V6.1);
        let real = self.gateway_v6.or(host.and_then(|family| family.host_loopback));
        let by_gateway = real.filter(|_| self.host_loopback.gateway);
        let host_loopback = self.host_loopback.v6.or(by_gateway);
        // Autoconfiguration knows no other prefix on Ethernet (RFC 2464, 4).
        Some(Family { guest, prefix: 64, gateway, host_loopback, host_global: self.host_global_v6 })
    }

    /// Resolvers, search domains and the guest's own names.
    fn apply_names(&self, config: &mut Config) {
        let behind = |told: IpAddr| config.dns_forward.iter().find(|(inside, _)| *inside == told);
        let servers: Vec<IpAddr> =
            config.dns.iter().map(|&told| behind(told).map_or(told, |&(_, server)| server)).collect();
        let stands_for_loopback = |address: IpAddr| match address {
            IpAddr::V4(a) => config.ipv4.is_some_and(|family| family.host_loopback == Some(a)),
            IpAddr::V6(a) => config.ipv6.is_some_and(|family| family.host_loopback == Some(a)),
        };
        let is_guests = |address: IpAddr| match address {
            IpAddr::V4(a) => config.ipv4.is_some_and(|family| family.guest == a),
            IpAddr::V6(a) => config.ipv6.is_some_and(|family| family.guest == a),
        };
        let mut forwards: Vec<(IpAddr, IpAddr)> = Vec::new();
        for &inside in &self.dns_forward {
            let same = |server: &&IpAddr| server.is_ipv4() == inside.is_ipv4();
            let named = self.dns_host.iter().find(same);
            match named.or(servers.iter().find(same)).or(self.dns_host.first()).or(servers.first()) {
                Some(&server) => forwards.push((inside, server)),
                None => tracing::warn!(
                    "--dns-forward {inside} leads nowhere: the host has no resolver in /etc/resolv.conf, and \
                     --dns-host names none"
                ),
            }
        }
        // The stand-in for a resolver that the guest cannot reach by its own address.
        let loopbacks = [
            config.ipv4.and_then(|family| family.host_loopback).map(IpAddr::V4),
            config.ipv6.and_then(|family| family.host_loopback).map(IpAddr::V6),
        ];
        let stand_in = loopbacks.into_iter().flatten().next();
        let mut told: Vec<IpAddr> = Vec::new();
        for &server in &servers {
            if !(server.is_loopback() || server.is_unspecified() || is_guests(server)) {
                told.push(server);
                // The host's gateway may be its resolver too, and must not be hidden by what it stands for.
                if stands_for_loopback(server) && !forwards.iter().any(|(inside, _)| *inside == server) {
                    forwards.push((server, server));
                }
                continue;
            }
            match (self.dns_forward.as_slice(), stand_in) {
                ([], Some(inside)) if !forwards.iter().any(|(known, _)| *known == inside) => {
                    forwards.push((inside, server));
                    told.push(inside);
                }
                ([], _) => {}
                (forwarded, _) => {
                    told.extend(forwarded.iter().filter(|a| !told.contains(a)).collect::<Vec<_>>())
                }
            }
        }
        let wanted = self.dns.clone().unwrap_or(told);
        config.dns = if self.tell_dns { wanted } else { Vec::new() };
        config.dns_forward = forwards;
        if let Some(search) = &self.search {
            config.search.clone_from(search);
        }
        if !self.tell_search {
            config.search.clear();
        }
        config.hostname.clone_from(&self.hostname);
        config.fqdn.clone_from(&self.fqdn);
    }
}

/// The prefix of an address's class, from when there were such (RFC 791).
fn class_prefix(address: Ipv4Addr) -> u8 {
    match address.octets()[0] {
        0..=127 => 8,
        128..=191 => 16,
        192..=223 => 24,
        _ => 32,
    }
}

/// The addresses of a family that mean different things, with what they mean.
fn each_address<A: Copy + Into<IpAddr>>(family: Family<A>) -> [(&'static str, Option<IpAddr>); 3] {
    [
        ("the guest (--address)", Some(family.guest.into())),
        ("the host's loopback (--map-host-loopback, --gateway)", family.host_loopback.map(Into::into)),
        ("the host's own address (--map-guest-addr)", family.host_global.map(Into::into)),
    ]
}

fn check_distinct(meanings: Option<[(&'static str, Option<IpAddr>); 3]>) -> io::Result<()> {
    let Some([guest, loopback, global]) = meanings else { return Ok(()) };
    for (one, other) in [(guest, loopback), (guest, global), (loopback, global)] {
        if let Some(address) = one.1
            && one.1 == other.1
        {
            return invalid(format!("{address} cannot mean both {} and {}", one.0, other.0));
        }
    }
    Ok(())
}

fn invalid<T>(text: String) -> io::Result<T> {
    Err(io::Error::new(io::ErrorKind::InvalidInput, text))
}

#[cfg(test)]
mod tests;

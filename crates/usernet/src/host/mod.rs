//! What the host's own network looks like, for a guest that is to have the same.
//!
//! Links, addresses and routes are asked of the kernel (rtnetlink(7)), resolvers and search domains read from
//! resolv.conf(5). [`HostNetwork`] is what a [`Template`] chooses of them, and [`Config::from_template`] makes a
//! guest's network of that:
//!
//! - The interface is the template's, or that of the default route with the least metric; the first hop with the most weight
//!   if it has several. A host with one interface alone and no default route has that one. IPv6 may go by another
//!   interface than IPv4.
//! - The guest has that interface's first global address, and the route's gateway, which stands for the host's loopback.
//! - Without a gateway on that route the guest's is made up. It then stands for nothing, and there is no DHCP, which
//!   could not tell of a route without one.
//! - A host that is not connected by IPv4 gives addresses that nobody has ([`ALONE`]), so that programs that know no other
//!   family work at least with the host's own services, where an option maps an address to them, and with the resolver.
//!   Without IPv6 the guest has none either, unless it is to have that alone ([`ALONE_V6`]).
//! - A resolver that the guest could not reach under its own address, on the host's loopback or on the very address
//!   that the guest takes over, is offered as the gateway's, and forwarded.

pub(crate) mod netlink;
pub(crate) mod resolv;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_route::address::{AddressHeaderFlags, AddressMessage};
use netlink_packet_route::route::RouteMessage;
use rustix::net::SocketFlags;

use crate::config::{Config, Family, Outbound, Services};
use netlink::{Hop, Netlink, Tables, hops, is_default, is_of, metric, own_address};
use resolv::{ResolvConf, Resolvers};

/// The gateway's Ethernet address: locally administered.
pub const GATEWAY_MAC: [u8; 6] = [0x9a, 0x55, 0x9a, 0x55, 0x9a, 0x55];

/// The guest's and the gateway's addresses on a host that has none of IPv4: link-local ones (RFC 3927).
pub const ALONE: (Ipv4Addr, Ipv4Addr) = (Ipv4Addr::new(169, 254, 2, 1), Ipv4Addr::new(169, 254, 2, 2));

/// Likewise for a guest that is to have IPv6 alone: a unique local address (RFC 4193), and a link-local router.
pub const ALONE_V6: (Ipv6Addr, Ipv6Addr) =
    (Ipv6Addr::new(0xfd72, 0x696e, 0x6733, 0, 0, 0, 0, 15), Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1));

/// The MTU that the guest is told: the most that whole pages hold of IPv4's 65535 bytes. The link is memory, whatever
/// the host's own links can take.
const MTU: u16 = 65520;

/// Which part of the host's network a guest takes after.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Template {
    /// Whether the guest is to have IPv4.
    pub ipv4: bool,
    /// Whether the guest is to have IPv6.
    pub ipv6: bool,
    /// The interface whose IPv4 addresses and routes it is to have; that of the default route if `None`.
    pub interface_v4: Option<String>,
    /// The interface whose IPv6 addresses and routes it is to have; that of the default route if `None`.
    pub interface_v6: Option<String>,
}

impl Default for Template {
    fn default() -> Self {
        Self { ipv4: true, ipv6: true, interface_v4: None, interface_v6: None }
    }
}

/// An interface of the host's, as one IP family sees it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Interface {
    /// The kernel's number for it.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// The address that the guest takes over.
    pub address: IpAddr,
    /// Length of its network's prefix in bits.
    pub prefix: u8,
    /// The gateway of the default route by this interface.
    pub gateway: Option<IpAddr>,
    /// All addresses that others can reach it by, [`Self::address`] among them, as the kernel describes them.
    pub addresses: Vec<AddressMessage>,
    /// All routes of the main table that lead out by it, as the kernel describes them. Some of a multipath route's hops
    /// may lead elsewhere.
    pub routes: Vec<RouteMessage>,
}

/// The part of the host's network that a guest takes after: at most one interface for each family.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct HostNetwork {
    /// The interface of IPv4.
    pub ipv4: Option<Interface>,
    /// The interface of IPv6.
    pub ipv6: Option<Interface>,
}

impl HostNetwork {
    /// Asks the kernel what there is of `template` now.
    ///
    /// # Errors
    /// The kernel does not tell, or an interface that the template names does not exist or has no address of any
    /// family that the guest is to have.
    pub fn of(template: &Template) -> io::Result<Self> {
        Self::chosen(&Netlink::open(0, SocketFlags::empty())?.tables()?, template)
    }

    /// With what `before` had of families that are not there now.
    fn or(self, before: &Self) -> Self {
        Self { ipv4: self.ipv4.or(before.ipv4.clone()), ipv6: self.ipv6.or(before.ipv6.clone()) }
    }

    fn chosen(tables: &Tables, template: &Template) -> io::Result<Self> {
        let family = |v6, wanted: bool, name: &Option<String>| {
            if !wanted {
                return Ok(None);
            }
            let index = name.as_deref().map(|name| tables.index_of(name)).transpose()?;
            Ok::<_, io::Error>(tables.interface(v6, index))
        };
        let network = Self {
            ipv4: family(false, template.ipv4, &template.interface_v4)?,
            ipv6: family(true, template.ipv6, &template.interface_v6)?,
        };
        let named = |wanted: bool, name: &Option<String>| name.clone().filter(|_| wanted);
        let names =
            named(template.ipv4, &template.interface_v4).or(named(template.ipv6, &template.interface_v6));
        match names {
            Some(name) if network == Self::default() => Err(io::Error::new(
                io::ErrorKind::AddrNotAvailable,
                format!("interface {name} has no address that a guest could take over"),
            )),
            _ => Ok(network),
        }
    }
}

impl Tables {
    fn index_of(&self, name: &str) -> io::Result<u32> {
        match self.links.iter().find(|link| link.1 == name) {
            Some((index, _)) => Ok(*index),
            None => {
                let names: Vec<&str> = self.links.iter().map(|link| link.1.as_str()).collect();
                Err(io::Error::new(
                    io::ErrorKind::NotFound,
                    format!("there is no interface {name}; there are: {}", names.join(", ")),
                ))
            }
        }
    }

    /// The interface numbered `wanted`, or else the one that packets to everywhere leave by, and what of it is of this
    /// family.
    fn interface(&self, v6: bool, wanted: Option<u32>) -> Option<Interface> {
        let mut defaults: Vec<(&RouteMessage, Hop)> = self
            .routes_of(v6)
            .filter(|route| is_default(route))
            .filter_map(|route| {
                let hops = hops(route).into_iter().filter(|hop| wanted.is_none_or(|w| hop.interface == w));
                // The first of those with the most weight.
                Some((route, hops.reduce(|best, hop| if hop.weight > best.weight { hop } else { best })?))
            })
            .collect();
        defaults.sort_by_key(|(route, _)| metric(route));
        let by_default =
            defaults.into_iter().find_map(|(_, hop)| self.described(v6, hop.interface, hop.gateway));
        by_default.or_else(|| self.described(v6, wanted.or_else(|| self.only_interface(v6))?, None))
    }

    /// The interface that all routes lead out by, if it is one alone.
    fn only_interface(&self, v6: bool) -> Option<u32> {
        let mut used = self.routes_of(v6).flat_map(hops).map(|hop| hop.interface);
        let first = used.next()?;
        used.all(|interface| interface == first).then_some(first)
    }

    fn described(&self, v6: bool, index: u32, gateway: Option<IpAddr>) -> Option<Interface> {
        let addresses: Vec<AddressMessage> = self
            .addresses
            .iter()
            .filter(|a| a.header.index == index && is_of(a.header.family, v6))
            .cloned()
            .collect();
        // An alias (IPv4), or one for the sake of privacy that will go (IPv6), only if there is no other.
        let own = addresses.iter().min_by_key(|a| a.header.flags.contains(AddressHeaderFlags::Secondary))?;
        let (address, prefix) = (own_address(own)?, own.header.prefix_len);
        let name = self.links.iter().find(|link| link.0 == index).map(|link| link.1.clone())?;
        let routes = self
            .routes_of(v6)
            .filter(|r| hops(r).iter().any(|hop| hop.interface == index))
            .cloned()
            .collect();
        Some(Interface { index, name, address, prefix, gateway, addresses, routes })
    }

    fn routes_of(&self, v6: bool) -> impl Iterator<Item = &RouteMessage> {
        self.routes.iter().filter(move |route| is_of(route.header.address_family, v6))
    }
}

impl Config {
    /// A network as the host itself has it, without forwarded ports.
    ///
    /// # Errors
    /// As [`Self::from_template`].
    pub fn from_host() -> io::Result<Self> {
        Self::from_template(&Template::default())
    }

    /// A network as the template's part of the host has it, without forwarded ports.
    ///
    /// [`Services::dhcp`] is off if the host's route has no gateway.
    ///
    /// # Errors
    /// As [`HostNetwork::of`]. A missing resolv.conf is no error: the guest is then told no resolver.
    pub fn from_template(template: &Template) -> io::Result<Self> {
        Ok(Host::open()?.config(template)?.1)
    }

    fn after(network: &HostNetwork, template: &Template, resolvers: &Resolvers) -> Self {
        let mut services = Services::default();
        let mut ipv4 = network.ipv4.as_ref().and_then(|interface| {
            let IpAddr::V4(guest) = interface.address else { return None };
            let gateway = interface.gateway.and_then(|g| if let IpAddr::V4(g) = g { Some(g) } else { None });
            services.dhcp = gateway.is_some();
            Some(Family {
                guest,
                prefix: interface.prefix,
                gateway: gateway.unwrap_or(ALONE.1),
                host_loopback: gateway,
                host_global: None,
            })
        });
        let mut ipv6 = network.ipv6.as_ref().and_then(|interface| {
            let IpAddr::V6(guest) = interface.address else { return None };
            let gateway = interface.gateway.and_then(|g| if let IpAddr::V6(g) = g { Some(g) } else { None });
            // Autoconfiguration knows no other prefix on Ethernet (RFC 2464 4).
            let prefix = 64;
            let host_loopback = gateway;
            Some(Family {
                guest,
                prefix,
                gateway: gateway.unwrap_or(ALONE_V6.1),
                host_loopback,
                host_global: None,
            })
        });
        if ipv4.is_none() && template.ipv4 {
            let (guest, gateway) = ALONE;
            ipv4 = Some(Family { guest, prefix: 16, gateway, host_loopback: None, host_global: None });
        }
        if ipv6.is_none() && template.ipv6 && !template.ipv4 {
            let (guest, gateway) = ALONE_V6;
            ipv6 = Some(Family { guest, prefix: 64, gateway, host_loopback: None, host_global: None });
        }
        let mut config = Self {
            guest_mac: None,
            gateway_mac: GATEWAY_MAC,
            ipv4,
            ipv6,
            mtu: MTU,
            dns: Vec::new(),
            dns_forward: Vec::new(),
            search: resolvers.search.clone(),
            hostname: None,
            fqdn: None,
            services,
            forwards: Vec::new(),
            freebind: false,
            outbound: Outbound::default(),
        };
        config.add_resolvers(&resolvers.servers);
        config
    }

    fn add_resolvers(&mut self, servers: &[IpAddr]) {
        // An IPv4 gateway first: resolv.conf has no place for the interface of a link-local address.
        let gateway = self.ipv4.map(|f| IpAddr::from(f.gateway)).or(self.ipv6.map(|f| f.gateway.into()));
        for &server in servers {
            let guests_own = match server {
                IpAddr::V4(server) => self.ipv4.is_some_and(|family| family.guest == server),
                IpAddr::V6(server) => self.ipv6.is_some_and(|family| family.guest == server),
            };
            if !(server.is_loopback() || server.is_unspecified() || guests_own) {
                self.dns.push(server);
                continue;
            }
            // One address leads to one resolver: the first.
            if self.dns_forward.is_empty()
                && let Some(gateway) = gateway
            {
                self.dns.push(gateway);
                self.dns_forward.push((gateway, server));
            }
        }
    }
}

/// The host, as far as it is asked: what is needed for that stays open.
#[derive(Debug)]
pub(crate) struct Host {
    netlink: Netlink,
    pub(crate) resolv: ResolvConf,
    /// The last that there were.
    resolvers: Resolvers,
}

impl Host {
    /// Opens what is needed.
    ///
    /// # Errors
    /// No descriptors.
    pub(crate) fn open() -> io::Result<Self> {
        let netlink = Netlink::open(0, SocketFlags::empty())?;
        Ok(Self { netlink, resolv: ResolvConf::open(), resolvers: Resolvers::default() })
    }

    /// The template's part of the host, and a guest's network after it.
    ///
    /// # Errors
    /// As [`HostNetwork::of`].
    pub(crate) fn config(&mut self, template: &Template) -> io::Result<(HostNetwork, Config)> {
        self.config_after(template, &HostNetwork::default())
    }

    /// As [`Self::config`], where what is not there now is as it was before.
    ///
    /// # Errors
    /// As [`HostNetwork::of`].
    pub(crate) fn config_after(
        &mut self,
        template: &Template,
        before: &HostNetwork,
    ) -> io::Result<(HostNetwork, Config)> {
        let network = HostNetwork::chosen(&self.netlink.tables()?, template)?.or(before);
        match self.resolv.read() {
            Ok(resolvers) if resolvers.servers.is_empty() && !self.resolvers.servers.is_empty() => {}
            Ok(resolvers) => self.resolvers = resolvers,
            Err(error) => tracing::info!(%error, "no resolvers for the guest in /etc/resolv.conf"),
        }
        let config = Config::after(&network, template, &self.resolvers);
        Ok((network, config))
    }
}

#[cfg(test)]
mod tests;

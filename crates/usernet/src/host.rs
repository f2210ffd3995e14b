//! What the host's own network looks like, for a guest that is to have the same.
//!
//! Links, addresses and routes are asked of the kernel (rtnetlink(7)), resolvers and search domains read from
//! resolv.conf(5). [`Config::from_host`] makes a guest's network of them:
//!
//! - The interface is that of the default route with the least metric; the first hop with the most weight if it has several.
//!   IPv6 may go by another interface than IPv4.
//! - The guest has that interface's first global address, and the route's gateway.
//! - A host that is not connected at all gives addresses that nobody has ([`ALONE`]).
//! - A resolver that the guest could not reach under its own address, on the host's loopback or on the very address
//!   that the guest takes over, is offered as the gateway's, and forwarded.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{RecvFlags, SendFlags, SocketFlags, SocketType};

use crate::config::{Config, Family, Outbound, Services};

/// The gateway's Ethernet address: locally administered.
pub const GATEWAY_MAC: [u8; 6] = [0x9a, 0x55, 0x9a, 0x55, 0x9a, 0x55];

/// The guest's and the gateway's addresses on a host that has none: link-local ones (RFC 3927).
pub const ALONE: (Ipv4Addr, Ipv4Addr) = (Ipv4Addr::new(169, 254, 2, 1), Ipv4Addr::new(169, 254, 2, 2));

/// The router of IPv6 when the host's own has no address.
const ROUTER_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// The MTU that the guest is told: the most that whole pages hold of IPv4's 65535 bytes. The link is memory, whatever
/// the host's own links can take.
const MTU: u16 = 65520;

/// A default route.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Route {
    v6: bool,
    gateway: Option<IpAddr>,
    interface: u32,
    metric: u32,
}

/// An address of one of the host's interfaces that others can reach.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Address {
    interface: u32,
    address: IpAddr,
    prefix: u8,
    /// An alias (IPv4), or one for the sake of privacy that will go (IPv6).
    secondary: bool,
}

/// The host's network, as far as a guest takes after it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Host {
    routes: Vec<Route>,
    addresses: Vec<Address>,
}

/// The contents of resolv.conf.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Resolvers {
    servers: Vec<IpAddr>,
    search: Vec<String>,
}

impl Config {
    /// A network as the host itself has it, without forwarded ports.
    ///
    /// # Errors
    /// The kernel does not tell. A missing resolv.conf is no error: the guest is then told no resolver.
    pub fn from_host() -> io::Result<Self> {
        let resolvers = match std::fs::read_to_string(Path::new("/etc/resolv.conf")) {
            Ok(text) => Resolvers::parse(&text),
            Err(error) => {
                tracing::info!("no resolvers for the guest: /etc/resolv.conf: {error}");
                Resolvers::default()
            }
        };
        Ok(Host::ask()?.config(&resolvers))
    }
}

impl Host {
    /// Asks the kernel.
    fn ask() -> io::Result<Self> {
        let mut host = Self::default();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut request = RouteMessage::default();
            request.header.address_family = family;
            dump(RouteNetlinkMessage::GetRoute(request), |message| {
                if let RouteNetlinkMessage::NewRoute(route) = message {
                    host.routes.extend(default_route(&route));
                }
            })?;
        }
        dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()), |message| {
            if let RouteNetlinkMessage::NewAddress(address) = message {
                host.addresses.extend(global_address(&address));
            }
        })?;
        Ok(host)
    }

    /// The best default route of a family, and the address that goes with it.
    fn way_out(&self, v6: bool) -> Option<(Route, Address)> {
        let mut routes: Vec<&Route> = self.routes.iter().filter(|route| route.v6 == v6).collect();
        routes.sort_by_key(|route| route.metric);
        routes.into_iter().find_map(|route| {
            let on_it =
                self.addresses.iter().filter(|a| a.interface == route.interface && a.address.is_ipv6() == v6);
            Some((*route, *on_it.min_by_key(|a| a.secondary)?))
        })
    }

    fn config(&self, resolvers: &Resolvers) -> Config {
        let mut ipv4 = self.way_out(false).and_then(|(route, own)| {
            let IpAddr::V4(guest) = own.address else { return None };
            let gateway = if let Some(IpAddr::V4(gateway)) = route.gateway { gateway } else { ALONE.1 };
            Some(Family {
                guest,
                prefix: own.prefix,
                gateway,
                host_loopback: Some(gateway),
                host_global: None,
            })
        });
        let ipv6 = self.way_out(true).and_then(|(route, own)| {
            let IpAddr::V6(guest) = own.address else { return None };
            let gateway = if let Some(IpAddr::V6(gateway)) = route.gateway { gateway } else { ROUTER_V6 };
            Some(Family { guest, prefix: 64, gateway, host_loopback: Some(gateway), host_global: None })
        });
        if ipv4.is_none() && ipv6.is_none() {
            let (guest, gateway) = ALONE;
            ipv4 =
                Some(Family { guest, prefix: 16, gateway, host_loopback: Some(gateway), host_global: None });
        }
        let mut config = Config {
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
            services: Services::default(),
            forwards: Vec::new(),
            freebind: false,
            outbound: Outbound::default(),
        };
        config.add_resolvers(&resolvers.servers);
        config
    }
}

impl Config {
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

impl Resolvers {
    /// Reads resolv.conf(5). Lines that make no sense are passed over, as the C library does.
    fn parse(text: &str) -> Self {
        let mut resolvers = Self::default();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") => {
                    // An address with an interface is link-local: out of the guest's reach.
                    let address: Option<IpAddr> = words.next().and_then(|word| word.parse().ok());
                    let local = |a: &IpAddr| matches!(a, IpAddr::V6(a) if a.is_unicast_link_local());
                    resolvers.servers.extend(address.filter(|a| !local(a)));
                }
                // The last of them counts.
                Some("search" | "domain") => resolvers.search = words.map(str::to_owned).collect(),
                _ => {}
            }
        }
        resolvers.search.retain(|domain| domain != ".");
        resolvers
    }
}

/// The route, if it is a default route of the main table.
fn default_route(message: &RouteMessage) -> Option<Route> {
    let header = &message.header;
    if header.destination_prefix_length != 0
        || header.table != RouteHeader::RT_TABLE_MAIN
        || header.kind != RouteType::Unicast
    {
        return None;
    }
    let v6 = header.address_family == AddressFamily::Inet6;
    let mut route = Route { v6, gateway: None, interface: 0, metric: 0 };
    route.apply(&message.attributes);
    let hops = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::MultiPath(hops) => Some(hops),
        _ => None,
    });
    if let Some(hops) = hops {
        // The first of those with the most weight.
        let best = hops.iter().rev().max_by_key(|hop| hop.hops)?;
        route.interface = best.interface_index;
        route.apply(&best.attributes);
    }
    Some(route)
}

impl Route {
    fn apply(&mut self, attributes: &[RouteAttribute]) {
        for attribute in attributes {
            match attribute {
                RouteAttribute::Gateway(RouteAddress::Inet(gateway)) => {
                    self.gateway = Some((*gateway).into())
                }
                RouteAttribute::Gateway(RouteAddress::Inet6(gateway)) => {
                    self.gateway = Some((*gateway).into())
                }
                RouteAttribute::Oif(interface) => self.interface = *interface,
                RouteAttribute::Priority(metric) => self.metric = *metric,
                _ => {}
            }
        }
    }
}

/// The address, if others can reach it.
fn global_address(message: &AddressMessage) -> Option<Address> {
    let header = &message.header;
    let unusable =
        AddressHeaderFlags::Tentative | AddressHeaderFlags::Dadfailed | AddressHeaderFlags::Deprecated;
    if header.scope != AddressScope::Universe || header.flags.intersects(unusable) {
        return None;
    }
    // On a point-to-point link the other end has the other attribute.
    let local = message
        .attributes
        .iter()
        .find_map(|a| if let AddressAttribute::Local(ip) = a { Some(*ip) } else { None });
    let any = || {
        message
            .attributes
            .iter()
            .find_map(|a| if let AddressAttribute::Address(ip) = a { Some(*ip) } else { None })
    };
    Some(Address {
        interface: header.index,
        address: local.or_else(any)?,
        prefix: header.prefix_len,
        secondary: header.flags.contains(AddressHeaderFlags::Secondary),
    })
}

/// Asks the kernel for all of something.
fn dump(request: RouteNetlinkMessage, mut each: impl FnMut(RouteNetlinkMessage)) -> io::Result<()> {
    // No message of a dump is longer (netlink(7), NLMSG_GOODSIZE, and what the kernel makes of it).
    const LONGEST: usize = 32 << 10;
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(rustix::net::AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
    rustix::net::bind(&socket, &SocketAddrNetlink::new(0, 0))?;
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(request));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    rustix::net::send(&socket, &bytes, SendFlags::empty())?;
    let mut buffer = vec![0; LONGEST];
    loop {
        let (length, _) = rustix::net::recv(&socket, &mut buffer[..], RecvFlags::empty())?;
        let mut rest = buffer.get(..length).unwrap_or_default();
        while !rest.is_empty() {
            let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
            // Each message begins at a multiple of four (netlink(3)).
            let length = (message.header.length as usize).next_multiple_of(4);
            match message.payload {
                NetlinkPayload::InnerMessage(message) => each(message),
                NetlinkPayload::Done(_) => return Ok(()),
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                _ => {}
            }
            rest = rest.get(length..).unwrap_or_default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(gateway: &str, interface: u32, metric: u32) -> Route {
        let gateway: IpAddr = gateway.parse().unwrap();
        Route { v6: gateway.is_ipv6(), gateway: Some(gateway), interface, metric }
    }

    fn address(address: &str, prefix: u8, interface: u32) -> Address {
        Address { interface, address: address.parse().unwrap(), prefix, secondary: false }
    }

    #[test]
    fn the_guest_has_what_the_host_has() {
        let temporary = Address { secondary: true, ..address("2001:db8::ffff", 64, 3) };
        let host = Host {
            routes: vec![
                route("198.51.100.1", 2, 600),
                route("192.0.2.1", 3, 100),
                route("fe80::1:1", 3, 100),
            ],
            addresses: vec![
                address("198.51.100.7", 24, 2),
                address("192.0.2.7", 25, 3),
                temporary,
                address("2001:db8::7", 56, 3),
            ],
        };
        let text = "nameserver 192.0.2.53\nnameserver 2001:db8::53\nsearch example.org\n";
        let config = host.config(&Resolvers::parse(text));
        let gateway = Ipv4Addr::new(192, 0, 2, 1);
        let guest = Ipv4Addr::new(192, 0, 2, 7);
        assert_eq!(
            config.ipv4,
            Some(Family { guest, prefix: 25, gateway, host_loopback: Some(gateway), host_global: None })
        );
        let v6 = config.ipv6.unwrap();
        assert_eq!((v6.guest, v6.prefix), ("2001:db8::7".parse().unwrap(), 64));
        assert_eq!(v6.gateway, "fe80::1:1".parse::<Ipv6Addr>().unwrap());
        assert_eq!(config.dns, ["192.0.2.53", "2001:db8::53"].map(|a| a.parse::<IpAddr>().unwrap()));
        assert_eq!(config.dns_forward, []);
        assert_eq!(config.search, ["example.org"]);
    }

    #[test]
    fn a_host_without_network_gives_addresses_all_the_same() {
        let config = Host::default().config(&Resolvers::default());
        let (guest, gateway) = ALONE;
        assert_eq!(
            config.ipv4,
            Some(Family { guest, prefix: 16, gateway, host_loopback: Some(gateway), host_global: None })
        );
        assert_eq!(config.ipv6, None);
    }

    #[test]
    fn one_family_is_enough() {
        let host = Host {
            routes: vec![Route { gateway: None, ..route("::", 2, 0) }],
            addresses: vec![address("2001:db8::7", 64, 2), address("192.0.2.7", 24, 2)],
        };
        let config = host.config(&Resolvers::default());
        assert_eq!(config.ipv4, None, "no route leads anywhere");
        assert_eq!(config.ipv6.unwrap().gateway, ROUTER_V6);
    }

    #[test]
    fn a_resolver_on_the_hosts_loopback_is_the_gateways() {
        let host =
            Host { routes: vec![route("192.0.2.1", 2, 0)], addresses: vec![address("192.0.2.7", 24, 2)] };
        let gateway: IpAddr = "192.0.2.1".parse().unwrap();
        for own in ["127.0.0.53", "::1", "192.0.2.7"] {
            let text = format!("nameserver {own}\nnameserver 127.0.0.54\nnameserver 9.9.9.9\n");
            let config = host.config(&Resolvers::parse(&text));
            assert_eq!(config.dns, [gateway, "9.9.9.9".parse().unwrap()]);
            assert_eq!(config.dns_forward, [(gateway, own.parse().unwrap())]);
        }
    }

    #[test]
    fn resolv_conf_is_read_as_the_c_library_does() {
        let text = "# comment\n; another\n\nnameserver\nnameserver nonsense\nnameserver fe80::1%eth0\n\
                    nameserver fe80::1\n\tnameserver 192.0.2.1 trailing\noptions ndots:5\ndomain one.example\n\
                    search two.example  three.example .\n";
        let read = Resolvers::parse(text);
        assert_eq!(read.servers, ["192.0.2.1".parse::<IpAddr>().unwrap()]);
        assert_eq!(read.search, ["two.example", "three.example"]);
    }

    /// The kernel is asked for real; what it says depends on the machine.
    #[test]
    fn the_kernel_answers() {
        let config = Config::from_host().unwrap();
        assert!(config.ipv4.is_some() || config.ipv6.is_some());
    }
}

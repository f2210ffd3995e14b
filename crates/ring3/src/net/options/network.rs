//! The guest's network: the host's as a template, changed by what the options say.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use usernet::Config;
use usernet::config::{Forward, MacAddress, Outbound, Services};

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
    /// Which address means the host's loopback, by family.
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
    /// Forwards that must be there from the start.
    pub forwards: Vec<Forward>,
}

/// Which address means the host's loopback to the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HostLoopback {
    /// None.
    None,
    /// These; the gateway's, for a family without one, if `gateway`.
    Addresses {
        /// IPv4's.
        v4: Option<Ipv4Addr>,
        /// IPv6's.
        v6: Option<Ipv6Addr>,
        /// Whether the gateway's is meant where none is named.
        gateway: bool,
    },
}

impl Network {
    /// The configuration of the engine: asks the host, then applies what the options say.
    ///
    /// # Errors
    /// The host does not tell, or has nothing that the options ask for.
    pub fn config(&self) -> io::Result<Config> {
        self.apply(Config::from_host()?)
    }

    fn apply(&self, mut config: Config) -> io::Result<Config> {
        config.mtu = self.mtu;
        Ok(config)
    }
}

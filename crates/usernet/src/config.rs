//! What the network of one guest looks like.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// An Ethernet address.
pub type MacAddress = [u8; 6];

/// One IP family's addresses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Family<A> {
    /// The guest's address.
    pub guest: A,
    /// Length of its network's prefix in bits.
    pub prefix: u8,
    /// The gateway: what the guest sends everything to that is not on its network.
    pub gateway: A,
    /// A guest-side address that stands for the host's loopback; by default the gateway.
    pub host_loopback: Option<A>,
    /// A guest-side address that stands for the host's own address, which the guest's copy of it hides; by default none.
    pub host_global: Option<A>,
}

/// A transport that is forwarded.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
        })
    }
}

/// A port of the host that leads into the guest.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Forward {
    /// TCP or UDP.
    pub transport: Transport,
    /// Where the host listens.
    pub listen: SocketAddr,
    /// The only interface of the host's by which it can be reached (`SO_BINDTODEVICE`); all of them if `None`.
    pub interface: Option<String>,
    /// The guest-side address that it leads to; the guest's own if `None`.
    pub guest_address: Option<IpAddr>,
    /// The guest's port.
    pub guest_port: u16,
}

impl Forward {
    /// A forward to the guest's own address, by whatever interface.
    #[must_use]
    pub fn new(transport: Transport, listen: SocketAddr, guest_port: u16) -> Self {
        Self { transport, listen, interface: None, guest_address: None, guest_port }
    }
}

/// What the host's outbound sockets are bound to, by family; the routing table decides where it is `None`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Outbound {
    /// The source address of IPv4.
    pub address_v4: Option<Ipv4Addr>,
    /// The source address of IPv6.
    pub address_v6: Option<Ipv6Addr>,
    /// The interface of IPv4 (`SO_BINDTODEVICE`).
    pub interface_v4: Option<String>,
    /// The interface of IPv6.
    pub interface_v6: Option<String>,
}

/// What the guest is served: everything, if not said otherwise.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Services {
    /// TCP, both ways.
    pub tcp: bool,
    /// UDP, both ways.
    pub udp: bool,
    /// ICMP and ICMPv6 echo.
    pub icmp: bool,
    /// An IPv4 address by DHCP.
    pub dhcp: bool,
    /// An IPv6 address by DHCPv6.
    pub dhcpv6: bool,
    /// Neighbours by NDP.
    pub ndp: bool,
    /// Router advertisements.
    pub ra: bool,
}

impl Default for Services {
    fn default() -> Self {
        Self { tcp: true, udp: true, icmp: true, dhcp: true, dhcpv6: true, ndp: true, ra: true }
    }
}

/// The network of one guest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    /// The guest's Ethernet address, if known before its first frame.
    pub guest_mac: Option<MacAddress>,
    /// The gateway's.
    pub gateway_mac: MacAddress,
    /// IPv4, if the guest has it.
    pub ipv4: Option<Family<Ipv4Addr>>,
    /// IPv6, if the guest has it.
    pub ipv6: Option<Family<Ipv6Addr>>,
    /// The MTU that the guest is told; 0 if it is told none.
    pub mtu: u16,
    /// The resolvers that the guest is told.
    pub dns: Vec<IpAddr>,
    /// A guest-side address whose port 53 leads to a resolver of the host's, and that resolver.
    pub dns_forward: Vec<(IpAddr, IpAddr)>,
    /// Search domains that the guest is told.
    pub search: Vec<String>,
    /// The guest's host name (DHCP option 12).
    pub hostname: Option<String>,
    /// The guest's fully qualified name (DHCP option 81, DHCPv6 option 39).
    pub fqdn: Option<String>,
    /// What the guest is served.
    pub services: Services,
    /// Ports of the host that lead into the guest.
    pub forwards: Vec<Forward>,
    /// Whether forwards may listen on addresses that the host does not have yet (`IP_FREEBIND`).
    pub freebind: bool,
    /// What the host's outbound sockets are bound to.
    pub outbound: Outbound,
}

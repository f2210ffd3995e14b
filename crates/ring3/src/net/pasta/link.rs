//! The tap device in the namespace, and its addresses and routes.
//!
//! All of it happens on a thread that is in the namespace.

use std::fs;

use std::net::IpAddr;

use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use taps::tun::{self, Tun};
use usernet::Config;
use usernet::config::MacAddress;

use super::netlink::Netlink;
use crate::net::{Because, NetError};

/// How many frames from the namespace wait for the engine at most; the kernel drops those that come then. The default
/// of 1000 holds less than one connection's window of small frames.
const QUEUE: u32 = 8192;

/// What the interface in the namespace is to be like.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Link {
    /// Its name.
    pub(super) name: String,
    /// Its Ethernet address; the kernel makes one up if it is `None`.
    pub(super) mac: Option<MacAddress>,
    /// Whether it gets its addresses and routes here; otherwise somebody in the namespace configures it.
    pub(super) configure: bool,
}

/// The most that an interface's MTU can be where the guest is told none.
const LARGEST_MTU: u16 = 65520;

impl Link {
    /// Makes the interface, in the present thread's namespace.
    pub(super) fn make(&self, config: &Config) -> Result<Tun, NetError> {
        let file = tun::open().because(|| format!("cannot open {}", tun::DEVICE))?;
        let mtu = if config.mtu == 0 { LARGEST_MTU } else { config.mtu };
        let options = tun::Options { name: &self.name, multi_queue: false, mtu };
        let tun =
            Tun::attach(file, options).because(|| format!("cannot make the tap device {}", self.name))?;
        let name = tun.name().because(|| "cannot ask for the tap device's name".into())?;
        self.prepare(&name, config)?;
        Ok(tun)
    }

    fn prepare(&self, name: &str, config: &Config) -> Result<(), NetError> {
        let netlink = Netlink::open().because(|| "cannot open a netlink socket".into())?;
        let index = netlink.index(name).because(|| format!("cannot find the interface {name}"))?;
        let mut attributes = vec![LinkAttribute::TxQueueLen(QUEUE)];
        attributes.extend(self.mac.map(|mac| LinkAttribute::Address(mac.to_vec())));
        netlink
            .change(link(index, LinkFlags::empty(), attributes))
            .because(|| format!("cannot set up the interface {name}"))?;
        if !self.configure {
            return Ok(());
        }
        netlink
            .change(link(1, LinkFlags::Up, Vec::new()))
            .because(|| "cannot bring up the loopback interface".into())?;
        // Nobody else can have the address, so nobody has to wait until that is certain. A kernel without IPv6 does
        // not have the file.
        let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{name}/accept_dad"), "0");
        let mtu = (config.mtu != 0).then(|| LinkAttribute::Mtu(config.mtu.into()));
        netlink
            .change(link(index, LinkFlags::Up, mtu.into_iter().collect()))
            .because(|| format!("cannot bring up the interface {name}"))?;
        if let Some(family) = config.ipv4 {
            let own = (family.guest.into(), family.prefix);
            assign(&netlink, index, own, family.gateway.into())?;
        }
        if let Some(family) = config.ipv6 {
            let own = (family.guest.into(), family.prefix);
            assign(&netlink, index, own, family.gateway.into())?;
        }
        Ok(())
    }
}

/// Gives the interface an address, and the default route.
fn assign(netlink: &Netlink, index: u32, own: (IpAddr, u8), gateway: IpAddr) -> Result<(), NetError> {
    let (address, prefix) = own;
    netlink
        .change(RouteNetlinkMessage::NewAddress(address_message(index, address, prefix)))
        .because(|| format!("cannot assign the address {address}/{prefix}"))?;
    let mut route = RouteMessage::default();
    route.header = RouteHeader {
        address_family: family(address),
        table: RouteHeader::RT_TABLE_MAIN,
        protocol: RouteProtocol::Boot,
        scope: RouteScope::Universe,
        kind: RouteType::Unicast,
        // The gateway need not be in the prefix.
        flags: RouteFlags::Onlink,
        ..RouteHeader::default()
    };
    route.attributes = vec![RouteAttribute::Oif(index), RouteAttribute::Gateway(route_address(gateway))];
    netlink
        .change(RouteNetlinkMessage::NewRoute(route))
        .because(|| format!("cannot add the default route by {gateway}"))
}

fn link(index: u32, up: LinkFlags, attributes: Vec<LinkAttribute>) -> RouteNetlinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.flags = up;
    message.header.change_mask = up;
    message.attributes = attributes;
    RouteNetlinkMessage::SetLink(message)
}

fn address_message(index: u32, address: IpAddr, prefix: u8) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.index = index;
    message.header.family = family(address);
    message.header.prefix_len = prefix;
    message.header.flags = AddressHeaderFlags::Nodad;
    message.attributes = vec![AddressAttribute::Local(address), AddressAttribute::Address(address)];
    message
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn route_address(address: IpAddr) -> RouteAddress {
    match address {
        IpAddr::V4(address) => RouteAddress::Inet(address),
        IpAddr::V6(address) => RouteAddress::Inet6(address),
    }
}

//! The tap device in the namespace, and its addresses and routes.
//!
//! All of it happens on a thread that is in the namespace.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;

use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteNextHopFlags, RouteProtocol,
    RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use taps::tun::{self, Tun};
use usernet::config::MacAddress;
use usernet::{Config, HostNetwork, Interface};

use super::netlink::Netlink;
use crate::net::options::settings::Configure;
use crate::net::{Because, NetError};

/// How many frames from the namespace wait for the engine at most; the kernel drops those that come then. The default
/// of 1000 holds less than one connection's window of small frames.
const QUEUE: u32 = 8192;

/// The MTU where the guest is told none.
const LARGEST_MTU: u16 = 65520;

/// The loopback interface's number in every namespace.
const LOOPBACK: u32 = 1;

/// What the interface in the namespace is to be like.
#[derive(Clone, Copy, Debug)]
pub(super) struct Link<'a> {
    /// Its name.
    pub(super) name: &'a str,
    /// Its Ethernet address; the kernel makes one up if it is `None`.
    pub(super) mac: Option<MacAddress>,
    /// How many queues it has.
    pub(super) queues: u16,
    /// What of addresses and routes is configured; nothing but the loopback's link if `None`.
    pub(super) configure: Option<Configure>,
    /// What is copied.
    pub(super) host: &'a HostNetwork,
    /// The guest's network.
    pub(super) config: &'a Config,
}

impl Link<'_> {
    /// Makes the interface, in the present thread's namespace. `files` are its queues' if they are open
    /// already.
    pub(super) fn make(&self, files: Option<Vec<OwnedFd>>) -> Result<Vec<Tun>, NetError> {
        let mtu = if self.config.mtu == 0 { LARGEST_MTU } else { self.config.mtu };
        let options = tun::Options { name: self.name, multi_queue: self.queues > 1, mtu };
        let files = match files {
            Some(files) => files,
            None => {
                let files: Result<_, _> = (0..self.queues).map(|_| tun::open()).collect();
                no_device(files)?
            }
        };
        let queues: Result<_, _> = files.into_iter().map(|file| Tun::attach(file, options)).collect();
        let queues = queues.because(|| format!("cannot make the tap device {}", self.name))?;
        self.prepare()?;
        Ok(queues)
    }

    /// Makes no interface; only the loopback is for use.
    pub(super) fn make_none(&self) -> Result<Vec<Tun>, NetError> {
        let netlink = Netlink::open().because(|| "cannot open a netlink socket".into())?;
        bring_up_loopback(&netlink)?;
        Ok(Vec::new())
    }

    fn prepare(&self) -> Result<(), NetError> {
        let name = self.name;
        let netlink = Netlink::open().because(|| "cannot open a netlink socket".into())?;
        bring_up_loopback(&netlink)?;
        let index = netlink.index(name).because(|| format!("cannot find the interface {name}"))?;
        let mut attributes = vec![LinkAttribute::TxQueueLen(QUEUE)];
        attributes.extend(self.mac.map(|mac| LinkAttribute::Address(mac.to_vec())));
        netlink
            .change(link(index, LinkFlags::empty(), attributes))
            .because(|| format!("cannot set up the interface {name}"))?;
        let Some(configure) = self.configure else { return Ok(()) };
        // Nobody else can have the address, so nobody has to wait until that is certain. A kernel without IPv6 does
        // not have the file.
        let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{name}/accept_dad"), "0");
        let mtu = (self.config.mtu != 0).then(|| LinkAttribute::Mtu(self.config.mtu.into()));
        netlink
            .change(link(index, LinkFlags::Up, mtu.into_iter().collect()))
            .because(|| format!("cannot bring up the interface {name}"))?;
        let v4 = self.config.ipv4.map(|f| (f.guest.into(), f.prefix, f.gateway.into()));
        let v6 = self.config.ipv6.map(|f| (f.guest.into(), f.prefix, f.gateway.into()));
        for (v6, family, interface) in [(false, v4, &self.host.ipv4), (true, v6, &self.host.ipv6)] {
            let Some((address, prefix, gateway)) = family else { continue };
            let copied = |wanted: [bool; 2]| interface.as_ref().filter(|_| wanted[usize::from(v6)]);
            let own = match copied(configure.copy_addresses) {
                Some(interface) => {
                    copy_addresses(&netlink, index, interface)?;
                    None
                }
                None => {
                    assign(&netlink, index, (address, prefix))?;
                    Some(address)
                }
            };
            match copied(configure.copy_routes) {
                Some(interface) => copy_routes(&netlink, index, interface, own)?,
                None => route_by(&netlink, index, gateway)?,
            }
        }
        Ok(())
    }
}

/// Says what can be done where the tap device's file could not be opened.
pub(super) fn no_device<T>(opened: io::Result<T>) -> Result<T, NetError> {
    let advice = match opened.as_ref().err().map(io::Error::kind) {
        Some(io::ErrorKind::PermissionDenied) => {
            "; only root may here: `chmod 0666 /dev/net/tun`, as udev has it, lets users"
        }
        Some(io::ErrorKind::NotFound) => {
            "; `modprobe tun` makes it, and a container has it when it is given it (--device /dev/net/tun)"
        }
        _ => "",
    };
    opened.because(|| format!("cannot open {}{advice}", tun::DEVICE))
}

/// Brings up the loopback of the present thread's namespace.
fn bring_up_loopback(netlink: &Netlink) -> Result<(), NetError> {
    netlink
        .change(link(LOOPBACK, LinkFlags::Up, Vec::new()))
        .because(|| "cannot bring up the loopback interface".into())
}

/// Gives the interface an address.
fn assign(netlink: &Netlink, index: u32, (address, prefix): (IpAddr, u8)) -> Result<(), NetError> {
    let mut message = AddressMessage::default();
    message.header.index = index;
    message.header.family = family(address);
    message.header.prefix_len = prefix;
    message.header.flags = AddressHeaderFlags::Nodad;
    message.attributes = vec![AddressAttribute::Local(address), AddressAttribute::Address(address)];
    netlink
        .change(RouteNetlinkMessage::NewAddress(message))
        .because(|| format!("cannot assign the address {address}/{prefix}"))
}

/// Gives the interface all addresses of another.
fn copy_addresses(netlink: &Netlink, index: u32, from: &Interface) -> Result<(), NetError> {
    for address in &from.addresses {
        let mut message = address.clone();
        message.header.index = index;
        message.header.flags = AddressHeaderFlags::Nodad;
        // Not the label, which is the other interface's name; not how long it is valid, which is up to the host.
        message.attributes.retain(|attribute| {
            matches!(
                attribute,
                AddressAttribute::Local(_) | AddressAttribute::Address(_) | AddressAttribute::Broadcast(_)
            )
        });
        let text = format!(
            "cannot copy an address of {}: {:?}; --no-copy-addrs does with one",
            from.name, message.attributes
        );
        netlink.change(RouteNetlinkMessage::NewAddress(message)).because(|| text)?;
    }
    Ok(())
}

/// The default route. The gateway need not be in the network's prefix.
fn route_by(netlink: &Netlink, index: u32, gateway: IpAddr) -> Result<(), NetError> {
    let mut route = RouteMessage::default();
    route.header = RouteHeader {
        address_family: family(gateway),
        table: RouteHeader::RT_TABLE_MAIN,
        protocol: RouteProtocol::Boot,
        scope: RouteScope::Universe,
        kind: RouteType::Unicast,
        flags: RouteFlags::Onlink,
        ..RouteHeader::default()
    };
    let by = match gateway {
        IpAddr::V4(gateway) => RouteAddress::Inet(gateway),
        IpAddr::V6(gateway) => RouteAddress::Inet6(gateway),
    };
    route.attributes = vec![RouteAttribute::Oif(index), RouteAttribute::Gateway(by)];
    netlink
        .change(RouteNetlinkMessage::NewRoute(route))
        .because(|| format!("cannot add the default route by {gateway}"))
}

/// Gives the interface all routes of another. Those that come with its addresses are there already, unless it has an address
/// of its `own`: then a gateway may be reachable by them alone.
///
/// A gateway must be reachable by a route that is there already, and the kernel lists routes in another order. So
/// those that are refused are tried again, as long as others are taken.
fn copy_routes(netlink: &Netlink, index: u32, from: &Interface, own: Option<IpAddr>) -> Result<(), NetError> {
    let mut left: Vec<RouteMessage> = from
        .routes
        .iter()
        .filter(|route| own.is_some() || route.header.protocol != RouteProtocol::Kernel)
        .map(|route| rerouted(route, from.index, index))
        .collect();
    if own.is_some() {
        // Their sources are addresses that are not here.
        for route in &mut left {
            route.attributes.retain(|attribute| !matches!(attribute, RouteAttribute::PrefSource(_)));
        }
    }
    loop {
        let before = left.len();
        let mut error = None;
        left.retain(|route| match netlink.change(RouteNetlinkMessage::NewRoute(route.clone())) {
            Ok(()) => false,
            Err(refused) => {
                error = Some(refused);
                true
            }
        });
        let Some(error) = error else { return Ok(()) };
        if left.len() == before {
            let some: Vec<String> = left.iter().map(described).collect();
            let (name, some) = (&from.name, some.join(", "));
            return Err(error).because(|| {
                format!("cannot copy routes of {name} ({some}); --no-copy-routes or -g does with the default route")
            });
        }
    }
}

/// A route as ip-route(8) would begin to show it.
fn described(route: &RouteMessage) -> String {
    let of = |address: &RouteAddress| match address {
        RouteAddress::Inet(address) => address.to_string(),
        RouteAddress::Inet6(address) => address.to_string(),
        other => format!("{other:?}"),
    };
    let mut text = "default".to_owned();
    let mut via = String::new();
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Destination(to) => {
                text = format!("{}/{}", of(to), route.header.destination_prefix_length);
            }
            RouteAttribute::Gateway(by) => via = format!(" via {}", of(by)),
            _ => {}
        }
    }
    text + &via
}

/// A route by another interface. Of several hops those that lead out by `from` are left.
fn rerouted(route: &RouteMessage, from: u32, to: u32) -> RouteMessage {
    let mut route = route.clone();
    // What the kernel says about a route's state is not for it to be told.
    route.header.flags &= RouteFlags::Onlink;
    let attributes = std::mem::take(&mut route.attributes);
    route.attributes = attributes
        .into_iter()
        .filter_map(|attribute| match attribute {
            RouteAttribute::Oif(_) => Some(RouteAttribute::Oif(to)),
            RouteAttribute::MultiPath(mut hops) => {
                hops.retain(|hop| hop.interface_index == from);
                for hop in &mut hops {
                    hop.interface_index = to;
                    hop.flags &= RouteNextHopFlags::Onlink;
                }
                Some(RouteAttribute::MultiPath(hops))
            }
            RouteAttribute::CacheInfo(_) | RouteAttribute::Iif(_) => None,
            other => Some(other),
        })
        .collect();
    route
}

fn link(index: u32, up: LinkFlags, attributes: Vec<LinkAttribute>) -> RouteNetlinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.flags = up;
    message.header.change_mask = up;
    message.attributes = attributes;
    RouteNetlinkMessage::SetLink(message)
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

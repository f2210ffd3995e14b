//! Questions to the kernel about links, addresses and routes (rtnetlink(7)).

use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;

use netlink_packet_core::{
    NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{RecvFlags, SendFlags, SocketFlags, SocketType};

/// No message of a dump is longer (netlink(7), NLMSG_GOODSIZE, and what the kernel makes of it).
const LONGEST: usize = 32 << 10;

/// Dumps that are begun again because something changed meanwhile, before what there is has to do.
const ATTEMPTS: usize = 8;

/// The multicast groups that announce changes of links, addresses and routes (rtnetlink(7): RTMGRP_LINK,
/// RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE, RTMGRP_IPV6_IFADDR and RTMGRP_IPV6_ROUTE, in linux/rtnetlink.h).
pub(crate) const ANNOUNCEMENTS: u32 = 0x1 | 0x10 | 0x40 | 0x100 | 0x400;

/// A link's number and name.
pub(crate) type Link = (u32, String);

/// What the kernel says at one moment.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Tables {
    pub(crate) links: Vec<Link>,
    /// Addresses that others can reach, and that can be used now.
    pub(crate) addresses: Vec<AddressMessage>,
    /// Routes of the main table.
    pub(crate) routes: Vec<RouteMessage>,
}

/// A socket to ask by.
#[derive(Debug)]
pub(crate) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Netlink {
    /// Opens it, as a member of the multicast groups in `groups` (a mask of RTMGRP_*); a socket that is asked is in none.
    ///
    /// # Errors
    /// No descriptors.
    pub(crate) fn open(groups: u32, flags: SocketFlags) -> io::Result<Self> {
        let flags = flags | SocketFlags::CLOEXEC;
        let family = rustix::net::AddressFamily::NETLINK;
        let socket = rustix::net::socket_with(family, SocketType::RAW, flags, None)?;
        rustix::net::bind(&socket, &SocketAddrNetlink::new(0, groups))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// The socket.
    pub(crate) fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// Asks for everything.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub(crate) fn tables(&mut self) -> io::Result<Tables> {
        let mut tables = Tables::default();
        self.dump(&RouteNetlinkMessage::GetLink(LinkMessage::default()), |message| {
            if let RouteNetlinkMessage::NewLink(link) = message {
                tables.links.extend(named(&link));
            }
        })?;
        self.dump(&RouteNetlinkMessage::GetAddress(AddressMessage::default()), |message| {
            if let RouteNetlinkMessage::NewAddress(address) = message
                && is_usable(&address)
            {
                tables.addresses.push(address);
            }
        })?;
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut request = RouteMessage::default();
            request.header.address_family = family;
            self.dump(&RouteNetlinkMessage::GetRoute(request), |message| {
                if let RouteNetlinkMessage::NewRoute(route) = message
                    && is_of_main_table(&route)
                {
                    tables.routes.push(route);
                }
            })?;
        }
        Ok(tables)
    }

    /// Asks for all of something.
    fn dump(
        &mut self,
        request: &RouteNetlinkMessage,
        mut each: impl FnMut(RouteNetlinkMessage),
    ) -> io::Result<()> {
        for _ in 0..ATTEMPTS {
            let mut found = Vec::new();
            let whole = self.dump_once(request, &mut found)?;
            if whole {
                found.into_iter().for_each(&mut each);
                return Ok(());
            }
        }
        Err(io::Error::other("the host's network changes faster than it can be read"))
    }

    /// One dump. Whether nothing changed while it was made (NLM_F_DUMP_INTR).
    // syscalls: sendto recvfrom
    fn dump_once(
        &mut self,
        request: &RouteNetlinkMessage,
        found: &mut Vec<RouteNetlinkMessage>,
    ) -> io::Result<bool> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | NLM_F_DUMP;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(request.clone()));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        rustix::net::send(&self.socket, &bytes, SendFlags::empty())?;
        let mut buffer = vec![0; LONGEST];
        let mut whole = true;
        loop {
            let length = match rustix::net::recv(&self.socket, &mut buffer[..], RecvFlags::empty()) {
                Ok((length, _)) => length,
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            let mut rest = buffer.get(..length).unwrap_or_default();
            while let Some((length, message)) = next_message(rest) {
                rest = rest.get(length..).unwrap_or_default();
                // The rest of an earlier dump that was given up.
                let Some(message) = message.filter(|m| m.header.sequence_number == self.sequence) else {
                    continue;
                };
                whole &= message.header.flags & NLM_F_DUMP_INTR == 0;
                match message.payload {
                    NetlinkPayload::InnerMessage(message) => found.push(message),
                    NetlinkPayload::Done(_) => return Ok(whole),
                    NetlinkPayload::Error(error) => return Err(error.to_io()),
                    _ => {}
                }
            }
        }
    }
}

/// The first of some messages, if it can be read, and where the next one begins.
fn next_message(bytes: &[u8]) -> Option<(usize, Option<NetlinkMessage<RouteNetlinkMessage>>)> {
    let length = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
    // A header is 16 bytes long, and each message begins at a multiple of four (netlink(3)).
    let message = bytes.get(..length.max(16))?;
    match NetlinkMessage::deserialize(message) {
        Ok(message) => Some((length.next_multiple_of(4), Some(message))),
        Err(error) => {
            // Kernels learn attributes faster than parsers do.
            tracing::debug!(%error, "a netlink message is passed over");
            Some((length.max(16).next_multiple_of(4), None))
        }
    }
}

fn named(link: &LinkMessage) -> Option<Link> {
    let name =
        link.attributes.iter().find_map(|a| if let LinkAttribute::IfName(n) = a { Some(n) } else { None })?;
    Some((link.header.index, name.clone()))
}

/// Whether others can reach the address, now.
fn is_usable(address: &AddressMessage) -> bool {
    let unusable =
        AddressHeaderFlags::Tentative | AddressHeaderFlags::Dadfailed | AddressHeaderFlags::Deprecated;
    let header = &address.header;
    matches!(header.scope, AddressScope::Universe | AddressScope::Site) && !header.flags.intersects(unusable)
}

/// Whether it is a route that packets are sent by, not an answer that the kernel keeps.
fn is_of_main_table(route: &RouteMessage) -> bool {
    let header = &route.header;
    header.table == RouteHeader::RT_TABLE_MAIN
        && header.kind == RouteType::Unicast
        && !header.flags.contains(RouteFlags::Cloned)
}

/// The address itself: on a point-to-point link the other end has the other attribute.
pub(crate) fn own_address(address: &AddressMessage) -> Option<IpAddr> {
    let attributes = || address.attributes.iter();
    attributes().find_map(|a| if let AddressAttribute::Local(ip) = a { Some(*ip) } else { None }).or_else(
        || attributes().find_map(|a| if let AddressAttribute::Address(ip) = a { Some(*ip) } else { None }),
    )
}

/// One hop of a route: the interface that it leaves by, and the router, if there is one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Hop {
    pub(crate) interface: u32,
    pub(crate) gateway: Option<IpAddr>,
    /// How much of the traffic it takes.
    pub(crate) weight: u8,
}

impl Hop {
    fn new(interface: u32, weight: u8, attributes: &[RouteAttribute]) -> Self {
        let mut hop = Self { interface, gateway: None, weight };
        for attribute in attributes {
            match attribute {
                RouteAttribute::Gateway(RouteAddress::Inet(gateway)) => hop.gateway = Some((*gateway).into()),
                RouteAttribute::Gateway(RouteAddress::Inet6(gateway)) => {
                    hop.gateway = Some((*gateway).into())
                }
                RouteAttribute::Oif(interface) => hop.interface = *interface,
                _ => {}
            }
        }
        hop
    }
}

/// A route's hops: one, if it is not a multipath route.
pub(crate) fn hops(route: &RouteMessage) -> Vec<Hop> {
    let several = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::MultiPath(hops) => Some(hops),
        _ => None,
    });
    match several {
        Some(hops) => {
            hops.iter().map(|hop| Hop::new(hop.interface_index, hop.hops, &hop.attributes)).collect()
        }
        None => vec![Hop::new(0, 0, &route.attributes)],
    }
}

/// A route's metric: the least is preferred.
pub(crate) fn metric(route: &RouteMessage) -> u32 {
    route
        .attributes
        .iter()
        .find_map(|a| if let RouteAttribute::Priority(m) = a { Some(*m) } else { None })
        .unwrap_or(0)
}

/// Whether it is a route to everywhere.
pub(crate) fn is_default(route: &RouteMessage) -> bool {
    route.header.destination_prefix_length == 0
}

/// Whether it is of that family.
pub(crate) fn is_of(family: AddressFamily, v6: bool) -> bool {
    family == if v6 { AddressFamily::Inet6 } else { AddressFamily::Inet }
}

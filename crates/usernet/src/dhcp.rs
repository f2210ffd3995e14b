//! A DHCP server with one lease (RFC 2131): the guest's own address, which is nobody else's.
//!
//! The lease ends only so that the guest asks again, and learns what has changed. One of the address that is given while
//! the host has no network is short, because that is expected to change.
//!
//! There is no state. A guest is offered its address whatever it asks for; asks it for another one, it is told no,
//! and asks again. A client that wants the rapid commit (RFC 4039) has its lease at once. The gateway is the server.
//!
//! A gateway that is not within the guest's prefix (a prefix of 32 bits, or a host whose router is elsewhere) is
//! made reachable by a classless route (RFC 3442), which comes before the default route.

use std::net::{IpAddr, Ipv4Addr};

use dhcproto::v4::fqdn::{ClientFQDN, FqdnFlags};
use dhcproto::v4::{DhcpOption, Message, MessageType, Opcode, OptionCode};
use dhcproto::{Decodable, Encodable, Name};
use ipnet::Ipv4Net;

use crate::config::{Config, Family};
use crate::context::Context;
use crate::host::ALONE;
use crate::packet::{Addresses, UdpView};

/// The server's port.
pub(crate) const SERVER: u16 = 67;
/// The client's.
const CLIENT: u16 = 68;

/// How long a lease is in seconds. A client renews it after half of that (RFC 2131 4.4.5).
const LEASE: u32 = 3600;
/// And on a host without a network.
const LEASE_ALONE: u32 = 60;

/// The least length of a BOOTP message (RFC 951 3), which some clients insist on.
const SHORTEST: usize = 300;

/// Longer messages are no client's: they fit the least MTU of anything in use.
pub(crate) const LONGEST_REQUEST: usize = 1500;

/// Bytes of a hardware address of Ethernet.
const ETHERNET: u8 = 6;

pub(crate) fn packet(cx: &mut Context<'_>, datagram: &UdpView<'_>) {
    let Some(family) = cx.config.ipv4 else { return };
    if datagram.payload.bytes.len() > LONGEST_REQUEST {
        return;
    }
    let Some(request) = filtered(datagram.payload.bytes).and_then(|bytes| Message::from_bytes(&bytes).ok())
    else {
        cx.link.stats.dropped.malformed += 1;
        return;
    };
    let Some(reply) = answer(cx.config, &family, &request) else { return };
    let Ok(mut bytes) = reply.to_vec() else { return };
    if bytes.len() < SHORTEST {
        bytes.resize(SHORTEST, 0);
    }
    let refused = reply.opts().has_msg_type(MessageType::Nak);
    // RFC 2131 4.1.
    let destination = if refused {
        Ipv4Addr::BROADCAST
    } else if !request.ciaddr().is_unspecified() {
        request.ciaddr()
    } else if request.flags().broadcast() {
        Ipv4Addr::BROADCAST
    } else {
        reply.yiaddr()
    };
    let addresses = Addresses::V4 { source: family.gateway, destination };
    cx.send_udp(addresses, (SERVER, CLIENT), &bytes);
}

/// A request with no options but those that matter here, in their right lengths: the parser knows many
/// more, and takes some on trust. `None` if the options do not fit.
fn filtered(request: &[u8]) -> Option<Vec<u8>> {
    /// Where the options begin: after BOOTP's fields and the cookie that says that there are some.
    const OPTIONS: usize = 240;
    const PAD: u8 = 0;
    const END: u8 = 255;
    let (header, mut rest) = request.split_at_checked(OPTIONS)?;
    let mut filtered = header.to_vec();
    let mut seen = [false; 256];
    loop {
        match *rest {
            [] | [END, ..] => break,
            [PAD, ..] => rest = rest.get(1..)?,
            [code, length, ..] => {
                let (option, next) = rest.split_at_checked(2 + usize::from(length))?;
                let wanted = match OptionCode::from(code) {
                    OptionCode::MessageType => length == 1,
                    OptionCode::RequestedIpAddress | OptionCode::ServerIdentifier => length == 4,
                    OptionCode::RapidCommit => length == 0,
                    _ => false,
                };
                // The parser joins options of one kind: the first counts here.
                if wanted && !std::mem::replace(&mut seen[usize::from(code)], true) {
                    filtered.extend(option);
                }
                rest = next;
            }
            [_] => return None,
        }
    }
    filtered.push(END);
    Some(filtered)
}

/// What a client is told, if anything.
fn answer(config: &Config, family: &Family<Ipv4Addr>, request: &Message) -> Option<Message> {
    // The crate hands out as many bytes of its hardware address as the client says that it has: check before.
    if request.opcode() != Opcode::BootRequest || request.hlen() != ETHERNET {
        return None;
    }
    let options = request.opts();
    let rapid = options.contains(OptionCode::RapidCommit);
    let kind = match options.msg_type()? {
        MessageType::Discover if rapid => MessageType::Ack,
        MessageType::Discover => MessageType::Offer,
        MessageType::Request => {
            if let Some(DhcpOption::ServerIdentifier(server)) = options.get(OptionCode::ServerIdentifier)
                && *server != family.gateway
            {
                return None;
            }
            let wanted = match options.get(OptionCode::RequestedIpAddress) {
                Some(DhcpOption::RequestedIpAddress(wanted)) => *wanted,
                _ => request.ciaddr(),
            };
            if wanted == family.guest { MessageType::Ack } else { MessageType::Nak }
        }
        MessageType::Inform => MessageType::Ack,
        _ => return None,
    };
    let mut reply = Message::default();
    reply
        .set_opcode(Opcode::BootReply)
        .set_htype(request.htype())
        .set_xid(request.xid())
        .set_flags(request.flags())
        .set_giaddr(request.giaddr())
        .set_chaddr(request.chaddr());
    let told = reply.opts_mut();
    told.insert(DhcpOption::MessageType(kind));
    told.insert(DhcpOption::ServerIdentifier(family.gateway));
    if kind == MessageType::Nak {
        return Some(reply);
    }
    if !options.has_msg_type(MessageType::Inform) {
        let lease = if family.guest == ALONE.0 { LEASE_ALONE } else { LEASE };
        told.insert(DhcpOption::AddressLeaseTime(lease));
        if rapid && options.has_msg_type(MessageType::Discover) {
            told.insert(DhcpOption::RapidCommit);
        }
        reply.set_yiaddr(family.guest);
    }
    describe(config, family, &mut reply);
    Some(reply)
}

/// Adds what the guest's network looks like.
fn describe(config: &Config, family: &Family<Ipv4Addr>, reply: &mut Message) {
    let told = reply.opts_mut();
    if let Ok(network) = Ipv4Net::new(family.guest, family.prefix) {
        told.insert(DhcpOption::SubnetMask(network.netmask()));
        if !network.contains(&family.gateway) {
            let everywhere = Ipv4Net::default();
            let mut routes = vec![(everywhere, family.gateway)];
            if let Ok(gateway) = Ipv4Net::new(family.gateway, 32) {
                routes.insert(0, (gateway, Ipv4Addr::UNSPECIFIED));
            }
            told.insert(DhcpOption::ClasslessStaticRoute(routes));
        }
    }
    told.insert(DhcpOption::Router(vec![family.gateway]));
    if config.mtu != 0 {
        told.insert(DhcpOption::InterfaceMtu(config.mtu));
    }
    let resolvers: Vec<Ipv4Addr> =
        config.dns.iter().filter_map(|r| if let IpAddr::V4(r) = r { Some(*r) } else { None }).collect();
    if !resolvers.is_empty() {
        told.insert(DhcpOption::DomainNameServer(resolvers));
    }
    let search: Vec<Name> = config.search.iter().filter_map(|domain| Name::from_ascii(domain).ok()).collect();
    if !search.is_empty() {
        told.insert(DhcpOption::DomainSearch(search));
    }
    if let Some(hostname) = &config.hostname {
        told.insert(DhcpOption::Hostname(hostname.clone()));
    }
    if let Some(Ok(name)) = config.fqdn.as_deref().map(Name::from_ascii) {
        // In the encoding of the wire; the server has set the name, and registers it nowhere (RFC 4702 2.1).
        let flags = FqdnFlags::default().set_e(true).set_o(true).set_n(true);
        told.insert(DhcpOption::ClientFQDN(ClientFQDN::new(flags, name)));
    }
}

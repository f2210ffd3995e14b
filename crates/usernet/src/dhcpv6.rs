//! A DHCPv6 server with one address (RFC 8415): the guest's own. Its lifetimes are there for the guest to ask again, and to
//! learn what has changed.
//!
//! Without state, as DHCP is: every request is answered from the configuration alone. Temporary addresses are not
//! given out, prefixes are not delegated, relays are not listened to: there is none between a guest and its link.

use std::net::{IpAddr, Ipv6Addr};

use dhcproto::v6::{
    DhcpOption, DhcpOptions, IAAddr, IANA, IATA, Message, MessageType, OptionCode, Status, StatusCode,
    UnknownOption,
};
use dhcproto::{Decodable, Encodable, Name};

use crate::config::{Config, Family};
use crate::context::Context;
use crate::dhcp::LONGEST_REQUEST;
use crate::host::ALONE_V6;
use crate::ndp;
use crate::packet::{Addresses, UdpView};

/// The server's port.
pub(crate) const SERVER: u16 = 547;
/// The client's.
const CLIENT: u16 = 546;

/// All servers of the link (RFC 8415 7.1).
pub(crate) const SERVERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2);

/// How long an address is preferred and valid, in seconds. A client renews it after half of the first (RFC 8415 14.2).
const LIFETIMES: (u32, u32) = (3600, 7200);
/// And on a host without a network.
const LIFETIMES_ALONE: (u32, u32) = (60, 120);

/// The option of the client's name (RFC 4704), which `dhcproto` leaves to its users.
const CLIENT_FQDN: u16 = 39;

pub(crate) fn packet(cx: &mut Context<'_>, datagram: &UdpView<'_>) {
    let (Some(family), Addresses::V6 { source, .. }) = (cx.config.ipv6, datagram.ip.addresses) else {
        return;
    };
    if datagram.payload.bytes.len() > LONGEST_REQUEST {
        return;
    }
    let Some(request) = filtered(datagram.payload.bytes).and_then(|bytes| Message::from_bytes(&bytes).ok())
    else {
        cx.link.stats.dropped.malformed += 1;
        return;
    };
    let Some(Ok(reply)) = answer(cx.config, &family, &request).map(|reply| reply.to_vec()) else { return };
    let addresses = Addresses::V6 { source: ndp::link_local(&family), destination: source };
    cx.send_udp(addresses, (SERVER, CLIENT), &reply);
}

/// A request with no options but those that matter here, in their right lengths: the parser knows many more,
/// takes some on trust, and calls itself for options within options. `None` if the options do not fit.
fn filtered(request: &[u8]) -> Option<Vec<u8>> {
    /// Of the message type and the transaction's number.
    const HEADER: usize = 4;
    /// Fields of associations (RFC 8415 21.4, 21.5) and of addresses in them (21.6), before their own options.
    const IA_NA: usize = 12;
    const IA_TA: usize = 4;
    const ADDRESS: usize = 24;
    let (header, options) = request.split_at_checked(HEADER)?;
    let mut filtered = header.to_vec();
    each_option(options, |code, value| match OptionCode::from(code) {
        OptionCode::ClientId | OptionCode::ServerId => push_option(&mut filtered, code, value),
        OptionCode::RapidCommit => push_option(&mut filtered, code, &[]),
        OptionCode::IATA => push_option(&mut filtered, code, value.get(..IA_TA)?),
        OptionCode::IANA => {
            let (fields, options) = value.split_at_checked(IA_NA)?;
            let mut association = fields.to_vec();
            each_option(options, |code, value| match OptionCode::from(code) {
                OptionCode::IAAddr => push_option(&mut association, code, value.get(..ADDRESS)?),
                _ => Some(()),
            })?;
            push_option(&mut filtered, code, &association)
        }
        _ => Some(()),
    })?;
    Some(filtered)
}

/// Calls `each` with the code and the value of all options; `None` if they do not fit, or it says so.
fn each_option(mut options: &[u8], mut each: impl FnMut(u16, &[u8]) -> Option<()>) -> Option<()> {
    while let Some((header, rest)) = options.split_first_chunk::<4>() {
        let [a, b, c, d] = *header;
        let (value, rest) = rest.split_at_checked(u16::from_be_bytes([c, d]).into())?;
        each(u16::from_be_bytes([a, b]), value)?;
        options = rest;
    }
    options.is_empty().then_some(())
}

fn push_option(to: &mut Vec<u8>, code: u16, value: &[u8]) -> Option<()> {
    to.extend(code.to_be_bytes());
    to.extend(u16::try_from(value.len()).ok()?.to_be_bytes());
    to.extend(value);
    Some(())
}

/// The server's name: DUID-LL (RFC 8415 11.4) of the gateway's Ethernet address.
fn server_id(config: &Config) -> Vec<u8> {
    [[0, 3, 0, 1].as_slice(), &config.gateway_mac].concat()
}

/// What a client is told, if anything (RFC 8415 16 says which messages are to be ignored, 18.3 what is said).
fn answer(config: &Config, family: &Family<Ipv6Addr>, request: &Message) -> Option<Message> {
    use MessageType::{
        Advertise, Confirm, Decline, InformationRequest, Rebind, Release, Renew, Reply, Request, Solicit,
    };
    let asked = request.opts();
    let client = match asked.get(OptionCode::ClientId) {
        Some(DhcpOption::ClientId(id)) => Some(id.clone()),
        _ => None,
    };
    let for_us = match asked.get(OptionCode::ServerId) {
        Some(DhcpOption::ServerId(id)) => Some(*id == server_id(config)),
        _ => None,
    };
    let kind = request.msg_type();
    let valid = match kind {
        Solicit | Confirm | Rebind => client.is_some() && for_us.is_none(),
        Request | Renew | Release | Decline => client.is_some() && for_us == Some(true),
        InformationRequest => for_us != Some(false),
        _ => false,
    };
    if !valid {
        return None;
    }
    let rapid = kind == Solicit && asked.get(OptionCode::RapidCommit).is_some();
    let mut reply =
        Message::new_with_id(if kind == Solicit && !rapid { Advertise } else { Reply }, request.xid());
    let told = reply.opts_mut();
    told.insert(DhcpOption::ServerId(server_id(config)));
    if let Some(client) = client {
        told.insert(DhcpOption::ClientId(client));
    }
    if rapid {
        told.insert(DhcpOption::RapidCommit);
    }
    match kind {
        Confirm => {
            // Without an address there is nothing to confirm (18.3.3).
            let mut addresses = asked.iter().flat_map(addresses_of).peekable();
            addresses.peek()?;
            let on_link = addresses.all(|address| address == family.guest);
            told.insert(status(if on_link { Status::Success } else { Status::NotOnLink }));
        }
        Release | Decline => {
            told.insert(status(Status::Success));
            return Some(reply);
        }
        InformationRequest => {}
        _ => {
            for option in asked.iter() {
                match option {
                    DhcpOption::IANA(ia) => told.insert(DhcpOption::IANA(assign(family, kind, ia))),
                    DhcpOption::IATA(ia) => {
                        let opts = DhcpOptions::from_iter([status(Status::NoAddrsAvail)]);
                        told.insert(DhcpOption::IATA(IATA { id: ia.id, opts }));
                    }
                    _ => {}
                }
            }
        }
    }
    describe(config, told);
    Some(reply)
}

/// The addresses that a client says it has.
fn addresses_of(option: &DhcpOption) -> Vec<Ipv6Addr> {
    let DhcpOption::IANA(ia) = option else { return Vec::new() };
    ia.opts.iter().filter_map(|o| if let DhcpOption::IAAddr(a) = o { Some(a.addr) } else { None }).collect()
}

/// The address of one association.
fn assign(family: &Family<Ipv6Addr>, kind: MessageType, asked: &IANA) -> IANA {
    let lease = |addr, (preferred_life, valid_life)| {
        DhcpOption::IAAddr(IAAddr { addr, preferred_life, valid_life, opts: DhcpOptions::new() })
    };
    let lifetimes = if family.guest == ALONE_V6.0 { LIFETIMES_ALONE } else { LIFETIMES };
    let wrong = addresses_of(&DhcpOption::IANA(asked.clone())).into_iter().filter(|a| *a != family.guest);
    let mut opts = DhcpOptions::new();
    match kind {
        // Solicited addresses are no more than hints.
        MessageType::Solicit => opts.insert(lease(family.guest, lifetimes)),
        MessageType::Request if wrong.clone().next().is_some() => opts.insert(status(Status::NotOnLink)),
        _ => {
            opts.insert(lease(family.guest, lifetimes));
            wrong.for_each(|addr| opts.insert(lease(addr, (0, 0))));
        }
    }
    // No time at which to ask again: the client's choice (21.4).
    IANA { id: asked.id, t1: 0, t2: 0, opts }
}

fn status(status: Status) -> DhcpOption {
    DhcpOption::StatusCode(StatusCode { status, msg: String::new() })
}

/// Adds what the guest's network looks like.
fn describe(config: &Config, told: &mut DhcpOptions) {
    let resolvers: Vec<Ipv6Addr> =
        config.dns.iter().filter_map(|r| if let IpAddr::V6(r) = r { Some(*r) } else { None }).collect();
    if !resolvers.is_empty() {
        told.insert(DhcpOption::DomainNameServers(resolvers));
    }
    let search: Vec<Name> = config.search.iter().filter_map(|domain| Name::from_ascii(domain).ok()).collect();
    if !search.is_empty() {
        told.insert(DhcpOption::DomainSearchList(search));
    }
    if let Some(name) = config.fqdn.as_deref().and_then(ndp::encoded_name) {
        // No flags: the server registers the name nowhere (RFC 4704 4.1).
        let data = [&[0], name.as_slice()].concat();
        told.insert(DhcpOption::Unknown(UnknownOption::new(OptionCode::from(CLIENT_FQDN), data)));
    }
}

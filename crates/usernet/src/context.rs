//! What the engine gives to the protocols while they handle something.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Instant;

use crate::config::{Config, Family, MacAddress, Outbound};
use crate::group::Guest;
use crate::ndp;
use crate::poller::Poller;
use crate::socket::Binding;
use crate::splice::Bypass;
use crate::stats::Stats;
use crate::tap::{Abilities, Offload, Sent, Tap};
use crate::warn::Warnings;

/// The way to the guest, and what is known about the guest.
pub(crate) struct Link {
    pub(crate) tap: Box<dyn Tap>,
    /// The guest's Ethernet address, once known; broadcast before.
    pub(crate) guest_mac: MacAddress,
    /// The guest's IPv4 address: what it was last seen with, before that the one in the configuration.
    pub(crate) guest_v4: Option<Ipv4Addr>,
    /// The guest's IPv6 address, likewise. Never link-local: a guest may make up its own within the prefix, and that is
    /// the one to reach it by.
    pub(crate) guest_v6: Option<Ipv6Addr>,
    /// Set when the tap said [`Sent::Full`]; cleared when it may have room again. Protocols with data left to send
    /// are then called to go on.
    pub(crate) full: bool,
    /// Frames that [`Self::send_or_hold`] keeps until there is room.
    held: VecDeque<Held>,
    /// Why the link is gone, once it is.
    pub(crate) lost: Option<io::Error>,
    pub(crate) stats: Stats,
    pub(crate) warnings: Warnings,
    /// Takes what comes from the host's loopback to forwarded ports.
    pub(crate) bypass: Option<Bypass>,
    identification: u32,
    /// A port of the host's loopback to which everything goes, so that tests with any frames stay on the host.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) contained: Option<u16>,
}

struct Held {
    frame: Vec<u8>,
    offload: Offload,
}

/// A longest UDP datagram cut to a small MTU is 45 frames; answers to the guest's own questions come on top of it.
const MOST_HELD: usize = 128;

impl Link {
    pub(crate) fn new(tap: Box<dyn Tap>, config: &Config) -> Self {
        Self {
            tap,
            guest_mac: config.guest_mac.unwrap_or([0xff; 6]),
            guest_v4: config.ipv4.map(|family| family.guest),
            guest_v6: config.ipv6.map(|family| family.guest),
            full: false,
            held: VecDeque::new(),
            lost: None,
            stats: Stats::default(),
            warnings: Warnings::default(),
            bypass: None,
            identification: 0,
            #[cfg(any(test, feature = "testing"))]
            contained: None,
        }
    }

    /// The guest's network is another. It goes on by the address that it was seen with, if it had one.
    pub(crate) fn reconfigured(&mut self, config: &Config) {
        self.guest_v4 = self.guest_v4.or(config.ipv4.map(|family| family.guest));
        self.guest_v6 = self.guest_v6.or(config.ipv6.map(|family| family.guest));
    }

    /// What is known of the guest.
    pub(crate) fn guest(&self) -> Guest {
        Guest { mac: self.guest_mac, v4: self.guest_v4, v6: self.guest_v6 }
    }

    pub(crate) fn abilities(&self) -> Abilities {
        self.tap.abilities()
    }

    /// Sends a frame: headers from Ethernet on, and payload.
    ///
    /// # Errors
    /// When the link is gone: [`Self::lost`] then says why, and the engine ends by itself.
    pub(crate) fn send(&mut self, header: &[u8], payload: &[u8], offload: Offload) -> io::Result<Sent> {
        if self.full {
            return Ok(Sent::Full);
        }
        match self.tap.send(header, payload, offload) {
            Ok(Sent::Yes) => {
                self.stats.frames_out += 1;
                self.stats.bytes_out += (header.len() + payload.len()) as u64;
                Ok(Sent::Yes)
            }
            Ok(Sent::Full) => {
                self.full = true;
                Ok(Sent::Full)
            }
            Err(error) => {
                let kind = error.kind();
                self.lost.get_or_insert(error);
                Err(kind.into())
            }
        }
    }

    /// Sends a frame of a protocol that could not repeat it: without room it is kept, as long as there are not too many
    /// already. Whoever has a choice looks at [`Self::full`] first.
    pub(crate) fn send_or_hold(&mut self, header: &[u8], payload: &[u8], offload: Offload) {
        match self.send(header, payload, offload) {
            Ok(Sent::Full) if self.held.len() < MOST_HELD => {
                self.held.push_back(Held { frame: [header, payload].concat(), offload });
            }
            Ok(Sent::Full) => self.stats.overruns += 1,
            // Either it is on its way or the link is gone.
            Ok(Sent::Yes) | Err(_) => {}
        }
    }

    /// A number for the fragments of the next datagram.
    pub(crate) fn next_identification(&mut self) -> u32 {
        self.identification = self.identification.wrapping_add(1);
        self.identification
    }

    /// The tap may have room again: sends what was kept.
    pub(crate) fn flush(&mut self) {
        self.full = false;
        while let Some(Held { frame, offload }) = self.held.pop_front() {
            if let Ok(Sent::Full) = self.send(&frame, &[], offload) {
                self.held.push_front(Held { frame, offload });
                return;
            }
        }
    }
}

/// Who may have a descriptor to spare when the host has no more.
pub(crate) trait Spare {
    /// Gives one up, if it belongs to something that was idle for a while. Whether it did.
    fn give_up(&mut self, now: Instant) -> bool;
}

/// Everything outside a protocol's own tables.
pub(crate) struct Context<'a> {
    pub(crate) config: &'a Config,
    pub(crate) link: &'a mut Link,
    pub(crate) poller: &'a Poller,
    /// When the present event was noticed.
    pub(crate) now: Instant,
    /// The other protocols, for one that runs out of descriptors; `None` where it does not ask.
    pub(crate) spare: Option<&'a mut dyn Spare>,
}

/// Ports of a resolver: DNS, and DNS over TLS (RFC 7858).
pub(crate) const RESOLVER_PORTS: [u16; 2] = [53, 853];

impl Context<'_> {
    /// Where the host's socket goes for what the guest calls `destination`: a resolver, the host's loopback, its own
    /// address, or the same.
    pub(crate) fn outside(&self, destination: SocketAddr) -> SocketAddr {
        let ip = destination.ip();
        #[cfg(any(test, feature = "testing"))]
        if let Some(port) = self.link.contained {
            return SocketAddr::new(loopback(ip), port);
        }
        if RESOLVER_PORTS.contains(&destination.port())
            && let Some((_, resolver)) = self.config.dns_forward.iter().find(|(inside, _)| *inside == ip)
        {
            return SocketAddr::new(*resolver, destination.port());
        }
        let ip = if self.is_host_loopback(ip) { loopback(ip) } else { self.host_global(ip).unwrap_or(ip) };
        SocketAddr::new(ip, destination.port())
    }

    /// What the host's socket that goes to `peer` is bound to: nothing, if that is the host itself. It would not be found
    /// from there.
    pub(crate) fn binding(&self, peer: IpAddr) -> Binding<'_> {
        let Outbound { address_v4, address_v6, interface_v4, interface_v6 } = &self.config.outbound;
        let (own, address, interface) = match peer {
            IpAddr::V4(peer) => (
                self.config.ipv4.is_some_and(|family| family.guest == peer),
                address_v4.map(IpAddr::from),
                interface_v4,
            ),
            IpAddr::V6(peer) => (
                self.config.ipv6.is_some_and(|family| family.guest == peer),
                address_v6.map(IpAddr::from),
                interface_v6,
            ),
        };
        if own || peer.is_loopback() {
            return Binding::default();
        }
        Binding { address, interface: interface.as_deref() }
    }

    /// The host's own address, if `address` stands for it.
    fn host_global(&self, address: IpAddr) -> Option<IpAddr> {
        match address {
            IpAddr::V4(a) => {
                self.config.ipv4.filter(|family| family.host_global == Some(a)).map(|f| f.guest.into())
            }
            IpAddr::V6(a) => {
                self.config.ipv6.filter(|family| family.host_global == Some(a)).map(|f| f.guest.into())
            }
        }
    }

    /// Whether the guest means the host's loopback by `address`.
    pub(crate) fn is_host_loopback(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(a) => self.config.ipv4.is_some_and(|family| family.host_loopback == Some(a)),
            IpAddr::V6(a) => self.config.ipv6.is_some_and(|family| family.host_loopback == Some(a)),
        }
    }

    /// Whether `address` is the engine's own: it stands for the host or a resolver, or is the router's on the link.
    pub(crate) fn is_ours(&self, address: IpAddr) -> bool {
        let router = self.config.ipv6.is_some_and(|family| address == ndp::link_local(&family));
        router
            || self.is_host_loopback(address)
            || self.host_global(address).is_some()
            || self.config.dns_forward.iter().any(|(inside, _)| *inside == address)
    }

    /// How the guest is told about a peer that the host knows as `source`. The host itself goes by the addresses that
    /// stand for it: its own address, which the guest has too, by that for it if there is one; everything else that the
    /// guest would take for itself or its link by that for the loopback, or else the gateway's.
    pub(crate) fn inside(&self, source: SocketAddr) -> SocketAddr {
        let ip = source.ip().to_canonical();
        let stand_in = match ip {
            IpAddr::V4(a) => self.config.ipv4.and_then(|family| {
                let own = a == family.guest;
                let hidden = a.is_loopback() || a.is_unspecified() || Some(a) == self.link.guest_v4;
                family
                    .host_global
                    .filter(|_| own)
                    .or((own || hidden).then(|| stand_in(&family)))
                    .map(IpAddr::from)
            }),
            IpAddr::V6(a) => self.config.ipv6.and_then(|family| {
                let own = a == family.guest;
                let hidden = a.is_loopback()
                    || a.is_unspecified()
                    || a.is_unicast_link_local()
                    || Some(a) == self.link.guest_v6;
                family
                    .host_global
                    .filter(|_| own)
                    .or((own || hidden).then(|| stand_in(&family)))
                    .map(IpAddr::from)
            }),
        };
        SocketAddr::new(stand_in.unwrap_or(ip), source.port())
    }

    /// Where something goes that comes from `peer` (as the host knows it) by a forwarded port that leads to `target`,
    /// or to the guest's own address: the address, and whom the guest is told it comes from. A peer of another family
    /// than the address goes by the one that stands for the host. `None` if the guest has no address.
    pub(crate) fn arrival(&self, peer: SocketAddr, target: Option<IpAddr>) -> Option<(IpAddr, SocketAddr)> {
        let peer = self.inside(peer);
        let address = target
            .or_else(|| self.guest_address(peer.ip()))
            .or(self.link.guest_v4.map(IpAddr::V4))
            .or(self.link.guest_v6.map(IpAddr::V6))?;
        let told = match address {
            _ if address.is_ipv4() == peer.is_ipv4() => peer.ip(),
            IpAddr::V4(_) => stand_in(&self.config.ipv4?).into(),
            IpAddr::V6(_) => stand_in(&self.config.ipv6?).into(),
        };
        Some((address, SocketAddr::new(told, peer.port())))
    }

    /// The guest's address to which something from `peer` (as the guest knows it) is sent; `None` if the guest does not
    /// have that family.
    pub(crate) fn guest_address(&self, peer: IpAddr) -> Option<IpAddr> {
        match peer {
            IpAddr::V4(_) => self.link.guest_v4.map(IpAddr::V4),
            IpAddr::V6(_) => self.link.guest_v6.map(IpAddr::V6),
        }
    }
}

/// The loopback address of `like`'s family.
fn loopback(like: IpAddr) -> IpAddr {
    match like {
        IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    }
}

/// The address by which the guest is told of the host.
fn stand_in<A: Copy>(family: &Family<A>) -> A {
    family.host_loopback.unwrap_or(family.gateway)
}

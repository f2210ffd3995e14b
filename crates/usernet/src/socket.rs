//! The host's sockets: what those of every protocol are bound to, and all of the datagram ones.
//!
//! Opening, and what needs control messages: which address a datagram came to ([`receive`], [`Inbox`]) and goes from
//! ([`send`]), and why one did not get through ([`next_error`]; ip(7) IP_RECVERR). rustix has no types for those
//! messages; nix does.

mod inbox;

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::libc;
use nix::sys::socket::sockopt::{
    BindToDevice, Ipv4PacketInfo, Ipv4RecvErr, Ipv6RecvErr, Ipv6RecvPacketInfo, UdpGroSegment,
};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, RecvMsg, SockaddrStorage, recvmsg, sendmsg, setsockopt,
};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SocketFlags, SocketType, bind, connect, getsockname, ipproto, recv,
    socket_with, sockopt,
};

use crate::config::Forward;
use crate::frame::IcmpError;
use crate::packet::Datagrams;
pub(crate) use inbox::{Appetite, Inbox};

/// Room for the control messages asked for here.
const CONTROL: usize = 256;

/// What a socket's buffers are to hold, in bytes.
const BUFFER: usize = 1 << 20;

/// Datagrams thrown away at most that arrived before a socket was connected.
const MOST_STRAY: usize = 64;

fn open(of: &SocketAddr, protocol: Option<Protocol>) -> io::Result<OwnedFd> {
    let family = if of.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    // syscalls: socket bind connect setsockopt getsockname
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = socket_with(family, SocketType::DGRAM, flags, protocol)?;
    // As much as the host allows (net.core.rmem_max): a burst must last until the engine comes round to it.
    let _ = sockopt::set_socket_recv_buffer_size(&fd, BUFFER);
    let _ = sockopt::set_socket_send_buffer_size(&fd, BUFFER);
    Ok(fd)
}

/// Any address of `like`'s family.
fn unspecified(like: &SocketAddr) -> IpAddr {
    if like.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() }
}

/// What the host's end of an outbound socket is bound to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Binding<'a> {
    /// Its address; of the peer's family.
    pub(crate) address: Option<IpAddr>,
    /// The interface that its packets leave and come by.
    pub(crate) interface: Option<&'a str>,
}

impl Binding<'_> {
    /// Binds the socket's interface.
    ///
    /// # Errors
    /// `ENODEV` if there is no such interface, `EPERM` before Linux 5.7.
    pub(crate) fn bind_interface(&self, fd: &OwnedFd) -> Result<(), Errno> {
        self.interface.map_or(Ok(()), |interface| bind_interface(fd, interface))
    }

    /// The address to bind to before connecting to `peer`: any, if it does not matter.
    fn address_for(&self, peer: &SocketAddr) -> IpAddr {
        self.address.unwrap_or_else(|| unspecified(peer))
    }
}

/// Has the socket be reached by `interface` alone.
///
/// # Errors
/// `ENODEV` if there is no such interface, `EPERM` before Linux 5.7.
pub(crate) fn bind_interface(fd: &OwnedFd, interface: &str) -> Result<(), Errno> {
    setsockopt(fd.as_raw_fd(), BindToDevice, &interface.into())
        .map_err(|error| Errno::from_raw_os_error(error as i32))
}

/// Binds a socket that is to listen for `forward`. One for any address of IPv6 serves IPv4 too, whatever the system's
/// default. `freebind` allows an address that the host does not have (yet).
///
/// # Errors
/// The address is taken or not the host's, the port forbidden, or there is no such interface.
pub(crate) fn bind_forward(fd: &OwnedFd, forward: &Forward, freebind: bool) -> io::Result<()> {
    let address = forward.listen;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(fd, !address.ip().is_unspecified())?;
    }
    if freebind {
        if address.is_ipv6() {
            sockopt::set_ipv6_freebind(fd, true)
        } else {
            sockopt::set_ip_freebind(fd, true)
        }?;
    }
    if let Some(interface) = &forward.interface {
        bind_interface(fd, interface)?;
    }
    // syscalls: bind
    Ok(bind(fd, &address)?)
}

/// Has the errors of datagrams kept, with their reasons.
fn keep_errors(fd: &OwnedFd, v6: bool) -> io::Result<()> {
    if v6 {
        setsockopt(fd.as_raw_fd(), Ipv6RecvErr, &true)?;
    }
    // A socket of IPv6 may be sending over IPv4. One that is for IPv6 alone does not mind.
    setsockopt(fd.as_raw_fd(), Ipv4RecvErr, &true)?;
    Ok(())
}

/// A UDP socket bound as `binding` says and connected to `peer`, from the guest's own `port` if the host has it free.
///
/// The port may be shared with other flows of the same guest port (SO_REUSEADDR): connected sockets are told apart by
/// their peers. What arrived before it was connected may be somebody else's, and is thrown away.
///
/// # Errors
/// No descriptors, no way to `peer`, or nothing to bind to.
pub(crate) fn connected_udp(peer: SocketAddr, port: u16, binding: &Binding<'_>) -> io::Result<OwnedFd> {
    let fd = open(&peer, None)?;
    keep_errors(&fd, peer.is_ipv6())?;
    binding.bind_interface(&fd)?;
    let address = binding.address_for(&peer);
    // To the host itself, the guest's port may be the very one that it wants to talk to.
    let mut bound = false;
    if !peer.ip().is_loopback() && port != peer.port() {
        sockopt::set_socket_reuseaddr(&fd, true)?;
        // Taken or forbidden: then the kernel chooses.
        bound = bind(&fd, &SocketAddr::new(address, port)).is_ok();
    }
    if !bound && !address.is_unspecified() {
        bind(&fd, &SocketAddr::new(address, 0))?;
    }
    connect(&fd, &peer)?;
    for _ in 0..MOST_STRAY {
        if recv(&fd, &mut [0u8; 0][..], RecvFlags::TRUNC).is_err() {
            break;
        }
    }
    Ok(fd)
}

/// A UDP socket that takes datagrams from anybody to where `forward` listens. One that shares its port gets the datagrams
/// of some peers, and others of this process those of the rest.
///
/// # Errors
/// As [`bind_forward`], or no descriptors.
pub(crate) fn listening_udp(forward: &Forward, freebind: bool, shares_port: bool) -> io::Result<OwnedFd> {
    let address = forward.listen;
    let fd = open(&address, None)?;
    sockopt::set_socket_reuseport(&fd, shares_port)?;
    keep_errors(&fd, address.is_ipv6())?;
    keep_destinations(&fd, address.is_ipv6())?;
    bind_forward(&fd, forward, freebind)?;
    Ok(fd)
}

/// Has [`receive`] tell which address a datagram came to.
///
/// # Errors
/// None for a datagram socket of this family.
pub(crate) fn keep_destinations(fd: &OwnedFd, v6: bool) -> io::Result<()> {
    if v6 {
        setsockopt(fd.as_raw_fd(), Ipv6RecvPacketInfo, &true)?;
    } else {
        setsockopt(fd.as_raw_fd(), Ipv4PacketInfo, &true)?;
    }
    Ok(())
}

/// Has [`receive`] take several datagrams at once where the kernel has put them together (`UDP_GRO` in udp(7)): a network card's
/// driver does that, and senders who use `UDP_SEGMENT` on the same host.
pub(crate) fn receive_together(fd: &OwnedFd) {
    // Kernels before 5.0 have them one by one.
    let _ = setsockopt(fd.as_raw_fd(), UdpGroSegment, &true);
}

/// A ping socket (icmp(7)) bound as `binding` says and connected to `target`, and the identifier that its messages have:
/// `identifier` if nobody else on the host uses it.
///
/// # Errors
/// `PermissionDenied` if `net.ipv4.ping_group_range` does not hold a group of this process; no descriptors, no way to
/// `target`, or nothing to bind to.
pub(crate) fn ping(target: IpAddr, identifier: u16, binding: &Binding<'_>) -> io::Result<(OwnedFd, u16)> {
    let target = SocketAddr::new(target, 0);
    let fd = open(&target, Some(if target.is_ipv6() { ipproto::ICMPV6 } else { ipproto::ICMP }))?;
    keep_errors(&fd, target.is_ipv6())?;
    binding.bind_interface(&fd)?;
    let address = binding.address_for(&target);
    if bind(&fd, &SocketAddr::new(address, identifier)).is_err() && !address.is_unspecified() {
        bind(&fd, &SocketAddr::new(address, 0))?;
    }
    connect(&fd, &target)?;
    let own = SocketAddr::try_from(getsockname(&fd)?)?;
    Ok((fd, own.port()))
}

/// Sets how many hops the socket's packets live.
pub(crate) fn set_hop_limit(fd: &OwnedFd, v6: bool, hops: u8) {
    // Refused by nobody for 1 to 255; without it packets live longer than the guest wanted.
    let _ = if v6 {
        sockopt::set_ipv6_unicast_hops(fd, Some(hops))
    } else {
        sockopt::set_ip_ttl(fd, hops.into())
    };
}

/// A datagram that a socket took, or several of one peer's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Received {
    /// Bytes of all of them.
    pub(crate) length: usize,
    /// How long each but the last is, if they are several.
    pub(crate) segment: Option<u16>,
    pub(crate) peer: SocketAddr,
    /// The host's address that it was sent to.
    pub(crate) local: Option<IpAddr>,
}

impl Received {
    /// The payload of each datagram, which are in `buffer`.
    pub(crate) fn datagrams<'a>(&self, buffer: &'a [u8]) -> Datagrams<'a> {
        Datagrams { bytes: buffer.get(..self.length).unwrap_or_default(), segment: self.segment }
    }
}

/// Takes the next datagram of a socket, or several if [`receive_together`] was asked for.
///
/// # Errors
/// `WouldBlock` if there is none; others are errors of datagrams that were sent by this socket before.
pub(crate) fn receive(fd: &OwnedFd, buffer: &mut [u8]) -> io::Result<Received> {
    let mut control = Vec::with_capacity(CONTROL);
    let mut parts = [IoSliceMut::new(buffer)];
    // syscalls: recvmsg
    let message =
        recvmsg::<SockaddrStorage>(fd.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::MSG_DONTWAIT)?;
    Ok(received(&message).ok_or(io::ErrorKind::InvalidData)?)
}

/// What a message and its control messages say; `None` if it is from nobody.
fn received(message: &RecvMsg<'_, SockaddrStorage>) -> Option<Received> {
    let (mut local, mut segment) = (None, None);
    for message in message.cmsgs() {
        match message {
            ControlMessageOwned::Ipv4PacketInfo(info) => {
                local = Some(Ipv4Addr::from_bits(u32::from_be(info.ipi_addr.s_addr)).into());
            }
            ControlMessageOwned::Ipv6PacketInfo(info) => {
                local = Some(Ipv6Addr::from(info.ipi6_addr.s6_addr).into());
            }
            ControlMessageOwned::UdpGroSegments(length) => segment = Some(length),
            _ => {}
        }
    }
    let peer = message.address.as_ref().and_then(to_std)?;
    Some(Received { length: message.bytes, segment, peer, local })
}

/// Sends a datagram, or several if `length` says how long each but the last is (`UDP_SEGMENT` in udp(7)); to `peer` by a socket
/// that is not connected, as the host's address `local`.
///
/// # Errors
/// As send(2); `EINVAL`, `EIO` and others if these cannot be sent together.
// syscalls: sendmsg
pub(crate) fn send(
    fd: &OwnedFd,
    bytes: &[u8],
    length: Option<u16>,
    local: Option<IpAddr>,
    peer: Option<SocketAddr>,
) -> io::Result<usize> {
    let parts = [IoSlice::new(bytes)];
    let (v4, v6);
    let from = match local {
        Some(IpAddr::V4(local)) => {
            let local = libc::in_addr { s_addr: u32::from(local).to_be() };
            v4 = libc::in_pktinfo {
                ipi_ifindex: 0,
                ipi_spec_dst: local,
                ipi_addr: libc::in_addr { s_addr: 0 },
            };
            Some(ControlMessage::Ipv4PacketInfo(&v4))
        }
        Some(IpAddr::V6(local)) => {
            v6 = libc::in6_pktinfo { ipi6_addr: libc::in6_addr { s6_addr: local.octets() }, ipi6_ifindex: 0 };
            Some(ControlMessage::Ipv6PacketInfo(&v6))
        }
        None => None,
    };
    let lengths = length.as_ref().map(ControlMessage::UdpGsoSegments);
    let control: Vec<ControlMessage<'_>> = from.into_iter().chain(lengths).collect();
    let peer = peer.map(SockaddrStorage::from);
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    Ok(sendmsg(fd.as_raw_fd(), &parts, &control, flags, peer.as_ref())?)
}

fn to_std(address: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = address.as_sockaddr_in() {
        return Some(SocketAddr::new(Ipv4Addr::from_bits(v4.ip()).into(), v4.port()));
    }
    let v6 = address.as_sockaddr_in6()?;
    Some(std::net::SocketAddrV6::new(v6.ip(), v6.port(), v6.flowinfo(), v6.scope_id()).into())
}

/// Why a datagram did not get through.
pub(crate) struct NetworkError {
    pub(crate) error: IcmpError,
    /// Who says so, if not the host itself.
    pub(crate) offender: Option<IpAddr>,
    /// Where the datagram was to go.
    pub(crate) destination: Option<SocketAddr>,
    /// How much of its payload the buffer holds.
    pub(crate) length: usize,
}

/// Takes the socket's next error, and what is known of the payload of its datagram into `buffer`.
pub(crate) fn next_error(fd: &OwnedFd, buffer: &mut [u8]) -> Option<NetworkError> {
    // linux/errqueue.h: who found the error.
    const LOCAL: u8 = 1;
    const ICMP: u8 = 2;
    const ICMPV6: u8 = 3;
    let mut control = Vec::with_capacity(CONTROL);
    let mut parts = [IoSliceMut::new(buffer)];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_ERRQUEUE;
    // syscalls: recvmsg
    let message = recvmsg::<SockaddrStorage>(fd.as_raw_fd(), &mut parts, Some(&mut control), flags).ok()?;
    let destination = message.address.as_ref().and_then(to_std);
    let (extended, offender) = message.cmsgs().find_map(|message| match message {
        ControlMessageOwned::Ipv4RecvErr(error, offender) => {
            let offender = offender.filter(|o| i32::from(o.sin_family) == libc::AF_INET);
            Some((error, offender.map(|o| Ipv4Addr::from_bits(u32::from_be(o.sin_addr.s_addr)).into())))
        }
        ControlMessageOwned::Ipv6RecvErr(error, offender) => {
            let offender = offender.filter(|o| i32::from(o.sin6_family) == libc::AF_INET6);
            Some((error, offender.map(|o| IpAddr::from(Ipv6Addr::from(o.sin6_addr.s6_addr)))))
        }
        _ => None,
    })?;
    let v6 = destination.is_some_and(|d| !d.ip().to_canonical().is_ipv4());
    let error = match extended.ee_origin {
        ICMP | ICMPV6 => IcmpError { kind: extended.ee_type, code: extended.ee_code, word: extended.ee_info },
        LOCAL => local_error(v6, Errno::from_raw_os_error(extended.ee_errno.cast_signed()), extended.ee_info),
        _ => return None,
    };
    Some(NetworkError { error, offender, destination, length: message.bytes })
}

/// What the guest is told about a datagram that the host did not take: `mtu` is how long it might have been, if known.
pub(crate) fn local_error(v6: bool, error: Errno, mtu: u32) -> IcmpError {
    match error {
        Errno::MSGSIZE => IcmpError::too_big(v6, mtu),
        Errno::CONNREFUSED => IcmpError::port_unreachable(v6),
        Errno::NETUNREACH | Errno::NETDOWN | Errno::ADDRNOTAVAIL | Errno::AFNOSUPPORT | Errno::NODEV => {
            IcmpError::net_unreachable(v6)
        }
        Errno::PERM | Errno::ACCESS => IcmpError::prohibited(v6),
        _ => IcmpError::host_unreachable(v6),
    }
}

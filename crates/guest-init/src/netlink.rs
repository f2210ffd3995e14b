//! Requests to the kernel about its network (rtnetlink(7)): the few that a guest's own start needs.
//!
//! A request is a header, a structure of its kind, and attributes; everything is aligned to four bytes and in the
//! processor's byte order, addresses in the network's.

use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with};

/// Bytes of `struct nlmsghdr`.
const HEADER: usize = 16;
/// A route's flag that says that its gateway is on the link, whatever the prefixes say (`RTNH_F_ONLINK`).
const ONLINK: u32 = 4;

/// A conversation with the kernel.
pub(crate) struct Netlink(OwnedFd);

impl Netlink {
    pub(crate) fn open() -> io::Result<Self> {
        // Without a protocol it is NETLINK_ROUTE, whose number is 0.
        Ok(Self(socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?))
    }

    /// Brings an interface up, with this MTU if one is given.
    pub(crate) fn up(&self, interface: u32, mtu: Option<u32>) -> io::Result<()> {
        self.ask(link_up(interface, mtu))
    }

    /// Gives an interface an address, at once: no others are asked whether they have it.
    pub(crate) fn add_address(&self, interface: u32, address: IpAddr, prefix: u8) -> io::Result<()> {
        self.ask(new_address(interface, address, prefix))
    }

    /// Sends everything that has no other route to `gateway`.
    pub(crate) fn add_default_route(&self, interface: u32, gateway: IpAddr) -> io::Result<()> {
        self.ask(new_default_route(interface, gateway))
    }

    /// Sends a request and reads what has become of it.
    fn ask(&self, request: Request) -> io::Result<()> {
        send(&self.0, &request.finish(), SendFlags::empty())?;
        let mut answer = [0; 1024];
        let (length, _) = recv(&self.0, &mut answer[..], RecvFlags::empty())?;
        result(answer.get(..length).unwrap_or_default())
    }
}

/// Reads the acknowledgement of a request: `struct nlmsgerr` with zero or a negated error number.
fn result(answer: &[u8]) -> io::Result<()> {
    let kind = answer.get(4..6).and_then(|kind| kind.try_into().ok()).map(u16::from_ne_bytes);
    let error =
        answer.get(HEADER..HEADER + 4).and_then(|error| error.try_into().ok()).map(i32::from_ne_bytes);
    match (kind.map(i32::from), error) {
        (Some(libc::NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(libc::NLMSG_ERROR), Some(error)) => Err(io::Error::from_raw_os_error(error.wrapping_neg())),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// A request under construction.
struct Request(Vec<u8>);

impl Request {
    /// `body` is the structure of this kind.
    fn new(kind: u16, flags: libc::c_int, body: &[u8]) -> Self {
        let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK | flags) as u16;
        // The length is written at the end; a number and a sender are for those who ask several things at once.
        let mut bytes = [&[0; 4], &kind.to_ne_bytes()[..], &flags.to_ne_bytes(), &[0; 8]].concat();
        bytes.extend(body);
        Self(bytes)
    }

    /// Adds an attribute (`struct rtattr`).
    fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    fn finish(mut self) -> Vec<u8> {
        let length = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        for (to, from) in self.0.iter_mut().zip(length.to_ne_bytes()) {
            *to = from;
        }
        self.0
    }
}

fn link_up(interface: u32, mtu: Option<u32>) -> Request {
    let up = libc::IFF_UP as u32;
    // `struct ifinfomsg`: family, kind, interface, flags, and which of the flags are meant.
    let body = [0, interface, up, up].map(u32::to_ne_bytes).concat();
    let request = Request::new(libc::RTM_NEWLINK, 0, &body);
    match mtu {
        Some(mtu) => request.attribute(libc::IFLA_MTU, &mtu.to_ne_bytes()),
        None => request,
    }
}

fn new_address(interface: u32, address: IpAddr, prefix: u8) -> Request {
    let (family, bytes) = parts(address);
    // `struct ifaddrmsg`: family, prefix, flags, scope (everywhere), interface.
    let body = [&[family, prefix, 0, 0][..], &interface.to_ne_bytes()].concat();
    Request::new(libc::RTM_NEWADDR, libc::NLM_F_CREATE | libc::NLM_F_EXCL, &body)
        .attribute(libc::IFA_LOCAL, &bytes)
        .attribute(libc::IFA_ADDRESS, &bytes)
        .attribute(libc::IFA_FLAGS, &libc::IFA_F_NODAD.to_ne_bytes())
}

fn new_default_route(interface: u32, gateway: IpAddr) -> Request {
    let (family, bytes) = parts(gateway);
    let (table, protocol) = (libc::RT_TABLE_MAIN, libc::RTPROT_BOOT);
    // `struct rtmsg`: family, lengths of both prefixes, service, table, protocol, scope (everywhere), kind, flags.
    let head = [family, 0, 0, 0, table, protocol, libc::RT_SCOPE_UNIVERSE, libc::RTN_UNICAST];
    let body = [&head[..], &ONLINK.to_ne_bytes()].concat();
    Request::new(libc::RTM_NEWROUTE, libc::NLM_F_CREATE | libc::NLM_F_EXCL, &body)
        .attribute(libc::RTA_GATEWAY, &bytes)
        .attribute(libc::RTA_OIF, &interface.to_ne_bytes())
}

/// The number of an address's family, and its bytes.
fn parts(address: IpAddr) -> (u8, Vec<u8>) {
    match address {
        IpAddr::V4(address) => (libc::AF_INET as u8, address.octets().into()),
        IpAddr::V6(address) => (libc::AF_INET6 as u8, address.octets().into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whole requests, as ip(8) of iproute2 sends them but for attributes that are not needed.
    #[test]
    fn requests_have_the_kernels_form() {
        let bytes = link_up(7, Some(1500)).finish();
        let expected = [
            &[40, 0, 0, 0, 16, 0, 5, 0][..],
            &[0; 8],
            &[0, 0, 0, 0, 7, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0],
            &[8, 0, 4, 0, 0xdc, 5, 0, 0],
        ];
        assert_eq!(bytes, expected.concat());
        let bytes = new_address(7, "192.0.2.5".parse().unwrap(), 24).finish();
        let expected = [
            &[48, 0, 0, 0, 20, 0, 5, 6][..],
            &[0; 8],
            &[2, 24, 0, 0, 7, 0, 0, 0],
            &[8, 0, 2, 0, 192, 0, 2, 5],
            &[8, 0, 1, 0, 192, 0, 2, 5],
            &[8, 0, 8, 0, 2, 0, 0, 0],
        ];
        assert_eq!(bytes, expected.concat());
        let bytes = new_default_route(7, "fe80::1".parse().unwrap()).finish();
        let gateway = [&[20, 0, 5, 0, 0xfe, 0x80][..], &[0; 13], &[1]].concat();
        let expected = [
            &[56, 0, 0, 0, 24, 0, 5, 6][..],
            &[0; 8],
            &[10, 0, 0, 0, 254, 3, 0, 1, 4, 0, 0, 0],
            &gateway,
            &[8, 0, 4, 0, 7, 0, 0, 0],
        ];
        assert_eq!(bytes, expected.concat());
    }

    #[test]
    fn the_kernels_answer_is_read() {
        let answer =
            |error: i32| [&[36, 0, 0, 0, 2, 0][..], &[0; 10], &error.to_ne_bytes(), &[0; 16]].concat();
        assert!(result(&answer(0)).is_ok());
        assert_eq!(result(&answer(-17)).unwrap_err().raw_os_error(), Some(17));
        let whole = answer(0);
        for length in 0..HEADER + 4 {
            assert!(result(&whole[..length]).is_err());
        }
        assert!(result(&[0; 64]).is_err());
    }

    /// The loopback interface can be brought up by whoever may, and the answer is the kernel's.
    #[test]
    fn the_kernel_understands() {
        let netlink = Netlink::open().unwrap();
        let error = netlink.up(u32::MAX >> 1, None).unwrap_err();
        let known = [libc::ENODEV, libc::EPERM];
        assert!(known.contains(&error.raw_os_error().unwrap()), "{error}");
    }
}

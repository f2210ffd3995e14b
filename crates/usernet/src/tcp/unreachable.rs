//! What the guest is told when the host cannot reach the other end of a connection that the guest begins.
//!
//! A refusal by the other end is a RST, and the guest's program reads "connection refused". That nobody could be reached is
//! another thing, of which a router tells by ICMP (RFC 1812 5.2.7.1), and so do we: a TCP that has sent a SYN and
//! nothing more gives up at once then (Linux; RFC 5461 3.1), and the program reads "no route to host" or "network
//! unreachable", as it would on the host. A program that has another address to try goes on to that.
//!
//! Once a connection stands, ICMP must not end it (RFC 1122 4.2.3.9): its errors are RSTs.

use rustix::io::Errno;

use super::emit::Ends;
use super::seq::Seq;
use crate::context::Context;
use crate::frame::{IcmpError, quoted_syn};
use crate::packet::Addresses;

/// Tells the guest that its SYN with `seq` did not get through, if `error` means that.
pub(super) fn tell(cx: &mut Context<'_>, ends: &Ends, seq: Seq, error: Errno) -> bool {
    let v6 = ends.is_ipv6();
    let error = match error {
        Errno::HOSTUNREACH | Errno::HOSTDOWN | Errno::TIMEDOUT => IcmpError::host_unreachable(v6),
        Errno::NETUNREACH | Errno::NETDOWN => IcmpError::net_unreachable(v6),
        Errno::ACCESS | Errno::PERM => IcmpError::prohibited(v6),
        _ => return false,
    };
    let Some(addresses) = Addresses::new(ends.guest, ends.peer) else { return false };
    let quoted = quoted_syn(addresses, (ends.guest_port, ends.peer_port), seq.0);
    cx.send_icmp_error(error, ends.peer, addresses, &quoted);
    true
}

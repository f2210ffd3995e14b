//! ARP (RFC 826): everything on the guest's link is behind the gateway's Ethernet address.
//!
//! Whoever the guest asks for is answered for, since its packets to anybody come here anyway; not its own
//! addresses, or it would believe that somebody else has them. Nor is a probe answered (RFC 5227 2.1.1: the
//! sender's address is 0.0.0.0), in which the guest asks whether an address is free for it, except for the gateway's
//! own and those that stand for the host.

use etherparse::{ArpEthIpv4Packet, ArpOperation, EtherType};

use crate::context::Context;
use crate::tap::Offload;

pub(crate) fn packet(cx: &mut Context<'_>, packet: &ArpEthIpv4Packet) {
    let Some(family) = cx.config.ipv4 else { return };
    if packet.operation != ArpOperation::REQUEST {
        return;
    }
    let (sender, target) = (packet.sender_ipv4_addr(), packet.target_ipv4_addr());
    let guests_own = target == sender || target == family.guest || Some(target) == cx.link.guest_v4;
    let ours = [Some(family.gateway), family.host_loopback, family.host_global].contains(&Some(target));
    let may_be_guests = guests_own || sender.is_unspecified();
    if target.is_unspecified() || (may_be_guests && !ours) {
        return;
    }
    let answer = ArpEthIpv4Packet {
        operation: ArpOperation::REPLY,
        sender_mac: cx.config.gateway_mac,
        sender_ipv4: packet.target_ipv4,
        target_mac: packet.sender_mac,
        target_ipv4: packet.sender_ipv4,
    };
    let header = cx.ethernet(EtherType::ARP);
    cx.link.send_or_hold(header.as_slice(), &answer.to_bytes(), Offload::default());
}

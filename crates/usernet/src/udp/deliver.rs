//! Datagrams to the guest.

use super::Key;
use super::burst::Burst;
use crate::context::Context;
use crate::packet::{Addresses, Datagrams};

/// Gives the guest datagrams from the other end: in one frame what is alike, if its link can do that.
pub(super) fn deliver<'a>(
    cx: &mut Context<'_>,
    burst: &mut Burst<()>,
    key: Key,
    several: impl Iterator<Item = Datagrams<'a>>,
) {
    let Some((addresses, (guest, remote))) = key.outbound() else { return };
    let (addresses, ports) = (addresses.reversed(), (remote, guest));
    let mut several = several.peekable();
    let gathers = cx.link.abilities().datagrams;
    while let Some(datagrams) = several.next() {
        // One alone is not copied, and neither are those that came together.
        let last = several.peek().is_none();
        if !gathers || datagrams.segment.is_some() || (last && burst.len() == 0) {
            send_gathered(cx, burst, addresses, ports);
            cx.send_datagrams(addresses, ports, datagrams);
        } else if !burst.add((), datagrams.bytes) {
            send_gathered(cx, burst, addresses, ports);
            burst.add((), datagrams.bytes);
        }
    }
    send_gathered(cx, burst, addresses, ports);
}

/// Gives the guest what was gathered for it.
fn send_gathered(cx: &mut Context<'_>, burst: &mut Burst<()>, addresses: Addresses, ports: (u16, u16)) {
    if burst.len() > 0 {
        let (bytes, length) = burst.together();
        let segment = (burst.len() > 1).then_some(length);
        cx.send_datagrams(addresses, ports, Datagrams { bytes, segment });
        burst.clear();
    }
}

//! The whole of TCP against another implementation of it, smoltcp, as the guest's, and real sockets as the world.
//!
//! Time is the simulation's own: it jumps to the next deadline when nobody has anything to do. The sockets of the
//! world are driven by the same thread, without blocking.

mod hostile;
mod life;
mod sim;
mod transfer;

use crate::config::{Config, Family, Outbound, Services};

/// The network of the tests' guest.
pub(super) fn network() -> Config {
    let parse = |text: &str| text.parse().unwrap();
    Config {
        guest_mac: Some([2, 0, 0, 0, 0, 15]),
        gateway_mac: [2, 0, 0, 0, 0, 2],
        ipv4: Some(Family {
            guest: [10, 0, 2, 15].into(),
            prefix: 24,
            gateway: [10, 0, 2, 2].into(),
            host_loopback: Some([10, 0, 2, 2].into()),
            host_global: None,
        }),
        ipv6: Some(Family {
            guest: parse("fd00::15"),
            prefix: 64,
            gateway: parse("fd00::2"),
            host_loopback: Some(parse("fd00::2")),
            host_global: None,
        }),
        mtu: 1500,
        dns: Vec::new(),
        dns_forward: Vec::new(),
        search: Vec::new(),
        hostname: None,
        fqdn: None,
        services: Services::default(),
        forwards: Vec::new(),
        freebind: false,
        outbound: Outbound::default(),
    }
}

//! The guest's network, from what the host has said: no DHCP client is needed, and nothing has to be waited for.
//!
//! A guest without a network still runs most commands: what fails here is said on the console.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use guest_init::spec::Network;

use crate::netlink::Netlink;

const INTERFACES: &str = "/sys/class/net";
const RESOLVERS: &str = "/etc/resolv.conf";

/// Brings the loopback interface up, and the network card with its addresses and routes.
pub(crate) fn set_up(network: Option<&Network>) {
    let say = |what: &str, error: io::Error| eprintln!("guest-init: cannot {what}: {error}");
    let netlink = match Netlink::open() {
        Ok(netlink) => netlink,
        Err(error) => return say("reach the kernel's network", error),
    };
    if let Err(error) = number(Path::new(INTERFACES).join("lo").as_path()).and_then(|lo| netlink.up(lo, None))
    {
        say("bring up the loopback interface", error);
    }
    let Some(network) = network else { return };
    let (name, interface) = match find(network.mac) {
        Ok(found) => found,
        Err(error) => return say("find the network card: the kernel may lack virtio_net", error),
    };
    if !network.addresses.is_empty() {
        // The addresses are given, and nobody else on this link has them. A kernel without IPv6 has no such files.
        for setting in ["accept_ra", "accept_dad"] {
            let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{name}/{setting}"), "0");
        }
    }
    if let Err(error) = netlink.up(interface, Some(network.mtu.into())) {
        say(&format!("bring up {name}"), error);
    }
    for &(address, prefix) in &network.addresses {
        if let Err(error) = netlink.add_address(interface, address, prefix) {
            say(&format!("give {name} the address {address}"), error);
        }
    }
    for &gateway in &network.gateways {
        if let Err(error) = netlink.add_default_route(interface, gateway) {
            say(&format!("make {gateway} the gateway"), error);
        }
    }
}

/// The name and number of the interface with this Ethernet address.
fn find(mac: [u8; 6]) -> io::Result<(String, u32)> {
    let wanted = mac.map(|byte| format!("{byte:02x}")).join(":");
    for entry in fs::read_dir(INTERFACES)? {
        let path = entry?.path();
        let address = fs::read_to_string(path.join("address")).unwrap_or_default();
        if address.trim_end() == wanted {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            return Ok((name, number(&path)?));
        }
    }
    Err(io::ErrorKind::NotFound.into())
}

/// The number of an interface, by its directory.
fn number(interface: &Path) -> io::Result<u32> {
    let text = fs::read_to_string(interface.join("ifindex"))?;
    text.trim_end().parse().map_err(|_| io::ErrorKind::InvalidData.into())
}

/// Writes resolv.conf(5), whatever the host's leads to: it may be a link to a service's file that the guest lacks.
pub(crate) fn name_resolvers(network: &Network) {
    if network.resolvers.is_empty() || !Path::new(RESOLVERS).parent().is_some_and(Path::is_dir) {
        return;
    }
    let _ = fs::remove_file(RESOLVERS);
    let written = fs::write(RESOLVERS, resolv_conf(network))
        .and_then(|()| fs::set_permissions(RESOLVERS, fs::Permissions::from_mode(0o644)));
    if let Err(error) = written {
        eprintln!("guest-init: cannot write {RESOLVERS}: {error}");
    }
}

fn resolv_conf(network: &Network) -> String {
    let mut text: String =
        network.resolvers.iter().map(|resolver| format!("nameserver {resolver}\n")).collect();
    if !network.search.is_empty() {
        text.push_str(&format!("search {}\n", network.search.join(" ")));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolvers_come_before_search_domains() {
        let resolvers = vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()];
        let mut network = Network { resolvers, ..Network::default() };
        assert_eq!(resolv_conf(&network), "nameserver 192.0.2.1\nnameserver 2001:db8::1\n");
        network.search = vec!["a.example".into(), "b.example".into()];
        assert!(resolv_conf(&network).ends_with("::1\nsearch a.example b.example\n"));
    }
}

//! The options of `pasta` and `passt`, as `clap` types: names, short forms, arguments, defaults and help.
//!
//! Names and defaults are those of upstream's manual page, passt(1). Everything else is made of these types: help, man
//! pages, completions, and the table in the documentation ([`super::table`]). Where a default is not a value but is
//! found out, its description ends in `[default: ...]`.

use std::ffi::OsString;
use std::net::IpAddr;
use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, ValueEnum};

use super::ports::{PortSpec, parse_interface};
use super::values::{
    AddressPrefix, Bytes, Listed, Netmask, NoneOr, UserGroup, parse_address_or_none, parse_domains,
    parse_host, parse_mac, parse_mtu, parse_name, parse_on_link, parse_on_link_or_none, parse_seconds,
};
use usernet::config::MacAddress;

const PASTA_EXAMPLES: &str = "\
Examples:
  pasta --config-net                       a shell with a network of its own
  pasta --config-net -- curl example.org   one command, whose status pasta exits with
  pasta --config-net -t 8080:80 -- CMD     port 8080 of the host leads to its port 80
  pasta --config-net 1234                  a network for the namespaces of process 1234
  pasta --config-net --netns /run/user/1000/netns/x

Ports (-t, -u, -T, -U): none | [ADDRESS[%INTERFACE]/]ITEM[,ITEM...], and ITEM is
  22                 one port
  22-80              a range
  22-80:32-90        a range that leads to another
  22:192.0.2.5/80    a port that leads to an address of the other side's
  ~25                not this one, whatever else is said (~20-30 for a range)
  all                every other port that is not ephemeral, as far as it can be had
  auto               only while something listens on the port that it leads to;
                     for UDP, on the same port in UDP or TCP
Several options accumulate. Without ports, `~25` and `auto` mean all ports.

Exit status:
  The command's own, or 128+N when signal N ended it; 126 when it cannot be
  executed, 127 when there is no such command; 1 when pasta itself failed; 0 when
  it has gone to the background, or its namespace has gone.";

const PASST_EXAMPLES: &str = "\
Examples:
  passt -f -t 2222:22
  qemu-system-x86_64 ... -device virtio-net-pci,netdev=n \\
      -netdev stream,id=n,server=off,addr.type=unix,addr.path=/tmp/passt_1.socket
  passt -f --vhost-user -s /tmp/vu.socket
  qemu-system-x86_64 ... -chardev socket,id=c,path=/tmp/vu.socket \\
      -netdev vhost-user,id=n,chardev=c -device virtio-net-pci,netdev=n \\
      -m 1G -object memory-backend-memfd,id=m,size=1G,share=on -numa node,memdev=m

Ports (-t, -u): none | [ADDRESS[%INTERFACE]/]ITEM[,ITEM...], and ITEM is
  22                 one port
  22-80              a range
  22-80:32-90        a range that leads to another
  22:192.0.2.5/80    a port that leads to an address of the guest's side
  ~25                not this one, whatever else is said (~20-30 for a range)
  all                every other port that is not ephemeral, as far as it can be had
Several options accumulate. Without ports, `~25` means all other ports.

Exit status:
  0 when it has gone to the background, or its only client (-1) has gone; 1 when
  it failed.";

/// A network for a namespace, by ordinary sockets, without privileges
///
/// Runs a command (without one: a shell) in new user and network namespaces, or attaches to existing ones. Inside is a
/// tap device; outside, each flow is one ordinary socket. There is no address translation: the namespace has
/// the host's addresses.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "pasta",
    version,
    infer_long_args = true,
    args_override_self = true,
    disable_version_flag = true,
    disable_help_flag = true,
    after_long_help = PASTA_EXAMPLES,
    max_term_width = 100
)]
pub struct PastaArgs {
    /// What passt has, too.
    #[command(flatten)]
    pub common: CommonArgs,
    /// What only pasta has.
    #[command(flatten)]
    pub own: PastaOnly,
}

/// A network for virtual machines, by ordinary sockets, without privileges
///
/// Listens on a UNIX socket for QEMU (`-netdev stream`) or, with --vhost-user, for any vhost-user front end. Each of the
/// guest's flows is one ordinary socket of the host's. There is no address translation: the guest has the host's
/// addresses.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "passt",
    version,
    infer_long_args = true,
    args_override_self = true,
    disable_version_flag = true,
    disable_help_flag = true,
    after_long_help = PASST_EXAMPLES,
    max_term_width = 100
)]
pub struct PasstArgs {
    /// What pasta has, too.
    #[command(flatten)]
    pub common: CommonArgs,
    /// What only passt has.
    #[command(flatten)]
    pub own: PasstOnly,
}

/// The options of both.
#[derive(Clone, Debug, Args)]
pub struct CommonArgs {
    /// Be verbose, and log to standard error, not to the system's log; in the background, only --log-file keeps it
    #[arg(short, long, overrides_with = "quiet")]
    pub debug: bool,
    /// Log single packets; implies --debug
    #[arg(long, overrides_with = "quiet")]
    pub trace: bool,
    /// Print statistics, at most every DELAY seconds, and nothing while nothing happens; needs the foreground
    #[arg(long, value_name = "DELAY", value_parser = parse_seconds)]
    pub stats: Option<std::time::Duration>,
    /// Print no informational messages
    #[arg(short, long, overrides_with_all = ["debug", "trace"])]
    pub quiet: bool,
    /// Stay in the foreground, and in the same PID namespace
    #[arg(short, long)]
    pub foreground: bool,
    /// No effect (deprecated)
    #[arg(short = 'e', long)]
    pub stderr: bool,
    /// Log to a file, and to standard error in the foreground [default: that, else the system's log]
    #[arg(short, long, value_name = "PATH")]
    pub log_file: Option<PathBuf>,
    /// Longest log file in bytes; its oldest entries go first [default: 1048576]
    #[arg(long, value_name = "SIZE")]
    pub log_size: Option<Bytes>,
    /// Become this user, which takes uid 0 or CAP_SETUID [default: nobody when started as root]
    #[arg(long, value_name = "UID[:GID]|LOGIN[:GROUP]")]
    pub runas: Option<UserGroup>,
    /// UNIX socket for control at run time (see `ring3 net --help`) [default: none]
    #[arg(short, long, value_name = "PATH")]
    pub conf_path: Option<PathBuf>,
    /// Show this help
    #[arg(short, long, action = ArgAction::HelpLong)]
    pub help: Option<bool>,
    /// Show the version
    #[arg(long, action = ArgAction::Version)]
    pub version: Option<bool>,
    /// Record the guest's or namespace's frames in a pcap file
    #[arg(short, long, value_name = "FILE")]
    pub pcap: Option<PathBuf>,
    /// Write the process's PID to a file when everything is ready
    #[arg(short = 'P', long, value_name = "FILE")]
    pub pid: Option<PathBuf>,
    /// MTU to tell by DHCP (option 26) and NDP (option 5), and of pasta's tap; 0 tells none
    #[arg(short, long, value_name = "MTU", default_value = "65520", value_parser = parse_mtu)]
    pub mtu: u16,
    /// Address of the guest, one per family; the length (IPv4) instead of -n, IPv6's is always 64 [default: the host's on
    /// the interface of the default route, else 169.254.2.1 and no IPv6]
    #[arg(short, long, value_name = "ADDR[/LEN]")]
    pub address: Vec<AddressPrefix>,
    /// IPv4 netmask, dotted or as a number of bits [default: that of the host's address, or of the class of -a's]
    #[arg(short = 'n', long, value_name = "MASK")]
    pub netmask: Option<Netmask>,
    /// Ethernet address that the guest sees everything come from
    #[arg(short = 'M', long, value_name = "MAC", default_value = "9a:55:9a:55:9a:55", value_parser = parse_mac)]
    pub mac_addr: MacAddress,
    /// Gateway of the guest, one per family; also the source of the host's loopback traffic [default: the host's, else
    /// 169.254.2.2 and fe80::1]
    #[arg(short, long, value_name = "ADDR", value_parser = parse_on_link)]
    pub gateway: Vec<IpAddr>,
    /// Host interface to take addresses and routes from [default: that of the default route]
    #[arg(short, long, value_name = "NAME", value_parser = parse_interface)]
    pub interface: Option<String>,
    /// Source address of outbound sockets, one per family [default: the routing table's choice]
    #[arg(short, long, value_name = "ADDR", value_parser = parse_host)]
    pub outbound: Vec<IpAddr>,
    /// Host interface that IPv4's outbound sockets are bound to; also -i for IPv4 [default: none]
    #[arg(long, value_name = "NAME", value_parser = parse_interface)]
    pub outbound_if4: Option<String>,
    /// Host interface that IPv6's outbound sockets are bound to; also -i for IPv6 [default: none]
    #[arg(long, value_name = "NAME", value_parser = parse_interface)]
    pub outbound_if6: Option<String>,
    /// Resolver for the guest, as it is, several allowed; `none` for no resolver [default: /etc/resolv.conf]
    #[arg(short = 'D', long, value_name = "ADDR|none", value_parser = parse_address_or_none)]
    pub dns: Vec<NoneOr<IpAddr>>,
    /// Address whose ports 53 and 853 lead, for the guest, to --dns-host, one per family [default: none]
    #[arg(long, value_name = "ADDR", value_parser = parse_on_link)]
    pub dns_forward: Vec<IpAddr>,
    /// Resolver of the host behind --dns-forward, one per family [default: the first in /etc/resolv.conf]
    #[arg(long, value_name = "ADDR", value_parser = parse_host)]
    pub dns_host: Vec<IpAddr>,
    /// Search domains, separated by spaces, or `none` [default: /etc/resolv.conf]
    #[arg(short = 'S', long, value_name = "LIST|none", value_parser = parse_domains)]
    pub search: Option<Listed>,
    /// Tell no resolvers by DHCP, DHCPv6 and NDP (pasta's default)
    #[arg(long, overrides_with = "dhcp_dns")]
    pub no_dhcp_dns: bool,
    /// Tell resolvers by DHCP, DHCPv6 and NDP (passt's default)
    #[arg(long, overrides_with = "no_dhcp_dns")]
    pub dhcp_dns: bool,
    /// Tell no search domains by DHCP, DHCPv6 and NDP (pasta's default)
    #[arg(long, overrides_with = "dhcp_search")]
    pub no_dhcp_search: bool,
    /// Tell search domains by DHCP, DHCPv6 and NDP (passt's default)
    #[arg(long, overrides_with = "no_dhcp_search")]
    pub dhcp_search: bool,
    /// No TCP: segments are dropped, nothing is accepted
    #[arg(long)]
    pub no_tcp: bool,
    /// No UDP: datagrams are dropped, both ways
    #[arg(long)]
    pub no_udp: bool,
    /// No ICMP and ICMPv6; implies --no-ndp
    #[arg(long)]
    pub no_icmp: bool,
    /// No DHCP server; implied when the host's IPv4 default route has no gateway
    #[arg(long)]
    pub no_dhcp: bool,
    /// No neighbour discovery, and no initial NDP message
    #[arg(long)]
    pub no_ndp: bool,
    /// No DHCPv6 server
    #[arg(long)]
    pub no_dhcpv6: bool,
    /// No answers to router solicitations
    #[arg(long)]
    pub no_ra: bool,
    /// Let -t and -u listen on addresses that the host does not have (IP_FREEBIND)
    #[arg(long)]
    pub freebind: bool,
    /// Address that means the host's loopback to the guest, one per family; `none` implies --no-map-gw [default: the
    /// gateway]
    #[arg(long, value_name = "ADDR|none", value_parser = parse_on_link_or_none)]
    pub map_host_loopback: Vec<NoneOr<IpAddr>>,
    /// The gateway's address does not mean the host; implied without a gateway or default route
    #[arg(long)]
    pub no_map_gw: bool,
    /// Address that means, to the guest, the host's own address, which the guest's copy hides, one per family
    /// [default: none]
    #[arg(long, value_name = "ADDR|none", value_parser = parse_on_link_or_none)]
    pub map_guest_addr: Vec<NoneOr<IpAddr>>,
    /// Where pivot_root(2) gives EINVAL (root on tmpfs or an initramfs), chroot(2) instead of failing
    #[arg(long)]
    pub chroot_fallback: bool,
    /// IPv4 only [default: both, as far as the host has them]
    #[arg(short = '4', long, overrides_with = "ipv6_only")]
    pub ipv4_only: bool,
    /// IPv6 only [default: both, as far as the host has them]
    #[arg(short = '6', long, overrides_with = "ipv4_only")]
    pub ipv6_only: bool,
    /// Host name for the guest (DHCP option 12) [default: none]
    #[arg(short = 'H', long, value_name = "NAME", value_parser = parse_name)]
    pub hostname: Option<String>,
    /// Fully qualified name for the guest (DHCP option 81, DHCPv6 option 39) [default: none]
    #[arg(long, value_name = "NAME", value_parser = parse_name)]
    pub fqdn: Option<String>,
    /// TCP ports of the host that lead inside [default: none (passt), auto (pasta)]
    #[arg(short, long, value_name = "SPEC")]
    pub tcp_ports: Vec<PortSpec>,
    /// UDP ports of the host that lead inside [default: none (passt), auto (pasta)]
    #[arg(short, long, value_name = "SPEC")]
    pub udp_ports: Vec<PortSpec>,
    /// Threads that carry the traffic (ring3's own) [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub threads: Option<u16>,
}

/// The options of pasta alone.
#[derive(Clone, Debug, Args)]
pub struct PastaOnly {
    /// Name of the tap device in the namespace [default: that of the host's interface, else tap0]
    #[arg(short = 'I', long, value_name = "NAME", value_parser = parse_interface)]
    pub ns_ifname: Option<String>,
    /// TCP ports of the namespace's loopback that lead to the host's [default: auto]
    #[arg(short = 'T', long, value_name = "SPEC")]
    pub tcp_ns: Vec<PortSpec>,
    /// UDP ports of the namespace's loopback that lead to the host's [default: auto]
    #[arg(short = 'U', long, value_name = "SPEC")]
    pub udp_ns: Vec<PortSpec>,
    /// Connections to forwarded ports by the host's loopback arrive on the namespace's loopback
    #[arg(long)]
    pub host_lo_to_ns_lo: bool,
    /// User namespace to join [default: that of PID]
    #[arg(long, value_name = "PATH")]
    pub userns: Option<PathBuf>,
    /// Network namespace to join: a path, or a name in /run/netns
    #[arg(long, value_name = "PATH|NAME")]
    pub netns: Option<PathBuf>,
    /// No user namespace is joined or made; implied by --netns without --userns
    #[arg(long)]
    pub netns_only: bool,
    /// Stay when the namespace's path has gone
    #[arg(long)]
    pub no_netns_quit: bool,
    /// The command stays in the PID namespace that pasta was started in
    #[arg(long)]
    pub no_pidns: bool,
    /// Configure the namespace: addresses, routes, links up
    #[arg(long)]
    pub config_net: bool,
    /// With --config-net, only the default route; implied by -g for its family (deprecated)
    #[arg(long)]
    pub no_copy_routes: bool,
    /// With --config-net, only one address; implied by -a for its family, and by -n for IPv4 (deprecated)
    #[arg(long)]
    pub no_copy_addrs: bool,
    /// Ethernet address of the tap device in the namespace [default: the kernel's choice]
    #[arg(long, value_name = "MAC", value_parser = parse_mac)]
    pub ns_mac_addr: Option<MacAddress>,
    /// Loopback connections take no short cut past the tap device
    #[arg(long)]
    pub no_splice: bool,
    /// Only loopback connections, by the short cut; no tap device, so --config-net has only the loopback to bring up
    #[arg(long)]
    pub splice_only: bool,
    /// Whether the tap device is driven by the kernel's vhost-net (ring3's own)
    #[arg(long, value_enum, default_value_t = Vhost::Auto)]
    pub vhost: Vhost,
    /// PID of the process whose namespaces are joined, or a command and its arguments [default: $SHELL]
    #[arg(value_name = "PID|CMD", trailing_var_arg = true)]
    pub command: Vec<OsString>,
}

/// The options of passt alone.
#[derive(Clone, Debug, Args)]
pub struct PasstOnly {
    /// UNIX socket to listen on [default: the first free of /tmp/passt_1.socket to /tmp/passt_64.socket]
    #[arg(short, long, visible_alias = "socket-path", value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Speak vhost-user on the socket
    #[arg(long)]
    pub vhost_user: bool,
    /// Print what a vhost-user back end can do, in JSON, and exit
    #[arg(long)]
    pub print_capabilities: bool,
    /// Socket for passt-repair: only `none`, since ring3 does not migrate guests [default: none]
    #[arg(long, value_name = "PATH|none")]
    pub repair_path: Option<PathBuf>,
    /// An error, since ring3 does not migrate guests (deprecated)
    #[arg(long)]
    pub migrate_exit: bool,
    /// An error, since ring3 does not migrate guests (deprecated)
    #[arg(long)]
    pub migrate_no_linger: bool,
    /// A socket that is open and connected already; implies --one-off
    #[arg(short = 'F', long, value_name = "FD")]
    pub fd: Option<i32>,
    /// End when the first client has gone
    #[arg(short = '1', long)]
    pub one_off: bool,
}

/// Whether a tap device is driven by vhost-net.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Vhost {
    /// Or pasta ends
    On,
    /// By reading and writing
    Off,
    /// If the host has it and lets us
    Auto,
}

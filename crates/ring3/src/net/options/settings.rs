//! What the front ends do: options that were found to fit together.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use usernet::config::{Forward, MacAddress, Transport};

use super::args::Vhost;
use super::network::Network;
use super::ports::Rule;

/// Bytes of a log file, at most, if not said otherwise.
pub const LOG_SIZE: u64 = 1 << 20;

/// What both front ends do.
#[derive(Clone, Debug)]
pub struct Common {
    /// What is logged, and where.
    pub log: Log,
    /// Whether the process stays in the foreground.
    pub foreground: bool,
    /// Who the process becomes; `None` leaves it as it is, except that root becomes nobody.
    pub runas: Option<Identity>,
    /// Where the process's id is written when everything is ready.
    pub pid_file: Option<PathBuf>,
    /// Where frames are recorded.
    pub pcap: Option<PathBuf>,
    /// How often statistics are printed, at most.
    pub stats: Option<Duration>,
    /// Whether chroot(2) will do where pivot_root(2) gives `EINVAL`.
    pub chroot_fallback: bool,
    /// The socket for control at run time.
    pub control: Option<PathBuf>,
    /// How many threads carry the traffic.
    pub threads: u16,
    /// Addresses, resolvers, services: what becomes of the engine's configuration.
    pub network: Network,
    /// TCP ports of the host that lead inside.
    pub tcp: Ports,
    /// UDP ports of the host that lead inside.
    pub udp: Ports,
}

/// What is logged, and where.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Log {
    /// How much.
    pub level: Level,
    /// A file besides standard error; syslog if `None`, but not in the foreground or with [`Level::Debug`] and above.
    pub file: Option<PathBuf>,
    /// The file's longest size in bytes.
    pub size: u64,
}

/// How much is logged.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Level {
    /// Warnings and errors.
    Quiet,
    /// And what the user may want to know.
    Normal,
    /// And what those want to know who look for an error.
    Debug,
    /// And single packets.
    Trace,
}

/// A user and a group.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Identity {
    /// The user's number.
    pub uid: u32,
    /// The group's.
    pub gid: u32,
}

/// Forwarded ports of one transport in one direction.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Ports {
    /// What is forwarded. Rules do not overlap.
    pub rules: Vec<Rule>,
    /// Whether `auto` rules also forward what is bound in TCP on the other side: UDP's do, for programs that use both.
    pub follow_tcp: bool,
}

/// What `pasta` does.
#[derive(Clone, Debug)]
pub struct PastaSettings {
    /// As passt.
    pub common: Common,
    /// The namespaces.
    pub target: Target,
    /// Whether pasta stays when the path of the namespace has gone.
    pub no_netns_quit: bool,
    /// The tap device's name in the namespace; the template interface's, else `tap0`, if `None`.
    pub ifname: Option<String>,
    /// The tap device's Ethernet address in the namespace; the kernel's choice if `None`.
    pub ns_mac: Option<MacAddress>,
    /// What is configured in the namespace; nothing but the loopback's link if `None`.
    pub configure: Option<Configure>,
    /// The short cut for loopback connections.
    pub splice: Splice,
    /// Whether connections by the host's loopback arrive on the namespace's loopback.
    pub host_lo_to_ns_lo: bool,
    /// TCP ports of the namespace's loopback that lead to the host's. A rule without an address or interface listens on
    /// the namespace's interface `lo` alone.
    pub tcp_ns: Ports,
    /// UDP ports of the namespace's loopback that lead to the host's.
    pub udp_ns: Ports,
    /// Whether the tap is driven by vhost-net.
    pub vhost: Vhost,
}

/// Which namespaces pasta serves.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Target {
    /// New ones, for a command.
    Command {
        /// The command and its arguments; a shell if empty.
        command: Vec<OsString>,
        /// Whether no user namespace is made.
        netns_only: bool,
        /// Whether the command gets a PID namespace of its own.
        pid_namespace: bool,
    },
    /// Existing ones.
    Join {
        /// The network namespace's path.
        netns: PathBuf,
        /// The user namespace's path, if one is joined.
        userns: Option<PathBuf>,
    },
}

/// What `--config-net` configures.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Configure {
    /// Whether all routes of the template interface are copied, by family (IPv4, IPv6); else only the default route.
    pub copy_routes: [bool; 2],
    /// Whether all its addresses are, likewise; else only the guest's one.
    pub copy_addresses: [bool; 2],
}

/// The short cut for loopback connections.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Splice {
    /// Besides the tap device.
    On,
    /// Not taken: everything goes by the tap device.
    Off,
    /// Nothing else: there is no tap device.
    Only,
}

/// What `passt` does.
#[derive(Clone, Debug)]
pub struct PasstSettings {
    /// As pasta.
    pub common: Common,
    /// Where guests come from.
    pub socket: GuestSocket,
    /// Whether vhost-user is spoken, instead of QEMU's framing.
    pub vhost_user: bool,
    /// Whether passt ends with its first guest.
    pub one_off: bool,
}

/// Where guests come from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum GuestSocket {
    /// A socket that is listened on here.
    Path(PathBuf),
    /// A socket that is listened on, at the first of [`GuestSocket::defaults`] that is free.
    FirstFree,
    /// This descriptor, connected already.
    Descriptor(i32),
}

/// Forwards that a front end makes when it starts.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Forwards {
    /// They must be there, or the front end fails.
    pub required: Vec<Forward>,
    /// As many as can be had; if there are any here, and not one can be had, the front end fails.
    pub best_effort: Vec<Forward>,
}

impl Common {
    /// What leads inside from the start: everything but `auto` rules.
    #[must_use]
    pub fn forwards(&self) -> Forwards {
        let v6 = self.network.families[1];
        let mut forwards = Forwards::default();
        for (transport, ports) in [(Transport::Tcp, &self.tcp), (Transport::Udp, &self.udp)] {
            for rule in ports.rules.iter().filter(|rule| !rule.auto) {
                let made = rule.mapping.ports.ports().map(|port| rule.forward(transport, port, v6));
                if rule.best_effort {
                    forwards.best_effort.extend(made)
                } else {
                    forwards.required.extend(made)
                }
            }
        }
        forwards
    }
}

impl GuestSocket {
    /// Where passt listens if not told, in this order.
    pub fn defaults() -> impl Iterator<Item = PathBuf> {
        (1..=64).map(|n| PathBuf::from(format!("/tmp/passt_{n}.socket")))
    }
}

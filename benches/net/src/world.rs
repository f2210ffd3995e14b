//! Network namespaces: a host with a neighbour that its default routes lead to, and guests.
//!
//! The host's namespace is where back ends and the host's end of each load run. Addresses are of the blocks for
//! documentation (RFC 5737, RFC 3849).

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::Failure;
use crate::process::{Guarded, output};

/// The host's own addresses, and its neighbour's.
pub(crate) const HOST_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
pub(crate) const HOST_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2);
pub(crate) const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
pub(crate) const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);

/// A network namespace, kept by a process that does nothing.
pub(crate) struct Namespace {
    keeper: Guarded,
}

impl Namespace {
    /// A namespace with a loopback interface, this congestion control, and enough ports for many connections.
    pub(crate) fn new(congestion: &str) -> Result<Self, Failure> {
        let keeper = Guarded::quiet(Command::new("unshare").args(["--net", "sleep", "infinity"]))?;
        let namespace = Self { keeper };
        let ours = fs::read_link("/proc/self/ns/net")?;
        namespace
            .until("a namespace of its own", |path| Ok(fs::read_link(format!("{path}/ns/net"))? != ours))?;
        namespace.ip("link set lo up")?;
        let settings = [
            ("tcp_congestion_control", congestion),
            // A load of short connections leaves each port waiting for a minute.
            ("ip_local_port_range", "10000 65000"),
            ("tcp_tw_reuse", "1"),
        ];
        for (name, value) in settings {
            let path = format!("/proc/sys/net/ipv4/{name}");
            let write = format!("echo {value} >{path}");
            output(&mut namespace.command("sh").args(["-c", &write]))
                .map_err(|error| format!("cannot set {name} to {value}: {error}"))?;
        }
        Ok(namespace)
    }

    /// A command that will run in this namespace.
    pub(crate) fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path())).arg("--").arg(program);
        command
    }

    /// A path that names it.
    pub(crate) fn path(&self) -> String {
        format!("/proc/{}/ns/net", self.keeper.id())
    }

    /// Runs `ip` with these words.
    pub(crate) fn ip(&self, words: &str) -> Result<String, Failure> {
        output(self.command("ip").args(words.split_whitespace()))
    }

    /// The congestion control that it has.
    pub(crate) fn congestion(&self) -> Result<String, Failure> {
        Ok(output(self.command("cat").arg("/proc/sys/net/ipv4/tcp_congestion_control"))?.trim().to_owned())
    }

    /// Waits for a default route, and for IPv6 addresses that may be used if there is to be one.
    pub(crate) fn wait_for_routes(&self, ipv6: bool) -> Result<(), Failure> {
        self.until("a default route", |path| {
            let v4 = fs::read_to_string(format!("{path}/net/route"))?;
            let v6 = fs::read_to_string(format!("{path}/net/ipv6_route"))?;
            let default_v4 = v4.lines().any(|line| line.split_whitespace().nth(1) == Some("00000000"));
            // The kernel's own entry for "unreachable" is on the loopback interface.
            let default_v6 =
                v6.lines().any(|line| line.starts_with(&format!("{:032} 00", 0)) && !line.ends_with(" lo"));
            Ok(default_v4 && (default_v6 || !ipv6))
        })
    }

    /// Waits until something listens to a TCP port.
    pub(crate) fn wait_for_listener(&self, port: u16) -> Result<(), Failure> {
        self.until(&format!("a listener on port {port}"), |path| {
            let tables = [format!("{path}/net/tcp"), format!("{path}/net/tcp6")].map(fs::read_to_string);
            // The local address and port, the remote ones, and the state, which is 0A.
            let [v4, v6] = tables;
            Ok((v4? + &v6?).lines().any(|line| {
                let mut words = line.split_whitespace().skip(1);
                let local = words.next().is_some_and(|word| word.ends_with(&format!(":{port:04X}")));
                local && words.nth(1) == Some("0A")
            }))
        })
    }

    fn until(&self, what: &str, so: impl Fn(&str) -> std::io::Result<bool>) -> Result<(), Failure> {
        let path = format!("/proc/{}", self.keeper.id());
        let deadline = Instant::now() + Duration::from_secs(10);
        while !so(&path).map_err(|error| format!("waiting for {what}: {error}"))? {
            if Instant::now() > deadline {
                return Err(format!("waited 10 s for {what}").into());
            }
            sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Connects two namespaces by a pair of virtual Ethernet interfaces, both named `name`.
    pub(crate) fn connect(&self, other: &Self, name: &str) -> Result<(), Failure> {
        let pid = other.keeper.id();
        self.ip(&format!("link add name {name} type veth peer name {name} netns {pid}"))?;
        self.ip(&format!("link set {name} up"))?;
        other.ip(&format!("link set {name} up"))?;
        Ok(())
    }

    /// Gives an interface addresses, which are used at once.
    pub(crate) fn address(&self, interface: &str, v4: Ipv4Addr, v6: Ipv6Addr) -> Result<(), Failure> {
        self.ip(&format!("address add {v4}/24 dev {interface}"))?;
        self.ip(&format!("address add {v6}/64 dev {interface} nodad"))?;
        Ok(())
    }
}

/// The host and its neighbour. Guests come and go.
pub(crate) struct World {
    pub(crate) host: Namespace,
    congestion: String,
    _neighbour: Namespace,
}

impl World {
    pub(crate) fn new(congestion: &str) -> Result<Self, Failure> {
        let (host, neighbour) = (Namespace::new(congestion)?, Namespace::new(congestion)?);
        host.connect(&neighbour, "eth0")?;
        host.address("eth0", HOST_V4, HOST_V6)?;
        neighbour.address("eth0", GATEWAY_V4, GATEWAY_V6)?;
        host.ip(&format!("route add default via {GATEWAY_V4}"))?;
        host.ip(&format!("route add default via {GATEWAY_V6}"))?;
        Ok(Self { host, congestion: congestion.to_owned(), _neighbour: neighbour })
    }

    /// A namespace for a guest, with nothing in it.
    pub(crate) fn guest(&self) -> Result<Namespace, Failure> {
        let guest = Namespace::new(&self.congestion)?;
        let found = guest.congestion()?;
        if found != self.congestion {
            return Err(format!("the guest's congestion control is {found}").into());
        }
        Ok(guest)
    }
}

/// An address for people and for programs that want text.
pub(crate) fn socket_address(address: IpAddr, port: u16) -> String {
    std::net::SocketAddr::new(address, port).to_string()
}

//! The guest's network: from the options to a device, what serves it, and what the guest is told.
//!
//! With a link of the kind `user` the device's queues lead to `usernet`'s engine, on a thread of this process. Everything
//! that needs the host's files or names is done here before the process is confined: its addresses, routes and
//! resolvers are read, and the ports that lead into the guest are listened to, so that one that is taken ends the
//! run before the guest boots. After that the engine opens sockets, and nothing else. With `--net-control` it may be asked for
//! more ports later, by a socket that is made first of all, while no thread is in the way of the process that removes it.
//!
//! **The host's network may change** while the guest runs. The guest's addresses are names between it and the engine, and
//! stay; its sockets go where the host's routes lead then. Its resolvers stay too, for it was told once; what it asks them
//! goes to the ones that the host has now.
//!
//! With a tap device there is no engine: frames pass as they are (`bridge`).

mod bridge;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use guest_init::spec;
use machine::dma::DeviceMemory;
use rustix::net::{AddressFamily, SocketType};
use taps::tun::{self, Tun};
use usernet::config::{Forward, Transport};
use usernet::follow::{Follower, Following};
use usernet::stats::Stats;
use usernet::tap::Tap;
use usernet::{Config, HostNetwork, Template};
use virtio::net::{Net, NetConfig, QueueTap};

use super::isolation::Use;
use super::spinner::Notes;
use crate::cli::{Link, Publish, RunArgs};
use crate::net::NetError;
use crate::net::control::{ControlSocket, Controlled};
use crate::net::options::ports::ephemeral_ports;
use bridge::Bridge;

/// The guest's Ethernet address behind an engine, where it has no neighbours: locally administered, and "Ring3".
const GUEST_MAC: [u8; 6] = [0x52, 0x69, 0x6e, 0x67, 0x33, 0x01];

/// What an interface has if nobody says otherwise.
const ETHERNET_MTU: u16 = 1500;

/// Why there is no network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The options contradict each other.
    #[error("-p {0}: only a guest with --net user has ports of the host's")]
    NotForwarded(Publish),
    /// Likewise.
    #[error("--net-control {}: only a guest with --net user has ports of the host's", .0.display())]
    NotControlled(PathBuf),
    /// The socket for control cannot be made.
    #[error(transparent)]
    Control(NetError),
    /// The host does not tell about its network, or has no descriptors left.
    #[error("cannot make the guest's network (--net none does without)")]
    Host(#[source] io::Error),
    /// A port cannot be had.
    #[error("the guest's ports cannot be forwarded (-p): port 0 of the host is any that is free")]
    Port(#[source] io::Error),
    /// The tap device cannot be used.
    #[error("cannot use the tap device {name} (--net tap={name}){}", if *missing { ": there is none; make it by `ip tuntap add NAME mode tap user USER`" } else { "" })]
    Tap {
        /// Its name.
        name: String,
        /// It does not exist.
        missing: bool,
        /// Why.
        source: io::Error,
    },
}

/// What moves the guest's frames.
enum Service {
    Engine {
        network: Box<usernet::Network>,
        changes: Box<Changes>,
        control: Option<Control>,
        /// Whether to say where the guest's ports are.
        announce: bool,
    },
    Bridge(Bridge<QueueTap<DeviceMemory>, Tun>),
}

/// The host's network, for when it is not what it was any more.
struct Changes {
    follower: Follower,
    host: HostNetwork,
    known: Config,
}

impl Changes {
    /// Has the engine behind `handle` follow the host's network, for a guest that was told `guest`.
    fn follow(self, guest: &spec::Network, handle: usernet::Handle) -> io::Result<Following> {
        let (resolvers, ours) =
            (guest.resolvers.clone(), Config { guest_mac: Some(guest.mac), ..self.known.clone() });
        self.follower.start((self.host, self.known), move |_, now| {
            let config = Config { dns_forward: resolved(&resolvers, &now), ..ours.clone() };
            // An engine that has ended needs nothing.
            let _ = handle.reconfigure(config);
        })
    }
}

/// Where the questions go that the guest asks the resolvers that it was told: to those of the host's present network.
fn resolved(asked: &[IpAddr], now: &Config) -> Vec<(IpAddr, IpAddr)> {
    let own =
        |server: &IpAddr| now.dns_forward.iter().find(|(inside, _)| inside == server).map(|(_, own)| *own);
    let servers = now.dns.iter().map(|server| own(server).unwrap_or(*server));
    let pairs = asked.iter().copied().zip(servers.collect::<Vec<_>>().into_iter().cycle());
    pairs.filter(|(asked, server)| asked != server).collect()
}

/// Control of the ports at run time, before there is anything to be controlled.
struct Control {
    socket: ControlSocket,
    controlled: Controlled,
}

/// A guest's network, ready to be served.
pub struct Network {
    device: Net<DeviceMemory>,
    service: Service,
    guest: spec::Network,
}

impl std::fmt::Debug for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Network").field("guest", &self.guest).finish_non_exhaustive()
    }
}

/// A network that is being served.
pub(super) struct Served {
    stop: Box<dyn FnOnce() -> Option<Stats> + Send>,
    thread: JoinHandle<()>,
}

/// Makes the network that the options ask for.
///
/// # Errors
/// A [`NetworkError`]. A host that allows no network at all is one only if the user asked for a network; otherwise
/// the guest has none, and the user is told so.
pub fn open(args: &RunArgs) -> Result<Option<Network>, NetworkError> {
    let link = args.net.clone().unwrap_or(Link::User);
    if let Some(port) = args.publish.first()
        && link != Link::User
    {
        return Err(NetworkError::NotForwarded(port.clone()));
    }
    if let Some(path) = &args.net_control
        && link != Link::User
    {
        return Err(NetworkError::NotControlled(path.clone()));
    }
    match link {
        Link::None => Ok(None),
        Link::Tap(name) => tap(&name).map(Some),
        Link::User => match user(args) {
            Err(NetworkError::Host(error)) if may_be_missing(args) => {
                eprintln!("ring3: the guest has no network: {error}");
                Ok(None)
            }
            result => result.map(Some),
        },
    }
}

/// Whether the user has said nothing that needs a network.
fn may_be_missing(args: &RunArgs) -> bool {
    args.net.is_none() && args.publish.is_empty() && args.net_control.is_none()
}

fn user(args: &RunArgs) -> Result<Network, NetworkError> {
    let publish = &args.publish;
    let control = args.net_control.as_deref().map(ControlSocket::bind_kept).transpose();
    let control = control.map_err(NetworkError::Control)?;
    let mut follower = Follower::open(Template::default()).map_err(NetworkError::Host)?;
    let (host, mut config) = follower.config().map_err(NetworkError::Host)?;
    let changes = Changes { follower, host, known: config.clone() };
    config.guest_mac = Some(GUEST_MAC);
    let guest = told(&config);
    config.forwards = publish.iter().map(forward).collect();
    let (device, taps) =
        Net::new(NetConfig { mac: GUEST_MAC, mtu: guest.mtu, pairs: 1 }).map_err(NetworkError::Host)?;
    let taps = taps.into_iter().map(|tap| Box::new(tap) as Box<dyn Tap>).collect();
    let engine = usernet::Network::new(config, taps).map_err(|error| {
        if publish.is_empty() { NetworkError::Host(error) } else { NetworkError::Port(error) }
    })?;
    let controlled = || Controlled { handle: engine.handle(), v6: has_ipv6(), ephemeral: ephemeral_ports() };
    let control = control.map(|socket| Control { socket, controlled: controlled() });
    // Which port it became is not for the guest's user to find out by trying.
    let announce = args.verbose || publish.iter().any(|port| port.host == 0);
    Ok(Network {
        device,
        service: Service::Engine { network: Box::new(engine), changes: Box::new(changes), control, announce },
        guest,
    })
}

/// What the guest is told, which a DHCP client would find out too.
fn told(config: &Config) -> spec::Network {
    let v4 = config.ipv4.map(|f| (IpAddr::from(f.guest), f.prefix, IpAddr::from(f.gateway)));
    let v6 = config.ipv6.map(|f| (IpAddr::from(f.guest), f.prefix, IpAddr::from(f.gateway)));
    let families = || v4.iter().chain(&v6);
    // A host without a resolver may have one later.
    let gateway = families().map(|&(.., gateway)| gateway).take(if config.dns.is_empty() { 1 } else { 0 });
    spec::Network {
        mac: GUEST_MAC,
        mtu: config.mtu,
        addresses: families().map(|&(address, prefix, _)| (address, prefix)).collect(),
        gateways: families().map(|&(.., gateway)| gateway).collect(),
        resolvers: config.dns.iter().copied().chain(gateway).collect(),
        search: config.search.clone(),
    }
}

fn forward(port: &Publish) -> Forward {
    let any = || if has_ipv6() { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    Forward::new(port.transport, SocketAddr::new(port.address.unwrap_or_else(any), port.host), port.guest)
}

/// Whether the host's kernel has IPv6: one socket then listens on all addresses of both families.
fn has_ipv6() -> bool {
    rustix::net::socket(AddressFamily::INET6, SocketType::STREAM, None).is_ok()
}

fn tap(name: &str) -> Result<Network, NetworkError> {
    let fail = |source: io::Error| {
        let missing = source.raw_os_error() == Some(libc::ENODEV);
        NetworkError::Tap { name: name.to_owned(), missing, source }
    };
    // The kernel makes one that is missing for whoever may, and it would be gone with us.
    rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None)
        .and_then(|socket| rustix::net::netdevice::name_to_index(&socket, name))
        .map_err(|errno| fail(errno.into()))?;
    let mtu = mtu(name);
    let options = tun::Options { name, multi_queue: false, mtu };
    let tun = tun::open().and_then(|file| Tun::attach(file, options)).map_err(fail)?;
    // It may have neighbours that are ring3's guests too.
    let mut mac = GUEST_MAC;
    rustix::rand::getrandom(&mut mac[1..], rustix::rand::GetRandomFlags::empty())
        .map_err(|e| fail(e.into()))?;
    let (device, taps) = Net::new(NetConfig { mac, mtu, pairs: 1 }).map_err(fail)?;
    let queues = taps.into_iter().next().ok_or_else(|| fail(io::ErrorKind::InvalidInput.into()))?;
    let bridge = Bridge::new(queues, tun).map_err(fail)?;
    let guest = spec::Network { mac, mtu, ..spec::Network::default() };
    Ok(Network { device, service: Service::Bridge(bridge), guest })
}

/// The MTU of an interface.
fn mtu(name: &str) -> u16 {
    // /sys may show another namespace's interfaces, and IPv6 may be off.
    ["/proc/sys/net/ipv6/conf", "/sys/class/net"]
        .iter()
        .filter_map(|dir| std::fs::read_to_string(Path::new(dir).join(name).join("mtu")).ok())
        .find_map(|text| text.trim().parse().ok())
        .unwrap_or(ETHERNET_MTU)
}

impl Network {
    /// What the guest's first process is to be told.
    #[must_use]
    pub fn guest(&self) -> &spec::Network {
        &self.guest
    }

    /// What the process needs for it once it is confined.
    #[must_use]
    pub fn needs(&self) -> Use {
        match self.service {
            Service::Engine { control: Some(_), .. } => Use::Ports,
            Service::Engine { control: None, .. } => Use::Sockets,
            Service::Bridge(_) => Use::Nothing,
        }
    }

    /// The guest's device, and the rest, which is to be served while the device is used.
    pub(super) fn into_parts(self) -> (Net<DeviceMemory>, Serve) {
        (self.device, Serve(self.service, self.guest))
    }
}

/// The host's side of a network.
pub(super) struct Serve(Service, spec::Network);

impl Serve {
    /// Starts the thread that moves the frames.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub(super) fn start(self, notes: &Notes) -> io::Result<Served> {
        match self.0 {
            Service::Engine { network, changes, control, announce } => {
                let handle = network.handle();
                let thread = spawn(move || network.run())?;
                let control = control.map(|control| control.socket.serve(control.controlled)).transpose()?;
                let following = changes.follow(&self.1, handle.clone())?;
                let forwards = if announce { handle.forwards().unwrap_or_default() } else { Vec::new() };
                for Forward { transport, listen, guest_port, .. } in forwards {
                    let transport = if transport == Transport::Tcp { "TCP" } else { "UDP" };
                    notes.say(format_args!("{transport} port {listen} leads to the guest's {guest_port}"));
                }
                let stop = Box::new(move || {
                    drop(following);
                    let stats = handle.stats().ok();
                    handle.stop();
                    // It waits for requests that the engine has.
                    drop(control);
                    stats
                });
                Ok(Served { stop, thread })
            }
            Service::Bridge(bridge) => {
                let stopper = bridge.stopper();
                let thread = spawn(move || bridge.run())?;
                let stop = Box::new(move || {
                    stopper.signal();
                    None
                });
                Ok(Served { stop, thread })
            }
        }
    }
}

fn spawn(run: impl FnOnce() -> io::Result<()> + Send + 'static) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name("network".into()).spawn(move || {
        if let Err(error) = run() {
            tracing::error!(%error, "the guest's network is gone");
        }
    })
}

impl Served {
    /// Ends it, when the guest has ended. Returns what an engine has counted.
    pub(super) fn stop(self) -> Option<Stats> {
        let stats = (self.stop)();
        // It has said by itself what there was to say.
        let _ = self.thread.join();
        stats
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn questions_follow_the_hosts_resolvers() {
        let asked = [address("192.0.2.53"), address("192.0.2.54")];
        let now = |dns: &[&str], forwards: &[(&str, &str)]| Config {
            dns: dns.iter().map(|text| address(text)).collect(),
            dns_forward: forwards.iter().map(|(a, b)| (address(a), address(b))).collect(),
            ..usernet::testing::config()
        };
        assert_eq!(resolved(&asked, &now(&["192.0.2.53", "192.0.2.54"], &[])), []);
        let new = address("198.51.100.1");
        assert_eq!(resolved(&asked, &now(&["198.51.100.1"], &[])), asked.map(|asked| (asked, new)));
        let own = now(&["192.0.2.1", "192.0.2.54"], &[("192.0.2.1", "127.0.0.53")]);
        assert_eq!(resolved(&asked, &own), [(asked[0], address("127.0.0.53"))]);
        assert_eq!(resolved(&asked, &now(&[], &[])), [], "there is nobody to ask");
    }

    #[test]
    fn the_guest_is_told_what_dhcp_would_tell() {
        let config = usernet::testing::config();
        let guest = told(&config);
        assert_eq!(guest.addresses, [(address("192.0.2.15"), 24), (address("2001:db8::f"), 64)]);
        assert_eq!(guest.gateways, [address("192.0.2.2"), address("fe80::2")]);
        assert_eq!((guest.resolvers, guest.search), (config.dns.clone(), config.search.clone()));
        let lonely = told(&Config { dns: Vec::new(), ..config });
        assert_eq!(lonely.resolvers, [address("192.0.2.2")], "one may come");
    }

    #[test]
    fn ports_without_an_address_are_everywhere() {
        let port = Publish { address: None, host: 8080, guest: 80, transport: Transport::Udp };
        let forward = forward(&port);
        assert!(forward.listen.ip().is_unspecified());
        assert_eq!(
            (forward.listen.port(), forward.guest_port, forward.transport),
            (8080, 80, Transport::Udp)
        );
    }
}

//! Whether options fit together: from [`super::args`] to [`super::settings`].
//!
//! Of an option that is given more than once the last one counts, or the last one for each address family, as upstream
//! has it. An option that could have no effect is an error here, so that none is ignored silently.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use nix::unistd::{Group, Uid, User};
use usernet::config::{Outbound, Services};

use super::args::{CommonArgs, PasstArgs, PastaArgs, PastaOnly, Vhost};
use super::network::{HostLoopback, Network};
use super::ports::{BadPorts, PortSpec, PortTable, ephemeral_ports};
use super::settings::{
    Common, Configure, GuestSocket, Identity, LOG_SIZE, Level, Log, PasstSettings, PastaSettings, Ports,
    Splice, Target,
};
use super::values::{Id, NoneOr, UserGroup};

/// Options that do not fit together, or that the host has nothing for.
#[derive(Debug, thiserror::Error)]
pub enum BadOptions {
    /// Two that exclude each other.
    #[error("{one} cannot be used with {other}: {why}")]
    Excludes {
        /// The one.
        one: &'static str,
        /// The other.
        other: &'static str,
        /// Why not.
        why: &'static str,
    },
    /// One that has no effect without another.
    #[error("{one} needs {other}: {why}")]
    Needs {
        /// The one.
        one: &'static str,
        /// The other.
        other: &'static str,
        /// Why.
        why: &'static str,
    },
    /// One that ring3 does not have.
    #[error("{option} is not for ring3: {why}")]
    Unsupported {
        /// The option.
        option: &'static str,
        /// Why not.
        why: &'static str,
    },
    /// Ports that cannot be forwarded together.
    #[error("{option}: {error}")]
    Ports {
        /// The option.
        option: &'static str,
        /// What is wrong with them.
        error: BadPorts,
    },
    /// A value that no other option makes good.
    #[error("{option} {value}: {why}")]
    Value {
        /// The option.
        option: &'static str,
        /// What was given.
        value: String,
        /// What is wrong with it.
        why: String,
    },
}

use BadOptions::{Excludes, Needs, Unsupported};

/// Who asks: what is the default, and what can apply, differs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Asker {
    Pasta,
    Passt,
}

impl TryFrom<PastaArgs> for PastaSettings {
    type Error = BadOptions;

    fn try_from(args: PastaArgs) -> Result<Self, BadOptions> {
        let PastaArgs { common, own } = args;
        let splice = splice(&own)?;
        if splice == Splice::Only {
            let unused = [
                (own.ns_ifname.is_some(), "--ns-ifname"),
                (own.ns_mac_addr.is_some(), "--ns-mac-addr"),
                (own.vhost == Vhost::On, "--vhost on"),
                (common.pcap.is_some(), "--pcap"),
                (common.stats.is_some(), "--stats"),
                (common.conf_path.is_some(), "--conf-path"),
            ];
            if let Some((_, one)) = unused.into_iter().find(|(given, _)| *given) {
                return Err(Excludes { one, other: "--splice-only", why: "there is no tap device" });
            }
        }
        let configure = configure(&common, &own)?;
        let target = target(&own)?;
        let ns = |option, specs: &[PortSpec], off, follow_tcp| {
            ports(option, specs, Asker::Pasta, off).map(|ports| Ports { follow_tcp, ..ports })
        };
        let tcp_ns = ns("--tcp-ns", &own.tcp_ns, common.no_tcp.then_some("--no-tcp"), false)?;
        let udp_ns = ns("--udp-ns", &own.udp_ns, common.no_udp.then_some("--no-udp"), true)?;
        // Somebody waits for the command's status.
        let waited_for = matches!(target, Target::Command { .. });
        Ok(Self {
            common: Common::new(common, Asker::Pasta, waited_for)?,
            target,
            no_netns_quit: own.no_netns_quit,
            ifname: own.ns_ifname,
            ns_mac: own.ns_mac_addr,
            configure,
            splice,
            host_lo_to_ns_lo: own.host_lo_to_ns_lo,
            tcp_ns,
            udp_ns,
            vhost: own.vhost,
        })
    }
}

impl TryFrom<PasstArgs> for PasstSettings {
    type Error = BadOptions;

    fn try_from(args: PasstArgs) -> Result<Self, BadOptions> {
        let PasstArgs { common, own } = args;
        const MIGRATION: &str = "it does not migrate guests between hosts";
        if own.repair_path.is_some_and(|path| path != Path::new("none")) {
            return Err(Unsupported { option: "--repair-path", why: MIGRATION });
        }
        if own.migrate_exit {
            return Err(Unsupported { option: "--migrate-exit", why: MIGRATION });
        }
        if own.migrate_no_linger {
            return Err(Unsupported { option: "--migrate-no-linger", why: MIGRATION });
        }
        let socket = match (own.socket, own.fd) {
            (Some(_), Some(_)) => {
                let why = "the descriptor is the guest's socket, so none is listened on";
                return Err(Excludes { one: "--fd", other: "--socket", why });
            }
            (None, Some(fd)) if fd < 3 => {
                let why = "0 to 2 are the standard streams; give the socket another number".to_owned();
                return Err(BadOptions::Value { option: "--fd", value: fd.to_string(), why });
            }
            (None, Some(fd)) => GuestSocket::Descriptor(fd),
            (Some(path), None) => GuestSocket::Path(path),
            (None, None) => GuestSocket::FirstFree,
        };
        Ok(Self {
            common: Common::new(common, Asker::Passt, false)?,
            vhost_user: own.vhost_user,
            one_off: own.one_off || matches!(socket, GuestSocket::Descriptor(_)),
            socket,
        })
    }
}

impl Common {
    /// `waited_for` says whether somebody waits for the process's end, so that it stays in the foreground.
    fn new(args: CommonArgs, asker: Asker, waited_for: bool) -> Result<Self, BadOptions> {
        let foreground = args.foreground || waited_for;
        let (no_tcp, no_udp) = (args.no_tcp.then_some("--no-tcp"), args.no_udp.then_some("--no-udp"));
        let tcp = ports("--tcp-ports", &args.tcp_ports, asker, no_tcp)?;
        let udp = ports("--udp-ports", &args.udp_ports, asker, no_udp)?;
        let network = network(&args, asker)?;
        for (option, ports) in [("--tcp-ports", &tcp), ("--udp-ports", &udp)] {
            check_families(option, ports, network.families)?;
        }
        if args.log_size.is_some() && args.log_file.is_none() {
            let why = "the system's log is not ours to cut";
            return Err(Needs { one: "--log-size", other: "--log-file", why });
        }
        if args.stats.is_some() && !foreground {
            let why = "in the background there is no standard error to print to";
            return Err(Needs { one: "--stats", other: "--foreground", why });
        }
        let level = match &args {
            CommonArgs { trace: true, .. } => Level::Trace,
            CommonArgs { debug: true, .. } => Level::Debug,
            CommonArgs { quiet: true, .. } => Level::Quiet,
            _ => Level::Normal,
        };
        Ok(Self {
            log: Log { level, file: args.log_file, size: args.log_size.map_or(LOG_SIZE, |size| size.0) },
            foreground,
            runas: args.runas.map(identity).transpose()?,
            pid_file: args.pid,
            pcap: args.pcap,
            stats: args.stats,
            chroot_fallback: args.chroot_fallback,
            control: args.conf_path,
            threads: args.threads.unwrap_or(1),
            network,
            tcp,
            udp: Ports { follow_tcp: true, ..udp },
        })
    }
}

fn splice(own: &PastaOnly) -> Result<Splice, BadOptions> {
    if own.no_splice && own.splice_only {
        let why = "nothing would be left";
        return Err(Excludes { one: "--no-splice", other: "--splice-only", why });
    }
    if own.no_splice && own.host_lo_to_ns_lo {
        let why = "only the short cut can arrive on the namespace's loopback";
        return Err(Excludes { one: "--host-lo-to-ns-lo", other: "--no-splice", why });
    }
    Ok(match (own.no_splice, own.splice_only) {
        (true, _) => Splice::Off,
        (_, true) => Splice::Only,
        _ => Splice::On,
    })
}

fn configure(common: &CommonArgs, own: &PastaOnly) -> Result<Option<Configure>, BadOptions> {
    if !own.config_net {
        for (given, one) in [(own.no_copy_routes, "--no-copy-routes"), (own.no_copy_addrs, "--no-copy-addrs")]
        {
            if given {
                return Err(Needs { one, other: "--config-net", why: "nothing is configured without it" });
            }
        }
        return Ok(None);
    }
    let both = |copy: bool, but_for: &dyn Fn(bool) -> bool| [false, true].map(|v6| copy && !but_for(v6));
    Ok(Some(Configure {
        copy_routes: both(!own.no_copy_routes, &|v6| common.gateway.iter().any(|a| a.is_ipv6() == v6)),
        // Those that are copied have the host's netmask.
        copy_addresses: both(!own.no_copy_addrs, &|v6| {
            common.address.iter().any(|a| a.address.is_ipv6() == v6) || (!v6 && common.netmask.is_some())
        }),
    }))
}

fn target(own: &PastaOnly) -> Result<Target, BadOptions> {
    if own.netns_only && own.userns.is_some() {
        let why = "no user namespace is joined then";
        return Err(Excludes { one: "--userns", other: "--netns-only", why });
    }
    let pid = match own.command.as_slice() {
        [word] => word.to_str().filter(|word| !word.is_empty() && word.bytes().all(|b| b.is_ascii_digit())),
        _ => None,
    };
    if let Some(netns) = &own.netns {
        if pid.is_some() {
            return Err(Excludes { one: "PID", other: "--netns", why: "both name the network namespace" });
        }
        if !own.command.is_empty() {
            let why = "a command gets new namespaces; to run one in existing ones, use nsenter(1)";
            return Err(Excludes { one: "a command", other: "--netns", why });
        }
        joins_none_made(own, "--netns")?;
        return Ok(Target::Join { netns: netns_path(netns), userns: own.userns.clone() });
    }
    if let Some(pid) = pid {
        joins_none_made(own, "PID")?;
        let of_process = |kind: &str| PathBuf::from(format!("/proc/{pid}/ns/{kind}"));
        let own_userns = || (!own.netns_only).then(|| of_process("user"));
        let userns = own.userns.clone().or_else(own_userns);
        return Ok(Target::Join { netns: of_process("net"), userns });
    }
    if own.userns.is_some() {
        let why = "a command gets new namespaces";
        return Err(Needs { one: "--userns", other: "--netns or PID", why });
    }
    if own.no_netns_quit {
        let why = "pasta ends with its command";
        return Err(Needs { one: "--no-netns-quit", other: "--netns or PID", why });
    }
    Ok(Target::Command {
        command: own.command.clone(),
        netns_only: own.netns_only,
        pid_namespace: !own.no_pidns,
    })
}

fn joins_none_made(own: &PastaOnly, other: &'static str) -> Result<(), BadOptions> {
    if own.no_pidns {
        return Err(Excludes { one: "--no-pidns", other, why: "no command is started" });
    }
    Ok(())
}

/// A word without a slash is a name as ip-netns(8) has them.
fn netns_path(spec: &Path) -> PathBuf {
    if spec.as_os_str().as_encoded_bytes().contains(&b'/') {
        spec.to_owned()
    } else {
        Path::new("/run/netns").join(spec)
    }
}

/// The rules for one option's values, or for its default.
fn ports(
    option: &'static str,
    specs: &[PortSpec],
    asker: Asker,
    off: Option<&'static str>,
) -> Result<Ports, BadOptions> {
    if let Some(other) = off {
        return match specs.iter().find(|spec| **spec != PortSpec::None) {
            Some(_) => Err(Excludes { one: option, other, why: "nothing could be forwarded" }),
            None => Ok(Ports::default()),
        };
    }
    let is_auto = |spec: &&PortSpec| matches!(spec, PortSpec::Ports(list) if list.auto);
    if asker == Asker::Passt
        && let Some(spec) = specs.iter().find(is_auto)
    {
        let why = "auto follows the listeners in a namespace, and a virtual machine's cannot be seen; \
                   name the ports, or say all"
            .to_owned();
        return Err(BadOptions::Value { option, value: spec.to_string(), why });
    }
    let specs = match (specs, asker) {
        ([], Asker::Pasta) => vec![PortSpec::auto()],
        (specs, _) => specs.to_vec(),
    };
    let table = PortTable::new(specs).map_err(|error| BadOptions::Ports { option, error })?;
    Ok(Ports { rules: table.rules(ephemeral_ports()), follow_tcp: false })
}

/// A rule for a family that the guest does not have, or between families, would carry nothing.
fn check_families(option: &'static str, ports: &Ports, families: [bool; 2]) -> Result<(), BadOptions> {
    for rule in &ports.rules {
        let value = || rule.to_string();
        let (listen, to) = (rule.listen.address, rule.mapping.to_address);
        if let (Some(listen), Some(to)) = (listen, to)
            && listen.is_ipv4() != to.is_ipv4()
        {
            let why = "the one address is IPv4, the other IPv6, and packets are not translated".to_owned();
            return Err(BadOptions::Value { option, value: value(), why });
        }
        if let Some(address) = listen.or(to)
            && !families[usize::from(address.is_ipv6())]
        {
            return Err(not_with_family(option, value(), address.is_ipv6()));
        }
    }
    Ok(())
}

/// A value of a family that an option has turned off.
fn not_with_family(option: &'static str, value: String, v6: bool) -> BadOptions {
    let why = if v6 { "there is no IPv6 with -4" } else { "there is no IPv4 with -6" };
    BadOptions::Value { option, value, why: why.to_owned() }
}

/// The last address of each family.
fn by_family(addresses: &[IpAddr]) -> (Option<std::net::Ipv4Addr>, Option<std::net::Ipv6Addr>) {
    let mut found = (None, None);
    for address in addresses {
        match *address {
            IpAddr::V4(address) => found.0 = Some(address),
            IpAddr::V6(address) => found.1 = Some(address),
        }
    }
    found
}

/// The addresses after the last `none`, and whether there was one.
fn after_none(values: &[NoneOr<IpAddr>]) -> (Vec<IpAddr>, bool) {
    let mut addresses = Vec::new();
    let mut none = false;
    for value in values {
        match value {
            NoneOr::None => {
                addresses.clear();
                none = true;
            }
            NoneOr::Some(address) => addresses.push(*address),
        }
    }
    (addresses, none)
}

fn network(args: &CommonArgs, asker: Asker) -> Result<Network, BadOptions> {
    let families = [!args.ipv6_only, !args.ipv4_only];
    let address_v4 = args.address.iter().rev().find_map(|a| match a.address {
        IpAddr::V4(address) => Some((address, a.prefix)),
        IpAddr::V6(_) => None,
    });
    let (_, address_v6) = by_family(&args.address.iter().map(|a| a.address).collect::<Vec<_>>());
    if args.netmask.is_some() && matches!(address_v4, Some((_, Some(_)))) {
        let why = "both give the length of the prefix";
        return Err(Excludes { one: "--netmask", other: "--address ADDR/LEN", why });
    }
    if args.netmask.is_some() && args.ipv6_only {
        return Err(Excludes { one: "--netmask", other: "--ipv6-only", why: "a netmask is IPv4's" });
    }
    for (option, interface, v6) in
        [("--outbound-if4", &args.outbound_if4, false), ("--outbound-if6", &args.outbound_if6, true)]
    {
        if let Some(name) = interface.as_ref().filter(|_| !families[usize::from(v6)]) {
            return Err(not_with_family(option, name.clone(), v6));
        }
    }
    for (option, addresses) in [
        ("--address", args.address.iter().map(|a| a.address).collect::<Vec<_>>()),
        ("--gateway", args.gateway.clone()),
        ("--outbound", args.outbound.clone()),
        ("--dns", after_none(&args.dns).0),
        ("--dns-forward", args.dns_forward.clone()),
        ("--dns-host", args.dns_host.clone()),
        ("--map-host-loopback", after_none(&args.map_host_loopback).0),
        ("--map-guest-addr", after_none(&args.map_guest_addr).0),
    ] {
        if let Some(address) = addresses.iter().find(|a| !families[usize::from(a.is_ipv6())]) {
            return Err(not_with_family(option, address.to_string(), address.is_ipv6()));
        }
    }
    if !args.dns_host.is_empty() && args.dns_forward.is_empty() {
        let why = "no address leads to that resolver otherwise";
        return Err(Needs { one: "--dns-host", other: "--dns-forward", why });
    }
    let (dns, no_dns) = after_none(&args.dns);
    let (gateway_v4, gateway_v6) = by_family(&args.gateway);
    let (loopbacks, no_loopback) = after_none(&args.map_host_loopback);
    let (loopback_v4, loopback_v6) = by_family(&loopbacks);
    let (host_global_v4, host_global_v6) = by_family(&after_none(&args.map_guest_addr).0);
    let (outbound_v4, outbound_v6) = by_family(&args.outbound);
    let last_of_each = |addresses: &[IpAddr]| {
        let (v4, v6) = by_family(addresses);
        v4.map(IpAddr::V4).into_iter().chain(v6.map(IpAddr::V6)).collect::<Vec<_>>()
    };
    let template = |outbound: &Option<String>| args.interface.clone().or_else(|| outbound.clone());
    let tell = |yes: bool, no: bool| if asker == Asker::Pasta { yes } else { !no };
    Ok(Network {
        families,
        template: [template(&args.outbound_if4), template(&args.outbound_if6)],
        address_v4,
        address_v6,
        netmask: args.netmask.map(|mask| mask.0),
        gateway_v4,
        gateway_v6,
        gateway_mac: args.mac_addr,
        mtu: args.mtu,
        dns: (no_dns || !dns.is_empty()).then_some(dns),
        dns_forward: last_of_each(&args.dns_forward),
        dns_host: last_of_each(&args.dns_host),
        search: args.search.as_ref().map(|search| search.0.clone()),
        tell_dns: tell(args.dhcp_dns, args.no_dhcp_dns),
        tell_search: tell(args.dhcp_search, args.no_dhcp_search),
        host_loopback: HostLoopback {
            v4: loopback_v4,
            v6: loopback_v6,
            gateway: !(args.no_map_gw || no_loopback),
        },
        host_global_v4,
        host_global_v6,
        hostname: args.hostname.clone(),
        fqdn: args.fqdn.clone(),
        services: Services {
            tcp: !args.no_tcp,
            udp: !args.no_udp,
            icmp: !args.no_icmp,
            dhcp: !args.no_dhcp,
            dhcpv6: !args.no_dhcpv6,
            ndp: !(args.no_ndp || args.no_icmp),
            ra: !args.no_ra,
        },
        freebind: args.freebind,
        outbound: Outbound {
            address_v4: outbound_v4,
            address_v6: outbound_v6,
            interface_v4: args.outbound_if4.clone(),
            interface_v6: args.outbound_if6.clone(),
        },
    })
}

/// Asks the system's data base of users for what was not given by number.
fn identity(who: UserGroup) -> Result<Identity, BadOptions> {
    let bad = |value: &Id, why: &str| BadOptions::Value {
        option: "--runas",
        value: value.to_string(),
        why: why.to_owned(),
    };
    let found = match &who.user {
        Id::Number(uid) => User::from_uid(Uid::from_raw(*uid)),
        Id::Name(name) => User::from_name(name),
    };
    let found = found.ok().flatten();
    let uid = match (&who.user, &found) {
        (Id::Number(uid), _) => *uid,
        (Id::Name(_), Some(user)) => user.uid.as_raw(),
        (name, None) => return Err(bad(name, "no such user; give an existing login, or UID:GID")),
    };
    let gid = match &who.group {
        Some(Id::Number(gid)) => *gid,
        Some(group @ Id::Name(name)) => match Group::from_name(name) {
            Ok(Some(group)) => group.gid.as_raw(),
            _ => return Err(bad(group, "no such group; give an existing one, or its number")),
        },
        None => match &found {
            Some(user) => user.gid.as_raw(),
            None => return Err(bad(&who.user, "no such user, so its group is not known; give UID:GID")),
        },
    };
    Ok(Identity { uid, gid })
}

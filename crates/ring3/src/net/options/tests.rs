use std::path::Path;
use std::time::Duration;

use clap::{CommandFactory, Parser};

use super::args::Vhost;
use super::settings::{Configure, GuestSocket, Level, Splice, Target};
use super::*;

fn pasta(words: &[&str]) -> Result<PastaSettings, String> {
    let args = PastaArgs::try_parse_from(["pasta"].iter().chain(words)).map_err(|e| e.to_string())?;
    PastaSettings::try_from(args).map_err(|e| e.to_string())
}

fn passt(words: &[&str]) -> Result<PasstSettings, String> {
    let args = PasstArgs::try_parse_from(["passt"].iter().chain(words)).map_err(|e| e.to_string())?;
    PasstSettings::try_from(args).map_err(|e| e.to_string())
}

#[test]
fn the_definitions_are_sound() {
    PastaArgs::command().debug_assert();
    PasstArgs::command().debug_assert();
}

#[test]
fn defaults_are_upstreams() {
    let settings = pasta(&[]).unwrap();
    let Target::Command { command, netns_only: false, pid_namespace: true } = &settings.target else {
        panic!("{:?}", settings.target)
    };
    assert!(command.is_empty());
    assert!(settings.configure.is_none() && !settings.no_netns_quit && !settings.host_lo_to_ns_lo);
    assert_eq!((settings.splice, settings.vhost), (Splice::On, Vhost::Auto));
    for ports in [&settings.common.tcp, &settings.common.udp, &settings.tcp_ns, &settings.udp_ns] {
        assert!(!ports.rules.is_empty() && ports.rules.iter().all(|rule| rule.auto && rule.best_effort));
    }
    assert!(settings.common.udp.follow_tcp && settings.udp_ns.follow_tcp);
    assert!(!settings.common.tcp.follow_tcp && !settings.tcp_ns.follow_tcp);

    let settings = passt(&[]).unwrap();
    assert_eq!(settings.socket, GuestSocket::FirstFree);
    assert!(!settings.one_off && !settings.vhost_user && !settings.common.foreground);
    assert!(settings.common.tcp.rules.is_empty() && settings.common.udp.rules.is_empty());
    assert_eq!((settings.common.log.level, settings.common.log.size), (Level::Normal, 1 << 20));
    assert_eq!(settings.common.network.mtu, 65520);
    let paths: Vec<_> = GuestSocket::defaults().collect();
    assert_eq!((paths.len(), paths[63].as_path()), (64, Path::new("/tmp/passt_64.socket")));
}

/// What podman gives pasta, and libvirt passt.
#[test]
fn what_callers_are_known_to_give() {
    let settings = pasta(&[
        "--config-net",
        "-t",
        "8080-8080:80-80",
        "-u",
        "none",
        "-T",
        "none",
        "-U",
        "none",
        "--dns-forward",
        "169.254.1.1",
        "--no-map-gw",
        "--quiet",
        "--netns",
        "/run/user/1000/netns/netns-1",
        "--map-guest-addr",
        "169.254.1.2",
    ])
    .unwrap();
    assert_eq!(settings.common.forwards().required.len(), 1);
    assert!(settings.common.forwards().best_effort.is_empty());
    assert_eq!(settings.common.log.level, Level::Quiet);
    assert!(!settings.common.foreground);
    assert_eq!(settings.configure, Some(Configure { copy_routes: [true; 2], copy_addresses: [true; 2] }));
    let netns = "/run/user/1000/netns/netns-1".into();
    assert_eq!(settings.target, Target::Join { netns, userns: None });

    let settings = passt(&[
        "--one-off",
        "--socket",
        "/run/passt.socket",
        "--pid",
        "/run/passt.pid",
        "--log-file",
        "/tmp/log",
        "--debug",
        "--tcp-ports",
        "192.0.2.1%eth0/2001:1",
        "--udp-ports",
        "3000-3010",
        "--repair-path",
        "none",
        "--stderr",
    ])
    .unwrap();
    assert!(settings.one_off);
    assert_eq!(settings.socket, GuestSocket::Path("/run/passt.socket".into()));
    assert_eq!(settings.common.forwards().required.len(), 12);
}

#[test]
fn the_command_takes_the_rest() {
    let command = |words: &[&str]| match pasta(words).unwrap().target {
        Target::Command { command, .. } => command,
        other => panic!("{other:?}"),
    };
    assert_eq!(command(&["--config-net", "ls", "-l", "--quiet"]), ["ls", "-l", "--quiet"]);
    assert_eq!(command(&["-f", "--", "-x"]), ["-x"]);
    assert_eq!(command(&["12", "34"]), ["12", "34"]);
    assert!(pasta(&["ls"]).unwrap().common.foreground, "somebody waits for the status");
}

#[test]
fn namespaces_are_named_in_several_ways() {
    let join = |netns: &str, userns: Option<&str>| Target::Join {
        netns: netns.into(),
        userns: userns.map(Into::into),
    };
    for (words, target) in [
        (&["1234"][..], join("/proc/1234/ns/net", Some("/proc/1234/ns/user"))),
        (&["--userns", "/u", "1234"], join("/proc/1234/ns/net", Some("/u"))),
        (&["--netns-only", "1234"], join("/proc/1234/ns/net", None)),
        (&["--netns", "blue"], join("/run/netns/blue", None)),
        (&["--netns", "./blue", "--userns", "/u"], join("./blue", Some("/u"))),
    ] {
        assert_eq!(pasta(words).unwrap().target, target, "{words:?}");
    }
}

#[test]
fn prefixes_will_do_and_the_last_one_counts() {
    let settings =
        pasta(&["--config", "--foreg", "-m", "1500", "--mtu", "9000", "-q", "-d", "-l", "a", "-l", "b"])
            .unwrap();
    assert!(settings.configure.is_some());
    assert_eq!(settings.common.network.mtu, 9000);
    assert_eq!(settings.common.log.level, Level::Debug);
    assert_eq!(settings.common.log.file.as_deref(), Some(Path::new("b")));
    assert_eq!(pasta(&["--trace", "-q"]).unwrap().common.log.level, Level::Quiet);
    assert_eq!(passt(&["-4", "-6"]).unwrap().common.network.families, [false, true]);
    assert_eq!(passt(&["-f", "--stats", "5"]).unwrap().common.stats, Some(Duration::from_secs(5)));
    // Exact although it is also the beginning of others.
    assert!(!passt(&["--no-dhcp"]).unwrap().common.network.services.dhcp);
}

#[test]
fn an_own_address_or_gateway_ends_the_copying_of_its_family() {
    let settings = pasta(&["--config-net", "-a", "192.0.2.9", "-g", "fe80::9"]).unwrap();
    assert_eq!(
        settings.configure,
        Some(Configure { copy_routes: [true, false], copy_addresses: [false, true] })
    );
    // What is copied has the host's netmask.
    let settings = pasta(&["--config-net", "-n", "16"]).unwrap();
    assert_eq!(settings.configure.map(|c| c.copy_addresses), Some([false, true]));
    // Of which there is only the loopback then.
    assert_eq!(pasta(&["--config-net", "--splice-only"]).unwrap().splice, Splice::Only);
    let settings = pasta(&["--config-net", "--no-copy-routes", "--no-copy-addrs"]).unwrap();
    assert_eq!(settings.configure, Some(Configure { copy_routes: [false; 2], copy_addresses: [false; 2] }));
}

#[test]
fn what_cannot_apply_is_an_error_that_says_why() {
    for (words, why) in [
        (&["-a", "192.0.2.1/24", "-n", "24"][..], "both give the length"),
        (&["-6", "-n", "24"], "a netmask is IPv4's"),
        (&["-4", "-a", "2001:db8::1"], "there is no IPv6 with -4"),
        (&["-6", "--map-host-loopback", "192.0.2.1"], "there is no IPv4 with -6"),
        (&["-4", "-D", "2001:db8::1"], "--dns 2001:db8::1: there is no IPv6 with -4"),
        (&["-6", "--outbound-if4", "eth0"], "--outbound-if4 eth0: there is no IPv4 with -6"),
        (&["--dns-host", "192.0.2.1"], "needs --dns-forward"),
        (&["--no-tcp", "-t", "22"], "cannot be used with --no-tcp"),
        (&["--no-udp", "-U", "22"], "cannot be used with --no-udp"),
        (&["-6", "-t", "192.0.2.1/22"], "there is no IPv4 with -6"),
        (&["-t", "192.0.2.1/22:[2001:db8::1]"], "not translated"),
        (&["-t", "22", "-u", "23", "-t", "22:24"], "--tcp-ports: port 22 is forwarded twice"),
        (&["--netns", "x", "1234"], "PID cannot be used with --netns"),
        (&["--netns", "x", "ls", "-l"], "a command cannot be used with --netns"),
        (&["--userns", "/u", "--netns-only", "1"], "--userns cannot be used with --netns-only"),
        (&["--userns", "/u"], "--userns needs --netns or PID"),
        (&["--no-netns-quit", "ls"], "pasta ends with its command"),
        (&["--no-pidns", "--netns", "x"], "no command is started"),
        (&["--host-lo-to-ns-lo", "--no-splice"], "--host-lo-to-ns-lo cannot be used with --no-splice"),
        (&["--no-splice", "--splice-only"], "nothing would be left"),
        (&["--splice-only", "--config-net", "-I", "x"], "--ns-ifname cannot be used with --splice-only"),
        (&["--splice-only", "--vhost", "on"], "there is no tap device"),
        (&["--splice-only", "-c", "/x"], "--conf-path cannot be used with --splice-only"),
        (&["--no-copy-routes"], "needs --config-net"),
        (&["--runas", "no-such-user-here"], "no such user"),
        (&["--mtu", "67"], "68 to 65521"),
        (&["--mtu", "65522"], "68 to 65521"),
        (&["-g", "0.0.0.0"], "no host has this address"),
        (&["-g", "127.0.0.1"], "its own loopback"),
        (&["-o", "224.0.0.1"], "no host has this address"),
        (&["--dns-forward", "::1"], "its own loopback"),
        (&["--dns-host", "::"], "no host has this address"),
        (&["--map-host-loopback", "127.0.0.1"], "its own loopback"),
        (&["--map-guest-addr", "255.255.255.255"], "no host has this address"),
        (&["-D", "192.0.2"], "none for no address"),
        (&["-S", " "], "or none"),
        (&["--log-size", "5000"], "--log-size needs --log-file"),
        (&["--stats", "5", "1234"], "--stats needs --foreground"),
        (&["-t", "22", "-t", "none"], "'none' means no port"),
        (&["--mac-addr", "01:00:5e:00:00:01"], "a group's"),
        (&["-a", "127.0.0.1"], "a guest cannot have"),
        (&["-a", "255.255.255.255"], "a guest cannot have"),
        (&["-n", "255.0.255.0"], "not a netmask"),
        (&["--log-size", "0"], "not a size"),
        (&["--stats", "0"], "1 or more"),
        (&["-I", "a/b"], "cannot be the name of an interface"),
        (&["-t", "22-80:32"], "59 ports"),
    ] {
        let error = pasta(words).unwrap_err();
        assert!(error.contains(why), "{words:?}: {error}");
    }
    for (words, why) in [
        (&["-t", "auto"][..], "auto follows the listeners in a namespace"),
        (&["-u", "22,auto"], "auto follows"),
        (&["--repair-path", "/x"], "does not migrate"),
        (&["--migrate-exit"], "does not migrate"),
        (&["--migrate-no-linger"], "does not migrate"),
        (&["-F", "5", "-s", "x"], "--fd cannot be used with --socket"),
        (&["-F", "0"], "standard streams"),
        (&["ls"], "unexpected argument 'ls'"),
    ] {
        let error = passt(words).unwrap_err();
        assert!(error.contains(why), "{words:?}: {error}");
    }
}

#[test]
fn users_by_number_or_name() {
    let runas = |text: &str| passt(&["--runas", text]).unwrap().common.runas.map(|id| (id.uid, id.gid));
    assert_eq!(runas("1234:5678"), Some((1234, 5678)));
    assert_eq!(runas("0"), Some((0, 0)), "root of a user namespace may stay that");
    assert_eq!(passt(&[]).unwrap().common.runas, None);
}

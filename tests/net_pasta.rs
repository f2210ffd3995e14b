//! `ring3 pasta`: commands and namespaces with the host's network.
//!
//! All sockets are in namespaces that the tests make, or on the host's loopback.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on is to fail")]

mod support;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use support::net::{as_user, connect, echo, expect_echo, free_port, part, pasta, play, playing, possible};
use support::process::{PATIENCE, Running, finish, privileged};
use support::{Noise, skip};

/// A network whose addresses do not depend on the host's.
const NETWORK: [&str; 9] =
    ["--config-net", "-4", "-a", "192.0.2.77/24", "-g", "192.0.2.1", "-I", "tap7", "--no-map-gw"];

/// The same, with a gateway that stands for the host's loopback.
const MAPPED: [&str; 8] = ["--config-net", "-4", "-a", "192.0.2.77/24", "-g", "192.0.2.1", "-I", "tap7"];

/// No forwarded ports.
const CLOSED: [&str; 8] = ["-t", "none", "-u", "none", "-T", "none", "-U", "none"];

fn with<'a>(lists: &[&[&'a str]]) -> Vec<&'a str> {
    lists.concat()
}

fn noise(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    Noise(17).fill(&mut bytes);
    bytes
}

/// The part of these tests that runs in a namespace.
#[test]
fn inside() {
    let Some(part) = part() else { return };
    let words: Vec<&str> = part.split(' ').collect();
    match words.as_slice() {
        ["echo-client", to] => {
            let stream = connect(to.parse().unwrap());
            expect_echo(&stream, &noise(8 << 20));
        }
        ["echo-server", at] => {
            let listener = TcpListener::bind(at).unwrap();
            println!("listening");
            echo(listener.accept().unwrap().0);
            // The network ends with the command, whatever is still on its way then: so until the client has it all.
            drop(listener.accept().unwrap());
        }
        ["udp-client", to] => {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.connect(to).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket.send(b"question").unwrap();
            let mut buffer = [0; 100];
            let length = socket.recv(&mut buffer).unwrap();
            assert_eq!(&buffer[..length], b"question, answered");
        }
        ["refused", to] => {
            let error = TcpStream::connect(to).unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
        }
        ["seal", deed] => seal_and(&deed.replace('\u{a0}', " ")),
        _ => panic!("unknown part {part}"),
    }
    println!("played {part}");
}

/// Filters system calls, then makes one that nobody tagged.
fn seal_and(deed: &str) {
    ring3::net::isolation::enclose(false).unwrap();
    ring3::net::isolation::drop_capabilities(false).unwrap();
    ring3::net::isolation::seal(ring3::net::isolation::Mode::Pasta, None).unwrap();
    match deed {
        "make a directory" => {
            let error = fs::create_dir("/x").unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::ENOSYS));
        }
        "make a local socket" => {
            let error = std::os::unix::net::UnixStream::pair().unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::ENOSYS));
        }
        "use the network" => drop(UdpSocket::bind("127.0.0.1:0").unwrap()),
        "make a namespace" => drop(nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)),
        _ => panic!("unknown deed {deed}"),
    }
}

#[test]
fn the_exit_status_is_the_commands() {
    if !possible() {
        return;
    }
    let options = with(&[&NETWORK, &CLOSED]);
    finish(pasta(&options, &["sh", "-c", "exit 7"]), PATIENCE).expect(7);
    finish(pasta(&options, &["true"]), PATIENCE).expect(0);
    let missing = finish(pasta(&options, &["/usr/nonexistent-program"]), PATIENCE);
    missing.expect(127);
    assert!(missing.stderr.contains("/usr/nonexistent-program"), "{}", missing.stderr);
    finish(pasta(&options, &["/"]), PATIENCE).expect(126);
}

/// As the first process of a PID namespace it would not notice what it does not catch.
#[test]
fn a_signal_ends_a_command_that_does_not_catch_it() {
    if !possible() {
        return;
    }
    let options = with(&[&NETWORK, &CLOSED]);
    // Who starts the tests may ignore SIGINT, as a shell does for what it runs in the background.
    let caught = "trap 'exit 9' TERM; sleep 1000 & echo ready; wait";
    for (signal, command, status) in [
        (Signal::TERM, &["yes", "ready"][..], 128 + libc::SIGTERM),
        (Signal::INT, &["env", "--default-signal=INT", "yes", "ready"], 128 + libc::SIGINT),
        (Signal::TERM, &["sh", "-c", caught], 9),
    ] {
        let (running, mut output) = Running::start_quiet_with_output(pasta(&options, command));
        output.wait_for("ready");
        running.signal(signal);
        running.finish(PATIENCE).expect(status);
    }
}

#[test]
fn bad_options_have_status_1_and_run_nothing() {
    let bad = finish(pasta(&["--netns", "x", "1234"], &[]), PATIENCE);
    bad.expect(1);
    let missing = finish(pasta(&["--netns", "/nonexistent/netns"], &[]), PATIENCE);
    missing.expect(1);
    assert!(missing.stderr.contains("/nonexistent/netns"), "{}", missing.stderr);
}

#[test]
fn the_namespace_is_configured() {
    if !possible() {
        return;
    }
    let script = "cat /proc/net/route /proc/net/fib_trie; ip link show tap7; id -u";
    let options = with(&[&NETWORK, &CLOSED, &["-m", "9000"]]);
    let text = finish(pasta(&options, &["sh", "-c", script]), PATIENCE).expect(0).text();
    // The default route by 192.0.2.1, as /proc/net/route has it: in the processor's byte order.
    assert!(text.lines().any(|l| l.starts_with("tap7\t00000000\t010200C0\t0003")), "{text}");
    assert!(text.contains("mtu 9000"), "{text}");
    assert!(text.contains("192.0.2.77"), "{text}");
    assert_eq!(text.lines().last(), Some("0"), "the command is root inside");
}

/// The host's gateway is then reached by the host's network alone, which is not the guest's own.
#[test]
fn routes_are_copied_beside_an_own_address() {
    if !possible() {
        return;
    }
    let ring3 = support::process::RING3;
    let inner = format!("{ring3} pasta --config-net -4 -a 10.1.2.3 {} -- ip route", CLOSED.join(" "));
    let script = format!("ip route replace default via 192.0.2.1 dev tap7 && exec {inner}");
    let options = with(&[&NETWORK, &CLOSED]);
    let text = finish(pasta(&options, &["sh", "-c", &script]), PATIENCE).expect(0).text();
    for route in ["default via 192.0.2.1 ", "192.0.2.0/24 dev tap7", "10.0.0.0/8 dev tap7"] {
        assert!(text.contains(route), "{route} is not in {text}");
    }
}

#[test]
fn connections_reach_the_hosts_loopback_by_the_gateway() {
    if !possible() {
        return;
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = std::thread::spawn(move || echo(listener.accept().unwrap().0));
    let part = format!("echo-client 192.0.2.1:{port}");
    finish(playing(&with(&[&MAPPED, &CLOSED]), &part), PATIENCE).expect(0);
    server.join().unwrap();
    let part = format!("refused 192.0.2.1:{}", free_port());
    finish(playing(&with(&[&MAPPED, &CLOSED]), &part), PATIENCE).expect(0);
}

/// Root becomes nobody, who may open neither the tap device nor what is in root's directories.
#[test]
fn root_starts_several_threads_and_leaves_nothing() {
    if !possible() {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        return skip("only root can start it as root");
    }
    let directory = tempfile::tempdir().unwrap();
    let control = directory.path().join("control");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let known = control.clone();
    let server = std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        assert!(known.exists(), "the control socket");
        echo(stream);
    });
    let mut command = privileged();
    command.arg("pasta").args(with(&[
        &MAPPED,
        &CLOSED,
        &["--threads", "3", "-c", control.to_str().unwrap()],
    ]));
    finish(play(command, &format!("echo-client 192.0.2.1:{port}")), PATIENCE).expect(0);
    server.join().unwrap();
    assert!(!control.exists(), "the control socket is left behind");
}

#[test]
fn datagrams_reach_the_hosts_loopback_by_the_gateway() {
    if !possible() {
        return;
    }
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let port = socket.local_addr().unwrap().port();
    let server = std::thread::spawn(move || {
        let mut buffer = [0; 100];
        let (length, from) = socket.recv_from(&mut buffer).unwrap();
        let answer = [&buffer[..length], b", answered"].concat();
        socket.send_to(&answer, from).unwrap();
    });
    let options = with(&[&MAPPED, &CLOSED, &["--trace"]]);
    let client = finish(playing(&options, &format!("udp-client 192.0.2.1:{port}")), PATIENCE);
    client.expect(0);
    server.join().unwrap();
    let log = &client.stderr;
    assert!(log.contains("from the guest: UDP 192.0.2.77:"), "{log}");
    assert!(log.contains(&format!("to the guest: UDP 192.0.2.1:{port} to 192.0.2.77:")), "{log}");
}

#[test]
fn ipv6_alone() {
    if !possible() {
        return;
    }
    let Ok(listener) = TcpListener::bind("[::1]:0") else { return skip("the host has no IPv6") };
    let port = listener.local_addr().unwrap().port();
    let server = std::thread::spawn(move || echo(listener.accept().unwrap().0));
    let network = ["--config-net", "-6", "-a", "2001:db8::77", "-g", "2001:db8::1", "-I", "tap7"];
    let options = with(&[&network, &CLOSED]);
    finish(playing(&options, &format!("echo-client [2001:db8::1]:{port}")), PATIENCE).expect(0);
    server.join().unwrap();
    let text = finish(pasta(&options, &["cat", "/proc/net/route"]), PATIENCE).expect(0).text();
    assert!(!text.contains("tap7"), "no IPv4: {text}");
}

/// Forwards are tried with and without the bypass of the loopback.
fn forwarded(more: &[&str], server: SocketAddr, host: SocketAddr) {
    let options = with(&[&NETWORK, more]);
    let inside = Running::start_quiet(playing(&options, &format!("echo-server {server}")));
    // Until the server listens, a connection may be made and reset.
    let bytes = noise(8 << 20);
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut stream = connect(host);
        let first = stream.write_all(&bytes[..8]).and_then(|()| {
            let mut back = [0; 8];
            stream.read_exact(&mut back).map(|()| back)
        });
        match first {
            Ok(back) => {
                assert_eq!(back, bytes[..8]);
                expect_echo(&stream, &bytes);
                drop(connect(host));
                break;
            }
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    inside.finish(PATIENCE).expect(0);
}

#[test]
fn ports_of_the_host_lead_inside() {
    if !possible() {
        return;
    }
    let port = free_port();
    let spec = format!("{port}:8080");
    let host = SocketAddr::from(([127, 0, 0, 1], port));
    let server = SocketAddr::from(([0, 0, 0, 0], 8080));
    let rest = ["-u", "none", "-T", "none", "-U", "none", "-t", spec.as_str()];
    forwarded(&rest, server, host);
    forwarded(&with(&[&rest, &["--no-splice"]])[..], server, host);
}

#[test]
fn the_hosts_loopback_may_lead_to_the_namespaces() {
    if !possible() {
        return;
    }
    let port = free_port();
    let spec = format!("{port}:8080");
    let rest = ["-u", "none", "-T", "none", "-U", "none", "-t", spec.as_str(), "--host-lo-to-ns-lo"];
    let loopback = SocketAddr::from(([127, 0, 0, 1], 8080));
    forwarded(&rest, loopback, SocketAddr::from(([127, 0, 0, 1], port)));
}

#[test]
fn ports_follow_listeners() {
    if !possible() {
        return;
    }
    let port = free_port();
    let spec = format!("{port},auto");
    let rest = ["-u", "none", "-T", "none", "-U", "none", "-t", spec.as_str()];
    forwarded(&rest, SocketAddr::from(([0, 0, 0, 0], port)), SocketAddr::from(([127, 0, 0, 1], port)));
}

#[test]
fn ports_of_the_namespace_lead_to_the_host() {
    if !possible() {
        return;
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = std::thread::spawn(move || {
        // One for each way of asking.
        for _ in 0..2 {
            echo(listener.accept().unwrap().0);
        }
    });
    let fixed = format!("7000:{port}");
    let options = with(&[&NETWORK, &["-t", "none", "-u", "none", "-U", "none", "-T", fixed.as_str()]]);
    finish(playing(&options, "echo-client 127.0.0.1:7000"), PATIENCE).expect(0);
    let auto = format!("{port},auto");
    let options = with(&[&NETWORK, &["-t", "none", "-u", "none", "-U", "none", "-T", auto.as_str()]]);
    finish(playing(&options, &format!("echo-client 127.0.0.1:{port}")), PATIENCE).expect(0);
    server.join().unwrap();
}

/// A namespace that lasts as long as its input is open; its process.
struct Held {
    child: std::process::Child,
    pid: u32,
}

impl Held {
    fn make() -> Self {
        let mut command = as_user("unshare");
        command.args(["--user", "--map-root-user", "--net", "sh", "-c", "echo $$; exec cat"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        Self { pid: line.trim().parse().unwrap(), child }
    }

    fn end(mut self) {
        drop(self.child.stdin.take());
        self.child.wait().unwrap();
    }
}

/// A field of /proc/PID/status.
fn status(pid: i32, field: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {field} in {text}")).trim().to_owned()
}

#[test]
fn a_process_in_the_background_holds_nothing_and_ends_with_the_namespace() {
    if !possible() {
        return;
    }
    let held = Held::make();
    let directory = support::temp_dir();
    let pid_file = directory.path().join("pid");
    let target = held.pid.to_string();
    let options = with(&[&NETWORK, &CLOSED, &["-P", pid_file.to_str().unwrap(), target.as_str()]]);
    finish(pasta(&options, &[]), PATIENCE).expect(0);
    // It is ready as soon as the command has returned.
    let pid: i32 = fs::read_to_string(&pid_file).unwrap().trim().parse().unwrap();
    let routes = fs::read_to_string(format!("/proc/{}/net/route", held.pid)).unwrap();
    assert!(routes.contains("tap7"), "{routes}");
    for sets in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
        assert_eq!(status(pid, sets).trim_start_matches('0'), "", "{sets}");
    }
    assert_eq!(status(pid, "Seccomp"), "2");
    assert_eq!(status(pid, "NoNewPrivs"), "1");
    assert_ne!(status(pid, "Uid").split_whitespace().next(), Some("0"));
    assert_eq!(status(pid, "NSpid").split_whitespace().count(), 2, "a PID namespace of its own");
    if rustix::process::geteuid().is_root() {
        // Others may not look.
        let names: Vec<_> = fs::read_dir(format!("/proc/{pid}/root/")).unwrap().collect();
        assert!(names.is_empty(), "{names:?}");
        let own = |kind: &str| fs::read_link(format!("/proc/self/ns/{kind}")).unwrap();
        let its = |kind: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
        assert_eq!(its("net"), own("net"), "its sockets are the host's");
        for kind in ["user", "mnt", "ipc", "uts", "pid"] {
            assert_ne!(its(kind), own(kind), "{kind}");
        }
    }
    held.end();
    let deadline = Instant::now() + PATIENCE;
    while Path::new(&format!("/proc/{pid}")).exists() {
        assert!(Instant::now() < deadline, "still there");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn dhcp() {
    if !possible() {
        return;
    }
    let found = ["/usr/bin/busybox", "/bin/busybox"].into_iter().find(|path| Path::new(path).exists());
    let Some(busybox) = found else { return skip("there is no busybox, whose udhcpc is needed") };
    let directory = support::temp_dir();
    let hook =
        support::write(directory.path(), "hook", b"#!/bin/sh\necho \"$1 $ip $subnet $router $dns $mtu\"\n");
    fs::set_permissions(&hook, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let script = format!(
        "ip link set tap7 up || {busybox} ip link set tap7 up; \
         exec {busybox} udhcpc -i tap7 -n -q -f -t 5 -s {} -O mtu",
        hook.display()
    );
    let network = [
        "-4",
        "-a",
        "192.0.2.77/24",
        "-g",
        "192.0.2.1",
        "-I",
        "tap7",
        "-D",
        "192.0.2.53",
        "--dhcp-dns",
        "-m",
        "9000",
    ];
    let options = with(&[&network, &CLOSED]);
    let text = finish(pasta(&options, &["sh", "-c", &script]), PATIENCE).expect(0).text();
    let bound = "bound 192.0.2.77 255.255.255.0 192.0.2.1 192.0.2.53 9000";
    assert!(text.lines().any(|line| line == bound), "{text}");
}

#[test]
fn calls_that_nobody_tagged_fail_or_kill() {
    if !possible() {
        return;
    }
    let options = with(&[&NETWORK, &CLOSED, &["--no-pidns"]]);
    for deed in ["make a directory", "make a local socket", "use the network"] {
        // Words are parted by blanks.
        let part = format!("seal {}", deed.replace(' ', "\u{a0}"));
        finish(playing(&options, &part), PATIENCE).expect(0);
    }
    let killed = finish(playing(&options, "seal make\u{a0}a\u{a0}namespace"), PATIENCE);
    killed.expect(128 + libc::SIGSYS);
}

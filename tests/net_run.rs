//! The network of a guest of `ring3 run`: the guest's connections, the host's, names, and the ends of both.
//!
//! Each test is this program again in a network namespace of its own ([`in_namespace`]), whose only way out is a link to
//! nowhere, so nothing leaves the machine, ports are free, and the addresses are known. The guest runs this program too
//! ([`guest_side`]): it needs nothing else of the host's programs.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on is to fail")]

mod support;

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs, UdpSocket};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::process::Signal;
use support::kernels::{Kernels, kernels};
use support::process::{PATIENCE, RING3, Running, boot, finish, other_user, run};
use support::{Noise, skip, temp_dir};

/// Tells this program in a namespace which test it is.
const CASE: &str = "RING3_TEST_CASE";
/// Tells this program in a guest what to do.
const JOB: &str = "RING3_TEST_JOB";

/// The namespace's own addresses, which are the guest's too, and its gateways, which stand for its loopback.
const HOST: [&str; 2] = ["192.0.2.15", "2001:db8::15"];
const GATEWAY: [&str; 2] = ["192.0.2.2", "2001:db8::2"];
/// The host's and the guest's addresses on a tap device.
const TAP: [&str; 2] = ["198.51.100.1", "198.51.100.2"];

/// A resolver's answer.
const NAMED: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 77);

const LARGE: usize = 100_000_000;
const SMALL: usize = 1_000_000;

/// How long one side waits for the other.
const WAIT: Duration = Duration::from_secs(120);

#[test]
fn the_guest_and_the_host_talk_both_ways() {
    in_namespace("talk");
}

#[test]
fn ports_come_and_go_while_the_guest_runs() {
    in_namespace("control");
}

#[test]
fn an_interrupted_guest_leaves_no_connection() {
    in_namespace("interrupted");
}

#[test]
fn a_guest_without_a_network_has_none() {
    in_namespace("none");
}

#[test]
fn a_guest_on_a_tap_device_is_its_neighbour() {
    in_namespace("tap");
}

#[test]
fn ports_that_cannot_be_had_are_named_before_the_guest_boots() {
    in_namespace("ports");
}

/// Runs [`inside`] in a new network namespace, with mounts of its own.
fn in_namespace(case: &str) {
    // The fetch of a kernel needs the world.
    if kernels().is_none() {
        return;
    }
    let mut new: Vec<&str> = vec!["--net", "--mount"];
    if !rustix::process::geteuid().is_root() {
        new.extend(["--user", "--map-root-user"]);
    }
    let possible = Command::new("unshare").args(&new).args(["ip", "link"]).stdout(Stdio::null()).status();
    if !possible.is_ok_and(|status| status.success()) {
        return skip("no network namespace can be made here, or there is no ip(8)");
    }
    let status = Command::new("unshare")
        .args(&new)
        .arg("--")
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "inside", "--ignored", "--nocapture", "--test-threads=2"])
        .env(CASE, case)
        .status()
        .unwrap();
    assert!(status.success(), "{case}: {status}");
}

#[test]
#[ignore = "what the other tests run in a namespace"]
fn inside() {
    let Ok(case) = std::env::var(CASE) else { return };
    let kernels = kernels().unwrap();
    let ipv6 = set_up();
    match case.as_str() {
        "talk" => talk(&kernels, ipv6),
        "control" => controlled(&kernels),
        "interrupted" => interrupted(&kernels),
        "none" => none(&kernels),
        "tap" => on_a_tap(&kernels),
        "ports" => ports(&kernels),
        other => panic!("{other}"),
    }
}

fn ip(arguments: &str) -> bool {
    Command::new("ip").args(arguments.split(' ')).status().unwrap().success()
}

/// Gives the namespace a network, and a resolver's name. Returns whether it has IPv6.
fn set_up() -> bool {
    let [v4, v6] = HOST;
    let [gateway_v4, gateway_v6] = GATEWAY;
    for arguments in [
        "link set lo up",
        "link add up0 type veth peer name up1",
        "link set up1 up",
        "link set up0 up",
        &format!("addr add {v4}/24 dev up0"),
        &format!("route add default via {gateway_v4}"),
    ] {
        assert!(ip(arguments), "ip {arguments}");
    }
    let ipv6 = ip(&format!("-6 addr add {v6}/64 dev up0 nodad"))
        && ip(&format!("-6 route add default via {gateway_v6}"));
    if !ipv6 {
        skip("all of IPv6: the host has it off");
    }
    let dir = temp_dir();
    let file = support::write(dir.path(), "resolv.conf", b"nameserver 127.0.0.53\nsearch ring3.test\n");
    let bound = Command::new("mount").arg("--bind").arg(file).arg("/etc/resolv.conf").status().unwrap();
    assert!(bound.success());
    ipv6
}

/// `ring3 run` of [`guest_side`] with this job.
fn job(kernel: &Path, options: &[&str], job: &str) -> Command {
    let variable = format!("{JOB}={job}");
    let options = [options, &["--env", &variable]].concat();
    let program = std::env::current_exe().unwrap();
    let program = program.to_str().unwrap();
    run(kernel, &options, &[program, "--exact", "guest_side", "--ignored", "--nocapture", "--test-threads=1"])
}

#[test]
#[ignore = "what the other tests run in a guest"]
fn guest_side() {
    let Ok(job) = std::env::var(JOB) else { return };
    let status = match job.as_str() {
        "talk" => guest_talks(false),
        "talk with IPv6" => guest_talks(true),
        "listen" => guest_listens(),
        "wait" => guest_waits(),
        "tap" => guest_on_a_tap(),
        other => panic!("{other}"),
    };
    std::process::exit(status);
}

/// Writes noise.
fn send_noise(mut to: impl Write, mut length: usize, seed: u64) {
    let mut noise = Noise(seed);
    let mut buffer = vec![0; 64_000];
    while length > 0 {
        noise.fill(&mut buffer);
        let part = length.min(buffer.len());
        to.write_all(&buffer[..part]).unwrap();
        length -= part;
    }
}

/// Reads noise, and then the end of it.
fn expect_noise(mut from: impl Read, length: usize, seed: u64) {
    let mut noise = Noise(seed);
    let (mut expected, mut got) = (vec![0; 64_000], vec![0; 64_000]);
    let mut left = length;
    while left > 0 {
        noise.fill(&mut expected);
        let part = left.min(expected.len());
        from.read_exact(&mut got[..part]).unwrap();
        assert!(expected[..part] == got[..part], "difference after {} bytes", length - left);
        left -= part;
    }
    assert_eq!(from.read(&mut got).unwrap(), 0, "the end");
}

/// Serves one connection.
fn serve(address: &str, handle: impl FnOnce(TcpStream) + Send + 'static) -> JoinHandle<()> {
    let listener = TcpListener::bind(address).unwrap();
    thread::spawn(move || handle(patient(listener.accept().unwrap().0)))
}

/// With an end to the waiting.
fn patient(stream: TcpStream) -> TcpStream {
    stream.set_read_timeout(Some(WAIT)).unwrap();
    stream.set_write_timeout(Some(WAIT)).unwrap();
    stream
}

/// Sends noise, closes its half, and waits for the other's thanks.
fn give(stream: TcpStream, length: usize, seed: u64) {
    send_noise(&stream, length, seed);
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    (&stream).read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "thanks", "after the end of the other direction");
}

/// The other side of [`give`].
fn take(stream: TcpStream, length: usize, seed: u64) {
    expect_noise(&stream, length, seed);
    (&stream).write_all(b"thanks").unwrap();
}

/// Gives each datagram back.
fn echo(socket: UdpSocket) {
    let mut buffer = [0; 65_536];
    while let Ok((length, from)) = socket.recv_from(&mut buffer) {
        if socket.send_to(&buffer[..length], from).is_err() {
            return;
        }
    }
}

/// Sends datagrams until they come back: there is no promise for the first.
fn expect_echo(to: SocketAddr, length: usize) {
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { "::".parse().unwrap() };
    let socket = UdpSocket::bind((any, 0)).unwrap();
    socket.connect(to).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let datagram: Vec<u8> = (0..length).map(|i| (i % 251) as u8).collect();
    let mut answer = vec![0; 65_536];
    for _ in 0..5 {
        socket.send(&datagram).unwrap();
        if let Ok(got) = socket.recv(&mut answer) {
            assert!(answer[..got] == datagram, "{to}");
            return;
        }
    }
    panic!("no answer from {to}");
}

/// A resolver that knows one IPv4 address, whatever the name.
fn resolve(socket: UdpSocket) {
    let mut query = [0; 512];
    while let Ok((length, from)) = socket.recv_from(&mut query) {
        // RFC 1035, 4.1: a header of 12 bytes, the question's name, kind and class.
        let name = query[12..length].iter().position(|&byte| byte == 0).unwrap();
        let end = 12 + name + 5;
        let is_a = query[end - 4..end - 2] == [0, 1];
        let mut answer = query[..end].to_vec();
        answer[2..12].copy_from_slice(&[0x81, 0x80, 0, 1, 0, u8::from(is_a), 0, 0, 0, 0]);
        if is_a {
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
            answer.extend(NAMED.octets());
        }
        socket.send_to(&answer, from).unwrap();
    }
}

fn talk(kernels: &Kernels, ipv6: bool) {
    let mut servers = vec![
        serve("127.0.0.1:7100", |stream| give(stream, LARGE, 1)),
        serve("127.0.0.1:7101", |stream| take(stream, LARGE / 10, 2)),
    ];
    if ipv6 {
        servers.push(serve("[::1]:7100", |stream| give(stream, SMALL, 3)));
    }
    // These end with the process.
    let udp = |address: &str| UdpSocket::bind(address).unwrap();
    let (echoing, resolver) = (udp("127.0.0.1:7102"), udp("127.0.0.53:53"));
    thread::spawn(move || echo(echoing));
    thread::spawn(move || resolve(resolver));

    let mut options = vec!["-p", "127.0.0.1:8080:7000", "-p", "8081:7001/udp"];
    if ipv6 {
        options.extend(["-p", "[::1]:8082:7000"]);
    }
    let command = job(kernels.newer(), &options, if ipv6 { "talk with IPv6" } else { "talk" });
    let (running, mut output) = Running::boot_with_output(command);
    output.wait_for("ready\n");
    expect_echo("127.0.0.1:8081".parse().unwrap(), 1400);
    if ipv6 {
        expect_echo("[::1]:8081".parse().unwrap(), 9000);
        give(patient(TcpStream::connect("[::1]:8082").unwrap()), SMALL, 4);
    }
    give(patient(TcpStream::connect("127.0.0.1:8080").unwrap()), SMALL, 4);
    let end = running.finish(PATIENCE);
    end.expect(7);
    assert_eq!(end.stderr, "", "ring3 has nothing to say about it");
    for server in servers {
        server.join().unwrap();
    }
}

/// The guest's part of [`talk`]. Returns its exit status.
fn guest_talks(ipv6: bool) -> i32 {
    let [v4, v6] = GATEWAY;
    let connect = |host: &str, port: u16| patient(TcpStream::connect((host, port)).unwrap());
    take(connect(v4, 7100), LARGE, 1);
    give(connect(v4, 7101), LARGE / 10, 2);
    if ipv6 {
        take(connect(v6, 7100), SMALL, 3);
    }
    expect_echo(SocketAddr::new(v4.parse().unwrap(), 7102), 1);
    expect_echo(SocketAddr::new(v4.parse().unwrap(), 7102), 30_000);

    let conf = std::fs::read_to_string("/etc/resolv.conf").unwrap();
    assert_eq!(conf, format!("nameserver {v4}\nsearch ring3.test\n"));
    let named: Vec<SocketAddr> = ("any.name.example", 80).to_socket_addrs().unwrap().collect();
    assert!(named.contains(&SocketAddr::new(NAMED.into(), 80)), "{named:?}");

    let refused = TcpStream::connect((v4, 7999)).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);

    let any = if ipv6 { "[::]" } else { "0.0.0.0" };
    let listener = TcpListener::bind(format!("{any}:7000")).unwrap();
    let datagrams = UdpSocket::bind(format!("{any}:7001")).unwrap();
    println!("ready");
    thread::spawn(move || echo(datagrams));
    // The last connection is made when the host has everything else.
    for _ in 0..if ipv6 { 2 } else { 1 } {
        take(patient(listener.accept().unwrap().0), SMALL, 4);
    }
    7
}

fn controlled(kernels: &Kernels) {
    let dir = temp_dir();
    let path = dir.path().join("control");
    let socket = path.to_str().unwrap();
    let net = |words: &[&str]| {
        let ended = Command::new(RING3).arg("net").args(words).output().unwrap();
        let said = String::from_utf8(ended.stderr).unwrap();
        assert!(ended.status.success(), "{words:?}: {said}");
        String::from_utf8(ended.stdout).unwrap()
    };
    let options = ["--net-control", socket, "-p", "127.0.0.1:8080:7000"];
    let (running, mut output) = Running::boot_with_output(job(kernels.newer(), &options, "listen"));
    output.wait_for("ready\n");
    assert_eq!(net(&["list", "-c", socket]), "tcp 127.0.0.1/8080:7000\n");
    net(&["add", "-c", socket, "127.0.0.1/8081:7000"]);
    net(&["add", "-c", socket, "--udp", "127.0.0.1/8082:7001"]);
    give(patient(TcpStream::connect("127.0.0.1:8081").unwrap()), SMALL, 4);
    expect_echo("127.0.0.1:8082".parse().unwrap(), 1400);
    net(&["remove", "-c", socket, "127.0.0.1/8081"]);
    let refused = TcpStream::connect("127.0.0.1:8081").unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    let left = "tcp 127.0.0.1/8080:7000\nudp 127.0.0.1/8082:7001\n";
    assert_eq!(net(&["list", "-c", socket]), left);
    give(patient(TcpStream::connect("127.0.0.1:8080").unwrap()), SMALL, 4);
    let end = running.finish(PATIENCE);
    end.expect(7);
    assert_eq!(end.stderr, "", "ring3 has nothing to say about it");
    assert!(!path.exists(), "its name has gone with it");
}

/// Takes two connections, and gives datagrams back.
fn guest_listens() -> i32 {
    let listener = TcpListener::bind("0.0.0.0:7000").unwrap();
    let datagrams = UdpSocket::bind("0.0.0.0:7001").unwrap();
    println!("ready");
    thread::spawn(move || echo(datagrams));
    for _ in 0..2 {
        take(patient(listener.accept().unwrap().0), SMALL, 4);
    }
    7
}

fn interrupted(kernels: &Kernels) {
    let server = serve("127.0.0.1:7100", |mut stream| {
        stream.write_all(b"hello").unwrap();
        // However it ends, it ends.
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let command = job(kernels.older(), &["-v", "-p", "0:7000"], "wait");
    let (running, mut output) = Running::boot_with_output(command);
    output.wait_for("hello\n");
    running.signal(Signal::INT);
    let end = running.finish(PATIENCE);
    end.expect(130);
    assert!(end.stderr.contains("leads to the guest's 7000"), "{}", end.stderr);
    server.join().unwrap();
}

fn guest_waits() -> i32 {
    let mut stream = patient(TcpStream::connect((GATEWAY[0], 7100)).unwrap());
    let mut greeting = [0; 5];
    stream.read_exact(&mut greeting).unwrap();
    println!("{}", std::str::from_utf8(&greeting).unwrap());
    let _ = stream.read(&mut greeting);
    1
}

fn none(kernels: &Kernels) {
    let script = "ls /sys/class/net; cat /etc/resolv.conf; exit 3";
    let end = boot(run(kernels.older(), &["--net", "none"], &["sh", "-c", script]));
    end.expect(3);
    let hosts = std::fs::read_to_string("/etc/resolv.conf").unwrap();
    assert_eq!(end.text(), format!("lo\n{hosts}"));
}

fn on_a_tap(kernels: &Kernels) {
    let owner = other_user().unwrap_or(0);
    if !ip(&format!("tuntap add vm0 mode tap user {owner}")) {
        return skip("no tap device can be made here");
    }
    let [host, _] = TAP;
    assert!(ip(&format!("addr add {host}/24 dev vm0")) && ip("link set vm0 up"));
    let server = serve(&format!("{host}:7100"), |stream| give(stream, SMALL, 5));
    let mut command = job(kernels.newer(), &["--net", "tap=vm0"], "tap");
    let device = std::fs::metadata("/dev/net/tun").unwrap();
    if device.mode() & 0o006 != 0o006 {
        skip("a tap device for an unprivileged user: /dev/net/tun is root's here");
        command.uid(0).gid(0);
    }
    let end = boot(command);
    end.expect(7);
    assert_eq!(end.stderr, "");
    server.join().unwrap();
}

fn guest_on_a_tap() -> i32 {
    let [host, own] = TAP;
    // The card is up, and the rest is the guest's own business.
    assert!(ip(&format!("addr add {own}/24 dev eth0")));
    take(patient(TcpStream::connect((host, 7100)).unwrap()), SMALL, 5);
    7
}

fn ports(kernels: &Kernels) {
    let try_with = |options: &[&str]| finish(run(kernels.newer(), options, &["true"]), PATIENCE);
    let _taken = TcpListener::bind("127.0.0.1:8080").unwrap();
    let _taken_too = UdpSocket::bind("127.0.0.1:8080").unwrap();
    for port in ["127.0.0.1:8080:80", "127.0.0.1:8080:80/udp"] {
        let end = try_with(&["-p", port]);
        end.expect_error("another program has the port");
        assert!(end.stderr.contains("127.0.0.1:8080"), "{}", end.stderr);
    }
    try_with(&["-p", "192.0.2.99:8081:80"]).expect_error("the host does not have that address");
    try_with(&["--net", "none", "-p", "8081:80"]).expect_error("-p 8081:80");
    try_with(&["--net", "none", "--net-control", "control"]).expect_error("--net-control control");
    try_with(&["--net-control", "/proc/x"]).expect_error("cannot listen for control at /proc/x");
    try_with(&["--net", "tap=nosuch"]).expect_error("ip tuntap add");
    if other_user().is_some() {
        let end = try_with(&["-p", "127.0.0.1:80:80"]);
        end.expect_error("net.ipv4.ip_unprivileged_port_start");
        assert!(end.stderr.contains("127.0.0.1:80"), "{}", end.stderr);
    }
}

//! The kernel's own vhost-net, under `taps::vhost_net` and `usernet`'s engine.
//!
//! Few machines that run tests have the module, and fewer let anybody use it. Debian's kernels have it: so the test
//! boots one, and runs itself in the guest, which is host and guest of the network in one. A network namespace
//! with a tap device is the guest; the engine outside serves it, by vhost-net and then by read and write.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on is to fail")]

mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use support::Noise;
use support::kernels::kernels;
use support::process::{boot, run_the_guests_side};
use taps::tun::{self, Tun};
use taps::vhost_net::{Device, Mode};
use usernet::config::{Config, Family, Forward, Services, Transport};
use usernet::{Engine, Handle};

/// Names the directory of the kernel's modules to the guest's side.
const MODULES: &str = "RING3_TEST_MODULES";
/// Tells the guest's side how much to transfer by vhost-net, each way over IPv4.
const MEGABYTES: &str = "RING3_TEST_MEGABYTES";

#[test]
fn the_kernels_vhost_net_carries_frames() {
    let Some(kernels) = kernels() else { return };
    if ip().is_none() {
        return support::skip("there is no ip(8): apt-get install iproute2");
    }
    for (kernel, cpus, megabytes) in [(kernels.newer(), "2", 64), (kernels.older(), "1", 16)] {
        let modules = format!("{MODULES}={}", kernel.parent().unwrap().join("modules").display());
        let megabytes = format!("{MEGABYTES}={megabytes}");
        let options = ["--cpus", cpus, "--env", &modules, "--env", &megabytes];
        let end = boot(run_the_guests_side(kernel, &options));
        end.expect(0);
        // What it measured.
        let text = end.text();
        for line in text.lines().filter(|line| line.starts_with("vhost-net:") || line.starts_with("PASS")) {
            println!("{line}");
        }
    }
}

#[test]
#[ignore = "runs in the guest of another test"]
fn the_guests_side() {
    let modules = PathBuf::from(std::env::var_os(MODULES).unwrap());
    load(&modules, "kernel/drivers/net/tun.ko");
    without_the_module_there_is_the_tap_device();
    pasta_carries("auto", "without vhost-net: /dev/vhost-net");
    load(&modules, "kernel/drivers/vhost/vhost_net.ko");
    assert!(Path::new("/dev/vhost-net").exists());
    let megabytes: usize = std::env::var(MEGABYTES).unwrap().parse().unwrap();
    let vhost = carries_everything(Mode::On, megabytes);
    let plain = carries_everything(Mode::Off, megabytes / 4);
    pasta_carries("on", "by vhost-net");
    pasta_carries("auto", "by vhost-net");
    pasta_does_without_a_device_that_refuses();
    println!("vhost-net: {vhost:.0?} MB/s; read and write: {plain:.0?} MB/s");
}

/// Where a command in `ring3 pasta`'s namespace finds this test's server.
const SERVER: &str = "RING3_TEST_SERVER";
/// The host's loopback in that namespace: no address that the guest itself may have been given.
const LOOPBACK: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);

/// The whole way, with the process isolated as it always is; `way` is what it says about how frames go.
fn pasta_carries(vhost: &str, way: &str) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let server = SocketAddr::new(LOOPBACK.into(), listener.local_addr().unwrap().port());
    let this = std::env::current_exe().unwrap();
    let sender = std::thread::spawn(move || send(&mut listener.accept().unwrap().0, 1));
    let output = Command::new(env!("CARGO_BIN_EXE_ring3"))
        .args(["pasta", "--debug", "--vhost", vhost, "--config-net", "--map-host-loopback"])
        .arg(LOOPBACK.to_string())
        .arg("--")
        .arg(this)
        .args(["--ignored", "--exact", "a_commands_side", "--nocapture", "--test-threads=1"])
        .env(SERVER, server.to_string())
        .output()
        .unwrap();
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {log}", output.status);
    assert!(log.contains(way), "--vhost {vhost}: {log}");
    sender.join().unwrap();
    println!("PASS pasta --vhost {vhost}: {way}");
}

/// A device that is there, but refuses everything.
fn pasta_does_without_a_device_that_refuses() {
    let mount = |words: &[&str]| assert!(Command::new("mount").args(words).status().unwrap().success());
    mount(&["--bind", "/dev/null", "/dev/vhost-net"]);
    pasta_carries("auto", "without vhost-net: ");
    let on =
        Command::new(env!("CARGO_BIN_EXE_ring3")).args(["pasta", "--vhost", "on", "true"]).output().unwrap();
    let log = String::from_utf8_lossy(&on.stderr);
    assert!(on.status.code() == Some(1) && log.contains("cannot use vhost-net"), "{}: {log}", on.status);
}

#[test]
#[ignore = "runs in a namespace of another test"]
fn a_commands_side() {
    let server: SocketAddr = std::env::var(SERVER).unwrap().parse().unwrap();
    receive(&mut TcpStream::connect(server).unwrap(), 1);
}

/// `auto` does without vhost-net, `on` says why it cannot.
fn without_the_module_there_is_the_tap_device() {
    let namespace = Namespace::new();
    let Err(error) = Device::open(Mode::On) else { panic!("there is no vhost-net yet") };
    let error = error.to_string();
    assert!(error.contains("/dev/vhost-net") && error.contains("modprobe vhost_net"), "{error}");
    let tap = Device::open(Mode::Auto).unwrap().serve(namespace.tap("plain")).unwrap();
    assert!(tap.abilities().checksum);
    println!("PASS without the module");
}

// ---- the guest's network ----

const GUEST_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 15);
const HOST_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
const GUEST_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 15);
const HOST_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2);
const MTU: u16 = 65520;

fn config() -> Config {
    Config {
        guest_mac: None,
        gateway_mac: [0x9a, 0x55, 0x9a, 0x55, 0x9a, 0x55],
        ipv4: Some(Family {
            guest: GUEST_V4,
            prefix: 24,
            gateway: HOST_V4,
            host_loopback: Some(HOST_V4),
            host_global: None,
        }),
        ipv6: Some(Family {
            guest: GUEST_V6,
            prefix: 64,
            gateway: HOST_V6,
            host_loopback: Some(HOST_V6),
            host_global: None,
        }),
        mtu: MTU,
        dns: Vec::new(),
        dns_forward: Vec::new(),
        search: Vec::new(),
        hostname: None,
        fqdn: None,
        services: Services::default(),
        forwards: Vec::new(),
        freebind: false,
        outbound: usernet::config::Outbound::default(),
    }
}

/// A thread in a network namespace of its own, which does what it is sent.
struct Namespace {
    work: Option<Sender<Box<dyn FnOnce() + Send>>>,
    thread: Option<JoinHandle<()>>,
}

impl Namespace {
    fn new() -> Self {
        let (work, queue): (_, Receiver<Box<dyn FnOnce() + Send>>) = channel();
        let thread = std::thread::spawn(move || {
            // SAFETY: needed for a system call without a safe wrapper here; it concerns this thread alone, which has
            // no descriptor of the old namespace.
            assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0);
            queue.into_iter().for_each(|job| job());
        });
        Self { work: Some(work), thread: Some(thread) }
    }

    /// Starts something in the namespace; its result comes by the channel.
    fn start<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> Receiver<T> {
        let (sender, receiver) = channel();
        let job = Box::new(move || sender.send(job()).unwrap());
        self.work.as_ref().unwrap().send(job).unwrap();
        receiver
    }

    fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        self.start(job).recv().unwrap()
    }

    fn tap(&self, name: &'static str) -> Tun {
        self.run(move || {
            let options = tun::Options { name, multi_queue: false, mtu: MTU };
            Tun::attach(tun::open().unwrap(), options).unwrap()
        })
    }

    /// Runs an ip(8) command.
    fn ip(&self, arguments: &str) {
        let arguments: Vec<String> = arguments.split(' ').map(str::to_owned).collect();
        let status = self.run(move || Command::new(ip().unwrap()).args(&arguments).status().unwrap());
        assert!(status.success());
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        drop(self.work.take());
        let ended = self.thread.take().unwrap().join();
        assert!(ended.is_ok() || std::thread::panicking());
    }
}

fn ip() -> Option<PathBuf> {
    ["/usr/sbin/ip", "/sbin/ip", "/usr/bin/ip", "/bin/ip"]
        .map(PathBuf::from)
        .into_iter()
        .find(|ip| ip.exists())
}

/// How fast the transfers were, in megabytes a second.
#[derive(Debug)]
#[expect(dead_code, reason = "it is printed")]
struct Rates {
    into_v4: f64,
    out_v4: f64,
    into_v6: f64,
    out_v6: f64,
}

fn carries_everything(mode: Mode, megabytes: usize) -> Rates {
    let namespace = Namespace::new();
    let tap = Device::open(mode).unwrap().serve(namespace.tap("tap0")).unwrap();
    namespace.ip("link set lo up");
    namespace.ip(&format!("link set tap0 mtu {MTU} up"));
    namespace.ip(&format!("address add {GUEST_V4}/24 dev tap0"));
    namespace.ip(&format!("address add {GUEST_V6}/64 dev tap0 nodad"));
    let engine = Engine::new(config(), tap).unwrap();
    let handle = engine.handle();
    let engine = std::thread::spawn(move || engine.run());

    let (v4, v6) =
        ([Ipv4Addr::LOCALHOST.into(), HOST_V4.into()], [Ipv6Addr::LOCALHOST.into(), HOST_V6.into()]);
    let rate = |megabytes: usize, took: Duration| megabytes as f64 / took.as_secs_f64();
    let rates = Rates {
        into_v4: rate(megabytes, into(&namespace, v4, megabytes)),
        out_v4: rate(megabytes, out(&namespace, v4, megabytes)),
        into_v6: rate(megabytes / 2, into(&namespace, v6, megabytes / 2)),
        out_v6: rate(megabytes / 2, out(&namespace, v6, megabytes / 2)),
    };
    println!("PASS {mode:?}: transfers");
    short_connections(&namespace, 100);
    println!("PASS {mode:?}: short connections");
    datagrams(&namespace, v4);
    datagrams(&namespace, v6);
    println!("PASS {mode:?}: datagrams");
    forwarded(&namespace, &handle, 8);
    println!("PASS {mode:?}: a forwarded port");
    let stats = handle.stats().unwrap();
    assert!(stats.frames_in > 100 && stats.frames_out > 100, "{stats:?}");
    assert_eq!((stats.dropped.malformed, stats.dropped.checksum), (0, 0), "{stats:?}");

    namespace.ip("link delete tap0");
    // Each question is a turn of the engine, in which it can notice.
    while handle.stats().is_ok() {}
    let error = engine.join().unwrap().unwrap_err();
    println!("PASS {mode:?}: the interface's end: {error}");
    rates
}

// ---- what crosses it ----

const MEGABYTE: usize = 1 << 20;

/// Bytes to send: megabyte after megabyte is another part of the same noise, which costs the guest's processor nothing.
struct Bytes(Vec<u8>);

impl Bytes {
    fn new() -> Self {
        let mut bytes = vec![0; 2 * MEGABYTE];
        Noise(1).fill(&mut bytes);
        Self(bytes)
    }

    fn megabyte(&self, number: usize) -> &[u8] {
        let start = number * 4099 % MEGABYTE;
        &self.0[start..start + MEGABYTE]
    }
}

fn send(stream: &mut TcpStream, megabytes: usize) {
    let bytes = Bytes::new();
    for number in 0..megabytes {
        stream.write_all(bytes.megabyte(number)).unwrap();
    }
}

/// Receives what [`send`] sends, and then the end.
fn receive(stream: &mut TcpStream, megabytes: usize) {
    let bytes = Bytes::new();
    let mut buffer = vec![0; MEGABYTE];
    for number in 0..megabytes {
        stream.read_exact(&mut buffer).unwrap();
        assert!(buffer == bytes.megabyte(number), "megabyte {number} is not what was sent");
    }
    assert_eq!(stream.read(&mut buffer).unwrap(), 0);
}

/// From the host into the namespace.
fn into(namespace: &Namespace, [host, seen]: [IpAddr; 2], megabytes: usize) -> Duration {
    let listener = TcpListener::bind((host, 0)).unwrap();
    let target = SocketAddr::new(seen, listener.local_addr().unwrap().port());
    let client = namespace.start(move || receive(&mut TcpStream::connect(target).unwrap(), megabytes));
    let mut server = listener.accept().unwrap().0;
    let began = Instant::now();
    send(&mut server, megabytes);
    drop(server);
    client.recv().unwrap();
    began.elapsed()
}

/// Out of the namespace to the host.
fn out(namespace: &Namespace, [host, seen]: [IpAddr; 2], megabytes: usize) -> Duration {
    let listener = TcpListener::bind((host, 0)).unwrap();
    let target = SocketAddr::new(seen, listener.local_addr().unwrap().port());
    let client = namespace.start(move || send(&mut TcpStream::connect(target).unwrap(), megabytes));
    let mut server = listener.accept().unwrap().0;
    let began = Instant::now();
    receive(&mut server, megabytes);
    client.recv().unwrap();
    began.elapsed()
}

/// One after the other, with a byte each way.
fn short_connections(namespace: &Namespace, count: usize) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let client = namespace.start(move || {
        for number in 0..count {
            let mut stream = TcpStream::connect((HOST_V4, port)).unwrap();
            let mut byte = [number as u8];
            stream.write_all(&byte).unwrap();
            stream.read_exact(&mut byte).unwrap();
            assert_eq!(byte, [!(number as u8)]);
        }
    });
    for _ in 0..count {
        let mut stream = listener.accept().unwrap().0;
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        stream.write_all(&[!byte[0]]).unwrap();
    }
    client.recv().unwrap();
}

/// Of many sizes, up to the longest that the link carries, there and back.
fn datagrams(namespace: &Namespace, [host, seen]: [IpAddr; 2]) {
    let server = UdpSocket::bind((host, 0)).unwrap();
    let target = SocketAddr::new(seen, server.local_addr().unwrap().port());
    let longest = usize::from(MTU) - if host.is_ipv4() { 28 } else { 48 };
    let sizes = [0, 1, 1000, 8192 - 12, 8192, 20_000, longest];
    let client = namespace.start(move || {
        let any: IpAddr =
            if seen.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let client = UdpSocket::bind((any, 0)).unwrap();
        client.connect(target).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut buffer = vec![0; 1 << 16];
        for size in sizes {
            let sent: Vec<u8> = (0..size).map(|place| (place % 251) as u8).collect();
            client.send(&sent).unwrap();
            let length = client.recv(&mut buffer).unwrap();
            assert!(buffer[..length] == sent, "{size} bytes became {length}");
        }
    });
    let mut buffer = vec![0; 1 << 16];
    for _ in sizes {
        let (length, from) = server.recv_from(&mut buffer).unwrap();
        server.send_to(&buffer[..length], from).unwrap();
    }
    client.recv().unwrap();
}

/// By a port of the host's.
fn forwarded(namespace: &Namespace, handle: &Handle, megabytes: usize) {
    let (ready, port) = channel();
    let server = namespace.start(move || {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        ready.send(listener.local_addr().unwrap().port()).unwrap();
        receive(&mut listener.accept().unwrap().0, megabytes);
    });
    let listen = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0);
    let forward = handle.add_forward(Forward::new(Transport::Tcp, listen, port.recv().unwrap())).unwrap();
    send(&mut TcpStream::connect(forward.listen).unwrap(), megabytes);
    server.recv().unwrap();
}

// ---- modules ----

/// Loads a module after those that it needs.
fn load(modules: &Path, name: &str) {
    let dependencies = fs::read_to_string(modules.join("modules.dep")).unwrap();
    let (module, needs) = dependencies
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(module, _)| module.strip_suffix(".xz").unwrap_or(module) == name)
        .unwrap_or_else(|| panic!("the kernel has no {name}"));
    // They are listed the other way round.
    for file in needs.split_whitespace().rev().chain([module]) {
        let mut image = fs::read(modules.join(file)).unwrap();
        if file.ends_with(".xz") {
            let mut plain = Vec::new();
            liblzma::read::XzDecoder::new(image.as_slice()).read_to_end(&mut plain).unwrap();
            image = plain;
        }
        match rustix::system::init_module(&image, c"") {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => panic!("{file}: {error}"),
        }
    }
}

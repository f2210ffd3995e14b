//! `ring3 pasta` next to programs that are not ours: iperf3, DHCP clients, and the host's own TCP and UDP on both sides
//! of it, in a network that each test makes.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on is to fail")]

mod support;

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::process::Command;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use rustix::process::Signal;
use support::Noise;
use support::process::Running;
use support::world::{
    GATEWAY, Guest, HOST, PATIENCE, World, at, inside, listens, pasta, wait_for_forward, wait_until,
};

/// The guest's service, which the host reaches by a forward.
const IN: u16 = 5201;
/// The host's service, on its loopback.
const OUT: u16 = 5301;

/// What a single call may take. A test that waits this long has found a stall.
const STALL: Duration = Duration::from_secs(30);

/// A listener for both families.
fn listen(port: u16) -> TcpListener {
    TcpListener::bind(("::", port)).unwrap()
}

fn patient(stream: TcpStream) -> TcpStream {
    stream.set_read_timeout(Some(STALL)).unwrap();
    stream.set_write_timeout(Some(STALL)).unwrap();
    stream
}

fn connect(to: SocketAddr) -> TcpStream {
    patient(TcpStream::connect_timeout(&to, STALL).unwrap())
}

fn accept(listener: &TcpListener) -> TcpStream {
    patient(listener.accept().unwrap().0)
}

/// Runs a client and a server, once with the client on the host and once with it in the guest. They are given what to
/// connect to and what to listen on.
fn both_ways<C, S>(guest: &Guest, families: &[Family], client: C, server: S)
where
    C: Fn(SocketAddr) + Sync,
    S: Fn(TcpListener) + Sync,
{
    for family in families {
        wait_for_forward(IN);
        std::thread::scope(|scope| {
            let listener = guest.namespace.run(|| listen(IN));
            scope.spawn(|| server(listener));
            client(family.pick(HOST, IN));
        });
        std::thread::scope(|scope| {
            let listener = listen(OUT);
            scope.spawn(|| server(listener));
            guest.namespace.run(|| client(family.pick(GATEWAY, OUT)));
        });
    }
}

#[derive(Clone, Copy)]
enum Family {
    V4,
    V6,
}

impl Family {
    const BOTH: [Self; 2] = [Self::V4, Self::V6];

    fn pick(self, (v4, v6): (std::net::Ipv4Addr, std::net::Ipv6Addr), port: u16) -> SocketAddr {
        match self {
            Self::V4 => at(v4, port),
            Self::V6 => at(v6, port),
        }
    }
}

fn forwarding(world: &World) -> Guest {
    world.guest(&format!("-t {IN} -u {IN} -T none -U none"))
}

#[test]
fn iperf3_runs_both_ways() {
    inside("iperf3_runs_both_ways", |world| {
        if Command::new("iperf3").arg("--version").output().is_err() {
            return world.skip("no iperf3 here (apt-get install iperf3)");
        }
        let guest = forwarding(world);
        wait_for_forward(IN);
        let run = |server: &mut Command,
                   client: &mut Command,
                   to: SocketAddr,
                   extra: &[&str],
                   listening: &dyn Fn() -> bool| {
            let port = to.port().to_string();
            server.args(["--server", "--one-off", "--forceflush", "--port", &port]);
            server.stdout(std::process::Stdio::null());
            let mut server = server.spawn().unwrap();
            wait_until("iperf3's server", listening);
            client.args(["--connect-timeout", "10000", "--port", &port, "--time", "1"]).args(extra);
            client.args(["--client", &to.ip().to_string()]);
            let done = client.output().unwrap();
            let text = String::from_utf8_lossy(&done.stdout).into_owned();
            assert!(done.status.success(), "{text}\n{}", String::from_utf8_lossy(&done.stderr));
            assert!(text.contains("receiver"), "{text}");
            server.wait().unwrap();
        };
        for extra in [&["--parallel", "2"] as &[&str], &["--udp", "--bitrate", "20M", "--length", "1200"]] {
            for family in Family::BOTH {
                let (into, out) = (family.pick(HOST, IN), family.pick(GATEWAY, OUT));
                let inside = || guest.namespace.command("iperf3");
                let outside = || Command::new("iperf3");
                run(&mut inside(), &mut outside(), into, extra, &|| guest.namespace.listens(IN));
                run(&mut outside(), &mut inside(), out, extra, &|| listens(OUT));
            }
        }
        guest.finish();
    });
}

/// A checksum that depends on the order of all bytes (FNV-1a over words).
struct Checksum(u64);

impl Checksum {
    fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    /// Takes a buffer whose length is a multiple of 8.
    fn add(&mut self, bytes: &[u8]) {
        for word in bytes.chunks_exact(8) {
            self.0 =
                (self.0 ^ u64::from_le_bytes(word.try_into().unwrap())).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}

const BLOCK: usize = 1 << 16;

/// Sends this many blocks of noise and returns their checksum.
fn send_noise(stream: &mut TcpStream, seed: u64, blocks: u64) -> u64 {
    let (mut noise, mut sum, mut block) = (Noise(seed), Checksum::new(), vec![0; BLOCK]);
    for _ in 0..blocks {
        noise.fill(&mut block);
        sum.add(&block);
        stream.write_all(&block).unwrap();
    }
    stream.shutdown(Shutdown::Write).unwrap();
    sum.0
}

/// Receives to the end: how many bytes, and their checksum.
fn receive(stream: &mut TcpStream) -> (u64, u64) {
    let (mut sum, mut block, mut total) = (Checksum::new(), vec![0; BLOCK], 0);
    loop {
        let mut filled = 0;
        while filled < block.len() {
            match stream.read(&mut block[filled..]).unwrap() {
                0 => break,
                n => filled += n,
            }
        }
        sum.add(&block[..filled]);
        total += filled as u64;
        if filled < block.len() {
            return (total, sum.0);
        }
    }
}

#[test]
fn a_gigabyte_arrives_exactly_both_ways() {
    inside("a_gigabyte_arrives_exactly_both_ways", |world| {
        let guest = forwarding(world);
        let blocks = (1_u64 << 30) / BLOCK as u64;
        both_ways(
            &guest,
            &[Family::V4],
            |to| {
                let mut stream = connect(to);
                let sum = send_noise(&mut stream, 1, blocks);
                // The other end says what it got.
                let mut answer = [0; 16];
                stream.read_exact(&mut answer).unwrap();
                let number = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap());
                assert_eq!(number(&answer[..8]), blocks * BLOCK as u64, "length");
                assert_eq!(number(&answer[8..]), sum, "contents");
            },
            |listener| {
                let mut stream = accept(&listener);
                let (total, sum) = receive(&mut stream);
                stream.write_all(&[total.to_le_bytes(), sum.to_le_bytes()].concat()).unwrap();
            },
        );
        guest.finish();
    });
}

#[test]
fn transfers_in_both_directions_at_once_are_exact() {
    inside("transfers_in_both_directions_at_once_are_exact", |world| {
        let guest = forwarding(world);
        let exchange = |stream: TcpStream, seed| {
            let (mut reader, mut writer) = (stream.try_clone().unwrap(), stream);
            std::thread::scope(|scope| {
                let sent = scope.spawn(move || send_noise(&mut writer, seed, 512));
                let got = receive(&mut reader);
                (sent.join().unwrap(), got)
            })
        };
        let expected = |seed| {
            let (mut noise, mut sum, mut block) = (Noise(seed), Checksum::new(), vec![0; BLOCK]);
            for _ in 0..512 {
                noise.fill(&mut block);
                sum.add(&block);
            }
            (512 * BLOCK as u64, sum.0)
        };
        both_ways(
            &guest,
            &Family::BOTH,
            |to| assert_eq!(exchange(connect(to), 2).1, expected(3)),
            |listener| assert_eq!(exchange(accept(&listener), 3).1, expected(2)),
        );
        guest.finish();
    });
}

#[test]
fn thousands_of_short_connections() {
    const COUNT: u32 = 2000;
    inside("thousands_of_short_connections", |world| {
        let guest = forwarding(world);
        both_ways(
            &guest,
            &Family::BOTH,
            |to| {
                for number in 0..COUNT {
                    let mut stream = connect(to);
                    stream.write_all(&number.to_le_bytes()).unwrap();
                    let mut answer = [0; 4];
                    stream.read_exact(&mut answer).unwrap();
                    assert_eq!(u32::from_le_bytes(answer), !number);
                }
            },
            |listener| {
                for _ in 0..COUNT {
                    let mut stream = accept(&listener);
                    let mut bytes = [0; 4];
                    stream.read_exact(&mut bytes).unwrap();
                    stream.write_all(&(!u32::from_le_bytes(bytes)).to_le_bytes()).unwrap();
                }
            },
        );
        guest.finish();
    });
}

#[test]
fn half_closed_connections_carry_the_other_half() {
    inside("half_closed_connections_carry_the_other_half", |world| {
        let guest = forwarding(world);
        both_ways(
            &guest,
            &Family::BOTH,
            |to| {
                let mut stream = connect(to);
                stream.write_all(b"question").unwrap();
                stream.shutdown(Shutdown::Write).unwrap();
                assert_eq!(receive(&mut stream).0, 40 * BLOCK as u64);
            },
            |listener| {
                let mut stream = accept(&listener);
                let mut question = String::new();
                // Ends with the client's half.
                stream.read_to_string(&mut question).unwrap();
                assert_eq!(question, "question");
                send_noise(&mut stream, 4, 40);
            },
        );
        // And the server's half first.
        both_ways(
            &guest,
            &Family::BOTH,
            |to| {
                let mut stream = connect(to);
                assert_eq!(receive(&mut stream).0, 40 * BLOCK as u64);
                send_noise(&mut stream, 5, 40);
            },
            |listener| {
                let mut stream = accept(&listener);
                send_noise(&mut stream, 6, 40);
                assert_eq!(receive(&mut stream).0, 40 * BLOCK as u64);
            },
        );
        guest.finish();
    });
}

#[test]
fn resets_are_carried() {
    inside("resets_are_carried", |world| {
        let guest = forwarding(world);
        both_ways(
            &guest,
            &Family::BOTH,
            |to| {
                let mut stream = connect(to);
                stream.write_all(b"never read").unwrap();
                let error = stream.read(&mut [0; 1]).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::ConnectionReset);
            },
            |listener| {
                let stream = accept(&listener);
                // What has not been read makes the close a reset.
                let arrived = stream.peek(&mut [0; 1]).unwrap();
                assert_eq!(arrived, 1);
            },
        );
        guest.finish();
    });
}

#[test]
fn closed_ports_refuse() {
    inside("closed_ports_refuse", |world| {
        let guest = forwarding(world);
        let refused = |to: SocketAddr| {
            let error = TcpStream::connect_timeout(&to, STALL).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{to}");
        };
        let unreachable = |to: SocketAddr| {
            let socket = UdpSocket::bind((if to.is_ipv4() { "0.0.0.0" } else { "::" }, 0)).unwrap();
            socket.connect(to).unwrap();
            socket.set_read_timeout(Some(STALL)).unwrap();
            socket.send(b"anyone?").unwrap();
            let error = socket.recv(&mut [0; 64]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "UDP {to}");
        };
        wait_for_forward(IN);
        for family in Family::BOTH {
            guest.namespace.run(|| {
                refused(family.pick(GATEWAY, 9));
                unreachable(family.pick(GATEWAY, 9));
            });
            // Into the guest there is no such answer for UDP: a socket cannot make the host's kernel refuse for it. A
            // TCP forward has accepted before it knows: the reset comes after that, or before connecting has returned.
            let connected = TcpStream::connect_timeout(&family.pick(HOST, IN), STALL);
            let error = connected.and_then(|mut stream| stream.read(&mut [0; 1])).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        }
        guest.finish();
    });
}

#[test]
fn ten_thousand_idle_flows_still_work() {
    const COUNT: usize = 10_000;
    inside("ten_thousand_idle_flows_still_work", |world| {
        use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
        let limit = getrlimit(Resource::Nofile);
        if limit.maximum.is_some_and(|most| most < COUNT as u64 + 500) {
            return world.skip("fewer than 10,500 open files are allowed here");
        }
        setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }).unwrap();
        // What is accepted late waits here, not in this process: a descriptor for each end would be too many.
        std::fs::write("/proc/sys/net/core/somaxconn", "16384").unwrap();
        let guest = forwarding(world);
        let listener = listen(OUT);
        rustix::net::listen(&listener, 16384).unwrap();
        guest.namespace.run(|| {
            let mut streams = Vec::with_capacity(COUNT);
            for number in 0..COUNT {
                let mut stream = connect(at(GATEWAY.0, OUT));
                stream.write_all(&(number as u64).to_le_bytes()).unwrap();
                streams.push(stream);
            }
            // All of them are open at once now; in the order in which they were made, they get an answer.
            for (number, stream) in streams.iter_mut().enumerate() {
                let mut server = accept(&listener);
                let mut bytes = [0; 8];
                server.read_exact(&mut bytes).unwrap();
                server.write_all(&bytes).unwrap();
                stream.read_exact(&mut bytes).unwrap();
                assert_eq!(u64::from_le_bytes(bytes), number as u64);
            }
        });
        guest.finish();
    });
}

#[test]
fn ipv6_alone_is_enough() {
    inside("ipv6_alone_is_enough", |world| {
        let guest = world.guest(&format!("-6 -t {IN} -T none -u none -U none"));
        let route = guest.namespace.proc_net("route");
        assert!(route.lines().skip(1).all(|line| line.starts_with("lo\t")), "{route}");
        both_ways(
            &guest,
            &[Family::V6],
            |to| drop(connect(to).write_all(b"hello")),
            |listener| {
                let mut text = String::new();
                accept(&listener).read_to_string(&mut text).unwrap();
                assert_eq!(text, "hello");
            },
        );
        guest.finish();
    });
}

#[test]
fn ranges_translations_and_exclusions_of_ports() {
    inside("ranges_translations_and_exclusions_of_ports", |world| {
        let options = "-t 4000-4010,~4005 -t 192.0.2.2/6000-6002:7000-7002 -T none -u none -U none";
        let guest = world.guest(options);
        wait_for_forward(4010);
        wait_for_forward(6002);
        for (outside, port) in [(4000, 4000), (4010, 4010), (6000, 7000), (6002, 7002)] {
            std::thread::scope(|scope| {
                let listener = guest.namespace.run(|| listen(port));
                scope.spawn(move || accept(&listener).write_all(&port.to_le_bytes()).unwrap());
                let mut bytes = [0; 2];
                connect(at(HOST.0, outside)).read_exact(&mut bytes).unwrap();
                assert_eq!(u16::from_le_bytes(bytes), port, "through {outside}");
            });
        }
        // Neither excluded nor neighbouring ports, nor another address than the one given.
        assert!(![3999, 4005, 4011, 5999, 6003].into_iter().any(listens));
        TcpListener::bind(("127.0.0.1", 6001)).expect("only 192.0.2.2 is bound");
        guest.finish();
    });
}

#[test]
fn a_restart_finds_its_ports_free() {
    inside("a_restart_finds_its_ports_free", |world| {
        let guest = forwarding(world);
        wait_for_forward(IN);
        // Connections are open, in both directions, when it ends.
        let listener = guest.namespace.run(|| listen(IN));
        let client = connect(at(HOST.0, IN));
        let server = accept(&listener);
        let Guest { namespace, engine } = guest;
        engine.signal(rustix::process::Signal::TERM);
        engine.finish(PATIENCE);
        drop((client, server, listener));
        for _ in 0..3 {
            let again = Running::start_quiet(pasta(&namespace, &format!("--config-net -t {IN} -u {IN}")));
            again.wait_until(|| listens(IN));
            assert!(listens(IN), "{:?}", again.finish(PATIENCE));
            again.signal(rustix::process::Signal::TERM);
            again.finish(PATIENCE);
        }
    });
}

#[test]
fn a_new_address_of_the_host_serves_at_once() {
    inside("a_new_address_of_the_host_serves_at_once", |world| {
        let guest = forwarding(world);
        wait_for_forward(IN);
        // The gateway's own address means the host's loopback in the guest.
        let beyond = Ipv4Addr::new(192, 0, 2, 3);
        world.neighbour.ip(&format!("address add {beyond}/24 dev eth0"));
        let outside = world.neighbour.run(|| listen(OUT));
        let within = guest.namespace.run(|| listen(IN));
        for last in [2, 9] {
            let host = Ipv4Addr::new(192, 0, 2, last);
            if host != HOST.0 {
                world.ip(&format!("address delete {}/24 dev eth0", HOST.0));
                world.ip(&format!("address add {host}/24 dev eth0"));
                world.ip(&format!("route add default via {}", GATEWAY.0));
            }
            let _out = guest.namespace.run(|| connect(at(beyond, OUT)));
            let (_, from) = outside.accept().unwrap();
            assert_eq!(from.ip().to_canonical(), host);
            let _into = world.neighbour.run(|| connect(at(host, IN)));
            accept(&within).write_all(b"still here").unwrap();
        }
        guest.finish();
    });
}

/// Datagrams of 1000 bytes, a shorter one at the end, by one call (`UDP_SEGMENT` in udp(7)).
fn send_together(to: SocketAddr, bytes: &[u8]) {
    let any: SocketAddr = if to.is_ipv4() { at(Ipv4Addr::UNSPECIFIED, 0) } else { "[::]:0".parse().unwrap() };
    let socket = UdpSocket::bind(any).unwrap();
    setsockopt(socket.as_raw_fd(), sockopt::UdpGsoSegment, &1000).unwrap();
    assert_eq!(socket.send_to(bytes, to).unwrap(), bytes.len());
}

/// All of `bytes` arrive at `socket`, datagram by datagram, when `send` sent them. A busy machine may lose some, and
/// nothing sends those again: then all are sent anew.
fn expect_together(socket: &UdpSocket, bytes: &[u8], send: impl Fn()) {
    let mut buffer = vec![0; 1 << 16];
    let mut arrived = |wait: Duration| -> Option<Vec<u8>> {
        socket.set_read_timeout(Some(wait)).unwrap();
        let length = socket.recv(&mut buffer).ok()?;
        Some(buffer[..length].to_vec())
    };
    for _ in 0..20 {
        send();
        if bytes
            .chunks(1000)
            .all(|expected| arrived(Duration::from_secs(2)).is_some_and(|got| got == expected))
        {
            return;
        }
        while arrived(Duration::from_millis(500)).is_some() {}
    }
    panic!("the datagrams never arrived all and in order");
}

/// The kernel cuts them apart on either side, and completes their checksums.
#[test]
fn datagrams_that_are_sent_together_all_arrive() {
    inside("datagrams_that_are_sent_together_all_arrive", |world| {
        let guest = world.guest(&format!("-t none -u {IN}"));
        let mut bytes = vec![0; 40_104];
        Noise(7).fill(&mut bytes);
        let addresses = [(at(HOST.0, IN), at(GATEWAY.0, OUT)), (at(HOST.1, IN), at(GATEWAY.1, OUT))];
        for (host, gateway) in addresses {
            let within = guest.namespace.run(|| UdpSocket::bind(("::", IN)).unwrap());
            expect_together(&within, &bytes, || world.neighbour.run(|| send_together(host, &bytes)));
            let outside = UdpSocket::bind(("::", OUT)).unwrap();
            expect_together(&outside, &bytes, || guest.namespace.run(|| send_together(gateway, &bytes)));
        }
        guest.finish();
    });
}

/// A DHCP client's script leaves what it was told in a file, by name.
fn leases(path: &std::path::Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

fn has_udhcpc() -> bool {
    let help = Command::new("busybox").args(["udhcpc", "--help"]).output();
    help.is_ok_and(|done| String::from_utf8_lossy(&done.stderr).contains("Usage: udhcpc"))
}

/// A script for udhcpc, in `dir`, that leaves each lease in the file `told`.
fn dhcp_script(dir: &std::path::Path, told: &std::path::Path) -> std::path::PathBuf {
    let script = dir.join("script");
    std::fs::write(&script, format!("#!/bin/sh\n[ $1 != bound ] || env >{}\n", told.display())).unwrap();
    rustix::fs::chmod(&script, rustix::fs::Mode::from_raw_mode(0o755)).unwrap();
    script
}

#[test]
fn udhcpc_gets_a_lease() {
    inside("udhcpc_gets_a_lease", |world| {
        if !has_udhcpc() {
            return world.skip("no busybox with udhcpc here (apt-get install busybox)");
        }
        let guest = world
            .bare_guest("-t none -u none --dns 203.0.113.53 --search example.org --dhcp-dns --dhcp-search");
        guest.namespace.ip("link set eth0 up");
        let dir = tempfile::tempdir().unwrap();
        let told = dir.path().join("told");
        let mut client = guest.namespace.command("busybox");
        client
            .args(["udhcpc", "-i", "eth0", "-f", "-n", "-q", "-t", "20", "-T", "1", "-O", "search", "-s"])
            .arg(dhcp_script(dir.path(), &told));
        support::process::finish(client, PATIENCE).expect(0);
        let text = leases(&told);
        for expected in
            ["ip=192.0.2.2", "router=192.0.2.1", "mask=24", "dns=203.0.113.53", "search=example.org"]
        {
            assert!(text.lines().any(|line| line.trim_end_matches('.') == expected), "{expected}:\n{text}");
        }
        guest.finish();
    });
}

#[test]
fn udhcpc_follows_the_hosts_address() {
    inside("udhcpc_follows_the_hosts_address", |world| {
        if !has_udhcpc() {
            return world.skip("no busybox with udhcpc here (apt-get install busybox)");
        }
        let guest = world.bare_guest("-t none -u none --dns 203.0.113.53 --dhcp-dns");
        guest.namespace.ip("link set eth0 up");
        let dir = tempfile::tempdir().unwrap();
        let told = dir.path().join("told");
        let mut client = guest.namespace.command("busybox");
        client.args(["udhcpc", "-i", "eth0", "-f", "-t", "20", "-T", "1", "-A", "1", "-s"]);
        client.arg(dhcp_script(dir.path(), &told));
        let client = Running::start_quiet(client);
        let has = |address: &str| leases(&told).lines().any(|line| line == format!("ip={address}"));
        client.wait_until(|| has("192.0.2.2"));
        world.ip(&format!("address delete {}/24 dev eth0", HOST.0));
        world.ip("address add 192.0.2.9/24 dev eth0");
        world.ip(&format!("route add default via {}", GATEWAY.0));
        // It asks for a renewal of what it has, until that is refused: the engine hears of the change in its own time.
        wait_until("a lease of the new address", || {
            client.signal(Signal::USR1);
            std::thread::sleep(Duration::from_millis(50));
            has("192.0.2.9")
        });
        client.signal(Signal::TERM);
        client.finish(PATIENCE);
        guest.finish();
    });
}

#[test]
fn dhclient_gets_leases_of_both_families() {
    inside("dhclient_gets_leases_of_both_families", |world| {
        if !std::path::Path::new("/usr/sbin/dhclient").exists()
            && !std::path::Path::new("/sbin/dhclient").exists()
        {
            return world.skip("no dhclient here (apt-get install isc-dhcp-client)");
        }
        let guest = world.bare_guest("-t none -u none --dns 203.0.113.53 --dns 2001:db8::53 --dhcp-dns");
        guest.namespace.ip("link set eth0 up");
        let dir = tempfile::tempdir().unwrap();
        let (script, told) = (dir.path().join("script"), dir.path().join("told"));
        std::fs::write(&script, format!("#!/bin/sh\nenv >>{}\n", told.display())).unwrap();
        rustix::fs::chmod(&script, rustix::fs::Mode::from_raw_mode(0o755)).unwrap();
        // Without an address of the link, DHCPv6 has no source.
        wait_until("a link-local address", || {
            guest.namespace.proc_net("if_inet6").lines().any(|line| {
                // Address, interface, prefix length, scope, flags, name.
                let flags = line.split_whitespace().nth(4).and_then(|word| u8::from_str_radix(word, 16).ok());
                const TENTATIVE: u8 = 0x40;
                line.starts_with("fe80")
                    && line.ends_with("eth0")
                    && flags.is_some_and(|f| f & TENTATIVE == 0)
            })
        });
        for (family, expected) in [
            (
                "-4",
                &[
                    "new_ip_address=192.0.2.2",
                    "new_routers=192.0.2.1",
                    "new_domain_name_servers=203.0.113.53",
                ],
            ),
            ("-6", &["new_ip6_address=2001:db8::2", "reason=BOUND6", "new_dhcp6_name_servers=2001:db8::53"]),
        ] {
            let mut client = guest.namespace.command("dhclient");
            client.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin");
            client.args([family, "-1", "-d", "-lf"]).arg(dir.path().join(format!("leases{family}")));
            client
                .arg("-pf")
                .arg(dir.path().join(format!("pid{family}")))
                .arg("-sf")
                .arg(&script)
                .arg("eth0");
            let client = Running::start_quiet(client);
            client.wait_until(|| expected.iter().all(|line| leases(&told).lines().any(|told| told == *line)));
            let text = leases(&told);
            assert!(expected.iter().all(|line| text.lines().any(|told| told == *line)), "{text}");
        }
        guest.finish();
    });
}

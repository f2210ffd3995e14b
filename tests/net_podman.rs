//! Rootless podman with `ring3 pasta` in the place of pasta.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on is to fail")]

mod support;

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

use support::process::{Running, finish};
use support::world::{GATEWAY, HOST, PATIENCE, World, at, inside, listens, skip, wait_until};

/// Where Debian's podman is unpacked, or why it is not.
fn podman() -> &'static Result<PathBuf, String> {
    static ROOT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    ROOT.get_or_init(|| {
        let root = support::scratch().join("podman");
        let fetch = concat!(env!("CARGO_MANIFEST_DIR"), "/../../benches/peers/fetch.sh");
        let mut command = Command::new(fetch);
        command.arg(&root).args([
            "trixie",
            "podman",
            "crun",
            "busybox-static",
            "bash",
            "coreutils",
            "mount",
            "util-linux",
        ]);
        let done = finish(command, PATIENCE);
        match done.code {
            Some(0) => Ok(root),
            _ => Err(format!("no podman here: {}", done.stderr.trim())),
        }
    })
}

/// What the script of a user with podman says.
fn script(root: &PathBuf, script: &str) -> Command {
    let pasta = std::env::var("RING3_TEST_PASTA").unwrap_or_else(|_| env!("CARGO_BIN_EXE_ring3").into());
    let mut command = Command::new("unshare");
    command.args(["--mount", "--cgroup", "--ipc", "--uts", "--pid", "--fork", "--kill-child", "bash"]);
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/support/podman.sh"));
    command.arg(root).arg(pasta).arg(script);
    command
}

/// Runs a test where podman is, and works with the network that is always there.
fn with_podman(name: &str, body: impl FnOnce(&World, &PathBuf)) {
    // Before the world is made: there is no archive in it. There, what was fetched is found.
    let root = match podman() {
        Err(why) => return skip(name, why),
        Ok(root) => root,
    };
    inside(name, |world| {
        let done = finish(script(root, "podman run --rm --network none busybox echo works"), PATIENCE);
        if done.text() != "works\n" {
            return world.skip(&format!("podman does not work here: {}", done.stderr.trim()));
        }
        body(world, root);
    });
}

#[test]
fn a_container_has_the_hosts_addresses_routes_and_names() {
    with_podman("a_container_has_the_hosts_addresses_routes_and_names", |world, root| {
        // The host's resolver is the neighbour, who answers a question that it gets with the question.
        let resolver = world.neighbour.run(|| UdpSocket::bind(at(GATEWAY.0, 53)).unwrap());
        resolver.set_read_timeout(Some(PATIENCE)).unwrap();
        let asked = std::thread::spawn(move || {
            let mut question = [0; 512];
            let (length, from) = resolver.recv_from(&mut question).unwrap();
            let mut answer = question[..length].to_vec();
            // A response without an answer: there is no such name.
            answer[2] |= 0x80;
            answer[3] |= 3;
            resolver.send_to(&answer, from).unwrap();
            String::from_utf8_lossy(&question[..length]).into_owned()
        });
        let commands =
            "ip address; ip route; ip -6 route; cat /etc/resolv.conf; nslookup ring3-asks.example. || true";
        let done = finish(
            script(root, &format!("podman run --rm --network pasta busybox sh -c '{commands}'")),
            PATIENCE,
        );
        done.expect(0);
        let text = done.text();
        for expected in [
            "inet 192.0.2.2/24",
            "inet6 2001:db8::2/64",
            "default via 192.0.2.1",
            "default via 2001:db8::1",
            "nameserver 169.254.1.1",
        ] {
            assert!(text.contains(expected), "{expected}:\n{text}\n{}", done.stderr);
        }
        let question = asked.join().unwrap();
        assert!(question.contains("ring3-asks"), "{question:?}");
    });
}

#[test]
fn published_ports_lead_into_the_container_until_it_ends() {
    with_podman("published_ports_lead_into_the_container_until_it_ends", |_, root| {
        // One connection ends the container.
        let run = "podman run --rm --network pasta -p 8080:80 busybox nc -l -p 80 -e echo from the container";
        for address in [at(HOST.0, 8080), at([127, 0, 0, 1], 8080), at(HOST.1, 8080)] {
            let container = Running::start_quiet(script(root, run));
            container.wait_until(|| listens(8080));
            // The port is there before the program that serves it.
            wait_until("an answer", || {
                let mut text = String::new();
                let connected = TcpStream::connect_timeout(&address, PATIENCE);
                connected.is_ok_and(|mut stream| stream.read_to_string(&mut text).is_ok())
                    && text == "from the container\n"
            });
            container.finish(PATIENCE).expect(0);
            wait_until("the port's release", || !listens(8080));
        }
    });
}

#[test]
fn a_container_reaches_the_host_by_name() {
    with_podman("a_container_reaches_the_host_by_name", |_, root| {
        let listener = TcpListener::bind("0.0.0.0:7000").unwrap();
        let served = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(b"from the host").unwrap();
        });
        let run = "podman run --rm --network pasta busybox nc host.containers.internal 7000";
        let done = finish(script(root, run), PATIENCE);
        done.expect(0);
        assert_eq!(done.text(), "from the host", "{}", done.stderr);
        served.join().unwrap();
    });
}

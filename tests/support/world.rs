//! A network of the test's own: a host's namespace with a neighbour, and guests' namespaces behind `ring3 pasta`.
//!
//! A test runs its body in a second process, root in a user namespace of its own, whose network namespace is the
//! host's: whoever runs the tests, they need no privileges, and the machine's network is not theirs. When that process
//! ends, however it ends, everything in its process namespace is killed.
//!
//! `RING3_TEST_PASTA`: the words of another `pasta` to run instead of `ring3 pasta`, to try a test on upstream's.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd as _;
use std::process::{Child, Command, Stdio};
use std::thread::{Scope, ScopedJoinHandle, sleep};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::process::{Finished, Running, finish, privileged};

/// What a test may take on a slow, busy machine.
pub const PATIENCE: Duration = Duration::from_secs(120);
/// The host's addresses, which are the guest's too.
pub const HOST: (Ipv4Addr, Ipv6Addr) =
    (Ipv4Addr::new(192, 0, 2, 2), Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2));
/// The neighbour, to which the host's default routes lead. In the guest these mean the host's loopback.
pub const GATEWAY: (Ipv4Addr, Ipv6Addr) =
    (Ipv4Addr::new(192, 0, 2, 1), Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1));

/// Set in the second process.
const INSIDE: &str = "RING3_TEST_INSIDE";

/// Runs the body of the test of this name in a world of its own, or says why that cannot be.
#[track_caller]
pub fn inside(name: &str, body: impl FnOnce(&World)) {
    if std::env::var_os(INSIDE).is_some() {
        body(&World::new(name));
        return;
    }
    if let Err(why) = possible() {
        skip(name, &why);
        return;
    }
    let mut command = unshare();
    command.arg(std::env::current_exe().unwrap()).args(["--exact", name, "--nocapture"]).env(INSIDE, name);
    let done = finish(command, PATIENCE);
    for why in done.stderr.lines().filter_map(|line| line.strip_prefix(&format!("SKIPPED {name}: "))) {
        skip(name, why);
    }
    assert_eq!(done.code, Some(0), "{}\n{}", done.text(), done.stderr);
    assert!(done.text().contains("1 passed"), "there is no test {name}:\n{}", done.text());
}

/// Says that a test, or a part of it, is skipped and why, past the test harness.
pub fn skip(name: &str, why: &str) {
    use std::io::Write as _;
    let _ = writeln!(std::io::stderr(), "SKIPPED {name}: {why}");
}

fn unshare() -> Command {
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--net", "--mount", "--pid", "--fork"]);
    command.args(["--kill-child", "--mount-proc"]).stdin(Stdio::null());
    command
}

/// Whether such worlds can be made here.
fn possible() -> Result<(), String> {
    let mut command = unshare();
    command.args([
        "sh",
        "-c",
        "ip link set lo up && ip link add name a type veth peer name b && : <>/dev/net/tun",
    ]);
    let done = command.output().map_err(|error| format!("no unshare(1) here: {error}"))?;
    if done.status.success() {
        return Ok(());
    }
    Err(format!("no namespaces with a tap here: {}", String::from_utf8_lossy(&done.stderr).trim()))
}

/// Asks again and again until it is so.
#[track_caller]
pub fn wait_until(what: &str, so: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE / 4;
    while !so() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        sleep(Duration::from_millis(1));
    }
}

/// The host, in whose namespace the test's process is, and its neighbour.
pub struct World {
    pub name: String,
    pub neighbour: Namespace,
}

impl World {
    fn new(name: &str) -> Self {
        let neighbour = Namespace::new();
        let ip = |words: &str| run_to_end(Command::new("ip").args(words.split_whitespace()));
        ip("link set lo up");
        ip(&format!("link add name eth0 type veth peer name eth0 netns {}", neighbour.keeper.id()));
        for (address, namespace) in [(HOST, None), (GATEWAY, Some(&neighbour))] {
            let words = [
                format!("address add {}/24 dev eth0", address.0),
                format!("address add {}/64 dev eth0 nodad", address.1),
                "link set eth0 up".to_owned(),
            ];
            words
                .iter()
                .for_each(|words| namespace.map_or_else(|| ip(words), |namespace| namespace.ip(words)));
        }
        ip(&format!("route add default via {}", GATEWAY.0));
        ip(&format!("route add default via {}", GATEWAY.1));
        Self { name: name.to_owned(), neighbour }
    }

    /// Runs `ip` in the host's namespace.
    pub fn ip(&self, words: &str) {
        run_to_end(Command::new("ip").args(words.split_whitespace()));
    }

    /// Says that this test is skipped, or a part of it.
    pub fn skip(&self, why: &str) {
        skip(&self.name, why);
    }

    /// A guest that has its network, configured by pasta.
    pub fn guest(&self, options: &str) -> Guest {
        let guest = self.bare_guest(&format!("--config-net {options}"));
        let only_v6 = options.split_whitespace().any(|word| word == "-6");
        guest.namespace.wait_for_routes(!only_v6);
        guest
    }

    /// A guest with a tap that nobody has configured.
    pub fn bare_guest(&self, options: &str) -> Guest {
        let namespace = Namespace::new();
        let engine = Running::start_quiet(pasta(&namespace, options));
        let path = format!("/proc/{}/net/dev", namespace.keeper.id());
        engine.wait_until(|| fs::read_to_string(&path).is_ok_and(|text| text.contains("eth0:")));
        Guest { namespace, engine }
    }
}

/// The command that runs pasta in the foreground for this namespace.
pub fn pasta(namespace: &Namespace, options: &str) -> Command {
    let mut command = match std::env::var("RING3_TEST_PASTA") {
        Ok(words) => {
            let mut words = words.split_whitespace();
            let mut command = Command::new(words.next().unwrap());
            command.args(words).stdin(Stdio::null());
            command
        }
        Err(_) => {
            let mut command = privileged();
            command.arg("pasta");
            command
        }
    };
    command.args(["--foreground", "--netns-only", "--ns-ifname", "eth0", "--netns"]);
    command.arg(namespace.path()).args(options.split_whitespace());
    command
}

/// A namespace behind a running `pasta`.
pub struct Guest {
    pub namespace: Namespace,
    pub engine: Running,
}

impl Guest {
    /// Ends pasta as a user does, and fails the test unless it was still well.
    #[track_caller]
    pub fn finish(self) -> Finished {
        self.engine.signal(Signal::TERM);
        let finished = self.engine.finish(PATIENCE);
        assert!(!finished.stderr.contains("panicked at"), "{}", finished.stderr);
        assert!(finished.code == Some(0) || finished.signal == Some(Signal::TERM.as_raw()), "{finished:?}");
        finished
    }
}

/// A network namespace, kept by a process that does nothing.
pub struct Namespace {
    keeper: Child,
}

impl Namespace {
    pub fn new() -> Self {
        let keeper = Command::new("unshare")
            .args(["--net", "sleep", "infinity"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let namespace = Self { keeper };
        let ours = fs::read_link("/proc/self/ns/net").unwrap();
        wait_until("a namespace", || fs::read_link(namespace.path()).is_ok_and(|link| link != ours));
        namespace.ip("link set lo up");
        namespace
    }

    /// A path that names it.
    pub fn path(&self) -> String {
        format!("/proc/{}/ns/net", self.keeper.id())
    }

    /// One of its files in `/proc/PID/net`.
    pub fn proc_net(&self, file: &str) -> String {
        fs::read_to_string(format!("/proc/{}/net/{file}", self.keeper.id())).unwrap()
    }

    /// A command that will run in it.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path())).args(["--", program]).stdin(Stdio::null());
        command
    }

    /// Runs `ip` in it.
    #[track_caller]
    pub fn ip(&self, words: &str) {
        run_to_end(self.command("ip").args(words.split_whitespace()));
    }

    /// Runs a closure in it. Sockets that it makes stay there.
    pub fn run<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| self.spawn(scope, body).join().unwrap())
    }

    /// Runs a closure in it, beside the caller.
    pub fn spawn<'scope, T: Send + 'scope>(
        &self,
        scope: &'scope Scope<'scope, '_>,
        body: impl FnOnce() -> T + Send + 'scope,
    ) -> ScopedJoinHandle<'scope, T> {
        let namespace = fs::File::open(self.path()).unwrap();
        scope.spawn(move || {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            body()
        })
    }

    /// Whether something listens to a TCP port in it.
    pub fn listens(&self, port: u16) -> bool {
        listed(&["tcp", "tcp6"].map(|file| self.proc_net(file)), port)
    }

    /// Waits for default routes, and so for addresses.
    pub fn wait_for_routes(&self, ipv4: bool) {
        wait_until("the guest's default routes", || {
            let v4 = self.proc_net("route");
            let v6 = self.proc_net("ipv6_route");
            let default_v6 = format!("{:032} 00 ", 0);
            let v4 = v4.lines().any(|line| line.split_whitespace().nth(1) == Some("00000000"));
            // The kernel's own entry for "unreachable" is on the loopback interface.
            let v6 =
                v6.lines().any(|line| line.starts_with(&default_v6) && !line.trim_end().ends_with(" lo"));
            v6 && (v4 || !ipv4)
        });
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // Both fail when it has ended already.
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
    }
}

/// Waits until something listens to a TCP port in the host's namespace: pasta, for its guest.
#[track_caller]
pub fn wait_for_forward(port: u16) {
    wait_until(&format!("a listener on port {port}"), || listens(port));
}

/// Whether something listens to a TCP port in the host's namespace.
pub fn listens(port: u16) -> bool {
    listed(&["tcp", "tcp6"].map(|file| fs::read_to_string(format!("/proc/self/net/{file}")).unwrap()), port)
}

/// Whether tables like /proc/net/tcp have a listener on this port.
fn listed(tables: &[String], port: u16) -> bool {
    // The local address and port, the remote ones, and the state, which is 0A.
    let local = format!(":{port:04X}");
    tables.iter().flat_map(|table| table.lines()).any(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        words.get(1).is_some_and(|word| word.ends_with(&local)) && words.get(3) == Some(&"0A")
    })
}

/// An address and a port.
pub fn at(address: impl Into<IpAddr>, port: u16) -> SocketAddr {
    SocketAddr::new(address.into(), port)
}

/// Runs a command, which must succeed.
#[track_caller]
pub fn run_to_end(command: &mut Command) {
    let done = command.stdin(Stdio::null()).output().unwrap();
    assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
}

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread::JoinHandle;

use usernet::Engine;
use usernet::testing;

use super::*;
use crate::net::local::Name;
use crate::net::options::ports::DEFAULT_EPHEMERAL;

/// An engine on a thread, and its control socket.
struct Network {
    path: PathBuf,
    handle: Handle,
    engine: Option<JoinHandle<()>>,
    server: Option<Server>,
    _name: Name,
    /// Loopback addresses of this test's own, so that no port is in use.
    address: Ipv4Addr,
    _guest: testing::Guest,
}

impl Network {
    fn new(number: u8) -> Self {
        let (tap, guest) = testing::tap(testing::PLAIN, 16).unwrap();
        let engine = Engine::new(testing::config(), Box::new(tap)).unwrap();
        let handle = engine.handle();
        let [low, high, ..] = std::process::id().to_le_bytes();
        let path = std::env::temp_dir().join(format!("ring3-control-{}-{number}", std::process::id()));
        let controlled = Controlled { handle: handle.clone(), v6: false, ephemeral: DEFAULT_EPHEMERAL };
        let (socket, name) = ControlSocket::bind(&path).unwrap();
        let server = socket.serve(controlled).unwrap();
        let engine = std::thread::spawn(move || engine.run().unwrap());
        Self {
            path,
            handle,
            engine: Some(engine),
            server: Some(server),
            _name: name,
            address: Ipv4Addr::new(127, 64 + number, high, low),
            _guest: guest,
        }
    }

    fn spec(&self, ports: &str) -> PortSpec {
        format!("{}/{ports}", self.address).parse().unwrap()
    }

    fn ask(&self, request: Request) -> Result<Vec<String>, String> {
        client::ask(&self.path, &[request]).map_err(|error| error.to_string())
    }

    fn add(&self, ports: &str) -> Result<Vec<String>, String> {
        self.ask(Request::Add(Transport::Tcp, self.spec(ports)))
    }

    fn remove(&self, ports: &str) -> Result<Vec<String>, String> {
        self.ask(Request::Remove(Transport::Tcp, self.spec(ports)))
    }

    fn list(&self) -> Vec<String> {
        self.ask(Request::List).unwrap()
    }

    /// Whether somebody listens.
    fn listens(&self, port: u16) -> bool {
        TcpStream::connect((self.address, port)).is_ok()
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.handle.stop();
        let _ = self.engine.take().map(JoinHandle::join);
        drop(self.server.take());
    }
}

#[test]
fn ports_come_and_go() {
    let network = Network::new(1);
    let address = network.address;
    assert_eq!(network.list(), [""; 0]);
    network.add("2000-2003:80-83,~2002").unwrap();
    network.ask(Request::Add(Transport::Udp, network.spec("2000"))).unwrap();
    assert!(network.listens(2000) && !network.listens(2002));
    let expected = [
        format!("tcp {address}/2000-2001:80-81"),
        format!("tcp {address}/2003:83"),
        format!("udp {address}/2000"),
    ];
    assert_eq!(network.list(), expected);
    // What is listed can be said again.
    for line in network.list() {
        line.split_once(' ').unwrap().1.parse::<PortSpec>().unwrap();
    }
    network.remove("2001-2003").unwrap();
    assert_eq!(network.list(), [format!("tcp {address}/2000:80"), format!("udp {address}/2000")]);
    network.remove("all").unwrap();
    assert_eq!(network.list(), [format!("udp {address}/2000")]);
    assert!(!network.listens(2000));
    assert!(network.remove("2000").unwrap_err().contains("nothing is forwarded by tcp"));
}

#[test]
fn a_range_is_added_as_a_whole_or_not_at_all() {
    let network = Network::new(2);
    let taken = TcpListener::bind((network.address, 2005)).unwrap();
    let error = network.add("2000-2010").unwrap_err();
    assert!(error.contains(&format!("cannot listen on TCP {}:2005", network.address)), "{error}");
    assert_eq!(network.list(), [""; 0]);
    drop(taken);
    network.add("2000-2010").unwrap();
    assert!(network.add("2010").unwrap_err().contains(":2010"));
    assert_eq!(network.list().len(), 1);
}

#[test]
fn what_is_no_request_is_refused_and_the_client_stays() {
    let network = Network::new(3);
    let mut socket = UnixStream::connect(&network.path).unwrap();
    let mut answers = BufReader::new(socket.try_clone().unwrap()).lines();
    for (request, words) in [
        ("", "'' is not a request"),
        ("quit", "'quit' is not a request"),
        ("add", "neither tcp nor udp"),
        ("add sctp 22", "'sctp'"),
        ("add tcp", "ports are missing"),
        ("add tcp 0", "'0' is not a port"),
        ("add tcp 22 23", "'23' is too much"),
        ("add tcp auto", "'auto' is for the command line"),
        ("add tcp none", "'none' names no port"),
        ("add tcp 22,22", "forwarded twice"),
        ("list \u{0}", "too much"),
    ] {
        socket.write_all(format!("{request}\n").as_bytes()).unwrap();
        let answer = answers.next().unwrap().unwrap();
        assert!(answer.starts_with("error ") && answer.contains(words), "{request}: {answer}");
    }
    // Several at once, and one in pieces.
    for piece in ["list\nli", "st\r\n", "list\nlist\n"] {
        socket.write_all(piece.as_bytes()).unwrap();
    }
    for _ in 0..4 {
        assert_eq!(answers.next().unwrap().unwrap(), "ok");
    }
}

#[test]
fn a_request_without_end_ends_the_connection() {
    let network = Network::new(4);
    let mut socket = UnixStream::connect(&network.path).unwrap();
    socket.write_all(&[b'x'; LONGEST_REQUEST]).unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("error a request is longer"), "{answer}");
    assert_eq!(network.list(), [""; 0]);
}

#[test]
fn clients_that_do_not_read_are_in_nobodys_way() {
    let network = Network::new(5);
    // Ports that are not in a row: a line each.
    let ports: Vec<String> = (0..400).map(|n| (20000 + 2 * n).to_string()).collect();
    network.add(&ports.join(",")).unwrap();
    let mut lazy = UnixStream::connect(&network.path).unwrap();
    lazy.set_nonblocking(true).unwrap();
    // Until neither side takes any more.
    while lazy.write(b"list\n").is_ok() {}
    assert_eq!(network.list().len(), 400);
    // And nobody is kept out by many.
    let many: Vec<UnixStream> =
        (0..3 * MOST_CLIENTS).map(|_| UnixStream::connect(&network.path).unwrap()).collect();
    assert_eq!(network.list().len(), 400);
    drop(many);
}

#[test]
fn a_socket_left_behind_is_replaced_and_nothing_else() {
    let path = std::env::temp_dir().join(format!("ring3-control-{}-stale", std::process::id()));
    std::fs::write(&path, "something else").unwrap();
    assert!(ControlSocket::bind(&path).is_err());
    std::fs::remove_file(&path).unwrap();
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let socket = ControlSocket::bind(&path).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let error = ControlSocket::bind(&path).map(drop).unwrap_err().to_string();
    assert!(error.contains("cannot listen for control at"), "{error}");
    drop(socket);
    assert!(!path.exists());
    client::ask(&path, &[Request::List]).unwrap_err();
}

#[test]
fn rows_are_told_apart_by_all_that_they_are() {
    let at = |listen: &str, port| Forward::new(Transport::Tcp, listen.parse::<SocketAddr>().unwrap(), port);
    let by = |interface: &str, forward| Forward { interface: Some(interface.to_owned()), ..forward };
    let to = |address: &str, forward| Forward { guest_address: Some(address.parse().unwrap()), ..forward };
    let lines = describe(vec![
        at("[::]:82", 82),
        at("[::]:80", 80),
        at("[::]:81", 81),
        at("[::]:83", 84),
        at("0.0.0.0:84", 85),
        by("eth0", at("[::]:84", 85)),
        to("192.0.2.5", at("[::1]:84", 85)),
        at("[::]:65535", 1),
        at("[::]:65534", 65535),
    ]);
    assert_eq!(
        lines,
        [
            "tcp 0.0.0.0/84:85",
            "tcp 80-82",
            "tcp 83:84",
            "tcp 65534:65535",
            "tcp 65535:1",
            "tcp %eth0/84:85",
            "tcp ::1/84:192.0.2.5/85",
        ]
    );
}

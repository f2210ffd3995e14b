//! Running out of things, and recovering.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, setrlimit};

use super::super::sockets::Kind;
use super::*;

/// A namespace that has no descriptors while it is told so.
#[derive(Clone, Default)]
struct Scarce(Arc<AtomicBool>);

impl Sockets for Scarce {
    fn socket(&self, kind: Kind) -> io::Result<OwnedFd> {
        if self.0.load(Ordering::SeqCst) { Err(Errno::MFILE.into()) } else { Here.socket(kind) }
    }

    fn bind(&self, transport: Transport, address: SocketAddr, on: Option<&str>) -> io::Result<OwnedFd> {
        Here.bind(transport, address, on)
    }
}

/// A port that leads to a server that answers every byte.
fn echo(running: &Running) -> SocketAddr {
    let listener = TcpListener::bind(any()).unwrap();
    let port = running.forward(Transport::Tcp, listener.local_addr().unwrap());
    std::thread::spawn(move || {
        loop {
            // It may be the one without descriptors.
            let Ok((mut stream, _)) = listener.accept() else {
                std::thread::yield_now();
                continue;
            };
            let mut byte = [0];
            if stream.read_exact(&mut byte).is_ok() {
                let _ = stream.write_all(&byte);
            }
        }
    });
    port
}

fn ask(port: SocketAddr) -> io::Result<()> {
    let mut stream = TcpStream::connect(port)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"x")?;
    stream.read_exact(&mut [0])
}

/// Whether a client is served; else it must be reset.
fn works(port: SocketAddr) -> bool {
    match ask(port) {
        Ok(()) => true,
        Err(error) => {
            assert!(
                matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe),
                "{error}"
            );
            false
        }
    }
}

#[test]
fn without_descriptors_clients_are_reset_until_there_are_some() {
    let scarce = Scarce::default();
    let running = Running::with(Config::default(), scarce.clone(), |_| ());
    let port = echo(&running);
    assert!(works(port));
    scarce.0.store(true, Ordering::SeqCst);
    assert!(!works(port));
    assert_eq!(running.stats().tcp_refused, 1);
    scarce.0.store(false, Ordering::SeqCst);
    assert!(works(port));
}

#[test]
fn a_full_table_resets_until_it_has_room() {
    let running = Running::with(Config { most_connections: 2, ..Config::default() }, Here, |_| ());
    let port = echo(&running);
    let held: Vec<_> = (0..2).map(|_| TcpStream::connect(port).unwrap()).collect();
    running.until(|stats| stats.tcp_connections == 2);
    assert!(!works(port));
    drop(held);
    running.until(|stats| stats.tcp_connections == 0);
    assert!(works(port));
}

/// In a process of its own, whose limit does not harm other tests.
#[test]
fn a_low_limit_of_descriptors_is_survived() {
    let own = std::env::current_exe().unwrap();
    let name = "splice::tests::exhaustion::with_few_descriptors";
    let child = Command::new(own).args(["--exact", name, "--ignored", "--test-threads=1"]).output().unwrap();
    let said = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success() && said.contains("1 passed"), "{said}");
}

#[test]
#[ignore = "run by another test, in a process of its own"]
fn with_few_descriptors() {
    let running = Running::new();
    let port = echo(&running);
    let limit = Rlimit { current: Some(40), maximum: Some(40) };
    setrlimit(Resource::Nofile, limit).unwrap();
    for _ in 0..3 {
        // Until there are none left: the splicer may be the one to miss them, or the server, or this thread.
        let mut held = Vec::new();
        while let Ok(client) = TcpStream::connect(port) {
            held.push(client);
        }
        assert!(held.len() > 5, "{} connections", held.len());
        drop(held);
        // Those that are left over go first.
        let end = Instant::now() + PATIENCE;
        while let Err(error) = ask(port) {
            assert!(Instant::now() < end, "it did not recover: {error}");
            std::thread::yield_now();
        }
        running.until(|stats| stats.tcp_connections == 0);
    }
}

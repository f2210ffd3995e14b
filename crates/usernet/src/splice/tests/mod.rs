//! The bypass from outside: clients and servers of the loopback, with a splicer between them. Both sides are the same
//! namespace, except in [`namespace`].

mod bypass;
mod exhaustion;
mod namespace;
mod tcp;
mod udp;

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::sockets::{Here, Sockets};
use super::{Config, Forward, Handle, Side, Splicer, Stats};
use crate::config::Transport;

/// How long a test waits for what must come before it fails.
const PATIENCE: Duration = Duration::from_secs(30);

/// A port of the loopback that the kernel chooses.
fn any() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 0).into()
}

/// A splicer on a thread of its own.
struct Running {
    handle: Handle,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Running {
    fn new() -> Self {
        Self::with(Config::default(), Here, |_| ())
    }

    fn with(config: Config, guest: impl Sockets + 'static, set: impl FnOnce(&mut Splicer)) -> Self {
        let mut splicer = Splicer::new(config, Box::new(Here), Box::new(guest)).unwrap();
        set(&mut splicer);
        let handle = splicer.handle();
        Self { handle, thread: Some(std::thread::spawn(|| splicer.run())) }
    }

    /// A port of the host's that leads to `target`.
    fn forward(&self, transport: Transport, target: SocketAddr) -> SocketAddr {
        let forward = Forward::new(Side::Host, transport, any(), target.port());
        self.handle.add_forward(forward).unwrap().listen
    }

    fn stats(&self) -> Stats {
        self.handle.stats().unwrap()
    }

    fn until(&self, done: impl Fn(Stats) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !done(self.stats()) {
            assert!(Instant::now() < end, "what should happen did not: {:?}", self.stats());
            std::thread::yield_now();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.handle.stop();
        let ended = self.thread.take().map(JoinHandle::join);
        if !std::thread::panicking() {
            ended.unwrap().unwrap().unwrap();
        }
    }
}

/// A client and the server that the splicer leads it to.
fn pair(running: &Running) -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind(any()).unwrap();
    let port = running.forward(Transport::Tcp, listener.local_addr().unwrap());
    let client = TcpStream::connect(port).unwrap();
    let (server, _) = listener.accept().unwrap();
    for stream in [&client, &server] {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
    }
    (client, server)
}

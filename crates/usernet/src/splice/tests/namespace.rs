//! In a network namespace for real.

use std::io::{Read, Write};
use std::net::UdpSocket;
use std::process::Command;
use std::sync::mpsc::channel;

use nix::sched::{CloneFlags, unshare};

use super::super::sockets;
use super::*;

/// A namespace with a loopback, and a thread that serves its sockets; or why there is none.
fn namespace() -> Result<sockets::There, String> {
    let (there, server) = sockets::remote();
    let (ready, made) = channel();
    std::thread::spawn(move || {
        let entered = unshare(CloneFlags::CLONE_NEWNET).map_err(|error| format!("unshare: {error}"));
        let up = entered.and_then(|()| {
            let status = Command::new("ip").args(["link", "set", "lo", "up"]).status();
            match status {
                Ok(status) if status.success() => Ok(()),
                Ok(status) => Err(format!("ip: {status}")),
                Err(error) => Err(format!("ip: {error}")),
            }
        });
        let is_up = up.is_ok();
        let _ = ready.send(up);
        if is_up {
            server.run();
        }
    });
    made.recv().unwrap().map(|()| there)
}

/// What listens in the namespace, or connects from it, is a socket of it, whoever uses it.
fn listener_in(there: &sockets::There) -> TcpListener {
    TcpListener::from(there.bind(Transport::Tcp, any(), None).unwrap())
}

#[test]
fn between_two_namespaces() {
    let there = match namespace() {
        Ok(there) => there,
        Err(why) => {
            eprintln!("SKIPPED between_two_namespaces: {why}");
            return;
        }
    };
    let running = Running::with(Config::default(), there.clone(), |_| ());

    // From the host into the namespace.
    let inner = listener_in(&there);
    inner.set_nonblocking(false).unwrap();
    let target = inner.local_addr().unwrap();
    let listen = running.forward(Transport::Tcp, target);
    let mut client = TcpStream::connect(listen).unwrap();
    client.write_all(b"inwards").unwrap();
    let mut word = [0; 7];
    inner.accept().unwrap().0.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"inwards");

    // From the namespace to the host: the same port may be in use on both.
    let outer = TcpListener::bind(any()).unwrap();
    let port = outer.local_addr().unwrap();
    running.handle.add_forward(Forward::new(Side::Guest, Transport::Tcp, port, port.port())).unwrap();
    let kind = sockets::Kind { transport: Transport::Tcp, v6: false };
    let inside = there.socket(kind).unwrap();
    // It does not block: being under way is no error.
    let _ = rustix::net::connect(&inside, &port);
    let mut outside = outer.accept().unwrap().0;
    outside.write_all(b"outward").unwrap();
    let mut inside = TcpStream::from(inside);
    inside.set_nonblocking(false).unwrap();
    inside.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"outward");

    // Datagrams.
    let inner = UdpSocket::from(there.bind(Transport::Udp, any(), None).unwrap());
    inner.set_nonblocking(false).unwrap();
    let client = UdpSocket::bind(any()).unwrap();
    client.connect(running.forward(Transport::Udp, inner.local_addr().unwrap())).unwrap();
    client.send(b"hello").unwrap();
    let (n, from) = inner.recv_from(&mut word).unwrap();
    inner.send_to(&word[..n], from).unwrap();
    assert_eq!(client.recv(&mut word).unwrap(), 5);
}

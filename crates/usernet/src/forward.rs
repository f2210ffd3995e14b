//! What to do about a port that cannot be forwarded.

use std::io;

use rustix::io::Errno;

use crate::config::{Forward, Transport};

/// The kind of an error. `QuotaExceeded` if there are no descriptors left, for which the standard library has no name.
pub(crate) fn kind(error: &io::Error) -> io::ErrorKind {
    match Errno::from_io_error(error) {
        Some(Errno::MFILE | Errno::NFILE) => io::ErrorKind::QuotaExceeded,
        _ => error.kind(),
    }
}

/// The error with the name of the port that could not be listened to, and a way out.
pub(crate) fn explained(forward: &Forward, error: &io::Error) -> io::Error {
    let Forward { transport, listen, interface, .. } = forward;
    let port = listen.port();
    let listing = match transport {
        Transport::Tcp => "ss -ltnp",
        Transport::Udp => "ss -lunp",
    };
    let by = interface.as_ref().map_or(String::new(), |interface| format!(" by interface {interface}"));
    let advice = match Errno::from_io_error(error) {
        Some(Errno::ADDRINUSE) => {
            format!("another program has the port: `{listing} sport = :{port}` says which")
        }
        Some(Errno::ACCESS) => format!(
            "the port is for root alone: take one from 1024 on, or allow this one with \
             `sysctl -w net.ipv4.ip_unprivileged_port_start={port}`"
        ),
        Some(Errno::ADDRNOTAVAIL) => {
            "the host does not have that address (now): name one that `ip address` shows; freebind allows others"
                .to_owned()
        }
        Some(Errno::NODEV) => "there is no such interface: `ip link` shows them".to_owned(),
        Some(Errno::PERM) => "before Linux 5.7, an interface can be named only with CAP_NET_RAW".to_owned(),
        Some(Errno::AFNOSUPPORT) => "the host does not have that protocol: leave it out".to_owned(),
        Some(Errno::MFILE | Errno::NFILE) => {
            "no descriptors are left: forward fewer ports, or raise the limit (`ulimit -n`)".to_owned()
        }
        _ => return io::Error::new(error.kind(), format!("cannot listen on {transport} {listen}{by}: {error}")),
    };
    io::Error::new(kind(error), format!("cannot listen on {transport} {listen}{by}: {error}; {advice}"))
}

//! Which ports of a network namespace somebody listens to, as /proc/net tells (proc(5)).
//!
//! The files belong to the namespace in which they were opened, wherever and whenever they are read. So they are opened
//! once, before the process leaves the host's files behind.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::sync::{Mutex, PoisonError};

use usernet::config::Transport;

/// A state of a TCP socket: it listens.
const LISTEN: &str = "0A";
/// A state of a UDP socket: it is not connected.
const UNCONNECTED: &str = "07";

/// The tables of one namespace. IPv6's are not there where the kernel has no IPv6.
#[derive(Debug)]
pub(super) struct Bound {
    tcp: Vec<Mutex<File>>,
    udp: Vec<Mutex<File>>,
}

impl Bound {
    /// Those of the calling thread's namespace.
    pub(super) fn open() -> io::Result<Self> {
        let table = |name: &str| match File::open(format!("/proc/thread-self/net/{name}")) {
            Ok(file) => Ok(Some(Mutex::new(file))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        };
        let tables = |names: [&str; 2]| -> io::Result<Vec<_>> {
            Ok(names.map(table).into_iter().collect::<io::Result<Vec<_>>>()?.into_iter().flatten().collect())
        };
        Ok(Self { tcp: tables(["tcp", "tcp6"])?, udp: tables(["udp", "udp6"])? })
    }

    /// The ports that are bound now.
    pub(super) fn ports(&self, transport: Transport) -> io::Result<BTreeSet<u16>> {
        let (tables, state) = match transport {
            Transport::Tcp => (&self.tcp, LISTEN),
            Transport::Udp => (&self.udp, UNCONNECTED),
        };
        let mut ports = BTreeSet::new();
        for table in tables {
            let mut file = table.lock().unwrap_or_else(PoisonError::into_inner);
            let mut text = String::new();
            // syscalls(pasta): lseek read fstat statx
            file.seek(SeekFrom::Start(0))?;
            file.read_to_string(&mut text)?;
            ports.extend(text.lines().filter_map(|line| port(line, state)));
        }
        Ok(ports)
    }
}

/// The local port of a table's line, if its socket is in `state`.
fn port(line: &str, state: &str) -> Option<u16> {
    let mut words = line.split_ascii_whitespace().skip(1);
    let (local, _remote, its_state) = (words.next()?, words.next()?, words.next()?);
    let (_, port) = local.rsplit_once(':')?;
    u16::from_str_radix(port, 16).ok().filter(|_| its_state == state)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn lines_of_the_tables() {
        let v4 =
            "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1";
        let v6 = "   1: 00000000000000000000000001000000:0035 00000000000000000000000000000000:0000 07 0:0";
        assert_eq!(port(v4, LISTEN), Some(8080));
        assert_eq!(port(v4, UNCONNECTED), None);
        assert_eq!(port(v6, UNCONNECTED), Some(53));
        for other in ["", "  sl  local_address rem_address   st tx_queue", "0: x", "0: x:y z 0A"] {
            assert_eq!(port(other, LISTEN), None, "{other}");
        }
    }

    #[test]
    fn listeners_come_and_go() {
        let bound = Bound::open().unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(tcp.local_addr().unwrap()).unwrap();
        let (tcp_port, udp_port) = (tcp.local_addr().unwrap().port(), udp.local_addr().unwrap().port());
        let now = bound.ports(Transport::Tcp).unwrap();
        assert!(now.contains(&tcp_port));
        assert!(!now.contains(&client.local_addr().unwrap().port()), "that one is connected");
        assert!(bound.ports(Transport::Udp).unwrap().contains(&udp_port));
        drop((tcp, client));
        // A test beside this one that starts a program has copies of all descriptors for a moment.
        let end = Instant::now() + Duration::from_secs(30);
        while bound.ports(Transport::Tcp).unwrap().contains(&tcp_port) {
            assert!(Instant::now() < end, "the listener does not go");
            std::thread::yield_now();
        }
    }
}

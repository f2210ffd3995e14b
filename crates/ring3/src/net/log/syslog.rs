//! The system's log, by its datagram socket.
//!
//! An entry is `<PRIORITY>NAME[PID]: TEXT`, as the C library sends it (syslog(3)) but for the time, which the log's daemon knows
//! itself. The socket is connected once: an isolated process cannot do it again, so after a restart of the daemon
//! its entries are lost, unless the daemon keeps its socket, as systemd's does.

use std::io;
use std::os::unix::net::UnixDatagram;
use std::process;

/// Where the daemon listens.
const SOCKET: &str = "/dev/log";

/// Facility: system daemons (RFC 5424, 6.2.1).
const DAEMON: u8 = 3 << 3;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Syslog {
    socket: UnixDatagram,
    name: String,
}

impl Syslog {
    pub(super) fn connect(name: &str) -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        socket.connect(SOCKET)?;
        // A daemon that stands still does not stop the network.
        socket.set_nonblocking(true)?;
        Ok(Self { socket, name: name.to_owned() })
    }

    /// Sends an entry, or loses it.
    pub(super) fn send(&self, level: tracing::Level, entry: &[u8]) {
        let text = String::from_utf8_lossy(entry);
        // syscalls: getpid sendto
        let _ = self.socket.send(message(level, &self.name, process::id(), text.trim_end()).as_bytes());
    }
}

fn message(level: tracing::Level, name: &str, pid: u32, text: &str) -> String {
    let severity = match level {
        tracing::Level::ERROR => 3,
        tracing::Level::WARN => 4,
        tracing::Level::INFO => 6,
        _ => 7,
    };
    format!("<{}>{name}[{pid}]: {text}", DAEMON | severity)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_has_priority_name_and_process() {
        assert_eq!(message(tracing::Level::WARN, "passt", 7, "no room"), "<28>passt[7]: no room");
        assert_eq!(message(tracing::Level::INFO, "pasta", 8, "ready"), "<30>pasta[8]: ready");
    }
}

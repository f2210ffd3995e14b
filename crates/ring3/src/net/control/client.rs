//! The other end: what `ring3 net` does.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Request;

/// Names the socket if `--socket` does not.
pub const SOCKET_VARIABLE: &str = "RING3_NET_SOCKET";

/// How long an answer may take: `all` is some tens of thousands of ports.
const PATIENCE: Duration = Duration::from_secs(120);

/// Bytes of an answer at most: a line for each port that there is, and more.
const LONGEST_ANSWER: u64 = 32 << 20;

/// Why there is no answer, or not the right one.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No socket was named.
    #[error(
        "no socket is named: give --socket PATH, or set {SOCKET_VARIABLE}, to the PATH of `pasta -c PATH` or \
         `run --net-control PATH`"
    )]
    NoSocket,
    /// Nobody answers.
    #[error("cannot talk to the network at {path}")]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The network refused.
    #[error("{0}")]
    Refused(String),
    /// Something other than a network is there.
    #[error("{0} is no control socket: it answered something else")]
    NotControl(PathBuf),
}

/// The socket that is named by the user, or by the environment.
///
/// # Errors
/// By neither.
pub fn socket(named: Option<PathBuf>) -> Result<PathBuf, ClientError> {
    let variable = || std::env::var_os(SOCKET_VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from);
    named.or_else(variable).ok_or(ClientError::NoSocket)
}

/// Asks for each of `requests` in turn; returns the lines of all answers.
///
/// # Errors
/// As soon as one is refused, or not answered. Those before it were done.
pub fn ask(path: &Path, requests: &[Request]) -> Result<Vec<String>, ClientError> {
    let failed = |source| ClientError::Socket { path: path.to_owned(), source };
    let mut socket = UnixStream::connect(path).map_err(failed)?;
    socket.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
    let answers = socket.try_clone().map_err(failed)?;
    let mut answers = BufReader::new(answers.take(LONGEST_ANSWER));
    let mut lines = Vec::new();
    for request in requests {
        socket.write_all(format!("{request}\n").as_bytes()).map_err(failed)?;
        loop {
            let mut line = String::new();
            if answers.read_line(&mut line).map_err(failed)? == 0 {
                return Err(failed(io::ErrorKind::UnexpectedEof.into()));
            }
            let line = line.trim_end_matches('\n');
            match line.split_once(' ') {
                None if line == "ok" => break,
                Some(("error", why)) => return Err(ClientError::Refused(why.to_owned())),
                Some(("tcp" | "udp", _)) => lines.push(line.to_owned()),
                _ => return Err(ClientError::NotControl(path.to_owned())),
            }
        }
    }
    Ok(lines)
}

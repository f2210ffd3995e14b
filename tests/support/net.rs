//! User-mode networking: `ring3 pasta` as the user of [`process::ring3`], and programs that run inside.
//!
//! What runs inside a namespace is, as a rule, the test program itself: a test that does nothing unless it is told by the
//! environment which part to play ([`part`]).

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::process::{self, PATIENCE, RING3};
use super::skip;

/// Tells the test program inside what to do.
const PART: &str = "RING3_TEST_PART";

/// Puts a tap device where this user can open it, out of others' sight, and goes on as the user.
const AS_NOBODY: &str = "mount -t tmpfs none /mnt && mknod /mnt/tun c 10 200 && chmod 666 /mnt/tun && \
     mount --bind /mnt/tun /dev/net/tun && cd / && \
     exec setpriv --reuid 65534 --regid 65534 --clear-groups \"$@\"";

/// Whether the user can make namespaces with a tap device in them. Says aloud why the calling test is skipped if not.
pub fn possible() -> bool {
    if !Path::new("/dev/net/tun").exists() {
        skip("there is no /dev/net/tun");
        return false;
    }
    let mut unshare = as_user("unshare");
    unshare.args(["--user", "--map-root-user", "--net", "true"]).stderr(Stdio::null()).stdout(Stdio::null());
    let possible = unshare.status().is_ok_and(|status| status.success());
    if !possible {
        skip("users may not make user and network namespaces here (unshare -rn true)");
    }
    possible
}

/// A program as the user whose tests these are, with a tap device that can be opened.
pub fn as_user(program: &str) -> Command {
    let open = |path: &Path| path.metadata().is_ok_and(|m| m.permissions().mode() & 0o666 == 0o666);
    let mut command = if process::other_user().is_some() && !open(Path::new("/dev/net/tun")) {
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", AS_NOBODY, "sh", program]);
        command
    } else {
        let mut command = Command::new(program);
        if let Some(id) = process::other_user() {
            std::os::unix::process::CommandExt::gid(
                std::os::unix::process::CommandExt::uid(&mut command, id),
                id,
            );
        }
        command
    };
    command.env_clear().env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin").env("HOME", "/nonexistent");
    command.stdin(Stdio::null()).current_dir("/");
    command
}

/// `ring3 pasta` with options, and a command unless it is empty.
pub fn pasta(options: &[&str], command: &[&str]) -> Command {
    let mut pasta = as_user(RING3);
    pasta.arg("pasta").args(options);
    if !command.is_empty() {
        pasta.arg("--").args(command);
    }
    pasta
}

/// `ring3 pasta` with this test program inside, playing `part` in the test of that name.
pub fn playing(options: &[&str], part: &str) -> Command {
    play(pasta(options, &[]), part)
}

/// A `pasta` without a command, with this test program inside as in [`playing`].
pub fn play(mut pasta: Command, part: &str) -> Command {
    let program = std::env::current_exe().unwrap();
    pasta.arg("--").arg(program).args(["--exact", "inside", "--nocapture"]).env(PART, part);
    pasta
}

/// The part that this process is to play, if it runs inside.
pub fn part() -> Option<String> {
    std::env::var(PART).ok()
}

/// A port that nobody has at the moment.
pub fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Connects, as soon as somebody listens.
#[track_caller]
pub fn connect(to: SocketAddr) -> TcpStream {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match TcpStream::connect_timeout(&to, Duration::from_secs(10)) {
            Ok(stream) => return stream,
            Err(error) => assert!(Instant::now() < deadline, "cannot connect to {to}: {error}"),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Sends back all that comes, then closes.
pub fn echo(mut stream: TcpStream) {
    let mut buffer = vec![0; 1 << 16];
    loop {
        match stream.read(&mut buffer).unwrap() {
            0 => return,
            count => stream.write_all(&buffer[..count]).unwrap(),
        }
    }
}

/// Sends `bytes` and checks that they all come back.
#[track_caller]
pub fn expect_echo(stream: &TcpStream, bytes: &[u8]) {
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut stream = stream;
            stream.write_all(bytes).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
        });
        let mut back = Vec::new();
        let mut stream = stream;
        stream.read_to_end(&mut back).unwrap();
        assert!(back == bytes, "{} of {} bytes came back", back.len(), bytes.len());
    });
}

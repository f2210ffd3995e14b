//! `ring3` processes: as an unprivileged user, at most two machines at a time, each with a watchdog.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

/// What a run may take on a slow, busy machine. A test that waits this long has found a hang.
pub const PATIENCE: Duration = Duration::from_secs(240);

/// The program under test.
pub const RING3: &str = env!("CARGO_BIN_EXE_ring3");
/// `nobody` and `nogroup` of Debian.
const NOBODY: u32 = 65534;

/// The user to start `ring3` as, where that is not who we are.
pub fn other_user() -> Option<u32> {
    static OTHER: OnceLock<Option<u32>> = OnceLock::new();
    *OTHER.get_or_init(|| {
        if !rustix::process::geteuid().is_root() {
            return None;
        }
        let mut version = Command::new(RING3);
        version.arg("--version").uid(NOBODY).gid(NOBODY).current_dir("/").stdout(Stdio::null());
        let reachable = version.status().is_ok_and(|status| status.success());
        if !reachable {
            super::skip("running as an unprivileged user: nobody cannot reach the build directory");
        }
        reachable.then_some(NOBODY)
    })
}

/// `ring3` as ourselves.
pub fn privileged() -> Command {
    let mut command = Command::new(RING3);
    command.stdin(Stdio::null());
    command
}

/// `ring3` as an unprivileged user in `/`, without home, cache, language or terminal.
pub fn ring3() -> Command {
    let mut command = privileged();
    command.env_clear().env("PATH", "/usr/bin:/bin").env("HOME", "/nonexistent").current_dir("/");
    as_other_user(&mut command);
    command
}

/// Has a command run as the user of [`ring3`].
pub fn as_other_user(command: &mut Command) {
    if let Some(id) = other_user() {
        // The standard library drops the supplementary groups with these.
        command.uid(id).gid(id);
    }
}

/// `ring3 run` with a kernel, options, and a command unless it is empty.
pub fn run(kernel: &Path, options: &[&str], command: &[&str]) -> Command {
    let mut ring3 = ring3();
    ring3.args(["run", "--kernel"]).arg(kernel).args(options);
    if !command.is_empty() {
        ring3.arg("--").args(command);
    }
    ring3
}

/// `ring3 run` with a kernel, options, and the ignored test `the_guests_side` of this program as the command.
pub fn run_the_guests_side(kernel: &Path, options: &[&str]) -> Command {
    let this = std::env::current_exe().unwrap();
    let command = [
        this.to_str().unwrap(),
        "--ignored",
        "--exact",
        "the_guests_side",
        "--nocapture",
        "--test-threads=1",
    ];
    run(kernel, options, &command)
}

/// How a process ended.
#[derive(Debug)]
pub struct Finished {
    /// Its status, if no signal ended it.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// What it wrote to standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error.
    pub stderr: String,
    /// How long it ran.
    pub took: Duration,
}

impl Finished {
    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Fails the test unless the status is this one.
    #[track_caller]
    pub fn expect(&self, code: i32) -> &Self {
        assert!(!self.stderr.contains("panicked at"), "ring3 panicked:\n{}", self.stderr);
        assert_eq!(self.code, Some(code), "stdout:\n{}\nstderr:\n{}", self.text(), self.stderr);
        self
    }

    /// Fails the test unless `ring3` refused to go on: status 125 and a message with these words.
    #[track_caller]
    pub fn expect_error(&self, words: &str) -> &Self {
        self.expect(125);
        assert!(self.stderr.lines().any(|line| line.starts_with("ring3: ")), "{}", self.stderr);
        assert!(self.stderr.contains(words), "{words:?} is not in:\n{}", self.stderr);
        self
    }
}

/// Runs a command that starts no machine to its end.
#[track_caller]
pub fn finish(command: Command, patience: Duration) -> Finished {
    Running::start(command, None).finish(patience)
}

/// Boots a machine and waits for its end.
#[track_caller]
pub fn boot(command: Command) -> Finished {
    let slot = Slot::take();
    Running::start(command, Some(slot)).finish(PATIENCE)
}

/// A process under watch; dropped, it is killed.
pub struct Running {
    child: Child,
    stdout: Option<JoinHandle<Vec<u8>>>,
    stderr: Option<JoinHandle<String>>,
    began: Instant,
    _slot: Option<Slot>,
}

impl Running {
    /// Boots a machine.
    pub fn boot(command: Command) -> Self {
        let slot = Slot::take();
        Self::start(command, Some(slot))
    }

    fn start(command: Command, slot: Option<Slot>) -> Self {
        let (mut running, output) = Self::start_with_output(command, slot);
        running.stdout = Some(std::thread::spawn(move || read_all(output.file)));
        running
    }

    /// Boots a machine whose standard output the test reads itself.
    pub fn boot_with_output(command: Command) -> (Self, Output) {
        let slot = Slot::take();
        Self::start_with_output(command, Some(slot))
    }

    /// Starts a process that boots no machine, and whose standard output the test reads itself.
    pub fn start_quiet_with_output(command: Command) -> (Self, Output) {
        Self::start_with_output(command, None)
    }

    fn start_with_output(mut command: Command, slot: Option<Slot>) -> (Self, Output) {
        let (reader, writer) = std::io::pipe().unwrap();
        let mut child = command.stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
        // It holds the writer.
        drop(command);
        let pipe = child.stderr.take().unwrap();
        let stderr = std::thread::spawn(move || String::from_utf8_lossy(&read_all(pipe)).into_owned());
        let running = Self { child, stdout: None, stderr: Some(stderr), began: Instant::now(), _slot: slot };
        (running, Output::new(OwnedFd::from(reader)))
    }

    /// Boots a machine on a terminal, which is all its standard streams.
    pub fn boot_on_terminal(mut command: Command, terminal: &OwnedFd) -> Self {
        let slot = Slot::take();
        let copy = || terminal.try_clone().unwrap();
        let child = command.stdin(copy()).stdout(copy()).stderr(copy()).spawn().unwrap();
        Self { child, stdout: None, stderr: None, began: Instant::now(), _slot: Some(slot) }
    }

    /// Starts a process that boots no machine.
    pub fn start_quiet(command: Command) -> Self {
        Self::start(command, None)
    }

    /// Asks again and again, until it is so or the process has ended.
    pub fn wait_until(&self, so: impl Fn() -> bool) {
        let pidfd = pidfd_open(self.pid(), PidfdFlags::empty()).unwrap();
        while !so() && !readable(&pidfd, Duration::from_millis(1)) {}
    }

    /// Its process id.
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// The other end of its standard input, if that is piped.
    pub fn stdin(&mut self) -> Option<impl Write + Send + 'static> {
        self.child.stdin.take()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// Waits for its end; a process that takes longer is killed, and the test fails.
    #[track_caller]
    pub fn finish(mut self, patience: Duration) -> Finished {
        let pidfd = pidfd_open(self.pid(), PidfdFlags::empty()).unwrap();
        let ended = readable(&pidfd, patience);
        if !ended {
            self.child.kill().unwrap();
        }
        let status = self.child.wait().unwrap();
        let took = self.began.elapsed();
        let finished = Finished {
            code: status.code(),
            signal: status.signal(),
            stdout: self.stdout.take().map(|thread| thread.join().unwrap()).unwrap_or_default(),
            stderr: self.stderr.take().map(|thread| thread.join().unwrap()).unwrap_or_default(),
            took,
        };
        assert!(ended, "killed after {patience:?}:\n{}\n{}", finished.text(), finished.stderr);
        finished
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read_all(mut from: impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    // What was read before an error is worth showing.
    let _ = from.read_to_end(&mut bytes);
    bytes
}

/// Standard output, or a terminal, of a process that runs.
pub struct Output {
    file: File,
    /// Everything read so far.
    pub seen: Vec<u8>,
}

impl Output {
    /// Reads from a descriptor.
    pub fn new(fd: OwnedFd) -> Self {
        Self { file: File::from(fd), seen: Vec::new() }
    }

    /// Fills a buffer.
    #[track_caller]
    pub fn read_exact(&mut self, buffer: &mut [u8]) {
        let mut filled = 0;
        while filled < buffer.len() {
            assert!(readable(&self.file, PATIENCE), "no output for {PATIENCE:?}");
            let count = self.file.read(&mut buffer[filled..]).unwrap();
            assert!(count > 0, "the output ended");
            filled += count;
        }
    }

    /// The rest of it.
    #[track_caller]
    pub fn rest(&mut self) -> Vec<u8> {
        let mut rest = std::mem::take(&mut self.seen);
        let mut buffer = [0; 4096];
        loop {
            assert!(readable(&self.file, PATIENCE), "no output for {PATIENCE:?}");
            match self.file.read(&mut buffer) {
                Ok(count @ 1..) => rest.extend(&buffer[..count]),
                // A terminal ends with an error.
                _ => return rest,
            }
        }
    }

    /// Reads until this text has been written, and forgets everything up to its end.
    #[track_caller]
    pub fn wait_for(&mut self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(at) = self.seen.windows(text.len()).position(|w| w == text.as_bytes()) {
                let rest = self.seen.split_off(at + text.len());
                let before = std::mem::replace(&mut self.seen, rest);
                return String::from_utf8_lossy(&before).into_owned();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(readable(&self.file, left), "no {text:?} in {:?}", String::from_utf8_lossy(&self.seen));
            let mut buffer = [0; 4096];
            let count = self.file.read(&mut buffer).unwrap_or(0);
            assert!(count > 0, "ended without {text:?}: {:?}", String::from_utf8_lossy(&self.seen));
            self.seen.extend(&buffer[..count]);
        }
    }
}

/// Waits until a descriptor can be read; no after `patience`.
fn readable(fd: &impl std::os::fd::AsFd, patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    loop {
        let left = Timespec::try_from(deadline.saturating_duration_since(Instant::now())).unwrap();
        match poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&left)) {
            Ok(count) => return count > 0,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => panic!("poll: {errno}"),
        }
    }
}

/// The right to run a machine: two at a time, over all test programs, so that none starves another.
struct Slot {
    _lock: File,
}

impl Slot {
    fn take() -> Self {
        let open = |index: usize| {
            let path = super::scratch().join(format!("machine-{index}.lock"));
            File::options().create(true).truncate(false).write(true).open(path).unwrap()
        };
        for index in 0..2 {
            let lock = open(index);
            if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
                return Self { _lock: lock };
            }
        }
        // Whichever is free first would be better; over many tests it comes to the same.
        let lock = open(usize::from(Instant::now().elapsed().subsec_nanos() % 2 == 1));
        flock(&lock, FlockOperation::LockExclusive).unwrap();
        Self { _lock: lock }
    }
}

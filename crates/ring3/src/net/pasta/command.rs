//! The command that runs in a network namespace of its own.
//!
//! It is started early, in new namespaces, and waits: only when the network is ready is it let go, to execute.
//!
//! **Signals.** As the first process of a PID namespace, a command that does not catch a signal does not even notice it
//! (pid_namespaces(7)): Ctrl-C and SIGTERM would do nothing to `sleep`. Here they do what they do to any process: its
//! status in /proc, open since before the isolation, tells what it catches, and if it would have been ended it is killed.

use std::cell::Cell;
use std::convert::Infallible;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process;

use nix::sched::{CloneFlags, clone};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{
    Pid, Signal, WaitOptions, WaitStatus, kill_process, set_parent_process_death_signal, waitpid,
};

use crate::net::{Because, NetError};

/// Exit statuses as shells have them: not executable, not found.
const NOT_EXECUTABLE: i32 = 126;
const NOT_FOUND: i32 = 127;

/// A process that waits to become the command.
#[derive(Debug)]
pub(super) struct Command {
    pid: Pid,
    /// A byte lets it go; being closed without ends it.
    go: Option<OwnedFd>,
    /// Its status in /proc, if it is the first of a PID namespace and /proc shows it.
    disposition: Option<File>,
    /// The signal that it was killed for.
    killed_for: Cell<Option<Signal>>,
}

impl Command {
    /// Starts it in new network, mount, IPC and UTS namespaces, and a PID namespace if `pid_namespace`. Without a command
    /// it is a login shell.
    pub(super) fn start(command: &[OsString], pid_namespace: bool) -> Result<Self, NetError> {
        // The child only waits, mounts and executes.
        const STACK: usize = 256 << 10;
        const NAMESPACES: CloneFlags = CloneFlags::CLONE_NEWNET
            .union(CloneFlags::CLONE_NEWNS)
            .union(CloneFlags::CLONE_NEWIPC)
            .union(CloneFlags::CLONE_NEWUTS);
        let pid = if pid_namespace { CloneFlags::CLONE_NEWPID } else { CloneFlags::empty() };
        let (wait, go) = pipe_with(PipeFlags::CLOEXEC).because(|| "cannot make a pipe".into())?;
        let (mut wait, mut go) = (Some(wait), Some(go));
        let mut stack = vec![0; STACK];
        let body = || {
            go.take();
            let released = wait.take().is_some_and(|pipe| matches!(rustix::io::read(pipe, &mut [0]), Ok(1)));
            if !released {
                return 1;
            }
            // A command without its network is of no use to anybody.
            let _ = set_parent_process_death_signal(Some(Signal::KILL));
            let Err((error, status)) = become_command(command, pid_namespace);
            eprintln!("pasta: {error}");
            status as isize
        };
        let pid = clone(Box::new(body), &mut stack, NAMESPACES | pid, Some(libc::SIGCHLD))
            .map_err(io::Error::from)
            .because(|| "cannot make a network namespace for the command".into())?;
        let pid = Pid::from_raw(pid.as_raw()).ok_or(io::ErrorKind::NotFound);
        let pid = pid.map_err(io::Error::from).because(|| "cannot start a process".into())?;
        let path = || format!("/proc/{}/status", pid.as_raw_nonzero());
        let disposition = if pid_namespace { File::open(path()).ok() } else { None };
        Ok(Self { pid, go, disposition, killed_for: Cell::new(None) })
    }

    /// Its network namespace.
    pub(super) fn network_namespace(&self) -> PathBuf {
        format!("/proc/{}/ns/net", self.pid.as_raw_nonzero()).into()
    }

    /// Lets it execute.
    pub(super) fn go(&mut self) -> Result<(), NetError> {
        let Some(go) = self.go.take() else { return Ok(()) };
        rustix::io::write(go, &[1]).because(|| "cannot start the command".into())?;
        Ok(())
    }

    /// Its process identifier.
    pub(super) fn pid(&self) -> Pid {
        self.pid
    }

    /// Sends it a signal whose effect is to end who does not catch it.
    // syscalls(pasta): kill
    pub(super) fn signal(&self, signal: Signal) {
        if !self.end_by(signal) {
            // It may have ended.
            let _ = kill_process(self.pid, signal);
        }
    }

    /// Has a signal that it was sent by the terminal end it, if that is its effect.
    pub(super) fn signalled(&self, signal: Signal) {
        self.end_by(signal);
    }

    /// Ends the command if `signal` should, and would not.
    fn end_by(&self, signal: Signal) -> bool {
        let mut status = [0; 4096];
        // syscalls(pasta): pread64
        let length = self.disposition.as_ref().and_then(|file| file.read_at(&mut status, 0).ok());
        let text = length.and_then(|length| str::from_utf8(status.get(..length)?).ok());
        let ends = text.is_some_and(|text| is_default(text, signal));
        if ends {
            self.killed_for.set(Some(signal));
            let _ = kill_process(self.pid, Signal::KILL);
        }
        ends
    }

    // syscalls(pasta): wait4
    /// Its exit status, if it has ended: 128 and the signal's number if a signal ended it.
    pub(super) fn status(&self) -> io::Result<Option<u8>> {
        let ended = waitpid(Some(self.pid), WaitOptions::NOHANG)?;
        Ok(ended.and_then(|(_, status)| exit_status(status, self.killed_for.get())))
    }
}

/// Whether `signal` is neither caught, ignored nor blocked, as /proc/PID/status has it (proc_pid_status(5)).
fn is_default(status: &str, signal: Signal) -> bool {
    let bit = 1 << (signal.as_raw() - 1);
    let has = |name: &str| {
        let mask = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).map(|mask| mask & bit != 0)
    };
    ["SigBlk", "SigIgn", "SigCgt"].into_iter().all(|name| has(name) == Some(false))
}

/// What a shell would say.
fn exit_status(status: WaitStatus, killed_for: Option<Signal>) -> Option<u8> {
    let by = |signal| match killed_for {
        Some(asked) if signal == Signal::KILL.as_raw() => asked.as_raw(),
        _ => signal,
    };
    let number = status.exit_status().or(status.terminating_signal().map(|signal| 128 + by(signal)))?;
    Some(u8::try_from(number).unwrap_or(u8::MAX))
}

fn mount_proc() -> rustix::io::Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    // Not for whoever is outside.
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::DOWNSTREAM)?;
    mount(c"proc", c"/proc", c"proc", flags, None)
}

/// Executes the command, in its namespaces.
fn become_command(command: &[OsString], pid_namespace: bool) -> Result<Infallible, (String, i32)> {
    // The process identifiers that are seen are those of its namespace. Where the host hides parts of /proc, as in
    // a container, the kernel does not allow it.
    if pid_namespace && let Err(error) = mount_proc() {
        tracing::debug!("no /proc of the namespace's own: {error}");
    }
    // Its user may ping, as the engine lets it.
    let _ = fs::write("/proc/sys/net/ipv4/ping_group_range", "0 0");
    let shell = || std::env::var_os("SHELL").filter(|shell| !shell.is_empty()).unwrap_or("/bin/sh".into());
    let error = match command {
        [] => {
            let shell = shell();
            let name = PathBuf::from(&shell);
            let mut dash = OsString::from("-");
            dash.push(name.file_name().unwrap_or(OsStr::new("sh")));
            (process::Command::new(&shell).arg0(dash).exec(), shell)
        }
        [program, arguments @ ..] => (process::Command::new(program).args(arguments).exec(), program.clone()),
    };
    let (error, program) = error;
    let status = if error.kind() == io::ErrorKind::NotFound { NOT_FOUND } else { NOT_EXECUTABLE };
    Err((format!("cannot execute {}: {error}", program.display()), status))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_ends_whom_nothing_keeps_from_it() {
        // Caught: HUP (1) and INT (2); ignored: QUIT (3); blocked: TERM (15).
        let status =
            "Name:\tx\nSigBlk:\t0000000000004000\nSigIgn:\t0000000000000004\nSigCgt:\t0000000000000003\n";
        for signal in [Signal::HUP, Signal::INT, Signal::QUIT, Signal::TERM] {
            assert!(!is_default(status, signal), "{signal:?}");
        }
        assert!(is_default(status, Signal::USR1));
        assert!(!is_default("SigBlk:\t0\nSigIgn:\t0\n", Signal::TERM), "what is not told is not known");
    }
}

//! The command that runs in a network namespace of its own.
//!
//! It is started early, in new namespaces, and waits: only when the network is ready is it let go, to execute.

use std::convert::Infallible;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
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
            eprintln!("ring3: {error}");
            status as isize
        };
        let pid = clone(Box::new(body), &mut stack, NAMESPACES | pid, Some(libc::SIGCHLD))
            .map_err(io::Error::from)
            .because(|| "cannot make a network namespace for the command".into())?;
        let pid = Pid::from_raw(pid.as_raw()).ok_or(io::ErrorKind::NotFound);
        let pid = pid.map_err(io::Error::from).because(|| "cannot start a process".into())?;
        Ok(Self { pid, go })
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

    /// Sends it a signal.
    // syscalls(pasta): kill
    pub(super) fn signal(&self, signal: Signal) {
        // It may have ended.
        let _ = kill_process(self.pid, signal);
    }

    // syscalls(pasta): wait4
    /// Its exit status, if it has ended: 128 and the signal's number if a signal ended it.
    pub(super) fn status(&self) -> io::Result<Option<u8>> {
        Ok(waitpid(Some(self.pid), WaitOptions::NOHANG)?.and_then(|(_, status)| exit_status(status)))
    }
}

/// What a shell would say.
fn exit_status(status: WaitStatus) -> Option<u8> {
    let number = status.exit_status().or(status.terminating_signal().map(|signal| 128 + signal))?;
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

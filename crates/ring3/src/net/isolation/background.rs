//! Going to the background: a child goes on, and its parent ends when the child is ready.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::exit;

use nix::sched::{CloneFlags, unshare};
use rustix::fs::{Mode, OFlags, open};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, WaitOptions, setsid, waitpid};

use crate::net::{Because, NetError};

/// A process that is to go to the background, and is not ready yet.
#[derive(Debug)]
#[must_use = "somebody waits for it"]
pub struct Background {
    /// A byte says that it is ready; the parent waits for it.
    ready: OwnedFd,
    /// What the standard streams become.
    null: OwnedFd,
}

/// Goes on in a child process, in a PID namespace of its own. The parent waits until the child is ready
/// ([`Background::ready`]), writes the child's process identifier to `pid_file` and ends with status 0; or ends as
/// the child does, which has then said why.
///
/// # Errors
/// The process has several threads, or there are no processes or namespaces to be had.
pub fn split(pid_file: Option<File>) -> Result<Background, NetError> {
    let (wait, ready) = pipe_with(PipeFlags::CLOEXEC).because(|| "cannot make a pipe".into())?;
    let null = open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .because(|| "cannot open /dev/null".into())?;
    // For children; the process itself stays where it is.
    unshare(CloneFlags::CLONE_NEWPID)
        .map_err(io::Error::from)
        .because(|| "cannot make a PID namespace to isolate the process in".into())?;
    match fork().because(|| "cannot go to the background".into())? {
        None => {
            drop(wait);
            // It leads no group yet, so this works.
            let _ = setsid();
            Ok(Background { ready, null })
        }
        Some(child) => {
            drop(ready);
            exit(await_child(child, &wait, pid_file))
        }
    }
}

impl Background {
    // syscalls: dup2 dup3
    /// Everything is ready: lets the parent end, and the terminal go.
    ///
    /// # Errors
    /// The standard streams cannot be replaced.
    pub fn ready(self) -> Result<(), NetError> {
        let streams = [rustix::stdio::dup2_stdin, rustix::stdio::dup2_stdout, rustix::stdio::dup2_stderr];
        for stream in streams {
            stream(self.null.as_fd()).because(|| "cannot let go of the standard streams".into())?;
        }
        // The parent may have been ended; that is no reason to end.
        let _ = rustix::io::write(&self.ready, &[1]);
        Ok(())
    }
}

/// The parent's part: its exit status.
fn await_child(child: Pid, wait: &OwnedFd, pid_file: Option<File>) -> i32 {
    if matches!(rustix::io::retry_on_intr(|| rustix::io::read(wait, &mut [0])), Ok(1)) {
        return match write_pid(pid_file, child.as_raw_nonzero().get()) {
            Ok(()) => 0,
            Err(error) => {
                eprintln!("ring3: cannot write the PID file: {error}");
                1
            }
        };
    }
    let status = rustix::io::retry_on_intr(|| waitpid(Some(child), WaitOptions::empty()));
    status.ok().flatten().and_then(|(_, status)| status.exit_status()).unwrap_or(1)
}

/// Makes the file for a process identifier, while the process sees the host's files.
///
/// # Errors
/// It cannot be made.
pub fn pid_file(path: Option<&Path>) -> Result<Option<File>, NetError> {
    let create =
        |path: &Path| File::create(path).because(|| format!("cannot write the PID file {}", path.display()));
    path.map(create).transpose()
}

/// Writes a process identifier to the file that was asked for.
pub(crate) fn write_pid(file: Option<File>, pid: i32) -> io::Result<()> {
    file.map_or(Ok(()), |mut file| writeln!(file, "{pid}"))
}

/// Forks: `None` in the child. The process must have a single thread.
///
/// # Errors
/// It has several, or there are no processes to be had.
#[allow(unsafe_code, reason = "fork is unsafe in processes with several threads")]
pub(crate) fn fork() -> io::Result<Option<Pid>> {
    if fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::other("a process with several threads cannot fork"));
    }
    // SAFETY: this is the only thread, as was just seen, so nobody else can hold a lock or be in the middle of a change
    // that the child would find.
    match unsafe { nix::unistd::fork() }? {
        nix::unistd::ForkResult::Child => Ok(None),
        nix::unistd::ForkResult::Parent { child } => {
            Pid::from_raw(child.as_raw()).map(Some).ok_or_else(|| io::ErrorKind::NotFound.into())
        }
    }
}

//! Serving in the background, once everything is ready.
//!
//! The process that the user started starts itself once more, and waits: it ends with status 0 when the other one says
//! that it is ready, or with the other's status if that failed. The second process does all the work; what it says until
//! it is ready goes where the first one's output goes. It is started rather than forked, so that nothing in it is a
//! copy of something half-made.
//!
//! The two know each other by a pipe, which is the second one's standard input, and by a variable in its environment, which
//! names the first one's process.

use std::fs;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::fs::{Mode, OFlags};
use rustix::process::{getpid, getppid, setsid};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};

use super::{Because, NetError};

/// Names the process that waits.
const PARENT: &str = "RING3_BACKGROUND_OF";

/// What a process is to do.
#[derive(Debug)]
pub enum Place {
    /// Serve.
    Here(Here),
    /// End with this status: another process serves.
    Elsewhere(u8),
}

/// The process that serves, before it is ready.
#[derive(Debug)]
pub struct Here {
    background: bool,
}

/// Finds out whether this process is the one that serves; in the background, another is started.
///
/// # Errors
/// That cannot be started.
pub fn enter(foreground: bool) -> Result<Place, NetError> {
    if foreground {
        return Ok(Place::Here(Here { background: false }));
    }
    let parent = std::env::var(PARENT).ok().and_then(|text| text.parse().ok());
    if parent.is_some() && parent == getppid().map(|pid| pid.as_raw_nonzero().get()) {
        return Ok(Place::Here(Here { background: true }));
    }
    start().because(|| "cannot start the process for the background".into()).map(Place::Elsewhere)
}

/// Starts this program once more, and waits until it is ready or ends; the status to end with.
fn start() -> io::Result<u8> {
    let (mut ready, theirs) = io::pipe()?;
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_default();
    let mut child = Command::new("/proc/self/exe")
        .arg0(name)
        .args(arguments)
        .env(PARENT, getpid().to_string())
        .stdin(Stdio::from(theirs))
        .spawn()?;
    if ready.read(&mut [0])? > 0 {
        return Ok(0);
    }
    let status = child.wait()?;
    let number = status.code().or(status.signal().map(|signal| 128 + signal));
    Ok(number.and_then(|number| u8::try_from(number).ok()).unwrap_or(1))
}

impl Here {
    /// Everything is ready: writes the process's id to `pid_file`, leaves the terminal and lets the user go on.
    ///
    /// # Errors
    /// The file cannot be written, or /dev/null not be opened.
    pub fn ready(self, pid_file: Option<&Path>) -> Result<(), NetError> {
        if let Some(path) = pid_file {
            fs::write(path, format!("{}\n", getpid()))
                .because(|| format!("cannot write the process's id to {}", path.display()))?;
        }
        if !self.background {
            return Ok(());
        }
        self.leave().because(|| "cannot go to the background".into())
    }

    fn leave(self) -> io::Result<()> {
        // It fails for the leader of a process group, which is no terminal's then.
        let _ = setsid();
        let null = rustix::fs::open(c"/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        let waiting = io::stdin().as_fd().try_clone_to_owned()?;
        dup2_stdin(&null)?;
        dup2_stdout(&null)?;
        dup2_stderr(&null)?;
        // The user may have ended the other one: this one goes on.
        let _ = rustix::io::write(waiting, &[1]);
        Ok(())
    }
}

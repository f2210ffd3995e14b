//! Starting the command: streams, session, environment, and what a shell would say when it cannot run.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};

use guest_init::control::FromGuest;
use guest_init::spec::{Spec, Stream};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::Pid;

use crate::error::{Error, Result};
use crate::ports::Control;
use crate::sys;

/// The guest's terminal: console port 0.
const TERMINAL: &str = "/dev/hvc0";

/// A command that runs.
pub(crate) struct Started {
    /// The process, leader of its session and process group.
    pub(crate) pid: Pid,
    /// Our ends of its pipes: write end of standard input, read ends of output and error.
    pub(crate) pipes: [Option<OwnedFd>; 3],
    /// The terminal, if it has one.
    pub(crate) terminal: Option<File>,
}

/// Why a command does not run.
pub(crate) enum StartError {
    /// As a shell would say it, with the shell's status 126 or 127.
    NotRun(u8, String),
    /// The guest failed, not the command.
    Other(Error),
}

impl From<Error> for StartError {
    fn from(error: Error) -> Self {
        Self::Other(error)
    }
}

/// Starts the command of the spec; says `ready` on the control port right before.
pub(crate) fn start(spec: &Spec, control: &Control) -> std::result::Result<Started, StartError> {
    let Some((program, arguments)) = spec.argv.split_first() else {
        return Err(StartError::NotRun(127, "the command is empty".into()));
    };
    let shown = program.to_string_lossy().into_owned();
    if program.is_empty() {
        return Err(StartError::NotRun(127, "'': command not found".into()));
    }
    if let Err(error) = std::env::set_current_dir(&spec.workdir)
        && spec.workdir_required
    {
        return Err(Error::io("cannot start in directory", &spec.workdir)(error).into());
    }
    let mut command = Command::new(program);
    command.args(arguments).env_clear();
    for (name, value) in &spec.env {
        command.env(name, value);
    }
    let has_terminal = spec.streams.contains(&Stream::Terminal);
    let terminal = if has_terminal { Some(open_terminal()?) } else { None };
    if let (Some(terminal), Some((rows, columns))) = (&terminal, spec.winsize) {
        set_winsize(terminal, rows, columns);
    }
    let mut pipes = [None, None, None];
    let mut stdout_copy = None;
    for (index, (slot, stream)) in pipes.iter_mut().zip(spec.streams).enumerate() {
        let theirs: OwnedFd = match stream {
            Stream::Null => open("/dev/null")?.into(),
            Stream::Terminal => open_terminal()?.into(),
            Stream::Port | Stream::Stdout => match stdout_copy.take() {
                Some(copy) if stream == Stream::Stdout => copy,
                _ => {
                    let (read, write) =
                        pipe_with(PipeFlags::CLOEXEC).map_err(Error::errno("cannot make", "a pipe"))?;
                    let (ours, theirs) = if index == 0 { (write, read) } else { (read, write) };
                    rustix::io::ioctl_fionbio(&ours, true)
                        .map_err(Error::errno("cannot prepare", "a pipe"))?;
                    *slot = Some(ours);
                    theirs
                }
            },
        };
        if index == 1 {
            stdout_copy = Some(theirs.try_clone().map_err(Error::io("cannot duplicate", "stdout"))?);
        }
        let stdio = Stdio::from(theirs);
        match index {
            0 => command.stdin(stdio),
            1 => command.stdout(stdio),
            _ => command.stderr(stdio),
        };
    }
    drop(stdout_copy);
    sys::in_new_session(&mut command, has_terminal);
    control.send(&FromGuest::Ready)?;
    let child = command.spawn().map_err(|error| not_run(&shown, &error))?;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pid =
        pid.ok_or_else(|| Error::Relay("the command has no process id", io::ErrorKind::Other.into()))?;
    Ok(Started { pid, pipes, terminal })
}

fn open(path: &str) -> Result<File> {
    fs::OpenOptions::new().read(true).write(true).open(path).map_err(Error::io("cannot open", path))
}

/// Opens the terminal without making it ours.
fn open_terminal() -> Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let no_tty = rustix::fs::OFlags::NOCTTY.bits().cast_signed();
    fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(no_tty)
        .open(TERMINAL)
        .map_err(Error::io("cannot open the terminal", TERMINAL))
}

/// Sets the terminal's size; the kernel tells the foreground process group by `SIGWINCH`.
pub(crate) fn set_winsize(terminal: &File, rows: u16, columns: u16) {
    let size = rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // A wrong size is no reason to end a session.
    let _ = rustix::termios::tcsetwinsize(terminal, size);
}

/// The shell's words and status for a command that cannot be executed.
fn not_run(program: &str, error: &io::Error) -> StartError {
    match error.kind() {
        io::ErrorKind::NotFound if !program.contains('/') => {
            StartError::NotRun(127, format!("{program}: command not found"))
        }
        io::ErrorKind::NotFound => StartError::NotRun(127, format!("{program}: {error}")),
        _ => StartError::NotRun(126, format!("{program}: {error}")),
    }
}

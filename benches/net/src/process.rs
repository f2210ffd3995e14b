//! Child processes that end with their owner, and what the kernel accounts to them.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::Failure;

/// A child that is killed when dropped.
pub(crate) struct Guarded(pub(crate) Child);

impl Guarded {
    /// Starts a command that says nothing.
    pub(crate) fn quiet(command: &mut Command) -> Result<Self, Failure> {
        Self::start(command.stderr(Stdio::null()))
    }

    /// Starts a command whose complaints go to a file.
    pub(crate) fn logged(command: &mut Command, log: &Path) -> Result<Self, Failure> {
        Self::start(command.stderr(fs::File::create(log)?))
    }

    fn start(command: &mut Command) -> Result<Self, Failure> {
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let child =
            command.spawn().map_err(|e| format!("cannot start {}: {e}", command.get_program().display()))?;
        Ok(Self(child))
    }

    /// Its process id.
    pub(crate) fn id(&self) -> u32 {
        self.0.id()
    }

    /// Fails if it has ended.
    pub(crate) fn check(&mut self) -> Result<(), Failure> {
        match self.0.try_wait()? {
            Some(status) => Err(format!("it ended early: {status}").into()),
            None => Ok(()),
        }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // Both fail when it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a command to its end and returns what it wrote.
pub(crate) fn output(command: &mut Command) -> Result<String, Failure> {
    let program = command.get_program().display().to_string();
    let done = command.stdin(Stdio::null()).output().map_err(|e| format!("cannot start {program}: {e}"))?;
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    if !done.status.success() {
        let args: Vec<_> = command.get_args().map(|arg| arg.to_string_lossy().into_owned()).collect();
        let said = String::from_utf8_lossy(&done.stderr).into_owned() + &text;
        return Err(format!("{program} {}: {}: {}", args.join(" "), done.status, said.trim()).into());
    }
    Ok(text)
}

/// A process and its descendants.
pub(crate) fn tree(root: u32) -> Vec<u32> {
    let mut members = vec![root];
    let all: Vec<(u32, u32)> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|pid| Some((pid, stat_field(pid, 4)?.try_into().ok()?)))
        .collect();
    let mut next = 0;
    while let Some(&parent) = members.get(next) {
        members.extend(all.iter().filter(|(_, of)| *of == parent).map(|(pid, _)| *pid));
        next += 1;
    }
    members
}

/// A number in `/proc/PID/stat`, counted from one as in proc_pid_stat(5).
fn stat_field(pid: u32, field: usize) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the name in parentheses, which may hold anything.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(field.checked_sub(3)?)?.parse().ok()
}

/// Processor time of a process and its descendants, in seconds: user and system time of all their threads. What the
/// kernel does for them elsewhere (soft interrupts, kernel threads) is not in it.
pub(crate) fn processor_seconds(root: u32) -> f64 {
    let ticks: u64 =
        tree(root).into_iter().flat_map(|pid| [stat_field(pid, 14), stat_field(pid, 15)]).flatten().sum();
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}

/// Resident memory of a process and its descendants, in bytes.
pub(crate) fn resident_bytes(root: u32) -> f64 {
    let pages: u64 = tree(root).into_iter().filter_map(|pid| stat_field(pid, 24)).sum();
    pages as f64 * rustix::param::page_size() as f64
}

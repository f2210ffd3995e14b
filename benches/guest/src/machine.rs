//! The machines that are compared, and one run of one of them.
//!
//! A machine is a command whose standard output is the guest's serial console. The lines are given their time as
//! they arrive, by this process's clock. How much memory and processor time the machine took is what the kernel
//! accounts to its process when it is waited for.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use crate::{Failure, MEMORY, Options};

/// A machine that takes longer is stuck.
const LIMIT: Duration = Duration::from_secs(120);

/// A machine to measure.
pub(crate) struct Machine {
    /// The column's name.
    pub(crate) name: &'static str,
    program: OsString,
    arguments: Vec<OsString>,
}

impl Machine {
    /// A machine that is only a column's name.
    #[cfg(test)]
    pub(crate) fn named(name: &'static str) -> Self {
        Self { name, program: OsString::new(), arguments: Vec::new() }
    }
}

/// What one run gave. Times are in seconds, memory in MiB.
#[derive(Debug, Default)]
pub(crate) struct Sample {
    /// From the start of the process to the first line of user space.
    pub(crate) first_line: f64,
    /// Millions of instructions a second of the integer loop.
    pub(crate) integer: f64,
    /// All forks and execs.
    pub(crate) spawn: f64,
    /// One page-fault sweep.
    pub(crate) sweep: f64,
    /// From start to end.
    pub(crate) total: f64,
    /// Processor time, user and system.
    pub(crate) processor: f64,
    /// The most memory that the process had in use.
    pub(crate) peak: f64,
    /// Guest memory that the host had to give, where the machine tells.
    pub(crate) touched: Option<f64>,
    /// The guest's kernel command line, if it was asked for.
    pub(crate) command_line: Option<String>,
}

/// ring3 with `append` added to the command line.
pub(crate) fn ring3(
    options: &Options,
    initramfs: &Path,
    append: Option<&str>,
    name: &'static str,
) -> Machine {
    let mut arguments: Vec<OsString> = vec!["run".into(), "--stats".into(), "--cpus=1".into()];
    arguments.push(format!("--memory={MEMORY}M").into());
    arguments.extend(["--kernel".into(), options.kernel.as_os_str().to_owned()]);
    arguments.extend(["--initramfs".into(), initramfs.as_os_str().to_owned()]);
    arguments.extend(["--append".into(), format!("quiet {}", append.unwrap_or_default()).trim_end().into()]);
    Machine { name, program: options.ring3.as_os_str().to_owned(), arguments }
}

/// QEMU's TCG as a machine of the type `kind`.
pub(crate) fn qemu(
    options: &Options,
    initramfs: &Path,
    command_line: &str,
    kind: &str,
    name: &'static str,
) -> Machine {
    let words =
        "-accel tcg -cpu max -smp 1 -display none -nodefaults -no-user-config -no-reboot -serial stdio";
    let mut arguments: Vec<OsString> = vec!["-M".into(), kind.into(), "-m".into(), MEMORY.to_string().into()];
    arguments.extend(words.split_whitespace().map(OsString::from));
    arguments.extend(["-kernel".into(), options.kernel.as_os_str().to_owned()]);
    arguments.extend(["-initrd".into(), initramfs.as_os_str().to_owned()]);
    arguments.extend(["-append".into(), command_line.into()]);
    Machine { name, program: "qemu-system-x86_64".into(), arguments }
}

/// Runs the machine once, to the guest's power-off.
///
/// # Errors
/// When it cannot be started, says something unexpected, or does not get to the end.
pub(crate) fn run(machine: &Machine) -> Result<Sample, Failure> {
    let begin = Instant::now();
    let mut child = Command::new(&machine.program)
        .args(&machine.arguments)
        .stdin(File::open("/dev/null")?)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("{}: cannot start {}: {error}", machine.name, machine.program.display()))?;
    let (Some(stdout), Some(mut stderr)) = (child.stdout.take(), child.stderr.take()) else {
        return Err("no pipes".into());
    };
    let complaints = thread::spawn(move || {
        let mut text = Vec::new();
        let _ = stderr.read_to_end(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    });
    let (send, lines) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
            let _ = send.send((begin.elapsed(), String::from_utf8_lossy(&line).into_owned()));
        }
    });

    let mut log = Log::default();
    let stuck = loop {
        match lines.recv_timeout(LIMIT.saturating_sub(begin.elapsed())) {
            Ok((at, line)) => log.line(at.as_secs_f64(), &line),
            Err(RecvTimeoutError::Disconnected) => break false,
            Err(RecvTimeoutError::Timeout) => {
                // It may have ended by itself.
                let _ = child.kill();
                break true;
            }
        }
    };
    let (status, usage) = wait(&child)?;
    let total = begin.elapsed().as_secs_f64();
    let text = complaints.join().unwrap_or_default();
    let failed = |what: String| -> Failure {
        let (out, err) = (log.tail.join("\n  | "), text.trim_end().replace('\n', "\n  | "));
        format!("{}: {what}\n  | {out}\n  | {err}", machine.name).into()
    };
    if stuck {
        return Err(failed(format!("no end after {} s", LIMIT.as_secs())));
    }
    if !status.success() {
        return Err(failed(format!("{status}")));
    }
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    let mut sample = Sample {
        total,
        processor: seconds(usage.ru_utime) + seconds(usage.ru_stime),
        peak: usage.ru_maxrss as f64 / 1024.0,
        touched: text.lines().find_map(|line| {
            line.strip_prefix("guest memory in use")?.trim().split(' ').next()?.parse().ok()
        }),
        command_line: log.command_line.clone(),
        ..Sample::default()
    };
    if sample.command_line.is_some() {
        return Ok(sample);
    }
    if !log.done {
        return Err(failed("the guest did not get to its end".into()));
    }
    let part = |name: &str| {
        let found = log.parts.iter().find(|part| part.name == name);
        found.ok_or_else(|| failed(format!("no line for {name}")))
    };
    let integer = part("integer")?;
    sample.first_line = log.first_line;
    sample.integer = integer.units / integer.seconds / 1e6;
    sample.spawn = part("spawn")?.seconds;
    let sweep = part("sweep")?;
    sample.sweep = sweep.seconds / sweep.units;
    for part in &log.parts {
        // A clock that runs wrong makes a guest do other things than the other one does.
        if (part.guest_seconds - part.seconds).abs() > 0.05 + part.seconds * 0.05 {
            eprintln!(
                "bench-run: {}: {} took {:.3} s, but {:.3} s by the guest's clock",
                machine.name, part.name, part.seconds, part.guest_seconds
            );
        }
    }
    Ok(sample)
}

/// Waits for the process's end, and tells what it used.
fn wait(child: &Child) -> Result<(ExitStatus, libc::rusage), Failure> {
    let pid = libc::pid_t::try_from(child.id())?;
    let mut status = 0;
    // SAFETY: needed as a value to be overwritten; all zeroes is a valid `rusage`.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    loop {
        // SAFETY: needed because neither the standard library nor rustix returns the usage of one process; both
        // pointers are to live values of the right types, and the child has not been waited for by anyone else.
        if unsafe { libc::wait4(pid, &raw mut status, 0, &raw mut usage) } == pid {
            return Ok((ExitStatus::from_raw(status), usage));
        }
        let error = std::io::Error::last_os_error();
        if error.kind() != std::io::ErrorKind::Interrupted {
            return Err(error.into());
        }
    }
}

/// One measurement.
struct Part {
    name: String,
    seconds: f64,
    units: f64,
    guest_seconds: f64,
}

/// What the guest said so far.
#[derive(Default)]
struct Log {
    first_line: f64,
    begun: f64,
    parts: Vec<Part>,
    command_line: Option<String>,
    done: bool,
    tail: Vec<String>,
}

impl Log {
    fn line(&mut self, at: f64, line: &str) {
        let line = line.trim_end();
        if self.tail.len() == 10 {
            self.tail.remove(0);
        }
        self.tail.push(line.to_owned());
        // Firmware leaves escape sequences before it.
        let Some((_, said)) = line.split_once("bench: ") else { return };
        if let Some(text) = said.strip_prefix("cmdline ") {
            self.command_line = Some(text.to_owned());
            return;
        }
        let words: Vec<&str> = said.split_whitespace().collect();
        match words[..] {
            ["first", "line"] => self.first_line = at,
            ["begin", _] => self.begun = at,
            ["end", name, units, seconds] => {
                if let (Ok(units), Ok(guest_seconds)) = (units.parse(), seconds.parse()) {
                    let name = name.to_owned();
                    self.parts.push(Part { name, seconds: at - self.begun, units, guest_seconds });
                }
            }
            ["done"] => self.done = true,
            _ => {}
        }
    }
}

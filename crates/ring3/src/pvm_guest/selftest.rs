//! `ring3 pvm selftest`: boots the guest and judges its report.
//!
//! # Theory of operation
//! For each boot a machine runs on a thread of its own. Its serial port and its end come as events in one queue to the
//! calling thread, which shows lines, keeps the time, and stops a machine that takes too long. The guest is ring3's own
//! code and gets neither disk nor root: the process is not confined for it.

use std::fmt;
use std::io::{self, Write};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::thread;
use std::time::{Duration, Instant};

use machine::loader::{BootProtocol, ImageError, KernelImage};
use machine::power::{PowerEvent, Shutdown};
use machine::{Ended, GuestAbi, Machine, MachineConfig, MachineError, MachineHandle};

use super::report::Report;
use crate::cli::{Boot, SelftestArgs};

/// Pieces of output that may wait to be shown; then the guest waits.
const BACKLOG: usize = 64;

/// Why the selftest could not be done.
#[derive(Debug, thiserror::Error)]
pub enum SelftestError {
    /// The guest is no kernel: ring3 was built wrong.
    #[error("the guest that ring3 brings along cannot be used")]
    Guest(#[from] ImageError),
    /// No machine.
    #[error("cannot run the machine")]
    Machine(#[from] MachineError),
    /// No thread.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    /// Nothing is left to check.
    #[error("no check's name begins with {0}; `ring3 pvm selftest --list` prints the names")]
    NoCheck(String),
    /// Nobody takes the results.
    #[error("cannot write the results")]
    Output(#[from] io::Error),
}

/// One boot of the guest.
#[derive(Debug, Clone, Copy)]
struct Variant {
    boot: Boot,
    cpus: u32,
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let boot = match self.boot {
            Boot::Linux => "linux",
            Boot::Pvh => "pvh",
        };
        write!(f, "{boot}, {} vCPU{}", self.cpus, if self.cpus == 1 { "" } else { "s" })
    }
}

/// The boots that the options ask for.
fn variants(args: &SelftestArgs) -> Vec<Variant> {
    let (boots, cpus) = match (args.boot, args.cpus) {
        (boot, cpus) if args.list => (vec![boot.unwrap_or(Boot::Linux)], vec![cpus.unwrap_or(1)]),
        (boot, cpus) => (
            boot.map_or(vec![Boot::Linux, Boot::Pvh], |boot| vec![boot]),
            cpus.map_or(vec![1, 2], |cpus| vec![cpus]),
        ),
    };
    boots.iter().flat_map(|&boot| cpus.iter().map(move |&cpus| Variant { boot, cpus })).collect()
}

/// Boots `guest` in every way that the options ask for, and writes to `out` what came of it. Returns the exit status: 0
/// when every check passed, 1 when one did not or a guest did not get to its end.
///
/// # Errors
/// A [`SelftestError`] when ring3 or the host is at fault.
pub fn run(args: &SelftestArgs, guest: &[u8], out: &mut dyn Write) -> Result<u8, SelftestError> {
    let image = KernelImage::from_bytes(guest.to_vec())?;
    let variants = variants(args);
    let mut failed = 0;
    for &variant in &variants {
        if args.verbose {
            writeln!(out, "# {variant}")?;
        }
        let began = Instant::now();
        let (report, end) = boot(args, variant, &image, out)?;
        if let Some(only) = &args.only
            && report.is_empty()
        {
            return Err(SelftestError::NoCheck(only.clone()));
        }
        if args.list {
            for check in report.checks() {
                writeln!(out, "{}", check.name)?;
            }
            return Ok(u8::from(!report.is_complete()));
        }
        let mut problems = report.problems();
        problems.extend(end.problem(args.timeout));
        let (passed, skipped) = report.counts();
        write!(out, "{variant}: {passed} passed, {skipped} skipped")?;
        if problems.is_empty() {
            writeln!(out, " in {:.1} s", began.elapsed().as_secs_f64())?;
            continue;
        }
        failed += 1;
        writeln!(out, "; FAILED:")?;
        for problem in problems {
            writeln!(out, "  {problem}")?;
        }
    }
    match failed {
        0 => writeln!(out, "PVM selftest: all passed")?,
        failed => writeln!(out, "PVM selftest: {failed} of {} boots FAILED", variants.len())?,
    }
    out.flush()?;
    Ok(u8::from(failed > 0))
}

/// How a machine ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// By the guest's doing; and where, if it was a triple fault.
    Guest(PowerEvent, Option<Shutdown>),
    /// Its time was over.
    TimedOut,
}

impl End {
    /// Words for every end but the right one.
    fn problem(self, timeout: Duration) -> Option<String> {
        match self {
            Self::Guest(PowerEvent::PowerOff, _) => None,
            Self::Guest(event, at) => {
                let at = at.map_or_else(String::new, |at| format!(" ({at})"));
                Some(format!("the guest ended by {event}{at} in place of a power-off"))
            }
            Self::TimedOut => Some(format!(
                "the guest did not end within {} s (--timeout), and was stopped",
                timeout.as_secs_f64()
            )),
        }
    }
}

/// What a machine's thread tells.
enum Event {
    /// The guest's next words.
    Output(Vec<u8>),
    /// The machine is gone.
    Ended(Result<(Ended, Option<Shutdown>), MachineError>),
}

/// The serial port's far end.
struct SerialEnd(SyncSender<Event>);

impl Write for SerialEnd {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let sent = self.0.send(Event::Output(bytes.to_vec()));
        sent.map(|()| bytes.len()).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Boots the guest once.
fn boot(
    args: &SelftestArgs,
    variant: Variant,
    image: &KernelImage,
    out: &mut dyn Write,
) -> Result<(Report, End), SelftestError> {
    let (sender, events) = mpsc::sync_channel(BACKLOG);
    let mut machine = Machine::new(MachineConfig {
        memory: args.memory,
        cpus: variant.cpus,
        serial: Box::new(SerialEnd(sender.clone())),
        guest_abi: GuestAbi::Pvm,
        iommu: None,
    })?;
    let only = args.only.as_ref().map_or_else(String::new, |only| format!("only={only}"));
    machine.load(image, BootProtocol::from(variant.boot), None, &only)?;
    let handle = machine.handle();
    let run = move || {
        let result = machine.run().map(|(ended, stats)| (ended, stats.shutdowns.first().copied()));
        // Somebody listens until this comes.
        let _ = sender.send(Event::Ended(result));
    };
    let machine = thread::Builder::new().name("machine".into()).spawn(run).map_err(SelftestError::Thread)?;
    let watched = watch(args, &events, &handle, out);
    if let Err(panic) = machine.join() {
        std::panic::resume_unwind(panic);
    }
    watched
}

/// Follows a machine to its end.
fn watch(
    args: &SelftestArgs,
    events: &Receiver<Event>,
    handle: &MachineHandle,
    out: &mut dyn Write,
) -> Result<(Report, End), SelftestError> {
    let mut report = Report::default();
    let mut shown = Ok(());
    let mut timed_out = false;
    // An impossible instant is no deadline.
    let mut deadline = Instant::now().checked_add(args.timeout);
    loop {
        let event = match deadline {
            Some(deadline) => events.recv_timeout(deadline.saturating_duration_since(Instant::now())),
            None => events.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match event {
            Ok(Event::Output(bytes)) => {
                for line in report.push(&bytes) {
                    if args.verbose && shown.is_ok() {
                        shown = writeln!(out, "{line}");
                    }
                }
                if shown.is_err() {
                    handle.stop();
                }
            }
            Ok(Event::Ended(result)) => {
                let (ended, shutdown) = result?;
                let end = match ended {
                    Ended::Guest(event) if !timed_out => End::Guest(event, shutdown),
                    _ => End::TimedOut,
                };
                return Ok(shown.map(|()| (report, end))?);
            }
            Err(RecvTimeoutError::Timeout) => {
                timed_out = true;
                deadline = None;
                handle.stop();
            }
            // Its thread is gone without a word: it panicked, which the caller passes on.
            Err(RecvTimeoutError::Disconnected) => return Ok((report, End::TimedOut)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    use crate::cli::{Cli, PvmTask, Task};

    fn args(words: &[&str]) -> SelftestArgs {
        match Cli::parse_from(["ring3", "pvm", "selftest"].iter().chain(words)).command {
            Task::Pvm { task: PvmTask::Selftest(args) } => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn all_combinations_unless_told() {
        let names =
            |words: &[&str]| variants(&args(words)).iter().map(Variant::to_string).collect::<Vec<_>>();
        assert_eq!(names(&[]), ["linux, 1 vCPU", "linux, 2 vCPUs", "pvh, 1 vCPU", "pvh, 2 vCPUs"]);
        assert_eq!(names(&["--cpus", "3"]), ["linux, 3 vCPUs", "pvh, 3 vCPUs"]);
        assert_eq!(names(&["--boot", "pvh"]), ["pvh, 1 vCPU", "pvh, 2 vCPUs"]);
        assert_eq!(names(&["--list"]), ["linux, 1 vCPU"]);
        assert_eq!(names(&["--list", "--boot", "pvh", "--cpus", "2"]), ["pvh, 2 vCPUs"]);
    }
}

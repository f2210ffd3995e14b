//! The watch over one run: everything that happens, in one queue, acted on in one place.

use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use guest_init::control::{FromGuest, Lines, ToGuest};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH};
use signal_hook::iterator::{Handle, Signals};

use super::RunError;
use super::console::Console;
use super::spec::{Outcome, VmSpec};
use super::spinner::Spinner;
use super::terminal::{self, RawMode};
use super::vm::VmError;

/// Exit status of a run that `--timeout` ended, as with timeout(1).
const TIMED_OUT: u8 = 124;
/// After the command has ended, how long the guest may take to power off.
const POWER_OFF_GRACE: Duration = Duration::from_secs(10);
/// After SIGTERM on timeout, how long the command may take to end.
const TIMEOUT_GRACE: Duration = Duration::from_secs(2);
/// How long a machine may take to stop when told to.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// Something that happened.
enum Event {
    /// The guest's first process said something.
    Guest(FromGuest),
    /// The guest sent what no first process of ours sends.
    BadLine(String),
    /// This process got a signal.
    Signal(i32),
    /// The user typed the escape.
    Escape,
    /// The machine ended.
    Machine(Result<Outcome, VmError>),
}

/// Where the run stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The guest boots; there is no command to forward a signal to.
    Booting,
    /// The command runs.
    Running,
    /// The command has ended; the guest powers off.
    Ended,
    /// The machine was told to stop.
    Stopping,
}

/// How a run ended.
pub(super) struct End {
    /// What the guest said about the command.
    report: Option<FromGuest>,
    /// A line that made no sense, if that was the end.
    bad_line: Option<String>,
    /// How the machine ended; `None` when it did not stop in time.
    machine: Option<Result<Outcome, VmError>>,
    timed_out: bool,
    /// The signal that made us stop the machine.
    signal: Option<i32>,
}

/// One run under watch.
pub(super) struct Session {
    control: UnixStream,
    stop: OwnedFd,
    /// The guest has ended, though the machine may still be writing.
    off: Arc<AtomicBool>,
    spinner: Spinner,
    /// Where what is typed goes, until the command takes the terminal over.
    typed: Option<OwnedFd>,
    /// The terminal is the guest's.
    raw: Option<RawMode>,
    phase: Phase,
    signals_seen: u32,
    /// When the run's own time is over.
    deadline: Option<Instant>,
    /// When the patience of the present phase is over.
    grace: Option<Instant>,
    end: End,
    /// The control socket's end of file was seen: the guest says nothing more.
    silent: bool,
    sender: Sender<Event>,
    events: Receiver<Event>,
    signals: Handle,
}

impl Session {
    pub(super) fn new(
        control: UnixStream,
        stop: OwnedFd,
        off: Arc<AtomicBool>,
        spinner: Spinner,
        timeout: Option<Duration>,
        typed: Option<OwnedFd>,
    ) -> Result<Self, RunError> {
        let (sender, events) = mpsc::channel();
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGWINCH])
            .map_err(RunError::SetUp)?;
        let handle = signals.handle();
        let to = sender.clone();
        spawn("signals", move || {
            for signal in signals.forever() {
                if to.send(Event::Signal(signal)).is_err() {
                    return;
                }
            }
        })
        .map_err(RunError::SetUp)?;
        let reader = control.try_clone().map_err(RunError::SetUp)?;
        let to = sender.clone();
        spawn("control", move || read_control(reader, &to)).map_err(RunError::SetUp)?;
        // An impossible instant is no deadline.
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let end = End { report: None, bad_line: None, machine: None, timed_out: false, signal: None };
        Ok(Self {
            control,
            stop,
            off,
            spinner,
            typed,
            raw: None,
            phase: Phase::Booting,
            signals_seen: 0,
            deadline,
            grace: None,
            end,
            silent: false,
            sender,
            events,
            signals: handle,
        })
    }

    /// Starts the machine on its own thread.
    pub(super) fn start<F>(&self, launch: F, vm: VmSpec) -> io::Result<()>
    where
        F: FnOnce(VmSpec) -> Result<Outcome, VmError> + Send + 'static,
    {
        let to = self.sender.clone();
        spawn("machine", move || {
            let outcome = launch(vm);
            // Nobody listens any more when the watch gave up on us.
            let _ = to.send(Event::Machine(outcome));
        })
    }

    /// Gives the terminal to the guest. Until then it is as it was, so that Ctrl-C ends a boot.
    pub(super) fn hand_over_terminal(&mut self) -> io::Result<()> {
        let Some(typed) = self.typed.take() else { return Ok(()) };
        self.raw = Some(RawMode::enter()?);
        let to = self.sender.clone();
        terminal::pass_input(typed, move || {
            let _ = to.send(Event::Escape);
        })
    }

    /// Acts on events until the machine has ended, or does not stop when told to.
    pub(super) fn watch(mut self) -> End {
        loop {
            let event = match self.next_alarm() {
                Some(alarm) => self.events.recv_timeout(alarm.saturating_duration_since(Instant::now())),
                None => self.events.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match event {
                Ok(Event::Machine(result)) => {
                    self.end.machine = Some(result);
                    self.take_last_words();
                    break;
                }
                Ok(event) => self.act(event),
                Err(RecvTimeoutError::Timeout) => {
                    if self.phase == Phase::Stopping {
                        break;
                    }
                    self.alarm();
                }
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        self.spinner.clear();
        self.signals.close();
        self.end
    }

    /// The status may still be in the control socket when the machine is gone already: its thread reads up to the
    /// end of file that the machine's end leaves. Only that thread may be late.
    fn take_last_words(&mut self) {
        const PATIENCE: Duration = Duration::from_secs(10);
        while self.end.report.is_none() && !self.silent {
            match self.events.recv_timeout(PATIENCE) {
                Ok(event @ Event::Guest(_)) => self.act(event),
                Ok(Event::BadLine(line)) if line.is_empty() => return,
                Ok(_) => {}
                Err(_) => return,
            }
        }
    }

    fn next_alarm(&self) -> Option<Instant> {
        match (self.grace, self.deadline) {
            (Some(grace), _) => Some(grace),
            (None, deadline) => deadline,
        }
    }

    fn act(&mut self, event: Event) {
        match event {
            Event::Guest(FromGuest::Stage(stage)) => self.spinner.stage(&stage),
            Event::Guest(FromGuest::Ready) => {
                self.spinner.clear();
                if self.phase == Phase::Booting {
                    self.phase = Phase::Running;
                    // A terminal that cannot be made raw can still be used.
                    let _ = self.hand_over_terminal();
                    // The size may have changed while the guest booted.
                    self.send_size();
                }
            }
            Event::Guest(report) => {
                self.spinner.clear();
                // The first report counts: what follows can only be a confused guest.
                if self.end.report.is_none() {
                    self.end.report = Some(report);
                }
                if self.phase != Phase::Stopping {
                    self.phase = Phase::Ended;
                    self.grace = Instant::now().checked_add(POWER_OFF_GRACE);
                }
            }
            Event::BadLine(line) => {
                self.silent |= line.is_empty();
                if !line.is_empty() && self.end.report.is_none() {
                    self.end.bad_line = Some(line);
                    self.stop();
                }
            }
            Event::Escape => {
                self.end.signal.get_or_insert(SIGINT);
                self.stop();
            }
            Event::Signal(SIGWINCH) => self.send_size(),
            Event::Signal(signal) => self.signal(signal),
            Event::Machine(_) => {}
        }
    }

    /// The first signal is the command's, if there is one; the second is for us.
    fn signal(&mut self, signal: i32) {
        self.signals_seen += 1;
        let harmless = matches!(signal, SIGUSR1 | SIGUSR2);
        if self.phase == Phase::Running && (self.signals_seen == 1 || harmless) {
            if harmless {
                self.signals_seen -= 1;
            }
            self.send(&ToGuest::Signal(u8::try_from(signal).unwrap_or(0)));
        } else if !harmless {
            self.end.signal.get_or_insert(signal);
            self.stop();
        } else {
            self.signals_seen -= 1;
        }
    }

    /// A deadline or a grace period is over.
    fn alarm(&mut self) {
        if self.phase == Phase::Running && !self.end.timed_out {
            self.end.timed_out = true;
            self.send(&ToGuest::Signal(u8::try_from(SIGTERM).unwrap_or(0)));
            self.grace = Instant::now().checked_add(TIMEOUT_GRACE);
        } else if self.phase == Phase::Ended && self.off.load(Ordering::SeqCst) {
            // Whoever reads our output takes their time: that is theirs to decide.
            self.grace = None;
            self.deadline = None;
        } else {
            if self.phase == Phase::Booting {
                self.end.timed_out = true;
            }
            self.stop();
        }
    }

    fn stop(&mut self) {
        self.spinner.clear();
        if self.phase != Phase::Stopping {
            self.phase = Phase::Stopping;
            self.grace = Instant::now().checked_add(STOP_GRACE);
            // An eventfd that cannot be written has been raised already.
            let _ = rustix::io::write(&self.stop, &1_u64.to_ne_bytes());
        }
    }

    fn send_size(&mut self) {
        if self.raw.is_some()
            && self.phase == Phase::Running
            && let Some((rows, columns)) = terminal::size()
        {
            self.send(&ToGuest::Winsize(rows, columns));
        }
    }

    fn send(&mut self, message: &ToGuest) {
        // A machine that is gone needs no message. The socket's buffer holds thousands of them: a guest that
        // reads none must not block us.
        let line = format!("{message}\n");
        let _ = rustix::net::send(&self.control, line.as_bytes(), rustix::net::SendFlags::DONTWAIT);
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name(name.into()).spawn(body).map(drop)
}

/// Turns the control socket into events; the last is a bad line without text.
fn read_control(mut socket: UnixStream, to: &Sender<Event>) {
    let mut lines = Lines::default();
    let mut buffer = [0; 4096];
    'reading: loop {
        let count = match socket.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => break,
        };
        let Ok(lines) = lines.push(buffer.get(..count).unwrap_or_default()) else {
            let _ = to.send(Event::BadLine("(a line without end)".into()));
            break;
        };
        for line in lines {
            let event = FromGuest::parse(&line).map_or(Event::BadLine(format!("{line:?}")), Event::Guest);
            if to.send(event).is_err() {
                break 'reading;
            }
        }
    }
    let _ = to.send(Event::BadLine(String::new()));
}

impl End {
    /// The exit status, or the error that takes its place.
    pub(super) fn status(self, own_initramfs: bool, console: Console) -> Result<u8, RunError> {
        if self.timed_out {
            return Ok(TIMED_OUT);
        }
        if let Some(report) = self.report {
            return match report {
                FromGuest::Exit(status) => Ok(status),
                FromGuest::Signal(signal) => Ok(signal.saturating_add(128)),
                FromGuest::NotRun(status, why) => {
                    eprintln!("ring3: {}", printable(&why));
                    Ok(status)
                }
                FromGuest::Failed(reason) => Err(RunError::Guest {
                    reason: printable(&reason),
                    console: console.lines(self.machine.is_some()),
                }),
                FromGuest::Stage(_) | FromGuest::Ready => Ok(0),
            };
        }
        if let Some(signal) = self.signal {
            return Ok(u8::try_from(signal).unwrap_or(0).saturating_add(128));
        }
        let ended = self.machine.is_some();
        if let Some(line) = self.bad_line {
            return Err(RunError::Guest {
                reason: format!("its first process said {line}"),
                console: vec![],
            });
        }
        let outcome = match self.machine {
            Some(Err(error)) => return Err(error.into()),
            Some(Ok(Outcome::PowerOff | Outcome::Reset)) if !own_initramfs => return Ok(0),
            Some(Ok(Outcome::TimedOut)) => return Ok(TIMED_OUT),
            Some(Ok(outcome)) => Some(outcome),
            None => None,
        };
        let mut console = console.lines(ended);
        let triple_fault;
        let what = match outcome {
            Some(Outcome::Panic { console: lines }) => {
                if !lines.is_empty() {
                    console = lines;
                }
                "the guest's kernel panicked"
            }
            Some(Outcome::Reset) if console.iter().any(|line| line.contains("Kernel panic")) => {
                "the guest's kernel panicked"
            }
            Some(Outcome::PowerOff) => "the guest powered off before the command's end",
            Some(Outcome::Reset) => "the guest reset itself before the command's end",
            Some(Outcome::TripleFault(at)) => {
                triple_fault = match at {
                    Some(at) => format!("the guest's processor shut down (triple fault) {at}"),
                    None => "the guest's processor shut down (triple fault)".to_owned(),
                };
                &triple_fault
            }
            Some(Outcome::Interrupted | Outcome::TimedOut) => "the machine was interrupted",
            None => "the machine did not stop when told to",
        }
        .to_owned();
        // A guest alone has shown its console already.
        Err(if own_initramfs { RunError::Died { what, console } } else { RunError::Ended(what) })
    }
}

/// The guest's words without what could command the user's terminal.
fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).collect()
}

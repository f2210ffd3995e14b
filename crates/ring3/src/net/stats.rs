//! `--stats`: what the engine has counted, on standard error, when something has changed.

use std::fmt;
use std::io::{self, Write};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use usernet::Handle;
use usernet::stats::Stats;

/// A thread that prints statistics, until this is dropped.
#[derive(Debug)]
pub struct Printer {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Printer {
    /// Prints at most every `delay`, and nothing while nothing has changed.
    ///
    /// # Errors
    /// The host is out of threads.
    pub fn start(handle: Handle, delay: Duration) -> io::Result<Self> {
        Self::to(handle, delay, io::stderr())
    }

    fn to(handle: Handle, delay: Duration, mut out: impl Write + Send + 'static) -> io::Result<Self> {
        let (stop, stopped) = channel();
        let print = move || {
            let mut last = Stats::default();
            while stopped.recv_timeout(delay) == Err(RecvTimeoutError::Timeout) {
                let Ok(stats) = handle.stats() else { return };
                if stats != last {
                    // syscalls: write
                    // Nobody may be reading.
                    let _ = writeln!(out, "{}", Line(&stats, &last));
                    last = stats;
                }
            }
        };
        let thread = thread::Builder::new().name("stats".into()).spawn(print)?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Printer {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Statistics in one line: totals, and in brackets what came to them since the last one.
struct Line<'a>(&'a Stats, &'a Stats);

impl fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(now, last) = self;
        let mut total =
            |name: &str, now: u64, last: u64| write!(f, "{name} {now} (+{}) ", now.wrapping_sub(last));
        total("from guest: frames", now.frames_in, last.frames_in)?;
        total("bytes", now.bytes_in, last.bytes_in)?;
        total("dropped", now.dropped.total(), last.dropped.total())?;
        total("| to guest: frames", now.frames_out, last.frames_out)?;
        total("bytes", now.bytes_out, last.bytes_out)?;
        total("overruns", now.overruns, last.overruns)?;
        write!(f, "| flows: {} TCP, {} UDP, {} ping", now.tcp_flows, now.udp_flows, now.ping_flows)?;
        if now.evicted > 0 { write!(f, ", {} evicted", now.evicted) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_totals_and_what_is_new() {
        let last = Stats { frames_in: 10, bytes_in: 1000, ..Stats::default() };
        let mut now = Stats { frames_in: 12, bytes_in: 1600, tcp_flows: 3, ..last };
        now.dropped.checksum = 1;
        let line = Line(&now, &last).to_string();
        assert!(line.starts_with("from guest: frames 12 (+2) bytes 1600 (+600) dropped 1 (+1) |"), "{line}");
        assert!(line.ends_with("flows: 3 TCP, 0 UDP, 0 ping"), "{line}");
    }
}

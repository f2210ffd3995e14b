//! The log of `pasta` and `passt`: where `tracing`'s events go.
//!
//! - `--log-file`: to that file, which keeps its newest entries ([`file`]), each with the seconds since the start.
//! - In the foreground, and with `--debug`: not to the system's log.
//! - Else to that.
//!
//! And all of it to standard error, which becomes /dev/null when the process goes to the background: what `--debug` says from then
//! on is in a log file or nowhere, as upstream has it.
//!
//! Everything is open before the process isolates itself.

mod file;
mod syslog;

use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};

use tracing::{Metadata, Subscriber};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::time::Uptime;

use self::file::BoundedFile;
use self::syslog::Syslog;
use super::options::settings::{Level, Log};
use super::{Because, NetError};

/// Where entries go.
#[derive(Debug)]
enum Sink {
    File(Mutex<BoundedFile>),
    System(Syslog),
    Error,
}

/// Begins to log, for the whole process, under the name `name`.
///
/// # Errors
/// The log file cannot be made.
pub fn start(log: &Log, foreground: bool, name: &str) -> Result<(), NetError> {
    // Tests and libraries may have been first.
    let _ = tracing::subscriber::set_global_default(subscriber(log, foreground, name)?);
    Ok(())
}

fn subscriber(
    log: &Log,
    foreground: bool,
    name: &str,
) -> Result<Box<dyn Subscriber + Send + Sync>, NetError> {
    let sink = match &log.file {
        Some(path) => {
            let file = BoundedFile::create(path, log.size);
            Sink::File(Mutex::new(file.because(|| format!("cannot make the log file {}", path.display()))?))
        }
        None if foreground || log.level >= Level::Debug => Sink::Error,
        None => Syslog::connect(name).map_or(Sink::Error, Sink::System),
    };
    let level = match log.level {
        Level::Quiet => tracing::Level::WARN,
        Level::Normal => tracing::Level::INFO,
        Level::Debug => tracing::Level::DEBUG,
        Level::Trace => tracing::Level::TRACE,
    };
    let in_file = matches!(sink, Sink::File(_));
    let builder = tracing_subscriber::fmt()
        .with_writer(sink)
        .with_max_level(level)
        .with_ansi(false)
        .with_target(log.level >= Level::Debug)
        .with_level(in_file || log.level >= Level::Debug);
    Ok(if in_file {
        Box::new(builder.with_timer(Uptime::default()).finish())
    } else {
        Box::new(builder.without_time().finish())
    })
}

/// Writes one entry. The subscriber writes each at once.
struct Entry<'a> {
    sink: &'a Sink,
    level: tracing::Level,
}

impl<'a> MakeWriter<'a> for Sink {
    type Writer = Entry<'a>;

    fn make_writer(&'a self) -> Entry<'a> {
        Entry { sink: self, level: tracing::Level::INFO }
    }

    fn make_writer_for(&'a self, meta: &Metadata<'_>) -> Entry<'a> {
        Entry { sink: self, level: *meta.level() }
    }
}

impl Write for Entry<'_> {
    fn write(&mut self, entry: &[u8]) -> io::Result<usize> {
        match self.sink {
            // An entry that cannot be written is lost: there is nobody to tell.
            Sink::File(file) => drop(file.lock().unwrap_or_else(PoisonError::into_inner).append(entry)),
            Sink::System(log) => log.send(self.level, entry),
            Sink::Error => {}
        }
        let _ = io::stderr().write_all(entry);
        Ok(entry.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_file_has_what_its_level_lets_through() {
        let path = std::env::temp_dir().join(format!("ring3-log-{}", std::process::id()));
        for (level, expected) in [(Level::Quiet, &["bad"][..]), (Level::Debug, &["bad", "known", "detail"])] {
            let log = Log { level, file: Some(path.clone()), size: 4096 };
            tracing::subscriber::with_default(subscriber(&log, false, "passt").unwrap(), || {
                tracing::warn!("bad");
                tracing::info!("known");
                tracing::debug!("detail");
                tracing::trace!("packet");
            });
            let text = std::fs::read_to_string(&path).unwrap();
            assert_eq!(text.lines().count(), expected.len(), "{text}");
            assert!(text.lines().zip(expected).all(|(line, word)| line.ends_with(word)), "{text}");
        }
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_log_file_that_cannot_be_made_is_an_error() {
        let log = Log { level: Level::Normal, file: Some("/nowhere/at/all".into()), size: 4096 };
        let error = subscriber(&log, true, "pasta").err().unwrap().to_string();
        assert_eq!(error, "cannot make the log file /nowhere/at/all");
    }
}

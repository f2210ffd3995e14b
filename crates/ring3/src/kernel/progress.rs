//! What the user sees while a kernel is fetched: a bar on a terminal, one line elsewhere.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// A progress display on standard error.
#[derive(Debug)]
pub struct Progress {
    bar: Option<ProgressBar>,
}

impl Progress {
    /// One for this process's standard error.
    #[must_use]
    pub fn on_stderr() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner();
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        Self { bar }
    }

    /// Shows what is being done, of unknown length.
    pub fn stage(&self, what: &str) {
        if let Some(bar) = &self.bar {
            bar.set_style(ProgressStyle::default_spinner());
            bar.set_message(what.to_owned());
        }
    }

    /// Shows a download of `total` bytes (0: unknown).
    pub fn download(&self, what: &str, total: u64) {
        let Some(bar) = &self.bar else {
            eprintln!("ring3: {what} ({} MB)", total.div_ceil(1_000_000));
            return;
        };
        if let Ok(style) = ProgressStyle::with_template("{msg} [{bar:30}] {bytes}/{total_bytes} {eta}") {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_message(what.to_owned());
        bar.set_length(total);
        bar.set_position(0);
    }

    /// Bytes of the download that are there.
    pub fn at(&self, bytes: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(bytes);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

//! The boot stage on standard error, only where that is a terminal, and lines that go past it.

use std::fmt;
use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// A line that spins until the command's first output.
#[derive(Debug)]
pub struct Spinner(Option<ProgressBar>);

impl Spinner {
    /// Starts to spin, if standard error is a terminal and `wanted`.
    #[must_use]
    pub fn start(wanted: bool, stage: &str) -> Self {
        Self((wanted && std::io::stderr().is_terminal()).then(|| {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
                bar.set_style(style);
            }
            bar.set_message(stage.to_owned());
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        }))
    }

    /// Shows another stage. The text may come from the guest: control characters are dropped.
    pub fn stage(&self, stage: &str) {
        if let Some(bar) = &self.0 {
            bar.set_message(stage.chars().filter(|c| !c.is_control()).take(60).collect::<String>());
        }
    }

    /// Where other threads say what is worth a line of its own.
    #[must_use]
    pub fn notes(&self) -> Notes {
        Notes(self.0.clone())
    }

    /// Removes the line. Later calls do nothing.
    pub fn clear(&mut self) {
        if let Some(bar) = self.0.take() {
            bar.finish_and_clear();
        }
    }
}

/// ring3's own words on standard error, which do not run into the spinning line.
#[derive(Debug, Clone)]
pub struct Notes(Option<ProgressBar>);

impl Notes {
    /// Says one line.
    pub fn say(&self, text: fmt::Arguments<'_>) {
        let say = || eprintln!("ring3: {text}");
        match &self.0 {
            Some(bar) => bar.suspend(say),
            None => say(),
        }
    }
}

impl Drop for Spinner {
    fn drop(&mut self) {
        self.clear();
    }
}

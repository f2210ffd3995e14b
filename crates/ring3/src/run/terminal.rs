//! The user's terminal: raw while a command has it, as it was on every way out.
//!
//! In raw mode every key is the guest's, Ctrl-C included, so what is typed passes through here: Ctrl-] pressed
//! three times within a second (as in `systemd-nspawn`) ends the machine, however hung the guest is.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::stdio::stdin;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// What to restore. Global, because the panic hook has nothing else to find it by.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

/// Raw mode of standard input's terminal, until dropped.
#[derive(Debug)]
pub struct RawMode(());

impl RawMode {
    /// Enters raw mode.
    ///
    /// # Errors
    /// When standard input is not a terminal, or cannot be set.
    pub fn enter() -> io::Result<Self> {
        let mut settings = tcgetattr(stdin())?;
        if let Ok(mut saved) = SAVED.lock() {
            *saved = Some(settings.clone());
        }
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            restore();
            previous(info);
        }));
        settings.make_raw();
        tcsetattr(stdin(), OptionalActions::Drain, &settings)?;
        Ok(Self(()))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    // `try_lock`: a panic may come from a thread that holds it.
    if let Ok(mut saved) = SAVED.try_lock()
        && let Some(settings) = saved.take()
    {
        // A terminal that is gone needs no restoring.
        let _ = tcsetattr(stdin(), OptionalActions::Drain, &settings);
    }
}

/// Rows and columns of standard input's terminal.
#[must_use]
pub fn size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(stdin()).ok()?;
    (size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
}

/// Recognizes Ctrl-] typed three times within a second.
#[derive(Debug, Default)]
struct Escape {
    pressed: u8,
    since: Option<Instant>,
}

impl Escape {
    /// Takes what was typed at `now`; true when that completes the escape.
    fn push(&mut self, typed: &[u8], now: Instant) -> bool {
        const KEY: u8 = 0x1d;
        const TIMES: u8 = 3;
        const WITHIN: Duration = Duration::from_secs(1);
        for &byte in typed {
            let in_time = self.since.is_some_and(|since| now.duration_since(since) <= WITHIN);
            match (byte == KEY, in_time) {
                (true, true) => self.pressed += 1,
                (true, false) => (self.pressed, self.since) = (1, Some(now)),
                (false, _) => (self.pressed, self.since) = (0, None),
            }
            if self.pressed == TIMES {
                return true;
            }
        }
        false
    }
}

/// Passes what is typed on standard input to the machine until either end closes; `escaped` is called when the
/// user wants out.
///
/// # Errors
/// When no thread can be made.
pub fn pass_input(to: OwnedFd, escaped: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let mut from = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut to = File::from(to);
    let pass = move || {
        let mut escape = Escape::default();
        let mut buffer = [0; 4096];
        loop {
            let typed = match from.read(&mut buffer) {
                Ok(0) => return,
                Ok(count) => buffer.get(..count).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return,
            };
            if escape.push(typed, Instant::now()) {
                return escaped();
            }
            if to.write_all(typed).is_err() {
                return;
            }
        }
    };
    std::thread::Builder::new().name("terminal".into()).spawn(pass).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_presses_in_a_second_are_an_escape() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut escape = Escape::default();
        assert!(!escape.push(b"\x1d\x1d", at(0)));
        assert!(!escape.push(b"a\x1d", at(10)));
        assert!(!escape.push(b"\x1d", at(20)));
        assert!(escape.push(b"\x1d", at(900)));
        let mut slow = Escape::default();
        assert!(!slow.push(b"\x1d\x1d", at(0)));
        assert!(!slow.push(b"\x1d", at(1100)));
        assert!(!slow.push(b"\x1d", at(1200)));
        assert!(slow.push(b"\x1d", at(1300)));
    }
}

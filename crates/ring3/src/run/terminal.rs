//! The user's terminal: raw while a command has it, as it was on every way out.

use std::io;
use std::sync::Mutex;

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

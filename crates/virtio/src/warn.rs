//! Warnings that a guest can cause, at a bounded rate.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Warnings let through in one [`PERIOD`].
const BURST: u32 = 5;
const PERIOD: Duration = Duration::from_secs(10);

/// Logs warnings about what the guest does, at most [`BURST`] each [`PERIOD`].
#[derive(Debug)]
pub(crate) struct GuestWarnings {
    device: String,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    period_start: Instant,
    logged: u32,
    dropped: u64,
}

impl GuestWarnings {
    pub(crate) fn new(device: &str) -> Self {
        let state = State { period_start: Instant::now(), logged: 0, dropped: 0 };
        GuestWarnings { device: device.to_owned(), state: Mutex::new(state) }
    }

    /// Logs `what` or counts it as dropped.
    pub(crate) fn warn(&self, what: &dyn std::fmt::Display) {
        let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if state.period_start.elapsed() >= PERIOD {
            state.period_start = Instant::now();
            state.logged = 0;
        }
        if state.logged >= BURST {
            state.dropped += 1;
            return;
        }
        state.logged += 1;
        let dropped = std::mem::take(&mut state.dropped);
        drop(state);
        if dropped > 0 {
            tracing::warn!(device = %self.device, "{dropped} warnings about the guest not shown");
        }
        tracing::warn!(device = %self.device, "{what}");
    }
}

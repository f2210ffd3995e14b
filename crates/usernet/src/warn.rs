//! Warnings that a guest can cause, at a bounded rate.

use std::fmt::Display;
use std::time::{Duration, Instant};

/// Warnings let through in one [`PERIOD`].
const BURST: u32 = 5;
const PERIOD: Duration = Duration::from_secs(10);

/// Logs at most [`BURST`] warnings each [`PERIOD`].
#[derive(Debug, Default)]
pub(crate) struct Warnings {
    period_start: Option<Instant>,
    logged: u32,
    dropped: u64,
}

impl Warnings {
    /// Logs `what` or counts it as dropped.
    pub(crate) fn warn(&mut self, now: Instant, what: &dyn Display) {
        if self.period_start.is_none_or(|start| now.saturating_duration_since(start) >= PERIOD) {
            self.period_start = Some(now);
            self.logged = 0;
        }
        if self.logged >= BURST {
            self.dropped += 1;
            return;
        }
        self.logged += 1;
        let dropped = std::mem::take(&mut self.dropped);
        if dropped > 0 {
            tracing::warn!("{dropped} warnings about the guest's network not shown");
        }
        tracing::warn!("{what}");
    }
}

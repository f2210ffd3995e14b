//! What the benches measure by, and what of several runs they tell.

use rustix::time::{ClockId, clock_gettime};

/// The processor time of this thread.
pub(super) fn thread_seconds() -> f64 {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    now.tv_sec as f64 + now.tv_nsec as f64 * 1e-9
}

/// The one in the middle, or the upper of two.
pub(super) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

//! Whether a process has one thread only.

use std::{fs, os::unix::fs::MetadataExt, path::Path};

/// Whether the calling thread is the only one of its process that will ever run again.
///
/// A thread that was joined is counted and listed by the kernel a little longer. And a list of threads may be short when one of
/// them ends meanwhile, so it counts only when it has as many as the kernel counts.
pub(super) fn alone() -> bool {
    const ATTEMPTS: u32 = 64;
    const TASKS: &str = "/proc/self/task";
    let own = rustix::thread::gettid().as_raw_nonzero().to_string();
    let look = || {
        // Two for the directory itself, and one for each thread (proc_pid_task(5)).
        let count = fs::metadata(TASKS).ok()?.nlink().checked_sub(2)?;
        let tasks: Vec<_> = fs::read_dir(TASKS).ok()?.collect::<Result<_, _>>().ok()?;
        let others = || tasks.iter().filter(|task| task.file_name() != *own);
        (tasks.len() as u64 == count).then(|| others().all(|task| has_ended(&task.path())))
    };
    (0..ATTEMPTS).find_map(|_| look()).unwrap_or(false)
}

/// Whether the thread whose directory in `/proc` this is runs no code of the program's any more.
fn has_ended(task: &Path) -> bool {
    fs::read_to_string(task.join("stat")).map_or(true, |stat| is_ending(&stat))
}

/// The same of what proc_pid_stat(5) describes.
fn is_ending(stat: &str) -> bool {
    /// `PF_EXITING` of the kernel: the thread is on its way out, and does not come back.
    const EXITING: u32 = 4;
    // The name before may have anything in it; the flags are the ninth field of all.
    let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let flags = rest.split_ascii_whitespace().nth(6).and_then(|flags| flags.parse::<u32>().ok());
    flags.is_some_and(|flags| flags & EXITING != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_ends_is_known_by_its_flags() {
        let line = |state, flags| format!("7 (a) b 4 4 4 4) {state} 1 7 7 0 -1 {flags} 0 0 0 0");
        assert!(is_ending(&line('R', 0x0040_0044)));
        assert!(is_ending(&line('X', 0x0040_0044)));
        assert!(!is_ending(&line('S', 0x0040_0040)));
        assert!(!is_ending(""));
        assert!(!has_ended(Path::new("/proc/thread-self")));
    }
}

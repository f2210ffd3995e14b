//! Descriptors that the parent process left open.

use std::os::fd::RawFd;

/// The descriptors besides the standard streams that a process started with. None of them is ours: whatever the
/// command line names is opened anew, `/dev/fd/N` included.
#[derive(Debug)]
pub struct Inherited(Vec<RawFd>);

impl Inherited {
    /// Finds them. To be called before the process opens anything.
    #[must_use]
    pub fn find() -> Self {
        // The list names the descriptor that reads it, which is closed by the time of the second look.
        let numbers: Vec<RawFd> = std::fs::read_dir("/proc/self/fd")
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(|&fd| fd > 2)
            .collect();
        let is_open = |fd: &RawFd| std::fs::symlink_metadata(format!("/proc/self/fd/{fd}")).is_ok();
        Self(numbers.into_iter().filter(is_open).collect())
    }

    /// Closes them.
    pub(crate) fn close(self) {
        for fd in self.0 {
            // One that is closed already is what was wanted.
            let _ = nix::unistd::close(fd);
        }
    }
}

//! The unsafe part of the first process: what a child does between fork and exec.

use std::os::unix::process::CommandExt;
use std::process::Command;

/// Makes the command the leader of a new session; with `terminal`, its standard input (or whichever of its
/// first three descriptors is one) becomes the session's controlling terminal.
pub(crate) fn in_new_session(command: &mut Command, terminal: bool) {
    let set_up = move || {
        rustix::process::setsid()?;
        if terminal {
            let hvc = rustix::fs::open("/dev/hvc0", rustix::fs::OFlags::RDWR, rustix::fs::Mode::empty())?;
            rustix::process::ioctl_tiocsctty(&hvc)?;
        }
        Ok(())
    };
    // SAFETY: needed because the session must be made in the child. Between fork and exec of a process that
    // may have other threads only async-signal-safe calls are allowed: the closure makes four system calls
    // (setsid, open with a constant path, ioctl, close), allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(set_up);
    }
}

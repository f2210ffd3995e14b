//! The unsafe part of the first process: what a child does between fork and exec, and one ioctl.

use std::io;
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

/// Sets `IFF_UP` on the interface `lo`.
pub(crate) fn bring_up_loopback() -> io::Result<()> {
    use rustix::net::{AddressFamily, SocketType, socket};
    // Not a socket of std's: that would link the resolver into this binary.
    let socket = socket(AddressFamily::UNIX, SocketType::DGRAM, None)?;
    // SAFETY: needed to build a C structure with a union; all-zero bytes are a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    let fd = std::os::fd::AsRawFd::as_raw_fd(&socket);
    // SAFETY: needed because neither std nor rustix sets interface flags. SIOCSIFFLAGS reads one `ifreq`,
    // which lives across the call; the descriptor is an open socket.
    let result = unsafe { libc::ioctl(fd, libc::SIOCSIFFLAGS, &raw const request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

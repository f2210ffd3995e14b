//! What the process that serves a guest's network may still do.
//!
//! # Theory of operation
//! Whoever breaks out of the engine is code in this process. So before the first frame the process becomes nobody, who sees
//! nothing:
//!
//! 1. **User** ([`user`]). Root becomes nobody, or whom `--runas` names. The process moves to a user namespace of its own,
//!    or to the one that it serves: there it is root, which the further namespaces need, and has no power outside.
//! 2. **Background** ([`background`]). A process that does not stay in the foreground goes on as a child in a PID namespace
//!    of its own, where it sees no other process.
//! 3. **Files, IPC, names** ([`enclose`]). In mount, IPC and UTS namespaces of its own, its root directory is an empty,
//!    read-only file system. What it needs of the host's files is open by then. Programs that are started gain no rights
//!    (`no_new_privs`), and the process's memory is not for debuggers and core dumps.
//! 4. **Capabilities and system calls** ([`seal`]). No capability is left to it, and a filter lets through the calls alone that
//!    are tagged beside their use (`calls`). Threads that keep a capability for their one task are named there.
//!
//! The network namespace stays the host's: the engine's sockets are what it is for.
//!
//! **Failures.** What cannot be done ends the process before it serves anybody, with a message.
//!
//! Everything before step 4 is done by a process of one thread, since namespaces and capabilities belong to threads.

pub mod background;
mod calls;
mod root;
pub mod user;

use rustix::process::{DumpableBehavior, Pid, set_dumpable_behavior};
use rustix::thread::{CapabilitySet, set_no_new_privs};

use super::{Because, NetError};

pub use calls::Mode;
#[cfg(test)]
pub(crate) use calls::for_all_modes;

/// Step 3, for a process whose only thread is the caller. See `root::empty` for `chroot_fallback`.
///
/// # Errors
/// The system does not allow one of the measures.
pub fn enclose(chroot_fallback: bool) -> Result<(), NetError> {
    root::empty(chroot_fallback)?;
    set_no_new_privs(true).because(|| "cannot give up rights of other programs".into())?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .because(|| "cannot keep debuggers from the process".into())
}

/// Gives up what the calling thread, and threads that it starts later, may do beyond an ordinary user. Apart from low ports, for a
/// thread that listens to them in a namespace where it is root.
///
/// # Errors
/// The kernel does not do it.
pub fn drop_capabilities(keep_low_ports: bool) -> Result<(), NetError> {
    let keep = if keep_low_ports { CapabilitySet::NET_BIND_SERVICE } else { CapabilitySet::empty() };
    user::drop_capabilities(keep).because(|| "cannot give up capabilities".into())
}

/// Step 4, when everything is open: for all threads there are. Each has called [`drop_capabilities`] before. `command` is the
/// process that may be sent signals.
///
/// # Errors
/// The kernel does not do it.
pub fn seal(mode: Mode, command: Option<Pid>) -> Result<(), NetError> {
    calls::filter(mode, command)
        .map_err(std::io::Error::other)
        .because(|| "cannot filter system calls".into())
}

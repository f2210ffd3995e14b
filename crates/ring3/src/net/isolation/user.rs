//! Who the process is: an ordinary user, who is root in a user namespace that holds nothing.

use std::fs;
use std::io;

use nix::sched::{CloneFlags, unshare};
use rustix::process::{DumpableBehavior, getegid, geteuid, set_dumpable_behavior};

use crate::net::{Because, NetError};

/// Makes a user namespace in which the process is root, which gives it rights over what is made in there alone.
///
/// # Errors
/// The kernel or a security module does not let users make namespaces.
pub fn own_namespace() -> Result<(), NetError> {
    let (user, group) = (geteuid(), getegid());
    unshare(CloneFlags::CLONE_NEWUSER)
        .map_err(io::Error::from)
        .because(|| "cannot make a user namespace: the system may not allow its users to".into())?;
    let write = |file: &str, text: String| {
        fs::write(format!("/proc/self/{file}"), text).because(|| format!("cannot write /proc/self/{file}"))
    };
    write("uid_map", format!("0 {} 1", user.as_raw()))?;
    // Without CAP_SETGID outside, the kernel demands this of whoever maps groups (user_namespaces(7)).
    write("setgroups", "deny".into())?;
    write("gid_map", format!("0 {} 1", group.as_raw()))
}

/// Lets the process look at itself in /proc, which a change of user takes from it.
pub(crate) fn be_dumpable() -> Result<(), NetError> {
    set_dumpable_behavior(DumpableBehavior::Dumpable).because(|| "cannot make the process dumpable".into())
}

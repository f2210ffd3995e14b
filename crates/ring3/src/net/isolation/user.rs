//! Who the process is: an ordinary user, and root only in a user namespace that has power over nothing else.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid, User, setgid, setgroups, setuid};
use rustix::fs::{Mode, OFlags, fstat, open};
use rustix::process::{DumpableBehavior, getegid, geteuid, set_dumpable_behavior};
use rustix::thread::{
    CapabilitySet, CapabilitySets, LinkNameSpaceType, capabilities, move_into_link_name_space,
    set_capabilities, set_keep_capabilities,
};

use crate::net::options::settings::Identity;
use crate::net::{Because, NetError};

/// Who root becomes if nothing else is said.
const NOBODY: &str = "nobody";

/// Whether the process is the host's root. In another user namespace than the first one, root is some user of the host's.
#[must_use]
pub fn is_root() -> bool {
    let first = |map: String| map.split_ascii_whitespace().eq(["0", "0", "4294967295"]);
    geteuid().is_root() && fs::read_to_string("/proc/self/uid_map").is_ok_and(first)
}

/// Becomes `runas`; without it root becomes nobody, and others stay who they are. With `keep`, root's capabilities are
/// kept, for what is still to be set up.
///
/// # Errors
/// The process may not become who it is to be; or that is the host's root, whom no network is served as.
pub fn leave_root(runas: Option<Identity>, keep: bool) -> Result<(), NetError> {
    let identity = match runas {
        Some(identity) => identity,
        None if is_root() => nobody()?,
        None => return Ok(()),
    };
    let Identity { uid, gid } = identity;
    if (uid == 0 || gid == 0) && is_root() {
        return Err(io::Error::from(io::ErrorKind::PermissionDenied)).because(|| {
            "cannot serve a network with root's rights: give another user and group (--runas)".into()
        });
    }
    let already = (geteuid().as_raw(), getegid().as_raw()) == (uid, gid);
    set_keep_capabilities(keep).because(|| "cannot keep capabilities".into())?;
    let denied =
        || format!("cannot become user {uid}, group {gid}: that takes root, or CAP_SETUID and CAP_SETGID");
    match setgroups(&[]) {
        // Whoever made the user namespace that it is root of may not drop groups there, nor need that.
        Err(Errno::EPERM) if already => {}
        result => result.map_err(io::Error::from).because(denied)?,
    }
    setgid(Gid::from_raw(gid)).map_err(io::Error::from).because(denied)?;
    setuid(Uid::from_raw(uid)).map_err(io::Error::from).because(denied)?;
    if keep {
        // The change of user took them out of effect.
        let sets = capabilities(None).because(|| "cannot read capabilities".into())?;
        let sets = CapabilitySets { effective: sets.permitted, ..sets };
        set_capabilities(None, sets).because(|| "cannot keep capabilities".into())?;
    }
    be_dumpable()
}

fn nobody() -> Result<Identity, NetError> {
    let user = User::from_name(NOBODY).map_err(io::Error::from);
    let user = user.and_then(|user| user.ok_or_else(|| io::ErrorKind::NotFound.into()));
    let user = user.because(|| format!("cannot find the user {NOBODY}: name another one with --runas"))?;
    Ok(Identity { uid: user.uid.as_raw(), gid: user.gid.as_raw() })
}

/// Makes a user namespace in which the process is root, which gives it rights over what is made in there alone.
///
/// # Errors
/// The kernel or a security module does not let users make namespaces.
pub fn own_namespace() -> Result<(), NetError> {
    let (user, group) = (geteuid(), getegid());
    unshare(CloneFlags::CLONE_NEWUSER).map_err(io::Error::from).because(|| {
        "cannot make a user namespace: see user.max_user_namespaces, and what AppArmor or a container's own rules \
         say about it"
            .into()
    })?;
    be_dumpable()?;
    let write = |file: &str, text: String| {
        fs::write(format!("/proc/self/{file}"), text).because(|| format!("cannot write /proc/self/{file}"))
    };
    write("uid_map", format!("0 {} 1", user.as_raw()))?;
    // Without CAP_SETGID outside, the kernel demands this of whoever maps groups (user_namespaces(7)).
    write("setgroups", "deny".into())?;
    write("gid_map", format!("0 {} 1", group.as_raw()))
}

/// Joins the user namespace that `path` leads to, if it is not the present one already.
///
/// # Errors
/// It cannot be opened, or is not owned by this user.
pub fn join_namespace(path: &Path) -> Result<(), NetError> {
    let name = || format!("cannot open the user namespace {}", path.display());
    let present =
        open("/proc/self/ns/user", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).because(name)?;
    let wanted = open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).because(name)?;
    let identity = |fd| fstat(fd).map(|stat| (stat.st_dev, stat.st_ino)).because(name);
    // Joining where one is already is an error (setns(2)).
    if identity(present.as_fd())? == identity(wanted.as_fd())? {
        return Ok(());
    }
    move_into_link_name_space(wanted.as_fd(), Some(LinkNameSpaceType::User))
        .because(|| format!("cannot join the user namespace {}: is it another user's?", path.display()))?;
    be_dumpable()
}

/// Gives up what the thread may do beyond an ordinary user, apart from `keep`.
pub(super) fn drop_capabilities(keep: CapabilitySet) -> io::Result<()> {
    let has = capabilities(None)?;
    let keep = CapabilitySets {
        effective: has.permitted & keep,
        permitted: has.permitted & keep,
        inheritable: CapabilitySet::empty(),
    };
    Ok(set_capabilities(None, keep)?)
}

/// Lets the process look at itself in /proc, which a change of user or namespace takes from it.
fn be_dumpable() -> Result<(), NetError> {
    set_dumpable_behavior(DumpableBehavior::Dumpable).because(|| "cannot make the process dumpable".into())
}

//! A root directory with nothing in it.

use std::io;

use nix::sched::{CloneFlags, unshare};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount};
use rustix::process::{chdir, chroot, pivot_root};

use crate::net::{Because, NetError};

/// Where the empty file system is mounted before it becomes the root: the first of these that exists.
const PLACES: [&str; 4] = ["/tmp", "/run", "/var", "/dev"];

/// Moves the process, whose only thread is the caller, into mount, IPC and UTS namespaces of its own, in which there are no
/// files. What is open stays open. With `chroot_fallback`, chroot(2) will do where the root is of a kind that
/// pivot_root(2) cannot replace.
pub(super) fn empty(chroot_fallback: bool) -> Result<(), NetError> {
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS)
        .map_err(io::Error::from)
        .because(|| "cannot make mount, IPC and UTS namespaces to isolate the process in".into())?;
    // Nothing of what follows is for others to see, and nothing of what others mount is for us.
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .because(|| "cannot make mounts private".into())?;
    let place =
        mount_nothing().because(|| format!("cannot mount an empty file system at {}", PLACES.join(", ")))?;
    chdir(place).because(|| format!("cannot enter the empty file system at {place}"))?;
    match pivot_root(".", ".") {
        Ok(()) => {}
        Err(Errno::INVAL) if chroot_fallback => {
            chroot(".").because(|| "cannot change the root directory".into())?;
            return chdir("/").because(|| "cannot enter the empty root directory".into());
        }
        Err(error) => {
            return Err(error).because(|| match error {
                Errno::INVAL => {
                    "cannot replace the root directory, as where it is an initramfs: --chroot-fallback \
                                 does with less"
                        .into()
                }
                _ => "cannot replace the root directory".into(),
            });
        }
    }
    // The old root lies above the new one now (pivot_root(2)).
    unmount(".", UnmountFlags::DETACH).because(|| "cannot unmount the old root directory".into())?;
    chdir("/").because(|| "cannot enter the empty root directory".into())
}

fn mount_nothing() -> io::Result<&'static str> {
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let mut error = Errno::NOENT;
    for place in PLACES {
        match mount(c"none", place, c"tmpfs", flags, Some(c"nr_inodes=2,size=0,mode=0555")) {
            Ok(()) => return Ok(place),
            Err(other) => error = other,
        }
    }
    Err(error.into())
}

//! File systems: the kernel's own, the overlay root, and what user space expects around them.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, symlink};
use std::path::Path;

use guest_init::spec::{ROOT_TAG, Root, Spec};
use rustix::mount::{MountFlags, mount, mount_move};

use crate::error::{Error, Result};

/// Mounts devtmpfs, proc and sysfs in the initramfs.
pub(crate) fn kernel_file_systems() -> Result<()> {
    attach("devtmpfs", "devtmpfs", "/dev", MountFlags::NOSUID, "mode=0755")?;
    attach("proc", "proc", "/proc", MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV, "")?;
    attach("sysfs", "sysfs", "/sys", MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV, "")
}

/// Makes the host's directory, under a tmpfs overlay, the root of this process.
pub(crate) fn host_root(spec: &Spec) -> Result<()> {
    attach(ROOT_TAG, "virtiofs", "/lower", MountFlags::RDONLY | MountFlags::NOATIME, "")?;
    attach("tmpfs", "tmpfs", "/overlay", MountFlags::empty(), "mode=0755,size=75%")?;
    for dir in ["/overlay/upper", "/overlay/work"] {
        make_dir(dir, 0o755)?;
    }
    let layers = "lowerdir=/lower,upperdir=/overlay/upper,workdir=/overlay/work";
    attach("ring3", "overlay", "/newroot", MountFlags::NOATIME, layers)?;
    for name in ["dev", "proc", "sys"] {
        let to = format!("/newroot/{name}");
        make_dir(&to, 0o755)?;
        mount_move(format!("/{name}"), &to).map_err(Error::errno("cannot move a mount to", &to))?;
    }
    // The initramfs is the root of the mount tree and cannot be pivoted away; moving the new root over it is
    // what switch_root does.
    std::env::set_current_dir("/newroot").map_err(Error::io("cannot enter", "/newroot"))?;
    mount_move(".", "/").map_err(Error::errno("cannot move the new root to", "/"))?;
    rustix::process::chroot(".").map_err(Error::errno("cannot change the root to", "/newroot"))?;
    std::env::set_current_dir("/").map_err(Error::io("cannot enter", "/"))?;
    // The host's /run speaks of the host's services. Where the command is to start there, it must stay.
    if !spec.workdir.starts_with("/run/") {
        attach("tmpfs", "tmpfs", "/run", MountFlags::NOSUID | MountFlags::NODEV, "mode=0755,size=20%")?;
    }
    Ok(())
}

/// Mounts and links what programs expect besides the root: pseudo-terminals, shared memory, `/tmp`.
pub(crate) fn user_file_systems(spec: &Spec) -> Result<()> {
    let safe = MountFlags::NOSUID | MountFlags::NODEV;
    attach(
        "devpts",
        "devpts",
        "/dev/pts",
        MountFlags::NOSUID | MountFlags::NOEXEC,
        "gid=5,mode=620,ptmxmode=666",
    )?;
    attach("tmpfs", "tmpfs", "/dev/shm", safe, "mode=1777")?;
    for (target, link) in [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ] {
        // devtmpfs or an earlier link may have it already.
        let _ = symlink(target, link);
    }
    // Control groups are a service to the command, not a need.
    let _ = mount("cgroup2", "/sys/fs/cgroup", "cgroup2", safe | MountFlags::NOEXEC, c"nsdelegate");
    if spec.root == Root::Initramfs {
        make_dir("/run", 0o755)?;
    }
    make_dir("/tmp", 0o1777)
}

/// Lets `modprobe` find the running kernel's modules where the guest's root lacks them.
pub(crate) fn link_module_tree(tree: &Path) {
    let release = rustix::system::uname();
    let link = Path::new("/lib/modules").join(release.release().to_string_lossy().as_ref());
    if link.exists() || !tree.exists() {
        return;
    }
    let _ = fs::create_dir_all("/lib/modules");
    // Only modprobe in the guest misses it.
    if let Err(error) = symlink(tree, &link) {
        eprintln!("guest-init: cannot link {} to {}: {error}", link.display(), tree.display());
    }
}

fn attach(source: &str, kind: &str, target: &str, flags: MountFlags, options: &str) -> Result<()> {
    make_dir(target, 0o755)?;
    let options = std::ffi::CString::new(options).unwrap_or_default();
    match mount(source, target, kind, flags, options.as_c_str()) {
        // A kernel may have mounted devtmpfs by itself.
        Ok(()) | Err(rustix::io::Errno::BUSY) => Ok(()),
        Err(errno) => {
            let what = match kind {
                "virtiofs" => "cannot mount the host's directory (virtio-fs) on",
                "overlay" => "cannot mount the overlay on",
                "devtmpfs" => "cannot mount devtmpfs on",
                _ => "cannot mount a file system on",
            };
            Err(Error::errno(what, target)(errno))
        }
    }
}

/// Makes a directory if it is missing. The mode is exact: it does not go through the umask.
fn make_dir(path: &str, mode: u32) -> Result<()> {
    match fs::DirBuilder::new().mode(mode).create(path) {
        Ok(()) => fs::set_permissions(path, fs::Permissions::from_mode(mode))
            .map_err(Error::io("cannot set the mode of", path)),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(Error::io("cannot make directory", path)(error)),
    }
}

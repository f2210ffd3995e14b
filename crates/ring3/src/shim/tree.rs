//! Where the library keeps the files of sysfs that it serves, and what becomes of those that nobody removed.
//!
//! A program's tree is removed by the program when it exits (`tree` of crate `shim`). What is killed removes nothing: a signal that
//! ends the program leaves the tree behind. So who makes a new one looks for such trees first. Whose a tree is its name says, by what
//! no other process of this machine is called until it is started anew: the process's number, when it was started, in which
//! namespace the number is meant, and which start of the machine that was.

use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// What all names begin with.
const PREFIX: &str = "ring3-shim-";

/// Where a process's number means that process.
#[derive(Clone, Debug, PartialEq, Eq)]
struct World {
    /// The first digits of the identifier that the kernel made when it was started (random(4)).
    boot: String,
    /// The inode of the PID namespace.
    namespace: u64,
}

impl World {
    /// Ours; none without a /proc.
    fn own() -> Option<Self> {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        let (boot, _) = boot.split_once('-')?;
        Some(Self { boot: boot.to_owned(), namespace: fs::metadata("/proc/self/ns/pid").ok()?.ino() })
    }
}

/// A process.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Owner {
    world: World,
    pid: u32,
    /// In clock ticks since the machine was started.
    started: u64,
}

impl Owner {
    fn this(world: World) -> Option<Self> {
        let pid = std::process::id();
        // A /proc of another namespace does not know us by our number.
        let same = fs::read_link("/proc/self").ok()?.to_str()?.parse() == Ok(pid);
        Some(Self { world, pid, started: started(pid)? }).filter(|_| same)
    }

    /// A new name for a tree of this process's.
    fn name(&self) -> String {
        let Self { world: World { boot, namespace }, pid, started } = self;
        let random = RandomState::new().hash_one(pid);
        format!("{PREFIX}{pid}-{started}-{namespace}-{boot}-{random:016x}")
    }

    /// Whose tree has this name.
    fn of(name: &str) -> Option<Self> {
        let mut parts = name.strip_prefix(PREFIX)?.split('-');
        let mut next = || parts.next();
        let (pid, started) = (next()?.parse().ok()?, next()?.parse().ok()?);
        let (namespace, boot) = (next()?.parse().ok()?, next()?.to_owned());
        next()?;
        Some(Self { world: World { boot, namespace }, pid, started })
    }

    /// Whether it has ended, as far as `world` can tell.
    fn has_ended(&self, world: &World) -> bool {
        self.world == *world && started(self.pid) != Some(self.started)
    }
}

/// When a process was started that has not ended (proc_pid_stat(5)).
fn started(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name before may have anything in it.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    let alive = !matches!(fields.next()?, "Z" | "X");
    fields.nth(18)?.parse().ok().filter(|_| alive)
}

/// A new name for a tree of this process's, and of the program that it becomes.
pub(super) fn name() -> String {
    let own = World::own().and_then(Owner::this).map(|owner| owner.name());
    own.unwrap_or_else(|| {
        let pid = std::process::id();
        format!("{PREFIX}{pid}-{:016x}", RandomState::new().hash_one(pid))
    })
}

/// Removes the trees in `directory` that are this user's, and whose processes have ended. What cannot be removed stays.
pub(super) fn sweep(directory: &Path) {
    let Some(world) = World::own() else { return };
    let user = rustix::process::geteuid().as_raw();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let owner = entry.file_name().to_str().and_then(Owner::of);
        let ours = || entry.metadata().is_ok_and(|about| about.is_dir() && about.uid() == user);
        if owner.is_some_and(|owner| owner.has_ended(&world)) && ours() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn only_trees_of_ended_processes_are_removed() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let world = World::own().unwrap();
        let pid = child.id();
        let owner = Owner { world: world.clone(), pid, started: started(pid).unwrap() };
        let tree = owner.name();
        assert_eq!(Owner::of(&tree), Some(owner.clone()));
        let named = |world, started| Owner { world, started, ..owner.clone() }.name();
        let elsewhere = named(World { namespace: 1, ..world.clone() }, 0);
        let once = named(World { boot: "0".to_owned(), ..world.clone() }, 0);
        // A process that had the child's number before it, and names that only look like trees.
        let before = named(world, owner.started - 1);
        let mine = name();
        for name in [&tree, &elsewhere, &once, &before, &mine, "ring3-shim-1-2", "ring3-shim", "other"] {
            fs::create_dir(at(name)).unwrap();
            fs::write(at(name).join("file"), "").unwrap();
        }
        let link = format!("{before}0");
        symlink(at("other"), at(&link)).unwrap();
        let left = || {
            let mut names: Vec<_> =
                fs::read_dir(directory.path()).unwrap().collect::<Result<_, _>>().unwrap();
            names.sort_by_key(fs::DirEntry::file_name);
            names.into_iter().map(|entry| entry.file_name().into_string().unwrap()).collect::<Vec<_>>()
        };
        let mut kept = [&tree, &elsewhere, &once, &mine, &link, "ring3-shim-1-2", "ring3-shim", "other"];
        kept.sort_unstable();
        sweep(directory.path());
        assert_eq!(left(), kept);
        assert!(at("other").join("file").exists());
        // It has ended, and nobody has waited for it.
        drop(child.stdin.take());
        while started(pid).is_some() {
            std::thread::yield_now();
        }
        sweep(directory.path());
        assert_eq!(left(), kept.into_iter().filter(|name| *name != tree).collect::<Vec<_>>());
        child.wait().unwrap();
    }
}

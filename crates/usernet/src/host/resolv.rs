//! The host's resolvers, from resolv.conf(5), also for a process that cannot see the host's files any more.
//!
//! `/etc/resolv.conf` is a file that is replaced by another, or a symbolic link to one, or itself a mount that a container engine
//! made. A process that has given up its view of the file system cannot follow a path; it has kept the directories
//! where such files are ([`ResolvConf::open`]), and reading follows links from one of these to the next by name
//! ([`ResolvConf::read`]). A file that is a mount cannot be replaced, and would be missed in a directory whose mounts
//! are gone: that file itself is kept.

use std::ffi::OsStr;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags, openat, readlinkat, statx};
use rustix::io::Errno;

/// Where everybody looks.
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// Where programs that write it keep it, so that it can be a link to there one day.
const DIRECTORIES: [&str; 5] =
    ["/etc", "/run/systemd/resolve", "/run/NetworkManager", "/run/resolvconf", "/run/connman"];

/// Links that lead to each other, at most.
const MOST_LINKS: usize = 8;

/// What is read of the file at most.
const MOST: usize = 64 << 10;

/// The contents of resolv.conf.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Resolvers {
    pub(crate) servers: Vec<IpAddr>,
    pub(crate) search: Vec<String>,
}

impl Resolvers {
    /// Reads resolv.conf(5). Lines that make no sense are passed over, as the C library does.
    pub(crate) fn parse(text: &str) -> Self {
        let mut resolvers = Self::default();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") => {
                    // An address with an interface is link-local: out of the guest's reach.
                    let address: Option<IpAddr> = words.next().and_then(|word| word.parse().ok());
                    let local = |a: &IpAddr| matches!(a, IpAddr::V6(a) if a.is_unicast_link_local());
                    resolvers.servers.extend(address.filter(|a| !local(a)));
                }
                // The last of them counts.
                Some("search" | "domain") => resolvers.search = words.map(str::to_owned).collect(),
                _ => {}
            }
        }
        resolvers.search.retain(|domain| domain != ".");
        resolvers
    }
}

#[derive(Debug)]
struct Directory {
    path: PathBuf,
    fd: OwnedFd,
}

/// The way to resolv.conf.
#[derive(Debug)]
pub(crate) struct ResolvConf {
    start: PathBuf,
    directories: Vec<Directory>,
    /// The file, if it is a mount.
    mount: Option<OwnedFd>,
}

impl ResolvConf {
    /// Opens the directories that it may be in.
    pub(crate) fn open() -> Self {
        Self::open_at(Path::new(RESOLV_CONF), &DIRECTORIES.map(Path::new))
    }

    fn open_at(start: &Path, directories: &[&Path]) -> Self {
        let mut this = Self { start: start.to_owned(), directories: Vec::new(), mount: None };
        directories.iter().for_each(|path| this.keep(path));
        // Those that it is in now are kept under the names that lead there.
        let mut path = start.to_owned();
        for _ in 0..MOST_LINKS {
            if let Some(parent) = path.parent() {
                this.keep(parent);
            }
            match readlinkat(CWD, &path, Vec::new()) {
                Ok(target) => path = followed(&path, OsStr::from_bytes(target.as_bytes())),
                Err(_) => break,
            }
        }
        this.mount = path.parent().and_then(|parent| mounted(&path, parent));
        this
    }

    fn keep(&mut self, path: &Path) {
        if self.directory(path).is_none()
            && let Ok(fd) =
                openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        {
            self.directories.push(Directory { path: path.to_owned(), fd });
        }
    }

    fn directory(&self, path: &Path) -> Option<&Directory> {
        self.directories.iter().find(|directory| directory.path == path)
    }

    /// The directories to watch for changes, and the file, if it is a mount.
    pub(crate) fn places(&self) -> Vec<&Path> {
        let file = self.mount.as_ref().map(|_| self.start.as_path());
        self.directories.iter().map(|directory| directory.path.as_path()).chain(file).collect()
    }

    /// Whether a change of the file with this name in one of [`Self::places`] matters.
    pub(crate) fn is_concerned(name: &[u8]) -> bool {
        // Also stub-resolv.conf and the like.
        name.ends_with(b"resolv.conf")
    }

    /// Reads the file as it is now.
    ///
    /// # Errors
    /// It is not there, or is in a directory that was not kept.
    // syscalls: openat readlinkat pread64 close
    pub(crate) fn read(&self) -> io::Result<Resolvers> {
        if let Some(mount) = &self.mount {
            return contents(mount);
        }
        let mut path = self.start.clone();
        for _ in 0..MOST_LINKS {
            let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { break };
            let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOFOLLOW;
            let Some(directory) = self.directory(parent) else {
                // Where the host's files are in sight still.
                return contents(&openat(CWD, &path, flags - OFlags::NOFOLLOW, Mode::empty())?);
            };
            match openat(&directory.fd, name, flags, Mode::empty()) {
                Ok(fd) => return contents(&fd),
                Err(Errno::LOOP) => {
                    let target = readlinkat(&directory.fd, name, Vec::new())?;
                    path = followed(&path, OsStr::from_bytes(target.as_bytes()));
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(Errno::LOOP.into())
    }
}

fn contents(fd: &OwnedFd) -> io::Result<Resolvers> {
    let mut bytes = vec![0; MOST];
    let mut length = 0;
    while let Some(rest) = bytes.get_mut(length..).filter(|rest| !rest.is_empty()) {
        match rustix::io::pread(fd, rest, length as u64) {
            Ok(0) => break,
            Ok(read) => length += read,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    bytes.truncate(length);
    Ok(Resolvers::parse(&String::from_utf8_lossy(&bytes)))
}

/// The path that the symbolic link at `path` leads to, without `.` and `..`.
fn followed(path: &Path, target: &OsStr) -> PathBuf {
    let mut result = PathBuf::new();
    for part in path.parent().unwrap_or(path).join(target).components() {
        match part {
            Component::ParentDir => {
                result.pop();
            }
            Component::CurDir => {}
            part => result.push(part),
        }
    }
    result
}

/// The file, if it is a mount in its directory.
fn mounted(file: &Path, parent: &Path) -> Option<OwnedFd> {
    let mount = |path: &Path| Some(statx(CWD, path, AtFlags::empty(), StatxFlags::MNT_ID).ok()?.stx_mnt_id);
    if mount(file)? == mount(parent)? {
        return None;
    }
    openat(CWD, file, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty()).ok()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn resolv_conf_is_read_as_the_c_library_does() {
        let text = "# comment\n; another\n\nnameserver\nnameserver nonsense\nnameserver fe80::1%eth0\n\
                    nameserver fe80::1\n\tnameserver 192.0.2.1 trailing\noptions ndots:5\ndomain one.example\n\
                    search two.example  three.example .\n";
        let read = Resolvers::parse(text);
        assert_eq!(read.servers, ["192.0.2.1".parse::<IpAddr>().unwrap()]);
        assert_eq!(read.search, ["two.example", "three.example"]);
    }

    #[test]
    fn links_are_followed_by_name() {
        for (path, target, result) in [
            ("/etc/resolv.conf", "../run/x/resolv.conf", "/run/x/resolv.conf"),
            ("/etc/resolv.conf", "/var/run/resolv.conf", "/var/run/resolv.conf"),
            ("/etc/resolv.conf", "./other", "/etc/other"),
            ("/etc/resolv.conf", "../../../../r", "/r"),
        ] {
            assert_eq!(followed(Path::new(path), OsStr::new(target)), Path::new(result), "{target}");
        }
    }

    /// What a process still reads that has kept its directories, after these were moved out of its sight.
    #[test]
    fn directories_that_were_kept_are_enough() {
        let root = std::env::temp_dir().join(format!("usernet-resolv-{}", std::process::id()));
        let (etc, run) = (root.join("etc"), root.join("run"));
        fs::create_dir_all(&etc).unwrap();
        fs::create_dir_all(&run).unwrap();
        let start = etc.join("resolv.conf");
        symlink("../run/resolv.conf", &start).unwrap();
        fs::write(run.join("resolv.conf"), "nameserver 192.0.2.1\n").unwrap();
        let kept = ResolvConf::open_at(&start, &[]);
        let moved = root.with_extension("moved");
        fs::rename(&root, &moved).unwrap();
        let servers = || kept.read().map(|r| r.servers.iter().map(IpAddr::to_string).collect::<Vec<_>>());
        assert_eq!(servers().unwrap(), ["192.0.2.1"]);
        // Replaced, as those do that write it.
        fs::write(moved.join("run/new"), "nameserver 192.0.2.2\n").unwrap();
        fs::rename(moved.join("run/new"), moved.join("run/resolv.conf")).unwrap();
        assert_eq!(servers().unwrap(), ["192.0.2.2"]);
        // And now a file of its own.
        fs::remove_file(moved.join("etc/resolv.conf")).unwrap();
        fs::write(moved.join("etc/resolv.conf"), "nameserver 192.0.2.3\n").unwrap();
        assert_eq!(servers().unwrap(), ["192.0.2.3"]);
        fs::remove_file(moved.join("etc/resolv.conf")).unwrap();
        assert_eq!(servers().unwrap_err().kind(), io::ErrorKind::NotFound);
        symlink("resolv.conf", moved.join("etc/resolv.conf")).unwrap();
        assert!(servers().is_err(), "a link to itself");
        fs::remove_dir_all(&moved).unwrap();
    }
}

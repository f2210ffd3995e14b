//! Noticing that a namespace's name has gone, which is when whoever serves it ends.
//!
//! The namespace itself does not go: the tap device keeps it. So it is the path that counts: a process's (`/proc/PID/...`)
//! goes with the process, for which there is a pidfd; another one is looked after by inotify(7) in its directory. What is
//! needed is opened before the process leaves the host's files and processes behind.

use std::ffi::OsString;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Component, Path};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify::{self, CreateFlags, Reader, WatchFlags};
use rustix::fs::{AtFlags, Mode, OFlags, open, statat};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// A watch over a path.
#[derive(Debug)]
pub(super) enum Watch {
    /// A process.
    Process(OwnedFd),
    /// A name in a directory.
    Name {
        /// inotify's events.
        events: OwnedFd,
        directory: OwnedFd,
        name: OsString,
    },
}

impl Watch {
    /// Begins to watch `path`.
    ///
    /// # Errors
    /// It is not there, or the system is out of what watches take.
    pub(super) fn begin(path: &Path) -> io::Result<Self> {
        if let Some(process) = process_of(path) {
            return Ok(Self::Process(pidfd_open(process, PidfdFlags::empty())?));
        }
        let path = path.canonicalize()?;
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let directory = open(parent, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let events = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let what =
            WatchFlags::DELETE | WatchFlags::MOVED_FROM | WatchFlags::DELETE_SELF | WatchFlags::MOVE_SELF;
        inotify::add_watch(&events, parent, what)?;
        Ok(Self::Name { events, directory, name: name.to_owned() })
    }

    /// Waits until the path has gone.
    ///
    /// # Errors
    /// As poll(2).
    // syscalls(pasta): poll read newfstatat
    pub(super) fn wait(&self) -> io::Result<()> {
        let fd = match self {
            Self::Process(process) => process,
            Self::Name { events, .. } => events,
        };
        while self.exists()? {
            match poll(&mut [PollFd::new(fd, PollFlags::IN)], None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Whether the path is still there, as far as the events that have come say anything about it.
    fn exists(&self) -> io::Result<bool> {
        match self {
            Self::Process(process) => {
                let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
                Ok(poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&now))? == 0)
            }
            Self::Name { events, directory, name } => {
                // The events only say that it is time to look.
                let mut buffer = [MaybeUninit::uninit(); 4096];
                let mut reader = Reader::new(events, &mut buffer);
                while reader.next().is_ok() {}
                Ok(!matches!(statat(directory, name, AtFlags::SYMLINK_NOFOLLOW), Err(Errno::NOENT)))
            }
        }
    }
}

/// The process in whose part of /proc a path is.
fn process_of(path: &Path) -> Option<Pid> {
    let mut components = path.components();
    let proc = [Component::RootDir, Component::Normal("proc".as_ref())];
    if !proc.iter().all(|part| components.next().as_ref() == Some(part)) {
        return None;
    }
    let Component::Normal(number) = components.next()? else { return None };
    Pid::from_raw(number.to_str()?.parse().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_processes() {
        assert_eq!(
            process_of(Path::new("/proc/17/ns/net")).map(Pid::as_raw_nonzero).map(|n| n.get()),
            Some(17)
        );
        for other in ["/proc/self/ns/net", "/run/netns/17", "proc/17", "/proc", "/proc/0/ns/net"] {
            assert_eq!(process_of(Path::new(other)), None, "{other}");
        }
    }

    #[test]
    fn a_name_that_goes_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("name");
        std::fs::write(&path, "").unwrap();
        let watch = Watch::begin(&path).unwrap();
        assert!(watch.exists().unwrap());
        let other = directory.path().join("other");
        std::fs::write(&other, "").unwrap();
        std::fs::remove_file(&other).unwrap();
        assert!(watch.exists().unwrap());
        let waiter = std::thread::spawn(move || watch.wait());
        std::fs::remove_file(&path).unwrap();
        waiter.join().unwrap().unwrap();
    }

    #[test]
    fn a_process_that_ends_is_noticed() {
        let mut child =
            std::process::Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        let watch = Watch::begin(Path::new(&format!("/proc/{}/ns/net", child.id()))).unwrap();
        assert!(watch.exists().unwrap());
        drop(child.stdin.take());
        watch.wait().unwrap();
        child.wait().unwrap();
    }
}

//! Namespaces: finding them and being in them.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::thread;

use rustix::fs::{Mode, OFlags};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::net::{Because, NetError};

/// A network namespace, kept by a descriptor.
#[derive(Debug)]
pub(super) struct NetNamespace(OwnedFd);

impl NetNamespace {
    /// The one that `path` leads to.
    pub(super) fn open(path: &Path) -> Result<Self, NetError> {
        open(path).map(Self).because(|| format!("cannot open the network namespace {}", path.display()))
    }

    /// Does something on a thread that is in the namespace.
    ///
    /// # Errors
    /// The process has no rights over the namespace.
    pub(super) fn inside<T: Send>(&self, deed: impl FnOnce() -> T + Send) -> Result<T, NetError> {
        let enter = || move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::Network));
        thread::scope(|scope| {
            let thread = thread::Builder::new().name("namespace".into());
            let thread = thread
                .spawn_scoped(scope, || {
                    enter().because(|| "cannot enter the network namespace".into())?;
                    Ok(deed())
                })
                .because(|| "cannot start a thread".into())?;
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

fn open(path: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
}

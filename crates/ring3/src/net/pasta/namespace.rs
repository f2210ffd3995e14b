//! The namespaces that are served: found or made, and entered by threads.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;

use rustix::fs::{Mode, OFlags};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::command::Command;
use crate::net::isolation::user;
use crate::net::options::settings::Target;
use crate::net::{Because, NetError};

/// A network namespace, kept by a descriptor.
#[derive(Debug)]
pub(super) struct NetNamespace(OwnedFd);

impl NetNamespace {
    /// The one that `path` leads to.
    pub(super) fn open(path: &Path) -> Result<Self, NetError> {
        open(path).map(Self).because(|| format!("cannot open the network namespace {}", path.display()))
    }

    /// Has the calling thread enter it.
    ///
    /// # Errors
    /// The process has no rights over it.
    pub(super) fn enter(&self) -> Result<(), NetError> {
        move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::Network)).because(|| {
            "cannot enter the network namespace: it belongs to a user namespace that is to be joined first \
             (--userns), or to another user"
                .into()
        })
    }

    /// Does something on a thread that is in the namespace, and waits for it.
    pub(super) fn inside<T: Send>(
        &self,
        deed: impl FnOnce() -> Result<T, NetError> + Send,
    ) -> Result<T, NetError> {
        thread::scope(|scope| {
            let thread = thread::Builder::new().name("namespace".into());
            let deed = || self.enter().and_then(|()| deed());
            let thread = thread.spawn_scoped(scope, deed).because(|| "cannot start a thread".into())?;
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

impl AsFd for NetNamespace {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn open(path: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
}

/// Namespaces that were found, and are not entered yet.
#[derive(Debug)]
pub(super) enum Found<'a> {
    /// None: they will be made.
    ToMake(&'a Target),
    /// Existing ones.
    Existing {
        /// The network namespace.
        net: NetNamespace,
        /// The user namespace that is joined, if one is.
        user: Option<&'a PathBuf>,
    },
}

impl<'a> Found<'a> {
    /// Finds what `target` names, with the rights that the process still has.
    pub(super) fn find(target: &'a Target) -> Result<Self, NetError> {
        Ok(match target {
            Target::Command { .. } => Self::ToMake(target),
            Target::Join { netns, userns } => {
                Self::Existing { net: NetNamespace::open(netns)?, user: userns.as_ref() }
            }
        })
    }

    /// Moves the process to the user namespace, and makes what is to be made. A command waits in its namespaces then.
    pub(super) fn settle(self) -> Result<(NetNamespace, Option<Command>), NetError> {
        match self {
            Self::Existing { net, user } => {
                user.map(|path| user::join_namespace(path)).transpose()?;
                Ok((net, None))
            }
            Self::ToMake(Target::Command { command, netns_only, pid_namespace }) => {
                if !netns_only {
                    user::own_namespace()?;
                }
                let command = Command::start(command, *pid_namespace)?;
                Ok((NetNamespace::open(&command.network_namespace())?, Some(command)))
            }
            Self::ToMake(Target::Join { .. }) => unreachable!("what is joined was found"),
        }
    }
}

//! Served descriptors in more than one process.
//!
//! What is served lives in the process that opened it. A child that inherits such a descriptor has a copy of that state, as `fork`
//! copies all memory, but a copy that nobody keeps up to date. So the child's descriptors become [`client::RemoteFile`]s, and its
//! calls go to the process that opened them (the *server*), by a socket that is made just before the fork. There a thread waits
//! for them ([`server`]), that exists only while such a child lives. Arguments stay where they are: the server copies them out of
//! the child's memory, and into it (`iommufd::process::RemoteProcess`).
//!
//! A child's connection counts as the child's descriptors: when it ends, by exit, by death or by exec, they are closed. A child of
//! the child has a connection of its own to the same server. When the server ends, what it served is gone, and the
//! children's calls answer EIO. This is the one thing in which it differs from the kernel.
//!
//! A child of `daemon` is different: its parent ends at once, by the same call. So it goes on with the copy, as the owner of what
//! was served ([`bequeath`]). That takes a parent with one thread: then nothing is missing in the copy, and nothing in it is in
//! the middle of anything. What was pinned is pinned in the copy, at the same addresses.
//!
//! `posix_spawn` and `vfork` share the parent's memory until exec and need none of this ([`crate::owner`]).

mod client;
mod lend;
mod server;
mod signals;
#[cfg(test)]
mod tests;
mod threads;
mod usage;
mod wire;

use core::{
    any::Any,
    cell::{Cell, RefCell},
};
use std::{
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
};

use iommufd::{Result, process};

pub(crate) use client::Link;

use crate::{
    caller::ShimCaller,
    errno, inside,
    kept::{self, Kept},
    table::{self, Description},
};
use client::RemoteFile;

/// What is to be done on both sides of a fork that is under way.
struct Fork {
    /// The child goes on with what this process serves.
    heir: bool,
    /// Nobody is in the middle of changing what is pinned, who is served, and on whose behalf.
    quiet: Box<dyn Any>,
    /// The descriptors that this process serves, and their numbers on the new connection.
    served: Vec<(i32, u64)>,
    /// What the new connection serves, and its two ends.
    connection: Option<(server::Shared, Kept, Kept)>,
    /// The descriptors that others serve for us: their link there, their numbers, and the child's socket.
    upstream: Vec<Upstream>,
}

impl Fork {
    /// The sockets that were made for it.
    fn sockets(&self) -> Vec<BorrowedFd<'_>> {
        let own = self.connection.iter().flat_map(|(_, ours, theirs)| [ours, theirs]);
        own.chain(self.upstream.iter().map(|upstream| &upstream.socket)).map(Kept::as_fd).collect()
    }
}

struct Upstream {
    link: Arc<Link>,
    socket: Kept,
    files: Vec<(i32, u64)>,
}

thread_local! {
    /// The fork that this thread is making.
    static FORK: RefCell<Option<Fork>> = const { RefCell::new(None) };
    /// Whether the child is to be its parent's heir.
    static BEQUEATHS: Cell<bool> = const { Cell::new(false) };
}

/// Does `daemon`, which forks, and ends this process when there is a child. What this process serves goes on in the child.
pub(crate) fn bequeath<T>(daemon: impl FnOnce() -> T) -> T {
    let serves = || table::range(0, i32::MAX).any(|(_, description)| description.file.shared().is_none());
    let alone = errno::preserved(|| inside::run(|| !serves() || threads::alone()));
    if !alone {
        crate::complain(
            "daemon() in a process that has a device open and several threads, be they its own or the device's: the \
             device ends with them, and calls on it will answer EIO",
        );
    }
    BEQUEATHS.set(alone);
    let result = daemon();
    BEQUEATHS.set(false);
    result
}

/// Before a fork.
pub(crate) fn prepare() {
    if !table::serves_any() {
        return;
    }
    let fork = errno::preserved(|| inside::run(plan));
    FORK.with_borrow_mut(|slot| *slot = fork.ok());
}

/// After it, in the parent.
pub(crate) fn parent() {
    let Some(fork) = FORK.take() else { return };
    drop(fork.quiet);
    errno::preserved(|| {
        inside::run(|| {
            if let Some((shared, ours, theirs)) = fork.connection {
                drop(theirs);
                server::start(ours, shared);
            }
        });
    });
}

/// After it, in the child.
pub(crate) fn child() {
    let mut fork = FORK.take();
    if let Some(fork) = &mut fork {
        fork.quiet = Box::new(());
    }
    // What its parent serves, or is served by, is to end with the parent.
    let own = fork.as_ref().map(Fork::sockets).unwrap_or_default();
    errno::preserved(|| inside::run(|| kept::close_sockets_but(&own)));
    if fork.is_none() && !table::serves_any() {
        return;
    }
    errno::preserved(|| {
        inside::run(|| {
            usage::forget();
            server::forget();
            if !fork.as_ref().is_some_and(|fork| fork.heir) {
                process::forget();
                ShimCaller::renew();
            }
            become_client(fork);
        });
    });
}

fn plan() -> Result<Fork> {
    let heir = BEQUEATHS.get();
    let mut upstream: Vec<Upstream> = Vec::new();
    let (mut numbers, mut own) = (Vec::new(), Vec::new());
    for (fd, description) in table::range(0, i32::MAX) {
        let Some((link, id)) = description.file.shared() else {
            if !heir {
                numbers.push(fd);
                own.push(description);
            }
            continue;
        };
        match upstream.iter_mut().find(|known| Arc::ptr_eq(&known.link, &link)) {
            Some(known) => known.files.push((fd, id)),
            None => upstream.push(Upstream { socket: link.fork()?, link, files: vec![(fd, id)] }),
        }
    }
    let (shared, ids) = server::share(&own);
    let connection = if own.is_empty() {
        None
    } else {
        let (ours, theirs) = server::connection()?;
        Some((shared, ours, theirs))
    };
    Ok(Fork {
        heir,
        quiet: Box::new((process::quiet(), server::quiet(), usage::quiet())),
        served: numbers.into_iter().zip(ids).collect(),
        connection,
        upstream,
    })
}

/// Makes this process's descriptors those of a child. Without `fork` they are not served any more.
fn become_client(fork: Option<Fork>) {
    let heir = fork.as_ref().is_some_and(|fork| fork.heir);
    // What was inherited is a copy of another process's state, in the middle of anything. Dropping it would act on it.
    for (fd, copy) in
        table::range(0, i32::MAX).map(|(fd, description)| (fd, core::mem::ManuallyDrop::new(description)))
    {
        if heir && copy.file.shared().is_none() {
            drop(core::mem::ManuallyDrop::into_inner(copy));
        } else {
            core::mem::forget(table::remove(fd));
        }
    }
    let Some(fork) = fork else { return };
    if let Some((shared, ours, theirs)) = fork.connection {
        core::mem::forget(shared);
        drop(ours);
        enter(&Link::new(theirs), &fork.served);
    }
    for upstream in fork.upstream {
        core::mem::forget(upstream.link);
        enter(&Link::new(upstream.socket), &upstream.files);
    }
}

/// Enters descriptors that the other end of `link` serves.
fn enter(link: &Arc<Link>, files: &[(i32, u64)]) {
    let mut known: Vec<(u64, Arc<Description>)> = Vec::new();
    for &(fd, id) in files {
        let description = match known.iter().find(|(other, _)| *other == id) {
            Some((_, description)) => Arc::clone(description),
            None => {
                let file = Arc::new(RemoteFile::new(Arc::clone(link), id));
                let description = Arc::new(Description { file });
                known.push((id, Arc::clone(&description)));
                description
            }
        };
        drop(table::insert(fd, description));
    }
}

/// Before a descriptor is closed: see [`server::settle`].
pub(crate) fn settle() {
    inside::run(server::settle);
}

/// How many pages are pinned, and locked, on behalf of process `pid`, as far as this process and those that serve it know.
pub(crate) fn usage_of(pid: i32) -> (u64, u64) {
    let mut sum = usage::of(pid);
    let mut asked: Vec<Arc<Link>> = Vec::new();
    for (_, description) in table::range(0, i32::MAX) {
        let Some((link, _)) = description.file.shared() else { continue };
        if asked.iter().any(|other| Arc::ptr_eq(other, &link)) {
            continue;
        }
        let (pinned, locked) = link.usage(pid).unwrap_or((0, 0));
        sum = (sum.0 + pinned, sum.1 + locked);
        asked.push(link);
    }
    sum
}

//! Eventfds: signalling them, and a thread that waits for those of the user.
//!
//! A [`Watcher`] is one thread that does something whenever one of several eventfds is signalled: unmasking INTx,
//! writing a register. It begins with the first eventfd and ends when it is dropped.

use core::fmt;
use std::{
    collections::HashMap,
    io::IoSliceMut,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
};

use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, epoll, eventfd, poll},
    io::{ReadWriteFlags, preadv2, read, write},
};

use crate::{Errno, Result};

/// Locks a mutex whose data is consistent whenever it is unlocked, also by a panic.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An eventfd that somebody else gave us.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// Takes a descriptor over.
    ///
    /// # Errors
    /// EINVAL when it is not one of an eventfd.
    pub fn new(fd: OwnedFd) -> Result<Self> {
        use std::os::fd::AsRawFd;

        // Nothing but its name in /proc tells an eventfd from other descriptors.
        let name = rustix::fs::readlink(format!("/proc/self/fd/{}", fd.as_raw_fd()), Vec::new())?;
        if name.to_bytes() == b"anon_inode:[eventfd]" { Ok(Self(fd)) } else { Err(Errno::INVAL) }
    }

    /// Adds one to its counter. A counter that is full stays so: a user who never reads it must not stop a device.
    pub fn signal(&self) {
        let mut writable = [PollFd::new(&self.0, PollFlags::OUT)];
        if poll(&mut writable, Some(&Timespec::default())) == Ok(1) {
            let _ = write(&self.0, &1u64.to_ne_bytes());
        }
    }

    /// Takes its count away: whether it was signalled. Does not wait.
    fn take(&self) -> bool {
        let mut count = [0; 8];
        // The counter may be empty again, and the descriptor may be one that waits.
        match preadv2(&self.0, &mut [IoSliceMut::new(&mut count)], u64::MAX, ReadWriteFlags::NOWAIT) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => read(&self.0, &mut count).is_ok(),
            result => result.is_ok(),
        }
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

type Action = Box<dyn Fn() + Send>;

/// What to do when one eventfd is signalled; nothing any more after its removal.
struct Watch {
    eventfd: EventFd,
    action: Mutex<Option<Action>>,
}

#[derive(Default)]
struct Watches {
    next: u64,
    by_id: HashMap<u64, Arc<Watch>>,
}

struct Shared {
    epoll: OwnedFd,
    /// Ends the thread.
    stop: OwnedFd,
    watches: Mutex<Watches>,
}

/// Names one eventfd that a [`Watcher`] waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WatchId(u64);

/// Does something when eventfds are signalled.
#[derive(Default)]
pub struct Watcher(Mutex<Option<(Arc<Shared>, thread::JoinHandle<()>)>>);

impl fmt::Debug for Watcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watcher").finish_non_exhaustive()
    }
}

/// What the epoll entry of [`Shared::stop`] carries.
const STOP: u64 = u64::MAX;

impl Watcher {
    /// Calls `action` from the watcher's thread whenever `eventfd` is signalled, until it is removed.
    ///
    /// # Errors
    /// What the system says when there is no room for a thread or a descriptor.
    pub fn add(&self, eventfd: EventFd, action: Action) -> Result<WatchId> {
        let shared = self.shared()?;
        let watch = Arc::new(Watch { eventfd, action: Mutex::new(Some(action)) });
        let mut watches = lock(&shared.watches);
        let id = watches.next;
        let data = epoll::EventData::new_u64(id);
        epoll::add(&shared.epoll, &watch.eventfd, data, epoll::EventFlags::IN)?;
        watches.next += 1;
        watches.by_id.insert(id, watch);
        Ok(WatchId(id))
    }

    /// Waits no longer for `id`. The action is not running when this returns, and it does not run again; so it must not
    /// be called by the action itself.
    pub fn remove(&self, id: WatchId) {
        let Some(shared) = lock(&self.0).as_ref().map(|(shared, _)| Arc::clone(shared)) else { return };
        let watch = lock(&shared.watches).by_id.remove(&id.0);
        if let Some(watch) = watch {
            let _ = epoll::delete(&shared.epoll, &watch.eventfd);
            *lock(&watch.action) = None;
        }
    }

    fn shared(&self) -> Result<Arc<Shared>> {
        let mut running = lock(&self.0);
        if let Some((shared, _)) = &*running {
            return Ok(Arc::clone(shared));
        }
        let shared = Arc::new(Shared {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            stop: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            watches: Mutex::default(),
        });
        epoll::add(&shared.epoll, &shared.stop, epoll::EventData::new_u64(STOP), epoll::EventFlags::IN)?;
        let of_thread = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("vfio-eventfds".into())
            .spawn(move || wait(&of_thread))
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::AGAIN))?;
        *running = Some((Arc::clone(&shared), thread));
        Ok(shared)
    }
}

fn wait(shared: &Shared) {
    let mut events =
        [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 16];
    loop {
        let count = match epoll::wait(&shared.epoll, &mut events, None) {
            Ok(count) => count,
            Err(Errno::INTR) => continue,
            Err(_) => return,
        };
        for event in events.iter().take(count) {
            let id = event.data.u64();
            if id == STOP {
                return;
            }
            let watch = lock(&shared.watches).by_id.get(&id).cloned();
            if let Some(watch) = watch
                && watch.eventfd.take()
                && let Some(action) = &*lock(&watch.action)
            {
                action();
            }
        }
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        let running = self.0.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some((shared, thread)) = running {
            let _ = write(&shared.stop, &1u64.to_ne_bytes());
            // An action may hold the last reference to the owner.
            if thread.thread().id() != thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::mpsc;

    use super::*;

    /// An eventfd that a test keeps, and the descriptor that it gives away.
    pub(crate) fn pair() -> (OwnedFd, OwnedFd) {
        let ours = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap();
        let theirs = rustix::io::fcntl_dupfd_cloexec(&ours, 0).unwrap();
        (ours, theirs)
    }

    /// How often it was signalled since the last time.
    pub(crate) fn count(fd: &OwnedFd) -> u64 {
        let mut count = [0; 8];
        match read(fd, &mut count) {
            Ok(8) => u64::from_ne_bytes(count),
            Err(Errno::AGAIN) => 0,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn other_descriptors_are_refused() {
        let file = rustix::fs::memfd_create("file", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        assert_eq!(EventFd::new(file).unwrap_err(), Errno::INVAL);
    }

    #[test]
    fn a_full_counter_does_not_stop_who_signals() {
        let (ours, theirs) = pair();
        write(&ours, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        EventFd::new(theirs).unwrap().signal();
        assert_eq!(count(&ours), u64::MAX - 1);
    }

    #[test]
    fn a_watcher_acts_until_the_removal() {
        let watcher = Watcher::default();
        let (tell, told) = mpsc::channel();
        let (first, theirs) = pair();
        let other = tell.clone();
        let id = watcher.add(EventFd::new(theirs).unwrap(), Box::new(move || tell.send(1).unwrap())).unwrap();
        let (second, theirs) = pair();
        watcher.add(EventFd::new(theirs).unwrap(), Box::new(move || other.send(2).unwrap())).unwrap();
        write(&first, &1u64.to_ne_bytes()).unwrap();
        assert_eq!(told.recv(), Ok(1));
        watcher.remove(id);
        write(&first, &1u64.to_ne_bytes()).unwrap();
        write(&second, &1u64.to_ne_bytes()).unwrap();
        assert_eq!(told.recv(), Ok(2));
        assert_eq!(count(&first), 1, "nobody takes it any more");
    }
}

//! The process that serves: a thread for each process that shares its files, which ends with that process.

use core::{any::Any, cell::RefCell};
use std::{
    collections::HashMap,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
};

use iommufd::{
    Errno, Result,
    caller::{Caller, Capability, File},
    process::{Process, RemoteProcess, UserAddr},
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair, sockopt};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use vfio::doors::{self, DeviceFile, Opened};

use super::wire::{self, Kind, MOST, Message};
use crate::{
    calls,
    kept::Kept,
    node::{Mappable, ServedFile},
    table::Description,
};

/// The files that one process shares, by the numbers that both sides know them by.
#[derive(Default)]
pub(super) struct Shared {
    files: HashMap<u64, Arc<dyn ServedFile>>,
    next: u64,
}

impl Shared {
    /// Adds `file`: its number.
    pub(super) fn add(&mut self, file: Arc<dyn ServedFile>) -> u64 {
        let number = self.next;
        self.next += 1;
        self.files.insert(number, file);
        number
    }

    fn copy(&self) -> Self {
        Self { files: self.files.clone(), next: self.next }
    }
}

/// The two ends of a connection: for the process that serves, and for the other.
pub(super) fn connection() -> Result<(Kept, Kept)> {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_passcred(&ours, true)?;
    Ok((Kept::new(ours), Kept::new(theirs)))
}

/// Serves the process at the other end of `socket` until it ends, in a thread of its own. The program's signals are not for
/// that thread.
pub(super) fn start(socket: Kept, shared: Shared) {
    let connection = Arc::new(Connection::default());
    match socket.as_fd().try_clone_to_owned() {
        Ok(copy) => *lock(&connection.socket) = Some(Kept::new(copy)),
        Err(_) => return,
    }
    lock(&CONNECTIONS).push(Arc::clone(&connection));
    super::signals::blocked(|| {
        let serve = move || {
            let mut server = Server { socket, shared, process: None, kept: Vec::new() };
            server.run();
            drop(server);
            lock(&CONNECTIONS).retain(|other| !Arc::ptr_eq(other, &connection));
            *lock(&connection.socket) = None;
            connection.ended.notify_all();
        };
        if let Err(error) = std::thread::Builder::new().name("ring3-shim".to_owned()).spawn(serve) {
            tracing::warn!("a child's descriptors cannot be served: {error}");
        }
    });
}

/// A connection, as others see it: its socket, until it has ended.
#[derive(Default)]
struct Connection {
    socket: Mutex<Option<Kept>>,
    ended: Condvar,
}

static CONNECTIONS: Mutex<Vec<Arc<Connection>>> = Mutex::new(Vec::new());

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits until what processes had open that have ended is closed, as it is in the kernel before anybody can know that they
/// have ended.
pub(super) fn settle() {
    let connections = lock(&CONNECTIONS).clone();
    for connection in connections {
        let mut socket = lock(&connection.socket);
        while let Some(open) = socket.as_ref() {
            let mut fds = [PollFd::new(open, PollFlags::empty())];
            let ended = poll(&mut fds, Some(&Timespec::default())) == Ok(1)
                && fds.iter().any(|fd| fd.revents().contains(PollFlags::HUP));
            if !ended {
                break;
            }
            socket = connection.ended.wait(socket).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Keeps the connections as they are until the result is dropped: for the time of a fork.
pub(super) fn quiet() -> impl Sized {
    lock(&CONNECTIONS)
}

/// In a child after a fork: its parent's connections are none of its own. Their sockets were closed.
pub(super) fn forget() {
    if let Ok(mut connections) = CONNECTIONS.try_lock() {
        core::mem::take(&mut *connections).into_iter().for_each(core::mem::forget);
    }
}

struct Server {
    socket: Kept,
    shared: Shared,
    process: Option<Arc<RemoteProcess>>,
    /// What the process has mapped: held for as long as it is there.
    kept: Vec<Arc<dyn Any + Send + Sync>>,
}

impl Server {
    fn run(&mut self) {
        // Whatever goes wrong with the connection ends it, as the process's death does.
        while let Ok(Some((message, from))) = wire::receive(self.socket.as_fd()) {
            let process = match (&self.process, from) {
                (Some(process), _) => Arc::clone(process),
                (None, Some(from)) => match remote(from) {
                    Ok(process) => {
                        super::usage::add(&process);
                        Arc::clone(self.process.insert(process))
                    }
                    Err(_) => break,
                },
                (None, None) => break,
            };
            let answer = self.serve(&process, message);
            if wire::send(self.socket.as_fd(), &answer).is_err() {
                break;
            }
        }
        if let Some(process) = &self.process {
            process.end();
        }
    }

    fn serve(&mut self, process: &Arc<RemoteProcess>, message: Message) -> Message {
        let [id, a, b, c, ..] = message.words;
        if message.kind == Kind::Close {
            self.shared.files.remove(&id);
            return Message::answer(Ok(0));
        }
        if message.kind == Kind::Fork {
            return self.fork();
        }
        if message.kind == Kind::Usage {
            return super::usage::answer(i32::try_from(id).unwrap_or(0));
        }
        let Some(file) = self.shared.files.get(&id).map(Arc::clone) else {
            return Message::answer(Err(Errno::BADF));
        };
        let bounded = |length: u64| usize::try_from(length).map_or(MOST, |length| length.min(MOST));
        let count = |done: Result<usize>| Message::answer(done.map(|done| done as i64));
        match message.kind {
            Kind::Ioctl => {
                let [.., user, limit, _] = message.words;
                process.set_caller(
                    u32::try_from(user).unwrap_or(u32::MAX),
                    (limit != u64::MAX).then_some(limit),
                );
                let process: Arc<dyn Process> = Arc::clone(process) as _;
                let capabilities = message.words[3];
                let caller = RemoteCaller { server: RefCell::new(self), process, capabilities };
                let request = u32::try_from(a).unwrap_or(0);
                let result = file.ioctl(&caller, request, UserAddr(b));
                Message::answer(result.map(i64::from))
            }
            Kind::Read => {
                let mut deliver =
                    |at: usize, bytes: &[u8]| process.write(UserAddr(b.wrapping_add(at as u64)), bytes);
                count(file.read_to(UserAddr(b), bounded(a), &mut deliver))
            }
            Kind::ReadAt => {
                let mut bytes = vec![0; bounded(b)];
                let done = file.read_at(a, &mut bytes);
                bytes.truncate(done.unwrap_or(0));
                Message { bytes, ..count(done) }
            }
            Kind::Write => count(file.write(&message.bytes)),
            Kind::WriteAt => count(file.write_at(a, &message.bytes)),
            Kind::Mmap => {
                let prot = i32::try_from(c & 0xffff_ffff).unwrap_or(0);
                match file.mmap(a, b, prot, c >> 32 != 0) {
                    // Nothing there catches its accesses.
                    Ok(Mappable::Registers(_)) => Message::answer(Err(Errno::INVAL)),
                    Ok(Mappable::Pages(mapping)) => {
                        self.kept.push(mapping.guard);
                        let answer =
                            Message::answer(i64::try_from(mapping.offset).map_err(|_| Errno::OVERFLOW));
                        Message { descriptor: Some(mapping.fd), ..answer }
                    }
                    Err(error) => Message::answer(Err(error)),
                }
            }
            _ => Message::answer(Err(Errno::PROTO)),
        }
    }

    /// The process is about to fork: a connection for its child, which shares the same files.
    fn fork(&self) -> Message {
        let made = connection().and_then(|(ours, theirs)| {
            Ok((ours, theirs.as_fd().try_clone_to_owned().map_err(|_| Errno::MFILE)?))
        });
        match made {
            Ok((ours, theirs)) => {
                start(ours, self.shared.copy());
                Message { descriptor: Some(theirs), ..Message::answer(Ok(0)) }
            }
            Err(error) => Message::answer(Err(error)),
        }
    }

    /// Asks the process something in the middle of a call that it made.
    fn ask(&self, question: &Message) -> Result<Message> {
        wire::send(self.socket.as_fd(), question)?;
        let (answer, _) = wire::receive(self.socket.as_fd())?.ok_or(Errno::PIPE)?;
        answer.result()?;
        Ok(answer)
    }
}

/// A process that shares our files, while it makes a call.
struct RemoteCaller<'a> {
    server: RefCell<&'a mut Server>,
    process: Arc<dyn Process>,
    /// One bit for each [`Capability`].
    capabilities: u64,
}

/// The bit of a capability in the words of a call.
pub(super) fn bit(capability: Capability) -> u64 {
    match capability {
        Capability::IpcLock => 1,
        Capability::SysResource => 2,
        Capability::SysRawio => 4,
    }
}

impl RemoteCaller<'_> {
    /// Gives the program `descriptor`, which stands for `file`: its number there.
    fn give(&self, descriptor: OwnedFd, file: Arc<dyn ServedFile>) -> Result<i32> {
        let mut server = self.server.borrow_mut();
        let id = server.shared.add(file);
        let question = Message { descriptor: Some(descriptor), ..Message::new(Kind::Install, [id]) };
        let fd = server.ask(&question).and_then(|answer| answer.result());
        if fd.is_err() {
            server.shared.files.remove(&id);
        }
        i32::try_from(fd?).map_err(|_| Errno::MFILE)
    }

    /// What serves descriptor `fd` of the program. EBADF when it is not served, or by another process.
    fn served(&self, fd: i32) -> Result<Arc<dyn ServedFile>> {
        let server = self.server.borrow();
        let answer = server.ask(&Message::new(Kind::Installed, [i64::from(fd).cast_unsigned()]))?;
        let id = answer.result()?.cast_unsigned();
        server.shared.files.get(&id).map(Arc::clone).ok_or(Errno::BADF)
    }
}

impl Caller for RemoteCaller<'_> {
    fn process(&self) -> &Arc<dyn Process> {
        &self.process
    }

    fn capable(&self, capability: Capability) -> bool {
        self.capabilities & bit(capability) != 0
    }

    fn install(&self, file: Arc<dyn File>) -> Result<i32> {
        let descriptor = file.readiness().try_clone_to_owned().map_err(|_| Errno::MFILE)?;
        self.give(descriptor, calls::given(file))
    }

    fn uninstall(&self, fd: i32) {
        let _ = self.server.borrow().ask(&Message::new(Kind::Uninstall, [i64::from(fd).cast_unsigned()]));
    }

    fn installed(&self, fd: i32) -> Result<Arc<dyn File>> {
        self.served(fd)?.given().ok_or(Errno::BADF)
    }
}

impl doors::Caller for RemoteCaller<'_> {
    fn opened(&self, fd: i32) -> Result<Opened> {
        match self.served(fd) {
            Ok(file) => Ok(file.opened()),
            Err(_) => self.process.file(fd).map(|_| Opened::Other),
        }
    }

    fn install_device(&self, device: Arc<DeviceFile>) -> Result<i32> {
        self.give(calls::stand_in()?, crate::nodes::vfio::device(device))
    }
}

/// A process that shares our files.
fn remote(pid: Pid) -> Result<Arc<RemoteProcess>> {
    let pidfd = Kept::new(pidfd_open(pid, PidfdFlags::empty())?);
    Ok(RemoteProcess::with_pidfd(pid, Box::new(pidfd)))
}

/// The files of `descriptions` for a process to share, and their numbers in the same order.
pub(super) fn share(descriptions: &[Arc<Description>]) -> (Shared, Vec<u64>) {
    let mut shared = Shared::default();
    let mut known: Vec<(*const Description, u64)> = Vec::new();
    let numbers = descriptions
        .iter()
        .map(|description| {
            let address = Arc::as_ptr(description);
            if let Some((_, number)) = known.iter().find(|(other, _)| core::ptr::eq(*other, address)) {
                return *number;
            }
            let number = shared.add(Arc::clone(&description.file));
            known.push((address, number));
            number
        })
        .collect();
    (shared, numbers)
}

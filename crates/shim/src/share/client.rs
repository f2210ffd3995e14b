//! The process that shares files which another one serves: a child after a fork.

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
};

use iommufd::{
    Errno, Result,
    caller::{Capability, Deliver},
    process::UserAddr,
};
use rustix::process::Resource;
use vfio::doors::Caller;

use super::{
    lend,
    server::bit,
    wire::{self, Kind, MOST, Message},
};
use crate::{
    calls,
    node::{Mappable, Mapping, ServedFile},
    table,
};

/// The connection to the process that serves. One call at a time.
pub(crate) struct Link {
    socket: Mutex<OwnedFd>,
}

impl Link {
    pub(super) fn new(socket: OwnedFd) -> Arc<Self> {
        Arc::new(Self { socket: Mutex::new(socket) })
    }

    /// Makes a call, and answers what the other asks meanwhile. EIO when it is gone, with all that it served.
    pub(super) fn call(self: &Arc<Self>, message: &Message) -> Result<Message> {
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        wire::send(socket.as_fd(), message).map_err(|_| Errno::IO)?;
        loop {
            let received = wire::receive(socket.as_fd()).map_err(|_| Errno::IO)?;
            let (message, _) = received.ok_or(Errno::IO)?;
            let answer = match message.kind {
                Kind::Answer => {
                    message.result()?;
                    return Ok(message);
                }
                Kind::Install => Message::answer(self.install(message)),
                Kind::Uninstall => {
                    calls::uninstall(i32::try_from(message.words[0].cast_signed()).unwrap_or(-1));
                    Message::answer(Ok(0))
                }
                Kind::Installed => Message::answer(self.installed(message.words[0].cast_signed())),
                _ => Message::answer(Err(Errno::PROTO)),
            };
            wire::send(socket.as_fd(), &answer).map_err(|_| Errno::IO)?;
        }
    }

    /// A descriptor of the program for what the other has made.
    fn install(self: &Arc<Self>, message: Message) -> Result<i64> {
        let descriptor = message.descriptor.ok_or(Errno::PROTO)?;
        let file = Arc::new(RemoteFile { link: Arc::clone(self), id: message.words[0] });
        calls::install(descriptor, file, true).map(i64::from)
    }

    /// The number by which the other knows what descriptor `fd` is.
    fn installed(self: &Arc<Self>, fd: i64) -> Result<i64> {
        let description = i32::try_from(fd).ok().and_then(table::get_full).ok_or(Errno::BADF)?;
        let (link, id) = description.file.shared().ok_or(Errno::BADF)?;
        if Arc::ptr_eq(&link, self) { i64::try_from(id).map_err(|_| Errno::BADF) } else { Err(Errno::BADF) }
    }

    /// The socket for another process that will share the same files.
    pub(super) fn fork(self: &Arc<Self>) -> Result<OwnedFd> {
        self.call(&Message::new(Kind::Fork, []))?.descriptor.ok_or(Errno::PROTO)
    }

    /// What the other has pinned on behalf of `pid`: pages pinned, and locked.
    pub(super) fn usage(self: &Arc<Self>, pid: i32) -> Result<(u64, u64)> {
        let answer = self.call(&Message::new(Kind::Usage, [i64::from(pid).cast_unsigned()]))?;
        Ok((answer.words[2], answer.words[3]))
    }
}

/// A file that another process serves.
pub(super) struct RemoteFile {
    link: Arc<Link>,
    id: u64,
}

impl RemoteFile {
    pub(super) fn new(link: Arc<Link>, id: u64) -> Self {
        Self { link, id }
    }

    fn count(&self, message: &Message) -> Result<usize> {
        usize::try_from(self.link.call(message)?.result()?).map_err(|_| Errno::IO)
    }

    fn fill(&self, message: &Message, to: &mut [u8]) -> Result<usize> {
        let answer = self.link.call(message)?;
        let done = answer.bytes.len().min(to.len());
        to.iter_mut().zip(&answer.bytes).for_each(|(to, from)| *to = *from);
        Ok(done)
    }
}

impl Drop for RemoteFile {
    fn drop(&mut self) {
        // If the other is gone there is nothing to close.
        let _ = self.link.call(&Message::new(Kind::Close, [self.id]));
    }
}

impl ServedFile for RemoteFile {
    fn ioctl(&self, caller: &dyn Caller, request: u32, argument: UserAddr) -> Result<i32> {
        let all = [Capability::IpcLock, Capability::SysResource, Capability::SysRawio];
        let capabilities =
            all.into_iter().filter(|one| caller.capable(*one)).fold(0, |sum, one| sum | bit(one));
        lend::before(request, argument);
        let user = u64::from(rustix::process::getuid().as_raw());
        let limit = rustix::process::getrlimit(Resource::Memlock).current.unwrap_or(u64::MAX);
        let words = [self.id, u64::from(request), argument.0, capabilities, user, limit];
        let answer = self.link.call(&Message::new(Kind::Ioctl, words))?;
        i32::try_from(answer.result()?).map_err(|_| Errno::IO)
    }

    /// The other puts it there: only so does it know what was taken.
    fn read_to(&self, to: UserAddr, room: usize, _deliver: Deliver<'_>) -> Result<usize> {
        self.count(&Message::new(Kind::Read, [self.id, room as u64, to.0]))
    }

    fn write(&self, from: &[u8]) -> Result<usize> {
        let bytes = from.iter().copied().take(MOST).collect();
        self.count(&Message { bytes, ..Message::new(Kind::Write, [self.id]) })
    }

    fn read_at(&self, offset: u64, to: &mut [u8]) -> Result<usize> {
        self.fill(&Message::new(Kind::ReadAt, [self.id, offset, to.len().min(MOST) as u64]), to)
    }

    fn write_at(&self, offset: u64, from: &[u8]) -> Result<usize> {
        let bytes = from.iter().copied().take(MOST).collect();
        self.count(&Message { bytes, ..Message::new(Kind::WriteAt, [self.id, offset]) })
    }

    fn mmap(&self, offset: u64, length: u64, prot: i32, shared: bool) -> Result<Mappable> {
        let how = u64::from(prot.cast_unsigned()) | u64::from(shared) << 32;
        let answer = self.link.call(&Message::new(Kind::Mmap, [self.id, offset, length, how]))?;
        let offset = u64::try_from(answer.result()?).map_err(|_| Errno::IO)?;
        let fd = answer.descriptor.ok_or(Errno::IO)?;
        Ok(Mappable::Pages(Mapping { fd, offset, guard: Arc::new(()) }))
    }

    fn shared(&self) -> Option<(Arc<Link>, u64)> {
        Some((Arc::clone(&self.link), self.id))
    }
}

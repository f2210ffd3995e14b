//! One client: its commands, decoded, checked and answered.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use uapi::vfio::{
    VFIO_IRQ_SET_ACTION_MASK, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_TYPE_MASK,
    VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_BOOL, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE,
    VFIO_IRQ_SET_DATA_TYPE_MASK,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::memory::ClientMemory;
use super::{Options, feature, info};
use crate::device::Device;
use crate::dma::Dma;
use crate::irq::{IrqAction, IrqData, IrqSet};
use crate::migration::MigrationStream;
use crate::user::connection::Connection;
use crate::user::transport::{Broken, Message};
use crate::user::version::{self, Capabilities};
use crate::user::wire::{self, Command, Sender};
use crate::user::{Errno, Result};

/// What a command is answered with.
#[derive(Debug, Default)]
pub(super) struct Reply {
    pub(super) payload: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

impl Reply {
    pub(super) fn of(payload: &(impl IntoBytes + Immutable)) -> Self {
        Self { payload: payload.as_bytes().to_vec(), fds: Vec::new() }
    }
}

/// Serves one client until it goes.
pub(super) fn run(device: &Arc<dyn Device>, connection: &Arc<Connection>, options: &Options) -> Broken {
    let mut session = match greet(device, connection, options) {
        Ok(session) => session,
        Err(broken) => return broken,
    };
    let broken = loop {
        let message = match connection.next_command() {
            Ok(message) => message,
            Err(broken) => break broken,
        };
        let header = message.header;
        let sent = match session.handle(message) {
            Ok(reply) => {
                let fds: Vec<_> = reply.fds.iter().map(AsFd::as_fd).collect();
                connection.reply(&header, &[&reply.payload], &fds)
            }
            Err(errno) => {
                tracing::debug!(command = header.command, %errno, "a client's command fails");
                connection.reply_failure(&header, errno)
            }
        };
        if let Err(broken) = sent {
            break broken;
        }
    };
    session.end();
    broken
}

/// The first exchange. The device is open after it.
fn greet(
    device: &Arc<dyn Device>,
    connection: &Arc<Connection>,
    options: &Options,
) -> Result<Session, Broken> {
    let message = connection.next_command()?;
    let refuse = |errno, why| {
        // The client is told; whether it still listens makes no difference.
        let _ = connection.reply_failure(&message.header, errno);
        connection.shut_down();
        Err(Broken::Protocol(why))
    };
    if Command::from_number(message.header.command) != Ok(Command::Version) {
        return refuse(Errno::INVAL, "the first command is not VERSION");
    }
    let Ok((proposed, theirs)) = version::decode(&message.payload) else {
        return refuse(Errno::INVAL, "a VERSION that cannot be read");
    };
    if proposed.major != version::MAJOR || !message.fds.is_empty() || message.header.no_reply() {
        return refuse(Errno::INVAL, "a VERSION that is not served");
    }
    let ours = options.capabilities;
    let common = ours.common(theirs);
    let agreed = wire::Version { major: version::MAJOR, minor: proposed.minor.min(version::MINOR) };
    let mut answer = Capabilities {
        // Limits of what the server takes are its own; the client's bind what the server sends.
        max_fds: ours.max_fds,
        max_transfer: ours.max_transfer,
        max_dma_maps: ours.max_dma_maps,
        page_sizes: ours.page_sizes,
        ..common
    };
    let mut twin = None;
    if common.twin_socket {
        let pair = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None);
        match pair {
            Ok((kept, given)) => {
                twin = Some((Arc::new(Connection::new(kept, false, options.patience)), given));
                answer.twin_fd = Some(0);
            }
            Err(errno) => return refuse(errno, "no sockets are left"),
        }
    }
    let (channel, given) = match twin {
        Some((channel, given)) => (channel, Some(given)),
        None => (Arc::clone(connection), None),
    };
    let memory = Arc::new(ClientMemory::new(Arc::clone(&channel), ours.max_dma_maps, theirs.max_transfer));
    if let Err(errno) = device.open(Arc::clone(&memory) as Arc<dyn Dma>) {
        return refuse(errno, "the device cannot be opened");
    }
    let session = Session {
        device: Arc::clone(device),
        channel,
        memory,
        stream: None,
        max_transfer: ours.max_transfer,
        client_fds: theirs.max_fds,
    };
    let fds: Vec<_> = given.iter().map(AsFd::as_fd).collect();
    match connection.reply(&message.header, &[&version::encode(agreed, answer)], &fds) {
        Ok(()) => Ok(session),
        Err(broken) => {
            session.end();
            Err(broken)
        }
    }
}

/// A client that is being served.
pub(super) struct Session {
    pub(super) device: Arc<dyn Device>,
    /// Where commands to the client go.
    channel: Arc<Connection>,
    pub(super) memory: Arc<ClientMemory>,
    /// The device's saved state, while it is read or written.
    pub(super) stream: Option<Arc<dyn MigrationStream>>,
    /// Bytes that a transfer may have.
    pub(super) max_transfer: usize,
    /// Descriptors that the client takes in a message.
    pub(super) client_fds: usize,
}

impl Session {
    /// The client has gone.
    fn end(self) {
        // First, so that nothing waits for the client any more.
        self.channel.shut_down();
        self.device.close();
        self.memory.unmap_all();
    }

    /// Does what a message asks for.
    fn handle(&mut self, message: Message) -> Result<Reply> {
        let command = Command::from_number(message.header.command)?;
        let row = command.row();
        if row.sender != Sender::Client || message.payload.len() < row.request {
            return Err(Errno::INVAL);
        }
        let payload = &*message.payload;
        let fds = message.fds;
        if !fds.is_empty() && !matches!(command, Command::DmaMap | Command::DeviceSetIrqs) {
            return Err(Errno::INVAL);
        }
        match command {
            Command::DmaMap => self.dma_map(payload, fds),
            Command::DmaUnmap => self.dma_unmap(payload),
            Command::DeviceGetInfo => self.device_info(payload),
            Command::DeviceGetRegionInfo => info::region(self, payload),
            Command::DeviceGetRegionIoFds => info::io_fds(self, payload),
            Command::DeviceGetIrqInfo => self.irq_info(payload),
            Command::DeviceSetIrqs => self.set_irqs(payload, fds),
            Command::RegionRead => self.region_read(payload),
            Command::RegionWrite => self.region_write(payload),
            Command::DeviceReset => self.device.reset().map(|()| Reply::default()),
            Command::RegionWriteMulti => self.write_multi(payload),
            Command::DeviceFeature => feature::handle(self, payload),
            Command::MigDataRead => self.mig_data_read(payload),
            Command::MigDataWrite => self.mig_data_write(payload),
            // Version comes once; the others go the other way.
            Command::Version | Command::DmaRead | Command::DmaWrite => Err(Errno::INVAL),
        }
    }

    fn dma_map(&self, payload: &[u8], fds: Vec<OwnedFd>) -> Result<Reply> {
        let (map, _) = wire::split::<wire::DmaMap>(payload)?;
        let mut fds = fds.into_iter();
        let file = fds.next();
        if fds.next().is_some()
            || usize::try_from(map.argsz).unwrap_or(usize::MAX) < size_of::<wire::DmaMap>()
        {
            return Err(Errno::INVAL);
        }
        self.memory.map(&map, file)?;
        Ok(Reply::default())
    }

    fn dma_unmap(&self, payload: &[u8]) -> Result<Reply> {
        let (unmap, _) = wire::split::<wire::DmaUnmap>(payload)?;
        match unmap.flags {
            0 => self.memory.unmap(unmap.address, unmap.size)?,
            wire::DMA_UNMAP_ALL if unmap.address == 0 && unmap.size == 0 => self.memory.unmap_all(),
            wire::DMA_UNMAP_ALL => return Err(Errno::INVAL),
            _ => return Err(Errno::NOTSUP),
        }
        Ok(Reply::of(&unmap))
    }

    fn device_info(&self, payload: &[u8]) -> Result<Reply> {
        let (asked, _) = wire::split::<wire::DeviceInfo>(payload)?;
        check_argsz(asked.argsz, size_of::<wire::DeviceInfo>())?;
        let info = self.device.info()?;
        Ok(Reply::of(&wire::DeviceInfo {
            argsz: length_u32(size_of::<wire::DeviceInfo>()),
            flags: info.flags.bits(),
            num_regions: info.regions,
            num_irqs: info.irqs,
        }))
    }

    fn irq_info(&self, payload: &[u8]) -> Result<Reply> {
        use uapi::vfio::vfio_irq_info;
        let (asked, _) = wire::split::<vfio_irq_info>(payload)?;
        check_argsz(asked.argsz, size_of::<vfio_irq_info>())?;
        let irq = self.device.irq(asked.index)?;
        Ok(Reply::of(&vfio_irq_info {
            argsz: length_u32(size_of::<vfio_irq_info>()),
            flags: irq.flags.bits(),
            index: asked.index,
            count: irq.count,
        }))
    }

    fn set_irqs(&self, payload: &[u8], fds: Vec<OwnedFd>) -> Result<Reply> {
        let (set, data) = wire::split::<wire::IrqSet>(payload)?;
        let wire::IrqSet { flags, index, start, count, .. } = set;
        let info = self.device.irq(index)?;
        let end = start.checked_add(count).ok_or(Errno::INVAL)?;
        if end > info.count || flags & !(VFIO_IRQ_SET_DATA_TYPE_MASK | VFIO_IRQ_SET_ACTION_TYPE_MASK) != 0 {
            return Err(Errno::INVAL);
        }
        let action = match flags & VFIO_IRQ_SET_ACTION_TYPE_MASK {
            VFIO_IRQ_SET_ACTION_MASK => IrqAction::Mask,
            VFIO_IRQ_SET_ACTION_UNMASK => IrqAction::Unmask,
            VFIO_IRQ_SET_ACTION_TRIGGER => IrqAction::Trigger,
            _ => return Err(Errno::INVAL),
        };
        // At most as many as the device has vectors, which is not many.
        let vectors = usize::try_from(count).map_err(|_| Errno::INVAL)?;
        let data = match flags & VFIO_IRQ_SET_DATA_TYPE_MASK {
            VFIO_IRQ_SET_DATA_NONE if fds.is_empty() => IrqData::None,
            VFIO_IRQ_SET_DATA_BOOL if fds.is_empty() && count > 0 => {
                let bytes = data.get(..vectors).ok_or(Errno::INVAL)?;
                IrqData::Bool(bytes.iter().map(|byte| *byte != 0).collect())
            }
            // No descriptors at all take away what is there.
            VFIO_IRQ_SET_DATA_EVENTFD if fds.is_empty() && count > 0 => {
                IrqData::EventFd((0..vectors).map(|_| None).collect())
            }
            VFIO_IRQ_SET_DATA_EVENTFD if fds.len() == vectors && count > 0 => {
                IrqData::EventFd(fds.into_iter().map(Some).collect())
            }
            _ => return Err(Errno::INVAL),
        };
        self.device.set_irqs(IrqSet { index, start, count, action, data })?;
        Ok(Reply::default())
    }

    fn check_count(&self, count: u32) -> Result<usize> {
        usize::try_from(count).ok().filter(|count| *count <= self.max_transfer).ok_or(Errno::INVAL)
    }

    fn region_read(&self, payload: &[u8]) -> Result<Reply> {
        let (mut access, _) = wire::split::<wire::RegionAccess>(payload)?;
        let count = self.check_count(access.count)?;
        let head = size_of::<wire::RegionAccess>();
        let mut reply = vec![0; head + count];
        let data = reply.get_mut(head..).unwrap_or_default();
        let done = self.device.read(access.region, access.offset, data)?.min(count);
        access.count = length_u32(done);
        reply.truncate(head + done);
        access.write_to_prefix(&mut reply).map_err(|_| Errno::INVAL)?;
        Ok(Reply { payload: reply, fds: Vec::new() })
    }

    fn region_write(&self, payload: &[u8]) -> Result<Reply> {
        let (mut access, data) = wire::split::<wire::RegionAccess>(payload)?;
        if data.len() != self.check_count(access.count)? {
            return Err(Errno::INVAL);
        }
        let done = self.device.write(access.region, access.offset, data)?;
        access.count = length_u32(done.min(data.len()));
        Ok(Reply::of(&access))
    }

    fn write_multi(&self, payload: &[u8]) -> Result<Reply> {
        let (multi, writes) = wire::split::<wire::WriteMulti>(payload)?;
        let count = usize::try_from(multi.count).map_err(|_| Errno::INVAL)?;
        let writes = split_writes(writes, count)?;
        // All are looked at before the first is made.
        for write in &writes {
            usize::try_from(write.access.count)
                .ok()
                .filter(|count| (1..=write.data.len()).contains(count))
                .ok_or(Errno::INVAL)?;
        }
        let mut done = 0;
        for write in &writes {
            let data = usize::try_from(write.access.count).ok().and_then(|count| write.data.get(..count));
            let written =
                self.device.write(write.access.region, write.access.offset, data.unwrap_or_default());
            match written {
                Ok(_) => done += 1,
                Err(errno) if done == 0 => return Err(errno),
                Err(_) => break,
            }
        }
        Ok(Reply::of(&wire::WriteMulti { count: done }))
    }

    fn mig_data_read(&self, payload: &[u8]) -> Result<Reply> {
        let (asked, _) = wire::split::<wire::MigData>(payload)?;
        let head = size_of::<wire::MigData>();
        let size = self.check_count(asked.size)?;
        check_argsz(asked.argsz, head + size)?;
        let stream = self.stream.as_ref().ok_or(Errno::INVAL)?;
        let mut reply = vec![0; head + size];
        let data = reply.get_mut(head..).unwrap_or_default();
        let mut done = 0;
        while done < size {
            match stream.read(data.get_mut(done..).unwrap_or_default()) {
                Ok(0) | Err(Errno::NOMSG) => break,
                Ok(count) => done += count,
                Err(_) if done > 0 => break,
                Err(errno) => return Err(errno),
            }
        }
        reply.truncate(head + done);
        let header = wire::MigData { argsz: length_u32(head + done), size: length_u32(done) };
        header.write_to_prefix(&mut reply).map_err(|_| Errno::INVAL)?;
        Ok(Reply { payload: reply, fds: Vec::new() })
    }

    fn mig_data_write(&self, payload: &[u8]) -> Result<Reply> {
        let (header, mut data) = wire::split::<wire::MigData>(payload)?;
        if data.len() != self.check_count(header.size)? {
            return Err(Errno::INVAL);
        }
        let stream = self.stream.as_ref().ok_or(Errno::INVAL)?;
        while !data.is_empty() {
            let count = stream.write(data)?;
            data = data.get(count..).filter(|_| count > 0).ok_or(Errno::IO)?;
        }
        Ok(Reply::default())
    }
}

/// Exactly `count` writes. The payload has no alignment to rely on.
fn split_writes(bytes: &[u8], count: usize) -> Result<Vec<wire::SingleWrite>> {
    if count.checked_mul(size_of::<wire::SingleWrite>()) != Some(bytes.len()) {
        return Err(Errno::INVAL);
    }
    let writes = bytes.chunks_exact(size_of::<wire::SingleWrite>());
    writes.map(|write| wire::SingleWrite::read_from_bytes(write).map_err(|_| Errno::INVAL)).collect()
}

/// A reply must have room for what it is at least.
pub(super) fn check_argsz(argsz: u32, needed: usize) -> Result<()> {
    if usize::try_from(argsz).is_ok_and(|argsz| argsz >= needed) { Ok(()) } else { Err(Errno::INVAL) }
}

/// Lengths of what was made here, which are small.
pub(super) fn length_u32(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

//! The side that uses a device: a [`Device`] whose other end is a server.
//!
//! # Theory of operation
//!
//! [`RemoteDevice::connect`] does the first exchange and asks for everything that does not change: regions, interrupts,
//! which features there are. Calls of the device become commands; several threads may have commands under way at once. A
//! thread of the client's own, which is started when memory is announced first, serves the server's DMA_READ and DMA_WRITE
//! from the memory that [`Device::open`] gave.
//!
//! **Posted writes.** A write to a region is sent without waiting, unless [`Options::posted_writes`] is off or the region
//! is PCI configuration space; later commands see it done, since the server takes them in order. Several writes that are
//! known at once go in one message ([`RemoteDevice::write_many`]).
//!
//! **Memory.** The server reaches memory by what [`RemoteDevice::map_memory`] announced: with a file it maps it, without
//! one it asks. Users that cannot tell what there is leave [`Options::export`] on: then all addresses up to it are announced
//! when the device is opened, and each access is asked for, answered from the `Dma` with its faults.
//!
//! **A server that hangs** costs each caller its patience once ([`Patience::reply`]); after that the connection is at its end
//! and all calls fail at once, with the errno of [`Broken::errno`](crate::user::transport::Broken::errno).

mod features;
mod info;
mod memory;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use iommufd::domain::Prot;
use iommufd::iova::{Iova, IovaRange};
use uapi::vfio::{
    VFIO_IRQ_SET_DATA_BOOL, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE, VFIO_PCI_CONFIG_REGION_INDEX,
};
use zerocopy::IntoBytes;

use self::features::{RemoteLogging, RemoteMigration};
use self::info::Region;
use self::memory::Memory;
use super::connection::{Connection, Patience};
use super::version::{self, Capabilities};
use super::wire::{self, Command, DmaFlags};
use super::{Errno, Result};
use crate::device::{Device, DeviceFlags, DeviceInfo, DmaLogging, RegionFile, RegionInfo};
use crate::dma::Dma;
use crate::irq::{IrqData, IrqInfo, IrqSet};
use crate::migration::Migration;

/// What a client may be told.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How long the server may take.
    pub patience: Patience,
    /// What the client says that it can do.
    pub capabilities: Capabilities,
    /// Writes to regions are not waited for. Their errors are lost.
    pub posted_writes: bool,
    /// On [`Device::open`] all addresses up to this length are announced, without a file.
    pub export: Option<u64>,
}

impl Default for Options {
    /// Posted writes; memory below 4 TiB is announced.
    fn default() -> Self {
        Self {
            patience: Patience::default(),
            capabilities: Capabilities::OURS,
            posted_writes: true,
            export: Some(1 << 42),
        }
    }
}

/// Memory that is announced to the server.
#[derive(Clone, Copy, Debug)]
pub struct MemoryWindow<'a> {
    /// Its addresses.
    pub range: IovaRange,
    /// What the device may do with it.
    pub prot: Prot,
    /// The file that holds it, and where in that it begins; the server maps it. Without one it asks for each access.
    pub file: Option<(BorrowedFd<'a>, u64)>,
}

/// One write of [`RemoteDevice::write_many`].
#[derive(Clone, Copy, Debug)]
pub struct RegionWrite<'a> {
    /// The region.
    pub region: u32,
    /// Where in it.
    pub offset: u64,
    /// What is written.
    pub data: &'a [u8],
}

/// A device at the other end of a socket.
#[derive(Debug)]
pub struct RemoteDevice {
    main: Arc<Connection>,
    /// Where the server's commands come: `main`, or a socket of their own.
    channel: Arc<Connection>,
    /// Since memory was announced first.
    service: Mutex<Option<JoinHandle<()>>>,
    memory: Arc<Memory>,
    /// What the server can do.
    server: Capabilities,
    options: Options,
    info: DeviceInfo,
    regions: Vec<Region>,
    irqs: Vec<IrqInfo>,
    migration: Option<RemoteMigration>,
    logging: Option<RemoteLogging>,
}

impl RemoteDevice {
    /// The device that the server at the other end of this UNIX stream socket has.
    ///
    /// # Errors
    /// EPROTO when the other end speaks no version of the protocol that is known here, or breaks it; what the server
    /// says; [`Broken::errno`](super::transport::Broken::errno).
    pub fn connect(socket: OwnedFd, options: Options) -> Result<Self> {
        // Where commands of the server come is settled by its first reply, before which it may send none.
        let main = Arc::new(Connection::new(socket, true, options.patience));
        let (minor, server, twin) = greet(&main, &options)?;
        let channel = match twin {
            Some(socket) => Arc::new(Connection::new(socket, true, options.patience)),
            None => Arc::clone(&main),
        };
        let mut device = Self {
            main,
            channel,
            service: Mutex::default(),
            memory: Arc::default(),
            server,
            options,
            info: DeviceInfo { flags: DeviceFlags::empty(), regions: 0, irqs: 0, atomic_completer: None },
            regions: Vec::new(),
            irqs: Vec::new(),
            migration: None,
            logging: None,
        };
        device.info = info::device(&device.main)?;
        for index in 0..device.info.regions {
            // A region that is counted but not there: one that the bus has numbers for.
            let absent = |errno| {
                if device.main.broken().is_none() && errno == Errno::INVAL {
                    Ok(Region::absent())
                } else {
                    Err(errno)
                }
            };
            let region = info::region(&device.main, index, device.info.flags).or_else(absent)?;
            device.regions.push(region);
        }
        for index in 0..device.info.irqs {
            device.irqs.push(info::irq(&device.main, index)?);
        }
        // Servers of version 0.0 do not know the command, and those of crate vfio_user lose track of the stream over it.
        if minor > 0 {
            device.migration = RemoteMigration::probe(&device.main, server.max_transfer)?;
            device.logging = RemoteLogging::probe(&device.main, server.max_transfer)?;
        }
        Ok(device)
    }

    /// What the server can do, and what both agreed on.
    pub fn capabilities(&self) -> Capabilities {
        self.server
    }

    /// Starts the thread that serves the server's commands, unless it runs.
    fn start_service(&self) -> Result<()> {
        let mut service = self.service.lock().unwrap_or_else(PoisonError::into_inner);
        if service.is_none() {
            let (channel, memory) = (Arc::clone(&self.channel), Arc::clone(&self.memory));
            let max = self.options.capabilities.max_transfer;
            let serve = move || memory::serve(&channel, &memory, max);
            let thread = std::thread::Builder::new().name("vfio-user-dma".into()).spawn(serve);
            *service = Some(thread.map_err(|_| Errno::NOMEM)?);
        }
        Ok(())
    }

    /// Announces memory.
    ///
    /// # Errors
    /// EEXIST for addresses that are announced already; what the server says.
    pub fn map_memory(&self, window: &MemoryWindow<'_>) -> Result<()> {
        let mut flags = DmaFlags::empty();
        flags.set(DmaFlags::READ, window.prot.contains(Prot::READ));
        flags.set(DmaFlags::WRITE, window.prot.contains(Prot::WRITE));
        let map = wire::DmaMap {
            argsz: wire_length(size_of::<wire::DmaMap>()),
            flags: flags.bits(),
            offset: window.file.map_or(0, |(_, offset)| offset),
            address: window.range.start().0,
            size: window.range.length().ok_or(Errno::INVAL)?,
        };
        self.start_service()?;
        let fds: Vec<_> = window.file.iter().map(|(file, _)| *file).collect();
        self.main.request(Command::DmaMap, &[map.as_bytes()], &fds).map(|_| ())
    }

    /// Takes memory away that was announced, all of a window. The device does not use it any more when this returns.
    ///
    /// # Errors
    /// ENOENT when it was not; what the server says.
    pub fn unmap_memory(&self, range: IovaRange) -> Result<()> {
        let unmap = wire::DmaUnmap {
            argsz: wire_length(size_of::<wire::DmaUnmap>()),
            flags: 0,
            address: range.start().0,
            size: range.length().ok_or(Errno::INVAL)?,
        };
        self.main.request(Command::DmaUnmap, &[unmap.as_bytes()], &[]).map(|_| ())
    }

    /// Makes several small writes, in order, with as few messages as the server allows.
    ///
    /// # Errors
    /// As [`Device::write`]. Without an error all of them have been, or will be, made.
    pub fn write_many(&self, writes: &[RegionWrite<'_>]) -> Result<()> {
        let single = size_of::<wire::SingleWrite>();
        let room = self.server.max_transfer.saturating_sub(size_of::<wire::WriteMulti>()) / single;
        if !self.server.write_multiple || room == 0 || writes.iter().any(|write| write.data.len() > 8) {
            for write in writes {
                self.write(write.region, write.offset, write.data)?;
            }
            return Ok(());
        }
        for writes in writes.chunks(room) {
            let mut body = Vec::with_capacity(writes.len() * single);
            for write in writes {
                let mut data = [0; 8];
                for (to, from) in data.iter_mut().zip(write.data) {
                    *to = *from;
                }
                let count = wire_length(write.data.len());
                let access = wire::RegionAccess { offset: write.offset, region: write.region, count };
                body.extend_from_slice(wire::SingleWrite { access, data }.as_bytes());
            }
            let count = wire::WriteMulti { count: writes.len() as u64 };
            let parts: [&[u8]; 2] = [count.as_bytes(), &body];
            if self.options.posted_writes {
                self.main.post(Command::RegionWriteMulti, &parts)?;
            } else {
                let reply = self.main.request(Command::RegionWriteMulti, &parts, &[])?;
                let (done, _) = wire::split::<wire::WriteMulti>(&reply.payload)?;
                if done.count != count.count {
                    return Err(Errno::IO);
                }
            }
        }
        Ok(())
    }

    fn region(&self, index: u32) -> Result<&Region> {
        usize::try_from(index).ok().and_then(|index| self.regions.get(index)).ok_or(Errno::INVAL)
    }

    /// One command of SET_IRQS.
    fn send_irqs(&self, set: wire::IrqSet, data: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        let argsz = wire_length(size_of::<wire::IrqSet>() + data.len());
        let set = wire::IrqSet { argsz, ..set };
        self.main.request(Command::DeviceSetIrqs, &[set.as_bytes(), data], fds).map(|_| ())
    }

    /// Eventfds go in runs: a message has a descriptor for each of its vectors, or none at all.
    fn send_eventfds(&self, set: wire::IrqSet, eventfds: &[Option<OwnedFd>]) -> Result<()> {
        let mut start = set.start;
        for run in eventfds.chunk_by(|a, b| a.is_some() == b.is_some()) {
            let given = run.first().is_some_and(Option::is_some);
            // What carries no descriptors has no limit.
            let most = if given { self.server.max_fds.max(1) } else { run.len() };
            for part in run.chunks(most.max(1)) {
                let fds: Vec<_> = part.iter().flatten().map(AsFd::as_fd).collect();
                let count = wire_length(part.len());
                self.send_irqs(wire::IrqSet { start, count, ..set }, &[], &fds)?;
                start = start.saturating_add(count);
            }
        }
        Ok(())
    }
}

/// The first exchange: the minor version, what the server can do, and the socket for its commands if there is one.
fn greet(main: &Connection, options: &Options) -> Result<(u16, Capabilities, Option<OwnedFd>)> {
    let proposed = wire::Version { major: version::MAJOR, minor: version::MINOR };
    let payload = version::encode(proposed, options.capabilities);
    let reply = main.request(Command::Version, &[&payload], &[])?;
    let (agreed, mut server) = version::decode(&reply.payload).map_err(|_| Errno::PROTO)?;
    if agreed.major != proposed.major || agreed.minor > proposed.minor {
        return Err(Errno::PROTO);
    }
    let twin = match (server.twin_socket, server.twin_fd) {
        (false, _) => None,
        (true, Some(index)) if options.capabilities.twin_socket => {
            Some(reply.fds.into_iter().nth(index).ok_or(Errno::PROTO)?)
        }
        (true, _) => return Err(Errno::PROTO),
    };
    server.write_multiple &= options.capabilities.write_multiple;
    Ok((agreed.minor, server, twin))
}

/// Lengths of what is sent, which are small.
fn wire_length(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

impl Device for RemoteDevice {
    fn info(&self) -> Result<DeviceInfo> {
        Ok(self.info.clone())
    }

    fn region(&self, index: u32) -> Result<RegionInfo> {
        self.region(index).map(|region| region.info.clone())
    }

    fn read(&self, index: u32, offset: u64, to: &mut [u8]) -> Result<usize> {
        self.region(index)?;
        let mut done = 0;
        for part in to.chunks_mut(self.server.max_transfer) {
            let at = offset.checked_add(done as u64).ok_or(Errno::INVAL)?;
            let access = wire::RegionAccess { offset: at, region: index, count: wire_length(part.len()) };
            let reply = self.main.request(Command::RegionRead, &[access.as_bytes()], &[])?;
            let (came, data) = wire::split::<wire::RegionAccess>(&reply.payload)?;
            if data.len() > part.len() || usize::try_from(came.count) != Ok(data.len()) {
                return Err(Errno::PROTO);
            }
            part.get_mut(..data.len()).unwrap_or_default().copy_from_slice(data);
            done += data.len();
            if data.len() < part.len() {
                break;
            }
        }
        Ok(done)
    }

    fn write(&self, index: u32, offset: u64, from: &[u8]) -> Result<usize> {
        self.region(index)?;
        let posted = self.options.posted_writes && index != VFIO_PCI_CONFIG_REGION_INDEX;
        let mut done = 0;
        for part in from.chunks(self.server.max_transfer) {
            let at = offset.checked_add(done as u64).ok_or(Errno::INVAL)?;
            let access = wire::RegionAccess { offset: at, region: index, count: wire_length(part.len()) };
            let parts = [access.as_bytes(), part];
            if posted {
                self.main.post(Command::RegionWrite, &parts)?;
                done += part.len();
                continue;
            }
            let reply = self.main.request(Command::RegionWrite, &parts, &[])?;
            let (came, _) = wire::split::<wire::RegionAccess>(&reply.payload)?;
            let count = usize::try_from(came.count).ok().filter(|count| *count <= part.len());
            let count = count.ok_or(Errno::PROTO)?;
            done += count;
            if count < part.len() {
                break;
            }
        }
        Ok(done)
    }

    fn region_file(&self, index: u32) -> Option<RegionFile<'_>> {
        let (file, offset) = self.region(index).ok()?.file.as_ref()?;
        Some(RegionFile { file: file.as_fd(), offset: *offset })
    }

    fn irq(&self, index: u32) -> Result<IrqInfo> {
        let irq = usize::try_from(index).ok().and_then(|index| self.irqs.get(index));
        irq.copied().ok_or(Errno::INVAL)
    }

    fn set_irqs(&self, set: IrqSet) -> Result<()> {
        let data = match &set.data {
            IrqData::None => VFIO_IRQ_SET_DATA_NONE,
            IrqData::Bool(_) => VFIO_IRQ_SET_DATA_BOOL,
            IrqData::EventFd(_) => VFIO_IRQ_SET_DATA_EVENTFD,
        };
        let flags = data | set.action as u32;
        let head = wire::IrqSet { argsz: 0, flags, index: set.index, start: set.start, count: set.count };
        match &set.data {
            IrqData::None => self.send_irqs(head, &[], &[]),
            IrqData::Bool(vectors) => {
                let bytes: Vec<_> = vectors.iter().map(|vector| u8::from(*vector)).collect();
                self.send_irqs(head, &bytes, &[])
            }
            IrqData::EventFd(eventfds) => self.send_eventfds(head, eventfds),
        }
    }

    fn reset(&self) -> Result<()> {
        if !self.info.flags.contains(DeviceFlags::RESET) {
            return Err(Errno::NOTTY);
        }
        self.main.request(Command::DeviceReset, &[], &[]).map(|_| ())
    }

    fn open(&self, dma: Arc<dyn Dma>) -> Result<()> {
        self.memory.set(Some(dma));
        if let Some(length) = self.options.export {
            let range = IovaRange::with_length(Iova(0), length)?;
            self.map_memory(&MemoryWindow { range, prot: Prot::READ | Prot::WRITE, file: None })?;
        }
        Ok(())
    }

    fn close(&self) {
        if let Some(range) =
            self.options.export.and_then(|length| IovaRange::with_length(Iova(0), length).ok())
        {
            // A server that is gone uses no memory.
            let _ = self.unmap_memory(range);
        }
        self.memory.set(None);
        for (index, irq) in (0..).zip(&self.irqs) {
            if irq.count > 0 {
                let action = crate::irq::IrqAction::Trigger;
                // As above: nobody is left to signal.
                let _ = self.set_irqs(IrqSet { index, start: 0, count: 0, action, data: IrqData::None });
            }
        }
    }

    fn migration(&self) -> Option<&dyn Migration> {
        self.migration.as_ref().map(|migration| migration as &dyn Migration)
    }

    fn dma_logging(&self) -> Option<&dyn DmaLogging> {
        self.logging.as_ref().map(|logging| logging as &dyn DmaLogging)
    }
}

impl Drop for RemoteDevice {
    fn drop(&mut self) {
        self.main.shut_down();
        self.channel.shut_down();
        if let Some(service) = self.service.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            // A panic there has been reported.
            let _ = service.join();
        }
    }
}

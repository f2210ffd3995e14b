//! A device to test with, and the bodies of fuzz targets.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::fs::MemfdFlags;
use uapi::vfio::{VFIO_PCI_NUM_IRQS, VFIO_PCI_NUM_REGIONS};
use zerocopy::{FromBytes, IntoBytes};

use super::connection::Patience;
use super::server::{self, Server};
use super::transport::Broken;
use super::version::{self, Capabilities};
use super::wire::{COMMANDS, Header, Version};
use super::{Errno, Result, client};
use crate::device::{
    Area, Device, DeviceFlags, DeviceInfo, IoEventFd, IoEventSpot, Mappable, RegionFile, RegionFlags,
    RegionInfo,
};
use crate::dma::{Dma, NoDma};
use crate::irq::{IrqAction, IrqData, IrqFlags, IrqInfo, IrqSet};
use crate::migration::{Migration, MigrationFlags, MigrationStream, State};

/// The region with registers.
pub const REGISTERS: u32 = 0;
/// The region that is memory.
pub const MEMORY: u32 = 2;
/// Bytes of [`MEMORY`].
pub const MEMORY_SIZE: u64 = 0x4000;
/// Registers are plain memory up to here.
pub const SCRATCH_SIZE: usize = 0x20_0000;
/// Writing an address here copies [`COPY_LENGTH`] bytes from it to the address after them.
pub const COPY: u64 = SCRATCH_SIZE as u64;
/// Bytes that a copy moves.
pub const COPY_LENGTH: usize = 3 << 20;
/// Bytes of the registers, all together.
pub const REGISTERS_SIZE: u64 = COPY + 8;
/// The kind of interrupt that exists, and how many vectors it has.
pub const IRQ: u32 = 2;
/// See [`IRQ`].
pub const VECTORS: u32 = 5;

#[derive(Debug)]
struct Inner {
    scratch: Vec<u8>,
    dma: Arc<dyn Dma>,
    eventfds: Vec<Option<OwnedFd>>,
    calls: Vec<String>,
    state: State,
}

/// A device whose registers are memory, and which copies.
#[derive(Debug)]
pub struct Model {
    inner: Mutex<Inner>,
    memory: File,
    saved: Arc<Mutex<Vec<u8>>>,
}

impl Model {
    /// A new one.
    ///
    /// # Panics
    /// The host has no memory left.
    #[allow(clippy::unwrap_used, reason = "for tests")]
    pub fn new() -> Self {
        let memory = File::from(rustix::fs::memfd_create("model", MemfdFlags::CLOEXEC).unwrap());
        memory.set_len(MEMORY_SIZE).unwrap();
        let inner = Inner {
            scratch: vec![0; SCRATCH_SIZE],
            dma: Arc::new(NoDma),
            eventfds: Vec::new(),
            calls: Vec::new(),
            state: State::Running,
        };
        Self { inner: Mutex::new(inner), memory, saved: Arc::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What has been called since the last time, of what is noted.
    pub fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.lock().calls)
    }

    /// Access to the user's memory.
    pub fn dma(&self) -> Arc<dyn Dma> {
        Arc::clone(&self.lock().dma)
    }

    /// Signals a vector. Whether anybody is told.
    pub fn signal(&self, vector: usize) -> bool {
        let inner = self.lock();
        let eventfd = inner.eventfds.get(vector).and_then(Option::as_ref);
        eventfd.is_some_and(|eventfd| rustix::io::write(eventfd, &1u64.to_ne_bytes()).is_ok())
    }
}

impl Default for Model {
    fn default() -> Self {
        Self::new()
    }
}

impl Device for Model {
    fn info(&self) -> Result<DeviceInfo> {
        let flags = DeviceFlags::PCI | DeviceFlags::RESET;
        Ok(DeviceInfo {
            flags,
            regions: VFIO_PCI_NUM_REGIONS,
            irqs: VFIO_PCI_NUM_IRQS,
            atomic_completer: None,
        })
    }

    fn region(&self, index: u32) -> Result<RegionInfo> {
        let flags = RegionFlags::READ | RegionFlags::WRITE;
        let areas = vec![Area { offset: 0, size: 0x1000 }, Area { offset: 0x2000, size: 0x2000 }];
        match index {
            REGISTERS => {
                Ok(RegionInfo { flags, size: REGISTERS_SIZE, registers: true, ..Default::default() })
            }
            MEMORY => Ok(RegionInfo {
                flags,
                size: MEMORY_SIZE,
                mappable: Mappable::Areas(areas),
                registers: true,
                msix_mappable: true,
                kind: Some((0x8000_1234, 5)),
            }),
            _ if index < VFIO_PCI_NUM_REGIONS => Ok(RegionInfo::default()),
            _ => Err(Errno::INVAL),
        }
    }

    fn read(&self, index: u32, offset: u64, to: &mut [u8]) -> Result<usize> {
        match index {
            REGISTERS => {
                let inner = self.lock();
                let from = usize::try_from(offset).ok().and_then(|offset| inner.scratch.get(offset..));
                let from = from.ok_or(Errno::INVAL)?;
                let count = from.len().min(to.len());
                to.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
                Ok(count)
            }
            MEMORY => Ok(rustix::io::pread(&self.memory, to, offset)?),
            _ => Err(Errno::INVAL),
        }
    }

    fn write(&self, index: u32, offset: u64, from: &[u8]) -> Result<usize> {
        if index != REGISTERS {
            return Err(Errno::INVAL);
        }
        if offset == COPY {
            let address = u64::read_from_bytes(from).map_err(|_| Errno::INVAL)?;
            let dma = self.dma();
            let mut bytes = vec![0; COPY_LENGTH];
            let copied = dma.read(iommufd::iova::Iova(address), &mut bytes).and_then(|()| {
                dma.write(iommufd::iova::Iova(address.saturating_add(COPY_LENGTH as u64)), &bytes)
            });
            self.lock().calls.push(format!("copy {copied:?}"));
            return Ok(from.len());
        }
        let mut inner = self.lock();
        let to = usize::try_from(offset).ok().and_then(|offset| inner.scratch.get_mut(offset..));
        let to = to.ok_or(Errno::INVAL)?;
        let count = from.len().min(to.len());
        to.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
        Ok(count)
    }

    fn region_file(&self, index: u32) -> Option<RegionFile<'_>> {
        (index == MEMORY).then(|| RegionFile { file: self.memory.as_fd(), offset: 0 })
    }

    fn irq(&self, index: u32) -> Result<IrqInfo> {
        match index {
            IRQ => Ok(IrqInfo { flags: IrqFlags::EVENTFD, count: VECTORS }),
            _ if index < VFIO_PCI_NUM_IRQS => Ok(IrqInfo::default()),
            _ => Err(Errno::INVAL),
        }
    }

    fn set_irqs(&self, set: IrqSet) -> Result<()> {
        let mut inner = self.lock();
        inner.eventfds.resize_with(VECTORS as usize, || None);
        let call = match set.data {
            IrqData::None => {
                if set.count == 0 {
                    inner.eventfds.clear();
                }
                "none".to_owned()
            }
            IrqData::Bool(vectors) => format!("{vectors:?}"),
            IrqData::EventFd(eventfds) => {
                let given: Vec<_> = eventfds.iter().map(Option::is_some).collect();
                if set.action == IrqAction::Trigger {
                    let to = inner.eventfds.iter_mut().skip(set.start as usize);
                    to.zip(eventfds).for_each(|(to, from)| *to = from);
                }
                format!("eventfds {given:?}")
            }
        };
        inner.calls.push(format!("irqs {} {}+{} {:?} {call}", set.index, set.start, set.count, set.action));
        Ok(())
    }

    fn reset(&self) -> Result<()> {
        let mut inner = self.lock();
        inner.scratch.fill(0);
        inner.state = State::Running;
        inner.calls.push("reset".into());
        Ok(())
    }

    fn open(&self, dma: Arc<dyn Dma>) -> Result<()> {
        self.lock().dma = dma;
        Ok(())
    }

    fn close(&self) {
        let mut inner = self.lock();
        inner.dma = Arc::new(NoDma);
        inner.eventfds.clear();
    }

    fn ioeventfd(&self, ioeventfd: IoEventFd) -> Result<()> {
        let IoEventFd { region, offset, width, data, eventfd } = ioeventfd;
        let set = eventfd.is_some();
        self.lock().calls.push(format!("ioeventfd {region} {offset:#x} {width} {data} {set}"));
        Ok(())
    }

    fn io_event_spots(&self, index: u32) -> Result<Vec<IoEventSpot>> {
        self.region(index)?;
        let spot = |number| IoEventSpot { offset: 16 * number, width: 4, data: number };
        Ok(if index == REGISTERS { (0..3).map(spot).collect() } else { Vec::new() })
    }

    fn migration(&self) -> Option<&dyn Migration> {
        Some(self)
    }
}

/// The first bytes of the registers are the state.
const STATE_SIZE: usize = 3 << 19;

/// Reads or writes [`Model::saved`].
struct Stream {
    saved: Arc<Mutex<Vec<u8>>>,
    at: Mutex<usize>,
}

impl MigrationStream for Stream {
    fn read(&self, to: &mut [u8]) -> Result<usize> {
        let saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner);
        let mut at = self.at.lock().unwrap_or_else(PoisonError::into_inner);
        let from = saved.get(*at..).unwrap_or_default();
        let count = from.len().min(to.len());
        to.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
        *at += count;
        Ok(count)
    }

    fn write(&self, from: &[u8]) -> Result<usize> {
        let mut saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner);
        if saved.len() + from.len() > STATE_SIZE {
            return Err(Errno::INVAL);
        }
        saved.extend_from_slice(from);
        Ok(from.len())
    }
}

impl Migration for Model {
    fn flags(&self) -> MigrationFlags {
        MigrationFlags::STOP_COPY
    }

    fn state(&self) -> Result<State> {
        Ok(self.lock().state)
    }

    fn set_state(&self, to: State) -> Result<Option<Arc<dyn MigrationStream>>> {
        let mut inner = self.lock();
        let mut saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.state == State::Resuming && to == State::Stop {
            let from = saved.iter();
            inner.scratch.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
        }
        inner.state = to;
        saved.clear();
        match to {
            State::StopCopy => saved.extend_from_slice(inner.scratch.get(..STATE_SIZE).unwrap_or_default()),
            State::Resuming => {}
            State::Stop | State::Running => return Ok(None),
            _ => return Err(Errno::INVAL),
        }
        Ok(Some(Arc::new(Stream { saved: Arc::clone(&self.saved), at: Mutex::new(0) })))
    }

    fn stop_copy_length(&self) -> Result<u64> {
        Ok(STATE_SIZE as u64)
    }
}

/// A patience that tests can afford.
pub const SHORT: Patience =
    Patience { message: Duration::from_millis(100), reply: Duration::from_millis(100) };

/// Any bytes as what a client says, after a proper VERSION unless the first byte is odd.
pub fn serve_anything(bytes: &[u8]) {
    let Ok((ours, theirs)) = UnixStream::pair() else { return };
    let (choice, bytes) = bytes.split_first().unwrap_or((&0, &[]));
    if choice & 1 == 0 {
        let capabilities = Capabilities { twin_socket: choice & 2 != 0, ..Capabilities::OURS };
        let payload = version::encode(Version { major: 0, minor: 1 }, capabilities);
        let header = Header::command(0, super::wire::Command::Version, payload.len(), false);
        let _ = (&ours).write_all(&[header.as_bytes(), &payload].concat());
    }
    // What does not fit a socket is not sent.
    let _ = (&ours).write_all(bytes.get(..64 << 10).unwrap_or(bytes));
    let _ = ours.shutdown(std::net::Shutdown::Write);
    let options = server::Options { patience: SHORT, ..Default::default() };
    let broken = Server::new(Arc::new(Model::new()), options).serve(theirs.into());
    assert!(!matches!(broken, Broken::Socket(_)), "{broken}");
}

/// Any bytes as what a server answers to a client that connects and uses the device.
///
/// They are taken as replies one after the other: a byte whose lowest bits make flags and change the command, two bytes of
/// length, and the payload.
pub fn connect_to_anything(bytes: &[u8]) {
    let Ok((ours, theirs)) = UnixStream::pair() else { return };
    let mut rest = bytes.get(..64 << 10).unwrap_or(bytes);
    let mut stream = Vec::new();
    // The order in which a client asks for things is nobody's business; most replies are to the command that was sent.
    let commands = [1u16, 4].into_iter().chain([5; 9]).chain([7; 5]).chain([16; 2]).chain([9, 10]).cycle();
    for (id, expected) in (0u16..64).zip(commands) {
        let Some(([choice, low, high], after)) = rest.split_first_chunk() else { break };
        let length = usize::from(u16::from_le_bytes([*low, *high])) % 600;
        let (payload, after) = after.split_at_checked(length).unwrap_or((after, &[]));
        rest = after;
        let command = if choice & 0xc0 == 0xc0 {
            COMMANDS.get(usize::from(choice & 15)).map_or(99, |row| row.command as u16)
        } else {
            expected
        };
        let flags = if choice & 0x30 == 0x30 { u32::from(choice & 0xf) | 0x20 } else { 1 };
        let size = u32::try_from(payload.len() + Header::SIZE).unwrap_or(0);
        let header = Header { id, command, size, flags, error: u32::from(*choice) };
        stream.extend_from_slice(header.as_bytes());
        stream.extend_from_slice(payload);
    }
    let _ = (&ours).write_all(stream.get(..64 << 10).unwrap_or(&stream));
    let _ = ours.shutdown(std::net::Shutdown::Write);
    let options = client::Options { patience: SHORT, posted_writes: false, ..Default::default() };
    if let Ok(device) = client::RemoteDevice::connect(theirs.into(), options) {
        let _ = device.read(0, 0, &mut [0; 64]);
        let _ = device.write(0, 0, &[0; 64]);
    }
}

//! Devices of the host, through its kernel's own VFIO.
//!
//! # Theory of operation
//!
//! A [`HostDevice`] is a [`Device`] whose calls become system calls: registers by `pread` and `pwrite` of its descriptor,
//! interrupts by eventfds that the kernel signals, features as the driver offers them. There are two doors:
//!
//! - [`Door::Device`]: the device's own node, bound to an iommufd. An address space is an IOAS.
//! - [`Door::Group`]: the group's node and VFIO's container, which kernels before 6.6 have alone.
//!
//! **Memory.** Such a device accesses memory by itself, through the host's IOMMU. It reaches what is mapped in the
//! [`AddressSpace`] that it is in, nothing else; the memory that [`Device::open`] gives is not asked. So whoever gives such
//! a device to a guest maps the guest's memory there ([`AddressSpace::map_guest`]), once for all devices in it. The
//! kernel locks that memory.
//!
//! **One user.** A device has one user at a time, whichever door, and all devices of an IOMMU group belong to one: the
//! address space keeps the groups that it has opened.
//!
//! **Registers can be mapped** ([`HostDevice::map_registers`]), but they are not what [`Device::region_file`] gives: that is
//! memory, which may be handed on to others, and here it would be the descriptor of the whole device.
//!
//! **An [`iommufd::Context`] of our own** can have such a device, above the host's IOMMU ([`HostDevice::for_context`]): then the
//! device has as many address spaces as the context says. Its domains are page tables of the host's iommufd, or, by the
//! group's door, what a container of the device's own is changed to have (`contained`).
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use iommufd::{domain::Prot, iova::Iova};
//! use vfio::{device::Device, kernel::{AddressSpace, HostDevice}};
//! use vm_memory::MmapRegion;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let address = "0000:00:05.0".parse()?;
//! let space = AddressSpace::new(HostDevice::door(address, None)?)?;
//! let device = HostDevice::open_in(address, &space)?;
//! let memory = Arc::new(MmapRegion::<()>::new(1 << 20)?);
//! space.map(Iova(0x100000), &memory, Prot::READ | Prot::WRITE)?;
//! device.write(7, 4, &[6, 0])?; // memory, bus master
//! let mut register = [0; 4];
//! device.read(0, 0, &mut register)?;
//! # Ok(())
//! # }
//! ```
//!
//! Contents: `host`, what sysfs tells; `space`, address spaces and the ways through both doors; `container`, the group's;
//! `contained`, the same for a context; `info`, `features`; `registers`, mapped ones. The system calls are in [`iommufd::kernel::calls`].

mod contained;
mod container;
mod error;
mod features;
mod host;
mod info;
mod name;
mod registers;
mod space;

use core::fmt;
use std::{
    fs::File,
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::FileExt,
    },
    path::PathBuf,
    sync::Arc,
};

use iommufd::{
    hardware::Hardware,
    kernel::{
        HostHardware, HostPort,
        calls::{self, Bare, Plain},
    },
};
use uapi::vfio::{
    VFIO_DEVICE_ATTACH_PASID, VFIO_DEVICE_DETACH_PASID, VFIO_DEVICE_IOEVENTFD_8, VFIO_IRQ_SET_DATA_BOOL,
    VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE, VFIO_PCI_CONFIG_REGION_INDEX,
    vfio_device_attach_iommufd_pt, vfio_device_detach_iommufd_pt, vfio_device_ioeventfd, vfio_irq_set,
};
use zerocopy::IntoBytes;

pub use iommufd::kernel::HostIommu;

pub use crate::pci::address::Address as PciAddress;

use self::{
    contained::ContainerHardware,
    container::Container,
    features::{HostLogging, HostMigration},
    host::{Found, Host},
    info::Region,
};
pub use self::{
    error::{KernelError, MapError},
    name::{HostDeviceName, NoHostDeviceName},
    registers::{Register, Registers},
    space::AddressSpace,
};
use crate::{
    Errno, Result,
    device::{Area, Device, DeviceFlags, DeviceInfo, DmaLogging, IoEventFd, LowPower, RegionInfo},
    dma::Dma,
    irq::{IrqAction, IrqData, IrqInfo, IrqSet},
    migration::Migration,
};

/// How a device is had.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Door {
    /// By its own node, `/dev/vfio/devices/vfioN`, and `/dev/iommu`.
    Device,
    /// By its group's, `/dev/vfio/N`, and `/dev/vfio/vfio`.
    Group,
}

impl fmt::Display for Door {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Device => "own node",
            Self::Group => "group",
        })
    }
}

/// A device of the host.
#[derive(Debug)]
pub struct HostDevice {
    address: PciAddress,
    group: u32,
    file: Arc<File>,
    reach: Reach,
    info: DeviceInfo,
    regions: Vec<Region>,
    irqs: Vec<IrqInfo>,
    migration: Option<HostMigration>,
    logging: Option<HostLogging>,
    low_power: bool,
}

/// What decides which memory it reaches.
enum Reach {
    /// An address space, in which others may be.
    Space(Arc<AddressSpace>),
    /// A context, by page tables of the host's iommufd.
    Iommufd(Arc<HostIommu>, Arc<Port>),
    /// A context, by the container.
    Container(Arc<Container>),
}

impl fmt::Debug for Reach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Space(space) => space.fmt(f),
            Self::Iommufd(_, port) => port.fmt(f),
            Self::Container(_) => f.write_str("Container"),
        }
    }
}

/// Regions, and kinds of interrupts, that a device may have here.
const MAX_INDICES: u32 = 64;
/// The command register, and its bit that lets the device access memory (PCI Local Bus 3.0, section 6.2.2).
const COMMAND: u64 = 4;
const BUS_MASTER: u8 = 4;

impl HostDevice {
    /// Which door leads to the device: the one that is wanted, or else its own node where the kernel has that.
    ///
    /// # Errors
    /// A [`KernelError`] that says what is to be done.
    pub fn door(address: PciAddress, wanted: Option<Door>) -> Result<Door, KernelError> {
        let host = Host::default();
        host.door(&host.find(address)?, wanted)
    }

    /// The number of a device's IOMMU group: devices of one cannot be kept apart, and are in one address space.
    ///
    /// # Errors
    /// A [`KernelError`] that says what is to be done.
    pub fn group_of(address: PciAddress) -> Result<u32, KernelError> {
        Host::default().find(address).map(|found| found.group)
    }

    /// Opens a device in an address space, which decides the door.
    ///
    /// # Errors
    /// A [`KernelError`] that says what is to be done.
    pub fn open_in(address: PciAddress, space: &Arc<AddressSpace>) -> Result<Self, KernelError> {
        let host = Host::default();
        let found = host.find(address)?;
        host.door(&found, Some(space.door()))?;
        let file = match space.ioas() {
            None => Arc::new(space.open_in_group(&host, &found)?.into()),
            Some(ioas) => {
                let (fd, id) = space::open_node(ioas.iommu(), &found)?;
                let port = Port { device: Arc::new(fd.into()), id };
                port.attach(None, ioas.id()).map_err(space::refused_attach(address))?;
                port.device
            }
        };
        Self::new(&found, file, Reach::Space(Arc::clone(space)))
    }

    /// Opens a device in an address space of its own.
    ///
    /// # Errors
    /// A [`KernelError`] that says what is to be done.
    pub fn connect(address: PciAddress, wanted: Option<Door>) -> Result<Self, KernelError> {
        Self::open_in(address, &AddressSpace::new(Self::door(address, wanted)?)?)
    }

    /// Opens a device for a [`Context`](iommufd::Context), which binds it as [`Self::hardware`]: attached to nothing, by its own
    /// node and an iommufd, or by its group and a container of its own. `iommu` is the iommufd, opened when there is none yet:
    /// devices of one can share page tables.
    ///
    /// # Errors
    /// A [`KernelError`] that says what is to be done.
    pub fn for_context(
        address: PciAddress,
        door: Door,
        iommu: &mut Option<Arc<HostIommu>>,
    ) -> Result<Self, KernelError> {
        let host = Host::default();
        let found = host.find(address)?;
        match host.door(&found, Some(door))? {
            Door::Device => {
                let iommu = match iommu {
                    Some(iommu) => Arc::clone(iommu),
                    none => {
                        let refused = |source| KernelError::Open { path: "/dev/iommu".into(), source };
                        Arc::clone(none.insert(HostIommu::open().map_err(refused)?))
                    }
                };
                let (fd, id) = space::open_node(&iommu, &found)?;
                let port = Arc::new(Port { device: Arc::new(fd.into()), id });
                Self::new(&found, Arc::clone(&port.device), Reach::Iommufd(iommu, port))
            }
            Door::Group => {
                let container = Arc::new(Container::new()?);
                let file = Arc::new(container.open_device(&host, &found)?.into());
                Self::new(&found, file, Reach::Container(container))
            }
        }
    }

    /// The host's IOMMU as this device sees it, for one that [`Self::for_context`] has opened. It is asked for once.
    ///
    /// # Errors
    /// ENODEV for a device that is in an [`AddressSpace`]; the kernel's.
    ///
    /// # Safety
    /// As for [`HostHardware::new`].
    #[allow(unsafe_code, reason = "hands the promise on")]
    pub unsafe fn hardware(&self) -> Result<Arc<dyn Hardware>> {
        let group = self.group.into();
        match &self.reach {
            Reach::Space(_) => Err(Errno::NODEV),
            Reach::Iommufd(iommu, port) => {
                // SAFETY: the caller's word.
                let hardware = unsafe { HostHardware::new(Arc::clone(iommu), Arc::clone(port) as _, group) };
                Ok(hardware?)
            }
            Reach::Container(container) => {
                let ranges = container.ranges()?;
                // SAFETY: the caller's word.
                let hardware = unsafe { ContainerHardware::new(Arc::clone(container) as _, ranges, group) };
                Ok(Arc::new(hardware))
            }
        }
    }

    fn new(found: &Found, file: Arc<File>, reach: Reach) -> Result<Self, KernelError> {
        let address = found.address;
        let refused = |what| move |source| KernelError::Refused { what, address, source };
        let info = info::device(&file).map_err(refused("describe"))?;
        if info.regions > MAX_INDICES || info.irqs > MAX_INDICES {
            return Err(KernelError::Unknown("gives a device more regions or interrupts than are known"));
        }
        let regions = (0..info.regions).map(|index| info::region(&file, index, info.flags));
        let regions = regions.collect::<Result<_>>().map_err(refused("describe regions of"))?;
        let irqs = (0..info.irqs).map(|index| info::irq(&file, index));
        let irqs = irqs.collect::<Result<_>>().map_err(refused("describe interrupts of"))?;
        Ok(Self {
            address,
            group: found.group,
            migration: HostMigration::probe(&file),
            logging: HostLogging::probe(&file),
            low_power: features::has_low_power(file.as_fd()),
            file,
            reach,
            info,
            regions,
            irqs,
        })
    }

    /// Where it is.
    #[must_use]
    pub fn address(&self) -> PciAddress {
        self.address
    }

    /// The number of its IOMMU group.
    #[must_use]
    pub fn group(&self) -> u32 {
        self.group
    }

    /// The address space that it is in; none for one that is a context's ([`Self::for_context`]).
    #[must_use]
    pub fn space(&self) -> Option<&Arc<AddressSpace>> {
        match &self.reach {
            Reach::Space(space) => Some(space),
            Reach::Iommufd(..) | Reach::Container(_) => None,
        }
    }

    /// Maps an area of a region that is [`Mappable`](crate::device::Mappable).
    ///
    /// # Errors
    /// EINVAL for an area that cannot be mapped; the kernel's.
    pub fn map_registers(&self, index: u32, area: Area) -> Result<Registers> {
        let region = self.region(index)?;
        let end = area.offset.checked_add(area.size).ok_or(Errno::INVAL)?;
        let inside = |whole: &Area| whole.offset <= area.offset && end <= whole.offset + whole.size;
        if !region.info.mappable.areas(region.info.size).iter().any(inside) {
            return Err(Errno::INVAL);
        }
        Registers::map(self.file.as_fd(), region.start, area)
    }

    fn region(&self, index: u32) -> Result<&Region> {
        usize::try_from(index).ok().and_then(|index| self.regions.get(index)).ok_or(Errno::INVAL)
    }

    /// Where `offset` of a region is in the descriptor.
    fn place(&self, index: u32, offset: u64) -> Result<u64> {
        let region = self.region(index)?;
        let at = region.start.checked_add(offset).filter(|_| offset <= region.info.size);
        at.ok_or(Errno::INVAL)
    }

    /// Takes away the device's right to access memory.
    fn stop(&self) {
        let mut command = [0];
        if self.read(VFIO_PCI_CONFIG_REGION_INDEX, COMMAND, &mut command) == Ok(1) {
            let [command] = command;
            // One that cannot be written to is gone.
            let _ = self.write(VFIO_PCI_CONFIG_REGION_INDEX, COMMAND, &[command & !BUS_MASTER]);
        }
    }
}

/// Opens a node of the host's.
fn open(path: impl Into<PathBuf>) -> Result<File, KernelError> {
    let path = path.into();
    File::options().read(true).write(true).open(&path).map_err(|source| KernelError::Open { path, source })
}

fn errno(error: std::io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

impl Device for HostDevice {
    fn info(&self) -> Result<DeviceInfo> {
        Ok(self.info.clone())
    }

    fn region(&self, index: u32) -> Result<RegionInfo> {
        self.region(index).map(|region| region.info.clone())
    }

    fn read(&self, index: u32, offset: u64, to: &mut [u8]) -> Result<usize> {
        self.file.read_at(to, self.place(index, offset)?).map_err(errno)
    }

    fn write(&self, index: u32, offset: u64, from: &[u8]) -> Result<usize> {
        self.file.write_at(from, self.place(index, offset)?).map_err(errno)
    }

    fn irq(&self, index: u32) -> Result<IrqInfo> {
        usize::try_from(index).ok().and_then(|index| self.irqs.get(index)).copied().ok_or(Errno::INVAL)
    }

    fn set_irqs(&self, set: IrqSet) -> Result<()> {
        let (kind, data) = match &set.data {
            IrqData::None => (VFIO_IRQ_SET_DATA_NONE, Vec::new()),
            IrqData::Bool(vectors) => {
                (VFIO_IRQ_SET_DATA_BOOL, vectors.iter().map(|vector| u8::from(*vector)).collect())
            }
            IrqData::EventFd(vectors) => {
                let number = |fd: &Option<_>| fd.as_ref().map_or(-1, AsRawFd::as_raw_fd);
                (VFIO_IRQ_SET_DATA_EVENTFD, vectors.iter().flat_map(|fd| number(fd).to_ne_bytes()).collect())
            }
        };
        let head = vfio_irq_set {
            flags: kind | set.action as u32,
            index: set.index,
            start: set.start,
            count: set.count,
            ..Default::default()
        };
        let mut bytes = head.as_bytes().to_vec();
        bytes.extend(data);
        calls::sized(self.file.as_fd(), Plain::SetIrqs, &mut bytes).map(drop)
    }

    fn reset(&self) -> Result<()> {
        if !self.info.flags.contains(DeviceFlags::RESET) {
            return Err(Errno::INVAL);
        }
        calls::bare(self.file.as_fd(), Bare::Reset, 0).map(drop)
    }

    /// The device reaches what its [`AddressSpace`] has, not `dma`. One that has no reset is left as it is.
    fn open(&self, dma: Arc<dyn Dma>) -> Result<()> {
        drop(dma);
        if self.info.flags.contains(DeviceFlags::RESET) { self.reset() } else { Ok(()) }
    }

    fn close(&self) {
        self.stop();
        for (index, irq) in (0..).zip(&self.irqs) {
            if irq.count > 0 {
                let none =
                    IrqSet { index, start: 0, count: 0, action: IrqAction::Trigger, data: IrqData::None };
                // A kind that was not set up is refused, and a device that is gone signals nothing.
                let _ = self.set_irqs(none);
            }
        }
        if self.info.flags.contains(DeviceFlags::RESET) {
            let _ = self.reset();
        }
    }

    fn ioeventfd(&self, ioeventfd: IoEventFd) -> Result<()> {
        let IoEventFd { region, offset, width, data, eventfd } = ioeventfd;
        if !matches!(width, 1 | 2 | 4 | 8) {
            return Err(Errno::INVAL);
        }
        let mut call = vfio_device_ioeventfd {
            // The flags are as wide as what they stand for.
            flags: VFIO_DEVICE_IOEVENTFD_8 * u32::from(width),
            offset: self.place(region, offset)?,
            data,
            fd: eventfd.as_ref().map_or(-1, AsRawFd::as_raw_fd),
            ..Default::default()
        };
        calls::fixed(self.file.as_fd(), Plain::IoEventFd, &mut call).map(drop)
    }

    fn migration(&self) -> Option<&dyn Migration> {
        self.migration.as_ref().map(|migration| migration as &dyn Migration)
    }

    fn dma_logging(&self) -> Option<&dyn DmaLogging> {
        self.logging.as_ref().map(|logging| logging as &dyn DmaLogging)
    }

    fn has_low_power(&self) -> bool {
        self.low_power
    }

    fn low_power(&self, state: LowPower) -> Result<()> {
        features::low_power(self.file.as_fd(), &state)
    }
}

/// A device's descriptor that is bound to an iommufd.
#[derive(Debug)]
struct Port {
    device: Arc<File>,
    id: u32,
}

impl HostPort for Port {
    fn id(&self) -> u32 {
        self.id
    }

    fn attach(&self, pasid: Option<u32>, table: u32) -> Result<()> {
        let mut attach = vfio_device_attach_iommufd_pt {
            flags: if pasid.is_some() { VFIO_DEVICE_ATTACH_PASID } else { 0 },
            pt_id: table,
            pasid: pasid.unwrap_or(0),
            ..Default::default()
        };
        calls::fixed(self.device.as_fd(), Plain::Attach, &mut attach).map(drop)
    }

    fn detach(&self, pasid: Option<u32>) -> Result<()> {
        let mut detach = vfio_device_detach_iommufd_pt {
            flags: if pasid.is_some() { VFIO_DEVICE_DETACH_PASID } else { 0 },
            pasid: pasid.unwrap_or(0),
            ..Default::default()
        };
        calls::fixed(self.device.as_fd(), Plain::Detach, &mut detach).map(drop)
    }
}

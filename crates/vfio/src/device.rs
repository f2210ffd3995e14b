//! What a device is to whoever gives it to somebody.

use core::fmt;
use std::{
    os::fd::{BorrowedFd, OwnedFd},
    sync::Arc,
};

use iommufd::{domain::DirtySink, iova::IovaRange};
use uapi::vfio::{
    VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
};

use crate::{
    Errno, Result,
    dma::Dma,
    irq::{IrqInfo, IrqSet},
    migration::Migration,
};

bitflags::bitflags! {
    /// What kind of device it is (`VFIO_DEVICE_FLAGS_*`). `VFIO_DEVICE_FLAGS_CAPS` follows from [`DeviceInfo`].
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct DeviceFlags: u32 {
        /// [`Device::reset`] works.
        const RESET = VFIO_DEVICE_FLAGS_RESET;
        /// Its regions and interrupts have the numbers of a PCI function (`VFIO_PCI_*_INDEX`).
        const PCI = VFIO_DEVICE_FLAGS_PCI;
    }

    /// How a region can be accessed (`VFIO_REGION_INFO_FLAG_*`). MMAP and CAPS follow from the rest of [`RegionInfo`].
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct RegionFlags: u32 {
        /// By [`Device::read`].
        const READ = VFIO_REGION_INFO_FLAG_READ;
        /// By [`Device::write`].
        const WRITE = VFIO_REGION_INFO_FLAG_WRITE;
    }
}

/// What a device is (`struct vfio_device_info`).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DeviceInfo {
    /// Its kind.
    pub flags: DeviceFlags,
    /// How many regions it has: those below have an index, though perhaps no size.
    pub regions: u32,
    /// How many kinds of interrupts.
    pub irqs: u32,
    /// Atomic operations of PCIe that it can complete (`VFIO_PCI_ATOMIC_COMP*`); none without the capability.
    pub atomic_completer: Option<u32>,
}

/// A part of a region.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Area {
    /// Where it begins in the region: a multiple of the page size.
    pub offset: u64,
    /// How long it is: a multiple of the page size.
    pub size: u64,
}

/// What of a region can be mapped into an address space.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Mappable {
    /// Nothing.
    #[default]
    No,
    /// All of it.
    All,
    /// These areas, in order and apart: the capability SPARSE_MMAP. An empty list means the capability with no area.
    Areas(Vec<Area>),
}

impl Mappable {
    /// The areas of a region of `size` bytes.
    #[must_use]
    pub fn areas(&self, size: u64) -> Vec<Area> {
        match self {
            Self::No => Vec::new(),
            Self::All => vec![Area { offset: 0, size }],
            Self::Areas(areas) => areas.clone(),
        }
    }
}

/// What a region is (`struct vfio_region_info`, and its capabilities).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct RegionInfo {
    /// How it can be accessed; nothing for a region that the device does not have.
    pub flags: RegionFlags,
    /// How many bytes it has; 0 for one that the device does not have.
    pub size: u64,
    /// What of it is plain memory in the file of [`Device::region_file`].
    pub mappable: Mappable,
    /// The rest are registers that take loads and stores: it, too, can be mapped by who catches the accesses and makes
    /// calls of [`Device::read`] and [`Device::write`] of them.
    pub registers: bool,
    /// The areas that may be mapped include MSI-X's table: the capability MSIX_MAPPABLE.
    pub msix_mappable: bool,
    /// Type and subtype of a region that the bus does not define: the capability TYPE.
    pub kind: Option<(u32, u32)>,
}

/// The memory behind a region.
#[derive(Clone, Copy, Debug)]
pub struct RegionFile<'a> {
    /// To be mapped shared.
    pub file: BorrowedFd<'a>,
    /// Where in the file the region begins.
    pub offset: u64,
}

/// An eventfd that stands for a write of one value to one place of a region (`VFIO_DEVICE_IOEVENTFD`).
#[derive(Debug)]
pub struct IoEventFd {
    /// The region.
    pub region: u32,
    /// Where in it, a multiple of `width`.
    pub offset: u64,
    /// How many bytes are written: 1, 2, 4 or 8.
    pub width: u8,
    /// What is written.
    pub data: u64,
    /// Whose signal does it; none takes away the one that is there.
    pub eventfd: Option<OwnedFd>,
}

/// A place where an eventfd can stand for a write: what [`Device::ioeventfd`] takes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IoEventSpot {
    /// Where in the region.
    pub offset: u64,
    /// How many bytes are written: 1, 2, 4 or 8.
    pub width: u8,
    /// What is written.
    pub data: u64,
}

/// What a user asks of a device's power (`VFIO_DEVICE_FEATURE_LOW_POWER_*`).
#[derive(Debug)]
pub enum LowPower {
    /// It may sleep until it is accessed.
    Enter,
    /// The same, and the eventfd is signalled when it wakes up.
    EnterWithWakeup(OwnedFd),
    /// It must be awake.
    Exit,
}

/// A log of what a device's DMA has written to.
pub trait DmaLogging: Send + Sync {
    /// Notes writes to `ranges` from now on, in pages of about `page_size` bytes: the size that it notes in.
    ///
    /// # Errors
    /// EINVAL for ranges that overlap or are empty or when it notes already, EOPNOTSUPP for too many.
    fn start(&self, page_size: u64, ranges: &[IovaRange]) -> Result<u64>;

    /// Stops, and forgets what was noted. Nothing when it does not note.
    fn stop(&self);

    /// Reports what was written to in `range` since the last report, and forgets it.
    ///
    /// # Errors
    /// EINVAL when it does not note.
    fn report(&self, range: IovaRange, sink: &mut dyn DirtySink) -> Result<()>;
}

/// A device.
///
/// All calls may come from any thread, several at once. Indices of regions and interrupts come as the user gave them, and
/// so do offsets and lengths: whatever they are, the answer is an errno at worst. A call holds none of the
/// device's locks while it waits for memory ([`Dma`]) or for a peer.
pub trait Device: Send + Sync + fmt::Debug {
    /// What it is.
    ///
    /// # Errors
    /// Of a device that must be asked.
    fn info(&self) -> Result<DeviceInfo>;

    /// What region `index` is.
    ///
    /// # Errors
    /// EINVAL when it has not so many.
    fn region(&self, index: u32) -> Result<RegionInfo>;

    /// Reads region `index` from `offset`: how many bytes, fewer at the end of the region.
    ///
    /// # Errors
    /// EINVAL for what cannot be read or lies outside, EIO when the device does not answer (its memory is disabled).
    fn read(&self, index: u32, offset: u64, to: &mut [u8]) -> Result<usize>;

    /// Writes `from` to region `index` at `offset`: how many bytes.
    ///
    /// # Errors
    /// As [`Self::read`].
    fn write(&self, index: u32, offset: u64, from: &[u8]) -> Result<usize>;

    /// The memory behind what is [`Mappable`] of region `index`.
    fn region_file(&self, index: u32) -> Option<RegionFile<'_>> {
        let _ = index;
        None
    }

    /// What interrupts of kind `index` it has.
    ///
    /// # Errors
    /// EINVAL when it has not so many kinds.
    fn irq(&self, index: u32) -> Result<IrqInfo>;

    /// Sets up, masks, unmasks or signals interrupts.
    ///
    /// # Errors
    /// EINVAL for vectors that do not exist, ENOTTY for an action that the kind does not know.
    fn set_irqs(&self, set: IrqSet) -> Result<()>;

    /// Back to the state after power-up. Interrupts that were set up stay set up, and so do the registers of a
    /// configuration space that software programs.
    ///
    /// # Errors
    /// EINVAL when it has no reset.
    fn reset(&self) -> Result<()>;

    /// A user has come: from now on the device may access memory by `dma`. It is as after a reset. Calls of open and
    /// close alternate.
    ///
    /// # Errors
    /// Whatever makes the device unusable; it is closed then.
    fn open(&self, dma: Arc<dyn Dma>) -> Result<()>;

    /// The user has gone: no access to memory is under way or will begin, no interrupt is signalled, and eventfds are
    /// closed.
    fn close(&self);

    /// Lets an eventfd stand for a write.
    ///
    /// # Errors
    /// ENOTTY when it does not offer that, EEXIST for one that is there, ENODEV when none is there to take away,
    /// ENOSPC when there are too many.
    fn ioeventfd(&self, ioeventfd: IoEventFd) -> Result<()> {
        let _ = ioeventfd;
        Err(Errno::NOTTY)
    }

    /// The places of region `index` that are written to often, for users who let eventfds stand for writes on their own
    /// initiative.
    ///
    /// # Errors
    /// EINVAL when it has not so many regions.
    fn io_event_spots(&self, index: u32) -> Result<Vec<IoEventSpot>> {
        self.region(index).map(|_| Vec::new())
    }

    /// Its migration, if it can be migrated.
    fn migration(&self) -> Option<&dyn Migration> {
        None
    }

    /// Its log of DMA, if it keeps one.
    fn dma_logging(&self) -> Option<&dyn DmaLogging> {
        None
    }

    /// Whether [`Self::low_power`] works.
    fn has_low_power(&self) -> bool {
        false
    }

    /// Changes its power state.
    ///
    /// # Errors
    /// ENOTTY when it has no such states, EINVAL when it is asked to sleep twice.
    fn low_power(&self, state: LowPower) -> Result<()> {
        let _ = state;
        Err(Errno::NOTTY)
    }
}

//! An open device: what a device's own node and its group give.

use std::{
    collections::BTreeSet,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex, OnceLock},
};

use iommufd::{BoundDevice, process::UserAddr};

#[cfg(feature = "group")]
use super::group::GroupUse;
use super::{
    Caller,
    system::{Slot, System, Use},
    table::{self, Call},
    token::Uuid,
};
use crate::{Errno, Result, device::Mappable, dma::Dma, eventfd::lock};

/// A region's offsets in the file are its index shifted by so much, as in the kernel's vfio-pci.
pub const REGION_SHIFT: u32 = 40;

/// What a range of a device's file is, for who maps it.
#[derive(Debug)]
pub enum Mapping {
    /// Memory: a file to be mapped shared.
    Memory {
        /// The file.
        file: OwnedFd,
        /// Where in it.
        offset: u64,
    },
    /// Registers: each access must become a [`DeviceFile::read_at`] or [`DeviceFile::write_at`] of the same offset in the
    /// device's file.
    Registers,
}

/// By which door the device was reached.
#[derive(Debug)]
pub(super) enum Way {
    #[cfg(feature = "device-cdev")]
    Device,
    #[cfg(feature = "group")]
    #[allow(dead_code, reason = "kept so that the group stays in use")]
    Group(Arc<GroupUse>),
}

/// What an open device has; a node that is not bound yet has nothing.
#[derive(Debug)]
pub(super) struct Opening {
    pub(super) bound: Option<Arc<BoundDevice>>,
    /// What of it is attached to something: its plain DMA (none), and PASIDs.
    pub(super) attached: Mutex<BTreeSet<Option<u32>>>,
}

/// An open device.
#[derive(Debug)]
pub struct DeviceFile {
    pub(super) slot: Arc<Slot>,
    pub(super) way: Way,
    /// Set once: there is no way to unbind but closing.
    pub(super) opening: OnceLock<Opening>,
    /// Taken to set it.
    #[cfg(feature = "device-cdev")]
    pub(super) binding: Mutex<()>,
}

/// The memory of a device, and what it is bound to for it.
pub(super) type Bound = (Option<Arc<BoundDevice>>, Arc<dyn Dma>);

impl DeviceFile {
    #[cfg(feature = "device-cdev")]
    pub(super) fn unbound(slot: Arc<Slot>, way: Way) -> Arc<Self> {
        Arc::new(Self { slot, way, opening: OnceLock::new(), binding: Mutex::default() })
    }

    /// Opens the device. `shared`: it may be open already, as only the file of a group may. EINVAL when it may not.
    pub(super) fn open(
        &self,
        token: Option<Uuid>,
        shared: bool,
        bind: impl FnOnce() -> Result<Bound>,
    ) -> Result<()> {
        let mut in_use = lock(&self.slot.in_use);
        if in_use.files > 0 && !shared {
            return Err(Errno::INVAL);
        }
        self.slot.token.open(token)?;
        if in_use.files == 0
            && let Err(errno) = Self::first(&self.slot, &mut in_use, bind)
        {
            self.slot.token.close();
            return Err(errno);
        }
        in_use.files += 1;
        let opening = Opening { bound: in_use.bound.clone(), attached: Mutex::default() };
        // Nobody else sets it: the caller has `binding`, or has just made the file.
        let _ = self.opening.set(opening);
        Ok(())
    }

    fn first(slot: &Slot, in_use: &mut Use, bind: impl FnOnce() -> Result<Bound>) -> Result<()> {
        let (bound, dma) = bind()?;
        slot.device.open(dma)?;
        in_use.bound = bound;
        Ok(())
    }

    /// What an open device has. EINVAL for a node that is not bound.
    pub(super) fn opening(&self) -> Result<&Opening> {
        self.opening.get().ok_or(Errno::INVAL)
    }

    pub(super) fn system(&self) -> Option<Arc<System>> {
        self.slot.system.upgrade()
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &Arc<dyn crate::device::Device> {
        &self.slot.device
    }

    /// `ioctl`: what it returns.
    ///
    /// # Errors
    /// EINVAL for all but `VFIO_DEVICE_BIND_IOMMUFD` before that; ENOTTY for what there is not; and what the call documents.
    pub fn ioctl(self: &Arc<Self>, caller: &dyn Caller, cmd: u32, arg: UserAddr) -> Result<i32> {
        let found = table::DEVICE.iter().find(|ioctl| ioctl.command == cmd);
        if self.opening.get().is_none() && found.is_none_or(|ioctl| !ioctl.unbound) {
            return Err(Errno::INVAL);
        }
        (found.ok_or(Errno::NOTTY)?.run)(&Call { file: self, caller, arg })
    }

    /// `pread` at an offset of the file.
    ///
    /// # Errors
    /// EINVAL before it is bound and where no region is, EIO where the device does not answer, EFAULT past the configuration
    /// space.
    pub fn read_at(&self, offset: u64, to: &mut [u8]) -> Result<usize> {
        self.opening()?;
        if to.is_empty() {
            return Ok(0);
        }
        let (region, offset) = place(offset)?;
        self.slot.device.read(region, offset, to)
    }

    /// `pwrite`. Errors as [`Self::read_at`].
    ///
    /// # Errors
    /// As [`Self::read_at`].
    pub fn write_at(&self, offset: u64, from: &[u8]) -> Result<usize> {
        self.opening()?;
        if from.is_empty() {
            return Ok(0);
        }
        let (region, offset) = place(offset)?;
        self.slot.device.write(region, offset, from)
    }

    /// `mmap` of `length` bytes at `offset` of the file: what is to be mapped there.
    ///
    /// # Errors
    /// EINVAL before it is bound, for a private mapping, and for what is not all in one region that can be mapped.
    pub fn mmap(&self, offset: u64, length: u64, shared: bool) -> Result<Mapping> {
        self.opening()?;
        let (index, at) = place(offset)?;
        let info = self.slot.device.region(index)?;
        let length = length.checked_next_multiple_of(4096).ok_or(Errno::INVAL)?;
        let end = at.checked_add(length).ok_or(Errno::INVAL)?;
        if !shared || length == 0 || end > info.size {
            return Err(Errno::INVAL);
        }
        let areas = info.mappable.areas(info.size);
        let inside = |area: &crate::device::Area| {
            area.offset <= at && area.offset.checked_add(area.size).is_some_and(|last| end <= last)
        };
        if areas.iter().any(inside) {
            let file = self.slot.device.region_file(index).ok_or(Errno::INVAL)?;
            let offset = file.offset.checked_add(at).ok_or(Errno::INVAL)?;
            return Ok(Mapping::Memory {
                file: file.file.as_fd().try_clone_to_owned().map_err(|_| Errno::MFILE)?,
                offset,
            });
        }
        if info.registers
            && info.mappable != Mappable::All
            && self.system().is_some_and(|system| system.maps_registers)
        {
            return Ok(Mapping::Registers);
        }
        Err(Errno::INVAL)
    }
}

/// The region of an offset of the file, and the offset in it.
pub(super) fn place(offset: u64) -> Result<(u32, u64)> {
    let region = u32::try_from(offset >> REGION_SHIFT).map_err(|_| Errno::INVAL)?;
    Ok((region, offset & ((1 << REGION_SHIFT) - 1)))
}

impl Drop for DeviceFile {
    fn drop(&mut self) {
        let Some(opening) = self.opening.take() else { return };
        {
            let mut in_use = lock(&self.slot.in_use);
            in_use.files = in_use.files.saturating_sub(1);
            if in_use.files == 0 {
                // First nothing of the device is under way, then it has no memory any more.
                self.slot.device.close();
                for pasid in &*lock(&opening.attached) {
                    if let Some(bound) = &opening.bound {
                        bound.detach(*pasid);
                    }
                }
                drop(opening);
                in_use.bound = None;
            }
            self.slot.token.close();
        }
        match &self.way {
            #[cfg(feature = "device-cdev")]
            Way::Device => self.slot.group.release_device(),
            // The group is released with the last that uses it.
            #[cfg(feature = "group")]
            Way::Group(_) => {}
        }
    }
}

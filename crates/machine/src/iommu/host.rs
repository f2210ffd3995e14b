//! Devices of the host behind the guest's IOMMU.
//!
//! Such a device is bound to the same context as the others, and its hardware is the host's IOMMU (`vfio::kernel`). What the guest
//! maps is an IOAS as for any device; a domain of the IOAS is then a page table of the host's, into which the context enters
//! it. The device's translations are the host's affair, and so are its faults: the host's kernel logs them.

#![allow(unsafe_code, reason = "promises what is mapped for the host's devices")]

use std::sync::Arc;

use iommufd::hardware::Hardware;
use iommufd::iova::IovaRange;
use iommufd::{BoundDevice, Context, Errno};
use vfio::kernel::HostDevice;

/// A device of the host, to be put behind an IOMMU of this module's.
#[derive(Debug)]
pub(crate) struct HostEndpoint(Arc<dyn Hardware>);

impl HostEndpoint {
    /// This one, which was opened for a context.
    ///
    /// # Errors
    /// ENODEV when it was opened otherwise; the kernel's.
    pub(crate) fn new(device: &HostDevice) -> Result<Self, Errno> {
        // SAFETY: needed because only who maps knows what devices reach then. Nobody but the IOMMUs of this module gets the
        // hardware, and their contexts map pages of `ram::GuestProcess`: guest RAM, which `RamPages` keeps mapped for as
        // long as the context has it pinned, and which this process accesses only by volatile slices and atomics.
        unsafe { device.hardware() }.map(Self)
    }

    /// One that is no host's.
    #[cfg(test)]
    pub(super) fn of(hardware: Arc<dyn Hardware>) -> Self {
        Self(hardware)
    }

    /// Binds it: the device, and the addresses that it can have translated, in order.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn bind(self, context: &Arc<Context>) -> Result<(BoundDevice, Vec<IovaRange>), Errno> {
        let device = context.bind(self.0)?;
        // An address space without mappings tells, once the device is attached to it.
        let ioas = context.ioas_alloc()?;
        device.attach(None, ioas)?;
        let ranges = context.ioas_space(ioas).map(|space| space.iova_ranges());
        device.detach(None);
        context.destroy(ioas)?;
        Ok((device, ranges?))
    }
}

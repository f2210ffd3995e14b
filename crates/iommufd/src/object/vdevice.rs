//! VDEVICE: a device as the guest of a vIOMMU knows it.

use core::fmt;
use std::sync::{Arc, PoisonError, Weak};

use super::{
    Pending,
    device::Device,
    table::{Short, Use},
    viommu::Viommu,
};
use crate::{Context, Errno, Result, inject};

/// A vDEVICE. When its device goes first it goes too, and its id stays behind as a tombstone.
pub(crate) struct Vdevice {
    virt_id: u64,
    device: Weak<Device>,
    viommu: Use<Viommu>,
}

impl fmt::Debug for Vdevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vdevice")
            .field("virt_id", &self.virt_id)
            .field("viommu", &self.viommu)
            .finish_non_exhaustive()
    }
}

impl Drop for Vdevice {
    fn drop(&mut self) {
        let mut parts = self.viommu.parts();
        self.viommu.driver.remove_device(self.virt_id);
        parts.devices.remove(&self.virt_id);
        drop(parts);
        if let Some(device) = self.device.upgrade() {
            *device.vdevice.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
    }
}

impl Context {
    /// The vDEVICE and its device: the call on the device must not end before the vDEVICE is finished, so that who ends the
    /// device finds it.
    pub(crate) fn prepare_vdevice(
        &self,
        viommu: u32,
        device: u32,
        virt_id: u64,
    ) -> Result<(Pending<Vdevice>, Short<Device>)> {
        inject::check()?;
        let viommu = self.table().get::<Viommu>(viommu)?;
        let device = self.table().get::<Device>(device)?;
        if viommu.iommu != device.hardware.iommu() {
            return Err(Errno::INVAL);
        }
        let reservation = self.table().reserve()?;
        let mut parts = viommu.parts();
        let mut link = device.vdevice.lock().unwrap_or_else(PoisonError::into_inner);
        if link.is_some() || parts.devices.contains_key(&virt_id) {
            return Err(Errno::EXIST);
        }
        viommu.driver.add_device(&device.hardware, virt_id)?;
        parts.devices.insert(virt_id, reservation.id());
        *link = Some(reservation.id());
        drop((link, parts));
        let weak = Arc::downgrade(device.as_arc());
        Ok((Pending::new(reservation, Vdevice { virt_id, device: weak, viommu: viommu.hold() }), device))
    }
}

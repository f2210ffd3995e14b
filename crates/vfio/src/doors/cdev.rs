//! The door of a device's own: `/dev/vfio/devices/vfioN`.

use core::mem::offset_of;
use std::sync::Arc;

use iommufd::process::UserAddr;
use uapi::vfio::{
    VFIO_DEVICE_ATTACH_PASID, VFIO_DEVICE_BIND_FLAG_TOKEN, VFIO_DEVICE_DETACH_PASID,
    vfio_device_attach_iommufd_pt, vfio_device_bind_iommufd, vfio_device_detach_iommufd_pt,
};
use zerocopy::IntoBytes;

use super::{
    Caller, Opened, System,
    device_file::{DeviceFile, Opening, Way},
    dma::IommuDma,
    structure,
    table::Call,
    token::Uuid,
};
use crate::{Errno, Result, eventfd::lock};

impl System {
    /// Opens the node of device `number`. Nothing works until it is bound.
    ///
    /// # Errors
    /// ENODEV when there is no such device.
    pub fn open_device(&self, number: u32) -> Result<Arc<DeviceFile>> {
        let slot = self.slot(number)?;
        if slot.hardware.is_none() {
            return Err(Errno::NODEV);
        }
        Ok(DeviceFile::unbound(slot, Way::Device))
    }
}

/// `VFIO_DEVICE_BIND_IOMMUFD`.
pub(super) fn bind(call: &Call<'_, DeviceFile>) -> Result<i32> {
    let minimum = offset_of!(vfio_device_bind_iommufd, token_uuid_ptr);
    let mut args: vfio_device_bind_iommufd = structure::get(call.process(), call.arg, minimum)?;
    if !matches!(call.file.way, Way::Device)
        || args.flags & !VFIO_DEVICE_BIND_FLAG_TOKEN != 0
        || args.iommufd < 0
    {
        return Err(Errno::INVAL);
    }
    let token = if args.flags & VFIO_DEVICE_BIND_FLAG_TOKEN != 0 {
        let mut token = Uuid::default();
        call.process().read(UserAddr(args.token_uuid_ptr), &mut token)?;
        Some(token)
    } else {
        None
    };
    let _binding = lock(&call.file.binding);
    if call.file.opening.get().is_some() {
        return Err(Errno::INVAL);
    }
    let group = &call.file.slot.group;
    group.claim_device()?;
    let id = open(call.file, call.caller, args.iommufd, token).inspect_err(|_| group.release_device())?;
    args.out_devid = id;
    // The kernel leaves the device bound when it cannot tell its number, and so do we.
    structure::put(call.process(), call.arg, &args, args.argsz)?;
    Ok(0)
}

fn open(file: &DeviceFile, caller: &dyn Caller, iommufd: i32, token: Option<Uuid>) -> Result<u32> {
    let Opened::Iommufd(context) = caller.opened(iommufd)? else { return Err(Errno::BADFD) };
    file.open(token, false, || {
        let hardware = file.slot.hardware.clone().ok_or(Errno::NODEV)?;
        let bound = Arc::new(context.bind(hardware)?);
        let dma = Arc::new(IommuDma(bound.dma()));
        Ok((Some(bound), dma))
    })?;
    bound(file).map(|(_, bound)| bound.id())
}

fn bound(file: &DeviceFile) -> Result<(&Opening, &iommufd::BoundDevice)> {
    let opening = file.opening()?;
    Ok((opening, opening.bound.as_deref().ok_or(Errno::INVAL)?))
}

/// `VFIO_DEVICE_ATTACH_IOMMUFD_PT`.
pub(super) fn attach(call: &Call<'_, DeviceFile>) -> Result<i32> {
    if !matches!(call.file.way, Way::Device) {
        return Err(Errno::NOTTY);
    }
    let minimum = offset_of!(vfio_device_attach_iommufd_pt, pasid);
    let mut args: vfio_device_attach_iommufd_pt = structure::get(call.process(), call.arg, minimum)?;
    let with_pasid = args.flags & VFIO_DEVICE_ATTACH_PASID != 0;
    if args.flags & !VFIO_DEVICE_ATTACH_PASID != 0
        || with_pasid && (args.argsz as usize) < size_of::<vfio_device_attach_iommufd_pt>()
    {
        return Err(Errno::INVAL);
    }
    let (opening, bound) = bound(call.file)?;
    let pasid = with_pasid.then_some(args.pasid);
    if with_pasid && bound.hardware()?.max_pasid_log2() == 0 {
        return Err(Errno::INVAL);
    }
    {
        let mut attached = lock(&opening.attached);
        if attached.contains(&pasid) {
            args.pt_id = bound.replace(pasid, args.pt_id)?;
        } else {
            args.pt_id = bound.attach(pasid, args.pt_id)?;
            attached.insert(pasid);
        }
    }
    let at = structure::plus(call.arg, offset_of!(vfio_device_attach_iommufd_pt, pt_id))?;
    // A program that cannot be told is attached to nothing.
    call.process().write(at, args.pt_id.as_bytes()).inspect_err(|_| release(opening, bound, pasid))?;
    Ok(0)
}

fn release(opening: &Opening, bound: &iommufd::BoundDevice, pasid: Option<u32>) {
    if lock(&opening.attached).remove(&pasid) {
        bound.detach(pasid);
    }
}

/// `VFIO_DEVICE_DETACH_IOMMUFD_PT`.
pub(super) fn detach(call: &Call<'_, DeviceFile>) -> Result<i32> {
    if !matches!(call.file.way, Way::Device) {
        return Err(Errno::NOTTY);
    }
    let minimum = offset_of!(vfio_device_detach_iommufd_pt, pasid);
    let args: vfio_device_detach_iommufd_pt = structure::get(call.process(), call.arg, minimum)?;
    let with_pasid = args.flags & VFIO_DEVICE_DETACH_PASID != 0;
    if args.flags & !VFIO_DEVICE_DETACH_PASID != 0
        || with_pasid && (args.argsz as usize) < size_of::<vfio_device_detach_iommufd_pt>()
    {
        return Err(Errno::INVAL);
    }
    let (opening, bound) = bound(call.file)?;
    release(opening, bound, with_pasid.then_some(args.pasid));
    Ok(0)
}

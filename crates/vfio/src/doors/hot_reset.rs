//! `VFIO_DEVICE_GET_PCI_HOT_RESET_INFO` and `VFIO_DEVICE_PCI_HOT_RESET`: a reset of a bus, which all devices on it suffer. So
//! who asks for it must own all of them that are in use.

use std::sync::Arc;

use uapi::vfio::{
    VFIO_PCI_HOT_RESET_FLAG_DEV_ID, VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED, vfio_pci_dependent_device,
    vfio_pci_hot_reset,
};
use zerocopy::IntoBytes;

use super::{
    device_file::{DeviceFile, Way},
    structure,
    system::Slot,
    table::Call,
};
use crate::{Errno, Result, eventfd::lock};

/// The length of both structures without their arrays.
const HEAD: usize = 12;
/// A device that the caller's iommufd owns though it has no object for it, and one that it does not own.
const OWNED: u32 = 0;
const NOT_OWNED: u32 = u32::MAX;

/// The devices that are reset together with the file's own. ENODEV when their bus has no reset.
fn together(file: &DeviceFile) -> Result<Vec<Arc<Slot>>> {
    let set = file.slot.reset_set.ok_or(Errno::NODEV)?;
    let system = file.system().ok_or(Errno::NODEV)?;
    Ok(system.slots(|slot| slot.reset_set == Some(set)))
}

/// Whether the device is one of a group whose owner is the iommufd that `file` is bound to.
fn owned_group(file: &DeviceFile, slot: &Slot, all: &[Arc<Slot>]) -> bool {
    let Some(bound) = file.opening.get().and_then(|opening| opening.bound.as_ref()) else { return false };
    all.iter().any(|other| other.group.number == slot.group.number && other.id_in(bound.context()).is_some())
}

/// How a caller who came by the device's own node sees another device.
fn device_id(file: &DeviceFile, slot: &Slot, all: &[Arc<Slot>]) -> u32 {
    let context = file.opening.get().and_then(|opening| opening.bound.as_ref()).map(|bound| bound.context());
    match context.and_then(|context| slot.id_in(context)) {
        Some(id) => id,
        None if lock(&slot.in_use).files == 0 && owned_group(file, slot, all) => OWNED,
        None => NOT_OWNED,
    }
}

pub(super) fn info(call: &Call<'_, DeviceFile>) -> Result<i32> {
    let [argsz, _, _]: [u32; 3] = structure::get(call.process(), call.arg, HEAD)?;
    let all = together(call.file)?;
    let by_device = match &call.file.way {
        #[cfg(feature = "device-cdev")]
        Way::Device => true,
        #[cfg(feature = "group")]
        Way::Group(_) => false,
    };
    let mut flags =
        if by_device { VFIO_PCI_HOT_RESET_FLAG_DEV_ID | VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED } else { 0 };
    let mut devices = Vec::with_capacity(all.len());
    for slot in &all {
        let group_id = if by_device { device_id(call.file, slot, &all) } else { slot.group.number };
        if by_device && group_id == NOT_OWNED {
            flags &= !VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED;
        }
        let (segment, bus, devfn) = slot.address.unwrap_or_default();
        devices.push(vfio_pci_dependent_device { group_id, segment, bus, devfn });
    }
    let count = devices.len() as u32;
    let bytes = devices.as_slice().as_bytes();
    let fits = (argsz as usize).saturating_sub(HEAD) >= bytes.len();
    let head = [argsz, if fits { flags } else { 0 }, count];
    if fits {
        call.process().write(structure::plus(call.arg, HEAD)?, bytes)?;
    }
    call.process().write(call.arg, head.as_bytes())?;
    if fits { Ok(0) } else { Err(Errno::NOSPC) }
}

pub(super) fn reset(call: &Call<'_, DeviceFile>) -> Result<i32> {
    let head: vfio_pci_hot_reset_head = structure::get(call.process(), call.arg, HEAD)?;
    if head.flags != 0 {
        return Err(Errno::INVAL);
    }
    let all = together(call.file);
    match &call.file.way {
        #[cfg(feature = "device-cdev")]
        Way::Device => {
            if head.count != 0 {
                return Err(Errno::INVAL);
            }
            let all = all?;
            if all.iter().any(|slot| device_id(call.file, slot, &all) == NOT_OWNED) {
                return Err(Errno::INVAL);
            }
            run(&all)
        }
        #[cfg(feature = "group")]
        Way::Group(_) => {
            if head.count == 0 {
                return Err(Errno::INVAL);
            }
            let all = all?;
            let groups = groups(call, &head, all.len())?;
            let owned =
                |slot: &Arc<Slot>| lock(&slot.in_use).files == 0 || groups.contains(&slot.group.number);
            if !all.iter().all(owned) {
                return Err(Errno::INVAL);
            }
            run(&all)
        }
    }
}

fn run(all: &[Arc<Slot>]) -> Result<i32> {
    for slot in all {
        slot.device.reset()?;
    }
    Ok(0)
}

/// `struct vfio_pci_hot_reset`, without what follows it.
#[allow(non_camel_case_types, reason = "as the kernel's")]
#[repr(C)]
#[derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable)]
struct vfio_pci_hot_reset_head {
    argsz: u32,
    flags: u32,
    count: u32,
}

const _: () = assert!(core::mem::offset_of!(vfio_pci_hot_reset, group_fds) == HEAD);

/// The groups that the caller shows it owns, by their descriptors. EINVAL for more than there are devices, and for other
/// descriptors; EBADF.
#[cfg(feature = "group")]
fn groups(call: &Call<'_, DeviceFile>, head: &vfio_pci_hot_reset_head, most: usize) -> Result<Vec<u32>> {
    let count = head.count as usize;
    if count > most || (head.argsz as usize).saturating_sub(HEAD) < count * 4 {
        return Err(Errno::INVAL);
    }
    let mut fds = vec![0; count];
    call.process().read(structure::plus(call.arg, HEAD)?, fds.as_mut_slice().as_mut_bytes())?;
    let number = |fd: i32| match call.caller.opened(fd)? {
        super::Opened::Group(group) => Ok(group.number()),
        _ => Err(Errno::INVAL),
    };
    fds.into_iter().map(number).collect()
}

//! What a device tells of itself: `VFIO_DEVICE_GET_INFO`, `GET_REGION_INFO` and `GET_IRQ_INFO`.

use core::mem::offset_of;

use uapi::vfio::{
    VFIO_DEVICE_FLAGS_CAPS, VFIO_DEVICE_INFO_CAP_PCI_ATOMIC_COMP, VFIO_REGION_INFO_CAP_MSIX_MAPPABLE,
    VFIO_REGION_INFO_CAP_SPARSE_MMAP, VFIO_REGION_INFO_CAP_TYPE, VFIO_REGION_INFO_FLAG_CAPS,
    VFIO_REGION_INFO_FLAG_MMAP, vfio_device_info, vfio_irq_info, vfio_region_info,
};
use zerocopy::IntoBytes;

use super::{
    chain::Chain,
    device_file::{DeviceFile, REGION_SHIFT},
    structure,
    table::Call,
};
use crate::{Result, device::Mappable};

/// The version of every capability that there is.
const VERSION: u16 = 1;
/// The least that can be mapped.
const PAGE: u64 = 4096;

pub(super) fn device(call: &Call<'_, DeviceFile>) -> Result<i32> {
    let minimum = offset_of!(vfio_device_info, cap_offset);
    let mut args: vfio_device_info = structure::get(call.process(), call.arg, minimum)?;
    let info = call.file.slot.device.info()?;
    let mut chain = Chain::default();
    if let Some(atomics) = info.atomic_completer {
        chain.push(VFIO_DEVICE_INFO_CAP_PCI_ATOMIC_COMP, VERSION, [atomics, 0].as_bytes());
    }
    let given = args.argsz;
    args.flags = info.flags.bits();
    args.num_regions = info.regions;
    args.num_irqs = info.irqs;
    args.cap_offset = 0;
    if !chain.is_empty() {
        args.flags |= VFIO_DEVICE_FLAGS_CAPS;
        (args.argsz, args.cap_offset) =
            chain.put(call.process(), call.arg, size_of::<vfio_device_info>(), args.argsz)?;
    }
    structure::put(call.process(), call.arg, &args, given)?;
    Ok(0)
}

pub(super) fn region(call: &Call<'_, DeviceFile>) -> Result<i32> {
    let mut args: vfio_region_info = structure::get(call.process(), call.arg, size_of::<vfio_region_info>())?;
    let info = call.file.slot.device.region(args.index)?;
    let maps_registers = info.registers
        && info.size.is_multiple_of(PAGE)
        && call.file.system().is_some_and(|system| system.maps_registers);
    let mut chain = Chain::default();
    // Where registers can be mapped, too, all of the region can.
    if let Mappable::Areas(areas) = &info.mappable
        && !maps_registers
    {
        let mut body = [areas.len() as u32, 0].as_bytes().to_vec();
        for area in areas {
            body.extend_from_slice([area.offset, area.size].as_bytes());
        }
        chain.push(VFIO_REGION_INFO_CAP_SPARSE_MMAP, VERSION, &body);
    }
    if info.msix_mappable && (maps_registers || info.mappable != Mappable::No) {
        chain.push(VFIO_REGION_INFO_CAP_MSIX_MAPPABLE, VERSION, &[]);
    }
    if let Some((kind, subtype)) = info.kind {
        chain.push(VFIO_REGION_INFO_CAP_TYPE, VERSION, [kind, subtype].as_bytes());
    }
    let given = args.argsz;
    args.flags = info.flags.bits();
    args.size = info.size;
    args.offset = u64::from(args.index) << REGION_SHIFT;
    args.cap_offset = 0;
    if info.size >= PAGE && (maps_registers || info.mappable != Mappable::No) {
        args.flags |= VFIO_REGION_INFO_FLAG_MMAP;
    }
    if !chain.is_empty() {
        args.flags |= VFIO_REGION_INFO_FLAG_CAPS;
        (args.argsz, args.cap_offset) =
            chain.put(call.process(), call.arg, size_of::<vfio_region_info>(), args.argsz)?;
    }
    structure::put(call.process(), call.arg, &args, given)?;
    Ok(0)
}

pub(super) fn irq(call: &Call<'_, DeviceFile>) -> Result<i32> {
    let mut args: vfio_irq_info = structure::get(call.process(), call.arg, size_of::<vfio_irq_info>())?;
    let info = call.file.slot.device.irq(args.index)?;
    args.flags = info.flags.bits();
    args.count = info.count;
    structure::put(call.process(), call.arg, &args, args.argsz)?;
    Ok(0)
}

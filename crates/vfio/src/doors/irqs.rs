//! `VFIO_DEVICE_SET_IRQS`: from bytes and numbers of descriptors to an [`IrqSet`].

use core::mem::offset_of;
use std::os::fd::OwnedFd;

use uapi::vfio::{
    VFIO_IRQ_SET_ACTION_MASK, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_TYPE_MASK,
    VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_BOOL, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE,
    VFIO_IRQ_SET_DATA_TYPE_MASK, VFIO_PCI_ERR_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX, vfio_irq_set,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{device_file::DeviceFile, structure, table::Call};
use crate::{
    Errno, Result,
    device::DeviceFlags,
    irq::{IrqAction, IrqData, IrqSet},
};

/// `struct vfio_irq_set`, without what follows it.
#[repr(C)]
#[derive(FromBytes, IntoBytes, Immutable)]
struct Head {
    argsz: u32,
    flags: u32,
    index: u32,
    start: u32,
    count: u32,
}

const HEAD: usize = offset_of!(vfio_irq_set, data);
const _: () = assert!(HEAD == size_of::<Head>());

pub(super) fn set(call: &Call<'_, DeviceFile>) -> Result<i32> {
    let head: Head = structure::get(call.process(), call.arg, HEAD)?;
    let device = &call.file.slot.device;
    if head.flags & !(VFIO_IRQ_SET_DATA_TYPE_MASK | VFIO_IRQ_SET_ACTION_TYPE_MASK) != 0 {
        return Err(Errno::INVAL);
    }
    // Whatever is allocated below is bounded by how many vectors there are.
    let there = device.irq(head.index)?.count;
    if head.start >= there || head.count > there - head.start {
        return Err(Errno::INVAL);
    }
    let width = match head.flags & VFIO_IRQ_SET_DATA_TYPE_MASK {
        VFIO_IRQ_SET_DATA_NONE => 0,
        VFIO_IRQ_SET_DATA_BOOL => 1,
        VFIO_IRQ_SET_DATA_EVENTFD => 4,
        _ => return Err(Errno::INVAL),
    };
    let length = head.count as usize * width;
    if (head.argsz as usize).saturating_sub(HEAD) < length {
        return Err(Errno::INVAL);
    }
    let action = match head.flags & VFIO_IRQ_SET_ACTION_TYPE_MASK {
        VFIO_IRQ_SET_ACTION_MASK => IrqAction::Mask,
        VFIO_IRQ_SET_ACTION_UNMASK => IrqAction::Unmask,
        VFIO_IRQ_SET_ACTION_TRIGGER => IrqAction::Trigger,
        _ => return Err(Errno::NOTTY),
    };
    let mut bytes = vec![0; length];
    call.process().read(structure::plus(call.arg, HEAD)?, &mut bytes)?;
    let data = match width {
        0 => IrqData::None,
        1 => IrqData::Bool(bytes.iter().map(|byte| *byte != 0).collect()),
        _ => {
            let pci = device.info()?.flags.contains(DeviceFlags::PCI);
            let single = pci && matches!(head.index, VFIO_PCI_ERR_IRQ_INDEX | VFIO_PCI_REQ_IRQ_INDEX);
            let numbers = bytes.chunks_exact(4).filter_map(|bytes| bytes.first_chunk());
            let fds = numbers.map(|bytes| eventfd(call, i32::from_ne_bytes(*bytes), single));
            IrqData::EventFd(fds.collect::<Result<_>>()?)
        }
    };
    device.set_irqs(IrqSet { index: head.index, start: head.start, count: head.count, action, data })?;
    Ok(0)
}

/// The descriptor behind a number. For most kinds every negative one means none, `strict` ones know -1 only.
fn eventfd(call: &Call<'_, DeviceFile>, fd: i32, strict: bool) -> Result<Option<OwnedFd>> {
    match fd {
        -1 => Ok(None),
        ..-1 if strict => Err(Errno::INVAL),
        ..-1 => Ok(None),
        _ => Ok(Some(call.process().file(fd)?)),
    }
}

/// `VFIO_DEVICE_IOEVENTFD`.
pub(super) fn ioeventfd(call: &Call<'_, DeviceFile>) -> Result<i32> {
    use uapi::vfio::{VFIO_DEVICE_IOEVENTFD_SIZE_MASK, vfio_device_ioeventfd};

    // The reserved word at the end is not necessary.
    let minimum = offset_of!(vfio_device_ioeventfd, reserved);
    let args: vfio_device_ioeventfd = structure::get(call.process(), call.arg, minimum)?;
    let width = args.flags & VFIO_DEVICE_IOEVENTFD_SIZE_MASK;
    if args.flags & !VFIO_DEVICE_IOEVENTFD_SIZE_MASK != 0 || !width.is_power_of_two() || args.fd < -1 {
        return Err(Errno::INVAL);
    }
    let (region, offset) = super::device_file::place(args.offset)?;
    let eventfd = if args.fd < 0 { None } else { Some(call.process().file(args.fd)?) };
    call.file.slot.device.ioeventfd(crate::device::IoEventFd {
        region,
        offset,
        width: width as u8,
        data: args.data,
        eventfd,
    })?;
    Ok(0)
}

/// `VFIO_DEVICE_RESET`.
pub(super) fn reset(call: &Call<'_, DeviceFile>) -> Result<i32> {
    call.file.slot.device.reset().map(|()| 0)
}

//! The ioctls of vIOMMUs and of what belongs to them.

use uapi::iommufd::{
    IOMMU_HW_QUEUE_TYPE_DEFAULT, IOMMU_VEVENTQ_TYPE_DEFAULT, IOMMU_VIOMMU_TYPE_DEFAULT, iommu_hw_queue_alloc,
    iommu_vdevice_alloc, iommu_veventq_alloc, iommu_viommu_alloc,
};

use super::{Call, fault::give_file, known_flags};
use crate::{Errno, Result, hardware::UserData, iova::Iova, process::UserAddr};

/// EOPNOTSUPP for the type 0, which is kept for later.
fn known_type(kind: u32, reserved: u32) -> Result<()> {
    if kind == reserved { Err(Errno::OPNOTSUPP) } else { Ok(()) }
}

pub(super) fn alloc(call: &Call<'_>, args: &mut iommu_viommu_alloc) -> Result<()> {
    known_flags(args.flags, 0)?;
    known_type(args.type_, IOMMU_VIOMMU_TYPE_DEFAULT)?;
    let data = UserData { kind: args.type_, addr: UserAddr(args.data_uptr), length: args.data_len };
    let viommu = call.context.prepare_viommu(call.caller, args.dev_id, args.hwpt_id, data)?;
    args.out_viommu_id = viommu.id();
    call.respond(args)?;
    viommu.finish();
    Ok(())
}

pub(super) fn alloc_device(call: &Call<'_>, args: &mut iommu_vdevice_alloc) -> Result<()> {
    // The calls on the device must not end before the vDEVICE is found: see `Binding`.
    let (vdevice, _device) = call.context.prepare_vdevice(args.viommu_id, args.dev_id, args.virt_id)?;
    args.out_vdevice_id = vdevice.id();
    call.respond(args)?;
    vdevice.finish();
    Ok(())
}

pub(super) fn alloc_event_queue(call: &Call<'_>, args: &mut iommu_veventq_alloc) -> Result<()> {
    known_flags(args.flags | args.__reserved, 0)?;
    known_type(args.type_, IOMMU_VEVENTQ_TYPE_DEFAULT)?;
    let queue = call.context.prepare_event_queue(args.viommu_id, args.type_, args.veventq_depth)?;
    args.out_veventq_id = queue.id();
    give_file(
        call,
        queue,
        |queue| call.context.event_file(queue),
        |fd| {
            args.out_veventq_fd = fd;
            call.respond(args)
        },
    )
}

pub(super) fn alloc_hw_queue(call: &Call<'_>, args: &mut iommu_hw_queue_alloc) -> Result<()> {
    known_flags(args.flags, 0)?;
    known_type(args.type_, IOMMU_HW_QUEUE_TYPE_DEFAULT)?;
    let iova = Iova(args.nesting_parent_iova);
    let queue = call.context.prepare_hw_queue(args.viommu_id, args.type_, args.index, iova, args.length)?;
    args.out_hw_queue_id = queue.id();
    call.respond(args)?;
    queue.finish();
    Ok(())
}

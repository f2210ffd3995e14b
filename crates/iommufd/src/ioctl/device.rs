//! `IOMMU_GET_HW_INFO`.

use uapi::iommufd::{
    IOMMU_HW_CAP_DIRTY_TRACKING, IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED, IOMMU_HW_INFO_FLAG_INPUT_TYPE,
    IOMMU_HW_INFO_TYPE_DEFAULT, iommu_hw_info,
};

use super::{Call, known_flags};
use crate::{Errno, Result, hardware::Capabilities, object::device::Device, process::UserAddr};

pub(super) fn get_hw_info(call: &Call<'_>, args: &mut iommu_hw_info) -> Result<()> {
    known_flags(args.flags, IOMMU_HW_INFO_FLAG_INPUT_TYPE)?;
    if args.__reserved != [0; 3] {
        return Err(Errno::OPNOTSUPP);
    }
    let device = call.context.table().get::<Device>(args.dev_id)?;
    let asked = args.flags & IOMMU_HW_INFO_FLAG_INPUT_TYPE != 0;
    let kind = if asked { args.in_data_type } else { IOMMU_HW_INFO_TYPE_DEFAULT };
    let (kind, data) = device.hardware.info(kind)?;
    let room = args.data_len as usize;
    let at = UserAddr(args.data_uptr);
    call.process().write(at, data.get(..room).unwrap_or(&data))?;
    clear(call, at, data.len(), room)?;
    args.data_len = u32::try_from(data.len()).map_err(|_| Errno::OVERFLOW)?;
    args.in_data_type = kind;
    args.out_max_pasid_log2 = device.hardware.max_pasid_log2();
    let capabilities = device.hardware.capabilities();
    let tracks = capabilities.contains(Capabilities::DIRTY_TRACKING);
    let ats = capabilities.contains(Capabilities::ATS);
    args.out_capabilities = u64::from(if tracks { IOMMU_HW_CAP_DIRTY_TRACKING } else { 0 })
        | u64::from(if ats { 0 } else { IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED });
    call.respond(args)
}

/// Clears bytes `from..to` at `at`.
fn clear(call: &Call<'_>, at: UserAddr, from: usize, to: usize) -> Result<()> {
    let zeros = [0; 256];
    let mut done = from;
    while done < to {
        let size = zeros.len().min(to - done);
        let addr = at.0.checked_add(done as u64).ok_or(Errno::FAULT)?;
        call.process().write(UserAddr(addr), zeros.get(..size).unwrap_or(&zeros))?;
        done += size;
    }
    Ok(())
}

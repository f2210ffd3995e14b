//! The ioctls of page tables.

use uapi::iommufd::{
    IOMMU_HWPT_ALLOC_DIRTY_TRACKING, IOMMU_HWPT_ALLOC_NEST_PARENT, IOMMU_HWPT_ALLOC_PASID,
    IOMMU_HWPT_DATA_NONE, IOMMU_HWPT_DIRTY_TRACKING_ENABLE, IOMMU_HWPT_FAULT_ID_VALID,
    IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR, iommu_hwpt_alloc, iommu_hwpt_get_dirty_bitmap,
    iommu_hwpt_invalidate, iommu_hwpt_set_dirty_tracking,
};

use super::{Call, known_flags};
use crate::{
    Errno, Result,
    hardware::{Entries, UserData},
    ioas::DirtyBitmap,
    iova::{Iova, IovaRange, PAGE_SIZE},
    object::{HwptOptions, hwpt::NestedHwpt, viommu::Viommu},
    process::UserAddr,
};

/// How many invalidations one call may ask for: what the kernel's interface allows.
const MAX_ENTRIES: u32 = 1 << 19;

pub(super) fn alloc(call: &Call<'_>, args: &mut iommu_hwpt_alloc) -> Result<()> {
    known_flags(args.__reserved, 0)?;
    let known = IOMMU_HWPT_ALLOC_NEST_PARENT
        | IOMMU_HWPT_ALLOC_DIRTY_TRACKING
        | IOMMU_HWPT_FAULT_ID_VALID
        | IOMMU_HWPT_ALLOC_PASID;
    known_flags(args.flags, known)?;
    if (args.data_type == IOMMU_HWPT_DATA_NONE) != (args.data_len == 0) {
        return Err(Errno::INVAL);
    }
    let options = HwptOptions {
        nest_parent: args.flags & IOMMU_HWPT_ALLOC_NEST_PARENT != 0,
        dirty_tracking: args.flags & IOMMU_HWPT_ALLOC_DIRTY_TRACKING != 0,
        pasid: args.flags & IOMMU_HWPT_ALLOC_PASID != 0,
        fault_queue: (args.flags & IOMMU_HWPT_FAULT_ID_VALID != 0).then_some(args.fault_id),
    };
    let data = UserData { kind: args.data_type, addr: UserAddr(args.data_uptr), length: args.data_len };
    let hwpt = call.context.prepare_hwpt(call.caller, args.dev_id, args.pt_id, options, data)?;
    args.out_hwpt_id = hwpt.id();
    call.respond(args)?;
    hwpt.finish();
    Ok(())
}

pub(super) fn set_dirty_tracking(call: &Call<'_>, args: &mut iommu_hwpt_set_dirty_tracking) -> Result<()> {
    // As the kernel, which does not look at the reserved field of this one.
    known_flags(args.flags, IOMMU_HWPT_DIRTY_TRACKING_ENABLE)?;
    let enable = args.flags & IOMMU_HWPT_DIRTY_TRACKING_ENABLE != 0;
    call.context.set_dirty_tracking(args.hwpt_id, enable)
}

pub(super) fn get_dirty_bitmap(call: &Call<'_>, args: &mut iommu_hwpt_get_dirty_bitmap) -> Result<()> {
    known_flags(args.flags, IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR)?;
    known_flags(args.__reserved, 0)?;
    let bitmap = DirtyBitmap {
        range: IovaRange::with_length(Iova(args.iova), args.length)?,
        page_size: args.page_size,
        process: call.process(),
        at: UserAddr(args.data),
    };
    let keep = args.flags & IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR != 0;
    call.context.read_dirty(args.hwpt_id, &bitmap, keep)
}

pub(super) fn invalidate(call: &Call<'_>, args: &mut iommu_hwpt_invalidate) -> Result<()> {
    let mut done = 0;
    let result = run_invalidations(call, args, &mut done);
    args.entry_num = done;
    // How many were run the program reads also when one failed.
    call.respond(args).and(result)
}

fn run_invalidations(call: &Call<'_>, args: &iommu_hwpt_invalidate, done: &mut u32) -> Result<()> {
    known_flags(args.__reserved, 0)?;
    let entries = Entries {
        kind: args.data_type,
        addr: UserAddr(args.data_uptr),
        entry_length: args.entry_len,
        number: args.entry_num,
    };
    let lengths = 1..=PAGE_SIZE;
    if entries.number > 0
        && (entries.addr.0 == 0
            || !lengths.contains(&u64::from(entries.entry_length))
            || entries.number > MAX_ENTRIES)
    {
        return Err(Errno::INVAL);
    }
    let target = call.context.table().get_any(args.hwpt_id)?;
    match target.downcast::<NestedHwpt>() {
        Ok(hwpt) => hwpt.nested.invalidate(call.caller, entries, done),
        Err(other) => {
            let viommu = other.downcast::<Viommu>().map_err(|_| Errno::INVAL)?;
            viommu.driver.invalidate(call.caller, entries, done)
        }
    }
}

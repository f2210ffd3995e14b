//! `IOMMU_OPTION` and `IOMMU_VFIO_IOAS`.

use uapi::iommufd::{
    IOMMU_OPTION_HUGE_PAGES, IOMMU_OPTION_OP_GET, IOMMU_OPTION_OP_SET, IOMMU_OPTION_RLIMIT_MODE,
    IOMMU_VFIO_IOAS_CLEAR, IOMMU_VFIO_IOAS_GET, IOMMU_VFIO_IOAS_SET, iommu_option, iommu_vfio_ioas,
};

use super::{Call, known_flags};
use crate::{Errno, Result, account::Accounting, caller::Capability};

pub(super) fn option(call: &Call<'_>, args: &mut iommu_option) -> Result<()> {
    known_flags(args.__reserved.into(), 0)?;
    match args.option_id {
        IOMMU_OPTION_RLIMIT_MODE => rlimit_mode(call, args)?,
        IOMMU_OPTION_HUGE_PAGES => huge_pages(call, args)?,
        _ => return Err(Errno::OPNOTSUPP),
    }
    call.respond(args)
}

fn rlimit_mode(call: &Call<'_>, args: &mut iommu_option) -> Result<()> {
    if args.object_id != 0 {
        return Err(Errno::OPNOTSUPP);
    }
    match u32::from(args.op) {
        IOMMU_OPTION_OP_GET => args.val64 = u64::from(call.context.accounting() == Accounting::Process),
        IOMMU_OPTION_OP_SET => {
            if !call.caller.capable(Capability::SysResource) {
                return Err(Errno::PERM);
            }
            let accounting = match args.val64 {
                0 => Accounting::User,
                1 => Accounting::Process,
                _ => return Err(Errno::INVAL),
            };
            call.context.set_accounting(accounting)?;
        }
        _ => return Err(Errno::OPNOTSUPP),
    }
    Ok(())
}

fn huge_pages(call: &Call<'_>, args: &mut iommu_option) -> Result<()> {
    let ioas = call.context.ioas(args.object_id)?;
    match u32::from(args.op) {
        IOMMU_OPTION_OP_GET => args.val64 = ioas.space.huge_pages().into(),
        IOMMU_OPTION_OP_SET => {
            let allowed = match args.val64 {
                0 => false,
                1 => true,
                _ => return Err(Errno::INVAL),
            };
            ioas.space.set_huge_pages(allowed)?;
        }
        _ => return Err(Errno::OPNOTSUPP),
    }
    Ok(())
}

pub(super) fn vfio_ioas(call: &Call<'_>, args: &mut iommu_vfio_ioas) -> Result<()> {
    known_flags(args.__reserved.into(), 0)?;
    match u32::from(args.op) {
        IOMMU_VFIO_IOAS_GET => {
            args.ioas_id = call.context.compat_ioas()?;
            call.respond(args)
        }
        IOMMU_VFIO_IOAS_SET => call.context.set_compat_ioas(Some(args.ioas_id)),
        IOMMU_VFIO_IOAS_CLEAR => call.context.set_compat_ioas(None),
        _ => Err(Errno::OPNOTSUPP),
    }
}

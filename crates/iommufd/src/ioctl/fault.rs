//! `IOMMU_FAULT_QUEUE_ALLOC`, and how a call gives out a file.

use std::sync::Arc;

use uapi::iommufd::iommu_fault_alloc;

use super::{Call, known_flags};
use crate::{
    Errno, Result,
    caller::File,
    object::{
        Pending,
        table::{Kind, Use},
    },
};

pub(super) fn alloc(call: &Call<'_>, args: &mut iommu_fault_alloc) -> Result<()> {
    known_flags(args.flags, 0)?;
    let queue = call.context.prepare_fault_queue()?;
    args.out_fault_id = queue.id();
    give_file(
        call,
        queue,
        |queue| call.context.fault_file(queue),
        |fd| {
            args.out_fault_fd = fd;
            call.respond(args)
        },
    )
}

/// Finishes an object that has a file, gives the program a descriptor for it, and has `respond` tell which.
pub(super) fn give_file<T: Kind>(
    call: &Call<'_>,
    pending: Pending<T>,
    file: impl FnOnce(Use<T>) -> Arc<dyn File>,
    respond: impl FnOnce(u32) -> Result<()>,
) -> Result<()> {
    let usage = pending.finish_used();
    let install = |file| {
        let fd = call.caller.install(file)?;
        let number = u32::try_from(fd).map_err(|_| Errno::BADF)?;
        respond(number).inspect_err(|_| call.caller.uninstall(fd))
    };
    install(file(usage.clone())).inspect_err(|_| call.context.table().destroy_owned(usage.clone()))
}

//! The ioctls of address spaces.

use std::sync::Arc;

use uapi::iommufd::{
    IOMMU_IOAS_MAP_FIXED_IOVA, IOMMU_IOAS_MAP_READABLE, IOMMU_IOAS_MAP_WRITEABLE, iommu_ioas_alloc,
    iommu_ioas_allow_iovas, iommu_ioas_change_process, iommu_ioas_copy, iommu_ioas_iova_ranges,
    iommu_ioas_map, iommu_ioas_map_file, iommu_ioas_noiommu_get_pa, iommu_ioas_unmap, iommu_iova_range,
};
use zerocopy::{FromZeros, IntoBytes};

use super::{Call, known_flags};
use crate::{
    Errno, Result,
    caller::Capability,
    dmabuf::DmaBuf,
    domain::Prot,
    ioas::Ioas,
    iova::{Iova, IovaRange},
    object::ioas::IoasObject,
    pages::Pages,
    process::UserAddr,
};

/// How many ranges a program may allow. The kernel has no number for it, only its memory.
const MAX_ALLOWED: usize = 1 << 20;

pub(super) fn alloc(call: &Call<'_>, args: &mut iommu_ioas_alloc) -> Result<()> {
    known_flags(args.flags, 0)?;
    let ioas = call.context.prepare_ioas()?;
    args.out_ioas_id = ioas.id();
    call.respond(args)?;
    ioas.finish();
    Ok(())
}

pub(super) fn iova_ranges(call: &Call<'_>, args: &mut iommu_ioas_iova_ranges) -> Result<()> {
    known_flags(args.__reserved, 0)?;
    let ioas = call.context.ioas(args.ioas_id)?;
    let ranges: Vec<_> = ioas
        .space
        .iova_ranges()
        .into_iter()
        .map(|range| iommu_iova_range { start: range.start().0, last: range.last().0 })
        .collect();
    let room = args.num_iovas as usize;
    let fitting = ranges.get(..room).unwrap_or(&ranges);
    call.process().write(UserAddr(args.allowed_iovas), fitting.as_bytes())?;
    args.num_iovas = u32::try_from(ranges.len()).map_err(|_| Errno::OVERFLOW)?;
    args.out_iova_alignment = ioas.space.iova_alignment();
    call.respond(args)?;
    if ranges.len() > room { Err(Errno::MSGSIZE) } else { Ok(()) }
}

pub(super) fn allow_iovas(call: &Call<'_>, args: &mut iommu_ioas_allow_iovas) -> Result<()> {
    known_flags(args.__reserved, 0)?;
    let ioas = call.context.ioas(args.ioas_id)?;
    let mut ranges = Vec::new();
    let mut chunk = [iommu_iova_range::new_zeroed(); 64];
    let mut left = args.num_iovas as usize;
    let mut from = args.allowed_iovas;
    while left > 0 {
        // A piece at a time: that there are so many is only what the program says.
        let Some(piece) = chunk.get_mut(..left.min(64)) else { break };
        call.process().read(UserAddr(from), piece.as_mut_bytes())?;
        if ranges.len() >= MAX_ALLOWED {
            return Err(Errno::NOMEM);
        }
        for range in piece.iter() {
            // The kernel takes no range of a single byte here.
            if range.start >= range.last {
                return Err(Errno::INVAL);
            }
            ranges.push(IovaRange::new(Iova(range.start), Iova(range.last))?);
        }
        left -= piece.len();
        from = from.checked_add(size_of_val(piece) as u64).ok_or(Errno::FAULT)?;
    }
    ioas.space.set_allowed(&ranges)
}

/// What a mapping asks for.
struct MapFlags {
    prot: Prot,
    fixed: bool,
}

impl MapFlags {
    /// EOPNOTSUPP for unknown ones, EINVAL for memory that nobody may access.
    fn new(flags: u32) -> Result<Self> {
        let known = IOMMU_IOAS_MAP_FIXED_IOVA | IOMMU_IOAS_MAP_WRITEABLE | IOMMU_IOAS_MAP_READABLE;
        known_flags(flags, known)?;
        let mut prot = Prot::empty();
        prot.set(Prot::READ, flags & IOMMU_IOAS_MAP_READABLE != 0);
        prot.set(Prot::WRITE, flags & IOMMU_IOAS_MAP_WRITEABLE != 0);
        if prot.is_empty() {
            return Err(Errno::INVAL);
        }
        Ok(Self { prot, fixed: flags & IOMMU_IOAS_MAP_FIXED_IOVA != 0 })
    }

    fn at(&self, iova: u64) -> Option<Iova> {
        self.fixed.then_some(Iova(iova))
    }
}

/// EOVERFLOW for numbers that are no addresses or lengths of the kernel's `unsigned long`.
fn bounded(iova: u64, length: u64) -> Result<()> {
    if iova == u64::MAX || length == u64::MAX { Err(Errno::OVERFLOW) } else { Ok(()) }
}

/// Maps, and has `respond` tell the program where.
fn map(
    ioas: &IoasObject,
    pages: &Arc<Pages>,
    length: u64,
    at: Option<Iova>,
    prot: Prot,
    respond: impl FnOnce(Iova) -> Result<()>,
) -> Result<()> {
    let iova = ioas.space.map(pages, 0, length, at, prot)?;
    respond(iova).inspect_err(|_| {
        // The program does not know of it. It can only be gone already.
        let _ = IovaRange::with_length(iova, length).and_then(|range| ioas.space.unmap(range));
    })
}

pub(super) fn map_user(call: &Call<'_>, args: &mut iommu_ioas_map) -> Result<()> {
    let flags = MapFlags::new(args.flags)?;
    known_flags(args.__reserved, 0)?;
    bounded(args.iova, args.length)?;
    let ioas = call.context.ioas(args.ioas_id)?;
    let pages = Pages::user(
        call.caller.process().clone(),
        UserAddr(args.user_va),
        args.length,
        flags.prot.contains(Prot::WRITE),
        call.context.accounting_of(call.caller),
    )?;
    map(&ioas, &pages, args.length, flags.at(args.iova), flags.prot, |iova| {
        args.iova = iova.0;
        call.respond(args)
    })
}

pub(super) fn map_file(call: &Call<'_>, args: &mut iommu_ioas_map_file) -> Result<()> {
    let flags = MapFlags::new(args.flags)?;
    bounded(args.iova, args.length)?;
    let ioas = call.context.ioas(args.ioas_id)?;
    let writable = flags.prot.contains(Prot::WRITE);
    let exported =
        call.caller.installed(args.fd).ok().and_then(|file| file.as_any().downcast::<DmaBuf>().ok());
    let pages = match exported {
        Some(buffer) => buffer.pages(args.start, args.length, writable)?,
        None => Pages::file(
            call.caller.process().clone(),
            &call.process().file(args.fd)?,
            args.start,
            args.length,
            writable,
            call.context.accounting_of(call.caller),
        )?,
    };
    map(&ioas, &pages, args.length, flags.at(args.iova), flags.prot, |iova| {
        args.iova = iova.0;
        call.respond(args)
    })
}

pub(super) fn copy(call: &Call<'_>, args: &mut iommu_ioas_copy) -> Result<()> {
    let flags = MapFlags::new(args.flags)?;
    bounded(args.src_iova.max(args.dst_iova), args.length)?;
    let range = IovaRange::with_length(Iova(args.src_iova), args.length)?;
    let source = call.context.ioas(args.src_ioas_id)?;
    let destination = call.context.ioas(args.dst_ioas_id)?;
    let iova = destination.space.copy_from(&source.space, range, flags.at(args.dst_iova), flags.prot)?;
    args.dst_iova = iova.0;
    call.respond(args).inspect_err(|_| {
        // As after a map.
        let _ = IovaRange::with_length(iova, args.length).and_then(|range| destination.space.unmap(range));
    })
}

pub(super) fn unmap(call: &Call<'_>, args: &mut iommu_ioas_unmap) -> Result<()> {
    let ioas = call.context.ioas(args.ioas_id)?;
    if args.iova == 0 && args.length == u64::MAX {
        args.length = ioas.space.unmap(IovaRange::ALL)?;
    } else {
        bounded(args.iova, args.length)?;
        args.length = ioas.space.unmap(IovaRange::with_length(Iova(args.iova), args.length)?)?;
        if args.length == 0 {
            return Err(Errno::NOENT);
        }
    }
    call.respond(args)
}

pub(super) fn change_process(call: &Call<'_>, args: &mut iommu_ioas_change_process) -> Result<()> {
    known_flags(args.__reserved, 0)?;
    let objects = call.context.table().all::<IoasObject>();
    let spaces: Vec<_> = objects.iter().map(|ioas| ioas.space.clone()).collect();
    Ioas::change_process(&spaces, call.caller.process())
}

pub(super) fn no_iommu_get_pa(call: &Call<'_>, args: &mut iommu_ioas_noiommu_get_pa) -> Result<()> {
    known_flags(args.flags | args.__reserved, 0)?;
    if !call.caller.capable(Capability::SysRawio) {
        return Err(Errno::PERM);
    }
    let range = IovaRange::with_length(Iova(args.iova), args.length)?;
    let ioas = call.context.ioas(args.ioas_id)?;
    let (host, length) = ioas.hwpts().iter().find_map(|hwpt| contiguous(hwpt, range)).ok_or(Errno::NOENT)?;
    (args.out_phys, args.length) = (host, length);
    call.respond(args)
}

/// Where the start of `range` is in host memory, and how many bytes of it lie together there.
fn contiguous(hwpt: &crate::object::hwpt::PagingHwpt, range: IovaRange) -> Option<(u64, u64)> {
    let step = crate::iova::PAGE_SIZE;
    let start = hwpt.domain.lookup(range.start())?.0;
    // Up to the end of the page at first, then by pages.
    let mut length = step - range.start().0 % step;
    let wanted = range.length().unwrap_or(u64::MAX);
    while length < wanted {
        let next = range.start().0.checked_add(length)?;
        if hwpt.domain.lookup(Iova(next)).is_none_or(|host| Some(host.0) != start.checked_add(length)) {
            break;
        }
        length = length.saturating_add(step);
    }
    Some((start, length.min(wanted)))
}

//! The ioctls of a VFIO container (`/dev/vfio/vfio`, type 1) on an iommufd context.
//!
//! They have no place for an id: they mean the IOAS that `IOMMU_VFIO_IOAS` has chosen, or that a VFIO group has made
//! when it was added to the context as its container. Each structure begins with its size (`argsz`); a shorter one than a
//! command needs is EINVAL, and what is past the known is not looked at.
//!
//! As in the kernel's compatibility code, dirty tracking by the container (`VFIO_IOMMU_DIRTY_PAGES`) is not there, an
//! address of memory cannot be changed (`VFIO_UPDATE_VADDR`), and an area that is cut by an unmap must have been mapped by
//! version 1 of type 1, where large pages are off.

mod info;

use uapi::vfio::{
    VFIO_API_VERSION, VFIO_DMA_CC_IOMMU, VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE,
    VFIO_DMA_UNMAP_FLAG_ALL, VFIO_NOIOMMU_IOMMU, VFIO_TYPE1_IOMMU, VFIO_TYPE1v2_IOMMU as VFIO_TYPE1V2_IOMMU,
    VFIO_UNMAP_ALL,
};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

pub(crate) use info::get_info;

use crate::{
    Errno, Result,
    caller::Capability,
    domain::Prot,
    ioctl::Call,
    iova::{Iova, IovaRange},
    pages::Pages,
    process::UserAddr,
};

/// The known part of `struct vfio_iommu_type1_dma_map`: what must be given.
#[repr(C)]
#[derive(FromBytes, IntoBytes, Immutable)]
struct DmaMap {
    argsz: u32,
    flags: u32,
    vaddr: u64,
    iova: u64,
    size: u64,
}

/// The known part of `struct vfio_iommu_type1_dma_unmap`.
#[repr(C)]
#[derive(FromBytes, IntoBytes, Immutable)]
struct DmaUnmap {
    argsz: u32,
    flags: u32,
    iova: u64,
    size: u64,
}

/// Copies a structure whose first field is its size, which must be its length at least.
fn copy_in<T: FromZeros + FromBytes + IntoBytes + Immutable>(call: &Call<'_>) -> Result<T> {
    let mut value = T::new_zeroed();
    call.process().read(call.arg, value.as_mut_bytes())?;
    let size = value.as_bytes().first_chunk().map_or(0, |size| u32::from_ne_bytes(*size));
    if (size as usize) < size_of::<T>() { Err(Errno::INVAL) } else { Ok(value) }
}

pub(crate) fn get_api_version(_call: &Call<'_>) -> Result<i32> {
    i32::try_from(VFIO_API_VERSION).map_err(|_| Errno::INVAL)
}

/// The argument itself, for commands that take a number.
fn number(call: &Call<'_>) -> u32 {
    // The kernel's commands take an `unsigned long`, of which no value past 32 bits is known.
    u32::try_from(call.arg.0).unwrap_or(u32::MAX)
}

pub(crate) fn check_extension(call: &Call<'_>) -> Result<i32> {
    let yes = match number(call) {
        VFIO_TYPE1_IOMMU | VFIO_TYPE1V2_IOMMU | VFIO_UNMAP_ALL => true,
        VFIO_DMA_CC_IOMMU => {
            let (_, ioas) = call.context.compat()?;
            ioas.hwpts().iter().all(|hwpt| hwpt.domain.enforce_cache_coherency())
        }
        VFIO_NOIOMMU_IOMMU => call.caller.capable(Capability::SysRawio),
        _ => false,
    };
    Ok(yes.into())
}

pub(crate) fn set_iommu(call: &Call<'_>) -> Result<i32> {
    let kind = number(call);
    if kind == VFIO_NOIOMMU_IOMMU {
        // There is nothing to translate; the container only has to be opened so.
        return if call.context.no_iommu() { Ok(0) } else { Err(Errno::INVAL) };
    }
    if !matches!(kind, VFIO_TYPE1_IOMMU | VFIO_TYPE1V2_IOMMU) || call.context.no_iommu() {
        return Err(Errno::INVAL);
    }
    let (_, ioas) = call.context.compat()?;
    if kind == VFIO_TYPE1_IOMMU {
        // So that an unmap may cut areas.
        ioas.space.set_huge_pages(false)?;
    }
    Ok(0)
}

pub(crate) fn map_dma(call: &Call<'_>) -> Result<i32> {
    let args: DmaMap = copy_in(call)?;
    if args.flags & !(VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE) != 0 {
        return Err(Errno::INVAL);
    }
    let mut prot = Prot::empty();
    prot.set(Prot::READ, args.flags & VFIO_DMA_MAP_FLAG_READ != 0);
    prot.set(Prot::WRITE, args.flags & VFIO_DMA_MAP_FLAG_WRITE != 0);
    if prot.is_empty() {
        return Err(Errno::INVAL);
    }
    let (_, ioas) = call.context.compat()?;
    let pages = Pages::user(
        call.caller.process().clone(),
        UserAddr(args.vaddr),
        args.size,
        prot.contains(Prot::WRITE),
        call.context.accounting_of(call.caller),
    )?;
    ioas.space.map(&pages, 0, args.size, Some(Iova(args.iova)), prot)?;
    Ok(0)
}

pub(crate) fn unmap_dma(call: &Call<'_>) -> Result<i32> {
    let mut args: DmaUnmap = copy_in(call)?;
    // Dirty bitmaps of an unmap are the migration interface of old, and addresses cannot be changed.
    if args.flags & !VFIO_DMA_UNMAP_FLAG_ALL != 0 {
        return Err(Errno::INVAL);
    }
    let (_, ioas) = call.context.compat()?;
    let range = if args.flags & VFIO_DMA_UNMAP_FLAG_ALL != 0 {
        if args.iova != 0 || args.size != 0 {
            return Err(Errno::INVAL);
        }
        Ok(IovaRange::ALL)
    } else {
        let range = IovaRange::with_length(Iova(args.iova), args.size);
        if let Ok(range) = range
            && !ioas.space.huge_pages()
        {
            // Of an area's first byte alone the kernel says that it is not mapped, rather than not aligned.
            let end = range.last().0.checked_add(1).filter(|_| range.last() != range.start());
            let cuts: Vec<_> = [Some(range.start().0), end].into_iter().flatten().map(Iova).collect();
            ioas.space.cut(&cuts)?;
        }
        range
    };
    args.size = 0;
    let result = range.and_then(|range| ioas.space.unmap_counting(range, &mut args.size));
    // How much was unmapped the program learns also when it failed half-way.
    call.process().write(call.arg, args.as_bytes())?;
    result.map(|()| 0)
}

//! `VFIO_IOMMU_DIRTY_PAGES`. Like the kernel's type 1 for a device whose IOMMU does not tell, it says of every page that a
//! device can write to that it was written to.

use core::mem::offset_of;

use iommufd::{
    iova::{IovaRange, PAGE_SIZE},
    process::{Process, UserAddr},
};
use uapi::vfio::{
    VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP, VFIO_IOMMU_DIRTY_PAGES_FLAG_START,
    VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP, vfio_bitmap, vfio_iommu_type1_dirty_bitmap_get,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{Container, Version, mappings::Mapping, type1};
use crate::{
    Errno, Result,
    doors::{structure, table::Call},
};

/// The longest bitmap: 8 TiB in pages, as in the kernel.
pub(super) const MOST_BYTES: u64 = 1 << 28;

/// `struct vfio_iommu_type1_dirty_bitmap` and what may follow it.
#[repr(C)]
#[derive(FromBytes, IntoBytes, Immutable)]
struct Dirty {
    argsz: u32,
    flags: u32,
    get: vfio_iommu_type1_dirty_bitmap_get,
}

/// `VFIO_IOMMU_DIRTY_PAGES`.
pub(in crate::doors) fn dirty_pages(call: &Call<'_, Container>) -> Result<i32> {
    call.file.type1(|type1| {
        if type1.version == Version::One {
            return Err(Errno::ACCESS);
        }
        let args: Dirty = structure::get(call.process(), call.arg, offset_of!(Dirty, get))?;
        match args.flags {
            VFIO_IOMMU_DIRTY_PAGES_FLAG_START => type1.dirty = true,
            VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP => type1.dirty = false,
            VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP => {
                if !type1.dirty || (args.argsz as usize) < size_of::<Dirty>() {
                    return Err(Errno::INVAL);
                }
                let range = type1::pages(args.get.iova, args.get.size).map_err(|_| Errno::INVAL)?;
                check(&args.get.bitmap, args.get.size)?;
                if type1.mappings.cuts(range) {
                    return Err(Errno::INVAL);
                }
                let mappings: Vec<Mapping> = type1.mappings.in_range(range).copied().collect();
                report(call.process(), &args.get.bitmap, range, &mappings)?;
            }
            _ => return Err(Errno::INVAL),
        }
        Ok(0)
    })
}

/// EINVAL for a bitmap that counts in other pages than these, or does not fit `size` bytes of them.
pub(super) fn check(bitmap: &vfio_bitmap, size: u64) -> Result<()> {
    let needed = (size / PAGE_SIZE).div_ceil(64) * 8;
    let fits = bitmap.pgsize == PAGE_SIZE && (needed..=MOST_BYTES).contains(&bitmap.size) && bitmap.size > 0;
    if fits { Ok(()) } else { Err(Errno::INVAL) }
}

/// Sets the bits of all that is mapped. EFAULT.
pub(super) fn report(
    process: &dyn Process,
    bitmap: &vfio_bitmap,
    range: IovaRange,
    mappings: &[Mapping],
) -> Result<()> {
    for mapping in mappings.iter().filter(|mapping| !mapping.registers) {
        let Some(part) = mapping.range.intersection(range) else { continue };
        let page = |iova: iommufd::iova::Iova| (iova.0 - range.start().0) / PAGE_SIZE;
        let (first, last) = (page(part.start()), page(part.last()));
        let mut byte = first / 8;
        let mut buffer = [0; 4096];
        while byte <= last / 8 {
            let count = (last / 8 - byte + 1).min(buffer.len() as u64);
            let bits = buffer.get_mut(..count as usize).unwrap_or_default();
            let at = bitmap.data.checked_add(byte).map(UserAddr).ok_or(Errno::FAULT)?;
            process.read(at, bits)?;
            for (bits, number) in bits.iter_mut().zip(byte..) {
                let low = first.saturating_sub(number * 8).min(7);
                let high = (last - number * 8).min(7);
                *bits |= u8::MAX << low & u8::MAX >> (7 - high);
            }
            process.write(at, bits)?;
            byte += count;
        }
    }
    Ok(())
}

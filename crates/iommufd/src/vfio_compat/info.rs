//! `VFIO_IOMMU_GET_INFO`.

use uapi::vfio::{
    VFIO_IOMMU_INFO_CAPS, VFIO_IOMMU_INFO_PGSIZES, VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE,
    VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL,
};

use crate::{Errno, Result, ioctl::Call, iova::PAGE_SIZE, object::ioas::IoasObject, process::UserAddr};

/// Where the field `cap_offset` of `struct vfio_iommu_type1_info` begins: programs from before it give no more.
const BEFORE_CAPS: usize = 16;
/// The length of `struct vfio_iommu_type1_info`, behind which the capabilities are.
const INFO: usize = 24;
/// The length of `struct vfio_info_cap_header`.
const HEADER: usize = 8;
/// The version of both capabilities.
const VERSION: u16 = 1;

pub(crate) fn get_info(call: &Call<'_>) -> Result<i32> {
    let mut head = [0; BEFORE_CAPS];
    call.process().read(call.arg, &mut head)?;
    let size = head.first_chunk().map_or(0, |size| u32::from_ne_bytes(*size)) as usize;
    if size < BEFORE_CAPS {
        return Err(Errno::INVAL);
    }
    let (_, ioas) = call.context.compat()?;
    let (first, second) = (dma_avail(), iova_ranges(&ioas));
    let between = u32::try_from(INFO + HEADER + first.len()).map_err(|_| Errno::OVERFLOW)?;
    let total =
        u32::try_from(INFO + HEADER + first.len() + HEADER + second.len()).map_err(|_| Errno::OVERFLOW)?;

    let flags = VFIO_IOMMU_INFO_PGSIZES | VFIO_IOMMU_INFO_CAPS;
    // A program that has not room for all capabilities is told only how much they need.
    let cap_offset = if size >= total as usize { INFO as u32 } else { 0 };
    let mut info = Vec::with_capacity(INFO);
    info.extend(total.to_ne_bytes());
    info.extend(flags.to_ne_bytes());
    info.extend(page_sizes(&ioas).to_ne_bytes());
    info.extend(cap_offset.to_ne_bytes());
    info.extend([0; 4]);
    info.truncate(size);
    if cap_offset != 0 {
        info.extend(header(VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL, between));
        info.extend(first);
        info.extend(header(VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, 0));
        info.extend(second);
    }
    call.process().write(UserAddr(call.arg.0), &info)?;
    Ok(0)
}

/// The page sizes that every page table of the IOAS has, from the host's on: smaller ones mean nothing to VFIO.
fn page_sizes(ioas: &IoasObject) -> u64 {
    let sizes = ioas.hwpts().iter().fold(u64::MAX, |sizes, hwpt| sizes & hwpt.domain.geometry().page_sizes);
    sizes & !(PAGE_SIZE - 1)
}

/// `struct vfio_info_cap_header`. `next` is where the next capability is.
fn header(id: u32, next: u32) -> impl Iterator<Item = u8> {
    let id = (id as u16).to_ne_bytes();
    id.into_iter().chain(VERSION.to_ne_bytes()).chain(next.to_ne_bytes())
}

/// `struct vfio_iommu_type1_info_cap_iova_range` behind its header.
fn iova_ranges(ioas: &IoasObject) -> Vec<u8> {
    let ranges = ioas.space.iova_ranges();
    let number = u32::try_from(ranges.len()).unwrap_or(u32::MAX);
    let body = ranges.iter().flat_map(|range| [range.start().0, range.last().0]).flat_map(u64::to_ne_bytes);
    number.to_ne_bytes().into_iter().chain([0; 4]).chain(body).collect()
}

/// `struct vfio_iommu_type1_info_dma_avail` behind its header, up to where the next capability may begin: how many
/// mappings there may be yet. There is no limit.
fn dma_avail() -> Vec<u8> {
    u32::MAX.to_ne_bytes().into_iter().chain([0; 4]).collect()
}

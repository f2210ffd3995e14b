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
    let capabilities = [iova_ranges(&ioas), dma_avail()];
    let total = INFO + capabilities.iter().map(Vec::len).sum::<usize>();
    let total = u32::try_from(total).map_err(|_| Errno::OVERFLOW)?;

    // As many capabilities as fit, each one's `next` set when the next is there.
    let mut chain = Vec::new();
    let mut fitting = capabilities.iter().take_while({
        let mut end = INFO;
        move |capability| {
            end += capability.len();
            end <= size
        }
    });
    let mut next = fitting.next();
    while let Some(capability) = next {
        next = fitting.next();
        let after = if next.is_some() { INFO + chain.len() + capability.len() } else { 0 };
        let after = u32::try_from(after).map_err(|_| Errno::OVERFLOW)?;
        chain.extend(capability.iter().take(4));
        chain.extend(after.to_ne_bytes());
        chain.extend(capability.iter().skip(HEADER));
    }

    let cap_offset = if chain.is_empty() { 0 } else { INFO as u32 };
    let flags = VFIO_IOMMU_INFO_PGSIZES | VFIO_IOMMU_INFO_CAPS;
    let mut info = Vec::with_capacity(INFO + chain.len());
    info.extend(total.to_ne_bytes());
    info.extend(flags.to_ne_bytes());
    info.extend(page_sizes(&ioas).to_ne_bytes());
    info.extend(cap_offset.to_ne_bytes());
    info.extend([0; 4]);
    info.truncate(size);
    info.extend(chain);
    call.process().write(UserAddr(call.arg.0), &info)?;
    Ok(0)
}

/// The page sizes that every page table of the IOAS has, and at least the host's: smaller ones mean nothing to VFIO.
fn page_sizes(ioas: &IoasObject) -> u64 {
    let from_page = !(PAGE_SIZE - 1);
    let sizes = ioas.hwpts().iter().fold(u64::MAX, |sizes, hwpt| sizes & hwpt.domain.geometry().page_sizes);
    // A table with smaller pages maps the host's with several.
    if sizes & (PAGE_SIZE - 1) != 0 { sizes | from_page } else { sizes & from_page }
}

/// A capability with its header, whose `next` is 0.
fn capability(id: u32, body: impl IntoIterator<Item = u8>) -> Vec<u8> {
    let id = (id as u16).to_ne_bytes();
    let header = id.into_iter().chain(VERSION.to_ne_bytes()).chain([0; 4]);
    header.chain(body).collect()
}

/// `struct vfio_iommu_type1_info_cap_iova_range`.
fn iova_ranges(ioas: &IoasObject) -> Vec<u8> {
    let ranges = ioas.space.iova_ranges();
    let number = u32::try_from(ranges.len()).unwrap_or(u32::MAX);
    let body = ranges.iter().flat_map(|range| [range.start().0, range.last().0]).flat_map(u64::to_ne_bytes);
    capability(
        VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE,
        number.to_ne_bytes().into_iter().chain([0; 4]).chain(body),
    )
}

/// `struct vfio_iommu_type1_info_dma_avail`: how many mappings there may be yet. There is no limit.
fn dma_avail() -> Vec<u8> {
    capability(VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL, u32::from(u16::MAX).to_ne_bytes())
}

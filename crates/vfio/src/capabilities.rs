//! Capabilities that stand in a chain behind an information structure (`struct vfio_info_cap_header`), as a kernel or a
//! server wrote them.

use uapi::vfio::{
    VFIO_REGION_INFO_CAP_MSIX_MAPPABLE, VFIO_REGION_INFO_CAP_SPARSE_MMAP, VFIO_REGION_INFO_CAP_TYPE,
    VFIO_REGION_INFO_FLAG_CAPS, vfio_info_cap_header, vfio_region_info, vfio_region_sparse_mmap_area,
};
use zerocopy::FromBytes;

use crate::device::Area;
use crate::{Errno, Result};

/// Capabilities in a chain that are looked at.
const MAX_CAPABILITIES: usize = 64;

/// The capabilities of a chain: the identifier of each, and what follows its header to the end of the whole. EPROTO when the
/// chain leads out of the bytes, or around.
#[derive(Debug)]
pub(crate) struct Chain<'a> {
    bytes: &'a [u8],
    next: u32,
    left: usize,
}

impl<'a> Chain<'a> {
    /// The chain in `bytes`, structure included, that starts at `next`; 0 for none.
    pub(crate) fn new(bytes: &'a [u8], next: u32) -> Self {
        Self { bytes, next, left: MAX_CAPABILITIES }
    }

    fn at(&mut self, at: u32) -> Result<(u16, &'a [u8])> {
        self.left = self.left.checked_sub(1).ok_or(Errno::PROTO)?;
        let rest = usize::try_from(at).ok().and_then(|at| self.bytes.get(at..)).ok_or(Errno::PROTO)?;
        let (header, body) = vfio_info_cap_header::read_from_prefix(rest).map_err(|_| Errno::PROTO)?;
        self.next = header.next;
        Ok((header.id, body))
    }
}

impl<'a> Iterator for Chain<'a> {
    type Item = Result<(u16, &'a [u8])>;

    fn next(&mut self) -> Option<Self::Item> {
        let at = core::mem::take(&mut self.next);
        (at != 0).then(|| self.at(at))
    }
}

/// What a region's chain says.
#[derive(Debug, Default)]
pub(crate) struct RegionCapabilities {
    /// SPARSE_MMAP.
    pub(crate) sparse: Option<Vec<Area>>,
    /// TYPE: type and subtype.
    pub(crate) kind: Option<(u32, u32)>,
    /// MSIX_MAPPABLE.
    pub(crate) msix_mappable: bool,
}

impl RegionCapabilities {
    /// Follows the chain in `bytes`, which `info` begins.
    ///
    /// # Errors
    /// EPROTO for one that makes no sense.
    pub(crate) fn read(info: &vfio_region_info, bytes: &[u8]) -> Result<Self> {
        let mut found = Self::default();
        let start = if info.flags & VFIO_REGION_INFO_FLAG_CAPS == 0 { 0 } else { info.cap_offset };
        for capability in Chain::new(bytes, start) {
            let (id, body) = capability?;
            match u32::from(id) {
                VFIO_REGION_INFO_CAP_SPARSE_MMAP => found.sparse = Some(sparse(body)?),
                VFIO_REGION_INFO_CAP_TYPE => {
                    let ([kind, subtype], _) =
                        <[u32; 2]>::read_from_prefix(body).map_err(|_| Errno::PROTO)?;
                    found.kind = Some((kind, subtype));
                }
                VFIO_REGION_INFO_CAP_MSIX_MAPPABLE => found.msix_mappable = true,
                _ => {}
            }
        }
        Ok(found)
    }
}

/// The areas of the capability SPARSE_MMAP.
fn sparse(body: &[u8]) -> Result<Vec<Area>> {
    let ([count, _], rest) = <[u32; 2]>::read_from_prefix(body).map_err(|_| Errno::PROTO)?;
    let size = size_of::<vfio_region_sparse_mmap_area>();
    let length = usize::try_from(count).ok().and_then(|count| count.checked_mul(size)).ok_or(Errno::PROTO)?;
    let entries = rest.get(..length).ok_or(Errno::PROTO)?.chunks_exact(size);
    let areas = entries.map(|entry| {
        let area = vfio_region_sparse_mmap_area::read_from_bytes(entry).map_err(|_| Errno::PROTO)?;
        Ok(Area { offset: area.offset, size: area.size })
    });
    areas.collect()
}

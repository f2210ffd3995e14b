//! `VFIO_IOMMU_GET_INFO`, `MAP_DMA` and `UNMAP_DMA`.

use core::mem::offset_of;

use iommufd::{
    domain::Prot,
    iova::{Iova, IovaRange, PAGE_SIZE},
    process::UserAddr,
};
use uapi::vfio::{
    VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_VADDR, VFIO_DMA_MAP_FLAG_WRITE, VFIO_DMA_UNMAP_FLAG_ALL,
    VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP, VFIO_DMA_UNMAP_FLAG_VADDR, VFIO_IOMMU_INFO_CAPS,
    VFIO_IOMMU_INFO_PGSIZES, VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION,
    VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL, vfio_bitmap, vfio_iommu_type1_dma_map, vfio_iommu_type1_info,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{
    Container, Type1, Version, dirty,
    mappings::{MOST, Mapping},
};
use crate::{
    Errno, Result,
    doors::{chain::Chain, structure, table::Call},
};

/// The version of every capability.
const CAPABILITY: u16 = 1;

/// `VFIO_IOMMU_GET_INFO`.
pub(in crate::doors) fn get_info(call: &Call<'_, Container>) -> Result<i32> {
    let minimum = offset_of!(vfio_iommu_type1_info, cap_offset);
    call.file.type1(|type1| {
        let mut args: vfio_iommu_type1_info = structure::get(call.process(), call.arg, minimum)?;
        let mut chain = Chain::default();
        let migration = [0, PAGE_SIZE, dirty::MOST_BYTES];
        chain.push(VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION, CAPABILITY, migration.as_bytes());
        let available = MOST.saturating_sub(type1.mappings.len()) as u32;
        chain.push(VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL, CAPABILITY, [available, 0].as_bytes());
        let ranges = ranges(type1)?;
        let mut body = [ranges.len() as u32, 0].as_bytes().to_vec();
        for range in ranges {
            body.extend_from_slice([range.start().0, range.last().0].as_bytes());
        }
        chain.push(VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, CAPABILITY, &body);
        let given = args.argsz;
        args.flags = VFIO_IOMMU_INFO_PGSIZES | VFIO_IOMMU_INFO_CAPS;
        args.iova_pgsizes = !(PAGE_SIZE - 1);
        (args.argsz, args.cap_offset) =
            chain.put(call.process(), call.arg, size_of::<vfio_iommu_type1_info>(), given)?;
        structure::put(call.process(), call.arg, &args, given)?;
        Ok(0)
    })
}

/// Where something may be mapped.
fn ranges(type1: &Type1) -> Result<Vec<IovaRange>> {
    Ok(type1.context.ioas_space(type1.ioas)?.iova_ranges())
}

/// A range of whole pages. EINVAL; EOVERFLOW when it goes past the last address.
pub(super) fn pages(start: u64, size: u64) -> Result<IovaRange> {
    if size == 0 || (start | size) & (PAGE_SIZE - 1) != 0 {
        return Err(Errno::INVAL);
    }
    IovaRange::with_length(Iova(start), size)
}

/// `VFIO_IOMMU_MAP_DMA`.
pub(in crate::doors) fn map_dma(call: &Call<'_, Container>) -> Result<i32> {
    call.file.type1(|type1| {
        let size = size_of::<vfio_iommu_type1_dma_map>();
        let args: vfio_iommu_type1_dma_map = structure::get(call.process(), call.arg, size)?;
        let access = args.flags & (VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE);
        let renew = args.flags & VFIO_DMA_MAP_FLAG_VADDR != 0;
        let known = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE | VFIO_DMA_MAP_FLAG_VADDR;
        if args.flags & !known != 0 || renew == (access != 0) {
            return Err(Errno::INVAL);
        }
        let range = pages(args.iova, args.size)?;
        pages(args.vaddr, args.size)?;
        if renew {
            return give_back(type1, range);
        }
        if type1.mappings.in_range(range).next().is_some() {
            return Err(Errno::EXIST);
        }
        if type1.mappings.len() >= MOST {
            return Err(Errno::NOSPC);
        }
        if !ranges(type1)?.iter().any(|allowed| allowed.covers(range)) {
            return Err(Errno::INVAL);
        }
        let mut prot = Prot::empty();
        prot.set(Prot::READ, access & VFIO_DMA_MAP_FLAG_READ != 0);
        prot.set(Prot::WRITE, access & VFIO_DMA_MAP_FLAG_WRITE != 0);
        let registers = call.caller.has_registers(UserAddr(args.vaddr), args.size);
        if !registers {
            let at = Some(Iova(args.iova));
            type1.context.ioas_map_by(type1.ioas, call.caller, UserAddr(args.vaddr), args.size, at, prot)?;
        }
        type1.mappings.insert(Mapping { range, registers, withdrawn: false })?;
        Ok(0)
    })
}

/// `VFIO_DMA_MAP_FLAG_VADDR`: the program has the memory again, at whatever address. The pages have been there all the
/// time. ENOENT when nothing is mapped at exactly the range, EINVAL when it was not withdrawn.
fn give_back(type1: &mut Type1, range: IovaRange) -> Result<i32> {
    let mapping = type1.mappings.at(range.start().0).ok_or(Errno::NOENT)?;
    if mapping.range != range || !mapping.withdrawn {
        return Err(Errno::INVAL);
    }
    mapping.withdrawn = false;
    Ok(0)
}

/// `struct vfio_iommu_type1_dma_unmap` and the bitmap that may follow it.
#[repr(C)]
#[derive(FromBytes, IntoBytes, Immutable)]
struct Unmap {
    argsz: u32,
    flags: u32,
    iova: u64,
    size: u64,
    bitmap: vfio_bitmap,
}

/// `VFIO_IOMMU_UNMAP_DMA`.
pub(in crate::doors) fn unmap_dma(call: &Call<'_, Container>) -> Result<i32> {
    let minimum = offset_of!(Unmap, bitmap);
    call.file.type1(|type1| {
        let mut args: Unmap = structure::get(call.process(), call.arg, minimum)?;
        let flag = |flag| args.flags & flag != 0;
        let all = flag(VFIO_DMA_UNMAP_FLAG_ALL);
        let withdraw = flag(VFIO_DMA_UNMAP_FLAG_VADDR);
        let dirty = flag(VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP);
        let known =
            VFIO_DMA_UNMAP_FLAG_ALL | VFIO_DMA_UNMAP_FLAG_VADDR | VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP;
        if args.flags & !known != 0 || dirty && (all || withdraw) {
            return Err(Errno::INVAL);
        }
        let range = if all {
            if args.iova != 0 || args.size != 0 {
                return Err(Errno::INVAL);
            }
            IovaRange::ALL
        } else {
            pages(args.iova, args.size)?
        };
        if dirty {
            if (args.argsz as usize) < size_of::<Unmap>() || !type1.dirty {
                return Err(Errno::INVAL);
            }
            dirty::check(&args.bitmap, args.size)?;
        }
        let chosen: Vec<Mapping> = match type1.version {
            Version::Two if type1.mappings.cuts(range) => return Err(Errno::INVAL),
            // A piece that begins before the range stops it; one that begins in it goes as a whole.
            Version::One => type1
                .mappings
                .in_range(range)
                .take_while(|mapping| mapping.range.start() >= range.start())
                .copied()
                .collect(),
            Version::Two => type1.mappings.in_range(range).copied().collect(),
        };
        if withdraw {
            if chosen.iter().any(|mapping| mapping.withdrawn) {
                return Err(Errno::INVAL);
            }
            for mapping in type1.mappings.iter_mut().filter(|mapping| chosen.contains(mapping)) {
                mapping.withdrawn = true;
            }
        } else {
            if dirty {
                dirty::report(call.process(), &args.bitmap, range, &chosen)?;
            }
            for mapping in &chosen {
                if !mapping.registers {
                    type1.context.ioas_unmap(type1.ioas, mapping.range)?;
                }
                type1.mappings.remove(mapping);
            }
        }
        args.size = chosen.iter().filter_map(|mapping| mapping.range.length()).fold(0, u64::saturating_add);
        let head = args.as_bytes().get(..minimum).unwrap_or_default();
        call.process().write(call.arg, head)?;
        Ok(0)
    })
}

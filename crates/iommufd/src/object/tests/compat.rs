//! VFIO's ioctls.

use uapi::vfio::*;

use super::*;
use crate::{process::UserAddr, testing::ARGUMENTS};

fn set_iommu(world: &World, kind: u32) -> Result<i32> {
    world.context.ioctl(&world.program, VFIO_SET_IOMMU, UserAddr(kind.into()))
}

fn map(world: &World, offset: u64, size: u64, iova: u64) -> Result<i32> {
    let mut args = vfio_iommu_type1_dma_map {
        argsz: super::size::<vfio_iommu_type1_dma_map>(),
        flags: VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
        vaddr: MEMORY + offset,
        iova,
        size,
    };
    world.program.ioctl(&world.context, VFIO_IOMMU_MAP_DMA, &mut args)
}

/// The result, and the size that comes back.
fn unmap(world: &World, iova: u64, size: u64, flags: u32) -> (Result<i32>, u64) {
    let mut args = [24 | u64::from(flags) << 32, iova, size];
    let result = world.program.ioctl(&world.context, VFIO_IOMMU_UNMAP_DMA, &mut args);
    (result, args[2])
}

#[test]
fn without_an_address_space_there_is_no_device() {
    let world = World::new();
    let call = |cmd, arg| world.context.ioctl(&world.program, cmd, UserAddr(arg));
    assert_eq!(call(VFIO_GET_API_VERSION, 0), Ok(0));
    assert_eq!(call(VFIO_CHECK_EXTENSION, VFIO_TYPE1_IOMMU.into()), Ok(1));
    assert_eq!(call(VFIO_CHECK_EXTENSION, 6), Ok(0), "nesting");
    assert_eq!(set_iommu(&world, VFIO_TYPE1_IOMMU), Err(Errno::NODEV));
    assert_eq!(set_iommu(&world, 2), Err(Errno::INVAL));
    assert_eq!(map(&world, 0, PAGE, 0), Err(Errno::NODEV));
    assert_eq!(call(VFIO_IOMMU_DIRTY_PAGES, ARGUMENTS.0), Err(Errno::NOTTY));
    let id = world.context.compat_ioas_or_new().unwrap();
    assert_eq!(world.context.compat_ioas_or_new(), Ok(id));
    assert_eq!(map(&world, 0, PAGE, 0), Ok(0));
    // An IOAS that is destroyed is not meant any more.
    world.destroy(id).unwrap();
    assert_eq!(world.context.compat_ioas(), Err(Errno::NODEV));
}

#[test]
fn version_1_cuts_areas_and_version_2_does_not() {
    for (version, cut) in [(VFIO_TYPE1_IOMMU, Ok(0)), (3, Err(Errno::NOENT))] {
        let world = World::new();
        let ioas = world.ioas();
        world.device(ioas, 0).unwrap();
        world.context.set_compat_ioas(Some(ioas)).unwrap();
        set_iommu(&world, version).unwrap();
        map(&world, 0, 4 * PAGE, APERTURE).unwrap();
        let done = if cut.is_ok() { PAGE } else { 0 };
        assert_eq!(unmap(&world, APERTURE + PAGE, PAGE, 0), (cut, done));
        assert_eq!(unmap(&world, APERTURE, 0, VFIO_DMA_UNMAP_FLAG_ALL), (Err(Errno::INVAL), 0));
        assert_eq!(unmap(&world, 0, 0, VFIO_DMA_UNMAP_FLAG_ALL), (Ok(0), 4 * PAGE - done));
        assert_eq!(unmap(&world, APERTURE, PAGE, 0), (Ok(0), 0), "of nothing");
    }
}

#[test]
fn capabilities_are_given_whole_or_not() {
    let world = World::new();
    let ioas = world.ioas();
    world.device(ioas, 0).unwrap();
    world.context.set_compat_ioas(Some(ioas)).unwrap();
    let info = |argsz: u32| {
        let mut bytes = [0xaa_u8; 96];
        bytes[..argsz as usize].fill(0);
        bytes[..4].copy_from_slice(&argsz.to_ne_bytes());
        world.program.ioctl(&world.context, VFIO_IOMMU_GET_INFO, &mut bytes).map(|_| bytes)
    };
    assert_eq!(info(15), Err(Errno::INVAL));
    for argsz in 16..90 {
        let bytes = info(argsz).unwrap();
        let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(4)), (72, 3));
        assert!(bytes[argsz as usize..].iter().all(|byte| *byte == 0xaa), "nothing past the end");
        if argsz >= 72 {
            assert_eq!(
                (word(16), word(24) & 0xffff, word(28), word(40) & 0xffff, word(44)),
                (24, 3, 40, 1, 0)
            );
            assert_eq!((u64::from(word(56)), word(64)), (APERTURE, MOCK_APERTURE_LAST));
        } else if argsz >= 20 {
            assert_eq!(word(16), 0);
        }
    }
}

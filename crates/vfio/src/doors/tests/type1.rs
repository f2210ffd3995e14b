//! VFIO's own container.

use uapi::vfio::{
    VFIO_DEVICE_GET_INFO, VFIO_GROUP_GET_DEVICE_FD, VFIO_GROUP_SET_CONTAINER, VFIO_IOMMU_DIRTY_PAGES,
    VFIO_IOMMU_ENABLE, VFIO_IOMMU_GET_INFO, VFIO_IOMMU_MAP_DMA, VFIO_IOMMU_SPAPR_TCE_CREATE,
    VFIO_IOMMU_UNMAP_DMA, VFIO_SET_IOMMU,
};

use super::*;
use crate::Errno;

const BASE: u64 = 0x1000_0000;
const P: u64 = PAGE as u64;

struct World {
    program: Program,
    container: i32,
    device: i32,
    pages: Pages,
    _system: Arc<System>,
}

impl World {
    fn new(version: u64) -> Self {
        let (system, program) = (system(), Program::default());
        let group = program.group(&system, 5).unwrap();
        let container = program.container(&system);
        program.ioctl(group, VFIO_GROUP_SET_CONTAINER, &mut container.to_ne_bytes()).unwrap();
        assert_eq!(program.ioctl(container, VFIO_IOMMU_GET_INFO, &mut [24u64; 3]), Err(Errno::INVAL));
        assert_eq!(program.call(container, 0x3bc8, 0), Err(Errno::INVAL));
        program.call(container, VFIO_SET_IOMMU, version).unwrap();
        let mut name = *b"0000:00:05.0\0";
        let device = program.ioctl(group, VFIO_GROUP_GET_DEVICE_FD, &mut name).unwrap();
        Self { program, container, device, pages: Pages::new(64), _system: system }
    }

    fn map_with(&self, argsz: u32, flags: u32, vaddr: u64, iova: u64, size: u64) -> crate::Result<i32> {
        let mut args = vfio_iommu_type1_dma_map { argsz, flags, vaddr, iova, size };
        self.program.ioctl(self.container, VFIO_IOMMU_MAP_DMA, &mut args)
    }

    fn map(&self, iova: u64, size: u64) -> crate::Result<i32> {
        self.map_with(32, 3, self.pages.address(), iova, size)
    }

    fn unmap_with(&self, argsz: u32, flags: u32, iova: u64, size: u64) -> crate::Result<u64> {
        let mut args = [u64::from(argsz) | u64::from(flags) << 32, iova, size, 0, 0, 0];
        self.program.ioctl(self.container, VFIO_IOMMU_UNMAP_DMA, &mut args).map(|_| args[2])
    }

    fn unmap(&self, iova: u64, size: u64) -> crate::Result<u64> {
        self.unmap_with(24, 0, iova, size)
    }

    fn dirty(&self, flags: u32, iova: u64, size: u64, pgsize: u64, length: u64) -> crate::Result<u64> {
        let mut bits = [0u64; 4];
        let at = bits.as_mut_ptr().addr() as u64;
        let mut args = [48 | u64::from(flags) << 32, iova, size, pgsize, length, at];
        self.program.ioctl(self.container, VFIO_IOMMU_DIRTY_PAGES, &mut args)?;
        Ok(std::hint::black_box(&bits)[0])
    }
}

#[test]
fn a_container_tells_of_itself() {
    let world = World::new(3);
    let mut info = [0u64; 32];
    let mut get = |argsz| {
        info[0] = argsz;
        world.program.ioctl(world.container, VFIO_IOMMU_GET_INFO, &mut info).map(|_| info)
    };
    assert_eq!(get(15).map(|_| ()), Err(Errno::INVAL));
    let told = get(24).unwrap();
    assert_eq!((told[0], told[2]), (3 << 32 | 0x78, 0), "how much is needed, and none of it");
    assert_eq!(get(16).unwrap()[0], 3 << 32 | 0x78);
    let told = get(256).unwrap();
    assert_eq!((told[0], told[2]), (3 << 32 | 256, 24));
    assert_eq!(told[1] & 0x1000, 0x1000, "pages of 4 KiB");
    assert_eq!(told[3..7], [0x38 << 32 | 0x0001_0002, 0, P, 1 << 28], "MIGRATION");
    assert_eq!(told[7..9], [0x48 << 32 | 0x0001_0003, 0xffff], "DMA_AVAIL");
    assert_eq!(told[9..13], [0x0001_0001, 2, 0, 0xfedf_ffff], "IOVA_RANGE");
    assert_eq!(told[13], 0xfef0_0000);
    for foreign in [VFIO_IOMMU_ENABLE, 0x3bc8, VFIO_DEVICE_GET_INFO, VFIO_IOMMU_SPAPR_TCE_CREATE] {
        assert_eq!(world.program.call(world.container, foreign, 0), Err(Errno::NOTTY));
    }
}

#[test]
fn mapping() {
    for version in [1, 3] {
        let world = World::new(version);
        let at = world.pages.address();
        assert_eq!(world.map_with(31, 3, at, BASE, P), Err(Errno::INVAL));
        for flags in [0, 8, 7] {
            assert_eq!(world.map_with(32, flags, at, BASE, P), Err(Errno::INVAL), "{flags}");
        }
        assert_eq!(world.map_with(32, 4, at, BASE, P), Err(Errno::NOENT));
        for (vaddr, iova, size, errno) in [
            (at, BASE, 0, Errno::INVAL),
            (at, BASE, 100, Errno::INVAL),
            (at + 1, BASE, P, Errno::INVAL),
            (at, BASE + 1, P, Errno::INVAL),
            (at, 0u64.wrapping_sub(P), 2 * P, Errno::OVERFLOW),
            (0u64.wrapping_sub(P), BASE, 2 * P, Errno::OVERFLOW),
            (0x1000, BASE, P, Errno::FAULT),
            (at, 1 << 60, P, Errno::INVAL),
            (at, 0xfee0_0000, P, Errno::INVAL),
            (at, 0xfedf_f000, 2 * P, Errno::INVAL),
        ] {
            assert_eq!(
                world.map_with(32, 3, vaddr, iova, size),
                Err(errno),
                "{vaddr:#x} {iova:#x} {size:#x}"
            );
        }
        assert_eq!(world.map(BASE, 16 * P), Ok(0));
        assert_eq!(world.map(BASE, 16 * P), Err(Errno::EXIST));
        assert_eq!(world.map(BASE + 15 * P, 2 * P), Err(Errno::EXIST));
        assert_eq!(world.map_with(32, 1, at, BASE + 16 * P, 4 * P), Ok(0));
        assert_eq!(copy(&world.program, world.device, BASE, BASE + P, 100), reg::STATUS_DONE);
        assert_eq!(
            copy(&world.program, world.device, BASE, BASE + 16 * P, 100),
            reg::STATUS_FAULT,
            "read only"
        );
        assert_eq!(world.program.call(world.container, VFIO_IOMMU_MAP_DMA, 8), Err(Errno::FAULT));
    }
}

#[test]
fn unmapping() {
    for version in [1, 3] {
        let world = World::new(version);
        world.map(BASE, 16 * P).unwrap();
        world.map_with(32, 1, world.pages.address(), BASE + 16 * P, 4 * P).unwrap();
        world.map_with(32, 2, world.pages.address(), BASE + 20 * P, 4 * P).unwrap();
        assert_eq!(world.unmap_with(23, 0, BASE, P), Err(Errno::INVAL));
        assert_eq!(world.unmap_with(24, 8, BASE, P), Err(Errno::INVAL));
        assert_eq!(world.unmap_with(24, 2, BASE, 0), Err(Errno::INVAL), "all, with an address");
        assert_eq!(world.unmap_with(24, 2, 0, P), Err(Errno::INVAL));
        assert_eq!(world.unmap_with(24, 3, 0, 0), Err(Errno::INVAL), "all, and dirty");
        assert_eq!(world.unmap_with(24, 1, BASE, 16 * P), Err(Errno::INVAL), "no room for the bitmap");
        assert_eq!(world.unmap(BASE, 0), Err(Errno::INVAL));
        assert_eq!(world.unmap(BASE, 100), Err(Errno::INVAL));
        assert_eq!(world.unmap(BASE + 1, P), Err(Errno::INVAL));
        assert_eq!(world.unmap(0u64.wrapping_sub(P), 2 * P), Err(Errno::OVERFLOW));
        assert_eq!(world.unmap(0x5000_0000, P), Ok(0));
        if version == 3 {
            for at in [BASE + P, BASE, BASE + 15 * P] {
                assert_eq!(world.unmap(at, P), Err(Errno::INVAL), "it would be cut");
            }
            assert_eq!(world.unmap(BASE - P, 17 * P), Ok(16 * P));
        } else {
            assert_eq!(world.unmap(BASE + P, P), Ok(0), "not by its middle");
            assert_eq!(world.unmap(BASE, P), Ok(16 * P), "as a whole");
            assert_eq!(world.unmap(BASE - P, 17 * P), Ok(0));
        }
        assert_eq!(copy(&world.program, world.device, BASE, BASE + P, 1), reg::STATUS_FAULT);
        assert_eq!(world.unmap(BASE, 32 * P), Ok(8 * P));
        world.map(BASE, 16 * P).unwrap();
        world.map(BASE + 32 * P, P).unwrap();
        assert_eq!(world.unmap_with(24, 2, 0, 0), Ok(17 * P));
        assert_eq!(world.unmap_with(24, 2, 0, 0), Ok(0));
        world.map(BASE, 16 * P).unwrap();
        assert_eq!(world.unmap(0, u64::MAX), Err(Errno::INVAL));
        assert_eq!(world.unmap(0, !0xfff), Ok(16 * P));
    }
}

#[test]
fn an_address_is_withdrawn_and_given_back() {
    let world = World::new(3);
    world.map(BASE, 16 * P).unwrap();
    assert_eq!(
        world.map_with(32, 4, world.pages.address(), BASE, 16 * P),
        Err(Errno::INVAL),
        "it was not withdrawn"
    );
    assert_eq!(world.unmap_with(24, 4, BASE, 16 * P), Ok(16 * P));
    assert_eq!(world.unmap_with(24, 4, BASE, 16 * P), Err(Errno::INVAL));
    assert_eq!(world.map_with(32, 4, world.pages.address(), BASE, 8 * P), Err(Errno::INVAL));
    assert_eq!(world.map_with(32, 4, world.pages.address(), BASE, 16 * P), Ok(0));
    assert_eq!(copy(&world.program, world.device, BASE, BASE + P, 1), reg::STATUS_DONE);
}

#[test]
fn dirty_pages() {
    let (start, stop, get) = (1, 2, 4);
    let world = World::new(1);
    assert_eq!(world.dirty(start, 0, 0, 0, 0), Err(Errno::ACCESS), "not with version 1");
    let world = World::new(3);
    world.map(BASE, 16 * P).unwrap();
    assert_eq!(world.dirty(get, BASE, 16 * P, P, 8), Err(Errno::INVAL), "not started");
    assert_eq!(world.dirty(stop, 0, 0, 0, 0), Ok(0));
    assert_eq!(world.dirty(start, 0, 0, 0, 0), Ok(0));
    assert_eq!(world.dirty(start, 0, 0, 0, 0), Ok(0));
    for flags in [0, 3, 8] {
        assert_eq!(world.dirty(flags, 0, 0, 0, 0), Err(Errno::INVAL));
    }
    assert_eq!(world.dirty(get, BASE, 16 * P, P, 8), Ok(0xffff));
    assert_eq!(world.dirty(get, BASE, 16 * P, P, 8), Ok(0xffff));
    for (iova, size, pgsize, length) in [
        (BASE, 16 * P, 8192, 8),
        (BASE, 16 * P, P, 1),
        (BASE, 8 * P, P, 8),
        (BASE + P, P, P, 8),
        (BASE + 1, 16 * P, P, 8),
        (BASE, 0, P, 8),
        (BASE, 16 * P, P, u64::MAX),
    ] {
        assert_eq!(world.dirty(get, iova, size, pgsize, length), Err(Errno::INVAL));
    }
    assert_eq!(world.dirty(get, 0, 64 * P, P, 8), Ok(0), "elsewhere");
    assert_eq!(world.dirty(get, BASE - 4 * P, 20 * P, P, 8), Ok(0xf_fff0));
    let mut bits = [0u64];
    let at = bits.as_mut_ptr().addr() as u64;
    let mut args = [48 | 1 << 32, BASE, 16 * P, P, 8, at];
    assert_eq!(world.program.ioctl(world.container, VFIO_IOMMU_UNMAP_DMA, &mut args), Ok(0));
    assert_eq!((args[2], std::hint::black_box(&bits)[0]), (16 * P, 0xffff));
}

#[test]
fn two_groups_share_what_is_mapped() {
    let (system, program) = (system(), Program::default());
    let container = program.container(&system);
    let (first, second) = (program.group(&system, 5).unwrap(), program.group(&system, 6).unwrap());
    program.ioctl(first, VFIO_GROUP_SET_CONTAINER, &mut container.to_ne_bytes()).unwrap();
    program.call(container, VFIO_SET_IOMMU, 3).unwrap();
    let pages = Pages::new(1);
    program.ioctl(container, VFIO_IOMMU_MAP_DMA, &mut dma_map(&pages, 0, PAGE)).unwrap();
    // Who comes later finds it.
    program.ioctl(second, VFIO_GROUP_SET_CONTAINER, &mut container.to_ne_bytes()).unwrap();
    program.close(first);
    assert_eq!(
        program.ioctl(container, VFIO_IOMMU_MAP_DMA, &mut dma_map(&pages, 0, PAGE)),
        Err(Errno::EXIST)
    );
    program.close(second);
    assert_eq!(
        program.ioctl(container, VFIO_IOMMU_MAP_DMA, &mut dma_map(&pages, 0, PAGE)),
        Err(Errno::INVAL)
    );
}

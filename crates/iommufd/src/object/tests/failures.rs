//! Every step fails once for want of memory, and leaves nothing behind.

use super::*;
use crate::{caller::Caller as _, inject, process::UserAddr};

/// A life of a context: everything is made, used and destroyed.
fn life(world: &World) -> Result<()> {
    let ioas = world.context.ioas_alloc()?;
    world.map(ioas, 0, 4 * PAGE, APERTURE)?;
    let (stdev, _, device) = world.device(ioas, MOCK_FLAGS_DEVICE_PASID)?;
    let flags = IOMMU_HWPT_ALLOC_NEST_PARENT | IOMMU_HWPT_ALLOC_PASID;
    let parent = world.hwpt(device, ioas, flags, false, 0)?;
    let viommu = world.viommu(device, parent)?;
    let vdevice = world.vdevice(viommu, device, 3)?;
    let (queue, file) = world.context.fault_queue_alloc()?;
    let flags = IOMMU_HWPT_ALLOC_PASID | IOMMU_HWPT_FAULT_ID_VALID;
    let nested = world.hwpt(device, viommu, flags, true, queue)?;
    world.replace(stdev, nested)?;
    let pasid = |op, pt_id| {
        let member = iommu_test_cmd__bindgen_ty_1__bindgen_ty_18 { pasid: 9, pt_id };
        world.test(op, stdev, member).map(drop)
    };
    pasid(IOMMU_TEST_OP_PASID_ATTACH, parent)?;
    pasid(IOMMU_TEST_OP_PASID_REPLACE, nested)?;
    let (events, event_file) = world.context.veventq_alloc(viommu, IOMMU_VEVENTQ_TYPE_SELFTEST, 2)?;
    let hw_queue = world.context.hw_queue_alloc(
        viommu,
        IOMMU_HW_QUEUE_TYPE_SELFTEST,
        0,
        crate::iova::Iova(APERTURE),
        PAGE,
    )?;
    drop((file, event_file));
    pasid(IOMMU_TEST_OP_PASID_DETACH, 0)?;
    world.destroy(stdev)?;
    match world.destroy(vdevice) {
        Err(Errno::NOENT) => {}
        Err(error) => return Err(error),
        Ok(()) => panic!("the vDEVICE went with its device"),
    }
    for id in [hw_queue, events, nested, queue, viommu, parent] {
        world.destroy(id)?;
    }
    assert_eq!(world.unmap(ioas, 0, u64::MAX)?, 4 * PAGE);
    world.destroy(ioas)
}

#[test]
fn any_step_may_fail() {
    let mut failures = 0;
    for nth in 1..1000 {
        let world = World::new();
        inject::fail_nth(nth);
        let result = life(&world);
        let left = inject::remaining();
        inject::fail_nth(0);
        let World { context, program } = world;
        drop(context);
        for page in 0..4 {
            assert_eq!(program.process().pin_count(UserAddr(MEMORY + page * PAGE)), Ok(0), "step {nth}");
        }
        match result {
            Ok(()) if left > 0 => {
                assert!(failures > 20, "only {failures} steps can fail");
                return;
            }
            // Something did without.
            Ok(()) => {}
            Err(error) => {
                assert_eq!((error, left), (Errno::NOMEM, 0), "step {nth}");
                failures += 1;
            }
        }
    }
    panic!("it goes on failing");
}

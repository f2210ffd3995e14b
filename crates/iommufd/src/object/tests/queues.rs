//! Event queues and hardware queues.

use super::*;
use crate::caller::Caller as _;

/// A device with a vIOMMU: the world, mock device, device, vIOMMU, IOAS.
fn with_viommu() -> (World, u32, u32, u32, u32) {
    let world = World::new();
    let ioas = world.ioas();
    let (stdev, _, device) = world.device(ioas, 0).unwrap();
    let parent = world.hwpt(device, ioas, IOMMU_HWPT_ALLOC_NEST_PARENT, false, 0).unwrap();
    let viommu = world.viommu(device, parent).unwrap();
    (world, stdev, device, viommu, ioas)
}

fn event_queue(world: &World, viommu_id: u32, depth: u32) -> Result<(u32, i32)> {
    let mut args = iommu_veventq_alloc {
        size: size::<iommu_veventq_alloc>(),
        viommu_id,
        type_: IOMMU_VEVENTQ_TYPE_SELFTEST,
        veventq_depth: depth,
        ..Default::default()
    };
    world.call(IOMMUFD_CMD_VEVENTQ_ALLOC, &mut args)?;
    Ok((args.out_veventq_id, args.out_veventq_fd as i32))
}

fn hw_queue(world: &World, viommu_id: u32, index: u32, nesting_parent_iova: u64, length: u64) -> Result<u32> {
    let mut args = iommu_hw_queue_alloc {
        size: size::<iommu_hw_queue_alloc>(),
        viommu_id,
        type_: IOMMU_HW_QUEUE_TYPE_SELFTEST,
        index,
        nesting_parent_iova,
        length,
        ..Default::default()
    };
    world.call(IOMMUFD_CMD_HW_QUEUE_ALLOC, &mut args)?;
    Ok(args.out_hw_queue_id)
}

#[test]
fn lost_events_leave_a_gap_or_a_header() {
    let (world, stdev, device, viommu, _) = with_viommu();
    world.vdevice(viommu, device, 0x99).unwrap();
    let nested = world.hwpt(device, viommu, 0, true, 0).unwrap();
    world.replace(stdev, nested).unwrap();
    assert_eq!(event_queue(&world, viommu, 0), Err(Errno::INVAL));
    assert_eq!(event_queue(&world, viommu, (1 << 19) + 1), Err(Errno::INVAL));
    let (queue, fd) = event_queue(&world, viommu, 2).unwrap();
    assert_eq!(event_queue(&world, viommu, 2), Err(Errno::EXIST));
    assert_eq!(world.destroy(queue), Err(Errno::BUSY), "its descriptor is open");

    let file = world.program.installed(fd).unwrap();
    let event = || {
        let member = iommu_test_cmd__bindgen_ty_1__bindgen_ty_17 { dev_id: device };
        world.test(IOMMU_TEST_OP_TRIGGER_VEVENT, 0, member).unwrap();
    };
    // Flags and sequence number of each header, of what `length` bytes hold.
    let read = |length: usize| -> Result<Vec<(u32, u32)>> {
        let mut bytes = vec![0; length];
        let done = file.read(&mut bytes)?;
        let mut rest = &bytes[..done];
        let mut headers = Vec::new();
        while let Ok((header, tail)) = iommufd_vevent_header::read_from_prefix(rest) {
            let data = if header.flags == 0 { 4 } else { 0 };
            if data > 0 {
                assert_eq!(tail[..4], 0x99_u32.to_ne_bytes());
            }
            headers.push((header.flags, header.sequence));
            rest = &tail[data..];
        }
        Ok(headers)
    };
    assert_eq!(read(7), Err(Errno::INVAL));
    assert_eq!(read(8), Ok(vec![]));
    event();
    assert_eq!(read(8), Err(Errno::INVAL), "the header fits, the event does not");
    assert_eq!(read(12), Ok(vec![(0, 0)]));
    (0..3).for_each(|_| event());
    assert_eq!(read(100), Ok(vec![(0, 1), (0, 2), (1, 3)]), "the last one is lost");
    (0..4).for_each(|_| event());
    assert_eq!(read(12), Ok(vec![(0, 4)]));
    event();
    assert_eq!(read(100), Ok(vec![(0, 5), (0, 8)]), "a gap says it, and no header");
    assert_eq!(file.write(&[0; 8]), Err(Errno::INVAL));
}

#[test]
fn a_hardware_queue_owns_its_memory() {
    let (world, _, _, viommu, ioas) = with_viommu();
    assert_eq!(hw_queue(&world, viommu, 0, APERTURE, PAGE), Err(Errno::NOENT));
    assert_eq!(hw_queue(&world, viommu, 0, APERTURE, 0), Err(Errno::INVAL));
    assert_eq!(hw_queue(&world, viommu, 0, u64::MAX, PAGE), Err(Errno::OVERFLOW));
    world.map(ioas, 0, 2 * PAGE, APERTURE).unwrap();
    world.map(ioas, 2 * PAGE, PAGE, APERTURE + 2 * PAGE).unwrap();
    assert_eq!(hw_queue(&world, viommu, 1, APERTURE, PAGE), Err(Errno::IO), "0 comes first");
    assert_eq!(hw_queue(&world, viommu, 2, APERTURE, PAGE), Err(Errno::INVAL));
    // Over two areas, and not of whole pages.
    let first = hw_queue(&world, viommu, 0, APERTURE + PAGE + 8, PAGE).unwrap();
    assert_eq!(hw_queue(&world, viommu, 0, APERTURE, PAGE), Err(Errno::EXIST));
    assert_eq!(world.unmap(ioas, APERTURE, 2 * PAGE), Err(Errno::BUSY));
    assert_eq!(world.unmap(ioas, APERTURE + 2 * PAGE, PAGE), Err(Errno::BUSY));
    let second = hw_queue(&world, viommu, 1, APERTURE, PAGE).unwrap();
    assert_eq!(world.destroy(first), Err(Errno::BUSY), "the second is above it");
    assert_eq!(world.destroy(viommu), Err(Errno::BUSY));
    world.destroy(second).unwrap();
    world.destroy(first).unwrap();
    assert_eq!(world.unmap(ioas, 0, u64::MAX), Ok(3 * PAGE));
}

#[test]
fn a_queue_that_cannot_be_made_leaves_nothing_pinned() {
    let (world, _, _, viommu, ioas) = with_viommu();
    world.map(ioas, 0, PAGE, APERTURE).unwrap();
    // Pages that lie apart in host memory.
    world.map(ioas, 8 * PAGE, PAGE, APERTURE + PAGE).unwrap();
    assert_eq!(hw_queue(&world, viommu, 0, APERTURE, 2 * PAGE), Err(Errno::FAULT));
    assert_eq!(hw_queue(&world, viommu, 0, APERTURE, 3 * PAGE), Err(Errno::NOENT));
    assert_eq!(hw_queue(&world, viommu, 1, APERTURE, PAGE), Err(Errno::IO));
    assert_eq!(world.unmap(ioas, 0, u64::MAX), Ok(2 * PAGE), "nothing owns them");
    world.map(ioas, 0, PAGE / 2, APERTURE).unwrap();
}

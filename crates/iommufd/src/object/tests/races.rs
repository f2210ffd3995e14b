//! Threads on the same ids.

use std::thread;

use super::*;
use crate::iova::Iova;

const ROUNDS: usize = 300;

#[test]
fn of_two_who_destroy_one_object_one_does() {
    let world = World::new();
    for _ in 0..ROUNDS {
        let id = world.ioas();
        let done: usize = thread::scope(|scope| {
            let threads: Vec<_> = (0..2).map(|_| scope.spawn(|| world.context.destroy(id))).collect();
            threads
                .into_iter()
                .filter(|_| true)
                .map(|thread| usize::from(thread.join().unwrap().is_ok()))
                .sum()
        });
        assert_eq!(done, 1);
    }
}

#[test]
fn who_attaches_to_what_is_destroyed_has_it_or_has_not() {
    let world = World::new();
    let (home, other) = (world.ioas(), world.ioas());
    let (stdev, _, device) = world.device(home, 0).unwrap();
    let device = world.context.table().get::<crate::object::device::Device>(device).unwrap().as_arc().clone();
    for _ in 0..ROUNDS {
        let hwpt = world.hwpt(device.id, other, 0, false, 0).unwrap();
        let (attached, destroyed) = thread::scope(|scope| {
            let attach = scope.spawn(|| device.replace(None, hwpt));
            let destroy = scope.spawn(|| world.context.destroy(hwpt));
            (attach.join().unwrap(), destroy.join().unwrap())
        });
        match (attached, destroyed) {
            (Ok(_), Err(Errno::BUSY)) | (Err(Errno::NOENT), Ok(())) => {}
            other => panic!("{other:?}"),
        }
        device.replace(None, home).unwrap();
        let _ = world.context.destroy(hwpt);
    }
    world.destroy(stdev).unwrap();
    world.destroy(other).unwrap();
}

#[test]
fn a_vdevice_never_outlives_its_device() {
    let world = World::new();
    let ioas = world.ioas();
    let (_, _, other) = world.device(ioas, 0).unwrap();
    let parent = world.hwpt(other, ioas, IOMMU_HWPT_ALLOC_NEST_PARENT, false, 0).unwrap();
    let viommu = world.viommu(other, parent).unwrap();
    for _ in 0..ROUNDS {
        let (stdev, _, device) = world.device(ioas, 0).unwrap();
        let vdevice = thread::scope(|scope| {
            let make = scope.spawn(|| world.context.vdevice_alloc(viommu, device, 5));
            let unbind = scope.spawn(|| world.context.destroy(stdev));
            unbind.join().unwrap().unwrap();
            make.join().unwrap()
        });
        if let Ok(vdevice) = vdevice {
            assert_eq!(world.context.destroy(vdevice), Err(Errno::NOENT));
        }
        // The number is free again.
        let again = world.vdevice(viommu, other, 5).unwrap();
        world.destroy(again).unwrap();
    }
    world.destroy(viommu).unwrap();
}

#[test]
fn maps_and_attachments_from_several_threads_end_in_order() {
    let world = World::new();
    let ioas = world.ioas();
    let context = &world.context;
    thread::scope(|scope| {
        for thread in 0..3_u64 {
            let program = Program::new().unwrap();
            scope.spawn(move || {
                let caller = World { context: context.clone(), program };
                for round in 0..60 {
                    let iova = APERTURE + (thread * 64 + round % 8) * PAGE;
                    caller.map(ioas, 0, PAGE, iova).unwrap();
                    let (stdev, hwpt, _) = caller.device(ioas, 0).unwrap();
                    let found = context.hwpt(hwpt).unwrap().domain.lookup(Iova(iova));
                    assert!(found.is_some(), "the device sees what was mapped before it came");
                    caller.destroy(stdev).unwrap();
                    assert_eq!(caller.unmap(ioas, iova, PAGE), Ok(PAGE));
                }
            });
        }
    });
    world.destroy(ioas).unwrap();
    assert!(world.context.table().is_empty());
}

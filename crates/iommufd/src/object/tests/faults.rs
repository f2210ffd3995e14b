//! Fault queues.

use super::*;
use crate::caller::Caller as _;

/// A device attached to a nested page table with a fault queue: the world, mock device, device, descriptor.
fn with_queue() -> (World, u32, u32, i32, u32, u32) {
    let world = World::new();
    let ioas = world.ioas();
    let (stdev, _, device) = world.device(ioas, 0).unwrap();
    let parent = world.hwpt(device, ioas, IOMMU_HWPT_ALLOC_NEST_PARENT, false, 0).unwrap();
    let mut queue = iommu_fault_alloc { size: size::<iommu_fault_alloc>(), ..Default::default() };
    world.call(IOMMUFD_CMD_FAULT_QUEUE_ALLOC, &mut queue).unwrap();
    let nested = world.hwpt(device, parent, IOMMU_HWPT_FAULT_ID_VALID, true, queue.out_fault_id).unwrap();
    world.replace(stdev, nested).unwrap();
    (world, stdev, device, queue.out_fault_fd as i32, queue.out_fault_id, ioas)
}

fn fault(world: &World, dev_id: u32, grpid: u32) {
    let member =
        iommu_test_cmd__bindgen_ty_1__bindgen_ty_15 { dev_id, pasid: 1, grpid, perm: 3, addr: 0xdead_b000 };
    world.test(IOMMU_TEST_OP_TRIGGER_IOPF, 0, member).unwrap();
}

fn readable(world: &World, fd: i32) -> bool {
    use rustix::event::{PollFd, PollFlags, poll};
    let file = world.program.installed(fd).unwrap();
    let mut fds = [PollFd::from_borrowed_fd(file.readiness(), PollFlags::IN)];
    poll(&mut fds, Some(&Default::default())).unwrap() == 1
}

fn read(world: &World, fd: i32, records: usize) -> Vec<iommu_hwpt_pgfault> {
    let mut bytes = vec![0; records * size_of::<iommu_hwpt_pgfault>()];
    let length = world.program.installed(fd).unwrap().read(&mut bytes).unwrap();
    bytes[..length].chunks(40).map(|record| iommu_hwpt_pgfault::read_from_bytes(record).unwrap()).collect()
}

fn answer(world: &World, fd: i32, cookie: u32, code: u32) -> Result<usize> {
    world.program.installed(fd).unwrap().write(iommu_hwpt_page_response { cookie, code }.as_bytes())
}

#[test]
fn a_fault_is_read_once_and_answered_once() {
    let (world, _, device, fd, ..) = with_queue();
    assert!(!readable(&world, fd));
    assert!(read(&world, fd, 1).is_empty());
    fault(&world, device, 7);
    fault(&world, device, 8);
    assert!(readable(&world, fd));
    let first = read(&world, fd, 1);
    assert_eq!((first[0].dev_id, first[0].grpid, first[0].addr, first[0].flags), (device, 7, 0xdead_b000, 3));
    let second = read(&world, fd, 4);
    assert_eq!(second.len(), 1);
    assert!(!readable(&world, fd));
    assert_eq!(answer(&world, fd, first[0].cookie, 2), Err(Errno::INVAL), "no such code");
    assert_eq!(answer(&world, fd, first[0].cookie, IOMMUFD_PAGE_RESP_SUCCESS), Ok(8));
    assert_eq!(answer(&world, fd, first[0].cookie, IOMMUFD_PAGE_RESP_SUCCESS), Err(Errno::INVAL));
    assert_eq!(answer(&world, fd, second[0].cookie, IOMMUFD_PAGE_RESP_INVALID), Ok(8));
}

#[test]
fn what_cannot_be_delivered_stays() {
    let (world, _, device, fd, ..) = with_queue();
    fault(&world, device, 7);
    fault(&world, device, 8);
    let file = world.program.installed(fd).unwrap();
    let refuse = |from: usize| move |at: usize, _: &[u8]| if at < from { Ok(()) } else { Err(Errno::FAULT) };
    assert_eq!(file.read_to(80, &mut refuse(0)), Err(Errno::FAULT));
    assert!(readable(&world, fd));
    assert_eq!(file.read_to(80, &mut refuse(40)), Ok(40), "the first was delivered");
    let second = read(&world, fd, 4);
    assert_eq!((second.len(), second[0].grpid, second[0].cookie), (1, 8, 2));
    assert!(!readable(&world, fd));
}

#[test]
fn records_are_whole() {
    let (world, _, device, fd, ..) = with_queue();
    fault(&world, device, 1);
    let file = world.program.installed(fd).unwrap();
    assert_eq!(file.read(&mut [0; 39]), Err(Errno::SPIPE));
    assert_eq!(file.write(&[0; 9]), Err(Errno::SPIPE));
    assert_eq!(file.read(&mut []), Ok(0));
    assert_eq!(read(&world, fd, 1).len(), 1);
}

#[test]
fn a_device_that_leaves_takes_its_faults_along() {
    let (world, stdev, device, fd, _, ioas) = with_queue();
    fault(&world, device, 1);
    fault(&world, device, 2);
    let read_one = read(&world, fd, 1);
    world.replace(stdev, ioas).unwrap();
    assert!(!readable(&world, fd));
    assert!(read(&world, fd, 1).is_empty());
    assert_eq!(answer(&world, fd, read_one[0].cookie, IOMMUFD_PAGE_RESP_SUCCESS), Err(Errno::INVAL));
    // Nobody wants the page requests of the page table that it has now.
    fault(&world, device, 3);
    assert!(read(&world, fd, 1).is_empty());
}

#[test]
fn a_queue_lives_with_its_descriptor() {
    let (world, stdev, device, fd, queue, ioas) = with_queue();
    fault(&world, device, 1);
    assert_eq!(world.destroy(queue), Err(Errno::BUSY));
    world.replace(stdev, ioas).unwrap();
    assert_eq!(world.destroy(queue), Err(Errno::BUSY), "the page table that is attached to nothing has it");
    let World { context, program } = world;
    drop(context);
    // The descriptor keeps the context.
    let file = program.installed(fd).unwrap();
    program.close(fd).unwrap();
    assert_eq!(file.read(&mut [0; 40]), Ok(0));
}

#[test]
fn a_parent_has_no_faults() {
    let (world, _, device, _, queue, ioas) = with_queue();
    let flags = IOMMU_HWPT_ALLOC_NEST_PARENT | IOMMU_HWPT_FAULT_ID_VALID;
    assert_eq!(world.hwpt(device, ioas, flags, false, queue), Err(Errno::OPNOTSUPP));
    assert_eq!(world.hwpt(device, ioas, IOMMU_HWPT_FAULT_ID_VALID, false, ioas), Err(Errno::NOENT));
    world.hwpt(device, ioas, IOMMU_HWPT_FAULT_ID_VALID, false, queue).unwrap();
}

//! Lifetimes: what holds what, and in which order it goes.

use super::*;
use crate::{iova::IovaRange, testing::MEMORY_FD};

#[test]
fn a_fresh_id_is_not_one_that_was_just_destroyed() {
    let world = World::new();
    let first = world.ioas();
    world.destroy(first).unwrap();
    assert_ne!(world.ioas(), first);
    assert_eq!(world.destroy(first), Err(Errno::NOENT));
}

#[test]
fn what_is_used_cannot_be_destroyed() {
    let world = World::new();
    let ioas = world.ioas();
    let (stdev, automatic, device) = world.device(ioas, 0).unwrap();
    let parent = world.hwpt(device, ioas, IOMMU_HWPT_ALLOC_NEST_PARENT, false, 0).unwrap();
    let viommu = world.viommu(device, parent).unwrap();
    let nested = world.hwpt(device, viommu, 0, true, 0).unwrap();
    for used in [ioas, automatic, device, parent, viommu] {
        assert_eq!(world.destroy(used), Err(Errno::BUSY));
    }
    // The device takes the page table that was made for it along.
    world.destroy(stdev).unwrap();
    assert_eq!(world.destroy(device), Err(Errno::NOENT));
    assert_eq!(world.destroy(automatic), Err(Errno::NOENT));
    for free in [nested, viommu, parent, ioas] {
        world.destroy(free).unwrap();
    }
    assert!(world.context.table().is_empty());
}

#[test]
fn a_context_that_is_dropped_leaves_nothing_pinned() {
    let world = World::new();
    let ioas = world.ioas();
    let (_, _, device) = world.device(ioas, 0).unwrap();
    world.map(ioas, 0, 4 * PAGE, APERTURE).unwrap();
    let parent = world.hwpt(device, ioas, IOMMU_HWPT_ALLOC_NEST_PARENT, false, 0).unwrap();
    let viommu = world.viommu(device, parent).unwrap();
    world.hwpt(device, viommu, 0, true, 0).unwrap();
    world.vdevice(viommu, device, 7).unwrap();
    let process = crate::caller::Caller::process(&world.program).clone();
    let pins = || process.pin_count(crate::process::UserAddr(MEMORY)).unwrap();
    assert_eq!(pins(), 1, "two page tables, one pin");
    drop(world.context);
    assert_eq!(pins(), 0);
}

#[test]
fn two_devices_share_the_page_table_that_was_made_for_the_first() {
    let world = World::new();
    let (ioas, other) = (world.ioas(), world.ioas());
    let (one, hwpt, _) = world.device(ioas, 0).unwrap();
    let (two, same, _) = world.device(ioas, 0).unwrap();
    assert_eq!(hwpt, same);
    let moved = world.replace(one, other).unwrap();
    assert_eq!(world.destroy(hwpt), Err(Errno::BUSY), "the second device has it");
    assert_eq!(world.replace(two, other), Ok(moved));
    assert_eq!(world.destroy(hwpt), Err(Errno::NOENT));
    world.destroy(ioas).unwrap();
}

#[test]
fn a_vdevice_whose_device_goes_first_leaves_a_tombstone() {
    let world = World::new();
    let ioas = world.ioas();
    let (stdev, _, device) = world.device(ioas, 0).unwrap();
    let parent = world.hwpt(device, ioas, IOMMU_HWPT_ALLOC_NEST_PARENT, false, 0).unwrap();
    let viommu = world.viommu(device, parent).unwrap();
    let vdevice = world.vdevice(viommu, device, 0x99).unwrap();
    assert_eq!(world.vdevice(viommu, device, 0x98), Err(Errno::EXIST), "one for each device");
    world.destroy(stdev).unwrap();
    assert_eq!(world.destroy(vdevice), Err(Errno::NOENT));
    world.destroy(viommu).unwrap();
    assert!(!world.context.table().is_empty(), "the id is never another object's");
}

#[test]
fn a_nested_page_table_of_a_viommu_wants_a_vdevice() {
    let world = World::new();
    let ioas = world.ioas();
    let (stdev, automatic, device) = world.device(ioas, 0).unwrap();
    let parent = world.hwpt(device, ioas, IOMMU_HWPT_ALLOC_NEST_PARENT, false, 0).unwrap();
    let viommu = world.viommu(device, parent).unwrap();
    let nested = world.hwpt(device, viommu, 0, true, 0).unwrap();
    assert_eq!(world.replace(stdev, nested), Err(Errno::NOENT));
    assert_eq!(world.destroy(automatic), Err(Errno::BUSY), "the failure has left the device where it was");
    let vdevice = world.vdevice(viommu, device, 1).unwrap();
    assert_eq!(world.replace(stdev, nested), Ok(nested));
    world.destroy(vdevice).unwrap();
}

#[test]
fn pasids_and_plain_dma_want_the_same_kind_of_page_table() {
    let world = World::new();
    let ioas = world.ioas();
    let (stdev, _, device) = world.device(ioas, MOCK_FLAGS_DEVICE_PASID).unwrap();
    let plain = world.hwpt(device, ioas, 0, false, 0).unwrap();
    let [one, two] = [0, 1].map(|_| world.hwpt(device, ioas, IOMMU_HWPT_ALLOC_PASID, false, 0).unwrap());
    let pasid = |op, pasid, pt_id| {
        let member = iommu_test_cmd__bindgen_ty_1__bindgen_ty_18 { pasid, pt_id };
        world.test(op, stdev, member).map(drop)
    };
    assert_eq!(pasid(IOMMU_TEST_OP_PASID_ATTACH, 5, one), Err(Errno::INVAL), "plain DMA has another kind");
    world.replace(stdev, one).unwrap();
    assert_eq!(pasid(IOMMU_TEST_OP_PASID_ATTACH, 5, plain), Err(Errno::INVAL));
    assert_eq!(pasid(IOMMU_TEST_OP_PASID_ATTACH, 5, ioas), Err(Errno::INVAL));
    assert_eq!(pasid(IOMMU_TEST_OP_PASID_ATTACH, 1 << 20, one), Err(Errno::INVAL), "past the last PASID");
    assert_eq!(pasid(IOMMU_TEST_OP_PASID_ATTACH, 0, two), Err(Errno::BUSY), "0 is plain DMA");
    pasid(IOMMU_TEST_OP_PASID_ATTACH, 5, two).unwrap();
    assert_eq!(pasid(IOMMU_TEST_OP_PASID_ATTACH, 5, two), Err(Errno::BUSY));
    assert_eq!(pasid(IOMMU_TEST_OP_PASID_REPLACE, 6, two), Err(Errno::INVAL), "it is not attached");
    assert_eq!(world.replace(stdev, plain), Err(Errno::INVAL), "while a PASID is attached");
    assert_eq!(world.destroy(two), Err(Errno::BUSY));
    pasid(IOMMU_TEST_OP_PASID_REPLACE, 5, one).unwrap();
    world.destroy(two).unwrap();
    pasid(IOMMU_TEST_OP_PASID_DETACH, 5, 0).unwrap();
    pasid(IOMMU_TEST_OP_PASID_DETACH, 5, 0).unwrap();
    world.replace(stdev, plain).unwrap();
}

#[test]
fn a_mapping_keeps_its_viommu() {
    use rustix::mm::{MapFlags, ProtFlags};
    let world = World::new();
    let ioas = world.ioas();
    let (_, _, device) = world.device(ioas, 0).unwrap();
    let parent = world.hwpt(device, ioas, IOMMU_HWPT_ALLOC_NEST_PARENT, false, 0).unwrap();
    let at = crate::process::UserAddr(MEMORY);
    let data = iommu_viommu_selftest { in_data: 0xbeef, ..Default::default() };
    world.program.put(at, data.as_bytes()).unwrap();
    let mut args = iommu_viommu_alloc {
        size: size::<iommu_viommu_alloc>(),
        type_: IOMMU_VIOMMU_TYPE_SELFTEST,
        dev_id: device,
        hwpt_id: parent,
        data_len: size::<iommu_viommu_selftest>(),
        data_uptr: at.0,
        ..Default::default()
    };
    world.call(IOMMUFD_CMD_VIOMMU_ALLOC, &mut args).unwrap();
    let data: iommu_viommu_selftest = world.program.take(at).unwrap();
    assert_eq!(data.out_data, 0xbeef);
    let (offset, length) = (data.out_mmap_offset, data.out_mmap_length);
    let map = |offset, length, prot, flags| world.context.mmap(offset, length, prot, flags).map(drop);
    assert_eq!(map(offset + PAGE, length, ProtFlags::READ, MapFlags::SHARED), Err(Errno::NXIO));
    assert_eq!(map(offset, length / 2, ProtFlags::READ, MapFlags::SHARED), Err(Errno::NXIO));
    assert_eq!(map(offset, length, ProtFlags::READ, MapFlags::PRIVATE), Err(Errno::INVAL));
    assert_eq!(map(offset, length, ProtFlags::EXEC, MapFlags::SHARED), Err(Errno::PERM));
    let mapping = world.context.mmap(offset, length, ProtFlags::READ, MapFlags::SHARED).unwrap();
    let mut first = [0; 4];
    rustix::io::pread(mapping.file(), &mut first, mapping.offset()).unwrap();
    assert_eq!(u32::from_ne_bytes(first), 0xbeef);
    assert_eq!(world.destroy(args.out_viommu_id), Err(Errno::BUSY));
    drop(mapping);
    world.destroy(args.out_viommu_id).unwrap();
    assert_eq!(map(offset, length, ProtFlags::READ, MapFlags::SHARED), Err(Errno::NXIO));
}

#[test]
fn an_id_of_a_wrong_kind_is_none() {
    let world = World::new();
    let ioas = world.ioas();
    let (_, hwpt, device) = world.device(ioas, 0).unwrap();
    assert_eq!(world.map(hwpt, 0, PAGE, APERTURE), Err(Errno::NOENT));
    assert_eq!(world.hwpt(ioas, ioas, 0, false, 0), Err(Errno::NOENT));
    assert_eq!(world.hwpt(device, device, 0, false, 0), Err(Errno::INVAL));
    assert_eq!(world.device(device, 0), Err(Errno::INVAL));
    assert_eq!(world.viommu(device, hwpt), Err(Errno::INVAL), "no parent");
    assert_eq!(world.viommu(device, ioas), Err(Errno::NOENT));
}

#[test]
fn an_answer_that_cannot_be_written_leaves_no_object() {
    let world = World::new();
    // The argument is at the very end of memory, so that it can be read as far as must be, but not be longer.
    let args = iommu_ioas_alloc { size: 12, ..Default::default() };
    let end = crate::process::UserAddr(MEMORY + crate::testing::LENGTH - 8);
    world.program.put(end, &args.as_bytes()[..8]).unwrap();
    let result = world.context.ioctl(&world.program, number(IOMMUFD_CMD_IOAS_ALLOC), end);
    assert_eq!(result, Err(Errno::FAULT));
    assert!(world.context.table().is_empty());
}

#[test]
fn sizes_of_structures_follow_the_rules() {
    let world = World::new();
    let at = crate::testing::ARGUMENTS;
    let call = |bytes: &[u8]| {
        world.program.put(at, bytes).unwrap();
        world.context.ioctl(&world.program, number(IOMMUFD_CMD_DESTROY), at)
    };
    let with = |size: u32, tail: u8| {
        let mut bytes = [0; 64];
        bytes[..4].copy_from_slice(&size.to_ne_bytes());
        bytes[8] = tail;
        call(&bytes)
    };
    assert_eq!(with(7, 0), Err(Errno::INVAL));
    assert_eq!(with(8, 1), Err(Errno::NOENT), "what is past the size is not looked at");
    assert_eq!(with(9, 0), Err(Errno::NOENT));
    assert_eq!(with(9, 1), Err(Errno::TOOBIG));
    assert_eq!(with(u32::MAX, 0), Err(Errno::FAULT), "memory ends before");
    let bad = crate::process::UserAddr(0);
    assert_eq!(world.context.ioctl(&world.program, number(IOMMUFD_CMD_DESTROY), bad), Err(Errno::FAULT));
    assert_eq!(world.context.ioctl(&world.program, number(0x7f), at), Err(Errno::NOTTY));
    assert_eq!(world.context.ioctl(&world.program, number(0x96), at), Err(Errno::NOTTY));
    // The mock's ioctl is the mock's only.
    let plain = crate::Context::new();
    assert_eq!(plain.ioctl(&world.program, IOMMU_TEST_CMD, at), Err(Errno::NOTTY));
}

#[test]
fn how_pins_are_counted_is_decided_before_there_are_objects() {
    let mut world = World::new();
    let set = |world: &World, val64| {
        let mut args = iommu_option {
            size: size::<iommu_option>(),
            option_id: IOMMU_OPTION_RLIMIT_MODE,
            op: IOMMU_OPTION_OP_SET as u16,
            val64,
            ..Default::default()
        };
        world.call(IOMMUFD_CMD_OPTION, &mut args)
    };
    assert_eq!(set(&world, 2), Err(Errno::INVAL));
    set(&world, 1).unwrap();
    world.program.capable = false;
    assert_eq!(set(&world, 0), Err(Errno::PERM));
    world.program.capable = true;
    world.ioas();
    assert_eq!(set(&world, 0), Err(Errno::BUSY));
}

#[test]
fn only_files_change_their_process() {
    let world = World::new();
    let ioas = world.ioas();
    let change = |world: &World| {
        let mut args = iommu_ioas_change_process { size: 8, ..Default::default() };
        world.call(IOMMUFD_CMD_IOAS_CHANGE_PROCESS, &mut args)
    };
    world.map(ioas, 0, PAGE, APERTURE).unwrap();
    assert_eq!(change(&world), Err(Errno::INVAL));
    world.unmap(ioas, APERTURE, PAGE).unwrap();
    let mut args = iommu_ioas_map_file {
        size: size::<iommu_ioas_map_file>(),
        flags: IOMMU_IOAS_MAP_READABLE,
        ioas_id: ioas,
        fd: MEMORY_FD,
        length: PAGE,
        ..Default::default()
    };
    world.call(IOMMUFD_CMD_IOAS_MAP_FILE, &mut args).unwrap();
    change(&world).unwrap();
    let other = World { context: world.context.clone(), program: Program::new().unwrap() };
    change(&other).unwrap();
    args.fd = 99;
    assert_eq!(world.call(IOMMUFD_CMD_IOAS_MAP_FILE, &mut args), Err(Errno::BADF));
}

#[test]
fn a_revoked_buffer_is_gone_from_page_tables() {
    let world = World::new();
    let ioas = world.ioas();
    let (_, hwpt, _) = world.device(ioas, 0).unwrap();
    let mut get = iommu_test_cmd::new_zeroed();
    (get.size, get.op) = (size::<iommu_test_cmd>(), IOMMU_TEST_OP_DMABUF_GET);
    let member = iommu_test_cmd__bindgen_ty_1__bindgen_ty_22 { length: 4 * PAGE as u32, open_flags: 0 };
    assert!(get.__bindgen_anon_1.set_member(&member));
    let fd = world.program.ioctl(&world.context, IOMMU_TEST_CMD, &mut get).unwrap();
    let map = |iova| {
        let mut args = iommu_ioas_map_file {
            size: size::<iommu_ioas_map_file>(),
            flags: IOMMU_IOAS_MAP_READABLE | IOMMU_IOAS_MAP_FIXED_IOVA,
            ioas_id: ioas,
            fd,
            length: 4 * PAGE,
            iova,
            ..Default::default()
        };
        world.call(IOMMUFD_CMD_IOAS_MAP_FILE, &mut args)
    };
    let revoke = |revoked| {
        let member = iommu_test_cmd__bindgen_ty_1__bindgen_ty_23 { dmabuf_fd: fd, revoked };
        world.test(IOMMU_TEST_OP_DMABUF_REVOKE, 0, member).map(drop)
    };
    let lookup = |iova| world.context.hwpt(hwpt).unwrap().domain.lookup(crate::iova::Iova(iova));
    map(APERTURE).unwrap();
    assert!(lookup(APERTURE).is_some());
    revoke(1).unwrap();
    assert!(lookup(APERTURE).is_none());
    assert_eq!(map(2 * APERTURE), Err(Errno::NODEV));
    revoke(0).unwrap();
    map(2 * APERTURE).unwrap();
    assert!(lookup(APERTURE).is_none() && lookup(2 * APERTURE).is_some());
    assert_eq!(world.context.ioas_unmap(ioas, IovaRange::ALL), Ok(8 * PAGE));
}

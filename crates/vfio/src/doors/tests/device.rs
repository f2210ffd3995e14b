//! The device's own door, and what an open device answers.

use std::os::fd::AsRawFd;

use uapi::vfio::{
    VFIO_DEVICE_ATTACH_IOMMUFD_PT, VFIO_DEVICE_BIND_IOMMUFD, VFIO_DEVICE_DETACH_IOMMUFD_PT,
    VFIO_DEVICE_FEATURE, VFIO_DEVICE_GET_INFO, VFIO_DEVICE_GET_IRQ_INFO, VFIO_DEVICE_GET_PCI_HOT_RESET_INFO,
    VFIO_DEVICE_GET_REGION_INFO, VFIO_DEVICE_IOEVENTFD, VFIO_DEVICE_PCI_HOT_RESET,
    VFIO_DEVICE_QUERY_GFX_PLANE, VFIO_DEVICE_RESET, VFIO_DEVICE_SET_IRQS, VFIO_GET_API_VERSION,
    VFIO_GROUP_GET_STATUS, VFIO_MIG_GET_PRECOPY_INFO, vfio_device_attach_iommufd_pt,
    vfio_device_bind_iommufd, vfio_device_detach_iommufd_pt, vfio_device_info, vfio_device_ioeventfd,
    vfio_irq_info, vfio_region_info,
};

use super::*;
use crate::{
    Errno,
    doors::{Mapping, MigrationFile, Token, testing::registration},
    eventfd::tests::{count, pair},
};

fn bind(program: &Program, fd: i32, iommufd: i32) -> crate::Result<u32> {
    let mut args = vfio_device_bind_iommufd { argsz: 24, iommufd, ..Default::default() };
    program.ioctl(fd, VFIO_DEVICE_BIND_IOMMUFD, &mut args).map(|_| args.out_devid)
}

fn attach(program: &Program, fd: i32, pt_id: u32) -> crate::Result<u32> {
    let mut args = vfio_device_attach_iommufd_pt { argsz: 16, pt_id, ..Default::default() };
    program.ioctl(fd, VFIO_DEVICE_ATTACH_IOMMUFD_PT, &mut args).map(|_| args.pt_id)
}

fn detach(program: &Program, fd: i32) -> crate::Result<i32> {
    let mut args = vfio_device_detach_iommufd_pt { argsz: 12, ..Default::default() };
    program.ioctl(fd, VFIO_DEVICE_DETACH_IOMMUFD_PT, &mut args)
}

fn ioas(program: &Program, iommufd: i32) -> (std::sync::Arc<iommufd::Context>, u32) {
    let Ok(crate::doors::Opened::Iommufd(context)) = crate::doors::Caller::opened(program, iommufd) else {
        panic!("no iommufd");
    };
    let id = context.ioas_alloc().unwrap();
    (context, id)
}

/// A program that has the test device open and bound.
fn open() -> (std::sync::Arc<System>, Program, i32, i32) {
    let (system, program) = (system(), Program::default());
    let fd = program.device(&system, 0).unwrap();
    let iommufd = program.iommufd();
    bind(&program, fd, iommufd).unwrap();
    (system, program, fd, iommufd)
}

#[test]
fn nothing_works_before_it_is_bound() {
    let (system, program) = (system(), Program::default());
    let fd = program.device(&system, 0).unwrap();
    let mut info = vfio_device_info { argsz: 24, ..Default::default() };
    assert_eq!(program.ioctl(fd, VFIO_DEVICE_GET_INFO, &mut info), Err(Errno::INVAL));
    assert_eq!(program.call(fd, VFIO_DEVICE_RESET, 0), Err(Errno::INVAL));
    assert_eq!(program.call(fd, 0x3bc8, 0), Err(Errno::INVAL), "nor is anything unknown");
    assert_eq!(attach(&program, fd, 1), Err(Errno::INVAL));
    assert_eq!(detach(&program, fd), Err(Errno::INVAL));
    let file = program.file(fd);
    assert_eq!(file.read_at(CONFIG, &mut [0; 4]), Err(Errno::INVAL));
    assert_eq!(file.write_at(CONFIG, &[0; 4]), Err(Errno::INVAL));
    assert!(matches!(file.mmap(2 << REGION_SHIFT, 4096, true), Err(Errno::INVAL)));
    assert_eq!(program.device(&system, 7), Err(Errno::NODEV));
}

#[test]
fn binding() {
    let (system, program) = (system(), Program::default());
    let (fd, other) = (program.device(&system, 0).unwrap(), program.device(&system, 0).unwrap());
    let iommufd = program.iommufd();
    let mut args = vfio_device_bind_iommufd { argsz: 15, iommufd, ..Default::default() };
    let with = |program: &Program, args: &mut vfio_device_bind_iommufd| {
        program.ioctl(other, VFIO_DEVICE_BIND_IOMMUFD, args)
    };
    assert_eq!(with(&program, &mut args), Err(Errno::INVAL));
    (args.argsz, args.flags) = (24, 2);
    assert_eq!(with(&program, &mut args), Err(Errno::INVAL));
    (args.flags, args.iommufd) = (0, -1);
    assert_eq!(with(&program, &mut args), Err(Errno::INVAL));
    args.iommufd = 0;
    assert_eq!(with(&program, &mut args), Err(Errno::BADFD));
    args.iommufd = i32::MAX;
    assert_eq!(with(&program, &mut args), Err(Errno::BADF));
    (args.flags, args.iommufd, args.token_uuid_ptr) = (1, iommufd, 8);
    assert_eq!(with(&program, &mut args), Err(Errno::FAULT));
    let uuid = [1u8; 16];
    args.token_uuid_ptr = uuid.as_ptr().addr() as u64;
    assert_eq!(with(&program, &mut args), Err(Errno::INVAL), "no SR-IOV");
    assert_eq!(program.call(fd, VFIO_DEVICE_BIND_IOMMUFD, 8), Err(Errno::FAULT));

    assert!(bind(&program, fd, iommufd).is_ok());
    assert_eq!(bind(&program, fd, iommufd), Err(Errno::INVAL));
    assert_eq!(bind(&program, other, iommufd), Err(Errno::INVAL), "one at a time");
    program.close(fd);
    assert!(bind(&program, other, iommufd).is_ok());
}

#[test]
fn attaching() {
    let (_system, program, fd, iommufd) = open();
    let (context, first) = ioas(&program, iommufd);
    let (_, second) = ioas(&program, iommufd);
    let mut args = vfio_device_attach_iommufd_pt { argsz: 11, pt_id: first, ..Default::default() };
    let mut with = |argsz, flags, pasid| {
        (args.argsz, args.flags, args.pasid, args.pt_id) = (argsz, flags, pasid, first);
        program.ioctl(fd, VFIO_DEVICE_ATTACH_IOMMUFD_PT, &mut args)
    };
    assert_eq!(with(11, 0, 0), Err(Errno::INVAL));
    assert_eq!(with(12, 1, 0), Err(Errno::INVAL), "no room for the PASID");
    assert_eq!(with(16, 2, 0), Err(Errno::INVAL));
    assert_eq!(with(12, 0, 0), Ok(0));
    assert!(attach(&program, fd, first).is_ok());
    assert!(attach(&program, fd, second).is_ok(), "something else");
    assert_eq!(attach(&program, fd, u32::MAX), Err(Errno::NOENT));
    assert_eq!(context.destroy(second), Err(Errno::BUSY));
    let mut args = vfio_device_detach_iommufd_pt { argsz: 7, ..Default::default() };
    let mut with = |argsz, flags| {
        (args.argsz, args.flags) = (argsz, flags);
        program.ioctl(fd, VFIO_DEVICE_DETACH_IOMMUFD_PT, &mut args)
    };
    assert_eq!(with(7, 0), Err(Errno::INVAL));
    assert_eq!(with(8, 2), Err(Errno::INVAL));
    assert_eq!(with(8, 1), Err(Errno::INVAL));
    assert_eq!(with(12, 1), Ok(0), "nothing is attached for the PASID");
    assert_eq!(with(8, 0), Ok(0));
    assert_eq!(with(8, 0), Ok(0));
    assert_eq!(context.destroy(second), Ok(()));
}

#[test]
fn memory_is_reached_through_what_it_is_attached_to() {
    let (_system, program, fd, iommufd) = open();
    let (context, id) = ioas(&program, iommufd);
    let mut pages = Pages::new(4);
    pages.bytes()[..5].copy_from_slice(b"bytes");
    assert_eq!(copy(&program, fd, 0x10_0000, 0x10_1000, 5), reg::STATUS_FAULT, "attached to nothing");
    attach(&program, fd, id).unwrap();
    let from = iommufd::process::UserAddr(pages.address());
    let process = iommufd::caller::Caller::process(&program);
    let prot = iommufd::domain::Prot::READ | iommufd::domain::Prot::WRITE;
    let at = Some(iommufd::iova::Iova(0x10_0000));
    context.ioas_map(id, process, from, 4 * PAGE as u64, at, prot).unwrap();
    assert_eq!(copy(&program, fd, 0x10_0000, 0x10_1000, 5), reg::STATUS_DONE);
    assert_eq!(pages.bytes()[PAGE..PAGE + 5], *b"bytes");
    assert_eq!(copy(&program, fd, 0x10_0000, 0x10_3ffe, 5), reg::STATUS_FAULT, "across the end");
    detach(&program, fd).unwrap();
    assert_eq!(copy(&program, fd, 0x10_0000, 0x10_1000, 5), reg::STATUS_FAULT);
    program.close(fd);
}

#[test]
fn a_device_tells_of_itself() {
    let (_system, program, fd, _) = open();
    let mut info = [0u32; 16];
    info[0] = 15;
    assert_eq!(program.ioctl(fd, VFIO_DEVICE_GET_INFO, &mut info), Err(Errno::INVAL));
    (info[0], info[4]) = (16, 0x55);
    assert_eq!(program.ioctl(fd, VFIO_DEVICE_GET_INFO, &mut info), Ok(0));
    assert_eq!(info[..5], [40, 0x83, 9, 5, 0x55], "what it has no room for stays");
    info[0] = 24;
    assert_eq!(program.ioctl(fd, VFIO_DEVICE_GET_INFO, &mut info), Ok(0));
    assert_eq!((info[0], info[4]), (40, 0), "how much the capability needs");
    info[0] = 64;
    assert_eq!(program.ioctl(fd, VFIO_DEVICE_GET_INFO, &mut info), Ok(0));
    assert_eq!((info[0], info[4]), (64, 24));
    assert_eq!(info[6..10], [0x0001_0005, 0, 7, 0], "PCI_ATOMIC_COMP");
    assert_eq!(program.call(fd, VFIO_DEVICE_GET_INFO, 8), Err(Errno::FAULT));

    let mut region = vfio_region_info { argsz: 31, ..Default::default() };
    assert_eq!(program.ioctl(fd, VFIO_DEVICE_GET_REGION_INFO, &mut region), Err(Errno::INVAL));
    let mut of = |index| {
        region = vfio_region_info { argsz: 32, index, ..Default::default() };
        program.ioctl(fd, VFIO_DEVICE_GET_REGION_INFO, &mut region).map(|_| region)
    };
    for index in [8, 9, u32::MAX] {
        assert_eq!(of(index).map(|_| ()), Err(Errno::INVAL));
    }
    let told = |region: vfio_region_info| (region.flags, region.size, region.offset, region.argsz);
    assert_eq!(told(of(0).unwrap()), (3, 0x1000, 0, 32));
    assert_eq!(told(of(1).unwrap()), (3, 32, 1 << 40, 32));
    assert_eq!(told(of(2).unwrap()), (7, 0x1_0000, 2 << 40, 32));
    assert_eq!(told(of(3).unwrap()), (0, 0, 3 << 40, 32));
    assert_eq!(told(of(6).unwrap()), (1, 2048, 6 << 40, 32));
    assert_eq!(told(of(7).unwrap()), (3, 4096, 7 << 40, 32));
    assert_eq!(told(of(4).unwrap()), (15, 0x1_0000, 4 << 40, 32 + 32 + 8));

    let mut sparse = [0u64; 16];
    (sparse[0], sparse[1]) = (128, 4);
    assert_eq!(program.ioctl(fd, VFIO_DEVICE_GET_REGION_INFO, &mut sparse), Ok(0));
    assert_eq!(sparse[1], 32 << 32 | 4, "where the capabilities are");
    assert_eq!(sparse[4..8], [64 << 32 | 0x0001_0001, 1, 0x8000, 0x8000], "SPARSE_MMAP");
    assert_eq!(sparse[8], 0x0001_0003, "MSIX_MAPPABLE");

    let mut irq = vfio_irq_info { argsz: 15, ..Default::default() };
    assert_eq!(program.ioctl(fd, VFIO_DEVICE_GET_IRQ_INFO, &mut irq), Err(Errno::INVAL));
    for (index, told) in [(0, (7, 1)), (1, (9, 4)), (2, (1, 16)), (3, (9, 1)), (4, (9, 1))] {
        irq = vfio_irq_info { argsz: 16, index, ..Default::default() };
        assert_eq!(program.ioctl(fd, VFIO_DEVICE_GET_IRQ_INFO, &mut irq), Ok(0));
        assert_eq!((irq.flags, irq.count), told);
    }
    irq.index = 5;
    assert_eq!(program.ioctl(fd, VFIO_DEVICE_GET_IRQ_INFO, &mut irq), Err(Errno::INVAL));

    for foreign in [
        VFIO_GET_API_VERSION,
        VFIO_GROUP_GET_STATUS,
        VFIO_MIG_GET_PRECOPY_INFO,
        0x3bc8,
        VFIO_DEVICE_QUERY_GFX_PLANE,
    ] {
        assert_eq!(program.call(fd, foreign, 0), Err(Errno::NOTTY));
    }
}

#[test]
fn the_file_of_a_device() {
    let (_system, program, fd, _) = open();
    let file = program.file(fd);
    let mut bytes = [0; 4];
    assert_eq!(file.read_at(9 << REGION_SHIFT, &mut []), Ok(0));
    assert_eq!(file.read_at(9 << REGION_SHIFT, &mut bytes), Err(Errno::INVAL));
    assert_eq!(file.read_at(u64::MAX >> 1, &mut bytes), Err(Errno::INVAL));
    assert_eq!(file.read_at(CONFIG + 0x1000, &mut bytes), Err(Errno::FAULT));
    assert_eq!(file.read_at(0, &mut bytes), Ok(4));
    assert_eq!(u32::from_le_bytes(bytes), reg::ID_VALUE);
    // Mapping: memory is a file, registers are not to be had here.
    let memory = 2u64 << REGION_SHIFT;
    assert!(matches!(file.mmap(memory, 0x1_0000, true), Ok(Mapping::Memory { offset: 0, .. })));
    assert!(matches!(file.mmap(memory + 0x1000, 100, true), Ok(Mapping::Memory { offset: 0x1000, .. })));
    for (offset, length) in [
        (memory, 0x1_1000),
        (memory + 0xf000, 0x2000),
        (memory, u64::MAX),
        (memory, 0),
        (0, 4096),
        (CONFIG, 4096),
        (3 << REGION_SHIFT, 4096),
        (4 << REGION_SHIFT, 4096),
        ((4 << REGION_SHIFT) + 0x7000, 0x2000),
        (9 << REGION_SHIFT, 4096),
    ] {
        assert!(matches!(file.mmap(offset, length, true), Err(Errno::INVAL)), "{offset:#x} {length:#x}");
    }
    assert!(matches!(file.mmap(memory, 4096, false), Err(Errno::INVAL)), "private");
    assert!(matches!(file.mmap((4 << REGION_SHIFT) + 0x8000, 0x8000, true), Ok(Mapping::Memory { .. })));

    // Whoever catches accesses can have registers mapped, too.
    let system = System::new(true);
    let number = system.add(registration("a", 1, std::sync::Arc::new(test::function().unwrap()))).unwrap();
    let fd = program.device(&system, number).unwrap();
    bind(&program, fd, program.iommufd()).unwrap();
    assert!(matches!(program.file(fd).mmap(0, 4096, true), Ok(Mapping::Registers)));
    assert!(matches!(program.file(fd).mmap(1 << REGION_SHIFT, 4096, true), Err(Errno::INVAL)));
    let mut region = vfio_region_info { argsz: 32, ..Default::default() };
    program.ioctl(fd, VFIO_DEVICE_GET_REGION_INFO, &mut region).unwrap();
    assert_eq!(region.flags, 7);
}

#[test]
fn interrupts_by_their_bytes() {
    let (_system, program, fd, _) = open();
    let (ours, theirs) = pair();
    let mut args = [0u32; 24];
    let mut set = |argsz, flags, index, start, count: u32, data: i32| {
        args[..6].copy_from_slice(&[argsz, flags, index, start, count, data as u32]);
        program.ioctl(fd, VFIO_DEVICE_SET_IRQS, &mut args)
    };
    let (none, boolean, eventfd, mask, trigger) = (1, 2, 4, 8, 32);
    assert_eq!(set(19, none | trigger, 2, 0, 1, 0), Err(Errno::INVAL));
    assert_eq!(set(20, 0, 2, 0, 1, 0), Err(Errno::INVAL));
    assert_eq!(set(20, none, 2, 0, 1, 0), Err(Errno::NOTTY));
    assert_eq!(set(20, none | trigger | mask, 2, 0, 1, 0), Err(Errno::NOTTY));
    assert_eq!(set(24, none | boolean | trigger, 2, 0, 1, 1), Err(Errno::INVAL));
    assert_eq!(set(20, none | trigger | 64, 2, 0, 1, 0), Err(Errno::INVAL));
    assert_eq!(set(20, none | trigger, 9, 0, 0, 0), Err(Errno::INVAL));
    assert_eq!(set(20, none | trigger, 2, 16, 0, 0), Err(Errno::INVAL));
    assert_eq!(set(20, none | trigger, 2, 1, u32::MAX, 0), Err(Errno::INVAL));
    assert_eq!(set(23, eventfd | trigger, 2, 0, 1, 0), Err(Errno::INVAL));
    assert_eq!(set(24, eventfd | trigger, 2, 0, u32::MAX, 0), Err(Errno::INVAL));
    assert_eq!(set(24, eventfd | trigger, 2, 0, 1, i32::MAX), Err(Errno::BADF));
    assert_eq!(set(24, eventfd | trigger, 2, 0, 1, 0), Err(Errno::INVAL), "no eventfd");
    assert_eq!(set(24, eventfd | trigger, 3, 0, 1, -2), Err(Errno::INVAL));
    assert_eq!(set(24, eventfd | trigger, 2, 0, 1, -2), Ok(0));
    assert_eq!(set(24, eventfd | trigger, 2, 0, 1, theirs.as_raw_fd()), Ok(0));
    assert_eq!(set(20, none | trigger, 2, 0, 1, 0), Ok(0));
    assert_eq!(set(21, boolean | trigger, 2, 0, 1, 1), Ok(0));
    assert_eq!(count(&ours), 2);
    program.file(fd).write_at(reg::RAISE, &0u32.to_le_bytes()).unwrap();
    assert_eq!(count(&ours), 1);
    assert_eq!(set(20, none | trigger, 2, 0, 0, 0), Ok(0));
    assert_eq!(set(20, none | trigger, 2, 0, 0, 0), Err(Errno::INVAL));
    assert_eq!(program.call(fd, VFIO_DEVICE_SET_IRQS, 8), Err(Errno::FAULT));

    let mut io = vfio_device_ioeventfd {
        argsz: 36,
        flags: 4,
        offset: 4,
        fd: theirs.as_raw_fd(),
        ..Default::default()
    };
    let mut with = |flags, offset, fd_| {
        (io.flags, io.offset, io.fd) = (flags, offset, fd_);
        program.ioctl(fd, VFIO_DEVICE_IOEVENTFD, &mut io)
    };
    let good = theirs.as_raw_fd();
    assert_eq!(with(4, 4, good), Ok(0));
    assert_eq!(with(4, 4, good), Err(Errno::EXIST));
    assert_eq!(with(4, 4, -1), Ok(0));
    assert_eq!(with(4, 4, -1), Err(Errno::NODEV));
    assert_eq!(with(4, 5, good), Ok(0), "the kernel does not look whether it is aligned");
    for (flags, offset, fd) in [
        (0, 4, good),
        (3, 4, good),
        (16, 4, good),
        (4, 4, -2),
        (4, 4, 0),
        (4, 0x1000, good),
        (4, CONFIG, good),
        (4, 3 << 40, good),
        (4, u64::MAX, good),
        (4, 4 << 40, good),
    ] {
        assert_eq!(with(flags, offset, fd), Err(Errno::INVAL), "{flags} {offset:#x} {fd}");
    }
}

fn feature<const N: usize>(
    program: &Program,
    fd: i32,
    flags: u32,
    data: &mut [u64; N],
) -> crate::Result<i32> {
    let mut args = vec![0u64; 1 + N];
    args[0] = (8 + 8 * N as u64) | u64::from(flags) << 32;
    args[1..].copy_from_slice(data);
    let result = program.ioctl(fd, VFIO_DEVICE_FEATURE, args.as_mut_slice());
    data.copy_from_slice(&args[1..]);
    result
}

const GET: u32 = 1 << 16;
const SET: u32 = 2 << 16;
const PROBE: u32 = 4 << 16;

#[test]
fn features() {
    let (_system, program, fd, _) = open();
    let ask = |flags| feature(&program, fd, flags, &mut []);
    for (index, get, set) in [
        (1, true, false),
        (2, true, true),
        (3, false, true),
        (4, false, true),
        (5, false, true),
        (6, false, true),
        (7, false, true),
        (8, true, false),
        (9, true, false),
        (12, false, true),
    ] {
        let answer = |yes| if yes { Ok(0) } else { Err(Errno::INVAL) };
        assert_eq!(ask(index | PROBE), Ok(0), "{index}");
        assert_eq!(ask(index | PROBE | GET), answer(get), "{index}");
        assert_eq!(ask(index | PROBE | SET), answer(set), "{index}");
        assert_eq!(ask(index), Err(Errno::INVAL), "no operation");
        assert_eq!(ask(index | GET | SET), Err(Errno::INVAL));
    }
    for absent in [0, 10, 11, 13, 14, 0xffff] {
        for flags in [0, PROBE, GET, SET] {
            assert_eq!(ask(absent | flags), Err(Errno::NOTTY), "{absent}");
        }
    }
    assert_eq!(ask(3 | 1 << 20 | SET), Err(Errno::INVAL));
    assert_eq!(ask(3 | SET), Ok(0));
    assert_eq!(ask(3 | SET), Err(Errno::INVAL), "asleep already");
    assert_eq!(ask(5 | SET), Ok(0));
    assert_eq!(ask(5 | SET), Ok(0));
    assert_eq!(ask(4 | SET), Err(Errno::INVAL), "no eventfd");
    assert_eq!(feature(&program, fd, 4 | SET, &mut [u64::from(u32::MAX)]), Err(Errno::INVAL));
    assert_eq!(program.call(fd, VFIO_DEVICE_FEATURE, 8), Err(Errno::FAULT));
    assert_eq!(program.ioctl(fd, VFIO_DEVICE_FEATURE, &mut [7u32, 0]), Err(Errno::INVAL));
}

#[test]
fn what_a_device_writes_is_logged() {
    let (_system, program, fd, iommufd) = open();
    let (context, id) = ioas(&program, iommufd);
    attach(&program, fd, id).unwrap();
    let pages = Pages::new(8);
    let process = iommufd::caller::Caller::process(&program);
    let prot = iommufd::domain::Prot::READ | iommufd::domain::Prot::WRITE;
    let from = iommufd::process::UserAddr(pages.address());
    context.ioas_map(id, process, from, 8 * PAGE as u64, Some(iommufd::iova::Iova(0)), prot).unwrap();
    let ranges = [0u64, 8 * PAGE as u64];
    let at = ranges.as_ptr().addr() as u64;
    let start = |page_size, count, at| feature(&program, fd, 6 | SET, &mut [page_size, count, at]);
    assert_eq!(start(4096, 0, at), Err(Errno::INVAL));
    assert_eq!(start(4097, 1, at), Err(Errno::INVAL));
    assert_eq!(start(4096, 100_000, at), Err(Errno::TOOBIG));
    assert_eq!(start(4096, 1, 8), Err(Errno::FAULT));
    assert_eq!(start(1 << 20, 1, at), Err(Errno::INVAL), "not made of whole pages");
    assert_eq!(start(4096, 1, at), Ok(0));
    assert_eq!(start(4096, 1, at), Err(Errno::INVAL), "twice");
    assert_eq!(copy(&program, fd, 0, 3 * PAGE as u64 - 1, 2), reg::STATUS_DONE);
    let mut bitmap = [1u64];
    let mut report = |iova: u64, length: u64, page_size: u64| {
        let at = bitmap.as_mut_ptr().addr() as u64;
        let result = feature(&program, fd, 8 | GET, &mut [iova, length, page_size, at]);
        // Read it as memory that somebody else has written.
        result.map(|_| std::hint::black_box(&bitmap)[0])
    };
    assert_eq!(report(0, 8 * PAGE as u64, 4095), Err(Errno::INVAL));
    assert_eq!(report(u64::MAX - 4095, 8192, 4096), Err(Errno::OVERFLOW));
    assert_eq!(report(0, 8 * PAGE as u64, 4096), Ok(0b1101), "bits are added");
    assert_eq!(feature(&program, fd, 7 | SET, &mut []), Ok(0));
    assert_eq!(report(0, 8 * PAGE as u64, 4096), Err(Errno::INVAL));
    program.close(fd);
}

#[test]
fn a_device_is_moved_by_its_features() {
    let (_system, program, from, _) = open();
    let (_other_system, other, to, _) = open();
    let state = |program: &Program, fd, state: u64| {
        let mut data = [state];
        feature(program, fd, 2 | SET, &mut data).map(|_| (data[0] >> 32) as i32)
    };
    let mut flags = [0];
    assert_eq!(feature(&program, from, 1 | GET, &mut flags), Ok(0));
    assert_eq!(flags, [5], "STOP_COPY and PRE_COPY");
    program.file(from).write_at(reg::SCRATCH, &0x1234_5678u32.to_le_bytes()).unwrap();
    program.file(from).write_at((2 << REGION_SHIFT) + 7, b"memory").unwrap();
    let source = state(&program, from, 6).unwrap();
    assert!(source >= 0);
    let given = program.given(source).unwrap();
    let file = std::sync::Arc::clone(&given).as_any().downcast::<MigrationFile>().unwrap();
    let mut precopy = [24u64, u64::MAX, u64::MAX];
    let at = iommufd::process::UserAddr(precopy.as_mut_ptr().addr() as u64);
    assert_eq!(file.ioctl(&program, VFIO_MIG_GET_PRECOPY_INFO, at), Ok(0));
    assert_eq!(std::hint::black_box(&precopy)[1..], [0x1_0008, 0]);
    assert_eq!(file.ioctl(&program, VFIO_DEVICE_RESET, at), Err(Errno::NOTTY));
    assert_eq!(state(&program, from, 3), Ok(-1), "the same stream goes on");
    let mut now = [0];
    assert_eq!(feature(&program, from, 2 | GET, &mut now), Ok(0));
    assert_eq!(now, [u64::from(u32::MAX) << 32 | 3]);
    assert_eq!(state(&program, from, 5), Err(Errno::INVAL), "no peer to peer");
    assert_eq!(state(&program, from, 99), Err(Errno::INVAL));

    let target = other.given(state(&other, to, 4).unwrap()).unwrap();
    let mut buffer = [0; 1000];
    loop {
        match given.read(&mut buffer).unwrap() {
            0 => break,
            length => assert_eq!(target.write(&buffer[..length]), Ok(length)),
        }
    }
    assert_eq!(state(&other, to, 2), Ok(-1));
    let (mut scratch, mut memory) = ([0; 4], [0; 6]);
    other.file(to).read_at(reg::SCRATCH, &mut scratch).unwrap();
    other.file(to).read_at((2 << REGION_SHIFT) + 7, &mut memory).unwrap();
    assert_eq!((u32::from_le_bytes(scratch), &memory), (0x1234_5678, b"memory"));
}

#[test]
fn tokens_of_virtual_functions() {
    let system = System::new(false);
    let token = Token::physical();
    let mut pf = registration("pf", 1, std::sync::Arc::new(ioat::physical().unwrap()));
    pf.token = token.clone();
    let mut vf = registration("vf", 2, ioat::virtual_function().unwrap());
    vf.token = token.of_virtual();
    let (pf, vf) = (system.add(pf).unwrap(), system.add(vf).unwrap());
    let program = Program::default();
    let iommufd = program.iommufd();
    let (one, two) = ([1u8; 16], [2u8; 16]);
    let open = |number, token: Option<&[u8; 16]>| {
        let fd = program.device(&system, number).unwrap();
        let token_uuid_ptr = token.map_or(0, |token| token.as_ptr().addr() as u64);
        let flags = u32::from(token.is_some());
        let mut args =
            vfio_device_bind_iommufd { argsz: 24, flags, iommufd, token_uuid_ptr, ..Default::default() };
        let result = program.ioctl(fd, VFIO_DEVICE_BIND_IOMMUFD, &mut args).map(|_| fd);
        result.inspect_err(|_| program.close(fd))
    };
    let physical = open(pf, Some(&one)).unwrap();
    assert_eq!(open(vf, None), Err(Errno::ACCESS));
    assert_eq!(open(vf, Some(&two)), Err(Errno::ACCESS));
    let data = [u64::from_ne_bytes([2; 8]); 2];
    assert_eq!(feature(&program, physical, SET, &mut data.clone()), Ok(0));
    assert_eq!(open(vf, Some(&one)), Err(Errno::ACCESS), "overridden");
    program.close(physical);
    let virtual_function = open(vf, Some(&two)).unwrap();
    assert_eq!(feature(&program, virtual_function, SET, &mut data.clone()), Err(Errno::NOTTY));
    assert_eq!(open(pf, None), Err(Errno::ACCESS));
    program.close(virtual_function);
    assert!(open(pf, None).is_ok());
}

#[test]
fn a_reset_of_the_bus_concerns_all_on_it() {
    let system = System::new(false);
    let program = Program::default();
    let mut numbers = Vec::new();
    for (name, group) in [("a", 1), ("b", 1), ("c", 3)] {
        let mut device = registration(name, group, std::sync::Arc::new(test::function().unwrap()));
        device.reset_set = Some(7);
        numbers.push(system.add(device).unwrap());
    }
    let alone = system.add(registration("d", 4, std::sync::Arc::new(test::function().unwrap()))).unwrap();
    let (iommufd, other) = (program.iommufd(), program.iommufd());
    let open = |number, iommufd| {
        let fd = program.device(&system, number).unwrap();
        (fd, bind(&program, fd, iommufd).unwrap())
    };
    let (fd, id) = open(numbers[0], iommufd);
    let (third, third_id) = open(numbers[2], iommufd);
    let (alone, _) = open(alone, iommufd);
    let mut args = [0u32; 16];
    let mut info = |fd, argsz| {
        args[0] = argsz;
        program.ioctl(fd, VFIO_DEVICE_GET_PCI_HOT_RESET_INFO, &mut args).map(|_| args)
    };
    assert_eq!(info(alone, 64).map(|_| ()), Err(Errno::NODEV));
    assert_eq!(info(fd, 11).map(|_| ()), Err(Errno::INVAL));
    assert_eq!(info(fd, 12).map(|_| ()), Err(Errno::NOSPC));
    let told = info(fd, 64).unwrap();
    assert_eq!((told[1], told[2]), (3, 3), "all are owned");
    assert_eq!([told[3], told[5], told[7]], [id, 0, third_id]);
    let reset = |fd, argsz, flags, count| {
        program.ioctl(fd, VFIO_DEVICE_PCI_HOT_RESET, &mut [argsz, flags, count, 0u32])
    };
    assert_eq!(reset(fd, 11, 0, 0), Err(Errno::INVAL));
    assert_eq!(reset(fd, 12, 1, 0), Err(Errno::INVAL));
    assert_eq!(reset(fd, 16, 0, 1), Err(Errno::INVAL), "groups are for who came by one");
    assert_eq!(reset(alone, 12, 0, 0), Err(Errno::NODEV));
    program.file(third).write_at(reg::SCRATCH, &[1; 4]).unwrap();
    assert_eq!(reset(fd, 12, 0, 0), Ok(0));
    let mut scratch = [1; 4];
    program.file(third).read_at(reg::SCRATCH, &mut scratch).unwrap();
    assert_eq!(scratch, [0; 4]);
    program.close(third);
    let (_third, _) = open(numbers[2], other);
    let told = info(fd, 64).unwrap();
    assert_eq!((told[1], told[7]), (1, u32::MAX), "somebody else's");
    assert_eq!(reset(fd, 12, 0, 0), Err(Errno::INVAL));
}

#[test]
fn two_threads_bind_one_file() {
    for _ in 0..50 {
        let (system, program) = (system(), Program::default());
        let fd = program.device(&system, 0).unwrap();
        let iommufd = program.iommufd();
        let args = || vfio_device_bind_iommufd { argsz: 24, iommufd, ..Default::default() };
        let results = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..2)
                .map(|_| scope.spawn(|| program.ioctl(fd, VFIO_DEVICE_BIND_IOMMUFD, &mut args())))
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
        assert!(results.contains(&Err(Errno::INVAL)));
        program.close(fd);
        let again = program.device(&system, 0).unwrap();
        assert!(bind(&program, again, iommufd).is_ok(), "nothing is left of it");
    }
}

#[test]
fn a_closed_device_has_no_user() {
    let (_system, program, fd, _) = open();
    let file = program.file(fd);
    let device = std::sync::Arc::clone(file.device());
    file.write_at(CONFIG + 4, &6u16.to_le_bytes()).unwrap();
    drop(file);
    program.close(fd);
    let mut command = [0; 2];
    device.read(VFIO_PCI_CONFIG_REGION_INDEX, 4, &mut command).unwrap();
    assert_eq!(command[0] & 4, 4, "the registers stay until somebody opens it");
    device.open(std::sync::Arc::new(crate::dma::NoDma)).unwrap();
    device.read(VFIO_PCI_CONFIG_REGION_INDEX, 4, &mut command).unwrap();
    assert_eq!(command[0] & 4, 0);
}

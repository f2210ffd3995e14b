//! The group's door.

use uapi::vfio::{
    VFIO_CHECK_EXTENSION, VFIO_DEVICE_GET_INFO, VFIO_GROUP_GET_DEVICE_FD, VFIO_GROUP_GET_STATUS,
    VFIO_GROUP_SET_CONTAINER, VFIO_GROUP_UNSET_CONTAINER, VFIO_SET_IOMMU,
};

use super::*;
use crate::Errno;

const NAME: &str = "0000:00:05.0";

fn status(program: &Program, group: i32) -> u32 {
    let mut args = [8u32, 0];
    program.ioctl(group, VFIO_GROUP_GET_STATUS, &mut args).unwrap();
    args[1]
}

fn set_container(program: &Program, group: i32, container: i32) -> crate::Result<i32> {
    program.ioctl(group, VFIO_GROUP_SET_CONTAINER, &mut container.to_ne_bytes())
}

fn device(program: &Program, group: i32, name: &str) -> crate::Result<i32> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.push(0);
    program.ioctl(group, VFIO_GROUP_GET_DEVICE_FD, bytes.as_mut_slice())
}

#[test]
#[cfg(feature = "iommufd")]
fn an_iommufd_is_a_container() {
    let (system, program) = (system(), Program::default());
    let group = program.group(&system, 5).unwrap();
    let iommufd = program.iommufd();
    assert_eq!(program.call(iommufd, VFIO_SET_IOMMU, 3), Err(Errno::NODEV));
    assert_eq!(set_container(&program, group, iommufd), Ok(0));
    assert_eq!(set_container(&program, group, iommufd), Err(Errno::INVAL));
    assert_eq!(status(&program, group), 3);
    let fd = device(&program, group, NAME).unwrap();
    assert_eq!(program.call(iommufd, VFIO_SET_IOMMU, 3), Ok(0));
    let mut pages = Pages::new(2);
    pages.bytes()[..3].copy_from_slice(b"dma");
    program.ioctl(iommufd, uapi::vfio::VFIO_IOMMU_MAP_DMA, &mut dma_map(&pages, 0x1000, 2 * PAGE)).unwrap();
    assert_eq!(copy(&program, fd, 0x1000, 0x2000, 3), reg::STATUS_DONE);
    assert_eq!(pages.bytes()[PAGE..PAGE + 3], *b"dma");
    assert_eq!(program.call(group, VFIO_GROUP_UNSET_CONTAINER, 0), Ok(0), "though a device is open");
    assert_eq!(program.call(group, VFIO_GROUP_UNSET_CONTAINER, 0), Err(Errno::INVAL));
    program.close(fd);
    program.close(group);
}

#[test]
#[cfg(feature = "container")]
fn calls_in_each_order() {
    let (system, program) = (system(), Program::default());
    assert_eq!(program.group(&system, 99), Err(Errno::NODEV));
    let group = program.group(&system, 5).unwrap();
    assert_eq!(program.group(&system, 5), Err(Errno::BUSY));
    assert_eq!(program.ioctl(group, VFIO_GROUP_GET_STATUS, &mut [4u32, 0]), Err(Errno::INVAL));
    assert_eq!(program.call(group, VFIO_GROUP_GET_STATUS, 8), Err(Errno::FAULT));
    assert_eq!(status(&program, group), 1);
    assert_eq!(device(&program, group, NAME), Err(Errno::INVAL));
    assert_eq!(program.call(group, VFIO_GROUP_UNSET_CONTAINER, 0), Err(Errno::INVAL));
    assert_eq!(set_container(&program, group, -1), Err(Errno::BADF));
    assert_eq!(set_container(&program, group, 0), Err(Errno::BADFD));
    assert_eq!(program.call(group, VFIO_GROUP_SET_CONTAINER, 8), Err(Errno::FAULT));
    let container = program.container(&system);
    assert_eq!(program.call(container, VFIO_SET_IOMMU, 3), Err(Errno::INVAL));
    assert_eq!(set_container(&program, group, container), Ok(0));
    assert_eq!(set_container(&program, group, container), Err(Errno::INVAL));
    assert_eq!(status(&program, group), 3);
    assert_eq!(device(&program, group, NAME), Err(Errno::INVAL), "the container has no type");
    assert_eq!(program.call(container, VFIO_SET_IOMMU, 99), Err(Errno::NODEV));
    assert_eq!(program.call(container, VFIO_SET_IOMMU, 8), Err(Errno::NODEV));
    assert_eq!(program.call(container, VFIO_SET_IOMMU, 3), Ok(0));
    assert_eq!(program.call(container, VFIO_SET_IOMMU, 3), Err(Errno::INVAL));
    assert_eq!(program.call(container, VFIO_SET_IOMMU, 1), Err(Errno::INVAL));
    for (name, errno) in [
        ("nonsense", Errno::NODEV),
        ("", Errno::NODEV),
        ("0000:00:05.0x", Errno::NODEV),
        ("0000:00:06.0", Errno::NODEV),
        ("0000:00:05.0 foo=1", Errno::INVAL),
        ("0000:00:05.0 vf_token=zz", Errno::INVAL),
        ("0000:00:05.0 vf_token=bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3", Errno::INVAL),
    ] {
        assert_eq!(device(&program, group, name), Err(errno), "{name}");
    }
    assert_eq!(device(&program, group, &"x".repeat(1000)), Err(Errno::INVAL));
    assert_eq!(program.call(group, VFIO_GROUP_GET_DEVICE_FD, 8), Err(Errno::FAULT));
    let first = device(&program, group, "0000:00:05.0 ").unwrap();
    let second = device(&program, group, NAME).unwrap();
    assert_eq!(program.call(group, VFIO_GROUP_UNSET_CONTAINER, 0), Err(Errno::BUSY));
    assert_eq!(program.call(group, VFIO_DEVICE_GET_INFO, 0), Err(Errno::NOTTY));
    #[cfg(feature = "device-cdev")]
    {
        use uapi::vfio::{
            VFIO_DEVICE_ATTACH_IOMMUFD_PT, VFIO_DEVICE_BIND_IOMMUFD, VFIO_DEVICE_DETACH_IOMMUFD_PT,
        };
        let mut bind = [24u32, 0, program.iommufd() as u32, 0, 0, 0];
        assert_eq!(program.ioctl(first, VFIO_DEVICE_BIND_IOMMUFD, &mut bind), Err(Errno::INVAL));
        assert_eq!(program.ioctl(first, VFIO_DEVICE_ATTACH_IOMMUFD_PT, &mut [16u32; 4]), Err(Errno::NOTTY));
        assert_eq!(program.ioctl(first, VFIO_DEVICE_DETACH_IOMMUFD_PT, &mut [12u32; 3]), Err(Errno::NOTTY));
        let node = program.device(&system, 0).unwrap();
        assert_eq!(program.ioctl(node, VFIO_DEVICE_BIND_IOMMUFD, &mut bind), Err(Errno::BUSY));
    }
    program.close(first);
    program.close(group);
    assert_eq!(program.group(&system, 5), Err(Errno::BUSY), "a device is open");
    program.close(second);
    let group = program.group(&system, 5).unwrap();
    assert_eq!(status(&program, group), 1, "the container was left");
    assert_eq!(program.call(container, VFIO_SET_IOMMU, 3), Err(Errno::INVAL), "it has no groups");
}

#[test]
#[cfg(feature = "container")]
fn extensions() {
    let (system, program) = (system(), Program::default());
    let container = program.container(&system);
    let yes = || -> Vec<u64> {
        (0..13).filter(|number| program.call(container, VFIO_CHECK_EXTENSION, *number) == Ok(1)).collect()
    };
    assert_eq!(yes(), [1, 3, 9]);
    let group = program.group(&system, 5).unwrap();
    set_container(&program, group, container).unwrap();
    assert_eq!(yes(), [1, 3, 9]);
    program.call(container, VFIO_SET_IOMMU, 3).unwrap();
    // The kernel's answer to DMA_CC (4) is its IOMMU's; ours is coherent.
    assert_eq!(yes(), [1, 3, 4, 9, 10]);
}

#[test]
#[cfg(feature = "device-cdev")]
fn one_door_at_a_time() {
    use uapi::vfio::VFIO_DEVICE_BIND_IOMMUFD;
    let (system, program) = (system(), Program::default());
    let node = program.device(&system, 0).unwrap();
    let mut bind = [24u32, 0, program.iommufd() as u32, 0, 0, 0];
    assert_eq!(program.ioctl(node, VFIO_DEVICE_BIND_IOMMUFD, &mut bind), Ok(0));
    assert_eq!(program.group(&system, 5), Err(Errno::BUSY));
    assert!(program.group(&system, 6).is_ok(), "another group");
    program.close(node);
    assert!(program.group(&system, 5).is_ok());
}

#[test]
#[cfg(feature = "noiommu")]
fn a_device_without_an_iommu() {
    use crate::doors::{Registration, testing::registration};
    let system = System::new(false);
    let bare = registration("bare", 0, Arc::new(test::function().unwrap()));
    let number = system.add(Registration { hardware: None, ..bare }).unwrap();
    let nodes: Vec<_> = system.nodes().iter().map(ToString::to_string).collect();
    assert!(
        nodes.contains(&"/dev/vfio/noiommu-0".to_owned())
            && !nodes.contains(&"/dev/vfio/devices/vfio0".to_owned())
    );
    let mut program = Program::default();
    program.privileged = false;
    let group = system.group_of(number).unwrap();
    assert_eq!(program.group(&system, group), Err(Errno::PERM));
    program.privileged = true;
    let group = program.group(&system, group).unwrap();
    let container = program.container(&system);
    set_container(&program, group, container).unwrap();
    assert_eq!(program.call(container, VFIO_SET_IOMMU, 3), Err(Errno::NODEV));
    assert_eq!(program.call(container, VFIO_CHECK_EXTENSION, 8), Ok(1));
    assert_eq!(program.call(container, VFIO_SET_IOMMU, 8), Ok(0));
    let fd = device(&program, group, "bare").unwrap();
    let mut pages = Pages::new(1);
    pages.bytes()[..4].copy_from_slice(b"here");
    let at = pages.address();
    assert_eq!(copy(&program, fd, at, at + 100, 4), reg::STATUS_DONE);
    assert_eq!(std::hint::black_box(pages.bytes())[100..104], *b"here");
    assert_eq!(copy(&program, fd, 8, at, 4), reg::STATUS_FAULT);
}

//! The answers are those of the kernel (7.3, vfio-pci), to the same calls in the same order.

#[cfg(feature = "device-cdev")]
mod device;
#[cfg(feature = "group")]
mod group;
#[cfg(feature = "container")]
mod type1;

use std::sync::Arc;

use uapi::vfio::{VFIO_PCI_CONFIG_REGION_INDEX, vfio_iommu_type1_dma_map};

use super::{
    System,
    testing::{Program, registration},
};
use crate::{
    devices::{
        ioat,
        test::{self, registers as reg},
    },
    doors::REGION_SHIFT,
    pci::address::Address,
};

const CONFIG: u64 = (VFIO_PCI_CONFIG_REGION_INDEX as u64) << REGION_SHIFT;
const PAGE: usize = 4096;

/// A system with a test device as number 0 in group 5, and a DMA engine as number 1 in group 6.
fn system() -> Arc<System> {
    let system = System::new(false);
    let test = registration("0000:00:05.0", 5, Arc::new(test::function().unwrap()));
    assert_eq!(system.add(test), Ok(0));
    let ioat = registration("0000:00:06.0", 6, Arc::new(ioat::physical().unwrap()));
    assert_eq!(system.add(ioat), Ok(1));
    system
}

/// Pages of the program's own. Aligned, so that they can be mapped.
struct Pages(Vec<u8>, usize);

impl Pages {
    fn new(count: usize) -> Self {
        let bytes = vec![0; (count + 1) * PAGE];
        let start = bytes.as_ptr().addr().next_multiple_of(PAGE) - bytes.as_ptr().addr();
        Self(bytes, start)
    }

    fn address(&self) -> u64 {
        (self.0.as_ptr().addr() + self.1) as u64
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.0[self.1..]
    }
}

fn dma_map(pages: &Pages, iova: u64, size: usize) -> vfio_iommu_type1_dma_map {
    vfio_iommu_type1_dma_map { argsz: 32, flags: 3, vaddr: pages.address(), iova, size: size as u64 }
}

/// Lets the test device copy `length` bytes: how it ended.
fn copy(program: &Program, fd: i32, source: u64, target: u64, length: u32) -> u32 {
    let file = program.file(fd);
    file.write_at(CONFIG + 4, &6u16.to_le_bytes()).unwrap();
    file.write_at(reg::SOURCE, &source.to_le_bytes()).unwrap();
    file.write_at(reg::TARGET, &target.to_le_bytes()).unwrap();
    file.write_at(reg::LENGTH, &length.to_le_bytes()).unwrap();
    file.write_at(reg::COMMAND, &reg::COMMAND_COPY.to_le_bytes()).unwrap();
    let mut status = [0; 4];
    file.read_at(reg::STATUS, &mut status).unwrap();
    u32::from_le_bytes(status)
}

/// What `examples/nodes.rs` and `mixes.sh` look at from outside.
#[test]
fn nodes_are_those_of_the_mix() {
    let nodes: Vec<_> = system().nodes().iter().map(ToString::to_string).collect();
    let has = |node: &str| nodes.iter().filter(|found| *found == node).count();
    assert_eq!(has("/dev/iommu"), usize::from(cfg!(feature = "iommufd")));
    let container = cfg!(any(feature = "container", feature = "iommufd-container"));
    assert_eq!(has("/dev/vfio/vfio"), usize::from(container));
    for group in ["/dev/vfio/5", "/dev/vfio/6"] {
        assert_eq!(has(group), usize::from(cfg!(feature = "group")));
    }
    for device in ["/dev/vfio/devices/vfio0", "/dev/vfio/devices/vfio1"] {
        assert_eq!(has(device), usize::from(cfg!(feature = "device-cdev")));
    }
    assert_eq!(system().missing_container().is_some(), cfg!(feature = "group") && !container);
}

#[test]
fn devices_come_and_go() {
    let system = system();
    let again = registration("0000:00:05.0", 9, Arc::new(test::function().unwrap()));
    assert!(system.add(again).is_err(), "the name is taken");
    assert_eq!(system.group_of(1), Some(6));
    let before = system.nodes().len();
    system.remove(1);
    assert_eq!(system.group_of(1), None);
    assert!(system.nodes().len() < before);
    let bare = |name| registration(name, 9, Arc::new(test::function().unwrap()));
    let first = super::Registration { number: Some(0), ..bare("0000:00:09.0") };
    assert_eq!(system.add(first).unwrap_err(), super::SystemError::Number(0));
    let far = super::Registration { number: Some(7), ..bare("0000:00:09.0") };
    assert_eq!(system.add(far), Ok(7));
    assert_eq!(system.add(bare("0000:00:0a.0")), Ok(1), "the lowest that is free");
}

#[test]
fn virtual_functions_follow_their_number() {
    let system = system();
    let make = |_, at: Address| {
        Some(registration(&at.to_string(), 100 + u64::from(at.devfn), ioat::virtual_function().ok()?))
    };
    let token = super::Token::physical();
    let layout = (ioat::TOTAL_VFS, ioat::VF_OFFSET, ioat::VF_STRIDE);
    let vfs = super::VirtualFunctions::new(
        &system,
        Address { segment: 0, bus: 0, devfn: 0x30 },
        layout,
        token,
        make,
    );
    assert_eq!((vfs.total(), vfs.count()), (7, 0));
    assert_eq!(vfs.set(8), Err(crate::Errno::RANGE));
    assert_eq!(vfs.set(2), Ok(()));
    assert_eq!(vfs.set(2), Ok(()));
    assert_eq!(vfs.set(3), Err(crate::Errno::BUSY));
    assert_eq!((vfs.count(), vfs.address(0).devfn, vfs.address(1).devfn), (2, 0xb0, 0xb2));
    let group = |number: usize| vfs.devices()[number].and_then(|device| system.group_of(device));
    assert_eq!((group(0), group(1)), (Some(100 + 0xb0), Some(100 + 0xb2)));
    assert_eq!(vfs.unbind(2), Err(crate::Errno::NODEV));
    assert_eq!(vfs.bind(0), Err(crate::Errno::BUSY));
    assert_eq!((vfs.unbind(0), vfs.unbind(0)), (Ok(()), Err(crate::Errno::NODEV)));
    assert_eq!((vfs.count(), group(0), group(1)), (2, None, Some(100 + 0xb2)));
    assert_eq!((vfs.bind(0), group(0)), (Ok(()), Some(100 + 0xb0)));
    assert_eq!(vfs.set(0), Ok(()));
    assert_eq!((vfs.count(), vfs.devices().len()), (0, 0));
}

/// Not random bytes forever, but the same ones each time.
#[test]
fn any_bytes_have_an_answer() {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut bytes = [0; 480];
    for _ in 0..200 {
        for byte in &mut bytes {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *byte = (state >> 32) as u8;
        }
        super::testing::fuzz_regions(&bytes);
        #[cfg(feature = "device-cdev")]
        super::testing::fuzz_ioctl(&bytes);
    }
}

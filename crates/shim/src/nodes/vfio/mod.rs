//! `/dev/vfio`: the devices that the program was given, and what sysfs says of them.
//!
//! They are made when the program first looks for one, not in each process that only starts another: a device may hold a file
//! open.

mod functions;
mod sysfs;

use std::{
    os::fd::OwnedFd,
    sync::{Arc, OnceLock},
};

use iommufd::{Errno, Result, process::UserAddr};
use vfio::doors::{
    Caller, DeviceFile, Mapping as DeviceMapping, Node as VfioNode, Opened as VfioOpened, System,
    container::Container, group::GroupFile,
};

use crate::{
    caller::ShimCaller,
    node::{Mappable, Mapping, Metadata, Node, Opened, ServedFile},
    tree::{self, Plan},
};
use functions::Functions;

/// The major numbers that the nodes show: such as Linux leaves to drivers that ask for any.
const GROUP_MAJOR: u32 = 510;
const DEVICE_MAJOR: u32 = 511;

/// `/dev/vfio/vfio` is one of the miscellaneous devices.
const CONTAINER: (u32, u32) = (10, 196);

static SPECIFIED: OnceLock<Vec<String>> = OnceLock::new();
static DEVICES: OnceLock<Functions> = OnceLock::new();

/// The devices will be these; their files are added to the plan.
pub(crate) fn set(specifications: Vec<String>, plan: &mut Plan) {
    if !specifications.is_empty() {
        plan.tops.extend(sysfs::TOPS.map(str::to_owned));
        plan.entries.push(sysfs::entries);
        plan.attribute = Some(sysfs::attribute);
    }
    let _ = SPECIFIED.set(specifications);
}

fn devices() -> Option<&'static Functions> {
    let specifications = SPECIFIED.get().filter(|specifications| !specifications.is_empty())?;
    Some(DEVICES.get_or_init(|| Functions::new(specifications)))
}

/// The node at `path`.
pub(crate) fn find(path: &str) -> Option<Arc<dyn Node>> {
    let name = path.strip_prefix("/dev/vfio/")?;
    let devices = devices()?;
    // Without a tree nobody has changed anything.
    if let Ok(tree) = tree::lock() {
        devices.follow(&tree);
    }
    let node = devices.system.nodes().into_iter().find(|node| {
        let there = node.to_string();
        there.strip_prefix("/dev/vfio/") == Some(name)
    })?;
    Some(Arc::new(DoorNode { system: Arc::clone(&devices.system), node }))
}

/// A node of `/dev/vfio`.
struct DoorNode {
    system: Arc<System>,
    node: VfioNode,
}

impl Node for DoorNode {
    fn open(&self, _flags: i32) -> Result<Opened> {
        let metadata = self.metadata();
        Ok(Opened::Served(match &self.node {
            VfioNode::Container => Arc::new(Door::Container(self.system.open_container())),
            VfioNode::Group { number, .. } => {
                Arc::new(Door::Group(self.system.open_group(&*ShimCaller::get(), *number)?))
            }
            VfioNode::Device { number } => {
                Arc::new(Door::Device(self.system.open_device(*number)?, metadata))
            }
            VfioNode::Iommufd | VfioNode::IommufdContainer => return Err(Errno::NOENT),
        }))
    }

    fn metadata(&self) -> Metadata {
        let rdev = match &self.node {
            VfioNode::Group { number, .. } => (GROUP_MAJOR, *number),
            VfioNode::Device { number } => (DEVICE_MAJOR, *number),
            _ => CONTAINER,
        };
        Metadata { mode: libc::S_IFCHR | 0o600, rdev }
    }
}

/// What opening such a node gives, or a group gave out.
enum Door {
    Container(Arc<Container>),
    Group(Arc<GroupFile>),
    Device(Arc<DeviceFile>, Metadata),
}

/// What serves a device that a group gave out.
pub(crate) fn device(device: Arc<DeviceFile>) -> Arc<dyn ServedFile> {
    Arc::new(Door::Device(device, Metadata { mode: libc::S_IFREG | 0o600, rdev: (0, 0) }))
}

impl ServedFile for Door {
    fn ioctl(&self, caller: &dyn Caller, request: u32, argument: UserAddr) -> Result<i32> {
        match self {
            Self::Container(container) => container.ioctl(caller, request, argument),
            Self::Group(group) => group.ioctl(caller, request, argument),
            Self::Device(device, _) => device.ioctl(caller, request, argument),
        }
    }

    fn read(&self, to: &mut [u8]) -> Result<usize> {
        self.read_at(0, to)
    }

    fn write(&self, from: &[u8]) -> Result<usize> {
        self.write_at(0, from)
    }

    fn read_at(&self, offset: u64, to: &mut [u8]) -> Result<usize> {
        match self {
            Self::Device(device, _) => device.read_at(offset, to),
            _ => Err(Errno::INVAL),
        }
    }

    fn write_at(&self, offset: u64, from: &[u8]) -> Result<usize> {
        match self {
            Self::Device(device, _) => device.write_at(offset, from),
            _ => Err(Errno::INVAL),
        }
    }

    fn mmap(&self, offset: u64, length: u64, _prot: i32, shared: bool) -> Result<Mappable> {
        let Self::Device(device, _) = self else { return Err(Errno::NODEV) };
        Ok(match device.mmap(offset, length, shared)? {
            DeviceMapping::Memory { file, offset } => {
                let fd: OwnedFd = file;
                Mappable::Pages(Mapping { fd, offset, guard: Arc::clone(device) as _ })
            }
            DeviceMapping::Registers => Mappable::Registers(Arc::clone(device)),
        })
    }

    fn metadata(&self) -> Option<Metadata> {
        match self {
            Self::Device(_, metadata) => Some(*metadata),
            _ => None,
        }
    }

    fn opened(&self) -> VfioOpened {
        match self {
            Self::Container(container) => VfioOpened::Container(Arc::clone(container)),
            Self::Group(group) => VfioOpened::Group(Arc::clone(group)),
            Self::Device(device, _) => VfioOpened::Device(Arc::clone(device)),
        }
    }
}
